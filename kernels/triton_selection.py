"""Triton kernels of ``uta::select_blocks`` and ``uta::list_blocks``: a selection without a sort.

What is looked for is the place at which a budget is spent: the score of the last block that is
kept, and the index of the last one with that score. Scores are compared as integers of the same
order. A sample of the scores brackets the threshold; a pass over all of them counts what lies in
each of some thousand parts of the bracket; the next collects the few blocks of the part in which
the budget ends, and one program chooses among them. Where the sample misled, or where very many
scores are equal, passes go on as long as they must: a pass that finds nothing left to do returns.

How many there are is fixed, so that nothing waits for the host. Atomics only count and collect, and
what is collected is a set: the same scores give the same bits.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher

LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)  # below and above every key
_INFINITY = tl.constexpr(0x7F800000)  # the key of +inf
_MINUS_INFINITY = tl.constexpr(-0x7F800001)

# the state of a group's search, int64
STATE = tl.constexpr(8)  # how many numbers it has
_MODE = tl.constexpr(0)
_LOW, _HIGH = tl.constexpr(1), tl.constexpr(2)  # keys between which, inclusive, the budget ends
_WANTED = tl.constexpr(3)  # how many blocks with keys up to _HIGH are kept
_SHIFT = tl.constexpr(4)  # keys in a part: two to the power of this
_ABOVE = tl.constexpr(5)  # blocks with keys above _HIGH, as the first pass counts them
_FOUND = tl.constexpr(6)  # blocks collected
_LAST = tl.constexpr(7)  # when done: the last index that is kept among keys equal to _LOW
# its modes: what the next pass does
_COUNT, _COLLECT, _TIES, _DONE = (tl.constexpr(mode) for mode in range(4))


@dataclasses.dataclass(frozen=True)
class Search:
    """Sizes of the search and of its tiles.

    Attributes:
        samples: Scores of a group that bracket the threshold, a power of two.
        deviations: Width of the bracket to each side, in standard deviations of a sample's rank.
        parts: Into which a pass cuts what is left, a power of two, at least 8.
        found: Blocks that one program chooses among at most, a power of two.
        rows: Of scores that a program of a pass takes at a time, a power of two.
        columns: That it takes at a time, likewise.
        num_warps: Of such a program.
        row_columns: As ``columns``, where every row is a group of its own.
        row_warps: As ``num_warps``, likewise.
    """

    samples: int = 16384
    deviations: float = 5.0
    parts: int = 4096
    found: int = 4096
    rows: int = 4
    columns: int = 256
    num_warps: int = 4
    row_columns: int = 2048
    row_warps: int = 4

    @property
    def passes(self) -> int:
        """How many are enough: the sample misleads, parts shrink to one key, all keys are equal."""
        count, width = 2, 1 << 32
        while width > 1:
            width = 1 << max(0, math.ceil(math.log2(width / (self.parts - 2))))
            count += 1
        return count


SEARCH = Search()


@triton.jit
def _in_order(bits):
    """Keys of float32 scores, given as int32 bits: of their order, 0.0 for -0.0, -inf for NaN."""
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    return tl.where((key > _INFINITY) | (key < _MINUS_INFINITY), _MINUS_INFINITY, key)


@triton.jit
def _shift(low, high, PARTS: tl.constexpr):
    """The least shift by which keys between ``low`` and ``high``, exclusive, fill the parts."""
    shift = tl.cast(0, tl.int64)
    while ((high - low - 2) >> shift) > PARTS - 3:
        shift += 1
    return shift


@triton.jit
def _key_of_rank(key, real, rank):
    """The key that is ``rank``-th from above among those that are ``real``; int64."""
    low, high = tl.cast(LOWEST, tl.int64), tl.cast(HIGHEST, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((real & (key >= middle.to(tl.int32))).to(tl.int32)) >= rank
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _bracket_kernel(
    bits_ptr,  # int32 [G, rows, blocks]: scores
    state_ptr,  # int64 [G, STATE]
    rows, blocks,
    samples,  # SAMPLES, or all scores of a group if they are no more
    upper, lower,  # ranks of the bracket's ends in the sample; outside 1 ... samples: no end
    wanted,
    SAMPLES: tl.constexpr, PARTS: tl.constexpr,
    ALL: tl.constexpr,  # the sample is all scores
):  # fmt: skip
    """Start the search of one group: the bracket in which its budget should end."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SAMPLES)
    real = i < samples
    if ALL:
        place = i.to(tl.int64)
    else:  # by chance, the same each time: no structure of the scores can mislead it
        x = (i + 1).to(tl.uint32) * 0x9E3779B1
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        x = x ^ (x >> 16)
        y = (x ^ 0x5BD1E995) * 0x9E3779B1
        y = (y ^ (y >> 15)) * 0x85EBCA6B
        y = y ^ (y >> 13)
        row = ((x >> 1).to(tl.int64) * rows) >> 31
        place = row * blocks + (((y >> 1).to(tl.int64) * blocks) >> 31)
    start = bits_ptr + group * rows * blocks
    key = _in_order(tl.load(start + place, mask=real, other=0))  # [SAMPLES]
    low, high = tl.cast(LOWEST, tl.int64), tl.cast(HIGHEST, tl.int64)
    if lower <= samples:
        low = _key_of_rank(key, real, lower)
    if upper >= 1:
        high = _key_of_rank(key, real, upper)
    state = state_ptr + group * STATE
    tl.store(state + _MODE, _COUNT)
    tl.store(state + _LOW, low)
    tl.store(state + _HIGH, high)
    tl.store(state + _WANTED, wanted)
    tl.store(state + _SHIFT, _shift(low, high, PARTS))
    tl.store(state + _ABOVE, 0)
    tl.store(state + _FOUND, 0)
    tl.store(state + _LAST, 0)


