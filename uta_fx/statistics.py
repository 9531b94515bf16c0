"""Statistics of key and value blocks: what policies score and what stands for the tail."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """Means and variances over the true tokens of each block of ``block_kv`` keys.

    Attributes:
        size: float32 ``[Nk]``, tokens in each block; only the last can be ragged.
        key_mean: float32 ``[B, H, Nk, D]``.
        key_variance: float32 ``[B, H, Nk, D]``, of each channel, divided by the token count.
        value_mean: float32 ``[B, H, Nk, Dv]``.
    """

    size: Tensor
    key_mean: Tensor
    key_variance: Tensor
    value_mean: Tensor

    @property
    def log_size(self) -> Tensor:
        """float32 ``[B, H, Nk]``: natural log of ``size``."""
        return self.size.log().expand(self.key_mean.shape[:-1])


def block_statistics(key: Tensor, value: Tensor, block_kv: int) -> BlockStatistics:
    """Pool ``key`` ``[B, H, L, D]`` and ``value`` ``[B, H, L, Dv]`` in blocks of ``block_kv``."""
    blocks = [
        (key_block.float(), value_block.float())
        for key_block, value_block in zip(
            _split(key, block_kv), _split(value, block_kv), strict=True
        )
    ]
    variance, mean = zip(
        *(torch.var_mean(key_block, dim=3, correction=0) for key_block, _ in blocks), strict=True
    )
    sizes = [
        torch.full((key_block.shape[2],), float(key_block.shape[3]), device=key.device)
        for key_block, _ in blocks
    ]
    return BlockStatistics(
        size=torch.cat(sizes),
        key_mean=torch.cat(mean, 2),
        key_variance=torch.cat(variance, 2),
        value_mean=torch.cat([value_block.mean(3) for _, value_block in blocks], 2),
    )


def block_covariance(key: Tensor, value: Tensor, key_mean: Tensor, block_kv: int) -> Tensor:
    """Covariance of keys with values inside the blocks, averaged over all tokens of each head.

    The ``H / n`` of the first-order tail: ``sum_j (k_j - mean of j's block)^T v_j / L``.

    Args:
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        key_mean: float32 ``[B, H, Nk, D]`` from ``block_statistics``.
        block_kv: Keys in a block.

    Returns:
        float32 ``[B, H, 1, D, Dv]``.
    """
    # float16 could overflow in a sum over all tokens; bfloat16 has the range and the speed
    dtype = torch.float32 if key.dtype == torch.float32 else torch.bfloat16
    centered = [
        (block - mean[:, :, :, None]).to(dtype).flatten(2, 3)
        for block, mean in zip(_split(key, block_kv), _split_means(key, key_mean, block_kv),
                               strict=True)
    ]  # fmt: skip
    product = torch.cat(centered, 2).transpose(-1, -2) @ value.to(dtype)
    return product.float()[:, :, None] / key.shape[2]


def block_covariances(key: Tensor, value: Tensor, key_mean: Tensor, block_kv: int) -> Tensor:
    """As ``block_covariance``, for each block by itself: float32 ``[B, H, Nk, D, Dv]``."""
    return torch.cat(
        [
            (key_block - mean[:, :, :, None]).transpose(-1, -2)
            @ value_block.float()
            / key_block.shape[3]
            for key_block, value_block, mean in zip(
                _split(key, block_kv),
                _split(value, block_kv),
                _split_means(key, key_mean, block_kv),
                strict=True,
            )
        ],
        2,
    )


def query_means(query: Tensor, block_q: int) -> Tensor:
    """Mean query of each block: ``[B, H, L, D] -> float32 [B, H, ceil(L / block_q), D]``."""
    return torch.cat([block.float().mean(3) for block in _split(query, block_q)], 2)


def _split(x: Tensor, block: int) -> list[Tensor]:
    """``[B, H, L, D]`` as its whole blocks ``[B, H, n, block, D]`` and its ragged one, if any."""
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (-1, block))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])
    return parts


def _split_means(x: Tensor, means: Tensor, block: int) -> list[Tensor]:
    """The means of ``x``'s blocks, parted as ``_split`` parts ``x``."""
    whole = x.shape[2] // block
    return [part for part in (means[:, :, :whole], means[:, :, whole:]) if part.shape[2]]
