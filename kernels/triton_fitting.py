"""Triton kernels of ``uta::fit_tail``: a few rows attend to keys, and two factors follow.

The second of them reads the keys and values of the sampled blocks, and does so once: each program
takes a part of one head's through a running softmax, apart for those that a row lists and for its
tail, and the representatives of these blocks through another. What comes of the parts is joined by
the third, one program a head, which then solves for the factors; a fourth applies them, for
``uta::fitted_tail``. Softmax is base 2 inside.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels import reference
from uta_fx.kernels.contract import MAX_FIT_ROWS
from uta_fx.kernels.launches import launcher
from uta_fx.kernels.triton_attention import (
    LOG2_E,
    Tile,
    dim_options,
    fit_tile,
    last_contiguous,
    shared_limit,
)

PROGRAMS = 192  # of the second kernel, at most: on an H100 all of them run at once
MIN_KEYS = 1024  # of one of them: what it leaves is 1.6 % of query, key and value of so many tokens
SOLVE_OPTIONS = {"num_warps": 4}
TILE = 1024  # numbers that the kernel that applies the factors takes at a time
LARGEST = tl.constexpr(reference.LARGEST)
RIDGE = tl.constexpr(reference.RIDGE)
STEPS = tl.constexpr(reference.STEPS)
LIMIT = tl.constexpr(reference.LIMIT)
GOLDEN = tl.constexpr(reference.GOLDEN)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny ** 0.5)


@triton.jit
def _sampled_row(i, length, rows):
    """Which of ``length`` query rows is row i of the sample: ``(2 i + 1) length // (2 rows)``."""
    odd, parts = 2 * i + 1, 2 * rows  # no product beyond 32 bits
    return (odd * (length // parts) + odd * (length % parts) // parts).to(tl.int64)


@triton.jit
def _sampled_block(i, every):
    """As ``reference.sampled_block``."""
    return i * every + i * GOLDEN % 65536 * every // 65536


@triton.jit
def _square_kernel(
    q_ptr,
    square_ptr,  # float32 [B, H, R, D], contiguous
    q_sb, q_sh, q_sm,
    heads, length, rows, scale,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Mean of (s q)^2 over the query block of one row of the sample, channel by channel."""
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    first = _sampled_row(tl.program_id(0), length, rows) // BLOCK_Q * BLOCK_Q
    row, d = first + tl.arange(0, BLOCK_Q), tl.arange(0, D_PADDED)
    inside_d = d < D
    q_ptrs = q_ptr + batch * q_sb + head * q_sh + row[:, None] * q_sm + d[None, :]
    q_mask = (row < length)[:, None] & inside_d[None, :]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0).to(tl.float32) * scale  # [BLOCK_Q, D_PADDED]
    square = tl.sum(q * q, 0) / tl.minimum(length - first, BLOCK_Q).to(tl.float32)
    place = batch_head * rows + tl.program_id(0)
    tl.store(square_ptr + place * D + d, square, mask=inside_d)


# one kernel serves all lengths, and whatever stride a batch of one is given
@triton.jit(do_not_specialize=["every", "size_sb"])
def _sample_kernel(
    q_ptr, k_ptr, v_ptr,
    exact_ptr,  # uint8 [B, H, Nq, Nk], contiguous
    counts_ptr,  # int32 [B, H, Nk], contiguous, read where COUNTED
    square_ptr,  # float32 [B, H, R, D], contiguous
    k_mean_ptr, k_var_ptr, v_mean_ptr,  # [B, H, Nk, D] and [B, H, Nk, Dv], contiguous
    size_ptr,  # float32 [B, H, Nk]
    values_ptr,  # [B, H, P, 3, R, Dv], contiguous: of lists, of the tail, of representatives
    masses_ptr,  # float32 [B, H, P, 4, R], contiguous: lse, lists' share; lse, damping of those
    q_sb, q_sh, q_sm,
    k_sb, k_sh, k_sn,
    v_sb, v_sh, v_sn,
    size_sb, size_sh, size_sn,
    heads, length_q, length_kv, rows, blocks_per_program,
    every,  # of so many blocks one is looked at
    scale_log2,  # s * log2(e)
    half_weight_log2,  # variance_weight / 2 * log2(e)
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,  # of the mask
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,  # rows; keys of a step, which divide BLOCK_KV
    MEANS: tl.constexpr,  # representatives of a step
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    COUNTED: tl.constexpr,  # key blocks say how many keys they hold
    PRECISION: tl.constexpr, SQUARE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to ``blocks_per_program`` sampled blocks of one head, and to their representatives.

    Everything is relative to what the program sees. Where that is nothing, values and shares are
    zero and the log-sum-exp is -inf.
    """
    STEPS_OF_BLOCK: tl.constexpr = BLOCK_KV // BLOCK_N
    part = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    r, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    inside_r, inside_d, inside_dv = r < rows, d < D, dv < DV
    row = _sampled_row(r, length_q, rows)
    q_ptrs = q_ptr + batch * q_sb + head * q_sh + row[:, None] * q_sm + d[None, :]
    q_mask = inside_r[:, None] & inside_d[None, :]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)  # [BLOCK_R, D_PADDED]
    blocks = tl.cdiv(length_kv, BLOCK_KV)
    blocks_q = tl.cdiv(length_q, BLOCK_Q)
    exact_rows = exact_ptr + (batch_head * blocks_q + row // BLOCK_Q) * blocks  # [BLOCK_R]
    first_sampled = part * blocks_per_program
    last_sampled = tl.minimum(first_sampled + blocks_per_program, blocks // every)

    k_base = k_ptr + batch * k_sb + head * k_sh
    v_base = v_ptr + batch * v_sb + head * v_sh
    row_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    p_all = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)  # summed over keys in the end
    p_lists = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    of_lists = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    of_tail = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    for step in range(first_sampled * STEPS_OF_BLOCK, last_sampled * STEPS_OF_BLOCK):
        block = _sampled_block(step // STEPS_OF_BLOCK, every)
        listed = tl.load(exact_rows + block, mask=inside_r, other=0)  # [BLOCK_R]
        key = tl.cast(block, tl.int64) * BLOCK_KV + step % STEPS_OF_BLOCK * BLOCK_N + n
        inside = key < length_kv
        if COUNTED:
            count = tl.load(counts_ptr + batch_head * blocks + block)
            inside = inside & (key < tl.cast(block, tl.int64) * BLOCK_KV + count)
        k_ptrs = k_base + key[:, None] * k_sn + d[None, :]
        v_ptrs = v_base + key[:, None] * v_sn + dv[None, :]
        k_mask, v_mask = inside[:, None] & inside_d[None, :], inside[:, None] & inside_dv[None, :]
        k = tl.load(k_ptrs, mask=k_mask, other=0.0)  # [BLOCK_N, D_PADDED]
        v = tl.load(v_ptrs, mask=v_mask, other=0.0)  # [BLOCK_N, DV_PADDED]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        logits = tl.where(inside[None, :], logits, -float("inf"))  # [BLOCK_R, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # nothing seen so far: subtracting 0 instead of -inf leaves the weights zero
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(row_max - base)[:, None]
        of_keys = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)  # [BLOCK_R, DV_PADDED]
        p_all = p_all * shrink + p
        in_lists = (listed != 0)[:, None]
        p_lists = p_lists * shrink + tl.where(in_lists, p, 0.0)
        of_lists = of_lists * shrink + tl.where(in_lists, of_keys, 0.0)
        of_tail = of_tail * shrink + tl.where(in_lists, 0.0, of_keys)
        row_max = new_max
    total = tl.sum(p_all, 1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    place = batch_head * tl.num_programs(0) + part
    values_base = values_ptr + place * (3 * rows * DV)
    values_ptrs = values_base + r[:, None] * DV + dv[None, :]
    mask = inside_r[:, None] & inside_dv[None, :]
    dtype = values_ptr.dtype.element_ty
    tl.store(values_ptrs, (of_lists * inverse[:, None]).to(dtype), mask=mask)
    tl.store(values_ptrs + rows * DV, (of_tail * inverse[:, None]).to(dtype), mask=mask)
    masses_ptrs = masses_ptr + place * (4 * rows) + r
    tl.store(masses_ptrs, row_max + tl.log2(total), mask=inside_r)
    tl.store(masses_ptrs + rows, tl.sum(p_lists, 1) * inverse, mask=inside_r)

    square_ptrs = square_ptr + (batch_head * rows + r)[:, None] * D + d[None, :]
    square = tl.load(square_ptrs, mask=q_mask, other=0.0)  # [BLOCK_R, D_PADDED]
    size_base = size_ptr + batch * size_sb + head * size_sh
    row_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    damped = tl.zeros([BLOCK_R], tl.float32)
    of_means = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    for start in tl.range(first_sampled, last_sampled, MEANS, num_stages=2):
        sampled = start + tl.arange(0, MEANS)
        inside = sampled < last_sampled
        block = _sampled_block(sampled, every)
        place_k = (batch_head * blocks + block)[:, None] * D + d[None, :]
        place_v = (batch_head * blocks + block)[:, None] * DV + dv[None, :]
        k_mask, v_mask = inside[:, None] & inside_d[None, :], inside[:, None] & inside_dv[None, :]
        k = tl.load(k_mean_ptr + place_k, mask=k_mask, other=0.0)  # [MEANS, D_PADDED]
        variance = tl.load(k_var_ptr + place_k, mask=k_mask, other=0.0)
        v = tl.load(v_mean_ptr + place_v, mask=v_mask, other=0.0)  # [MEANS, DV_PADDED]
        size_ptrs = size_base + block.to(tl.int64) * size_sn
        bias = tl.load(size_ptrs, mask=inside, other=-float("inf")) * LOG2_E  # [MEANS]
        listed_ptrs = exact_rows[:, None] + block[None, :]
        listed_mask = inside_r[:, None] & inside[None, :]
        listed = tl.load(listed_ptrs, mask=listed_mask, other=1)  # [BLOCK_R, MEANS]
        spread = tl.trans(variance).to(tl.float32)
        sigma2 = tl.dot(square, spread, input_precision=SQUARE_PRECISION)  # [BLOCK_R, MEANS]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        logits = logits + bias[None, :] + sigma2 * half_weight_log2
        logits = tl.where(listed != 0, -float("inf"), logits)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(row_max - base)
        total = total * shrink + tl.sum(p, 1)
        damped = damped * shrink + tl.sum(p / (1.0 + sigma2), 1)
        of_means = of_means * shrink[:, None]
        of_means = tl.dot(p.to(v.dtype), v, of_means, input_precision=PRECISION)
        row_max = new_max
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(values_ptrs + 2 * rows * DV, (of_means * inverse[:, None]).to(dtype), mask=mask)
    tl.store(masses_ptrs + 2 * rows, row_max + tl.log2(total), mask=inside_r)
    tl.store(masses_ptrs + 3 * rows, damped * inverse, mask=inside_r)


@triton.jit(do_not_specialize=["parts"])  # for one part sums would have another order
def _solve_kernel(
    q_ptr,
    slope_ptr,  # float32 [B, H, D, Dv], contiguous
    values_ptr, masses_ptr,  # of the second kernel
    mass_ptr, gain_ptr,  # float32 [B, H], contiguous
    q_sb, q_sh, q_sm,
    heads, length, rows, parts, scale,
    BLOCK_R: tl.constexpr,
    SLOPE_ROWS: tl.constexpr,  # of the slope at a time
    STAGES: tl.constexpr,  # depth of the pipeline over parts
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Join the parts of one head and solve for its factors."""
    batch_head = tl.program_id(0).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    r, dv = tl.arange(0, BLOCK_R), tl.arange(0, DV_PADDED)
    inside_r, inside_dv = r < rows, dv < DV
    mask = inside_r[:, None] & inside_dv[None, :]
    row_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    exact_mass = tl.zeros([BLOCK_R], tl.float32)  # of the lists
    mass = tl.zeros([BLOCK_R], tl.float32)
    damped = tl.zeros([BLOCK_R], tl.float32)
    exact_values = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    true_values = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    values = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    for part in tl.range(0, parts, num_stages=STAGES):
        place = batch_head * parts + part
        masses_ptrs = masses_ptr + place * (4 * rows) + r
        lse = tl.load(masses_ptrs, mask=inside_r, other=-float("inf"))  # [BLOCK_R]
        lists_share = tl.load(masses_ptrs + rows, mask=inside_r, other=0.0)
        means_lse = tl.load(masses_ptrs + 2 * rows, mask=inside_r, other=-float("inf"))
        damped_share = tl.load(masses_ptrs + 3 * rows, mask=inside_r, other=0.0)
        values_ptrs = values_ptr + place * (3 * rows * DV) + r[:, None] * DV + dv[None, :]
        of_lists = tl.load(values_ptrs, mask=mask, other=0.0)  # [BLOCK_R, DV_PADDED]
        of_tail = tl.load(values_ptrs + rows * DV, mask=mask, other=0.0)
        of_means = tl.load(values_ptrs + 2 * rows * DV, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, lse)
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        shrink = tl.exp2(row_max - base)
        weight, of_mass = tl.exp2(lse - base), tl.exp2(means_lse - base)
        total = total * shrink + weight
        exact_mass = exact_mass * shrink + weight * lists_share
        mass = mass * shrink + of_mass
        damped = damped * shrink + of_mass * damped_share
        exact_values = exact_values * shrink[:, None] + of_lists.to(tl.float32) * weight[:, None]
        true_values = true_values * shrink[:, None] + of_tail.to(tl.float32) * weight[:, None]
        values = values * shrink[:, None] + of_means.to(tl.float32) * of_mass[:, None]
        row_max = new_max
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    exact_mass, mass = exact_mass * inverse, mass * inverse
    exact_values, true_values = exact_values * inverse[:, None], true_values * inverse[:, None]
    values = values * inverse[:, None]

    q_base = q_ptr + batch * q_sb + head * q_sh + _sampled_row(r, length, rows)[:, None] * q_sm
    along = tl.zeros([BLOCK_R, DV_PADDED], tl.float32)
    for first_d in range(0, D_PADDED, SLOPE_ROWS):
        d = first_d + tl.arange(0, SLOPE_ROWS)
        inside_d = d < D
        q_mask = inside_r[:, None] & inside_d[None, :]
        q = tl.load(q_base + d[None, :], mask=q_mask, other=0.0)  # [BLOCK_R, SLOPE_ROWS]
        slope_ptrs = slope_ptr + (batch_head * D + d)[:, None] * DV + dv[None, :]
        slope_mask = inside_d[:, None] & inside_dv[None, :]
        slope = tl.load(slope_ptrs, mask=slope_mask, other=0.0)  # [SLOPE_ROWS, DV_PADDED]
        along = tl.dot(q, slope.to(q.dtype), along, input_precision=PRECISION)
    along = along * (damped * inverse * scale)[:, None]

    of_mass, of_slope = 1.0, 1.0
    for _ in tl.static_range(STEPS):
        # as in the reference: no difference of large numbers where the tail has nearly all of a row
        share = 1.0 / (exact_mass + of_mass * mass)
        more = of_mass * mass - (1.0 - exact_mass)
        given = of_mass * values + of_slope * along  # in place of the true values
        rest = exact_values * (more * share)[:, None] + true_values - given * share[:, None]
        u = (values - (exact_values + given) * (mass * share)[:, None]) * share[:, None]
        x = along * share[:, None]
        y = rest + (of_mass - 1.0) * u + (of_slope - 1.0) * x
        uu, ux, xx = tl.sum(u * u, 1), tl.sum(u * x, 1), tl.sum(x * x, 1)
        uy, xy = tl.sum(u * y, 1), tl.sum(x * y, 1)
        largest = tl.abs(uu) + tl.abs(ux) + tl.abs(xx) + tl.abs(uy) + tl.abs(xy)
        counts = inside_r & (largest < float("inf"))  # rows of padding may hold anything
        uu, ux, xx = _sum_where(uu, counts), _sum_where(ux, counts), _sum_where(xx, counts)
        uy, xy = _sum_where(uy, counts), _sum_where(xy, counts)
        size_u = tl.maximum(tl.sqrt_rn(uu), TINY)
        size_x = tl.maximum(tl.sqrt_rn(xx), TINY)
        along_u, along_x = uy / size_u, xy / size_x
        both = ux / (size_u * size_x)
        determinant = (1.0 + RIDGE) * (1.0 + RIDGE) - both * both
        of_u = 1.0 + ((1.0 + RIDGE) * along_u - both * along_x) / (determinant * size_u)
        of_x = 1.0 + ((1.0 + RIDGE) * along_x - both * along_u) / (determinant * size_x)
        of_mass = tl.minimum(tl.maximum(of_u, 1.0 / LIMIT), LIMIT)
        of_slope = of_mass * tl.minimum(tl.maximum(of_x / of_mass, 0.0), LIMIT)
    tl.store(mass_ptr + batch_head, of_mass)
    tl.store(gain_ptr + batch_head, of_slope / of_mass)


@triton.jit
def _sum_where(x, inside):
    return tl.sum(tl.where(inside, x, 0.0), 0)


# (bytes of an element, padded head dim), as those of ``triton_attention``; a tile has all rows
_TILES = {
    (2, 256): Tile(block_m=16, block_n=32, num_warps=8, num_stages=3),
    (2, 128): Tile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    (2, 64): Tile(block_m=16, block_n=64, num_warps=4, num_stages=4),
    (2, 32): Tile(block_m=16, block_n=64, num_warps=4, num_stages=4),
    (2, 16): Tile(block_m=16, block_n=64, num_warps=4, num_stages=4),
    (4, 256): Tile(block_m=16, block_n=16, num_warps=8, num_stages=2),
    (4, 128): Tile(block_m=16, block_n=32, num_warps=4, num_stages=2),
    (4, 64): Tile(block_m=16, block_n=64, num_warps=4, num_stages=2),
    (4, 32): Tile(block_m=16, block_n=64, num_warps=4, num_stages=3),
    (4, 16): Tile(block_m=16, block_n=64, num_warps=4, num_stages=3),
}
_ROWS = {2: 32, 4: 16}  # by bytes of an element: representatives, or rows of the slope, of a step


# whatever strides a batch of one is given
@triton.jit(do_not_specialize=["size_sb"])
def _apply_kernel(
    mass_ptr, gain_ptr,  # float32 [B, H], contiguous
    size_ptr,  # float32 [B, H, Nk]
    slope_ptr,  # float32 [B, H, D, Dv], contiguous
    fitted_size_ptr, fitted_slope_ptr,  # contiguous
    size_sb, size_sh, size_sn,
    heads, blocks,
    ELEMENTS: tl.constexpr,  # of a slope
    TILE: tl.constexpr,
):  # fmt: skip
    """Apply one head's factors: add the log of the mass, multiply by the gain."""
    batch_head = tl.program_id(0).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    log_mass, gain = tl.log(tl.load(mass_ptr + batch_head)), tl.load(gain_ptr + batch_head)
    size_base = size_ptr + batch * size_sb + head * size_sh
    for start in range(0, blocks, TILE):
        block = start + tl.arange(0, TILE)
        size = tl.load(size_base + block.to(tl.int64) * size_sn, mask=block < blocks, other=0.0)
        place = batch_head * blocks + block
        tl.store(fitted_size_ptr + place, size + log_mass, mask=block < blocks)
    for start in range(0, ELEMENTS, TILE):
        at = start + tl.arange(0, TILE)
        place = batch_head * ELEMENTS + at
        slope = tl.load(slope_ptr + place, mask=at < ELEMENTS, other=0.0) * gain
        if fitted_slope_ptr.dtype.element_ty == tl.float16:
            slope = tl.minimum(tl.maximum(slope, -LARGEST), LARGEST)
        slope = slope.to(fitted_slope_ptr.dtype.element_ty)
        tl.store(fitted_slope_ptr + place, slope, mask=at < ELEMENTS)


def fit_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact: Tensor,
    key_counts: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    value_mean: Tensor,
    log_size: Tensor,
    slope: Tensor,
    scale: float,
    variance_weight: float,
    rows: int,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.fit_tail``.

    Three launches, which wait for nothing; the same inputs give the same bits. Meanwhile each
    program of the second takes as much memory as three outputs of the sampled rows in the dtype of
    the values. In 16 bits weights are rounded to that dtype before they meet the values, what a
    program leaves is, and so is the slope.
    """
    batch, heads, _, dim = query.shape
    dim_v = value.shape[-1]
    query, key, value = (last_contiguous(x) for x in (query, key, value))
    sample = (
        query, key, value, exact, key_counts, key_mean, key_variance, value_mean, log_size,
        scale, variance_weight, rows, block_q, block_kv,
    )  # fmt: skip
    values, masses = attend_sampled_rows(*sample)
    mass, gain = (query.new_empty((batch, heads), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(query):
        launcher(_solve_kernel, (batch * heads,))(
            query, slope.contiguous(), values, masses, mass, gain,
            *query.stride()[:3], heads, query.shape[2], rows, values.shape[2], scale,
            **solve_options(query.dtype, dim, dim_v),
        )  # fmt: skip
    return mass, gain


def fitted_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Launch the kernels and one that applies the factors; as ``reference.fitted_tail``."""
    mass, gain = fit_tail(*args)
    key, log_size, slope = args[1], args[8], args[9].contiguous()
    (batch, heads, blocks), elements = log_size.shape, slope[0, 0].numel()
    fitted_log_size = log_size.new_empty(log_size.shape)
    fitted_slope = key.new_empty((batch, heads, 1, *slope.shape[2:]))
    with torch.cuda.device_of(key):
        launcher(_apply_kernel, (batch * heads,))(
            mass, gain, log_size, slope, fitted_log_size, fitted_slope,
            *log_size.stride(), heads, blocks,
            ELEMENTS=elements, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return fitted_log_size, fitted_slope


def square_options(dim: int, block_q: int) -> dict[str, Any]:
    """Constants and compiler's options of the first kernel."""
    return {"BLOCK_Q": block_q, "D": dim, "D_PADDED": triton.next_power_of_2(dim), "num_warps": 4}


def sample_options(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    block_q: int,
    block_kv: int,
    counted: bool,
    tile: Tile,
) -> dict[str, Any]:
    """Those of the second kernel, for queries of that dtype."""
    dims = dim_options(dtype, dim, dim_v)
    return {
        "BLOCK_Q": block_q, "BLOCK_KV": block_kv, "BLOCK_R": tile.block_m,
        "BLOCK_N": tile.block_n, "MEANS": _ROWS[dtype.itemsize], "COUNTED": counted,
        **dims,
        # squares are float32 whatever the dtype; three products of TF32 are nearly as exact
        "SQUARE_PRECISION": "tf32x3" if dtype.itemsize == 2 else dims["PRECISION"],
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def sample_tile(
    dtype: torch.dtype, dim: int, dim_v: int, block_q: int, block_kv: int, limit: int
) -> Tile:
    """The tuned tile of the second kernel within so many bytes of shared memory."""
    return fit_tile(_TILES, dtype, max(dim, dim_v), block_q, block_kv, 1, 2, limit)


def solve_options(dtype: torch.dtype, dim: int, dim_v: int) -> dict[str, Any]:
    """Constants and compiler's options of the third kernel."""
    return {
        "BLOCK_R": MAX_FIT_ROWS, "SLOPE_ROWS": _ROWS[dtype.itemsize],
        "STAGES": 4 if dtype.itemsize == 2 else 2, **dim_options(dtype, dim, dim_v),
        **SOLVE_OPTIONS,
    }  # fmt: skip


def attend_sampled_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact: Tensor,
    key_counts: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    value_mean: Tensor,
    log_size: Tensor,
    scale: float,
    variance_weight: float,
    rows: int,
    block_q: int,
    block_kv: int,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels that look at keys and values, each program at a part of one head's.

    Args:
        query: As in ``reference.fit_tail``, with a contiguous last dimension as key and value.
        key: See there, as all that follow.
        value: See there.
        exact: See there.
        key_counts: See there.
        key_mean: See there.
        key_variance: See there.
        value_mean: See there.
        log_size: See there.
        scale: See there.
        variance_weight: See there.
        rows: See there.
        block_q: See there.
        block_kv: See there.
        tile: In place of the tuned one.

    Returns:
        Of each of P parts of the keys, in the dtype of ``value`` ``[B, H, P, 3, R, Dv]``: what the
        rows see of their lists there, what of their tails, and the mean value of representatives.
        And float32 ``[B, H, P, 4, R]``: log-sum-exp, the lists' share in it, the log-sum-exp of
        representatives, and how much of the slope is left after damping; both of base 2.
    """
    batch, heads, length_q, dim = query.shape
    length_kv, dim_v = value.shape[-2:]
    every = reference.spacing(exact.shape[3])
    blocks = exact.shape[3] // every
    parts = max(1, min(PROGRAMS // (batch * heads), blocks * block_kv // MIN_KEYS))
    per_program = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, per_program)
    sizes = (query.dtype, dim, dim_v, block_q, block_kv)
    tile = tile or sample_tile(*sizes, shared_limit(query))
    square = query.new_empty((batch, heads, rows, dim), dtype=torch.float32)
    values = value.new_empty((batch, heads, parts, 3, rows, dim_v))
    masses = query.new_empty((batch, heads, parts, 4, rows), dtype=torch.float32)
    with torch.cuda.device_of(query):
        launcher(_square_kernel, (rows, batch * heads))(
            query, square, *query.stride()[:3], heads, length_q, rows, scale,
            **square_options(dim, block_q),
        )  # fmt: skip
        launcher(_sample_kernel, (parts, batch * heads))(
            query, key, value,
            exact.contiguous().view(torch.uint8), key_counts.contiguous(), square,
            *(x.contiguous() for x in (key_mean, key_variance, value_mean)), log_size,
            values, masses,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *log_size.stride(),
            heads, length_q, length_kv, rows, per_program, every,
            scale * LOG2_E.value, variance_weight / 2 * LOG2_E.value,
            **sample_options(*sizes, key_counts.shape[2] > 0, tile),
        )  # fmt: skip
    return values, masses
