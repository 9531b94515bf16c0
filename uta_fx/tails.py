"""What stands for the keys that are not attended to exactly: the forms of the tail."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uta_fx.kernels import contract, ops
from uta_fx.kernels.reference import rounded
from uta_fx.policies.base import Selection
from uta_fx.rectification import Rectification, rectification
from uta_fx.statistics import block_covariances, query_means

KINDS = ("none", "normalizer", "single", "bins", "block", "first_order", "gaussian", "rectified")
SLOPES = ("head", "query_block")


class Representatives(NamedTuple):
    """The five tail inputs of ``uta::sparse_attention``; shapes as documented there."""

    key: Tensor
    value: Tensor
    log_size: Tensor
    variance: Tensor
    slope: Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """How skipped keys enter the softmax.

    Attributes:
        kind: ``none`` drops them. ``single`` (UTA, eq. 10-14) is one representative for the whole
            tail; ``normalizer`` is its share of the denominator alone; ``bins`` (UTA, 3.4.2) one
            for each of ``bins`` groups of blocks with close pooled logits; ``block`` one for every
            block. A mean key is a lower bound of the mass it stands for (Jensen), exact where the
            logits in the group are equal. ``first_order`` adds the slope of the values over the
            logits; ``gaussian`` also lifts the mass by half the in-block logit variance, which is
            exact where logits and values in a block are jointly Gaussian. ``rectified`` (Rectified
            SpaAttn) does not enter the softmax: pooled attention says by how much a query block's
            exact output is scaled down, and which means of values are added to it.
        bins: Groups of ``bins``, at least 1.
        variance_weight: Share of that half variance (``gaussian`` alone), at least 0. 1 is exact
            for Gaussian blocks whose variance is known; the operator takes that of all rows of a
            query block (``reference.pooled_variance``). 0.5 is the default because the variance
            is estimated channel by channel and real logits have lighter tails
            (``docs/measured.md``).
        slope: ``"head"``: one key-value covariance for each head; ``"query_block"``: one for each
            query block, its tail blocks weighted by their pooled attention (dearer: O(Nk D Dv)
            memory for each head).
        fit: Of ``first_order`` and ``gaussian`` with a slope for each head: so many query rows of
            each head, evenly spaced, are attended to exactly, and the mass of the tail and its
            slope are multiplied by what fits these best (``uta::fit_tail``). None: 16 there, which
            are enough and the most (``docs/measured.md``); 0 for neither. The keys and values of
            64 to 127 blocks, or of all where there are fewer, are read once for that, in four
            launches on a GPU, which meanwhile take under 1 % of the memory of query, key and value
            where there are many tokens.
        keep_rejected: Of ``rectified``: where the mean of a block is too poor to be added, its
            share goes to the exact keys, as in the published code; False leaves it out, as the
            paper writes.

    Raises:
        ValueError: A field is outside its range.
    """

    kind: str = "gaussian"
    bins: int = 8
    variance_weight: float = 0.5
    slope: str = "head"
    fit: int | None = None
    keep_rejected: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tail must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.slope not in SLOPES:
            raise ValueError(f"slope must be one of {', '.join(SLOPES)}, got {self.slope!r}")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")
        if self.fit is not None and (
            not isinstance(self.fit, int) or not 0 <= self.fit <= contract.MAX_FIT_ROWS
        ):
            raise ValueError(
                f"fit must be a number of rows from 0 to {contract.MAX_FIT_ROWS}, or None,"
                f" got {self.fit!r}"
            )
        if self.fit and not self._may_fit:
            raise ValueError(
                "fit concerns the tails first_order and gaussian with slope='head' alone,"
                f" got {self.fit} for {self.kind} with slope={self.slope!r}"
            )
        if not self.keep_rejected and self.kind != "rectified":
            raise ValueError(
                f"keep_rejected concerns the tail rectified alone, got False for {self.kind}"
            )
        if not self.variance_weight >= 0:
            raise ValueError(f"variance_weight must not be negative, got {self.variance_weight}")

    @property
    def _may_fit(self) -> bool:
        return self.kind in ("first_order", "gaussian") and self.slope == "head"

    @property
    def fit_rows(self) -> int:
        """Rows that mass and slope are fitted to; 0 for none."""
        if self.fit is None:
            return contract.MAX_FIT_ROWS if self._may_fit else 0
        return self.fit

    @property
    def mass_weight(self) -> float:
        """The operator's ``variance_weight``."""
        return self.variance_weight if self.kind == "gaussian" else 0.0

    def representatives(
        self, selection: Selection, exact: Tensor, key: Tensor, value: Tensor, block_kv: int
    ) -> Representatives:
        """Aggregate the blocks that ``exact`` leaves out.

        Args:
            selection: What the policy saw.
            exact: Boolean ``[B, H, Nq, Nk]``, what it chose.
            key: ``[B, H, Lk, D]``.
            value: ``[B, H, Lk, Dv]``.
            block_kv: Keys in a block.

        Returns:
            Tensors in the dtype of ``key`` (``log_size`` in float32).

        Raises:
            ValueError: The tail is ``rectified``, which has none.
        """
        if self.kind == "rectified":
            raise ValueError(
                "tail rectified has no representatives: it needs uta::rectified_attention"
            )
        if self.kind == "none":
            return _absent(key, value)
        if self.kind in ("normalizer", "single", "bins"):
            return self._grouped(selection, exact, key, value)
        statistics, absent = selection.statistics, _absent(key, value)
        blocks = absent._replace(
            key=statistics.key_mean,
            value=statistics.value_mean,
            log_size=statistics.log_size,
        )
        if self.kind == "block":
            return blocks
        if self.fit_rows:
            arguments = self.fit_arguments(selection, exact, key, value)
            log_size, slope = ops.fitted_tail(*arguments)
            blocks = blocks._replace(log_size=log_size)
        elif self.slope == "head":
            slope = rounded(statistics.covariance[:, :, None], key.dtype)
        else:
            slope = _slope_of_query_blocks(selection, exact, key, value, block_kv)
            slope = rounded(slope, key.dtype)
        return blocks._replace(variance=statistics.key_variance, slope=slope)

    def fit_arguments(
        self, selection: Selection, exact: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Any, ...]:
        """Arguments of ``uta::fit_tail``; arguments as in ``representatives``."""
        statistics = selection.statistics
        if statistics.size.dim() == 3:  # blocks of clusters hold padding
            counts = statistics.size.int()
        else:
            counts = exact.new_empty((*exact.shape[:2], 0), dtype=torch.int32)
        return (
            selection.query, key, value, exact, counts,
            statistics.key_mean, statistics.key_variance, statistics.value_mean,
            statistics.log_size, statistics.covariance,
            selection.scale, self.mass_weight, self.fit_rows, selection.block_q, selection.block_kv,
        )  # fmt: skip

    def rectification(self, selection: Selection, exact: Tensor) -> Rectification:
        """What a tail ``rectified`` makes of the output; arguments as in ``representatives``."""
        return rectification(selection, exact, keep_rejected=self.keep_rejected)

    def _grouped(
        self, selection: Selection, exact: Tensor, key: Tensor, value: Tensor
    ) -> Representatives:
        """Representatives of groups of blocks: ``[B, H, Nq, R, D]``."""
        statistics = selection.statistics
        sizes = statistics.size.unsqueeze(-2) * ~exact  # [B, H, Nq, Nk], 0 where exact
        if self.kind == "bins":
            groups = _bin_by_logit(_pooled_logits(selection), exact, self.bins)
            members = groups[..., None, :] == torch.arange(self.bins, device=key.device)[:, None]
            sizes = sizes[..., None, :] * members  # [B, H, Nq, R, Nk]
        else:
            sizes = sizes[..., None, :]
        total = sizes.sum(-1)
        share = (sizes / total.clamp(min=1)[..., None]).flatten(2, 3)  # [B, H, Nq * R, Nk]
        mean_key, mean_value = (
            (share @ mean.float()).unflatten(2, total.shape[2:])
            for mean in (statistics.key_mean, statistics.value_mean)
        )
        if self.kind == "normalizer":
            mean_value = torch.zeros_like(mean_value)
        return _absent(key, value)._replace(
            key=mean_key.to(key.dtype), value=mean_value.to(key.dtype), log_size=total.log()
        )


