"""The online softmax of the kernels for Hopper: one query block, step by step over a ring.

A step multiplies the queries with the keys of one stage of the ring and the weights with its
values. Softmax is base 2 inside. Weights are relative to a maximum that lags behind the true one by
at most ``LAG``, so that the accumulator is rescaled only where that is exceeded, as in
FlashAttention-4 (https://github.com/Dao-AILab/flash-attention). The sum over a row stays spread
over the four threads that hold the row until the last step.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import math

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LAG = tl.constexpr(8.0)  # weights stay below 2^8, which 16 bits hold
# sums of 64 rows, each spread over the four threads that hold it
SUMS = tl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)


def _scale_unless_ones(count: int) -> tuple[str, str]:
    """PTX that multiplies ``count`` numbers of a thread by a factor for each, and its operands.

    Of the factors, one a row, a thread of a wgmma accumulator has two: at places 0 and 2. A warp
    whose factors are all 1 branches around the multiplications.
    """
    factor = 2 * count
    lines = [
        "{ .reg .pred p, q;",
        f"setp.neu.f32 p, ${factor}, 0f3F800000;",
        f"setp.neu.f32 q, ${factor + 2}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${factor + i};" for i in range(count)),
        "DONE: }",
    ]
    operands = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return "\n".join(lines), ",".join(operands)


SCALE_32, OPERANDS_32 = (tl.constexpr(x) for x in _scale_unless_ones(32))  # for a head dim of 64
SCALE_64, OPERANDS_64 = (tl.constexpr(x) for x in _scale_unless_ones(64))  # and of 128


@gluon.jit
def exp2(x):
    """2^x in one instruction, results below 2^-126 as zero; ``gl.exp2`` takes four to keep them."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _rescale(acc, shrink):
    """``acc * shrink[:, None]``."""
    factors = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    factors, acc = gl.broadcast(factors, acc)
    if acc.shape[1] == 64:
        return gl.inline_asm_elementwise(
            SCALE_32, OPERANDS_32, [acc, factors], gl.float32, is_pure=True, pack=32
        )
    else:
        return gl.inline_asm_elementwise(
            SCALE_64, OPERANDS_64, [acc, factors], gl.float32, is_pure=True, pack=64
        )


@gluon.jit
def _spread(rows):
    """One number a row as four that add up to it."""
    rows = gl.convert_layout(rows, gl.SliceLayout(1, SUMS))[:, None]
    return rows * gl.full([rows.shape[0], 4], 0.25, gl.float32, SUMS)


@gluon.jit
def _add(sums, shrink, p):
    """``sums * shrink`` and what each thread has of each row of ``p``."""
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])
    parts = gl.convert_layout(gl.sum(gl.sum(parts, 3), 1), SUMS)
    return sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None] + parts


@gluon.jit
def _softmax_step(
    s, columns, stage, row_max, row_sum, gain, scale_log2,
    WHICH: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Weights of one tile of logits, the shrink of what was before, and the softmax after it.

    The damping is read when it is used: there are no registers to spare.
    """
    found = gl.max(s, 1) * scale_log2
    new_max = gl.where(found > row_max + LAG, found, row_max)
    base = new_max
    if TAIL:  # nothing seen so far: subtracting 0 instead of -inf leaves the weights zero
        base = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = exp2(s * scale_log2 - base[:, None])
    shrink = exp2(row_max - base)
    row_sum = _add(row_sum, shrink, p)
    if TAIL:
        damping = columns.index(4 * stage + 2 + WHICH).load(gl.SliceLayout(0, s.type.layout))
        gain = _add(gain, shrink, p * damping[None, :])
    return p, shrink, new_max, row_sum, gain


@gluon.jit
def _start_logits(q, k_ring, columns, stage, none, WHICH: gl.constexpr, TAIL: gl.constexpr):
    """Start the logits of a stage's keys; those of representatives begin with their bias."""
    tile: gl.constexpr = k_ring.shape
    k = k_ring.index(stage).reshape([tile[3], tile[4]]).permute((1, 0))
    if TAIL:
        bias = columns.index(4 * stage + WHICH).load(gl.SliceLayout(0, none.type.layout))
        bias, none = gl.broadcast(bias[None, :], none)
        return warpgroup_mma(q, k, bias, is_async=True)
    else:
        return warpgroup_mma(q, k, none, use_acc=False, is_async=True)


@gluon.jit
def _start_values(p, v_ring, stage, acc):
    """Start adding the weighted values of a stage to the accumulator."""
    tile: gl.constexpr = v_ring.shape
    v = v_ring.index(stage).reshape([tile[3], tile[4]])
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _place(j, places, WHICH: gl.constexpr):
    """Where in the ring's order the j-th step of a query block is; see ``_pair_lists_kernel``."""
    base, first, own, alternating = places
    i = j - own
    turn = gl.where(i < alternating, 2 * i + WHICH, i + alternating)
    return base + gl.where(i < 0, 0, first + turn)


@gluon.jit
def _hide_missing(s, places, last_keys):
    """Logits of a first step; -inf where a key is missing from the ragged block, if it is that."""
    inside = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout)) < last_keys
    return gl.where(inside[None, :] | (places[2] == 0), s, -float("inf"))


