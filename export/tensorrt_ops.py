"""``uta::sparse_attention`` in two steps, each of which one kernel launch can do.

TensorRT's ahead-of-time plugins are one launch each, and may not write to their inputs. The
operators of this file exist in graphs for TensorRT alone: they have shapes and no kernels.
Importing this module needs torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uta_fx.kernels import ops  # noqa: F401  # defines uta::block_scores

_LIBRARY = torch.library.Library("uta", "FRAGMENT")
_LIBRARY.define(
    "attend_tail(Tensor query, Tensor listed, Tensor tail_key, Tensor tail_value,"
    " Tensor tail_log_size, Tensor tail_variance, Tensor tail_slope, float scale,"
    " float variance_weight, int block_q, int per_block, int has_variance, int has_slope)"
    " -> (Tensor output, Tensor lse)"
)
_LIBRARY.define(
    "attend_listed(Tensor query, Tensor key, Tensor value, Tensor block_ids, Tensor block_counts,"
    " Tensor start, Tensor start_lse, float scale, int block_q, int block_kv, int resume)"
    " -> (Tensor output, Tensor lse)"
)


class Kinds(NamedTuple):
    """A letter for each tensor: T of the model's dtype, S of its scores', F float32, I int32."""

    inputs: str
    outputs: str


PLUGINS = {
    "attend_tail": Kinds("TITTFTT", "TF"),
    "attend_listed": Kinds("TTTIITF", "TF"),
    "block_scores": Kinds("TTTF", "S"),
}
"""The operators that are plugins; each is one launch."""


def attend_in_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """What ``uta::sparse_attention`` is: attention over the tail, taken up by that over the lists.

    Arguments and results are those of ``uta_fx.kernels.reference.sparse_attention``. What is absent
    is stood for by a tensor that is there anyway and is not read: TensorRT's plugins take no empty
    tensors. A tail of rank 4 gets rank 5, and the map of what each row lists, int32
    ``[B, H, Nq, Nk]``, is made here.
    """
    if not block_ids.shape[-1]:
        block_ids = block_counts.unsqueeze(-1)
    start, start_lse = query, query.new_zeros(1, dtype=torch.float32)
    has_tail = tail_key.shape[-2] > 0
    if has_tail:
        per_block, listed = tail_key.dim() == 4, block_counts
        if per_block:
            listed = _map(block_ids, block_counts, -(-key.shape[2] // block_kv))
            tail_key, tail_value, tail_log_size = (
                x.unsqueeze(2) for x in (tail_key, tail_value, tail_log_size)
            )
        elif tail_key.stride(2) == tail_value.stride(2) == tail_log_size.stride(2) == 0:
            # all query blocks see the same
            tail_key, tail_value, tail_log_size = (
                x[:, :, :1] for x in (tail_key, tail_value, tail_log_size)
            )
        has_variance, has_slope = tail_variance.shape[2] > 0, tail_slope.shape[2] > 0
        start, start_lse = torch.ops.uta.attend_tail(
            query, listed, tail_key, tail_value, tail_log_size,
            tail_variance if has_variance else tail_key, tail_slope if has_slope else tail_value,
            scale, variance_weight, block_q, int(per_block), int(has_variance), int(has_slope),
        )  # fmt: skip
    output, lse = torch.ops.uta.attend_listed(
        query, key, value, block_ids, block_counts, start, start_lse,
        scale, block_q, block_kv, int(has_tail),
    )  # fmt: skip
    return output, lse


def _map(block_ids: Tensor, block_counts: Tensor, blocks: int) -> Tensor:
    """1 where a row lists a key block: int32 ``[B, H, Nq, Nk]``."""
    used = torch.arange(block_ids.shape[-1], device=block_ids.device) < block_counts[..., None]
    target = torch.where(used, block_ids, blocks).long()  # one column too many for the rest
    shape = (*block_ids.shape[:-1], blocks + 1)
    none = torch.zeros(shape, dtype=torch.int32, device=block_ids.device)
    return none.scatter(-1, target, 1)[..., :blocks]


def _fake_attend_tail(
    query: Tensor, listed: Tensor, tail_key: Tensor, tail_value: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    output = query.new_empty((*query.shape[:3], tail_value.shape[-1]))
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_attend_listed(
    query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    output = query.new_empty((*query.shape[:3], value.shape[-1]))
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


torch.library.register_fake("uta::attend_tail", _fake_attend_tail, lib=_LIBRARY)
torch.library.register_fake("uta::attend_listed", _fake_attend_listed, lib=_LIBRARY)
