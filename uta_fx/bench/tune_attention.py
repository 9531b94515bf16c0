"""Try tiles for the Triton kernels: the numbers behind their tables. ``python -m`` runs it."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import uta_fx
from uta_fx.attention import list_arguments, operator_arguments, pool_blocks, reorder_tokens
from uta_fx.bench.attention import time_interleaved
from uta_fx.bench.inputs import SHAPES, structured_inputs
from uta_fx.policies import LowDelta

KERNELS = ("listed", "tail", "scores")


def tune(
    shape: str,
    block_q: int,
    block_kv: int,
    *,
    kernels: Sequence[str] = KERNELS,
    density: float = 0.2,
    rounds: int = 7,
    best: int = 5,
) -> None:
    """Print the fastest tiles for listed blocks, tail and scores of one shape on this GPU.

    Args:
        shape: Name in ``uta_fx.bench.attention.SHAPES``.
        block_q: Query tokens in a block.
        block_kv: Key tokens in a block.
        kernels: Which of ``KERNELS``.
        density: Share of exact blocks.
        rounds: Timed rounds.
        best: How many tiles to print for each kernel.
    """
    from uta_fx.kernels import triton_attention, triton_scores

    site, tile = SHAPES[shape], triton_attention.Tile
    config = uta_fx.Config(density=density, block_q=block_q, block_kv=block_kv)
    inputs = structured_inputs(site, "cuda", torch.bfloat16)
    ordered, _ = reorder_tokens(*inputs, config, site.grid)
    selection = pool_blocks(*ordered, config, scale=None)
    arguments = list_arguments(operator_arguments(selection, *ordered[1:], config))
    visited = 4 * site.dim * block_q * block_kv * arguments[4].double().sum().item()
    no_tail: list[Any] = [x[:, :, :0] if i in range(5, 10) else x for i, x in enumerate(arguments)]
    no_list: list[Any] = [torch.zeros_like(x) if i == 4 else x for i, x in enumerate(arguments)]
    scores = LowDelta().arguments(selection)
    blocks = len(selection.statistics.size)
    pairs = 2 * site.batch * site.heads * site.length * blocks * site.dim

    def tiles(block_m: Iterable[int], block_n: Iterable[int], stages: Iterable[int]) -> list[Any]:
        return [
            tile(block_m=m, block_n=n, num_warps=w, num_stages=s)
            for m, n, w, s in itertools.product(block_m, block_n, (4, 8), stages)
            if w == 4 or m == 128
        ]

    rows = (block_q,)
    listed = tiles(rows, {min(block_kv, 64), block_kv}, (2, 3, 4))
    table: dict[str, tuple[float, list[Any], Callable[[Any], Callable[[], Any]]]] = {
        "listed": (
            visited,
            listed,
            lambda t: lambda: triton_attention.sparse_attention(*no_tail, listed_tile=t),
        ),
        "tail": (
            3 * pairs,
            tiles(rows, (32, 64), (1, 2)),
            lambda t: lambda: triton_attention.sparse_attention(*no_list, tail_tile=t),
        ),
        "scores": (
            4 * pairs,
            tiles((64, 128), (32, 64), (2, 3, 4)),
            lambda t: lambda: triton_scores.block_scores(*scores, tile=t),
        ),
    }
    for name in kernels:
        flops, choices, bind = table[name]
        calls = {t: bind(t) for t in choices if _fits(bind(t))}
        times = time_interleaved(calls, rounds, "cuda", warmup=1)
        medians = {t: statistics.median(samples) for t, samples in times.items()}
        for t in sorted(medians, key=medians.__getitem__)[:best]:
            print(
                f"{shape} {block_q}x{block_kv} {name:6} {t.block_m:3}x{t.block_n:<3}"
                f" warps {t.num_warps} stages {t.num_stages}: {medians[t]:8.3f} ms"
                f" {flops / medians[t] / 1e9:5.0f} TFLOP/s"
            )


def _fits(call: Callable[[], Any]) -> bool:
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("block_q", type=int)
    parser.add_argument("block_kv", type=int)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    given = parser.parse_args()
    with torch.no_grad():
        tune(
            given.shape,
            given.block_q,
            given.block_kv,
            kernels=given.kernels,
            density=given.density,
        )
