"""What each operation does to a stretch of tokens whose order has changed.

Say that a *place* of a tensor, ``tokens`` positions from ``start`` on along ``dim``, is permuted
by some fixed permutation. A rule of ``needs`` names the places of the operands that must be
permuted in the same way for a place of the output to come out permuted and all else the same: the
operation commutes with the permutation. What has no rule, or where the rule returns None, does not.
``discards`` tells where the order of an operand does not reach the output at all: sums over the
tokens, a softmax over permuted keys with their values, a slice of the text beside them.

Nothing here knows of models; that a rule is right can be checked by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from uta_fx.passes.match_operators import Fused, match_operator, operands_of
from uta_fx.passes.read_mask import hides
from uta_fx.passes.read_node import (
    VIEWS,
    argument,
    equation_of,
    is_call,
    name_of,
    reduced_dims,
    written_by,
)
from uta_fx.passes.site import recorded
from uta_fx.passes.trace_axes import CONSTANTS, Size, index_entries, number_of, plain, same


class Place(NamedTuple):
    """Where permuted tokens lie in a tensor.

    Attributes:
        dim: The dimension, not negative.
        start: The first of them.
        times: How many equal parts the dimension has, one after another, where outer dimensions
            such as batches are merged with the tokens; in each part they start at ``start``.
        width: How many entries each token has there, where inner dimensions are merged with them.
    """

    dim: int
    start: int
    times: int = 1
    width: int = 1

    @property
    def merged(self) -> bool:
        """Whether the dimension is that of the tokens and others."""
        return (self.times, self.width) != (1, 1)


Needs = dict[Node, Place]
Rule = Callable[[Node, Place, Size], Needs | None]

ATTENTION = "scaled_dot_product_attention"


def needs(node: Node, place: Place, tokens: Size) -> Needs | None:
    """Places of the operands that make a place of the output come out permuted, or None.

    Operands that are not named must not be permuted, except where ``discards`` lets them be.

    Args:
        node: An operation. One with several outputs (``split``) has the place of its input, one
            that writes (``setitem``) that of what it writes to.
        place: Of its output.
        tokens: How many are permuted.
    """
    rule = _rule_of(node)
    if rule is None or node.kwargs.get("out") is not None:
        return None
    try:
        found = rule(node, place, tokens) if _fits(node, place, tokens) else None
        if place.merged and found and rule is not _reshape:
            if rule not in _ANY_ORDER:
                return None
            found = {x: place._replace(dim=at.dim) for x, at in found.items()}
        if found is None or not all(_fits(x, at, tokens) for x, at in found.items()):
            return None
        return found
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # arguments in a form, or sizes, that the rule does not know


def places_from(node: Node, operand: Node, place: Place, tokens: Size) -> Iterator[Place]:
    """Places of the output that come out permuted when this place of this operand is."""
    if not is_call(node):
        return
    value = recorded(node)
    if not isinstance(value, torch.Tensor) and isinstance(argument(node, 0, "input"), Node):
        value = recorded(argument(node, 0, "input"))
    rank = value.dim() if isinstance(value, torch.Tensor) else place.dim + 1
    starts = {place.start: None} | dict.fromkeys(x + place.start for x in _shifts(node, operand))
    candidates = [place] + [place._replace(dim=dim, start=x) for dim in range(rank) for x in starts]
    if _RULES.get(name_of(node)) is _reshape and isinstance(value, torch.Tensor):
        reshaped = _reshaped(_shape(operand), _shape(node), place)
        candidates = [] if reshaped is None else [reshaped]
    for candidate in candidates:
        found = needs(node, candidate, tokens) if candidate.start >= 0 else None
        if found is None:
            continue
        like = candidate == place and name_of(node) in _LIKE and operand is node.all_input_nodes[0]
        if like or found.get(operand) == place:
            yield candidate
            return


def discards(
    node: Node, operand: Node, place: Place, tokens: Size, places: Callable[[Node], set[Place]]
) -> bool:
    """Whether the order of an operand's place does not reach the output.

    Args:
        node: An operation.
        operand: One of its inputs.
        place: Permuted in it.
        tokens: How many are permuted.
        places: Where each input is permuted.
    """
    name = name_of(node)
    if name in _SHAPES or (name == "getattr" and not isinstance(recorded(node), torch.Tensor)):
        return True
    if name in CONSTANTS:
        return True
    if name in _AFTER_ANOTHER and operand is not argument(node, 0, "input"):
        return True
    if name == "copy" and operand is not argument(node, 1, "src") and not written_by(node):
        return True
    if place.merged:
        return False
    try:
        for group in _summed(node):
            dims = group.get(operand)
            if dims is not None and place.dim in dims:
                return all(
                    any(Place(dim, place.start) in places(x) for dim in where)
                    for x, where in group.items()
                ) and not _masked(node, place.start, tokens)
        return _leaves_out(node, operand, place, tokens)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def may_alias(node: Node) -> list[Node]:
    """The inputs with which an output may share memory."""
    if not is_call(node):
        return []
    name = name_of(node)
    written = written_by(node)
    if written:
        return list(written)
    if not isinstance(recorded(node), (torch.Tensor, tuple, list)):
        return []
    if name in VIEWS:
        source = argument(node, 0, "input")
        return [source] if isinstance(source, Node) else []
    if _rule_of(node) is not None:
        return []
    # an operation that is not known may return what it was given
    return [x for x in node.all_input_nodes if isinstance(recorded(x), (torch.Tensor, tuple, list))]


def _rule_of(node: Node) -> Rule | None:
    if operands_of(node) is not None:
        return _operator
    return _RULES.get(name_of(node))


def _fits(node: Node, place: Place, tokens: Size) -> bool:
    """Whether a place lies in a value, for all that is known of its size."""
    value = recorded(node)
    if not isinstance(value, torch.Tensor):
        node = (operands_of(node) or (_first(node),))[0]
    shape = _shape(node)
    if not 0 <= place.dim < len(shape) or place.start < 0:
        return False
    size, each = shape[place.dim], place.times * place.width
    holds = statically_known_true((place.start + tokens) * each <= size)
    return holds and (each == 1 or same(size % each, 0))


# ---- helpers -------------------------------------------------------------------------------------


def _shape(node: Node) -> Sequence[Size]:
    return [plain(size) for size in recorded(node).shape]


def _tensors(node: Node) -> list[Node]:
    return [x for x in node.all_input_nodes if isinstance(recorded(x), torch.Tensor)]


def _first(node: Node) -> Node:
    first = argument(node, 0, "input")
    if not isinstance(first, Node):
        raise TypeError(f"{node.name} has no tensor in front")
    return first


def _dim(node: Node, place: int, name: str, default: int, rank: int) -> int:
    dim = argument(node, place, name, default)
    if not isinstance(dim, int):
        raise TypeError(f"{node.name} has no plain dimension")
    return dim % rank


def _aligned(operands: Sequence[Node], dim: int, start: int, size: Size, rank: int) -> Needs | None:
    """Needs of operands that are broadcast against each other, dimensions aligned at the end."""
    found: Needs = {}
    for x in operands:
        shape = _shape(x)
        place = dim - rank + len(shape)
        if place < 0 or (same(shape[place], 1) and not same(size, 1)):
            continue
        if not same(shape[place], size):
            return None
        found[x] = Place(place, start)
    return found


def _inside(place: Place, begin: Size, size: Size, tokens: Size) -> bool | None:
    """Whether the tokens lie in ``[begin, begin + size)``: all True, none False, some None."""
    if not isinstance(begin, int):
        return None
    if statically_known_true(begin >= place.start + tokens):
        return False
    if isinstance(size, int) and begin + size <= place.start:
        return False
    holds = statically_known_true(place.start + tokens <= begin + size)
    return True if begin <= place.start and holds else None


# ---- operations that commute with the permutation ------------------------------------------------


def _pointwise(node: Node, place: Place, tokens: Size) -> Needs | None:
    if name_of(node) == "where" and argument(node, 1, "input") is None:
        return None  # where(condition) lists places
    if (
        name_of(node) == "dropout"
        and argument(node, 2, "training", True)
        and argument(node, 1, "p", 0.5)
    ):
        return None
    shape = _shape(node)
    operands = [_first(node)] if name_of(node) in _CASTS else _tensors(node)
    return _aligned(operands, place.dim, place.start, shape[place.dim], len(shape))


def _constant(node: Node, place: Place, tokens: Size) -> Needs | None:
    """All entries alike, or not yet written."""
    return {}


def _last_kept(node: Node, place: Place, tokens: Size) -> Needs | None:
    """A projection: the last dimension alone is mixed."""
    if place.dim >= len(_shape(node)) - 1:
        return None
    return {_first(node): place}


def _norm(node: Node, place: Place, tokens: Size) -> Needs | None:
    width = argument(node, 1, "normalized_shape")
    if place.dim >= len(_shape(_first(node))) - len(width):
        return None
    return {_first(node): place}


def _group_norm(node: Node, place: Place, tokens: Size) -> Needs | None:
    """Statistics over all tokens of a group of channels: a sum, whatever their order."""
    return {_first(node): place} if place.dim != 1 else None


def _same_place(node: Node, place: Place, tokens: Size) -> Needs | None:
    """Softmax and normalize: each entry by itself and a sum over a dimension."""
    return {_first(node): place}


def _along_another(node: Node, place: Place, tokens: Size) -> Needs | None:
    """Entries along one dimension are mixed or moved; the tokens must lie along another."""
    rank = len(_shape(node))
    default = -1 if name_of(node) == "glu" else None
    dim = argument(node, 2 if name_of(node) == "repeat_interleave" else 1, "dim", default)
    if not isinstance(dim, int) or place.dim == dim % rank:
        return None
    return {_first(node): place}


def _permute(node: Node, place: Place, tokens: Size) -> Needs | None:
    dims = argument(node, 1, "dims")
    given: Any = dims if isinstance(dims, (tuple, list)) else node.args[1:]
    return {_first(node): Place(given[place.dim] % len(given), place.start)}


def _transpose(node: Node, place: Place, tokens: Size) -> Needs | None:
    rank = len(_shape(node))
    a, b = _dim(node, 1, "dim0", 0, rank), _dim(node, 2, "dim1", 1, rank)
    dim = b if place.dim == a else a if place.dim == b else place.dim
    return {_first(node): Place(dim, place.start)}


def _movedim(node: Node, place: Place, tokens: Size) -> Needs | None:
    rank = len(_shape(node))
    source, target = _dim(node, 1, "source", 0, rank), _dim(node, 2, "destination", 0, rank)
    order = [dim for dim in range(rank) if dim != source]
    order.insert(target, source)
    return {_first(node): Place(order[place.dim], place.start)}


def _transposed_attribute(node: Node, place: Place, tokens: Size) -> Needs | None:
    name = argument(node, 1, "other") if name_of(node) == "getattr" else name_of(node)
    rank = len(_shape(node))
    if name in ("real", "imag", "data"):
        return {_first(node): place}
    if name in ("T", "H") and rank != 2:
        return None
    if name not in ("mT", "mH", "T", "H"):
        return None
    dim = {rank - 1: rank - 2, rank - 2: rank - 1}.get(place.dim, place.dim)
    return {_first(node): Place(dim, place.start)}


def _reshape(node: Node, place: Place, tokens: Size) -> Needs | None:
    found = _reshaped(_shape(node), _shape(_first(node)), place)
    return None if found is None else {_first(node): found}


def _reshaped(shape: Sequence[Size], other: Sequence[Size], place: Place) -> Place | None:
    """The place in another shape of the same entries.

    The tokens lie in the dimension before which, its own outer ones included, as much lies as
    before them in the first shape.
    """
    before = math.prod(shape[: place.dim]) * place.times
    for dim, size in enumerate(other):
        times = _quotient(before, math.prod(other[:dim]))
        width = times and _quotient(size * place.times * place.width, shape[place.dim] * times)
        if times and width:
            return Place(dim, place.start, times, width)
    return None


def _quotient(a: Size, b: Size) -> int | None:
    """A whole number of times; None where it is none, or not known."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return 1 if same(a, b) else None


