"""Read a product of two tensors, however it is spelled, in letters as of an einsum."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from uta_fx.passes.read_node import VIEWS, argument, equation_of, is_call, name_of
from uta_fx.passes.site import recorded, value_of

# of each product the places and names of its sides
_SIDES = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "linear": ((0, "input"), (1, "weight")),
    "inner": ((0, "input"), (1, "other")),
    "tensordot": ((0, "a"), (1, "b")),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two tensors, its dimensions in letters.

    Attributes:
        node: That computes it.
        left: Of the two.
        right: Likewise.
        left_letters: One for each dimension.
        right_letters: Likewise; those that the output lacks are summed over.
        out_letters: Likewise.
        since: The first of the views around the operation, where it is seen through them: its sides
            are the tensors that go into these.
    """

    node: Node
    left: Node
    right: Node
    left_letters: Sequence[str]
    right_letters: Sequence[str]
    out_letters: Sequence[str]
    since: Node | None = None

    def swapped(self) -> Product:
        """The same with its sides exchanged."""
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            left_letters=self.right_letters,
            right_letters=self.left_letters,
        )


def read_product(node: Node) -> Product | None:
    """The product that a node is; None for other nodes, and for a projection by weights.

    ``baddbmm`` and ``addmm`` are products although they add to one.
    """
    name = name_of(node) if is_call(node) else ""
    if name == "einsum":
        inputs, out, operands = equation_of(node)
        if len(operands) != 2 or any(len(set(x)) < len(x) for x in (*inputs, out)):
            return None
        (left, right), (a, b) = operands, inputs
        return Product(node, left, right, a, b, out)
    if name not in _SIDES:
        return None
    left, right = (argument(node, *side) for side in _SIDES[name])
    if not all(
        isinstance(x, Node) and isinstance(recorded(x), torch.Tensor) for x in (left, right)
    ):
        return None
    ranks = value_of(left).dim(), value_of(right).dim()
    if not all(2 <= rank <= 6 for rank in ranks):
        return None
    if (name == "linear" or ranks[0] != ranks[1]) and is_weight(right):
        return None
    if name == "linear" and argument(node, 2, "bias") is not None:
        return None
    letters = _letters(node, name, *ranks)
    return letters and Product(node, left, right, *letters)


def is_product(node: Node) -> bool:
    """Whether ``read_product`` has one."""
    return read_product(node) is not None


def is_weight(node: Node) -> bool:
    """Whether a tensor is a parameter of the model, or a view of one."""
    while name_of(node) in VIEWS and isinstance(argument(node, 0, "input"), Node):
        node = argument(node, 0, "input")
    return node.op == "get_attr" or isinstance(recorded(node), nn.Parameter)


def _letters(node: Node, name: str, left: int, right: int) -> tuple[str, str, str] | None:
    """Of the sides and the output of a product of such ranks."""
    if name in ("linear", "inner"):  # over the last dimension of both
        a, b = string.ascii_lowercase[: left - 1], string.ascii_uppercase[: right - 1]
        return f"{a}z", f"{b}z", a + b
    if name == "tensordot":
        dims = argument(node, 2, "dims", 2)
        if len(node.args) == 4:  # after export
            dims = node.args[2:]
        return _letters_of_dims(dims, left, right)
    batch = "abcd"[: max(left, right) - 2]  # aligned at their end
    a, b = (batch[len(batch) + 2 - rank :] for rank in (left, right))
    return f"{a}mn", f"{b}no", f"{batch}mo"


def _letters_of_dims(dims: Any, left: int, right: int) -> tuple[str, str, str] | None:
    """Those of a product over these dimensions of the left and these of the right side."""
    if isinstance(dims, int):
        dims = list(range(left - dims, left)), list(range(dims))
    if not (isinstance(dims, (tuple, list)) and all(isinstance(x, (tuple, list)) for x in dims)):
        return None
    a, b = list(string.ascii_lowercase[:left]), list(string.ascii_uppercase[:right])
    for i, j in zip(*dims, strict=True):
        b[j] = a[i]
    out = [x for x in (*a, *b) if not (x in a and x in b)]
    return "".join(a), "".join(b), "".join(out)
