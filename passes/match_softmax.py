"""Match attention that is written out: ``softmax(q @ k.T * scale + mask) @ v`` in all its forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from uta_fx.passes.read_mask import HIDING
from uta_fx.passes.site import Operand, Order, recorded, value_of
from uta_fx.passes.trace_axes import VIEWS, argument, equation_of, name_of, same, written_by

_SOFTMAXES = ("softmax", "softmin", "exp", "exp2", "pow")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "to_copy", "contiguous")
_MOVES = ("transpose", "permute", "mT", "getattr")
# operations on logits or weights that are looked past to say what keeps a near miss from matching
_NEAR = (*_CASTS, "mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clamp", "tanh",
         "view", "view_as", "reshape", *_MOVES, "unflatten", "flatten", "expand", "nan_to_num",
         "neg", "softcap", "sigmoid", "unsqueeze", "squeeze", "cat", "getitem", "slice", "narrow",
         "normalize", "reciprocal")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Written:
    """Attention as it was found written out; fields as of ``Call``."""

    node: Node
    query: Operand
    key: Operand
    value: Operand
    output: Order
    scale: float
    scales: tuple[tuple[str, Node], ...]
    mask: Node | None
    inverted: bool
    objection: str | None


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of two tensors, its dimensions in letters as of einsum."""

    node: Node
    left: Node
    right: Node
    left_letters: Sequence[str]
    right_letters: Sequence[str]
    out_letters: Sequence[str]

    def swapped(self) -> _Product:
        """The same with its sides exchanged."""
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            left_letters=self.right_letters,
            right_letters=self.left_letters,
        )


def match_softmax(node: Node) -> Written | None:
    """The attention whose last product is ``node``; None where it is not attention's last.

    A product of which one side comes, through casts and the like, out of a softmax over the product
    of two other tensors. A softmax may be spelled out as exponentials, and their sum may divide the
    product instead. Where anything but casts, scales, one mask and dropout that is off lies
    between, the result carries the objection.
    """
    last = _product(node)
    if last is None or name_of(node) == "baddbmm":
        return None
    if not _leads_to(last.left, _SOFTMAXES):
        last = last.swapped()
    objections, turns = list[str](), list[Node]()
    softmax = _up(last.left, _SOFTMAXES, objections, "the weights", turns)
    if softmax is None:
        return None
    end, dim = _divided_product(node, softmax) or (node, None)
    if dim is None:
        logits, dim, base = _softmax(softmax, objections)
    else:
        logits, base = _exponent(softmax) or (softmax, 1.0)
    first_node = _up(logits, _PRODUCTS, [], "", [])
    first = _product(first_node) if first_node else None
    if first is None:
        return None
    rank = value_of(softmax).dim()
    dim = dim - rank if dim >= 0 else dim
    scale, scales, mask, inverted, moves = _read_logits(logits, first, base, dim, objections)
    factors = [tensor for _, tensor in scales]
    _check_uses(first.node, end, factors, mask, objections)
    masks = [] if mask is None else [mask]
    _check_writes(first.node, end, [first.left, first.right, *factors, *masks], objections)
    _check_writes(node, end, [last.right], objections)
    letters = _moved(moves, first.out_letters)
    weights = _moved(turns, letters)
    column, layout = letters[-1], None
    if rank == len(letters) == len(last.left_letters):
        column = letters[dim]
        fixed = any(value_of(x).dim() for x in (*masks, *factors))
        # what is divided by the sums of rows has its rows where the weights have them
        apart = end is not node and (weights[-1] != column or turns or not _keeps_rows(last))
        if column not in _renamed(last.right_letters, last, weights):
            objections.append(f"its softmax is over dimension {dim}, which its values do not have")
        elif not apart and not (fixed and moves):
            layout = _layout(first, last, weights, column, fixed)
    if layout is None:
        objections.append("its products are laid out in a way that is not understood")
        layout = (*_guess(first, column), _plain(last.right), _plain(last.node).order)
    query, key, value, output = layout
    objection = f"looks like attention, but {objections[0]}" if objections else None
    return Written(end, query, key, value, output, scale, tuple(scales), mask, inverted, objection)


