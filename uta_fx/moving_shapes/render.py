"""Draws packed scenes as clips: where things are (a layout, sampled), and what that looks like.

A prompt leaves sizes, places, speeds and the phase of the background open. ``sample_layout`` draws
them; ``draw`` is arithmetic on tensors, so it runs on any device and compiles into a few kernels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from uta_fx.moving_shapes.scenes import COLOURS, HUES, MAX_SHAPES, MOTIONS

FRAMES = 16
SIZE = 64

_CANDIDATES = 8
_CLEAR_FRAMES = 9
_DARK_SHADE = 0.55


class Layout(NamedTuple):
    """What the prompt leaves open, for B clips of F frames; lengths in pixels, angles in radians.

    Attributes:
        radius: [B, 3].
        centre: [B, 3, F, 2], x to the right and y down.
        angle: [B, 3, F], clockwise.
        wave: [B, 2, 2], two perpendicular wave vectors of the background, radians a pixel.
        phase: [B, 2, F], their phases, which drift.
    """

    radius: Tensor
    centre: Tensor
    angle: Tensor
    wave: Tensor
    phase: Tensor


def render(packed: Tensor, generator: torch.Generator, *, frames: int = FRAMES) -> Tensor:
    """Draw clips of packed scenes with a random layout.

    Args:
        packed: int64 [B, 15], on the device of ``generator``.
        generator: Source of the layouts.
        frames: Number of first frames to draw, F, 1 to 16 (default all 16).

    Returns:
        float32 [B, 3, F, 64, 64], RGB in [-1, 1].
    """
    return draw(packed, sample_layout(packed, generator, frames=frames))


def sample_layout(packed: Tensor, generator: torch.Generator, *, frames: int = FRAMES) -> Layout:
    """Draw the layout of packed scenes.

    Every shape stays inside the picture, and is (mostly) clear of the shapes in front of it in
    at least nine of the sixteen frames, as far as eight attempts find such places.

    Args:
        packed: int64 [B, 15], on the device of ``generator``.
        generator: Source of randomness.
        frames: Number of first frames, F, 1 to 16.

    Returns:
        The layout.

    Raises:
        ValueError: If ``frames`` is not in 1 to 16.
    """
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames: expected 1 to {FRAMES}, got {frames}")
    batch, device = len(packed), packed.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    shapes = packed[:, 1 : 1 + 4 * MAX_SHAPES].view(batch, MAX_SHAPES, 4)
    motion, direction = shapes[..., 2], shapes[..., 3]
    time = torch.arange(FRAMES, device=device, dtype=torch.float32)

    radius = uniform(7.5, 11.0, MAX_SHAPES)
    centre = _sample_paths(radius, motion, direction, time, uniform)
    clear = _clear_frames(centre, radius, packed[:, 0])
    best = clear.clamp(max=_CLEAR_FRAMES).argmax(dim=1)
    centre = centre[torch.arange(batch, device=device), best]

    # A shape that spins turns the way it would roll: clockwise to the right and downwards.
    rate = uniform(0.14, 0.26, MAX_SHAPES) * (2.0 * (direction % 2) - 1.0)
    spins = motion == MOTIONS.index("spins")
    angle = (rate * spins)[..., None] * time

    turn, period = uniform(0.0, math.pi), uniform(14.0, 24.0)
    across = torch.stack([turn.cos(), turn.sin()], dim=1)
    along = torch.stack([-turn.sin(), turn.cos()], dim=1)
    wave = torch.stack([across, along], dim=1) * (2 * math.pi / period)[:, None, None]
    phase = uniform(0.0, 2 * math.pi, 2)[..., None] + uniform(-0.15, 0.15, 2)[..., None] * time
    return Layout(radius, centre[:, :, :frames], angle[:, :, :frames], wave, phase[:, :, :frames])


def draw(packed: Tensor, layout: Layout) -> Tensor:
    """Draw packed scenes in a given layout, antialiased.

    Args:
        packed: int64 [B, 15].
        layout: Where things are, on the same device.

    Returns:
        float32 [B, 3, F, 64, 64], RGB in [-1, 1].
    """
    grid = torch.arange(SIZE, device=packed.device, dtype=torch.float32) + 0.5
    x, y = grid[None, None, None, :], grid[None, None, :, None]
    count, hue, texture = packed[:, 0], packed[:, -2], packed[:, -1]

    hues, colours = _palette(packed.device)
    light = hues[hue]
    shade = _DARK_SHADE + (1 - _DARK_SHADE) * _texture(texture, layout, x, y)
    video = shade[:, None] * light[:, :, None, None, None]

    for shape in reversed(range(MAX_SHAPES)):
        colour, kind = packed[:, 1 + 4 * shape], packed[:, 2 + 4 * shape]
        centre = layout.centre[:, shape, :, None, None, :]
        angle = layout.angle[:, shape, :, None, None]
        dx, dy = x - centre[..., 0], y - centre[..., 1]
        u = dx * angle.cos() + dy * angle.sin()
        v = dy * angle.cos() - dx * angle.sin()
        distance = _distance(kind, layout.radius[:, shape], u, v)
        cover = (0.5 - distance).clamp(0, 1) * (shape < count)[:, None, None, None]
        video = torch.lerp(video, colours[colour][:, :, None, None, None], cover[:, None])
    return 2 * video - 1


def _sample_paths(radius, motion, direction, time, uniform) -> Tensor:
    """Candidate paths [B, 8, 3, F, 2] that stay inside the picture."""
    bounces = (motion == MOTIONS.index("bounces"))[:, None, :]
    reach = radius[:, None, :]
    speed = uniform(1.2, 2.2, _CANDIDATES, MAX_SHAPES)
    # Frames until the border is touched; a shape that only moves never touches it.
    touch = uniform(5.0, 10.0, _CANDIDATES, MAX_SHAPES)
    last = FRAMES - 1
    room = SIZE - 2 * reach - speed * last
    start = SIZE - reach - speed * last - room * uniform(0.0, 1.0, _CANDIDATES, MAX_SHAPES)
    start = torch.where(bounces, SIZE - reach - speed * touch, start)
    travelled = torch.where(
        bounces[..., None],
        touch[..., None] - (time - touch[..., None]).abs(),
        time.expand(1, 1, 1, -1),
    )
    forward = start[..., None] + speed[..., None] * travelled
    sideways = reach + (SIZE - 2 * reach) * uniform(0.0, 1.0, _CANDIDATES, MAX_SHAPES)

    # Directions are left, right, up, down: odd ones go forward, the first two go along x.
    positive = (direction % 2 == 1)[:, None, :, None]
    along = torch.where(positive, forward, SIZE - forward)
    across = sideways[..., None].expand_as(along)
    horizontal = (direction < 2)[:, None, :, None]
    return torch.stack(
        [torch.where(horizontal, along, across), torch.where(horizontal, across, along)], dim=-1
    )


def _clear_frames(centre: Tensor, radius: Tensor, count: Tensor) -> Tensor:
    """Frames [B, 8] in which the most covered shape is clear of the shapes in front of it."""
    frames = [centre.new_full(centre.shape[:2], FRAMES)]
    for back in range(1, MAX_SHAPES):
        gap = (centre[:, :, :back] - centre[:, :, back : back + 1]).norm(dim=-1)
        reach = 0.8 * (radius[:, :back] + radius[:, back : back + 1])
        clear = (gap > reach[:, None, :, None]).all(dim=2).sum(dim=-1)
        frames.append(torch.where((back < count)[:, None], clear, FRAMES).to(centre.dtype))
    return torch.stack(frames).amin(dim=0)


def _texture(texture: Tensor, layout: Layout, x: Tensor, y: Tensor) -> Tensor:
    """Brightness [B, F, 64, 64] of the background, 0 to 1."""
    wave, phase = layout.wave[..., None, None, None], layout.phase[..., None, None]
    u = wave[:, 0, 0] * x + wave[:, 0, 1] * y + phase[:, 0]
    v = wave[:, 1, 0] * x + wave[:, 1, 1] * y + phase[:, 1]
    stripes = torch.sigmoid(4 * u.sin())
    checks = torch.sigmoid(6 * u.sin() * v.sin())
    dots = torch.sigmoid(4 * (u.cos() + v.cos() - 0.7))
    waves = torch.sigmoid(4 * (u + 1.2 * v.sin()).sin())
    clouds = 0.5 + 0.25 * ((0.7 * u).sin() + (0.7 * v).sin())
    return _choose(texture, [stripes, checks, dots, waves, clouds])


def _distance(kind: Tensor, radius: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance [B, F, 64, 64] to the outline, pixels, negative inside."""
    r = radius[:, None, None, None]
    length = (u.square() + v.square()).sqrt()
    disc = length - r
    square = torch.maximum(u.abs(), v.abs()) - 0.86 * r
    ring = (length - 0.72 * r).abs() - 0.28 * r
    triangle = _half_planes(3, u, v)[0] - 0.58 * r
    # A point of a five-pointed star is inside of all but at most one of its five edges.
    star = _half_planes(5, u, v)[1] - 0.38 * r
    return _choose(kind, [disc, square, triangle, ring, star])


def _half_planes(sides: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and second largest projection on the normals of a regular polygon, one tip up."""
    largest = second = torch.full_like(u, -math.inf)
    for side in range(sides):
        turn = math.pi / 2 + 2 * math.pi * side / sides
        value = math.cos(turn) * u + math.sin(turn) * v
        second = torch.maximum(second, torch.minimum(largest, value))
        largest = torch.maximum(largest, value)
    return largest, second


def _choose(index: Tensor, options: list[Tensor]) -> Tensor:
    """Of options [B, F, H, W], for each clip the one that its index [B] names."""
    chosen = options[0]
    for position, option in enumerate(options[1:], start=1):
        chosen = torch.where((index == position)[:, None, None, None], option, chosen)
    return chosen


@functools.cache
def _palette(device: torch.device) -> tuple[Tensor, Tensor]:
    """Colours [hues, 3] of backgrounds and [colours, 3] of shapes, uploaded once a device."""
    hues = torch.tensor(list(HUES.values()), device=device)
    return hues, torch.tensor(list(COLOURS.values()), device=device)
