"""Listed key blocks of ``uta::sparse_attention`` on Hopper: two query blocks share what they read.

A program takes a pair of neighbouring query blocks. One warp copies the key and value blocks of
both lists into a ring of shared memory, a block that both list once; two groups of four warps
multiply, one for each query block. Softmax is base 2 inside, and the products of one block overlap
with the softmax of the next, as FlashAttention-3 does (https://arxiv.org/abs/2407.08608).
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import math

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
BLOCK = 64  # rows of a query block, keys of a key block
CHUNK = 512  # key blocks that are ordered at a time
PLAN = 8  # numbers in a plan: alternating, count of each query block, bad rows, ragged rows
MAX_REGISTERS = 168  # of each of 384 threads: two groups that multiply and one that copies
HEAD_DIM = 128  # at 64, bound by the softmax, it is no faster than Triton's tile
STAGES = 6  # of the ring: pairs of a key and a value block


@triton.jit
def _pair_lists_kernel(
    ids_out_ptr,  # int32 [B, H, pairs, Nk]
    plan_ptr,  # int32 [B, H, pairs, PLAN]
    listed_ptr,  # uint8 [B, H, Nq, Nk]
    counts_ptr,
    counts_sb, counts_sh,
    heads, blocks_q, blocks_kv, whole, max_blocks,
    CHUNK: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Order the key blocks that a pair of query blocks, a and b, lists.

    First, where one of them lists it, the ragged block, which is the one beyond ``whole``. Then
    those of a alone and of b alone in turns, as many of each; then those of both; last what one of
    them has more of its own. So neither waits long for the other's, and entry j of either is at a
    place that needs no list: ``2 j + which`` among those in turns and ``j + alternating`` after.
    """
    pair = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    offs = tl.arange(0, CHUNK)
    has_b = 2 * pair + 1 < blocks_q
    row_a = listed_ptr + (batch_head * blocks_q + 2 * pair) * blocks_kv
    row_b = row_a + blocks_kv
    only_a, only_b, both = 0, 0, 0
    for start in range(0, whole, CHUNK):
        inside = start + offs < whole
        a = tl.load(row_a + start + offs, mask=inside, other=0).to(tl.int32)  # [CHUNK]
        b = tl.load(row_b + start + offs, mask=inside & has_b, other=0).to(tl.int32)
        only_a += tl.sum(a & ~b, 0)
        only_b += tl.sum(b & ~a, 0)
        both += tl.sum(a & b, 0)
    is_ragged = whole < blocks_kv
    ragged_a = tl.load(row_a + whole, mask=is_ragged, other=0).to(tl.int32)
    ragged_b = tl.load(row_b + whole, mask=is_ragged & has_b, other=0).to(tl.int32)
    first = ragged_a | ragged_b
    alternating = tl.minimum(only_a, only_b)
    counts_row = counts_ptr + batch * counts_sb + head * counts_sh + 2 * pair
    given_a = tl.minimum(tl.load(counts_row), max_blocks)
    given_b = tl.minimum(tl.load(counts_row + 1, mask=has_b, other=0), max_blocks)
    # ids are distinct: one that is missing from the map lies outside of it
    bad_a = (given_a != only_a + both + ragged_a).to(tl.int32)
    bad_b = (given_b != only_b + both + ragged_b).to(tl.int32)

    ids_row = ids_out_ptr + (batch_head * tl.num_programs(0) + pair) * blocks_kv
    plan = plan_ptr + (batch_head * tl.num_programs(0) + pair) * PLAN
    tl.store(plan, alternating)
    tl.store(plan + 1, only_a + both)
    tl.store(plan + 2, only_b + both)
    tl.store(plan + 3, bad_a | bad_b << 1)
    tl.store(plan + 4, ragged_a | ragged_b << 1)
    tl.store(ids_row, whole, mask=first != 0)
    seen_a, seen_b, seen_both = 0, 0, 0
    for start in range(0, whole, CHUNK):
        ids = start + offs
        inside = ids < whole
        a = tl.load(row_a + ids, mask=inside, other=0).to(tl.int32)  # [CHUNK]
        b = tl.load(row_b + ids, mask=inside & has_b, other=0).to(tl.int32)
        alone_a, alone_b, shared = a & ~b, b & ~a, a & b
        rank_a = seen_a + tl.cumsum(alone_a, 0) - 1
        rank_b = seen_b + tl.cumsum(alone_b, 0) - 1
        rank_both = seen_both + tl.cumsum(shared, 0) - 1
        rest = alternating + both
        at_a = tl.where(rank_a < alternating, 2 * rank_a, rest + rank_a)
        at_b = tl.where(rank_b < alternating, 2 * rank_b + 1, rest + rank_b)
        at = tl.where(shared != 0, 2 * alternating + rank_both, tl.where(a != 0, at_a, at_b))
        tl.store(ids_row + first + at, ids, mask=(a | b) != 0)
        seen_a += tl.sum(alone_a, 0)
        seen_b += tl.sum(alone_b, 0)
        seen_both += tl.sum(shared, 0)


