"""Write ``F.multi_head_attention_forward``, one node to Dynamo, as the operations that it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
MULTI_HEAD = F.multi_head_attention_forward


def expand_multi_head(gm: GraphModule) -> None:
    """Replace each such node that is plain attention; the graph computes what it did.

    Plain is what ``objection_to_expansion`` does not object to; the others stay one node.
    """
    for node in gm.graph.find_nodes(op="call_function", target=MULTI_HEAD):
        if objection_to_expansion(node) is None:
            _expand(node)
    gm.recompile()


def objection_to_expansion(node: Node) -> str | None:
    """Why an ``nn.MultiheadAttention`` is more than projections around an attention, or None."""
    call = bind_multi_head(node)
    for name in ("attn_mask", "bias_k", "bias_v", "static_k", "static_v"):
        if call[name] is not None:
            return f"nn.MultiheadAttention has {name}"
    if call["add_zero_attn"] or call["is_causal"]:
        return "nn.MultiheadAttention has add_zero_attn or is causal"
    if call["training"] and call["dropout_p"]:
        return f"nn.MultiheadAttention has dropout ({call['dropout_p']})"
    if any(user.args[1] == 1 and user.users for user in node.users):
        return "nn.MultiheadAttention returns its weights"
    if call["query"].meta["example_value"].dim() != 3:
        return "nn.MultiheadAttention has no batch"
    return None


def bind_multi_head(node: Node) -> dict[str, Any]:
    """All arguments of such a node by name."""
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _expand(node: Node) -> None:
    call, graph = bind_multi_head(node), node.graph

    def emit(function: Callable[..., Any], *args: Any) -> Node:
        new = graph.call_function(function, args)
        values = torch.fx.node.map_arg(args, lambda x: x.meta["example_value"])
        new.meta = {**node.meta, "example_value": function(*values)}
        return new

    def part(x: Node | None, index: int) -> Node | None:
        if x is None:
            return None
        size = x.meta["example_value"].shape[0] // 3
        return emit(torch.narrow, x, 0, index * size, size)

    with graph.inserting_before(node):
        heads = []
        for i, name in enumerate(("query", "key", "value")):
            weight = call[f"{name[0]}_proj_weight"]
            if not call["use_separate_proj_weight"]:
                weight = part(call["in_proj_weight"], i)
            x = emit(F.linear, call[name], weight, part(call["in_proj_bias"], i))  # [L, B, E]
            x = emit(torch.unflatten, x, -1, (call["num_heads"], -1))
            heads.append(emit(torch.permute, x, (1, 2, 0, 3)))
        mask = call["key_padding_mask"]  # [B, L]
        if mask is not None:
            if mask.meta["example_value"].dtype == torch.bool:  # True: hidden
                mask = emit(torch.logical_not, mask)
            mask = emit(torch.unsqueeze, emit(torch.unsqueeze, mask, 1), 1)
        x = emit(F.scaled_dot_product_attention, *heads, mask)
        x = emit(torch.flatten, emit(torch.permute, x, (2, 0, 1, 3)), 2)
        x = emit(F.linear, x, call["out_proj_weight"], call["out_proj_bias"])
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(x)
        graph.erase_node(user)
    graph.erase_node(node)
