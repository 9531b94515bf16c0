"""Parts of a mask, without the rest of it: some models have an entry for every pair of tokens."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from uta_fx.passes.read_node import written_by

_ATEN = torch.ops.aten
_POINTWISE = {
    getattr(getattr(_ATEN, name), overload)
    for name, overload in (
        ("__and__", "Tensor"), ("__or__", "Tensor"), ("bitwise_and", "Tensor"),
        ("bitwise_or", "Tensor"), ("bitwise_not", "default"), ("logical_and", "default"),
        ("logical_or", "default"), ("logical_not", "default"), ("to", "dtype"),
        ("clone", "default"), ("contiguous", "default"),
    )
}  # fmt: skip


def narrow_masks(program: ExportedProgram) -> None:
    """Cut boolean tensors before they are combined and repeated, where they are cut afterwards.

    A sparse site reads one row of its mask, and those of text; what nobody reads is not computed
    then, as Inductor computes none of it.

    Args:
        program: Changed, unless masks are written to in it. Sizes that only a run knows stay as
            they are.
    """
    graph = program.graph
    if any(_is_mask(x) for node in graph.nodes for x in written_by(node)):
        return
    for split in graph.find_nodes(op="call_function", target=_ATEN.split_with_sizes.default):
        _spell_out_split(split)
    narrowed: dict[tuple[Node, int, int, int], Node] = {}
    replaced = []
    for node in graph.find_nodes(op="call_function", target=_ATEN.slice.Tensor):
        if (part := _part(node)) is not None:
            node.replace_all_uses_with(_narrow(*part, narrowed))
            replaced.append(node)
    for node in replaced:  # not before: another may be replaced by what this one alone reads
        _erase(node)
    for x, *_ in reversed(narrowed):
        users, checks = list(x.users), _ATEN._assert_tensor_metadata.default
        if users and all(user.target is checks for user in users):
            for user in users:
                graph.erase_node(user)
            _erase(x)
    program.graph_module.recompile()


def _erase(node: Node) -> None:
    """Erase a node that nobody reads, and the masks that nobody reads then.

    Nothing else: what nobody reads may open or close something (vmap, autocast).
    """
    if node.users or node.op != "call_function" or node.is_impure():
        return
    sources = [x for x in node.all_input_nodes if _is_mask(x)]
    node.graph.erase_node(node)
    for source in sorted(sources):  # one that another is made of goes with that one
        _erase(source)


def _is_mask(x: Any) -> bool:
    """A boolean tensor of known sizes."""
    value = x.meta.get("val") if isinstance(x, Node) else None
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.bool
        and all(isinstance(size, int) for size in value.shape)
    )


def _spell_out_split(split: Node) -> None:
    """As slices."""
    arguments: Any = split.args
    x, sizes, dim = (*arguments, 0)[:3]
    if not _is_mask(x):
        return
    ends = list(itertools.accumulate(sizes))
    for part in [user for user in split.users if user.target is operator.getitem]:
        index: Any = part.args[1]
        with split.graph.inserting_before(part):
            bounds = (dim, ends[index] - sizes[index], ends[index])
            one = split.graph.call_function(_ATEN.slice.Tensor, (x, *bounds))
        one.meta = dict(part.meta)
        part.replace_all_uses_with(one)
        split.graph.erase_node(part)
    _erase(split)


def _part(node: Node) -> tuple[Node, int, int, int] | None:
    """What a slice of a mask is of: the mask, dimension, start and end; None of any other."""
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, first, last, step = given
    if node.kwargs or not _is_mask(x) or step != 1:
        return None
    sizes = x.meta["val"].shape
    start, end, _ = slice(first, last).indices(sizes[dim])
    return x, dim % len(sizes), start, max(start, end)


def _narrow(
    x: Node, dim: int, start: int, end: int, known: dict[tuple[Node, int, int, int], Node]
) -> Node:
    """A node that computes a part of what another does; ``known`` are those that there are."""
    key = (x, dim, start, end)
    if key in known:
        return known[key]
    rank = x.meta["val"].dim()

    def part_of(source: Any, dim: int) -> Any:
        """The same part of an operand, where it has more than one element in that dimension."""
        if not _is_mask(source) or _size(source, dim - rank) == 1:
            return source
        return _narrow(source, dim - rank + source.meta["val"].dim(), start, end, known)

    target: Any = x.target
    args: list[Any] = list(x.args)
    kwargs: Any = x.kwargs
    source: Any = args[0] if args else None
    if target in _POINTWISE and all(map(_is_mask, x.all_input_nodes)):
        args = [part_of(y, dim) for y in args]
    elif target is _ATEN.transpose.int and _is_mask(source):
        first, second = (y % rank for y in args[1:])
        args[0] = part_of(source, {first: second, second: first}.get(dim, dim))
    elif target is _ATEN.repeat.default and _is_mask(source) and _size(source, dim - rank) == 1:
        args[1] = [*args[1][:dim], end - start, *args[1][dim + 1 :]]
    elif target is _ATEN.repeat.default and _is_mask(source) and args[1][dim] == 1:
        args[0] = part_of(source, dim)
    else:
        target, args, kwargs = _ATEN.slice.Tensor, [x, dim, start, end], {}
    with x.graph.inserting_after(x):
        node = known[key] = x.graph.call_function(target, tuple(args), kwargs)
    node.meta = x.meta | {"val": x.meta["val"].narrow(dim, start, end - start)}
    return node


def _size(x: Node, dim: int) -> int:
    """Of a dimension counted from the last, -1; 1 of one that there is not."""
    sizes: tuple[int, ...] = x.meta["val"].shape
    return sizes[dim] if -dim <= len(sizes) else 1