def _complex(node: Node, place: Place, tokens: Size) -> Needs | None:
    """A last dimension of pairs comes or goes."""
    if place.dim >= min(len(_shape(node)), len(_shape(_first(node)))):
        return None
    return {_first(node): place}


def _expand(node: Node, place: Place, tokens: Size) -> Needs | None:
    shape = _shape(node)
    return _aligned([_first(node)], place.dim, place.start, shape[place.dim], len(shape))


def _cat(node: Node, place: Place, tokens: Size) -> Needs | None:
    parts = _parts(node)
    dim = _joined_dim(node)
    if dim != place.dim:
        return {x: place for x, _, _ in parts}
    for x, begin, size in parts:
        inside = _inside(place, begin, size, tokens)
        if inside and isinstance(begin, int):
            alone = sum(other is x for other, _, _ in parts) == 1
            return {x: Place(dim, place.start - begin)} if alone else None
        if inside is None:
            return None
    return None


def _joined_dim(node: Node) -> int:
    return int(argument(node, 1, "dim", node.kwargs.get("axis", 0))) % len(_shape(node))


def _parts(node: Node) -> list[tuple[Node, Size, Size]]:
    """What is concatenated, where it begins and how long it is."""
    rank, dim = len(_shape(node)), _joined_dim(node)
    parts: list[tuple[Node, Size, Size]] = []
    begin: Size = 0
    for x in argument(node, 0, "tensors"):
        if len(_shape(x)) == rank:  # torch lets an empty vector pass
            size = _shape(x)[dim]
            parts.append((x, plain(begin), size))
            begin = begin + size
    return parts