@gluon.jit
def exp2(x):
    """2^x in one instruction, results below 2^-126 as zero; ``gl.exp2`` takes four to keep them."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _copy_blocks(
    k_desc, v_desc, k_ring, v_ring, full, empty, ids_row, plan, batch, head,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the pair's key and value blocks in their order, each into the next stage of the ring.

    Both groups free a stage; for a group that has no use for a block this warp does so. Such a
    group goes on by two places at most and waits for a phase of a stage whose phase before it may
    not have seen: that one must be over, or its parity is taken for the one waited for. So a copy
    begins when the one ``STAGES - 2`` places before it has come to its end.
    """
    alternating = gl.load(plan)
    count_a, count_b = gl.load(plan + 1), gl.load(plan + 2)
    ragged = gl.load(plan + 4)
    first = gl.minimum(ragged, 1)
    total = first + alternating + gl.maximum(count_a, count_b)
    shared_end = first + alternating + gl.minimum(count_a, count_b)
    block = gl.load(ids_row, mask=total > 0, other=0)
    for t in range(total):
        following = gl.load(ids_row + t + 1, mask=t + 1 < total, other=0)
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
        alone = (t < first + 2 * alternating) | (t >= shared_end)
        alone = gl.where(t < first, ragged != 3, alone)
        mbarrier.arrive(empty.index(stage), pred=alone)
        block = following


@gluon.jit
def wait_for_turn(turns, j, WHICH: gl.constexpr):
    """Wait until the other group has its products of step j - 1, or j, in the tensor cores' queue.

    Groups take turns, 0 first: while the products of one are computed, the other has its softmax.
    """
    mbarrier.wait(turns.index(WHICH), (j + 1 - WHICH) & 1)


@gluon.jit
def pass_turn(turns, WHICH: gl.constexpr):
    """Let the other group go on."""
    mbarrier.arrive(turns.index(1 - WHICH))


