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
from uta_fx.passes.locate_video import has_several_grids
from uta_fx.passes.site import Site
from uta_fx.passes.sparsify import understand
from uta_fx.passes.trace_axes import SIDES, Trace


def with_surroundings(
    config: Config,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Config:
    """Settings for the blocks of a model: what it shows of its grid, and of its masks.

    Masks are trusted where it shows why. Where the video's sequence holds history or other images
    too, which a block does not tell from it, the settings say where in it the video lies.

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
    starts: set[int | str] = set()
    handed_on: dict[int, tuple[torch.Tensor, Mapping[int, Any]]] = {}

    def look(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if id(value) in handed_on:
                node.meta[SIDES] = handed_on[id(value)][1]
        found = understand(gm, plan_of(config))
        sites.extend(site for _, site in found if site.expected)
        trace = Trace(gm)
        if any(site.grid for site in sites):
            starts.update(
                site.text[0] if site.text else 0
                for call, site in found
                if site.expected
                and site.grid
                and has_several_grids(trace, trace.axis(call.key.node, call.key.token_dim))
            )
            return _stop
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
    start = starts.pop() if len(starts) == 1 else None
    start = start if isinstance(start, int) else None
    return dataclasses.replace(config, grid=grids.pop(), video_start=start, trust_masks=trusted)


class _Seen(Exception):
    """A graph has shown what was looked for."""


def _stop(*_: Any) -> NoReturn:
    raise _Seen
