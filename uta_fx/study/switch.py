"""A traced transformer whose attention can change between calls without tracing again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from uta_fx.attention import SparseSite
from uta_fx.backend import plan_of
from uta_fx.config import Config
from uta_fx.enable import runs_dense
from uta_fx.order import Grid
from uta_fx.passes.sparsify import rewrite, understand


class Switch:
    """Runs a pipeline's transformer eagerly, its video self-attention as ``config`` says now.

    A study compares a hundred configurations of one model: compiling each would take hours.
    Inside the ``with`` block the transformer is one traced graph whose sites read ``config``.

    Attributes:
        config: Of the sites; None for dense.
        sites: How many sites the graph has.
    """

    def __init__(self, pipeline: Any) -> None:
        self.config: Config | None = None
        self.sites = 0
        self._pipeline = pipeline

    def __enter__(self) -> Switch:
        transformer = self._pipeline.transformer
        transformer.forward = torch.compile(
            transformer.forward, backend=self._capture, fullgraph=True, dynamic=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self._pipeline.transformer.forward

    def _capture(self, gm: GraphModule, _: Sequence[Tensor]) -> Any:
        plan = dataclasses.replace(
            plan_of(Config(min_tokens=1)),
            replacement=lambda grid, scale: _Attention(self, grid, scale),
        )
        pairs = understand(gm, plan)
        rewrite(gm, pairs, plan)
        self.sites = sum(site.sparse for _, site in pairs)
        return gm.forward

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, grid: Grid | None, scale: float | None
    ) -> Tensor:
        config = self.config
        if config is None or runs_dense(self._pipeline.scheduler, config.dense_until):
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
        return SparseSite(config=config, grid=grid, scale=scale)(query, key, value)


class _Attention:
    """One site: hands its call to the switch."""

    __name__ = "switched_site"  # torch.fx names and prints the target of a node by it

    def __init__(self, switch: Switch, grid: Grid | None, scale: float | None) -> None:
        self._switch, self._grid, self._scale = switch, grid, scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._switch._attend(query, key, value, self._grid, self._scale)
