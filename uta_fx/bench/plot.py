"""What the benchmark of attention measured, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uta_fx._optional import require

CANDIDATES = {"operation": "-o", "in order": ":o", "flex": "--x"}
"""What is drawn, and how: everything, the same without reordering, FlexAttention over its lists."""


def draw(path: str | Path, rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Draw speed-up against density, with what would be ideal, and error against time.

    Args:
        path: File to write; its ending says of what kind.
        rows: Of ``uta_fx.bench.attention.run``.
        title: What stands above.
    """
    pyplot = require("matplotlib.pyplot", extra="demo")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    colours = {shape: f"C{place}" for place, shape in enumerate(shapes)}
    figure, (speed, error) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for shape in shapes:
        for what, style in CANDIDATES.items():
            points = sorted(
                (row for row in rows if (row["shape"], row["what"]) == (shape, what)),
                key=lambda row: row["density"],
            )
            if not points:
                continue
            label = {"operation": shape, "flex": f"{shape}, FlexAttention, no tail"}.get(what)
            look = {"color": colours[shape], "markersize": 4, "label": label}
            density = [row["density"] for row in points]
            speed.plot(density, [row["speedup"] for row in points], style, **look)
            if points[0]["error"] is not None:
                time = [1 / row["speedup"] for row in points]
                error.plot(time, [row["error"] for row in points], style, **look)
    densities = sorted({row["density"] for row in rows if row["density"]})
    speed.plot(densities, [1 / density for density in densities], "k-", lw=0.8, label="1 / density")
    speed.set(xlabel="density", ylabel="speed-up over the best dense kernel", xscale="log")
    speed.set_yscale("log")
    speed.set_title(
        "whole operation; dotted: tokens in the order of the blocks already", fontsize=9
    )
    error.set(xlabel="time, in that of the best dense kernel", ylabel="relative squared error")
    error.set(xscale="log", yscale="log")
    for axis, values in (
        (speed.xaxis, densities),
        (speed.yaxis, (1, 2, 3, 4, 5, 7, 10, 20)),
        (error.xaxis, (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1)),
    ):
        axis.set_minor_locator(pyplot.NullLocator())
        axis.set_ticks(values, [f"{value:g}" for value in values])
    for axes in (speed, error):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
