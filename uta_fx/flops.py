"""What attention costs in floating-point operations, dense and sparse; a multiply-add is two.

Counted as ``torch.utils.flop_counter`` counts: matrix products, convolutions and attention, nothing
elementwise. Operations are not time: gathers, softmax and launches are not among them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from uta_fx.attention import blocks_holding, find_exact_tokens, sparse_attention
from uta_fx.config import Config
from uta_fx.kernels.reference import spacing
from uta_fx.order import Grid
from uta_fx.passes.site import Cost

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def model_counter() -> FlopCounterMode:
    """Counts a dense model on any device: torch (2.13) lacks the CPU's attention."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(
        display=False,
        custom_mapping={cpu_attention: lambda q, k, v, *_, **__: dense_flops(q, k, v[-1])},
    )


def dense_flops(query: Shape, key: Shape, dim_v: int) -> int:
    """``2 B H Lq Lk (D + Dv)``: two matrix products.

    Args:
        query: ``[B, H, Lq, D]``, a shape.
        key: ``[B, H, Lk, D]``; its heads may be fewer.
        dim_v: Dv, head dim of the values.
    """
    batch, heads, length_q, dim = query
    return 2 * batch * heads * length_q * key[2] * (dim + dim_v)


def sparse_cost(
    query: Shape,
    key: Shape,
    dim_v: int,
    dtype: torch.dtype,
    tokens: int,
    grid: Grid | None,
    config: Config,
) -> Cost:
    """What self- or joint attention costs dense, and what ``config`` makes of it.

    Padding that a mask hides counts as tokens: only a run knows how much there is.

    Args:
        query: ``[B, H, Lq, D]``, a shape.
        key: ``[B, Hkv, Lk, D]``, a shape; Lk is Lq or more.
        dim_v: Head dim of the values.
        dtype: Of the tensors.
        tokens: Video tokens, at most Lq; the others are text: their rows and their keys for the
            video's rows stay exact.
        grid: Frames, height and width of the video tokens; None keeps their order.
        config: Settings.
    """
    batch, heads, _, dim = query
    video = (batch, heads, tokens, dim)
    parts = dict(_sparse_parts(video, key[1], dim_v, dtype, grid, config))
    dense = dense_flops(query, key, dim_v)
    parts["text"] = dense - dense_flops(video, video, dim_v)
    return Cost(dense, sum(parts.values()), parts)


@functools.cache
def _sparse_parts(
    shape: tuple[int, ...],
    kv_heads: int,
    dim_v: int,
    dtype: torch.dtype,
    grid: Grid | None,
    config: Config,
) -> tuple[tuple[str, int], ...]:
    """The video's own parts: the operation runs on the meta device and is counted.

    The operators are counted by the formulas below; what a policy or a tail multiplies beside them
    is counted by torch and goes to ``scores`` (pooled logits, weights of representatives).
    """
    from torch.utils.flop_counter import FlopCounterMode

    batch, _, tokens, dim = shape
    query = torch.empty(shape, dtype=dtype, device="meta")
    key, value = (query.new_empty((batch, kv_heads, tokens, width)) for width in (dim, dim_v))
    parts: Counter[str] = Counter()
    density = config.density
    exact = find_exact_tokens(torch.empty(1, 1, tokens, 0), config, grid, None)
    if exact is not None:  # what is chosen among their blocks counts once
        density += (1 - density) * blocks_holding(exact, config.block_kv).float().mean().item()
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.uta.block_statistics: functools.partial(_statistics, parts),
        torch.ops.uta.block_scores: functools.partial(_scores, parts),
        torch.ops.uta.fitted_tail: functools.partial(_fit, parts),
        torch.ops.uta.block_masked_attention: functools.partial(_attention, parts, density),
        torch.ops.uta.rectified_attention: functools.partial(_rectified, parts, density),
        torch.ops.uta.kmeans: functools.partial(_kmeans, parts),
        torch.ops.uta.clustered_attention: functools.partial(_clustered, parts, density, shape[2]),
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        sparse_attention(query, key, value, config=config, grid=grid)
    parts["scores"] += counter.get_total_flops() - parts.total()
    return tuple((name, parts[name]) for name in ("statistics", "scores", "listed", "tail"))


