"""``dynamic_shapes`` fit the arguments: torch.export passes over dimensions that are not there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_dynamic_shapes(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> None:
    """Refuse dimensions that tensors do not have; what else does not fit, torch.export refuses.

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
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:  # so does the call itself, in better words
        return
    by_name = isinstance(dynamic_shapes, Mapping)
    _check(dynamic_shapes, arguments if by_name else tuple(arguments.values()), list(arguments))


def _check(shapes: Any, value: Any, names: Sequence[Any] = (), name: str = "") -> None:
    """Of one argument or part of one; ``names`` are those of the parts of a sequence."""
    if isinstance(value, Tensor):
        _check_tensor(shapes, value, name)
    elif isinstance(shapes, Mapping) and isinstance(value, Mapping):
        for key in shapes.keys() & value.keys():
            _check(shapes[key], value[key], name=f"{name}[{key!r}]" if name else key)
    elif isinstance(shapes, (tuple, list)) and isinstance(value, (tuple, list)):
        for index, (of_part, part) in enumerate(zip(shapes, value, strict=False)):
            _check(of_part, part, name=f"{name}[{index}]" if name else names[index])


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
