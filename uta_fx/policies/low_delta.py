"""Keep exact what would err most if it were aggregated."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from uta_fx.kernels.ops import block_scores
from uta_fx.policies.base import Selection, spend_budget


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LowDelta:
    """Score p * exp(w sigma2 / 2) * sigma2 * nu: mass, in-block logit variance, values' spread.

    The low-delta idea of the UTA paper (section 3.3) made practical: a group of keys with equal
    logits, or with equal values, aggregates without error, and to second order the error of
    aggregating a block grows as the share of attention it holds times the variance of its logits
    (sigma2) times the deviation of its values (nu). That share is the pooled attention p, which
    takes a block's keys for equal, times what their variance adds to it; heads are compared by
    what it adds beyond the mean of the head. p and sigma2 are those of groups of ``rows`` query
    rows; the score is their root mean square over a query block, because the squares of errors add
    up.

    Attributes:
        power: Exponent of sigma2. 1 is the expected error; 0.5 weighs by the deviation, which suits
            blocks that are not compact (``reorder="none"``: ``docs/measured.md``), where errors
            saturate; 0 leaves the logits' spread out.
        variance_weight: w, the share of sigma2 / 2 that raises a block's mass: 1 for Gaussian
            logits whose variance is known, less for real ones, of which 0.3 errs least
            (``docs/measured.md``); 0 leaves it out.
        value_power: Exponent of nu, the root of the values' variance summed over channels; 0 leaves
            the values out.
        rows: Query rows that are scored together by their mean, a power of two that leaves at least
            four groups in a query block. Twice as many take half the time.

    Raises:
        ValueError: A field is outside its range.
    """

    power: float = 1.0
    variance_weight: float = 0.3
    value_power: float = 1.0
    rows: int = 2

    def __post_init__(self) -> None:
        for name in ("power", "variance_weight", "value_power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.rows < 1 or self.rows & (self.rows - 1):
            raise ValueError(f"rows must be a power of two, got {self.rows}")

    def arguments(self, selection: Selection) -> tuple[Any, ...]:
        """The arguments of ``uta::block_scores``."""
        statistics = selection.statistics
        return (
            selection.query,
            statistics.key_mean,
            statistics.key_variance,
            statistics.log_size,
            selection.scale,
            self.variance_weight,
            self.power,
            selection.block_q,
            self.rows,
        )

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        scores = block_scores(*self.arguments(selection))
        factor = selection.statistics.value_variance ** (self.value_power / 2)
        if self.variance_weight:
            factor = factor * (-self.variance_weight / 2 * _mean_variance(selection)).exp()
        scores = (scores * factor[:, :, None]).to(scores.dtype)
        return spend_budget(scores, selection.density, selection.budget)


def _mean_variance(selection: Selection) -> Tensor:
    """Mean of sigma2 over the key blocks and a row of each query block: float32 ``[B, H, 1]``."""
    rows = selection.query[:, :, :: selection.block_q].float() * selection.scale
    square = rows.square().mean(2)
    variance = selection.statistics.key_variance.float().mean(2)
    return (square * variance).sum(-1, keepdim=True)