def _softmax(node: Node, objections: list[str]) -> tuple[Node, int, float]:
    """Of what a node is the softmax, over which dimension, and what multiplies it in base e.

    One of ``softmax(x)``, ``exp(log_softmax(x))``, ``exp(x - logsumexp(x))`` and
    ``exp(x) / exp(x).sum()``; from the last, ``_read_logits`` takes what is subtracted from x.
    There another base may stand for e.
    """
    if name_of(node) in ("softmax", "softmin"):
        sign = 1.0 if name_of(node) == "softmax" else -1.0
        return argument(node, 0, "input"), _dimension(node, objections), sign
    if (divided := _divided(node)) is not None:
        exponentials, dim = divided
        logits, base = _exponent(exponentials) or (exponentials, 1.0)
        return logits, dim, base
    exponent, base = _exponent(node) or (node, 1.0)
    inner = _uncast(exponent)
    if name_of(node) == "exp" and name_of(inner) == "log_softmax":
        return argument(inner, 0, "input"), _dimension(inner, objections), 1.0
    if name_of(node) == "exp" and name_of(inner) == "sub":
        logits = argument(inner, 0, "input")
        reduced = _reduced(argument(inner, 1, "other"), "logsumexp")
        if reduced and _uncast(logits) is reduced[0]:
            return logits, reduced[1], 1.0
    objections[:] = ["its weights are not exponentials divided by their sum"]
    return inner, -1, base


def _dimension(softmax: Node, objections: list[str]) -> int:
    dim = argument(softmax, 1, "dim")
    if isinstance(dim, int):
        return dim
    objections.append("its softmax does not say over which dimension it is")
    return -1


def _exponent(node: Node) -> tuple[Node, float] | None:
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
    node = _uncast(node)
    a, b = argument(node, 0, "input"), argument(node, 1, "exponent")
    if name_of(node) == "reciprocal" or (name_of(node) == "pow" and b == -1):
        return a
    if name_of(node) == "mul" and b == 1:  # 1 / x after export
        return _inverse(a)
    return b if name_of(node) == "div" and a == 1 else None


def _divided_product(product: Node, exponentials: Node) -> tuple[Node, int] | None:
    """Where a product of exponentials is divided by their sum, and over which dimension that is."""
    node, name = product, "to"
    while name in _CASTS and _exponent(exponentials) is not None:
        users = [user for user in node.users if _is_used(user)]
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
    exponentials, reduced = _uncast(quotient[0]), _reduced(quotient[1], "sum")
    if _exponent(exponentials) is None or not reduced or reduced[0] is not exponentials:
        return None
    return exponentials, reduced[1]


def _reduced(node: Any, name: str) -> tuple[Node, int] | None:
    """Of what a node is such a reduction, over one dimension that is kept or put back last."""
    value = recorded(node) if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    node, last = _uncast(node), value.dim() - 1
    put_back = (name_of(node) == "unsqueeze" and argument(node, 1, "dim") in (-1, last)) or (
        name_of(node) == "getitem" and argument(node, 1, "other") == (Ellipsis, None)
    )
    if put_back:
        node = _uncast(argument(node, 0, "input"))
    if name == "sum" and put_back and (summed := _summed_by_einsum(node)) is not None:
        return summed if summed[1] == last else None
    dims = argument(node, 1, "dim")
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    if name_of(node) != name or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    if put_back == argument(node, 2, "keepdim", False) or (put_back and dims[0] not in (-1, last)):
        return None
    return _uncast(argument(node, 0, "input")), dims[0]


def _summed_by_einsum(node: Node) -> tuple[Node, int] | None:
    """Of what a node is ``einsum("...x -> ...")``, the sum over one dimension, and over which."""
    if name_of(node) != "einsum":
        return None
    (inputs, *others), output, operands = equation_of(node)
    gone = [dim for dim, letter in enumerate(inputs) if letter not in output]
    kept = "".join(letter for letter in inputs if letter in output)
    if others or len(gone) != 1 or len(set(inputs)) < len(inputs) or kept != output:
        return None
    return _uncast(operands[0]), gone[0]


def _uncast(node: Node) -> Node:
    while name_of(node) in _CASTS:
        node = argument(node, 0, "input")
    return node


def _product(node: Node) -> _Product | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = name_of(node)
    if name in ("matmul", "bmm"):
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        right = node.kwargs.get("mat2", right)
    elif name == "baddbmm":
        left, right = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    elif name == "einsum":
        inputs, out, operands = equation_of(node)
        if len(operands) != 2 or any(len(set(x)) < len(x) for x in (*inputs, out)):
            return None
        (left, right), (left_letters, right_letters) = operands, inputs
        return _Product(node, left, right, left_letters, right_letters, out)
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    rank = value_of(left).dim()
    if not 3 <= rank <= 6 or value_of(right).dim() != rank:
        return None
    batch = "abcd"[: rank - 2]
    return _Product(node, left, right, f"{batch}mn", f"{batch}no", f"{batch}mo")


def _moved(moves: Sequence[Node], letters: Sequence[str]) -> Sequence[str]:
    """Letters of a tensor after such moves, as far as its rank stays what it was."""
    for node in moves:
        if value_of(node).dim() != len(letters):
            continue
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


