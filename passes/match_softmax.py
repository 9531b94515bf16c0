"""Match attention that is written out: ``softmax(q @ k.T * scale + mask) @ v`` in all its forms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.read_mask import HIDING
from uta_fx.passes.site import Operand, recorded, value_of
from uta_fx.passes.trace_axes import VIEWS, argument, equation_of, name_of, same, written_by

_EXPONENTIALS = {"exp": 1.0, "exp2": math.log(2)}
"""What multiplies logits where their base is e."""
_SOFTMAXES = ("softmax", *_EXPONENTIALS)
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "to_copy", "contiguous")
# operations on logits or weights that are looked past to say what keeps a near miss from matching
_NEAR = (*_CASTS, "mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clamp", "tanh",
         "view", "view_as", "reshape", "transpose", "permute", "unflatten", "flatten", "expand",
         "nan_to_num", "neg", "softcap", "sigmoid", "unsqueeze", "squeeze", "cat", "getitem",
         "slice", "narrow")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Written:
    """Attention as it was found written out; fields as of ``Call``."""

    node: Node
    query: Operand
    key: Operand
    value: Operand
    output: tuple[int, ...]
    scale: float
    scales: tuple[tuple[str, Node], ...]
    mask: Node | None
    inverted: bool
    objection: str | None


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of two tensors, its dimensions in letters as of einsum."""

    node: Node
    left: Node
    right: Node
    left_letters: str
    right_letters: str
    out_letters: str

    def swapped(self) -> _Product:
        """The same with its sides exchanged."""
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            left_letters=self.right_letters,
            right_letters=self.left_letters,
        )


def match_softmax(node: Node) -> Written | None:
    """The attention whose last product is ``node``; None where it is not attention's last.

    A product of which one side comes, through casts and the like, out of a softmax over the product
    of two other tensors. A softmax may be spelled out as exponentials, and their sum may divide the
    product instead. Where anything but casts, scales, one mask and dropout that is off lies
    between, the result carries the objection.
    """
    last = _product(node)
    if last is None or name_of(node) == "baddbmm":
        return None
    if not _leads_to(last.left, _SOFTMAXES):
        last = last.swapped()
    objections = list[str]()
    softmax = _up(last.left, _SOFTMAXES, objections, "the weights")
    if softmax is None:
        return None
    end, dim = _divided_product(node, softmax) or (node, None)
    if dim is None:
        logits, dim, base = _softmax(softmax, objections)
    else:
        logits, base = argument(softmax, 0, "input"), _EXPONENTIALS[name_of(softmax)]
    first_node = _up(logits, _PRODUCTS, [], "")
    first = _product(first_node) if first_node else None
    if first is None:
        return None
    scale, scales, mask, inverted = _read_logits(logits, first, base, objections)
    rank = value_of(softmax).dim()
    if dim is None or dim % rank != rank - 1:
        objections.append(f"its softmax is over dimension {dim}, not the last")
    factors = [tensor for _, tensor in scales]
    _check_uses(first.node, end, factors, mask, objections)
    masks = [] if mask is None else [mask]
    _check_writes(first.node, end, [first.left, first.right, *factors, *masks], objections)
    _check_writes(node, end, [last.right], objections)
    layout = _layout(first, last)
    permuted = layout is not None and list(layout[-1]) != sorted(layout[-1])
    if layout is None or rank != len(first.out_letters) or (end is not node and permuted):
        objections.append("its products are laid out in a way that is not understood")
        layout = (*_guess(first), _plain(last.right), (0, 1, 2, 3))
    query, key, value, output = layout
    objection = f"looks like attention, but {objections[0]}" if objections else None
    return Written(end, query, key, value, output, scale, tuple(scales), mask, inverted, objection)


def _softmax(node: Node, objections: list[str]) -> tuple[Node, int | None, float]:
    """Of what a node is the softmax, over which dimension, and what multiplies it in base e.

    One of ``softmax(x)``, ``exp(log_softmax(x))``, ``exp(x - logsumexp(x))`` and
    ``exp(x) / exp(x).sum()``; from the last, ``_read_logits`` takes what is subtracted from x.
    There ``exp2`` may stand for ``exp``.
    """
    if name_of(node) == "softmax":
        return argument(node, 0, "input"), argument(node, 1, "dim"), 1.0
    if name_of(node) == "div":
        exponentials = _uncast(argument(node, 0, "input"))
        base = _EXPONENTIALS[name_of(exponentials)]
        return argument(exponentials, 0, "input"), _is_divided(node), base
    inner = _uncast(argument(node, 0, "input"))
    if name_of(node) == "exp" and name_of(inner) == "log_softmax":
        return argument(inner, 0, "input"), argument(inner, 1, "dim"), 1.0
    if name_of(node) == "exp" and name_of(inner) == "sub":
        logits = argument(inner, 0, "input")
        reduced = _reduced(argument(inner, 1, "other"), "logsumexp")
        if reduced and _uncast(logits) is reduced[0]:
            return logits, reduced[1], 1.0
    objections[:] = ["its weights are not exponentials divided by their sum"]
    return inner, -1, 1.0


