"""Read what lies between a product of queries and keys and a softmax: scale, mask and moves."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.read_mask import HIDING, chosen
from uta_fx.passes.read_node import argument, name_of
from uta_fx.passes.read_product import Product
from uta_fx.passes.site import recorded, value_of
from uta_fx.passes.trace_axes import same
from uta_fx.passes.walk_upstream import CASTS, constant_of, is_move, leads_to_node


def read_logits(
    node: Node, product: Product, base: float, dim: int, objections: list[str]
) -> tuple[float, list[tuple[str, Node]], Node | None, bool, list[Node]]:
    """What lies between the product and the softmax.

    What is subtracted and the same for all keys, such as the largest logit, changes no softmax.

    Args:
        node: The logits, as the softmax takes them.
        product: Of queries and keys.
        base: A factor besides.
        dim: Over which dimension the softmax is, from the end.
        objections: Gets what is more than this.

    Returns:
        The factors, numbers (all in one) and tensors; what is added, or where logits are filled;
        whether that is True where keys are hidden, not where they are seen; and what moves
        dimensions, in the order of the graph.
    """
    scale, scales, mask, inverted = 1.0, list[tuple[str, Node]](), None, False
    moves = list[Node]()
    while node is not product.node:
        name = name_of(node)
        if name in CASTS or name == "neg" or is_move(node):
            if name == "neg":
                scale = -scale
            elif name not in CASTS:
                moves.insert(0, node)
            node = argument(node, 0, "input")
            continue
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if name in ("mul", "div", "add") and not leads_to_node(a, product.node):
            if name == "div":
                objections.append("its logits are divided into something")
                break
            a, b = b, a
        if name in ("mul", "div"):
            if isinstance(b, (int, float)):
                scale = scale * b if name == "mul" else scale / b
            else:
                objection = _objection_to_scale(b)
                if objection:
                    objections.append(objection)
                    break
                scales.append((name, b))
        elif (
            name == "add"
            and isinstance(b, Node)
            and mask is None
            and scale == base == 1.0
            and not scales
        ):
            mask, inverted = _added(b)
            if node.kwargs.get("alpha", 1) != 1:
                objections.append("its mask is scaled")
        elif name == "add" and isinstance(b, Node):
            objections.append("its mask is scaled" if mask is None else "it has two masks")
            break
        elif name in ("masked_fill", "where"):
            filled = _filled(node, product.node)
            if filled is None:
                objections.append(f"{name} changes the logits")
                break
            if mask is not None or scales or scale * base <= 0:
                objections.append("its mask is scaled" if mask is None else "it has two masks")
                break
            a, mask, value, inverted = filled
            if not value * scale * base <= HIDING:
                objections.append(f"its logits are filled with {value}, which hides no key")
        elif not (name == "add" and isinstance(b, (int, float))) and not (
            name == "sub"
            and "rsub" not in str(node.target)
            and (_is_same_for_keys(b, dim) if not moves else _is_same_for_keys(b, None))
        ):
            objections.append(f"{name} changes the logits")
            break
        node = a
    if node is product.node and name_of(node) in ("baddbmm", "addmm"):
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        if not isinstance(alpha, (int, float)):
            objections.append("its scale is computed in the graph")
            alpha, beta = 1, 0
        if beta not in (0, 1) or (
            beta == 1 and (mask is not None or not scale == base == 1.0 or scales)
        ):
            objections.append("its mask is scaled")
        elif beta == 1:
            mask = argument(node, 0, "input")
        scale = scale * alpha
    return scale * base, scales, mask, inverted, moves


def _added(mask: Node) -> tuple[Node, bool]:
    """What is added to logits; where it is 0 and -inf by a mask, that, and whether it hides."""
    if name_of(mask) == "where" and mask.op == "call_function":
        condition, *values = chosen(mask)
        numbers = [constant_of(value) for value in values]
        if value_of(condition).dtype == torch.bool and numbers in (
            [0, -torch.inf],
            [-torch.inf, 0],
        ):
            return condition, numbers[0] != 0
    return mask, False


def _filled(node: Node, product: Node) -> tuple[Node, Node, float, bool] | None:
    """Logits, the mask by which they are filled, with what, and whether where it is True."""
    if name_of(node) == "masked_fill":
        logits, mask, value = (argument(node, *x) for x in enumerate(("input", "mask", "value")))
        inverted = True
    else:
        mask, logits, value = (
            argument(node, *x) for x in enumerate(("condition", "input", "other"))
        )
        if node.op == "call_method":
            mask, logits = logits, mask
        inverted = not leads_to_node(logits, product)
        if inverted:
            logits, value = value, logits
    number = constant_of(value)
    if number is None or not isinstance(mask, Node) or not leads_to_node(logits, product):
        return None
    return (logits, mask, number, inverted) if value_of(mask).dtype == torch.bool else None


def _objection_to_scale(scale: Any) -> str | None:
    """Why a factor of the logits cannot be one of the queries, which may be in another order."""
    value = recorded(scale) if isinstance(scale, Node) else None
    if not isinstance(value, torch.Tensor):
        return "its scale is computed in the graph"
    if not all(same(size, 1) for size in value.shape[-2:]):
        return "its scale differs from token to token"
    return None


def _is_same_for_keys(shift: Any, dim: int | None) -> bool:
    """Whether what is subtracted from logits is one number for all keys of a query.

    Args:
        shift: Broadcasts to the logits.
        dim: Where they have keys, from the end; None where that is not known.
    """
    if not isinstance(shift, Node):
        return isinstance(shift, (int, float))
    value = recorded(shift)
    if not isinstance(value, torch.Tensor):
        return False
    if dim is None:
        return all(same(size, 1) for size in value.shape)
    return value.dim() < -dim or same(value.shape[dim], 1)
