"""Attention to listed blocks and a tail on Hopper: two query blocks share what they read.

A program takes a pair of neighbouring query blocks. One warp copies the representatives of the tail
and then the key and value blocks of both lists into a ring of shared memory, a block that both list
once; two groups of four warps multiply, one for each query block. At head dim 64 a multiprocessor
has two programs. ``gluon_softmax`` has the steps of a group, ``gluon_tail`` the tail's part.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from uta_fx.kernels.gluon_softmax import LOG2_E, attend_steps
from uta_fx.kernels.gluon_tail import Tail, add_slope, copy_tail, variances
from uta_fx.kernels.launches import launcher

LN_2 = tl.constexpr(math.log(2.0))
BLOCK = 64  # rows of a query block, keys of a key block
CHUNK = 128  # key blocks that are ordered at a time, fewer than 2^FIELD
FIELD = 10  # bits of a count in a word of three
RANKED, COMPARED = 64, 256  # what a program ranks, and with how many others at a time
# numbers in a plan: alternating, count of each query block, bad rows, ragged rows, blocks in both
# lists; then which pair of the head has its turn here
PLAN = 8
# of the kernel that orders lists, and of the one that gives pairs their turns
ORDER_OPTIONS = {"CHUNK": CHUNK, "PLAN": PLAN, "FIELD": FIELD, "num_warps": 1}
TURN_OPTIONS = {"PLAN": PLAN, "RANKED": RANKED, "COMPARED": COMPARED}
HEAD_DIMS = (64, 128)
# of each of 384 threads when a program starts: two groups that multiply and one that copies. At
# head dim 64 they are half of what a multiprocessor has
MAX_REGISTERS = {128: 168, 64: 80}
GROUP_REGISTERS = {128: 240, 64: 104}  # then of the second group's; the first has what is left
STAGES = 5  # of the ring: pairs of a key and a value block
MAX_BLOCKS = 1 << 16  # of keys: their order is kept in 16 bits
MIN_SCALE = 1e-30  # biases of representatives are divided by the scale, unless that is 0
# what is made for pairs of blocks takes one part in SHARE of query, key and value: it is made for
# some of the heads at a time, but not for so few that a launch has less than FILL programs
SHARE = 25
FILL = 2048  # 15 on each multiprocessor, one after the other
MAP_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
# the parts of the heads differ in number and in where they begin in memory, which changes nothing
# in the code of their kernels: they are compiled once
OF_PARTS: dict[str, Any] = {
    "do_not_specialize": ["heads"],
    "do_not_specialize_on_alignment": ["lse_ptr", "size_ptr", "listed_ptr", "counts_ptr"],
}


@triton.jit
def _load_kinds(row_a, row_b, ids, inside, has_b, FIELD: tl.constexpr):
    """A one in the field of its kind for each key block that is listed: a's, b's, both's."""
    a = tl.load(row_a + ids, mask=inside, other=0).to(tl.int32)
    b = tl.load(row_b + ids, mask=inside & has_b, other=0).to(tl.int32)
    return (a & ~b) | (b & ~a) << FIELD | (a & b) << 2 * FIELD


@triton.jit
def _fields(word, FIELD: tl.constexpr):
    """The three counts of a word."""
    mask = (1 << FIELD) - 1
    return word & mask, word >> FIELD & mask, word >> 2 * FIELD


