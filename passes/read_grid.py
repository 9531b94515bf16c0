"""Read the token grid, frames x height x width, from the patch embedding in the graph."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from uta_fx.passes.site import Grid, value_of

_CONV2D = (F.conv2d, torch.conv2d, torch.ops.aten.conv2d.default)
_CONV3D = (F.conv3d, torch.conv3d, torch.ops.aten.conv3d.default)


def read_grid(gm: GraphModule, batch: int, tokens: int) -> Grid | None:
    """The grid of ``tokens`` video tokens, or None where the graph does not say.

    A patch embedding is a convolution: ``conv3d`` to ``[B, C, F, H, W]``, or ``conv2d`` frame by
    frame to ``[B * F, C, H, W]``. A grid is believed only when its product is the number of tokens,
    and only when no other convolution claims a different one.
    """
    grids = {grid for grid in _candidates(gm, batch) if math.prod(grid) == tokens}
    return grids.pop() if len(grids) == 1 else None


def _candidates(gm: GraphModule, batch: int) -> list[Grid]:
    grids = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _CONV2D + _CONV3D:
            continue
        shape = value_of(node).shape
        try:
            if node.target in _CONV3D:
                frames, height, width = (int(side) for side in shape[2:])
            else:
                frames, rest = divmod(int(shape[0]), batch)
                if rest:
                    continue
                height, width = (int(side) for side in shape[2:])
        except (RuntimeError, TypeError, ValueError):
            continue  # a size known only at run time
        grids.append((frames, height, width))
    return grids
