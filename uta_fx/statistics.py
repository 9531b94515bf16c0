"""Statistics of key and value blocks: what policies score and what stands for the tail."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from uta_fx.kernels import ops
from uta_fx.kernels.constants import constant
from uta_fx.kernels.reference import split_blocks


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """Means and variances over the true tokens of each block of ``block_kv`` keys.

    What has a number for each channel of a block is in the dtype of the keys, as kernels take it:
    computed in float32 and rounded once. In float32 it would be 3 % of query, key and value.

    Attributes:
        size: float32 ``[Nk]``, tokens in each block, where only the last can be ragged; or ``[B, H,
            Nk]``, where blocks are those of clusters and may be empty.
        log_size: float32 ``[B, H, Nk]``, its natural log.
        key_mean: ``[B, H, Nk, D]``, in the dtype of the keys.
        key_variance: ``[B, H, Nk, D]``, likewise, of each channel, divided by the token count.
        value_mean: ``[B, H, Nk, Dv]``, likewise.
        value_variance: float32 ``[B, H, Nk]``, summed over the channels.
        covariance: float32 ``[B, H, D, Dv]``, of keys with values inside the blocks, averaged over
            all tokens of a head: the ``H / n`` of the first-order tail.
    """

    size: Tensor
    log_size: Tensor
    key_mean: Tensor
    key_variance: Tensor
    value_mean: Tensor
    value_variance: Tensor
    covariance: Tensor


def for_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, Hkv, ...]`` as ``[B, heads, ...]``: ``x.repeat_interleave(heads // Hkv, 1)``.

    The same tensor where Hkv is ``heads``, a copy otherwise: what is constant along a part of the
    heads has no strides.
    """
    if x.shape[1] == heads:
        return x
    shape = (x.shape[0], x.shape[1], heads // x.shape[1], *x.shape[2:])
    return x.unsqueeze(2).expand(shape).flatten(1, 2)


def block_statistics(key: Tensor, value: Tensor, block_kv: int, heads: int) -> BlockStatistics:
    """Pool keys and values in blocks.

    Args:
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        block_kv: Keys in a block.
        heads: H, those of the queries: Hkv, or a multiple of it.
    """
    pooled = [for_heads(x, heads) for x in ops.block_statistics(key, value, block_kv)]
    tokens = key.shape[2]
    first = torch.arange(0, tokens, block_kv, dtype=torch.float32, device=key.device)
    size = (tokens - first).clamp(max=block_kv)
    log_size = log_block_sizes(key, tokens, block_kv) if isinstance(tokens, int) else size.log()
    return BlockStatistics(size, log_size.expand(*pooled[0].shape[:-1]), *pooled)


@constant("int tokens, int block")
def log_block_sizes(tokens: int, block: int) -> Tensor:
    """float32 ``[ceil(tokens / block)]``: natural log of how many tokens each block holds."""
    first = torch.arange(0, tokens, block, dtype=torch.float32)
    return (tokens - first).clamp(max=block).log()


def block_covariances(
    key: Tensor, value: Tensor, statistics: BlockStatistics, block_kv: int
) -> Tensor:
    """Covariance of keys with values in each block by itself.

    Args:
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        statistics: Of these.
        block_kv: Keys in a block.

    Returns:
        float32 ``[B, H, Nk, D, Dv]``.
    """
    sums = torch.cat(
        [
            (keys - keys.float().mean(3, keepdim=True)).transpose(-1, -2) @ values.float()
            for keys, values in zip(
                split_blocks(key, block_kv), split_blocks(value, block_kv), strict=True
            )
        ],
        2,
    )
    return sums / statistics.size.clamp(min=1)[..., None, None]


def query_means(query: Tensor, block_q: int) -> Tensor:
    """Mean query of each block: ``[B, H, L, D] -> float32 [B, H, ceil(L / block_q), D]``."""
    length = query.shape[2]
    if not isinstance(length, int):  # whether a block is ragged must not become part of a graph
        missing = (block_q - length % block_q) % block_q
        blocks = F.pad(query.float(), (0, 0, 0, missing)).unflatten(2, (-1, block_q))
        first = torch.arange(0, length, block_q, device=query.device)
        return blocks.sum(3) / (length - first).clamp(max=block_q)[:, None]
    return torch.cat([block.float().mean(3) for block in split_blocks(query, block_q)], 2)
