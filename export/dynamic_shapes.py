"""``dynamic_shapes``: whether they fit the arguments, and what they call the sizes of a program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree


def check_dynamic_shapes(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> None:
    """Refuse dimensions that tensors do not have, over which torch.export passes.

    What else does not fit, it refuses itself.

    Args:
        model: In eval mode.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dynamic_shapes: As for ``torch.export.export``.

    Raises:
        TypeError: It is of none of the types that it may be of.
        ValueError: It names a dimension that a tensor does not have, or not as many as it has.
    """
    if dynamic_shapes is None or hasattr(dynamic_shapes, "dynamic_shapes"):  # a ShapesCollection
        return
    if not isinstance(dynamic_shapes, (Mapping, tuple, list)):
        raise TypeError(
            f"dynamic_shapes must be a dict, a tuple, a list or None, got {dynamic_shapes!r}"
        )
    _visit_tensors(model, args, kwargs, dynamic_shapes, _check_tensor)


def names_of_symbols(
    model: torch.nn.Module, program: ExportedProgram, dynamic_shapes: Any
) -> dict[str, str]:
    """What a user calls the sizes of a program that are symbols there.

    Args:
        model: What was exported.
        program: Of it, with example inputs.
        dynamic_shapes: With which it was exported.

    Returns:
        ``{"s47": "batch"}`` where they have ``Dim("batch")``; nothing of ``Dim.DYNAMIC``.
    """
    if not isinstance(dynamic_shapes, (Mapping, tuple, list)) or program.example_inputs is None:
        return {}
    args, kwargs = program.example_inputs
    leaves = [id(x) for x in pytree.tree_leaves((args, kwargs))]
    inputs = dict(zip(leaves, program.graph_signature.user_inputs, strict=True))
    values = {x.name: x.meta["val"] for x in program.graph.find_nodes(op="placeholder")}
    found = {}

    def note(shapes: Any, x: Tensor, name: str) -> None:
        dims = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        for dim, called in dims:
            size = values[inputs[id(x)]].shape[dim]
            if isinstance(called, torch.export.Dim) and isinstance(size, torch.SymInt):
                (symbol,) = size.node.expr.free_symbols
                found[str(symbol)] = getattr(called, "root", called).__name__

    _visit_tensors(model, args, kwargs, dynamic_shapes, note)
    return found


Visit = Callable[[Any, Tensor, str], None]


def _visit_tensors(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    visit: Visit,
) -> None:
    """Call ``visit`` with what is said of a tensor, the tensor, and its name."""
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:  # so does the call itself, in better words
        return
    by_name = isinstance(dynamic_shapes, Mapping)
    values = arguments if by_name else tuple(arguments.values())
    _visit(dynamic_shapes, values, visit, list(arguments))


def _visit(
    shapes: Any, value: Any, visit: Visit, names: Sequence[Any] = (), name: str = ""
) -> None:
    """One argument or part of one; ``names`` are those of the parts of a sequence."""
    if isinstance(value, Tensor):
        visit(shapes, value, name)
    elif isinstance(shapes, Mapping) and isinstance(value, Mapping):
        for key in shapes.keys() & value.keys():
            _visit(shapes[key], value[key], visit, name=f"{name}[{key!r}]" if name else key)
    elif isinstance(shapes, (tuple, list)) and isinstance(value, (tuple, list)):
        for index, (of_part, part) in enumerate(zip(shapes, value, strict=False)):
            _visit(of_part, part, visit, name=f"{name}[{index}]" if name else names[index])


def _check_tensor(shapes: Any, x: Tensor, name: str) -> None:
    whose = f"{name}, whose sizes are {list(x.shape)}"
    if isinstance(shapes, Mapping):
        for dim in shapes:
            if not isinstance(dim, int) or not 0 <= dim < x.dim():
                raise ValueError(
                    f"dynamic_shapes must name dimensions of {whose}, counted from 0, got {dim!r}"
                )
    elif isinstance(shapes, (tuple, list)) and len(shapes) != x.dim():
        raise ValueError(
            f"dynamic_shapes must have an entry for each dimension of {whose}, got {len(shapes)}"
        )
