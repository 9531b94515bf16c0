"""``uta::block_scores`` on Hopper: two groups of warps multiply what one warp copies.

As in ``triton_scores`` a program goes over the block means twice, for the softmax's maximum and sum
of each group of rows and to add the groups up, and the second time tiles lie the other way. Here
the products of one group of warps overlap with the exponentials of the other.
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
    GROUP_REGISTERS,
    HEAD_DIMS,
    MAX_REGISTERS,
    is_addressable,
    on_hopper,
    tensor_map,
)
from uta_fx.kernels.gluon_softmax import LOG2_E, exp2
from uta_fx.kernels.launches import launcher

TILE = 64  # key blocks of a step
GROUPS = {128: 128, 64: 64}  # of query rows, that four warps score, by head dim
POWERS = (0.5, 1.0)  # of the variance, that the kernel serves
SLOTS = 3  # of the ring: tiles of means or variances


@gluon.jit
def _copy(
    mean_desc, var_desc, size_base, ring, column_ring, full, empty, batch, head, blocks,
    TILE: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Copy all means, then means and variances in turns, each tile into the next slot of the ring.

    Beside a tile of means go the base-2 logs of the block sizes, -inf where there is no block.
    """
    LINE: gl.constexpr = gl.BlockedLayout([TILE // 32], [32], [1], [0])
    steps = gl.cdiv(blocks, TILE)
    for t in range(3 * steps):
        again = t - steps
        start = gl.where(again < 0, t, again // 2) * TILE
        slot = t % SLOTS
        bar = full.index(slot)
        offs = start + gl.arange(0, TILE, LINE)
        size = gl.load(size_base + offs, mask=offs < blocks, other=-float("inf")) * LOG2_E  # [TILE]
        mbarrier.wait(empty.index(slot), (t // SLOTS & 1) ^ 1)
        mbarrier.expect(bar, mean_desc.block_type.nbytes)
        if (again >= 0) & (again % 2 == 1):
            tma.async_copy_global_to_shared(
                var_desc, [batch, head, start, 0], bar, ring.index(slot)
            )
        else:
            tma.async_copy_global_to_shared(
                mean_desc, [batch, head, start, 0], bar, ring.index(slot)
            )
        column_ring.index(slot).store(size)
        mbarrier.arrive(bar)


@gluon.jit
def _pool_queries(
    q_tile, square_tile, q_base, q_sm, first, length_q, scale,
    D: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Store each group's mean query and mean of ``(s q)^2`` into shared memory."""
    PART: gl.constexpr = 32  # groups whose rows are loaded at a time
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    for part in gl.static_range(GROUPS // PART):
        row = first + ROWS * (part * PART + gl.arange(0, PART, gl.SliceLayout(1, LAYOUT)))
        total = gl.zeros([PART, D], gl.float32, LAYOUT)
        square = gl.zeros([PART, D], gl.float32, LAYOUT)
        for r in gl.static_range(ROWS):
            ptrs = q_base + (row + r).to(gl.int64)[:, None] * q_sm + d[None, :]
            some = gl.load(ptrs, mask=(row + r < length_q)[:, None], other=0.0).to(gl.float32)
            total += some
            square += some * some
        members = gl.minimum(gl.maximum(length_q - row, 1), ROWS).to(gl.float32)[:, None]
        q_tile.slice(part * PART, PART).store((total / members).to(q_tile.dtype))
        square *= scale * scale / members
        square_tile.slice(part * PART, PART).store(square.to(q_tile.dtype))
    fence_async_shared()


@gluon.jit
def _log_sums(
    memory, q_tile, blocks, scale_log2,
    TILE: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The base-2 log-sum-exp of each group's logits, ``[GROUPS]``."""
    ring, column_ring, full, empty = memory
    D: gl.constexpr = q_tile.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    none = gl.zeros([GROUPS, TILE], gl.float32, LAYOUT)
    q = q_tile.load(gl.DotOperandLayout(0, LAYOUT, 2))
    row_max = gl.full([GROUPS], -float("inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    row_sum = gl.zeros([GROUPS], gl.float32, gl.SliceLayout(1, LAYOUT))
    for t in range(gl.cdiv(blocks, TILE)):
        slot = t % SLOTS
        mbarrier.wait(full.index(slot), t // SLOTS & 1)
        mean = ring.index(slot).reshape([TILE, D]).permute((1, 0))
        logits = warpgroup_mma(q, mean, none, use_acc=False, is_async=True)
        size = column_ring.index(slot).load(gl.SliceLayout(0, LAYOUT))  # [TILE]
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(empty.index(slot))
        logits = logits * scale_log2 + size[None, :]  # [GROUPS, TILE]
        new_max = gl.maximum(row_max, gl.max(logits, 1))
        row_sum = row_sum * exp2(row_max - new_max) + gl.sum(exp2(logits - new_max[:, None]), 1)
        row_max = new_max
    return row_max + gl.log2(row_sum)


@gluon.jit
def _add_up(
    memory, q_tile, square_tile, norm, scores_base, first_block, blocks_q, blocks, scale_log2,
    half_weight_log2,  # variance_weight / 2 * log2(e)
    PER_BLOCK: gl.constexpr,  # groups of a query block
    WEIGHTED: gl.constexpr,  # the variance takes part in the mass
    HALF: gl.constexpr,  # the power of the variance is a half, not one
    TILE: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Store the scores; ``norm`` is taken off each group's base-2 logits."""
    ring, column_ring, full, empty = memory
    D: gl.constexpr = q_tile.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUPS, 16])
    MANY: gl.constexpr = GROUPS // PER_BLOCK
    norm = gl.convert_layout(norm, gl.SliceLayout(0, LAYOUT))
    none = gl.zeros([TILE, GROUPS], gl.float32, LAYOUT)
    steps = gl.cdiv(blocks, TILE)
    for step in range(steps):
        t = steps + 2 * step
        slot = t % SLOTS
        other = (t + 1) % SLOTS
        mbarrier.wait(full.index(slot), t // SLOTS & 1)
        mean = ring.index(slot).reshape([TILE, D])
        logits = warpgroup_mma(mean, q_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(full.index(other), (t + 1) // SLOTS & 1)
        variance = ring.index(other).reshape([TILE, D])
        sigma2 = warpgroup_mma(
            variance, square_tile.permute((1, 0)), none, use_acc=False, is_async=True
        )
        size = column_ring.index(slot).load(gl.SliceLayout(1, LAYOUT))  # [TILE]
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(empty.index(slot))
        logits = logits * scale_log2 - norm[None, :]  # over the blocks' sizes
        if WEIGHTED:
            sigma2 = warpgroup_mma_wait(0, deps=[sigma2])
            mbarrier.arrive(empty.index(other))
            weights = exp2(logits + half_weight_log2 * sigma2)  # [TILE, GROUPS]
        else:
            weights = exp2(logits)
            sigma2 = warpgroup_mma_wait(0, deps=[sigma2])
            mbarrier.arrive(empty.index(other))
        scores = weights * sigma2
        squares = scores * (weights if HALF else scores)
        by_block = gl.sum(gl.reshape(squares, [TILE, MANY, PER_BLOCK]), 2)  # [TILE, MANY]
        OUT: gl.constexpr = by_block.type.layout
        column = step * TILE + gl.arange(0, TILE, gl.SliceLayout(1, OUT))
        block = first_block + gl.arange(0, MANY, gl.SliceLayout(0, OUT))
        ptrs = scores_base + block.to(gl.int64)[None, :] * blocks + column[:, None]
        mask = (block < blocks_q)[None, :] & (column < blocks)[:, None]
        size = gl.convert_layout(size, gl.SliceLayout(1, OUT))[:, None]
        # a block without keys may have any weight so far
        scores = gl.where(size > -float("inf"), gl.sqrt(by_block) * exp2(size), 0.0)
        gl.store(ptrs, scores.to(scores_base.dtype.element_ty), mask=mask)


@gluon.jit
def _score(
    memory, given, q_tile, square_tile, first,
    BLOCK_Q: gl.constexpr, ROWS: gl.constexpr, WEIGHTED: gl.constexpr, HALF: gl.constexpr,
    TILE: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Store the scores of GROUPS * ROWS query rows from ``first`` on."""
    q_base, q_sm, scores_base, length_q, blocks_q, blocks, scale, scale_log2, weight = given
    D: gl.constexpr = q_tile.shape[1]
    _pool_queries(q_tile, square_tile, q_base, q_sm, first, length_q, scale, D, ROWS, GROUPS)
    norm = _log_sums(memory, q_tile, blocks, scale_log2, TILE, GROUPS, SLOTS)
    # and the count of the mean over groups; +inf: a group that is not there
    row = first + ROWS * gl.arange(0, GROUPS, norm.type.layout)
    rows_of_block = gl.minimum(gl.maximum(length_q - row // BLOCK_Q * BLOCK_Q, 1), BLOCK_Q)
    norm += 0.5 * gl.log2(gl.cdiv(rows_of_block, ROWS).to(gl.float32))
    norm = gl.where(row < length_q, norm, float("inf"))
    _add_up(
        memory, q_tile, square_tile, norm, scores_base, first // BLOCK_Q, blocks_q, blocks,
        scale_log2, weight, BLOCK_Q // ROWS, WEIGHTED, HALF, TILE, GROUPS, SLOTS,
    )  # fmt: skip


@gluon.jit
def _scores_kernel(
    mean_desc, var_desc, q_ptr, size_ptr,
    scores_ptr,  # bfloat16 [B, H, Nq, Nk], contiguous
    q_sb, q_sh, q_sm,
    size_sb, size_sh,
    heads, length_q, blocks_q, blocks,
    scale, scale_log2, half_weight_log2,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, ROWS: gl.constexpr,
    WEIGHTED: gl.constexpr, HALF: gl.constexpr,
    TILE: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Score 2 * GROUPS * ROWS query rows against every key block."""
    batch_head = gl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    tile: gl.constexpr = mean_desc.block_type.shape
    ring = gl.allocate_shared_memory(
        mean_desc.dtype, [SLOTS, tile[0], tile[1], tile[2], tile[3]], mean_desc.layout
    )
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    column_ring = gl.allocate_shared_memory(gl.float32, [SLOTS, TILE], line)
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUPS, D], mean_desc.dtype)
    q_a = gl.allocate_shared_memory(mean_desc.dtype, [GROUPS, D], flat)
    square_a = gl.allocate_shared_memory(mean_desc.dtype, [GROUPS, D], flat)
    q_b = gl.allocate_shared_memory(mean_desc.dtype, [GROUPS, D], flat)
    square_b = gl.allocate_shared_memory(mean_desc.dtype, [GROUPS, D], flat)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=2)  # the copy, and what is beside it
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # the copy engine sees them
    memory = (ring, column_ring, full, empty)
    first = gl.program_id(0) * (2 * GROUPS * ROWS)
    given = (
        q_ptr + batch.to(gl.int64) * q_sb + head.to(gl.int64) * q_sh, q_sm,
        scores_ptr + batch_head.to(gl.int64) * blocks_q * blocks,
        length_q, blocks_q, blocks, scale, scale_log2, half_weight_log2,
    )  # fmt: skip
    size_base = size_ptr + batch.to(gl.int64) * size_sb + head.to(gl.int64) * size_sh
    rest = first + GROUPS * ROWS
    gl.warp_specialize(
        [
            (_score, (
                memory, given, q_a, square_a, first,
                BLOCK_Q, ROWS, WEIGHTED, HALF, TILE, GROUPS, SLOTS,
            )),
            (_score, (
                memory, given, q_b, square_b, rest,
                BLOCK_Q, ROWS, WEIGHTED, HALF, TILE, GROUPS, SLOTS,
            )),
            (_copy, (
                mean_desc, var_desc, size_base, ring, column_ring, full, empty,
                batch, head, blocks, TILE, SLOTS,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def takes(
    query: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    variance_power: float,
    block_q: int,
    rows: int,
) -> bool:
    """Whether ``block_scores`` serves these; last dimensions are contiguous.

    It wants a GPU of compute capability 9.0, 16 bits, a head dim of 64 or 128, a power of the
    variance in ``POWERS``, and no more than ``GROUPS`` groups in a query block.
    """
    return (
        on_hopper(query)
        and takes_sizes(query.dtype, query.shape[-1], variance_power, block_q, rows)
        and all(is_addressable(x) for x in (key_mean, key_variance))
    )


def takes_sizes(
    dtype: torch.dtype, dim: int, variance_power: float, block_q: int, rows: int
) -> bool:
    """What ``takes`` wants of a dtype, a head dim and numbers."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and dim in HEAD_DIMS
        and variance_power in POWERS
        and GROUPS[dim] % (block_q // rows) == 0
    )


def rows_of_program(dim: int, rows: int) -> int:
    """How many query rows one program scores, in groups of ``rows``, at head dim ``dim``."""
    return 2 * GROUPS[dim] * rows


def score_options(
    dim: int, variance_weight: float, variance_power: float, block_q: int, rows: int
) -> dict[str, int]:
    """Constants and compiler options of the kernel."""
    return {
        "D": dim, "BLOCK_Q": block_q, "ROWS": rows,
        "WEIGHTED": variance_weight != 0, "HALF": variance_power == 0.5,
        "TILE": TILE, "GROUPS": GROUPS[dim], "SLOTS": SLOTS, "REGISTERS": GROUP_REGISTERS[dim],
        "num_warps": 4, "maxnreg": MAX_REGISTERS[dim],
    }  # fmt: skip


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
) -> Tensor:
    """Launch the kernel for tensors that ``takes`` accepts; as ``reference.block_scores``.

    The mean query and the mean of ``(s q)^2`` of a group are rounded to the query's dtype, the
    scores to bfloat16.
    """
    batch, heads, length_q, dim = query.shape
    blocks_q, blocks = triton.cdiv(length_q, block_q), key_mean.shape[-2]
    scores = query.new_empty((batch, heads, blocks_q, blocks), dtype=torch.bfloat16)
    launcher(_scores_kernel, (triton.cdiv(length_q, rows_of_program(dim, rows)), batch * heads))(
        tensor_map(key_mean, TILE), tensor_map(key_variance, TILE), query, log_size, scores,
        *query.stride()[:3], *log_size.stride()[:2],
        heads, length_q, blocks_q, blocks,
        scale, scale * LOG2_E.value, variance_weight / 2 * LOG2_E.value,
        **score_options(dim, variance_weight, variance_power, block_q, rows),
    )  # fmt: skip
    return scores
