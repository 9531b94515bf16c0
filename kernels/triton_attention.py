"""Triton forward kernels of ``uta::sparse_attention``: listed key blocks and a tail in one softmax.

Two kernels share the work of a row: the tail kernel stores attention over the representatives, with
its log-sum-exp, where the results belong; the listed kernel takes it up from there as the state of
its own running softmax and overwrites it. Apart, each has the registers that it needs. Softmax is
base 2 inside. ``gluon_attention`` takes the place of one or both on Hopper.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.ops import empty_outputs
from uta_fx.kernels.reference import text_arguments, text_as_tail
from uta_fx.kernels.triton_selection import list_blocks

try:
    from uta_fx.kernels import gluon_attention, gluon_tail
except (ImportError, AttributeError):  # Gluon is experimental: its names may move
    gluon_attention = gluon_tail = None  # type: ignore[assignment]

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
ID_CHUNK = 512  # ids that a program looks through at a time


@triton.jit
def _mark_listed_kernel(
    listed_ptr,  # uint8 [B, H, Nq, Nk], zero before
    ids_ptr, counts_ptr,
    ids_sb, ids_sh, ids_sn,
    counts_sb, counts_sh,
    heads, blocks_kv, max_blocks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write 1 where a query block lists a key block; ids outside ``[0, Nk)`` are passed over."""
    q_block = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    count = tl.load(counts_ptr + batch * counts_sb + head * counts_sh + q_block)
    count = tl.minimum(count, max_blocks)
    row = listed_ptr + (batch_head * tl.num_programs(0) + q_block) * blocks_kv
    ids_row = ids_ptr + batch * ids_sb + head * ids_sh + q_block.to(tl.int64) * ids_sn
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_row + i, mask=i < count, other=-1)  # [CHUNK]
        tl.store(row + ids, 1, mask=(ids >= 0) & (ids < blocks_kv))


