"""Reorder the video's tokens once for a whole graph, where that provably changes nothing else.

Every value of the graph is either as the model has it or holds its video tokens in block order. A
value may hold them in block order if its operation commutes with the permutation
(``order_rules.needs``) and its operands hold them where the operation needs them. Where the two
kinds of values meet, a gather brings one into the other, so that any choice of values is right; the
choice here begins at the sparse sites and goes up and down the graph for as long as operations
commute. What ends it at the top is where frames, rows and columns are flattened into tokens (or an
input of the graph), at the bottom where they are unflattened again; rotary tables and modulation
that runs along the tokens enter at the side, each once.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from uta_fx.kernels.ops import gather_tokens
from uta_fx.passes.find_calls import Call, module_path
from uta_fx.passes.locate_video import expected, tokens_in
from uta_fx.passes.order_rules import (
    Place,
    discards,
    may_alias,
    needs,
    places_from,
)
from uta_fx.passes.read_node import name_of, written_by
from uta_fx.passes.site import Grid, recorded, value_of
from uta_fx.passes.trace_axes import Size, same

TokenIndex = Callable[..., Tensor]
MakeIndex = Callable[[Grid | None, Place, bool], TokenIndex]


@dataclasses.dataclass(frozen=True)
class SparseCall:
    """A call that becomes sparse.

    Attributes:
        call: The call.
        grid: Frames, height and width of its video.
        before: Tokens in front of the video, in the keys.
    """

    call: Call
    grid: Grid
    before: int

    @property
    def output(self) -> Place:
        """Where the video lies in what the call returns."""
        (dim,) = self.call.output[2]
        return Place(dim, self._before_queries)

    @property
    def operands(self) -> dict[Node, Place]:
        """Where it lies in queries, keys and values."""
        return {
            x.node: Place(x.token_dim, self.before) for x in (self.call.key, self.call.value)
        } | {self.call.query.node: Place(self.call.query.token_dim, self._before_queries)}

    @property
    def _before_queries(self) -> int:
        """None where the video alone has queries."""
        alone = same(self.call.query.shape[-2], self.tokens)
        return 0 if alone else self.before

    @property
    def tokens(self) -> Size:
        """Of the video."""
        return tokens_in(self.grid, self.call.key.shape[-2])

    @property
    def size(self) -> int:
        """Elements that are gathered when tokens are reordered around the call alone."""
        tokens = expected(self.tokens)
        sides = (self.call.query, self.call.key, self.call.value, self.call.query)
        return sum(tokens * _product(x.shape[:2] + x.shape[3:]) for x in sides)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Values that a node hands to others in another order.

    Attributes:
        node: Whose value it is.
        undone: Places brought back from block order to the model's.
        done: Places brought into block order.
        users: Who take them.
        written: Whether something writes into the value: then each user gathers when it runs.
    """

    node: Node
    undone: frozenset[Place]
    done: frozenset[Place]
    users: tuple[Node, ...]
    written: bool


@dataclasses.dataclass(frozen=True)
class GatherTokens:
    """What stands in a graph for a gather: a function of a tensor and an index.

    Attributes:
        dim: Of the tensor.
    """

    dim: int
    __name__ = "gather_tokens"  # torch.fx names and prints the target of a node by it

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """As ``torch.index_select``, with dimensions in memory as they were where that is known."""
        if not all(isinstance(stride, int) and stride for stride in x.stride()):
            return x.index_select(self.dim, index)
        return gather_tokens(x, index, self.dim)


@dataclasses.dataclass(frozen=True)
class Region:
    """Part of a graph in which the tokens of one grid are in block order.

    Attributes:
        grid: Frames, height and width.
        calls: Nodes of the sparse calls inside.
        gathers: At its edges.
        reasons: By the node of each sparse call of this grid, where its tokens are reordered.
        stands: By the node of each sparse call, the node that attends: its ``Call.place``.
    """

    grid: Grid
    calls: frozenset[Node]
    gathers: tuple[Gather, ...]
    reasons: Mapping[Node, str]
    stands: Mapping[Node, Node]


def find_regions(gm: GraphModule, sparse: Sequence[SparseCall]) -> list[Region]:
    """Where tokens can be reordered once; changes nothing.

    Args:
        gm: A graph in which the calls still stand as the model wrote them.
        sparse: The calls that will become sparse.
    """
    regions: list[Region] = []
    taken: set[Node] = set()
    for grid in dict.fromkeys(x.grid for x in sparse):
        search = _Search(gm.graph, sparse, grid, taken)
        regions.append(search.region())
        # no value is between two regions: its gathers would be of both
        inside = {node for node, places in search.places.items() if places}
        taken |= inside.union(*(({*node.users, *node.all_input_nodes}) for node in inside))
    return regions


