"""Selections that know the true attention: what practical ones could gain at most."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from uta_fx.policies.base import Selection, spend_budget
from uta_fx.policies.topp import check_nucleus, nucleus


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OracleTopK:
    """Keep the blocks that truly hold most attention, averaged over the rows of a query block.

    For study: scoring takes as long as dense attention, a query block at a time.
    """

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        scores = true_scores(selection, power=0.0)
        return spend_budget(scores, selection.density, selection.budget)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OracleTopP:
    """Keep, in each row, the fewest blocks that truly hold a given share of its attention.

    For study. ``TopP`` with the true attention in place of the pooled one: ``Config.density`` is
    the most that a row keeps, and ``Config.budget`` has no effect.

    Attributes:
        mass: Share of a row's attention, in (0, 1].
        least: Share of a row's blocks that it keeps in any case, in [0, 1]; never none.

    Raises:
        ValueError: A field is outside its range.
    """

    mass: float = 0.9
    least: float = 0.0

    def __post_init__(self) -> None:
        check_nucleus(self.mass, self.least)

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        attention = true_scores(selection, power=0.0)
        return nucleus(attention, self.mass, self.least, selection.density)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OracleLowDelta:
    """Keep the blocks that would truly err most, by the rule of ``LowDelta``.

    For study. Each row's true attention on a block, times the true variance of its logits there,
    averaged over the rows of a query block, times the deviation of the block's values.

    Attributes:
        power: Exponent of the variance; at least 0.
        value_power: Exponent of the values' deviation; at least 0.

    Raises:
        ValueError: A field is negative.
    """

    power: float = 1.0
    value_power: float = 1.0

    def __post_init__(self) -> None:
        for name in ("power", "value_power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        scores = true_scores(selection, self.power)
        spread = selection.statistics.value_variance ** (self.value_power / 2)
        return spend_budget(scores * spread[:, :, None], selection.density, selection.budget)


def true_scores(selection: Selection, power: float) -> Tensor:
    """True attention of rows on blocks, weighted and averaged: float32 ``[B, H, Nq, Nk]``.

    Args:
        selection: The site.
        power: Exponent of the variance of a row's logits in a block, the weight; 0 for none.
    """
    key = selection.key.float().mT
    scores = []
    for rows in selection.query.split(selection.block_q, 2):
        logits = (rows.float() * selection.scale) @ key  # [B, H, block_q, L]
        parts = []
        for attention, part in zip(
            _blocks(logits.softmax(-1), selection.block_kv),
            _blocks(logits, selection.block_kv),
            strict=True,
        ):
            score = attention.sum(-1)  # [B, H, block_q, n]
            parts.append(score * part.var(-1, correction=0) ** power if power else score)
        scores.append(torch.cat(parts, -1).mean(2))
    return torch.stack(scores, 2)


def _blocks(x: Tensor, block: int) -> list[Tensor]:
    """``[..., L]`` as its whole blocks ``[..., n, block]`` and its ragged one, if any."""
    whole = x.shape[-1] // block * block
    parts = [x[..., :whole].unflatten(-1, (-1, block))] if whole else []
    if whole < x.shape[-1]:
        parts.append(x[..., None, whole:])
    return parts
