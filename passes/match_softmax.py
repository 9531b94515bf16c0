"""Match attention that is written out: ``softmax(q @ k.T * scale + mask) @ v`` in all its forms."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.site import Operand, recorded, value_of
from uta_fx.passes.trace_axes import VIEWS, argument, equation_of, name_of

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "to_copy", "contiguous")
# operations on logits or weights that are looked past to say what keeps a near miss from matching
_NEAR = (*_CASTS, "mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clamp", "tanh",
         "view", "view_as", "reshape", "transpose", "permute", "unflatten", "flatten", "expand",
         "nan_to_num", "neg", "softcap", "sigmoid", "unsqueeze", "squeeze")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Written:
    """Attention as it was found written out; fields as of ``Call``."""

    node: Node
    query: Operand
    key: Operand
    value: Operand
    output: tuple[int, ...]
    scale: float
    mask: Node | None
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
    of two other tensors. Where anything but casts, one scale, one added mask and dropout that is
    off lies between, the result carries the objection.
    """
    last = _product(node)
    if last is None or name_of(node) == "baddbmm":
        return None
    if not _leads_to(last.left, ("softmax",)):
        last = last.swapped()
    weights, objections = last.left, list[str]()
    softmax = _up(weights, ("softmax",), objections, "the weights")
    if softmax is None:
        return None
    logits = argument(softmax, 0, "input")
    first_node = _up(logits, _PRODUCTS, [], "")
    first = _product(first_node) if first_node else None
    if first is None:
        return None
    scale, mask = _read_logits(logits, first, objections)
    _check_softmax(softmax, objections)
    _check_weights(weights, softmax, node, objections)
    if not objections:
        _check_writes(first, node, objections)
    layout = _layout(first, last)
    if layout is None or value_of(softmax).dim() != len(first.out_letters):
        objections.append("its products are laid out in a way that is not understood")
        layout = (*_guess(first), _plain(last.right), (0, 1, 2, 3))
    query, key, value, output = layout
    objection = f"looks like attention, but {objections[0]}" if objections else None
    return Written(node, query, key, value, output, scale, mask, objection)


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
        if name in names:
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
        node = max(tensors[:2], key=lambda x: _leads_to(x, names))
    return None


def _leads_to(node: Node, names: tuple[str, ...], depth: int = 6) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if name_of(node) in names:
        return True
    inputs = node.all_input_nodes[:2] if depth and name_of(node) in _NEAR else []
    return any(_leads_to(x, names, depth - 1) for x in inputs)


def _read_logits(node: Node, product: _Product, objections: list[str]) -> tuple[float, Node | None]:
    """The factor between the product and the softmax, and what is added."""
    scale, mask = 1.0, None
    while node is not product.node:
        name = name_of(node)
        if name in _CASTS:
            node = argument(node, 0, "input")
            continue
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if name in ("mul", "div", "add") and not _leads_to_node(a, product.node):
            if name == "div":
                objections.append("its logits are divided into something")
                return scale, mask
            a, b = b, a
        if name in ("mul", "div"):
            if not isinstance(b, (int, float)):
                objections.append("its scale is computed in the graph")
                return scale, mask
            scale = scale * b if name == "mul" else scale / b
        elif name == "add" and isinstance(b, Node) and mask is None and scale == 1.0:
            mask = b
        elif name == "add" and isinstance(b, Node):
            objections.append("its mask is scaled" if mask is None else "it has two masks")
            return scale, mask
        elif name == "masked_fill":
            objections.append("has an attention mask written as masked_fill")
            return scale, mask
        else:
            objections.append(f"{name} changes the logits")
            return scale, mask
        node = a
    if name_of(product.node) == "baddbmm":
        alpha, beta = product.node.kwargs.get("alpha", 1), product.node.kwargs.get("beta", 1)
        if not isinstance(alpha, (int, float)):
            objections.append("its scale is computed in the graph")
            return scale, mask
        if beta not in (0, 1) or (beta == 1 and (mask is not None or scale != 1.0)):
            objections.append("its mask is scaled")
            return scale, mask
        if beta == 1:
            mask = argument(product.node, 0, "input")
        scale = scale * alpha
    return scale, mask


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
                stack.extend(current.all_input_nodes[:2])
    return False


def _check_softmax(softmax: Node, objections: list[str]) -> None:
    dim, rank = argument(softmax, 1, "dim"), value_of(softmax).dim()
    if dim is None or dim % rank != rank - 1:
        objections.append(f"its softmax is over dimension {dim}, not the last")


def _check_weights(weights: Node, softmax: Node, last: Node, objections: list[str]) -> None:
    """The weights must go nowhere else: else nothing is saved."""
    node, user = weights, last
    while True:
        if any(other is not user and _is_used(other) for other in node.users):
            objections.append("its weights are used elsewhere too")
            return
        if node is softmax:
            return
        node, user = argument(node, 0, "input"), node


def _is_used(node: Node, depth: int = 8) -> bool:
    """Whether a node's value reaches the output, as far as one can see."""
    if node.op == "output" or name_of(node) == "setitem" or not depth:
        return True
    return any(_is_used(user, depth - 1) for user in node.users)


def _check_writes(first: _Product, last: Node, objections: list[str]) -> None:
    """Queries and keys must still be what they were when the call's place is its end."""
    order = {node: i for i, node in enumerate(last.graph.nodes)}
    for operand in (first.left, first.right):
        for alias in _aliases(operand):
            for user in alias.users:
                written = name_of(user) == "setitem" or (
                    isinstance(user.target, str) and re.fullmatch(r"[a-z]\w*[a-z]_", user.target)
                )
                between = order[first.node] < order[user] < order[last]
                if written and between and argument(user, 0, "input") is alias:
                    objections.append("its queries or keys are written to before it ends")


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
