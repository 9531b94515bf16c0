"""Trace the Python calls in a graph into graphs of operators."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from uta_fx.passes.site import value_of

invoke_subgraph = torch.ops.higher_order.invoke_subgraph


def trace_calls(gm: GraphModule, kind: type, *, share: int | None) -> None:
    """Replace every call of a value of ``kind`` by a call of a module that holds its operators.

    AOTAutograd traces Python in a graph too, but never finds such a graph in its cache: it cannot
    tell what the Python does. Calls that are alike call one module. Two kinds of calls stay as they
    are: of a size known only at run time, and one that makes a tensor of Python numbers (Dynamo
    knows no source for a module's constants).

    Args:
        gm: Changed in place; its calls of ``kind`` take tensors alone.
        kind: Class of hashable callables with a ``__name__`` that return a tensor, or several.
        share: Call modules that are called so many times or more through ``invoke_subgraph``,
            which Inductor compiles by itself and once; None writes the operators out at each call,
            which any compiler understands, and Inductor compiles sooner where there is one call.
    """
    modules: dict[Any, GraphModule] = {}
    alike: dict[Any, list[Node]] = {}
    calls = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and isinstance(node.target, kind)
    ]
    for node in calls:
        values = [value_of(argument) for argument in node.args]
        if not all(_is_static(value) for value in values):
            continue
        inputs = [_empty_like(value) for value in values]
        key = (node.target, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key not in modules:
            modules[key] = make_fx(_in_tuple(node.target), tracing_mode="fake")(*inputs)
        alike.setdefault(key, []).append(node)
    for number, (key, module) in enumerate(modules.items()):
        if next(module.buffers(), None) is not None:
            continue
        name, nodes = f"{key[0].__name__}_{number}", alike[key]
        gm.add_submodule(name, module)
        for node in nodes:
            _call_module(gm, node, name, module, through=share is not None and len(nodes) >= share)
    gm.graph.lint()
    gm.recompile()


def _call_module(
    gm: GraphModule, node: Node, name: str, module: GraphModule, through: bool
) -> None:
    """Put a call of a module in a node's place, ``through`` ``invoke_subgraph`` or plain."""
    with gm.graph.inserting_before(node):
        if through:
            subgraph = gm.graph.get_attr(name)
            call = gm.graph.call_function(invoke_subgraph, (subgraph, name, *node.args))
        else:
            call = gm.graph.call_module(name, node.args)
        result, outputs = call, cast("tuple[Any, ...]", module.graph.output_node().args[0])
        if len(outputs) == 1:
            result = gm.graph.call_function(getitem, (call, 0))
    result.meta = dict(node.meta)  # same shape, dtype and source line
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _in_tuple(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A subgraph returns a tuple."""

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        result = function(*arguments)
        return result if isinstance(result, tuple) else (result,)

    return call


def _is_static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _empty_like(value: Tensor) -> Tensor:
    """Of the fake mode that PyTorch traces in now: Dynamo has left that of its graph's values."""
    with detect_fake_mode() or FakeTensorMode():
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