@triton.jit
def _load_keys(row_ptrs, real, first, blocks, COLUMNS: tl.constexpr):
    """Keys ``[ROWS, COLUMNS]`` of rows that are ``real`` and their columns; and which there are."""
    column = first + tl.arange(0, COLUMNS)
    inside = real[:, None] & (column < blocks)[None, :]
    bits = tl.load(row_ptrs[:, None] + column[None, :], mask=inside, other=0)
    return _in_order(bits), column, inside


@triton.jit
def _best_columns(row_ptrs, real, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The column of the highest key of each row, the first of several: int32 ``[ROWS]``."""
    best = tl.full([ROWS], LOWEST, tl.int32)
    place = tl.zeros([ROWS], tl.int32)
    for first in range(0, blocks, COLUMNS):
        key, column, inside = _load_keys(row_ptrs, real, first, blocks, COLUMNS)
        key = tl.where(inside, key, LOWEST)
        highest = tl.max(key, 1)
        at = tl.min(tl.where(key == highest[:, None], column[None, :], HIGHEST), 1)
        place = tl.where(highest > best, at, place)
        best = tl.maximum(best, highest)
    return place


@triton.jit
def _count_parts(
    row_ptrs, real, best, state, parts, blocks,
    FIRST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the blocks in each part of the bracket and, in the first pass, above it.

    The ends of the bracket have parts of their own, because it is there that many equal scores lie:
    these, and what is above, are added up before an atomic adds them.
    """
    low = tl.load(state + _LOW).to(tl.int32)
    high = tl.load(state + _HIGH).to(tl.int32)
    shift = tl.load(state + _SHIFT).to(tl.uint32)
    above = tl.zeros([ROWS, COLUMNS], tl.int32)
    at_low = tl.zeros([ROWS, COLUMNS], tl.int32)
    at_high = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, blocks, COLUMNS):
        key, column, inside = _load_keys(row_ptrs, real, first, blocks, COLUMNS)
        other = inside & (column[None, :] != best[:, None])
        if FIRST:
            above += (other & (key > high)).to(tl.int32)
        at_low += (other & (key == low)).to(tl.int32)
        at_high += (other & (key == high) & (low < high)).to(tl.int32)
        between = other & (key > low) & (key < high)
        part = 1 + ((key - low - 1).to(tl.uint32, bitcast=True) >> shift).to(tl.int32)
        one = tl.full([ROWS, COLUMNS], 1, tl.int64)
        tl.atomic_add(parts + part, one, mask=between, sem="relaxed")
    if FIRST:
        tl.atomic_add(state + _ABOVE, tl.sum(above).to(tl.int64), sem="relaxed")
    tl.atomic_add(parts, tl.sum(at_low).to(tl.int64), sem="relaxed")
    tl.atomic_add(parts + PARTS - 1, tl.sum(at_high).to(tl.int64), sem="relaxed")


