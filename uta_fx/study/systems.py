"""Published sparse attentions side by side, with and without their tail: error, picture, time.

To add one: an entry of ``SYSTEMS``.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uta_fx.attention import clustered_attention, pool_blocks, reorder_tokens, sparse_attention
from uta_fx.bench.attention import time_interleaved
from uta_fx.bench.inputs import Inputs, Shape
from uta_fx.config import Config
from uta_fx.generate import psnr
from uta_fx.order import Grid
from uta_fx.policies import SVG2, Radial, Threshold, TopP
from uta_fx.study.sites import AttentionCall
from uta_fx.study.switch import Switch

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
FIT_STEPS = 12
FIT_WITHIN = 0.02
"""How far from the density that was asked for halving stops, relative."""
REACHED = 0.2
"""How far from it a row may be; the row is empty beyond."""
SAMPLED_ROWS = 128
CHUNK = 1 << 26  # weights of attention at a time
DENSE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Dense attention that times are compared with: the first of these that there is."""


@dataclasses.dataclass(frozen=True)
class System:
    """One way to be sparse.

    Attributes:
        name: What is printed.
        config: Makes its configuration from a number that rises with what is kept.
        knob: The least and the greatest such number; None where it is ``Config.density`` and just
            that is kept.
        densities: Where it is measured unless others are asked for.
    """

    name: str
    config: Callable[[float], Config]
    knob: tuple[float, float] | None = None
    densities: tuple[float, ...] = DENSITIES


def _kept(**fields: Any) -> Callable[[float], Config]:
    return lambda density: Config(density=density, **fields)


def _radial(tail: str) -> Callable[[float], Config]:
    return lambda log: Config(policy=Radial(decay=2**log), tail=tail)


def _top_p(tail: str) -> Callable[[float], Config]:
    return lambda mass: Config(policy=TopP(mass=mass), density=1.0, tail=tail)


def _svg2(tail: str) -> Callable[[float], Config]:
    """No floor, which would keep a tenth of the clusters whatever their mass."""
    return lambda mass: Config(policy=SVG2(mass=mass, least=0.0), tail=tail)


_TAILS = {"": "none", " + single": "single", " + gaussian": "gaussian"}
"""Dropped, as published; UTA with one representative a query block, as in its paper; and ours."""


def _with_tails(
    name: str,
    config: Callable[[str], Callable[[float], Config]],
    knob: tuple[float, float] | None,
) -> tuple[System, ...]:
    return tuple(System(name + suffix, config(tail), knob) for suffix, tail in _TAILS.items())


SYSTEMS = (
    *_with_tails("Top-K", lambda tail: _kept(policy="topk", tail=tail, budget="row"), None),
    *_with_tails("Top-P", _top_p, (0.001, 1.0)),
    *_with_tails("SVG2", _svg2, (0.001, 1.0)),
    *_with_tails("Radial", _radial, (-8.0, 4.0)),
    *_with_tails("SVG", lambda tail: _kept(policy="spatial_temporal", tail=tail), (0.001, 0.999)),
    System("Rectified SpaAttn", _kept(policy="rectified", tail="rectified"), (0.001, 1.0)),
    System(
        "Sol-Attn",
        lambda x: Config(policy=Threshold(deviations=-x), tail="block", reorder="morton"),
        (-4.0, 4.0),
    ),
    # so little too that others are as fast
    System("ours", _kept(), densities=(0.02, 0.05, *DENSITIES)),
)
"""Every system with the token order and budget of its own; blocks are ours, 64 x 64."""

