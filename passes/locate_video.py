"""Find the video among the tokens of an attention call, and how it lies in space and time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from uta_fx.passes.read_node import name_of
from uta_fx.passes.site import Grid, Side, recorded
from uta_fx.passes.trace_axes import Axis, Size, Stretch, Trace, cut, length, plain, same


@dataclasses.dataclass(frozen=True)
class Video:
    """Consecutive tokens of a sequence.

    Attributes:
        before: Tokens in front of them.
        tokens: How many they are.
        after: Tokens behind them.
        grid: Their frames, rows and columns.
    """

    before: Size
    tokens: Size
    after: Size
    grid: Grid


def locate_video(
    trace: Trace,
    axis: Axis,
    given: Grid | None,
    start: int | None = None,
    symbolic: bool = False,
) -> Video | str:
    """The video in a token axis, or a sentence that says why it cannot be told.

    Tokens are video where the graph flattens two (rows and columns of one frame) or three axes
    into theirs: after a patch embedding, or the positions of a rotary embedding that multiplies
    them. The longest such stretch is taken (a short one can be a conditioning image or history). A
    grid is believed only when it has as many tokens and nothing else claims another for them, but
    for one that merges two of its sides.

    Args:
        trace: The graph's axes.
        axis: Of the tokens.
        given: The grid that the user gave: it says how long the video is, and which of several
            claims is true; it must not contradict a single one.
        start: Its first token, given beside a grid, where the graph does not show it: it must not
            contradict the graph either. Without a meaning where the grid is all tokens.
        symbolic: Whether sides may be other than numbers, as far as ``is_clear`` has found.
    """
    stretches = trace.stretches(axis)
    if given is not None:
        return _given(axis, stretches, given, start)
    grids = _claims(stretches, symbolic)
    if not grids:
        return (
            f"the graph does not show how its {_parts(axis)} tokens{_origin(trace, axis)} lie in"
            " frames, rows and columns; give grid"
        )
    if len(grids) == 1:
        (((start, end), claims),) = grids.items()
    else:  # is_clear has found none of these symbolic
        (start, end), claims = max(grids.items(), key=lambda item: math.prod(min(item[1])))
    if len(claims) > 1:
        text = " and ".join(map(_text, sorted(claims)))
        return f"the graph claims {text} for its tokens; give grid"
    return _video(axis, start, end, claims.pop())


def has_several_grids(trace: Trace, axis: Axis) -> bool:
    """Whether more than one part of a token axis lies in frames, rows and columns."""
    return len(_claims(trace.stretches(axis))) > 1


def is_clear(gm: GraphModule, trace: Trace, axis: Axis) -> bool:
    """Whether the grid of the video in a token axis, if there is any, need not be numbers.

    It is where the graph claims no other for any of the tokens, its product is known to be their
    number, and its sides can be computed from the sizes that are inputs of the graph.
    """
    symbols = set(symbols_of(gm))
    grids = _claims(trace.stretches(axis), symbolic=True)
    for (start, end), claims in grids.items():
        if len(grids) > 1 or len(claims) > 1:
            return False
        grid = next(iter(claims))
        if not same(tokens_in(grid, length(axis)), length(axis[start:end])):
            return False
        if not {x for side in grid for x in sympy.sympify(side).free_symbols} <= symbols:
            return False
    return True


class Known(NamedTuple):
    """Where the inputs of a graph show a symbol.

    Attributes:
        node: An input that is a size, or that has one.
        dim: Which; None for the input itself.
        times: How often the symbol this size is: 2 for a dimension that is ``2 * Dim("half")``.
    """

    node: Node
    dim: int | None
    times: int


def symbols_of(gm: GraphModule) -> dict[sympy.Symbol, Known]:
    """The sizes that a graph knows from its inputs, by symbol."""
    found: dict[sympy.Symbol, Known] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = recorded(node)
        sizes: Iterable[tuple[int | None, Size]] = enumerate(getattr(value, "shape", ()))
        if isinstance(value, torch.SymInt):
            sizes = [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                times, symbol = size.node.expr.as_coeff_Mul()
                if symbol.is_symbol:
                    found.setdefault(symbol, Known(node, dim, int(times)))
    return found


def is_symbolic(grid: Grid) -> bool:
    """Whether a side is no number."""
    return not all(isinstance(side, int) for side in grid)


def tokens_in(grid: Grid, like: Size) -> Size:
    """How many tokens a grid has; ``like`` is any size of the graph that depends on it."""
    tokens = math.prod(grid)
    if isinstance(tokens, int) or isinstance(like, int):
        return int(tokens)
    tokens = like.node.shape_env.create_symintnode(tokens, hint=None)
    return plain(tokens)


def expected(size: Size) -> int:
    """A size as it is in the run that is traced; no guard is added: for what need not be right."""
    return size if isinstance(size, int) else int(size.node.hint)


def settle_grids(gm: GraphModule, trace: Trace, axes: Sequence[Axis]) -> bool:
    """Read the sizes that the grids of these axes are computed from as numbers; whether any was.

    A grid specialises the graph in any case. Where not the grid alone but what it is made of is
    known, so are all lengths that are computed from the same.
    """
    wanted = {
        symbol
        for axis in axes
        for stretch in trace.stretches(axis)
        if len(stretch.source.sides) in (2, 3)
        for side in stretch.source.sides
        if isinstance(side, torch.SymInt)
        for symbol in side.node.expr.free_symbols
    }
    if not wanted:
        return False
    values = [recorded(node) for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [
        size
        for value in values
        for size in (value.shape if isinstance(value, torch.Tensor) else (value,))
        if isinstance(size, torch.SymInt)
    ]
    for size in sizes:
        if size.node.expr in wanted:
            int(size)
    # tables beside the tokens are as long, which the graph knows of the symbol alone
    tokens = [
        plain(x)
        for axis in axes
        for x in (length(axis), *(stretch.source.length for stretch in trace.stretches(axis)))
    ]
    lengths = {x for x in tokens if isinstance(x, int)}
    for size in sizes:
        if size.node.hint in lengths:
            int(size)
    return True


def _given(axis: Axis, stretches: list[Stretch], grid: Grid, start: int | None) -> Video | str:
    """The part of an axis, or all of it, that has as many tokens as the user's grid."""
    tokens = math.prod(grid)
    fits = {(x.start, x.end) for x in stretches if same(x.source.length, tokens)}
    if same(length(axis), tokens):
        fits = {(0, len(axis))}
    elif start is not None:
        begun = {place for place in fits if _is_number(length(axis[: place[0]]), start)}
        if not begun:
            return _begun(axis, fits, grid, start)
        fits = begun
    if len(fits) != 1:
        problem = "matches more than one part of" if fits else "does not match"
        reason = f"grid {_text(grid)} = {tokens} {problem} its {_parts(axis)} tokens"
        part = statically_known_true(length(axis) >= tokens)
        return f"{reason}; where the video lies in them is video_start" if part else reason
    place = fits.pop()
    claims = _claims(stretches).get(place, set())
    if len(claims) == 1 and not any(x == grid or _merges(x, grid) for x in claims):
        return f"grid {_text(grid)} is given, but the graph shows {_text(claims.pop())}"
    return _video(axis, *place, grid)


