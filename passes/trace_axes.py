"""Follow every axis of every tensor in a graph back to where its positions come into being.

A token axis is what this is for: that of a query leads back to the patch embedding whose frames,
rows and columns were flattened into it, through every projection, rotation, residual and attention
on the way, and splits where text was concatenated to the video.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from uta_fx.passes.match_operators import operands_of
from uta_fx.passes.read_node import (
    VIEWS,
    argument,
    equation_of,
    is_call,
    is_random,
    name_of,
    reduced_dims,
    written_by,
)
from uta_fx.passes.site import recorded

Size = int | torch.SymInt

SIDES = "uta_fx.sides"
"""In the meta of a graph's input: what another graph knows of it, as of ``Trace.sides_of``."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive positions of an axis that come from consecutive positions of their sources.

    Attributes:
        spans: Pairs of a source's number and the place in it where the run starts (as text where
            that is known only at run time). Several where tensors were added or multiplied.
        length: Positions.
    """

    spans: frozenset[tuple[int, int | str]]
    length: Size


Axis = tuple[Run, ...]
Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where positions come into being.

    Attributes:
        node: The node whose output first has them.
        length: How many.
        sides: Lengths of the axes that were flattened into it, outermost first; ``(length,)``
            where it was not flattened, or where an inner one is a flattened one and more.
        opaque: Whether the node is an operation through which axes cannot be followed.
    """

    node: Node
    length: Size
    sides: tuple[Size, ...]
    opaque: bool = False


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Runs ``[start, end)`` of an axis that hold all positions of a source in order."""

    start: int
    end: int
    source: Source


class Trace:
    """The axes of a graph's tensors.

    Attributes:
        sources: By number.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.sources: list[Source] = []
        self._numbers: dict[Any, int] = {}
        self._flattened: dict[int, Axes] = {}
        self._axes: dict[Node, Any] = {}
        self._first: dict[Any, Node] = {}  # of the nodes that compute one thing
        self._twin: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            twin = self._find_twin(node)
            self._axes[node] = self._visit(node) if twin is node else self._axes[twin]

    def axis(self, node: Node, dim: int) -> Axis:
        """Axis ``dim`` of a node whose output is one tensor."""
        return self._axes[node][dim]

    def of(self, node: Node) -> Axes:
        """All axes of a node whose output is one tensor."""
        return self._axes[node]

    def stretches(self, axis: Axis) -> list[Stretch]:
        """Every part of an axis that is the whole of a source."""
        found = []
        for start, run in enumerate(axis):
            for number, place in run.spans:
                source = self.sources[number]
                done: Size = 0
                for end in range(start, len(axis)):
                    if place != 0 or (number, done) not in axis[end].spans:
                        break
                    done = done + axis[end].length
                    if same(done, source.length):
                        found.append(Stretch(start, end + 1, source))
                        break
        return found

    def sides_of(self, node: Node) -> dict[int, tuple[Size, ...]]:
        """Of a tensor's dimensions those that are flattened ones, and the lengths of these."""
        return {
            dim: stretch.source.sides
            for dim, axis in enumerate(self.of(node))
            for stretch in self.stretches(axis)
            if (stretch.start, stretch.end) == (0, len(axis)) and len(stretch.source.sides) > 1
        }

    def _visit(self, node: Node) -> Any:
        value = recorded(node)
        if isinstance(value, torch.Tensor):
            if not is_call(node):
                return self._leaves(node, value.shape)
            if node.target in ("copy_", torch.ops.aten.copy_.default):
                target, source, *_ = _all(node)
                _write(self, node, target, Ellipsis, source)
                return self.of(target)
            return self._checked(node, _apply(self, node), value.shape)
        if isinstance(value, (tuple, list)) and is_call(node):
            parts = _apply(self, node)
            return [
                self._checked(node, parts[i] if parts else None, part.shape, i)
                if isinstance(part, torch.Tensor)
                else None
                for i, part in enumerate(value)
            ]
        if name_of(node) == "setitem":
            _write(self, node, *_all(node))
        return None

    def set(self, node: Node, axes: Axes) -> None:
        """Describe anew a tensor that was written to."""
        if axes != self._axes.get(node):
            self._first, self._twin = {}, {}  # what was computed of it before is another thing
        self._axes[node] = axes

    def _find_twin(self, node: Node) -> Node:
        """The first node that computes the same of the same tensors, which may be this one.

        Some models make the rotary table of queries and that of keys apart, positions included.
        """
        if (
            not is_call(node)
            or not (node.all_input_nodes or name_of(node) == "arange")
            or written_by(node)
            or is_random(node)
        ):
            return node
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: self._twin.get(x, x))
        first = self._first.setdefault((node.target, repr(args), repr(kwargs)), node)
        self._twin[node] = first
        return first

    def _checked(self, node: Node, axes: Axes | None, shape: Sequence[Size], part: int = 0) -> Axes:
        """The axes that a rule gave, wherever they have the length that the tensor has."""
        if axes is None or len(axes) != len(shape):
            return self._leaves(node, shape, part, opaque=axes is None)
        return tuple(
            axis if same(length(axis), size) else self.leaf(node, dim, size, part)
            for dim, (axis, size) in enumerate(zip(axes, shape, strict=True))
        )

    def _leaves(
        self, node: Node, shape: Sequence[Size], part: int = 0, opaque: bool = False
    ) -> Axes:
        return tuple(self.leaf(node, dim, size, part, opaque) for dim, size in enumerate(shape))

    def leaf(self, node: Node, dim: int, size: Size, part: int = 0, opaque: bool = False) -> Axis:
        """An axis whose positions come into being here."""
        size = plain(size)
        sides = node.meta.get(SIDES, {}).get(dim, (size,))
        return self._source((node, dim, part), Source(node, size, sides, opaque))

    def gathered(self, node: Node, axis: Axis, index: Any, size: Size) -> Axis:
        """An axis of positions picked out of another by ``index``."""
        size = plain(size)
        return self._source((_key(axis), index), Source(node, size, (size,)))

    def flatten(self, node: Node, axes: Iterable[Axis]) -> Axis:
        """Several axes merged into one, the first outermost."""
        merged = tuple(axis for axis in axes if not same(length(axis), 1))
        if len(merged) < 2:
            return merged[0] if merged else self.leaf(node, 0, 1)
        total = math.prod(map(length, merged))
        # frames with text of their own are no grid
        joined = any(
            len(axis) > 1 and any(len(self._sides((run,))) > 1 for run in axis)
            for axis in merged[1:]
        )
        sides = (total,) if joined else tuple(s for axis in merged for s in self._sides(axis))
        source = Source(node, total, sides)
        flat = self._source(tuple(map(_key, merged)), source)
        self._flattened[self._numbers[tuple(map(_key, merged))]] = merged
        return flat

    def unflatten(self, axis: Axis) -> Axes:
        """The axes that were merged into this one, or it alone."""
        for number, start in sorted(axis[0].spans, key=str) if len(axis) == 1 else ():
            merged = self._flattened.get(number)
            if merged and start == 0 and same(self.sources[number].length, axis[0].length):
                return merged
        return (axis,)

    def _sides(self, axis: Axis) -> tuple[Size, ...]:
        if len(axis) == 1:
            for number, start in axis[0].spans:
                source = self.sources[number]
                if start == 0 and len(source.sides) > 1 and same(source.length, axis[0].length):
                    return source.sides
        return (length(axis),)

    def _source(self, key: Any, source: Source) -> Axis:
        if key not in self._numbers:
            self._numbers[key] = len(self.sources)
            self.sources.append(source)
        return (Run(frozenset({(self._numbers[key], 0)}), source.length),)


