"""Keep a band of frames or a band of places, whichever a head needs: Sparse VideoGen."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.kernels.constants import constant
from uta_fx.order import Grid
from uta_fx.policies.base import Selection
from uta_fx.policies.layout import block_count, mostly, raster_places, share_of_band


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpatialTemporal:
    """The choice of Sparse VideoGen (arXiv:2502.01776): each head is spatial or temporal.

    A spatial head attends to tokens at most so far away in raster order: the frames around its own.
    A temporal head attends to tokens at most so far away when frames run fastest: the places around
    its own, in all frames. Both bands reach L (1 - sqrt(1 - density)), which makes them as dense as
    asked for; a pair of blocks is kept where at least half of its pairs of tokens are in the band.
    Each call attends densely for a few sampled rows, and each head takes the band that errs less
    there. ``Config.budget`` has no effect.

    Published: bands of blocks of 128 in two token orders, heads moved between them; 64 rows drawn
    anew from the first 10,000 at each call; the first frame kept for Wan. Here all heads are in one
    order (``"auto"``: raster), and the rows are drawn once, from the whole video: the same for each
    call, so that a result can be repeated.

    Attributes:
        rows: How many are sampled, at least 1.
        sink: Whether all attend to the first frame, as for Wan.
        seed: Of the sample.

    Raises:
        ValueError: ``rows`` is less than 1.
    """

    rows: int = 64
    sink: bool = True
    seed: int = 0

    order: ClassVar[str] = "none"
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        query, key, value = selection.query, selection.key, selection.value
        layout = selection.layout("spatial_temporal")
        bands = band_blocks(query, *layout, selection.density, self.sink)  # [2, Nq, Nk]
        rows = sampled_rows(query, query.shape[2], self.rows, self.seed)
        sample = query.index_select(2, rows).float() * selection.scale
        logits = sample @ key.float().mT  # [B, H, rows, L]
        dense = logits.softmax(-1) @ value.float()
        block = torch.arange(key.shape[2], device=key.device) // selection.block_kv
        errors = []
        for band in bands.unbind(0):
            inside = band.index_select(0, rows // selection.block_q).index_select(1, block)
            output = logits.masked_fill(~inside, -torch.inf).softmax(-1) @ value.float()
            errors.append((output - dense).square().mean((2, 3)))  # [B, H]
        spatial = (errors[0] <= errors[1])[..., None, None]
        return torch.where(spatial, bands[0], bands[1])


@constant("int[] grid, str order, int block_q, int block_kv, float density, bool sink")
def band_blocks(
    grid: Grid, order: str, block_q: int, block_kv: int, density: float, sink: bool
) -> Tensor:
    """The blocks of spatial and of temporal heads: boolean ``[2, Nq, Nk]``."""
    frames, height, width = grid
    spatial = raster_places(grid, order, block_kv)
    frame, place = spatial // (height * width), spatial % (height * width)
    reach = reach_of(len(spatial), density)
    masks = torch.stack(
        [
            mostly(share_of_band(along, reach, block_q, block_kv))
            for along in (spatial, place * frames + frame)
        ]
    )
    if sink:
        first = torch.zeros(block_count(len(frame), block_kv), dtype=torch.bool)
        first[(frame == 0).nonzero().flatten() // block_kv] = True
        masks |= first
    return masks


def reach_of(tokens: int, density: float) -> int:
    """How far a band reaches that holds the share ``density`` of all pairs of tokens."""
    return round(tokens * (1 - math.sqrt(1 - density)))


@constant("int tokens, int rows, int seed")
def sampled_rows(tokens: int, rows: int, seed: int) -> Tensor:
    """Distinct rows in ascending order: int64 ``[min(rows, tokens)]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:rows].sort().values
