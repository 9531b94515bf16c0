"""The operation against dense attention: is it right, how fast is it, how much does it err.

Nothing is timed before sampled rows agree with float64. Baselines and candidates take turns in
rounds and medians are reported, so that a clock that drifts does so for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import uta_fx
from uta_fx.attention import operator_arguments, pool_blocks, reorder_tokens
from uta_fx.kernels import ops, reference
from uta_fx.order import Grid
from uta_fx.policies import LowDelta

SAMPLED_HEADS = 2
SAMPLED_BLOCKS = 3  # query blocks of each sampled head: the first, one in the middle, the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention call of a video model.

    Attributes:
        name: What is printed.
        batch: B.
        heads: H.
        grid: Frames, height and width in tokens; their product is L.
        dim: D, of queries, keys and values.
    """

    name: str
    batch: int
    heads: int
    grid: Grid
    dim: int

    @property
    def length(self) -> int:
        """L."""
        return math.prod(self.grid)

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of the two products of dense attention."""
        return 4 * self.batch * self.heads * self.length**2 * self.dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="wan-1.3b-480p", batch=1, heads=12, grid=(21, 30, 52), dim=128),
        Shape(name="wan-14b-720p", batch=1, heads=40, grid=(21, 45, 80), dim=128),
        Shape(name="cogvideox-5b", batch=2, heads=48, grid=(13, 30, 45), dim=64),
        Shape(name="power-of-two", batch=1, heads=12, grid=(16, 32, 32), dim=128),
        Shape(name="tiny", batch=1, heads=2, grid=(4, 12, 10), dim=32),
    )
}
DEFAULT_SHAPES = ("wan-1.3b-480p", "wan-14b-720p", "cogvideox-5b", "power-of-two")
COLUMNS = {
    "shape": "<15", "density": ">7.2f", "what": "<12", "ms": ">9.3f", "spread": ">7.1%",
    "speedup": ">8.2f", "tflops": ">7.0f", "rate": ">6.2f", "error": ">9.1e",
}  # fmt: skip


def run(
    shapes: Sequence[str] = DEFAULT_SHAPES,
    densities: Sequence[float] = (0.1, 0.2, 0.25),
    *,
    config: uta_fx.Config | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 15,
    compile: bool = True,
    output: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Check, time and print; a table grows as shapes are done.

    Args:
        shapes: Names in ``SHAPES``.
        densities: What to set ``config.density`` to.
        config: Everything else; None for the defaults.
        device: Where to run; dense baselines that it does not have are left out.
        dtype: Of query, key and value.
        rounds: Timed rounds, at least 2; the median is reported.
        compile: Compile the whole operation; False runs it eagerly.
        output: JSON file to write; None for none.

    Returns:
        One entry for each timed thing: ``shape``, ``density`` (None for dense), ``kept`` (share of
        blocks that were exact), ``what`` (``dense cudnn``, ``dense flash``, ``dense math``,
        ``scores``: the policy's statistic; ``kernels``: attention with lists and tail given;
        ``operation``: everything), ``ms``, ``spread`` (of the middle half of the rounds, relative),
        ``speedup`` over the fastest dense baseline, ``tflops`` on visited tiles, ``rate``: of those
        to the fastest dense one's, and ``error``: squared error of the output relative to dense.

    Raises:
        ValueError: A name is not in ``SHAPES``.
        ArithmeticError: A result disagrees with float64; nothing of that shape was timed.
    """
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown:
        raise ValueError(f"shapes must be among {', '.join(SHAPES)}, got {', '.join(unknown)}")
    config = config or uta_fx.Config()
    print(describe(device, dtype, config))
    print(" ".join(f"{name:{_alignment(form)}}" for name, form in COLUMNS.items()))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in shapes:
            shape_rows = _run_shape(SHAPES[name], densities, config, device, dtype, rounds, compile)
            for row in shape_rows:
                print(_format_row(row))
            rows += shape_rows
    if output is not None:
        record = {"machine": describe(device, dtype, config), "rows": rows}
        Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return rows


def describe(device: str, dtype: torch.dtype, config: uta_fx.Config) -> str:
    """One line: device, versions, dtype, blocks."""
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else device
    return (
        f"{name}, torch {torch.__version__}, {dtype}, blocks {config.block_q}x{config.block_kv},"
        f" policy {config.policy}, tail {config.tail}, budget {config.budget}"
    )


