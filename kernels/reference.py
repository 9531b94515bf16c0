"""What every kernel must agree with: the operators in plain PyTorch, in the dtype they are given.

Called on float64 tensors these functions are the specification; called on the tensors of a user
they say how much error that dtype makes by itself. Memory is O(Lq * Lk): for tests and study.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RIDGE = 0.3  # how strongly both factors of a fit are held to 1, relative to what the sample says
STEPS = 2  # of Gauss and Newton, since mass is in the denominator too
SAMPLED_BLOCKS = 64  # of keys, at least, that a fit looks at where there are more
GOLDEN = 40503  # 2^16 over the golden ratio
LARGEST = torch.finfo(torch.float16).max
LIMIT = 4.0  # mass lies between one part in so many and so many times, the slope below


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
    """Attention over listed key blocks and over representatives of the rest, in one softmax.

    Query row i of query block n sees the tokens of its listed blocks with logit ``s q_i.k_j`` and
    value ``v_j``, and every representative r of its tail with

        sigma2 = sum_c mean over rows j of block n of (s q_jc)^2 tail_variance_rc      (or 0)
        logit  = s q_i.tail_key_r + tail_log_size_r + variance_weight * sigma2 / 2
        value  = tail_value_r + (s q_i @ tail_slope) / (1 + sigma2)      (no slope: tail_value_r)

    which is UTA's equation 14 with any number of representatives; variance and slope are the
    second-order mass and first-order value of a block whose logits and values are Gaussian. The
    variance of the logits is that of the whole query block: one number for each pair of blocks.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        block_ids: int32 ``[B, H, Nq, M]``; the first ``block_counts`` entries of a row are distinct
            ids of key blocks, in any order; the others are ignored. ``Nq = ceil(Lq / block_q)``.
        block_counts: int32 ``[B, H, Nq]``, each in ``[0, M]``.
        tail_key: ``[B, H, Nk, D]``, one representative for each key block, which takes part in the
            rows that do not list that block; or ``[B, H, Nq, R, D]``, R for each query block.
            ``Nk = ceil(Lk / block_kv)``. An R (or Nk) of 0 means: the tail is dropped.
        tail_value: As ``tail_key``, with Dv.
        tail_log_size: float32, as ``tail_key`` without its last dimension: natural log of how many
            keys it stands for; ``-inf`` where it stands for none.
        tail_variance: ``[B, H, Nk, D]``, or ``[B, H, 0, D]`` for none.
        tail_slope: ``[B, H, S, D, Dv]``, S one of 0 (none), 1 (one for each head) or Nq.
        scale: s, multiplies the logits.
        variance_weight: Share of ``sigma2 / 2`` that is added to the logit.
        block_q: Query rows in a block.
        block_kv: Keys in a block; the last one may be ragged.
        key_counts: As in ``clustered_attention``; None where every key counts.

    Returns:
        Output ``[B, H, Lq, Dv]`` in the dtype of ``query`` and the natural log-sum-exp
        ``[B, H, Lq]`` (float32, or float64 for float64 inputs). A row that sees nothing is zero,
        with log-sum-exp ``-inf``; a row with an id outside ``[0, Nk)`` is NaN.
    """
    length_q, length_kv = query.shape[-2], key.shape[-2]
    exact, valid = listed_blocks(block_ids, block_counts, -(-length_kv // block_kv))
    rows = torch.arange(length_q, device=query.device) // block_q
    columns = torch.arange(length_kv, device=query.device) // block_kv

    logits = (query * scale) @ key.transpose(-1, -2)
    seen = exact[:, :, rows][..., columns]
    if key_counts is not None:
        place = torch.arange(length_kv, device=query.device) % block_kv
        seen = seen & (place < key_counts[:, :, columns])[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    tail = _tail_logits(query * scale, tail_key, tail_log_size, rows)
    sigma2 = tail.new_zeros(())
    if tail_variance.shape[2]:
        sigma2 = pooled_variance(query, tail_variance, scale, block_q)[:, :, rows]
    tail = tail + variance_weight / 2 * sigma2
    if tail_key.dim() == 4 and tail_key.shape[-2]:
        tail = tail.masked_fill(exact[:, :, rows], -torch.inf)

    everything = torch.cat([logits, tail.to(logits.dtype)], -1)
    lse = everything.to(_accumulator(query)).logsumexp(-1)
    weights = (everything - lse[..., None]).exp().to(query.dtype)
    weights = weights.masked_fill(everything == -torch.inf, 0.0)  # also where lse is -inf
    exact_weights, tail_weights = weights.split([length_kv, tail.shape[-1]], -1)
    output = exact_weights @ value
    if tail_value.dim() == 5:
        output = output + torch.einsum("bhir,bhird->bhid", tail_weights, tail_value[:, :, rows])
    else:
        output = output + tail_weights @ tail_value
    if tail_slope.shape[2]:
        gain = (tail_weights / (1 + sigma2).to(tail_weights.dtype)).sum(-1, keepdim=True)
        slope = tail_slope if tail_slope.shape[2] == 1 else tail_slope[:, :, rows]
        output = output + gain * (query[..., None, :] * scale @ slope).squeeze(-2)
    invalid = ~valid[:, :, rows]
    return output.masked_fill(invalid[..., None], torch.nan), lse.masked_fill(invalid, torch.nan)


def block_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, exact: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """``sparse_attention`` of the blocks of a mask.

    Args:
        query: As in ``sparse_attention``.
        key: As in ``sparse_attention``.
        value: As in ``sparse_attention``.
        exact: Boolean ``[B, H, Nq, Nk]``: True where query block n attends to key block b exactly.
        rest: As in ``sparse_attention``, from ``tail_key`` on.

    Returns:
        As ``sparse_attention``.
    """
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
    """Attention over listed key blocks and over text, times a gain, plus an offset.

    ``gain_n * softmax(...) @ values + offset_n`` for each row of query block n: Rectified SpaAttn
    (arXiv:2511.19835).

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        block_ids: As in ``sparse_attention``.
        block_counts: As in ``sparse_attention``.
        text_key: ``[B, H, Lt, D]``, seen by every row; Lt may be 0.
        text_value: ``[B, H, Lt, Dv]``.
        text_bias: float32 ``[B, H, Lt]``, added to their logits; ``-inf`` hides one.
        gain: float32 ``[B, H, Nq]``.
        offset: float32 ``[B, H, Nq, Dv]``.
        scale: Multiplies the logits.
        block_q: Query rows in a block.
        block_kv: Keys in a block; the last one may be ragged.

    Returns:
        ``[B, H, Lq, Dv]`` in the dtype of ``query``. A row that sees nothing is its offset; a row
        with an id outside ``[0, Nk)`` is NaN.
    """
    tail = text_as_tail(query, text_key, text_value, text_bias, block_q)
    arguments = (query, key, value, block_ids, block_counts, *tail)
    output, _ = sparse_attention(*arguments, scale, 0.0, block_q, block_kv)
    rows = torch.arange(query.shape[2], device=query.device) // block_q
    return (output * gain[:, :, rows, None] + offset[:, :, rows]).to(query.dtype)


def text_as_tail(
    query: Tensor, text_key: Tensor, text_value: Tensor, text_bias: Tensor, block_q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Text of ``rectified_attention`` as tail inputs of ``sparse_attention``: each key for itself.

    Nothing is copied.
    """
    blocks = -(-query.shape[2] // block_q)
    lead, (dim, dim_v) = query.shape[:2], (query.shape[3], text_value.shape[3])
    return (
        text_key[:, :, None].expand(-1, -1, blocks, -1, -1),
        text_value[:, :, None].expand(-1, -1, blocks, -1, -1),
        text_bias[:, :, None].expand(-1, -1, blocks, -1),
        query.new_empty((*lead, 0, dim)),
        query.new_empty((*lead, 0, dim, dim_v)),
    )


def text_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, block_q: int
) -> tuple[Tensor, Tensor]:
    """Attention to a few keys, all of them exact.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lt, D]``.
        value: ``[B, H, Lt, Dv]``.
        bias: float32 ``[B, H, Lt]``, added to logits; ``[B, H, 0]`` for none.
        scale: Multiplies the logits.
        block_q: Query rows in a block, which does not matter to the result.

    Returns:
        As ``sparse_attention``.
    """
    return sparse_attention(*text_arguments(query, key, value, bias, scale, block_q))


