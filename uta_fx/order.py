"""Orders of the video tokens in which a block of consecutive tokens is compact."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

Grid = tuple[int, int, int]

ORDERS = ("auto", "none", "tile", "morton")


def token_order(grid: Grid, order: str, block: int, device: torch.device | str) -> Tensor:
    """Raster index of each token in the new order.

    Args:
        grid: Frames, height and width in tokens; raster order runs over width first.
        order: ``"tile"`` (``"auto"`` is the same) or ``"morton"``.
        block: Tokens in a block, a power of two.
        device: Where the result lives.

    Returns:
        int64 ``[frames * height * width]``, a permutation: ``x.index_select(dim, order)`` brings
        tokens into the new order, ``argsort`` of it brings them back.
    """
    rank = _morton_rank(grid, device) if order == "morton" else _tile_rank(grid, block, device)
    return rank.argsort()


def tile_shape(grid: Grid, block: int) -> Grid:
    """Sides of a tile of ``block`` tokens: close to a cube, and close to dividing the grid.

    Among all sides that are powers of two with product ``block``, the one with the smallest
    surface times the factor by which whole tiles would overfill the grid: 4 x 4 x 4 for 64 tokens
    wherever it divides the grid, 1 x 8 x 8 for a single frame.
    """

    def cost(tile: Grid) -> float:
        frames, height, width = tile
        surface = frames * height + height * width + width * frames
        overfill = 1.0
        for side, length in zip(tile, grid, strict=True):
            overfill *= -(-length // side) * side / length
        return surface * overfill

    sides = [1 << bits for bits in range(block.bit_length())]
    tiles = [(a, b, block // (a * b)) for a, b in itertools.product(sides, sides) if a * b <= block]
    return min(tiles, key=cost)


def _tile_rank(grid: Grid, block: int, device: torch.device | str) -> Tensor:
    """Position of each token when tiles follow one another as an ox ploughs.

    Where tiles do not divide the grid those at the border hold fewer tokens, and blocks straddle
    tiles: since consecutive tiles are neighbours, such a block is still compact.
    """
    tile = tile_shape(grid, block)
    counts = [-(-length // side) for length, side in zip(grid, tile, strict=True)]
    axes = [torch.arange(length, device=device) for length in grid]
    outer = [axis // side for axis, side in zip(axes, tile, strict=True)]
    inner = [axis % side for axis, side in zip(axes, tile, strict=True)]
    frame, row, column = (
        axis.view([-1 if d == dim else 1 for d in range(3)]) for dim, axis in enumerate(outer)
    )
    row = torch.where(frame % 2 == 1, counts[1] - 1 - row, row)
    column = torch.where((frame * counts[1] + row) % 2 == 1, counts[2] - 1 - column, column)
    within = (inner[0][:, None, None] * tile[1] + inner[1][:, None]) * tile[2] + inner[2]
    return (((frame * counts[1] + row) * counts[2] + column) * block + within).flatten()


def _morton_rank(grid: Grid, device: torch.device | str) -> Tensor:
    """Interleaved bits of the coordinates: the Z-order curve in three dimensions."""
    axes = torch.meshgrid(*(torch.arange(length, device=device) for length in grid), indexing="ij")
    rank = torch.zeros_like(axes[0])
    for bit in range(max(grid).bit_length()):
        for place, axis in enumerate(reversed(axes)):
            rank = rank | ((axis >> bit & 1) << (3 * bit + place))
    return rank.flatten()