def plain(size: Size) -> Size:
    """A size as an int where it is symbolic in form alone."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal; no guard is added."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def length(axis: Axis) -> Size:
    """How many positions an axis has."""
    return sum((run.length for run in axis), 0)


def equal(a: Axis, b: Axis) -> bool:
    """Whether two axes hold the same positions.

    A run whose length only a run of the graph knows is never cut: equal spans are then all of it.
    """
    return len(a) == len(b) and all(
        x.spans == y.spans
        and (
            same(x.length, y.length) or not (isinstance(x.length, int) or isinstance(y.length, int))
        )
        for x, y in zip(a, b, strict=True)
    )


def _all(node: Node) -> Any:
    """The positional arguments."""
    return node.args


def _key(axis: Axis) -> Any:
    return tuple((run.spans, str(run.length)) for run in axis)


def number_of(x: Any) -> Any:
    """An int or SymInt where a graph holds it as a node."""
    return plain(recorded(x) if isinstance(x, Node) else x)


def _shape(node: Node) -> Sequence[Size]:
    return recorded(node).shape


# ---- cutting and joining -------------------------------------------------------------------------


def join(axes: Iterable[Axis]) -> Axis:
    """Axes one after another; neighbours that follow each other in every source become one run."""
    runs: list[Run] = []
    for run in (run for axis in axes for run in axis):
        if same(run.length, 0):
            continue
        if runs and _follows(runs[-1], run):
            runs[-1] = Run(runs[-1].spans, runs[-1].length + run.length)
        else:
            runs.append(run)
    return tuple(runs)


def cut(axis: Axis, position: Size) -> tuple[Axis, Axis] | None:
    """An axis up to a position and from it on; None where the position cannot be found.

    A position inside a run can be found where sizes are plain numbers; otherwise it must be known
    to be the end of a run.
    """
    done: Size = 0
    for i, run in enumerate(axis):
        if same(position, done):
            return axis[:i], axis[i:]
        ints = all(isinstance(x, int) for x in (position, done, run.length))
        if ints and done < position < done + run.length:
            inside = position - done
            left, right = Run(run.spans, inside), _shifted(run, inside)
            return (*axis[:i], left), (right, *axis[i + 1 :])
        done = done + run.length
    return (axis, ()) if same(position, done) else None


def place_in(axis: Axis, part: Axis) -> int | None:
    """Where in an axis the positions of ``part`` lie one after another; None where they do not."""
    done: Size = 0
    for run in axis:
        if not isinstance(done, int):
            break
        for number, start in part[0].spans:
            begins = [begin for other, begin in run.spans if other == number]
            if not (begins and isinstance(start, int) and isinstance(begins[0], int)):
                continue
            place = done + start - begins[0]
            rest = cut(axis, place) if place >= done else None
            found = cut(rest[1], length(part)) if rest else None
            if found and equal(found[0], part):
                return place
        done = done + run.length
    return None


def meet(axes: Sequence[Axis]) -> Axis | None:
    """The axis of a pointwise operation: positions come from every operand's positions."""
    first, *others = axes
    for other in others:
        if equal(first, other):
            continue
        pairs = _refined(first, other)
        if pairs is None:
            return None
        first = join([tuple(Run(a.spans | b.spans, a.length) for a, b in pairs)])
    return first