def join_text(
    output: Tensor,
    lse: Tensor,
    text_output: Tensor,
    text_lse: Tensor,
    before: Tensor,
    after: Tensor,
) -> Tensor:
    """Two softmaxes of the video's queries over disjoint keys as one, amid the rows of others.

        share = sigmoid(text_lse - lse)
        joined = (1 - share) output + share text_output

    Args:
        output: ``[B, H, L, Dv]``, attention of the video's queries over the video.
        lse: float32 ``[B, H, L]``, its log-sum-exp.
        text_output: As ``output``, over the text.
        text_lse: As ``lse``; -inf where a row sees no text.
        before: ``[B, H, L1, Dv]``, attention of the tokens before the video over everything.
        after: ``[B, H, L2, Dv]``, of those after it.

    Returns:
        ``[B, H, L1 + L + L2, Dv]``, in memory as ``[B, L1 + L + L2, H, Dv]``: models join the heads
        next, without a copy.
    """
    share = (text_lse - lse).sigmoid()[..., None]
    video = torch.lerp(output.to(share.dtype), text_output.to(share.dtype), share)
    return join_tokens([before, video.to(output.dtype), after])


def join_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Tokens of ``[B, H, L, Dv]`` one after the other; in memory as ``join_text`` returns them."""
    return joined([x.transpose(1, 2) for x in parts], 1).contiguous().transpose(1, 2)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``, without a copy where all parts but one are known to be empty."""
    some = [part for part in parts if not isinstance(part.shape[dim], int) or part.shape[dim]]
    return torch.cat(some, dim) if len(some) > 1 else (some or parts)[0]


