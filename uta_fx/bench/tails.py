"""What each form of the tail costs and what it is worth, on the same lists of exact blocks."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uta_fx
from uta_fx.attention import operator_arguments, pool_blocks, reorder_tokens
from uta_fx.bench.attention import (
    alignment,
    baselines,
    bind,
    describe,
    format_row,
    time_interleaved,
)
from uta_fx.bench.gate import check_attention, check_fit, relative_error
from uta_fx.bench.inputs import INPUTS, SHAPES
from uta_fx.flops import sparse_cost
from uta_fx.kernels import ops
from uta_fx.policies import Selection
from uta_fx.statistics import BlockStatistics
from uta_fx.tails import Tail

TAILS = {
    "none": Tail(kind="none"),
    "normalizer": Tail(kind="normalizer"),
    "single": Tail(kind="single"),
    "bins": Tail(kind="bins"),
    "block": Tail(kind="block"),
    "first_order": Tail(kind="first_order"),
    "first_order, not fitted": Tail(kind="first_order", fit=0),
    "first_order, slope of each query block": Tail(kind="first_order", slope="query_block"),
    "gaussian": Tail(kind="gaussian"),
    "gaussian, not fitted": Tail(kind="gaussian", fit=0),
    "gaussian, slope of each query block": Tail(kind="gaussian", slope="query_block"),
}
COLUMNS = {
    "tail": "<38", "density": ">7.2f", "kernel": ">9.3f", "tail_ms": ">9.3f", "making": ">9.3f",
    "fit": ">7.3f", "share": ">7.1%", "flops": ">7.1%", "speedup": ">8.2f", "error": ">9.1e",
}  # fmt: skip


def run(
    shape: str = "wan-1.3b-480p",
    densities: Sequence[float] = (0.05, 0.1, 0.25, 0.5),
    *,
    config: uta_fx.Config | None = None,
    inputs: str = "structured",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 9,
    compile: bool = True,
    output: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Check each tail at each density, time them in turns, and print a table.

    Args:
        shape: Name in ``uta_fx.bench.inputs.SHAPES``.
        densities: What to set ``config.density`` to.
        config: Everything else but the tail; None for the defaults.
        inputs: Name in ``uta_fx.bench.inputs.INPUTS``.
        device: Where to run.
        dtype: Of query, key and value.
        rounds: Timed rounds, at least 2; the median is reported.
        compile: Compile what makes the representatives.
        output: JSON file to write; None for none.

    Returns:
        One entry for each tail and density: ``tail``, a name in ``TAILS``; ``density``; ``kernel``,
        milliseconds of the operator; ``tail_ms``, those above the same lists without a tail;
        ``making``, of its representatives, out of block statistics that are there already; ``fit``,
        of ``uta::fit_tail`` in that, None where the tail is not fitted;
        ``share`` of ``tail_ms`` in ``kernel``, and ``flops``, that of the operations; ``speedup``
        of kernel and making over the fastest dense attention; ``error``: squared, relative to that.

    Raises:
        ValueError: ``shape`` or ``inputs`` is not a name that there is.
        ArithmeticError: A result disagrees with float64; nothing was timed.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
    config = config or uta_fx.Config()
    with torch.no_grad():
        case = _Case(shape, inputs, config, device, dtype, compile)
        candidates: dict[Any, Callable[[], Any]] = {
            ("dense", name): call for name, call in baselines(*case.given).items()
        }
        for density in densities:
            for name, tail in TAILS.items():
                candidates |= case.at(density, name, tail)
        times = time_interleaved(candidates, rounds, device)
    ms = {name: statistics.median(samples) for name, samples in times.items()}
    rows = case.rows(densities, ms)
    machine = f"{shape}, {describe(device, dtype, config, tail=False)}, {inputs} inputs"
    print(machine)
    print(" ".join(f"{name:{alignment(form)}}" for name, form in COLUMNS.items()))
    for row in rows:
        print(format_row(row, COLUMNS))
    if output is not None:
        record = {"machine": machine, "shape": shape, "inputs": inputs, "rows": rows}
        Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return rows


class _Case:
    """One shape: its inputs, pooled once, and every tail on them."""

    def __init__(
        self,
        shape: str,
        inputs: str,
        config: uta_fx.Config,
        device: str,
        dtype: torch.dtype,
        compile: bool,
    ) -> None:
        self.shape, self.config, self.compile = SHAPES[shape], config, compile
        self.given = INPUTS[inputs](self.shape, device, dtype, 0)
        self.ordered, self.inverse = reorder_tokens(*self.given, config, self.shape.grid)
        self.selection = pool_blocks(*self.ordered, config, None, self.shape.grid)
        self.errors: dict[tuple[str, float], float] = {}
        self.making: dict[str, Callable[..., Any]] = {}

    def at(self, density: float, name: str, tail: Tail) -> dict[Any, Callable[[], Any]]:
        """The kernel and the making of its representatives, checked."""
        config = dataclasses.replace(self.config, density=density, tail=tail)
        selection = dataclasses.replace(self.selection, density=density)
        _, key, value = self.ordered
        arguments = operator_arguments(selection, key, value, config)
        check_attention(arguments)
        output, _ = ops.block_masked_attention(*arguments)
        if self.inverse is not None:
            output = output.index_select(2, self.inverse)
        self.errors[name, density] = relative_error(output, *self.given, selection.scale)
        candidates = {("kernel", name, density): bind(ops.block_masked_attention, *arguments)}
        if name not in self.making:

            def make(exact: Tensor, query: Tensor, *pooled: Tensor) -> Any:
                # a value of ours comes into being in here: torch 2.11 cannot take it as an argument
                selection = Selection(query, key, value, BlockStatistics(*pooled), **settings)
                # nor as a result
                return tuple(tail.representatives(selection, exact, key, value, config.block_kv))

            settings = {
                field.name: getattr(self.selection, field.name)
                for field in dataclasses.fields(Selection)
                if field.name not in ("query", "key", "value", "statistics")
            }
            self.making[name] = torch.compile(make, dynamic=False) if self.compile else make
        if tail.kind != "none":
            exact = config.selection_policy().select(selection)
            # the same selection for every density: representatives do not ask for it
            pooled = vars(self.selection.statistics).values()
            making = bind(self.making[name], exact, self.selection.query, *pooled)
            candidates["making", name, density] = making
            if tail.fit_rows:
                fit = tail.fit_arguments(self.selection, exact, key, value)
                check_fit(fit)
                candidates["fit", name, density] = bind(ops.fit_tail, *fit)
        return candidates

    def rows(self, densities: Sequence[float], ms: dict[Any, float]) -> list[dict[str, Any]]:
        """Entries of ``run``, out of medians by candidate."""
        best = min(value for name, value in ms.items() if name[0] == "dense")
        (batch, heads, tokens, dim), dtype = self.given[0].shape, self.given[0].dtype
        size = (batch, heads, tokens, dim)
        rows: list[dict[str, Any]] = []
        for density in densities:
            for name, tail in TAILS.items():
                config = dataclasses.replace(self.config, density=density, tail=tail)
                parts = sparse_cost(size, size, dim, dtype, tokens, None, config).parts
                kernel = ms["kernel", name, density]
                making = ms.get(("making", name, density), 0.0)
                more = kernel - ms["kernel", "none", density]
                rows.append(
                    {
                        "tail": name,
                        "density": density,
                        "kernel": kernel,
                        "tail_ms": more,
                        "making": making,
                        "fit": ms.get(("fit", name, density)),
                        "share": more / kernel,
                        "flops": parts["tail"] / (parts["tail"] + parts["listed"]),
                        "speedup": best / (kernel + making),
                        "error": self.errors[name, density],
                    }
                )
        return rows
