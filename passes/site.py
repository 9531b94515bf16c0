"""One attention call of a graph: what it is, what was decided about it, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

Side: TypeAlias = int | sympy.Expr
"""Of a grid: a number, or what a graph with dynamic shapes computes it from."""
Grid = tuple[Side, Side, Side]
Order = tuple[tuple[int, ...], ...]
"""Which dimensions of a tensor each of ``[B, H, L, D]`` is: none where it has size 1, or several,
the first outermost."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations of one attention call; a multiply-add is two.

    Attributes:
        dense: Of the model's own attention.
        decided: Of what the decision makes of it: ``dense`` where the site stays dense.
        parts: What ``decided`` is the sum of, where the site becomes sparse: ``statistics`` of the
            key blocks, ``scores`` that choose among them, ``listed`` blocks, ``tail``, and ``text``
            (text queries and text keys, which stay exact).
    """

    dense: int
    decided: int
    parts: Mapping[str, int]

    @property
    def sparsified(self) -> int:
        """The operations of ``dense`` that something sparse takes the place of: without text."""
        return self.dense - self.parts["text"] if self.parts else 0


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        name: Path of the module that makes the call, or the node's name.
        kind: ``"self"``, ``"joint"`` (video and text in one sequence), ``"cross"``, ``"unknown"``.
        shape: Batch, heads, query length and head dim; a symbolic size is given as text.
        length_kv: Key length.
        dtype: Of the query.
        layer: Index among the self- and joint attention sites of the graph that have at least
            ``min_tokens``; None for other sites.
        grid: Frames, height and width of the video tokens, where known; an expression for a side
            that each run may have anew.
        text: Tokens before and after the video of a joint site, where known.
        expected: Whether a user would expect it sparse: it is not cross-attention, not shorter than
            ``min_tokens`` and not named by ``dense_layers``.
        sparse: Whether it is rewritten.
        reason: One sentence: why it is sparse, or why it stays dense.
        count: How many calls it stands for: more than one where a graph runs several times.
        cost: Of one call; None where nobody counted.
        reordered: Where its tokens are brought into block order: ``"once"`` for the whole graph,
            ``"in parts"`` of the graph or ``"here"``, around this call, and the operation that is
            why; None where they are not.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    length_kv: int | str
    dtype: torch.dtype
    layer: int | None
    grid: Grid | None
    text: tuple[int | str, int | str] | None
    expected: bool
    sparse: bool
    reason: str
    count: int = 1
    cost: Cost | None = None
    reordered: str | None = None


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of an attention call in any layout, seen as ``[B, H, L, D]``.

    Attributes:
        node: The tensor.
        order: Which of its dimensions each of the four is. An operand that cannot be seen so has
            its own dimensions here.
    """

    node: Node
    order: Order

    @property
    def shape(self) -> tuple[int | torch.SymInt, ...]:
        """Sizes of the four."""
        return sizes_of(value_of(self.node).shape, self.order)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return value_of(self.node).dtype

    @property
    def token_dim(self) -> int:
        """The tensor's dimension that holds tokens."""
        (dim,) = self.order[-2]
        return dim


def sizes_of(shape: Sequence[Any], order: Order) -> tuple[Any, ...]:
    """Of ``[B, H, L, D]``, by the shape of a tensor that is laid out so."""
    return tuple(math.prod(shape[dim] for dim in dims) for dims in order)


def in_order(*dims: int) -> Order:
    """Of one dimension each."""
    return tuple((dim,) for dim in dims)


def recorded(node: Node) -> Any:
    """What tracing recorded of a node's output: ``val`` after export, ``example_value`` in Dynamo.

    Returns:
        A fake tensor, a number, a sequence of them, or None.
    """
    return node.meta.get("val", node.meta.get("example_value"))


def value_of(node: Node) -> torch.Tensor:
    """The node's fake tensor.

    Raises:
        ValueError: The graph was traced without shapes.
    """
    value = recorded(node)
    if isinstance(value, torch.Tensor):
        return value
    raise ValueError(f"node {node.name} has no shape: trace with torch.compile or torch.export")
