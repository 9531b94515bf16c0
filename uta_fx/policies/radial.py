"""Keep what is near in time, the less the further: Radial Attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from uta_fx.kernels.constants import constant
from uta_fx.order import Grid
from uta_fx.policies.base import Selection

SPLIT = 128  # tokens: a band that would be narrower goes to every second, third ... frame instead


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Radial:
    """The mask of Radial Attention (arXiv:2506.19852, section 4): a function of the grid alone.

    With S tokens in a frame and frames i (query) and j (key) delta apart, tokens r and c of these
    frames attend where ``|r - c| <= w``: all of them for delta of 0 and 1, and beyond that

        w = max(decay * P / 2 ** g, block),  P the power of two above S, g the bits of delta

    Where P / 2 ** g is less than 128 only every floor(128 * 2 ** g / P)-th delta is kept. A pair of
    blocks is kept where, of the columns that a pair of frames marks in it, more than three in five
    have more than a third of their rows marked.

    The rule is one of raster order (``Config.reorder`` of ``"auto"`` or ``"none"``). The published
    blocks are 128 x 128, ours as a rule 64 x 64, which follow the bands more closely.
    ``Config.density`` and ``Config.budget`` have no effect: ``decay`` says how much is kept.

    Attributes:
        decay: Above 0. Published: 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo.
        sink: Whether all attend to the first frame, as for Wan; not for HunyuanVideo.

    Raises:
        ValueError: ``decay`` is not positive.
    """

    decay: float = 0.2
    sink: bool = True

    order: ClassVar[str] = "none"
    orders: ClassVar[tuple[str, ...]] = ("none",)
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay must be above 0, got {self.decay}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``, the same for each head."""
        grid, _, block_q, block_kv = selection.layout("radial")
        mask = radial_blocks(selection.query, grid, block_q, block_kv, self.decay, self.sink)
        return mask.expand(*selection.query.shape[:2], -1, -1)


@constant("int[] grid, int block_q, int block_kv, float decay, bool sink")
def radial_blocks(grid: Grid, block_q: int, block_kv: int, decay: float, sink: bool) -> Tensor:
    """The blocks that ``Radial`` keeps: boolean ``[Nq, Nk]``."""
    frames, height, width = grid
    tokens, block = height * width, max(block_q, block_kv)
    rows = _cut_by_frames(frames, tokens, block_q)
    columns = _cut_by_frames(frames, tokens, block_kv)
    # alike pieces of different frames are looked at once
    row_kinds, row_kind = torch.stack([rows.first, rows.end, rows.size]).unique(
        dim=1, return_inverse=True
    )
    column_kinds, column_kind = torch.stack([columns.first, columns.end]).unique(
        dim=1, return_inverse=True
    )
    reaches = [reach_of(delta, tokens, decay, block) for delta in range(frames)]
    table = torch.stack([_marked(row_kinds, column_kinds, tokens, reach) for reach in reaches])
    delta = (rows.frame[:, None] - columns.frame).abs()
    if sink:
        delta = delta.masked_fill(columns.frame == 0, 0)
    row, column = table[delta, row_kind[:, None], column_kind].nonzero(as_tuple=True)
    mask = torch.zeros(int(rows.block[-1]) + 1, int(columns.block[-1]) + 1, dtype=torch.bool)
    mask[rows.block[row], columns.block[column]] = True
    return mask


def reach_of(delta: int, tokens: int, decay: float, block: int) -> int:
    """How far apart tokens of frames ``delta`` apart attend; -1 where they do not at all.

    Args:
        delta: Frames between.
        tokens: In a frame.
        decay: As in ``Radial``.
        block: Tokens in a block; no band is narrower.
    """
    if delta <= 1:
        return tokens
    width = (1 << tokens.bit_length()) / (1 << delta.bit_length())
    if width < SPLIT and delta % int(SPLIT / width):
        return -1
    return int(max(width * decay, block))


class _Pieces(NamedTuple):
    """Blocks of raster order, cut where frames end: int64 ``[N]`` each.

    Attributes:
        block: Which block.
        frame: Which frame.
        first: First token in the frame.
        end: One after the last.
        size: Tokens in the whole block.
    """

    block: Tensor
    frame: Tensor
    first: Tensor
    end: Tensor
    size: Tensor


def _cut_by_frames(frames: int, tokens: int, block: int) -> _Pieces:
    length = frames * tokens
    starts = torch.cat([torch.arange(0, length, block), torch.arange(0, length, tokens)]).unique()
    ends = torch.cat([starts[1:], torch.tensor([length])])
    which, frame = starts // block, starts // tokens
    size = (length - which * block).clamp(max=block)
    return _Pieces(which, frame, starts - frame * tokens, ends - frame * tokens, size)


def _marked(rows: Tensor, columns: Tensor, tokens: int, reach: int) -> Tensor:
    """Whether a band marks pairs of pieces: boolean ``[R, C]``; no number is rounded.

    Args:
        rows: First, end, and size of the block of kinds of rows: ``[3, R]``.
        columns: First and end of kinds of columns: ``[2, C]``.
        tokens: In a frame.
        reach: Of the band.
    """
    first, end, size = rows[:, :, None]
    column = torch.arange(tokens)
    upper = torch.minimum(end, column + reach + 1)
    count = (upper - torch.maximum(first, column - reach)).clamp(min=0)  # [R, tokens]
    some, third = (
        torch.nn.functional.pad(which.int().cumsum(1, dtype=torch.int32), (1, 0))
        for which in (count > 0, 3 * count > size)
    )
    start, stop = columns
    touched, well = (x[:, stop] - x[:, start] for x in (some, third))
    return (touched > 0) & (5 * well > 3 * touched)
