"""What the operators take: raised before anything is launched, in terms of their arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uta_fx.kernels.reference import score_dtype, text_arguments, text_as_tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
BLOCK_SIZES = (16, 32, 64, 128)
MIN_GROUPS = 4  # of rows in a query block
MAX_FIT_ROWS = 16  # that a tail is fitted to: one tile of a matrix product
MAX_HEADS = 65535  # of all samples together on a GPU: what a grid of programs holds along this axis


def check_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    *rest: Any,
) -> None:
    """Raise for whatever is outside the operator's contract."""
    blocks_q, _ = _check_attention(query, key, value, *rest)
    lead = query.shape[:2]
    _check_shape("block_ids", block_ids, (*lead, blocks_q, block_ids.shape[-1]))
    _check_shape("block_counts", block_counts, (*lead, blocks_q))
    for name, tensor in (("block_ids", block_ids), ("block_counts", block_counts)):
        check_dtype(name, tensor, torch.int32)
        check_device(name, tensor, query)


def check_block_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, exact: Tensor, *rest: Any
) -> None:
    """Raise for whatever is outside the operator's contract."""
    blocks = _check_attention(query, key, value, *rest)
    if not key.shape[2]:
        raise ValueError("key must hold at least one token, got 0")
    _check_shape("exact", exact, (*query.shape[:2], *blocks))
    check_dtype("exact", exact, torch.bool)
    check_device("exact", exact, query)


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
) -> tuple[int, int]:
    """Raise for what does not concern which blocks are exact; how many blocks there are."""
    check_finite(scale=scale, variance_weight=variance_weight)
    _check_blocked("query", query, "block_q", block_q)
    _check_block_size("block_kv", block_kv)
    batch, heads, length_q, dim = query.shape
    length_kv, dim_v = key.shape[-2], value.shape[-1]
    _check_head_dim("value", value)
    blocks_q, blocks_kv = -(-length_q // block_q), -(-length_kv // block_kv)
    per_block = tail_key.dim() == 4
    lead = (batch, heads) if per_block else (batch, heads, blocks_q)
    representatives = tail_key.shape[-2]
    if per_block and representatives not in (0, blocks_kv):
        raise ValueError(
            f"tail_key of rank 4 must hold one representative for each of the {blocks_kv} key"
            f" blocks, or none, got {representatives}"
        )
    if tail_variance.shape[2] and not per_block:
        raise ValueError("tail_variance needs a tail_key of rank 4 [B, H, Nk, D], got rank 5")
    _check_shape("key", key, (batch, heads, length_kv, dim))
    _check_shape("value", value, (batch, heads, length_kv, dim_v))
    _check_shape("tail_key", tail_key, (*lead, representatives, dim))
    _check_shape("tail_value", tail_value, (*lead, representatives, dim_v))
    _check_shape("tail_log_size", tail_log_size, (*lead, representatives))
    variances = representatives if tail_variance.shape[2] else 0
    _check_shape("tail_variance", tail_variance, (batch, heads, variances, dim))
    slopes = tail_slope.shape[2]
    if slopes not in (0, 1, blocks_q):
        raise ValueError(
            f"tail_slope must hold 0, 1 or {blocks_q} slopes a head (none, one for the head, one"
            f" for each query block), got {slopes}"
        )
    _check_shape("tail_slope", tail_slope, (batch, heads, slopes, dim, dim_v))

    like_query = {
        "key": key,
        "value": value,
        "tail_key": tail_key,
        "tail_value": tail_value,
        "tail_variance": tail_variance,
        "tail_slope": tail_slope,
    }
    for name, tensor in like_query.items():
        check_dtype(name, tensor, query.dtype)
        check_device(name, tensor, query)
    check_dtype("tail_log_size", tail_log_size, torch.float32)
    check_device("tail_log_size", tail_log_size, query)
    return blocks_q, blocks_kv


def check_clustered_attention(*args: Any) -> None:
    """Raise for whatever is outside the operator's contract."""
    query, key, key_counts, block_kv = args[0], args[1], args[5], args[-1]
    check_sparse_attention(*args[:5], *args[6:])
    if key.shape[2] % block_kv:
        raise ValueError(
            f"key must have a length that is a multiple of block_kv, {block_kv}, got {key.shape[2]}"
        )
    _check_shape("key_counts", key_counts, (*query.shape[:2], key.shape[2] // block_kv))
    check_dtype("key_counts", key_counts, torch.int32)
    check_device("key_counts", key_counts, query)


def check_kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> None:
    """Raise for whatever is outside the operator's contract."""
    check_heads("tokens", tokens)
    batch, heads, _, dim = tokens.shape
    _check_shape("centroids", centroids, (batch, heads, centroids.shape[-2], dim))
    if not centroids.shape[2]:
        raise ValueError("centroids must hold at least 1 a head, got 0")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    check_dtype("centroids", centroids, torch.float32)
    check_device("centroids", centroids, tokens)


def check_rectified_attention(
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
) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("query", query, "block_q", block_q)
    lead, texts = query.shape[:2], text_key.shape[-2]
    _check_shape("text_key", text_key, (*lead, texts, query.shape[-1]))
    _check_shape("text_value", text_value, (*lead, texts, value.shape[-1]))
    _check_shape("text_bias", text_bias, (*lead, texts))
    tail = text_as_tail(query, text_key, text_value, text_bias, block_q)
    check_sparse_attention(
        query, key, value, block_ids, block_counts, *tail, scale, 0.0, block_q, block_kv
    )
    blocks = block_counts.shape[-1]
    _check_shape("gain", gain, (*lead, blocks))
    _check_shape("offset", offset, (*lead, blocks, value.shape[-1]))
    for name, tensor in (("gain", gain), ("offset", offset)):
        check_dtype(name, tensor, torch.float32)
        check_device(name, tensor, query)


def check_text_attention(query: Tensor, *rest: Any) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("query", query, "block_q", rest[-1])
    check_sparse_attention(*text_arguments(query, *rest))


def check_join_text(
    output: Tensor,
    lse: Tensor,
    text_output: Tensor,
    text_lse: Tensor,
    before: Tensor,
    after: Tensor,
) -> None:
    """Raise for whatever is outside the operator's contract."""
    check_heads("output", output)
    batch, heads, _, dim = output.shape
    _check_shape("text_output", text_output, output.shape)
    for name, tensor in (("before", before), ("after", after)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions")
        _check_shape(name, tensor, (batch, heads, tensor.shape[2], dim))
    for name, tensor in (("lse", lse), ("text_lse", text_lse)):
        _check_shape(name, tensor, output.shape[:3])
        check_dtype(name, tensor, torch.float32)
        check_device(name, tensor, output)
    for name, tensor in (("text_output", text_output), ("before", before), ("after", after)):
        check_dtype(name, tensor, output.dtype)
        check_device(name, tensor, output)


def check_fit_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    exact: Tensor,
    key_counts: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    value_mean: Tensor,
    log_size: Tensor,
    slope: Tensor,
    scale: float,
    variance_weight: float,
    rows: int,
    block_q: int,
    block_kv: int,
) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("query", query, "block_q", block_q)
    _check_blocked("key", key, "block_kv", block_kv)
    _check_head_dim("value", value)
    lead, dim, dim_v = query.shape[:2], query.shape[3], value.shape[-1]
    length, blocks = key.shape[2], -(-key.shape[2] // block_kv)
    _check_shape("key", key, (*lead, length, dim))
    _check_shape("value", value, (*lead, length, dim_v))
    _check_shape("exact", exact, (*lead, -(-query.shape[2] // block_q), blocks))
    counted = bool(key_counts.shape[-1])
    if counted and length % block_kv:
        raise ValueError(
            f"key must have a length that is a multiple of block_kv, {block_kv}, got {length}"
        )
    _check_shape("key_counts", key_counts, (*lead, blocks if counted else 0))
    _check_shape("key_mean", key_mean, (*lead, blocks, dim))
    _check_shape("key_variance", key_variance, (*lead, blocks, dim))
    _check_shape("value_mean", value_mean, (*lead, blocks, dim_v))
    _check_shape("log_size", log_size, (*lead, blocks))
    _check_shape("slope", slope, (*lead, dim, dim_v))
    check_finite(scale=scale, variance_weight=variance_weight)
    if not 1 <= rows <= MAX_FIT_ROWS:
        raise ValueError(f"rows must lie in [1, {MAX_FIT_ROWS}], got {rows}")
    for name, tensor, dtype in (
        ("key", key, query.dtype),
        ("value", value, query.dtype),
        ("exact", exact, torch.bool),
        ("key_counts", key_counts, torch.int32),
        ("key_mean", key_mean, query.dtype),
        ("key_variance", key_variance, query.dtype),
        ("value_mean", value_mean, query.dtype),
        ("log_size", log_size, torch.float32),
        ("slope", slope, torch.float32),
    ):
        check_dtype(name, tensor, dtype)
        check_device(name, tensor, query)


check_fitted_tail = check_fit_tail


def check_block_scores(
    query: Tensor,
    key_mean: Tensor,
    key_variance: Tensor,
    log_size: Tensor,
    scale: float,
    variance_weight: float,
    variance_power: float,
    block_q: int,
    rows: int,
) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("query", query, "block_q", block_q)
    batch, heads, _, dim = query.shape
    blocks = key_mean.shape[-2]
    if not blocks:
        raise ValueError("key_mean must hold at least one block, got 0")
    _check_shape("key_mean", key_mean, (batch, heads, blocks, dim))
    _check_shape("key_variance", key_variance, (batch, heads, blocks, dim))
    _check_shape("log_size", log_size, (batch, heads, blocks))
    if rows < 1 or block_q % rows or block_q // rows < MIN_GROUPS:
        raise ValueError(
            f"rows must divide block_q, {block_q}, into at least {MIN_GROUPS} groups, got {rows}"
        )
    check_finite(scale=scale, variance_weight=variance_weight, variance_power=variance_power)
    if variance_power < 0:
        raise ValueError(f"variance_power must not be negative, got {variance_power}")
    for name, tensor, dtype in (
        ("key_mean", key_mean, query.dtype),
        ("key_variance", key_variance, query.dtype),
        ("log_size", log_size, torch.float32),
    ):
        check_dtype(name, tensor, dtype)
        check_device(name, tensor, query)


def check_weigh_scores(
    scores: Tensor,
    query: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    scale: float,
    variance_weight: float,
    value_power: float,
    block_q: int,
) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("query", query, "block_q", block_q)
    (batch, heads, length, dim), blocks = query.shape, key_variance.shape[-2]
    _check_shape("scores", scores, (batch, heads, -(-length // block_q), blocks))
    _check_shape("key_variance", key_variance, (batch, heads, blocks, dim))
    _check_shape("value_variance", value_variance, (batch, heads, blocks))
    check_finite(scale=scale, variance_weight=variance_weight, value_power=value_power)
    if value_power < 0:
        raise ValueError(f"value_power must not be negative, got {value_power}")
    for name, tensor, dtype in (
        ("scores", scores, score_dtype(query.dtype)),
        ("key_variance", key_variance, query.dtype),
        ("value_variance", value_variance, torch.float32),
    ):
        check_dtype(name, tensor, dtype)
        check_device(name, tensor, query)


def check_block_statistics(key: Tensor, value: Tensor, block_kv: int) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_blocked("key", key, "block_kv", block_kv)
    _check_shape("value", value, (*key.shape[:3], value.shape[-1]))
    _check_head_dim("value", value)
    check_dtype("value", value, key.dtype)
    check_device("value", value, key)


def check_select_blocks(scores: Tensor, kept: int, rows: int) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_pairs("scores", scores)
    if scores.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"scores must be float32 or bfloat16, got {scores.dtype}")
    _, heads, blocks_q, blocks = scores.shape
    if rows < 1 or heads * blocks_q % rows:
        raise ValueError(f"rows must divide the rows of a sample, {heads} * {blocks_q}, got {rows}")
    if not rows <= kept <= rows * blocks:
        raise ValueError(
            f"kept must lie in [{rows}, {rows * blocks}], from one block a row to all, got {kept}"
        )


def check_list_blocks(exact: Tensor) -> None:
    """Raise for whatever is outside the operator's contract."""
    _check_pairs("exact", exact)
    check_dtype("exact", exact, torch.bool)


def _check_pairs(name: str, tensor: Tensor) -> None:
    """A number for each pair of a query block and a key block."""
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be [B, H, Nq, Nk], got {tensor.dim()} dimensions")


def _check_blocked(name: str, tensor: Tensor, block_name: str, block: int) -> None:
    """A tensor ``[B, H, L, D]`` that is cut into blocks."""
    check_heads(name, tensor)
    _check_block_size(block_name, block)


def check_heads(name: str, tensor: Tensor) -> None:
    """Raise where a tensor is no ``[B, H, L, D]`` that the operators take."""
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions")
    if 0 in tensor.shape[:3]:
        raise ValueError(f"{name} must hold a token of a head, got shape {tuple(tensor.shape)}")
    if tensor.is_cuda and tensor.shape[0] * tensor.shape[1] > MAX_HEADS:
        raise ValueError(
            f"{name} must have at most {MAX_HEADS} heads in all samples on a GPU,"
            f" got {tensor.shape[0]} * {tensor.shape[1]}"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    _check_head_dim(name, tensor)


def _check_head_dim(name: str, tensor: Tensor) -> None:
    if not MIN_HEAD_DIM <= tensor.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} must have a head dim from {MIN_HEAD_DIM} to {MAX_HEAD_DIM},"
            f" got {tensor.shape[-1]}"
        )


def _check_block_size(name: str, block: int) -> None:
    if block not in BLOCK_SIZES:
        raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {block}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_finite(**numbers: float) -> None:
    """Raise where a number is infinite or NaN."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")


def check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """Raise where a tensor has another dtype."""
    if tensor.dtype != expected:
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, first: Tensor) -> None:
    """Raise where a tensor is on another device than the first argument."""
    if tensor.device != first.device:
        raise TypeError(
            f"{name} must be on {first.device} as the first argument is, got {tensor.device}"
        )