def _divided_product(product: Node, exponentials: Node) -> tuple[Node, int] | None:
    """Where a product of exponentials is divided by their sum, and over which dimension that is."""
    node, name = product, "to"
    while name in _CASTS and name_of(exponentials) in _EXPONENTIALS:
        users = [user for user in node.users if _is_used(user)]
        if len(users) != 1 or argument(users[0], 0, "input") is not node:
            break
        node, name = users[0], name_of(users[0])
    reduced = _reduced(argument(node, 1, "other"), "sum") if name == "div" else None
    return (node, reduced[1]) if reduced and reduced[0] is exponentials else None


def _is_divided(node: Node) -> int | None:
    """The dimension over which a quotient is one of exponentials and their sum; else None."""
    exponentials = argument(node, 0, "input")
    if name_of(node) != "div" or not isinstance(exponentials, Node):
        return None
    exponentials = _uncast(exponentials)
    reduced = _reduced(argument(node, 1, "other"), "sum")
    if name_of(exponentials) not in _EXPONENTIALS or not reduced or reduced[0] is not exponentials:
        return None
    return reduced[1]


def _reduced(node: Any, name: str) -> tuple[Node, int] | None:
    """Of what a node is such a reduction, over one dimension that is kept or put back last."""
    value = recorded(node) if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    node, last = _uncast(node), value.dim() - 1
    put_back = (name_of(node) == "unsqueeze" and argument(node, 1, "dim") in (-1, last)) or (
        name_of(node) == "getitem" and argument(node, 1, "other") == (Ellipsis, None)
    )
    if put_back:
        node = _uncast(argument(node, 0, "input"))
    dims = argument(node, 1, "dim")
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    if name_of(node) != name or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    if put_back == argument(node, 2, "keepdim", False) or (put_back and dims[0] not in (-1, last)):
        return None
    return _uncast(argument(node, 0, "input")), dims[0]


def _uncast(node: Node) -> Node:
    while name_of(node) in _CASTS:
        node = argument(node, 0, "input")
    return node


def _product(node: Node) -> _Product | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    if name in ("matmul", "bmm"):
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        right = node.kwargs.get("mat2", right)
    elif name == "baddbmm":
        left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    elif name == "einsum":
        inputs, out, operands = equation_of(node)
        if len(operands) != 2 or any(len(set(x)) < len(x) for x in (*inputs, out)):
            return None
        (left, right), (left_letters, right_letters) = operands, inputs
        return _Product(node, left, right, left_letters, right_letters, out)
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    rank = value_of(left).dim()
    if rank not in (3, 4) or value_of(right).dim() != rank:
        return None
    batch = "ab"[: rank - 2]
    return _Product(node, left, right, f"{batch}mn", f"{batch}no", f"{batch}mo")


def _up(node: Node, names: tuple[str, ...], objections: list[str], what: str) -> Node | None:
    """The nearest node of these names upstream, along the first tensor argument.

    Anything but a cast or dropout that is off on the way is an objection.
    """
    for _ in range(12):
        if node.op not in ("call_function", "call_method"):
            return None
        name = name_of(node)
        if name in names or ("exp" in names and _is_divided(node) is not None):
            return node
        if name not in _NEAR:
            return None
        if name == "dropout":
            if argument(node, 1, "p", 0.5) and argument(node, 2, "training", True):
                objections.append("it has dropout")
        elif name not in _CASTS:
            objections.append(f"{name} changes {what}")
        tensors = [x for x in node.all_input_nodes if isinstance(recorded(x), torch.Tensor)]
        if not tensors:
            return None
        # a mask may come first: mask + logits
        node = max(tensors[:3], key=lambda x: _leads_to(x, names))
    return None


def _leads_to(node: Node, names: tuple[str, ...], depth: int = 6) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if name_of(node) in names:
        return True
    inputs = node.all_input_nodes[:3] if depth and name_of(node) in _NEAR else []
    return any(_leads_to(x, names, depth - 1) for x in inputs)