def _is_move(node: Node) -> bool:
    """Whether a node is the same tensor with its dimensions in another order."""
    name = name_of(node)
    return name in _MOVES and (name != "getattr" or argument(node, 1, "name") == "mT")


def _is_named(node: Node, names: tuple[str, ...]) -> bool:
    name = name_of(node)
    return name in names and (name != "pow" or _exponent(node) is not None)


def _up(
    node: Node, names: tuple[str, ...], objections: list[str], what: str, moves: list[Node]
) -> Node | None:
    """The nearest node of these names upstream, along the first tensor argument.

    Anything but a cast, dropout that is off, or a move (put in front of ``moves``) on the way is an
    objection.
    """
    for _ in range(12):
        if node.op not in ("call_function", "call_method"):
            return None
        name = name_of(node)
        if _is_named(node, names) or ("exp" in names and _divided(node) is not None):
            return node
        if name not in _NEAR:
            return None
        if _is_move(node):
            moves.insert(0, node)
        elif name == "dropout":
            if argument(node, 1, "p", 0.5) and argument(node, 2, "training", True):
                objections.append("it has dropout")
        elif name not in _CASTS:
            objections.append(f"{name} changes {what}")
        tensors = [x for x in node.all_input_nodes if isinstance(recorded(x), torch.Tensor)]
        if not tensors:
            return None
        # a mask may come first: mask + logits
        node = max(tensors[:3], key=lambda x: _leads_to(x, names))
    return None


def _leads_to(node: Node, names: tuple[str, ...], depth: int = 6) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if _is_named(node, names):
        return True
    inputs = node.all_input_nodes[:3] if depth and name_of(node) in _NEAR else []
    return any(_leads_to(x, names, depth - 1) for x in inputs)


def _read_logits(
    node: Node, product: _Product, base: float, dim: int, objections: list[str]
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
        if name in _CASTS or name == "neg" or _is_move(node):
            if name == "neg":
                scale = -scale
            elif name not in _CASTS:
                moves.insert(0, node)
            node = argument(node, 0, "input")
            continue
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if name in ("mul", "div", "add") and not _leads_to_node(a, product.node):
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
            mask = b
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
    if node is product.node and name_of(node) == "baddbmm":
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
        inverted = not _leads_to_node(logits, product)
        if inverted:
            logits, value = value, logits
    number = _number(value)
    if number is None or not isinstance(mask, Node) or not _leads_to_node(logits, product):
        return None
    return (logits, mask, number, inverted) if value_of(mask).dtype == torch.bool else None


def _number(value: Any) -> float | None:
    """A number, also where a tensor is made of it alone."""
    if isinstance(value, (int, float)):
        return value
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "tensor": 0}
    if not isinstance(value, Node) or name_of(value := _uncast(value)) not in place:
        return None
    made_of = argument(value, place[name_of(value)], "fill_value")
    return made_of if isinstance(made_of, (int, float)) else None


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


def _leads_to_node(node: Any, target: Node) -> bool:
    """Whether ``target`` is upstream along casts, scales and sums."""
    stack = [node]
    for _ in range(16):
        if not stack:
            return False
        current = stack.pop()
        if current is target:
            return True
        if isinstance(current, Node) and current.op != "placeholder":
            if name_of(current) in _NEAR:
                stack.extend(current.all_input_nodes[:3])
    return False


def _check_uses(
    first: Node, last: Node, scales: list[Node], mask: Node | None, objections: list[str]
) -> None:
    """Logits and weights must go nowhere else, else nothing is saved, and nobody may change them.

    What is made of the logits on the way to ``last`` may: their largest, their sum.
    """
    stretch = _stretch(first, last)
    inside = {first}
    for node in stretch:
        if not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
    needed = {last}
    for node in reversed(stretch):
        if not needed.isdisjoint(node.users):
            needed.add(node)
    inside &= needed
    if not inside.isdisjoint(scales):
        objections.append("its scale is computed from its logits")
    if mask in inside:
        objections.append("its mask is computed from its logits")
    place = {node: i for i, node in enumerate(stretch)}
    for node in inside - {last}:
        if any(user not in inside and _is_used(user) for user in node.users):
            objections.append("its logits or weights are used elsewhere too, or written to")
            return
        for written in written_by(node):
            later = (user for alias in _aliases(written) for user in alias.users)
            if any(place.get(user, -1) > place[node] for user in later):
                objections.append("its logits are written to")
                return


