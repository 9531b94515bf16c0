"""Triton kernel of ``uta::block_statistics``: everything pooled from keys and values in one pass.

A program takes a few consecutive blocks of one head: it reads each block once, writes its means and
variances, and keeps the sum of their covariances, which the launcher adds up over programs.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.triton_attention import dot_precision

PROGRAMS = 528  # how many are aimed at: four for each multiprocessor of an H100


@triton.jit
def _centre(x, inside, size):
    """Float32 mean and deviations from it; deviations are zero where there is no token."""
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / size
    return mean, tl.where(inside[:, None], x - mean[None, :], 0.0)


@triton.jit
def _statistics_kernel(
    k_ptr, v_ptr,
    k_mean_ptr, k_var_ptr,  # float32 [B, H, Nk, D], contiguous
    v_mean_ptr, v_var_ptr,  # float32 [B, H, Nk, Dv] and [B, H, Nk], contiguous
    cov_ptr,  # float32 [B, H, P, D, Dv], contiguous: one sum for each program
    k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn,
    heads, length, blocks, blocks_per_program,
    BLOCK_KV: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pool ``blocks_per_program`` blocks of one head."""
    part = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    n, d, dv = tl.arange(0, BLOCK_KV), tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    inside_d, inside_dv = d < D, dv < DV
    k_base = k_ptr + batch * k_sb + head * k_sh
    v_base = v_ptr + batch * v_sb + head * v_sh
    first_block = part * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, blocks)
    covariance = tl.zeros([D_PADDED, DV_PADDED], tl.float32)
    for block in range(first_block, last_block):
        first = tl.cast(block, tl.int64) * BLOCK_KV
        inside = first + n < length
        size = tl.minimum(length - first, BLOCK_KV).to(tl.float32)
        k_ptrs = k_base + (first + n)[:, None] * k_sn + d[None, :]
        v_ptrs = v_base + (first + n)[:, None] * v_sn + dv[None, :]
        k = tl.load(k_ptrs, mask=inside[:, None] & inside_d[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None] & inside_dv[None, :], other=0.0)
        k_mean, k_deviation = _centre(k, inside, size)  # [D_PADDED], [BLOCK_KV, D_PADDED]
        v_mean, v_deviation = _centre(v, inside, size)
        row = batch_head * blocks + block
        k_variance = tl.sum(k_deviation * k_deviation, 0) / size
        v_variance = tl.sum(tl.sum(v_deviation * v_deviation, 1), 0) / size
        tl.store(k_mean_ptr + row * D + d, k_mean, mask=inside_d)
        tl.store(k_var_ptr + row * D + d, k_variance, mask=inside_d)
        tl.store(v_mean_ptr + row * DV + dv, v_mean, mask=inside_dv)
        tl.store(v_var_ptr + row, v_variance)
        covariance = tl.dot(
            tl.trans(k_deviation.to(k.dtype)), v_deviation.to(v.dtype), covariance,
            input_precision=PRECISION,
        )  # fmt: skip
    cov_base = cov_ptr + (batch_head * tl.num_programs(0) + part) * (D * DV)
    cov_mask = inside_d[:, None] & inside_dv[None, :]
    tl.store(cov_base + d[:, None] * DV + dv[None, :], covariance, mask=cov_mask)


def block_statistics(
    key: Tensor, value: Tensor, block_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; arguments and results as in ``reference.block_statistics``.

    In 16 bits deviations are rounded to the key's dtype before they are multiplied.
    """
    batch, heads, length, dim = key.shape
    dim_v = value.shape[-1]
    blocks = -(-length // block_kv)
    per_program = triton.cdiv(blocks * batch * heads, PROGRAMS)
    parts = triton.cdiv(blocks, per_program)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))

    def empty(*shape: int) -> Tensor:
        return key.new_empty((batch, heads, *shape), dtype=torch.float32)

    key_mean, key_variance = empty(blocks, dim), empty(blocks, dim)
    value_mean, value_variance = empty(blocks, dim_v), empty(blocks)
    sums = empty(parts, dim, dim_v)
    with torch.cuda.device_of(key):
        _statistics_kernel[(parts, batch * heads)](
            key, value, key_mean, key_variance, value_mean, value_variance, sums,
            *key.stride()[:3], *value.stride()[:3],
            heads, length, blocks, per_program,
            BLOCK_KV=block_kv,
            D=dim, D_PADDED=triton.next_power_of_2(dim),
            DV=dim_v, DV_PADDED=triton.next_power_of_2(dim_v),
            PRECISION=dot_precision(key.dtype),
            num_warps=8 if max(dim, dim_v) > 64 else 4,
        )  # fmt: skip
    return key_mean, key_variance, value_mean, value_variance, sums.sum(2) / length
