"""Name a softmax that weighs values, but is no attention that ``match_softmax`` finds."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.match_softmax import Written
from uta_fx.passes.read_node import argument, equation_of, is_call, name_of
from uta_fx.passes.read_product import is_product, is_weight
from uta_fx.passes.read_softmax import is_softmax, read_softmax
from uta_fx.passes.site import Operand, recorded, value_of
from uta_fx.passes.walk_upstream import NEAR, leads_to, up

_SUMS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "linear", "inner", "tensordot",
         "sum", "mv", "vecdot", "linalg_vecdot")  # fmt: skip


def match_near_miss(node: Node) -> Written | None:
    """The attention that a softmax may be of, with an objection.

    None for other nodes, and for a softmax by whose result no sum weighs values. Of queries and
    keys nothing is known but the tokens: rows and columns of the logits; of values not even those.
    """
    if not is_call(node) or not isinstance(recorded(node), torch.Tensor):
        return None
    name, objections = name_of(node), list[str]()
    if is_softmax(node) and name not in ("exp", "exp2", "pow"):
        logits, dim, _ = read_softmax(node, objections)
    elif "softmax" in name and name != "log_softmax" and node.all_input_nodes:
        logits, dim = node.all_input_nodes[0], -1
        objections.append(f"{name} is not known to be a plain softmax")
    else:
        return None
    taker, rank, value = _taker(node), value_of(node).dim(), recorded(logits)
    if taker is None or rank < 2 or not isinstance(value, torch.Tensor) or value.dim() != rank:
        return None
    if not leads_to(logits, is_product):
        objections.append(f"its logits come out of {_described(_origin(logits))}")
    elif up(logits, is_product, [], "", []) is None:
        objections.append("its logits are of several products")
    elif not is_product(taker):
        objections.append(f"its weights go into {_described(taker)}")
    objections.append("its products are laid out in a way that is not understood")
    column = dim % rank
    *batch, row = sorted((x for x in range(rank) if x != column), key=lambda x: _size(logits, x))
    query, key = (Operand(logits, (tuple(batch), (), (x,), ())) for x in (row, column))
    objection = f"looks like attention, but {objections[0]}"
    return Written(taker, node, query, key, Operand(node, ()), query.order, objection)


def _taker(weights: Node) -> Node | None:
    """The sum in which weights meet a tensor that the model computes; None where there is none."""
    stack, seen = [(weights, False)], set[Node]()
    while stack:
        node, multiplied = stack.pop()
        for user in node.users:
            name = name_of(user)
            others = [x for x in user.all_input_nodes if x is not node and not is_weight(x)]
            others = [x for x in others if isinstance(recorded(x), torch.Tensor)]
            known = name in _SUMS or "::" in name  # another library's may be one
            if known and (others or (name == "sum" and multiplied)):
                return user
            if name in NEAR and user not in seen:
                seen.add(user)
                stack.append((user, multiplied or (name == "mul" and bool(others))))
    return None


def _origin(logits: Node) -> Node:
    """The nearest node upstream that does more than scale, cast, fill or move logits."""
    node: Any = logits
    while is_call(node) and name_of(node) in NEAR:
        first = argument(node, 0, "input")
        node = first if isinstance(first, Node) else node.all_input_nodes[0]
    return node


def _described(node: Node) -> str:
    if not is_call(node):
        return "an input of the graph"
    if name_of(node) == "einsum" and len(equation_of(node)[2]) > 2:
        return f"an einsum of {len(equation_of(node)[2])} tensors, not of 2"
    return f"{name_of(node)}, which is not known as a product of two tensors"


def _size(node: Node, dim: int) -> float:
    """Of a dimension, for comparisons: the larger of two is the one that only a run knows."""
    size = value_of(node).shape[dim]
    return size if isinstance(size, int) else float("inf")
