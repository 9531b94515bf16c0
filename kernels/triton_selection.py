"""Triton kernels of ``uta::select_blocks`` and ``uta::list_blocks``: a selection without a sort.

What is looked for is the place at which a budget is spent: the score of the last block that is
kept, and how many with that score are. Scores are compared as integers of the same order, digit by
digit from the highest: each pass over the scores counts the digits of those that agree with the
threshold so far, and the counts say its next digit. The first pass finds the best block of each
row, which is kept whatever its score and never counted. The last leaves the counts of every program
by itself, so that each knows how many blocks at the threshold come before its own.

How many passes there are follows from the dtype, so that nothing waits for the host. Atomics only
add up counts: the same scores give the same bits.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher

PACKED_BLOCKS = 1 << 15
"""So many blocks have a number that fits into 32 bits beside a key of 16."""
LOWEST = tl.constexpr(-(2**31))  # below every key
_MINUS_INFINITY = tl.constexpr(0x7F800000 - 2**31)  # its bits, as an int32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the passes, their programs and their tiles.

    Attributes:
        passes: Which count the digits of a key, for scores of 16 and of 32 bits, at least 2. Fewer
            read less and count more: a pass has 2^digit counts.
        programs: Of a pass, at most; each takes as many rows of a group.
        rows: Which a program takes at a time, a power of two; 16 keep loads aligned.
        columns: That the first pass takes at a time, likewise.
        scores: That a later pass takes at a time, likewise.
        kept_scores: As ``scores``, where the mask is stored.
        num_warps: Of such a program.
        row_columns: As ``columns``, where every row is a group of its own.
        row_warps: As ``num_warps``, likewise.
        list_rows: As ``rows``, of ``list_blocks``.
        list_columns: As ``columns``, likewise.
    """

    passes: tuple[int, int] = (3, 6)
    programs: int = 1056
    rows: int = 16
    columns: int = 256
    scores: int = 4096
    kept_scores: int = 2048
    num_warps: int = 4
    row_columns: int = 2048
    row_warps: int = 4
    list_rows: int = 4
    list_columns: int = 256


SIZES = Sizes()
ANY_BUDGET: dict[str, Any] = {"do_not_specialize": ["wanted"]}  # one kernel serves all of them


@triton.constexpr_function
def _rest(number: int, PASSES: int, BITS: int) -> int:
    """Bits of an int32 below the digit that pass ``number`` counts; those of a key are its first.

    Where digits cannot be equal the first are longer.
    """
    return 32 - BITS + BITS * (PASSES - 1 - number) // PASSES


@triton.constexpr_function
def _width(number: int, PASSES: int, BITS: int) -> int:
    """Bits of the digit that pass ``number`` counts."""
    return BITS * (PASSES - number) // PASSES - BITS * (PASSES - 1 - number) // PASSES


@triton.jit
def _load_keys(ptrs, mask):
    """Keys of scores, given by pointers to their bits: int32 of their order.

    Those of bfloat16, which is the first half of float32, have 16 bits of zeros below. -0.0 counts
    as 0.0, and NaN, which stands also for what is masked, as -inf.
    """
    bits = tl.load(ptrs, mask=mask, other=-1)
    bits = bits.to(tl.int32) << (32 - bits.dtype.primitive_bitwidth)
    score = bits.to(tl.float32, bitcast=True)
    bits = tl.where(score == score, bits, _MINUS_INFINITY)
    return tl.where(bits < 0, LOWEST - bits, bits)


@triton.jit
def _digit(key, number: tl.constexpr, PASSES: tl.constexpr, BITS: tl.constexpr):
    """The digit of a key that pass ``number`` counts, not negative."""
    digit = key >> _rest(number, PASSES, BITS)
    WIDTH: tl.constexpr = _width(number, PASSES, BITS)
    return digit + (1 << (WIDTH - 1)) if number == 0 else digit & ((1 << WIDTH) - 1)


