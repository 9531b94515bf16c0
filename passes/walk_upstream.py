"""Walk from weights or logits up to what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.read_node import argument, is_call, name_of, written_by
from uta_fx.passes.site import recorded, value_of
from uta_fx.passes.trace_axes import same

CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "to_copy", "contiguous",
         "clone", "detach")  # fmt: skip
RESHAPES = ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "expand")
_TURNS = ("mT", "T", "t")
_MOVES = ("transpose", "permute", "getattr", *_TURNS, *RESHAPES)
# operations on logits or weights that are looked past to say what keeps a near miss from matching
NEAR = (*CASTS, *_MOVES, "mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clamp",
        "tanh", "expand", "repeat_interleave", "nan_to_num", "neg", "sigmoid", "cat", "squeeze",
        "unsqueeze", "getitem", "slice", "narrow", "normalize", "reciprocal", "pow", "threshold",
        "relu")  # fmt: skip


def uncast(node: Node) -> Node:
    """What a node is a cast of."""
    while name_of(node) in CASTS:
        node = argument(node, 0, "input")
    return node


def constant_of(value: Any) -> float | None:
    """A number, also where a tensor is made of it alone; None for all else."""
    if isinstance(value, (int, float)):
        return value
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "tensor": 0}
    if not isinstance(value, Node) or name_of(value := uncast(value)) not in place:
        return None
    made_of = argument(value, place[name_of(value)], "fill_value")
    return made_of if isinstance(made_of, (int, float)) else None


def is_move(node: Node) -> bool:
    """Whether a node is the same tensor with its dimensions in another order or shape."""
    name = argument(node, 1, "name") if name_of(node) == "getattr" else name_of(node)
    return name in _MOVES and (name not in ("T", "t") or value_of(node).dim() == 2)


def moved(moves: Sequence[Node], letters: Sequence[str]) -> Sequence[str]:
    """Letters of a tensor's dimensions after such moves.

    A view back to a shape that it had has the letters of then; dimensions that another view makes
    have new ones, but for those at the end that it leaves as they are.
    """
    forms: list[tuple[Sequence[Any], Sequence[str]]] = []
    for node in moves:
        before, after = value_of(argument(node, 0, "input")).shape, value_of(node).shape
        if len(before) != len(letters):
            continue
        if name_of(node) in RESHAPES:
            forms.append((before, letters))
            known = [x for shape, x in forms if _are_same(shape, after)]
            letters = known[0] if known else _reshaped(node.name, letters, before, after)
            continue
        forms = []
        dims: Any = list(range(len(letters)))
        if name_of(node) == "permute":
            dims = argument(node, 1, "dims")
            dims = dims if isinstance(dims, (tuple, list)) else node.args[1:]
        else:
            a, b = -2, -1
            if name_of(node) == "transpose":
                a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
            dims[a], dims[b] = dims[b], dims[a]
        letters = [letters[dim] for dim in dims]
    return letters


def _are_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _reshaped(
    name: str, letters: Sequence[str], before: Sequence[Any], after: Sequence[Any]
) -> list[str]:
    kept = 0
    while kept < min(len(before), len(after)) and same(before[-1 - kept], after[-1 - kept]):
        kept += 1
    new = [f"{name}.{dim}" for dim in range(len(after) - kept)]
    return [*new, *letters[len(letters) - kept :]]


def up(
    node: Node,
    is_end: Callable[[Node], bool],
    objections: list[str],
    what: str,
    moves: list[Node],
) -> Node | None:
    """The nearest such node upstream, along the tensor that leads to one.

    Anything but a cast, dropout that is off, or a move (put in front of ``moves``) on the way is an
    objection. Where several that lead to one are joined, there is none.
    """
    for _ in range(12):
        if not is_call(node):
            return None
        if is_end(node):
            return node
        name = name_of(node)
        if name not in NEAR:
            return None
        if is_move(node):
            moves.insert(0, node)
        elif name == "dropout":
            if argument(node, 1, "p", 0.5) and argument(node, 2, "training", True):
                objections.append("it has dropout")
        elif name not in CASTS and not _clears_hidden_rows(node):
            objections.append(f"{name} changes {what}")
        tensors = [x for x in node.all_input_nodes if isinstance(recorded(x), torch.Tensor)]
        joined = name == "cat" and sum(leads_to(x, is_end) for x in tensors) > 1
        if not tensors or joined:
            return None
        # a mask may come first: mask + logits
        node = max(tensors[:3], key=lambda x: leads_to(x, is_end))
    return None


def _clears_hidden_rows(node: Node) -> bool:
    """Whether weights become zero in rows whose logits are all -inf, and are else a softmax's.

    In core ATen that is a part of ``scaled_dot_product_attention``.
    """
    if name_of(node) != "where":
        return False
    condition: Any
    weights: Any
    condition, zeros, weights = node.args
    if not is_call(weights) or name_of(weights) != "softmax" or constant_of(zeros) != 0:
        return False
    logits, dim = uncast(argument(weights, 0, "input")), argument(weights, 1, "dim")
    names, steps = list[str](), dict[str, Node]()
    while is_call(condition) and uncast(condition) is not logits:
        names.append(name_of(condition))
        steps[names[-1]] = condition
        condition = argument(condition, 0, "input")
    if names not in (["logical_not", "any", "logical_not", "eq"], ["all", "eq"]):
        return False
    over = steps.get("any") or steps["all"]
    return (
        argument(steps["eq"], 1, "other") == -torch.inf
        and argument(over, 1, "dim") in (dim, [dim])
        and argument(over, 2, "keepdim", False)
    )


def leads_to(node: Node, is_end: Callable[[Node], bool], depth: int = 6) -> bool:
    """Whether such a node is upstream along casts, scales, sums and the like."""
    if not is_call(node):
        return False
    if is_end(node):
        return True
    inputs = node.all_input_nodes[:3] if depth and name_of(node) in NEAR else []
    return any(leads_to(x, is_end, depth - 1) for x in inputs)


def leads_to_node(node: Any, target: Node) -> bool:
    """Whether ``target`` is upstream in this way, of a node or what else an argument may be."""
    stack = [node]
    for _ in range(16):
        if not stack:
            return False
        current = stack.pop()
        if current is target:
            return True
        if isinstance(current, Node) and current.op != "placeholder":
            if name_of(current) in NEAR:
                stack.extend(current.all_input_nodes[:3])
    return False


def is_used(node: Node, depth: int = 8) -> bool:
    """Whether a node's value reaches the output or is written to, as far as one can see."""
    if node.op == "output" or written_by(node) or not depth:
        return True
    return any(is_used(user, depth - 1) for user in node.users)
