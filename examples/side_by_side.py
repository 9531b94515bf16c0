"""What the ``generate_*.py`` share: arguments, random models, a clock, the video and the table."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import uta_fx
from uta_fx.enable import dense_steps
from uta_fx.generate import psnr, ssim
from uta_fx.pictures import VIDEO_SUFFIXES, comparison_rows, write_side_by_side
from uta_fx.study.pipelines import real_size_pipeline, tiny_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

TINY = {
    "height": 96,
    "width": 160,
    "frames": 17,
    "steps": 6,
    "min_tokens": 260,  # the video has 300 and more, a text up to 256
    "inner": "eager",  # Inductor would take longer than everything else
}


def arguments(
    argv: Sequence[str] | None, description: str, *, model: str, **defaults: int
) -> argparse.Namespace:
    """Read the command line; ``defaults`` are the model's own height, width, frames and steps."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default=model, help=f"name on the Hub, or a folder ({model})")
    option("--prompt", default="a red fox runs through fresh snow, cinematic")
    option("--height", type=int, help=f"pixels ({defaults['height']})")
    option("--width", type=int, help=f"pixels ({defaults['width']})")
    option("--frames", type=int, help=f"frames of the video ({defaults['frames']})")
    option("--steps", type=int, help=f"denoising steps ({defaults['steps']})")
    option("--seed", type=int, default=0, help="of the noise, dense and sparse (0)")
    option("--density", type=float, default=0.25, help="share of exact key blocks (0.25)")
    option("--dense-until", type=float, default=0.2, help="share of steps dense at first (0.2)")
    option("--min-tokens", type=int, help="shorter sequences stay dense (4096)")
    option("--inner", help="what compiles the graphs (inductor)")
    option("--out", type=Path, default=Path("side_by_side.mp4"), help="an .mp4 or a .gif")
    option("--offload", action="store_true", help="keep on the GPU only the model that runs")
    memory = parser.add_mutually_exclusive_group().add_argument
    memory("--tiny", action="store_true", help="small random models, seconds on a CPU: noise")
    memory(
        "--random", action="store_true",
        help="the transformer at its real size with random weights, all else small: noise",
    )  # fmt: skip
    args = parser.parse_args(argv)
    values = defaults | {"min_tokens": 4096, "inner": "inductor"} | (TINY if args.tiny else {})
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out.suffix not in VIDEO_SUFFIXES:
        parser.error(f"--out must end in {' or '.join(VIDEO_SUFFIXES)}, got {args.out}")
    least = dense_steps(args.steps, args.dense_until) + 2
    if args.steps < least:
        parser.error(f"--steps must be at least {least} to time a sparse one, got {args.steps}")
    return args


def place(pipeline: Any, offload: bool) -> None:
    """Bring a pipeline to the GPU if there is one, at once or model by model."""
    if offload:
        pipeline.enable_model_cpu_offload(device=DEVICE)
    else:
        pipeline.to(DEVICE)


def random_pipeline(args: argparse.Namespace, name: str) -> Any:
    """What ``--tiny`` or ``--random`` asks for, made in memory; None where neither does."""
    if args.tiny:
        return tiny_pipeline(name)
    return real_size_pipeline(name, DEVICE) if args.random else None


def config_of(args: argparse.Namespace) -> uta_fx.Config:
    """As the command line asks. The first steps lay out the picture and stay dense."""
    return uta_fx.Config(
        density=args.density,
        dense_until=args.dense_until,
        min_tokens=args.min_tokens,
        inner=args.inner,
        strict=True,  # an error where a video self-attention would stay dense
    )


class Clock:
    """Wall time of each step but the first, as a pipeline's ``callback_on_step_end``."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Tensor, tensors: dict) -> dict:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
        return tensors


@dataclass(frozen=True)
class Run:
    """One generation: its video ``[1, 3, F, H, W]`` in [0, 1] and the seconds of its steps."""

    video: Tensor
    seconds: list[float]


Generate = Callable[[Clock], Tensor]


def timed(generate: Generate) -> Run:
    """Generate; ``generate`` hands the clock to its pipeline and returns ``[F, 3, H, W]``."""
    clock = Clock()
    video = generate(clock).float().cpu()
    return Run(video.transpose(0, 1)[None], clock.seconds)


def timed_dense(args: argparse.Namespace, pipeline: Any, generate: Generate) -> Run:
    """What we compare with: every step dense, compiled by Inductor."""
    uta_fx.enable(pipeline, uta_fx.Config(dense_until=1, inner=args.inner), fullgraph=True)
    run = timed(generate)
    uta_fx.disable(pipeline)
    return run


def show(args: argparse.Namespace, dense: Run, sparse: Run, frames_per_second: int) -> None:
    """Print the table, then write the video, which takes longer the larger it is."""
    first = dense_steps(args.steps, args.dense_until)  # the step after it holds no compilation
    times = [statistics.median(run) for run in (dense.seconds, sparse.seconds[first:])]
    table = Table(title=f"{args.width} x {args.height}, {args.frames} frames, on {DEVICE}")
    for heading in ("", "dense", "sparse"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("density", "1", f"{args.density:g}")
    table.add_row("dense first steps", "", f"{first} of {args.steps}")
    table.add_row("time a step", *(f"{seconds:.3f} s" for seconds in times))
    table.add_row("speed-up a step", "", f"{times[0] / times[1]:.2f}x")
    table.add_row("PSNR against dense", "", f"{psnr(dense.video, sparse.video):.1f} dB")
    table.add_row("SSIM against dense", "", f"{ssim(dense.video, sparse.video):.4f}")
    Console().print(table)

    rows = comparison_rows(dense.video, sparse.video)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    videos = {label: video[0] for label, video in rows.items()}
    write_side_by_side(args.out, videos, frames_per_second=frames_per_second)
    print(args.out)
