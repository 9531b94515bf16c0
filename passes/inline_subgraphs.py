"""Write functions that Dynamo leaves whole, as under ``torch.utils.checkpoint``, into the graph."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

# an operator of a subgraph, and where its inputs begin
_OPERATORS = {
    torch.ops.higher_order.tag_activation_checkpoint: 1,  # torch.utils.checkpoint
    torch.ops.higher_order.invoke_subgraph: 2,  # torch.compiler.nested_compile_region
}


def inline_subgraphs(gm: GraphModule) -> None:
    """Replace each call of such a function by its operations; the graph computes what it did.

    With gradients they stay: a checkpoint says what is kept for them.
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
    name, inputs = arguments[0].target, arguments[_OPERATORS[node.target] :]
    body, graph = gm.get_submodule(name), gm.graph
    assert isinstance(body, GraphModule)
    copies = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for old in body.graph.nodes:
            if old.op in ("placeholder", "output"):
                continue
            new = copies[old] = graph.node_copy(old, copies.__getitem__)
            if old.op == "get_attr":  # a function in the function
                new.target = f"{name}_{old.target}"
                gm.add_submodule(new.target, body.get_submodule(old.target))
    results: Any = torch.fx.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for user in list(node.users):
        assert user.target is getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not arguments[0].users:
        graph.erase_node(arguments[0])
    return [x for x in copies.values() if isinstance(x, Node) and x.target in _OPERATORS]
