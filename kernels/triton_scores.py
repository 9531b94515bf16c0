"""Triton kernel of ``uta::block_scores``: pooled attention, squared and averaged over query blocks.

A program goes over the block means twice: once for the softmax's maximum and sum of each group of
rows, once to add up the groups. Recomputing costs less than storing them. The second time tiles lie
the other way, so that the sum over groups runs along a thread. Softmax is base 2 inside.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.reference import score_dtype
from uta_fx.kernels.triton_attention import (
    LOG2_E,
    Tile,
    dot_precision,
    fit_tile,
    last_contiguous,
    shared_limit,
)

try:
    from uta_fx.kernels import gluon_scores
except (ImportError, AttributeError):  # Gluon is experimental: its names may move
    gluon_scores = None  # type: ignore[assignment]

MAX_BLOCK = 128  # the largest block_q


@triton.jit
def _load_blocks(base, stride, start, blocks, BLOCK_N: tl.constexpr, D: tl.constexpr,
                 D_PADDED: tl.constexpr):  # fmt: skip
    """``[BLOCK_N, D_PADDED]`` of the means or variances from ``start`` on, zero beyond the last."""
    offs_n, d = tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    ptrs = base + tl.cast(start, tl.int64) * stride + offs_n[:, None] * stride + d[None, :]
    return tl.load(ptrs, mask=(start + offs_n < blocks)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _scores_kernel(
    q_ptr, mean_ptr, var_ptr, size_ptr,
    scores_ptr,  # bfloat16, float32 for float32 queries, [B, H, Nq, Nk], contiguous
    q_sb, q_sh, q_sm,
    mean_sb, mean_sh, mean_sn,
    var_sb, var_sh, var_sn,
    size_sb, size_sh,
    heads, length_q, blocks_q, blocks,
    scale, scale_log2,
    half_weight_log2,  # variance_weight / 2 * log2(e)
    power,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,  # query rows of a block and of a group
    BLOCK_M: tl.constexpr,  # groups that are scored together: whole query blocks, or a part of one
    BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # the variance takes part in the mass
    POWER: tl.constexpr,  # "none", "one", "half", or "any": the value of power
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Score BLOCK_M * ROWS // BLOCK_Q query blocks, at least one, against every key block."""
    GROUPS: tl.constexpr = BLOCK_Q // ROWS  # of a query block
    BLOCKS: tl.constexpr = max(BLOCK_M // GROUPS, 1)  # whole query blocks at a time
    PARTS: tl.constexpr = max(GROUPS // BLOCK_M, 1)  # of a query block, one after another
    tile = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs_m, offs_n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    mean_base = mean_ptr + batch * mean_sb + head * mean_sh
    var_base = var_ptr + batch * var_sb + head * var_sh
    size_base = size_ptr + batch * size_sb + head * size_sh
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    scores_base = scores_ptr + batch_head * blocks_q * blocks
    scores_ptrs = scores_base + block.to(tl.int64)[None, :] * blocks + offs_n[:, None]
    for part in tl.static_range(PARTS):
        first_group = (tile * PARTS + part) * BLOCK_M
        row = (first_group + offs_m) * ROWS  # the first of a group
        q_base = q_ptr + batch * q_sb + head * q_sh + first_group.to(tl.int64) * ROWS * q_sm
        total = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
        square = tl.zeros([BLOCK_M, D_PADDED], tl.float32)
        for r in tl.static_range(ROWS):
            q_ptrs = q_base + (offs_m * ROWS + r)[:, None] * q_sm + d[None, :]
            q_mask = (row + r < length_q)[:, None] & (d < D)[None, :]
            some = tl.load(q_ptrs, mask=q_mask, other=0.0).to(tl.float32)
            total += some
            square += some * some
        members = tl.minimum(tl.maximum(length_q - row, 1), ROWS).to(tl.float32)[:, None]
        q = (total / members).to(q_ptr.dtype.element_ty)  # [BLOCK_M, D_PADDED]
        q_square = (square * (scale * scale) / members).to(q.dtype)  # [BLOCK_M, D_PADDED]

        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, blocks, BLOCK_N):
            mean = _load_blocks(mean_base, mean_sn, start, blocks, BLOCK_N, D, D_PADDED)
            size = tl.load(
                size_base + start + offs_n, mask=start + offs_n < blocks, other=-float("inf")
            )
            logits = tl.dot(q, tl.trans(mean), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            logits = logits * scale_log2 + (size * LOG2_E)[None, :]
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            row_sum = row_sum * tl.exp2(row_max - new_max)
            row_sum += tl.sum(tl.exp2(logits - new_max[:, None]), 1)
            row_max = new_max

        # the softmax's sum and the mean's count, taken off the logits; +inf: a group that is not
        # there
        rows_of_block = tl.minimum(tl.maximum(length_q - row // BLOCK_Q * BLOCK_Q, 1), BLOCK_Q)
        groups = tl.cdiv(rows_of_block, ROWS).to(tl.float32)
        norm = row_max + tl.log2(row_sum) + 0.5 * tl.log2(groups)
        norm = tl.where(row < length_q, norm, float("inf"))
        for start in range(0, blocks, BLOCK_N):
            inside = start + offs_n < blocks
            mean = _load_blocks(mean_base, mean_sn, start, blocks, BLOCK_N, D, D_PADDED)
            size = tl.load(size_base + start + offs_n, mask=inside, other=-float("inf"))
            logits = tl.dot(mean, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            logits = logits * scale_log2 + (size * LOG2_E)[:, None]
            if WEIGHTED or POWER != "none":
                variance = _load_blocks(var_base, var_sn, start, blocks, BLOCK_N, D, D_PADDED)
                sigma2 = tl.dot(variance, tl.trans(q_square), input_precision=PRECISION)
            if WEIGHTED:
                logits += sigma2 * half_weight_log2
            scores = tl.exp2(logits - norm[None, :])  # [BLOCK_N, BLOCK_M]
            if POWER == "one":
                scores *= sigma2
            elif POWER == "half":
                scores *= tl.sqrt(sigma2)
            elif POWER == "any":
                scores *= tl.exp2(power * tl.log2(sigma2))
            by_block = tl.reshape(scores * scores, [BLOCK_N, BLOCKS, BLOCK_M // BLOCKS])
            squares = tl.sum(by_block, 2)  # [BLOCK_N, BLOCKS]
            mask = (block < blocks_q)[None, :] & inside[:, None]
            if part > 0:
                squares += tl.load(scores_ptrs + start, mask=mask, other=0.0)
            if part == PARTS - 1:
                squares = tl.sqrt(squares)
            tl.store(scores_ptrs + start, squares.to(scores_ptr.dtype.element_ty), mask=mask)
        if part < PARTS - 1:
            tl.debug_barrier()  # other threads of the program may add to it


# (bytes of an element, padded head dim), on a machine with 227 KB of shared memory; block_m in
# groups of rows
_TILES = {
    (2, 256): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (2, 128): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (2, 64): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (2, 32): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (2, 16): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (4, 256): Tile(block_m=16, block_n=16, num_warps=8, num_stages=1),
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
    rows: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.block_scores``.

    In 16 bits the mean query and the mean of ``(s q)^2`` of a group are rounded to the query's
    dtype, and the scores to bfloat16; so are the sums so far where a query block has more groups
    than fit into a tile. ``tile`` takes the place of the tuned one.
    """
    batch, heads, length_q, dim = query.shape
    blocks_q, blocks = -(-length_q // block_q), key_mean.shape[-2]
    query, key_mean, key_variance, log_size = (
        last_contiguous(x) for x in (query, key_mean, key_variance, log_size)
    )
    if tile is None and gluon_scores is not None and gluon_scores.takes(
        query, key_mean, key_variance, variance_power, block_q, rows
    ):  # fmt: skip
        with torch.cuda.device_of(query):
            return gluon_scores.block_scores(
                query, key_mean, key_variance, log_size, scale, variance_weight, variance_power,
                block_q, rows,
            )  # fmt: skip
    scores = query.new_empty((batch, heads, blocks_q, blocks), dtype=score_dtype(query.dtype))
    tile = tile or score_tile(query.dtype, dim, blocks, shared_limit(query))
    of_program = rows_of_program(tile, block_q, rows)
    with torch.cuda.device_of(query):
        launcher(_scores_kernel, (triton.cdiv(length_q, of_program), batch * heads))(
            query, key_mean, key_variance, log_size, scores,
            *query.stride()[:3], *key_mean.stride()[:3], *key_variance.stride()[:3],
            *log_size.stride()[:2],
            heads, length_q, blocks_q, blocks,
            scale, scale * LOG2_E.value, variance_weight / 2 * LOG2_E.value, variance_power,
            **score_options(
                query.dtype, dim, variance_weight, variance_power, block_q, rows, tile
            ),
        )  # fmt: skip
    return scores


def score_tile(dtype: torch.dtype, dim: int, blocks: int, limit: int) -> Tile:
    """The tuned tile, made smaller until it suits the blocks of keys and the shared memory."""
    most = max(16, triton.next_power_of_2(blocks))
    return fit_tile(_TILES, dtype, dim, MAX_BLOCK, most, 2, 2, limit)


def rows_of_program(tile: Tile, block_q: int, rows: int) -> int:
    """How many query rows one program scores, in groups of ``rows``."""
    return max(tile.block_m * rows, block_q)


def score_options(
    dtype: torch.dtype,
    dim: int,
    variance_weight: float,
    variance_power: float,
    block_q: int,
    rows: int,
    tile: Tile,
) -> dict[str, Any]:
    """Constants and compiler options of the kernel."""
    return {
        "BLOCK_Q": block_q, "ROWS": rows, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "D": dim, "D_PADDED": triton.next_power_of_2(dim), "WEIGHTED": variance_weight != 0,
        "POWER": _POWERS.get(float(variance_power), "any"), "PRECISION": dot_precision(dtype),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
