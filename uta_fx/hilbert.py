"""The generalised Hilbert curve: a path through a box of any sides whose steps stay small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Point = tuple[int, int, int]


class Edge(NamedTuple):
    """One edge of a box: which axis it lies along, how many points it has, and its direction."""

    axis: int
    length: int
    sign: int

    def halves(self) -> tuple[Edge, Edge]:
        """Both parts; the first one even where it can be, so that a path ends where it should."""
        first = self.length // 2
        if first % 2 and self.length > 2:
            first += 1
        return self._replace(length=first), self._replace(length=self.length - first)

    def back(self) -> Edge:
        """The same in the other direction."""
        return self._replace(sign=-self.sign)


def curve(sides: Point) -> Iterator[Point]:
    """Visit every point of a box once, near points soon after one another.

    The Hilbert curve in three dimensions, generalised as J. Červený did (``gilbert3d``): a box is
    cut into halves where its sides allow it, in two or in three directions, or along its longest
    side alone, and each part is a box again. Steps go to a neighbour; where a side is odd some go
    diagonally.

    Args:
        sides: Points along each axis, all at least 1. The curve sets out along the longest one;
            among equal ones along the last.
    """
    longest = max(range(3), key=lambda axis: (sides[axis], axis))
    axes = [longest, *(axis for axis in (2, 1, 0) if axis != longest)]
    yield from _walk((0, 0, 0), *(Edge(axis, sides[axis], 1) for axis in axes))


def _walk(corner: Point, a: Edge, b: Edge, c: Edge) -> Iterator[Point]:
    """The path through the box from ``corner`` to the far end of ``a``."""
    if 0 in (a.length, b.length, c.length):
        return
    for edge in (a, b, c):
        if edge.length == a.length * b.length * c.length:  # the other two are 1
            yield from (_ahead(corner, edge, place) for place in range(edge.length))
            return
    (a1, a2), (b1, b2), (c1, c2) = a.halves(), b.halves(), c.halves()
    if 2 * a.length > 3 * b.length and 2 * a.length > 3 * c.length:
        yield from _walk(corner, a1, b, c)
        yield from _walk(_past(corner, a1), a2, b, c)
    elif 3 * b.length > 4 * c.length:
        yield from _walk(corner, b1, c, a1)
        yield from _walk(_past(corner, b1), a, b2, c)
        yield from _walk(_last(_last(corner, a), b1), b1.back(), c, a2.back())
    elif 3 * c.length > 4 * b.length:
        yield from _walk(corner, c1, a1, b)
        yield from _walk(_past(corner, c1), a, b, c2)
        yield from _walk(_last(_last(corner, a), c1), c1.back(), a2.back(), b)
    else:
        yield from _walk(corner, b1, c1, a1)
        yield from _walk(_past(corner, b1), c, a1, b2)
        yield from _walk(_last(_last(corner, b1), c), a, b1.back(), c2.back())
        yield from _walk(_last(_past(_last(corner, a), b1), c), c.back(), a2.back(), b2)
        yield from _walk(_last(_last(corner, a), b1), b1.back(), c1, a2.back())


def _ahead(corner: Point, edge: Edge, places: int) -> Point:
    moved = list(corner)
    moved[edge.axis] += edge.sign * places
    return moved[0], moved[1], moved[2]


def _past(corner: Point, edge: Edge) -> Point:
    """The first point beyond an edge."""
    return _ahead(corner, edge, edge.length)


def _last(corner: Point, edge: Edge) -> Point:
    """The last point of an edge."""
    return _ahead(corner, edge, edge.length - 1)
