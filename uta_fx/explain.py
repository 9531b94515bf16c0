"""Say what the backend would do to a model, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule

from uta_fx.backend import note_on_layers, plan_of
from uta_fx.config import Config
from uta_fx.passes.site import Site
from uta_fx.passes.sparsify import understand

# what fullgraph=True switches on
FULL_CAPTURE = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every attention call of a model with the decision about it; prints as a table.

    Attributes:
        sites: In the order of execution.
        graphs: Into how many graphs the model breaks.
        notes: What is odd about the configuration, a sentence each.
    """

    sites: tuple[Site, ...]
    graphs: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("site", "kind", "B, H, L, D", "keys", "grid", "text", "decision", "reason")
        rows = [
            (
                site.name,
                site.kind,
                ", ".join(map(str, site.shape)),
                str(site.length_kv),
                " x ".join(map(str, site.grid)) if site.grid else "-",
                " + video + ".join(map(str, site.text)) if site.text else "-",
                "sparse" if site.sparse else "dense",
                site.reason,
            )
            for site in self.sites
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        sparse = sum(site.sparse for site in self.sites)
        plural = "graph" if self.graphs == 1 else "graphs"
        lines.append(f"{sparse} of {len(rows)} sites sparse, {self.graphs} {plural}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    model: torch.nn.Module, *args: Any, config: Config | None = None, **kwargs: Any
) -> Explanation:
    """Trace a model and report every attention call; nothing is rewritten.

    The model runs once, dense, on the given inputs (tensors on the ``meta`` device cost nothing).
    It is traced as ``torch.compile(model, fullgraph=True)`` traces it, sizes that only a run knows
    included, but may break into several graphs.

    Args:
        model: Any module, compiled or not.
        *args: Its arguments.
        config: Settings; None for the defaults.
        **kwargs: Its keyword arguments.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config = config or Config()
    graphs: list[list[Site]] = []

    def record(gm: GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append([site for _, site in understand(gm, plan_of(config))])
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        torch.compile(model, backend=record, dynamic=False)(*args, **kwargs)
    notes = filter(None, (note_on_layers(sites, config) for sites in graphs))
    return Explanation(
        sites=tuple(site for sites in graphs for site in sites),
        graphs=len(graphs),
        notes=tuple(dict.fromkeys(notes)),  # each once
    )
