"""Single tokens kept by their true scores, with and without their tail.

By logit it is table 1 of the UTA paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from uta_fx.policies.base import share_of
from uta_fx.study.sites import AttentionCall

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
CHUNK = 1 << 24  # logits at a time
RULES = {"topk": "Top-K", "topp": "Top-P", "low_delta": "Low-Delta"}
"""Which tokens are kept: rules of ``choose_tokens``, and their names in the table."""


@dataclasses.dataclass(frozen=True)
class OracleError:
    """Mean squared errors of the output by one rule at one density, over all calls.

    Attributes:
        rule: A key of ``RULES``.
        density: Share of keys that are kept.
        dropped: With the other keys dropped.
        aggregated: With the others as one representative (UTA).
        recall: Share of attention that the kept keys hold.
    """

    rule: str
    density: float
    dropped: float
    aggregated: float
    recall: float

    @property
    def reduction(self) -> float:
        """By which share aggregation lowers the error."""
        return 1 - self.aggregated / self.dropped


def choose_tokens(logits: Tensor, value: Tensor, density: float, rule: str) -> Tensor:
    """Single keys to keep, by their true scores.

    ``topk`` keeps the highest logits of each row. ``topp`` keeps, in each row, the fewest keys that
    hold a share of its attention, the share with which the rows keep ``density`` on average.
    ``low_delta`` is the rule of ``OracleLowDelta`` with a token for a block: the highest of each
    row by p (z - m)^2 nu, where p is a key's attention, z - m its logit less the row's mean, and nu
    how far its value is from the mean of all.

    Args:
        logits: ``[..., L, Lk]``.
        value: ``[..., Lk, Dv]``.
        density: Share of keys, in (0, 1].
        rule: A key of ``RULES``.

    Returns:
        Boolean ``[..., L, Lk]``, at least one key in a row.

    Raises:
        ValueError: There is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    count = share_of(density, logits.shape[-1])
    if rule == "topp":
        ranked, order = logits.softmax(-1).sort(-1, descending=True)
        above = ranked.cumsum(-1) - ranked  # 0 for the first of each row
        share = above.flatten().kthvalue(share_of(density, above.numel())).values
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, above <= share)
    scores = logits
    if rule == "low_delta":
        spread = (value - value.mean(-2, keepdim=True)).norm(dim=-1)
        deviation = logits - logits.mean(-1, keepdim=True)
        scores = logits.softmax(-1) * deviation.square() * spread[..., None, :]
    kept = scores.topk(count, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)


def token_oracle(
    query: Tensor, key: Tensor, value: Tensor, scale: float, density: float, rule: str = "topk"
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep single keys by their true scores, in float64; the tail dropped, and aggregated.

    With T the kept keys and N others, of mean logit m and mean value w (UTA, equations 11 to 14):

        dropped     sum_T exp(z) v / sum_T exp(z)
        aggregated  (sum_T exp(z) v + N exp(m) w) / (sum_T exp(z) + N exp(m))

    Args:
        query: ``[..., L, D]``.
        key: ``[..., Lk, D]``.
        value: ``[..., Lk, Dv]``.
        scale: Multiplies the logits.
        density: In (0, 1].
        rule: As in ``choose_tokens``.

    Returns:
        Both outputs ``[..., L, Dv]``, and the share ``[..., L]`` of attention that is kept.
    """
    query, key, value = (x.double() for x in (query, key, value))
    logits = scale * query @ key.mT
    outside = (~choose_tokens(logits, value, density, rule)).double()
    count = outside.sum(-1, keepdim=True)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    inside = weights * (1 - outside)
    mass = inside.sum(-1, keepdim=True)
    some = count.clamp(min=1)
    mean = (logits * outside).sum(-1, keepdim=True) / some
    tail = count * (mean - top).exp()
    dropped = inside @ value
    aggregated = (dropped + tail * (outside @ value / some)) / (mass + tail)
    return dropped / mass, aggregated, (mass / weights.sum(-1, keepdim=True))[..., 0]


@torch.no_grad()
def measure_oracle(
    calls: Iterable[AttentionCall],
    densities: Sequence[float] = DENSITIES,
    rules: Sequence[str] = tuple(RULES),
    *,
    rows: int | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> list[OracleError]:
    """Errors of the token-level oracle against dense attention, averaged over calls and heads.

    Args:
        calls: Attention calls.
        densities: Shares of keys to keep.
        rules: Keys of ``RULES``. The share of ``topp`` is one for the rows that are looked at
            together, at most 16 million logits.
        rows: How many rows of each call to look at, drawn once; None for all.
        seed: Of the draw.
        progress: Called after each call.
    """
    points = list(itertools.product(rules, densities))
    sums = torch.zeros(len(points), 3, dtype=torch.float64)
    count = 0
    for call in calls:
        length, scale = call.query.shape[2], call.query.shape[3] ** -0.5
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(length, generator=generator)[:rows].to(call.query.device)
        heads = call.query.shape[0] * call.query.shape[1]
        for part in chosen.split(max(1, CHUNK // (heads * length))):
            query = call.query.index_select(2, part)
            exact, _, _ = token_oracle(query, call.key, call.value, scale, 1.0)
            for i, (rule, density) in enumerate(points):
                dropped, aggregated, kept = token_oracle(
                    query, call.key, call.value, scale, density, rule
                )
                errors = ((x - exact).square().mean(-1) for x in (dropped, aggregated))
                sums[i] += torch.stack([x.sum() for x in (*errors, kept)]).cpu()
            count += heads * len(part)
        progress()
    return [
        OracleError(*point, *(row / count).tolist())
        for point, row in zip(points, sums, strict=True)
    ]


def to_json(errors: Sequence[OracleError]) -> str:
    """Every number, and the reductions."""
    rows = [dataclasses.asdict(error) | {"reduction": error.reduction} for error in errors]
    return json.dumps(rows, indent=1) + "\n"


def markdown(errors: Sequence[OracleError]) -> str:
    """Three rows for each rule, a column for each density."""
    densities = list(dict.fromkeys(error.density for error in errors))
    lines = [
        f"| tokens kept | {' | '.join(f'{density:.0%}' for density in densities)} |",
        "|---" * (len(densities) + 1) + "|",
    ]
    for rule in dict.fromkeys(error.rule for error in errors):
        some = [error for error in errors if error.rule == rule]
        cells = [f"{e.aggregated:.2e} (-{e.reduction:.1%})" for e in some]
        lines += [
            f"| {RULES[rule]} | {' | '.join(f'{e.dropped:.2e}' for e in some)} |",
            f"| {RULES[rule]} + UTA | {' | '.join(cells)} |",
            f"| recall of {RULES[rule]} | {' | '.join(f'{e.recall:.1%}' for e in some)} |",
        ]
    return "\n".join(lines)
