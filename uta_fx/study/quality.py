"""What tails, budgets, orders and densities are worth, in the generated picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from uta_fx.config import Config
from uta_fx.generate import psnr
from uta_fx.moving_shapes import MovingShapesPipeline, agreement, parse_prompt
from uta_fx.study.switch import Switch
from uta_fx.tails import KINDS

DENSITIES = (0.1, 0.2)
DENSE_UNTIL = (0.0, 0.2)


@dataclasses.dataclass(frozen=True)
class Score:
    """One configuration against dense, at the same prompts and seeds.

    Attributes:
        label: What varies, in words.
        config: The configuration.
        psnr: Of the clips, mean, in dB.
        agreement: Share of shapes that agree with the prompt.
        dense_agreement: The same of the dense clips.
    """

    label: str
    config: Config
    psnr: float
    agreement: float
    dense_agreement: float


def configurations(base: Config) -> list[tuple[str, Config]]:
    """The whole table: tails x {row, site} x {raster, tile} x densities x dense_until.

    After it what most public systems do: pooled top-k, equal rows, one representative for each
    skipped block or none.
    """
    forms: list[dict[str, Any]] = [
        {"policy": base.policy, "tail": tail, "budget": budget, "reorder": reorder}
        for tail, budget, reorder in itertools.product(KINDS, ("row", "site"), ("none", "tile"))
    ]
    forms += [
        {"policy": "topk", "tail": tail, "budget": "row", "reorder": "tile"}
        for tail in ("block", "none")
    ]
    return [
        (
            _label(form),
            dataclasses.replace(base, **form, density=density, dense_until=dense_until),
        )
        for form, density, dense_until in itertools.product(forms, DENSITIES, DENSE_UNTIL)
    ]


def _label(form: dict[str, Any]) -> str:
    order = "raster" if form["reorder"] == "none" else form["reorder"]
    return f"{form['policy']}, {form['tail']}, {form['budget']}, {order}"


def measure(
    pipeline: MovingShapesPipeline,
    prompts: Sequence[str],
    configs: Iterable[tuple[str, Config]],
    *,
    steps: int,
    seed: int,
) -> Iterator[Score]:
    """Generate every prompt dense, then with each configuration, and compare.

    Args:
        pipeline: Loaded on its device; left as it was.
        prompts: One clip each.
        configs: Labels and configurations.
        steps: Denoising steps.
        seed: Of the first prompt; the next ones count up.

    Yields:
        A score for each configuration, as soon as it is known.

    Raises:
        ValueError: The transformer has no video self-attention.
    """
    scenes = [parse_prompt(prompt) for prompt in prompts]
    with Switch(pipeline) as switch:
        dense = pipeline(prompts, steps=steps, seed=seed).cpu()
        if not switch.sites:
            raise ValueError("pipeline must have video self-attention to study, got none")
        dense_agreement = agreement(dense, scenes)
        for label, config in configs:
            switch.config = config
            videos = pipeline(prompts, steps=steps, seed=seed).cpu()
            yield Score(
                label, config, psnr(dense, videos), agreement(videos, scenes), dense_agreement
            )


def markdown(scores: Sequence[Score]) -> str:
    """One row for each label, one column for each density and dense_until: PSNR in dB."""
    columns = sorted({(s.config.density, s.config.dense_until) for s in scores})
    header = ["policy, tail, budget, order"] + [
        f"density {density}, {'all sparse' if not until else f'first {until:.0%} dense'}"
        for density, until in columns
    ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    cells = {(s.label, s.config.density, s.config.dense_until): s for s in scores}
    for label in dict.fromkeys(s.label for s in scores):
        row = [label]
        for density, until in columns:
            score = cells.get((label, density, until))
            row.append(f"{score.psnr:.1f} ({score.agreement:.0%})" if score else "-")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def write_json(path: Path, scores: Sequence[Score]) -> None:
    """Write every score with its whole configuration."""
    rows = [
        {
            "label": score.label,
            "psnr": score.psnr,
            "agreement": score.agreement,
            "dense_agreement": score.dense_agreement,
            **{name: str(value) for name, value in dataclasses.asdict(score.config).items()},
        }
        for score in scores
    ]
    path.write_text(json.dumps(rows, indent=1))