TABLE = (
    "Top-K", "Top-K + single", "Top-K + gaussian", "SVG2", "SVG2 + single", "SVG2 + gaussian",
    "Radial", "Radial + single", "Radial + gaussian",
    "Rectified SpaAttn", "Sol-Attn", "ours",
)  # fmt: skip
"""Those that are measured unless others are named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one system does at one density.

    A number is None where nobody measured it, or where the system cannot keep so much or so little.

    Attributes:
        system: Its name.
        density: What was asked for.
        kept: Share of pairs of tokens in exact blocks.
        mse: Mean squared error of the attention output, over all calls.
        error: The same, relative to the mean square of the dense output.
        errors: Of each call by itself, relative to that of its dense output.
        recall: Share of true attention in exact blocks.
        psnr: Of the generated clips against dense, in dB.
        ms: Time of the whole operation at the timed shape.
        speedup: Over the dense baseline there.
        timed_kept: As ``kept``, there.
        timed_error: As ``error``, there, on sampled rows.
        failure: What went wrong with it, if anything did; the numbers before that stand.
    """

    system: str
    density: float
    kept: float | None = None
    mse: float | None = None
    error: float | None = None
    errors: tuple[float, ...] | None = None
    recall: float | None = None
    psnr: float | None = None
    ms: float | None = None
    speedup: float | None = None
    timed_kept: float | None = None
    timed_error: float | None = None
    failure: str | None = None


def find_systems(names: Sequence[str] | None) -> tuple[System, ...]:
    """Systems by name; None for those of ``TABLE``.

    Raises:
        ValueError: There is none of a name.
    """
    of_name = {system.name: system for system in SYSTEMS}
    unknown = [name for name in names or () if name not in of_name]
    if unknown:
        raise ValueError(f"system must be among {', '.join(of_name)}, got {', '.join(unknown)}")
    return tuple(of_name[name] for name in names or TABLE)


def fit(system: System, density: float, kept: Callable[[Config], float]) -> Config | None:
    """The configuration that keeps most nearly ``density``, by halving; None if that is not near.

    Args:
        system: The system.
        density: In (0, 1].
        kept: What a configuration keeps.
    """
    if system.knob is None:
        return system.config(density)
    low, high = system.knob
    best, distance = system.config(high), float("inf")
    for _ in range(FIT_STEPS):
        middle = (low + high) / 2
        config = system.config(middle)
        share = kept(config)
        if abs(share - density) < distance:
            best, distance = config, abs(share - density)
        if distance <= FIT_WITHIN * density:
            break
        low, high = (middle, high) if share < density else (low, middle)
    return best if distance <= REACHED * density else None


