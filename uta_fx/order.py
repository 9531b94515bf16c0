"""Orders of the video tokens in which a block of consecutive tokens is compact."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uta_fx.hilbert import curve
from uta_fx.kernels.constants import constant

Grid = tuple[int, int, int]

ORDERS = ("auto", "none", "tile", "morton", "hilbert")


class TokenOrder(NamedTuple):
    """A permutation of the tokens and the way back, both int64 ``[frames * height * width]``.

    Attributes:
        order: Raster index of each token in the new order: ``x.index_select(dim, order)`` brings
            tokens into it.
        inverse: Place in the new order of each token in raster order:
            ``x.index_select(dim, inverse)`` brings tokens back.
    """

    order: Tensor
    inverse: Tensor


def checked_grid(value: Any) -> Grid:
    """A grid that a user gives.

    Raises:
        ValueError: It is not three whole numbers, each at least 1.
    """
    try:
        frames, height, width = (_side(x) for x in value)
    except (TypeError, ValueError):
        raise ValueError(
            f"grid must be three ints (frames, height, width), got {value!r}"
        ) from None
    if min(frames, height, width) < 1:
        raise ValueError(f"grid must hold positive sides (frames, height, width), got {value!r}")
    return frames, height, width


def _side(x: Any) -> int:
    if isinstance(x, bool):
        raise TypeError
    return operator.index(x)


def token_order(grid: Grid, order: str, block: int, device: torch.device | str) -> TokenOrder:
    """The order in which tokens are blocked.

    Args:
        grid: Frames, height and width in tokens; raster order runs over width first.
        order: ``"tile"``, ``"morton"`` or ``"hilbert"``.
        block: Tokens in a block, a power of two.
        device: Where the result lives.
    """
    like = torch.empty(0, device=device)
    return TokenOrder(
        *(token_index(like, list(grid), order, block, back) for back in (False, True))
    )


@constant(
    "SymInt[] grid, str order, int block, bool back",
    shape=lambda grid, *_: (math.prod(grid),),
    dtype=torch.int64,
)
def token_index(grid: Grid, order: str, block: int, back: bool) -> Tensor:
    """``TokenOrder.order``, or (``back``) its inverse; arguments as of ``token_order``."""
    if order == "hilbert":
        _, height, width = grid
        forward = torch.tensor([(f * height + y) * width + x for f, y, x in curve(grid)])
        return _inverse(forward) if back else forward
    if order == "morton":
        place = _morton_place(_axes(grid), grid, max(grid).bit_length())
    else:
        place = _tile_place(_axes(grid), grid, tile_shape(grid, block))
    return place.flatten() if back else _inverse(place.flatten())


COMPUTED_ORDERS = ("tile", "morton")
"""Orders that ``computed_index`` knows."""
MORTON_BITS = 16  # of a side in ``computed_index``


def computed_index(like: Tensor, grid: Grid, order: str, block: int, back: bool) -> Tensor:
    """``token_index`` in operations on tensors, for a grid of which a trace knows symbols alone.

    The same as ``token_index`` for every grid; with ``"morton"`` for sides below 65536 tokens.

    Args:
        like: A tensor on the device of the result.
        grid: As of ``token_order``; sides may be symbolic.
        order: A name in ``COMPUTED_ORDERS``.
        block: Tokens in a block.
        back: As of ``token_index``.
    """
    axes = _axes(grid, like.device)
    if order == "morton":
        place = _morton_place(axes, grid, MORTON_BITS)
    else:
        place = _tile_place(axes, grid, _computed_tile_shape(grid, block, like.device))
    return place.flatten() if back else _inverse(place.flatten())


def _axes(grid: Grid, device: torch.device | str = "cpu") -> list[Tensor]:
    """``[F, 1, 1], [1, H, 1], [1, 1, W]``: what depends on one coordinate needs one axis."""
    return [
        torch.arange(length, device=device).view([-1 if d == dim else 1 for d in range(3)])
        for dim, length in enumerate(grid)
    ]


def _inverse(index: Tensor) -> Tensor:
    raster = torch.arange(index.shape[0], device=index.device)
    return torch.empty_like(raster).scatter(0, index, raster)


def tile_shape(grid: Grid, block: int) -> Grid:
    """Sides of a tile of ``block`` tokens: close to a cube, and close to dividing the grid.

    Among all sides that are powers of two with product ``block``, the one with the smallest
    surface times the number of tokens in the whole tiles that cover the grid: 4 x 4 x 4 for 64
    tokens wherever it divides the grid, 1 x 8 x 8 for a single frame.
    """
    sides = [1 << bits for bits in range(block.bit_length())]
    tiles = [(a, b, block // (a * b)) for a, b in itertools.product(sides, sides) if a * b <= block]
    return min(tiles, key=lambda tile: _tile_cost(tile, grid))


def _tile_cost(tile: Sequence[Any], grid: Grid) -> Any:
    """A whole number: surface times tokens in the tiles that cover the grid."""
    frames, height, width = tile
    cost = frames * height + height * width + width * frames
    for side, length in zip(tile, grid, strict=True):
        cost = cost * (_tiles_along(length, side) * side)
    return cost


def _tiles_along(length: Any, side: Any) -> Any:
    return (length + side - 1) // side


def _computed_tile_shape(grid: Grid, block: int, device: torch.device) -> list[Tensor]:
    """``tile_shape`` as tensors without dimensions."""
    count = block.bit_length()
    bits = torch.arange(count, device=device)
    first, second = bits.repeat_interleave(count), bits.repeat(count)
    third = count - 1 - first - second
    frames, height, width = (2**power for power in (first, second, third.clamp(min=0)))
    cost = _tile_cost((frames, height, width), grid).double()  # exact: far below 2**53
    best = cost.masked_fill(third < 0, torch.inf).argmin()  # of equals the first
    return [x.index_select(0, best.view(1))[0] for x in (frames, height, width)]


def _tile_place(axes: Sequence[Tensor], grid: Grid, sides: Sequence[Any]) -> Tensor:
    """Tokens before each token, ``[F, H, W]``, when tiles follow one another as an ox ploughs.

    Where tiles do not divide the grid those at the border hold fewer tokens, and blocks straddle
    tiles: since consecutive tiles are neighbours, such a block is still compact.
    """
    tile = [axis // side for axis, side in zip(axes, sides, strict=True)]
    first = [number * side for number, side in zip(tile, sides, strict=True)]
    inner = [axis - start for axis, start in zip(axes, first, strict=True)]
    size = [_extent(*along) for along in zip(axes, sides, grid, strict=True)]
    rows = _tiles_along(grid[1], sides[1])
    upward = tile[0] % 2 == 1
    row = tile[0] * rows + torch.where(upward, rows - 1 - tile[1], tile[1])  # in order of visit
    rows_before = torch.where(upward, grid[1] - first[1] - size[1], first[1])
    columns_before = torch.where(row % 2 == 1, grid[2] - first[2] - size[2], first[2])
    before = (first[0] * grid[1] + size[0] * rows_before) * grid[2]
    before = before + size[0] * size[1] * columns_before
    return before + (inner[0] * size[1] + inner[1]) * size[2] + inner[2]


def _morton_place(axes: Sequence[Tensor], grid: Grid, bits: int) -> Tensor:
    """Tokens before each token, ``[F, H, W]``, on the Z-order curve in three dimensions.

    The curve halves a cell by frames, then by rows, then by columns, and visits the lower half
    first: a token in the upper half comes after all tokens of the lower one.
    """
    before = torch.zeros((), dtype=torch.int64, device=axes[0].device)
    for bit in range(bits):
        cell = [_extent(axis, 2 << bit, length) for axis, length in zip(axes, grid, strict=True)]
        half = [_extent(axis, 1 << bit, length) for axis, length in zip(axes, grid, strict=True)]
        frames, rows, columns = (axis & 1 << bit for axis in axes)  # 0 in a lower half, or its side
        before = before + frames * cell[1] * cell[2]
        before = before + half[0] * (rows * cell[2] + half[1] * columns)
    return before


def _extent(axis: Tensor, side: Any, length: int) -> Tensor:
    """How many of ``length`` coordinates lie in the same cell of ``side`` as each of ``axis``."""
    return (length - axis // side * side).clamp(max=side)
