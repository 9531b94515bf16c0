"""Give calls in a graph a state: what a call returns beside its output is an input of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from uta_fx.passes.copy_graph import copy_graph
from uta_fx.passes.site import value_of


def carry_state(
    gm: GraphModule, example_inputs: Sequence[Any], kind: type[Any]
) -> tuple[GraphModule, list[Any]]:
    """Make the state of every call of a value of ``kind`` an input and an output of the graph.

    The graph stays a function: it takes the states after its own inputs and returns them after its
    own outputs. ``with_state`` hands them from call to call.

    Args:
        gm: Stays as it is; its calls of ``kind`` take tensors alone.
        example_inputs: Its inputs.
        kind: Class of callables that take their state after their other arguments and return it
            after their output. ``state_shapes`` gives the shapes of a state, float32, from the
            call's first argument.

    Returns:
        A copy of the graph, because PyTorch knows where the inputs of this one come from and admits
        no others; and its inputs, the last ones for the states.

    Raises:
        ValueError: A state's size is known only at run time.
    """
    copy = copy_graph(gm)
    graph, inputs, results = copy.graph, list(example_inputs), []
    placeholder = graph.find_nodes(op="placeholder")[-1]
    for node in list(graph.nodes):
        site: Any = node.target
        if node.op != "call_function" or not isinstance(site, kind):
            continue
        query, states = value_of(node.args[0]), []
        for shape in site.state_shapes(query):
            if not all(isinstance(size, int) for size in shape):
                raise ValueError(
                    "a state of the graph must have a fixed shape: compile with dynamic=False,"
                    f" got {tuple(shape)}"
                )
            with graph.inserting_after(placeholder):
                placeholder = graph.placeholder(f"state_{len(inputs)}")
            placeholder._dynamo_source = None  # none of the user's: nothing to guard
            inputs.append(_zeros(shape, query, example_inputs))
            placeholder.meta["example_value"] = inputs[-1]
            states.append(placeholder)
        node.args = (*node.args, *states)
        with graph.inserting_after(node):
            output = graph.call_function(getitem, (node, 0))
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output, delete_user_cb=lambda user, own=output: user is not own)
        after = output
        for index in range(1, len(states) + 1):
            with graph.inserting_after(after):
                after = graph.call_function(getitem, (node, index))
            results.append(after)
    last: Node = graph.output_node()
    last.args = ((*cast("tuple[Any, ...]", last.args[0]), *results),)
    graph.lint()
    copy.recompile()
    return copy, inputs


def with_state(compiled: Callable[..., Any], states: Sequence[Tensor]) -> Callable[..., Any]:
    """Call a graph of ``carry_state`` as the graph that it is a copy of.

    Args:
        compiled: The graph.
        states: What they are like; the first call gets zeros.
    """
    like = [(state.shape, state.device) for state in states]
    kept: list[Tensor] = []

    def call(*inputs: Any) -> list[Any]:
        if not kept:
            with torch.inference_mode(False):  # whose tensors nobody else may write to
                kept.extend(torch.zeros(shape, device=device) for shape, device in like)
        outputs = list(compiled(*inputs, *kept))
        own = len(outputs) - len(kept)
        # copied: what a CUDA graph returns is overwritten by its next run
        torch._foreach_copy_(kept, outputs[own:])
        return outputs[:own]

    return call


def _zeros(shape: Sequence[int], query: Tensor, example_inputs: Sequence[Any]) -> Tensor:
    """Fake where the inputs are: of the same mode."""
    for x in example_inputs:
        if isinstance(x, FakeTensor):
            with x.fake_mode:
                return torch.zeros(shape, device=query.device)
    return torch.zeros(shape, device=query.device)