def related(a: Axis, b: Axis) -> bool:
    """Whether every position of one axis shares a source with its position of the other."""
    pairs = _refined(a, b)
    return pairs is not None and all(x.spans & y.spans for x, y in pairs)


def _refined(a: Axis, b: Axis) -> list[tuple[Run, Run]] | None:
    """Two axes of one length as pairs of runs of one length."""
    rest, pairs = (list(a), list(b)), []
    while all(rest):
        shorter = _shorter(rest[0][0].length, rest[1][0].length)
        if shorter is None:
            return None
        heads = []
        for runs in rest:
            run = runs.pop(0)
            if not same(run.length, shorter):
                runs.insert(0, _shifted(run, shorter))
            heads.append(Run(run.spans, shorter))
        pairs.append((heads[0], heads[1]))
    return None if any(rest) else pairs


def _shorter(a: Size, b: Size) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a if same(a, b) else None


def _shifted(run: Run, by: Size) -> Run:
    spans = frozenset(
        (number, start + by if isinstance(start, int) and isinstance(by, int) else f"{start}+{by}")
        for number, start in run.spans
    )
    return Run(spans, run.length - by)


def _follows(run: Run, other: Run) -> bool:
    return isinstance(run.length, int) and _shifted(run, run.length).spans == other.spans