@triton.jit(**OF_PARTS)
def _pair_lists_kernel(
    ids_out_ptr,  # uint16 [B, H, pairs, Nk]
    plan_ptr,  # int32 [B, H, pairs, PLAN]
    listed_ptr,  # uint8 [B, H, Nq, Nk]
    counts_ptr,  # how long lists are; None where the map is all there is
    counts_sb, counts_sh,
    heads, blocks_q, blocks_kv, whole, max_blocks,
    CHUNK: tl.constexpr, PLAN: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Order the key blocks that a pair of query blocks, a and b, lists.

    First, where one of them lists it, the ragged block, which is the one beyond ``whole``. Then
    those of a alone and of b alone in turns, as many of each; then those of both; last what one of
    them has more of its own. So neither waits long for the other's, and entry j of either is at a
    place that needs no list: ``2 j + which`` among those in turns and ``j + alternating`` after.
    """
    pair = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, CHUNK)
    has_b = 2 * pair + 1 < blocks_q
    row_a = listed_ptr + (batch_head * blocks_q + 2 * pair) * blocks_kv
    row_b = row_a + blocks_kv
    only_a, only_b, both = 0, 0, 0
    for start in range(0, whole, CHUNK):
        ids = start + offs
        kind = _load_kinds(row_a, row_b, ids, ids < whole, has_b, FIELD)  # [CHUNK]
        some_a, some_b, some_both = _fields(tl.sum(kind, 0), FIELD)
        only_a += some_a
        only_b += some_b
        both += some_both
    is_ragged = whole < blocks_kv
    ragged_a = tl.load(row_a + whole, mask=is_ragged, other=0).to(tl.int32)
    ragged_b = tl.load(row_b + whole, mask=is_ragged & has_b, other=0).to(tl.int32)
    first = ragged_a | ragged_b
    alternating = tl.minimum(only_a, only_b)
    bad = 0
    if counts_ptr is not None:
        batch, head = batch_head // heads, batch_head % heads
        counts_row = counts_ptr + batch * counts_sb + head * counts_sh + 2 * pair
        given_a = tl.minimum(tl.load(counts_row), max_blocks)
        given_b = tl.minimum(tl.load(counts_row + 1, mask=has_b, other=0), max_blocks)
        # ids are distinct: one that is missing from the map lies outside of it
        bad_a = (given_a != only_a + both + ragged_a).to(tl.int32)
        bad_b = (given_b != only_b + both + ragged_b).to(tl.int32)
        bad = bad_a | bad_b << 1

    ids_row = ids_out_ptr + (batch_head * tl.num_programs(0) + pair) * blocks_kv
    plan = plan_ptr + (batch_head * tl.num_programs(0) + pair) * PLAN
    tl.store(plan, alternating)
    tl.store(plan + 1, only_a + both)
    tl.store(plan + 2, only_b + both)
    tl.store(plan + 3, bad)
    tl.store(plan + 4, ragged_a | ragged_b << 1)
    tl.store(plan + 5, only_a + only_b + 2 * both + ragged_a + ragged_b)
    tl.store(ids_row, whole, mask=first != 0)
    seen_a, seen_b, seen_both = 0, 0, 0
    rest = alternating + both
    for start in range(0, whole, CHUNK):
        ids = start + offs
        kind = _load_kinds(row_a, row_b, ids, ids < whole, has_b, FIELD)  # [CHUNK]
        before_a, before_b, before_both = _fields(tl.cumsum(kind, 0) - kind, FIELD)
        rank_a, rank_b = seen_a + before_a, seen_b + before_b
        at_a = tl.where(rank_a < alternating, 2 * rank_a, rest + rank_a)
        at_b = tl.where(rank_b < alternating, 2 * rank_b + 1, rest + rank_b)
        at = tl.where(kind == 1, at_a, at_b)
        at = tl.where(kind >> 2 * FIELD != 0, 2 * alternating + seen_both + before_both, at)
        tl.store(ids_row + first + at, ids, mask=kind != 0)
        some_a, some_b, some_both = _fields(tl.sum(kind, 0), FIELD)
        seen_a += some_a
        seen_b += some_b
        seen_both += some_both


@triton.jit
def _longest_first_kernel(
    plan_ptr,  # int32 [B, H, pairs, PLAN]
    blocks_q,
    PLAN: tl.constexpr,
    RANKED: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """Give the pairs of a head their turns, longest lists first: no long one comes at the end."""
    pairs = tl.cdiv(blocks_q, 2)
    plans = plan_ptr + tl.program_id(1).to(tl.int64) * pairs * PLAN
    pair = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    length = tl.load(plans + pair * PLAN + 5, mask=pair < pairs, other=0)  # [RANKED]
    rank = tl.zeros([RANKED], tl.int32)
    for start in range(0, pairs, COMPARED):
        other = start + tl.arange(0, COMPARED)
        of_other = tl.load(plans + other * PLAN + 5, mask=other < pairs, other=-1)  # [COMPARED]
        earlier = of_other[None, :] > length[:, None]
        tied = of_other[None, :] == length[:, None]
        earlier = earlier | (tied & (other[None, :] < pair[:, None]))
        rank += tl.sum(earlier.to(tl.int32), 1)
    tl.store(plans + rank * PLAN + 6, pair, mask=pair < pairs)


@gluon.jit
def _copy_blocks(
    k_desc, v_desc, k_ring, v_ring, full, empty, ids_row, plan, batch, head, base,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the pair's key and value blocks in their order, each into the next stage of the ring.

    ``base`` places come before them. Both groups free a stage; for a group that has no use for a
    block this warp does so. Such a group goes on by two places at most and waits for a phase of a
    stage whose phase before it may not have seen: that one must be over, or its parity is taken for
    the one waited for. So a copy begins when the one ``STAGES - 2`` places before it has come to
    its end.
    """
    alternating = gl.load(plan)
    count_a, count_b = gl.load(plan + 1), gl.load(plan + 2)
    ragged = gl.load(plan + 4)
    first = gl.minimum(ragged, 1)
    total = first + alternating + gl.maximum(count_a, count_b)
    shared_end = first + alternating + gl.minimum(count_a, count_b)
    block = gl.load(ids_row, mask=total > 0, other=0).to(gl.int32)
    for i in range(total):
        following = gl.load(ids_row + i + 1, mask=i + 1 < total, other=0).to(gl.int32)
        t = base + i
        stage = t % STAGES
        mbarrier.wait(empty.index(stage), (t // STAGES & 1) ^ 1)
        if t >= STAGES - 2:
            ended = t - (STAGES - 2)
            mbarrier.wait(full.index(ended % STAGES), ended // STAGES & 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [batch, head, block * BLOCK, 0], bar, k_ring.index(stage)
        )
        tma.async_copy_global_to_shared(
            v_desc, [batch, head, block * BLOCK, 0], bar, v_ring.index(stage)
        )
        mbarrier.arrive(bar)  # there is nothing beside the copies
        alone = (i < first + 2 * alternating) | (i >= shared_end)
        alone = gl.where(i < first, ragged != 3, alone)
        mbarrier.arrive(empty.index(stage), pred=alone)
        block = following


@gluon.jit
def _copy(
    memory,  # of _pair_memory
    given,  # of _paired_kernel
    BLOCK: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Copy everything that the pair reads: queries, the tail, the slope, listed blocks."""
    desk, slope_desk, k_ring, v_ring, column_ring, full, empty, desk_full, desk_free = memory
    (
        q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, slope_desc,
        size_base, sigma2_a, sigma2_b, listed_a, listed_b, ids_row, plan,
        batch, head, pair, representatives, scale_log2, half_weight_log2,
    ) = given  # fmt: skip
    mbarrier.expect(desk_full, 2 * q_desc.block_type.nbytes)
    for i in gl.static_range(2):
        row = (2 * pair + i) * BLOCK  # beyond the last query: zeros
        tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], desk_full, desk.index(i))
    base = 0
    if TAIL:
        base = gl.cdiv(representatives, BLOCK)
        copy_tail(
            tail_k_desc, tail_v_desc, k_ring, v_ring, column_ring, full, empty,
            size_base, sigma2_a, sigma2_b, listed_a, listed_b,
            batch, head, base, representatives, scale_log2, half_weight_log2, BLOCK, STAGES,
        )  # fmt: skip
        if not KEEP:
            mbarrier.wait(desk_free, 0)  # the queries are in registers by now
        mbarrier.wait(desk_full, 0)
        mbarrier.expect(desk_full, slope_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(slope_desc, [batch, head, 0, 0], desk_full, slope_desk)
    _copy_blocks(
        k_desc, v_desc, k_ring, v_ring, full, empty, ids_row, plan, batch, head, base,
        BLOCK, STAGES,
    )  # fmt: skip


@gluon.jit
def _attend(
    memory,  # of _pair_memory
    given,  # of _paired_kernel
    WHICH: gl.constexpr,  # of the pair
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr, EVEN: gl.constexpr, TAIL: gl.constexpr, RESUME: gl.constexpr,
    KEEP: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Store attention of one query block; ``rows``: how many of the pair's rows there are."""
    desk, slope_desk, k_ring, v_ring, column_ring, full, empty, desk_full, desk_free = memory
    (
        o_desc, o_base, lse_base, plan, o_sm, batch, head, pair, rows,
        last_keys, representatives, scale, scale_log2,
    ) = given  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    alternating = gl.load(plan)
    bad = gl.load(plan + 3) >> WHICH & 1
    ragged = gl.load(plan + 4)
    first = gl.minimum(ragged, 1)  # entries before those in turns
    own = ragged >> WHICH & 1  # and of them this query block's
    count = own + gl.load(plan + 1 + WHICH)

    mbarrier.wait(desk_full, 0)
    q_tile = desk.index(WHICH).reshape([BLOCK, D])
    if KEEP:
        q = q_tile
        if SIGN != 1:
            q_tile.store((q_tile.load(Q_LAYOUT) * SIGN).to(dtype))
            fence_async_shared()
    else:
        q = q_tile.load(Q_LAYOUT)  # [BLOCK, D]
        mbarrier.arrive(desk_free)
        if SIGN != 1:
            q = (q * SIGN).to(dtype)
    s_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
    lse_ptrs = lse_base + s_rows
    if RESUME:
        o_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, O_LAYOUT))
        o_dims = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
        o_ptrs = o_base + o_rows[:, None] * o_sm + o_dims[None, :]
        row_max = gl.load(lse_ptrs, mask=s_rows < rows, other=-float("inf")) * LOG2_E  # [BLOCK]
        row_sum = gl.where(row_max == -float("inf"), 0.0, 1.0)
        acc = gl.load(o_ptrs, mask=(o_rows < rows)[:, None], other=0.0).to(gl.float32)  # [BLOCK, D]
    else:
        row_max = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([BLOCK, D], gl.float32, O_LAYOUT)
    gain = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    rings = k_ring, v_ring, column_ring, full, empty
    base = 0
    if TAIL:
        base = gl.cdiv(representatives, BLOCK)
        acc, row_max, row_sum, gain = attend_steps(
            q, (acc, row_max, row_sum, gain), rings, (0, 0, 0, 0), base, 0, scale_log2,
            WHICH, STAGES, True, True, OVERLAP,
        )  # fmt: skip
        mbarrier.wait(desk_full, 1)
        if KEEP:
            q_again = q_tile.load(P_LAYOUT)
        else:
            q_again = gl.convert_layout(q, P_LAYOUT)
        acc, row_max, row_sum = add_slope(
            q_again, acc, row_max, row_sum, gain, slope_desk.reshape([D, D]), scale
        )
        if not KEEP:
            mbarrier.arrive(desk_free)
    acc, row_max, row_sum, gain = attend_steps(
        q, (acc, row_max, row_sum, gain), rings, (base, first, own, alternating), count, last_keys,
        scale_log2, WHICH, STAGES, EVEN, False, OVERLAP,
    )  # fmt: skip

    inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    acc *= gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
    lse = (row_max + gl.log2(row_sum)) * LN_2
    if bad != 0:
        acc += float("nan")
        lse += float("nan")
    gl.store(lse_ptrs, lse, mask=s_rows < rows)
    if not KEEP:
        # nobody reads the desk any more: both have their queries, and have used the slope
        mbarrier.wait(desk_free, 1 if TAIL else 0)
    o_tile = desk.index(WHICH)
    o_tile.reshape([BLOCK, D]).store(acc.to(dtype))
    fence_async_shared()
    row = (2 * pair + WHICH) * BLOCK  # rows beyond the last one are not written
    tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_tile)
    tma.store_wait(0)


@gluon.jit
def _pair_memory(
    q_desc, k_desc, v_desc, slope_desc,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Shared memory and barriers of one pair."""
    tile: gl.constexpr = k_desc.block_type.shape
    ring: gl.constexpr = [STAGES, tile[0], tile[1], tile[2], tile[3]]
    k_ring = gl.allocate_shared_memory(k_desc.dtype, ring, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, ring, v_desc.layout)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    column_ring = gl.allocate_shared_memory(gl.float32, [4 * STAGES, BLOCK], line)
    # queries, then the output
    two: gl.constexpr = [2, tile[0], tile[1], tile[2], tile[3]]
    desk = gl.allocate_shared_memory(q_desc.dtype, two, q_desc.layout)
    slope_shape: gl.constexpr = slope_desc.block_type.shape
    if KEEP:
        slope_desk = gl.allocate_shared_memory(slope_desc.dtype, slope_shape, slope_desc.layout)
    else:  # the slope takes the place of the queries
        slope_desk = desk._reinterpret(slope_desc.dtype, slope_shape, slope_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    desk_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if KEEP:  # nobody waits for it, and what nobody uses would lie where other things do
        desk_free = desk_full
    else:
        desk_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(desk_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # the copies, and what is beside them
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(desk_full, count=1)
    fence_async_shared()  # the copy engine sees them
    return desk, slope_desk, k_ring, v_ring, column_ring, full, empty, desk_full, desk_free


@gluon.jit
def _pair_arguments(given, turn, BLOCK: gl.constexpr, PLAN: gl.constexpr):
    """What the groups and the copying warp are given of the pair whose turn it is.

    A query block beyond the last reads the last one's lists and stores nothing.
    """
    (
        q_desc, k_desc, v_desc, o_desc, tail_k_desc, tail_v_desc, slope_desc,
        o_head, lse_ptr, ids_ptr, plan_ptr, size_head, sigma2_ptr, listed_ptr,
        o_sm, batch_head, batch, head, length_q, blocks_q, blocks_kv,
        last_keys, representatives, scale, scale_log2, half_weight_log2,
    ) = given  # fmt: skip
    wide = batch_head.to(gl.int64)
    pairs = gl.cdiv(blocks_q, 2)
    plans = plan_ptr + wide * pairs * PLAN
    pair = gl.load(plans + turn * PLAN + 6)
    pair_at = wide * pairs + pair
    plan = plan_ptr + pair_at * PLAN
    first_row = pair.to(gl.int64) * (2 * BLOCK)
    rows = length_q - pair * (2 * BLOCK)
    map_a = (wide * blocks_q + 2 * pair) * representatives
    map_b = (wide * blocks_q + gl.minimum(2 * pair + 1, blocks_q - 1)) * representatives
    attend = (
        o_desc, o_head + first_row * o_sm, lse_ptr + wide * length_q + first_row, plan,
        o_sm, batch, head, pair, rows, last_keys, representatives, scale, scale_log2,
    )  # fmt: skip
    copy = (
        q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, slope_desc,
        size_head, sigma2_ptr + map_a, sigma2_ptr + map_b, listed_ptr + map_a, listed_ptr + map_b,
        ids_ptr + pair_at * blocks_kv, plan,
        batch, head, pair, representatives, scale_log2, half_weight_log2,
    )  # fmt: skip
    return attend, copy


@gluon.jit(**OF_PARTS)
def _paired_kernel(
    q_desc, k_desc, v_desc, o_desc, tail_k_desc, tail_v_desc, slope_desc,
    o_ptr, lse_ptr, ids_ptr, plan_ptr, size_ptr, sigma2_ptr, listed_ptr,
    o_sb, o_sh, o_sm,
    size_sb, size_sh,
    heads, length_q, blocks_q, blocks_kv,
    last_keys,  # in the last key block
    representatives,  # as many as key blocks, where TAIL
    scale,  # |s|; its sign is in SIGN
    scale_log2,  # |s| * log2(e), 1 where s is 0
    half_weight_log2,  # variance_weight / 2 * log2(e)
    D: gl.constexpr, BLOCK: gl.constexpr, PLAN: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr,  # of s: 1, -1 or 0
    EVEN: gl.constexpr,  # the last key block is whole
    TAIL: gl.constexpr,  # attend to the representatives too
    RESUME: gl.constexpr,  # o and lse hold attention over a tail, to go on from
    REGISTERS: gl.constexpr,  # as in GROUP_REGISTERS
):  # fmt: skip
    """Store attention of a pair of query blocks over listed blocks and the tail."""
    # two programs on a multiprocessor: there are registers for little else than the products
    TIGHT: gl.constexpr = D == 64
    KEEP: gl.constexpr = TIGHT  # the queries in shared memory
    batch_head = gl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    given = (
        q_desc, k_desc, v_desc, o_desc, tail_k_desc, tail_v_desc, slope_desc,
        o_ptr + batch.to(gl.int64) * o_sb + head.to(gl.int64) * o_sh,
        lse_ptr, ids_ptr, plan_ptr,
        size_ptr + batch.to(gl.int64) * size_sb + head.to(gl.int64) * size_sh,
        sigma2_ptr, listed_ptr, o_sm, batch_head, batch, head, length_q, blocks_q, blocks_kv,
        last_keys, representatives, scale, scale_log2, half_weight_log2,
    )  # fmt: skip
    memory = _pair_memory(q_desc, k_desc, v_desc, slope_desc, BLOCK, STAGES, KEEP)
    attend, copy = _pair_arguments(given, gl.program_id(0), BLOCK, PLAN)
    gl.warp_specialize(
        [
            (_attend, (
                memory, attend, 0, D, BLOCK, STAGES, SIGN, EVEN, TAIL, RESUME, KEEP, not TIGHT,
            )),
            (_attend, (
                memory, attend, 1, D, BLOCK, STAGES, SIGN, EVEN, TAIL, RESUME, KEEP, not TIGHT,
            )),
            (_copy, (memory, copy, BLOCK, STAGES, TAIL, KEEP)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def takes(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, block_q: int, block_kv: int
) -> bool:
    """Whether ``attend`` serves these tensors; last dimensions but the output's are contiguous.

    It wants a GPU of compute capability 9.0, 16 bits, a head dim of 64 or 128 for keys and values,
    blocks of 64, no more than ``MAX_BLOCKS`` of keys, and tensors that the copy engine can address.
    """
    return (
        on_hopper(query)
        and takes_sizes(query.dtype, key.shape[-1], value.shape[-1], block_q, block_kv)
        and key.shape[2] <= MAX_BLOCKS * BLOCK
        and output.stride(-1) == 1
        and all(is_addressable(x) for x in (query, key, value, output))
    )


def takes_sizes(dtype: torch.dtype, dim: int, dim_v: int, block_q: int, block_kv: int) -> bool:
    """What ``takes`` wants of a dtype, of head dims and of block sizes."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and dim in HEAD_DIMS
        and dim == dim_v
        and block_q == block_kv == BLOCK
    )


def on_hopper(x: Tensor) -> bool:
    """Whether it lives on a GPU of compute capability 9.0."""
    if not x.is_cuda or torch.version.hip is not None:  # AMD's gfx90a says 9.0 too
        return False
    return torch.cuda.get_device_capability(x.device) == (9, 0)


def is_addressable(x: Tensor) -> bool:
    """Whether a tensor map can hold it: 16 bytes of alignment, strides above zero."""
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in x.stride()[:-1])


