"""The operation against dense attention: is it right, how fast is it, how much does it err.

Nothing is timed before sampled rows agree with float64. Baselines, peers and candidates take turns
in rounds and medians are reported, so that a clock that drifts does so for all of them; turns last
equally long, so that each is timed at the clock that it would hold by itself.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import uta_fx
from uta_fx.attention import list_arguments, operator_arguments, pool_blocks, reorder_tokens
from uta_fx.bench.gate import (
    check_attention,
    check_fit,
    check_scores,
    check_selection,
    check_statistics,
    relative_error,
)
from uta_fx.bench.inputs import INPUTS, SHAPES, Inputs, Shape
from uta_fx.kernels import ops
from uta_fx.order import Grid
from uta_fx.policies import SVG2, LowDelta

DEFAULT_SHAPES = tuple(x for x in SHAPES if not x.startswith(("cpu", "power", "tiny")))
DENSITIES = (0.05, 0.1, 0.2, 0.25, 0.5)
COLUMNS = {
    "shape": "<15", "density": ">7.2f", "what": "<12", "ms": ">9.3f", "spread": ">7.1%",
    "speedup": ">8.2f", "tflops": ">7.1f", "rate": ">6.2f", "error": ">9.1e", "memory": ">7.1%",
}  # fmt: skip
TURN = 250.0  # milliseconds for which a candidate has a GPU before the next one does
PARTS = {
    "reorder": "tokens into the order of the blocks, and the output back",
    "statistics": "means and variances of the blocks",
    "scores": "what the policy ranks blocks by",
    "routing": "from scores to a mask and representatives: all before attention, less those two",
    "listed": "attention to the listed blocks",
    "tail": "attention to the representatives",
}
OUTPUTS = ("operation", "in order", "kernels", "from lists", "flex")
TIMED = (*OUTPUTS, *PARTS)


def run(
    shapes: Sequence[str] = DEFAULT_SHAPES,
    densities: Sequence[float] = DENSITIES,
    *,
    config: uta_fx.Config | None = None,
    inputs: str = "structured",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 15,
    compile: bool = True,
    only: Sequence[str] = (),
    output: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Check, time and print; a table grows as shapes are done.

    Args:
        shapes: Names in ``SHAPES``.
        densities: What to set ``config.density`` to.
        config: Everything else; None for the defaults.
        inputs: A name in ``INPUTS``: where queries, keys and values come from.
        device: Where to run; baselines and peers that it does not have are left out.
        dtype: Of query, key and value.
        rounds: Timed rounds, at least 2; the median is reported.
        compile: Compile the whole operation and its parts; False runs them eagerly and leaves
            FlexAttention out.
        only: Names of ``what`` to time beside dense attention; empty for all.
        output: JSON file to write; None for none.

    Returns:
        One entry for each timed thing: ``shape``, ``density`` (None for dense and for what does not
        depend on it), ``kept`` (share of blocks that were exact), ``what``, ``ms``, ``spread`` (of
        the middle half of the rounds, relative), ``speedup`` over the fastest dense baseline,
        ``tflops`` on visited tiles, ``rate``: of those to the fastest dense one's, ``error``:
        squared error of the output relative to dense, and ``memory``: the most that a call had
        allocated beside its output, relative to query, key and value (None on a CPU).

        ``what`` is ``dense cudnn``, ``dense flash`` or ``dense math``; ``flex``: FlexAttention over
        the same blocks, without a tail; ``kernels``: attention with a mask of blocks and a tail
        given; ``from lists``: the same with lists in place of the mask, as in an ONNX file;
        ``operation``: everything; ``in order``: everything, of tokens that are in the order of the
        blocks already (where the policy does not ask where they lie); or a name in ``PARTS``.

    Raises:
        ValueError: A name is not in ``SHAPES`` or ``INPUTS`` or nothing that is timed; the policy
            or the tail has an operator of its own.
        ArithmeticError: A result disagrees with float64, or a selection with its rule; nothing of
            that shape was timed.
    """
    if unknown := set(shapes) - set(SHAPES):
        raise ValueError(
            f"shapes must be among {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}"
        )
    if inputs not in INPUTS:
        raise ValueError(f"inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
    if unknown := set(only) - set(TIMED):
        raise ValueError(f"only must be among {', '.join(TIMED)}, got {', '.join(sorted(unknown))}")
    config = config or uta_fx.Config()
    if isinstance(config.selection_policy(), SVG2) or config.tail_form().kind == "rectified":
        raise ValueError(
            "policy svg2 and tail rectified have operators of their own, which this benchmark"
            " cannot take apart: uta-fx study policies times them;"
            f" got policy {config.policy} and tail {config.tail}"
        )
    machine = f"{describe(device, dtype, config)}, {inputs} inputs"
    print(machine)
    print(" ".join(f"{name:{alignment(form)}}" for name, form in COLUMNS.items()))
    rows: list[dict[str, Any]] = []
    for name in shapes:
        with torch.no_grad():
            query_key_value = INPUTS[inputs](SHAPES[name], device, dtype, 0)
            case = _Case(SHAPES[name], query_key_value, config, device, rounds, compile, only)
            shape_rows = case.run(densities)
        for row in shape_rows:
            if row["what"] not in PARTS:
                print(format_row(row, COLUMNS))
        if not only:
            _print_parts(shape_rows)
        rows += shape_rows
        if output is not None:  # an interrupted run keeps what it has measured
            record = {"machine": machine, "inputs": inputs, "rows": rows}
            Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return rows


def describe(device: str, dtype: torch.dtype, config: uta_fx.Config, *, tail: bool = True) -> str:
    """One line: device, versions, dtype, and settings, of which ``tail`` may be left out."""
    on_gpu = torch.device(device).type == "cuda"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if on_gpu else f"{device}, threads {threads}"
    return (
        f"{name}, torch {torch.__version__}, {dtype}, blocks {config.block_q}x{config.block_kv},"
        f" policy {config.policy}, budget {config.budget}"
        + (f", tail {config.tail}" if tail else "")
    )


Candidates = dict[tuple[str, float | None], Callable[[], Any]]


class _Case:
    """One shape: its inputs, and everything that takes turns on them."""

    def __init__(
        self,
        shape: Shape,
        inputs: Inputs,
        config: uta_fx.Config,
        device: str,
        rounds: int,
        compile: bool,
        only: Sequence[str],
    ) -> None:
        self.shape, self.inputs, self.config = shape, inputs, config
        self.device, self.rounds, self.compile = device, rounds, compile
        self.only = only
        self.scale = shape.dim**-0.5
        self.ordered, self.inverse = reorder_tokens(*inputs, config, shape.grid)
        self.selection = pool_blocks(*self.ordered, config, self.scale, shape.grid)
        self.scored = LowDelta().arguments(self.selection)  # of uta::block_scores
        self.kept: dict[float, float] = {}

    def run(self, densities: Sequence[float]) -> list[dict[str, Any]]:
        """Check and time; rows of all candidates."""
        torch.compiler.reset()  # or the shapes before count towards the recompile limit
        candidates: Candidates = {
            (f"dense {name}", None): call for name, call in baselines(*self.inputs).items()
        }
        candidates |= self._parts_before_attention()
        for density in densities:
            candidates |= self._at_density(density)
        if self.only:
            wanted = set(self.only)
            if "routing" in wanted:  # a difference of these
                wanted |= {"before", "statistics", "scores"}
            candidates = {
                (name, density): call
                for (name, density), call in candidates.items()
                if name in wanted or name.startswith("dense")
            }
        turn = TURN if torch.device(self.device).type == "cuda" else 0.0
        times = time_interleaved(candidates, self.rounds, self.device, turn=turn)
        memory = {name: self._memory(call) for name, call in candidates.items()}
        errors = {name: self._error(name[0], call) for name, call in candidates.items()}
        return self._rows(times, memory, errors)

    def _parts_before_attention(self) -> Candidates:
        config, grid = self.config, self.shape.grid
        check_statistics(*self.ordered[1:], config.block_kv)
        check_scores(self.scored)

        def reorder(query: Tensor, key: Tensor, value: Tensor) -> Any:
            ordered, inverse = reorder_tokens(query, key, value, config, grid)
            # the output has the size of the query
            return ordered, query if inverse is None else query.index_select(2, inverse)

        _, key, value = self.ordered
        return {
            ("reorder", None): bind(self._compiled(reorder), *self.inputs),
            ("statistics", None): bind(ops.block_statistics, key, value, config.block_kv),
            ("scores", None): bind(ops.block_scores, *self.scored),
        }

    def _at_density(self, density: float) -> Candidates:
        """Kernels, peers and the whole operation at one density, checked."""
        config = dataclasses.replace(self.config, density=density)
        selection = dataclasses.replace(self.selection, density=density)
        arguments = operator_arguments(selection, *self.ordered[1:], config)
        check_selection(ops.block_scores(*self.scored), density)
        tail = config.tail_form()
        if tail.fit_rows:
            check_fit(tail.fit_arguments(selection, arguments[3], *arguments[1:3]))
        check_attention(arguments)
        self.kept[density] = arguments[3].double().mean().item()

        def before_attention(query: Tensor, key: Tensor, value: Tensor) -> Any:
            selection = pool_blocks(query, key, value, config, None, self.shape.grid)
            return operator_arguments(selection, key, value, config)[3:9]

        whole = self._compiled(_operation(config, self.shape.grid))
        lists = list_arguments(arguments)
        no_tail = [x[:, :, :0] if i in range(4, 9) else x for i, x in enumerate(arguments)]
        no_list = [torch.zeros_like(x) if i == 3 else x for i, x in enumerate(arguments)]
        candidates: Candidates = {
            ("kernels", density): bind(ops.block_masked_attention, *arguments),
            ("from lists", density): bind(ops.sparse_attention, *lists),
            ("operation", density): bind(whole, *self.inputs),
            ("before", density): bind(self._compiled(before_attention), *self.ordered),
            ("listed", density): bind(ops.block_masked_attention, *no_tail),
            ("tail", density): bind(ops.block_masked_attention, *no_list),
        }
        if not getattr(config.selection_policy(), "needs_grid", False):
            in_order = _operation(dataclasses.replace(config, reorder="none"), None)
            candidates["in order", density] = bind(self._compiled(in_order), *self.ordered)
        if self.compile and torch.device(self.device).type == "cuda":
            candidates["flex", density] = _flex_attention(lists)
        return candidates

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self.compile else function

    def _error(self, what: str, call: Callable[[], Any]) -> float | None:
        """Of the output; None where there is none that could be compared."""
        if what not in OUTPUTS:
            return None
        result = call()
        output = result[0] if isinstance(result, tuple) else result
        if what != "operation" and self.inverse is not None:
            output = output.index_select(2, self.inverse)
        return relative_error(output, *self.inputs, self.scale)

    def _memory(self, call: Callable[[], Any]) -> float | None:
        """The most that is allocated during a call beside its result, relative to q, k and v."""
        if torch.device(self.device).type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                peak -= tensor.numel() * tensor.element_size()
        return peak / sum(x.numel() * x.element_size() for x in self.inputs)

    def _rows(
        self,
        times: dict[Any, list[float]],
        memory: dict[Any, float | None],
        errors: dict[Any, float | None],
    ) -> list[dict[str, Any]]:
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        best = min(medians[name] for name in medians if name[0].startswith("dense"))
        rows = []
        for name, samples in times.items():
            (what, density), ms = name, medians[name]
            if what == "before":  # the difference is what has no call of its own
                what = "routing"
                ms -= medians["statistics", None] + medians["scores", None]
            # of the dense products' operations, those on exact blocks
            share = 1.0 if what.startswith("dense") else self.kept.get(density or 0)
            if what in ("tail", "routing"):
                share = None
            low, _, high = statistics.quantiles(samples, n=4)
            rows.append(
                {
                    "shape": self.shape.name,
                    "density": density,
                    "kept": self.kept.get(density or 0),
                    "what": what,
                    "ms": ms,
                    "spread": (high - low) / ms,
                    "speedup": best / ms,
                    "tflops": None if share is None else share * self.shape.dense_flops / ms / 1e9,
                    "rate": None if share is None else share * best / ms,
                    "error": errors[name],
                    "memory": memory[name],
                }
            )
        return rows


def time_interleaved(
    candidates: dict[Any, Callable[[], Any]],
    rounds: int,
    device: str,
    warmup: int = 2,
    turn: float = 0.0,
) -> dict[Any, list[float]]:
    """Milliseconds of each call, one number a round: in each every candidate has its turn.

    Rounds differ in their order, the same in every run.

    Args:
        candidates: Calls by name.
        rounds: How many turns each has.
        device: Where they run.
        warmup: Calls of each before.
        turn: Milliseconds for which a turn lasts at least, and at least one call: its number is
            the median. Under load a GPU lowers its clock, and one short call would be timed at the
            clock that the call before it left behind.
    """
    on_gpu = torch.device(device).type == "cuda"
    for _ in range(warmup):
        for call in candidates.values():
            call()
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    generator = random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(list(candidates), len(candidates)):
            call = candidates[name]
            samples = [_time_gpu(call) if on_gpu else _time_cpu(call)]
            while sum(samples) < turn:
                samples.append(_time_gpu(call) if on_gpu else _time_cpu(call))
            times[name].append(statistics.median(samples))
    return times


def _time_gpu(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(8_000_000)  # about 4 ms in which the host gets its launches queued
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_cpu(call: Callable[[], Any]) -> float:
    # on one thread its own time counts: others on the machine are no part of it
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    start = clock()
    call()
    return (clock() - start) * 1e3


def bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call without arguments."""
    return lambda: function(*arguments)


def baselines(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense attention by each backend that takes these tensors, by name."""
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


def _flex_attention(arguments: Sequence[Any]) -> Callable[[], Tensor]:
    """FlexAttention over the operator's lists, in tiles of their blocks; what it skips is lost."""
    from torch.nn.attention.flex_attention import (
        BlockMask,
        FlexKernelOptions,
        flex_attention,
        noop_mask,
    )

    query, key, value, ids, counts, scale = *arguments[:5], arguments[10]
    block_q, block_kv = arguments[12:]
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(ids), counts, ids,
        BLOCK_SIZE=(block_q, block_kv), mask_mod=noop_mask,
        seq_lengths=(query.shape[2], key.shape[2]),
    )  # fmt: skip
    options: FlexKernelOptions = {"BLOCK_M": block_q, "BLOCK_N": block_kv}
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, scale=scale, kernel_options=options)


def _operation(
    config: uta_fx.Config, grid: Grid | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return uta_fx.sparse_attention(query, key, value, config=config, grid=grid)

    return operation


def _print_parts(rows: Sequence[dict[str, Any]]) -> None:
    """What a call spends on each part, density by density; they add up to about ``operation``."""
    once = {row["what"]: row["ms"] for row in rows if row["density"] is None}
    for density in sorted({row["density"] for row in rows if row["density"]}):
        at = once | {row["what"]: row["ms"] for row in rows if row["density"] == density}
        parts = ", ".join(f"{name} {at[name]:.3f}" for name in PARTS)
        print(f"{rows[0]['shape']:<15} {density:7.2f} parts in ms: {parts}")


def alignment(form: str) -> str:
    """Of a column's title: the format of its numbers without their precision."""
    return form.split(".")[0].rstrip("%fe")


def format_row(row: dict[str, Any], columns: dict[str, str]) -> str:
    """One line of a table whose columns have these formats; ``-`` where there is no number."""
    cells = []
    for name, form in columns.items():
        value = row[name]
        cells.append(f"{'-':{alignment(form)}}" if value is None else f"{value:{form}}")
    return " ".join(cells)