@triton.jit
def _load_rows(ptrs, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Load a tile, zero outside; no mask where none is needed."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(ptrs, mask=columns[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def _tail_kernel(
    q_ptr, o_ptr, lse_ptr,
    listed_ptr,  # uint8 [B, H, Nq, Nk], read when PER_BLOCK
    tail_k_ptr, tail_v_ptr, tail_size_ptr, tail_var_ptr, slope_ptr,
    q_sb, q_sh, q_sm,
    o_sb, o_sh, o_sm, o_sd,
    tail_k_sb, tail_k_sh, tail_k_sn, tail_k_sr,
    tail_v_sb, tail_v_sh, tail_v_sn, tail_v_sr,
    tail_size_sb, tail_size_sh, tail_size_sn,
    tail_var_sb, tail_var_sh, tail_var_sr,
    slope_sb, slope_sh, slope_sn, slope_sd,
    heads, length_q, representatives,
    scale,  # |s|; its sign is in SIGN
    scale_log2,  # |s| * log2(e), 1 where s is 0
    half_weight_log2,  # variance_weight / 2 * log2(e)
    BLOCK_Q: tl.constexpr,  # rows that share a list
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # rows of a program, representatives of a step
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SIGN: tl.constexpr,  # of s: 1, -1 or 0
    PER_BLOCK: tl.constexpr,  # one representative for each key block: leave out those listed
    HAS_VARIANCE: tl.constexpr, HAS_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store attention of BLOCK_M rows over the tail; a row without one is zero, its lse -inf."""
    PAD_D: tl.constexpr = D != D_PADDED
    PAD_DV: tl.constexpr = DV != DV_PADDED
    # of the slope at a time: 32 KB at most
    SLOPE_ROW_BITS: tl.constexpr = DV_PADDED * slope_ptr.dtype.element_ty.primitive_bitwidth
    SLOPE_ROWS: tl.constexpr = min(D_PADDED, 32 * 1024 * 8 // SLOPE_ROW_BITS)
    tile = tl.program_id(0)
    q_block = (tile * BLOCK_M // BLOCK_Q).to(tl.int64)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs_m, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    inside_m = tile * BLOCK_M + offs_m < length_q
    inside_d, inside_dv = d < D, dv < DV
    first_row = tile.to(tl.int64) * BLOCK_M
    q_base = q_ptr + batch * q_sb + head * q_sh + first_row * q_sm
    q_ptrs = q_base + offs_m[:, None] * q_sm + d[None, :]
    q = _load_rows(q_ptrs, inside_m, inside_d, True, PAD_D)  # [BLOCK_M, D_PADDED]
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)
    if HAS_VARIANCE:
        first_of_block = q_block * BLOCK_Q
        square = tl.zeros([D_PADDED], tl.float32)  # of the query block, which may be many tiles
        for part in tl.static_range(BLOCK_Q // BLOCK_M):
            rows = first_of_block + part * BLOCK_M + offs_m
            ptrs = q_ptr + batch * q_sb + head * q_sh + rows[:, None] * q_sm + d[None, :]
            some = _load_rows(ptrs, rows < length_q, inside_d, True, PAD_D).to(tl.float32) * scale
            square += tl.sum(some * some, 0)
        square = square / tl.minimum(length_q - first_of_block, BLOCK_Q).to(tl.float32)

    tail_k_base = tail_k_ptr + batch * tail_k_sb + head * tail_k_sh + q_block * tail_k_sn
    tail_v_base = tail_v_ptr + batch * tail_v_sb + head * tail_v_sh + q_block * tail_v_sn
    size_base = tail_size_ptr + batch * tail_size_sb + head * tail_size_sh + q_block * tail_size_sn
    var_base = tail_var_ptr + batch * tail_var_sb + head * tail_var_sh
    blocks_q = tl.cdiv(length_q, BLOCK_Q)
    listed_row = listed_ptr + (batch_head * blocks_q + q_block) * representatives
    offs_k = offs_r[:, None] * tail_k_sr + d[None, :]
    offs_v = offs_r[:, None] * tail_v_sr + dv[None, :]
    offs_var = offs_r[:, None] * tail_var_sr + d[None, :]

    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    gain = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PADDED], tl.float32)
    for start in range(0, representatives, BLOCK_N):
        first = tl.cast(start, tl.int64)
        inside = start + offs_r < representatives
        k = _load_rows(tail_k_base + first * tail_k_sr + offs_k, inside, inside_d, True, PAD_D)
        v = _load_rows(tail_v_base + first * tail_v_sr + offs_v, inside, inside_dv, True, PAD_DV)
        bias = tl.load(size_base + start + offs_r, mask=inside, other=-float("inf")) * LOG2_E
        if PER_BLOCK:
            listed = tl.load(listed_row + start + offs_r, mask=inside, other=1)
            bias = tl.where(listed != 0, -float("inf"), bias)  # [BLOCK_N]
        if HAS_VARIANCE:
            var_ptrs = var_base + first * tail_var_sr + offs_var
            variance = _load_rows(var_ptrs, inside, inside_d, True, PAD_D)  # [BLOCK_N, D_PADDED]
            sigma2 = tl.sum(variance.to(tl.float32) * square[None, :], 1)  # [BLOCK_N]
            bias += sigma2 * half_weight_log2
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        logits = logits * scale_log2 + bias[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # nothing seen so far: subtracting 0 instead of -inf leaves the weights zero
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(row_max - base)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        if HAS_SLOPE:
            damped = p * (1.0 / (1.0 + sigma2))[None, :] if HAS_VARIANCE else p
            gain = gain * shrink + tl.sum(damped, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max

    inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc * inverse[:, None]
    if HAS_SLOPE:
        slope_base = slope_ptr + batch * slope_sb + head * slope_sh + q_block * slope_sn
        # the gain, at most 1 by now, goes into q, so that the product is added in place; the
        # modifier keeps this read apart from the first one: q must not live on in registers
        share = (gain * inverse * (scale * SIGN))[:, None]
        for first_d in tl.static_range(0, D_PADDED, SLOPE_ROWS):
            part = first_d + tl.arange(0, SLOPE_ROWS)
            inside_part = part < D
            part_ptrs = q_base + offs_m[:, None] * q_sm + part[None, :]
            q_mask = inside_m[:, None] & inside_part[None, :]
            q_again = tl.load(part_ptrs, mask=q_mask, other=0.0, cache_modifier=".cg")
            slope_ptrs = slope_base + part[:, None] * slope_sd + dv[None, :]
            slope = _load_rows(slope_ptrs, inside_part, inside_dv, PAD_D, PAD_DV)
            q_gain = (q_again.to(tl.float32) * share).to(q.dtype)  # [BLOCK_M, SLOPE_ROWS]
            acc = tl.dot(q_gain, slope, acc, input_precision=PRECISION)
    o_base = o_ptr + batch * o_sb + head * o_sh + first_row * o_sm
    o_ptrs = o_base + offs_m[:, None] * o_sm + dv[None, :] * o_sd
    o_mask = inside_m[:, None] & inside_dv[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=o_mask)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + batch_head * length_q + first_row + offs_m, lse, mask=inside_m)


@triton.jit
def _attend_tile(
    q, k, v, acc, row_max, row_sum, inside, scale_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        logits = tl.where(inside[None, :], logits, -float("inf"))
    # scale_log2 is positive, so it can wait until after the maximum: one multiply-add an element
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
    # nothing seen so far: subtracting 0 instead of -inf leaves the weights zero
    base = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
    p = tl.exp2(logits * scale_log2 - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _listed_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ids_ptr, counts_ptr,
    key_counts_ptr,  # int32 [B, H, Nk], read where COUNTED
    gain_ptr, offset_ptr,  # float32 [B, H, Nq] and [B, H, Nq, DV], read where RECTIFY
    q_sb, q_sh, q_sm,
    k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn,
    o_sb, o_sh, o_sm, o_sd,
    ids_sb, ids_sh, ids_sn,
    counts_sb, counts_sh,
    heads, length_q, length_kv, max_blocks,
    scale_log2,  # |s| * log2(e), 1 where s is 0
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,  # of the lists
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # of a tile: divide BLOCK_Q and BLOCK_KV
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    SIGN: tl.constexpr,  # of s: 1, -1 or 0
    EVEN: tl.constexpr,  # the last key block is whole
    RESUME: tl.constexpr,  # o and lse hold attention over the tail
    COUNTED: tl.constexpr,  # key blocks say how many keys they hold; the last one is whole
    RECTIFY: tl.constexpr,  # scale and shift the output of each query block
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store attention of BLOCK_M rows over their listed blocks and, where RESUME, the tail.

    A row that sees nothing has row_sum 0 and row_max -inf: it is stored as zero with lse -inf. A
    row with an id outside ``[0, Nk)`` reads no listed block at all and is stored as NaN.
    """
    PAD_D: tl.constexpr = D != D_PADDED
    PAD_DV: tl.constexpr = DV != DV_PADDED
    SPLIT: tl.constexpr = BLOCK_KV // BLOCK_N  # tiles in a key block
    tile = tl.program_id(0)
    q_block = (tile * BLOCK_M // BLOCK_Q).to(tl.int64)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    inside_m = tile * BLOCK_M + offs_m < length_q
    inside_d, inside_dv = d < D, dv < DV
    first_row = tile.to(tl.int64) * BLOCK_M
    q_base = q_ptr + batch * q_sb + head * q_sh + first_row * q_sm
    q_ptrs = q_base + offs_m[:, None] * q_sm + d[None, :]
    q = _load_rows(q_ptrs, inside_m, inside_d, True, PAD_D)  # [BLOCK_M, D_PADDED]
    if SIGN != 1:
        q = (q * SIGN).to(q.dtype)

    # look the list through: is it valid, and where in it is the ragged last block?
    blocks_kv = tl.cdiv(length_kv, BLOCK_KV)
    count = tl.load(counts_ptr + batch * counts_sb + head * counts_sh + q_block)
    count = tl.minimum(count, max_blocks)
    ids_row = ids_ptr + batch * ids_sb + head * ids_sh + q_block * ids_sn
    outside = 0
    ragged_at = count
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_row + i, mask=i < count, other=0)  # [CHUNK]
        wrong = (i < count) & ((ids < 0) | (ids >= blocks_kv))
        outside = tl.maximum(outside, tl.max(wrong.to(tl.int32), 0))
        if not EVEN:
            here = tl.where((ids == blocks_kv - 1) & (i < count), i, count)
            ragged_at = tl.minimum(ragged_at, tl.min(here, 0))
    whole = tl.where(outside != 0, 0, count)  # blocks that the main loop takes
    if not EVEN:
        has_ragged = (outside == 0) & (ragged_at < count)
        whole -= has_ragged.to(tl.int32)

    o_base = o_ptr + batch * o_sb + head * o_sh + first_row * o_sm
    o_ptrs = o_base + offs_m[:, None] * o_sm + dv[None, :] * o_sd
    o_mask = inside_m[:, None] & inside_dv[None, :]
    lse_ptrs = lse_ptr + batch_head * length_q + first_row + offs_m
    if RESUME:
        row_max = tl.load(lse_ptrs, mask=inside_m, other=-float("inf")) * LOG2_E  # [BLOCK_M]
        row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)
        acc = tl.load(o_ptrs, mask=o_mask, other=0.0).to(tl.float32)  # [BLOCK_M, DV_PADDED]
    else:
        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DV_PADDED], tl.float32)
    k_base = k_ptr + batch * k_sb + head * k_sh
    v_base = v_ptr + batch * v_sb + head * v_sh
    offs_k = offs_n[:, None] * k_sn + d[None, :]
    offs_v = offs_n[:, None] * v_sn + dv[None, :]
    for i in range(whole * SPLIT):
        position = i // SPLIT
        if not EVEN:  # the last of the list stands in for the ragged one, which comes after
            position = tl.where(position == ragged_at, whole, position)
        block = tl.load(ids_row + position).to(tl.int64)
        first = block * BLOCK_KV + (i % SPLIT) * BLOCK_N
        inside_n = offs_n
        if COUNTED:
            keys = tl.load(key_counts_ptr + batch_head * blocks_kv + block)
            inside_n = (i % SPLIT) * BLOCK_N + offs_n < keys
        k = _load_rows(k_base + first * k_sn + offs_k, offs_n, inside_d, False, PAD_D)
        v = _load_rows(v_base + first * v_sn + offs_v, offs_n, inside_dv, False, PAD_DV)
        acc, row_max, row_sum = _attend_tile(
            q, k, v, acc, row_max, row_sum, inside_n, scale_log2, COUNTED, PRECISION
        )
    if not EVEN:
        first_ragged = (blocks_kv - 1) * BLOCK_KV
        end = tl.where(has_ragged, length_kv, first_ragged)
        for start in tl.range(first_ragged, end, BLOCK_N, num_stages=1):
            first = tl.cast(start, tl.int64)
            inside_n = start + offs_n < length_kv
            k = _load_rows(k_base + first * k_sn + offs_k, inside_n, inside_d, True, PAD_D)
            v = _load_rows(v_base + first * v_sn + offs_v, inside_n, inside_dv, True, PAD_DV)
            acc, row_max, row_sum = _attend_tile(
                q, k, v, acc, row_max, row_sum, inside_n, scale_log2, True, PRECISION
            )

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = (row_max + tl.log2(row_sum)) * LN_2
    if RECTIFY:
        block = batch_head * tl.cdiv(length_q, BLOCK_Q) + q_block
        offset = tl.load(offset_ptr + block * DV + dv, mask=inside_dv, other=0.0)  # [DV_PADDED]
        acc = acc * tl.load(gain_ptr + block) + offset[None, :]
    if outside != 0:
        acc += float("nan")
        lse += float("nan")
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=o_mask)
    tl.store(lse_ptrs, lse, mask=inside_m)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut and pipelined.

    Args:
        block_m: Query rows of a program; divides ``block_q``.
        block_n: Keys of a step, which divide ``block_kv``; or representatives of a step.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline over the steps.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (bytes of an element, padded head dim), on a machine with 227 KB of shared memory; a block size
