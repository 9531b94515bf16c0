"""Write functions that Dynamo leaves whole, as under ``torch.utils.checkpoint``, into the graph."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast

# an operator of a subgraph, where that stands among its arguments, and where its inputs begin
_OPERATORS = {
    torch.ops.higher_order.tag_activation_checkpoint: (0, 1),  # torch.utils.checkpoint
    torch.ops.higher_order.invoke_subgraph: (0, 2),  # torch.compiler.nested_compile_region
    # torch.export's, of torch.autocast and torch.no_grad in a model
    _AUTOCAST: (4, 5),
    torch.ops.higher_order.wrap_with_set_grad_enabled: (1, 2),
}


def inline_subgraphs(gm: GraphModule) -> None:
    """Replace each call of such a function by its operations; the graph computes what it did.

    Autocast is entered before them and left after them. With gradients all functions stay: a
    checkpoint says what is kept for them.
    """
    if torch.is_grad_enabled():
        return
    calls = [node for node in gm.graph.nodes if node.target in _OPERATORS]
    while calls:
        calls += _inline(gm, calls.pop())
    gm.recompile()


def _inline(gm: GraphModule, node: Node) -> list[Node]:
    """Replace one call; returns those that were in the function."""
    arguments: Any = node.args
    place, first = _OPERATORS[node.target]
    function, inputs = arguments[place], arguments[first:]
    name, graph = function.target, gm.graph
    body = gm.get_submodule(name)
    assert isinstance(body, GraphModule)
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        if node.target is _AUTOCAST:
            entered = graph.call_function(_enter_autocast, arguments[:place])
        for old in body.graph.nodes:
            if old.op in ("placeholder", "output"):
                continue
            new = copies[old] = graph.node_copy(old, copies.__getitem__)
            if old.op == "get_attr":  # a function in the function
                new.target = f"{name}_{old.target}"
                gm.add_submodule(new.target, body.get_submodule(old.target))
        if node.target is _AUTOCAST:
            graph.call_function(_exit_autocast, (entered,))
    results: Any = torch.fx.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for user in list(node.users):
        assert user.target is getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not function.users:
        graph.erase_node(function)
    return [x for x in copies.values() if isinstance(x, Node) and x.target in _OPERATORS]
