"""A traced transformer whose attention can change between calls without tracing again."""

from __future__ import annotations

import dataclasses
import functools
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
            replacement=functools.partial(_Attention, self),
            token_index=None,  # each configuration has an order of its own
        )
        pairs = understand(gm, plan)
        rewrite(gm, pairs, plan)
        self.sites = sum(site.sparse for _, site in pairs)
        return gm.forward

    def _settings(self) -> Config | None:
        """What the step that runs now uses; None for dense attention."""
        config = self.config
        if config is None or runs_dense(self._pipeline, config.dense_until):
            return None
        return config


class _Attention:
    """One site: hands its call to the switch."""

    __name__ = "switched_site"  # torch.fx names and prints the target of a node by it

    def __init__(
        self,
        switch: Switch,
        grid: Grid | None,
        scale: float | None,
        video: tuple[int, int] | None,
        alone: bool,
        in_order: bool,
    ) -> None:
        assert not in_order
        self._switch, self._site = switch, (grid, scale, video, alone)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        config = self._switch._settings()
        if config is None:
            shared = key.shape[1] != query.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, scale=self._site[1], enable_gqa=shared
            )
        return SparseSite(config, *self._site)(query, key, value, attn_mask)