@triton.jit
def _collect(
    row_ptrs, row, real, best, state, keys, places, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store keys and indices of the blocks in the bracket, in whatever order."""
    low = tl.load(state + _LOW).to(tl.int32)
    high = tl.load(state + _HIGH).to(tl.int32)
    counter = state + _FOUND + tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, blocks, COLUMNS):
        key, column, inside = _load_keys(row_ptrs, real, first, blocks, COLUMNS)
        taken = inside & (column[None, :] != best[:, None]) & (key >= low) & (key <= high)
        one = tl.full([ROWS, COLUMNS], 1, tl.int64)
        slot = tl.atomic_add(counter, one, mask=taken, sem="relaxed")
        place = row.to(tl.int64)[:, None] * blocks + column[None, :]
        tl.store(keys + slot, key, mask=taken)
        tl.store(places + slot, place, mask=taken)


@triton.jit
def _count_ties(
    row_ptrs, real, best, state, ties_ptrs, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store how many blocks of each row are at the threshold."""
    low = tl.load(state + _LOW).to(tl.int32)
    ties = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, blocks, COLUMNS):
        key, column, inside = _load_keys(row_ptrs, real, first, blocks, COLUMNS)
        ties += (inside & (column[None, :] != best[:, None]) & (key == low)).to(tl.int32)
    tl.store(ties_ptrs, tl.sum(ties, 1), mask=real)