def _stack(node: Node, place: Place, tokens: Size) -> Needs | None:
    dim = _dim(node, 1, "dim", 0, len(_shape(node)))
    if dim == place.dim:
        return None
    shifted = Place(place.dim - (place.dim > dim), place.start)
    return {x: shifted for x in argument(node, 0, "tensors")}


def _split(node: Node, place: Place, tokens: Size) -> Needs | None:
    """The place is the input's: whole in one part, or across all parts."""
    dim = _split_dim(node)
    if name_of(node) == "unbind":
        return {_first(node): place} if dim != place.dim else None
    if dim == place.dim:
        inside = [_inside(place, begin, size, tokens) for begin, size in _cuts(node)]
        if True not in inside:
            return None
    return {_first(node): place}


def _split_dim(node: Node) -> int:
    rank = len(_shape(_first(node)))
    if name_of(node) == "unbind":
        return _dim(node, 1, "dim", 0, rank)
    names = ("split_size_or_sections", "split_sizes", "split_size", "chunks")
    place = 1 if any(name in node.kwargs for name in names) else 2
    return _dim(node, place, "dim", 0, rank)


def _cuts(node: Node) -> list[tuple[Size, Size]]:
    """Where each part of a split begins and how long it is."""
    dim = _split_dim(node)
    cuts: list[tuple[Size, Size]] = []
    begin: Size = 0
    for part in recorded(node):
        size = plain(part.shape[dim])
        cuts.append((plain(begin), size))
        begin = begin + size
    return cuts


