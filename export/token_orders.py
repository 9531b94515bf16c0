"""Token orders of a grid that only a run knows, in operations that an exporter has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from uta_fx.order import computed_index


def spell_out_orders(program: ExportedProgram) -> ExportedProgram:
    """The same program, in which token orders of symbolic grids are computed."""
    operator = torch.ops.uta.token_index.default
    found = program.graph.find_nodes(op="call_function", target=operator)
    if all(isinstance(side, int) for node in found for side in node.args[1]):
        return program
    return program.run_decompositions({operator: _token_index})


def _token_index(like: Tensor, grid: Any, order: str, block: int, back: bool) -> Tensor:
    if all(isinstance(side, int) for side in grid):
        return NotImplemented
    return computed_index(like, grid, order, block, back)