def _statistics(parts: Counter[str], key: Shape, value: Shape, *_: Any, out_shape: Any) -> int:
    """The covariance of keys with values, ``2 B H L D Dv``; means and variances are elementwise."""
    batch, heads, length, dim = key
    return _add(parts, "statistics", 2 * batch * heads * length * dim * value[-1])


def _scores(
    parts: Counter[str],
    query: Shape,
    key_mean: Shape,
    key_variance: Shape,
    log_size: Shape,
    scale: float,
    variance_weight: float,
    variance_power: float,
    block_q: int,
    group: int,
    *,
    out_shape: Any,
) -> int:
    """``2 B H G Nk D`` for each product, with G groups of query rows: two passes over the means.

    The variances enter the second pass where they are part of the mass or the score.
    """
    batch, heads, length, dim = query
    products = 2 + (variance_weight != 0 or variance_power != 0)
    rows = batch * heads * -(-length // group)
    return _add(parts, "scores", products * 2 * rows * key_mean[2] * dim)


def _fit(
    parts: Counter[str],
    query: Shape,
    key: Shape,
    value: Shape,
    exact: Shape,
    key_counts: Shape,
    key_mean: Shape,
    key_variance: Shape,
    value_mean: Shape,
    log_size: Shape,
    slope: Shape,
    scale: float,
    variance_weight: float,
    rows: int,
    block_q: int,
    block_kv: int,
    *,
    out_shape: Any,
) -> int:
    """A row costs ``2 (D + Dv)`` a key, ``2 (2 D + Dv)`` a representative, ``2 D Dv`` the slope.

    Both count for the blocks that are looked at.
    """
    batch, heads, length, dim = key
    dim_v, blocks = value[-1], key_mean[2] // spacing(key_mean[2])
    row = (
        2 * min(length, blocks * block_kv) * (dim + dim_v)
        + 2 * blocks * (2 * dim + dim_v)
        + 2 * dim * dim_v
    )
    return _add(parts, "tail", batch * heads * rows * row)


def _attention(
    parts: Counter[str],
    density: float,
    query: Shape,
    key: Shape,
    value: Shape,
    exact: Shape,
    tail_key: Shape,
    tail_value: Shape,
    tail_log_size: Shape,
    tail_variance: Shape,
    tail_slope: Shape,
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
    *,
    out_shape: Any,
) -> int:
    """The listed share of dense attention, and the tail's own products.

    A representative costs a row ``2 (D + Dv)``, and with a variance a query block ``2 D``; a slope
    costs a row ``2 D Dv``. ``density`` says how many blocks are exact: a run decides which.
    """
    batch, heads, length, dim = query
    dim_v, rows = value[-1], batch * heads * length
    tail = 2 * rows * tail_key[-2] * (dim + dim_v)
    tail += 2 * batch * heads * -(-length // block_q) * tail_variance[2] * dim
    if tail_slope[2]:
        tail += 2 * rows * dim * dim_v
    listed = round(density * dense_flops(query, key, dim_v))
    return _add(parts, "tail", tail) + _add(parts, "listed", listed)


def _rectified(
    parts: Counter[str],
    density: float,
    query: Shape,
    key: Shape,
    value: Shape,
    *_: Any,
    out_shape: Any,
) -> int:
    """The listed share of dense attention; gain and offset are elementwise."""
    return _add(parts, "listed", round(density * dense_flops(query, key, value[-1])))


def _kmeans(
    parts: Counter[str], tokens: Shape, centroids: Shape, iterations: int, *, out_shape: Any
) -> int:
    """``2 B H L C D`` an iteration for the distances; means are sums."""
    batch, heads, length, dim = tokens
    return _add(parts, "scores", iterations * 2 * batch * heads * length * centroids[2] * dim)


def _clustered(
    parts: Counter[str],
    density: float,
    tokens: int,
    query: Shape,
    key: Shape,
    value: Shape,
    block_ids: Shape,
    block_counts: Shape,
    key_counts: Shape,
    *rest: Any,
    out_shape: Any,
) -> int:
    """As ``_attention``, of as many rows and keys as there are tokens: padding is not counted."""
    query, key, value = ((*shape[:2], tokens, shape[3]) for shape in (query, key, value))
    return _attention(parts, density, query, key, value, block_ids, *rest, out_shape=out_shape)


def _add(parts: Counter[str], name: str, flops: int) -> int:
    parts[name] += flops
    return flops
