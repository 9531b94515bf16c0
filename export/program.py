"""A ``torch.export`` program with sparse attention inside: what every exporter starts from."""

from __future__ import annotations

import copy
import dataclasses
import operator
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from uta_fx.export.flex_attention import spell_out_flex
from uta_fx.export.narrow_masks import narrow_masks
from uta_fx.export.sort_selected import sort_selected
from uta_fx.passes.copy_graph import copy_graph
from uta_fx.passes.inline_subgraphs import inline_subgraphs
from uta_fx.passes.site import Site
from uta_fx.passes.sparsify import Plan, rewrite, understand


def sparsify_program(
    program: ExportedProgram, plan: Plan, dynamic_shapes: Any = None
) -> tuple[ExportedProgram, list[Site]]:
    """Run the backend's passes on an exported program.

    Args:
        program: From ``torch.export.export``, decomposed to core ATen or not.
        plan: What the passes are told.
        dynamic_shapes: With which it was exported; None for none.

    Returns:
        A program in which each sparse site is pooling, selection and ``uta::sparse_attention``,
        and FlexAttention other operations, traced for the shapes of the original's example inputs;
        and the sites.

    Raises:
        ValueError: The program carries no example inputs to trace with, or a dynamic dimension
            decides about attention.
    """
    if program.example_inputs is None:
        raise ValueError("program must carry example inputs, got an exported program without them")
    program = sort_selected(program, dynamic_shapes)
    args, kwargs = program.example_inputs
    module = program.module()
    assert isinstance(module, GraphModule)
    dynamic = _dynamic_dims(program)
    pairs = understand(module, plan)
    if fixed := sorted(dynamic - _dynamic_dims(program)):
        name, dim = fixed[0]
        raise ValueError(
            f"dynamic_shapes must leave dimension {dim} of {name} fixed: the number of tokens of an"
            " attention depends on it, and with this policy, tail and order, or in this graph, they"
            " must be numbers. Take policy low_delta or topk, tail none, block, first_order or"
            " gaussian, no hilbert order, and Dim.DYNAMIC for a Dim to which a number is added, or"
            " export one file for each size"
        )
    rewrite(module, pairs, plan)
    flex = spell_out_flex(module)
    sites = [
        dataclasses.replace(site, sparse=True, reason=flex[call.place])
        if flex.get(call.place)
        else site
        for call, site in pairs
    ]
    if not flex and not any(site.sparse for site in sites):
        return program, sites
    for node in module.graph.nodes:
        node.target = {_enter_autocast: _enter, _exit_autocast: _exit}.get(node.target, node.target)
    module.recompile()
    with torch.no_grad():
        sparse = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
        sparse = _without_regions(sparse)
    _list_masked_blocks(sparse)
    narrow_masks(sparse)
    return sparse, sites


def _enter(*arguments: Any) -> torch.autocast:
    """Do what ``_enter_autocast`` does: called in a trace that does no more than note it."""
    region = torch.autocast(*arguments)
    region.__enter__()
    return region


def _exit(region: torch.autocast) -> None:
    region.__exit__(None, None, None)


def _without_regions(program: ExportedProgram) -> ExportedProgram:
    """The same program with casts in place of autocast, if our operators are under it.

    Exporters look for these in the graph itself, not in functions that it calls.
    """
    _, *bodies = program.graph_module.modules()
    nodes = (x for body in bodies if isinstance(body, GraphModule) for x in body.graph.nodes)
    if not any(str(node.target).startswith("uta.") for node in nodes):
        return program
    program = copy.copy(program)
    program._graph_module = copy_graph(program.graph_module)
    inline_subgraphs(program.graph_module)
    return program.run_decompositions({})  # by itself it would lose the paths of modules


def _list_masked_blocks(program: ExportedProgram) -> None:
    """``uta::block_masked_attention`` as ``uta::list_blocks`` and ``uta::sparse_attention``.

    The operator of files takes lists.
    """
    graph, masked = program.graph, torch.ops.uta.block_masked_attention.default
    for node in graph.find_nodes(op="call_function", target=masked):
        query, key, value, exact, *rest = node.args
        fakes = torch.ops.uta.list_blocks.default(exact.meta["val"])
        with graph.inserting_before(node):
            lists = graph.call_function(torch.ops.uta.list_blocks.default, (exact,))
            parts = [graph.call_function(operator.getitem, (lists, i)) for i in range(2)]
        for made, fake in zip((lists, *parts), (fakes, *fakes), strict=True):
            made.meta = node.meta | {"val": fake}
        node.target = torch.ops.uta.sparse_attention.default
        node.args = (query, key, value, *parts, *rest)
    program.graph_module.recompile()


def _dynamic_dims(program: ExportedProgram) -> set[tuple[str, int]]:
    """Names and dimensions of the inputs whose sizes are not known yet."""
    inputs = set(program.graph_signature.user_inputs)
    return {
        (node.name, dim)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and "val" in node.meta
        for dim, size in enumerate(getattr(node.meta["val"], "shape", ()))
        if not is_concrete_int(size)
    }
