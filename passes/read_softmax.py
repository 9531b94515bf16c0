"""Read a softmax, also where it is spelled out as exponentials and their sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.read_node import argument, equation_of, name_of
from uta_fx.passes.site import recorded
from uta_fx.passes.walk_upstream import CASTS, is_used, uncast

_SOFTMAXES = ("softmax", "softmin")


def is_softmax(node: Node) -> bool:
    """Whether a node is a softmax, exponentials divided by their sum, or exponentials alone."""
    name = name_of(node)
    return name in _SOFTMAXES or exponent_of(node) is not None or _divided(node) is not None


def read_softmax(node: Node, objections: list[str]) -> tuple[Node, int, float]:
    """Of what a node is the softmax, over which dimension, and what multiplies it in base e.

    One of ``softmax(x)``, ``exp(log_softmax(x))``, ``exp(x - logsumexp(x))`` and
    ``exp(x) / exp(x).sum()``; from the last, ``read_logits`` takes what is subtracted from x.
    There another base may stand for e.
    """
    if name_of(node) in _SOFTMAXES:
        sign = 1.0 if name_of(node) == "softmax" else -1.0
        return argument(node, 0, "input"), _dimension(node, objections), sign
    if (divided := _divided(node)) is not None:
        exponentials, dim = divided
        logits, base = exponent_of(exponentials) or (exponentials, 1.0)
        return logits, dim, base
    exponent, base = exponent_of(node) or (node, 1.0)
    inner = uncast(exponent)
    if name_of(node) == "exp" and name_of(inner) == "log_softmax":
        return argument(inner, 0, "input"), _dimension(inner, objections), 1.0
    if name_of(node) == "exp" and name_of(inner) == "sub":
        logits = argument(inner, 0, "input")
        reduced = _reduced(argument(inner, 1, "other"), "logsumexp")
        if reduced and uncast(logits) is reduced[0]:
            return logits, reduced[1], 1.0
    objections[:] = ["its weights are not exponentials divided by their sum"]
    return inner, -1, base


def _dimension(softmax: Node, objections: list[str]) -> int:
    dim = argument(softmax, 1, "dim")
    if isinstance(dim, int):
        return dim
    objections.append("its softmax does not say over which dimension it is")
    return -1


def exponent_of(node: Node) -> tuple[Node, float] | None:
    """The tensor by which a node raises a number, and the logarithm of that; else None."""
    name = name_of(node)
    if name in ("exp", "exp2"):
        return argument(node, 0, "input"), 1.0 if name == "exp" else math.log(2)
    if name != "pow":
        return None
    base, exponent = argument(node, 0, "self"), argument(node, 1, "exponent")
    base = node.kwargs.get("input", base)
    number = isinstance(base, (int, float)) and base > 0 and isinstance(exponent, Node)
    return (exponent, math.log(base)) if number else None


def _quotient(node: Node) -> tuple[Any, Any] | None:
    """Dividend and divisor of a node: of ``a / b``, and of ``a * (1 / b)`` in its forms."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    if name_of(node) == "div":
        return a, b
    if name_of(node) != "mul":
        return None
    for one, other in ((a, b), (b, a)):
        inverse = _inverse(other)
        if inverse is not None:
            return one, inverse
    return None


def _inverse(node: Any) -> Node | None:
    """Of what a node is one divided by it."""
    if not isinstance(node, Node):
        return None
    node = uncast(node)
    a, b = argument(node, 0, "input"), argument(node, 1, "exponent")
    if name_of(node) == "reciprocal" or (name_of(node) == "pow" and b == -1):
        return a
    if name_of(node) == "mul" and b == 1:  # 1 / x after export
        return _inverse(a)
    return b if name_of(node) == "div" and a == 1 else None


def divided_product(product: Node, exponentials: Node) -> tuple[Node, int] | None:
    """Where a product of exponentials is divided by their sum, and over which dimension that is."""
    node, name = product, "to"
    while name in CASTS and exponent_of(exponentials) is not None:
        users = [user for user in node.users if is_used(user)]
        if len(users) != 1:
            break
        taken, node, name = node, users[0], name_of(users[0])
        quotient = _quotient(node)
        if quotient is not None and quotient[0] is taken:
            reduced = _reduced(quotient[1], "sum")
            return (node, reduced[1]) if reduced and reduced[0] is exponentials else None
    return None


def _divided(node: Node) -> tuple[Node, int] | None:
    """Exponentials that a node divides by their sum, and the dimension of that; else None."""
    quotient = _quotient(node)
    if quotient is None or not isinstance(quotient[0], Node):
        return None
    exponentials, reduced = uncast(quotient[0]), _reduced(quotient[1], "sum")
    if exponent_of(exponentials) is None or not reduced or reduced[0] is not exponentials:
        return None
    return exponentials, reduced[1]


def _reduced(node: Any, name: str) -> tuple[Node, int] | None:
    """Of what a node is such a reduction, over one dimension that is kept or put back last."""
    value = recorded(node) if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    node, last = uncast(node), value.dim() - 1
    put_back = (name_of(node) == "unsqueeze" and argument(node, 1, "dim") in (-1, last)) or (
        name_of(node) == "getitem" and argument(node, 1, "other") == (Ellipsis, None)
    )
    if put_back:
        node = uncast(argument(node, 0, "input"))
    if name == "sum" and put_back and (summed := _summed_by_einsum(node)) is not None:
        return summed if summed[1] == last else None
    dims = argument(node, 1, "dim")
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    if name_of(node) != name or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    if put_back == argument(node, 2, "keepdim", False) or (put_back and dims[0] not in (-1, last)):
        return None
    return uncast(argument(node, 0, "input")), dims[0]


def _summed_by_einsum(node: Node) -> tuple[Node, int] | None:
    """Of what a node is ``einsum("...x -> ...")``, the sum over one dimension, and over which."""
    if name_of(node) != "einsum":
        return None
    (inputs, *others), output, operands = equation_of(node)
    gone = [dim for dim, letter in enumerate(inputs) if letter not in output]
    kept = "".join(letter for letter in inputs if letter in output)
    if others or len(gone) != 1 or len(set(inputs)) < len(inputs) or kept != output:
        return None
    return uncast(operands[0]), gone[0]
