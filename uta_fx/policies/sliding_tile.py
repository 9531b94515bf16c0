"""Keep a window of tiles: Sliding Tile Attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.kernels.constants import constant
from uta_fx.order import Grid
from uta_fx.policies.base import Selection
from uta_fx.policies.layout import coordinates, mostly, share_of_groups


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlidingTile:
    """The windows of Sliding Tile Attention (arXiv:2502.04507): a function of the grid alone.

    The grid is cut into tiles. A query's window of tiles is centered on its own tile, or on the
    nearest at which the window does not leave the grid: with c = clamp(q, w // 2, n - 1 - w // 2)
    along an axis of n tiles, tiles with ``|c - k| <= w // 2`` are kept. A pair of blocks is kept
    where at least half of its pairs of tokens are.

    Published: tiles of 6 x 8 x 8 tokens, each the work of one program of 384 rows, and windows that
    were searched for by step, layer and head. Here a window is for all heads, or there is one for
    each; layers and steps have their own where they have graphs of their own. ``Config.density``
    and ``Config.budget`` have no effect.

    Attributes:
        tile: Frames, rows and columns of a tile, in tokens.
        windows: Frames, rows and columns of the window, in tiles: one for all heads, or one a head.

    Raises:
        ValueError: A number is not positive, or there is no window.
    """

    tile: Grid = (6, 8, 8)
    windows: tuple[Grid, ...] = ((3, 3, 3),)

    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, sides in (("tile", self.tile), *(("windows", x) for x in self.windows)):
            if len(sides) != 3 or min(sides) < 1:
                raise ValueError(f"{name} must hold three positive numbers, got {sides}")
        if not self.windows:
            raise ValueError("windows must hold one window, or one a head, got none")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``.

        Raises:
            ValueError: There are several windows, but not one for each head.
        """
        batch, heads = selection.query.shape[:2]
        if len(self.windows) not in (1, heads):
            raise ValueError(
                f"windows must hold one window, or one for each of {heads} heads,"
                f" got {len(self.windows)}"
            )
        masks = [
            sliding_tile_blocks(
                selection.query, *selection.layout("sliding_tile"), list(self.tile), list(window)
            )
            for window in self.windows
        ]
        return torch.stack(masks).expand(batch, heads, -1, -1)


@constant("int[] grid, str order, int block_q, int block_kv, int[] tile, int[] window")
def sliding_tile_blocks(
    grid: Grid, order: str, block_q: int, block_kv: int, tile: Grid, window: Grid
) -> Tensor:
    """The blocks that ``SlidingTile`` keeps with one window: boolean ``[Nq, Nk]``."""
    counts = [-(-length // side) for length, side in zip(grid, tile, strict=True)]
    places = coordinates(grid, order, block_kv)
    frame, row, column = (x // side for x, side in zip(places, tile, strict=True))
    wanted = tiles_in_window((counts[0], counts[1], counts[2]), window)
    shares = share_of_groups(
        (frame * counts[1] + row) * counts[2] + column, wanted, block_q, block_kv
    )
    return mostly(shares)


def tiles_in_window(counts: Grid, window: Grid) -> Tensor:
    """Which tiles each tile sees: boolean ``[n, n]``, tiles in raster order.

    Args:
        counts: Tiles along each axis.
        window: Tiles of the window along each axis.
    """
    seen = torch.ones(1, 1, dtype=torch.bool)
    for count, width in zip(counts, window, strict=True):
        place, half = torch.arange(count), width // 2
        center = place.clamp(min=half).clamp(max=count - 1 - half)
        along = (center[:, None] - place).abs() <= half
        seen = torch.kron(seen.int(), along.int()).bool()
    return seen
