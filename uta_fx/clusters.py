"""Tokens grouped by k-means, and sorted so that no block holds tokens of two clusters."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from uta_fx.statistics import BlockStatistics, block_statistics


class Centroids(NamedTuple):
    """Where the clusters of one site lie: what the next call may start from.

    Attributes:
        query: float32 ``[B, H, Cq, D]``.
        key: float32 ``[B, H, Ck, D]``.
    """

    query: Tensor
    key: Tensor


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks that clusters of tokens are padded to, and which token lies where.

    As many as ``padded_blocks`` says, whatever the clusters' sizes; those that are not needed come
    last and are empty.

    Attributes:
        token: int64 ``[B, H, N * block]``, the token in each row; any token in a row of padding.
        place: int64 ``[B, H, L]``, the row of each token.
        count: int32 ``[B, H, N]``, tokens in each block; they come first in it.
        cluster: int64 ``[B, H, N]``, of its tokens.
    """

    token: Tensor
    place: Tensor
    count: Tensor
    cluster: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Bring tokens into the blocks.

        Rows of padding hold the mean of the tokens of their block, so that pooling a block gives
        its true mean; zero in an empty block.

        Args:
            x: ``[B, H, L, D]``.

        Returns:
            ``[B, H, N * block, D]``.
        """
        index = self.token[..., None].expand(-1, -1, -1, x.shape[3])
        inside = self._inside
        rows = x.gather(2, index).unflatten(2, (-1, inside.shape[3]))  # [B, H, N, block, D]
        count = self.count.clamp(min=1)[..., None]
        mean = rows.float().where(inside[..., None], 0.0).sum(3) / count
        return rows.where(inside[..., None], mean.to(x.dtype)[:, :, :, None]).flatten(2, 3)

    def scatter(self, rows: Tensor) -> Tensor:
        """Bring rows ``[B, H, N * block, D]`` back into the order of the tokens."""
        return rows.gather(2, self.place[..., None].expand(-1, -1, -1, rows.shape[3]))

    def holding(self, tokens: Tensor) -> Tensor:
        """Blocks ``[B, H, N]`` that hold one of some tokens, a boolean ``[L]``."""
        inside = self._inside
        return (tokens[self.token].unflatten(2, inside.shape[2:]) & inside).any(-1)

    @property
    def _inside(self) -> Tensor:
        """Which rows are no padding: boolean ``[B, H, N, block]``."""
        block = self.token.shape[2] // self.count.shape[2]
        return torch.arange(block, device=self.count.device) < self.count[..., None]

    def statistics(self, key: Tensor, value: Tensor) -> BlockStatistics:
        """Pool gathered keys and values over the tokens that are there."""
        block = key.shape[2] // self.count.shape[2]
        statistics = block_statistics(key, value, block, key.shape[1])
        size = self.count.float()
        # padding lies at the mean: it adds nothing to a sum of squares but to what that is over
        share = block / size.clamp(min=1)
        return dataclasses.replace(
            statistics,
            size=size,
            log_size=size.log(),
            key_variance=(statistics.key_variance * share[..., None]).to(key.dtype),
            value_variance=statistics.value_variance * share,
            covariance=statistics.covariance * (key.shape[2] / size.sum(-1))[..., None, None],
        )


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The clusters of one site.

    Attributes:
        centroids: Their means.
        key_sizes: int32 ``[B, H, Ck]``, keys in each; 0 for some, perhaps.
        query: Where query tokens lie among the blocks.
        key: Where key tokens lie.
    """

    centroids: Centroids
    key_sizes: Tensor
    query: Blocks
    key: Blocks

    def blocks_of(self, kept: Tensor) -> Tensor:
        """Pairs of blocks that lie in kept pairs of clusters; no empty block.

        Args:
            kept: Boolean ``[B, H, Cq, Ck]``.

        Returns:
            Boolean ``[B, H, Nq, Nk]``.
        """
        query, key = self.query.cluster, self.key.cluster
        rows = kept.gather(2, query[..., None].expand(-1, -1, -1, kept.shape[3]))
        pairs = rows.gather(3, key[:, :, None].expand(-1, -1, query.shape[2], -1))
        return pairs & (self.query.count > 0)[..., None] & (self.key.count > 0)[:, :, None]


def padded_blocks(length: int, clusters: int, block: int) -> int:
    """The most blocks that ``length`` tokens in so many clusters can take."""
    return (length + min(length, clusters) * (block - 1)) // block


def sort_into_blocks(labels: Tensor, sizes: Tensor, block: int) -> Blocks:
    """Lay clusters out one after another, each from the start of a block.

    Tokens of a cluster keep their order.

    Args:
        labels: int32 ``[B, H, L]``, the cluster of each token.
        sizes: int32 ``[B, H, C]``, how many tokens have each label.
        block: Rows in a block.
    """
    length, clusters = labels.shape[2], sizes.shape[2]
    blocks = padded_blocks(length, clusters, block)
    wide, taken = sizes.long(), (sizes.long() + (block - 1)) // block
    first_token = wide.cumsum(-1) - wide
    end_block = taken.cumsum(-1)
    first_block = end_block - taken
    ordered, order = labels.long().sort(dim=-1, stable=True)
    token = torch.arange(length, device=labels.device)
    row = token + (first_block * block - first_token).gather(-1, ordered)
    place = torch.empty_like(order).scatter(-1, order, row)
    rows = order.new_zeros((*labels.shape[:2], blocks * block)).scatter(-1, row, order)
    n = torch.arange(blocks, device=labels.device)
    cluster = torch.searchsorted(
        end_block, n.expand(*labels.shape[:2], -1).contiguous(), right=True
    )
    cluster = cluster.clamp(max=clusters - 1)
    count = wide.gather(-1, cluster) - (n - first_block.gather(-1, cluster)) * block
    return Blocks(rows, place, count.clamp(0, block).int(), cluster)


def apart_from_padding(inside: Tensor, block_q: int, block_kv: int) -> tuple[Blocks, Blocks]:
    """Blocks of the tokens that are there, then blocks of padding, which are empty.

    As if these were two clusters.

    Args:
        inside: Boolean ``[B, H, L]``, which tokens are there.
        block_q: Query rows in a block.
        block_kv: Keys in a block.

    Returns:
        Of queries, and of keys.
    """
    size = inside.sum(-1, dtype=torch.int32)
    sizes = torch.stack([size, inside.shape[2] - size], -1)
    query, key = (sort_into_blocks((~inside).int(), sizes, x) for x in (block_q, block_kv))
    query, key = (
        dataclasses.replace(x, count=x.count.masked_fill(x.cluster == 1, 0)) for x in (query, key)
    )
    return query, key


def first_centroids(tokens: Tensor, clusters: int, seed: int) -> Tensor:
    """Distinct tokens of each head, spread evenly: float32 ``[B, H, clusters, D]``.

    The same at every call and on every device, and of no pattern that a grid could share: the step
    from one to the next is the golden section of the length.

    Args:
        tokens: ``[B, H, L, D]``.
        clusters: How many, at most L.
        seed: Where to begin.
    """
    length = tokens.shape[2]
    step = max(1, round(length * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, length) > 1:
        step += 1
    chosen = (torch.arange(clusters, device=tokens.device) * step + seed) % length
    return tokens.index_select(2, chosen).float()