def _getitem(node: Node, place: Place, tokens: Size) -> Needs | None:
    source, index = _first(node), argument(node, 1, "other")
    if isinstance(recorded(source), torch.Tensor):
        return _indexed(source, index, place, tokens)
    if name_of(source) == "unbind":
        dim = _split_dim(source)
        return {source: Place(place.dim + (place.dim >= dim), place.start)}
    if _rule_of(source) in (_operator, _norm, _group_norm):
        return {source: place} if index == 0 else None
    if _RULES.get(name_of(source)) is not _split or not isinstance(index, int):
        return None
    if place.dim != _split_dim(source):
        return {source: place}
    begin = _cuts(source)[index][0]
    return {source: Place(place.dim, place.start + begin)} if isinstance(begin, int) else None


def _index(node: Node, place: Place, tokens: Size) -> Needs | None:
    indices = argument(node, 1, "indices")
    entries = tuple(slice(None) if entry is None else entry for entry in indices)
    return _indexed(_first(node), entries, place, tokens)


def _indexed(source: Node, index: Any, place: Place, tokens: Size) -> Needs | None:
    """``x[index]`` where tokens lie along a slice."""
    walked = _walk(source, index)
    if walked is None:
        return None
    for dim, entry, out in walked:
        if out == place.dim and isinstance(entry, slice):
            begin = _begin(entry, _shape(source)[dim])
            return None if begin is None else {source: Place(dim, place.start + begin)}
    return None


def _walk(source: Node, index: Any) -> list[tuple[int, Any, int | None]] | None:
    """For each dimension of ``x``: its entry of ``x[index]`` and where it is in the output.

    None for indices that are not understood: a mask, or tensors beside other than slices.
    """
    entries = index_entries(index, len(_shape(source)))
    walked: list[tuple[int, Any, int | None]] = []
    dim = out = tensors = numbers = 0
    for entry in entries:
        if entry is None:
            out += 1
            continue
        value = number_of(entry)
        if isinstance(entry, slice):
            walked.append((dim, entry, out))
            out += 1
        elif isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            numbers += 1
            walked.append((dim, entry, None))
        elif isinstance(value, torch.Tensor) and value.dim() == 1 and value.dtype != torch.bool:
            tensors += 1
            walked.append((dim, entry, out))
            out += 1
        else:
            return None
        dim += 1
    return None if tensors > 1 or (tensors and numbers) else walked


