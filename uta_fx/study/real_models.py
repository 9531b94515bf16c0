"""Video transformers at their real sizes, traced without weights on the meta device.

``python -m uta_fx.study.real_models > docs/flops.md`` makes the table in the documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from uta_fx._optional import require
from uta_fx.config import Config
from uta_fx.explain import Explanation, explain
from uta_fx.order import Grid

DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a clip, in pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}, {self.frames} frames"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealModel:
    """A released model: its class, its configuration and what it is given at a size.

    Attributes:
        title: Its name for people.
        class_name: In diffusers.
        settings: What the class is built from, where it differs from the class's own defaults.
        stacks: The lists of alike layers in it, by attribute, and the setting that says how many
            there are.
        compression: How many frames, rows and columns of pixels one latent is.
        patch: How many latents, in frames, rows and columns, one token is.
        sizes: By name, those that it was made for; the first is the default.
        inputs: Makes the arguments of one step, of one sample, from the latent's frames, rows and
            columns and from the token grid.
        prepare: Makes the model ready for inputs without values.
        by_block: Each layer is compiled by itself, with a grid given.
    """

    title: str
    class_name: str
    settings: Mapping[str, Any]
    stacks: Mapping[str, str]
    compression: Grid
    patch: Grid
    sizes: Mapping[str, Size]
    inputs: Callable[[Grid, Grid], dict[str, Any]]
    prepare: Callable[[torch.nn.Module], None] = lambda model: None
    by_block: bool = False

    def latent(self, size: Size) -> Grid:
        """Frames, rows and columns of the latent of a clip.

        Raises:
            ValueError: The clip cannot be cut into whole tokens; the message names which side.
        """
        frames, height, width = self.compression
        for name, value, unit in (
            ("height", size.height, height * self.patch[1]),
            ("width", size.width, width * self.patch[2]),
        ):
            if value < unit or value % unit:
                raise ValueError(
                    f"{name} must be a multiple of {unit} for {self.title}, got {value}"
                )
        if size.frames < 1 or (size.frames - 1) % frames:
            raise ValueError(
                f"frames must be one more than a multiple of {frames} for {self.title},"
                f" got {size.frames}"
            )
        return (size.frames - 1) // frames + 1, size.height // height, size.width // width

    def grid(self, size: Size) -> Grid:
        """Frames, rows and columns of its video tokens."""
        frames, height, width = (
            side // patch for side, patch in zip(self.latent(size), self.patch, strict=True)
        )
        return frames, height, width

    def build(self, layers: int | None = None) -> torch.nn.Module:
        """The model without weights, in evaluation mode.

        Args:
            layers: At most so many of each stack; None for all.
        """
        diffusers = require("diffusers", extra="diffusers")
        cls = getattr(diffusers, self.class_name)
        with torch.device("meta"):
            model = cls(**self.settings | self._cut(cls, layers)).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(DTYPE)
        self.prepare(model)
        whole: torch.nn.Module = model
        return whole

    def depth(self) -> dict[str, int]:
        """How many layers each stack has."""
        cls = getattr(require("diffusers", extra="diffusers"), self.class_name)
        return {stack: self._count(cls, name) for stack, name in self.stacks.items()}

    def _cut(self, cls: Any, layers: int | None) -> dict[str, int]:
        if layers is None:
            return {}
        return {name: min(layers, self._count(cls, name)) for name in self.stacks.values()}

    def _count(self, cls: Any, name: str) -> int:
        import inspect

        return self.settings.get(name, inspect.signature(cls).parameters[name].default)


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


# fmt: off
WAN_SIZES = {"480p": Size(480, 832, 81), "720p": Size(720, 1280, 81)}


def _wan_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 512, 4096),
    }


def _hunyuan_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 4096),
        "encoder_attention_mask": meta(1, 256, dtype=torch.int64),
        "pooled_projections": meta(1, 768),
        "guidance": meta(1),
    }


def _hunyuan_15_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 65, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 1000, 3584),
        "encoder_attention_mask": torch.ones(1, 1000, dtype=torch.int64),
        "encoder_hidden_states_2": meta(1, 256, 1472),
        "encoder_attention_mask_2": torch.ones(1, 256, dtype=torch.int64),
        "image_embeds": torch.zeros(1, 729, 1152, dtype=DTYPE),
    }


def _cogvideox_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    frames, height, width = latent
    tokens = math.prod(grid)
    return {
        "hidden_states": meta(1, frames, 16, height, width),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1),
        "image_rotary_emb": (meta(tokens, 64), meta(tokens, 64)),
    }


def _ltx_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, math.prod(grid), 128),
        "encoder_hidden_states": meta(1, 128, 4096),
        "timestep": meta(1),
        "encoder_attention_mask": meta(1, 128),
        "num_frames": grid[0], "height": grid[1], "width": grid[2],
    }


def _mochi_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 12, *latent),
        "encoder_hidden_states": meta(1, 256, 4096),
        "timestep": meta(1),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.bool),
    }


REAL_MODELS = {
    "wan-2.1-1.3b": RealModel(
        title="Wan 2.1 1.3B",
        class_name="WanTransformer3DModel",
        settings={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=WAN_SIZES,
        inputs=_wan_inputs,
    ),
    "wan-2.1-14b": RealModel(
        title="Wan 2.1 14B",
        class_name="WanTransformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=WAN_SIZES,
        inputs=_wan_inputs,
    ),
    "hunyuanvideo": RealModel(
        title="HunyuanVideo",
        class_name="HunyuanVideoTransformer3DModel",
        settings={},
        stacks={
            "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 129), "480p": Size(480, 832, 129)},
        inputs=_hunyuan_inputs,
    ),
    "hunyuanvideo-1.5": RealModel(
        title="HunyuanVideo 1.5",
        class_name="HunyuanVideo15Transformer3DModel",
        settings={"task_type": "t2v", "target_size": 960},
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 16, 16),
        patch=(1, 1, 1),
        sizes={"720p": Size(720, 1280, 121), "480p": Size(480, 832, 121)},
        inputs=_hunyuan_15_inputs,
    ),
    "cogvideox-5b": RealModel(
        title="CogVideoX-5B",
        class_name="CogVideoXTransformer3DModel",
        settings={
            "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": Size(480, 720, 49)},
        inputs=_cogvideox_inputs,
    ),
    "ltx-video": RealModel(
        title="LTX-Video",
        class_name="LTXVideoTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(8, 32, 32),
        patch=(1, 1, 1),
        sizes={"512p": Size(512, 704, 161), "480p": Size(480, 832, 161), "720p": Size(704, 1280, 161)},
        inputs=_ltx_inputs,
    ),
    "mochi": RealModel(
        title="Mochi 1",
        class_name="MochiTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(6, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": Size(480, 848, 163)},
        inputs=_mochi_inputs,
    ),
}
# fmt: on
