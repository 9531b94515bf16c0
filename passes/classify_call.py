"""Tell self-attention, joint attention and cross-attention apart by where tokens come from."""

from __future__ import annotations

from torch.fx import Node

from uta_fx.passes.find_calls import Call
from uta_fx.passes.read_node import name_of
from uta_fx.passes.trace_axes import Axis, Trace, equal, place_in


def classify_call(call: Call, trace: Trace) -> str:
    """``"self"``, ``"joint"``, ``"cross"`` or ``"unknown"``.

    Lengths do not tell: the text of a cross-attention can be as long as the video. The tokens of
    queries and keys of a self-attention come into being at the same place; in a joint attention
    they do too, but at several, one after another: video and text; the queries may be a part of
    them. Those of a cross-attention differ. Tokens that differ without being projected in this
    graph leave the call unknown: it may be a part of a model, with queries and keys handed in. So
    do tokens of which both come out of operations that cannot be followed, such as being written
    into buffers: they may be the same. And so does a near miss of which no more than logits is
    known: whatever made them may have made their rows and columns too.
    """
    tokens = trace.axis(call.query.node, call.query.token_dim)
    keys = trace.axis(call.key.node, call.key.token_dim)
    if equal(tokens, keys):
        return "self" if _have_one_origin(trace, tokens) else "joint"
    if place_in(keys, tokens) is not None:
        return "joint"
    if not call.value.order:
        return "unknown"
    projected = _is_projected(call.query.node) and _is_projected(call.key.node)
    followed = not (_is_opaque(trace, tokens) and _is_opaque(trace, keys))
    return "cross" if projected and followed else "unknown"


def _is_opaque(trace: Trace, axis: Axis) -> bool:
    return any(trace.sources[number].opaque for run in axis for number, _ in run.spans)


def _have_one_origin(trace: Trace, axis: Axis) -> bool:
    """Whether tokens are one run, or all of what one patch embedding made."""
    return len(axis) == 1 or any(
        stretch.end - stretch.start == len(axis) and len(stretch.source.sides) > 1
        for stretch in trace.stretches(axis)
    )


def _is_projected(node: Node) -> bool:
    """Whether a linear projection lies upstream."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and name_of(current) in ("linear", "addmm", "mm"):
            return True
        stack.extend(current.all_input_nodes)
    return False
