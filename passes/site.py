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
        kind: ``"self"``, ``"joint"`` (video and text in one sequence), ``"cross"``, ``"unknown"``.
        shape: Batch, heads, query length and head dim; a symbolic size is given as text.
        length_kv: Key length.
        dtype: Of the query.
        layer: Index among the self- and joint attention sites of the graph that have at least
            ``min_tokens``; None for other sites.
        grid: Frames, height and width of the video tokens, where known.
        text: Tokens before and after the video of a joint site, where known.
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
    text: tuple[int | str, int | str] | None
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