# is at most the one that the caller asks for
_LISTED_TILES = {
    (2, 256): Tile(block_m=64, block_n=32, num_warps=8, num_stages=3),
    (2, 128): Tile(block_m=64, block_n=64, num_warps=4, num_stages=3),
    (2, 64): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (2, 32): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (2, 16): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3),
    (4, 256): Tile(block_m=16, block_n=16, num_warps=8, num_stages=2),
    (4, 128): Tile(block_m=32, block_n=16, num_warps=4, num_stages=2),
    (4, 64): Tile(block_m=32, block_n=32, num_warps=4, num_stages=2),
    (4, 32): Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
    (4, 16): Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),
}
_TAIL_TILES = {
    (2, 256): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (2, 128): Tile(block_m=64, block_n=64, num_warps=4, num_stages=1),
    (2, 64): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
    (2, 32): Tile(block_m=128, block_n=64, num_warps=4, num_stages=2),
    (2, 16): Tile(block_m=128, block_n=64, num_warps=4, num_stages=2),
    (4, 256): Tile(block_m=16, block_n=32, num_warps=8, num_stages=1),
    (4, 128): Tile(block_m=16, block_n=32, num_warps=4, num_stages=1),
    (4, 64): Tile(block_m=32, block_n=32, num_warps=4, num_stages=1),
    (4, 32): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
    (4, 16): Tile(block_m=64, block_n=32, num_warps=4, num_stages=1),
}


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor | None,
    block_counts: Tensor | None,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
    *,
    listed_tile: Tile | None = None,
    tail_tile: Tile | None = None,
    exact: Tensor | None = None,
    key_counts: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.sparse_attention``.

    One launch without a tail, two with a tail of rank 5 (one where ``block_ids`` has width 0), and
    with one of rank 4 a memset and three; nothing waits for the host. Besides the results, a tail
    of rank 4 takes one byte for each pair of a query block and a key block. In 16 bits the tail's
    part of a row is rounded once between the kernels. On Hopper, what ``gluon_attention`` accepts
    goes to its kernels: a memset and a launch, and then ``gluon_attention.attend``.
    ``listed_tile`` and ``tail_tile`` keep the kernels of this file and take the place of the tuned
    tiles. ``exact``, the mask of ``block_masked_attention``, takes the place of the lists, which
    are None then. ``gain`` and ``offset``, both or none, are those of ``rectified_attention``,
    ``key_counts`` are those of ``clustered_attention``; they keep the listed kernel of this file.
    """
    result, lse = empty_outputs(query, value)
    output = strided(result)
    batch, heads, length_q, dim = query.shape
    length_kv, dim_v = value.shape[-2:]
    blocks_q, blocks_kv = -(-length_q // block_q), -(-length_kv // block_kv)
    representatives = tail_key.shape[-2]
    limit = shared_limit(query)
    sizes = (query.dtype, max(dim, dim_v), block_q)
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    dims = dim_options(query.dtype, dim, dim_v) | {"SIGN": (scale > 0) - (scale < 0)}
    scale_log2 = (abs(scale) or 1.0) * LOG2_E.value
    per_block = representatives > 0 and tail_key.dim() == 4
    nothing_listed = block_ids is not None and block_ids.shape[-1] == 0
    tail_alone = representatives > 0 and nothing_listed and gain is None
    paired = (
        gluon_attention is not None
        and not tail_alone
        and not listed_tile
        and gain is None
        and key_counts is None
        and gluon_attention.takes(query, key, value, output, block_q, block_kv)
    )
    with torch.cuda.device_of(query):
        if exact is None:
            assert block_ids is not None and block_counts is not None
            block_ids, block_counts = last_contiguous(block_ids), last_contiguous(block_counts)
            mapped = blocks_kv if per_block or paired else 0
            listed = query.new_zeros((batch, heads, blocks_q, mapped), dtype=torch.uint8)
            if mapped:
                launcher(_mark_listed_kernel, (blocks_q, batch * heads))(
                    listed, block_ids, block_counts,
                    *block_ids.stride()[:3], *block_counts.stride()[:2],
                    heads, blocks_kv, block_ids.shape[-1],
                    CHUNK=ID_CHUNK,
                )  # fmt: skip
        else:
            listed = exact.contiguous().view(torch.uint8)
        paired_tail = None
        if representatives:
            tail_key, tail_value, tail_log_size, tail_variance, tail_slope = (
                last_contiguous(x)
                for x in (tail_key, tail_value, tail_log_size, tail_variance, tail_slope)
            )
            if paired and not tail_tile:
                tail = gluon_tail.Tail(
                    tail_key, tail_value, tail_log_size, tail_variance, tail_slope
                )
                paired_tail = tail if gluon_attention.takes_tail(tail, scale) else None
        if representatives and paired_tail is None:
            most = max(16, triton.next_power_of_2(representatives))
            tail_tile = tail_tile or fit_tile(_TAIL_TILES, *sizes, most, 1, 2, limit)
            launcher(_tail_kernel, (blocks_q * (block_q // tail_tile.block_m), batch * heads))(
                query, output, lse, listed,
                tail_key, tail_value, tail_log_size, tail_variance, tail_slope,
                *query.stride()[:3], *output.stride(),
                *_block_strides(tail_key), *_block_strides(tail_value),
                *_block_strides(tail_log_size.unsqueeze(-1))[:3],
                *tail_variance.stride()[:3], *tail_slope.stride()[:2],
                tail_slope.stride(2) if tail_slope.shape[2] > 1 else 0, tail_slope.stride(3),
                heads, length_q, representatives,
                abs(scale), scale_log2, variance_weight / 2 * LOG2_E.value,
                BLOCK_Q=block_q, BLOCK_M=tail_tile.block_m, BLOCK_N=tail_tile.block_n,
                PER_BLOCK=per_block, HAS_VARIANCE=tail_variance.shape[2] > 0,
                HAS_SLOPE=tail_slope.shape[2] > 0, **dims,
                num_warps=tail_tile.num_warps, num_stages=tail_tile.num_stages,
            )  # fmt: skip
        if tail_alone:
            return result, lse
        resume = representatives > 0 and paired_tail is None
        if paired:
            gluon_attention.attend(
                query, key, value, output, lse, listed, block_counts,
                0 if block_ids is None else block_ids.shape[-1],
                paired_tail, scale, variance_weight, resume,
            )  # fmt: skip
            return result, lse
        if block_ids is None or block_counts is None:
            assert exact is not None
            block_ids, block_counts = list_blocks(exact)
        listed_tile = listed_tile or fit_tile(_LISTED_TILES, *sizes, block_kv, 1, 2, limit)
        launcher(_listed_kernel, (blocks_q * (block_q // listed_tile.block_m), batch * heads))(
            query, key, value, output, lse, block_ids, block_counts,
            None if key_counts is None else key_counts.contiguous(),
            None if gain is None else gain.contiguous(),
            None if offset is None else offset.contiguous(),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride(),
            *block_ids.stride()[:3], *block_counts.stride()[:2],
            heads, length_q, length_kv, block_ids.shape[-1], scale_log2,
            BLOCK_Q=block_q, BLOCK_KV=block_kv,
            BLOCK_M=listed_tile.block_m, BLOCK_N=listed_tile.block_n,
            EVEN=length_kv % block_kv == 0, RESUME=resume, COUNTED=key_counts is not None,
            RECTIFY=gain is not None, CHUNK=ID_CHUNK, **dims,
            num_warps=listed_tile.num_warps, num_stages=listed_tile.num_stages,
        )  # fmt: skip
    return result, lse


def block_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, exact: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.block_masked_attention``.

    As ``sparse_attention`` without the memset and the launch that makes a mask of lists; what
    ``gluon_attention`` does not accept takes a launch that makes lists of the mask.
    """
    return sparse_attention(query, key, value, None, None, *rest, exact=exact)


