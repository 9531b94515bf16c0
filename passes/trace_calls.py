"""Trace the Python calls in a graph into graphs of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from uta_fx.passes.locate_video import symbols_of
from uta_fx.passes.site import recorded

invoke_subgraph = torch.ops.higher_order.invoke_subgraph


def trace_calls(gm: GraphModule, kind: type, *, share: int | None) -> None:
    """Replace every call of a value of ``kind`` by a call of a module that holds its operators.

    AOTAutograd traces Python in a graph too, but never finds such a graph in its cache: it cannot
    tell what the Python does. Calls that are alike call one module. Two kinds of calls stay as they
    are: of a size known only at run time, and one that makes a tensor of Python numbers (Dynamo
    knows no source for a module's constants).

    Args:
        gm: Changed in place; its calls of ``kind`` take tensors, and numbers as ``grid``.
        kind: Class of hashable callables with a ``__name__`` that return a tensor, or several.
        share: Call modules that are called so many times or more through ``invoke_subgraph``,
            which Inductor compiles by itself and once, unless they are one operator of ours, of
            which there is nothing to compile; None writes the operators out at each call, which
            any compiler understands, and Inductor compiles sooner where there is one call.
    """
    modules: dict[Any, GraphModule] = {}
    alike: dict[Any, list[Node]] = {}
    calls = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and isinstance(node.target, kind)
    ]
    known = symbols_of(gm)
    symbols: dict[Any, list[Node]] = {}
    for node in calls:
        inputs = [_empty_like(recorded(operand)) for operand in _operands(node)]
        places = [known[x] for x in sorted(free_symbols(inputs), key=str) if x in known]
        if any((place.dim, place.times) != (None, 1) for place in places):
            continue
        key = (node.target, str(node.kwargs), *map(_looks, inputs))
        if key not in modules:
            symbols[key] = [place.node for place in places]
            numbers = [recorded(x) for x in symbols[key]]
            with enable_python_dispatcher():  # what symbols as sizes need
                modules[key] = make_fx(_of_operands(node), tracing_mode="fake")(*inputs, *numbers)
        alike.setdefault(key, []).append(node)
    for number, (key, module) in enumerate(modules.items()):
        if next(module.buffers(), None) is not None:
            continue
        name, nodes = f"{key[0].__name__}_{number}", alike[key]
        gm.add_submodule(name, module)
        through = share is not None and len(nodes) >= share and not _is_ours(module)
        for node in nodes:
            _call_module(gm, node, name, module, symbols[key], through)
    gm.graph.lint()
    gm.recompile()


def _call_module(
    gm: GraphModule,
    node: Node,
    name: str,
    module: GraphModule,
    symbols: Sequence[Node],
    through: bool,
) -> None:
    """Put a call of a module in a node's place, ``through`` ``invoke_subgraph`` or plain."""
    operands = [*_operands(node), *symbols]
    with gm.graph.inserting_before(node):
        if through:
            subgraph = gm.graph.get_attr(name)
            call = gm.graph.call_function(invoke_subgraph, (subgraph, name, *operands))
        else:
            call = gm.graph.call_module(name, tuple(operands))
        result, outputs = call, cast("tuple[Any, ...]", module.graph.output_node().args[0])
        if len(outputs) == 1:
            result = gm.graph.call_function(getitem, (call, 0))
    result.meta = dict(node.meta)  # same shape, dtype and source line
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _is_ours(module: GraphModule) -> bool:
    """Whether it is a call of one of our operators and nothing else."""
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return len(calls) == 1 and getattr(calls[0], "namespace", None) == "uta"


def _operands(node: Node) -> list[Node]:
    """The tensors that a call takes, and the sides of its grid that are computed in the graph."""
    arguments: Any = node.args
    return [*arguments, *(x for x in _sides(node) if isinstance(x, Node))]


def _sides(node: Node) -> Sequence[Any]:
    sides: Any = node.kwargs.get("grid") or ()
    return sides


def _of_operands(node: Node) -> Callable[..., tuple[Tensor, ...]]:
    """A call as a function of its operands; a subgraph returns a tuple."""
    target: Any = node.target

    def call(*operands: Any) -> tuple[Tensor, ...]:
        tensors, numbers = operands[: len(node.args)], iter(operands[len(node.args) :])
        grid = tuple(next(numbers) if isinstance(x, Node) else x for x in _sides(node))
        result = target(*tensors, **({"grid": grid} if grid else {}))
        return result if isinstance(result, tuple) else (result,)

    return call


def _looks(value: Any) -> Any:
    """What is alike in operands of calls that are traced alike."""
    if not isinstance(value, Tensor):
        return str(value)
    return str(value.shape), str(value.stride()), value.dtype, value.device


def _empty_like(value: Any) -> Any:
    """Of the fake mode that PyTorch traces in now: Dynamo has left that of its graph's values."""
    if not isinstance(value, Tensor):
        return value
    with detect_fake_mode() or FakeTensorMode():
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
