"""Say what the backend would do to a model, and why."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Interpreter, Node

from uta_fx import dump
from uta_fx.backend import note_on_layers, objection_to_layers, plan_of
from uta_fx.config import Config
from uta_fx.flops import dense_flops, model_counter, sparse_cost
from uta_fx.passes.find_calls import Call, module_path
from uta_fx.passes.match_operators import FLEX
from uta_fx.passes.site import Cost, Site, sizes_of
from uta_fx.passes.sparsify import rewrite, understand

# what fullgraph=True switches on
FULL_CAPTURE = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every attention call of a model with the decision about it; prints as a table.

    Operations are counted as ``torch.utils.flop_counter`` counts them (matrix products,
    convolutions, attention; a multiply-add is two). They are not time: a kernel may reach more or
    less of the machine's peak than dense attention does, and gathers and softmax cost time too.

    Attributes:
        sites: In the order of execution.
        graphs: Into how many graphs the model breaks.
        notes: What is odd about the configuration, a sentence each.
        module_flops: Of the dense model, by path of the module whose forward makes them (those of
            its children not included, "" is the model itself); None where nobody counted.
        traced: The graphs themselves, for ``dump``.
    """

    sites: tuple[Site, ...]
    graphs: int
    notes: tuple[str, ...] = ()
    module_flops: Mapping[str, int] | None = None
    traced: tuple[CountedGraph, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def flops(self) -> int | None:
        """Of the whole dense model; None where nobody counted."""
        return None if self.module_flops is None else sum(self.module_flops.values())

    @property
    def attention_flops(self) -> int:
        """Of all attention of the dense model, cross-attention and short texts included."""
        return sum(site.count * cost.dense for site, cost in self._costs())

    @property
    def attention_share(self) -> float | None:
        """Of attention in the operations of the dense model; None where nobody counted."""
        flops = self.flops
        return self.attention_flops / flops if flops else None

    @property
    def sparse_share(self) -> float | None:
        """Of the attention's operations, those that become sparse; None without attention.

        Text queries, and text keys of video queries, count as attention that stays dense.
        """
        sparsified = sum(site.count * cost.sparsified for site, cost in self._costs())
        return sparsified / self.attention_flops if self.attention_flops else None

    @property
    def ideal_speedup(self) -> float | None:
        """Operations of the dense model over those of the sparse one; None where nobody counted.

        What the model would gain if every operation took the same time.
        """
        flops = self.flops
        if not flops:
            return None
        saved = sum(site.count * (cost.dense - cost.decided) for site, cost in self._costs())
        return flops / (flops - saved)

    def share(self, site: Site) -> float | None:
        """Of a site, all its calls together, in the operations of the dense model."""
        flops = self.flops
        return site.count * site.cost.dense / flops if site.cost and flops else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts: ready for ``json.dumps``.

        A site's ``flops`` are those of one call; ``share`` is that of all its calls.
        """
        return {
            "graphs": self.graphs,
            "notes": list(self.notes),
            "flops": self.flops,
            "attention_flops": self.attention_flops,
            "attention_share": self.attention_share,
            "sparse_share": self.sparse_share,
            "ideal_speedup": self.ideal_speedup,
            "sites": [
                dataclasses.asdict(site)
                | {"dtype": str(site.dtype).removeprefix("torch."), "share": self.share(site)}
                for site in self.sites
            ],
        }

    def dump(self, folder: str | Path) -> list[Path]:
        """Write each graph as the backend would rewrite it: code to read, and a picture.

        Args:
            folder: Gets ``graph_0.py``, an operation a line with its shape, and ``graph_0.dot`` for
                Graphviz (``dot -Tsvg``), and so on; made if it is not there.

        Returns:
            The files.
        """
        paths: list[Path] = []
        for number, graph in enumerate(self.traced):
            paths += dump.write(Path(folder), f"graph_{number}", *graph.rewritten())
        return paths

    def __str__(self) -> str:
        header: tuple[str, ...] = (
            "site", "calls", "layer", "kind", "B, H, L, D", "keys", "grid", "text", "TFLOPs a call",
            "of model", "decision", "TFLOPs then", "tokens reordered", "reason",
        )  # fmt: skip
        rows = [self._row(site) for site in self.sites]
        empty = {"calls"} if all(site.count == 1 for site in self.sites) else set()
        if all(site.layer is None for site in self.sites):
            empty |= {"layer"}
        if all(site.cost is None for site in self.sites):
            empty |= {"TFLOPs a call", "of model", "TFLOPs then"}
        if all(site.reordered is None for site in self.sites):
            empty |= {"tokens reordered"}
        kept = [index for index, name in enumerate(header) if name not in empty]
        header, rows = (
            tuple(header[index] for index in kept),
            [tuple(row[index] for index in kept) for row in rows],
        )
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        sparse = sum(site.count for site in self.sites if site.sparse)
        total = sum(site.count for site in self.sites)
        plural = "graph" if self.graphs == 1 else "graphs"
        lines.append(f"{sparse} of {total} sites sparse, {self.graphs} {plural}")
        lines += self._totals()
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _row(self, site: Site) -> tuple[str, ...]:
        cost, share = site.cost, self.share(site)
        return (
            site.name,
            str(site.count),
            "-" if site.layer is None else str(site.layer),
            site.kind,
            ", ".join(map(str, site.shape)),
            str(site.length_kv),
            " x ".join(map(str, site.grid)) if site.grid else "-",
            " + video + ".join(map(str, site.text)) if site.text else "-",
            _tera(cost.dense) if cost else "-",
            "-" if share is None else f"{share:.1%}",
            "sparse" if site.sparse else "dense",
            _tera(cost.decided) if cost and site.sparse else "-",
            site.reordered or "-",
            site.reason,
        )

    def _totals(self) -> list[str]:
        if not self.flops or self.sparse_share is None:
            return []
        return [
            f"{_tera(self.flops)} TFLOPs in the dense model, {self.attention_share:.1%} of them"
            f" attention; {self.sparse_share:.1%} of the attention's become sparse",
            f"{self.ideal_speedup:.2f}x fewer operations: what the model would gain if all of them"
            " took the same time (FLOPs, not time)",
        ]

    def _costs(self) -> Iterable[tuple[Site, Cost]]:
        return ((site, site.cost) for site in self.sites if site.cost)


def explain(
    model: torch.nn.Module, *args: Any, config: Config | None = None, **kwargs: Any
) -> Explanation:
    """Trace a model and report every attention call; nothing is rewritten.

    The model runs once, dense, on the given inputs (tensors on the ``meta`` device cost nothing).
    It is traced as ``torch.compile(model, fullgraph=True)`` traces it, sizes that only a run knows
    included, but may break into several graphs; what runs between them is not counted.

    Args:
        model: Any module, also as ``torch.compile`` returned it.
        *args: Its arguments.
        config: Settings; None for the defaults.
        **kwargs: Its keyword arguments.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config = Config.of(config)
    graphs = run_graphs(getattr(model, "_orig_mod", model), args, kwargs, config)
    notes = [note for graph in graphs for note in graph.notes]
    sites = tuple(site for graph in graphs for site in graph.counted_sites())
    if not graphs:
        notes.append(
            "nothing of the model was traced: it was compiled in place or scripted before, or it"
            " keeps itself from torch.compile; pass it as it was before"
        )
    elif not sites:
        where = " outside of these" if notes else ""
        notes.append(f"the model has no attention{where}: there is nothing to make sparse")
    return Explanation(
        sites=sites,
        graphs=len(graphs),
        notes=tuple(dict.fromkeys(notes)),  # each once
        module_flops=sum((graph.flops for graph in graphs), Counter()),
        traced=tuple(graphs),
    )


class CountedGraph:
    """A traced graph with its sites; counts operations whenever it runs.

    Attributes:
        sites: Calls and what was decided about them.
        runs: How often it ran.
        flops: Operations by path of the module that makes them, of all runs together.
    """

    def __init__(self, gm: GraphModule, config: Config) -> None:
        self.sites = understand(gm, plan_of(config))
        self.runs = 0
        self.flops: Counter[str] = Counter()
        self._gm, self._config = gm, config
        self._shapes: dict[Node, Sequence[int]] = {
            x.node: () for call, _ in self.sites for x in (call.query, call.key, call.value)
        }
        self._operators = {call.operator: call for call, _ in self.sites if call.operator}

    @property
    def notes(self) -> list[str]:
        """What is odd about the configuration or the count, a sentence each."""
        sites = [site for _, site in self.sites]
        layers = objection_to_layers(sites, self._config) or note_on_layers(sites, self._config)
        targets = (node.target for node in self._gm.graph.nodes)
        left_out = {x.name() for x in targets if isinstance(x, HigherOrderOperator)} - {FLEX}
        count = [f"operations inside {name} are not counted" for name in sorted(left_out)]
        return ([layers] if layers else []) + count

    def __call__(self, *args: Any) -> Any:
        """Run it dense."""
        self.runs += 1
        return _Counting(self._gm, self._shapes, self._operators, self.flops).run(*args)

    def rewritten(self) -> tuple[GraphModule, list[Node]]:
        """A copy with sparse attention in it, and its attention that stays dense."""
        plan, gm = plan_of(self._config), copy.deepcopy(self._gm)
        pairs = understand(gm, plan)
        rewrite(gm, pairs, plan)
        return gm, [call.place for call, site in pairs if not site.sparse]

    def counted_sites(self) -> list[Site]:
        """The sites with what they cost, and how many calls they stand for."""
        return [
            dataclasses.replace(site, count=self.runs, cost=self._cost(call, site))
            for call, site in self.sites
        ]

    def _cost(self, call: Call, site: Site) -> Cost | None:
        """By the sizes of the last run, which knows them all."""
        shapes = _shapes_of(call, self._shapes)
        if shapes is None:
            return None
        query, key, value = shapes
        if site.sparse:
            tokens = math.prod(site.grid) if site.grid else query[2]
            return sparse_cost(query, key, value[3], site.dtype, tokens, site.grid, self._config)
        dense = dense_flops(query, key, value[3])
        return Cost(dense, dense, {})


def _shapes_of(
    call: Call, sizes: Mapping[Node, Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """``[B, H, L, D]`` of queries, keys and values in a run; None where they are not of four."""
    query, key, value = (
        sizes_of(sizes[x.node], x.order) for x in (call.query, call.key, call.value)
    )
    return (query, key, value) if len(query) == len(key) == len(value) == 4 else None


def run_graphs(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: Config
) -> list[CountedGraph]:
    """Trace a model, run it once and return its graphs; as ``explain`` does."""
    graphs: list[CountedGraph] = []

    def record(gm: GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(CountedGraph(gm, config))
        return graphs[-1]

    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        torch.compile(model, backend=record, dynamic=False)(*args, **kwargs)
    return graphs


class _Counting(Interpreter):
    """Runs a graph, notes sizes of some nodes and counts the operations of each module.

    Attention that is one operator is counted by its shapes: torch's counter does not know those of
    libraries. Other operators that take functions run uncounted: it refuses them.
    """

    def __init__(
        self,
        gm: GraphModule,
        shapes: dict[Node, Sequence[int]],
        operators: Mapping[Node, Call],
        flops: Counter[str],
    ) -> None:
        super().__init__(gm)
        self._shapes, self._operators, self._flops = shapes, operators, flops

    def run_node(self, n: Node) -> Any:
        if n in self._operators:
            result = super().run_node(n)
            if shapes := _shapes_of(self._operators[n], self._shapes):
                query, key, value = shapes
                self._flops[module_path(n)] += dense_flops(query, key, value[3])
            return result
        if isinstance(n.target, HigherOrderOperator):
            return super().run_node(n)
        with model_counter() as counter:
            result = super().run_node(n)
        self._flops[module_path(n)] += counter.get_total_flops()
        if n in self._shapes:
            self._shapes[n] = result.shape
        return result


def _tera(flops: int) -> str:
    """``6.594``, or in three digits where it is less than a thousandth."""
    return f"{flops / 1e12:.3f}" if flops >= 1e9 else f"{flops / 1e12:.2g}"