def tensor_map(x: Tensor, rows: int) -> TensorDescriptor:
    """Of ``[B, H, L, D]`` in tiles of ``rows``; rows beyond L read as zero."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, x.shape[-1]], MAP_LAYOUT)


def takes_tail(tail: Tail, scale: float) -> bool:
    """Whether ``attend`` serves this tail, all of whose last dimensions are contiguous.

    It wants one representative a key block, with its variance, and one slope a head, all where the
    copy engine can address them, and a scale of 0 or at least ``MIN_SCALE``.
    """
    return (
        (scale == 0 or abs(scale) >= MIN_SCALE)
        and takes_tail_sizes(tail.key.dim() == 4, tail.variance.shape[2], tail.slope.shape[2])
        and all(is_addressable(x) for x in (tail.key, tail.value, tail.slope))
    )


def takes_tail_sizes(per_block: bool, variances: int, slopes: int) -> bool:
    """What ``takes_tail`` wants: of representatives, and how many variances and slopes a head."""
    return per_block and variances > 0 and slopes == 1


def paired_options(dim: int, sign: int, even: bool, tail: bool, resume: bool) -> dict[str, Any]:
    """Constants and compiler options of the paired kernel.

    Args:
        dim: D.
        sign: Of the scale: 1, -1 or 0.
        even: The last key block is whole.
        tail: It attends to representatives too.
        resume: The output holds attention over a tail, to go on from.
    """
    return {
        "D": dim, "BLOCK": BLOCK, "PLAN": PLAN, "STAGES": STAGES, "SIGN": sign, "EVEN": even,
        "TAIL": tail, "RESUME": resume, "REGISTERS": GROUP_REGISTERS[dim],
        "num_warps": 4, "maxnreg": MAX_REGISTERS[dim],
    }  # fmt: skip


def heads_at_a_time(batch_heads: int, blocks_q: int, blocks_kv: int, dim: int, tail: bool) -> int:
    """For how many heads ``attend`` makes what it makes for pairs of blocks.

    Args:
        batch_heads: Heads in all samples.
        blocks_q: Nq.
        blocks_kv: Nk.
        dim: D.
        tail: Whether it makes variances too.
    """
    made = triton.cdiv(blocks_q, 2) * (2 * blocks_kv + 4 * PLAN)  # bytes for each head
    if tail:
        made += 2 * blocks_q * blocks_kv
    given = 2 * (blocks_q + 2 * blocks_kv) * BLOCK * dim
    programs = triton.cdiv(blocks_q, 2) * batch_heads
    parts = max(1, min(triton.cdiv(SHARE * made, given), programs // FILL))
    return triton.cdiv(batch_heads, parts)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    listed: Tensor,
    block_counts: Tensor | None,
    max_blocks: int,
    tail: Tail | None,
    scale: float,
    variance_weight: float,
    resume: bool,
) -> None:
    """Launch the kernels for tensors that ``takes`` accepts; nothing waits for the host.

    Three launches, four with a tail, for ``heads_at_a_time`` heads. Meanwhile there is a byte for
    each of their pairs of blocks, three with a tail.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, D]``.
        output: ``[B, H, Lq, D]``: written, and where ``resume`` read.
        lse: float32 ``[B, H, Lq]``, contiguous: likewise.
        listed: uint8 ``[B, H, Nq, Nk]``, 1 where a query block lists a key block.
        block_counts: int32 ``[B, H, Nq]``, last dimension contiguous. A query block whose count is
            not that of its ones in ``listed`` has an id outside: its rows become NaN. None where
            there are no lists.
        max_blocks: Most blocks that a list can hold.
        tail: One that ``takes_tail`` accepts, or None for none.
        scale: s.
        variance_weight: As in the operator.
        resume: ``output`` and ``lse`` hold attention over the tail, to go on from.
    """
    batch, heads, blocks_q, blocks_kv = listed.shape
    most = heads_at_a_time(batch * heads, blocks_q, blocks_kv, query.shape[3], tail is not None)
    samples = max(1, most // heads)
    for sample in range(0, batch, samples):
        for head in range(0, heads, most):
            part = slice(sample, sample + samples), slice(head, head + most)
            _attend_part(
                query[part], key[part], value[part], output[part], lse[part], listed[part],
                None if block_counts is None else block_counts[part], max_blocks,
                None if tail is None else Tail(*(x[part] for x in tail)),
                scale, variance_weight, resume,
            )  # fmt: skip


def _attend_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    listed: Tensor,
    block_counts: Tensor | None,
    max_blocks: int,
    tail: Tail | None,
    scale: float,
    variance_weight: float,
    resume: bool,
) -> None:
    """``attend`` at once; on its return what it made is free again, for the next part."""
    batch, heads, length_q, dim = query.shape
    length_kv = key.shape[2]
    blocks_q, blocks_kv = listed.shape[2:]
    pairs = triton.cdiv(blocks_q, 2)
    ids = listed.new_empty((batch, heads, pairs, blocks_kv), dtype=torch.uint16)
    plan = listed.new_empty((batch, heads, pairs, PLAN), dtype=torch.int32)
    strides = (0, 0) if block_counts is None else block_counts.stride()[:2]
    launcher(_pair_lists_kernel, (pairs, batch * heads))(
        ids, plan, listed, block_counts, *strides,
        heads, blocks_q, blocks_kv, length_kv // BLOCK, max_blocks,
        **ORDER_OPTIONS,
    )  # fmt: skip
    launcher(_longest_first_kernel, (triton.cdiv(pairs, RANKED), batch * heads))(
        plan, blocks_q, **TURN_OPTIONS
    )
    q_map, k_map, v_map, o_map = (tensor_map(x, BLOCK) for x in (query, key, value, output))
    if tail is None:  # what is not read
        tail_maps = (k_map, v_map, k_map)
        log_size, sigma2 = lse, listed
    else:
        tail_maps = (
            tensor_map(tail.key, BLOCK), tensor_map(tail.value, BLOCK),
            tensor_map(tail.slope[:, :, 0], dim),
        )  # fmt: skip
        log_size, sigma2 = tail.log_size, variances(query, tail.variance, scale, BLOCK)
    sign = (scale > 0) - (scale < 0)
    launcher(_paired_kernel, (pairs, batch * heads))(
        q_map, k_map, v_map, o_map, *tail_maps,
        output, lse, ids, plan, log_size, sigma2, listed,
        *output.stride()[:3], *log_size.stride()[:2],
        heads, length_q, blocks_q, blocks_kv, length_kv - (blocks_kv - 1) * BLOCK, blocks_kv,
        abs(scale), (abs(scale) or 1.0) * LOG2_E.value, variance_weight / 2 * LOG2_E.value,
        **paired_options(dim, sign, length_kv % BLOCK == 0, tail is not None, resume),
    )  # fmt: skip