def insert_gathers(
    gm: GraphModule,
    region: Region,
    index: MakeIndex,
    sides: tuple[int | Node, ...] | None = None,
) -> dict[tuple[Node, Node], Node]:
    """Put the gathers of a region into the graph.

    The sparse calls inside must from then on be told that their tokens are in order.

    Args:
        gm: Changed in place.
        region: Of this graph.
        index: Makes a function that gives, for a tensor, the index that brings the grid's tokens at
            a place into block order, or back; for no grid the function takes one too, as ``grid``.
        sides: Of the region's grid, where it is symbolic.

    Returns:
        What a user (of a sparse call, the node that attends) takes from now on in place of a
        node, by the user and the node.
    """
    moved: dict[tuple[Node, Node], Node] = {}
    made: dict[tuple[object, ...], Node] = {}
    # before anything stands between
    following = {gather.node: _next_place(gather.node) for gather in region.gathers}
    for gather in region.gathers:
        users = [region.stands.get(user, user) for user in gather.users]
        if gather.written:
            for user in users:
                with gm.graph.inserting_before(user):
                    moved[user, gather.node] = _gathered(gm.graph, gather, region, index, {}, sides)
        else:
            with gm.graph.inserting_before(following[gather.node]):
                value = _gathered(gm.graph, gather, region, index, made, sides)
            moved.update({(user, gather.node): value for user in users})
    for (user, node), value in moved.items():
        user.replace_input_with(node, value)
    return moved


def _gathered(
    graph: Graph,
    gather: Gather,
    region: Region,
    index: MakeIndex,
    made: dict[tuple[object, ...], Node],
    sides: tuple[int | Node, ...] | None,
) -> Node:
    """The node's value in another order; indices that were made before are used again."""
    node, value = gather.node, value_of(gather.node)
    for places, back in ((gather.undone, True), (gather.done, False)):
        for place in sorted(places):
            length = value.shape[place.dim]
            alike = place.start, str(length), back, value.device
            if alike not in made:
                made[alike] = graph.call_function(
                    index(region.grid if sides is None else None, place, back),
                    (gather.node,),
                    None if sides is None else {"grid": sides},
                )
                made[alike].meta = {
                    key: x for key, x in gather.node.meta.items() if key not in _VALUES
                }
                made[alike].meta[_value_key(gather.node)] = value.new_empty(
                    length, dtype=torch.int64
                )
            node = graph.call_function(GatherTokens(place.dim), (node, made[alike]))
            node.meta = dict(gather.node.meta)  # same shape, dtype and source line
    return node


_VALUES = ("val", "example_value", "tensor_meta")


def _value_key(node: Node) -> str:
    return "val" if "val" in node.meta else "example_value"


def _next_place(node: Node) -> Node:
    """Where what is computed from a node can stand: after it, and after all inputs of the graph."""
    following = node.next
    while following.op == "placeholder" and node.op in ("placeholder", "get_attr"):
        following = following.next
    return following