def _begin(entry: slice, size: Size) -> int | None:
    """Where a slice of step one begins; None where that is not known."""
    start, step = number_of(entry.start), number_of(entry.step)
    if not (step is None or same(step, 1)):
        return None
    begin = plain(0 if start is None else start)
    if isinstance(begin, int) and begin < 0:
        begin = plain(begin + size)
    if not isinstance(begin, int):
        return None
    return min(max(begin, 0), size) if isinstance(size, int) else begin


def _slice_entry(node: Node) -> tuple[int, slice]:
    """The dimension and the entry of aten.slice and narrow."""
    dim = _dim(node, 1, "dim", 0, len(_shape(node)))
    if name_of(node) == "narrow":
        start = number_of(argument(node, 2, "start"))
        return dim, slice(start, start + number_of(argument(node, 3, "length")))
    return dim, slice(*(argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))))


def _slice(node: Node, place: Place, tokens: Size) -> Needs | None:
    dim, entry = _slice_entry(node)
    if dim != place.dim:
        return {_first(node): place}
    begin = _begin(entry, _shape(_first(node))[dim])
    return None if begin is None else {_first(node): Place(dim, place.start + begin)}


def _select(node: Node, place: Place, tokens: Size) -> Needs | None:
    dim = _dim(node, 1, "dim", 0, len(_shape(node)) + 1)
    return {_first(node): Place(place.dim + (place.dim >= dim), place.start)}


def _pad(node: Node, place: Place, tokens: Size) -> Needs | None:
    pads = [number_of(pad) for pad in argument(node, 1, "pad")]
    rank, after_last = len(_shape(node)), len(pads) // 2
    at = rank - 1 - place.dim
    if at >= after_last or (same(pads[2 * at], 0) and same(pads[2 * at + 1], 0)):
        return {_first(node): place}
    if argument(node, 2, "mode", "constant") != "constant" and name_of(node) == "pad":
        return None
    before = plain(pads[2 * at])
    if not isinstance(before, int) or place.start < before:
        return None
    return {_first(node): Place(place.dim, place.start - before)}


def _matmul(node: Node, place: Place, tokens: Size) -> Needs | None:
    shape, rank = _shape(node), len(_shape(node))
    added, left, right = _factors(node)
    if len(_shape(left)) < 2 or len(_shape(right)) < 2:
        return None
    size = shape[place.dim]
    found: Needs | None
    if place.dim == rank - 2:
        found = {left: Place(len(_shape(left)) - 2, place.start)}
    elif place.dim == rank - 1:
        found = {right: Place(len(_shape(right)) - 1, place.start)}
    else:
        found = _aligned([left, right], place.dim, place.start, size, rank)
    more = _aligned(added, place.dim, place.start, size, rank)
    if found is None or more is None or left is right or set(found) & set(more):
        return None
    return found | more


def _factors(node: Node) -> tuple[list[Node], Node, Node]:
    """What is added, and the two factors of a matrix product."""
    tensors: Any = node.args
    if name_of(node) in ("addmm", "baddbmm"):
        return [tensors[0]], tensors[1], tensors[2]
    return [], tensors[0], tensors[1] if len(tensors) > 1 else _tensors(node)[1]


def _einsum(node: Node, place: Place, tokens: Size) -> Needs | None:
    inputs, output, operands = _equation(node)
    letter = output[place.dim]
    if len(set(operands)) < len(operands):
        return None
    return {
        x: Place(letters.index(letter), place.start)
        for letters, x in zip(inputs, operands, strict=True)
        if letter in letters
    }


def _equation(node: Node) -> tuple[list[str], str, list[Node]]:
    inputs, output, operands = equation_of(node)
    if any(len(set(x)) < len(x) for x in (*inputs, output)):
        raise ValueError("an einsum with a diagonal")
    return inputs, output, operands


def _convolution(node: Node, place: Place, tokens: Size) -> Needs | None:
    return {_first(node): place} if place.dim == 0 else None


