"""Before the benchmarks of attention time anything: do sampled rows agree with float64.

And how far is an output from dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uta_fx.attention import list_arguments
from uta_fx.kernels import ops, reference

SAMPLED_HEADS = 2
SAMPLED_BLOCKS = 3  # query blocks of each sampled head: the first, one in the middle, the last


def check_attention(arguments: Sequence[Any]) -> None:
    """Compare sampled query blocks with float64.

    The kernels may err as much as the reference does in the same dtype, plus one unit in the last
    place of the largest output: half for its rounding, half for that of the tail's part. Their
    softmax is base 2, and on a GPU the variance of the logits may be rounded too.

    Args:
        arguments: Of ``uta::block_masked_attention``; with lists of the mask,
            ``uta::sparse_attention`` is checked too.

    Raises:
        ArithmeticError: They err more.
    """
    results = {
        "block_masked_attention": ops.block_masked_attention(*arguments),
        "sparse_attention": ops.sparse_attention(*list_arguments(arguments)),
    }
    query, block_q = arguments[0], arguments[11]
    chosen, rows = _sampled_rows(query.shape[2], block_q)
    for head in range(min(SAMPLED_HEADS, query.shape[1])):
        part: list[Any] = [
            x[:1, head : head + 1] if isinstance(x, Tensor) else x for x in arguments
        ]  # one sample, one head
        part[0] = part[0][:, :, rows.to(query.device)]
        part[3] = part[3][:, :, chosen]
        for i in (4, 5, 6):  # representatives of each query block
            if arguments[4].dim() == 5:
                part[i] = part[i][:, :, chosen]
        if part[8].shape[2] > 1:
            part[8] = part[8][:, :, chosen]
        double: list[Any] = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in part
        ]
        exact, exact_lse = reference.block_masked_attention(*double)
        eager, eager_lse = reference.block_masked_attention(*part)
        unit = torch.finfo(query.dtype).eps * exact.abs().max()
        base2, base2_lse = base2_roundings(part, exact, exact_lse)
        more, more_lse = variance_roundings(part) if query.is_cuda else (0.0, 0.0)
        allowed, allowed_lse = unit + base2 + more, base2_lse + more_lse
        for name, result in results.items():
            got, got_lse = (x[:1, head : head + 1, rows.to(query.device)] for x in result)
            _require(f"output of {name}", got, eager, exact, allowed)
            _require(f"log-sum-exp of {name}", got_lse, eager_lse, exact_lse, allowed_lse)


def base2_roundings(
    arguments: Sequence[Any], exact: Tensor, exact_lse: Tensor
) -> tuple[float, float]:
    """What a softmax in base 2 adds to the error of the output and of the log-sum-exp.

    The scale times log2(e) and its product with a logit are rounded in float32, and a GPU's exp2 is
    right to two units, which changes a weight by ``2^-24 * (2 |logit| + 4)`` of itself and an
    output by at most twice that share of the largest value; the log-sum-exp by that much and log2's
    two units.

    Args:
        arguments: Of ``uta::sparse_attention`` or ``uta::block_masked_attention``.
        exact: Output in float64.
        exact_lse: Log-sum-exp in float64; -inf where a row sees nothing.
    """
    seen = exact_lse[exact_lse != -torch.inf]
    largest_logit = max(seen.abs().max().item(), 1.0) if seen.numel() else 1.0
    values = (exact, arguments[2], arguments[-8])
    largest_value = max(x.abs().max().item() for x in values if x.numel())
    share = 2 * 2**-24 * (2 * largest_logit + 4)
    return share * largest_value, share


def variance_roundings(arguments: Sequence[Any]) -> tuple[float, float]:
    """What rounding sigma2, as on Hopper, adds to the error of the output and of the log-sum-exp.

    A mean of squares is rounded to the query's dtype and sigma2 to bfloat16: half a unit of each, a
    share ``u`` of sigma2. A logit moves by ``u * weight / 2 * sigma2``, a weight by the share ``e``
    that is its exponential's; the output by twice that of the largest value, and the slope's part,
    whose damping moves by ``u`` too, by as much of the largest rise.

    Args:
        arguments: Of ``uta::sparse_attention`` or ``uta::block_masked_attention``.
    """
    query, value, tail_value, variance, slope = (arguments[i].double() for i in (0, 2, -8, -6, -5))
    scale, weight, block_q = arguments[-4:-1]
    if not variance.shape[2]:
        return 0.0, 0.0
    u = torch.finfo(arguments[0].dtype).eps / 2 + torch.finfo(torch.bfloat16).eps / 2
    sigma2 = reference.pooled_variance(query, variance, scale, block_q).max().item()
    e = math.expm1(u * weight / 2 * sigma2)
    largest = max(value.abs().max().item(), tail_value.abs().max().item())
    rise = 0.0
    if slope.shape[2]:
        rise = (query[:, :, None] * scale @ slope).abs().max().item()
    return 2 * e * largest + (2 * e + u) * rise, e


def check_scores(arguments: Sequence[Any]) -> None:
    """Compare sampled rows of scores with float64.

    The mean query of a group and its mean of ``(s q)^2`` are rounded to the query's dtype: half a
    unit of sigma2, once as a factor of the score and once as the logarithm of another, by the
    largest sigma2, and of the products that a logit is the sum of, which counts twice. The rest is
    float32: a logit is rounded a few times, which counts twice, and a sum errs by 2^-24 for each
    term. Scores of queries in 16 bits are rounded to bfloat16 in the end: half a unit of
    themselves.

    Raises:
        ArithmeticError: A score is further away.
    """
    scores = ops.block_scores(*arguments)
    query, block_q = arguments[0], arguments[-2]
    chosen, rows = _sampled_rows(query.shape[2], block_q)
    part: list[Any] = [
        x[:1, :SAMPLED_HEADS].double() if isinstance(x, Tensor) else x for x in arguments
    ]
    part[0] = part[0][:, :, rows.to(query.device)]
    exact = reference.block_scores(*part)
    rows_q, mean, variance, log_size, scale, weight, power, _, group = part
    sigma2 = reference.pooled_variance(rows_q, variance, scale, group)
    groups = torch.cat([x.mean(3) for x in reference.split_blocks(rows_q * scale, group)], 2)
    products = groups.abs() @ mean.abs().mT
    logits = products + log_size[:, :, None] + weight / 2 * sigma2
    lift = weight / 2 * sigma2.max()
    unit = torch.finfo(query.dtype).eps / 2 * (power + lift + 2 * products.max())
    unit += 2**-24 * (8 * logits.max() + mean.shape[3] + mean.shape[2] + 8)
    if scores.dtype == torch.bfloat16:
        unit = (1 + unit) * (1 + torch.finfo(scores.dtype).eps / 2) - 1
    _require("scores", scores[:1, :SAMPLED_HEADS][:, :, chosen], exact, exact, unit * exact.max())


def check_statistics(key: Tensor, value: Tensor, block_kv: int) -> None:
    """Compare the statistics of sampled heads with float64.

    Raises:
        ArithmeticError: One is further away than ``require_statistics`` allows.
    """
    results = ops.block_statistics(key, value, block_kv)
    *sampled, key, value = (x[:1, :SAMPLED_HEADS] for x in (*results, key, value))
    require_statistics(sampled, key, value, block_kv)


def require_statistics(
    results: Sequence[Tensor], key: Tensor, value: Tensor, block_kv: int
) -> None:
    """Every number errs by the roundings on its way, at most.

    Float32 sums of n terms err by 2^-24 of the terms' absolute sum for each addition, and the
    division once more. A deviation carries the mean's error and is rounded; a variance squares it.
    Deviations of keys are rounded to their dtype, by half a unit, before they meet the values. What
    is of the keys' dtype is rounded to it.

    Args:
        results: Of ``uta::block_statistics``.
        key: ``[B, H, L, D]``, of which they are.
        value: ``[B, H, L, Dv]``, likewise.
        block_kv: Keys in a block.

    Raises:
        ArithmeticError: One errs more, or is NaN.
    """
    exact = reference.block_statistics(key.double(), value.double(), block_kv)
    limits = torch.finfo(key.dtype)
    additions = 2**-24 * (block_kv + 2)
    largest_k, largest_v = (additions * x.double().abs().max() for x in (key, value))

    def require(name: str, got: Tensor, expected: Tensor, allowed: Tensor) -> None:
        if got.dtype != torch.float32:  # half a unit, or half of the smallest number
            rounded = limits.eps / 2 * (expected.abs() + allowed)
            allowed = allowed + rounded.clamp(min=limits.smallest_normal * limits.eps / 2)
        if not ((got.double() - expected).abs() <= allowed).all():
            raise ArithmeticError(f"{name} of blocks differs from float64: nothing is timed")

    k_mean, k_var, v_mean, v_var, covariance = exact
    require("mean of keys", results[0], k_mean, largest_k)
    require("mean of values", results[2], v_mean, largest_v)
    for name, got, variance, error, channels in (
        ("variance of keys", results[1], k_var, largest_k, 1),
        ("variance of values", results[3], v_var, largest_v, value.shape[-1]),
    ):
        # mean of (x + e)^2 is off by 2 |e| times the mean deviation, at most its root, and e^2
        allowed = 2 * error * (channels * variance).sqrt() + channels * error**2
        terms = 2**-24 * (block_kv + channels + 4)
        require(name, got, variance, allowed + terms * variance)
    spread, size = (
        torch.cat([(x - centre).abs().flatten(2, 3) for x, centre in blocks], 2)
        for blocks in (
            [(x, x.mean(3, keepdim=True)) for x in reference.split_blocks(key.double(), block_kv)],
            [(x, 0.0) for x in reference.split_blocks(value.double(), block_kv)],
        )
    )
    unit = limits.eps / 2 + 2**-24 * (key.shape[2] + 8)
    allowed = unit * spread.mT @ size / key.shape[2] + largest_k * size.mean(2)[:, :, None]
    require("covariance of keys and values", results[4], covariance, allowed)


def check_selection(scores: Tensor, density: float) -> None:
    """Compare what a budget of the whole site keeps of scores with the rule, block by block.

    Raises:
        ArithmeticError: It keeps others.
    """
    _, heads, blocks_q, blocks = scores.shape
    rows = heads * blocks_q
    kept = max(rows, math.ceil(density * rows * blocks))
    mask = ops.select_blocks(scores, kept, rows)
    if not torch.equal(mask, reference.select_blocks(scores, kept, rows)):
        raise ArithmeticError("select_blocks keeps other blocks than its rule: nothing is timed")


def check_fit(arguments: Sequence[Any]) -> None:
    """Compare what sampled heads' tails are fitted by with float64.

    The factors may err as much as the reference does in the same dtype, plus what ``exact_fit``
    allows.

    Args:
        arguments: Of ``uta::fit_tail``.

    Raises:
        ArithmeticError: One errs more.
    """
    results = ops.fit_tail(*arguments)
    part: list[Any] = [x[:1, :SAMPLED_HEADS] if isinstance(x, Tensor) else x for x in arguments]
    eager = reference.fit_tail(*part)
    names = "mass of a fitted tail", "gain of a fitted tail"
    for name, got, err, exact, allowed in zip(names, results, eager, *exact_fit(part), strict=True):
        _require(name, got[:1, :SAMPLED_HEADS], err, exact, allowed.max())


def exact_fit(arguments: Sequence[Any]) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """The factors in float64, and by how much roundings of a few units may move each.

    How far a rounding moves the factors depends on the equations: four draws of one of all inputs
    say it, of which the worst counts eightfold, since a draw may happen to move a factor little.
    What is rounded on the way (weights, sums, the slope) is as many roundings of the same size. A
    few units of float32 are the arithmetic of the solution.

    Args:
        arguments: Of ``uta::fit_tail``.
    """
    double: list[Any] = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]
    exact = reference.fit_tail(*double)
    generator = torch.Generator(arguments[0].device).manual_seed(0)
    unit = torch.finfo(arguments[0].dtype).eps
    moved = [0.0, 0.0]
    for _ in range(4):
        others = list(double)
        for i in (0, 1, 2, 5, 6, 7, 9):
            drawn = torch.rand(
                others[i].shape, generator=generator, device=others[i].device, dtype=torch.float32
            )
            others[i] = others[i] * (1 + unit * (2 * drawn - 1))
        factors = zip(moved, reference.fit_tail(*others), exact, strict=True)
        moved = [max(worst, (x - true).abs().max().item()) for worst, x, true in factors]
    units = 8 * torch.finfo(torch.float32).eps
    return exact, [8 * by + units * true for by, true in zip(moved, exact, strict=True)]


def relative_error(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> float:
    """Squared error relative to dense attention's squares, on sampled rows of every head."""
    generator = torch.Generator().manual_seed(0)
    length = query.shape[2]
    rows = torch.randperm(length, generator=generator)[:128].to(query.device)
    error = total = 0.0
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            logits = query[b, h, rows].double() @ key[b, h].double().T * scale
            exact = logits.softmax(-1) @ value[b, h].double()
            error += (output[b, h, rows].double() - exact).square().sum().item()
            total += exact.square().sum().item()
    return error / total


def _require(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, rounding: Tensor | float
) -> None:
    error = (got.double() - exact).abs().max()
    allowed = (eager.double() - exact).abs().max() + rounding
    if not error <= allowed:
        raise ArithmeticError(
            f"{name} differs from float64 by {error:.2e} where {allowed:.2e} is allowed:"
            " nothing is timed"
        )


def _sampled_rows(length: int, block: int) -> tuple[list[int], Tensor]:
    """A few query blocks, the ragged last one among them, and their rows."""
    blocks = -(-length // block)
    chosen = sorted({0, blocks // 2, blocks - 1})[:SAMPLED_BLOCKS]
    rows = torch.cat([torch.arange(n * block, min((n + 1) * block, length)) for n in chosen])
    return chosen, rows
