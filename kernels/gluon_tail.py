"""The tail of ``uta::sparse_attention`` on Hopper: two query blocks share the representatives.

One warp copies representatives into a ring of shared memory; two groups of four warps attend to
them, one for each query block. The products of one step overlap with the softmax of the next, as in
``gluon_attention``. Softmax is base 2 inside.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from uta_fx.kernels.gluon_attention import (
    BLOCK,
    HEAD_DIM,
    LN_2,
    LOG2_E,
    MAX_REGISTERS,
    exp2,
    is_addressable,
    on_hopper,
    tensor_map,
)

STEP = 64  # representatives
MANY = 64  # blocks of either side whose variances one program computes at a time
STAGES = 4  # of the ring: keys and values of a step


@triton.jit
def _pooled_variance_kernel(
    q_ptr, var_ptr,
    sigma2_ptr,  # bfloat16 [B, H, Nq, Nk], contiguous
    q_sb, q_sh, q_sm,
    var_sb, var_sh, var_sr,
    heads, length_q, blocks_q, blocks_kv, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Store the logits' variances of MANY query blocks in every key block."""
    first = tl.program_id(0) * MANY
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    offs, d = tl.arange(0, MANY), tl.arange(0, D)
    q_base = q_ptr + batch * q_sb + head * q_sh + first.to(tl.int64) * BLOCK * q_sm + d[None, :]
    rows_left = length_q - (first + offs) * BLOCK
    square = tl.zeros([MANY, D], tl.float32)
    for r in range(BLOCK):
        ptrs = q_base + (offs * BLOCK + r).to(tl.int64)[:, None] * q_sm
        q = tl.load(ptrs, mask=(r < rows_left)[:, None], other=0.0).to(tl.float32) * scale
        square += q * q  # [MANY, D]
    size = tl.minimum(tl.maximum(rows_left, 1), BLOCK).to(tl.float32)
    square = (square / size[:, None]).to(var_ptr.dtype.element_ty)
    var_base = var_ptr + batch * var_sb + head * var_sh + d[None, :]
    out = sigma2_ptr + (batch_head * blocks_q + first) * blocks_kv
    for start in range(0, blocks_kv, MANY):
        column = start + offs
        ptrs = var_base + column.to(tl.int64)[:, None] * var_sr
        variance = tl.load(ptrs, mask=(column < blocks_kv)[:, None], other=0.0)  # [MANY, D]
        sigma2 = tl.dot(square, tl.trans(variance)).to(sigma2_ptr.dtype.element_ty)
        inside = (first + offs < blocks_q)[:, None] & (column < blocks_kv)[None, :]
        places = offs.to(tl.int64)[:, None] * blocks_kv + column[None, :]
        tl.store(out + places, sigma2, mask=inside)