CONSTANTS = {
    "empty_like", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full",
    "new_empty", "zeros", "ones", "full", "empty", "empty_permuted", "empty_strided",
}  # fmt: skip
"""Operations of which all entries are alike, or not yet written."""

# ---- one rule for each kind of operation ---------------------------------------------------------

Rule = Callable[[Trace, Node], Any]


def _apply(trace: Trace, node: Node) -> Any:
    """Axes of a node's output (a list of them for several outputs), or None: not understood."""
    rule = _RULES.get(name_of(node)) if operands_of(node) is None else _operator
    try:
        return rule(trace, node) if rule else None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # arguments in a form, or sizes, that the rule does not know


def _pointwise(trace: Trace, node: Node) -> Axes | None:
    operands = [x for x in node.all_input_nodes if isinstance(recorded(x), torch.Tensor)]
    rank = len(_shape(node))
    axes = []
    for dim, size in enumerate(_shape(node)):
        found = [
            axis
            for x in operands
            if (place := dim - rank + len(_shape(x))) >= 0
            and same(length(axis := trace.of(x)[place]), size)
        ]
        met = meet(found) if found else None
        axes.append(trace.leaf(node, dim, size) if met is None else met)
    return tuple(axes)


def _first(trace: Trace, node: Node) -> Any:
    """Shaped as the first argument: norms, softmax; of several outputs the first."""
    axes = trace.of(node.all_input_nodes[0])
    outputs = recorded(node)
    return axes if isinstance(outputs, torch.Tensor) else [axes] + [None] * (len(outputs) - 1)


def _permute(trace: Trace, node: Node) -> Axes:
    axes = trace.of(argument(node, 0, "input"))
    dims = argument(node, 1, "dims")
    dims = dims if isinstance(dims, (tuple, list)) else _all(node)[1:]
    return tuple(axes[dim] for dim in dims)


def _transpose(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    a, b = (argument(node, 1, "dim0", 0), argument(node, 2, "dim1", 1))
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def _movedim(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    source, destination = argument(node, 1, "source"), argument(node, 2, "destination")
    axis = axes.pop(source)
    axes.insert(destination if destination >= 0 else destination + len(axes) + 1, axis)
    return tuple(axes)


def _reshape(trace: Trace, node: Node) -> Axes | None:
    """Give each new size the old axis of its length, several merged, or a part of one."""
    old = [axis for axis in trace.of(argument(node, 0, "input")) if not same(length(axis), 1)]
    axes: list[Axis] = []
    sizes = list(_shape(node))
    dim = 0
    while dim < len(sizes):
        size = sizes[dim]
        if same(size, 1):
            axes.append(trace.leaf(node, dim, size))
            dim += 1
            continue
        group: list[Axis] = []
        while not same(product := math.prod(map(length, group)), size):
            if not (isinstance(product, int) and isinstance(size, int)):
                parts = trace.unflatten(group[0]) if len(group) == 1 else ()
                if len(parts) > 1 and same(length(parts[0]), size):
                    old[:0], group = parts, []
                    continue
                if not old:
                    return None
                group.append(old.pop(0))
            elif product < size:
                if not old:
                    return None
                group.append(old.pop(0))
            else:  # too long: take its parts, where they are known
                parts = trace.unflatten(group.pop())
                if len(parts) == 1:
                    old.insert(0, parts[0])
                    break
                old[:0] = parts
        else:
            axes.append(trace.flatten(node, group))
            dim += 1
            continue
        # no parts that fit: old axes become new ones as a whole
        old[:0] = group
        whole: Size = length(old.pop(0))
        filled: Size = 1
        while not same(filled, whole):
            if isinstance(filled, int) and isinstance(whole, int) and filled > whole:
                whole = whole * length(old.pop(0))
                continue
            axes.append(trace.leaf(node, dim, sizes[dim]))
            filled = filled * sizes[dim]
            dim += 1
    return tuple(axes)


def _unsqueeze(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    dim = argument(node, 1, "dim")
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, trace.leaf(node, dim, 1))
    return tuple(axes)


def _squeeze(trace: Trace, node: Node) -> Axes:
    dims = argument(node, 1, "dim")
    axes = trace.of(argument(node, 0, "input"))
    dims = range(len(axes)) if dims is None else dims if isinstance(dims, (tuple, list)) else [dims]
    gone = {dim % len(axes) for dim in dims if same(length(axes[dim]), 1)}
    return tuple(axis for dim, axis in enumerate(axes) if dim not in gone)


def _broadcast(trace: Trace, node: Node) -> Axes:
    """expand, repeat: axes that keep their length, aligned at the end."""
    shape, axes = _shape(node), trace.of(argument(node, 0, "input"))
    axes = (*[trace.leaf(node, dim, 1) for dim in range(len(shape) - len(axes))], *axes)
    return tuple(
        axis if same(length(axis), size) else trace.leaf(node, dim, size)
        for dim, (axis, size) in enumerate(zip(axes, shape, strict=True))
    )


def _cat(trace: Trace, node: Node) -> Axes:
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0)) % len(_shape(node))
    parts = [trace.of(x) for x in tensors if len(_shape(x)) == len(_shape(node))]
    return tuple(
        join(part[d] for part in parts)
        if d == dim
        else meet([part[d] for part in parts]) or trace.leaf(node, d, size)
        for d, size in enumerate(_shape(node))
    )


