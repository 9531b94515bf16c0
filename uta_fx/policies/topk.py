"""Keep the blocks that hold most attention, as pooled queries and keys estimate it."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from uta_fx.policies.base import Selection, spend_budget
from uta_fx.statistics import query_means


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Score softmax_b(s q_n.k_b + ln n_b) of block means: the selection of most public systems.

    SpargeAttn (arXiv:2502.18137), VSA and PISA (arXiv:2602.01077) select by it, with equal rows.
    """

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``."""
        return spend_budget(pooled_attention(selection), selection.density, selection.budget)


def pooled_attention(selection: Selection) -> Tensor:
    """Attention of each row as block means estimate it: float32 ``[B, H, Nq, Nk]``."""
    statistics = selection.statistics
    means = query_means(selection.query, selection.block_q) * selection.scale
    logits = means @ statistics.key_mean.float().mT + statistics.log_size[:, :, None]
    return logits.softmax(-1)