@triton.jit
def _threshold(
    counts_ptr,  # int64 [passes, DIGITS], of one group
    wanted,
    KNOWN: tl.constexpr,  # passes that have counted
    PASSES: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """The first digits of the threshold, as a key; how many blocks that have them are kept.

    The next digit is the highest of which, with all above it, there are as many as are wanted.
    """
    digit = tl.arange(0, DIGITS)
    found, left = tl.cast(0, tl.int32), tl.cast(wanted, tl.int64)
    for number in tl.static_range(KNOWN):
        count = tl.load(counts_ptr + number * DIGITS + digit)  # [DIGITS]
        from_here = tl.sum(count) - tl.cumsum(count, 0) + count
        enough = (from_here >= left) & (digit < 1 << _width(number, PASSES, BITS))
        chosen = tl.sum(enough.to(tl.int32)) - 1
        left -= tl.sum(tl.where(digit > chosen, count, 0))
        if number == 0:
            chosen -= 1 << (_width(0, PASSES, BITS) - 1)
        found += chosen << _rest(number, PASSES, BITS)
    return found, left


@triton.jit
def _share_of_program(rows, share, programs):
    """A program's group and its place among those of the group; its first row, and one past it."""
    group = (tl.program_id(0) // programs).to(tl.int64)  # 64-bit before it is multiplied
    place = tl.program_id(0) % programs
    return group, place, place * share, tl.minimum(place * share + share, rows)


@triton.jit
def _histogram_of_best(
    key, real, number: tl.constexpr, PASSES: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """How many of the keys ``[ROWS]`` that are real have each digit: int32 ``[2^width]``."""
    digit = _digit(key, number, PASSES, BITS)
    equal = digit[:, None] == tl.arange(0, 1 << _width(number, PASSES, BITS))[None, :]
    return tl.sum((equal & real[:, None]).to(tl.int32), 0)


@triton.jit
def _first_pass_kernel(
    bits_ptr,  # int16 or int32 [G, rows, blocks]: bits of the scores
    best_ptr,  # int32 [G, rows]: the best column of each row, the first of several
    counts_ptr,  # int64 [G, PASSES, DIGITS], zero before: blocks that have each digit
    rows, blocks,
    share, programs,  # rows of a program, programs of a group
    PASSES: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,  # a key of 16 bits and a column fit into an int32
):  # fmt: skip
    """Find the best block of each row; count the first digit of all others."""
    WORD: tl.constexpr = tl.int32 if PACKED else tl.int64
    LAST: tl.constexpr = (1 << 15 if PACKED else 1 << 31) - 1  # columns: the first is the highest
    group, _, first, last = _share_of_program(rows, share, programs)
    BINS: tl.constexpr = 1 << _width(0, PASSES, BITS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last
        row_ptrs = bits_ptr + (group * rows + row) * blocks
        best = tl.full([ROWS, COLUMNS], LOWEST, tl.int32).to(WORD) << (0 if PACKED else 32)
        for before in range(0, blocks, COLUMNS):
            column = before + tl.arange(0, COLUMNS)
            inside = real[:, None] & (column < blocks)[None, :]
            key = _load_keys(row_ptrs[:, None] + column[None, :], inside)  # [ROWS, COLUMNS]
            # no mask: Triton may reshape it to another order than that of the digits
            digit = tl.reshape(_digit(key, 0, PASSES, BITS), [ROWS * COLUMNS])
            counts += tl.histogram(digit, BINS)
            ranked = (key.to(WORD) << (0 if PACKED else 32)) + (LAST - column)[None, :]
            best = tl.maximum(best, ranked)
        ranked = tl.max(best, 1)
        place = (LAST - (ranked & LAST)).to(tl.int32)
        key = (ranked - (ranked & LAST)) if PACKED else (ranked >> 32).to(tl.int32)
        tl.store(best_ptr + group * rows + row, place, mask=real)
        counts -= _histogram_of_best(key, real, 0, PASSES, BITS)
    loaded = tl.cdiv(last - first, ROWS) * ROWS * (tl.cdiv(blocks, COLUMNS) * COLUMNS)
    outside = loaded - (last - first) * blocks  # each counted as -inf
    lowest = _digit(tl.cast(LOWEST - _MINUS_INFINITY, tl.int32), 0, PASSES, BITS)
    counts -= tl.where(tl.arange(0, BINS) == lowest, outside, 0)
    counts_ptrs = counts_ptr + group * PASSES * DIGITS + tl.arange(0, BINS)
    tl.atomic_add(counts_ptrs, counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@triton.jit(**ANY_BUDGET)
def _next_pass_kernel(
    bits_ptr, best_ptr, counts_ptr,
    tied_ptr,  # int32 [G, DIGITS, programs]: counts of the last pass, of each program
    wanted,
    rows, blocks, share, programs,
    NUMBER: tl.constexpr,  # of the pass, from 1
    PASSES: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Count a digit of the blocks whose digits before it are the threshold's, but for the best."""
    group, program, first, last = _share_of_program(rows, share, programs)
    counts_ptr += group * PASSES * DIGITS
    found, _ = _threshold(counts_ptr, wanted, NUMBER, PASSES, BITS, DIGITS)
    COMMON: tl.constexpr = _rest(NUMBER - 1, PASSES, BITS)
    BINS: tl.constexpr = 1 << _width(NUMBER, PASSES, BITS)
    bits_ptr += (group * rows + first) * blocks
    best_ptr += group * rows + first
    size = (last - first) * blocks
    counts = tl.zeros([BINS], tl.int32)
    for before in range(0, size, SCORES):
        at = before + tl.arange(0, SCORES)
        key = _load_keys(bits_ptr + at, at < size)  # [SCORES]
        agrees = (at < size) & (key >> COMMON == found >> COMMON)
        counts += tl.histogram(_digit(key, NUMBER, PASSES, BITS), BINS, mask=agrees)
    for start in range(0, last - first, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last - first
        best = tl.load(best_ptr + row, mask=real, other=0)
        key = _load_keys(bits_ptr + row.to(tl.int64) * blocks + best, real)  # [ROWS]
        agrees = real & (key >> COMMON == found >> COMMON)
        counts -= _histogram_of_best(key, agrees, NUMBER, PASSES, BITS)
    digit = tl.arange(0, BINS)
    counts_ptrs = counts_ptr + NUMBER * DIGITS + digit
    tl.atomic_add(counts_ptrs, counts.to(tl.int64), mask=counts != 0, sem="relaxed")
    if NUMBER == PASSES - 1:
        tl.store(tied_ptr + (group * DIGITS + digit) * programs + program, counts)


@triton.jit(**ANY_BUDGET)
def _keep_kernel(
    bits_ptr, best_ptr, counts_ptr, tied_ptr,
    kept_ptr,  # uint8 [G, rows, blocks]
    wanted,
    rows, blocks, share, programs,
    PASSES: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, SCORES: tl.constexpr,
    PROGRAMS: tl.constexpr,  # at least ``programs``
):  # fmt: skip
    """Store which blocks are kept: the best, what is above the threshold, the first of the ties."""
    group, program, first, last = _share_of_program(rows, share, programs)
    threshold, left = _threshold(
        counts_ptr + group * PASSES * DIGITS, wanted, PASSES, PASSES, BITS, DIGITS
    )
    tied_ptr += (group * DIGITS + _digit(threshold, PASSES - 1, PASSES, BITS)) * programs
    other = tl.arange(0, PROGRAMS)
    ties = tl.load(tied_ptr + other, mask=other <= program, other=0).to(tl.int64)
    left -= tl.sum(tl.where(other < program, ties, 0))  # to be kept of the ties from here on
    some = (left > 0) & (left < tl.sum(tl.where(other == program, ties, 0)))

    place = (group * rows + first) * blocks
    bits_ptr += place
    kept_ptr += place
    best_ptr += group * rows + first
    size = (last - first) * blocks
    for before in range(0, size, SCORES):
        at = before + tl.arange(0, SCORES)
        key = _load_keys(bits_ptr + at, at < size)  # [SCORES]
        tied = (at < size) & (key == threshold)
        if some:  # the budget ends here
            row = at // blocks
            tied &= at - row * blocks != tl.load(best_ptr + row, mask=at < size, other=0)
            number = tl.cumsum(tied.to(tl.int32), 0)
            kept = tied & (number <= left)
            left -= tl.sum(tied.to(tl.int32))
        else:
            kept = tied & (left > 0)
        kept = kept | (key > threshold)
        tl.store(kept_ptr + at, kept.to(tl.uint8), mask=at < size)
    tl.debug_barrier()  # other threads of the program may have stored what the best are to be
    for start in range(0, last - first, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last - first
        best = tl.load(best_ptr + row, mask=real, other=0)
        yes = tl.full([ROWS], 1, tl.uint8)
        tl.store(kept_ptr + row.to(tl.int64) * blocks + best, yes, mask=real)


@triton.jit(**ANY_BUDGET)
def _keep_in_row_kernel(
    bits_ptr,  # int16 or int32 [rows, blocks]: bits of the scores
    kept_ptr,  # uint8 [rows, blocks]
    blocks, wanted,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store which blocks of one row are kept, where the budget is a row's.

    The threshold is searched for bit by bit; the row stays in the cache.
    """
    start = tl.program_id(0).to(tl.int64) * blocks
    offs = tl.arange(0, COLUMNS)
    UNUSED: tl.constexpr = 32 - bits_ptr.dtype.element_ty.primitive_bitwidth
    KEYS: tl.constexpr = 1 << (31 - UNUSED)  # of either sign
    low, high = tl.cast(-KEYS, tl.int64), tl.cast(KEYS - 1, tl.int64)
    above = tl.cast(0, tl.int32)  # blocks with keys above high
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        threshold = (middle << UNUSED).to(tl.int32)
        count = tl.zeros([COLUMNS], tl.int32)
        for first in range(0, blocks, COLUMNS):
            inside = first + offs < blocks
            key = _load_keys(bits_ptr + start + first + offs, inside)
            count += (inside & (key >= threshold)).to(tl.int32)
        reached = tl.sum(count)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle - 1)
        above = tl.where(reached >= wanted, above, reached)
    threshold = (low << UNUSED).to(tl.int32)
    for first in range(0, blocks, COLUMNS):
        inside = first + offs < blocks
        key = _load_keys(bits_ptr + start + first + offs, inside)
        tied = (inside & (key == threshold)).to(tl.int32)
        kept = (key > threshold) | ((tied != 0) & (above + tl.cumsum(tied, 0) <= wanted))
        above += tl.sum(tied)
        tl.store(kept_ptr + start + first + offs, kept.to(tl.uint8), mask=inside)


@triton.jit
def _list_kernel(
    kept_ptr,  # uint8 [rows, blocks]
    ids_ptr,  # int32 [rows, blocks]
    counts_ptr,  # int32 [rows]
    rows, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the columns that are kept in ROWS rows, ascending, then zeros; and how many."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    offs = tl.arange(0, COLUMNS)
    count = tl.zeros([ROWS], tl.int32)
    ids_ptrs = ids_ptr + (row * blocks)[:, None]
    for first in range(0, blocks, COLUMNS):
        column = first + offs
        inside = real[:, None] & (column < blocks)[None, :]
        kept_ptrs = kept_ptr + (row * blocks)[:, None] + column[None, :]
        kept = tl.load(kept_ptrs, mask=inside, other=0).to(tl.int32)  # [ROWS, COLUMNS]
        slot = count[:, None] + tl.cumsum(kept, 1) - 1
        id = tl.zeros([ROWS, COLUMNS], tl.int32) + column[None, :]
        tl.store(ids_ptrs + slot, id, mask=kept != 0)
        count += tl.sum(kept, 1)
    for first in range(0, blocks, COLUMNS):
        column = first + offs
        rest = real[:, None] & (column < blocks)[None, :] & (column[None, :] >= count[:, None])
        none = tl.zeros([ROWS, COLUMNS], tl.int32)
        tl.store(ids_ptrs + column[None, :], none, mask=rest)
    tl.store(counts_ptr + row, count, mask=real)


def select_blocks(scores: Tensor, kept: int, rows: int, *, sizes: Sizes = SIZES) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.select_blocks``.

    One launch where every row has a budget of its own, and otherwise one for each pass and two
    more. Besides the mask that takes four bytes for each row, and as many for each program's count
    of each digit.
    """
    batch, heads, blocks_q, blocks = scores.shape
    mask = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    groups = batch * heads * blocks_q // rows
    if kept == rows * blocks:
        return mask.fill_(True)
    word = torch.int16 if scores.dtype == torch.bfloat16 else torch.int32
    bits, chosen = scores.contiguous().view(word), mask.view(torch.uint8)
    width = 8 * bits.element_size()
    with torch.cuda.device_of(scores):
        kernels = selection_kernels(width, blocks, rows, sizes)
        if rows == 1:
            ((in_row, options),) = kernels
            launcher(in_row, (groups,))(bits, chosen, blocks, kept, **options)
            return mask
        passes = sizes.passes[width == 32]
        digits = 1 << -(-width // passes)
        turns = triton.cdiv(triton.cdiv(rows, sizes.rows), max(1, sizes.programs // groups))
        share = turns * sizes.rows
        programs = triton.cdiv(rows, share)
        best = bits.new_empty((groups, rows), dtype=torch.int32)
        counts = bits.new_zeros((groups, passes, digits), dtype=torch.int64)
        tied = bits.new_empty((groups, digits, programs), dtype=torch.int32)
        grid, wanted = (groups * programs,), kept - rows
        shape = (rows, blocks, share, programs)
        (first, first_options), *others, (keep, keep_options) = kernels
        launcher(first, grid)(bits, best, counts, *shape, **first_options)
        for following, options in others:
            launcher(following, grid)(bits, best, counts, tied, wanted, *shape, **options)
        launcher(keep, grid)(bits, best, counts, tied, chosen, wanted, *shape, **keep_options)
    return mask


def selection_kernels(
    width: int, blocks: int, rows: int, sizes: Sizes = SIZES
) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels of ``select_blocks`` with their constants, in the order in which they run.

    Args:
        width: Bits of a score, 16 or 32.
        blocks: Nk.
        rows: As in ``reference.select_blocks``.
        sizes: Of passes and tiles.
    """
    if rows == 1:
        columns = min(sizes.row_columns, triton.next_power_of_2(blocks))
        return [(_keep_in_row_kernel, {"COLUMNS": columns, "num_warps": sizes.row_warps})]
    passes = sizes.passes[width == 32]
    common = {
        "PASSES": passes, "BITS": width, "DIGITS": 1 << -(-width // passes), "ROWS": sizes.rows,
        "num_warps": sizes.num_warps,
    }  # fmt: skip
    first = {
        "COLUMNS": min(sizes.columns, triton.next_power_of_2(blocks)),
        "PACKED": width == 16 and blocks <= PACKED_BLOCKS,
    }
    keep = {"SCORES": sizes.kept_scores, "PROGRAMS": triton.next_power_of_2(sizes.programs)}
    return [
        (_first_pass_kernel, first | common),
        *(
            (_next_pass_kernel, {"NUMBER": number, "SCORES": sizes.scores} | common)
            for number in range(1, passes)
        ),
        (_keep_kernel, keep | common),
    ]


def list_blocks(exact: Tensor, *, sizes: Sizes = SIZES) -> tuple[Tensor, Tensor]:
    """Launch the kernel; argument and results as in ``reference.list_blocks``."""
    batch, heads, blocks_q, blocks = exact.shape
    ids = exact.new_empty(exact.shape, dtype=torch.int32)
    counts = exact.new_empty((batch, heads, blocks_q), dtype=torch.int32)
    with torch.cuda.device_of(exact):
        launcher(_list_kernel, (triton.cdiv(counts.numel(), sizes.list_rows),))(
            exact.contiguous().view(torch.uint8),
            ids,
            counts,
            counts.numel(),
            blocks,
            **list_options(blocks, sizes),
        )
    return ids, counts


def list_options(blocks: int, sizes: Sizes = SIZES) -> dict[str, int]:
    """Constants and compiler options of the kernel of ``list_blocks``, for Nk."""
    columns = min(sizes.list_columns, triton.next_power_of_2(blocks))
    return {"ROWS": sizes.list_rows, "COLUMNS": columns, "num_warps": sizes.num_warps}
