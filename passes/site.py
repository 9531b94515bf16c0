"""One attention call of a graph: what it is, what was decided about it, and why."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        name: Path of the module that makes the call, or the node's name.
        kind: ``"self"``, ``"cross"`` or ``"unknown"``.
        shape: Batch, heads, query length and head dim; a symbolic size is given as text.
        length_kv: Key length.
        dtype: Of the query.
        layer: Index among the self-attention sites of the graph; None for other sites.
        grid: Frames, height and width of the tokens, where known.
        expected: Whether a user would expect it sparse: it is not cross-attention, not shorter than
            ``min_tokens`` and not named by ``dense_layers``.
        sparse: Whether it is rewritten.
        reason: One sentence: why it is sparse, or why it stays dense.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    length_kv: int | str
    dtype: torch.dtype
    layer: int | None
    grid: Grid | None
    expected: bool
    sparse: bool
    reason: str


def value_of(node: Node) -> torch.Tensor:
    """The node's fake tensor: ``val`` after export, ``example_value`` inside Dynamo.

    Raises:
        ValueError: The graph was traced without shapes.
    """
    for key in ("val", "example_value"):
        if isinstance(node.meta.get(key), torch.Tensor):
            return node.meta[key]
    raise ValueError(f"node {node.name} has no shape: trace with torch.compile or torch.export")