class _Search:
    """The values of a graph that hold the tokens of one grid in block order."""

    def __init__(
        self, graph: Graph, sparse: Sequence[SparseCall], grid: Grid, banned: Iterable[Node]
    ) -> None:
        self.every = {x.call.node: x for x in sparse}
        self.sparse = {node: x for node, x in self.every.items() if x.grid == grid}
        self.grid = grid
        self.tokens = next(iter(self.sparse.values())).tokens
        self.nodes = list(graph.nodes)
        self.places: dict[Node, set[Place]] = {}
        self.banned = set(banned)
        self._converted: dict[Node, dict[Node, set[Place]]] = {}
        self.reasons: dict[Node, str] = {}
        self._groups = _written_groups(self.nodes)
        self._live = self._reaching_output()

    def region(self) -> Region:
        """Search, and give up what is wrong or does not pay until nothing is."""
        while True:
            self._spread()
            if self._give_up():
                continue
            gathers = self._gathers()
            if not self._give_up_what_does_not_pay(gathers):
                break
        inside = frozenset(node for node in self.sparse if self.places.get(node))
        end = self._in_between(gathers)
        for node in inside:
            self.reasons[node] = f"in parts: {end}" if end else "once"
        stands = {node: x.call.place for node, x in self.every.items()}
        return Region(self.grid, inside, tuple(gathers), dict(self.reasons), stands)

    def operands(self, node: Node) -> list[Node]:
        """What a node takes; of a sparse call that will be queries, keys, values and the mask."""
        if node not in self.every:
            return node.all_input_nodes
        call = self.every[node].call
        mask = [] if call.attn_mask is None else [call.attn_mask]
        return [*dict.fromkeys([call.query.node, call.key.node, call.value.node, *mask])]

    def needs(self, node: Node, place: Place) -> Mapping[Node, Place] | None:
        """As ``order_rules.needs``; a sparse call needs its tokens in order."""
        if node in self.every:
            call = self.sparse.get(node)
            return call.operands if call is not None and place == call.output else None
        return needs(node, place, self.tokens)

    def _reaching_output(self) -> set[Node]:
        stack = [x for x in self.nodes if x.op == "output" or written_by(x)]
        live: set[Node] = set()
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(self.operands(node))
        return live

    def _users(self, node: Node) -> Iterable[Node]:
        return (user for user in node.users if user in self._live and node in self.operands(user))

    def _spread(self) -> None:
        """From the sparse calls along every operation that commutes."""
        self.places, self._converted = {}, {}
        stack: list[tuple[Node, Place]] = []

        def add(node: Node, place: Place) -> None:
            known = self.places.get(node, set())
            if place not in known and node not in self.banned and node in self._live:
                if self.needs(node, place) is not None:
                    self.places.setdefault(node, set()).add(place)
                    stack.append((node, place))

        for call in self.sparse.values():
            add(call.call.node, call.output)
        while stack:
            node, place = stack.pop()
            for operand, needed in (self.needs(node, place) or {}).items():
                add(operand, needed)
            for user in self._users(node):
                if user not in self.every:
                    for found in places_from(user, node, place, self.tokens):
                        add(user, found)

    def wanted(self, node: Node) -> dict[Node, set[Place]]:
        """Which places of its operands a node takes in block order."""
        found: dict[Node, set[Place]] = {x: set() for x in self.operands(node)}
        for place in self.places.get(node, ()):
            for operand, needed in (self.needs(node, place) or {}).items():
                found[operand].add(needed)
        return found

    def conversions(self, node: Node) -> dict[Node, set[Place]]:
        """The operands whose order is not the one that a node takes, and what it takes."""
        if node not in self._converted:
            self._converted[node] = self._conversions(node)
        return self._converted[node]

    def _conversions(self, node: Node) -> dict[Node, set[Place]]:
        wanted = self.wanted(node)
        held = {x: self.places.get(x, set()) for x in wanted}
        if not any(held.values()) and not any(wanted.values()):
            return {}
        converted = {x for x in wanted if wanted[x] - held[x]}
        while True:
            taken = {x: wanted[x] if x in converted else held[x] for x in wanted}
            wrong = {
                x
                for x in wanted
                for place in taken[x] - wanted[x]
                if node in self.every
                or not discards(node, x, place, self.tokens, lambda y: taken.get(y, set()))  # noqa: B023
            }
            if not wrong:
                return {x: wanted[x] for x in wanted if x in converted}
            converted |= wrong

    def _give_up(self) -> bool:
        """Ban what cannot hold tokens in block order after all; whether there was any."""
        banned = set()
        for node in self.sparse:
            if node in self.reasons:
                continue
            wrong = self.conversions(node) if self.places.get(node) else {node: set()}
            if wrong:
                banned.add(node)
                self.reasons[node] = f"here: {_because(min(wrong, key=self.nodes.index))}"
        for node in self._live:
            for operand, wanted in self.conversions(node).items():
                # several outputs in one value cannot be gathered, nor tokens merged with others
                changed = wanted ^ self.places.get(operand, set())
                merged = any(place.merged for place in changed)
                if merged or not isinstance(recorded(operand), torch.Tensor):
                    banned |= {operand, node}
        for group in self._groups:
            if any(self.places.get(node) for node in group) and not self._is_uniform(group):
                banned |= group
        banned -= self.banned
        self.banned |= banned
        return bool(banned)

    def _is_uniform(self, group: set[Node]) -> bool:
        """Whether all that share memory that is written to agree, so that no gather parts them."""
        return not any(
            source in group and source in self.conversions(node)
            for node in group
            for source in may_alias(node)
        )

    def _gathers(self) -> list[Gather]:
        """In the order of their nodes."""
        written: set[Node] = set().union(*self._groups)
        users: dict[tuple[Node, frozenset[Place]], list[Node]] = {}
        for node in self.nodes:
            if node in self._live:
                for operand, wanted in self.conversions(node).items():
                    users.setdefault((operand, frozenset(wanted)), []).append(node)
        order = {node: i for i, node in enumerate(self.nodes)}
        found = []
        for (node, places), who in sorted(users.items(), key=lambda item: order[item[0][0]]):
            held = frozenset(self.places.get(node, ()))
            found.append(Gather(node, held - places, places - held, tuple(who), node in written))
        return found

    def _give_up_what_does_not_pay(self, gathers: Sequence[Gather]) -> bool:
        """Ban each connected part that gathers more than its calls would alone."""
        parts = _Parts(self.places)
        for node, places in self.places.items():
            for operand in self.wanted(node) if places else ():
                if self.places.get(operand) and operand not in self.conversions(node):
                    parts.join(node, operand)
        cost: Counter[Node] = Counter()
        edges: dict[Node, list[Gather]] = {}
        for gather in gathers:
            part = parts.of(gather.node if self.places.get(gather.node) else gather.users[0])
            edges.setdefault(part, []).append(gather)
            times = len(gather.users) if gather.written else 1
            for place in (*gather.undone, *gather.done):
                cost[part] += times * self._elements(gather.node, place)
        saved: Counter[Node] = Counter()
        for node, call in self.sparse.items():
            if self.places.get(node):
                saved[parts.of(node)] += call.size
        losing = {part for part in map(parts.of, self.places) if cost[part] > saved[part]}
        if not losing:
            return False
        for node in self.sparse:
            if self.places.get(node) and parts.of(node) in losing:
                end = self._in_between(edges[parts.of(node)])
                self.reasons[node] = f"here: {end}" if end else _MORE_ONCE
        self.banned |= {node for node in self.places if parts.of(node) in losing}
        return True

    def _elements(self, node: Node, place: Place) -> int:
        """How many are gathered; a length that only a run knows counts as that of the video."""
        sizes: list[Size] = list(value_of(node).shape)
        if not isinstance(sizes[place.dim], int):
            sizes[place.dim] = expected(self.tokens)
        return _product(sizes)

    def _in_between(self, gathers: Sequence[Gather]) -> str | None:
        """What brings tokens out of block order before they are brought into it again, or None."""
        below: set[Node] = set()
        for node in self.nodes:
            if self.places.get(node) or any(x in below for x in self.operands(node)):
                below.add(node)
        above: set[Node] = set()
        stack = [x.node for x in gathers if x.done and x.node in below]
        while stack:
            node = stack.pop()
            if node not in above:
                above.add(node)
                stack.extend(self.operands(node))
                stack.extend(user for user in node.users if node in written_by(user))
        ends = [user for x in gathers if x.undone for user in x.users if user in above]
        # a call that reorders its own tokens has a reason, which is the one to name
        ends.sort(key=lambda node: node in self.every)
        return _because(ends[0]) if ends else None


