"""The operators: schemas, shape rules and device dispatch.

``uta::block_statistics`` pools keys and values, ``uta::block_scores`` pools attention,
``uta::select_blocks`` spends a budget on scores, ``uta::list_blocks`` makes lists of a mask, and
``uta::sparse_attention`` attends to listed blocks and a tail; ``uta::block_masked_attention`` takes
a mask in place of lists. ``uta::rectified_attention`` attends to listed blocks and text, and scales
and shifts what comes of it. ``uta::kmeans`` groups tokens, and ``uta::clustered_attention`` attends
to listed blocks that are not full. ``uta::fit_tail`` fits two factors of a tail to some rows of
exact attention.

Importing this module needs torch alone; the CPU and Triton kernels are imported when first used.
Schemas hold tensors first, then float and int: what TensorRT's converters can carry. A tensor that
is absent has a dimension of size 0. The operators are forward-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from uta_fx.kernels.reference import score_dtype, text_as_tail

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
BLOCK_SIZES = (16, 32, 64, 128)
MIN_GROUPS = 4  # of rows in a query block
MAX_FIT_ROWS = 16  # that a tail is fitted to: one tile of a matrix product
MAX_HEADS = 65535  # of all samples together on a GPU: what a grid of programs holds along this axis

_LIBRARY = torch.library.Library("uta", "DEF")
_LIBRARY.define(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor tail_key, Tensor tail_value, Tensor tail_log_size,"
    " Tensor tail_variance, Tensor tail_slope, float scale, float variance_weight,"
    " int block_q, int block_kv) -> (Tensor output, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "block_masked_attention(Tensor query, Tensor key, Tensor value, Tensor exact, Tensor tail_key,"
    " Tensor tail_value, Tensor tail_log_size, Tensor tail_variance, Tensor tail_slope,"
    " float scale, float variance_weight, int block_q, int block_kv)"
    " -> (Tensor output, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "rectified_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor text_key, Tensor text_value, Tensor text_bias, Tensor gain,"
    " Tensor offset, float scale, int block_q, int block_kv) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "block_scores(Tensor query, Tensor key_mean, Tensor key_variance, Tensor log_size,"
    " float scale, float variance_weight, float variance_power, int block_q, int rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "block_statistics(Tensor key, Tensor value, int block_kv) -> (Tensor key_mean,"
    " Tensor key_variance, Tensor value_mean, Tensor value_variance, Tensor covariance)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "clustered_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor key_counts, Tensor tail_key, Tensor tail_value,"
    " Tensor tail_log_size, Tensor tail_variance, Tensor tail_slope, float scale,"
    " float variance_weight, int block_q, int block_kv) -> (Tensor output, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "kmeans(Tensor tokens, Tensor centroids, int iterations) -> (Tensor labels,"
    " Tensor new_centroids, Tensor sizes)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "select_blocks(Tensor scores, SymInt kept, SymInt rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "list_blocks(Tensor exact) -> (Tensor block_ids, Tensor block_counts)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.define(
    "fit_tail(Tensor query, Tensor key, Tensor value, Tensor exact, Tensor key_counts,"
    " Tensor key_mean, Tensor key_variance, Tensor value_mean, Tensor log_size, Tensor slope,"
    " float scale, float variance_weight, int rows, int block_q, int block_kv)"
    " -> (Tensor mass, Tensor gain)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sparse_attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::sparse_attention``; arguments and results as in ``reference``.

    Inputs may have any strides with a contiguous last dimension; float32, float16 or bfloat16
    (query, key, value, tail_key, tail_value, tail_variance and tail_slope alike); head dims from
    16 to 256; block sizes 16, 32, 64 or 128. The output has the strides of ``empty_like(query)``.

    Raises:
        ValueError: A shape, block size or head dim is outside the contract; on the CPU also an id
            outside ``[0, Nk)`` (a GPU cannot report it without stopping, and makes the row NaN).
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.sparse_attention.default(*args, **options)


def block_masked_attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::block_masked_attention``; arguments and results as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``; there is no id that could lie outside.
    """
    return torch.ops.uta.block_masked_attention.default(*args, **options)


def clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::clustered_attention``; arguments and results as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``.
    """
    return torch.ops.uta.clustered_attention.default(*args)


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``uta::kmeans``; arguments and results as in ``reference``, centroids in float32.

    The same inputs give the same bits.

    Raises:
        ValueError: A shape, head dim or number of iterations is outside the contract.
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.kmeans.default(tokens, centroids, iterations)


def rectified_attention(*args: Any) -> Tensor:
    """Call ``uta::rectified_attention``; arguments and result as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``; ``gain``, ``offset`` and ``text_bias``
    are float32.
    """
    return torch.ops.uta.rectified_attention.default(*args)


def block_scores(*args: Any) -> Tensor:
    """Call ``uta::block_scores``; arguments and result as in ``reference``."""
    return torch.ops.uta.block_scores.default(*args)


def block_statistics(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    """Call ``uta::block_statistics``; arguments and results as in ``reference``."""
    return torch.ops.uta.block_statistics.default(key, value, block_kv)


def select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    """Call ``uta::select_blocks``; arguments and result as in ``reference``.

    Scores in float32 or bfloat16. The same on every device, to the bit.

    Raises:
        ValueError: The scores are not ``[B, H, Nq, Nk]``, or a number is outside the contract.
        TypeError: The scores are neither float32 nor bfloat16.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.select_blocks.default(scores, kept, rows)


def list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``uta::list_blocks``; argument and results as in ``reference``.

    Raises:
        ValueError: The mask is not ``[B, H, Nq, Nk]``.
        TypeError: It is not boolean.
    """
    return torch.ops.uta.list_blocks.default(exact)


def fit_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::fit_tail``; arguments and results as in ``reference``, float32.

    ``rows`` from 1 to ``MAX_FIT_ROWS``. Inputs as in ``sparse_attention``; the same inputs give the
    same bits.

    Raises:
        ValueError: A shape, block size, head dim or number of rows is outside the contract.
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.fit_tail.default(*args)


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output, with the strides of ``empty_like(query)``, and the log-sum-exp, uninitialised."""
    if value.shape[-1] == query.shape[-1]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


def check_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    *rest: Any,
) -> None:
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    if variance_power < 0:
        raise ValueError(f"variance_power must not be negative, got {variance_power}")
    for name, tensor, dtype in (
        ("key_mean", key_mean, query.dtype),
        ("key_variance", key_variance, query.dtype),
        ("log_size", log_size, torch.float32),
    ):
        check_dtype(name, tensor, dtype)
        check_device(name, tensor, query)


def check_block_statistics(key: Tensor, value: Tensor, block_kv: int) -> None:
    """Raise for whatever is outside the operator's contract, before anything is launched."""
    _check_blocked("key", key, "block_kv", block_kv)
    _check_shape("value", value, (*key.shape[:3], value.shape[-1]))
    _check_head_dim("value", value)
    check_dtype("value", value, key.dtype)
    check_device("value", value, key)


def check_select_blocks(scores: Tensor, kept: int, rows: int) -> None:
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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
    """Raise for whatever is outside the operator's contract, before anything is launched."""
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


def _cpu_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import cpu

    check_sparse_attention(*args)
    return cpu.sparse_attention(*args)


def _cpu_block_masked_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import cpu

    check_block_masked_attention(*args)
    return cpu.block_masked_attention(*args)


def _cpu_clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import cpu

    check_clustered_attention(*args)
    return cpu.clustered_attention(*args)


def _cpu_kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, ...]:
    from uta_fx.kernels import cpu

    check_kmeans(tokens, centroids, iterations)
    return cpu.kmeans(tokens, centroids, iterations)


def _cpu_rectified_attention(*args: Any) -> Tensor:
    from uta_fx.kernels import cpu

    check_rectified_attention(*args)
    return cpu.rectified_attention(*args)


def _cpu_block_scores(*args: Any) -> Tensor:
    from uta_fx.kernels import cpu

    check_block_scores(*args)
    return cpu.block_scores(*args)


