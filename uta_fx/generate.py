"""Generate the same clips dense and sparse, and measure how they differ."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from uta_fx._optional import require
from uta_fx.config import Config
from uta_fx.enable import dense_steps, disable, enable
from uta_fx.moving_shapes import MovingShapesPipeline, agreement, parse_prompt

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        videos: float32 ``[B, 3, F, H, W]`` on the CPU, in [0, 1].
        seconds: Wall time of each step, the first of each variant with its compilation.
        agreement: Share of shapes whose colour and direction agree with the prompt.
    """

    videos: Tensor
    seconds: tuple[float, ...]
    agreement: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The same prompts and seeds, dense and sparse.

    Attributes:
        dense: Generated with Inductor alone.
        sparse: Generated with ``backend="uta"``.
        dense_steps: How many first steps of the sparse run were dense (``dense_until``).
        psnr: Peak signal-to-noise ratio in dB, mean over the clips.
        ssim: Structural similarity, mean over clips and frames.
    """

    dense: Run
    sparse: Run
    dense_steps: int
    psnr: float
    ssim: float

    @property
    def dense_step_seconds(self) -> float:
        """Median wall time of a dense step."""
        return statistics.median(self.dense.seconds)

    @property
    def sparse_step_seconds(self) -> float:
        """Median wall time of a sparse step."""
        return statistics.median(self.sparse.seconds[self.dense_steps :] or self.dense.seconds)

    @property
    def speedup(self) -> float:
        """Dense step over sparse step."""
        return self.dense_step_seconds / self.sparse_step_seconds


def compare(
    pipeline: MovingShapesPipeline,
    prompts: Sequence[str],
    config: Config,
    *,
    steps: int,
    seed: int,
    progress: Progress = lambda name, step, steps: None,
) -> Comparison:
    """Generate dense and sparse.

    Args:
        pipeline: Loaded on its device; left as it was.
        prompts: One clip each.
        config: Of the sparse run; its ``inner`` compiles the dense run too.
        steps: Denoising steps.
        seed: Of the first prompt; the next ones count up.
        progress: Called with the run's name, the step that ended and the number of steps.

    Raises:
        ValueError: A prompt is not in the grammar, or ``steps`` is below 1.
    """
    transformer = pipeline.transformer
    options: dict[str, Any] = {"fullgraph": True}
    if pipeline.device.type == "cuda" and config.inner == "inductor":
        options["mode"] = "reduce-overhead"  # launches take longer than the work of a small model
    dense_forward = torch.compile(transformer.forward, backend=config.inner, **options)

    def run(name: str) -> Run:
        return _generate(pipeline, prompts, steps, seed, lambda s, n: progress(name, s, n))

    with _forward(transformer, dense_forward):
        dense = run("dense")
    enable(pipeline, config, **options)
    try:
        sparse = run("sparse")
    finally:
        disable(pipeline)
    return Comparison(
        dense=dense,
        sparse=sparse,
        dense_steps=dense_steps(steps, config.dense_until),
        psnr=psnr(dense.videos, sparse.videos),
        ssim=ssim(dense.videos, sparse.videos),
    )


def psnr(reference: Tensor, videos: Tensor) -> float:
    """Peak signal-to-noise ratio of clips ``[B, 3, F, H, W]`` in [0, 1], mean over B, in dB."""
    error = (reference - videos).square().flatten(1).mean(1).clamp(min=1e-12)
    return float((-10 * error.log10()).mean())


def ssim(reference: Tensor, videos: Tensor) -> float:
    """Structural similarity of clips ``[B, 3, F, H, W]`` in [0, 1], mean over clips and frames."""
    metrics = require("skimage.metrics", extra="demo")
    frames = [x.transpose(1, 2).flatten(0, 1).numpy() for x in (reference, videos)]
    return statistics.fmean(
        float(metrics.structural_similarity(a, b, channel_axis=0, data_range=1.0))
        for a, b in zip(*frames, strict=True)
    )


def _generate(
    pipeline: MovingShapesPipeline,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> Run:
    seconds = []
    last = time.perf_counter()

    def tick(step: int, total: int) -> None:
        nonlocal last
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        progress(step, total)

    videos = pipeline(prompts, steps=steps, seed=seed, callback=tick).cpu()
    scenes = [parse_prompt(prompt) for prompt in prompts]
    return Run(videos, tuple(seconds), agreement(videos, scenes))


@contextmanager
def _forward(model: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``model`` run ``forward`` for a while."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
