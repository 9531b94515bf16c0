"""Tokens joined from what masks and their complements select, as one sort of a known length.

HunyuanVideo 1.5 puts text that is valid before text that is not. By ``x[mask]`` each part has a
length that only a run knows, though the whole has not: a plugin and an engine want to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from uta_fx.passes.count_selected import Counts, count_selected, counted, mask_of
from uta_fx.passes.read_node import argument, name_of
from uta_fx.passes.site import recorded


def sort_selected(program: ExportedProgram, dynamic_shapes: Any = None) -> ExportedProgram:
    """The same program with such tokens sorted.

    Args:
        program: With example inputs.
        dynamic_shapes: With which it was exported; None for none.
    """
    module = program.module()
    assert isinstance(module, GraphModule) and program.example_inputs is not None
    counts = count_selected(module.graph)
    joined = {node: total for node in module.graph.nodes if (total := _length(node, counts))}
    if not joined:
        return program
    for node, total in joined.items():
        parts = [_part(part) for part in argument(node, 0, "tensors")]
        node.target, node.args, node.kwargs = _sorted, (parts, total), {}
    for node in list(module.graph.nodes):
        value = recorded(node)
        if isinstance(value, torch.SymInt) and isinstance(counted(value, counts), int):
            node.replace_all_uses_with(counted(value, counts))  # type: ignore[arg-type]
        elif name_of(node) == "assert_scalar" and _is_about(node, counts):
            module.graph.erase_node(node)  # a count is never negative nor more than there are
    module.graph.eliminate_dead_code()
    module.recompile()
    args, kwargs = program.example_inputs
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)


def _length(node: Node, counts: Counts) -> int | None:
    """How many rows a node has that joins selected rows alone; None for every other node."""
    if name_of(node) != "cat" or argument(node, 1, "dim", 0) != 0:
        return None
    size = recorded(node).shape[0]
    total = counted(size, counts)
    parts = argument(node, 0, "tensors")
    selected = all(mask_of(_selection(part)) is not None for part in parts)
    return total if selected and isinstance(total, int) else None


def _selection(part: Node) -> Node:
    """What is joined, or what zeros in its place are like."""
    source = argument(part, 0, "input")
    return source if name_of(part) == "zeros_like" and isinstance(source, Node) else part


def _part(part: Node) -> tuple[Any, Node | None, bool]:
    """The rows that are selected from, the mask, and whether zeros stand for what is selected."""
    selection = _selection(part)
    return argument(selection, 0, "input"), mask_of(selection), part is not selection


def _sorted(parts: Sequence[tuple[Tensor, Tensor, bool]], total: int) -> Tensor:
    """``torch.cat`` of what is selected from each part."""
    rows = torch.cat([torch.zeros_like(x) if zeros else x for x, _, zeros in parts])
    masks = torch.cat([mask for _, mask, _ in parts])
    first = masks.sort(stable=True, descending=True)[1][:total]
    return rows.index_select(0, first)


def _is_about(node: Node, counts: Counts) -> bool:
    """Whether an assertion is about counts of selected rows alone."""
    condition = recorded(argument(node, 0, "self"))
    symbols = condition.node.expr.free_symbols if isinstance(condition, torch.SymBool) else set()
    return bool(symbols) and symbols <= set(counts)
