"""The torch.compile backend: understand the graph, rewrite it, hand it on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from uta_fx.attention import SparseSite, TokenIndex
from uta_fx.config import Config
from uta_fx.passes.order_rules import Place
from uta_fx.passes.reorder_tokens import GatherTokens
from uta_fx.passes.site import Grid, Site
from uta_fx.passes.sparsify import Plan, rewrite, understand
from uta_fx.passes.trace_calls import trace_calls

logger = logging.getLogger(__name__)


def uta(
    gm: GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="uta", options={...})``.

    Args:
        gm: Graph from Dynamo.
        example_inputs: Its inputs.
        options: Fields of ``uta_fx.Config``, and, because torch.compile does not take ``mode`` and
            ``options`` together, ``"mode"`` (of Inductor) and ``"inductor"`` (a dict of Inductor's
            own options).
        mode: As ``options["mode"]``.

    Raises:
        ValueError: An option is unknown or out of range, or ``strict`` and a site stays dense.
        RuntimeError: A gradient is asked for.
    """
    options = dict(options or {})
    mode = options.pop("mode", mode)
    inductor = options.pop("inductor", None)
    config = Config.from_options(options)
    if config.dense_until:
        raise ValueError(
            f"dense_until={config.dense_until} needs uta_fx.enable(pipeline, config): the graph of"
            " one step does not know where in the noise schedule it is"
        )
    sparsify(gm, example_inputs, config)
    trace_calls(gm, SparseSite, share=config.inner == "inductor")
    trace_calls(gm, TokenIndex, share=False)
    # apart, so that Inductor gathers a table once and not in each kernel that reads it
    trace_calls(gm, GatherTokens, share=config.inner == "inductor")
    return _compile(gm, example_inputs, config.inner, mode, inductor)


def sparsify(gm: GraphModule, example_inputs: Sequence[Any], config: Config) -> list[Site]:
    """Rewrite the graph in place and say what was done.

    Raises:
        ValueError: ``strict`` and a video self-attention stays dense.
        RuntimeError: A gradient is asked for.
    """
    plan = plan_of(config)
    pairs = understand(gm, plan)
    sites = [site for _, site in pairs]
    for site in sites:
        logger.info("%s: %s (%s)", site.name, "sparse" if site.sparse else "dense", site.reason)
    refused = [site for site in sites if site.expected and not site.sparse]
    if refused and config.strict:
        raise ValueError(f"strict: {refused[0].name} stays dense: {refused[0].reason}")
    note = note_on_layers(sites, config)
    if note is not None:
        logger.warning(note)
    if any(site.sparse for site in sites):
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
        ):
            raise RuntimeError(
                "backend 'uta' is forward-only and this call records a gradient: run the model"
                " under torch.no_grad() or torch.inference_mode()"
            )
        rewrite(gm, pairs, plan)
    elif refused:
        logger.warning("no attention was rewritten; %s: %s", refused[0].name, refused[0].reason)
    return sites


def plan_of(config: Config) -> Plan:
    """What the passes need to know of a configuration."""

    def index(grid: Grid, place: Place, back: bool) -> TokenIndex:
        return TokenIndex(grid, config.reorder, config.block_kv, *place, back)

    return Plan(
        replacement=lambda grid, scale, video: SparseSite(config, grid, scale, video),
        min_tokens=config.min_tokens,
        needs_grid=config.reorder != "none",
        grid=config.grid,
        is_dense_layer=config.is_dense_layer,
        token_index=None if config.reorder == "none" else index,
    )


def note_on_layers(sites: Sequence[Site], config: Config) -> str | None:
    """A sentence where ``dense_layers`` names layers that the graph of these sites does not have.

    No error: a graph may be one block of a model, or what is left of it where a guidance skips
    layers. None also for a graph without any (``Site.layer`` says what counts as one).
    """
    layers = sum(site.layer is not None for site in sites)
    if layers == 0 or config.dense_layers_fit(layers):
        return None
    return (
        f"dense_layers={config.dense_layers!r} names layers that the graph does not have:"
        f" it has {layers} of self-attention"
    )


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    inner: str,
    mode: str | None,
    inductor: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx  # slow to import: only when compiling

        patches = {**(list_mode_options(mode) if mode else {}), **(inductor or {})}
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
        return compiled
    if mode or inductor:
        raise ValueError(f"options mode and inductor need inner='inductor', got inner={inner!r}")
    try:
        compile_inner: Any = torch._dynamo.lookup_backend(inner)
    except torch._dynamo.exc.InvalidBackend:
        valid = ", ".join(torch._dynamo.list_backends(exclude_tags=()))
        raise ValueError(f"inner must be one of {valid}, got {inner!r}") from None
    return compile_inner(gm, list(example_inputs))
