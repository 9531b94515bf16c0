"""Triton kernel of ``uta::block_scores``: pooled attention, averaged over each query block.

A program goes over the block means twice: once for the softmax's maximum and sum of each row, once
to add up the rows. Recomputing costs less than storing ``[L, Nk]``. Softmax is base 2 inside.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.triton_attention import LOG2_E, Tile, dot_precision, fit_tile, shared_limit

MAX_BLOCK = 128  # the largest block_q


@triton.jit
def _logits(
    q, q_square, mean_base, var_base, size_base, mean_sn, var_sn, start, blocks,
    scale_log2, half_weight_log2,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    WITH_SIGMA2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of one step, -inf beyond the last block, and sigma2 (0 where not asked for)."""
    offs_n, d = tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    first = tl.cast(start, tl.int64)
    inside = start + offs_n < blocks
    mask = inside[:, None] & (d < D)[None, :]
    mean_ptrs = mean_base + first * mean_sn + offs_n[:, None] * mean_sn + d[None, :]
    mean = tl.load(mean_ptrs, mask=mask, other=0.0)  # [BLOCK_N, D_PADDED]
    bias = tl.load(size_base + start + offs_n, mask=inside, other=-float("inf"))  # [BLOCK_N]
    logits = tl.dot(q, tl.trans(mean), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    logits = logits * scale_log2 + (bias * LOG2_E)[None, :]
    sigma2 = 0.0
    if WITH_SIGMA2:
        var_ptrs = var_base + first * var_sn + offs_n[:, None] * var_sn + d[None, :]
        variance = tl.load(var_ptrs, mask=mask, other=0.0)  # [BLOCK_N, D_PADDED]
        sigma2 = tl.dot(q_square, tl.trans(variance), input_precision=PRECISION)
        logits += sigma2 * half_weight_log2
    return logits, sigma2


@triton.jit
def _scores_kernel(
    q_ptr, mean_ptr, var_ptr, size_ptr,
    scores_ptr,  # float32 [B, H, Nq, Nk], contiguous
    q_sb, q_sh, q_sm,
    mean_sb, mean_sh, mean_sn,
    var_sb, var_sh, var_sn,
    size_sb, size_sh,
    heads, length_q, blocks_q, blocks,
    scale, scale_log2,
    half_weight_log2,  # variance_weight / 2 * log2(e)
    power,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,  # a program takes BLOCK_M // BLOCK_Q blocks
    BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # the variance takes part in the logits
    POWER: tl.constexpr,  # "none", "one", "half", or "any": the value of power
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program scores BLOCK_M // BLOCK_Q query blocks against every key block."""
    tile = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs_m, offs_n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    row = tile * BLOCK_M + offs_m
    q_base = q_ptr + batch * q_sb + head * q_sh + tile.to(tl.int64) * BLOCK_M * q_sm
    q_ptrs = q_base + offs_m[:, None] * q_sm + d[None, :]
    q_mask = (row < length_q)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)  # [BLOCK_M, D_PADDED]
    scaled = q.to(tl.float32) * scale
    q_square = (scaled * scaled).to(q.dtype)  # [BLOCK_M, D_PADDED]
    mean_base = mean_ptr + batch * mean_sb + head * mean_sh
    var_base = var_ptr + batch * var_sb + head * var_sh
    size_base = size_ptr + batch * size_sb + head * size_sh

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, blocks, BLOCK_N):
        logits, _ = _logits(
            q, q_square, mean_base, var_base, size_base, mean_sn, var_sn, start, blocks,
            scale_log2, half_weight_log2, BLOCK_N, D, D_PADDED, WEIGHTED, PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max)
        row_sum += tl.sum(tl.exp2(logits - new_max[:, None]), 1)
        row_max = new_max

    # the softmax's sum and the mean's count, taken off the logits; +inf: a row that is not there
    members = tl.minimum(tl.maximum(length_q - row // BLOCK_Q * BLOCK_Q, 1), BLOCK_Q)
    norm = row_max + tl.log2(row_sum * members.to(tl.float32))
    norm = tl.where(row < length_q, norm, float("inf"))
    block = tile * (BLOCK_M // BLOCK_Q) + tl.arange(0, BLOCK_M // BLOCK_Q)
    scores_base = scores_ptr + batch_head * blocks_q * blocks
    scores_ptrs = scores_base + block.to(tl.int64)[:, None] * blocks + offs_n[None, :]
    for start in range(0, blocks, BLOCK_N):
        logits, sigma2 = _logits(
            q, q_square, mean_base, var_base, size_base, mean_sn, var_sn, start, blocks,
            scale_log2, half_weight_log2, BLOCK_N, D, D_PADDED,
            WEIGHTED or POWER != "none", PRECISION,
        )  # fmt: skip
        scores = tl.exp2(logits - norm[:, None])  # [BLOCK_M, BLOCK_N]
        if POWER == "one":
            scores *= sigma2
        elif POWER == "half":
            scores *= tl.sqrt(sigma2)
        elif POWER == "any":
            scores *= tl.exp2(power * tl.log2(sigma2))
        by_block = tl.reshape(scores, [BLOCK_M // BLOCK_Q, BLOCK_Q, BLOCK_N])
        mask = (block < blocks_q)[:, None] & (start + offs_n < blocks)[None, :]
        tl.store(scores_ptrs + start, tl.sum(by_block, 1), mask=mask)


# (bytes of an element, padded head dim), on a machine with 227 KB of shared memory; block_m is at
# least the block size that the caller asks for
_TILES = {
    (2, 128): Tile(block_m=128, block_n=32, num_warps=4, num_stages=3),
    (2, 64): Tile(block_m=128, block_n=32, num_warps=4, num_stages=2),
    (2, 32): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (2, 16): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (4, 128): Tile(block_m=64, block_n=32, num_warps=8, num_stages=1),
    (4, 64): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
    (4, 32): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
    (4, 16): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
}
_POWERS = {0.0: "none", 0.5: "half", 1.0: "one"}


def block_scores(
    query: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    log_size: Tensor,
    scale: float,
    variance_weight: float,
    variance_power: float,
    block_q: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.block_scores``.

    In 16 bits ``(s q)^2`` is rounded to the query's dtype before it meets the variance. ``tile``
    takes the place of the tuned one.
    """
    batch, heads, length_q, dim = query.shape
    blocks_q, blocks = -(-length_q // block_q), key_mean.shape[-2]
    scores = query.new_empty((batch, heads, blocks_q, blocks), dtype=torch.float32)
    tile = tile or fit_tile(
        _TILES, query.dtype, dim, MAX_BLOCK, max(16, triton.next_power_of_2(blocks)), 2, 2,
        shared_limit(query),
    )  # fmt: skip
    query, key_mean, key_variance, log_size = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (query, key_mean, key_variance, log_size)
    )
    block_m = max(tile.block_m, block_q)
    with torch.cuda.device_of(query):
        _scores_kernel[(triton.cdiv(length_q, block_m), batch * heads)](
            query, key_mean, key_variance, log_size, scores,
            *query.stride()[:3], *key_mean.stride()[:3], *key_variance.stride()[:3],
            *log_size.stride()[:2],
            heads, length_q, blocks_q, blocks,
            scale, scale * LOG2_E.value, variance_weight / 2 * LOG2_E.value, variance_power,
            BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_N=tile.block_n,
            D=dim, D_PADDED=triton.next_power_of_2(dim),
            WEIGHTED=variance_weight != 0,
            POWER=_POWERS.get(float(variance_power), "any"),
            PRECISION=dot_precision(query.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return scores
