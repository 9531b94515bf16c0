"""What a block of a model does not show by itself, read from a trace of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule

from uta_fx.backend import plan_of
from uta_fx.config import Config
from uta_fx.explain import FULL_CAPTURE
from uta_fx.passes.site import Site
from uta_fx.passes.sparsify import understand
from uta_fx.passes.trace_axes import SIDES, Trace


def with_surroundings(
    config: Config,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Config:
    """Settings for the blocks of a model: with its grid, and its masks trusted where it shows why.

    Traces the model, which takes Dynamo seconds, and computes nothing from the graph on whose
    attention shows a grid. Where the model's graph breaks before that, the graphs in front of it
    run, and what tokens they hand on lie as they have put them.

    Args:
        config: Settings without a grid.
        forward: Of the model, with code that nothing else runs.
        args: Of a call.
        kwargs: Likewise.

    Raises:
        ValueError: The model shows no grid for its blocks, or several.
    """
    sites: list[Site] = []
    handed_on: dict[int, tuple[torch.Tensor, Mapping[int, Any]]] = {}

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if id(value) in handed_on:
                node.meta[SIDES] = handed_on[id(value)][1]
        found = [site for _, site in understand(gm, plan_of(config))]
        sites.extend(site for site in found if site.expected)
        if any(site.grid for site in sites):
            return _stop
        trace = Trace(gm)
        nodes: Any = gm.graph.output_node().args[0]

        def run(*arguments: Any) -> Any:
            values = gm.forward(*arguments)
            for node, value in zip(nodes, values, strict=True):
                if isinstance(value, torch.Tensor):  # which is kept: another would get its id
                    handed_on[id(value)] = value, trace.sides_of(node)
            return values

        return run

    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        try:
            torch.compile(forward, backend=look, dynamic=False)(*args, **kwargs)
        except _Seen:
            pass
    videos = [site for site in sites if site.grid]
    grids = {site.grid for site in videos}
    if len(grids) != 1:
        seen = " and ".join(sorted(" x ".join(map(str, site.grid or ())) for site in videos))
        raise ValueError(f"blocks=True needs config.grid: the model shows {seen or 'none'}")
    trusted = config.trust_masks or all(site.sparse for site in videos)
    return dataclasses.replace(config, grid=grids.pop(), trust_masks=trusted)


class _Seen(Exception):
    """A graph has shown what was looked for."""


def _stop(*_: Any) -> NoReturn:
    raise _Seen
