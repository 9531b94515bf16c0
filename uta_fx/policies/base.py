"""What a selection policy is, what it may look at, and the budget that most of them spend."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from uta_fx.clusters import Clusters
from uta_fx.kernels.ops import select_blocks
from uta_fx.order import Grid
from uta_fx.statistics import BlockStatistics

BUDGETS = ("site", "head", "row")

Layout = tuple[list[int], str, int, int]
"""Grid, order, query rows in a block, keys in a block."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Everything a policy may look at when it chooses the exact blocks of one site.

    Attributes:
        query: ``[B, H, L, D]``, video tokens in the order of the blocks.
        key: ``[B, H, L, D]``, in the same order.
        value: ``[B, H, L, Dv]``, in the same order.
        statistics: Of the key and value blocks.
        scale: Multiplies the logits.
        density: Share of key blocks to keep exact, in (0, 1].
        budget: A name in ``BUDGETS``: what ``density`` is a share of.
        block_q: Query rows in a block.
        block_kv: Keys in a block.
        grid: Frames, height and width of the tokens; None where nobody knows.
        order: How the tokens of the grid are ordered, a name in ``uta_fx.order.ORDERS`` that is
            not ``"auto"``.
        text_key: ``[B, H, Lt, D]``, keys that every query sees exactly beside the blocks; Lt may
            be 0.
        text_bias: Added to the logits of these, float32, broadcasts to ``[B, H, 1, Lt]``; None for
            nothing.
        clusters: Where the blocks are those of clusters: these.
        exact_for_all: Key blocks that are exact whatever a policy chooses: boolean, broadcasts to
            ``[B, H, Nq, Nk]``; None for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    statistics: BlockStatistics
    scale: float
    density: float
    budget: str
    block_q: int
    block_kv: int
    grid: Grid | None
    order: str
    text_key: Tensor
    text_bias: Tensor | None = None
    clusters: Clusters | None = None
    exact_for_all: Tensor | None = None

    def layout(self, policy: str) -> Layout:
        """The grid, its order and the block sizes, as arguments of an operator of constants.

        Args:
            policy: Who asks, for the error.

        Raises:
            ValueError: The grid is not known.
        """
        if self.grid is None:
            raise ValueError(
                f"grid must be given for policy {policy}, got None: it selects by where tokens lie"
            )
        return list(self.grid), self.order, self.block_q, self.block_kv


class Policy(Protocol):
    """A frozen value that chooses exact blocks with operations that a graph can trace.

    An implementation allocates only static shapes and never synchronises with the host. It must be
    hashable and comparable: the options of ``torch.compile`` are compared.

    It may have two attributes more: ``order``, the name of the token order that suits it, which
    ``Config.reorder="auto"`` takes (without it ``"tile"``); and ``orders``, those in which it has a
    meaning, where not all have. An order other than ``"none"``, or ``needs_grid = True``, leaves a
    site without a known grid dense.
    """

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``: True where query block n attends to key block b exactly."""
        ...


def spend_budget(scores: Tensor, density: float, budget: str) -> Tensor:
    """Keep the blocks with the highest scores.

    ``budget="row"`` keeps ``ceil(density * Nk)`` blocks in every row. ``budget="site"`` keeps
    ``ceil(density * H * Nq * Nk)`` blocks of each sample, wherever its scores are highest, after
    the best block of every row; ``budget="head"`` ``ceil(density * Nq * Nk)`` of each head of each
    sample. Samples of a batch never compete, so that a result does not depend on its neighbours.

    Of equal scores the first are kept, in the order of heads, rows and blocks; NaN counts as
    ``-inf``. The same scores keep the same blocks on every device.

    Args:
        scores: ``[B, H, Nq, Nk]``, higher is kept, in bfloat16 or compared in float32; within a
            budget rows must be comparable.
        density: In (0, 1].
        budget: ``"site"``, ``"head"`` or ``"row"``.

    Returns:
        Boolean ``[B, H, Nq, Nk]``.
    """
    _, heads, blocks_q, blocks = scores.shape
    rows = {"row": 1, "head": blocks_q, "site": heads * blocks_q}[budget]
    if scores.dtype != torch.bfloat16:
        scores = scores.float()
    return select_blocks(scores, _most(rows, share_of(density, rows * blocks)), rows)


def share_of(density: float, total: int) -> int:
    """``ceil(density * total)``, at least 1, in whole numbers: ``total`` may be symbolic.

    A density is the fraction next to it of a denominator up to a million.
    """
    part, whole = Fraction(density).limit_denominator(10**6).as_integer_ratio()
    kept = (total * part + whole - 1) // whole
    return _least(total, _most(1, kept))


def _most(a: int, b: int) -> int:
    """``max``, also of symbols; of numbers torch 2.11 cannot trace PyTorch's."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)


def _least(a: int, b: int) -> int:
    """``min``, likewise."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)
