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
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be in (0, 1], got {self.mass}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be in [0, 1], got {self.least}")

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        attention = pooled_attention(selection)
        blocks = attention.shape[-1]
        most = share_of(selection.density, blocks)
        ranked, order = attention.topk(most, dim=-1)
        # a block is kept where those above it hold less than the share
        above = ranked.cumsum(-1) - ranked
        rank = torch.arange(most, device=attention.device)
        kept = (above < self.mass) | (rank < share_of(self.least, blocks))
        return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, kept)
