"""Sparse attention on the CPU from PyTorch's own primitives: gather, flash attention, merge.

Query blocks that list equally many key blocks are taken together, so that a group is a dense batch
without padding: its key blocks are gathered and handed to PyTorch's flash attention for CPUs. The
tail is two small matrix products for all rows at once. The two parts, each with its log-sum-exp,
are one softmax after the merge.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from uta_fx.kernels.ops import empty_outputs
from uta_fx.kernels.reference import listed_blocks

# query blocks in a group at most: enough to feed every core, few enough that the gathered keys
# stay in the cache
GROUP = 16


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
) -> tuple[Tensor, Tensor]:
    """Compute ``reference.sparse_attention`` for CPU tensors; arguments and results as there.

    Raises:
        ValueError: A listed id lies outside ``[0, Nk)``, or a count outside ``[0, M]``.
    """
    output, lse = empty_outputs(query, value)
    length_q, blocks_kv = query.shape[2], -(-key.shape[2] // block_kv)
    _check_lists(block_ids, block_counts, blocks_kv)
    blocks = _into_blocks(query, block_q)  # [B, H, Nq, block_q, D]
    exact, exact_lse = _attend_listed(blocks, key, value, block_ids, block_counts, scale, block_kv)
    if tail_key.shape[-2]:
        listed = None
        if tail_key.dim() == 4:
            listed, _ = listed_blocks(block_ids, block_counts, blocks_kv)
        tail, tail_lse = _attend_tail(
            blocks, tail_key, tail_value, tail_log_size, tail_variance, tail_slope, listed,
            scale, variance_weight,
        )  # fmt: skip
        exact, exact_lse = _merge(exact, exact_lse, tail, tail_lse)
    output.copy_(exact.flatten(2, 3)[:, :, :length_q])
    lse.copy_(exact_lse.flatten(2, 3)[:, :, :length_q])
    return output, lse


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
) -> tuple[Tensor, Tensor]:
    """Softmax over the listed blocks alone: ``[B, H, Nq, block_q, Dv]`` and its log-sum-exp."""
    batch, heads, blocks_q, block_q, dim = query.shape
    dim_v = value.shape[-1]
    if dim != dim_v:  # the flash operator wants one head dim; zeros change neither product
        query, key = (F.pad(x, (0, max(dim_v - dim, 0))) for x in (query, key))
        value = F.pad(value, (0, max(dim - dim_v, 0)))
    keys, values = (_into_blocks(x, block_kv).flatten(0, 2) for x in (key, value))
    blocks_kv = -(-key.shape[2] // block_kv)
    ragged = key.shape[2] % block_kv
    rows = query.flatten(0, 2)[:, None]  # [B * H * Nq, 1, block_q, D]
    output = rows.new_zeros((*rows.shape[:-1], value.shape[-1])).squeeze(1)
    lse = rows.new_full(output.shape[:-1], -torch.inf, dtype=torch.float32)

    head = torch.arange(batch * heads).repeat_interleave(blocks_q) * blocks_kv
    ids = block_ids.flatten(0, 2).long()
    for count, group in _groups(block_counts.flatten()):
        local = ids[group, :count]
        flat = (head[group, None] + local).flatten()
        k = keys.index_select(0, flat).view(len(group), 1, count * block_kv, -1)
        v = values.index_select(0, flat).view(len(group), 1, count * block_kv, -1)
        bias = _ragged_bias(local == blocks_kv - 1, ragged, block_kv, query.dtype)
        if bias is not None:
            bias = bias.expand(-1, -1, block_q, -1)
        # the operator behind F.scaled_dot_product_attention, called by name for its log-sum-exp
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows[group], k, v, attn_mask=bias, scale=scale
        )
        output[group], lse[group] = part.squeeze(1), part_lse.view(len(group), block_q)
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


def _ragged_bias(last: Tensor, ragged: int, block_kv: int, dtype: torch.dtype) -> Tensor | None:
    """``[G, 1, 1, count * block_kv]``: -inf past the end of the keys; None where nothing is.

    Args:
        last: Boolean ``[G, count]``, True where the last key block is listed.
        ragged: Keys in the last block, 0 where it is whole.
        block_kv: Keys in a block.
        dtype: Of the result.
    """
    if not ragged or not last.any():
        return None
    beyond = last[..., None] & (torch.arange(block_kv) >= ragged)
    bias = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -torch.inf)
    return bias.flatten(1)[:, None, None]


def _attend_tail(
    query: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    listed: Tensor | None,
    scale: float,
    variance_weight: float,
) -> tuple[Tensor, Tensor]:
    """Softmax over the representatives alone, in float32, and its log-sum-exp."""
    blocks = query.shape[2:4]
    rows = query.flatten(2, 3).float() * scale  # [B, H, Nq * block_q, D]
    logits = _per_row(rows, tail_key.float().transpose(-1, -2), blocks)
    bias = tail_log_size if tail_log_size.dim() == 4 else tail_log_size[:, :, None]
    if listed is not None:
        bias = bias.masked_fill(listed, -torch.inf)
    logits.unflatten(2, blocks).add_(bias[..., None, :])
    damping = None
    if tail_variance.shape[2]:
        sigma2 = rows.square() @ tail_variance.float().transpose(-1, -2)
        if variance_weight:
            logits.add_(sigma2, alpha=variance_weight / 2)
        damping = sigma2.add_(1).reciprocal_()
    lse = logits.logsumexp(-1)
    # a row whose tail is empty has lse == -inf; subtracting 0 instead leaves its weights zero
    weights = logits.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_()
    output = _per_row(weights, tail_value.float(), blocks)
    if tail_slope.shape[2]:
        gain = (weights if damping is None else damping.mul_(weights)).sum(-1, keepdim=True)
        slope = tail_slope.float() if tail_slope.shape[2] > 1 else tail_slope[:, :, 0].float()
        output.addcmul_(gain, _per_row(rows, slope, blocks))
    return output.unflatten(2, blocks), lse.unflatten(2, blocks)


def _per_row(rows: Tensor, matrix: Tensor, blocks: torch.Size) -> Tensor:
    """``[B, H, Nq * block_q, X]`` times one matrix a head, or one for each query block (rank 5)."""
    if matrix.dim() == 4:
        return rows @ matrix
    return (rows.unflatten(2, blocks) @ matrix).flatten(2, 3)


def _merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one; rows that see nothing stay zero."""
    lse = torch.logaddexp(a_lse, b_lse)
    base = lse.nan_to_num(neginf=0.0)
    output = a.float() * (a_lse - base).exp()[..., None] + b * (b_lse - base).exp()[..., None]
    return output, lse
