"""Tokens kept by their true scores, with and without their tail: table 1 of the UTA paper."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from uta_fx.policies.base import share_of
from uta_fx.study.sites import AttentionCall

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
CHUNK = 1 << 24  # logits at a time


@dataclasses.dataclass(frozen=True)
class OracleError:
    """Mean squared errors of the output at one density, over all calls.

    Attributes:
        density: Share of each row's keys that are kept.
        dropped: With the other keys dropped (top-K).
        aggregated: With the others as one representative (top-K + UTA).
        recall: Share of attention that the kept keys hold.
    """

    density: float
    dropped: float
    aggregated: float
    recall: float

    @property
    def reduction(self) -> float:
        """By which share aggregation lowers the error."""
        return 1 - self.aggregated / self.dropped


def token_oracle(
    query: Tensor, key: Tensor, value: Tensor, scale: float, density: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep each row's keys of highest logits, in float64; the tail dropped, and aggregated.

    With T the kept keys and N others, of mean logit m and mean value w (UTA, equations 11 to 14):

        dropped     sum_T exp(z) v / sum_T exp(z)
        aggregated  (sum_T exp(z) v + N exp(m) w) / (sum_T exp(z) + N exp(m))

    Args:
        query: ``[..., L, D]``.
        key: ``[..., Lk, D]``.
        value: ``[..., Lk, Dv]``.
        scale: Multiplies the logits.
        density: In (0, 1].

    Returns:
        Both outputs ``[..., L, Dv]``, and the share ``[..., L]`` of attention that is kept.
    """
    query, key, value = (x.double() for x in (query, key, value))
    logits = scale * query @ key.mT
    kept = logits.topk(share_of(density, logits.shape[-1]), dim=-1).indices
    outside = torch.ones_like(logits).scatter(-1, kept, 0.0)
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
    *,
    rows: int | None = None,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> list[OracleError]:
    """Errors of the token-level oracle against dense attention, averaged over calls and heads.

    Args:
        calls: Attention calls.
        densities: Shares of keys to keep.
        rows: How many rows of each call to look at, drawn once; None for all.
        seed: Of the draw.
        progress: Called after each call.
    """
    sums = torch.zeros(len(densities), 3, dtype=torch.float64)
    count = 0
    for call in calls:
        length, scale = call.query.shape[2], call.query.shape[3] ** -0.5
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(length, generator=generator)[:rows].to(call.query.device)
        heads = call.query.shape[0] * call.query.shape[1]
        for part in chosen.split(max(1, CHUNK // (heads * length))):
            query = call.query.index_select(2, part)
            exact, _, _ = token_oracle(query, call.key, call.value, scale, 1.0)
            for i, density in enumerate(densities):
                dropped, aggregated, kept = token_oracle(
                    query, call.key, call.value, scale, density
                )
                errors = ((x - exact).square().mean(-1) for x in (dropped, aggregated))
                sums[i] += torch.stack([x.sum() for x in (*errors, kept)]).cpu()
            count += heads * len(part)
        progress()
    return [
        OracleError(density, *(row / count).tolist())
        for density, row in zip(densities, sums, strict=True)
    ]


def to_json(errors: Sequence[OracleError]) -> str:
    """Every number, and the reductions."""
    rows = [dataclasses.asdict(error) | {"reduction": error.reduction} for error in errors]
    return json.dumps(rows, indent=1) + "\n"


def markdown(errors: Sequence[OracleError]) -> str:
    """A row for each way, a column for each density."""
    lines = [
        f"| tokens kept | {' | '.join(f'{e.density:.0%}' for e in errors)} |",
        "|---" * (len(errors) + 1) + "|",
        f"| Top-K | {' | '.join(f'{e.dropped:.2e}' for e in errors)} |",
        "| Top-K + UTA | "
        + " | ".join(f"{e.aggregated:.2e} (-{e.reduction:.1%})" for e in errors)
        + " |",
        f"| recall of Top-K | {' | '.join(f'{e.recall:.1%}' for e in errors)} |",
    ]
    return "\n".join(lines)
