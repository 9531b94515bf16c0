"""Keep blocks by chance: what a selection must beat."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from uta_fx.policies.base import Selection, spend_budget

_WORD = 1 << 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """Score every pair of blocks by a hash of its place: a control for studies.

    The same at every call and on every device; every sample of a batch keeps the same blocks.

    Attributes:
        seed: Another seed keeps others; in [0, 2^31).

    Raises:
        ValueError: ``seed`` is outside its range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be in [0, 2^31), got {self.seed}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        batch, heads, length, _ = selection.query.shape
        rows, blocks = -(-length // selection.block_q), selection.statistics.size.shape[0]
        place = torch.arange(heads * rows * blocks, device=selection.query.device)
        # multiply and fold, as integer hashes do; products stay below 2^63
        x = (place + self.seed * 7919) % _WORD
        for factor in (0x7FEB352D, 0x45D9F3B, 0x7FEB352D):
            x = ((x ^ x // 65536) * factor) % _WORD
        x = x ^ x // 65536
        scores = x.to(torch.float32).view(1, heads, rows, blocks)
        return spend_budget(scores.expand(batch, -1, -1, -1), selection.density, selection.budget)