def _begun(axis: Axis, fits: set[tuple[int, int]], grid: Grid, start: int) -> Video | str:
    """The part of an axis from a token on, which is no whole source, or why that cannot be."""
    tokens = math.prod(grid)
    after = plain(length(axis) - start - tokens)
    given = f"grid {_text(grid)} = {tokens}"
    if not statically_known_true(after >= 0):
        return f"{given} does not match its {_parts(axis)} tokens from video_start={start} on"
    if _cuts(axis, start, tokens):
        others = " or ".join(str(length(axis[:first])) for first, _ in sorted(fits))
        matches = f": it matches those from {others} on" if fits else ""
        return (
            f"video_start={start} is given, but {given} from there on cuts the {_parts(axis)}"
            f" tokens that the graph shows{matches}"
        )
    return Video(start, tokens, after, grid)


def _cuts(axis: Axis, start: int, tokens: int) -> bool:
    """Whether a part of an axis begins or ends amid a run, and is not all of one source.

    A source is one also where it meets another in some of its tokens: what is added to a first
    frame alone, say, tells nothing apart.
    """
    head = cut(axis, start)
    tail = head and cut(head[1], tokens)
    if not head or not tail or not all(isinstance(run.length, int) for run in tail[0]):
        return False  # where runs end is known only at run time
    part = tail[0]
    if len(part) == 1 or len(head[0]) + len(part) + len(tail[1]) == len(axis):
        return False
    return not any(
        isinstance(place, int)
        and all(
            (number, place + length(part[:i])) in run.spans for i, run in enumerate(part[1:], 1)
        )
        for number, place in part[0].spans
    )


def _is_number(size: Size, number: int) -> bool:
    """Whether a size is a number; it is read as one, which specialises the graph."""
    try:
        return int(size) == number
    except RuntimeError:
        return False  # known only at run time


def _claims(stretches: list[Stretch], symbolic: bool = False) -> dict[tuple[int, int], set[Grid]]:
    """Grids of the parts of an axis, without those that merge two sides of another."""
    found: dict[tuple[int, int], set[Grid]] = {}
    for stretch in stretches:
        grid = _grid(stretch.source.sides, symbolic)
        if grid is not None:
            found.setdefault((stretch.start, stretch.end), set()).add(grid)
    return {
        place: {grid for grid in grids if not any(_merges(grid, other) for other in grids)}
        for place, grids in found.items()
    }


def _video(axis: Axis, start: int, end: int, grid: Grid) -> Video:
    return Video(length(axis[:start]), length(axis[start:end]), length(axis[end:]), grid)


def _grid(sides: tuple[Size, ...], symbolic: bool) -> Grid | None:
    """Two or three sides; as plain numbers, which specialises the graph, unless ``symbolic``."""
    if len(sides) not in (2, 3):
        return None
    try:
        *frames, height, width = (_side(side) if symbolic else int(side) for side in sides)
    except RuntimeError:
        return None  # known only at run time
    return (frames[0] if frames else 1), height, width


def _side(size: Size) -> Side:
    size = plain(size)
    if isinstance(size, int):
        return size
    if free_unbacked_symbols(size):
        raise RuntimeError(f"{size} is known only at run time")
    return size.node.expr


def _merges(coarse: Grid, fine: Grid) -> bool:
    """Whether one is the other with two sides seen as one: frames by tokens of a frame, say."""
    frames, height, width = fine
    merged = {(1, frames, height * width), (1, frames * height, width)}
    return coarse != fine and coarse in merged


def _text(grid: Grid) -> str:
    return " x ".join(map(str, grid))


def _parts(axis: Axis) -> str:
    return " + ".join(str(run.length) for run in axis)


def _origin(trace: Trace, axis: Axis) -> str:
    """The operation past which they cannot be followed."""
    names = {
        name_of(trace.sources[number].node)
        for run in axis
        for number, _ in run.spans
        if trace.sources[number].opaque
    }
    return f" (out of {', '.join(sorted(names))})" if names else ""
