"""Triton kernels of ``uta::block_statistics``: everything pooled from keys and values.

One kernel pools each block by itself; another goes through a few consecutive blocks of one head and
keeps the sum of their covariances, which a third adds up over programs. Apart, the first is as fast
as memory and the second is a matrix product that Triton can pipeline.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.reference import rounded
from uta_fx.kernels.triton_attention import dot_precision, last_contiguous

try:
    from uta_fx.kernels import gluon_statistics
except (ImportError, AttributeError):  # Gluon is experimental: its names may move
    gluon_statistics = None  # type: ignore[assignment]

PROGRAMS = 528  # of the second kernel, about: four for each multiprocessor of an H100
CHANNELS = 128  # of keys and of values that one program of it takes, at most
SUM_COLUMNS = 256  # of the third kernel: numbers that a program adds up
SUM_OPTIONS = {"ROWS": 16, "COLUMNS": SUM_COLUMNS, "num_warps": 4}
ROWS = {2: 64, 4: 16}  # by bytes of an element: tokens that it multiplies at a time, at most


@triton.jit
def _pool(x, inside, size):
    """Mean of the rows that are inside, and their variance, float32 for each column."""
    x = x.to(tl.float32)  # [BLOCK_KV, D], zero outside
    mean = tl.sum(x, 0) / size
    deviation = tl.where(inside[:, None], x - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0) / size


@triton.jit
def _pool_kernel(
    k_ptr, v_ptr,
    k_mean_ptr, k_var_ptr,  # float32 [B, H, Nk, D], contiguous
    v_mean_ptr, v_var_ptr,  # float32 [B, H, Nk, Dv] and [B, H, Nk], contiguous
    k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn,
    heads, length,
    BLOCK_KV: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Pool one block of keys and values."""
    block = tl.program_id(0).to(tl.int64)  # 64-bit before they are multiplied by strides
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    n, d, dv = tl.arange(0, BLOCK_KV), tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    inside_d, inside_dv = d < D, dv < DV
    row = block * BLOCK_KV + n
    inside = row < length
    size = tl.minimum(length - block * BLOCK_KV, BLOCK_KV).to(tl.float32)
    k_ptrs = k_ptr + batch * k_sb + head * k_sh + row[:, None] * k_sn + d[None, :]
    v_ptrs = v_ptr + batch * v_sb + head * v_sh + row[:, None] * v_sn + dv[None, :]
    k = tl.load(k_ptrs, mask=inside[:, None] & inside_d[None, :], other=0.0)
    v = tl.load(v_ptrs, mask=inside[:, None] & inside_dv[None, :], other=0.0)
    k_mean, k_variance = _pool(k, inside, size)
    v_mean, v_variance = _pool(v, inside, size)
    place = batch_head * tl.num_programs(0) + block
    tl.store(k_mean_ptr + place * D + d, k_mean, mask=inside_d)
    tl.store(k_var_ptr + place * D + d, k_variance, mask=inside_d)
    tl.store(v_mean_ptr + place * DV + dv, v_mean, mask=inside_dv)
    tl.store(v_var_ptr + place, tl.sum(v_variance, 0))


