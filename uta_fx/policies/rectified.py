"""Keep most of pooled attention, and the neighbours: the selection of Rectified SpaAttn."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.kernels.constants import constant
from uta_fx.order import Grid
from uta_fx.policies.base import Selection
from uta_fx.policies.layout import block_count, raster_places
from uta_fx.rectification import pooled_shares


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rectified:
    """The critical blocks of Rectified SpaAttn (arXiv:2511.19835).

    Blocks, and all text as one more column, are ranked by a row's pooled attention in which text
    keys are not pooled. The first max(c, k) are kept: c is one more than the ranks whose running
    sum is at most ``mass``, k is ``Config.density`` of all blocks, rounded down (1 keeps all).
    Besides, a row keeps the blocks that hold a neighbour of one of its tokens, and, where there is
    no text, the first blocks keep one another, as many as a frame has. ``Config.budget`` has no
    effect.

    Published: blocks of 128 x 128 along the generalised Hilbert curve, which ``reorder="auto"``
    takes; densities of 0.1 to 0.25. Belongs to the tail ``rectified``, and works with any.

    Attributes:
        mass: p of the published top-p, in [0, 1].
        reach: How far away neighbours are along each axis, in tokens; 0 for a row's own places.
        first_frame: Whether the first blocks keep one another.

    Raises:
        ValueError: A field is outside its range.
    """

    mass: float = 0.3
    reach: int = 1
    first_frame: bool = True

    order: ClassVar[str] = "hilbert"
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass must be in [0, 1], got {self.mass}")
        if self.reach < 0:
            raise ValueError(f"reach must be at least 0, got {self.reach}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        blocks, text = pooled_shares(selection)
        has_text = selection.text_key.shape[2] > 0
        columns = torch.cat([blocks, text], -1) if has_text else blocks
        ranked, order = columns.sort(-1, descending=True)
        above = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
        rank = torch.arange(columns.shape[-1], device=columns.device)
        # a product that misses an integer by rounding is it
        least = int(selection.density * blocks.shape[-1] * (1 + 1e-12))
        kept = (above <= self.mass) | (rank < least) | (least == blocks.shape[-1])
        critical = torch.zeros_like(kept).scatter(-1, order, kept)[..., : blocks.shape[-1]]
        first_frame = self.first_frame and not has_text
        layout = selection.layout("rectified")
        return critical | near_blocks(selection.query, *layout, self.reach, first_frame)


@constant("int[] grid, str order, int block_q, int block_kv, int reach, bool first_frame")
def near_blocks(
    grid: Grid, order: str, block_q: int, block_kv: int, reach: int, first_frame: bool
) -> Tensor:
    """Blocks that hold neighbours of one another, and those of the first frame: ``[Nq, Nk]``."""
    places = raster_places(grid, order, block_kv)
    place = torch.empty_like(places).scatter(0, places, torch.arange(len(places))).view(grid)
    rows, columns = block_count(len(places), block_q), block_count(len(places), block_kv)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for shift in itertools.product(range(-reach, reach + 1), repeat=3):
        here, there = place, place
        for axis, by in enumerate(shift):
            length = max(0, grid[axis] - abs(by))
            here = here.narrow(axis, max(0, -by) if length else 0, length)
            there = there.narrow(axis, max(0, by) if length else 0, length)
        mask[here // block_q, there // block_kv] = True
    if first_frame:
        mask[: rows // grid[0], : columns // grid[0]] = True
    return mask
