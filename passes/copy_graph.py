"""Copy a graph from Dynamo with all that compilers read from it."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(gm: GraphModule) -> GraphModule:
    """A graph of its own over the same modules; where its inputs come from is still known.

    What is compiled of it is but a part of what a backend returns: without the name of that, Dynamo
    does not save the part in its place (``caching_precompile``).
    """
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, new in copies.items():
        # without what refers to the true inputs: Dynamo takes that out of its own graph afterwards
        new.meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
    copy = GraphModule(gm, graph)
    copy.meta = {key: value for key, value in gm.meta.items() if key != "backend_id"}
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy
