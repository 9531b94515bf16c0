"""The operators on a CPU, from PyTorch's own primitives.

Sparse attention gathers, attends and merges. Query blocks that list equally many key blocks are
taken together, so that a group is a dense batch without padding: its key blocks are gathered and
handed to PyTorch's flash attention for CPUs. The tail is a few matrix products. The two parts, each
with its log-sum-exp, are one softmax after the merge.

Whatever has a number for each row and key block is computed head by head, in pieces that stay in
the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uta_fx.kernels import reference
from uta_fx.kernels.ops import empty_outputs
from uta_fx.kernels.reference import (
    gather_tokens,
    join_text,
    listed_blocks,
    pooled_variance,
    score_dtype,
    split_blocks,
    text_arguments,
    text_as_tail,
    text_bias,
    weigh_scores,
)

# the reference's are those for CPUs too
__all__ = ["gather_tokens", "join_text", "text_bias", "weigh_scores"]

# query blocks in a group at most: enough to feed every core, few enough that the gathered keys
# stay in the cache
GROUP = 16
# numbers in a piece at most, where there is one for each row and key block
PIECE = 1 << 20


def sparse_attention(
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
    *,
    key_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``reference.sparse_attention`` for CPU tensors; arguments and results as there.

    Raises:
        ValueError: A listed id lies outside ``[0, Nk)``, or a count outside ``[0, M]``.
    """
    output, lse = empty_outputs(query, value)
    exact, exact_lse = _attend(
        query, key, value, block_ids, block_counts,
        (tail_key, tail_value, tail_log_size, tail_variance, tail_slope),
        scale, variance_weight, block_q, block_kv, key_counts,
    )  # fmt: skip
    output.copy_(exact.flatten(2, 3)[:, :, : query.shape[2]])
    lse.copy_(exact_lse.flatten(2, 3)[:, :, : query.shape[2]])
    return output, lse


def block_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, exact: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute ``reference.block_masked_attention`` for CPU tensors; as there."""
    return sparse_attention(query, key, value, *list_blocks(exact), *rest)


def rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    gain: Tensor,
    offset: Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
) -> Tensor:
    """Compute ``reference.rectified_attention`` for CPU tensors; arguments and result as there.

    Raises:
        ValueError: As ``sparse_attention``.
    """
    output, _ = empty_outputs(query, value)
    tail = text_as_tail(query, text_key, text_value, text_bias, block_q)
    exact, _ = _attend(
        query, key, value, block_ids, block_counts, tail, scale, 0.0, block_q, block_kv
    )
    exact = torch.addcmul(offset[..., None, :], exact.float(), gain[..., None, None])
    return output.copy_(exact.flatten(2, 3)[:, :, : query.shape[2]])


def text_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute ``reference.text_attention`` for CPU tensors; arguments and results as there."""
    return sparse_attention(*text_arguments(*args))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    tail: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
    key_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Nq, block_q, Dv]`` and log-sum-exp of blocks; ``tail`` as in the operator."""
    tail_key, tail_value, tail_log_size, tail_variance, tail_slope = tail
    blocks_kv = -(-key.shape[2] // block_kv)
    _check_lists(block_ids, block_counts, blocks_kv)
    blocks = _into_blocks(query, block_q)  # [B, H, Nq, block_q, D]
    exact, exact_lse = _attend_listed(
        blocks, key, value, block_ids, block_counts, scale, block_kv, key_counts
    )
    if tail_key.shape[-2]:
        bias = tail_log_size
        if tail_key.dim() == 4:
            listed, _ = listed_blocks(block_ids, block_counts, blocks_kv)
            bias = tail_log_size[:, :, None].masked_fill(listed, -torch.inf)
        sigma2 = pooled_variance(query, tail_variance, scale, block_q)
        tail = (tail_key, tail_value, bias, sigma2, tail_slope)
        _add_tail(exact, exact_lse, blocks, tail, scale, variance_weight)
    return exact, exact_lse


def _check_lists(block_ids: Tensor, block_counts: Tensor, blocks_kv: int) -> None:
    width = block_ids.shape[-1]
    if block_counts.numel() and not 0 <= block_counts.min() <= block_counts.max() <= width:
        raise ValueError(
            f"block_counts must lie in [0, {width}], the width of block_ids,"
            f" got {int(block_counts.min())} to {int(block_counts.max())}"
        )
    used = torch.arange(width) < block_counts[..., None]
    ids = block_ids[used]
    if ids.numel() and not 0 <= ids.min() <= ids.max() < blocks_kv:
        raise ValueError(
            f"block_ids must lie in [0, {blocks_kv}), the number of key blocks,"
            f" got {int(ids.min())} to {int(ids.max())}"
        )


def _into_blocks(x: Tensor, block: int) -> Tensor:
    """``[B, H, L, D] -> [B, H, ceil(L / block), block, D]``; rows past the end are zero."""
    missing = -x.shape[2] % block
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, block))


def _attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    scale: float,
    block_kv: int,
    key_counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the listed blocks alone: ``[B, H, Nq, block_q, Dv]`` and its log-sum-exp."""
    batch, heads, blocks_q, block_q, dim = query.shape
    dim_v = value.shape[-1]
    if dim != dim_v:  # the flash operator wants one head dim; zeros change neither product
        query, key = (F.pad(x, (0, max(dim_v - dim, 0))) for x in (query, key))
        value = F.pad(value, (0, max(dim - dim_v, 0)))
    keys, values = (_into_blocks(x, block_kv).flatten(0, 2) for x in (key, value))
    blocks_kv = -(-key.shape[2] // block_kv)
    dims = key.shape[3]
    counts = _keys_in_blocks(key, block_kv) if key_counts is None else key_counts
    counts = counts.expand(batch, heads, -1).flatten()
    rows = query.flatten(0, 2)[:, None]  # [B * H * Nq, 1, block_q, D]
    output = rows.new_zeros((*rows.shape[:-1], value.shape[-1])).squeeze(1)
    lse = rows.new_full(output.shape[:-1], -torch.inf, dtype=torch.float32)

    head = torch.arange(batch * heads).repeat_interleave(blocks_q) * blocks_kv
    ids = block_ids.flatten(0, 2).long()
    # gathered blocks lie where those of the group before lay
    places = GROUP * int(block_counts.max()) if block_counts.numel() else 0
    some_keys, some_values = (x.new_empty((places, *x.shape[1:])) for x in (keys, values))
    for count, group in _groups(block_counts.flatten()):
        local = ids[group, :count]
        flat = (head[group, None] + local).flatten()
        k, v = (
            torch.index_select(x, 0, flat, out=some[: len(flat)]).view(len(group), 1, -1, dims)
            for x, some in ((keys, some_keys), (values, some_values))
        )
        bias, true = None, counts[flat]
        if (true < block_kv).any():
            outside = torch.arange(block_kv) >= true[:, None]
            bias = query.new_zeros(outside.shape).masked_fill_(outside, -torch.inf)
            bias = bias.view(len(group), 1, 1, -1).expand(-1, -1, block_q, -1)
        # the operator behind F.scaled_dot_product_attention, called by name for its log-sum-exp;
        # it reads rows as if they were contiguous
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[group].contiguous(), k, v, attn_mask=bias, scale=scale
        )
        output[group], lse[group] = part.squeeze(1), part_lse.view(len(group), block_q)
        empty = group[true.view(len(group), count).amax(1) == 0]
        output[empty], lse[empty] = 0, -torch.inf
    shape = (batch, heads, blocks_q, block_q)
    return output.view(*shape, -1)[..., :dim_v], lse.view(shape)


def _groups(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Query blocks that list equally many key blocks: that number, and their indices."""
    ordered, order = counts.sort(descending=True, stable=True)
    values, sizes = ordered.unique_consecutive(return_counts=True)
    for count, equal in zip(values.tolist(), order.split(sizes.tolist()), strict=True):
        if count:
            for group in equal.split(GROUP):
                yield count, group


def _keys_in_blocks(key: Tensor, block_kv: int) -> Tensor:
    """int64 ``[Nk]``; only the last can be ragged."""
    return (key.shape[2] - torch.arange(0, key.shape[2], block_kv)).clamp(max=block_kv)


def _add_tail(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    tail: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    variance_weight: float,
) -> None:
    """Take the tail into the softmax of ``output`` and ``lse``, in place.

    Args:
        output: ``[B, H, Nq, block_q, Dv]``, attention over the listed blocks.
        lse: float32 ``[B, H, Nq, block_q]``, of the same.
        query: ``[B, H, Nq, block_q, D]``.
        tail: Key, value, bias ``[B, H, Nq, R]`` (-inf: not in the tail), sigma2 of each pair of
            blocks (float32 ``[B, H, Nq, Nk]``, or Nk of 0 for none) and slope.
        scale: s.
        variance_weight: As in the operator.
    """
    block_q, representatives = query.shape[3], tail[0].shape[-2]
    for b, h, piece in _pieces(query.shape[:3], block_q * representatives):
        key, value, bias, sigma2, slope = (x[b, h] for x in tail)
        if key.dim() == 3:  # representatives of each query block
            key, value = key[piece], value[piece]
        if slope.shape[0] > 1:
            slope = slope[piece]
        part, part_lse = _attend_tail(
            query[b, h, piece].float() * scale, key.float(), value.float(), bias[piece],
            sigma2[piece], slope.float(), variance_weight,
        )  # fmt: skip
        _merge(output[b, h, piece], lse[b, h, piece], part, part_lse)


def _pieces(blocks: Sequence[int], numbers: int) -> Iterator[tuple[int, int, slice]]:
    """Sample, head and query blocks of each piece; ``numbers`` is how many a block has."""
    batch, heads, blocks_q = blocks
    size = max(1, PIECE // numbers)
    for b, h in itertools.product(range(batch), range(heads)):
        for first in range(0, blocks_q, size):
            yield b, h, slice(first, first + size)


def _attend_tail(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    sigma2: Tensor,
    slope: Tensor,
    variance_weight: float,
) -> tuple[Tensor, Tensor]:
    """Softmax over the representatives of one head alone, and its log-sum-exp.

    Args:
        rows: float32 ``[N, block_q, D]``, scaled.
        key: ``[R, D]`` or ``[N, R, D]``.
        value: ``[R, Dv]`` or ``[N, R, Dv]``.
        bias: ``[N, R]``.
        sigma2: float32 ``[N, R]``, or ``[N, 0]`` for none.
        slope: ``[1, D, Dv]`` or ``[N, D, Dv]``, or empty for none.
        variance_weight: As in the operator.
    """
    if sigma2.shape[1]:
        bias = bias + variance_weight / 2 * sigma2
    weights = (rows @ key.mT).add_(bias[:, None])  # [N, block_q, R], the logits
    # a row whose tail is empty has lse -inf; subtracting 0 instead leaves its weights zero
    highest = weights.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
    total = weights.sub_(highest).exp_().sum(-1, keepdim=True)
    output = weights @ value
    if slope.shape[0]:
        damping = 1 / (1 + sigma2) if sigma2.shape[1] else torch.ones_like(bias)
        output.addcmul_(weights @ damping[..., None], rows @ slope)
    lse = highest.add_(total.log()).squeeze(-1)
    return output.div_(total.clamp_(min=torch.finfo(total.dtype).tiny)), lse


def _merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Two softmaxes over disjoint keys as one, in place; rows that see nothing stay zero."""
    merged = torch.logaddexp(lse, other_lse)
    base = merged.nan_to_num(neginf=0.0)
    share, other_share = ((x - base).exp()[..., None] for x in (lse, other_lse))
    output.copy_(other.mul_(other_share).addcmul_(output.float(), share))  # rounded once
    lse.copy_(merged)


def clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute ``reference.clustered_attention`` for CPU tensors; arguments and results as there.

    Raises:
        ValueError: As ``sparse_attention``.
    """
    return sparse_attention(*args[:5], *args[6:], key_counts=args[5])


def block_scores(
    query: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    log_size: Tensor,
    scale: float,
    variance_weight: float,
    variance_power: float,
    block_q: int,
    rows: int,
) -> Tensor:
    """Compute ``reference.block_scores`` for CPU tensors; arguments and result as there."""
    mean, square = [], []
    for group in split_blocks(query, rows):  # [B, H, n, rows, D]
        scaled = group.float() * scale
        mean.append(scaled.mean(3))
        square.append(scaled.square_().mean(3))
    groups, squares = torch.cat(mean, 2), torch.cat(square, 2)
    parts = []
    of_block = block_q // rows
    for blocks, of_squares in zip(
        split_blocks(groups, of_block), split_blocks(squares, of_block), strict=True
    ):  # [B, H, Nq, of_block, D]
        scores = query.new_empty(
            (*blocks.shape[:3], key_mean.shape[2]), dtype=score_dtype(query.dtype)
        )
        for b, h, piece in _pieces(blocks.shape[:3], blocks.shape[3] * key_mean.shape[2]):
            logits = (blocks[b, h, piece] @ key_mean[b, h].float().mT).add_(log_size[b, h])
            sigma2 = of_squares[b, h, piece] @ key_variance[b, h].float().mT  # [N, of_block, Nk]
            if variance_weight:
                error = logits.log_softmax(-1).add_(sigma2, alpha=variance_weight / 2).exp_()
            else:
                error = logits.softmax(-1)
            if variance_power:
                error.mul_(sigma2 if variance_power == 1 else sigma2.pow_(variance_power))
            scores[b, h, piece] = error.square_().mean(1).sqrt_()
        parts.append(scores)
    return torch.cat(parts, 2)


def select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    """Compute ``reference.select_blocks`` for CPU tensors; arguments and result as there."""
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    best = torch.zeros_like(scores, dtype=torch.bool)
    wanted = kept
    if rows > 1:
        best.scatter_(-1, scores.argmax(-1, keepdim=True), True)
        scores.masked_fill_(best, -torch.inf)
        wanted -= rows
    mask, others = (x.reshape(-1, rows * x.shape[-1]) for x in (best, scores))
    if wanted:
        threshold = others.topk(wanted, sorted=False).values.amin(-1, keepdim=True)
        chosen = mask | (others >= threshold)
        if chosen.sum() > kept * len(chosen):  # scores equal to a threshold: the first of them
            mask = mask | (others > threshold)
            tied = chosen & ~mask
            chosen = mask | (tied & (tied.cumsum(-1) <= kept - mask.sum(-1, keepdim=True)))
        mask = chosen
    return mask.view(scores.shape)


def list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``reference.list_blocks`` for CPU tensors; argument and results as there."""
    blocks = exact.shape[-1]
    position = exact.cumsum(-1, dtype=torch.int32)
    # a block that is not listed writes to one column too many
    target = torch.where(exact, position - 1, blocks).long()
    listed = torch.zeros((*exact.shape[:-1], blocks + 1), dtype=torch.int32)
    listed.scatter_(-1, target, torch.arange(blocks, dtype=torch.int32).expand(exact.shape))
    return listed[..., :blocks].contiguous(), position[..., -1].contiguous()


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``reference.kmeans`` for CPU tensors; arguments and results as there."""
    batch, heads, length, _ = tokens.shape
    clusters = centroids.shape[2]
    labels = torch.empty((batch, heads, length), dtype=torch.int32)
    sizes = torch.empty((batch, heads, clusters), dtype=torch.int32)
    centroids = centroids.clone(memory_format=torch.contiguous_format)
    rows = max(1, PIECE // clusters)
    for b, h in itertools.product(range(batch), range(heads)):
        x, means = tokens[b, h].float(), centroids[b, h]
        for _ in range(iterations):
            norms = means.square().sum(-1)
            nearest = torch.cat(
                [torch.addmm(norms, part, means.T, alpha=-2).argmin(-1) for part in x.split(rows)]
            )
            size = torch.bincount(nearest, minlength=clusters)
            total = torch.zeros_like(means).index_add_(0, nearest, x)
            torch.where(size[:, None] > 0, total / size.clamp(min=1)[:, None], means, out=means)
        labels[b, h], sizes[b, h] = nearest, size
    return labels, centroids, sizes


def block_statistics(
    key: Tensor, value: Tensor, block_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``reference.block_statistics`` for CPU tensors; arguments and results as there."""
    batch, heads, length, _ = key.shape
    of_heads = [
        _head_statistics(key[b : b + 1, h : h + 1], value[b : b + 1, h : h + 1], block_kv)
        for b, h in itertools.product(range(batch), range(heads))
    ]
    mean, variance, value_mean, value_variance, covariance = (
        torch.cat(results).unflatten(0, (batch, heads)) for results in zip(*of_heads, strict=True)
    )
    mean, variance, value_mean = (
        reference.rounded(x, key.dtype) for x in (mean, variance, value_mean)
    )
    return mean, variance, value_mean, value_variance, covariance / length


def _head_statistics(key: Tensor, value: Tensor, block_kv: int) -> tuple[Tensor, ...]:
    """As ``block_statistics`` for one head, ``[1, ...]``; the covariance is a sum over tokens."""
    pooled = []
    covariance = key.new_zeros((1, key.shape[-1], value.shape[-1]), dtype=torch.float32)
    blocks = zip(split_blocks(key, block_kv), split_blocks(value, block_kv), strict=True)
    for keys, values in blocks:
        keys, values = keys[0].float(), values[0].float()  # [1, n, block_kv, D]
        key_mean, value_mean = keys.mean(2), values.mean(2)
        deviation = keys - key_mean[:, :, None]
        # deviations of keys sum to zero in a block: the values' means need not be taken off
        covariance += deviation.flatten(1, 2).mT @ values.flatten(1, 2)
        key_variance = deviation.square_().mean(2)
        value_variance = (values - value_mean[:, :, None]).square_().mean(2).sum(-1)
        pooled.append((key_mean, key_variance, value_mean, value_variance))
    means = (torch.cat(parts, 1) for parts in zip(*pooled, strict=True))
    return (*means, covariance)


def fitted_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute ``reference.fitted_tail`` for CPU tensors; as ``fit_tail``."""
    return reference.by_factors(*fit_tail(*args), *args)


def fit_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute ``reference.fit_tail`` for CPU tensors, in float32; as there."""
    tensors, numbers = args[:10], args[10:]
    wide = (x.float() if x.is_floating_point() else x for x in tensors)
    return reference.fit_tail(*wide, *numbers)