class Site:
    """One attention call, and what configurations keep of it.

    Args:
        inputs: Query, key and value, ``[B, H, L, D]``, in raster order.
        grid: Frames, height and width of the tokens.
    """

    def __init__(self, inputs: Inputs, grid: Grid) -> None:
        self.inputs, self.grid = inputs, grid
        self._kept: dict[Config, float] = {}

    def exact(self, config: Config) -> tuple[Tensor, Tensor, Tensor]:
        """The blocks that the policy chose, and the block of each token in raster order.

        Returns:
            Boolean ``[B, H, Nq, Nk]``; int64 ``[B, H, L]``, by query; int64 ``[B, H, L]``, by key.
        """
        (query, key, value), inverse = reorder_tokens(*self.inputs, config, self.grid)
        lead, tokens = query.shape[:2], torch.arange(query.shape[2], device=query.device)
        rows, columns = (
            (tokens // block).expand(*lead, -1) for block in (config.block_q, config.block_kv)
        )
        policy, clusters = config.selection_policy(), None
        if isinstance(policy, SVG2):
            clusters = policy.cluster(query, key, config.block_q, config.block_kv)
            rows, columns = (
                blocks.place // block
                for blocks, block in (
                    (clusters.query, config.block_q),
                    (clusters.key, config.block_kv),
                )
            )
            query = clusters.query.gather(query)
            key, value = clusters.key.gather(key), clusters.key.gather(value)
        grid = None if clusters else self.grid
        blocks = clusters.key if clusters else None
        selection = pool_blocks(query, key, value, config, None, grid, blocks=blocks)
        selection = dataclasses.replace(selection, clusters=clusters)
        if inverse is not None:
            rows, columns = rows.index_select(2, inverse), columns.index_select(2, inverse)
        return policy.select(selection), rows, columns

    def kept(self, config: Config) -> float:
        """Share of pairs of tokens in exact blocks; what the tail is does not matter."""
        key = dataclasses.replace(config, tail="none")
        if key not in self._kept:
            self._kept[key] = self._count(key)
        return self._kept[key]

    def _count(self, config: Config) -> float:
        exact, rows, columns = self.exact(config)
        counts = [
            torch.zeros(
                *exact.shape[:2], blocks, dtype=torch.float64, device=exact.device
            ).scatter_add(2, place, torch.ones_like(place, dtype=torch.float64))
            for place, blocks in ((rows, exact.shape[2]), (columns, exact.shape[3]))
        ]
        pairs = counts[0][:, :, None] @ exact.double() @ counts[1][..., None]
        return (pairs / rows.shape[2] ** 2).mean().item()

    def recall(self, config: Config) -> float:
        """Share of true attention in exact blocks, averaged over rows."""
        exact, rows, columns = self.exact(config)
        query, key, _ = (x.float() for x in self.inputs)
        heads, length = query.shape[0] * query.shape[1], query.shape[2]
        total = 0.0
        for part in torch.arange(length, device=query.device).split(CHUNK // (heads * length) or 1):
            logits = query.index_select(2, part) @ key.mT * query.shape[3] ** -0.5
            of_rows = rows.index_select(2, part)[..., None].expand(-1, -1, -1, exact.shape[3])
            of_tokens = columns[:, :, None].expand(-1, -1, len(part), -1)
            inside = exact.gather(2, of_rows).gather(3, of_tokens)
            total += (logits.softmax(-1) * inside).sum().item()
        return total / (heads * length)

    def output(self, config: Config) -> Tensor:
        """What the operation makes of it."""
        return sparse_attention(*self.inputs, config=config, grid=self.grid)


@torch.no_grad()
def attention_rows(
    calls: Sequence[AttentionCall],
    densities: Sequence[float] | None = None,
    systems: Sequence[System] = SYSTEMS,
) -> Iterator[tuple[Row, Config | None]]:
    """Errors and recall of every system at every density on attention calls of one shape.

    Args:
        calls: Of one shape.
        densities: None for those of each system.
        systems: Which.

    Yields:
        A row, and the configuration that it is of; None where no configuration keeps so much, or
        where it failed.
    """
    sites = [Site((call.query, call.key, call.value), call.grid) for call in calls]
    dense = [call.dense().double() for call in calls]
    squares = [x.square().mean().item() for x in dense]

    def kept(config: Config) -> float:
        return statistics.fmean(site.kept(config) for site in sites)

    def measure(system: System, row: Row) -> tuple[Row, Config | None]:
        config = fit(system, row.density, kept)
        if config is None:
            return row, None
        mses = [
            (site.output(config).double() - exact).square().mean().item()
            for site, exact in zip(sites, dense, strict=True)
        ]
        mse = statistics.fmean(mses)
        recall = statistics.fmean(site.recall(config) for site in sites)
        row = dataclasses.replace(
            row, kept=kept(config), mse=mse, error=mse / statistics.fmean(squares), recall=recall,
            errors=tuple(mse / square for mse, square in zip(mses, squares, strict=True)),
        )  # fmt: skip
        return row, config

    for system in systems:
        for density in densities or system.densities:
            row = Row(system=system.name, density=density)
            try:
                yield measure(system, row)
            except Exception as error:  # of one system; the others are measured all the same
                yield failed(row, error), None


def failed(row: Row, error: Exception) -> Row:
    """The row, with what went wrong in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return dataclasses.replace(row, failure=f"{type(error).__name__}: {first}")


@torch.no_grad()
def timed_rows(
    rows: Sequence[Row],
    shape: Shape,
    inputs: Inputs,
    systems: Sequence[System] = SYSTEMS,
    *,
    rounds: int = 7,
    compile: bool = False,
) -> Iterator[Row]:
    """The same rows with the time of the operation at a shape, and its error there.

    On a GPU the operation's launches are recorded in a CUDA graph, so that what is timed is the
    work of the GPU alone. SVG2 starts from the centroids of a call before, as it does at all steps
    but the first.

    Args:
        rows: Of ``attention_rows``.
        shape: Of the inputs.
        inputs: Query, key and value.
        systems: Those of the rows; each is fitted to its density anew.
        rounds: Timed rounds; medians are reported. Dense attention takes turns with each.
        compile: Compile the operation by Inductor and record nothing: as in a model, and about ten
            seconds more for each row.
    """
    site, device = Site(inputs, shape.grid), str(inputs[0].device)
    of_name = {system.name: system for system in systems}
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(shape.length, generator=generator)[:SAMPLED_ROWS].to(device)
    dense = dense_rows(inputs, chosen)

    def attend() -> Tensor:
        with sdpa_kernel(DENSE, set_priority=True):
            return F.scaled_dot_product_attention(*inputs)

    def measure(row: Row) -> Row:
        config = fit(of_name[row.system], row.density, site.kept)
        if config is None:
            return row
        operation = _operation(config, inputs, shape.grid, compile)
        sparse: Callable[[], Tensor] = functools.partial(operation, *inputs)
        output = sparse().index_select(2, chosen).double()
        if inputs[0].is_cuda and not compile:
            sparse = record(sparse)
        times = time_interleaved({"dense": attend, "sparse": sparse}, rounds, device)
        ms, baseline = (statistics.median(times[name]) for name in ("sparse", "dense"))
        return dataclasses.replace(
            row,
            ms=ms,
            speedup=baseline / ms,
            timed_kept=site.kept(config),
            timed_error=((output - dense).square().sum() / dense.square().sum()).item(),
        )

    for row in rows:
        try:
            yield measure(row)
        except Exception as error:  # as above
            yield failed(row, error)


def record(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what a call launches in a CUDA graph; what is returned launches it again.

    The call has run before, so that nothing is left to be compiled.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def pictured_rows(
    rows: Sequence[tuple[Row, Config]], pipeline: Any, prompts: Sequence[str], steps: int, seed: int
) -> Iterator[Row]:
    """The same rows with the PSNR of generated clips against dense.

    Args:
        rows: And the configurations that they are of.
        pipeline: Loaded on its device; left as it was.
        prompts: One clip each.
        steps: Denoising steps.
        seed: Of the first prompt; the next ones count up.
    """
    with Switch(pipeline) as switch:
        dense = pipeline(prompts, steps=steps, seed=seed).cpu()
        for row, config in rows:
            switch.config = config
            try:
                videos = pipeline(prompts, steps=steps, seed=seed).cpu()
                yield dataclasses.replace(row, psnr=psnr(dense, videos))
            except Exception as error:  # as above
                yield failed(row, error)


def dense_rows(inputs: Inputs, rows: Tensor) -> Tensor:
    """Dense attention of some rows in float64, a head at a time: ``[B, H, rows, Dv]``."""
    query, key, value = inputs
    scale = query.shape[-1] ** -0.5
    return torch.stack(
        [
            torch.stack(
                [
                    (scale * q[rows].double() @ k.double().T).softmax(-1) @ v.double()
                    for q, k, v in zip(*of_sample, strict=True)
                ]
            )
            for of_sample in zip(query, key, value, strict=True)
        ]
    )


def _operation(config: Config, inputs: Inputs, grid: Grid, compile: bool) -> Callable[..., Tensor]:
    """A function of query, key and value; of SVG2 from the centroids that ``inputs`` lead to."""
    if isinstance(config.selection_policy(), SVG2):
        _, centroids = clustered_attention(*inputs, config=config, grid=grid)

        def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return clustered_attention(query, key, value, centroids, config=config, grid=grid)[0]

    else:

        def operation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return sparse_attention(query, key, value, config=config, grid=grid)

    if not compile:
        return operation
    torch.compiler.reset()  # or the systems before count towards the recompile limit
    return torch.compile(operation, dynamic=False)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows by system, as in ``SYSTEMS``, then by density."""
    place = {system.name: i for i, system in enumerate(SYSTEMS)}
    return sorted(rows, key=lambda row: (place[row.system], row.density))
