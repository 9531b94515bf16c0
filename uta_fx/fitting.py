"""Mass and slope of a tail, fitted for each head to a few rows of exact attention."""

from __future__ import annotations

import torch
from torch import Tensor

from uta_fx.policies.base import Selection

RIDGE = 0.3  # how strongly both are held to 1, relative to what the sample says (docs/measured.md)
STEPS = 2  # of Gauss and Newton, since mass is in the denominator too
LIMIT = 4.0  # mass lies between one part in so many and so many times, the slope below


def fit_tail(
    selection: Selection,
    exact: Tensor,
    key: Tensor,
    value: Tensor,
    slope: Tensor,
    variance_weight: float,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """By how much the mass of the representatives and the slope of the tail should be larger.

    For a row i of the sample, with its output o_i over all keys exactly, what lists and tail give
    it with both factors, and sums over the blocks b that it does not attend to exactly:

        total_i = sum of the row's exact weights + mass sum_b m_ib     m_ib: of a representative
        given_i = output from these, with the slope
        u_i = sum_b m_ib (value_mean_b - given_i) / total_i
        x_i = sum_b m_ib / (1 + sigma2_ib) (s q_i @ slope) / total_i

    Where ``mass`` grows by d and ``mass gain`` by e, the output moves by ``d u + e x`` to first
    order. Each step takes the d and e that bring it closest to o over the rows, with a ridge that
    holds both factors to 1.

    Args:
        selection: What the policy saw.
        exact: Boolean ``[B, H, Nq, Nk]``, what it chose.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        slope: ``[B, H, D, Dv]``.
        variance_weight: As in ``uta::sparse_attention``.
        rows: Query rows of each head, evenly spaced.

    Returns:
        ``mass`` and ``gain``, float32 ``[B, H]``; 1 where there is no tail.
    """
    query, statistics, scale = selection.query, selection.statistics, selection.scale
    length, block_q, block_kv = query.shape[2], selection.block_q, selection.block_kv
    places = torch.arange(rows, device=query.device)
    place = (2 * places + 1) * length // (2 * rows)
    sample = query.index_select(2, place)  # [B, H, R, D]
    logits = (sample @ key.mT).float() * scale  # [B, H, R, Lk]
    if statistics.size.dim() == 3:  # blocks of clusters hold padding
        inside = torch.arange(block_kv, device=key.device) < statistics.size[..., None]
        logits = logits.masked_fill(~inside.flatten(2)[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp()
    in_tail = ~exact.index_select(2, place // block_q)  # [B, H, R, Nk]
    of_keys = in_tail[..., None].expand(*in_tail.shape, block_kv).flatten(3)[..., : key.shape[2]]
    of_tail = weights * of_keys
    both = torch.cat([weights, of_tail], 2).to(value.dtype)  # one product reads the values once
    output, numerator = (both @ value).float().chunk(2, 2)

    # variance of the logits, of the query block of each row as in the operator
    first = place // block_q * block_q
    others = torch.arange(block_q, device=query.device)
    others = (first[:, None] + others).clamp(max=length - 1).flatten()
    square = (query.index_select(2, others).float() * scale).square().unflatten(2, (-1, block_q))
    sigma2 = square.mean(3) @ statistics.key_variance.float().mT
    scaled = sample.float() * scale
    mass = scaled @ statistics.key_mean.float().mT + statistics.log_size[:, :, None] - lse
    mass = (mass + variance_weight / 2 * sigma2).exp() * in_tail
    x = (mass / (1 + sigma2)).sum(-1, keepdim=True) * (scaled @ slope.float())
    values, mass = mass @ statistics.value_mean.float(), mass.sum(-1, keepdim=True)
    exact_values, exact_mass = output - numerator, 1 - of_tail.sum(-1, keepdim=True)
    of_mass = of_slope = mass.new_ones((*mass.shape[:2], 1, 1))
    for _ in range(STEPS):
        total = exact_mass + of_mass * mass
        given = (exact_values + of_mass * values + of_slope * x) / total
        u, along = (values - given * mass) / total, x / total
        rest = output - given + (of_mass - 1) * u + (of_slope - 1) * along
        of_mass, of_slope = (f[..., None, None] for f in _least_squares(u, along, rest))
    of_mass, of_slope = of_mass[..., 0, 0], of_slope[..., 0, 0]
    return of_mass, of_slope / of_mass


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