@triton.jit
def _covariance_kernel(
    k_ptr, v_ptr,
    k_mean_ptr,  # float32 [B, H, Nk, D], contiguous
    cov_ptr,  # float32 [B, H, P, D, Dv], contiguous: one sum for each program
    k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn,
    heads, length, blocks, blocks_per_program,
    BLOCK_KV: tl.constexpr, ROWS: tl.constexpr,  # keys of a block and of a step, which divide it
    D: tl.constexpr, DV: tl.constexpr,
    CHANNELS_K: tl.constexpr, CHANNELS_V: tl.constexpr,  # of a program
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the covariances of ``blocks_per_program`` blocks of one head, in some channels."""
    STEPS: tl.constexpr = BLOCK_KV // ROWS  # in a block
    SLICES: tl.constexpr = (DV + CHANNELS_V - 1) // CHANNELS_V  # of the values' channels
    part = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    n = tl.arange(0, ROWS)
    d = tl.program_id(2) // SLICES * CHANNELS_K + tl.arange(0, CHANNELS_K)
    dv = tl.program_id(2) % SLICES * CHANNELS_V + tl.arange(0, CHANNELS_V)
    inside_d, inside_dv = d < D, dv < DV
    k_base = k_ptr + batch * k_sb + head * k_sh
    v_base = v_ptr + batch * v_sb + head * v_sh
    mean_base = k_mean_ptr + batch_head * blocks * D
    first_block = part * blocks_per_program
    last_block = tl.minimum(first_block + blocks_per_program, blocks)
    covariance = tl.zeros([CHANNELS_K, CHANNELS_V], tl.float32)
    for step in range(first_block * STEPS, last_block * STEPS):
        row = tl.cast(step, tl.int64) * ROWS + n
        inside = row < length
        k_ptrs = k_base + row[:, None] * k_sn + d[None, :]
        v_ptrs = v_base + row[:, None] * v_sn + dv[None, :]
        k = tl.load(k_ptrs, mask=inside[:, None] & inside_d[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None] & inside_dv[None, :], other=0.0)
        mean = tl.load(mean_base + step // STEPS * D + d, mask=inside_d, other=0.0)  # [CHANNELS_K]
        # rows outside need no mask: their values are zero
        deviation = (k.to(tl.float32) - mean[None, :]).to(k.dtype)  # [ROWS, CHANNELS_K]
        covariance = tl.dot(tl.trans(deviation), v, covariance, input_precision=PRECISION)
    cov_base = cov_ptr + (batch_head * tl.num_programs(0) + part) * (D * DV)
    cov_mask = inside_d[:, None] & inside_dv[None, :]
    tl.store(cov_base + d[:, None] * DV + dv[None, :], covariance, mask=cov_mask)


@triton.jit
def _sum_kernel(
    sums_ptr,  # float32 [B, H, P, size], contiguous
    total_ptr,  # float32 [B, H, size]
    parts, size, length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # parts and numbers at a time
):  # fmt: skip
    """Add up the sums of P programs, divided by the length."""
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a size
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums_base = sums_ptr + batch_head * parts * size
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        ptrs = sums_base + row.to(tl.int64)[:, None] * size + column[None, :]
        mask = (row < parts)[:, None] & (column < size)[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)  # [ROWS, COLUMNS]
    total_ptrs = total_ptr + batch_head * size + column
    tl.store(total_ptrs, tl.sum(total, 0) / length, mask=column < size)


def parts_of_head(blocks: int, batch_heads: int) -> int:
    """How many programs add up the covariances of a head's blocks."""
    return triton.cdiv(blocks, triton.cdiv(blocks * batch_heads, PROGRAMS))


def block_statistics(
    key: Tensor, value: Tensor, block_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.block_statistics``.

    In 16 bits deviations of keys are rounded to their dtype before they are multiplied.
    """
    batch, heads, length, dim = key.shape
    dim_v = value.shape[-1]
    blocks = -(-length // block_kv)
    parts = parts_of_head(blocks, batch * heads)
    per_program = triton.cdiv(blocks, parts)
    key, value = (last_contiguous(x) for x in (key, value))
    if gluon_statistics is not None and gluon_statistics.takes(key, value, block_kv):
        with torch.cuda.device_of(key):
            pooled = gluon_statistics.block_statistics(key, value, parts)
            return *pooled[:4], _covariance(pooled[4], length)
    padded, padded_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    channels, channels_v = min(CHANNELS, padded), min(CHANNELS, padded_v)
    slices = triton.cdiv(dim, channels) * triton.cdiv(dim_v, channels_v)
    strides = (*key.stride()[:3], *value.stride()[:3])

    def empty(*shape: int) -> Tensor:
        return key.new_empty((batch, heads, *shape), dtype=torch.float32)

    key_mean, key_variance = empty(blocks, dim), empty(blocks, dim)
    value_mean, value_variance = empty(blocks, dim_v), empty(blocks)
    sums = empty(parts, dim, dim_v)
    with torch.cuda.device_of(key):
        launcher(_pool_kernel, (blocks, batch * heads))(
            key, value, key_mean, key_variance, value_mean, value_variance,
            *strides, heads, length, BLOCK_KV=block_kv,
            D=dim, D_PADDED=padded, DV=dim_v, DV_PADDED=padded_v,
            num_warps=max(2, block_kv * max(padded, padded_v) // 4096),
        )  # fmt: skip
        launcher(_covariance_kernel, (parts, batch * heads, slices))(
            key, value, key_mean, sums,
            *strides, heads, length, blocks, per_program,
            BLOCK_KV=block_kv, ROWS=min(block_kv, ROWS[key.itemsize]), D=dim, DV=dim_v,
            CHANNELS_K=channels, CHANNELS_V=channels_v, PRECISION=dot_precision(key.dtype),
            num_warps=4, num_stages=2 if key.itemsize == 2 else 1,
        )  # fmt: skip
    # the second kernel reads means as they are: deviations of keys sum to zero in a block
    key_mean, key_variance, value_mean = (
        rounded(x, key.dtype) for x in (key_mean, key_variance, value_mean)
    )
    with torch.cuda.device_of(key):
        return key_mean, key_variance, value_mean, value_variance, _covariance(sums, length)


def _covariance(sums: Tensor, length: int) -> Tensor:
    """Launch the kernel that adds up those of programs."""
    batch, heads, parts, dim, dim_v = sums.shape
    covariance = sums.new_empty((batch, heads, dim, dim_v))
    launcher(_sum_kernel, (triton.cdiv(dim * dim_v, SUM_COLUMNS), batch * heads))(
        sums, covariance, parts, dim * dim_v, length, **SUM_OPTIONS
    )
    return covariance