@gluon.jit
def _softmax_step(s, row_max, row_sum, scale_log2):
    """Weights of one tile of logits and the running softmax after it."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = exp2(s * scale_log2 - new_max[:, None])
    shrink = exp2(row_max - new_max)
    return p, shrink, new_max, row_sum * shrink + gl.sum(p, 1)


@gluon.jit
def _attend(
    q_base, o_base, lse_base, k_ring, v_ring, full, empty, turns, plan,
    q_sm, o_sm, rows, last_keys, scale_log2,
    WHICH: gl.constexpr,  # of the pair
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr, EVEN: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    """Store attention of one query block; ``rows``: how many of the pair's rows there are."""
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
    steps = gl.maximum(count, (ragged >> (1 - WHICH) & 1) + gl.load(plan + 2 - WHICH))

    q_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, Q_LAYOUT))
    q_dims = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    q_ptrs = q_base + q_rows[:, None] * q_sm + q_dims[None, :]
    q = gl.load(q_ptrs, mask=(q_rows < rows)[:, None], other=0.0)  # [BLOCK, D]
    if SIGN != 1:
        q = (q * SIGN).to(dtype)

    o_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, O_LAYOUT))
    o_dims = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    o_ptrs = o_base + o_rows[:, None] * o_sm + o_dims[None, :]
    o_mask = (o_rows < rows)[:, None]
    s_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
    lse_ptrs = lse_base + s_rows
    if RESUME:
        row_max = gl.load(lse_ptrs, mask=s_rows < rows, other=-float("inf")) * LOG2_E  # [BLOCK]
        row_sum = gl.where(row_max == -float("inf"), 0.0, 1.0)
        acc = gl.load(o_ptrs, mask=o_mask, other=0.0).to(gl.float32)  # [BLOCK, D]
    else:
        row_max = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([BLOCK, D], gl.float32, O_LAYOUT)

    no_logits = gl.zeros([BLOCK, BLOCK], gl.float32, S_LAYOUT)
    if count > 0:
        at = gl.where(own != 0, 0, first + gl.where(alternating > 0, WHICH, 0))
        stage = at % STAGES
        mbarrier.wait(full.index(stage), at // STAGES & 1)
        k = k_ring.index(stage).reshape([BLOCK, D]).permute((1, 0))
        wait_for_turn(turns, 0, WHICH)
        s = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
        pass_turn(turns, WHICH)
        s = warpgroup_mma_wait(0, deps=[s])
        if not EVEN:
            inside = gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT)) < last_keys
            s = gl.where(inside[None, :] | (own == 0), s, -float("inf"))
        p, shrink, row_max, row_sum = _softmax_step(s, row_max, row_sum, scale_log2)
        p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
        for j in range(1, count):
            before = stage
            i = j - own
            at = first + gl.where(i < alternating, 2 * i + WHICH, i + alternating)
            stage = at % STAGES
            mbarrier.wait(full.index(stage), at // STAGES & 1)
            k = k_ring.index(stage).reshape([BLOCK, D]).permute((1, 0))
            wait_for_turn(turns, j, WHICH)
            s = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
            v = v_ring.index(before).reshape([BLOCK, D])
            acc = warpgroup_mma(p16, v, acc, is_async=True)
            pass_turn(turns, WHICH)
            s = warpgroup_mma_wait(1, deps=[s])
            p, shrink, row_max, row_sum = _softmax_step(s, row_max, row_sum, scale_log2)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before))
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
            acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
        v = v_ring.index(stage).reshape([BLOCK, D])
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage))
    for j in range(count, steps):  # the other has more
        wait_for_turn(turns, j, WHICH)
        pass_turn(turns, WHICH)

    divisor = gl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, O_LAYOUT))[:, None]
    lse = (row_max + gl.log2(row_sum)) * LN_2
    if bad != 0:
        acc += float("nan")
        lse += float("nan")
    gl.store(o_ptrs, acc.to(dtype), mask=o_mask)
    gl.store(lse_ptrs, lse, mask=s_rows < rows)


