"""See a bmm between views as the product of the tensors whose dimensions the views merge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch.fx import Node

from uta_fx.passes.read_node import argument, is_call, name_of
from uta_fx.passes.read_product import Product
from uta_fx.passes.site import value_of
from uta_fx.passes.trace_axes import Size, same
from uta_fx.passes.walk_upstream import RESHAPES, is_move, moved

# of a dimension the letter of the product, and which part of it; None of one of size 1
_Part: TypeAlias = tuple[str, tuple[int, ...]] | None
_View: TypeAlias = tuple[Node, Sequence[_Part]]

_VIEWS = (*RESHAPES, "unsqueeze", "squeeze")
_COPIES = ("contiguous", "clone")


def unmerge_product(product: Product) -> Product | None:
    """The product of which this is one after views; None where it is none or they do not agree.

    Core ATen has a matmul or an einsum as a bmm: views merge dimensions of both sides into three,
    a view takes those of the output apart, and permutations stand around. A letter must be taken
    apart alike wherever it is. Dimensions of size 1 are no letter's: they become letters by their
    place among those of their tensor, since any are right.
    """
    lefts = list(_above(product.left, product.left_letters))
    rights = list(_above(product.right, product.right_letters))
    _, *outs = _below(product.node, product.out_letters)
    found = [
        (left, right, out)
        for left, right, out in itertools.product(*(x[::-1] for x in (lefts, rights, outs)))
        if _agree(left, right) and _agree(left, out) and _agree(right, out)
    ]
    alike = [x for x in found if len({[*parts].count(None) for _, parts in x}) == 1]
    for left, right, out in (alike or found)[:1]:
        letters = _letters(left), _letters(right), _letters(out)
        since = min(node for node, _ in (*lefts, *rights))
        return Product(out[0], left[0], right[0], *letters, since=since)
    return None


def _above(node: Node, letters: Sequence[str]) -> Iterator[_View]:
    """A side of a product, and what it is a view or a copy of, as far as its letters are known."""
    parts = _whole(node, letters)
    while True:
        yield node, parts
        source = argument(node, 0, "input") if is_call(node) else None
        if not isinstance(source, Node):
            return
        if name_of(node) in (*_VIEWS, *_COPIES):
            found = _taken_apart(parts, value_of(node).shape, value_of(source).shape)
        elif is_move(node):
            found = [parts[place] for place in _places(node)[1]]
        else:
            return
        if found is None:
            return
        node, parts = source, found


def _below(node: Node, letters: Sequence[str]) -> Iterator[_View]:
    """A product, and the views of it that stand for it: each is all that becomes of the last."""
    parts = _whole(node, letters)
    while True:
        yield node, parts
        if len(node.users) != 1:
            return
        (user,) = node.users
        if argument(user, 0, "input") is not node:
            return
        if name_of(user) in _VIEWS:
            found = _taken_apart(parts, value_of(node).shape, value_of(user).shape)
        elif is_move(user):
            found = [parts[dim] for dim in _places(user)[0]]
        else:
            return
        if found is None:
            return
        node, parts = user, found


def _places(move: Node) -> tuple[list[int], list[int]]:
    """Of each dimension after a permutation where it was, and of each before where it is."""
    rank = value_of(move).dim()
    before = [int(dim) for dim in moved([move], [str(dim) for dim in range(rank)])]
    return before, [before.index(dim) for dim in range(rank)]


def _whole(node: Node, letters: Sequence[str]) -> list[_Part]:
    sizes = value_of(node).shape
    return [None if same(n, 1) else (x, ()) for x, n in zip(letters, sizes, strict=True)]


def _taken_apart(
    parts: Sequence[_Part], merged: Sequence[Size], sizes: Sequence[Size]
) -> list[_Part] | None:
    """Parts for the dimensions ``sizes`` that ``merged`` are made of; None where they are not."""
    found: list[_Part] = [None] * len(sizes)
    rest = [dim for dim, size in enumerate(sizes) if not same(size, 1)]
    for part, size in zip(parts, merged, strict=True):
        if part is None:
            continue
        group: list[int] = []
        total: Size = 1
        while not same(total, size):
            if not rest:
                return None
            group.append(rest.pop(0))
            total = total * sizes[group[-1]]
        letter, path = part
        for index, dim in enumerate(group):
            found[dim] = part if len(group) == 1 else (letter, (*path, index))
    return None if rest else found


def _agree(one: _View, other: _View) -> bool:
    """Whether two tensors have the letters that both have in the same parts."""
    a, b = _sizes(one), _sizes(other)
    return all(len(a[x]) == len(b[x]) and all(map(same, a[x], b[x])) for x in a.keys() & b.keys())


def _sizes(view: _View) -> dict[str, list[Size]]:
    """Of each letter the sizes of its parts."""
    node, parts = view
    shape, found = value_of(node).shape, dict[str, list[Size]]()
    for part, size in sorted((x, n) for x, n in zip(parts, shape, strict=True) if x is not None):
        found.setdefault(part[0], []).append(size)
    return found


def _letters(view: _View) -> list[str]:
    """One for each dimension, the parts of a letter numbered."""
    _, parts = view
    known = sorted(x for x in parts if x is not None)
    first = {letter: i for i, (letter, _) in reversed(list(enumerate(known)))}
    ones = itertools.count()
    return [
        f"1.{next(ones)}" if x is None else f"{x[0]}{known.index(x) - first[x[0]]}" for x in parts
    ]