def text_arguments(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, block_q: int
) -> tuple[Any, ...]:
    """The arguments of ``sparse_attention`` for those of ``text_attention``.

    Nothing is listed, and each key is a representative of itself: the bias stands where the log of
    how many keys a representative stands for does.
    """
    lead, blocks = query.shape[:2], -(-query.shape[2] // block_q)
    if isinstance(bias.shape[2], int) and not bias.shape[2]:
        bias = bias.new_zeros((1, 1, key.shape[2])).expand(*lead, -1)
    return (
        query, key, value,
        query.new_empty((*lead, blocks, 0), dtype=torch.int32),
        query.new_zeros((*lead, blocks), dtype=torch.int32),
        *text_as_tail(query, key, value, bias, block_q),
        scale, 0.0, block_q, block_q,
    )  # fmt: skip


def text_bias(row: Tensor, column: Tensor, start: int, tokens: int, trusted: bool) -> Tensor:
    """What a mask adds to the logits of text, for queries of the video.

    Args:
        row: Boolean (True: seen) or added to logits, ``[B or 1, H or 1, 1, L]``: what the mask has
            for the first query of the video.
        column: Likewise ``[B or 1, H or 1, tokens, 1]``, for its first key and its own queries; an
            empty last dimension where the mask is the same for all queries.
        start: The first token of the video.
        tokens: How many the video has.
        trusted: Whether nothing shows that the mask hides no video: NaN where it does. The mask
            is one of keys, or one of keys and one of queries, so that these two lines tell.

    Returns:
        float32 ``[B or 1, H or 1, 1, Lt]``, of the text before the video and after it.
    """
    text = torch.cat([row[..., :start], row[..., start + tokens :]], -1)
    bias = torch.where(text, 0.0, -torch.inf) if text.dtype == torch.bool else text.float()
    lines = [row[..., start : start + tokens], column.transpose(-1, -2)] if trusted else []
    for line in lines:
        shown = (line if line.dtype == torch.bool else line == 0).all(-1, keepdim=True)
        bias = torch.where(shown, bias, torch.nan) if line.shape[-2] else bias
    return bias


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    key_counts: Tensor,
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
    """``sparse_attention`` over key blocks that are not full.

    What a policy needs whose groups of keys have any size: each group is padded to whole blocks.

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Nk * block_kv, D]``.
        value: ``[B, H, Nk * block_kv, Dv]``.
        block_ids: As in ``sparse_attention``.
        block_counts: As in ``sparse_attention``.
        key_counts: int32 ``[B, H, Nk]``, in ``[0, block_kv]``: only so many keys at the start of a
            block exist. The others are padding, which no row sees and which must be finite.
        tail_key: As in ``sparse_attention``, as all that follow.
        tail_value: See there.
        tail_log_size: See there.
        tail_variance: See there.
        tail_slope: See there.
        scale: See there.
        variance_weight: See there.
        block_q: See there.
        block_kv: See there.

    Returns:
        As ``sparse_attention``.
    """
    return sparse_attention(
        query, key, value, block_ids, block_counts, tail_key, tail_value, tail_log_size,
        tail_variance, tail_slope, scale, variance_weight, block_q, block_kv, key_counts=key_counts,
    )  # fmt: skip


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
    """Pooled attention of groups of query rows on each key block, weighted, root mean square.

    Group g holds ``rows`` consecutive query rows; q_g is their mean, and so is that of squares.

        sigma2_gb = sum_c mean over rows i of group g of (s q_ic)^2 key_variance_bc
        p_g       = softmax_b(s q_g.key_mean_b + log_size_b)
        error_gb  = p_gb exp(variance_weight * sigma2_gb / 2) sigma2_gb^variance_power
        score_nb  = sqrt(mean over groups g of query block n of error_gb^2)

    With power 1 this is the expected error of aggregating block b (``low_delta``), with power 0
    the attention that b is estimated to hold. Its square adds up over rows, as squared errors do.
    The softmax's sum leaves the variances out, so that one product less is needed: whoever weighs
    them says what they are relative to.

    Args:
        query: ``[B, H, Lq, D]``.
        key_mean: ``[B, H, Nk, D]``.
        key_variance: ``[B, H, Nk, D]``.
        log_size: float32 ``[B, H, Nk]``, natural log of the tokens in each block.
        scale: s.
        variance_weight: Share of ``sigma2 / 2`` that raises the mass of a block, at least 0.
        variance_power: Exponent of sigma2 in the score, at least 0.
        block_q: Query rows in a block; the last one may be ragged.
        rows: Query rows in a group, which divide ``block_q``; the last group may be ragged.

    Returns:
        ``[B, H, ceil(Lq / block_q), Nk]``, not negative, in ``score_dtype(query.dtype)``.
    """
    accumulator = _accumulator(query)
    scaled = query.to(accumulator) * scale
    groups = torch.cat([x.mean(3) for x in split_blocks(scaled, rows)], 2)
    sigma2 = pooled_variance(query, key_variance, scale, rows)
    logits = groups @ key_mean.to(accumulator).transpose(-1, -2)
    logits = logits + log_size[..., None, :].to(accumulator)
    scores = (logits.log_softmax(-1) + variance_weight / 2 * sigma2).exp()
    if variance_power:
        scores = scores * (sigma2 if variance_power == 1 else sigma2**variance_power)
    blocks = split_blocks(scores.square(), block_q // rows)
    return torch.cat([x.mean(3) for x in blocks], 2).sqrt().to(score_dtype(query.dtype))


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of ``block_scores`` of queries in ``dtype``: that, or bfloat16 for float16 and its range."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def weigh_scores(
    scores: Tensor,
    query: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    scale: float,
    variance_weight: float,
    value_power: float,
    block_q: int,
) -> Tensor:
    """Scores of ``block_scores`` by what is one number for each head or key block.

        sigma2_h = sum_c mean over n of (s q_nc)^2 mean over b of key_variance_bc
        weight_b = value_variance_b^(value_power / 2) exp(-variance_weight * sigma2_h / 2)

    q_n is the first row of query block n: sigma2_h is about the mean of those of ``block_scores``.

    Args:
        scores: ``[B, H, Nq, Nk]``.
        query: ``[B, H, Lq, D]``.
        key_variance: ``[B, H, Nk, D]``.
        value_variance: float32 ``[B, H, Nk]``, not negative.
        scale: s.
        variance_weight: As in ``block_scores``.
        value_power: At least 0.
        block_q: Query rows in a block.

    Returns:
        ``scores`` times the weights of their key blocks, rounded once.
    """
    weights = value_variance ** (value_power / 2)
    if variance_weight:
        rows = query[:, :, ::block_q].to(weights.dtype) * scale
        variance = key_variance.to(weights.dtype).mean(2)
        sigma2 = (rows.square().mean(2) * variance).sum(-1, keepdim=True)
        weights = weights * (-variance_weight / 2 * sigma2).exp()
    return (scores * weights[:, :, None]).to(scores.dtype)


def block_statistics(
    key: Tensor, value: Tensor, block_kv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means and variances of the blocks of keys and values, over their true tokens.

        key_mean_b       = mean of the keys of block b               value_mean_b alike
        key_variance_bc  = mean of (k_jc - key_mean_bc)^2 over the block's tokens j
        value_variance_b = mean of |v_j - value_mean_b|^2 over them: all channels together
        covariance       = mean of (k_j - key_mean_b(j))^T (v_j - value_mean_b(j)) over all tokens

    Args:
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        block_kv: Keys in a block; the last one may be ragged.

    Returns:
        ``key_mean`` and ``key_variance`` ``[B, H, Nk, D]`` and ``value_mean`` ``[B, H, Nk, Dv]``
        in the dtype of ``key``, rounded once (a variance beyond float16 is its largest number);
        ``value_variance`` ``[B, H, Nk]`` and ``covariance`` ``[B, H, D, Dv]`` in float32 (float64
        for float64 inputs). ``Nk = ceil(L / block_kv)``.
    """
    dtype = key.dtype
    key, value = key.to(_accumulator(key)), value.to(_accumulator(value))
    pooled = []
    covariance = key.new_zeros((*key.shape[:2], key.shape[-1], value.shape[-1]))
    for keys, values in zip(
        split_blocks(key, block_kv), split_blocks(value, block_kv), strict=True
    ):
        key_variance, key_mean = torch.var_mean(keys, dim=3, correction=0)
        value_variance, value_mean = torch.var_mean(values, dim=3, correction=0)
        pooled.append((key_mean, key_variance, value_mean, value_variance.sum(-1)))
        deviation = (keys - key_mean[:, :, :, None]).flatten(2, 3)
        # deviations of keys sum to zero in a block: the values' means need not be taken off
        covariance = covariance + deviation.transpose(-1, -2) @ values.flatten(2, 3)
    means = (torch.cat(parts, 2) for parts in zip(*pooled, strict=True))
    *by_channel, value_variance = means
    key_mean, key_variance, value_mean = (rounded(x, dtype) for x in by_channel)
    return key_mean, key_variance, value_mean, value_variance, covariance / key.shape[2]


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm for each head: assign every token to its nearest centroid, move these.

        label_i    = argmin_c |x_i - centroid_c|^2           (the first of several)
        centroid_c = mean of the tokens with label c         (stays where it is if there are none)

    Args:
        tokens: ``[B, H, L, D]``.
        centroids: ``[B, H, C, D]``, where to start.
        iterations: How often both steps are taken, at least 1.

    Returns:
        Labels of the last iteration, int32 ``[B, H, L]``; the centroids that follow from them,
        ``[B, H, C, D]``; how many tokens each has, int32 ``[B, H, C]``.
    """
    tokens, centroids = tokens.to(_accumulator(tokens)), centroids.to(_accumulator(tokens))
    for _ in range(iterations):
        distance = centroids.square().sum(-1)[:, :, None] - 2 * tokens @ centroids.mT
        labels = distance.argmin(-1)
        members = torch.zeros_like(distance).scatter(-1, labels[..., None], 1.0)  # [B, H, L, C]
        sizes = members.sum(2)
        means = members.mT @ tokens / sizes.clamp(min=1)[..., None]
        centroids = torch.where(sizes[..., None] > 0, means, centroids)
    return labels.int(), centroids, sizes.int()


def select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    """Keep the best block of every row, then those with the highest scores.

    A budget is spent over each ``rows`` consecutive rows of a sample, head after head. Of equal
    scores the one that comes first is kept. NaN counts as ``-inf``.

    Args:
        scores: ``[B, H, Nq, Nk]``.
        kept: Blocks to keep in a budget, from ``rows`` to ``rows * Nk``.
        rows: Rows in a budget, which divide ``H * Nq``.

    Returns:
        Boolean ``[B, H, Nq, Nk]``.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best = torch.zeros_like(scores, dtype=torch.bool)
    best = best.scatter(-1, scores.argmax(-1, keepdim=True), True).reshape(
        -1, rows * best.shape[-1]
    )
    order = scores.reshape(best.shape).argsort(dim=-1, descending=True, stable=True)
    best_first = best.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True)
    chosen = order.gather(-1, best_first)[:, :kept]
    return torch.zeros_like(best).scatter(-1, chosen, True).view(scores.shape)


def list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a mask of blocks into the lists of ``sparse_attention``.

    Args:
        exact: Boolean ``[B, H, Nq, Nk]``.

    Returns:
        int32 ``[B, H, Nq, Nk]``, ids in ascending order, then zeros; int32 ``[B, H, Nq]``, how many
        there are.
    """
    order = exact.int().argsort(dim=-1, descending=True, stable=True)
    counts = exact.sum(-1, dtype=torch.int32)
    padding = torch.arange(exact.shape[-1], device=exact.device) >= counts[..., None]
    return order.masked_fill(padding, 0).int(), counts


def fit_tail(
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
) -> tuple[Tensor, Tensor]:
    """By how much the mass of the representatives and the slope of a tail should be larger.

    Some query rows of each head, evenly spaced, attend to the keys of each ``sampled_block``, as if
    there were no others. For such a row i, with its output o_i, what lists and tail give it with
    both factors, and sums over the blocks b that it does not attend to exactly:

        total_i = sum of the row's exact weights + mass sum_b m_ib     m_ib: of a representative
        given_i = output from these, with the slope
        u_i = sum_b m_ib (value_mean_b - given_i) / total_i
        x_i = sum_b m_ib / (1 + sigma2_ib) (s q_i @ slope) / total_i

    with masses m and variances sigma2 as in ``sparse_attention``. Where ``mass`` grows by d and
    ``mass gain`` by e, the output moves by ``d u + e x`` to first order. Each of ``STEPS`` steps
    takes the d and e that bring it closest to o over the rows, with a ridge that holds both factors
    to 1: regression on the operator's own error (``docs/measured.md`` says what it is worth).

    Args:
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        exact: Boolean ``[B, H, Nq, Nk]``: True where query block n attends to key block b exactly.
        key_counts: As in ``clustered_attention``; ``[B, H, 0]`` where every key counts.
        key_mean: ``[B, H, Nk, D]``.
        key_variance: ``[B, H, Nk, D]``.
        value_mean: ``[B, H, Nk, Dv]``.
        log_size: float32 ``[B, H, Nk]``: natural log of the keys in each block.
        slope: float32 ``[B, H, D, Dv]``.
        scale: s, multiplies the logits.
        variance_weight: As in ``sparse_attention``.
        rows: R, how many rows; row i of them is row ``(2 i + 1) Lq // (2 R)``.
        block_q: Query rows in a block; the last one may be ragged.
        block_kv: Keys in a block; the last one may be ragged.

    Returns:
        ``mass``, from ``1 / LIMIT`` to ``LIMIT``, and ``gain``, from 0 to ``LIMIT``, ``[B, H]``,
        float32 (float64 for float64 inputs); 1 where no row has a tail. Rows with a number that is
        not finite do not count.
    """
    accumulator = _accumulator(query)
    every = spacing(exact.shape[3])
    if every > 1:
        many = exact.shape[3] // every
        block = sampled_block(torch.arange(many, device=key.device), every)
        number = block[:, None] * block_kv + torch.arange(block_kv, device=key.device)
        beyond = max(0, (sampled_block(many - 1, every) + 1) * block_kv - key.shape[2])
        number = number.flatten()[: many * block_kv - beyond]
        key, value = (x.index_select(2, number) for x in (key, value))
        exact = exact.index_select(3, block)
        of_blocks = (key_mean, key_variance, value_mean, log_size)
        key_mean, key_variance, value_mean, log_size = (x.index_select(2, block) for x in of_blocks)
        if key_counts.shape[2]:
            key_counts = key_counts.index_select(2, block)
    length = query.shape[2]
    place = (2 * torch.arange(rows, device=query.device) + 1) * length // (2 * rows)
    sample = query.index_select(2, place)  # [B, H, R, D]
    logits = (sample @ key.mT).to(accumulator) * scale  # [B, H, R, Lk]
    if key_counts.shape[2]:
        inside = torch.arange(block_kv, device=key.device) < key_counts[..., None]
        logits = logits.masked_fill(~inside.flatten(2)[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp()
    listed = exact.index_select(2, place // block_q)  # [B, H, R, Nk]
    in_tail = ~listed[..., None].expand(*listed.shape, block_kv).flatten(3)[..., : key.shape[2]]
    both = torch.cat([weights * ~in_tail, weights * in_tail], 2)
    exact_mass, true_mass = both.sum(-1, keepdim=True).chunk(2, 2)
    both = both.to(value.dtype)  # one product reads the values once
    exact_values, true_values = (both @ value).to(accumulator).chunk(2, 2)

    # variance of the logits, of the query block of each row as in ``pooled_variance``
    members = place[:, None] // block_q * block_q + torch.arange(block_q, device=query.device)
    squares = query.index_select(2, members.clamp(max=length - 1).flatten()).to(accumulator)
    squares = (squares * scale).square().unflatten(2, (-1, block_q))  # [B, H, R, block_q, D]
    inside = (members < length)[..., None]
    squares = (squares * inside).sum(3) / inside.sum(1)
    sigma2 = squares @ key_variance.to(accumulator).mT
    scaled = sample.to(accumulator) * scale
    mass = scaled @ key_mean.to(accumulator).mT + log_size[:, :, None] - lse
    mass = (mass + variance_weight / 2 * sigma2).exp().masked_fill(listed, 0.0)
    x = (mass / (1 + sigma2)).sum(-1, keepdim=True) * (scaled @ slope.to(accumulator))
    values, mass = mass @ value_mean.to(accumulator), mass.sum(-1, keepdim=True)
    of_mass = of_slope = mass.new_ones((*mass.shape[:2], 1, 1))
    for _ in range(STEPS):
        # no difference of large numbers, whether lists or tail have nearly all of a row
        more, total = of_mass * mass - true_mass, exact_mass + of_mass * mass  # total: 1 + more
        given = of_mass * values + of_slope * x  # in place of the true values
        rest = exact_values * (more / total) + true_values - given / total
        u, along = (values - (exact_values + given) * (mass / total)) / total, x / total
        y = rest + (of_mass - 1) * u + (of_slope - 1) * along
        of_mass, of_slope = (f[..., None, None] for f in _least_squares(u, along, y))
    of_mass, of_slope = of_mass[..., 0, 0], of_slope[..., 0, 0]
    return of_mass, of_slope / of_mass


def fitted_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """The tail of ``sparse_attention`` by the factors of ``fit_tail``.

    Args:
        args: As of ``fit_tail``.

    Returns:
        ``tail_log_size`` ``[B, H, Nk]``, and ``tail_slope`` ``[B, H, 1, D, Dv]`` in the dtype of
        the keys.
    """
    return by_factors(*fit_tail(*args), *args)


def by_factors(mass: Tensor, gain: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``fitted_tail`` from what ``fit_tail`` returns for the same arguments."""
    key, log_size, slope = args[1], args[8], args[9]
    fitted = slope * gain[..., None, None]
    return log_size + mass.log()[..., None], rounded(fitted[:, :, None], key.dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To another dtype; in float16, which ends at 65504, what is beyond that is that."""
    if dtype == torch.float16:
        x = x.clamp(-LARGEST, LARGEST)
    return x.to(dtype)


def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``x.index_select(dim, index)`` with dimensions in memory as they were.

    Whoever takes the result may be compiled for that: the next block of a model, a view.

    Args:
        x: Of any dtype; no stride is 0.
        index: int64, one-dimensional, as long as that dimension.
        dim: Of ``x``, from 0.
    """
    order = memory_order(x)
    gathered = x.permute(order).index_select(order.index(dim), index)
    return gathered.permute([order.index(i) for i in range(x.dim())])


def memory_order(x: Tensor) -> list[int]:
    """The dimensions by stride, the largest first; of equal ones in their own order."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda dim: -strides[dim])


def spacing(blocks: int) -> int:
    """Of how many key blocks a fit looks at one."""
    return max(1, blocks // SAMPLED_BLOCKS)


def sampled_block(i: Any, every: int) -> Any:
    """Which key block is number i, an int or a tensor, of those that a fit looks at.

    One of every ``every``; which one of them follows the golden ratio, because blocks at equal
    distances may all be of one column of the frames.
    """
    return i * every + i * GOLDEN % 2**16 * every // 2**16


def _least_squares(u: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of ``y + u + x = f u + g x``, ``[B, H]``, from rows ``[B, H, R, Dv]``.

    Rows that are not finite do not count.
    """
    pairs = ((u, u), (u, x), (x, x), (u, y), (x, y))
    products = torch.stack([(a * b).sum(-1) for a, b in pairs])  # [5, B, H, R]
    finite = products.isfinite().all(0)  # rows of padding may hold anything
    uu, ux, xx, uy, xy = products.where(finite, 0.0).sum(-1).unbind()
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    size_u, size_x = uu.sqrt().clamp(min=tiny), xx.sqrt().clamp(min=tiny)
    along_u, along_x = uy / size_u, xy / size_x
    both = ux / (size_u * size_x)  # at most 1: the determinant is positive
    determinant = (1 + RIDGE) ** 2 - both.square()
    of_u = 1 + ((1 + RIDGE) * along_u - both * along_x) / (determinant * size_u)
    of_x = 1 + ((1 + RIDGE) * along_x - both * along_u) / (determinant * size_x)
    mass = of_u.clamp(1 / LIMIT, LIMIT)
    return mass, mass * (of_x / mass).clamp(0.0, LIMIT)


def split_blocks(x: Tensor, block: int) -> list[Tensor]:
    """``[B, H, L, D]`` as its whole blocks ``[B, H, n, block, D]`` and its ragged one, if any."""
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (-1, block))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])
    return parts


def listed_blocks(block_ids: Tensor, block_counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Turn lists of key blocks into a mask.

    Args:
        block_ids: int32 ``[B, H, Nq, M]``.
        block_counts: int32 ``[B, H, Nq]``.
        blocks: Nk, how many key blocks there are.

    Returns:
        Boolean ``[B, H, Nq, Nk]``, True where listed; boolean ``[B, H, Nq]``, False where a listed
        id lies outside ``[0, Nk)``.
    """
    used = torch.arange(block_ids.shape[-1], device=block_ids.device) < block_counts[..., None]
    inside = (block_ids >= 0) & (block_ids < blocks)
    spill = block_ids.long().masked_fill(~(used & inside), blocks)  # one column too many
    mask = torch.zeros((*block_ids.shape[:-1], blocks + 1), dtype=torch.bool, device=spill.device)
    return mask.scatter(-1, spill, True)[..., :blocks], (inside | ~used).all(-1)


def pooled_variance(query: Tensor, variance: Tensor, scale: float, block_q: int) -> Tensor:
    """Variance of the logits of each query block in each key block, channel by channel.

        sigma2_nb = sum_c mean over rows i of block n of (s q_ic)^2 variance_bc

    Args:
        query: ``[B, H, Lq, D]``.
        variance: Of the keys, ``[B, H, Nk, D]``.
        scale: s.
        block_q: Query rows in a block; the last one may be ragged.

    Returns:
        ``[B, H, ceil(Lq / block_q), Nk]``, float32 (float64 for float64 inputs).
    """
    accumulator = _accumulator(query)
    square = (query.to(accumulator) * scale).square()
    mean = torch.cat([rows.mean(3) for rows in split_blocks(square, block_q)], 2)
    return mean @ variance.to(accumulator).transpose(-1, -2)


def _tail_logits(scaled: Tensor, tail_key: Tensor, tail_log_size: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[B, H, Lq, R]`` without their variance term."""
    if tail_key.dim() == 5:
        logits = torch.einsum("bhid,bhird->bhir", scaled, tail_key[:, :, rows])
        return logits + tail_log_size[:, :, rows]
    return scaled @ tail_key.transpose(-1, -2) + tail_log_size[:, :, None]


def _accumulator(x: Tensor) -> torch.dtype:
    """The dtype in which sums over many keys are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
