"""Read from the graph which tokens an attention mask can hide."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from uta_fx.passes.count_selected import count_selected, counted
from uta_fx.passes.read_node import NEGATIONS, VIEWS, argument, name_of, written_by
from uta_fx.passes.site import recorded
from uta_fx.passes.trace_axes import Size, number_of, plain, same
from uta_fx.passes.walk_upstream import constant_of

HIDING = -9984.0
"""What is added to a logit hides its key from here on: models add -10000, in bfloat16 this."""


def hides(
    mask: Node, start: Size, stop: Size, *, trusted: bool = False, inverted: bool = False
) -> str | None:
    """Why a mask may do more than hide keys outside ``[start, stop)`` from everyone, or None.

    The queries in ``[start, stop)``, the video, must all see the same keys, among them every key in
    ``[start, stop)``. What the other queries see does not matter. Proved from how the graph builds
    the mask, not from its values, which a run decides.

    Args:
        mask: Broadcasts to ``[B, H, Lq, Lk]``; boolean (True: seen) or added to the logits.
        start: First token of the video.
        stop: One past its last.
        trusted: Prove alone that it is one of keys, or one of keys and one of queries, and not that
            they show the video: a run checks that.
        inverted: Whether a boolean mask is True where keys are hidden.
    """
    value = recorded(mask)
    if value.dim() < 2:
        return f"its attention mask has {value.dim()} dimensions"
    boolean = value.dtype == torch.bool
    rows = value.shape[-2]
    parts = [(mask, boolean and not inverted)]
    if not (isinstance(rows, int) and rows == 1):
        # [.., Lq, Lk] is a mask of keys where it is one of queries and one of keys, and the video's
        # part of the former shows everything
        parts = _operands(mask, not inverted) if boolean else []
        if not parts:
            return "its attention mask differs from query to query"
    for part, want in parts:
        keys, queries = _constant(part, -2), len(parts) > 1 and _constant(part, -1)
        if not keys and not queries:
            return "its attention mask differs from query to query"
        if not trusted and not _always(part, -1 if keys else -2, start, stop, want):
            return "the graph does not show that its attention mask leaves all video tokens seen"
    # a proof sees how tensors are made, and not what is written into them later
    if not (trusted and parts[0][0] is mask and _is(rows, 1)) and _is_written(mask):
        return "its attention mask is made of a tensor that is written to"
    return None


def shows_all(mask: Node, *, inverted: bool = False) -> bool:
    """Whether a mask provably hides nothing; of one of known length alone.

    Args:
        mask: As in ``hides``.
        inverted: Likewise.
    """
    want = recorded(mask).dtype == torch.bool and not inverted
    keys = _sizes(mask)[-1:]
    if not (keys and isinstance(keys[0], int)):
        return False
    return _always(mask, -1, 0, keys[0], want) and not _is_written(mask)


def pads(mask: Node, *, trusted: bool = False, inverted: bool = False) -> str | None:
    """Why a mask may do more than hide the last keys of each sample from all queries, or None.

    Args:
        mask: As in ``hides``.
        trusted: Prove alone that all queries see the same keys, and not that these come first: a
            run checks that.
        inverted: As in ``hides``.
    """
    value = recorded(mask)
    if value.dim() < 2:
        return f"its attention mask has {value.dim()} dimensions"
    one_row = _is(value.shape[-2], 1)
    if not _constant(mask, -2):
        return "its attention mask differs from query to query"
    boolean = value.dtype == torch.bool
    if not trusted and not (_first(mask, not inverted) if boolean else _added(mask)):
        return (
            "the graph does not show that its attention mask hides the end of each sample's tokens"
            " alone; trust_masks=True takes it to"
        )
    if not (trusted and one_row) and _is_written(mask):
        return "its attention mask is made of a tensor that is written to"
    return None


def _is_written(mask: Node) -> bool:
    """Whether an operation may write into a tensor that a mask is made of.

    One that takes a new tensor, and alone takes it, is what it would be out of place.
    """
    made_of: set[Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node not in made_of:
            made_of.add(node)
            stack += node.all_input_nodes
    stack = list(made_of)
    while stack:
        node = stack.pop()
        for user in node.users:
            alone = name_of(node) in _NEW and len(node.users) == 1 and user in made_of
            if node in written_by(user) and not alone:
                return True
            if user not in made_of and name_of(user) in (*VIEWS, *_ALIKE):
                made_of.add(user)
                stack.append(user)
    return False


_NEW = (
    "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like",
    "full_like",
)  # fmt: skip


def _operands(node: Node, want: bool) -> list[tuple[Node, bool]]:
    """The masks that must all be so (second: True or False) for a mask to be so."""
    if (same_one := _of_the_same_truth(node)) is not None:
        return _operands(same_one, want)
    if (other := _negated(node)) is not None:
        return _operands(other, not want)
    if name_of(node) in (_ANDS if want else _ORS) and len(node.all_input_nodes) == 2:
        return [part for x in node.all_input_nodes for part in _operands(x, want)]
    return [(node, want)]


_ANDS = ("and", "logical_and", "bitwise_and", "mul")
_ORS = ("or", "logical_or", "bitwise_or")


def _of_the_same_truth(node: Node) -> Node | None:
    """What a node is 1 where that is 1, and 0 where it is 0: of a cast, or ``mask > 0``."""
    name, (a, b) = name_of(node), _both(node)
    if isinstance(b, (int, float)):
        asks = {"ne": b == 0, "eq": b == 1, "gt": 0 <= b < 1, "ge": 0 < b <= 1}.get(name, False)
    else:
        asks = name in _CASTS
    return a if asks and isinstance(a, Node) else None


_CASTS = (
    "bool", "to", "int", "long", "float", "half", "bfloat16", "double", "type", "type_as",
    "to_copy", "contiguous", "clone", "alias",
)  # fmt: skip


def _negated(node: Node) -> Node | None:
    """What a node is 0 where that is 1, and 1 where it is 0: ``~mask``, ``mask == 0``, 1 - mask."""
    name, (a, b) = name_of(node), _both(node)
    if name == "sub":
        one, x = (b, a) if "rsub" in str(node.target) else (a, b)
        weighed = argument(node, 2, "alpha", 1) != 1
        return x if _fits(constant_of(one), True) and isinstance(x, Node) and not weighed else None
    if name == "eq":
        return a if _fits(b, False) else None
    return a if name in NEGATIONS and recorded(a).dtype == torch.bool else None


def _constant(node: Node, dim: int) -> bool:
    """Whether all entries along a dimension are the same one."""
    value, name = recorded(node), name_of(node)
    if value.dim() < -dim or _is(value.shape[dim], 1):
        return True
    if name in ("expand", "repeat"):
        return _constant(argument(node, 0, "input"), dim)
    if (source := _of_the_same_truth(node) or _negated(node)) is not None:
        return _constant(source, dim)
    if name in ("transpose", "permute"):
        return _constant(argument(node, 0, "input"), _transposed(node, dim))
    return False


def _transposed(node: Node, dim: int) -> int:
    rank = recorded(node).dim()
    if name_of(node) == "permute":
        dims = argument(node, 1, "dims")
        dims = dims if isinstance(dims, (tuple, list)) else node.args[1:]
        return dims[dim] % rank - rank
    a, b = (argument(node, i, f"dim{i - 1}") % rank for i in (1, 2))
    place = dim % rank
    return (b if place == a else a if place == b else place) - rank


def _always(node: Any, dim: int, start: Size, stop: Size, want: bool) -> bool:
    """Whether every entry whose index along ``dim`` (from the end) is in ``[start, stop)`` is so.

    Args:
        node: A tensor in the graph, or a number.
        dim: Negative.
        start: First index.
        stop: One past the last.
        want: True: 1; False: 0.
    """
    if not isinstance(node, Node):
        return _fits(node, want)
    name = name_of(node)
    shape = _sizes(node)
    if len(shape) < -dim or (isinstance(shape[dim], int) and shape[dim] < stop):
        return False
    if name in ("ones", "new_ones", "ones_like"):
        return want
    if name in ("zeros", "new_zeros", "zeros_like"):
        return not want
    if name in ("full", "new_full", "full_like"):
        return _fits(argument(node, 2 if name == "new_full" else 1, "fill_value"), want)
    if name in _TURNED and dim == -1 and (known := _compared(node, start, stop)) is not None:
        return known == want
    if (same_one := _of_the_same_truth(node)) is not None:
        return _always(same_one, dim, start, stop, want)
    if (other := _negated(node)) is not None:
        return _always(other, dim, start, stop, not want)
    if name in (*_ANDS, *_ORS):
        both = [_always(x, dim, start, stop, want) for x in _both(node)]
        if want and name in _ORS and recorded(node).dtype != torch.bool:
            return False  # 1 | 2 is 3
        return all(both) if want == (name in _ANDS) else any(both)
    if name in ("masked_fill", "where"):
        condition, *values = chosen(node)
        return all(
            _fits(constant_of(value), want)
            or _always(value, dim, start, stop, want)
            or _always(condition, dim, start, stop, not chosen)
            for value, chosen in zip(values, (True, False), strict=True)
        )
    if name in ("cat", "pad", "constant_pad_nd"):
        pieces = _pieces(node, dim, start, stop)
        return pieces is not None and all(_always(x, dim, a, b, want) for x, a, b in pieces)
    if name in ("transpose", "permute"):
        return _always(argument(node, 0, "input"), _transposed(node, dim), start, stop, want)
    if name in ("unsqueeze", "view", "reshape", "expand", "repeat", "getitem"):
        return _reshaped(node, dim, start, stop, want)
    return False


def _compared(node: Node, start: Size, stop: Size) -> bool | None:
    """What all of ``[start, stop)`` of ``arange(N) < bound`` or the like is, if that is known."""
    name, (index, bound) = name_of(node), _both(node)
    if not _is_arange(index):
        name, index, bound = _TURNED[name], bound, index
    if not _is_arange(index):
        return None
    below = name in ("lt", "le")
    # arange <= bound is arange < bound + 1, and > and >= are what these are not
    itself = int(name in ("le", "gt"))
    if _at_least(bound, stop - itself):
        return below
    number = number_of(bound)
    if isinstance(number, (int, torch.SymInt)) and statically_known_true(number <= start - itself):
        return not below
    return None


_TURNED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
"""Comparisons, with their operands the other way round."""


def _fits(number: Any, want: bool) -> bool:
    """Whether a number is one (which no cast makes zero), or zero."""
    return isinstance(number, (int, float)) and number == (1 if want else 0)


def _pieces(node: Node, dim: int, start: Size, stop: Size) -> list[tuple[Any, Size, Size]] | None:
    """What ``cat`` or ``pad`` put into ``[start, stop)``: a tensor or number, and where in it."""
    rank = recorded(node).dim()
    parts: list[tuple[Any, Any]]
    if name_of(node) == "cat":
        along = argument(node, 1, "dim", 0) % rank - rank
        parts = [(x, _sizes(x)[along]) for x in argument(node, 0, "tensors")]
        if along != dim:
            return [(x, start, stop) for x, _ in parts]
    else:
        counts = count_selected(node.graph)
        pads = [counted(number_of(pad), counts) for pad in argument(node, 1, "pad")]
        if len(pads) != 2 or dim != -1:
            return None
        place = 3 if name_of(node) == "pad" else 2
        source, value = argument(node, 0, "input"), argument(node, place, "value") or 0
        parts = [(value, pads[0]), (source, _sizes(source)[-1]), (value, pads[1])]
    pieces, done = [], 0
    for x, size in parts:
        if start == stop:
            break
        if not isinstance(size, int):
            return None
        if done + size > start:
            end = min(stop, done + size)
            pieces.append((x, start - done, end - done))
            start = end
        done += size
    return pieces if start == stop else None


def _reshaped(node: Node, dim: int, start: Size, stop: Size, want: bool) -> bool:
    """Through operations that put dimensions of size 1 in, or repeat along them."""
    source = argument(node, 0, "input")
    if not isinstance(source, Node) or not isinstance(recorded(source), torch.Tensor):
        return False
    old, new = list(recorded(source).shape), list(recorded(node).shape)
    if name_of(node) == "getitem" and not _takes_all(node):
        return False
    place = len(new) + dim
    if name_of(node) in ("expand", "repeat"):
        inside = place - (len(new) - len(old))
        if inside < 0 or _is(old[inside], 1):
            # the one entry of the source stands for all
            return inside >= 0 and _always(source, inside - len(old), 0, 1, want)
        if not _is(old[inside], new[place]):
            return False
    else:
        # by which number among the dimensions that are not 1
        if _is(new[place], 1):
            return False
        which = sum(not _is(size, 1) for size in new[:place])
        long = [i for i, size in enumerate(old) if not _is(size, 1)]
        if len(long) != sum(not _is(size, 1) for size in new) or not _is(
            old[long[which]], new[place]
        ):
            return False
        inside = long[which]
    return _always(source, inside - len(old), start, stop, want)


def _takes_all(node: Node) -> bool:
    """Whether an index leaves nothing out."""
    index = argument(node, 1, "other")
    index = index if isinstance(index, tuple) else (index,)
    whole = (None, Ellipsis, slice(None))
    return all(any(entry is w or entry == w for w in whole) for entry in index)


def _first(node: Any, want: bool) -> bool:
    """Whether the entries of each row before some bound are 1, and all others 0.

    Args:
        node: Rows are its last dimension.
        want: False: 0, and all others 1.
    """
    if not isinstance(node, Node):
        return False
    name = name_of(node)
    if (other := _negated(node)) is not None:
        return _first(other, not want)
    if name in ("lt", "le", "gt", "ge"):
        index, bound = _both(node)
        below = name in ("lt", "le")
        if _is_arange(bound):
            index, bound, below = bound, index, not below
        if _is_arange(index):
            return _is_one(bound) and below == want
    if name in ("masked_fill", "where"):
        condition, value, x = chosen(node)
        all_ones = isinstance(x, Node) and _always(x, -1, 0, _sizes(x)[-1], True)
        return want and all_ones and _fits(constant_of(value), False) and _first(condition, False)
    source = _of_the_same_rows(node) or _of_the_same_truth(node)
    return source is not None and _first(source, want)


def _added(node: Any) -> bool:
    """Whether the entries of each row before some bound are 0, and all others hide a key."""
    if not isinstance(node, Node):
        return False
    name = name_of(node)
    if name == "where":
        condition, a, b = chosen(node)
        return any(
            _fits(constant_of(shown), False) and _is_hiding(hidden) and _first(condition, want)
            for shown, hidden, want in ((a, b, True), (b, a, False))
        )
    if name == "masked_fill":
        x, condition, value = _filled(node)
        all_zeros = isinstance(x, Node) and _always(x, -1, 0, _sizes(x)[-1], False)
        return all_zeros and _is_hiding(value) and _first(condition, False)
    if name == "mul":
        return any(
            _is_hiding(factor) and factor != -torch.inf and _first(x, False)
            for x, factor in (_both(node), _both(node)[::-1])
        )
    source = _of_the_same_rows(node)
    return source is not None and _added(source)


def _both(node: Node) -> tuple[Any, Any]:
    """The operands of an operation of two."""
    return argument(node, 0, "input"), argument(node, 1, "other")


def _filled(node: Node) -> tuple[Any, Any, Any]:
    """Tensor, mask and value of ``masked_fill``."""
    return argument(node, 0, "input"), argument(node, 1, "mask"), argument(node, 2, "value")


def chosen(node: Node) -> tuple[Any, Any, Any]:
    """Of ``where`` and ``masked_fill`` the condition, what is taken where it is True, and else."""
    if name_of(node) == "masked_fill":
        x, condition, value = _filled(node)
        return condition, value, x
    first, second, other = (argument(node, *x) for x in enumerate(("condition", "input", "other")))
    return (second, first, other) if node.op == "call_method" else (first, second, other)


def _is_hiding(number: Any) -> bool:
    number = constant_of(number)
    return number is not None and number <= HIDING


def _is_one(bound: Any) -> bool:
    """Whether a bound is one number for each row."""
    value = number_of(bound)
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 or _is(value.shape[-1], 1)
    return isinstance(value, (int, float, torch.SymInt))


_ALIKE = (
    "unsqueeze", "expand", "repeat", "view", "reshape", "to", "to_copy", "getitem", "bool", "int",
    "long", "float", "type_as", "contiguous", "clone",
)  # fmt: skip


def _of_the_same_rows(node: Node) -> Node | None:
    """What a node is a view, a copy or a cast of, with the same last dimension."""
    source = argument(node, 0, "input")
    if name_of(node) not in _ALIKE or not isinstance(source, Node):
        return None
    value = recorded(source)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    kept = _is(value.shape[-1], recorded(node).shape[-1])
    return source if kept and (name_of(node) != "getitem" or _takes_all(node)) else None


def _is_arange(node: Any) -> bool:
    """``arange(N)`` from 0 in steps of 1 along the last dimension, in a dtype that holds it."""
    if not isinstance(node, Node) or getattr(recorded(node), "dtype", None) not in _EXACT:
        return False
    source = _of_the_same_rows(node)
    if source is not None:
        return _is_arange(source)
    if name_of(node) != "arange":
        return False
    start, *rest = node.args if len(node.args) > 1 else (0, *node.args)
    if isinstance(start, Node) or start != 0:
        return False
    return len(rest) == 1 and not {"start", "step"} & node.kwargs.keys()


_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


def _at_least(node: Any, bound: Size) -> bool:
    """Whether a number for each sample is ``bound`` and a count, which is not negative."""
    number = number_of(node)
    if isinstance(number, (int, torch.SymInt)):
        return statically_known_true(number >= bound)
    if not isinstance(node, Node):
        return False
    name = name_of(node)
    if name in ("unsqueeze", "view", "to", "int", "long", "reshape"):
        return _at_least(argument(node, 0, "input"), bound)
    if name == "add" and argument(node, 2, "alpha", 1) == 1:
        sides = _both(node)
        return any(
            isinstance(number_of(a), (int, torch.SymInt))
            and statically_known_true(number_of(a) >= bound)
            and _is_count(b)
            for a, b in (sides, sides[::-1])
        )
    return False


def _is_count(node: Any) -> bool:
    """The sum of a mask: of truths, or of what a run is given for them, which is not negative."""
    if not isinstance(node, Node) or name_of(node) != "sum":
        return False
    summed = [argument(node, 0, "input")]
    while summed:
        x = summed.pop()
        if not isinstance(x, Node):
            return False
        if x.op == "placeholder" or getattr(recorded(x), "dtype", None) == torch.bool:
            continue
        if name_of(x) not in _THE_SAME_NUMBERS:
            return False
        summed += x.all_input_nodes
    return True


_THE_SAME_NUMBERS = (*_ALIKE, "cat", "squeeze", "flatten", "slice", "select", "detach", "alias")
"""Operations after which no number is another: in dtypes, places and shapes alone."""


def _sizes(node: Node) -> list[Any]:
    return [plain(size) for size in recorded(node).shape]


def _is(a: Any, b: Any) -> bool:
    return all(isinstance(size, (int, torch.SymInt)) for size in (a, b)) and same(a, b)