def _stack(trace: Trace, node: Node) -> Axes:
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0) % len(_shape(node))
    axes = [meet(same_dim) or () for same_dim in zip(*map(trace.of, tensors), strict=True)]
    axes.insert(dim, trace.leaf(node, dim, len(tensors)))
    return tuple(axes)


def _split(trace: Trace, node: Node) -> list[Axes]:
    """split, chunk and their kin: the parts' own sizes say where the cuts are."""
    names = ("split_size_or_sections", "split_sizes", "split_size", "chunks")
    given = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    place = 2 if given is None else 1
    dim = argument(node, place, "dim", 0)
    axes = trace.of(argument(node, 0, "input"))
    dim %= len(axes)
    parts, rest = [], axes[dim]
    for i, part in enumerate(recorded(node)):
        halves = cut(rest, part.shape[dim])
        piece = halves[0] if halves else trace.leaf(node, dim, part.shape[dim], i)
        rest = halves[1] if halves else ()
        parts.append((*axes[:dim], piece, *axes[dim + 1 :]))
    return parts


def _unbind(trace: Trace, node: Node) -> list[Axes]:
    axes = trace.of(argument(node, 0, "input"))
    dim = argument(node, 1, "dim", 0) % len(axes)
    return [(*axes[:dim], *axes[dim + 1 :])] * len(recorded(node))


def _getitem(trace: Trace, node: Node) -> Any:
    source, index = argument(node, 0, "input"), argument(node, 1, "other")
    if not isinstance(recorded(source), torch.Tensor):
        return trace._axes[source][index]
    return _indexed(trace, node, trace.of(source), index)


def _index(trace: Trace, node: Node) -> Axes | None:
    """aten.index(x, indices), where None stands for all of a dimension."""
    indices = argument(node, 1, "indices")
    entries = tuple(slice(None) if entry is None else entry for entry in indices)
    return _indexed(trace, node, trace.of(argument(node, 0, "input")), entries)


def _indexed(trace: Trace, node: Node, axes: Axes, index: Any) -> Axes | None:
    """``x[index]`` for integers, slices, None, Ellipsis and at most one tensor."""
    entries = index_entries(index, len(axes))
    result: list[Axis] = []
    rest = list(axes)
    for entry in entries:
        if entry is None:
            result.append(trace.leaf(node, len(result), 1))
            continue
        axis = rest.pop(0)
        if isinstance(entry, slice):
            result.append(_sliced(trace, node, axis, entry, len(result)))
        elif isinstance(recorded(entry) if isinstance(entry, Node) else None, torch.Tensor):
            if len(_shape(entry)) != 1 or recorded(entry).dtype == torch.bool:
                return None
            size = _shape(entry)[0]
            result.append(trace.gathered(node, axis, entry, size))
        elif not isinstance(number_of(entry), (int, torch.SymInt)):
            return None
    return tuple(result)


