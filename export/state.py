"""What a call changes: objects and containers among its arguments, and the model itself."""

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
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import KeyPath, tree_flatten_with_path, tree_unflatten

from uta_fx.passes.read_node import written_by

# what torch.export takes for a leaf of the arguments
_LEAVES = (
    Tensor, bool, int, float, complex, str, bytes, type(None),
    torch.device, torch.dtype, torch.layout, torch.memory_format,
    torch.SymInt, torch.SymFloat, torch.SymBool, torch.ScriptObject,
)  # fmt: skip
_OWN_ATTRIBUTES = {*vars(torch.nn.Module()), "forward"}
_ABSENT = object()


class Opened(NamedTuple):
    """Arguments of which each tensor is an input of its own.

    Attributes:
        args: Positional arguments. In the place of each object is a dict of its tensors, by their
            paths in it (``layer_caches.0.key``). A tensor that is given twice, or that is a weight,
            is a copy the second time: ``torch.export`` has one input for each tensor.
        kwargs: Keyword arguments, likewise.
        left: Names of what the last call left in the arguments (``kv_cache_layer_caches_0_key``, as
            an input of that name would be), which are its last outputs: those tensors that an
            object or a container did not hold before, or that were written to. None left: the
            outputs alone.
        changed: Paths of what the last call changed in the model (``blocks.0.previous``):
            attributes that are neither parameters nor buffers, and entries of containers in them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left: list[str]
    changed: list[str]


@contextlib.contextmanager
def opened(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Opened]:
    """Have a model take tensors alone, and return what it leaves in its arguments.

    Objects are arguments of classes that ``torch.export`` does not know, such as a cache of keys
    and values, which one call writes and another reads. Each call works on copies of them; what
    they hold beside tensors, modules too, is constant.

    Raises:
        ValueError: An object cannot be copied.
    """
    leaves, spec = tree_flatten_with_path((tuple(args), dict(kwargs)))
    objects = {index: x for index, (_, x) in enumerate(leaves) if not isinstance(x, _LEAVES)}
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
    seen = {id(x): x for x in (*model.parameters(), *model.buffers())}

    def apart(x: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.detach().clone() if id(x) in seen else x
            seen[id(x)] = x
        return x

    inputs = [
        {path: apart(part) for path, part in held[index].items()} if index in held else apart(x)
        for index, (_, x) in enumerate(leaves)
    ]
    opened_args, opened_kwargs = tree_unflatten(inputs, spec)
    result = Opened(opened_args, opened_kwargs, [], [])

    @functools.wraps(forward)
    def opened_forward(*args: Any, **kwargs: Any) -> Any:
        taken = spec.flatten_up_to((args, kwargs))
        given = {index: {path: x.clone() for path, x in taken[index].items()} for index in objects}
        for index, x in objects.items():
            taken[index] = _with_tensors(x, held[index], given[index])
        args, kwargs = tree_unflatten(taken, spec)
        before, kept = _tensors_by_path(args, kwargs), _attributes(model)
        versions = {path: _version(x) for path, x in before.items()}
        outputs = forward(*args, **kwargs)
        left = {
            _plain(f"{names[index]}_{path}"): x
            for index in objects
            for path, x in _tensors(taken[index]).items()
            if given[index].get(path) is not x or _version(x)
        }
        left |= {
            _name(forward, path): x
            for path, x in _tensors_by_path(args, kwargs).items()
            if before.get(path) is not x or _version(x) != versions[path]
        }
        result.left[:] = left
        result.changed[:] = _differences(kept, _attributes(model))
        return (outputs, left) if left else outputs

    model.forward = opened_forward
    try:
        yield result
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def check_kept(program: ExportedProgram) -> tuple[str, ...]:
    """Refuse a model that reads in one call what another has written, which a file cannot keep.

    Args:
        program: Of ``torch.export.export``.

    Returns:
        Names of the inputs that it writes to.

    Raises:
        ValueError: Its outputs depend on a buffer that it writes.
    """
    if not any(_writes_to_given(node) for node in program.graph.nodes):
        return ()
    functional = program.run_decompositions({})
    signature = functional.graph_signature
    needed = _needed_for({str(name) for name in signature.user_outputs}, functional.graph.nodes)
    written = set(signature.buffers_to_mutate.values())
    read = {signature.inputs_to_buffers.get(name) for name in needed}
    if kept := sorted(written & read):
        raise ValueError(
            f"model must not keep what it reads in the next call, got one that writes its buffer"
            f" {kept[0]}: a file keeps nothing from one run to the next. Have it take this tensor"
            " as an argument: what it leaves in a dict, a list or an object there is output"
        )
    return tuple(signature.user_inputs_to_mutate.values())


def _writes_to_given(node: Node) -> bool:
    """Whether an operation may write to what the graph is given."""
    written = list(written_by(node))
    while written:
        x = written.pop()
        if x.op in ("placeholder", "get_attr"):
            return True
        schema = getattr(x.target, "_schema", None)
        if schema is None or any(y.alias_info is not None for y in schema.returns):
            written += x.all_input_nodes  # a view of one of them, perhaps
    return False


def _needed_for(outputs: set[str], nodes: Any) -> set[str]:
    """Names of the nodes from which some follow, and of these."""
    found = set(outputs)
    for node in reversed(list(nodes)):
        if node.op != "output" and node.name in found:
            found |= {x.name for x in node.all_input_nodes}
    return found


def _tensors_by_path(args: Any, kwargs: Any) -> dict[KeyPath, Tensor]:
    """Those in containers of arguments, and those that are arguments."""
    leaves, _ = tree_flatten_with_path((args, kwargs))
    return {path: x for path, x in leaves if isinstance(x, Tensor)}


def _version(x: Tensor) -> int:
    """How often it was written to; 0 of one made in inference mode, which does not count."""
    return 0 if x.is_inference() else x._version


def _attributes(model: torch.nn.Module) -> dict[str, Any]:
    """What a model's modules keep beside parameters and buffers, by path, containers open."""
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for name, x in vars(module).items():
            if name in _OWN_ATTRIBUTES:
                continue
            place = f"{prefix}.{name}" if prefix else name
            leaves, _ = tree_flatten_with_path(x)
            found |= {place + "".join(map(str, path)): leaf for path, leaf in leaves}
    return found


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Paths that one has and the other does not, or not with the same value."""

    def same(x: Any, y: Any) -> bool:
        numbers = (bool, int, float, str)
        return x is y or (type(x) is type(y) and isinstance(x, numbers) and x == y)

    paths = dict.fromkeys((*before, *after))
    return [x for x in paths if not same(before.get(x, _ABSENT), after.get(x, _ABSENT))]


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
