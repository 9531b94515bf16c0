"""Every setting of the rewrite: one frozen value that cannot be built wrong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from uta_fx.kernels.contract import BLOCK_SIZES
from uta_fx.order import ORDERS, Grid, checked_grid
from uta_fx.policies import BUDGETS, BY_NAME, SVG2, Policy
from uta_fx.tails import KINDS, Tail


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How sparse, what stays exact, and what stands for the rest.

    Attributes:
        density: Share of key blocks that stay exact, in (0, 1].
        policy: Name of a policy (a key of ``uta_fx.policies.BY_NAME``, such as ``low_delta``,
            ``topk``, ``radial`` or ``rectified``) or a policy object, such as
            ``uta_fx.policies.TopP(mass=0.95)``.
        tail: Name of a tail (``none``, ``normalizer``, ``single``, ``bins``, ``block``,
            ``first_order``, ``gaussian``, ``rectified``) or a ``uta_fx.tails.Tail``.
        budget: ``"site"``: ``density`` is a share of all blocks of one attention call and sample,
            spent where the policy's score is highest; ``"head"``: of those of each head; ``"row"``:
            of each query block's blocks.
        bins: Groups of the tail ``bins``.
        block_q: Query tokens in a block: 16, 32, 64 or 128.
        block_kv: Key tokens in a block: 16, 32, 64 or 128.
        reorder: ``"auto"``: what suits the policy, as a rule tiles; ``"tile"``: compact 3-D tiles;
            ``"morton"``: the Z-order curve; ``"hilbert"``: the generalised Hilbert curve;
            ``"none"``: the model's own order.
        grid: Frames, height and width of the video tokens; None reads it from the graph.
        exact_frames: So many frames at the start of the grid have keys that every query attends to
            exactly, in whole blocks: what the policy keeps comes on top. For the frames that a
            model is given (image to video) or generated before. Needs the grid; a site that has no
            further frames stays dense.
        video_start: First token of the video, beside ``grid``, where history or reference images
            lie in one sequence with it and the graph does not tell them apart, as in a block that
            is compiled by itself. They are exact for all, as text is. A site where the graph shows
            that the video begins elsewhere stays dense.
        trust_masks: Take an attention mask for one that hides text alone, or of a video without
            text the padding at the end of each sample, where the graph does not show it, as in a
            block that is compiled by itself. What the mask of a run hides of the video all the
            same makes the video's output of that sample NaN.
        min_tokens: Sites with fewer tokens stay dense.
        dense_layers: Layers whose attention stays dense, such as ``"0-1,-1"``; empty for none.
            A layer is a self-attention call of the graph. Those that a graph does not have are
            logged, not refused: it may be a part of the model. For a block that is compiled by
            itself it is a block of the model that calls it; one that has no such model is refused.
        dense_until: Share of the noise schedule that runs dense at its start, in [0, 1]; needs
            ``uta_fx.enable``, which sees the schedule.
        inner: Name of the ``torch.compile`` backend that gets the rewritten graph.
        strict: Raise where a video self-attention would stay dense for any reason but ``density``,
            ``dense_layers`` or ``min_tokens``.

    Raises:
        ValueError: A field is outside its range; the message names it and the valid values.
        TypeError: A field is of another type.
    """

    density: float = 0.25
    policy: str | Policy = "low_delta"
    tail: str | Tail = "gaussian"
    budget: str = "site"
    bins: int = 8
    block_q: int = 64
    block_kv: int = 64
    reorder: str = "auto"
    grid: Grid | None = None
    exact_frames: int = 0
    video_start: int | None = None
    trust_masks: bool = False
    min_tokens: int = 4096
    dense_layers: str = ""
    dense_until: float = 0.0
    inner: str = "inductor"
    strict: bool = False

    def __post_init__(self) -> None:
        _number(self, "density")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        _number(self, "dense_until")
        if not 0 <= self.dense_until <= 1:
            raise ValueError(f"dense_until must be in [0, 1], got {self.dense_until}")
        _one_of("budget", self.budget, BUDGETS)
        _one_of("reorder", self.reorder, ORDERS)
        _one_of("block_q", self.block_q, BLOCK_SIZES)
        _one_of("block_kv", self.block_kv, BLOCK_SIZES)
        if isinstance(self.policy, str):
            _one_of("policy", self.policy, tuple(BY_NAME))
        elif not callable(getattr(self.policy, "select", None)):
            raise TypeError(f"policy must be a name or have a method select, got {self.policy!r}")
        if isinstance(self.tail, str):
            _one_of("tail", self.tail, KINDS)
        elif not isinstance(self.tail, Tail):
            raise TypeError(f"tail must be a name or a uta_fx.tails.Tail, got {self.tail!r}")
        for name, least in (("bins", 1), ("min_tokens", 1), ("exact_frames", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.grid is not None:
            object.__setattr__(self, "grid", checked_grid(self.grid))
            self.check_frames(self.grid)
        if self.video_start is not None:
            _check_start(self)
        for name in ("strict", "trust_masks"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.inner, str) or not self.inner:
            raise TypeError(
                f"inner must be the name of a torch.compile backend, got {self.inner!r}"
            )
        _parse_ranges(self.dense_layers)
        if isinstance(self.selection_policy(), SVG2) and self.tail_form().kind == "rectified":
            raise ValueError(
                "tail rectified has no meaning with policy svg2: it weighs fixed blocks of tokens,"
                " and svg2 selects clusters; take gaussian, or another policy"
            )
        orders = getattr(self.selection_policy(), "orders", ORDERS)
        if self.order not in orders:
            raise ValueError(
                f"reorder must be auto or {' or '.join(orders)} for policy {self.policy}, whose"
                f" rule has no meaning in another order, got {self.reorder!r}"
            )

    @classmethod
    def of(cls, config: Config | None) -> Config:
        """The argument ``config`` of a public function: None stands for the defaults.

        Raises:
            TypeError: It is something else.
        """
        if config is None:
            return cls()
        if not isinstance(config, cls):
            raise TypeError(f"config must be a uta_fx.Config, got {type(config).__name__}")
        return config

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """Build from the ``options`` of ``torch.compile``.

        Raises:
            ValueError: An option is unknown; the message names it, its likeliest spelling and all
                valid names.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, 1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"unknown option {name!r}{hint}; valid options are {', '.join(names)},"
                    " mode and inductor"
                )
        return cls(**options)

    def selection_policy(self) -> Policy:
        """The policy itself, where ``policy`` may be its name."""
        return BY_NAME[self.policy] if isinstance(self.policy, str) else self.policy

    @property
    def order(self) -> str:
        """The token order itself, where ``reorder`` may be ``"auto"``."""
        if self.reorder != "auto":
            return self.reorder
        order: str = getattr(self.selection_policy(), "order", "tile")
        return order

    @property
    def needs_grid(self) -> bool:
        """Whether a site without a known grid cannot be as this says."""
        needs = getattr(self.selection_policy(), "needs_grid", False)
        return self.order != "none" or needs or self.exact_frames > 0

    def check_frames(self, grid: Grid) -> None:
        """Raise ``ValueError`` where a grid has fewer frames than ``exact_frames``."""
        if self.exact_frames > grid[0]:
            raise ValueError(
                f"exact_frames must be at most the frames of the grid, {grid[0]},"
                f" got {self.exact_frames}"
            )

    def tail_form(self) -> Tail:
        """The tail itself, where ``tail`` may be its name."""
        return Tail(kind=self.tail, bins=self.bins) if isinstance(self.tail, str) else self.tail

    def is_dense_layer(self, index: int, layers: int) -> bool:
        """Whether ``dense_layers`` names layer ``index`` of ``layers``."""
        for ends in _parse_ranges(self.dense_layers):
            first, last = (end + layers if end < 0 else end for end in ends)
            if first <= index <= last:
                return True
        return False

    def dense_layers_fit(self, layers: int) -> bool:
        """Whether ``dense_layers`` names none but layers of a graph that has ``layers``."""
        ends = [end for ends in _parse_ranges(self.dense_layers) for end in ends]
        return all(-layers <= end < layers for end in ends)


def _number(config: Config, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _check_start(config: Config) -> None:
    start = config.video_start
    if not isinstance(start, int) or isinstance(start, bool):
        raise TypeError(f"video_start must be an int, got {start!r}")
    if start < 0:
        raise ValueError(f"video_start must be at least 0, got {start}")
    if config.grid is None:
        raise ValueError(f"video_start={start} needs grid, which says where the video ends")


def _one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(str, valid))}, got {value!r}")


def _parse_ranges(text: str) -> list[tuple[int, int]]:
    """``"0-1,-1"`` as ``[(0, 1), (-1, -1)]``.

    Raises:
        ValueError: The text is not a list of numbers and ranges.
    """
    if not isinstance(text, str):
        raise TypeError(f"dense_layers must be a string such as '0-1,-1', got {text!r}")
    ranges = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part[1:].partition("-")  # a leading sign belongs to the first number
        try:
            start = int(part[0] + first)
            end = int(last) if dash else start
        except ValueError:
            raise ValueError(
                f"dense_layers must be numbers and ranges such as '0-1,-1', got {text!r}"
            ) from None
        if end < start and (start < 0) == (end < 0):
            raise ValueError(f"dense_layers must hold rising ranges, got {part!r} in {text!r}")
        ranges.append((start, end))
    return ranges
