"""Measures, from pixels alone, whether a clip shows what its prompt says.

Shapes of one scene have different colours, so a colour finds its shape. The centroids of its
pixels, frame by frame, are fitted by a straight path with at most one reversal; occluded frames are
left out. Nothing here knows how a clip was made: rendered, generated or filmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uta_fx.moving_shapes.scenes import COLOURS, Scene

_COLOUR_DISTANCE = 0.3
_SMALLEST_AREA = 20
_FEWEST_FRAMES = 4
_SLOWEST = 0.4


@dataclass(frozen=True, kw_only=True)
class Track:
    """What became of one colour in a clip.

    Attributes:
        colour: The colour looked for.
        frames: Number of frames that show it.
        direction: ``"left"``, ``"right"``, ``"up"`` or ``"down"``: the way it moves, before it
            turns back if it does; None where it is absent or stands still.
        bounces: True if it turns back.
        speed: Pixels a frame.
    """

    colour: str
    frames: int
    direction: str | None
    bounces: bool
    speed: float

    @property
    def present(self) -> bool:
        """True if enough frames show the colour to speak of a shape."""
        return self.frames >= _FEWEST_FRAMES


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Tracks of the shapes of a scene, in its order, and how many of them agree with it.

    Attributes:
        tracks: One track a shape.
        agrees: One bool a shape: its colour is present and moves the way the prompt says.
    """

    tracks: tuple[Track, ...]
    agrees: tuple[bool, ...]

    @property
    def agreement(self) -> float:
        """Share of the shapes that agree, 0 to 1."""
        return sum(self.agrees) / len(self.agrees)


def probe(video: Tensor, scene: Scene) -> ProbeResult:
    """Compare a clip with a scene.

    Args:
        video: Floating point [3, F, H, W], RGB in [0, 1], on any device.
        scene: What it should show.

    Returns:
        The tracks and which of them agree.

    Raises:
        ValueError: If ``video`` is not of that shape.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"video: expected [3, F, H, W], got {list(video.shape)}")
    labels = _segment(video.float().cpu())
    tracks = tuple(_track(labels, shape.colour) for shape in scene.shapes)
    agrees = tuple(
        track.present and track.direction == shape.direction
        for track, shape in zip(tracks, scene.shapes, strict=True)
    )
    return ProbeResult(tracks=tracks, agrees=agrees)


def agreement(videos: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of all shapes of all scenes that agree with their clip.

    Args:
        videos: Floating point [B, 3, F, H, W], RGB in [0, 1].
        scenes: B scenes.

    Returns:
        0 to 1.

    Raises:
        ValueError: If there are not as many clips as scenes, or none.
    """
    if len(videos) != len(scenes) or not scenes:
        raise ValueError(f"scenes: expected one for each of {len(videos)} clips, got {len(scenes)}")
    agrees = [
        agree
        for video, scene in zip(videos, scenes, strict=True)
        for agree in probe(video, scene).agrees
    ]
    return sum(agrees) / len(agrees)


def _segment(video: Tensor) -> Tensor:
    """Index of the nearest shape colour of each pixel, [F, H, W], or -1 where none is near."""
    colours = torch.tensor(list(COLOURS.values()))
    distance = (video[None] - colours[:, :, None, None, None]).norm(dim=1)
    nearest = distance.min(dim=0)
    return nearest.indices.masked_fill(nearest.values > _COLOUR_DISTANCE, -1)


def _track(labels: Tensor, colour: str) -> Track:
    mask = (labels == list(COLOURS).index(colour)).float()
    area = mask.sum(dim=(1, 2))
    shown = area >= _SMALLEST_AREA
    frames = int(shown.sum())
    if frames < _FEWEST_FRAMES:
        return Track(colour=colour, frames=frames, direction=None, bounces=False, speed=0.0)
    x = (mask.sum(dim=1) * torch.arange(mask.shape[2])).sum(dim=1) / area.clamp(min=1)
    y = (mask.sum(dim=2) * torch.arange(mask.shape[1])).sum(dim=1) / area.clamp(min=1)
    # A partly covered shape has its centroid elsewhere: trust whole shapes, and lean on the rest
    # only where whole ones are too few.
    whole = area >= 0.85 * area.quantile(0.8)
    weight = torch.where(whole, 1.0, 0.02) * shown
    velocity, bounces = _fit_path(torch.stack([x, y], dim=1), weight)
    speed = float(velocity.norm())
    direction = _direction(velocity) if speed >= _SLOWEST else None
    return Track(colour=colour, frames=frames, direction=direction, bounces=bounces, speed=speed)


def _fit_path(centre: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """Weighted least squares of centre(t) = c + velocity * f(t), f straight or with a reversal.

    Args:
        centre: [F, 2].
        weight: [F].

    Returns:
        The velocity [2] before a reversal, pixels a frame, and whether there is one.
    """
    time = torch.arange(len(centre), dtype=torch.float32)
    turns = torch.arange(3.0, len(centre) - 3.0, 0.5)
    paths = torch.cat([time[None], turns[:, None] - (time - turns[:, None]).abs()])
    share = weight / weight.sum()
    paths = paths - (paths * share).sum(dim=1, keepdim=True)
    offset = centre - (centre * share[:, None]).sum(dim=0)
    velocity = (paths * share) @ offset / (paths.square() * share).sum(dim=1, keepdim=True)
    residual = (offset - paths[..., None] * velocity[:, None]).square().sum(dim=2) @ share
    best = int(residual[1:].argmin()) + 1
    # A reversal has one more parameter: believe it only where it explains much more.
    bounces = bool(residual[best] < 0.5 * residual[0] and residual[0] > 0.5)
    return velocity[best if bounces else 0], bounces


def _direction(velocity: Tensor) -> str:
    x, y = velocity.tolist()
    if abs(x) > abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"