@gluon.jit
def _paired_kernel(
    q_ptr, k_desc, v_desc, o_ptr, lse_ptr, ids_ptr, plan_ptr,
    q_sb, q_sh, q_sm,
    o_sb, o_sh, o_sm,
    heads, length_q, blocks_kv,
    last_keys,  # in the last key block
    scale_log2,  # |s| * log2(e), 1 where s is 0
    D: gl.constexpr, BLOCK: gl.constexpr, PLAN: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr,  # of s: 1, -1 or 0
    EVEN: gl.constexpr,  # the last key block is whole
    RESUME: gl.constexpr,  # o and lse hold attention over the tail
):  # fmt: skip
    """Store attention of two query blocks over their listed blocks and, where RESUME, the tail."""
    pair = gl.program_id(0)
    batch_head = gl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    first_row = pair.to(gl.int64) * (2 * BLOCK)
    rows = length_q - pair * (2 * BLOCK)
    q_base = q_ptr + batch.to(gl.int64) * q_sb + head.to(gl.int64) * q_sh + first_row * q_sm
    o_base = o_ptr + batch.to(gl.int64) * o_sb + head.to(gl.int64) * o_sh + first_row * o_sm
    lse_base = lse_ptr + batch_head.to(gl.int64) * length_q + first_row
    pair_at = batch_head.to(gl.int64) * gl.num_programs(0) + pair
    ids_row = ids_ptr + pair_at * blocks_kv
    plan = plan_ptr + pair_at * PLAN

    shape: gl.constexpr = [STAGES, 1, 1, BLOCK, D]
    k_ring = gl.allocate_shared_memory(k_desc.dtype, shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, shape, v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)

    gl.warp_specialize(
        [
            (_attend, (
                q_base, o_base, lse_base, k_ring, v_ring, full, empty, turns, plan,
                q_sm, o_sm, rows, last_keys, scale_log2,
                0, D, BLOCK, STAGES, SIGN, EVEN, RESUME,
            )),
            (_attend, (
                q_base, o_base, lse_base, k_ring, v_ring, full, empty, turns, plan,
                q_sm, o_sm, rows, last_keys, scale_log2,
                1, D, BLOCK, STAGES, SIGN, EVEN, RESUME,
            )),
            (_copy_blocks, (
                k_desc, v_desc, k_ring, v_ring, full, empty, ids_row, plan, batch, head,
                BLOCK, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(query: Tensor, key: Tensor, value: Tensor, block_q: int, block_kv: int) -> bool:
    """Whether ``attend_listed`` serves these tensors, all of whose last dimensions are contiguous.

    It wants a GPU of compute capability 9.0, 16 bits, a head dim of 128 for keys and values,
    blocks of 64, and keys and values that the copy engine can address.
    """
    return (
        on_hopper(query)
        and query.dtype in (torch.bfloat16, torch.float16)
        and key.shape[-1] == value.shape[-1] == HEAD_DIM
        and block_q == block_kv == BLOCK
        and all(is_addressable(x) for x in (key, value))
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
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, x.shape[-1]], layout)


def attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    listed: Tensor,
    block_counts: Tensor,
    max_blocks: int,
    scale_log2: float,
    sign: int,
    resume: bool,
) -> None:
    """Launch the kernels for tensors that ``takes`` accepts; nothing waits for the host.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, D]``.
        output: ``[B, H, Lq, D]``, last dimension contiguous: written, and where ``resume`` read.
        lse: float32 ``[B, H, Lq]``, contiguous: likewise.
        listed: uint8 ``[B, H, Nq, Nk]``, 1 where a query block lists a key block.
        block_counts: int32 ``[B, H, Nq]``, last dimension contiguous. A query block whose count is
            not that of its ones in ``listed`` has an id outside: its rows become NaN.
        max_blocks: Most blocks that a list can hold.
        scale_log2: ``|s| * log2(e)``, 1 where s is 0.
        sign: Of s.
        resume: ``output`` and ``lse`` hold attention over the tail, to go on from.
    """
    batch, heads, length_q, dim = query.shape
    length_kv = key.shape[2]
    blocks_q, blocks_kv = listed.shape[2:]
    pairs = triton.cdiv(blocks_q, 2)
    ids = listed.new_empty((batch, heads, pairs, blocks_kv), dtype=torch.int32)
    plan = listed.new_empty((batch, heads, pairs, PLAN), dtype=torch.int32)
    grid = (pairs, batch * heads)
    _pair_lists_kernel[grid](
        ids, plan, listed, block_counts, *block_counts.stride()[:2],
        heads, blocks_q, blocks_kv, length_kv // BLOCK, max_blocks, CHUNK=CHUNK, PLAN=PLAN,
    )  # fmt: skip
    maps = (tensor_map(x, BLOCK) for x in (key, value))
    _paired_kernel[grid](
        query, *maps, output, lse, ids, plan,
        *query.stride()[:3], *output.stride()[:3],
        heads, length_q, blocks_kv, length_kv - (blocks_kv - 1) * BLOCK, scale_log2,
        D=dim, BLOCK=BLOCK, PLAN=PLAN, STAGES=STAGES,
        SIGN=sign, EVEN=length_kv % BLOCK == 0, RESUME=resume,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
