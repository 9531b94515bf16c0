"""Draw clips for people: a moving side-by-side and a contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uta_fx._optional import require

DIFFERENCE_GAIN = 4


def comparison_rows(dense: Tensor, sparse: Tensor) -> dict[str, Tensor]:
    """Rows of a picture: dense, sparse, and their difference, amplified and clamped to [0, 1]."""
    difference = ((dense - sparse).abs() * DIFFERENCE_GAIN).clamp(0, 1)
    return {"dense": dense, "sparse": sparse, f"difference x{DIFFERENCE_GAIN}": difference}


def write_gif(
    path: Path, rows: Mapping[str, Tensor], *, zoom: int = 3, frames_per_second: float = 8
) -> None:
    """Write a looping GIF: a column for each clip, a row for each entry of ``rows``.

    Args:
        path: File to write.
        rows: ``[B, 3, F, H, W]`` in [0, 1] by label.
        zoom: Pixels on the screen for each pixel of a clip.
        frames_per_second: Speed.
    """
    image = require("PIL.Image", extra="demo")
    draw = require("PIL.ImageDraw", extra="demo")
    margin, gap = 96, 4
    first = next(iter(rows.values()))
    batch, _, count, height, width = first.shape
    height, width = height * zoom, width * zoom
    size = (margin + batch * (width + gap), len(rows) * (height + gap))
    frames = []
    for index in range(count):
        canvas = image.new("RGB", size, "white")
        pen = draw.Draw(canvas)
        for row, (label, videos) in enumerate(rows.items()):
            pen.text((6, row * (height + gap) + height // 2), label, fill="black")
            for column in range(batch):
                frame = image.fromarray(_pixels(videos[column, :, index]))
                frame = frame.resize((width, height), image.Resampling.BICUBIC)
                canvas.paste(frame, (margin + column * (width + gap), row * (height + gap)))
        frames.append(canvas)
    _save_gif(path, frames, frames_per_second)


VIDEO_SUFFIXES = (".mp4", ".gif")


def write_side_by_side(
    path: Path, videos: Mapping[str, Tensor], *, frames_per_second: float = 16
) -> None:
    """Write one video that shows several beside each other, each under its label.

    Args:
        path: File to write, MP4 (H.264) or a looping GIF by its suffix.
        videos: ``[3, F, H, W]`` in [0, 1] by label, all of one shape.
        frames_per_second: Speed.

    Raises:
        ValueError: The suffix is neither.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(VIDEO_SUFFIXES)}, got {path}")
    if path.suffix == ".gif":
        _save_gif(path, list(_beside(videos)), frames_per_second)
        return
    imageio = require("imageio.v2", extra="demo")
    require("imageio_ffmpeg", extra="demo")
    # players want even sizes: with a block of 2 frames are scaled to them
    with imageio.get_writer(path, fps=frames_per_second, macro_block_size=2) as writer:
        for frame in _beside(videos):
            writer.append_data(np.asarray(frame))


def _beside(videos: Mapping[str, Tensor]) -> Iterator[Any]:
    """The frames, as images of PIL."""
    image = require("PIL.Image", extra="demo")
    draw = require("PIL.ImageDraw", extra="demo")
    header, gap = 18, 4
    _, count, height, width = next(iter(videos.values())).shape
    size = (len(videos) * (width + gap) - gap, header + height)
    for index in range(count):
        canvas = image.new("RGB", size, "white")
        pen = draw.Draw(canvas)
        for column, (label, video) in enumerate(videos.items()):
            left = column * (width + gap)
            pen.text((left + 4, 3), label, fill="black")
            canvas.paste(image.fromarray(_pixels(video[:, index])), (left, header))
        yield canvas


def _save_gif(path: Path, frames: Sequence[Any], frames_per_second: float) -> None:
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / frames_per_second),
        loop=0,
        disposal=2,
    )


def write_contact_sheet(
    path: Path, prompts: Sequence[str], rows: Mapping[str, Tensor], *, frames: int = 5
) -> None:
    """Write a PNG: each prompt a panel of ``len(rows)`` rows and ``frames`` columns.

    Args:
        path: File to write.
        prompts: B titles.
        rows: ``[B, 3, F, H, W]`` in [0, 1] by label.
        frames: How many frames of each clip, evenly spaced from the first to the last.
    """
    require("matplotlib", extra="demo").use("agg")
    pyplot = require("matplotlib.pyplot", extra="demo")
    count = next(iter(rows.values())).shape[2]
    chosen = torch.linspace(0, count - 1, min(frames, count)).round().long().tolist()
    across = min(2, len(prompts))
    down = -(-len(prompts) // across)
    figure = pyplot.figure(
        figsize=(across * len(chosen) * 1.1 + 0.4, down * (len(rows) * 1.1 + 0.5)),
        layout="constrained",
    )
    panels = figure.subfigures(down, across, squeeze=False).flatten()
    for place, (panel, prompt) in enumerate(zip(panels, prompts, strict=False)):
        panel.suptitle("\n".join(textwrap.wrap(prompt, 70)), fontsize=8)
        axes = panel.subplots(len(rows), len(chosen), squeeze=False)
        for line, (label, videos) in zip(axes, rows.items(), strict=True):
            line[0].set_ylabel(label, fontsize=7)
            for axis, index in zip(line, chosen, strict=True):
                axis.imshow(_pixels(videos[place, :, index]), interpolation="bicubic")
                axis.set_xticks([])
                axis.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pixels(frame: Tensor) -> np.ndarray:
    """``[3, H, W]`` in [0, 1] as uint8 ``[H, W, 3]``."""
    return (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
