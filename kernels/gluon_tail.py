"""The tail's part of ``gluon_attention``: representatives in the ring, and their slope."""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from uta_fx.kernels.gluon_softmax import LOG2_E
from uta_fx.kernels.launches import launcher

MANY_Q, MANY_KV = 16, 64  # blocks whose variances one program computes at a time
UNROLL = 8  # of their rows that it loads before it waits for one


class Tail(NamedTuple):
    """The tail inputs of ``uta::sparse_attention``; shapes as in ``reference``."""

    key: Tensor
    value: Tensor
    log_size: Tensor
    variance: Tensor
    slope: Tensor


@triton.jit
def _pooled_variance_kernel(
    q_ptr, var_ptr,
    sigma2_ptr,  # bfloat16 [B, H, Nq, Nk], contiguous
    q_sb, q_sh, q_sm,
    var_sb, var_sh, var_sr,
    heads, length_q, blocks_q, blocks_kv, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, MANY_Q: tl.constexpr, MANY_KV: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Store the logits' variances of MANY_Q query blocks in every key block."""
    first = tl.program_id(0) * MANY_Q
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs, d = tl.arange(0, MANY_Q), tl.arange(0, D)
    q_base = q_ptr + batch * q_sb + head * q_sh + first.to(tl.int64) * BLOCK * q_sm + d[None, :]
    rows_left = length_q - (first + offs) * BLOCK
    square = tl.zeros([MANY_Q, D], tl.float32)
    for start in range(0, BLOCK, UNROLL):
        for i in tl.static_range(UNROLL):
            r = start + i
            ptrs = q_base + (offs * BLOCK + r).to(tl.int64)[:, None] * q_sm
            q = tl.load(ptrs, mask=(r < rows_left)[:, None], other=0.0).to(tl.float32) * scale
            square += q * q  # [MANY_Q, D]
    size = tl.minimum(tl.maximum(rows_left, 1), BLOCK).to(tl.float32)
    square = (square / size[:, None]).to(var_ptr.dtype.element_ty)
    var_base = var_ptr + batch * var_sb + head * var_sh + d[None, :]
    out = sigma2_ptr + (batch_head * blocks_q + first) * blocks_kv
    for start in range(0, blocks_kv, MANY_KV):
        column = start + tl.arange(0, MANY_KV)
        ptrs = var_base + column.to(tl.int64)[:, None] * var_sr
        variance = tl.load(ptrs, mask=(column < blocks_kv)[:, None], other=0.0)  # [MANY_KV, D]
        sigma2 = tl.dot(square, tl.trans(variance)).to(sigma2_ptr.dtype.element_ty)
        inside = (first + offs < blocks_q)[:, None] & (column < blocks_kv)[None, :]
        places = offs.to(tl.int64)[:, None] * blocks_kv + column[None, :]
        tl.store(out + places, sigma2, mask=inside)


@gluon.jit
def copy_tail(
    k_desc, v_desc, k_ring, v_ring, column_ring, full, empty,
    size_base, sigma2_a, sigma2_b, listed_a, listed_b,
    batch, head, steps, representatives, scale_log2, half_weight_log2,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the head's representatives, step by step, each into the next stage of the ring.

    Beside them go two numbers of each representative for each query block of the pair: the bias of
    its logit, over the scale as products are, -inf where the block is listed or where there is
    none; and the damping of the slope.
    """
    LINE: gl.constexpr = gl.BlockedLayout([STEP // 32], [32], [1], [0])
    nothing: gl.constexpr = -float("inf")
    over_scale = 1.0 / scale_log2
    for t in range(steps):
        stage = t % STAGES
        bar = full.index(stage)
        offs = t * STEP + gl.arange(0, STEP, LINE)
        inside = offs < representatives
        size = gl.load(size_base + offs, mask=inside, other=nothing) * LOG2_E  # [STEP]
        in_a = gl.load(listed_a + offs, mask=inside, other=1)  # [STEP]
        in_b = gl.load(listed_b + offs, mask=inside, other=1)  # [STEP]
        for_a = gl.load(sigma2_a + offs, mask=inside, other=0.0).to(gl.float32)  # [STEP]
        for_b = gl.load(sigma2_b + offs, mask=inside, other=0.0).to(gl.float32)  # [STEP]
        mbarrier.wait(empty.index(stage), (t // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        at = t * STEP
        tma.async_copy_global_to_shared(k_desc, [batch, head, at, 0], bar, k_ring.index(stage))
        tma.async_copy_global_to_shared(v_desc, [batch, head, at, 0], bar, v_ring.index(stage))
        bias_a = (size + for_a * half_weight_log2) * over_scale
        bias_b = (size + for_b * half_weight_log2) * over_scale
        column_ring.index(4 * stage).store(gl.where(in_a != 0, nothing, bias_a))
        column_ring.index(4 * stage + 1).store(gl.where(in_b != 0, nothing, bias_b))
        column_ring.index(4 * stage + 2).store(1.0 / (1.0 + for_a))
        column_ring.index(4 * stage + 3).store(1.0 / (1.0 + for_b))
        mbarrier.arrive(bar)


@gluon.jit
def add_slope(q, acc, row_max, row_sum, gain, slope, scale):
    """Normalise the softmax so far and add its gain times ``s q @ slope``."""
    O_LAYOUT: gl.constexpr = acc.type.layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    acc *= gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # the gain, at most 1 by now, goes into q, so that the product is added in place
    share = gl.convert_layout(gain * inverse * scale, gl.SliceLayout(1, P_LAYOUT))
    q_gain = (q.to(gl.float32) * share[:, None]).to(q.dtype)
    acc = warpgroup_mma(q_gain, slope, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    row_max += gl.log2(gl.where(row_sum == 0.0, 1.0, row_sum))
    return acc, row_max, gl.where(row_sum == 0.0, 0.0, 1.0)


def variances(query: Tensor, variance: Tensor, scale: float, block: int) -> Tensor:
    """Launch ``reference.pooled_variance`` in 16 bits: bfloat16 ``[B, H, Nq, Nk]``.

    Args:
        query: ``[B, H, Lq, D]``, last dimension contiguous, D a power of two, 16 bits.
        variance: Of the keys, ``[B, H, Nk, D]``, likewise.
        scale: s.
        block: Query rows in a block.
    """
    batch, heads, length_q, dim = query.shape
    blocks_q, blocks_kv = triton.cdiv(length_q, block), variance.shape[2]
    sigma2 = query.new_empty((batch, heads, blocks_q, blocks_kv), dtype=torch.bfloat16)
    launcher(_pooled_variance_kernel, (triton.cdiv(blocks_q, MANY_Q), batch * heads))(
        query, variance, sigma2,
        *query.stride()[:3], *variance.stride()[:3],
        heads, length_q, blocks_q, blocks_kv, scale,
        **variance_options(dim, block),
    )  # fmt: skip
    return sigma2


def variance_options(dim: int, block: int) -> dict[str, int]:
    """Constants and compiler options of the variances' kernel, for D and rows of a block."""
    return {
        "D": dim, "BLOCK": block, "MANY_Q": MANY_Q, "MANY_KV": MANY_KV, "UNROLL": UNROLL,
        "num_warps": 2, "num_stages": 2,
    }  # fmt: skip
