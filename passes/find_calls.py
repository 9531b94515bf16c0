"""Find the attention of a graph, however it is written, and describe each call in one form."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from uta_fx.passes.expand_multi_head import (
    MULTI_HEAD,
    bind_multi_head,
    objection_to_expansion,
)
from uta_fx.passes.match_near_miss import match_near_miss
from uta_fx.passes.match_operators import Fused, match_operator
from uta_fx.passes.match_softmax import Written, match_softmax
from uta_fx.passes.site import Operand, Order, value_of

_SDPA = torch.ops.aten.scaled_dot_product_attention
SDPA_TARGETS = (F.scaled_dot_product_attention, _SDPA, _SDPA.default)

# nn.TransformerEncoderLayer, where neither gradients nor export forbid it
_ENCODER_LAYER = torch._transformer_encoder_layer_fwd

# what Dynamo and export put around module names: L['self']._modules['blocks'] is blocks
_NOT_MODULES = {"L", "self", "__dict__", "_modules", "_orig_mod"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention call with its arguments bound by name, torch's defaults filled in.

    Attributes:
        node: Whose output is the attention's.
        query: ``[B, H, Lq, D]``.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        output: Which dimensions of the node's output ``[B, H, Lq, Dv]`` are.
        objection: Why the call is not the plain attention that it looks like; None where it is.
        operator: The call of an operator of ``match_operators``, whose first output ``node`` is;
            None for other forms.
        attn_mask: As of ``F.scaled_dot_product_attention``, and so on.
        dropout_p: Likewise.
        is_causal: Likewise.
        scale: Likewise.
        enable_gqa: Likewise.
        scales: Tensors by which the logits are also scaled, each after ``"mul"`` or ``"div"``; they
            broadcast to ``[B, H, 1, 1]`` (of queries without heads, to ``[B, 1, 1]``).
        inverted: Whether ``attn_mask``, then boolean, is True where keys are hidden, as in
            ``masked_fill``, and not where they are seen.
    """

    node: Node
    query: Operand
    key: Operand
    value: Operand
    output: Order = ((0,), (1,), (2,), (3,))
    objection: str | None = None
    operator: Node | None = None
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    scales: tuple[tuple[str, Node], ...] = ()
    inverted: bool = False

    @property
    def place(self) -> Node:
        """The node that attends: its arguments are what queries and keys are at this place."""
        return self.operator or self.node

    @property
    def dtype(self) -> torch.dtype:
        """In which it is computed: autocast makes all tensors of an SDPA one dtype."""
        return (value_of(self.node) if self.node.target in SDPA_TARGETS else self.query).dtype

    @property
    def path(self) -> str:
        """Path of the calling module, such as ``blocks.0.attn1``, or else the node's name."""
        return module_path(self.place) or self.place.name


def module_path(node: Node) -> str:
    """Path of the module whose forward makes a node; empty for that of the whole model."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    words = re.findall(r"\w+", str(stack[-1][0])) if stack else []
    return ".".join(word for word in words if word not in _NOT_MODULES)


def find_calls(gm: GraphModule, is_long: Callable[[Any], bool]) -> list[Call]:
    """Every attention call of the graph, in order.

    Calls of ``scaled_dot_product_attention``, arguments positional or by keyword, tensors of two
    dimensions or more; operators of libraries and FlexAttention; and softmaxes between two matrix
    products. A softmax that is almost that is a call with an objection, as is an
    ``nn.MultiheadAttention`` that could not be expanded, a whole ``nn.TransformerEncoderLayer`` and
    an operator that is not known.

    Args:
        gm: The graph.
        is_long: Whether a size may be that of a video: a softmax that is not even almost that is a
            call where its rows and columns are.
    """
    calls, softmaxes = [], set[Node]()
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in SDPA_TARGETS:
            calls.append(_bound(node))
        elif node.op == "call_function" and node.target is MULTI_HEAD:
            calls.append(_multi_head(node))
        elif node.op == "call_function" and node.target is _ENCODER_LAYER:
            calls.append(_encoder_layer(node))
        elif fused := match_operator(gm, node):
            if fused.result is not None:
                calls.append(_fused(fused, fused.result))
        elif written := match_softmax(node):
            softmaxes.add(written.softmax)
            calls.append(_described(written))
    for node in gm.graph.nodes:
        near = None if node in softmaxes else match_near_miss(node)
        if near and is_long(near.query.shape[-2]) and is_long(near.key.shape[-2]):
            calls.append(_described(near))
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    return sorted(calls, key=lambda call: place[call.node])


def _bound(node: Node) -> Call:
    arguments = dict(_SIGNATURE.bind(*node.args, **node.kwargs).arguments)
    query, key, value = (_operand(arguments.pop(name)) for name in ("query", "key", "value"))
    alike = len({value_of(x.node).dim() for x in (query, key, value)}) == 1
    objection = None if alike else "its tensors differ in the number of dimensions"
    return Call(node, query, key, value, query.order, objection, **arguments)


def _multi_head(node: Node) -> Call:
    """One that was not expanded: tensors are ``[L, B, E]`` or ``[L, E]``, their heads inside."""
    arguments = bind_multi_head(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    batched = value_of(query).dim() == 3
    order: Order = ((1,), (), (0,), (2,)) if batched else ((), (), (0,), (1,))
    query, key, value = (Operand(x, order) for x in (query, key, value))
    return Call(node, query, key, value, objection=objection_to_expansion(node))


def _encoder_layer(node: Node) -> Call:
    """A whole layer, ``[B, L, E]``, with its attention inside."""
    arguments: Any = node.args
    tokens = Operand(arguments[0], ((0,), (), (1,), (2,)))
    objection = (
        "nn.TransformerEncoderLayer is one operator here; with"
        " torch.backends.mha.set_fastpath_enabled(False) its attention stands in the graph"
    )
    return Call(node, tokens, tokens, tokens, objection=objection)


def _fused(fused: Fused, result: Node) -> Call:
    return Call(
        node=result,
        query=fused.query,
        key=fused.key,
        value=fused.value,
        output=fused.output,
        objection=fused.objection,
        operator=fused.node,
        attn_mask=fused.attn_mask,
        dropout_p=fused.dropout_p,
        is_causal=fused.is_causal,
        scale=fused.scale,
        enable_gqa=True,  # all of them share keys among heads where there are fewer of them
    )


def _operand(node: Node) -> Operand:
    """``[..., H, L, D]``, ``[B, L, D]`` or ``[L, D]``."""
    *batch, tokens, depth = range(value_of(node).dim())
    heads = batch[1:][-1:]
    batch = batch[: len(batch) - len(heads)]
    return Operand(node, (tuple(batch), tuple(heads), (tokens,), (depth,)))


def _described(written: Written) -> Call:
    return Call(
        node=written.node,
        query=written.query,
        key=written.key,
        value=written.value,
        output=written.output,
        objection=written.objection,
        attn_mask=written.mask,
        scale=written.scale,
        enable_gqa=True,  # products repeat keys of one head for all heads
        scales=written.scales,
        inverted=written.inverted,
    )


# the builtin itself has no signature to bind
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("query", "key", "value")
    ]
    + [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("attn_mask", None),
            ("dropout_p", 0.0),
            ("is_causal", False),
            ("scale", None),
            ("enable_gqa", False),
        )
    ]
)