def _attention(node: Node, place: Place, tokens: Size) -> Needs | None:
    query, key, value, mask, causal, dropout = _attention_operands(node)
    rank, shape = len(_shape(node)), _shape(node)
    if causal or dropout or place.dim == rank - 1:
        return None
    alone = place.dim == rank - 2 and query not in (key, value)
    operands = [query] if alone else list(dict.fromkeys((query, key, value)))
    if mask is not None and not (
        place.dim == rank - 2 and _hides_nothing(mask, place.start, tokens)
    ):
        operands.append(mask)
    return _aligned(operands, place.dim, place.start, shape[place.dim], rank)


def _operator(node: Node, place: Place, tokens: Size) -> Needs | None:
    """Attention that is one operator; the place is that of its first output and of its queries."""
    call = _plain_operator(node)
    if call is None or call.query.order[-1] == (place.dim,):
        return None
    query, *others = (x.node for x in (call.query, call.key, call.value))
    alone = place.dim == call.query.token_dim and query not in others
    operands = [query] if alone else list(dict.fromkeys((query, *others)))
    shape = _shape(query)
    return _aligned(operands, place.dim, place.start, shape[place.dim], len(shape))


def _plain_operator(node: Node) -> Fused | None:
    """What an operator attends to, where that is all that it does and nothing is masked."""
    module = node.graph.owning_module
    call = match_operator(module, node) if module is not None else None
    if call is None or call.objection is not None or len(call.query.order) != 4:
        return None
    nothing = call.attn_mask is None and call.is_causal is False and call.dropout_p == 0.0
    return call if nothing else None


