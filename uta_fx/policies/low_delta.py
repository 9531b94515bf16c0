"""Keep exact what would err most if it were aggregated."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from uta_fx.kernels.ops import block_scores
from uta_fx.policies.base import Selection, spend_budget


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LowDelta:
    """Score p * sigma2: pooled attention times in-block logit variance, averaged over query rows.

    The low-delta idea of the UTA paper (section 3.3) made practical: a group of keys with equal
    logits aggregates without error, and to second order the error of aggregating a block grows as
    the share of attention it holds times the variance of its logits.

    Attributes:
        power: Exponent of sigma2. 1 is the expected error; 0.5 weighs by the deviation; 0 selects
            by pooled attention alone.
        variance_weight: Share of sigma2 / 2 in the logits of p (the mass of a Gaussian block).

    Raises:
        ValueError: A field is negative.
    """

    power: float = 1.0
    variance_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("power", "variance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def arguments(self, selection: Selection) -> tuple[Any, ...]:
        """The arguments of ``uta::block_scores``."""
        statistics, query = selection.statistics, selection.query
        return (
            query,
            statistics.key_mean.to(query.dtype),
            statistics.key_variance.to(query.dtype),
            statistics.log_size,
            selection.scale,
            self.variance_weight,
            self.power,
            selection.block_q,
        )

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        scores = block_scores(*self.arguments(selection))
        return spend_budget(scores, selection.density, selection.budget)