@triton.jit
def _pass_kernel(
    bits_ptr,  # int32 [G, rows, blocks]: scores
    best_ptr,  # int32 [G, rows]: the best column of each row, which the first pass stores
    state_ptr,  # int64 [G, STATE]
    parts_ptr,  # int64 [G, PARTS], zero before: how many blocks lie in each
    keys_ptr,  # int32 [G, FOUND]: of blocks that are collected
    places_ptr,  # int64 [G, FOUND]: their indices in the group
    ties_ptr,  # int32 [G, rows]: how many blocks of a row are at the threshold
    rows, blocks,
    FIRST: tl.constexpr, PARTS: tl.constexpr, FOUND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Look at ROWS rows of one group, but for the best block of each, as its search wants it."""
    group = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied
    state = state_ptr + group * STATE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    row_ptrs = bits_ptr + (group * rows + row) * blocks
    best_ptrs, ties_ptrs = best_ptr + group * rows + row, ties_ptr + group * rows + row
    parts = parts_ptr + group * PARTS
    if FIRST:
        best = _best_columns(row_ptrs, real, blocks, ROWS, COLUMNS)
        tl.store(best_ptrs, best, mask=real)
        _count_parts(row_ptrs, real, best, state, parts, blocks, FIRST, PARTS, ROWS, COLUMNS)
    else:
        mode = tl.load(state + _MODE)
        if mode != _DONE:
            best = tl.load(best_ptrs, mask=real, other=0)
            if mode == _COUNT:
                _count_parts(
                    row_ptrs, real, best, state, parts, blocks, FIRST, PARTS, ROWS, COLUMNS
                )
            elif mode == _COLLECT:
                keys, places = keys_ptr + group * FOUND, places_ptr + group * FOUND
                _collect(row_ptrs, row, real, best, state, keys, places, blocks, ROWS, COLUMNS)
            else:
                _count_ties(row_ptrs, real, best, state, ties_ptrs, blocks, ROWS, COLUMNS)


@triton.jit
def _narrow_by_parts(state, parts, PARTS: tl.constexpr, FOUND: tl.constexpr):
    """Find the part in which the budget ends, and say how the search goes on from there."""
    low, high = tl.load(state + _LOW), tl.load(state + _HIGH)
    above, wanted = tl.load(state + _ABOVE), tl.load(state + _WANTED)
    shift = tl.load(state + _SHIFT)
    part = tl.arange(0, PARTS)
    count = tl.load(parts + part)  # [PARTS]
    inside = tl.sum(count)
    left = wanted - above  # of those inside
    from_here = inside - tl.cumsum(count, 0) + count  # blocks in this part and those above it
    chosen = tl.sum((from_here >= left).to(tl.int32)) - 1
    in_chosen = tl.sum(tl.where(part == chosen, count, 0))
    higher = tl.sum(tl.where(part > chosen, count, 0))
    first = low + 1 + (tl.cast(chosen - 1, tl.int64) << shift)
    last = tl.minimum(first + (tl.cast(1, tl.int64) << shift), high) - 1
    first = tl.where(chosen == 0, low, tl.where(chosen == PARTS - 1, high, first))
    last = tl.where(chosen == 0, low, tl.where(chosen == PARTS - 1, high, last))
    mode = tl.where(first == last, _TIES, _COUNT)
    mode = tl.where(in_chosen <= FOUND, _COLLECT, mode)
    mode = tl.where(in_chosen == left - higher, _DONE, mode)  # all of the part
    too_low, too_high = left <= 0, left > inside  # where the bracket lies, if not where it should
    mode = tl.where(too_low | too_high, _COUNT, mode)
    first = tl.where(too_low, high + 1, tl.where(too_high, LOWEST, first))
    last = tl.where(too_low, HIGHEST, tl.where(too_high, low - 1, last))
    rest = tl.where(too_low, wanted, tl.where(too_high, left - inside, left - higher))
    mode = tl.where(wanted == 0, _DONE, mode)  # the best of the rows are all
    first = tl.where(wanted == 0, HIGHEST, first)
    tl.store(state + _MODE, mode)
    tl.store(state + _LOW, first)
    tl.store(state + _HIGH, last)
    tl.store(state + _WANTED, rest)
    tl.store(state + _SHIFT, _shift(first, last, PARTS))
    tl.store(state + _ABOVE, 0)
    tl.store(state + _LAST, tl.cast(2**62, tl.int64))
    # for the next pass; after the sums, which all threads have read for
    tl.store(parts + part, tl.zeros([PARTS], tl.int64))


@triton.jit
def _choose_found(state, keys_ptr, places_ptr, FOUND: tl.constexpr):
    """Find the last block that is kept among those collected."""
    low, high, wanted = tl.load(state + _LOW), tl.load(state + _HIGH), tl.load(state + _WANTED)
    i = tl.arange(0, FOUND)
    real = i < tl.load(state + _FOUND)
    key = tl.load(keys_ptr + i, mask=real, other=0)  # [FOUND]
    place = tl.load(places_ptr + i, mask=real, other=0)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        enough = tl.sum((real & (key >= middle.to(tl.int32))).to(tl.int32)) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    higher = tl.sum((real & (key > low.to(tl.int32))).to(tl.int32))
    tied = real & (key == low.to(tl.int32))
    first = tl.min(tl.where(tied, place, 2**62))
    last = tl.max(tl.where(tied, place, 0))
    while first < last:
        middle = first + ((last - first) >> 1)
        enough = tl.sum((tied & (place <= middle)).to(tl.int32)) >= wanted - higher
        first = tl.where(enough, first, middle + 1)
        last = tl.where(enough, middle, last)
    tl.store(state + _MODE, _DONE)
    tl.store(state + _LOW, low)
    tl.store(state + _LAST, last)


@triton.jit
def _choose_tied(
    state, bits, best_ptr, ties_ptr, rows, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Find the last block that is kept among those at the threshold, of which rows are counted."""
    low, wanted = tl.load(state + _LOW).to(tl.int32), tl.load(state + _WANTED)
    offs, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    full = tl.cast(0, tl.int64)  # rows before that in which the budget ends
    before = tl.cast(0, tl.int64)  # blocks at the threshold in them
    seen = tl.cast(0, tl.int64)
    for start in range(0, rows, ROWS):
        real = start + offs < rows
        ties = tl.load(ties_ptr + start + offs, mask=real, other=0).to(tl.int64)
        whole = real & (seen + tl.cumsum(ties, 0) < wanted)
        full += tl.sum(whole.to(tl.int64))
        before += tl.sum(tl.where(whole, ties, 0))
        seen += tl.sum(ties)
    row = bits + full * blocks
    best = tl.load(best_ptr + full)
    last = tl.cast(0, tl.int64)
    for start in range(0, blocks, COLUMNS):
        inside = start + column < blocks
        key = _in_order(tl.load(row + start + column, mask=inside, other=0))
        tied = (inside & (start + column != best) & (key == low)).to(tl.int64)
        last += tl.sum((inside & (before + tl.cumsum(tied, 0) < wanted)).to(tl.int64))
        before += tl.sum(tied)
    tl.store(state + _MODE, _DONE)
    tl.store(state + _LAST, full * blocks + last)


@triton.jit
def _narrow_kernel(
    bits_ptr, best_ptr, state_ptr, parts_ptr, keys_ptr, places_ptr, ties_ptr,
    rows, blocks,
    PARTS: tl.constexpr, FOUND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Take one group's search on from what ``_pass_kernel`` did; arguments as there."""
    group = tl.program_id(0).to(tl.int64)
    state = state_ptr + group * STATE
    mode = tl.load(state + _MODE)
    if mode == _COUNT:
        _narrow_by_parts(state, parts_ptr + group * PARTS, PARTS, FOUND)
    elif mode == _COLLECT:
        _choose_found(state, keys_ptr + group * FOUND, places_ptr + group * FOUND, FOUND)
    elif mode == _TIES:
        of_group = group * rows
        _choose_tied(
            state, bits_ptr + of_group * blocks, best_ptr + of_group, ties_ptr + of_group,
            rows, blocks, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _keep_kernel(
    bits_ptr, best_ptr, state_ptr,
    kept_ptr,  # uint8 [G, rows, blocks]
    rows, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store which blocks of ROWS rows of one group are kept; arguments as in ``_pass_kernel``."""
    group = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied
    state = state_ptr + group * STATE
    threshold, last = tl.load(state + _LOW).to(tl.int32), tl.load(state + _LAST)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    row_ptrs = bits_ptr + (group * rows + row) * blocks
    kept_ptrs = kept_ptr + (group * rows + row) * blocks
    best = tl.load(best_ptr + group * rows + row, mask=real, other=0)
    for first in range(0, blocks, COLUMNS):
        key, column, inside = _load_keys(row_ptrs, real, first, blocks, COLUMNS)
        place = row.to(tl.int64)[:, None] * blocks + column[None, :]
        kept = (key > threshold) | ((key == threshold) & (place <= last))
        kept = kept | (column[None, :] == best[:, None])
        tl.store(kept_ptrs[:, None] + column[None, :], kept.to(tl.uint8), mask=inside)


@triton.jit
def _keep_in_row_kernel(
    bits_ptr,  # int32 [rows, blocks]: scores
    kept_ptr,  # uint8 [rows, blocks]
    blocks, wanted,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store which blocks of one row are kept, where the budget is a row's.

    The threshold is searched for bit by bit; the row stays in the cache.
    """
    start = tl.program_id(0).to(tl.int64) * blocks
    offs = tl.arange(0, COLUMNS)
    low, high = tl.cast(LOWEST, tl.int64), tl.cast(HIGHEST, tl.int64)
    above = tl.cast(0, tl.int32)  # blocks with keys above high
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count = tl.zeros([COLUMNS], tl.int32)
        for first in range(0, blocks, COLUMNS):
            inside = first + offs < blocks
            key = _in_order(tl.load(bits_ptr + start + first + offs, mask=inside, other=0))
            count += (inside & (key >= middle.to(tl.int32))).to(tl.int32)
        reached = tl.sum(count)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached >= wanted, high, middle - 1)
        above = tl.where(reached >= wanted, above, reached)
    threshold = low.to(tl.int32)
    for first in range(0, blocks, COLUMNS):
        inside = first + offs < blocks
        key = _in_order(tl.load(bits_ptr + start + first + offs, mask=inside, other=0))
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


def select_blocks(scores: Tensor, kept: int, rows: int, *, search: Search = SEARCH) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.select_blocks``.

    One launch where every row has a budget of its own, and otherwise two for each pass and three
    more; besides the mask that takes some 100 KB for each budget and eight bytes for each row.
    """
    batch, heads, blocks_q, blocks = scores.shape
    mask = torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    groups, total = batch * heads * blocks_q // rows, rows * blocks
    if kept == total:
        return mask.fill_(True)
    bits, chosen = scores.contiguous().view(torch.int32), mask.view(torch.uint8)
    with torch.cuda.device_of(scores):
        if rows == 1:
            launcher(_keep_in_row_kernel, (groups,))(
                bits, chosen, blocks, kept,
                COLUMNS=min(search.row_columns, triton.next_power_of_2(blocks)),
                num_warps=search.row_warps,
            )  # fmt: skip
            return mask
        state = bits.new_empty((groups, STATE.value), dtype=torch.int64)
        parts = bits.new_zeros((groups, search.parts), dtype=torch.int64)
        keys = bits.new_empty((groups, search.found))
        places = bits.new_empty((groups, search.found), dtype=torch.int64)
        best, ties = bits.new_empty((2, groups, rows)).unbind()
        samples, (upper, lower) = min(total, search.samples), _ranks(kept, rows, total, search)
        launcher(_bracket_kernel, (groups,))(
            bits, state, rows, blocks, samples, upper, lower, kept - rows,
            SAMPLES=min(search.samples, triton.next_power_of_2(total)), PARTS=search.parts,
            ALL=total <= search.samples, num_warps=16,
        )  # fmt: skip
        columns = min(search.columns, triton.next_power_of_2(blocks))
        grid = (triton.cdiv(rows, search.rows), groups)
        arguments = (bits, best, state, parts, keys, places, ties, rows, blocks)
        for number in range(search.passes):
            launcher(_pass_kernel, grid)(
                *arguments, FIRST=number == 0, PARTS=search.parts, FOUND=search.found,
                ROWS=search.rows, COLUMNS=columns, num_warps=search.num_warps,
            )  # fmt: skip
            launcher(_narrow_kernel, (groups,))(
                *arguments, PARTS=search.parts, FOUND=search.found, ROWS=1024, COLUMNS=1024,
                num_warps=8,
            )  # fmt: skip
        launcher(_keep_kernel, grid)(
            bits, best, state, chosen, rows, blocks,
            ROWS=search.rows, COLUMNS=columns, num_warps=search.num_warps,
        )  # fmt: skip
    return mask


def _ranks(kept: int, rows: int, total: int, search: Search) -> tuple[int, int]:
    """Ranks in the sample between which the threshold should lie, 1 being the highest score.

    Of all scores the threshold's rank is from ``kept - rows``, if the best of no row lie above it,
    to ``kept``, if those of all do.
    """
    samples = min(total, search.samples)

    def rank(number: int, sign: int) -> float:
        share = number / total
        return samples * share + sign * search.deviations * math.sqrt(samples * share * (1 - share))

    return math.floor(rank(kept - rows, -1)), math.ceil(rank(kept, 1)) + 1


def list_blocks(exact: Tensor, *, search: Search = SEARCH) -> tuple[Tensor, Tensor]:
    """Launch the kernel; argument and results as in ``reference.list_blocks``."""
    batch, heads, blocks_q, blocks = exact.shape
    ids = exact.new_empty(exact.shape, dtype=torch.int32)
    counts = exact.new_empty((batch, heads, blocks_q), dtype=torch.int32)
    with torch.cuda.device_of(exact):
        launcher(_list_kernel, (triton.cdiv(counts.numel(), search.rows),))(
            exact.contiguous().view(torch.uint8), ids, counts, counts.numel(), blocks,
            ROWS=search.rows, COLUMNS=min(search.columns, triton.next_power_of_2(blocks)),
            num_warps=search.num_warps,
        )  # fmt: skip
    return ids, counts
