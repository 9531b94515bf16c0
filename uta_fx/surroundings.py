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


def with_surroundings(
    config: Config,
    forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Config:
    """Settings for the blocks of a model: with its grid, and its masks trusted where it shows why.

    Traces the model, which takes Dynamo seconds, and computes nothing from the graph on whose
    attention shows a grid.

    Args:
        config: Settings without a grid.
        forward: Of the model, with code that nothing else runs.
        args: Of a call.
        kwargs: Likewise.

    Raises:
        ValueError: The model shows no grid for its blocks, or several.
    """
    sites: list[Site] = []

    def look(gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found = [site for _, site in understand(gm, plan_of(config))]
        sites.extend(site for site in found if site.expected)
        return _stop if any(site.grid for site in sites) else gm.forward

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
