"""Match attention that is written out: ``softmax(q @ k.T * scale + mask) @ v`` in all its forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch.fx import Node

from uta_fx.passes.read_logits import read_logits
from uta_fx.passes.read_node import VIEWS, argument, name_of, written_by
from uta_fx.passes.read_product import Product, is_product, read_product
from uta_fx.passes.read_softmax import divided_product, exponent_of, is_softmax, read_softmax
from uta_fx.passes.site import Operand, Order, value_of
from uta_fx.passes.unmerge_product import unmerge_product
from uta_fx.passes.walk_upstream import is_used, leads_to, moved, up


@dataclasses.dataclass(frozen=True)
class Written:
    """Attention as it was found written out; fields as of ``Call``.

    Attributes:
        softmax: That makes its weights.
    """

    node: Node
    softmax: Node
    query: Operand
    key: Operand
    value: Operand
    output: Order
    objection: str | None
    scale: float = 1.0
    scales: tuple[tuple[str, Node], ...] = ()
    mask: Node | None = None
    inverted: bool = False


def match_softmax(node: Node) -> Written | None:
    """The attention whose last product is ``node``; None where it is not attention's last.

    A product of which one side comes, through casts and the like, out of a softmax over the product
    of two other tensors. A softmax may be spelled out as exponentials, and their sum may divide the
    product instead. Where anything but casts, scales, one mask and dropout that is off lies
    between, the result carries the objection. Products are taken as they are, or if that carries
    one, as those before and after the views around them: a mask may be of the latter.
    """
    last = read_product(node)
    if last is None or name_of(node) in ("baddbmm", "addmm"):
        return None
    found = _match(last)
    if found is None or found.objection is None:
        return found
    unmerged = unmerge_product(last)
    return (unmerged and _match(unmerged)) or found


def _match(last: Product) -> Written | None:
    node = last.node
    if not leads_to(last.left, is_softmax):
        last = last.swapped()
    objections, turns = list[str](), list[Node]()
    softmax = up(last.left, is_softmax, objections, "the weights", turns)
    if softmax is None:
        return None
    end, dim = divided_product(node, softmax) or (node, None)
    if dim is None:
        logits, dim, base = read_softmax(softmax, objections)
    else:
        logits, base = exponent_of(softmax) or (softmax, 1.0)
    first_node = up(logits, is_product, [], "", [])
    first = read_product(first_node) if first_node else None
    if first is None:
        return None
    if last.since is not None:
        first = unmerge_product(first) or first
    rank = value_of(softmax).dim()
    dim = dim - rank if dim >= 0 else dim
    scale, scales, mask, inverted, moves = read_logits(logits, first, base, dim, objections)
    factors = [tensor for _, tensor in scales]
    _check_uses(first.node, end, factors, mask, objections)
    masks = [] if mask is None else [mask]
    _check_writes(
        first.since or first.node, end, [first.left, first.right, *factors, *masks], objections
    )
    _check_writes(last.since or node, end, [last.right], objections)
    letters = moved(moves, first.out_letters)
    weights = moved([*moves, *turns], first.out_letters)
    column, layout = letters[-1], None
    if rank == len(letters) and len(weights) == len(last.left_letters):
        column = letters[dim]
        fixed = any(value_of(x).dim() for x in (*masks, *factors))
        # what is divided by the sums of rows has its rows where the weights have them
        apart = end is not node and (weights[-1] != column or turns or not _keeps_rows(last))
        if column not in _renamed(last.right_letters, last, weights):
            objections.append(f"its softmax is over dimension {dim}, which its values do not have")
        elif fixed and moves:
            objections.append("its mask or scale is of logits that are moved, not of its product")
        elif not apart:
            layout = _layout(first, last, weights, column, fixed)
    if layout is None:
        objections.append("its products are laid out in a way that is not understood")
        layout = (*_guess(first, column), _plain(last.right), _plain(last.node).order)
    query, key, value, output = layout
    objection = f"looks like attention, but {objections[0]}" if objections else None
    return Written(
        end, softmax, query, key, value, output, objection, scale, tuple(scales), mask, inverted
    )


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
        if any(user not in inside and is_used(user) for user in node.users):
            objections.append("its logits or weights are used elsewhere too, or written to")
            return
        for written in written_by(node):
            later = (user for alias in _aliases(written) for user in alias.users)
            if any(place.get(user, -1) > place[node] for user in later):
                objections.append("its logits are written to")
                return


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


def _keeps_rows(last: Product) -> bool:
    """Whether a product has its rows where its weights have them, and one dimension of values."""
    return last.out_letters[:-1] == last.left_letters[:-1]


def _layout(
    first: Product, last: Product, weights: Sequence[str], column: str, fixed: bool
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


def _renamed(letters: Sequence[str], last: Product, weights: Sequence[str]) -> list[str]:
    """Letters of the last product in those that its weights have; other letters are new ones."""
    names = dict(zip(last.left_letters, weights, strict=True))
    return [names.get(letter, f"{letter}'") for letter in letters]


def _guess(first: Product, column: str) -> tuple[Operand, Operand]:
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
