"""Attention calls of real models, and queries, keys and values to time them on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from uta_fx.order import Grid


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
        Shape(name="hunyuan-720p", batch=1, heads=24, grid=(33, 45, 80), dim=128),
        Shape(name="cogvideox-5b", batch=2, heads=48, grid=(13, 30, 45), dim=64),
        Shape(name="ltx-720p", batch=2, heads=32, grid=(21, 22, 40), dim=64),
        Shape(name="mochi-480p", batch=1, heads=24, grid=(28, 30, 53), dim=128),
        Shape(name="power-of-two", batch=1, heads=12, grid=(16, 32, 32), dim=128),
        Shape(name="cpu-4k-64", batch=1, heads=4, grid=(4, 32, 32), dim=64),
        Shape(name="cpu-4k-128", batch=1, heads=4, grid=(4, 32, 32), dim=128),
        Shape(name="cpu-16k-64", batch=1, heads=2, grid=(16, 32, 32), dim=64),
        Shape(name="cpu-16k-128", batch=1, heads=2, grid=(16, 32, 32), dim=128),
        Shape(name="tiny", batch=1, heads=2, grid=(4, 12, 10), dim=32),
    )
}

Inputs = tuple[Tensor, Tensor, Tensor]


def structured_inputs(
    shape: Shape, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Inputs:
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
    waves = 24
    query, key, value = _empty(shape, device, dtype)
    for b in range(shape.batch):
        for h in range(shape.heads):
            phase = position @ (8 * randn(3, waves)) + 2 * math.pi * randn(waves)
            field = phase.cos() * math.sqrt(2 / waves)  # [L, waves]
            shared, own = randn(waves, shape.dim), randn(waves, shape.dim)
            for tensor, mixture in ((query, shared), (key, shared), (value, own)):
                tensor[b, h] = field @ mixture + 0.5 * randn(shape.length, shape.dim)
    return query, key, value


def random_inputs(
    shape: Shape, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Independent normal numbers: attention without any structure to find.

    Returns:
        Three tensors ``[B, H, L, D]``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    query, key, value = _empty(shape, device, dtype)
    for tensor in (query, key, value):
        tensor.normal_(generator=generator)
    return query, key, value


def trained_inputs(
    shape: Shape, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """What the shipped model computes on clips enlarged to the grid of ``shape``; needs diffusers.

    Heads of all layers, at one noise level after another, fill the heads of ``shape``. Where its
    head dim is a multiple of the model's, 64, neighbouring heads lie side by side, and queries
    grow so that their logits add up.

    Returns:
        Three tensors ``[B, H, L, D]``.

    Raises:
        ValueError: The head dim of ``shape`` is not a multiple of the model's.
    """
    query, key, value = _empty(shape, device, dtype)
    heads = _trained_heads(shape.grid, device, dtype, seed)
    for b in range(shape.batch):
        for h in range(shape.heads):
            parts = [next(heads)]
            joined, over = divmod(shape.dim, parts[0][0].shape[-1])
            if over or not joined:
                raise ValueError(
                    f"shape must have a head dim that is a multiple of the trained model's,"
                    f" {parts[0][0].shape[-1]}, got {shape.dim}"
                )
            parts += [next(heads) for _ in range(joined - 1)]
            q, k, v = (torch.cat(part, -1) for part in zip(*parts, strict=True))
            query[b, h], key[b, h], value[b, h] = q * math.sqrt(joined), k, v
    return query, key, value


INPUTS: dict[str, Callable[[Shape, torch.device | str, torch.dtype, int], Inputs]] = {
    "structured": structured_inputs,
    "random": random_inputs,
    "trained": trained_inputs,
}


def _empty(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    size = (shape.batch, shape.heads, shape.length, shape.dim)
    query, key, value = (torch.empty(size, device=device, dtype=dtype) for _ in range(3))
    return query, key, value


@torch.no_grad()
def _trained_heads(
    grid: Grid, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Iterator[Inputs]:
    """Head after head of the shipped model's self-attention, each three ``[L, 64]``, for ever."""
    from uta_fx.moving_shapes import load_pipeline, render, sample_scenes
    from uta_fx.moving_shapes.scenes import tokenize

    pipeline = load_pipeline(device, dtype)
    _, rows, columns = pipeline.transformer.config.patch_size
    size = (grid[0], grid[1] * rows, grid[2] * columns)
    generator = torch.Generator().manual_seed(seed)
    while True:
        scene = sample_scenes(1, generator)
        clip = F.interpolate(render(scene, generator), size=size, mode="trilinear")
        noise = torch.randn(clip.shape, generator=generator)
        words = pipeline.prompt_encoder(tokenize(scene).to(device))
        for level in (0.9, 0.6, 0.3):
            with _Calls() as calls:
                pipeline.transformer(
                    hidden_states=torch.lerp(clip, noise, level).to(device, dtype),
                    timestep=torch.full((1,), 1000 * level, device=device),
                    encoder_hidden_states=words,
                )
            for query, key, value in calls.seen:
                if key.shape[2] == math.prod(grid):
                    yield from zip(query[0], key[0], value[0], strict=True)


class _Calls(TorchFunctionMode):
    """Keeps queries, keys and values of each call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Inputs] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.seen.append((given["query"], given["key"], given["value"]))
        return function(*args, **kwargs)
