"""A small text-to-video world and a trained model of it: shapes that move over patterns.

``scenes`` says what a clip shows, ``render`` draws it, ``probe`` measures whether a clip agrees
with its prompt; these need torch alone. ``load_pipeline`` gives the trained video diffusion
transformer and needs diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uta_fx.moving_shapes.probe import ProbeResult, Track, agreement, probe
from uta_fx.moving_shapes.render import FRAMES, SIZE, render
from uta_fx.moving_shapes.scenes import (
    Background,
    Scene,
    Shape,
    held_out_scenes,
    pack,
    parse_prompt,
    sample_scenes,
    unpack,
)

if TYPE_CHECKING:
    from uta_fx.moving_shapes.pipeline import MovingShapesPipeline, PromptEncoder, load_pipeline

__all__ = [
    "FRAMES",
    "SIZE",
    "Background",
    "MovingShapesPipeline",
    "ProbeResult",
    "PromptEncoder",
    "Scene",
    "Shape",
    "Track",
    "agreement",
    "held_out_scenes",
    "load_pipeline",
    "pack",
    "parse_prompt",
    "probe",
    "render",
    "sample_scenes",
    "unpack",
]

_NEED_DIFFUSERS = ("MovingShapesPipeline", "PromptEncoder", "load_pipeline")


def __getattr__(name: str) -> Any:
    if name not in _NEED_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from uta_fx.moving_shapes import pipeline

    return getattr(pipeline, name)