def index_entries(index: Any, rank: int) -> list[Any]:
    """An index of a tensor in full: one entry for each dimension, and each None."""
    entries = list(index) if isinstance(index, tuple) else [index]
    taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis not in entries:
        entries.append(Ellipsis)
    hole = entries.index(Ellipsis)
    entries[hole : hole + 1] = [slice(None)] * (rank - taken)
    return entries


def _sliced(trace: Trace, node: Node, axis: Axis, entry: slice, dim: int) -> Axis:
    start, step = number_of(entry.start), number_of(entry.step)
    size, whole = recorded(node).shape[dim], length(axis)
    if step is None or same(step, 1):
        begin = 0 if start is None else start
        if isinstance(begin, int) and begin < 0:
            begin = begin + whole
        if isinstance(begin, int) and isinstance(whole, int):
            begin = min(max(begin, 0), whole)
        tail = cut(axis, begin)
        # the output's own size says where it stops
        if tail and (head := cut(tail[1], size)):
            return head[0]
    return trace.gathered(node, axis, str(entry), size)


def _slice(trace: Trace, node: Node) -> Axes:
    """aten.slice(x, dim, start, end, step), Tensor.narrow(dim, start, length)."""
    axes = list(trace.of(argument(node, 0, "input")))
    dim = argument(node, 1, "dim", 0) % len(axes)
    if name_of(node) == "narrow":
        start = argument(node, 2, "start")
        entry = slice(start, start + argument(node, 3, "length"), None)
    else:
        entry = slice(*(argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))))
    axes[dim] = _sliced(trace, node, axes[dim], entry, dim)
    return tuple(axes)


def _copy(trace: Trace, node: Node) -> Axes:
    """``x.copy_(source)`` as a value: nothing is left of what was there."""
    axes = trace.of(argument(node, 1, "src"))
    rank = len(_shape(node))
    return tuple(
        axes[place]
        if (place := dim - rank + len(axes)) >= 0 and same(length(axes[place]), size)
        else trace.leaf(node, dim, size)
        for dim, size in enumerate(_shape(node))
    )


def _slice_scatter(trace: Trace, node: Node) -> Axes:
    """``x[..., start:end] = source`` as a value: axes stay where the source has some of them.

    Where nothing had been written to ``x`` they are the source's.
    """
    x, source = argument(node, 0, "input"), argument(node, 1, "src")
    axes, written = trace.of(x), trace.of(source)
    dim = argument(node, 2, "dim", 0) % len(axes)
    entry = slice(*(argument(node, i, n) for i, n in ((3, "start"), (4, "end"), (5, "step"))))
    parts = [
        _sliced(trace, source, axis, entry, d) if d == dim else axis for d, axis in enumerate(axes)
    ]
    blank = name_of(x) in CONSTANTS
    return tuple(
        axis
        if related(part, new)
        else new
        if blank and d != dim
        else trace.leaf(node, d, length(axis), opaque=True)
        for d, (axis, part, new) in enumerate(zip(axes, parts, written, strict=True))
    )


