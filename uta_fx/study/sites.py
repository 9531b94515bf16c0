"""Queries, keys and values of the shipped model: of its layers, at some noise levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from uta_fx.order import Grid

NOISE_LEVELS = (0.9, 0.6, 0.3)


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One self-attention call.

    Attributes:
        layer: Its index.
        noise: Share of noise in the clip that the model was given.
        grid: Frames, height and width of the tokens.
        query: ``[B, H, L, D]``.
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, D]``.
    """

    layer: int
    noise: float
    grid: Grid
    query: Tensor
    key: Tensor
    value: Tensor

    def dense(self) -> Tensor:
        """What dense attention makes of it."""
        return F.scaled_dot_product_attention(self.query, self.key, self.value)


@torch.no_grad()
def trained_calls(
    pipeline: Any,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[AttentionCall]:
    """Run a moving-shapes transformer on a rendered clip with noise, and keep what it attends to.

    Args:
        pipeline: Of ``load_pipeline``.
        noise_levels: In [0, 1]; the clip is rendered once.
        layers: Which; None for all.
        seed: Of the scene and the noise.
    """
    from uta_fx.moving_shapes import render, sample_scenes
    from uta_fx.moving_shapes.scenes import tokenize

    transformer = pipeline.transformer
    like = next(transformer.parameters())
    generator = torch.Generator().manual_seed(seed)
    scene = sample_scenes(1, generator)
    clip = render(scene, generator)
    noise = torch.randn(clip.shape, generator=generator)
    sides = zip(clip.shape[2:], transformer.config.patch_size, strict=True)
    frames, height, width = (side // patch for side, patch in sides)
    for level in noise_levels:
        with _Capture(frames * height * width) as capture:
            transformer(
                hidden_states=torch.lerp(clip, noise, level).to(like),
                timestep=torch.full((1,), 1000 * level, device=like.device),
                encoder_hidden_states=pipeline.prompt_encoder(tokenize(scene).to(like.device)),
            )
        for layer, call in enumerate(capture.seen):
            if layers is None or layer in layers:
                yield AttentionCall(layer, level, (frames, height, width), *call)


class _Capture(TorchFunctionMode):
    """Keeps queries, keys and values of attention to so many keys."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tokens = tokens

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
            if given["key"].shape[2] == self._tokens:
                self.seen.append((given["query"], given["key"], given["value"]))
        return function(*args, **kwargs)
