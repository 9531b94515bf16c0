"""Match attention that is one operator: of a library, of ATen's own kernels, or FlexAttention."""

from __future__ import annotations

import dataclasses
import re
from operator import getitem
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from uta_fx.passes.site import Operand, Order, in_order, recorded

_HEADS_FIRST, _TOKENS_FIRST = in_order(0, 1, 2, 3), in_order(0, 2, 1, 3)
# of three dimensions: tokens of all samples one after another, and heads that are samples too
_PACKED: Order = ((), (1,), (0,), (2,))
_MERGED: Order = ((0,), (), (1,), (2,))

# where [B, H, L, D] are in the tensors of each operator. Sources: flash_attn 2.8 and flash_attn_3
# (flash_attn_interface.py), diffusers 0.42 (attention_dispatch.py), xformers 0.0.34 (ops/fmha),
# torch 2.13
_LAYOUTS = {
    "flash_attn::_flash_attn_forward": _TOKENS_FIRST,
    "flash_attn::_flash_attn_varlen_forward": _TOKENS_FIRST,
    "flash_attn_3::_flash_attn_forward": _TOKENS_FIRST,
    "_diffusers_flash_attn_3::_flash_attn_forward": _TOKENS_FIRST,
    "xformers_flash::flash_fwd": _TOKENS_FIRST,
    "xformers_flash3::flash_fwd": _TOKENS_FIRST,
    "aten::_flash_attention_forward": _TOKENS_FIRST,
    "aten::_efficient_attention_forward": _TOKENS_FIRST,
    "aten::_scaled_dot_product_flash_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _HEADS_FIRST,
    "aten::_scaled_dot_product_efficient_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_cudnn_attention": _HEADS_FIRST,
    "aten::_scaled_dot_product_fused_attention_overrideable": _HEADS_FIRST,
}
# flash-attn of Hugging Face's Hub, which diffusers' backends flash_hub and _flash_3_hub load: a
# build's operators are in a library of the build's own name, as _flash_attn2_9c6dd5d
_OF_THE_HUB = re.compile(r"_\w*flash_attn\w*::_flash_attn_forward")
FLEX = "flex_attention"

