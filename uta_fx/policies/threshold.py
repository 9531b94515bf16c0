"""Keep what stands out of its row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from uta_fx.policies.base import Selection
from uta_fx.statistics import query_means


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Keep blocks whose pooled logit is above the row's mean by ``deviations`` deviations.

    The rule of Sol-Attn (arXiv:2607.24027): with m_nb = s q_n.k_b of block means, b is kept in row
    n where ``m_nb > mean_b(m_nb) + deviations * std_b(m_nb)``, and where n and b are neighbours.
    Of Gaussian logits 1 keeps 16 %, 1.5 keeps 7 % and 2 keeps 2 %. ``Config.density`` and
    ``Config.budget`` have no effect.

    Attributes:
        deviations: Tau.
        neighbours: Blocks on each side of a query block's own place that it keeps in any case, in
            the order of the tokens; at least 0.

    Raises:
        ValueError: ``neighbours`` is negative.
    """

    deviations: float = 1.0
    neighbours: int = 1

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise ValueError(f"neighbours must be at least 0, got {self.neighbours}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        means = query_means(selection.query, selection.block_q) * selection.scale
        logits = means @ selection.statistics.key_mean.float().mT
        center = logits.mean(-1, keepdim=True)
        deviation = (logits - center).square().mean(-1, keepdim=True).sqrt()
        rows, blocks = logits.shape[-2:]
        place = torch.arange(rows, device=logits.device) * blocks // rows
        block = torch.arange(blocks, device=logits.device)
        near = (place[:, None] - block).abs() <= self.neighbours
        return (logits > center + self.deviations * deviation) | near
