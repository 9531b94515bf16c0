"""Keep exact what would err most if it were aggregated."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from uta_fx.kernels.ops import block_scores
from uta_fx.policies.base import Selection, spend_budget


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LowDelta:
    """Score p * sigma2 * nu: pooled attention, in-block logit variance, spread of the values.

    The low-delta idea of the UTA paper (section 3.3) made practical: a group of keys with equal
    logits, or with equal values, aggregates without error, and to second order the error of
    aggregating a block grows as the share of attention it holds (p) times the variance of its
    logits (sigma2) times the deviation of its values (nu). p and sigma2 are those of groups of
    ``rows`` query rows; the score is their root mean square over a query block, because the squares
    of errors add up.

    Attributes:
        power: Exponent of sigma2. 1 is the expected error; 0.5 weighs by the deviation, which suits
            blocks that are not compact (``reorder="none"``: ``docs/measured.md``), where errors
            saturate; 0 leaves the logits' spread out.
        variance_weight: Share of sigma2 / 2 in the logits of p (the mass of a Gaussian block); any
            but 0 costs a sixth more time and gains nothing in the picture (``docs/measured.md``).
        value_power: Exponent of nu, the root of the values' variance summed over channels; 0 leaves
            the values out.
        rows: Query rows that are scored together by their mean, a power of two that leaves at least
            four groups in a query block. Twice as many take half the time.

    Raises:
        ValueError: A field is outside its range.
    """

    power: float = 1.0
    variance_weight: float = 0.0
    value_power: float = 1.0
    rows: int = 2

    def __post_init__(self) -> None:
        for name in ("power", "variance_weight", "value_power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.rows < 1 or self.rows & (self.rows - 1):
            raise ValueError(f"rows must be a power of two, got {self.rows}")

    def arguments(self, selection: Selection) -> tuple[Any, ...]:
        """The arguments of ``uta::block_scores``, with nu in the variance where that is the same.

        Relative to the largest nu of a sample, which changes no order, so that float16 holds it.
        """
        statistics, query = selection.statistics, selection.query
        variance = statistics.key_variance
        if self._spread_in_variance:
            spread = statistics.value_variance ** (self.value_power / (2 * self.power))
            largest = spread.amax((1, 2), keepdim=True).clamp_min(torch.finfo(spread.dtype).tiny)
            variance = variance * (spread / largest)[..., None]
        return (
            query,
            statistics.key_mean,
            variance.to(query.dtype),
            statistics.log_size,
            selection.scale,
            self.variance_weight,
            self.power,
            selection.block_q,
            self.rows,
        )

    @property
    def _spread_in_variance(self) -> bool:
        """Whether the variance is but a factor of the score, to the power of ``power``."""
        return self.value_power > 0 and self.power > 0 and self.variance_weight == 0

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        scores = block_scores(*self.arguments(selection))
        if self.value_power and not self._spread_in_variance:
            spread = selection.statistics.value_variance ** (self.value_power / 2)
            scores = scores * spread[:, :, None]
        return spend_budget(scores, selection.density, selection.budget)
