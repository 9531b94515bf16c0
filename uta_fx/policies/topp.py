"""Keep, in each row, the fewest blocks that hold a given share of its attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from uta_fx.policies.base import Selection, share_of
from uta_fx.policies.topk import pooled_attention


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopP:
    """Keep the blocks of highest pooled attention until they hold the share ``mass``.

    The nucleus of each row, ranked by block means as ``TopK`` ranks: SVG2 (arXiv:2505.18875) and
    SpargeAttn (arXiv:2502.18137) select so. A flat row keeps many blocks and a peaked one few;
    ``Config.density`` is the most that a row keeps, and ``Config.budget`` has no effect.

    Attributes:
        mass: Share of a row's pooled attention, in (0, 1].
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
        return nucleus(pooled_attention(selection), self.mass, self.least, selection.density)


def check_nucleus(mass: float, least: float) -> None:
    """Raise for what is outside the range of a field of that name.

    Raises:
        ValueError: It is.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    if not 0 <= least <= 1:
        raise ValueError(f"least must be in [0, 1], got {least}")


def nucleus(attention: Tensor, mass: float, least: float, density: float) -> Tensor:
    """The fewest blocks of each row that hold ``mass``.

    Args:
        attention: ``[B, H, Nq, Nk]``; a row sums to 1.
        mass: In (0, 1].
        least: Share of a row's blocks that it keeps in any case.
        density: Share of a row's blocks that it keeps at most.

    Returns:
        Boolean ``[B, H, Nq, Nk]``.
    """
    blocks = attention.shape[-1]
    most = share_of(density, blocks)
    ranked, order = attention.topk(most, dim=-1)
    # a block is kept where those above it hold less than the share
    above = ranked.cumsum(-1) - ranked
    rank = torch.arange(most, device=attention.device)
    kept = (above < mass) | (rank < share_of(least, blocks))
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, kept)