def _attention_operands(node: Node) -> tuple[Node, Node, Node, Node | None, Any, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = (None, None, None, None, 0.0, False)
    query, key, value, mask, dropout, causal = (
        argument(node, i, name, default)
        for i, (name, default) in enumerate(zip(names, defaults, strict=True))
    )
    return query, key, value, mask, causal, dropout


def _hides_nothing(mask: Node, start: int, tokens: Size) -> bool:
    """Whether a mask shows all tokens to all, and the same to each of them."""
    return hides(mask, start, start + tokens) is None


def _reduction(node: Node, place: Place, tokens: Size) -> Needs | None:
    rank = len(_shape(_first(node)))
    gone = reduced_dims(node)
    if len(_shape(node)) == rank:
        return None if place.dim in gone else {_first(node): place}
    kept = [dim for dim in range(rank) if dim not in gone]
    return {_first(node): Place(kept[place.dim], place.start)}


def _outer(node: Node, place: Place, tokens: Size) -> Needs | None:
    a, b = _first(node), argument(node, 1, "other")
    b = node.kwargs.get("vec2", b)
    return None if a is b else {(a, b)[place.dim]: Place(0, place.start)}


def _setitem(node: Node, place: Place, tokens: Size) -> Needs | None:
    """``target[index] = value``, with the place in the target."""
    target, index, value = node.args
    assert isinstance(target, Node)
    walked = _walk(target, index)
    if walked is None:
        return None
    entries = index_entries(index, len(_shape(target)))
    rank = sum(out is not None for _, _, out in walked) + sum(entry is None for entry in entries)
    found: Needs = {target: place}
    for dim, entry, out in walked:
        if dim != place.dim:
            continue
        size = _shape(target)[dim]
        if isinstance(entry, int):
            at = entry if entry >= 0 else plain(entry + size)
            return found if _inside(place, at, 1, tokens) is False else None
        if not isinstance(entry, slice):
            return None
        begin = _begin(entry, size)
        if begin is None:
            return None
        stop = number_of(entry.stop)
        stop = size if stop is None else stop + size if isinstance(stop, int) and stop < 0 else stop
        end = plain(stop)
        if isinstance(end, int) and isinstance(size, int):
            end = min(end, size)
        inside = _inside(place, begin, plain(end - begin), tokens)
        if inside is None:
            return None
        if not inside or not isinstance(
            recorded(value) if isinstance(value, Node) else 0, torch.Tensor
        ):
            return found
        assert isinstance(value, Node) and out is not None
        shape = _shape(value)
        at = out - rank + len(shape)
        if at < 0 or same(shape[at], 1):
            return found
        return None if value is target else found | {value: Place(at, place.start - begin)}
    return None


def _copy(node: Node, place: Place, tokens: Size) -> Needs | None:
    """``x.copy_(source)``, or its value, which is that of the source."""
    if written_by(node):
        return _pointwise(node, place, tokens)
    shape = _shape(node)
    source = argument(node, 1, "src")
    return _aligned([source], place.dim, place.start, shape[place.dim], len(shape))


def _slice_scatter(node: Node, place: Place, tokens: Size) -> Needs | None:
    """``x[..., start:end] = source`` as a value."""
    x, source = _first(node), argument(node, 1, "src")
    dim = _dim(node, 2, "dim", 0, len(_shape(node)))
    if x is source:
        return None
    if dim != place.dim:
        return {x: place, source: place}
    entry = slice(*(argument(node, i, n) for i, n in ((3, "start"), (4, "end"), (5, "step"))))
    begin = _begin(entry, _shape(x)[dim])
    inside = None if begin is None else _inside(place, begin, _shape(source)[dim], tokens)
    if inside is None or begin is None:
        return None
    return {x: place} | ({source: Place(dim, place.start - begin)} if inside else {})


# ---- where the order does not reach the output ---------------------------------------------------


def _summed(node: Node) -> list[Mapping[Node, set[int]]]:
    """Dimensions of operands that are summed over together."""
    name = name_of(node)
    if _rule_of(node) is _operator:
        call = _plain_operator(node)
        if call is None or call.query.node in (call.key.node, call.value.node):
            return []
        return [{x.node: {x.token_dim} for x in (call.key, call.value)}]
    if _RULES.get(name) is _reduction:
        return [{_first(node): reduced_dims(node)}]
    if _RULES.get(name) is _matmul:
        _, left, right = _factors(node)
        if left is right or min(len(_shape(left)), len(_shape(right))) < 2:
            return []
        return [{left: {len(_shape(left)) - 1}, right: {len(_shape(right)) - 2}}]
    if name == "einsum":
        inputs, output, operands = _equation(node)
        return [
            {x: {s.index(letter)} for s, x in zip(inputs, operands, strict=True) if letter in s}
            for letter in dict.fromkeys("".join(inputs))
            if letter not in output and len(set(operands)) == len(operands)
        ]
    if name == ATTENTION:
        query, key, value, _, causal, dropout = _attention_operands(node)
        if causal or dropout or query in (key, value):
            return []
        return [{x: {len(_shape(x)) - 2} for x in (key, value)}]
    return []


def _masked(node: Node, start: int, tokens: Size) -> bool:
    """Whether an attention mask treats the keys among the tokens differently."""
    if name_of(node) != ATTENTION:
        return False
    mask = _attention_operands(node)[3]
    if mask is None or same(_shape(mask)[-1], 1):
        return False
    return not _hides_nothing(mask, start, tokens)


def _leaves_out(node: Node, operand: Node, place: Place, tokens: Size) -> bool:
    """Whether a slice holds none of the tokens."""
    if node.args and operand is not node.args[0] and operand is not node.kwargs.get("input"):
        return False
    name = name_of(node)
    if name == "getitem" and not isinstance(recorded(operand), torch.Tensor):
        if _RULES.get(name_of(operand)) is not _split or name_of(operand) == "unbind":
            return False
        begin, size = _cuts(operand)[argument(node, 1, "other")]
        return place.dim == _split_dim(operand) and _inside(place, begin, size, tokens) is False
    if name in ("getitem", "index"):
        index = argument(node, 1, "other")
        if name == "index":
            entries = argument(node, 1, "indices")
            index = tuple(slice(None) if entry is None else entry for entry in entries)
        for dim, entry, out in _walk(operand, index) or ():
            if dim != place.dim:
                continue
            size = _shape(operand)[dim]
            if isinstance(entry, slice) and out is not None:
                begin = _begin(entry, size)
                return (
                    begin is not None and _inside(place, begin, _shape(node)[out], tokens) is False
                )
            if isinstance(entry, int):
                at = entry if entry >= 0 else plain(entry + size)
                return _inside(place, at, 1, tokens) is False
        return False
    if name in ("slice", "narrow"):
        dim, entry = _slice_entry(node)
        begin = _begin(entry, _shape(operand)[dim])
        outside = begin is not None and _inside(place, begin, _shape(node)[dim], tokens) is False
        return dim == place.dim and outside
    if name == "select":
        dim = _dim(node, 1, "dim", 0, len(_shape(operand)))
        at = argument(node, 2, "index")
        at = at if not isinstance(at, int) or at >= 0 else plain(at + _shape(operand)[dim])
        return dim == place.dim and _inside(place, at, 1, tokens) is False
    return False


def _shifts(node: Node, operand: Node) -> list[int]:
    """By how much positions of an operand may move on their way into the output."""
    name, found = name_of(node), list[Any]()
    try:
        if name == "cat":
            found = [begin for x, begin, _ in _parts(node) if x is operand]
        elif name == "getitem" and not isinstance(recorded(operand), torch.Tensor):
            found = [-_cuts(operand)[argument(node, 1, "other")][0]]
        elif name in ("getitem", "index", "setitem"):
            index = argument(node, 1, "indices" if name == "index" else "other")
            sign = 1 if name == "setitem" else -1
            target = _first(node)
            index = (
                tuple(slice(None) if x is None else x for x in index) if name == "index" else index
            )
            for dim, entry, _ in _walk(target, index) or ():
                begin = _begin(entry, _shape(target)[dim]) if isinstance(entry, slice) else None
                found.append(sign * (begin or 0))
        elif name in ("slice", "narrow"):
            dim, entry = _slice_entry(node)
            found = [-(_begin(entry, _shape(operand)[dim]) or 0)]
        elif name in ("pad", "constant_pad_nd"):
            found = [number_of(pad) for pad in argument(node, 1, "pad")[::2]]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return []
    return [x for x in found if isinstance(x, int) and x]


# ---- the table -----------------------------------------------------------------------------------

_CASTS = {"to", "to_copy", "type", "type_as"}
# of the second operand they take the dtype or shape
_AFTER_ANOTHER = {"to", "type_as", "view_as", "expand_as"}
_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like"}
_SHAPES = {"size", "sym_size", "dim", "numel", "sym_numel", "stride", "ndimension", "len"}

_RULES: dict[str, Rule] = {}
for _rule, _names in (
    (
        _pointwise,
        "add sub mul div neg pow sqrt rsqrt exp log sin cos silu gelu relu leaky_relu sigmoid tanh"
        " softplus mish elu hardswish abs square reciprocal float half bfloat16 double to to_copy"
        " type type_as contiguous clone detach dropout nan_to_num clamp where masked_fill"
        " maximum minimum addcmul addcdiv lerp eq ne lt le gt ge logical_and logical_or logical_not"
        " bitwise_not and or invert bool int long polar alias lift_fresh lift_fresh_copy sign"
        " round floor rfloordiv floordiv floor_divide remainder mod conj real imag identity relu6",
    ),
    (_constant, " ".join(sorted(CONSTANTS))),
    (_last_kept, "linear"),
    (_norm, "layer_norm rms_norm native_layer_norm"),
    (_group_norm, "group_norm native_group_norm"),
    (_same_place, "softmax log_softmax normalize"),
    (_along_another, "cumsum cumprod glu repeat_interleave index_select"),
    (_permute, "permute"),
    (_transpose, "transpose t"),
    (_movedim, "movedim moveaxis"),
    (_transposed_attribute, "getattr mT mH T H"),
    (_reshape, "view view_as reshape flatten unflatten squeeze unsqueeze"),
    (_complex, "view_as_complex view_as_real"),
    (_expand, "expand broadcast_to repeat tile expand_as"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_split, "split chunk split_with_sizes tensor_split unbind"),
    (_getitem, "getitem"),
    (_index, "index"),
    (_slice, "slice narrow"),
    (_select, "select"),
    (_pad, "pad constant_pad_nd"),
    (_matmul, "matmul bmm mm addmm baddbmm"),
    (_einsum, "einsum"),
    (_convolution, "conv1d conv2d conv3d convolution"),
    (_attention, ATTENTION),
    (_reduction, "mean sum amax amin prod var std norm all any logsumexp linalg_vector_norm"),
    (_outer, "outer ger"),
    (_setitem, "setitem"),
    (_copy, "copy"),
    (_slice_scatter, "slice_scatter"),
):
    for _name in _names.split():
        _RULES[_name] = _rule

_ANY_ORDER: set[Rule] = {
    _pointwise, _constant, _last_kept, _norm, _same_place, _permute, _transpose, _expand, _matmul,
    _reduction,
}  # fmt: skip
"""Rules of what commutes with any permutation along a dimension, such as that of merged tokens."""