def _cpu_block_statistics(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    from uta_fx.kernels import cpu

    check_block_statistics(key, value, block_kv)
    return cpu.block_statistics(key, value, block_kv)


def _cpu_select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    from uta_fx.kernels import cpu

    check_select_blocks(scores, kept, rows)
    return cpu.select_blocks(scores, kept, rows)


def _cpu_list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import cpu

    check_list_blocks(exact)
    return cpu.list_blocks(exact)


def _cpu_fit_tail(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import cpu

    check_fit_tail(*args)
    return cpu.fit_tail(*args)


def _cuda_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import triton_attention

    check_sparse_attention(*args)
    return triton_attention.sparse_attention(*args)


def _cuda_block_masked_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import triton_attention

    check_block_masked_attention(*args)
    return triton_attention.block_masked_attention(*args)


def _cuda_clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import triton_attention

    check_clustered_attention(*args)
    return triton_attention.clustered_attention(*args)


def _cuda_kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, ...]:
    from uta_fx.kernels import triton_kmeans

    check_kmeans(tokens, centroids, iterations)
    return triton_kmeans.kmeans(tokens, centroids, iterations)


def _cuda_rectified_attention(*args: Any) -> Tensor:
    from uta_fx.kernels import triton_attention

    check_rectified_attention(*args)
    return triton_attention.rectified_attention(*args)


def _cuda_block_scores(*args: Any) -> Tensor:
    from uta_fx.kernels import triton_scores

    check_block_scores(*args)
    return triton_scores.block_scores(*args)


def _cuda_block_statistics(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    from uta_fx.kernels import triton_statistics

    check_block_statistics(key, value, block_kv)
    return triton_statistics.block_statistics(key, value, block_kv)


def _cuda_select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    from uta_fx.kernels import triton_selection

    check_select_blocks(scores, kept, rows)
    return triton_selection.select_blocks(scores, kept, rows)


def _cuda_list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import triton_selection

    check_list_blocks(exact)
    return triton_selection.list_blocks(exact)


def _cuda_fit_tail(*args: Any) -> tuple[Tensor, Tensor]:
    from uta_fx.kernels import triton_fitting

    check_fit_tail(*args)
    return triton_fitting.fit_tail(*args)


def _fake_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_sparse_attention(query, key, value, *rest)
    return empty_outputs(query, value)


def _fake_block_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_block_masked_attention(query, key, value, *rest)
    return empty_outputs(query, value)


def _fake_clustered_attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    check_clustered_attention(query, key, value, *rest)
    return empty_outputs(query, value)


def _fake_kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, ...]:
    check_kmeans(tokens, centroids, iterations)
    return (
        tokens.new_empty(tokens.shape[:3], dtype=torch.int32),
        centroids.new_empty(centroids.shape),
        tokens.new_empty(centroids.shape[:3], dtype=torch.int32),
    )


def _fake_rectified_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    check_rectified_attention(query, key, value, *rest)
    return empty_outputs(query, value)[0]


def _fake_block_scores(query: Tensor, key_mean: Tensor, *rest: Any) -> Tensor:
    check_block_scores(query, key_mean, *rest)
    block_q = rest[-2]
    shape = (*query.shape[:2], -(-query.shape[2] // block_q), key_mean.shape[-2])
    return query.new_empty(shape, dtype=score_dtype(query.dtype))


def _fake_block_statistics(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    check_block_statistics(key, value, block_kv)
    (batch, heads, length, dim), dim_v = key.shape, value.shape[-1]
    blocks = -(-length // block_kv)
    by_channel = ((blocks, dim), (blocks, dim), (blocks, dim_v))
    mean, variance, value_mean = (key.new_empty((batch, heads, *shape)) for shape in by_channel)
    value_variance, covariance = (
        key.new_empty((batch, heads, *shape), dtype=torch.float32)
        for shape in ((blocks,), (dim, dim_v))
    )
    return mean, variance, value_mean, value_variance, covariance


def _fake_select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    check_select_blocks(scores, kept, rows)
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _fake_list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    check_list_blocks(exact)
    return (
        exact.new_empty(exact.shape, dtype=torch.int32),
        exact.new_empty(exact.shape[:3], dtype=torch.int32),
    )


def _fake_fit_tail(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_fit_tail(query, *rest)
    mass, gain = (query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2))
    return mass, gain


def _refuse_gradient(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the operators of uta are forward-only: run the model under torch.no_grad() or"
        " torch.inference_mode()"
    )


LAUNCHERS: dict[Any, Callable[..., Any]] = {}
"""What each operator calls on GPUs."""

# plain calls, not decorators: kernels and launchers stay callable without the dispatcher
for _name, _cpu, _cuda, _fake in (
    ("sparse_attention", _cpu_sparse_attention, _cuda_sparse_attention, _fake_sparse_attention),
    (
        "block_masked_attention",
        _cpu_block_masked_attention,
        _cuda_block_masked_attention,
        _fake_block_masked_attention,
    ),
    (
        "clustered_attention",
        _cpu_clustered_attention,
        _cuda_clustered_attention,
        _fake_clustered_attention,
    ),
    ("kmeans", _cpu_kmeans, _cuda_kmeans, _fake_kmeans),
    (
        "rectified_attention",
        _cpu_rectified_attention,
        _cuda_rectified_attention,
        _fake_rectified_attention,
    ),
    ("block_scores", _cpu_block_scores, _cuda_block_scores, _fake_block_scores),
    ("block_statistics", _cpu_block_statistics, _cuda_block_statistics, _fake_block_statistics),
    ("select_blocks", _cpu_select_blocks, _cuda_select_blocks, _fake_select_blocks),
    ("list_blocks", _cpu_list_blocks, _cuda_list_blocks, _fake_list_blocks),
    ("fit_tail", _cpu_fit_tail, _cuda_fit_tail, _fake_fit_tail),
):
    # PyTorch's own operations, which autocast around the operator would reach
    _LIBRARY.impl(_name, torch.autocast("cpu", enabled=False)(_cpu), "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"uta::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"uta::{_name}", _refuse_gradient, lib=_LIBRARY)
    LAUNCHERS[getattr(torch.ops.uta, _name).default] = _cuda
