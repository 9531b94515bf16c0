"""Sizes that are numbers of selected tokens, as far as a graph shows what they add up to.

``x[mask]`` has as many rows as the mask has true entries, and each such call a symbol of its own
for that. Those of one mask are the same number; with those of its complement they are all.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from uta_fx.passes.read_node import NEGATIONS, argument, name_of, written_by
from uta_fx.passes.site import recorded
from uta_fx.passes.trace_axes import Size

Counts = dict[sympy.Symbol, sympy.Expr]


def count_selected(graph: Graph) -> Counts:
    """Each symbol that counts what a mask selects, by one symbol for each mask."""
    if any(_is_written_mask(node) for node in graph.nodes):
        return {}
    ones: dict[Node, sympy.Expr] = {}
    counts: Counts = {}
    for node in graph.nodes:
        mask = mask_of(node)
        if mask is None:
            continue
        symbol, total = recorded(node).shape[0].node.expr, recorded(mask).shape[0]
        inverted = name_of(mask) in NEGATIONS
        whole = argument(mask, 0, "input") if inverted else mask
        count = ones.setdefault(whole, total - symbol if inverted else symbol)
        counts[symbol] = total - count if inverted else count
    return counts


def counted(size: Size, counts: Counts) -> Size:
    """A size as a number, where what masks and their complements select adds up to all.

    Args:
        size: Of a tensor in the graph, or computed from such sizes.
        counts: Of ``count_selected``.

    Returns:
        An int, or the size as it was.
    """
    if isinstance(size, int):
        return size
    expression = size.node.expr.xreplace(counts)
    return int(expression) if expression.is_number else size


def mask_of(node: Node) -> Node | None:
    """What selects rows where a node is ``x[mask]``, of as many as only a run knows."""
    if name_of(node) not in ("getitem", "index"):
        return None
    value, mask = recorded(node), argument(node, 1, "indices")
    if isinstance(mask, (list, tuple)) and len(mask) == 1:
        (mask,) = mask
    known = isinstance(mask, Node) and isinstance(value, torch.Tensor) and value.dim() > 0
    if not known or isinstance(value.shape[0], int) or not value.shape[0].node.expr.is_symbol:
        return None
    whole: Any = recorded(mask)
    selects = whole.dtype == torch.bool and whole.dim() == 1 and isinstance(whole.shape[0], int)
    return mask if selects else None


def _is_written_mask(node: Node) -> bool:
    """Whether it changes a mask, so that one name may stand for two of them."""
    kinds = (torch.bool, torch.uint8, torch.int8)
    return any(
        isinstance(recorded(x), torch.Tensor) and recorded(x).dtype in kinds
        for x in written_by(node)
    )
