"""Keep the blocks that are near."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.kernels.constants import constant
from uta_fx.order import Grid
from uta_fx.policies.base import Selection, spend_budget
from uta_fx.policies.layout import block_sizes, coordinates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Keep the nearest blocks, by the distance of their centers, until the density is reached.

    A local window of any shape of grid and any order: what attention would need if it were local.
    The same in every head and at every step.

    Attributes:
        frame_distance: How many rows or columns apart two consecutive frames count, above 0; less
            than 1 makes the window longer in time.

    Raises:
        ValueError: ``frame_distance`` is not positive.
    """

    frame_distance: float = 1.0

    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.frame_distance > 0:
            raise ValueError(f"frame_distance must be above 0, got {self.frame_distance}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``, the same for each head."""
        layout = selection.layout("window")
        mask = window_blocks(
            selection.query, *layout, self.frame_distance, selection.density, selection.budget
        )
        return mask.expand(*selection.query.shape[:2], -1, -1)


@constant(
    "int[] grid, str order, int block_q, int block_kv, float frame_distance, float density,"
    " str budget"
)
def window_blocks(
    grid: Grid,
    order: str,
    block_q: int,
    block_kv: int,
    frame_distance: float,
    density: float,
    budget: str,
) -> Tensor:
    """The blocks that ``Window`` keeps: boolean ``[Nq, Nk]``."""
    frame, row, column = coordinates(grid, order, block_kv)
    tokens = torch.stack([frame * frame_distance, row, column], -1).double()
    queries, keys = (_centers(tokens, block) for block in (block_q, block_kv))
    distance = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
    return spend_budget(-distance[None, None], density, budget)[0, 0]


def _centers(tokens: Tensor, block: int) -> Tensor:
    """Means of blocks: ``[L, 3] -> [N, 3]``."""
    sizes = block_sizes(len(tokens), block)
    total = torch.zeros(len(sizes), 3, dtype=tokens.dtype)
    total.index_add_(0, torch.arange(len(tokens)) // block, tokens)
    return total / sizes[:, None]
