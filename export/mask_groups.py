"""Tokens that a mask does not tell apart, in blocks of their own: masks become ones of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from uta_fx.export.clusters import clustered_attention

BLOCK = 64
MAX_RUNS = 1024  # of queries that see the same keys; more would be hardly any blocks


class MaskGroups(NamedTuple):
    """Queries that see the same keys, and keys that the same queries see, each in whole blocks.

    Attributes:
        queries: int64 ``[Nq * BLOCK]``, the token in each row; in a row of padding any of its
            block's.
        places: int64 ``[L]``, the row of each query.
        keys: int64 ``[Nk * BLOCK]``, as ``queries``, without keys that nobody sees.
        key_counts: int32 ``[Nk]``, keys in each block; they come first in it.
        ids: int32 ``[Nq, M]``, the key blocks that each query block sees.
        counts: int32 ``[Nq]``, how many of these count.
    """

    queries: Tensor
    places: Tensor
    keys: Tensor
    key_counts: Tensor
    ids: Tensor
    counts: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Masked attention ``[B, H, L, Dv]`` as one ``uta::sparse_attention``.

        A row that sees nothing is zero.

        Args:
            query: ``[B, H, L, D]``.
            key: ``[B, H, Lk, D]``.
            value: ``[B, H, Lk, Dv]``.
            scale: Multiplies the logits.
        """
        batch, heads, _, dim = query.shape
        rows, keys, values = (
            x.index_select(2, index)
            for x, index in ((query, self.queries), (key, self.keys), (value, self.keys))
        )
        ids, counts, key_counts = (
            x.expand(batch, heads, *x.shape) for x in (self.ids, self.counts, self.key_counts)
        )
        none, sums = rows[:, :, :0], torch.float32
        output, _ = clustered_attention(
            rows, keys, values, ids, counts, key_counts,
            none, values[:, :, :0], query.new_empty(batch, heads, 0, dtype=sums), none,
            query.new_empty(batch, heads, 0, dim, value.shape[-1]), scale, 0.0, BLOCK, BLOCK,
        )  # fmt: skip
        return output.index_select(2, self.places)


def group_tokens(shown: Iterable[Tensor]) -> MaskGroups | None:
    """Group the tokens of a mask.

    Args:
        shown: The mask, boolean: some rows ``[n, Lk]`` after others.

    Returns:
        None where blocks of the groups would hold no fewer pairs than the whole mask has.
    """
    starts: list[int] = []
    patterns: list[Tensor] = []
    done, last = 0, None
    for rows in shown:
        before = torch.cat([~rows[:1] if last is None else last, rows[:-1]])
        new = (rows != before).any(1).nonzero()[:, 0]
        starts += (new + done).tolist()
        patterns += rows[new].unbind()
        if len(patterns) > MAX_RUNS:
            return None
        done, last = done + len(rows), rows[-1:].clone()
    lengths = torch.tensor([*starts[1:], done]) - torch.tensor(starts)
    kinds, run_kinds = torch.stack(patterns).unique(dim=0, return_inverse=True)
    columns, key_kinds = kinds.T.unique(dim=0, return_inverse=True)
    queries, places, _, query_group = _in_blocks(run_kinds.repeat_interleave(lengths))
    keys, _, key_counts, key_group = _in_blocks(key_kinds)
    exact = columns.T[query_group][:, key_group]
    if int(exact.sum()) * BLOCK**2 >= done * len(key_kinds):
        return None
    seen = exact.any(0)
    exact, counts = exact[:, seen], exact.sum(1, dtype=torch.int32)
    ids = exact.int().argsort(dim=1, descending=True, stable=True)[:, : max(int(counts.max()), 1)]
    return MaskGroups(
        queries.flatten(), places, keys[seen].flatten(), key_counts[seen], ids.int(), counts
    )


def _in_blocks(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay tokens of each kind out in whole blocks.

    Args:
        kinds: int64 ``[L]``; every number up to the largest is there.

    Returns:
        The token in each row ``[N, BLOCK]``, the row of each token ``[L]``, int32 ``[N]`` how many
        tokens each block has, and its kind ``[N]``.
    """
    order, sizes = kinds.argsort(stable=True), kinds.bincount()
    taken = (sizes + BLOCK - 1) // BLOCK
    first_block, first_token = taken.cumsum(0) - taken, sizes.cumsum(0) - sizes
    kind = torch.arange(len(sizes)).repeat_interleave(taken)
    done = (torch.arange(len(kind)) - first_block[kind]) * BLOCK
    count = (sizes[kind] - done).clamp(max=BLOCK)
    row = torch.arange(BLOCK).minimum(count[:, None] - 1)
    token = order[(first_token[kind] + done)[:, None] + row]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(kinds)) + (first_block * BLOCK - first_token)[kinds[order]]
    return token, place, count.int(), kind