def _select(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    axes.pop(argument(node, 1, "dim"))
    return tuple(axes)


def _index_select(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    axes[dim] = trace.gathered(node, axes[dim], index, _shape(node)[dim])
    return tuple(axes)


def _pad(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    pads = [number_of(pad) for pad in argument(node, 1, "pad")]
    for i in range(len(pads) // 2):
        dim = len(axes) - 1 - i
        before, after = (
            () if same(pad, 0) else trace.leaf(node, dim, pad, part)
            for part, pad in enumerate(pads[2 * i : 2 * i + 2])
        )
        axes[dim] = join([before, axes[dim], after])
    return tuple(axes)


def _linear(trace: Trace, node: Node) -> Axes:
    weight = trace.of(argument(node, 1, "weight"))
    return (*trace.of(argument(node, 0, "input"))[:-1], *weight[:-1])


def _matmul(trace: Trace, node: Node) -> Axes | None:
    place = 1 if name_of(node) in ("addmm", "baddbmm") else 0
    a, b = (trace.of(x) for x in _all(node)[place : place + 2])
    if len(a) < 2 or len(b) < 2:
        return None
    batch = a[:-2] if len(a) >= len(b) else b[:-2]
    return (*batch, a[-2], b[-1])


def _einsum(trace: Trace, node: Node) -> Axes:
    inputs, output, operands = equation_of(node)
    known: dict[str, Axis] = {}
    for letters, operand in zip(inputs, operands, strict=True):
        for letter, axis in zip(letters, trace.of(operand), strict=True):
            known.setdefault(letter, axis)
    return tuple(known[letter] for letter in output)


def _convolution(trace: Trace, node: Node) -> Axes:
    source, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    new = [trace.leaf(node, dim, size) for dim, size in enumerate(_shape(node))]
    # each output from one position: a projection
    pointwise = all(same(size, 1) for size in _shape(weight)[2:]) and all(
        map(same, _shape(source)[2:], _shape(node)[2:])
    )
    return (trace.of(source)[0], new[1], *(trace.of(source) if pointwise else new)[2:])


def _attention(trace: Trace, node: Node) -> Axes:
    query, value = argument(node, 0, "query"), argument(node, 2, "value")
    return (*trace.of(query)[:-1], trace.of(value)[-1])


def _operator(trace: Trace, node: Node) -> Any:
    """An operator of a library that attends: its first output has the tokens of its queries."""
    operands = operands_of(node)
    if operands is None:
        return None
    query, value = map(trace.of, operands)
    output = (*query[:-1], value[-1])
    outputs = recorded(node)
    if isinstance(outputs, torch.Tensor):
        return output
    return [output] + [None] * (len(outputs) - 1)


def _reduction(trace: Trace, node: Node) -> Axes:
    axes = list(trace.of(argument(node, 0, "input")))
    for dim in sorted(reduced_dims(node), reverse=True):
        axes.pop(dim)
        if len(_shape(node)) == len(_shape(argument(node, 0, "input"))):
            axes.insert(dim, trace.leaf(node, dim, 1))
    return tuple(axes)


def _attribute(trace: Trace, node: Node) -> Axes | None:
    """``x.mT``, ``x.T``; parts of complex numbers keep the shape."""
    axes = trace.of(argument(node, 0, "input"))
    name = argument(node, 1, "other") if name_of(node) == "getattr" else name_of(node)
    if name in ("mT", "mH", "T", "H"):
        return (*axes[:-2], axes[-1], axes[-2]) if name[0] == "m" else axes[::-1]
    return axes if name in ("real", "imag", "data") else None


def _outer(trace: Trace, node: Node) -> Axes:
    return (trace.of(argument(node, 0, "input"))[0], trace.of(argument(node, 1, "other"))[0])


def _meshgrid(trace: Trace, node: Node) -> list[Axes] | None:
    vectors = (
        argument(node, 0, "input")
        if isinstance(argument(node, 0, "input"), (tuple, list))
        else _all(node)
    )
    if node.kwargs.get("indexing") != "ij":
        return None
    return [tuple(trace.of(vector)[0] for vector in vectors)] * len(vectors)


def _fresh(trace: Trace, node: Node) -> Axes:
    """Positions that come into being here and from nothing else: arange, zeros."""
    return trace._leaves(node, _shape(node))


def _complex(trace: Trace, node: Node) -> Axes:
    """view_as_complex drops the pair axis, view_as_real adds it."""
    axes = trace.of(argument(node, 0, "input"))
    if len(_shape(node)) < len(axes):
        return axes[:-1]
    return (*axes, trace.leaf(node, len(axes), 2))


def _write(trace: Trace, node: Node, target: Node, index: Any, value: Any) -> None:
    """``x[index] = value``: an axis keeps its sources only where the value has some of them."""
    if not isinstance(value, Node) or not isinstance(recorded(value), torch.Tensor):
        return
    axes, written = trace.of(target), trace.of(value)
    entries = index_entries(index, len(axes))
    known = all(isinstance(entry, (slice, int)) for entry in entries)
    lost: set[int] = set()
    place = len(written) - sum(isinstance(entry, slice) for entry in entries)
    for dim, entry in enumerate(entries[: len(axes)]):
        if not known:
            lost.add(dim)
        elif isinstance(entry, slice):
            if place >= 0 and not same(length(written[place]), 1):
                part = _sliced(trace, value, axes[dim], entry, place)
                if not related(part, written[place]):
                    lost.add(dim)
            place += 1
    sources = {number for dim in lost for run in axes[dim] for number, _ in run.spans}
    changed: Any = target
    depth = 0
    while isinstance(changed, Node):
        trace.set(
            changed,
            tuple(
                trace.leaf(node, dim, length(axis), depth, opaque=True)
                if any(number in sources for run in axis for number, _ in run.spans)
                else axis
                for dim, axis in enumerate(trace.of(changed))
            ),
        )
        depth += 1  # and what it is a view of
        changed = argument(changed, 0, "input") if name_of(changed) in VIEWS else None
        if isinstance(changed, Node) and not isinstance(recorded(changed), torch.Tensor):
            changed = argument(changed, 0, "input")


_RULES: dict[str, Rule] = {}
for _rule, _names in (
    (
        _pointwise,
        "add sub mul div neg pow sqrt rsqrt exp log sin cos silu gelu relu leaky_relu sigmoid tanh"
        " softplus mish elu hardswish abs square reciprocal float half bfloat16 double to to_copy"
        " type type_as contiguous clone detach dropout nan_to_num clamp where masked_fill"
        " empty_like zeros_like ones_like randn_like full_like maximum minimum addcmul addcdiv lerp"
        " eq ne lt le gt ge logical_and logical_or logical_not bitwise_not and or invert bool int"
        " long polar requires_grad alias lift_fresh_copy lift_fresh sign round floor rfloordiv"
        " floordiv floor_divide remainder mod conj real imag identity relu6 glu_pointwise view_as"
        " expand_as",
    ),
    (
        _first,
        "layer_norm rms_norm group_norm batch_norm softmax log_softmax normalize cumsum cumprod"
        " native_layer_norm",
    ),
    (_permute, "permute"),
    (_transpose, "transpose t"),
    (_movedim, "movedim moveaxis"),
    (_reshape, "view reshape flatten unflatten"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_broadcast, "expand repeat broadcast_to repeat_interleave tile"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_split, "split chunk split_with_sizes tensor_split"),
    (_unbind, "unbind"),
    (_getitem, "getitem"),
    (_slice, "slice narrow"),
    (_copy, "copy"),
    (_slice_scatter, "slice_scatter"),
    (_select, "select"),
    (_index, "index"),
    (_index_select, "index_select"),
    (_pad, "pad constant_pad_nd"),
    (_linear, "linear"),
    (_matmul, "matmul bmm mm addmm baddbmm"),
    (_einsum, "einsum"),
    (_convolution, "conv1d conv2d conv3d convolution"),
    (_attention, "scaled_dot_product_attention"),
    (
        _reduction,
        "mean sum amax amin prod var std norm all any max min logsumexp linalg_vector_norm",
    ),
    (
        _fresh,
        "arange zeros ones empty empty_permuted empty_strided full rand randn tensor linspace"
        " embedding eye",
    ),
    (_attribute, "getattr mT mH T H"),
    (_outer, "outer ger"),
    (_meshgrid, "meshgrid"),
    (_complex, "view_as_complex view_as_real"),
):
    for _name in _names.split():
        _RULES[_name] = _rule