def structured_inputs(
    shape: Shape, device: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that look like a video model's: smooth fields plus noise.

    Each head mixes a few random waves over the grid. Queries and keys share the mixture, so that
    near tokens attend to each other; values have their own.

    Returns:
        Three tensors ``[B, H, L, D]``.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    axes = [torch.linspace(0, 1, side, device=device) for side in shape.grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)  # [L, 3]
    waves, size = 24, (shape.batch, shape.heads, shape.length, shape.dim)
    query, key, value = (torch.empty(size, device=device, dtype=dtype) for _ in range(3))
    for b in range(shape.batch):
        for h in range(shape.heads):
            phase = position @ (8 * randn(3, waves)) + 2 * math.pi * randn(waves)
            field = phase.cos() * math.sqrt(2 / waves)  # [L, waves]
            shared, own = randn(waves, shape.dim), randn(waves, shape.dim)
            for tensor, mixture in ((query, shared), (key, shared), (value, own)):
                tensor[b, h] = field @ mixture + 0.5 * randn(shape.length, shape.dim)
    return query, key, value


def _run_shape(
    shape: Shape,
    densities: Sequence[float],
    config: uta_fx.Config,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    compile: bool,
) -> list[dict[str, Any]]:
    """Rows of one shape; candidates of all densities and baselines take turns."""
    torch.compiler.reset()  # or the shapes before count towards the recompile limit
    query, key, value = structured_inputs(shape, device, dtype)
    scale = shape.dim**-0.5
    candidates: dict[tuple[str, float | None], Callable[[], Any]] = {
        (f"dense {name}", None): call for name, call in _baselines(query, key, value).items()
    }
    ordered, _ = reorder_tokens(query, key, value, config, shape.grid)
    selection = pool_blocks(*ordered, config, scale)
    kept: dict[float, float] = {}
    errors: dict[float, float] = {}
    for density in densities:
        settings = dataclasses.replace(config, density=density)
        at_density = dataclasses.replace(selection, density=density)
        arguments = operator_arguments(at_density, *ordered[1:], settings)
        _check_attention(arguments)
        blocks = -(-shape.length // settings.block_kv)
        kept[density] = arguments[4].double().mean().item() / blocks

        operation = _operation(settings, shape.grid)
        if compile:
            operation = torch.compile(operation, dynamic=False)
        errors[density] = _relative_error(operation(query, key, value), query, key, value, scale)
        candidates["kernels", density] = _bind(ops.sparse_attention, *arguments)
        candidates["operation", density] = _bind(operation, query, key, value)
    scores_arguments = LowDelta().arguments(selection)
    _check_scores(scores_arguments)
    candidates["scores", None] = _bind(ops.block_scores, *scores_arguments)

    times = time_interleaved(candidates, rounds, device)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(medians[name] for name in medians if name[0].startswith("dense"))
    rows = []
    for (what, density), samples in times.items():
        ms = medians[what, density]
        # of the dense products' operations, those on exact blocks; scores do none
        share = kept.get(density) if density else (None if what == "scores" else 1.0)
        low, _, high = statistics.quantiles(samples, n=4)
        rows.append(
            {
                "shape": shape.name,
                "density": density,
                "kept": kept.get(density) if density else None,
                "what": what,
                "ms": ms,
                "spread": (high - low) / ms,
                "speedup": best / ms,
                "tflops": None if share is None else share * shape.dense_flops / ms / 1e9,
                "rate": None if share is None else share * best / ms,
                "error": errors[density] if what == "operation" and density else None,
            }
        )
    return rows


def time_interleaved(
    candidates: dict[Any, Callable[[], Any]], rounds: int, device: str, warmup: int = 2
) -> dict[Any, list[float]]:
    """Milliseconds of each call: in each round every candidate runs once, in turn."""
    on_gpu = torch.device(device).type == "cuda"
    for _ in range(warmup):
        for call in candidates.values():
            call()
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(_time_gpu(call) if on_gpu else _time_cpu(call))
    return times


def _time_gpu(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about 1 ms in which the host gets its launches queued
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_cpu(call: Callable[[], Any]) -> float:
    from time import perf_counter

    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e3


def _bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _baselines(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense attention by each backend that takes these tensors."""
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def call(backend: SDPBackend) -> Callable[[], Tensor]:
        def dense() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return dense

    usable = {}
    for name, backend in backends.items():
        try:
            call(backend)()
        except RuntimeError:  # what PyTorch raises where no allowed backend takes the tensors
            continue
        usable[name] = call(backend)
    return usable or {"math": call(SDPBackend.MATH)}


def _operation(config: uta_fx.Config, grid: Grid) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return uta_fx.sparse_attention(query, key, value, config=config, grid=grid)

    return operation


def _sampled_rows(length: int, block: int) -> tuple[list[int], Tensor]:
    """A few query blocks, the ragged last one among them, and their rows."""
    blocks = -(-length // block)
    chosen = sorted({0, blocks // 2, blocks - 1})[:SAMPLED_BLOCKS]
    rows = torch.cat([torch.arange(n * block, min((n + 1) * block, length)) for n in chosen])
    return chosen, rows


def _check_attention(arguments: Sequence[Any]) -> None:
    """Compare sampled query blocks with float64.

    The kernels may err as much as the reference does in the same dtype, plus one unit in the last
    place of the largest output: half for its rounding, half for that of the tail's part. Their
    softmax rounds a logit in float32 a few times more: as much of itself of every value.

    Raises:
        ArithmeticError: They err more.
    """
    output, lse = ops.sparse_attention(*arguments)
    query, block_q = arguments[0], arguments[12]
    chosen, rows = _sampled_rows(query.shape[2], block_q)
    for head in range(min(SAMPLED_HEADS, query.shape[1])):
        part: list[Any] = [
            x[:1, head : head + 1] if isinstance(x, Tensor) else x for x in arguments
        ]  # one sample, one head
        part[0] = part[0][:, :, rows.to(query.device)]
        for i in (3, 4):
            part[i] = part[i][:, :, chosen]
        for i in (5, 6, 7):  # representatives of each query block
            if arguments[5].dim() == 5:
                part[i] = part[i][:, :, chosen]
        if part[9].shape[2] > 1:
            part[9] = part[9][:, :, chosen]
        double: list[Any] = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in part
        ]
        exact, exact_lse = reference.sparse_attention(*double)
        eager, eager_lse = reference.sparse_attention(*part)
        got = output[:1, head : head + 1, rows.to(query.device)]
        got_lse = lse[:1, head : head + 1, rows.to(query.device)]
        logit = 2**-22 * exact_lse.abs().max()
        unit = torch.finfo(query.dtype).eps * exact.abs().max()
        _require("output", got, eager, exact, unit + logit * arguments[2].abs().max())
        _require("log-sum-exp", got_lse, eager_lse, exact_lse, logit)


def _check_scores(arguments: Sequence[Any]) -> None:
    """Compare sampled rows of scores with float64.

    ``(s q)^2`` is rounded to the query's dtype: half a unit of sigma2, once as a factor of the
    score and once as its part in the logit, by the largest sigma2. The rest is float32: a logit is
    rounded a few times, which counts twice, and a sum errs by 2^-24 for each term.

    Raises:
        ArithmeticError: A score is further away.
    """
    scores = ops.block_scores(*arguments)
    query, block_q = arguments[0], arguments[-1]
    chosen, rows = _sampled_rows(query.shape[2], block_q)
    part: list[Any] = [
        x[:1, :SAMPLED_HEADS].double() if isinstance(x, Tensor) else x for x in arguments
    ]
    part[0] = part[0][:, :, rows.to(query.device)]
    exact = reference.block_scores(*part)
    rows_q, mean, variance, log_size, scale, weight, power, _ = part
    sigma2 = (rows_q * scale).square() @ variance.mT
    logits = (rows_q * scale).abs() @ mean.abs().mT + log_size[:, :, None] + weight / 2 * sigma2
    unit = torch.finfo(query.dtype).eps / 2 * (power + weight * sigma2.max())
    unit += 2**-24 * (8 * logits.max() + mean.shape[3] + mean.shape[2] + 8)
    _require("scores", scores[:1, :SAMPLED_HEADS][:, :, chosen], exact, exact, unit * exact.max())


def _require(name: str, got: Tensor, eager: Tensor, exact: Tensor, rounding: Tensor) -> None:
    error = (got.double() - exact).abs().max()
    allowed = (eager.double() - exact).abs().max() + rounding
    if not error <= allowed:
        raise ArithmeticError(
            f"{name} differs from float64 by {error:.2e} where {allowed:.2e} is allowed:"
            " nothing is timed"
        )


def _relative_error(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> float:
    """Squared error relative to dense attention's squares, on sampled rows of every head."""
    generator = torch.Generator().manual_seed(0)
    length = query.shape[2]
    rows = torch.randperm(length, generator=generator)[:128].to(query.device)
    error = total = 0.0
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            logits = query[b, h, rows].double() @ key[b, h].double().T * scale
            exact = logits.softmax(-1) @ value[b, h].double()
            error += (output[b, h, rows].double() - exact).square().sum().item()
            total += exact.square().sum().item()
    return error / total


def _alignment(form: str) -> str:
    return form.split(".")[0].rstrip("%fe")


def _format_row(row: dict[str, Any]) -> str:
    cells = []
    for name, form in COLUMNS.items():
        value = row[name]
        cells.append(f"{'-':{_alignment(form)}}" if value is None else f"{value:{form}}")
    return " ".join(cells)