def _is_used(node: Node, depth: int = 8) -> bool:
    """Whether a node's value reaches the output or is written to, as far as one can see."""
    if node.op == "output" or written_by(node) or not depth:
        return True
    return any(_is_used(user, depth - 1) for user in node.users)


def _check_writes(first: Node, last: Node, operands: list[Node], objections: list[str]) -> None:
    """Queries, keys and scales must still be what they were when the call's place is its end."""
    kept = {alias for operand in operands for alias in _aliases(operand)}
    if any(not kept.isdisjoint(written_by(node)) for node in _stretch(first, last)):
        objections.append("its queries, keys or values are written to before it ends")


def _stretch(first: Node, last: Node) -> list[Node]:
    """The nodes from one to another, in the order of the graph."""
    nodes = [first]
    while nodes[-1] is not last:
        nodes.append(nodes[-1].next)
    return nodes


def _aliases(node: Node) -> set[Node]:
    """Nodes that may share memory with one: what it is a view of, and the views of that."""
    base = node
    while name_of(base) in VIEWS and isinstance(argument(base, 0, "input"), Node):
        base = argument(base, 0, "input")
    found, stack = set[Node](), [base]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(user for user in current.users if name_of(user) in VIEWS)
    return found


def _keeps_rows(last: _Product) -> bool:
    """Whether a product has its rows where its weights have them, and one dimension of values."""
    return last.out_letters[:-1] == last.left_letters[:-1]


def _layout(
    first: _Product, last: _Product, weights: Sequence[str], column: str, fixed: bool
) -> tuple[Operand, Operand, Operand, Order] | None:
    """Where ``[B, H, L, D]`` are in the operands and in the output; None where they are not.

    Args:
        first: The product of queries and keys.
        last: That of weights, left, and values.
        weights: Letters of ``first`` for the dimensions of the weights as ``last`` takes them.
        column: The letter of the keys.
        fixed: Whether a mask or a tensor of scales goes by the order of the dimensions of logits.
    """
    if column not in first.right_letters:
        first = first.swapped()
    left, right, logits = first.left_letters, first.right_letters, first.out_letters
    # of values and of the output, those of their own are new
    value = _renamed(last.right_letters, last, weights)
    output = _renamed(last.out_letters, last, weights)
    shared = [x for x in (logits if fixed else left) if x in left and x in right and x in logits]
    rows = [x for x in logits if x in left and x not in right]
    depth = [x for x in left if x not in logits]
    wide = [x for x in value if x not in weights]
    if not (
        rows
        and depth
        and wide
        and sorted(logits) == sorted([*shared, *rows, column])
        and sorted(right) == sorted([*shared, column, *depth])
        and sorted(value) == sorted([*shared, column, *wide])
        and sorted(output) == sorted([*shared, *rows, *wide])
    ):
        return None
    # heads that share keys and values are letters that these lack
    *groups, row = rows
    batch = shared[: max(1, len(shared) - 1)]
    heads = shared[len(batch) :]
    if fixed and (groups or list(logits) != [*batch, *heads, row, column]):
        return None

    def order(letters: Sequence[str], heads: list[str], tokens: str, width: list[str]) -> Order:
        found = (batch, heads, [tokens], width)
        return tuple(tuple(letters.index(x) for x in group) for group in found)

    return (
        Operand(first.left, order(left, [*heads, *groups], row, depth)),
        Operand(first.right, order(right, heads, column, depth)),
        Operand(last.right, order(value, heads, column, wide)),
        order(output, [*heads, *groups], row, wide),
    )


def _renamed(letters: Sequence[str], last: _Product, weights: Sequence[str]) -> list[str]:
    """Letters of the last product in those that its weights have; other letters are new ones."""
    names = dict(zip(last.left_letters, weights, strict=True))
    return [names.get(letter, f"{letter}'") for letter in letters]


def _guess(first: _Product, column: str) -> tuple[Operand, Operand]:
    """Queries and keys for a report: rows of the logits, and columns."""
    if column not in first.right_letters:
        first = first.swapped()
    rows = [x for x in first.out_letters if x not in first.right_letters]
    if not rows or column not in first.right_letters:
        return _plain(first.left), _plain(first.right)
    found = []
    for node, letters, token in (
        (first.left, first.left_letters, rows[-1]),
        (first.right, first.right_letters, column),
    ):
        place = letters.index(token)
        depth = tuple(x for x, letter in enumerate(letters) if letter not in first.out_letters)
        batch = tuple(x for x in range(len(letters)) if x != place and x not in depth)
        found.append(Operand(node, (batch, (), (place,), depth)))
    return found[0], found[1]


def _plain(node: Node) -> Operand:
    return Operand(node, tuple((dim,) for dim in range(value_of(node).dim())))
