"""Trace the Python calls in a graph into graphs of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from uta_fx.passes.site import value_of


def trace_calls(gm: GraphModule, kind: type) -> None:
    """Replace every call of a value of ``kind`` by a call of a module that holds its operators.

    AOTAutograd traces Python in a graph too, but never finds such a graph in its cache: it cannot
    tell what the Python does. Calls that are alike are traced once. Two stay as they are: one of a
    size known only at run time, and one that makes a tensor of Python numbers (Dynamo knows no
    source for a module's constants).

    Args:
        gm: Changed in place; its calls of ``kind`` take tensors alone.
        kind: Class of hashable callables with a ``__name__``.
    """
    traced: dict[Any, GraphModule] = {}
    calls = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and isinstance(node.target, kind)
    ]
    for index, node in enumerate(calls):
        values = [value_of(argument) for argument in node.args]
        if not all(_is_static(value) for value in values):
            continue
        inputs = [_empty_like(value) for value in values]
        key = (node.target, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key not in traced:
            traced[key] = make_fx(node.target, tracing_mode="fake")(*inputs)
        if next(traced[key].buffers(), None) is not None:
            continue
        name = f"{node.target.__name__}_{index}"
        gm.add_submodule(name, traced[key])
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(name, node.args)
        call.meta = dict(node.meta)  # same shape, dtype and source line
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


def _is_static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _empty_like(value: Tensor) -> Tensor:
    """Of the fake mode that PyTorch traces in now: Dynamo has left that of its graph's values."""
    with detect_fake_mode() or FakeTensorMode():
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
