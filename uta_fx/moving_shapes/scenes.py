"""What a clip shows, as words: scenes, their prompts, and their packed form for batches.

Three forms of one scene, each made from the other without loss:

* a prompt, ``"a red disc moves left and a blue star spins up over dark green stripes"``;
* a :class:`Scene` of frozen dataclasses;
* a row of a packed tensor [N, 15], int64: the number of shapes, then colour, kind, motion and
  direction of each of three shapes (the first is in front), then hue and texture of the
  background. Batches are sampled and drawn in this form, on any device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.12, 0.12),
    "yellow": (1.0, 0.88, 0.10),
    "green": (0.20, 0.90, 0.20),
    "cyan": (0.10, 0.90, 1.0),
    "blue": (0.16, 0.38, 1.0),
    "magenta": (1.0, 0.25, 0.90),
    "white": (1.0, 1.0, 1.0),
}
"""Colours of shapes, RGB in [0, 1]: bright, and far from each other and from every background."""

HUES: dict[str, tuple[float, float, float]] = {
    "red": (0.38, 0.10, 0.10),
    "brown": (0.36, 0.24, 0.10),
    "green": (0.10, 0.30, 0.12),
    "teal": (0.07, 0.28, 0.30),
    "blue": (0.12, 0.16, 0.42),
    "purple": (0.28, 0.12, 0.38),
}
"""Lighter of the two colours of a background, RGB in [0, 1]; the other is a darker shade of it."""

KINDS = ("disc", "square", "triangle", "ring", "star")
MOTIONS = ("moves", "spins", "bounces")
DIRECTIONS = ("left", "right", "up", "down")
TEXTURES = ("stripes", "checks", "dots", "waves", "clouds")
MAX_SHAPES = 3

PROMPT_LENGTH = 24
"""Tokens of every prompt, padding included."""

PADDING = 0
"""Token id of padding; a prompt of nothing but padding is the null prompt of guidance."""

_FIXED_WORDS = ("", "a", "and", "over", "dark")
_SHAPE_FIELDS = {
    "colour": tuple(COLOURS),
    "kind": KINDS,
    "motion": MOTIONS,
    "direction": DIRECTIONS,
}
_BACKGROUND_FIELDS = {"hue": tuple(HUES), "texture": TEXTURES}
_FIELDS = _SHAPE_FIELDS | _BACKGROUND_FIELDS
_BACKGROUND_COLUMN = 1 + MAX_SHAPES * len(_SHAPE_FIELDS)
PACKED_COLUMNS = _BACKGROUND_COLUMN + len(_BACKGROUND_FIELDS)
VOCABULARY_SIZE = len(_FIXED_WORDS) + sum(len(words) for words in _FIELDS.values())
_HELD_OUT_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One moving shape.

    Attributes:
        colour: A key of ``COLOURS``.
        kind: One of ``KINDS``.
        motion: ``"moves"`` glides upright, ``"spins"`` turns while it glides, ``"bounces"``
            glides to the border and comes back.
        direction: One of ``DIRECTIONS``; of a bounce, the direction before it.

    Raises:
        ValueError: If a field is not one of its words.
    """

    colour: str
    kind: str
    motion: str
    direction: str

    def __post_init__(self) -> None:
        _check_words(self, _SHAPE_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Background:
    """The drifting background.

    Attributes:
        hue: A key of ``HUES``.
        texture: One of ``TEXTURES``.

    Raises:
        ValueError: If a field is not one of its words.
    """

    hue: str
    texture: str

    def __post_init__(self) -> None:
        _check_words(self, _BACKGROUND_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three shapes over a background; an earlier shape passes in front of a later one.

    Raises:
        ValueError: If there is no shape, more than three, or two of the same colour.
    """

    shapes: tuple[Shape, ...]
    background: Background

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes) <= MAX_SHAPES:
            raise ValueError(f"shapes: expected 1 to {MAX_SHAPES} shapes, got {len(self.shapes)}")
        colours = [shape.colour for shape in self.shapes]
        if len(set(colours)) < len(colours):
            raise ValueError(f"shapes: expected different colours, got {', '.join(colours)}")

    @property
    def prompt(self) -> str:
        """The sentence that says this scene; :func:`parse_prompt` reads it back."""
        shapes = " and ".join(
            f"a {shape.colour} {shape.kind} {shape.motion} {shape.direction}"
            for shape in self.shapes
        )
        return f"{shapes} over dark {self.background.hue} {self.background.texture}"


def parse_prompt(prompt: str) -> Scene:
    """Read a prompt: ``a COLOUR KIND MOTION DIRECTION [and a ...] over dark HUE TEXTURE``.

    Args:
        prompt: Words separated by white space; case does not matter.

    Returns:
        The scene it says.

    Raises:
        TypeError: If ``prompt`` is not a string.
        ValueError: If it is empty, or a word is not in the grammar (the message names the word
            and the words that may stand there), or the scene is not valid.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
    words = enumerate(prompt.lower().split(), start=1)
    if not prompt.strip():
        raise ValueError(
            "prompt: expected a sentence such as "
            "'a red disc moves left over dark green stripes', got an empty one"
        )

    def field(name: str) -> str:
        return _next_word(words, f"a {name}", _FIELDS[name])

    shapes = []
    joint = "and"
    while joint == "and":
        _next_word(words, "an article", ("a",))
        shapes.append(Shape(**{name: field(name) for name in _SHAPE_FIELDS}))
        joint = _next_word(words, "a joining word", ("and", "over"))
    _next_word(words, "a shade", ("dark",))
    background = Background(**{name: field(name) for name in _BACKGROUND_FIELDS})
    for position, word in words:
        raise ValueError(f"prompt: expected its end before word {position}, got {word!r}")
    return Scene(shapes=tuple(shapes), background=background)


def pack(scenes: Sequence[Scene]) -> Tensor:
    """Write scenes as rows of integers.

    Args:
        scenes: N scenes.

    Returns:
        int64 [N, 15] on the CPU; columns of absent shapes are 0.
    """
    packed = torch.zeros(len(scenes), PACKED_COLUMNS, dtype=torch.int64)
    for row, scene in zip(packed, scenes, strict=True):
        row[0] = len(scene.shapes)
        values = [_index(shape, name) for shape in scene.shapes for name in _SHAPE_FIELDS]
        row[1 : 1 + len(values)] = torch.tensor(values)
        row[_BACKGROUND_COLUMN:] = torch.tensor(
            [_index(scene.background, name) for name in _BACKGROUND_FIELDS]
        )
    return packed


def unpack(packed: Tensor) -> list[Scene]:
    """Read rows of integers back as scenes.

    Args:
        packed: int64 [N, 15] on any device.

    Returns:
        N scenes.
    """
    scenes = []
    for count, *values in packed.tolist():
        columns = iter(values)
        shapes = [
            Shape(**{name: words[next(columns)] for name, words in _SHAPE_FIELDS.items()})
            for _ in range(MAX_SHAPES)
        ]
        background = {name: words[next(columns)] for name, words in _BACKGROUND_FIELDS.items()}
        scenes.append(Scene(shapes=tuple(shapes[:count]), background=Background(**background)))
    return scenes


def tokenize(packed: Tensor) -> Tensor:
    """Write the prompts of packed scenes as token ids, without leaving the device.

    A word has one id for each part of speech, so ``red`` of a shape and ``red`` of a background
    differ.

    Args:
        packed: int64 [N, 15].

    Returns:
        int64 [N, 24], padded with ``PADDING``.
    """
    offsets, template = _token_tables(packed.device)
    fixed = torch.arange(len(_FIXED_WORDS), device=packed.device).expand(len(packed), -1)
    ids = torch.cat([fixed, packed[:, 1:] + offsets], dim=1)
    return ids.gather(1, template[packed[:, 0]])


def sample_scenes(count: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
    """Draw packed scenes, uniform over their words.

    Args:
        count: Number of scenes, N.
        generator: Source of randomness; the scenes are made on its device.
        held_out: False (default) gives scenes to train on, True gives scenes that may have any
            prompt, so that :func:`is_held_out` can pick the others among them.

    Returns:
        int64 [N, 15].
    """
    device = generator.device

    def draw(size: int, *shape: int) -> Tensor:
        return torch.randint(size, shape, generator=generator, device=device)

    order = torch.rand(count, len(COLOURS), generator=generator, device=device).argsort(dim=1)
    shapes = torch.stack(
        [
            order[:, :MAX_SHAPES],
            *(draw(len(words), count, MAX_SHAPES) for words in (KINDS, MOTIONS, DIRECTIONS)),
        ],
        dim=2,
    )
    background = torch.stack([draw(len(HUES), count), draw(len(TEXTURES), count)], dim=1)
    packed = torch.cat([1 + draw(MAX_SHAPES, count, 1), shapes.flatten(1), background], dim=1)
    if held_out:
        return packed
    # The next hue changes the hash by an odd number times less than 16, never by a multiple of 16.
    hue = packed[:, _BACKGROUND_COLUMN]
    packed[:, _BACKGROUND_COLUMN] = torch.where(is_held_out(packed), (hue + 1) % len(HUES), hue)
    return packed


def is_held_out(packed: Tensor) -> Tensor:
    """Say which scenes have a prompt that training never shows: one in sixteen, by a hash.

    Args:
        packed: int64 [N, 15].

    Returns:
        bool [N].
    """
    weights = 2 * torch.arange(PROMPT_LENGTH, device=packed.device) + 1
    return (tokenize(packed) * weights).sum(dim=1) % _HELD_OUT_SHARE == 0


def held_out_scenes(count: int = 64, *, seed: int = 0) -> list[Scene]:
    """Scenes for evaluation, none of whose prompts is ever trained on.

    Args:
        count: Number of scenes, 64 by default.
        seed: Which scenes; the same on every machine.

    Returns:
        ``count`` scenes with different prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Scene] = {}
    while len(chosen) < count:
        packed = sample_scenes(1024, generator, held_out=True)
        for scene in unpack(packed[is_held_out(packed)]):
            chosen.setdefault(scene.prompt, scene)
    return list(chosen.values())[:count]


def _check_words(owner: object, fields: dict[str, tuple[str, ...]]) -> None:
    for name, words in fields.items():
        value = getattr(owner, name)
        if value not in words:
            raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")


def _next_word(words: Iterator[tuple[int, str]], role: str, valid: tuple[str, ...]) -> str:
    expected = f"{role} ({', '.join(valid)})"
    position, word = next(words, (0, ""))
    if not word:
        raise ValueError(f"prompt: expected {expected}, got the end of the prompt")
    if word not in valid:
        raise ValueError(f"prompt: expected {expected} as word {position}, got {word!r}")
    return word


def _index(owner: Shape | Background, name: str) -> int:
    return _FIELDS[name].index(getattr(owner, name))


@functools.cache
def _token_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """First id of the words of each packed column, and the sentence of each number of shapes.

    Returns:
        offsets [14] of the columns after the first, and template [4, 24]: for a number of shapes
        and a place in the prompt, which entry of (fixed words, packed columns) stands there.
    """
    first_id, offset_of = len(_FIXED_WORDS), {}
    for name, words in _FIELDS.items():
        offset_of[name] = first_id
        first_id += len(words)
    shape_fields, background_fields = list(_SHAPE_FIELDS), list(_BACKGROUND_FIELDS)
    offsets = torch.tensor(
        [offset_of[name] for name in shape_fields * MAX_SHAPES + background_fields]
    )

    pad, article, conjunction, over, dark = range(len(_FIXED_WORDS))
    template = torch.full((MAX_SHAPES + 1, PROMPT_LENGTH), pad)
    for count in range(1, MAX_SHAPES + 1):
        sentence: list[int] = []
        for shape in range(count):
            start = len(_FIXED_WORDS) + shape * len(shape_fields)
            sentence += [conjunction] if shape else []
            sentence += [article, *range(start, start + len(shape_fields))]
        start = len(_FIXED_WORDS) + MAX_SHAPES * len(shape_fields)
        sentence += [over, dark, *range(start, start + len(background_fields))]
        template[count, : len(sentence)] = torch.tensor(sentence)
    return offsets.to(device), template.to(device)
