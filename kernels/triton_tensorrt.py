"""The kernels as TensorRT launches them: pointers of inputs, then of outputs, and nothing else.

An ahead-of-time plugin takes no scalar but int32, no workspace and no tensor that it both reads and
writes. Engines have fixed sizes, so that every size, stride and scalar is part of the kernel here.
Tensors are contiguous. The work is done by the kernels of ``triton_attention`` and
``triton_scores``.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import triton
import triton.language as tl

from uta_fx.kernels.triton_attention import _listed_kernel, _tail_kernel
from uta_fx.kernels.triton_scores import _scores_kernel


@triton.jit
def attend_tail_entry(
    q_ptr, listed_ptr, tail_k_ptr, tail_v_ptr, tail_size_ptr, tail_var_ptr, slope_ptr,
    o_ptr, lse_ptr,
    HEADS: tl.constexpr, LENGTH_Q: tl.constexpr,
    TAILS: tl.constexpr, REPRESENTATIVES: tl.constexpr, SLOPES: tl.constexpr,
    SCALE: tl.constexpr, SCALE_LOG2: tl.constexpr, HALF_WEIGHT_LOG2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SIGN: tl.constexpr, PER_BLOCK: tl.constexpr,
    HAS_VARIANCE: tl.constexpr, HAS_SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``triton_attention._tail_kernel`` on contiguous tensors of fixed sizes."""
    ROWS: tl.constexpr = TAILS * REPRESENTATIVES
    OWN: tl.constexpr = 1 if TAILS > 1 else 0  # each query block has its own representatives
    OWN_SLOPE: tl.constexpr = 1 if SLOPES > 1 else 0
    _tail_kernel(
        q_ptr, o_ptr, lse_ptr, listed_ptr,
        tail_k_ptr, tail_v_ptr, tail_size_ptr, tail_var_ptr, slope_ptr,
        HEADS * LENGTH_Q * D, LENGTH_Q * D, D,
        HEADS * LENGTH_Q * DV, LENGTH_Q * DV, DV, 1,
        HEADS * ROWS * D, ROWS * D, OWN * REPRESENTATIVES * D, D,
        HEADS * ROWS * DV, ROWS * DV, OWN * REPRESENTATIVES * DV, DV,
        HEADS * ROWS, ROWS, OWN * REPRESENTATIVES,
        HEADS * REPRESENTATIVES * D, REPRESENTATIVES * D, D,
        HEADS * SLOPES * D * DV, SLOPES * D * DV, OWN_SLOPE * D * DV, DV,
        HEADS, LENGTH_Q, REPRESENTATIVES, SCALE, SCALE_LOG2, HALF_WEIGHT_LOG2,
        BLOCK_Q, BLOCK_M, BLOCK_N, D, D_PADDED, DV, DV_PADDED, SIGN, PER_BLOCK,
        HAS_VARIANCE, HAS_SLOPE, PRECISION,
    )  # fmt: skip


@triton.jit
def attend_listed_entry(
    q_ptr, k_ptr, v_ptr, ids_ptr, counts_ptr, start_ptr, start_lse_ptr,
    o_ptr, lse_ptr,
    HEADS: tl.constexpr, LENGTH_Q: tl.constexpr, LENGTH_KV: tl.constexpr,
    BLOCKS_Q: tl.constexpr, MAX_BLOCKS: tl.constexpr, SCALE_LOG2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SIGN: tl.constexpr, EVEN: tl.constexpr, RESUME: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``triton_attention._listed_kernel``, which resumes where ``start`` and its lse say."""
    if RESUME:
        row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        dv = tl.arange(0, DV_PADDED)
        first = tl.program_id(1).to(tl.int64) * LENGTH_Q
        inside = row < LENGTH_Q
        place = (first + row)[:, None] * DV + dv[None, :]
        mask = inside[:, None] & (dv < DV)[None, :]
        tl.store(o_ptr + place, tl.load(start_ptr + place, mask=mask, other=0.0), mask=mask)
        start_lse = tl.load(start_lse_ptr + first + row, mask=inside, other=0.0)
        tl.store(lse_ptr + first + row, start_lse, mask=inside)
        tl.debug_barrier()  # other threads of the program read it next
    _listed_kernel(
        q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ids_ptr, counts_ptr, None, None, None,
        HEADS * LENGTH_Q * D, LENGTH_Q * D, D,
        HEADS * LENGTH_KV * D, LENGTH_KV * D, D,
        HEADS * LENGTH_KV * DV, LENGTH_KV * DV, DV,
        HEADS * LENGTH_Q * DV, LENGTH_Q * DV, DV, 1,
        HEADS * BLOCKS_Q * MAX_BLOCKS, BLOCKS_Q * MAX_BLOCKS, MAX_BLOCKS,
        HEADS * BLOCKS_Q, BLOCKS_Q,
        HEADS, LENGTH_Q, LENGTH_KV, MAX_BLOCKS, SCALE_LOG2,
        BLOCK_Q, BLOCK_KV, BLOCK_M, BLOCK_N, D, D_PADDED, DV, DV_PADDED,
        SIGN, EVEN, RESUME, False, False, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit
def block_scores_entry(
    q_ptr, mean_ptr, var_ptr, size_ptr,
    scores_ptr,
    HEADS: tl.constexpr, LENGTH_Q: tl.constexpr, BLOCKS_Q: tl.constexpr, BLOCKS: tl.constexpr,
    SCALE: tl.constexpr, SCALE_LOG2: tl.constexpr, HALF_WEIGHT_LOG2: tl.constexpr,
    POWER_VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
    WEIGHTED: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``triton_scores._scores_kernel`` on contiguous tensors of fixed sizes."""
    _scores_kernel(
        q_ptr, mean_ptr, var_ptr, size_ptr, scores_ptr,
        HEADS * LENGTH_Q * D, LENGTH_Q * D, D,
        HEADS * BLOCKS * D, BLOCKS * D, D,
        HEADS * BLOCKS * D, BLOCKS * D, D,
        HEADS * BLOCKS, BLOCKS,
        HEADS, LENGTH_Q, BLOCKS_Q, BLOCKS, SCALE, SCALE_LOG2, HALF_WEIGHT_LOG2, POWER_VALUE,
        BLOCK_Q, ROWS, BLOCK_M, BLOCK_N, D, D_PADDED, WEIGHTED, POWER, PRECISION,
    )  # fmt: skip