def _read_logits(
    node: Node, product: _Product, base: float, objections: list[str]
) -> tuple[float, list[tuple[str, Node]], Node | None, bool]:
    """What lies between the product and the softmax.

    What is subtracted and the same for all keys, such as the largest logit, changes no softmax.

    Args:
        node: The logits, as the softmax takes them.
        product: Of queries and keys.
        base: A factor besides.
        objections: Gets what is more than this.

    Returns:
        The factors, numbers (all in one) and tensors; what is added, or where logits are filled;
        and whether that is True where keys are hidden, not where they are seen.
    """
    scale, scales, mask, inverted = 1.0, list[tuple[str, Node]](), None, False
    while node is not product.node:
        name = name_of(node)
        if name in _CASTS:
            node = argument(node, 0, "input")
            continue
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if name in ("mul", "div", "add") and not _leads_to_node(a, product.node):
            if name == "div":
                objections.append("its logits are divided into something")
                break
            a, b = b, a
        if name in ("mul", "div"):
            if isinstance(b, (int, float)):
                scale = scale * b if name == "mul" else scale / b
            else:
                objection = _objection_to_scale(b)
                if objection:
                    objections.append(objection)
                    break
                scales.append((name, b))
        elif (
            name == "add"
            and isinstance(b, Node)
            and mask is None
            and scale == base == 1.0
            and not scales
        ):
            mask = b
            if node.kwargs.get("alpha", 1) != 1:
                objections.append("its mask is scaled")
        elif name == "add" and isinstance(b, Node):
            objections.append("its mask is scaled" if mask is None else "it has two masks")
            break
        elif name in ("masked_fill", "where"):
            filled = _filled(node, product.node)
            if filled is None:
                objections.append(f"{name} changes the logits")
                break
            if mask is not None or scales or scale <= 0:
                objections.append("its mask is scaled" if mask is None else "it has two masks")
                break
            a, mask, value, inverted = filled
            if not value * scale <= HIDING:
                objections.append(f"its logits are filled with {value}, which hides no key")
        elif not (name == "sub" and "rsub" not in str(node.target) and _is_same_for_keys(b)):
            objections.append(f"{name} changes the logits")
            break
        node = a
    if node is product.node and name_of(node) == "baddbmm":
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if not isinstance(alpha, (int, float)):
            objections.append("its scale is computed in the graph")
            alpha, beta = 1, 0
        if beta not in (0, 1) or (
            beta == 1 and (mask is not None or not scale == base == 1.0 or scales)
        ):
            objections.append("its mask is scaled")
        elif beta == 1:
            mask = argument(node, 0, "input")
        scale = scale * alpha
    return scale * base, scales, mask, inverted


def _filled(node: Node, product: Node) -> tuple[Node, Node, float, bool] | None:
    """Logits, the mask by which they are filled, with what, and whether where it is True."""
    if name_of(node) == "masked_fill":
        logits, mask, value = (argument(node, *x) for x in enumerate(("input", "mask", "value")))
        inverted = True
    else:
        mask, logits, value = (
            argument(node, *x) for x in enumerate(("condition", "input", "other"))
        )
        if node.op == "call_method":
            mask, logits = logits, mask
        inverted = not _leads_to_node(logits, product)
        if inverted:
            logits, value = value, logits
    number = _number(value)
    if number is None or not isinstance(mask, Node) or not _leads_to_node(logits, product):
        return None
    return (logits, mask, number, inverted) if value_of(mask).dtype == torch.bool else None


def _number(value: Any) -> float | None:
    """A number, also where a tensor is made of it alone."""
    if isinstance(value, (int, float)):
        return value
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "tensor": 0}
    if not isinstance(value, Node) or name_of(value := _uncast(value)) not in place:
        return None
    made_of = argument(value, place[name_of(value)], "fill_value")
    return made_of if isinstance(made_of, (int, float)) else None


def _objection_to_scale(scale: Any) -> str | None:
    """Why a factor of the logits cannot be one of the queries, which may be in another order."""
    value = recorded(scale) if isinstance(scale, Node) else None
    if not isinstance(value, torch.Tensor):
        return "its scale is computed in the graph"
    if not all(same(size, 1) for size in value.shape[-2:]):
        return "its scale differs from token to token"
    return None


def _is_same_for_keys(shift: Any) -> bool:
    """Whether what is subtracted from logits is one number for all keys of a query."""
    if isinstance(shift, Node):
        value = recorded(shift)
        return isinstance(value, torch.Tensor) and all(same(size, 1) for size in value.shape[-1:])
    return isinstance(shift, (int, float))


def _leads_to_node(node: Any, target: Node) -> bool:
    """Whether ``target`` is upstream along casts, scales and sums."""
    stack = [node]
    for _ in range(16):
        if not stack:
            return False
        current = stack.pop()
        if current is target:
            return True
        if isinstance(current, Node) and current.op != "placeholder":
            if name_of(current) in _NEAR:
                stack.extend(current.all_input_nodes[:3])
    return False


