"""What Rectified SpaAttn makes of pooled attention: shares, a gain test, a gain and an offset.

arXiv:2511.19835. Attention over the exact keys alone gives them too much weight and the others
none. Pooled attention says how much is missing: a query block's output is scaled by the share that
its exact keys should have, and the means of the other values are added by theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uta_fx.kernels.reference import split_blocks
from uta_fx.policies.base import Selection
from uta_fx.statistics import query_means


class PooledShares(NamedTuple):
    """Attention of query blocks as their means see it; a row sums to 1.

    Attributes:
        blocks: float32 ``[B, H, Nq, Nk]``.
        text: float32 ``[B, H, Nq, 1]``, of all text together; 0 where there is none.
    """

    blocks: Tensor
    text: Tensor


def pooled_shares(selection: Selection) -> PooledShares:
    """Isolated-pooling attention reallocation (IPAR).

    Keys of text are not pooled; a pooled block counts as often as it has keys, so that one softmax
    over ``s q.k_m + ln n_m`` and ``s q.k_t`` gives both their shares.
    """
    means = query_means(selection.query, selection.block_q)
    statistics = selection.statistics
    key = statistics.key_mean.float()
    logits = selection.scale * means @ key.mT + statistics.log_size[:, :, None]
    text = selection.scale * means @ selection.text_key.float().mT
    if selection.text_bias is not None:
        text = text + selection.text_bias
    shares = torch.cat([logits, text], -1).softmax(-1)
    blocks = logits.shape[-1]
    return PooledShares(shares[..., :blocks], shares[..., blocks:].sum(-1, keepdim=True))


def gains(selection: Selection) -> Tensor:
    """Gain-aware pooling rectification (GAPR): which pairs of blocks pooling tells enough of.

    With a and b the mean absolute deviations of a block's queries and keys, channel by channel,
    ``|q.k| > |a.k| + |q.b|``: what a mean pair is worth against what it misses to first order.

    Returns:
        Boolean ``[B, H, Nq, Nk]``.
    """
    query = query_means(selection.query, selection.block_q)
    key = selection.statistics.key_mean.float()
    spread_q = _mean_deviations(selection.query, selection.block_q, query)
    spread_k = _mean_deviations(selection.key, selection.block_kv, key)
    error = (spread_q @ key.mT).abs() + (query @ spread_k.mT).abs()
    return (query @ key.mT).abs() > error


def _mean_deviations(x: Tensor, block: int, means: Tensor) -> Tensor:
    """Mean absolute deviation of each channel in each block: float32 ``[B, H, N, D]``."""
    whole = x.shape[2] // block
    centers = [part for part in (means[:, :, :whole], means[:, :, whole:]) if part.shape[2]]
    return torch.cat(
        [
            (tokens.float() - center[:, :, :, None]).abs().mean(3)
            for tokens, center in zip(split_blocks(x, block), centers, strict=True)
        ],
        2,
    )


class Rectification(NamedTuple):
    """What becomes of a query block's output: ``gain * output + offset``.

    Attributes:
        gain: float32 ``[B, H, Nq]``.
        offset: float32 ``[B, H, Nq, Dv]``.
    """

    gain: Tensor
    offset: Tensor


def rectification(selection: Selection, exact: Tensor, *, keep_rejected: bool) -> Rectification:
    """Scale the exact part to its pooled share, and add the blocks that pass the gain test.

    Args:
        selection: The site.
        exact: Boolean ``[B, H, Nq, Nk]``; text is exact in any case.
        keep_rejected: Whether the exact part also gets the shares of blocks that fail the test.
    """
    shares = pooled_shares(selection)
    added = shares.blocks.masked_fill(exact | ~gains(selection), 0.0)
    if keep_rejected:
        gain = 1 - added.sum(-1)  # without the rounding of a second sum: together they are 1
    else:
        gain = (shares.blocks.masked_fill(~exact, 0.0).sum(-1, keepdim=True) + shares.text)[..., 0]
    return Rectification(gain, added @ selection.statistics.value_mean.float())