# what an argument is, by its name in any of the schemas
_ROLES = {
    "query": "query", "q": "query", "key": "key", "k": "key", "value": "value", "v": "value",
    "scale": "scale", "softmax_scale": "scale",
    "causal": "is_causal", "is_causal": "is_causal",
    "dropout_p": "dropout_p", "p": "dropout_p",
    "attn_mask": "attn_mask", "attn_bias": "attn_mask", "bias": "attn_mask",
}  # fmt: skip
# arguments that do not change the output: how it is computed, what else is returned, and lengths
# that matter beside cumulative ones alone
_HARMLESS = {
    "return_softmax", "return_debug_mask", "compute_log_sumexp", "num_splits", "pack_gqa",
    "deterministic", "sm_margin", "scheduler_metadata", "rotary_interleaved", "use_kvsplit",
    "max_q", "max_k", "max_seqlen_q", "max_seqlen_k",
}  # fmt: skip
# the value with which another argument asks for nothing; None where it is not named here
_NEUTRAL: dict[str, Any] = {
    "window_size_left": -1, "window_size_right": -1, "window_left": -1, "window_right": -1,
    "softcap": 0.0, "attention_chunk": 0, "custom_mask_type": 0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fused:
    """Attention as an operator computes it; fields as of ``Call``.

    Attributes:
        node: The operator's call.
        result: Whose output is the attention's: of several outputs the first; None where nobody
            uses it.
    """

    node: Node
    result: Node | None
    query: Operand
    key: Operand
    value: Operand
    output: Order
    objection: str | None
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None


def match_operator(gm: GraphModule, node: Node) -> Fused | None:
    """The attention that a node computes by itself; None for every other node.

    Operators that are not known, but have attention in their names and take three tensors, are
    returned with an objection: their layout is then a guess that serves a report alone.
    """
    name = operator_name(node)
    if name is None:
        return None
    if name == FLEX:
        return _flex(gm, node)
    if _layout(name):
        return _known(node, name)
    library, _, plain = name.partition("::")
    if library in ("prim", "prims", "uta") or plain.endswith("backward"):
        return None
    return _unknown(node, name) if "attn" in plain or "attention" in plain else None


def operator_name(node: Node) -> str | None:
    """``library::operator`` of a call of an operator, ``flex_attention``; None for other nodes."""
    target = node.target
    if node.op != "call_function":
        return None
    if isinstance(target, HigherOrderOperator):
        return target.name() if target.name() == FLEX else None
    overload = _overload(target)
    return None if overload is None else overload._schema.name


def overloads(target: Any) -> list[OpOverload]:
    """Those of an operator that a node's target may stand for; none where it is no operator."""
    if isinstance(target, OpOverloadPacket):
        # as Dynamo records torch.ops.library.operator
        return [getattr(target, name) for name in target.overloads()]
    return [target] if isinstance(target, OpOverload) else []


def operands_of(node: Node) -> tuple[Node, Node] | None:
    """Query and value of a known operator's call; None for other nodes."""
    name = operator_name(node)
    if name == FLEX:
        arguments: Any = node.args
        return arguments[0], arguments[2]
    if not _layout(name):
        return None
    bound = {_ROLES.get(name, name): value for name, value in _arguments(node).items()}
    return bound["query"], bound["value"]


def _layout(name: str | None) -> Order | None:
    """Where ``[B, H, L, D]`` are in the tensors of a known operator; None for every other."""
    if name is None:
        return None
    return _TOKENS_FIRST if _OF_THE_HUB.fullmatch(name) else _LAYOUTS.get(name)


def _known(node: Node, name: str) -> Fused:
    layout = _layout(name)
    assert layout is not None
    roles: dict[str, Any] = {}
    objection = None
    for argument, value in _arguments(node).items():
        if argument in _ROLES:
            roles[_ROLES[argument]] = value
        elif argument not in _HARMLESS and value not in (None, _NEUTRAL.get(argument)):
            objection = objection or f"{name} has {argument}"
    query, key, value = (_operand(roles.pop(role), layout) for role in ("query", "key", "value"))
    result, other = _results(node)
    objection = objection or (f"another output of {name} is used" if other else None)
    return Fused(node, result, query, key, value, query.order, objection, **roles)


def _flex(gm: GraphModule, node: Node) -> Fused:
    arguments: Any = node.args
    query, key, value, score_mod, block_mask, scale, *_ = arguments
    result, other = _results(node)
    objection = None
    if not _returns_its_first(gm, score_mod):
        objection = "FlexAttention has a score_mod"
    elif not _shows_everything(gm, block_mask):
        objection = "FlexAttention has a block mask"
    elif other:
        objection = "another output of FlexAttention is used"
    q, k, v = (_operand(x, _HEADS_FIRST) for x in (query, key, value))
    return Fused(node, result, q, k, v, _HEADS_FIRST, objection, scale=scale)


def _unknown(node: Node, name: str) -> Fused | None:
    tensors = [
        value
        for value in _arguments(node).values()
        if isinstance(value, Node) and isinstance(recorded(value), torch.Tensor)
    ]
    tensors = [x for x in tensors if recorded(x).dim() >= 3][:3]
    result, _ = _results(node)
    if len(tensors) < 3:
        return None
    *_, first, second, _ = recorded(tensors[0]).shape
    # more tokens than heads
    tokens_first = str(first) != str(second) and _larger((first, second))
    layout = _TOKENS_FIRST if tokens_first else _HEADS_FIRST
    q, k, v = (_operand(x, layout) for x in tensors)
    return Fused(node, result, q, k, v, q.order, f"{name} is not known to be plain attention")


def _larger(pair: Any) -> bool:
    first, second = pair
    return not (isinstance(first, int) and isinstance(second, int)) or first > second


def _operand(node: Node, layout: Order) -> Operand:
    rank = recorded(node).dim()
    if rank == 3:
        return Operand(node, _PACKED if layout is _TOKENS_FIRST else _MERGED)
    return Operand(node, layout if rank == 4 else in_order(*range(rank)))


def _results(node: Node) -> tuple[Node | None, bool]:
    """The node of the first output, and whether anything else of the outputs is used."""
    if isinstance(recorded(node), torch.Tensor):
        return node, False
    used = [user for user in node.users if user.users or user.op == "output"]
    first = [user for user in used if user.target is getitem and user.args[1] == 0]
    return (first[0] if first else None), len(used) > 1


def _overload(target: Any) -> OpOverload | None:
    return next(iter(overloads(target)), None)


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operator's call by their names in its schema, defaults filled in."""
    overload = _overload(node.target)
    assert overload is not None
    bound = {x.name: x.default_value for x in overload._schema.arguments}
    names = [x.name for x in overload._schema.arguments]
    return bound | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _returns_its_first(gm: GraphModule, function: Node) -> bool:
    """Whether a subgraph is the identity of a score."""
    nodes = list(_subgraph(gm, function).graph.nodes)
    return nodes[-1].args[0] in (nodes[0], (nodes[0],), [nodes[0]])


def _shows_everything(gm: GraphModule, block_mask: Any) -> bool:
    """Whether a block mask is the one that stands for none: one block, which is there, no mask.

    It starts with two lengths and the number of key blocks for each query block, and ends with the
    sides of a block and the function that is the mask (``BlockMask.as_tuple`` of torch).
    """
    counts: Any = block_mask[2]
    side_q, side_kv, function = block_mask[-3:]
    if not (isinstance(counts, Node) and _name(counts) == "ones"):
        return False
    if not all(isinstance(side, int) and side >= 1 << 30 for side in (side_q, side_kv)):
        return False
    nodes = list(_subgraph(gm, function).graph.nodes)
    result = nodes[-1].args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return isinstance(result, Node) and _name(result) == "new_ones"


def _name(node: Node) -> str:
    overload = _overload(node.target)
    if overload is not None:
        return overload._schema.name.partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def _subgraph(gm: GraphModule, node: Node) -> GraphModule:
    assert node.op == "get_attr" and isinstance(node.target, str)
    module = gm.get_submodule(node.target)
    assert isinstance(module, GraphModule)
    return module
