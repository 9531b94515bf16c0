"""``uta::block_statistics`` on Hopper: keys and values are read once.

One warp copies blocks of keys and values into a ring of shared memory. One group of four warps
pools keys and multiplies their deviations with values, another pools values.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from uta_fx.kernels.gluon_attention import (
    BLOCK,
    MAX_REGISTERS,
    is_addressable,
    on_hopper,
    takes_sizes,
    tensor_map,
)
from uta_fx.kernels.launches import launcher
from uta_fx.kernels.reference import LARGEST as LARGEST_FLOAT16

LARGEST = gl.constexpr(LARGEST_FLOAT16)
STAGES = 4  # of the ring: pairs of a key and a value block
VALUE_REGISTERS = {128: 120, 64: 104}  # of a thread that pools values; others pool keys, one copies


@gluon.jit
def _copy(
    k_desc, v_desc, k_ring, v_ring, full, empty, batch, head, first_block, count,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy ``count`` blocks, each into the next stage of the ring."""
    for t in range(count):
        stage = t % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (t // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        at = (first_block + t) * BLOCK
        tma.async_copy_global_to_shared(k_desc, [batch, head, at, 0], bar, k_ring.index(stage))
        tma.async_copy_global_to_shared(v_desc, [batch, head, at, 0], bar, v_ring.index(stage))


@gluon.jit
def _pool_keys(
    k_ring, v_ring, full, empty, mean_ptr, var_ptr, cov_ptr, first_block, count, length,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Store means and variances of keys, and the sum of covariances with values."""
    C_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    K_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, C_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    d = gl.arange(0, D, gl.SliceLayout(1, K_LAYOUT))
    n = gl.arange(0, BLOCK, gl.SliceLayout(0, K_LAYOUT))
    covariance = gl.zeros([D, D], gl.float32, C_LAYOUT)
    for t in range(count):
        stage = t % STAGES
        block = first_block + t
        rows = gl.minimum(length - block * BLOCK, BLOCK)
        mbarrier.wait(full.index(stage), t // STAGES & 1)
        k = k_ring.index(stage).reshape([BLOCK, D]).permute((1, 0)).load(K_LAYOUT)  # [D, BLOCK]
        k = k.to(gl.float32)
        mean = gl.sum(k, 1) / rows.to(gl.float32)
        deviation = gl.where((n < rows)[None, :], k - mean[:, None], 0.0)
        variance = gl.sum(deviation * deviation, 1) / rows.to(gl.float32)
        v = v_ring.index(stage).reshape([BLOCK, D])
        covariance = warpgroup_mma(deviation.to(dtype), v, covariance, is_async=True)
        gl.store(mean_ptr + block.to(gl.int64) * D + d, mean)
        if dtype == gl.float16:
            variance = gl.minimum(variance, LARGEST)
        gl.store(var_ptr + block.to(gl.int64) * D + d, variance)
        covariance = warpgroup_mma_wait(0, deps=[covariance])
        mbarrier.arrive(empty.index(stage))
    rows = gl.arange(0, D, gl.SliceLayout(1, C_LAYOUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, C_LAYOUT))
    gl.store(cov_ptr + rows[:, None] * D + columns[None, :], covariance)


@gluon.jit
def _pool_values(
    v_ring, full, empty, mean_ptr, var_ptr, first_block, count, length,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Store means of values, and their variances summed over columns."""
    # warps side by side: a column's sum stays in one
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D, D // 32], [1, 4], [1, 0])
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    n = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    for t in range(count):
        stage = t % STAGES
        block = first_block + t
        rows = gl.minimum(length - block * BLOCK, BLOCK)
        mbarrier.wait(full.index(stage), t // STAGES & 1)
        v = v_ring.index(stage).reshape([BLOCK, D]).load(LAYOUT).to(gl.float32)  # [BLOCK, D]
        mbarrier.arrive(empty.index(stage))
        mean = gl.sum(v, 0) / rows.to(gl.float32)
        deviation = gl.where((n < rows)[:, None], v - mean[None, :], 0.0)
        variance = gl.sum(gl.sum(deviation * deviation, 0), 0) / rows.to(gl.float32)
        gl.store(mean_ptr + block.to(gl.int64) * D + d, mean)
        gl.store(var_ptr + block, variance)


@gluon.jit
def _statistics_kernel(
    k_desc, v_desc,
    k_mean_ptr, k_var_ptr,  # [B, H, Nk, D], contiguous, of the keys' dtype
    v_mean_ptr,  # likewise
    v_var_ptr,  # float32 [B, H, Nk], contiguous
    cov_ptr,  # float32 [B, H, P, D, D], contiguous: one sum for each program
    heads, length, blocks, blocks_per_program,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Pool ``blocks_per_program`` blocks of one head."""
    part = gl.program_id(0)
    batch_head = gl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    tile: gl.constexpr = k_desc.block_type.shape
    ring: gl.constexpr = [STAGES, tile[0], tile[1], tile[2], tile[3]]
    k_ring = gl.allocate_shared_memory(k_desc.dtype, ring, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, ring, v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # the copy engine sees them
    first = part * blocks_per_program
    count = gl.minimum(blocks_per_program, blocks - first)
    wide = batch_head.to(gl.int64)
    k_at = wide * blocks * D
    program = wide * gl.num_programs(0) + part
    gl.warp_specialize(
        [
            (_pool_keys, (
                k_ring, v_ring, full, empty, k_mean_ptr + k_at, k_var_ptr + k_at,
                cov_ptr + program * (D * D), first, count, length, D, BLOCK, STAGES,
            )),
            (_pool_values, (
                v_ring, full, empty, v_mean_ptr + k_at, v_var_ptr + wide * blocks,
                first, count, length, D, BLOCK, STAGES,
            )),
            (_copy, (
                k_desc, v_desc, k_ring, v_ring, full, empty, batch, head, first, count,
                BLOCK, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def takes(key: Tensor, value: Tensor, block_kv: int) -> bool:
    """Whether ``block_statistics`` serves these; last dimensions are contiguous.

    It wants a GPU of compute capability 9.0, 16 bits, a head dim of 64 or 128 for keys and values,
    and blocks of 64.
    """
    return (
        on_hopper(key)
        and takes_sizes(key.dtype, key.shape[-1], value.shape[-1], block_kv, block_kv)
        and all(is_addressable(x) for x in (key, value))
    )


def block_statistics(
    key: Tensor, value: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel for tensors that ``takes`` accepts; as ``reference.block_statistics``.

    In the place of the covariance it returns float32 ``[B, H, parts, D, D]``, whose sum is the
    covariance times L. Deviations of keys are rounded to their dtype before they are multiplied.
    Each head is the work of ``parts`` programs, at least 1 and no more than it has blocks.
    """
    batch, heads, length, dim = key.shape
    blocks = triton.cdiv(length, BLOCK)

    key_mean, key_variance, value_mean = (
        key.new_empty((batch, heads, blocks, dim)) for _ in range(3)
    )
    value_variance = key.new_empty((batch, heads, blocks), dtype=torch.float32)
    sums = key.new_empty((batch, heads, parts, dim, dim), dtype=torch.float32)
    launcher(_statistics_kernel, (parts, batch * heads))(
        tensor_map(key, BLOCK), tensor_map(value, BLOCK),
        key_mean, key_variance, value_mean, value_variance, sums,
        heads, length, blocks, triton.cdiv(blocks, parts),
        **statistics_options(dim),
    )  # fmt: skip
    return key_mean, key_variance, value_mean, value_variance, sums


def statistics_options(dim: int) -> dict[str, int]:
    """Constants and compiler options of the kernel, for D."""
    return {
        "D": dim, "BLOCK": BLOCK, "STAGES": STAGES, "REGISTERS": VALUE_REGISTERS[dim],
        "num_warps": 4, "maxnreg": MAX_REGISTERS[dim],
    }  # fmt: skip