@gluon.jit
def _copy_tail(
    k_desc, v_desc, slope_desc, k_ring, v_ring, slope_tile,
    column_ring, full, empty, slope_full, size_base, sigma2_a, sigma2_b, listed_a, listed_b,
    batch, head, steps, representatives, half_weight_log2,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the head's representatives, step by step, each into the next stage, and its slope.

    Beside them go two numbers of each representative for each query block of the pair: the bias of
    its base-2 logit, -inf where the block is listed or where there is none, and the damping of the
    slope.
    """
    LINE: gl.constexpr = gl.BlockedLayout([STEP // 32], [32], [1], [0])
    nothing: gl.constexpr = -float("inf")
    for t in range(steps):
        stage = t % STAGES
        mbarrier.wait(empty.index(stage), (t // STAGES & 1) ^ 1)
        bar = full.index(stage)
        at = t * STEP
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [batch, head, at, 0], bar, k_ring.index(stage))
        tma.async_copy_global_to_shared(v_desc, [batch, head, at, 0], bar, v_ring.index(stage))
        offs = at + gl.arange(0, STEP, LINE)
        inside = offs < representatives
        size = gl.load(size_base + offs, mask=inside, other=nothing) * LOG2_E  # [STEP]
        in_a = gl.load(listed_a + offs, mask=inside, other=1)  # [STEP]
        in_b = gl.load(listed_b + offs, mask=inside, other=1)  # [STEP]
        for_a = gl.load(sigma2_a + offs, mask=inside, other=0.0).to(gl.float32)  # [STEP]
        for_b = gl.load(sigma2_b + offs, mask=inside, other=0.0).to(gl.float32)  # [STEP]
        bias_a = gl.where(in_a != 0, nothing, size + for_a * half_weight_log2)
        bias_b = gl.where(in_b != 0, nothing, size + for_b * half_weight_log2)
        column_ring.index(4 * stage).store(bias_a)
        column_ring.index(4 * stage + 1).store(bias_b)
        column_ring.index(4 * stage + 2).store(1.0 / (1.0 + for_a))
        column_ring.index(4 * stage + 3).store(1.0 / (1.0 + for_b))
        mbarrier.arrive(bar)
        if t == 0:
            mbarrier.expect(slope_full, slope_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(slope_desc, [batch, head, 0, 0], slope_full, slope_tile)


@gluon.jit
def _tail_softmax(s, bias, damping, row_max, row_sum, gain, scale_log2):
    """Weights of one step and the running softmax and gain after it."""
    logits = s * scale_log2 + bias[None, :]
    new_max = gl.maximum(row_max, gl.max(logits, 1))
    # nothing seen so far: subtracting 0 instead of -inf leaves the weights zero
    base = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = exp2(logits - base[:, None])
    shrink = exp2(row_max - base)
    row_sum = row_sum * shrink + gl.sum(p, 1)
    gain = gain * shrink + gl.sum(p * damping[None, :], 1)
    return p, shrink, new_max, row_sum, gain


@gluon.jit
def _attend_tail(
    q_base, o_base, lse_base,
    k_ring, v_ring, column_ring, slope_tile, q_tiles, full, empty, slope_full,
    q_sm, o_sm, rows, steps, scale, scale_log2,
    WHICH: gl.constexpr,  # of the pair
    D: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr,
):  # fmt: skip
    """Store attention of one query block over the tail; ``rows``: of the pair's, how many exist."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_ring.dtype
    q_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, Q_LAYOUT))
    q_dims = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    q_ptrs = q_base + q_rows[:, None] * q_sm + q_dims[None, :]
    q = gl.load(q_ptrs, mask=(q_rows < rows)[:, None], other=0.0)  # [BLOCK, D]
    if SIGN != 1:
        q = (q * SIGN).to(dtype)
    q_tile = q_tiles.index(WHICH)
    q_tile.store(q)
    fence_async_shared()

    row_max = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    row_sum = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    gain = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([BLOCK, D], gl.float32, O_LAYOUT)
    none = gl.zeros([BLOCK, STEP], gl.float32, S_LAYOUT)

    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    mbarrier.wait(full.index(0), 0)
    bias = column_ring.index(WHICH).load(COLUMNS)  # [STEP]
    damping = column_ring.index(2 + WHICH).load(COLUMNS)  # [STEP]
    k = k_ring.index(0).reshape([STEP, D]).permute((1, 0))
    s = warpgroup_mma(q_tile, k, none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    p, shrink, row_max, row_sum, gain = _tail_softmax(
        s, bias, damping, row_max, row_sum, gain, scale_log2
    )
    p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
    stage = 0
    for t in range(1, steps):
        before = stage
        stage = t % STAGES
        mbarrier.wait(full.index(stage), t // STAGES & 1)
        k = k_ring.index(stage).reshape([STEP, D]).permute((1, 0))
        s = warpgroup_mma(q_tile, k, none, use_acc=False, is_async=True)
        v = v_ring.index(before).reshape([STEP, D])
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        bias = column_ring.index(4 * stage + WHICH).load(COLUMNS)
        damping = column_ring.index(4 * stage + 2 + WHICH).load(COLUMNS)
        s = warpgroup_mma_wait(1, deps=[s])
        p, shrink, row_max, row_sum, gain = _tail_softmax(
            s, bias, damping, row_max, row_sum, gain, scale_log2
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before))
        p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
    v = v_ring.index(stage).reshape([STEP, D])
    acc = warpgroup_mma(p16, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    acc *= gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # the gain, at most 1 by now, goes into q, so that the product is added in place
    share = gl.convert_layout(gain * inverse * scale, gl.SliceLayout(1, P_LAYOUT))
    q_gain = (q_tile.load(P_LAYOUT).to(gl.float32) * share[:, None]).to(dtype)
    mbarrier.wait(slope_full, 0)
    acc = warpgroup_mma(q_gain, slope_tile.reshape([D, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    lse = (row_max + gl.log2(row_sum)) * LN_2
    o_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, O_LAYOUT))
    o_dims = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    o_ptrs = o_base + o_rows[:, None] * o_sm + o_dims[None, :]
    gl.store(o_ptrs, acc.to(dtype), mask=(o_rows < rows)[:, None])
    s_rows = WHICH * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
    gl.store(lse_base + s_rows, lse, mask=s_rows < rows)


@gluon.jit
def _paired_tail_kernel(
    q_ptr, k_desc, v_desc, slope_desc, size_ptr, sigma2_ptr, listed_ptr, o_ptr, lse_ptr,
    q_sb, q_sh, q_sm,
    o_sb, o_sh, o_sm,
    size_sb, size_sh,
    heads, length_q, blocks_q, representatives,
    scale,  # |s|; its sign is in SIGN
    scale_log2,  # |s| * log2(e), 1 where s is 0
    half_weight_log2,  # variance_weight / 2 * log2(e)
    D: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    SIGN: gl.constexpr,  # of s: 1, -1 or 0
):  # fmt: skip
    """Store attention of two query blocks over the representatives of what they do not list.

    A row without one is zero, its lse -inf.
    """
    pair = gl.program_id(0)
    batch_head = gl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    batch64, head64 = batch.to(gl.int64), head.to(gl.int64)
    first_row = pair.to(gl.int64) * (2 * BLOCK)
    rows = length_q - pair * (2 * BLOCK)
    steps = gl.cdiv(representatives, STEP)
    q_base = q_ptr + batch64 * q_sb + head64 * q_sh + first_row * q_sm
    o_base = o_ptr + batch64 * o_sb + head64 * o_sh + first_row * o_sm
    lse_base = lse_ptr + batch_head.to(gl.int64) * length_q + first_row
    size_base = size_ptr + batch64 * size_sb + head64 * size_sh
    # a block beyond the last one has no rows to store: any row of the maps will do
    second = gl.minimum(2 * pair + 1, blocks_q - 1).to(gl.int64)
    row_a = (batch_head.to(gl.int64) * blocks_q + 2 * pair) * representatives
    row_b = (batch_head.to(gl.int64) * blocks_q + second) * representatives

    shape: gl.constexpr = [STAGES, 1, 1, STEP, D]
    k_ring = gl.allocate_shared_memory(k_desc.dtype, shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, shape, v_desc.layout)
    slope_tile = gl.allocate_shared_memory(slope_desc.dtype, [1, 1, D, D], slope_desc.layout)
    q_shape: gl.constexpr = [BLOCK, D]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(q_shape, k_desc.dtype)
    q_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, BLOCK, D], q_layout)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    column_ring = gl.allocate_shared_memory(gl.float32, [4 * STAGES, STEP], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    slope_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # the copies and the columns
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(slope_full, count=1)

    gl.warp_specialize(
        [
            (_attend_tail, (
                q_base, o_base, lse_base,
                k_ring, v_ring, column_ring, slope_tile, q_tiles, full, empty, slope_full,
                q_sm, o_sm, rows, steps, scale, scale_log2,
                0, D, BLOCK, STEP, STAGES, SIGN,
            )),
            (_attend_tail, (
                q_base, o_base, lse_base,
                k_ring, v_ring, column_ring, slope_tile, q_tiles, full, empty, slope_full,
                q_sm, o_sm, rows, steps, scale, scale_log2,
                1, D, BLOCK, STEP, STAGES, SIGN,
            )),
            (_copy_tail, (
                k_desc, v_desc, slope_desc, k_ring, v_ring, slope_tile,
                column_ring, full, empty, slope_full, size_base,
                sigma2_ptr + row_a, sigma2_ptr + row_b, listed_ptr + row_a, listed_ptr + row_b,
                batch, head, steps, representatives, half_weight_log2,
                STEP, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(
    query: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    block_q: int,
) -> bool:
    """Whether ``attend_tail`` serves these tensors, all of whose last dimensions are contiguous.

    It wants a GPU of compute capability 9.0, 16 bits, a head dim of 128 for keys and values, query
    blocks of 64, one representative a key block with its variance, one slope a head, and
    all of them where the copy engine can address them.
    """
    return (
        on_hopper(query)
        and query.dtype in (torch.bfloat16, torch.float16)
        and tail_key.dim() == 4
        and tail_key.shape[-1] == tail_value.shape[-1] == HEAD_DIM
        and block_q == BLOCK
        and tail_variance.shape[2] > 0
        and tail_slope.shape[2] == 1
        and all(is_addressable(x) for x in (tail_key, tail_value, tail_variance, tail_slope))
    )


def attend_tail(
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    listed: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    scale: float,
    scale_log2: float,
    sign: int,
    half_weight_log2: float,
) -> None:
    """Launch the kernel for tensors that ``takes`` accepts.

    Args:
        query: ``[B, H, Lq, D]``.
        output: ``[B, H, Lq, D]``, last dimension contiguous: written.
        lse: float32 ``[B, H, Lq]``, contiguous: written.
        listed: uint8 ``[B, H, Nq, Nk]``, 1 where a query block lists a key block.
        tail_key: As in ``reference.sparse_attention``, and so are the four after it.
        tail_value: ``[B, H, Nk, D]``.
        tail_log_size: ``[B, H, Nk]``, last dimension contiguous.
        tail_variance: ``[B, H, Nk, D]``.
        tail_slope: ``[B, H, 1, D, D]``.
        scale: ``|s|``.
        scale_log2: ``|s| * log2(e)``, 1 where s is 0.
        sign: Of s.
        half_weight_log2: ``variance_weight / 2 * log2(e)``.
    """
    batch, heads, length_q, dim = query.shape
    blocks_q, representatives = listed.shape[2:]
    sigma2 = listed.new_empty(listed.shape, dtype=torch.bfloat16)
    _pooled_variance_kernel[(triton.cdiv(blocks_q, MANY), batch * heads)](
        query, tail_variance, sigma2,
        *query.stride()[:3], *tail_variance.stride()[:3],
        heads, length_q, blocks_q, representatives, scale,
        D=dim, BLOCK=BLOCK, MANY=MANY, num_warps=4, num_stages=2,
    )  # fmt: skip
    _paired_tail_kernel[(triton.cdiv(blocks_q, 2), batch * heads)](
        query, tensor_map(tail_key, STEP), tensor_map(tail_value, STEP),
        tensor_map(tail_slope[:, :, 0], dim),
        tail_log_size, sigma2, listed, output, lse,
        *query.stride()[:3], *output.stride()[:3], *tail_log_size.stride()[:2],
        heads, length_q, blocks_q, representatives, scale, scale_log2, half_weight_log2,
        D=dim, BLOCK=BLOCK, STEP=STEP, STAGES=STAGES, SIGN=sign,
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