def _check_uses(
    first: Node, last: Node, scales: list[Node], mask: Node | None, objections: list[str]
) -> None:
    """Logits and weights must go nowhere else, else nothing is saved, and nobody may change them.

    What is made of the logits on the way to ``last`` may: their largest, their sum.
    """
    stretch = _stretch(first, last)
    inside = {first}
    for node in stretch:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    needed = {last}
    for node in reversed(stretch):
        if not needed.isdisjoint(node.users):
            needed.add(node)
    inside &= needed
    if not inside.isdisjoint(scales):
        objections.append("its scale is computed from its logits")
    if mask in inside:
        objections.append("its mask is computed from its logits")
    place = {node: i for i, node in enumerate(stretch)}
    for node in inside - {last}:
        if any(user not in inside and _is_used(user) for user in node.users):
            objections.append("its logits or weights are used elsewhere too, or written to")
            return
        for written in written_by(node):
            later = (user for alias in _aliases(written) for user in alias.users)
            if any(place.get(user, -1) > place[node] for user in later):
                objections.append("its logits are written to")
                return


def _is_used(node: Node, depth: int = 8) -> bool:
    """Whether a node's value reaches the output or is written to, as far as one can see."""
    if node.op == "output" or written_by(node) or not depth:
        return True
    return any(_is_used(user, depth - 1) for user in node.users)


def _check_writes(first: Node, last: Node, operands: list[Node], objections: list[str]) -> None:
    """Queries, keys and scales must still be what they were when the call's place is its end."""
    kept = {alias for operand in operands for alias in _aliases(operand)}
    if any(not kept.isdisjoint(written_by(node)) for node in _stretch(first, last)):
        objections.append("its queries, keys or values are written to before it ends")


def _stretch(first: Node, last: Node) -> list[Node]:
    """The nodes from one to another, in the order of the graph."""
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(nodes[-1].next)
    return nodes


def _aliases(node: Node) -> set[Node]:
    """Nodes that may share memory with one: what it is a view of, and the views of that."""
    base = node
    while name_of(base) in VIEWS and isinstance(argument(base, 0, "input"), Node):
        base = argument(base, 0, "input")
    found, stack = set[Node](), [base]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(user for user in current.users if name_of(user) in VIEWS)
    return found


def _layout(
    first: _Product, last: _Product
) -> tuple[Operand, Operand, Operand, tuple[int, ...]] | None:
    """Where ``[B, H, L, D]`` are in the operands and in the output; None where they are not."""
    *batch, row, column = list(first.out_letters)
    if row not in first.left_letters:
        first = first.swapped()
    inner = set(first.left_letters) & set(first.right_letters) - set(first.out_letters)
    if len(batch) not in (1, 2) or len(inner) != 1:
        return None
    if set(first.left_letters) != {*batch, row, *inner}:
        return None
    if set(first.right_letters) != {*batch, column, *inner}:
        return None
    # the weights have the letters of the logits, place by place, under new names
    if len(last.left_letters) != len(first.out_letters):
        return None
    *new_batch, new_row, new_column = list(last.left_letters)
    width = set(last.right_letters) - {*new_batch, new_column}
    if len(width) != 1 or set(last.right_letters) != {*new_batch, new_column, *width}:
        return None
    if set(last.out_letters) != {*new_batch, new_row, *width}:
        return None

    def order(letters: str, names: list[str], length: str, depth: str) -> tuple[int | None, ...]:
        head = [letters.index(name) for name in names]
        lead = (head[0], None) if len(head) == 1 else tuple(head)
        return (*lead, letters.index(length), letters.index(depth))

    (depth,), (wide,) = inner, width
    places = [*new_batch, new_row, wide]
    if len(new_batch) == 1:
        places.insert(1, "")
    return (
        Operand(first.left, order(first.left_letters, batch, row, depth)),
        Operand(first.right, order(first.right_letters, batch, column, depth)),
        Operand(last.right, order(last.right_letters, new_batch, new_column, wide)),
        tuple(places.index(letter) for letter in last.out_letters),
    )


def _guess(first: _Product) -> tuple[Operand, Operand]:
    """Queries and keys for a report: rows of the logits, and columns."""
    row, column = first.out_letters[-2], first.out_letters[-1]
    if row not in first.left_letters:
        first = first.swapped()
    sides = ((first.left, first.left_letters, row), (first.right, first.right_letters, column))
    found = []
    for node, letters, token in sides:
        others = [place for place, letter in enumerate(letters) if letter != token]
        inside = [place for place in others if letters[place] not in first.out_letters]
        if len(letters) != 4 or token not in letters or len(inside) != 1:
            return _plain(first.left), _plain(first.right)
        outside = [place for place in others if place not in inside]
        found.append(Operand(node, (*outside, letters.index(token), *inside)))
    return found[0], found[1]


def _plain(node: Node) -> Operand:
    return Operand(node, tuple(range(value_of(node).dim())))