@gluon.jit
def attend_steps(
    q,  # [BLOCK, D]
    softmax,  # acc [BLOCK, D], row_max, row_sum and gain [BLOCK]
    rings,  # of keys, values and columns; barriers: full and empty
    places,  # of the steps in the ring's order: base, first, own, alternating
    count,  # of steps
    last_keys,  # in the ragged block
    scale_log2,
    WHICH: gl.constexpr,  # of the pair
    STAGES: gl.constexpr,
    EVEN: gl.constexpr,  # there is no ragged block
    TAIL: gl.constexpr,  # of representatives: logits begin with a bias, weights add to the gain
    OVERLAP: gl.constexpr,  # products of one step with the softmax of the next
):  # fmt: skip
    """Take the keys of some steps into the softmax.

    With ``OVERLAP`` the products of a step wait in registers for the softmax of the next, as in
    FlashAttention-3 (https://arxiv.org/abs/2407.08608). Without it a group's softmax overlaps with
    products of other groups, of which a multiprocessor with two programs has enough.

    Returns:
        ``softmax`` after them.
    """
    acc, row_max, row_sum, gain = softmax
    k_ring, v_ring, columns, full, empty = rings
    dtype: gl.constexpr = k_ring.dtype
    BLOCK: gl.constexpr = k_ring.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    ROWS: gl.constexpr = row_max.type.layout
    none = gl.zeros([BLOCK, BLOCK], gl.float32, S_LAYOUT)
    row_sum, gain = _spread(row_sum), _spread(gain)
    if OVERLAP:
        if count > 0:
            at = _place(0, places, WHICH)
            stage = at % STAGES
            mbarrier.wait(full.index(stage), at // STAGES & 1)
            s = _start_logits(q, k_ring, columns, stage, none, WHICH, TAIL)
            s = warpgroup_mma_wait(0, deps=[s])
            if not EVEN:
                s = _hide_missing(s, places, last_keys)
            p, shrink, row_max, row_sum, gain = _softmax_step(
                s, columns, stage, row_max, row_sum, gain, scale_log2, WHICH, TAIL
            )
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
            acc = _rescale(acc, shrink)
            for j in range(1, count):
                before = stage
                at = _place(j, places, WHICH)
                stage = at % STAGES
                mbarrier.wait(full.index(stage), at // STAGES & 1)
                s = _start_logits(q, k_ring, columns, stage, none, WHICH, TAIL)
                acc = _start_values(p16, v_ring, before, acc)
                s = warpgroup_mma_wait(1, deps=[s])
                p, shrink, row_max, row_sum, gain = _softmax_step(
                    s, columns, stage, row_max, row_sum, gain, scale_log2, WHICH, TAIL
                )
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(before))
                p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
                acc = _rescale(acc, shrink)
            acc = _start_values(p16, v_ring, stage, acc)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage))
    else:
        for j in range(count):
            at = _place(j, places, WHICH)
            stage = at % STAGES
            mbarrier.wait(full.index(stage), at // STAGES & 1)
            s = _start_logits(q, k_ring, columns, stage, none, WHICH, TAIL)
            s = warpgroup_mma_wait(0, deps=[s])
            if not EVEN:
                if j == 0:
                    s = _hide_missing(s, places, last_keys)
            p, shrink, row_max, row_sum, gain = _softmax_step(
                s, columns, stage, row_max, row_sum, gain, scale_log2, WHICH, TAIL
            )
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
            acc = _rescale(acc, shrink)
            acc = _start_values(p16, v_ring, stage, acc)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage))
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), ROWS)
    gain = gl.convert_layout(gl.sum(gain, 1), ROWS)
    return acc, row_max, row_sum, gain
