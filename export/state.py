"""Objects among a model's arguments: their tensors in its graph, and what a call leaves in them."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, tree_flatten_with_path, tree_unflatten

# what torch.export takes for a leaf of the arguments
_LEAVES = (
    Tensor, bool, int, float, complex, str, bytes, type(None),
    torch.device, torch.dtype, torch.layout, torch.memory_format,
    torch.SymInt, torch.SymFloat, torch.SymBool, torch.ScriptObject,
)  # fmt: skip


class Opened(NamedTuple):
    """Arguments without objects.

    Attributes:
        args: Positional arguments. In the place of each object is a dict of its tensors, by their
            paths in it (``layer_caches.0.key``).
        kwargs: Keyword arguments, likewise.
        left: Names of what the last call left in the objects (``kv_cache_layer_caches_0_key``, as
            an input of that name would be), which are its last outputs: those tensors that an
            object did not hold before, or that were written to. None left: the outputs alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left: list[str]


@contextlib.contextmanager
def opened(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Opened]:
    """Have a model take the tensors of objects instead of these, and return what it leaves in them.

    Objects are arguments of classes that ``torch.export`` does not know, such as a cache of keys
    and values, which one call writes and another reads. Each call works on copies of them; what
    they hold beside tensors, modules too, is constant. Without objects among the arguments nothing
    changes.

    Raises:
        ValueError: An object cannot be copied.
    """
    leaves, spec = tree_flatten_with_path((tuple(args), dict(kwargs)))
    objects = {index: x for index, (_, x) in enumerate(leaves) if not isinstance(x, _LEAVES)}
    if not objects:
        yield Opened(tuple(args), dict(kwargs), [])
        return
    forward, own = model.forward, vars(model).get("forward")
    names = {index: _name(forward, leaves[index][0]) for index in objects}
    held = {index: _tensors(x) for index, x in objects.items()}
    for index, x in objects.items():
        try:
            _with_tensors(x, held[index], held[index])
        except Exception as error:  # whatever its class does when it is copied
            raise ValueError(
                f"{names[index]} must be tensors, containers of them or an object that can be"
                f" copied, got a {type(x).__name__}: {error}"
            ) from error
    opened_args, opened_kwargs = tree_unflatten(
        [held.get(index, x) for index, (_, x) in enumerate(leaves)], spec
    )
    result = Opened(opened_args, opened_kwargs, [])

    @functools.wraps(forward)
    def opened_forward(*args: Any, **kwargs: Any) -> Any:
        taken = spec.flatten_up_to((args, kwargs))
        given = {index: {path: x.clone() for path, x in taken[index].items()} for index in objects}
        for index, x in objects.items():
            taken[index] = _with_tensors(x, held[index], given[index])
        args, kwargs = tree_unflatten(taken, spec)
        outputs = forward(*args, **kwargs)
        left = {
            _plain(f"{names[index]}_{path}"): x
            for index in objects
            for path, x in _tensors(taken[index]).items()
            if given[index].get(path) is not x or x._version
        }
        result.left[:] = left
        return (outputs, left) if left else outputs

    model.forward = opened_forward
    try:
        yield result
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _tensors(x: Any) -> dict[str, Tensor]:
    """Those of an object by their paths: attributes, keys and places; each once."""
    return {path: part for path, part in _parts(x).items() if isinstance(part, Tensor)}


def _with_tensors(x: Any, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Any:
    """A copy of an object that holds the new tensors in the place of the old."""
    memo: dict[int, Any] = {id(part): part for part in _parts(x).values()}
    return copy.deepcopy(x, memo | {id(old[path]): new[path] for path in old})


def _parts(x: Any) -> dict[str, Tensor | torch.nn.Module]:
    """Tensors and modules in an object, which a copy shares, by their paths."""
    found: dict[str, Tensor | torch.nn.Module] = {}
    seen: set[int] = set()

    def look(x: Any, path: tuple[str, ...]) -> None:
        if id(x) in seen or isinstance(x, (type, ModuleType)):
            return
        seen.add(id(x))
        if isinstance(x, (Tensor, torch.nn.Module)):
            found[".".join(path)] = x
            return
        parts: list[tuple[Any, Any]] = []
        if isinstance(x, Mapping):
            parts += x.items()
        elif isinstance(x, (list, tuple, deque)):
            parts += enumerate(x)
        parts += getattr(x, "__dict__", {}).items()
        for kind in type(x).__mro__:
            slots = vars(kind).get("__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            parts += [(name, getattr(x, name)) for name in names if hasattr(x, name)]
        for name, part in parts:
            look(part, (*path, str(name)))

    look(x, ())
    return found


def _name(forward: Any, path: KeyPath) -> str:
    """Of an argument, as torch.export names it: by the parameter that takes it."""
    parameters = list(inspect.signature(forward).parameters)
    keys: list[Any] = [getattr(x, "key", getattr(x, "idx", getattr(x, "name", ""))) for x in path]
    in_kwargs, first, *rest = keys
    if not in_kwargs and first < len(parameters):
        first = parameters[first]
    return _plain("_".join(map(str, (first, *rest))))


def _plain(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]", "_", name).lower()
