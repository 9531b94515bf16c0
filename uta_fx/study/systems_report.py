"""What a study of systems found: its file, its table, its plot, and who is better at equal time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uta_fx._optional import require
from uta_fx.study.systems import Row

COLUMNS: Mapping[str, tuple[str, str]] = {
    "kept": ("kept", ".1%"), "mse": ("MSE", ".2e"), "error": ("relative", ".2e"),
    "recall": ("recall", ".1%"), "psnr": ("PSNR", ".1f"), "ms": ("ms", ".2f"),
    "speedup": ("speed-up", ".2f"), "timed_kept": ("kept there", ".1%"),
    "timed_error": ("relative there", ".2e"),
}  # fmt: skip
"""Columns of the table: field, heading and format."""


def markdown(rows: Sequence[Row]) -> str:
    """One line for each row; columns without a number are left out."""
    shown = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    lines = [
        f"| system | density | {' | '.join(COLUMNS[name][0] for name in shown)} |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for row in rows:
        cells = [row.system, f"{row.density:g}"]
        for name in shown:
            value = getattr(row, name)
            cells.append("-" if value is None else f"{value:{COLUMNS[name][1]}}")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{row.system} at {row.density:g}: {row.failure}" for row in rows if row.failure]
    notes += tails_apart(rows) + equal_time(rows)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def tails_apart(rows: Sequence[Row]) -> list[str]:
    """Where a system errs less with a tail than with the tail dropped, in words: a line for each.

    Args:
        rows: Of one study.
    """
    of_key = {(row.system, row.density): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.system for row in rows):
        base, _, tail = name.partition(" + ")
        pairs = [
            (of_key[base, row.density], row)
            for row in rows
            if tail and row.system == name and (base, row.density) in of_key
        ]
        counts = []
        for field, where in (("error", "the model's calls"), ("timed_error", "the timed shape")):
            both = [(getattr(a, field), getattr(b, field)) for a, b in pairs]
            both = [(dropped, kept) for dropped, kept in both if None not in (dropped, kept)]
            if both:
                lower = sum(kept < dropped for dropped, kept in both)
                counts.append(f"at {lower} of {len(both)} densities on {where}")
        calls = [
            kept < dropped
            for a, b in pairs
            for dropped, kept in zip(a.errors or (), b.errors or (), strict=True)
        ]
        if calls:
            counts.append(f"on {sum(calls)} of {len(calls)} single calls")
        if counts:
            lines.append(f"{name} errs less than {base} {', '.join(counts)}.")
    return lines


def equal_time(rows: Sequence[Row], name: str = "ours") -> list[str]:
    """Where another system errs less in the same time, in words; nothing where times are unknown.

    Args:
        rows: Of one study.
        name: Of the system that the others are held against.
    """
    timed = [
        (row, row.ms, row.timed_error)
        for row in rows
        if row.ms is not None and row.timed_error is not None
    ]
    curve = sorted((ms, error) for row, ms, error in timed if row.system == name)
    others = [point for point in timed if point[0].system != name]
    if not curve or not others:
        return []
    better, faster = [], []
    for row, ms, error in others:
        own = error_at(curve, ms)
        what = f"{row.system} at {row.density:g} ({ms:.2f} ms, {error:.1e}"
        if own is None:
            faster.append(f"{what})")
        elif error < own:
            better.append(f"{what} against {own:.1e})")
    lines = [
        f"At equal time {name} has the lowest error beside {len(others) - len(better + faster)}"
        f" of {len(others)} rows of other systems."
    ]
    if better:
        lines.append(f"Lower than {name} at equal time: {', '.join(better)}.")
    if faster:
        lines.append(
            f"Faster than the fastest row of {name} ({curve[0][0]:.2f} ms): {', '.join(faster)}."
        )
    return lines


def error_at(curve: Sequence[tuple[float, float]], ms: float) -> float | None:
    """The error that a system would have in a time.

    Args:
        curve: Times and errors of the system, by time; between two of them the logarithm of the
            error is linear in that of time, and after the last it stays.
        ms: The time.

    Returns:
        None before the first time.
    """
    if ms < curve[0][0]:
        return None
    for (time, error), (next_time, next_error) in itertools.pairwise(curve):
        if ms <= next_time and time < next_time:
            share = math.log(ms / time) / math.log(next_time / time)
            return error * (next_error / error) ** share
    return curve[-1][1]


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write every row, after what was measured on what."""
    record = {**about, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a file of ``write_json``."""
    rows = json.loads(path.read_text())["rows"]
    return [Row(**row | {"errors": tuple(row.get("errors") or ()) or None}) for row in rows]


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw error against density, and what there is of picture against density, error against time.

    Args:
        path: File to write; its ending says of what kind.
        rows: Of one study.
        title: What stands above.
    """
    pyplot = require("matplotlib.pyplot", extra="demo")
    panels = [("kept", "error", "share of pairs of tokens kept", "relative squared error, model")]
    if any(row.psnr is not None for row in rows):
        panels.append(("kept", "psnr", "share of pairs of tokens kept", "PSNR against dense, dB"))
    if any(row.ms is not None for row in rows):
        panels.append(("ms", "timed_error", "time of the operation, ms", "relative squared error"))
    figure, several = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 5), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=9)
    names = list(dict.fromkeys(row.system for row in rows))
    families = list(dict.fromkeys(name.partition(" + ")[0] for name in names))
    styles = {"": "--x", "single": "-o", "gaussian": "-s"}
    ticker = require("matplotlib.ticker", extra="demo")
    for axes, (x, y, x_label, y_label) in zip(several[0], panels, strict=True):
        for name in names:
            points = sorted(
                (getattr(row, x), getattr(row, y))
                for row in rows
                if row.system == name and None not in (getattr(row, x), getattr(row, y))
            )
            family, _, tail = name.partition(" + ")
            style, color, width = styles[tail], f"C{families.index(family)}", 1.2
            if name == "ours":
                style, color, width = "-D", "black", 2.2
            axes.plot(
                [point[0] for point in points], [point[1] for point in points], style,
                color=color, lw=width, ms=4, label=name,
            )  # fmt: skip
            for row in rows:  # the density that was asked for, in percent
                if x == "ms" and row.system == name == "ours" and row.ms and row.timed_error:
                    axes.annotate(
                        f"{row.density:.0%}", (row.ms, row.timed_error), fontsize=7,
                        xytext=(3, 3), textcoords="offset points",
                    )  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label)
        if x == "ms":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        if y != "psnr":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*several[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