_MORE_ONCE = "here: there is more that runs along the tokens than queries, keys and values"


class _Parts:
    """Disjoint sets of nodes."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._above = {node: node for node in nodes}

    def of(self, node: Node) -> Node:
        """A node that stands for all of its set."""
        while self._above.setdefault(node, node) is not node:
            self._above[node] = node = self._above[self._above[node]]
        return node

    def join(self, a: Node, b: Node) -> None:
        """Make one set of two."""
        self._above[self.of(a)] = self.of(b)


def _written_groups(nodes: Sequence[Node]) -> list[set[Node]]:
    """Values that may share memory into which something writes, with what writes."""
    parts = _Parts(nodes)
    written: list[Node] = []
    for node in nodes:
        for source in may_alias(node):
            parts.join(node, source)
        written += written_by(node)
    groups: dict[Node, set[Node]] = {parts.of(node): set() for node in written}
    for node in nodes:
        if parts.of(node) in groups:
            groups[parts.of(node)].add(node)
    return list(groups.values())


def _because(node: Node) -> str:
    path = module_path(node)
    return f"{name_of(node)}{f' in {path}' if path else ''} needs the model's order"


def _product(sizes: Iterable[Size]) -> int:
    """Of those that are known before the graph runs."""
    return math.prod(size for size in sizes if isinstance(size, int))
