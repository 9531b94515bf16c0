"""Tell self-attention from cross-attention by where queries and keys are projected from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from uta_fx.passes.find_calls import Call

_PROJECTIONS = (
    F.linear,
    torch._C._nn.linear,
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
)


def classify_call(call: Call) -> str:
    """``"self"``, ``"cross"`` or ``"unknown"``.

    Lengths do not tell: the text of a cross-attention can be as long as the video. Queries and keys
    of a self-attention are projected from the same tensor; those of a cross-attention are not.
    A query or key behind no linear projection leaves the call unknown, as does one of several.
    """
    sources = [_projected_from(node) for node in (call.query, call.key)]
    if any(len(source) != 1 for source in sources):
        return "unknown"
    return "self" if sources[0] == sources[1] else "cross"


def _projected_from(node: Node) -> set[Node]:
    """Inputs of the nearest linear projections upstream."""
    sources: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and current.target in _PROJECTIONS:
            # addmm(bias, input, weight), linear(input, weight, bias)
            place = 1 if current.target is torch.ops.aten.addmm.default else 0
            source: Any = current.args[place] if current.args else current.kwargs["input"]
            sources.add(_unwrapped(source))
        else:
            stack.extend(current.all_input_nodes)
    return sources


def _unwrapped(node: Node) -> Node:
    """The tensor behind casts, which a model may make once for queries and once for keys."""
    while node.op == "call_method" and node.target in ("to", "type_as", "contiguous"):
        node = node.all_input_nodes[0]
    return node
