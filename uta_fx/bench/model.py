"""Whole models at their real sizes, with random weights: one forward, dense and sparse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import uta_fx
from uta_fx.bench.attention import describe
from uta_fx.layers import blocks_of
from uta_fx.study.real_models import DTYPE, RealModel, find_model

# what the names of kernels of dense attention have in them
ATTENTION_KERNELS = ("sdpa", "flash", "fmha", "attention")


def run(
    names: Sequence[str],
    densities: Sequence[float] = (0.25, 0.1),
    *,
    size: str | None = None,
    config: uta_fx.Config | None = None,
    whole: bool = False,
    layers: int | None = None,
    rounds: int = 3,
    device: str = "cuda",
    output: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Build each model, time one forward of one sample, and print a line for each variant.

    Every block is compiled by itself, by ``config.inner`` (dense) or with ``backend="uta"``: alike
    blocks share their code, and what is around them runs eagerly in both. With ``whole`` the model
    is one graph, in which tokens are reordered once. Each variant finds an empty cache of compiled
    code, and what a process pays for its first compilation (imports, workers) is paid before;
    Triton kernels of ours that an earlier density compiled are there for the next.

    Args:
        names: In ``uta_fx.study.real_models.REAL_MODELS``.
        densities: What to set ``config.density`` to.
        size: Of the clip, a name in the models' ``sizes``; None for the first.
        config: Everything else; None for the defaults. The grid is the model's, and masks, which
            are ours and hide nothing, are trusted.
        whole: Compile the model as a whole.
        layers: At most so many of each stack of layers; None for all.
        rounds: Timed forwards; the median is reported.
        device: A GPU, or the CPU for small numbers of layers.
        output: JSON file to write; None for none.

    Returns:
        One entry for each variant: ``model``, ``size``, ``whole``, ``tokens``, ``density`` (None
        for dense), ``seconds``, ``speedup`` over dense, ``compile_s``: what the first forward takes
        longer,
        ``memory_gb``: the most that was allocated, ``attention``: the share of a forward's time
        that is attention (None without a GPU), and ``error``: of the model's output, relative to
        dense, in norm.
    """
    config = config or uta_fx.Config()
    how = "compiled as a whole" if whole else "blocks compiled one by one"
    print(f"{describe(device, DTYPE, config)}, random weights, {how}")
    if config.inner == "inductor":
        _start_inductor(device)
    print(f"{'model':16} {'size':6} {'tokens':>7} {'density':>7} {'s':>8} {'speedup':>7}"
          f" {'compile s':>9} {'GB':>6} {'attention':>9} {'error':>8}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in names:
        real = find_model(name)
        variants = _forwards(
            real, real.size(size), densities, config, whole, layers, rounds, device
        )
        for row in variants:
            row = {"model": name, "size": size or next(iter(real.sizes)), "whole": whole, **row}
            rows.append(row)
            print(_format(row), flush=True)
            if output is not None:
                Path(output).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _forwards(
    real: RealModel,
    size: Any,
    densities: Sequence[float],
    config: uta_fx.Config,
    whole: bool,
    layers: int | None,
    rounds: int,
    device: str,
) -> Any:
    grid = real.grid(size)
    model = real.with_random_weights(layers, device)
    inputs = tree_map_only(Tensor, _values(device), real.inputs(real.latent(size), grid))

    def forward() -> Tensor:
        return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    parts = [model] if whole else blocks_of(model)
    fullgraph = not (whole and real.by_block)  # such a model breaks its graph itself
    with _nothing_compiled():
        for part in parts:
            part.compile(fullgraph=fullgraph, backend=config.inner)
        dense, expected = _measure(forward, rounds, device)
        attention = _attention_seconds(forward, device)
    rest = None if attention is None else dense["seconds"] - attention
    for part in parts:
        part._compiled_call_impl = None
    yield _row(dense, None, dense["seconds"], rest, grid, 0.0)
    for density in densities:
        with _nothing_compiled():
            uta_fx.enable(
                model,
                dataclasses.replace(config, density=density, grid=grid, trust_masks=True),
                blocks=not whole,
                fullgraph=fullgraph,
            )
            sparse, result = _measure(forward, rounds, device)
            uta_fx.disable(model)
        error = ((result - expected).norm() / expected.norm()).item()
        yield _row(sparse, density, dense["seconds"], rest, grid, error)


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Dynamo has no code, Inductor and Triton an empty folder for theirs."""
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    with fresh_cache():
        yield


def _start_inductor(device: str) -> None:
    """Import what compiles, start its workers, and load the device's libraries."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.wait_pool_ready()

    @torch.compile
    def some(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ x, x, x).relu()

    with torch.no_grad():
        some(torch.ones(1, 1, 64, 64, device=device, dtype=DTYPE))


def _values(device: str) -> Callable[[Tensor], Tensor]:
    """Random numbers where a model is given some, ones where it is given counts or masks."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.ones(x.shape, dtype=x.dtype, device=device)
        return torch.randn(x.shape, generator=generator, device=device).to(x.dtype)

    return fill


@torch.no_grad()
def _measure(
    forward: Callable[[], Tensor], rounds: int, device: str
) -> tuple[dict[str, Any], Tensor]:
    on_gpu = torch.device(device).type == "cuda"
    times = []
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = perf_counter()
        result = forward().float().cpu()  # waits for the device
        times.append(perf_counter() - start)
    seconds = statistics.median(times[1:])
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return {"seconds": seconds, "compile_s": times[0] - seconds, "memory_gb": memory}, result


@torch.no_grad()
def _attention_seconds(forward: Callable[[], Tensor], device: str) -> float | None:
    """Time that the kernels of dense attention take in one forward; None without a GPU."""
    if torch.device(device).type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        forward()
        torch.cuda.synchronize()
    return sum(
        event.device_time_total / 1e6
        for event in profiler.key_averages()
        if any(part in event.key.lower() for part in ATTENTION_KERNELS)
    )


def _row(
    measured: dict[str, Any],
    density: float | None,
    dense: float,
    rest: float | None,
    grid: tuple[int, ...],
    error: float,
) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "tokens": frames * height * width,
        "density": density,
        **measured,
        "speedup": dense / measured["seconds"],
        # what is not attention takes as long as in the dense model
        "attention": None if rest is None else 1 - rest / measured["seconds"],
        "error": error,
    }


def _format(row: dict[str, Any]) -> str:
    def cell(value: float | None, form: str) -> str:
        return f"{'-':>{form.split('.')[0]}}" if value is None else f"{value:{form}}"

    return " ".join(
        (
            f"{row['model']:16} {row['size']:6} {row['tokens']:7d}",
            cell(row["density"], "7.2f"), cell(row["seconds"], "8.3f"),
            cell(row["speedup"], "7.2f"), cell(row["compile_s"], "9.1f"),
            cell(row["memory_gb"], "6.1f"),
            cell(row["attention"], "9.1%"), cell(row["error"], "8.1e"),
        )
    )  # fmt: skip
