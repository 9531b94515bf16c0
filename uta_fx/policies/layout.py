"""Where the tokens of a grid lie among blocks: what static policies are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uta_fx.order import Grid, token_order

CHUNK = 1 << 22  # numbers in a piece of a table of blocks x tokens


def raster_places(grid: Grid, order: str, block_kv: int) -> Tensor:
    """Raster index of each token in the order of the blocks: int64 ``[L]``."""
    if order == "none":
        return torch.arange(math.prod(grid))
    return token_order(grid, order, block_kv, "cpu").order


def coordinates(grid: Grid, order: str, block_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of each token in the order of the blocks: int64 ``[L]`` each."""
    places = raster_places(grid, order, block_kv)
    _, height, width = grid
    return places // (height * width), places // width % height, places % width


def block_count(tokens: int, block: int) -> int:
    """Blocks of ``block`` tokens, the last one perhaps ragged."""
    return -(-tokens // block)


def block_sizes(tokens: int, block: int) -> Tensor:
    """Tokens in each block: float64 ``[N]``."""
    first = torch.arange(0, tokens, block, dtype=torch.float64)
    return (tokens - first).clamp(max=block)


def mostly(shares: Tensor) -> Tensor:
    """Pairs of blocks of which at least half is wanted, and the best of each row in any case.

    Args:
        shares: ``[..., Nq, Nk]``, the share of its pairs of tokens that a rule wants.
    """
    return (shares >= 0.5) | (shares == shares.amax(-1, keepdim=True))


def share_of_groups(group: Tensor, wanted: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Which share of its pairs of tokens each pair of blocks has in wanted pairs of groups.

    Args:
        group: int64 ``[L]``, the group of each token in the order of the blocks.
        wanted: Boolean ``[G, G]``, by group of the query and of the key.
        block_q: Query rows in a block.
        block_kv: Keys in a block.

    Returns:
        float64 ``[Nq, Nk]``.
    """
    rows, columns = (_shares(group, len(wanted), block) for block in (block_q, block_kv))
    return rows @ wanted.double() @ columns.T


def _shares(group: Tensor, groups: int, block: int) -> Tensor:
    """The share of each block in each group: float64 ``[N, G]``."""
    tokens = len(group)
    blocks = torch.arange(tokens) // block
    count = torch.zeros(block_count(tokens, block), groups, dtype=torch.float64)
    count.index_put_((blocks, group), torch.ones((), dtype=torch.float64), accumulate=True)
    return count / block_sizes(tokens, block)[:, None]


def share_of_band(place: Tensor, reach: int, block_q: int, block_kv: int) -> Tensor:
    """Which share of its pairs of tokens each pair of blocks has within a band.

    Args:
        place: int64 ``[L]``, a permutation: where each token, in the order of the blocks, stands in
            the order in which the band is one.
        reach: Pairs at most so far apart there are in the band.
        block_q: Query rows in a block.
        block_kv: Keys in a block.

    Returns:
        float64 ``[Nq, Nk]``.
    """
    tokens = len(place)
    low, high = (place - reach).clamp(min=0), (place + reach + 1).clamp(max=tokens)
    row = torch.arange(tokens) // block_q
    parts = []
    for part in torch.arange(tokens).split(max(1, CHUNK // tokens) * block_kv):
        block = (part - part[0]) // block_kv
        blocks = block_count(len(part), block_kv)
        # how many keys of each block stand before each place
        before = torch.zeros(blocks, tokens + 1, dtype=torch.int32)
        before[block, place[part] + 1] = 1
        before = before.cumsum(1, dtype=torch.int32)
        inside = before[:, high] - before[:, low]
        count = torch.zeros(blocks, block_count(tokens, block_q), dtype=torch.int32)
        parts.append(count.index_add_(1, row, inside))
    count = torch.cat(parts).T.double()
    return count / block_sizes(tokens, block_q)[:, None] / block_sizes(tokens, block_kv)