def _absent(key: Tensor, value: Tensor) -> Representatives:
    """No representative, no variance, no slope."""
    batch, heads, _, dim = key.shape
    dim_v = value.shape[-1]
    return Representatives(
        key=key.new_empty((batch, heads, 0, dim)),
        value=key.new_empty((batch, heads, 0, dim_v)),
        log_size=key.new_empty((batch, heads, 0), dtype=torch.float32),
        variance=key.new_empty((batch, heads, 0, dim)),
        slope=key.new_empty((batch, heads, 0, dim, dim_v)),
    )


def _pooled_logits(selection: Selection) -> Tensor:
    """Mean query times mean key, scaled: float32 ``[B, H, Nq, Nk]``."""
    means = query_means(selection.query, selection.block_q) * selection.scale
    return means @ selection.statistics.key_mean.float().mT


def _bin_by_logit(logits: Tensor, exact: Tensor, bins: int) -> Tensor:
    """Cut each row's range of tail logits into equal intervals: int64 ``[B, H, Nq, Nk]``."""
    low = logits.masked_fill(exact, torch.inf).amin(-1, keepdim=True)
    high = logits.masked_fill(exact, -torch.inf).amax(-1, keepdim=True)
    position = (logits - low) / (high - low).clamp(min=1e-20)  # a row without tail gives garbage,
    return (position * bins).nan_to_num(0.0).clamp(0, bins - 1).long()  # which no member reads


def _slope_of_query_blocks(
    selection: Selection, exact: Tensor, key: Tensor, value: Tensor, block_kv: int
) -> Tensor:
    """Covariances averaged by pooled tail attention: float32 ``[B, H, Nq, D, Dv]``."""
    statistics = selection.statistics
    covariances = block_covariances(key, value, statistics, block_kv)
    logits = _pooled_logits(selection) + statistics.log_size[:, :, None]
    weights = logits.masked_fill(exact, -torch.inf).softmax(-1).nan_to_num(0.0)  # row without tail
    return (weights @ covariances.flatten(3)).unflatten(3, covariances.shape[3:])
