"""What the benchmark of attention measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uta_fx._optional import require

CANDIDATES = {
    "operation": ("-o", "whole operation"),
    "in order": (":o", "tokens in the order of the blocks already"),
    "flex": ("--x", "FlexAttention over the same blocks, without a tail"),
}
"""What is drawn: how, and what the legend calls it."""


def draw(path: str | Path, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Draw speed-up against density, with what would be ideal, and error against time.

    Args:
        path: File to write; its ending says of what kind.
        rows: Of ``uta_fx.bench.attention.run``.
        title: What stands above.
    """
    pyplot = require("matplotlib.pyplot", extra="demo")
    lines = require("matplotlib.lines", extra="demo")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    colours = {shape: f"C{place}" for place, shape in enumerate(shapes)}
    drawn = []  # candidates that the rows have
    figure, (speed, error) = pyplot.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for what, (style, label) in CANDIDATES.items():
        for shape in shapes:
            points = sorted(
                (row for row in rows if (row["shape"], row["what"]) == (shape, what)),
                key=lambda row: row["density"],
            )
            if not points:
                continue
            look = {"color": colours[shape], "markersize": 4}
            density = [row["density"] for row in points]
            speed.plot(density, [row["speedup"] for row in points], style, **look)
            if points[0]["error"] is not None:
                time = [1 / row["speedup"] for row in points]
                error.plot(time, [row["error"] for row in points], style, **look)
            if (style, label) not in drawn:
                drawn.append((style, label))
    densities = sorted({row["density"] for row in rows if row["density"]})
    ideal = {"color": "black", "lw": 0.8}
    speed.plot(densities, [1 / density for density in densities], "-", **ideal)
    speed.set(xlabel="density", ylabel="speed-up over the best dense kernel", xscale="log")
    speed.set_yscale("log")
    error.set(xlabel="time, in that of the best dense kernel", ylabel="relative squared error")
    error.set(xscale="log", yscale="log")
    for axis, values in (
        (speed.xaxis, densities),
        (speed.yaxis, (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20)),
        (error.xaxis, (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2)),
    ):
        low, high = axis.get_view_interval()
        axis.set_minor_locator(pyplot.NullLocator())
        inside = [value for value in values if low <= value <= high]
        axis.set_ticks(inside, [f"{value:g}" for value in inside])
    for axes in (speed, error):
        axes.grid(alpha=0.3)
    handles = [lines.Line2D([], [], color=colours[shape], lw=3, label=shape) for shape in shapes]
    handles += [
        lines.Line2D(
            [], [], color="grey", marker=style[-1], markersize=4, ls=style[:-1], label=label
        )
        for style, label in drawn
    ]
    handles.append(lines.Line2D([], [], label="1 / density", **ideal))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
