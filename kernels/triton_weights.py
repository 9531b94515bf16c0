"""Triton kernels of ``uta::weigh_scores``: what a head and its key blocks weigh scores by."""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.triton_attention import LOG2_E, last_contiguous

TILE = 8192  # numbers that a program reads at a time
COLUMNS = 1024  # weights that it writes at a time
SCORES = 2048  # that a program of the second kernel weighs


@triton.jit
def _sum_of_rows(base, stride, rows, inside_d, d, scale, SQUARE: tl.constexpr,
                 ROWS: tl.constexpr, D_PADDED: tl.constexpr):  # fmt: skip
    """Sum of ``rows`` rows, or of their squares: float32 ``[D_PADDED]``."""
    total = tl.zeros([ROWS, D_PADDED], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        ptrs = base + row.to(tl.int64)[:, None] * stride + d[None, :]
        mask = (row < rows)[:, None] & inside_d[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, D_PADDED]
        x = x * scale
        total += x * x if SQUARE else x
    return tl.sum(total, 0)


@triton.jit
def _weights_kernel(
    q_ptr, k_var_ptr,  # [B, H, L, D] and [B, H, Nk, D], last dimensions contiguous
    v_var_ptr, weights_ptr,  # float32 [B, H, Nk], contiguous
    q_sb, q_sh, q_sn,
    var_sb, var_sh, var_sn,
    heads, blocks_q, blocks,
    scale, variance_weight_log2, half_power,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    HAS_VARIANCE: tl.constexpr, HAS_POWER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weights of one head's key blocks."""
    batch_head = tl.program_id(0).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    log2 = tl.zeros([1], tl.float32)  # of what a head's weights have in common
    if HAS_VARIANCE:
        d = tl.arange(0, D_PADDED)
        q_base = q_ptr + batch * q_sb + head * q_sh
        var_base = k_var_ptr + batch * var_sb + head * var_sh
        inside, first_sn = d < D, q_sn * BLOCK_Q  # from the first row of a block to the next one's
        square = _sum_of_rows(q_base, first_sn, blocks_q, inside, d, scale, True, ROWS, D_PADDED)
        variance = _sum_of_rows(var_base, var_sn, blocks, inside, d, 1.0, False, ROWS, D_PADDED)
        sigma2 = tl.sum(square / blocks_q * (variance / blocks), 0)
        log2 -= variance_weight_log2 * sigma2
    for start in range(0, blocks, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = batch_head * blocks + column
        exponent = tl.zeros([COLUMNS], tl.float32) + log2
        if HAS_POWER:
            spread = tl.load(v_var_ptr + place, mask=column < blocks, other=1.0)  # [COLUMNS]
            exponent += half_power * tl.log2(spread)
        tl.store(weights_ptr + place, tl.exp2(exponent), mask=column < blocks)


@triton.jit
def _weigh_kernel(
    scores_ptr, weighed_ptr,  # [B, H, Nq, Nk], contiguous
    weights_ptr,  # float32 [B, H, Nk], contiguous
    total, blocks_q, blocks,
    SCORES: tl.constexpr,
):  # fmt: skip
    """Multiply SCORES scores by the weights of their key blocks, wherever heads begin."""
    first = tl.program_id(0).to(tl.int64) * SCORES
    row = first // blocks
    batch_head = row // blocks_q
    at = tl.arange(0, SCORES)
    place = (first - row * blocks).to(tl.int32) + at  # in the rows from this one on
    rows_after = place // blocks
    heads_after = ((row - batch_head * blocks_q).to(tl.int32) + rows_after) // blocks_q
    inside = first + at < total
    weight_at = heads_after * blocks + place - rows_after * blocks
    weight = tl.load(weights_ptr + batch_head * blocks + weight_at, mask=inside, other=0.0)
    score = tl.load(scores_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    weighed = (score * weight).to(weighed_ptr.dtype.element_ty)
    tl.store(weighed_ptr + first + at, weighed, mask=inside)


def weigh_scores(
    scores: Tensor,
    query: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    scale: float,
    variance_weight: float,
    value_power: float,
    block_q: int,
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference``."""
    (batch, heads, blocks_q, blocks), dim = scores.shape, query.shape[3]
    rows = scores.contiguous()
    weighed = torch.empty_like(rows)
    query, key_variance = last_contiguous(query), last_contiguous(key_variance)
    weights = torch.empty((batch, heads, blocks), dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(dim)
    with torch.cuda.device_of(query):
        launcher(_weights_kernel, (batch * heads,))(
            query, key_variance, value_variance.contiguous(), weights,
            *query.stride()[:3], *key_variance.stride()[:3],
            heads, blocks_q, blocks,
            scale, variance_weight / 2 * LOG2_E.value, value_power / 2,
            BLOCK_Q=block_q, D=dim, D_PADDED=padded,
            HAS_VARIANCE=variance_weight != 0, HAS_POWER=value_power != 0,
            ROWS=TILE // padded, COLUMNS=COLUMNS, num_warps=8,
        )  # fmt: skip
        launcher(_weigh_kernel, (triton.cdiv(rows.numel(), SCORES),))(
            rows, weighed, weights, rows.numel(), blocks_q, blocks,
            SCORES=SCORES, num_warps=4,
        )  # fmt: skip
    return weighed if scores.is_contiguous() else torch.empty_like(scores).copy_(weighed)