def text_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the tail; arguments and results as in ``reference``."""
    return sparse_attention(*text_arguments(*args))


def clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.clustered_attention``."""
    return sparse_attention(*args[:5], *args[6:], key_counts=args[5])


def rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    gain: Tensor,
    offset: Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.rectified_attention``.

    Gain and offset are the listed kernel's last step: nothing passes over the output again.
    """
    tail = text_as_tail(query, text_key, text_value, text_bias, block_q)
    return sparse_attention(
        query, key, value, block_ids, block_counts, *tail, scale, 0.0, block_q, block_kv,
        gain=gain, offset=offset,
    )[0]  # fmt: skip


def fit_tile(
    tiles: dict[tuple[int, int], Tile],
    dtype: torch.dtype,
    dim: int,
    block_q: int,
    max_block_n: int,
    resident: int,
    streamed: int,
    limit: int,
) -> Tile:
    """Take the tuned tile and make it smaller until it suits block sizes and shared memory.

    Args:
        tiles: By bytes of an element and padded head dim.
        dtype: Of the query.
        dim: The larger of the two head dims.
        block_q: Query rows in a block.
        max_block_n: Keys in a block, or representatives there are; a power of two.
        resident: How many tiles of ``block_m`` rows stay in shared memory.
        streamed: How many tiles of ``block_n`` rows each stage of the pipeline holds.
        limit: Bytes of shared memory that one program may use.
    """
    padded = max(16, triton.next_power_of_2(dim))
    tuned = tiles[dtype.itemsize, padded]
    block_m, block_n = min(tuned.block_m, block_q), min(tuned.block_n, max_block_n)
    row = padded * dtype.itemsize
    while block_n > 16 and (resident * block_m + streamed * block_n) * row > limit:
        block_n //= 2
    while block_m > 16 and (resident * block_m + streamed * block_n) * row > limit:
        block_m //= 2
    stages = (limit - resident * block_m * row) // (streamed * block_n * row)
    return Tile(
        block_m=block_m,
        block_n=block_n,
        num_warps=tuned.num_warps,
        num_stages=min(tuned.num_stages, max(1, stages)),
    )


def dim_options(dtype: torch.dtype, dim: int, dim_v: int) -> dict[str, Any]:
    """Constants of a kernel that follow from the two head dims and the dtype of its tensors."""
    return {
        "D": dim, "D_PADDED": triton.next_power_of_2(dim),
        "DV": dim_v, "DV_PADDED": triton.next_power_of_2(dim_v), "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``; float32 is multiplied as PyTorch does.

    What is read here is what comes of all of its settings, of which the older cannot be read
    (``torch.get_float32_matmul_precision``, ``allow_tf32``) once the newer are used.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def shared_limit(x: Tensor) -> int:
    """Bytes of shared memory that one program may use where ``x`` lives (sm_90's on a CPU)."""
    return _device_shared_limit(x.device.index) if x.is_cuda else 227 * 1024


@cache
def _device_shared_limit(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def _block_strides(tail: Tensor) -> tuple[int, ...]:
    """Strides of batch, head, query block (0: all see the same) and representative."""
    strides = tail.stride()[:-1]
    return (*strides[:2], 0, strides[2]) if len(strides) == 3 else strides


def last_contiguous(x: Tensor) -> Tensor:
    """The same numbers, those of a row side by side, as kernels read them."""
    return strided(x if x.stride(-1) == 1 else x.contiguous())


def strided(x: Tensor) -> Tensor:
    """The same memory, without a stride of 0 where a dimension has one entry.

    Inductor writes such strides for batches of one, and the copy engine takes none.
    """
    dims = list(zip(x.shape, x.stride(), strict=True))
    if not any(n == 1 and not stride for n, stride in dims):
        return x
    beyond = max(n * stride for n, stride in dims)
    return x.as_strided(x.shape, [stride if n > 1 else beyond for n, stride in dims])
