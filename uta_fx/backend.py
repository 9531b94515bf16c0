"""The torch.compile backend: understand the graph, rewrite it, hand it on."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule

from uta_fx.arguments import objection_to_lengths
from uta_fx.attention import ContinuedSite, SparseSite, TokenIndex
from uta_fx.compile_kernels import kernels_compiled_beside
from uta_fx.config import Config
from uta_fx.dump import readable
from uta_fx.layers import (
    BlockByBlock,
    block_around,
    blocks_of,
    check_layers,
    modules_being_called,
    parameters_of,
)
from uta_fx.passes.carry_state import carry_state, with_state
from uta_fx.passes.copy_graph import copy_graph
from uta_fx.passes.locate_video import symbols_of
from uta_fx.passes.order_rules import Place
from uta_fx.passes.reorder_tokens import GatherTokens
from uta_fx.passes.site import Grid, Site
from uta_fx.passes.sparsify import Plan, rewrite, understand
from uta_fx.passes.trace_calls import trace_calls
from uta_fx.policies import SVG2, LowDelta, TopK

logger = logging.getLogger(__name__)

Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


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
        ValueError: An option is unknown or out of range, ``strict`` and a site stays dense, or
            ``dense_layers`` where neither the graph nor the model around it shows the layers.
        TypeError: ``options`` is no mapping, or an option is of another type.
        RuntimeError: A gradient is asked for.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict such as {{'density': 0.2}}, got {options!r}")
    options = dict(options or {})
    mode = options.pop("mode", mode)
    inductor = options.pop("inductor", None)
    config = Config.from_options(options)
    if config.dense_until:
        raise ValueError(
            f"dense_until={config.dense_until} needs uta_fx.enable(pipeline, config): the graph of"
            " one step does not know where in the noise schedule it is"
        )
    compile_inner = functools.partial(_compile, inner=config.inner, mode=mode, inductor=inductor)
    share = config.inner == "inductor"
    symbolic = _asked_for_symbols() and not (share and records_cuda_graphs(mode, inductor))
    blocks = _blocks_around(gm, config, symbolic)
    if blocks is None:
        sparsify(gm, example_inputs, config, symbolic)
        return _compile_sparse(gm, example_inputs, compile_inner, share)
    dense, sparse = copy_graph(gm), copy_graph(gm)
    every = dataclasses.replace(config, dense_layers="")
    sites = sparsify(sparse, example_inputs, every, symbolic)
    run_sparse = _compile_sparse(sparse, example_inputs, compile_inner, share)
    if not any(site.sparse for site in sites):
        return run_sparse
    return blocks.choose(compile_inner(dense, example_inputs), run_sparse)


def sparsify(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config, symbolic: bool = False
) -> list[Site]:
    """Rewrite the graph in place and say what was done.

    Args:
        gm: Changed in place.
        example_inputs: Its inputs.
        config: Settings.
        symbolic: As in ``plan_of``.

    Raises:
        ValueError: ``strict`` and a video self-attention stays dense, or ``dense_layers`` for a
            graph that does not show its layers.
        RuntimeError: A gradient is asked for.
    """
    plan = plan_of(config, symbolic)
    pairs = understand(gm, plan)
    sites = [site for _, site in pairs]
    for site in sites:
        logger.info(
            "%s (%s, B H L D %s, %s keys): %s, %s",
            site.name, site.kind, " x ".join(map(str, site.shape)), site.length_kv,
            "sparse" if site.sparse else "dense", site.reason,
        )  # fmt: skip
    refused = [site for site in sites if site.expected and not site.sparse]
    if refused and config.strict:
        raise ValueError(f"strict: {refused[0].name} stays dense: {refused[0].reason}")
    if objection := objection_to_layers(sites, config):
        raise ValueError(objection)
    if note := note_on_layers(sites, config):
        logger.warning(note)
    if not any(site.sparse for site in sites):
        _note_break(gm)
    if not sites:
        models = _models_being_called()
        # many parts of a model whose graph breaks have none
        part = len(models) > 1 or not _broken.isdisjoint(models)
        level = logging.INFO if part else logging.WARNING
        targets = (node.target for node in gm.graph.nodes)
        whole = sorted({x.name() for x in targets if isinstance(x, HigherOrderOperator)})
        where = f" outside {' and '.join(whole)}" if whole else ""
        logger.log(level, "the graph has no attention%s: it is compiled as it is", where)
    if any(site.sparse for site in sites):
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
        ):
            raise RuntimeError(
                "backend 'uta' is forward-only and this call records a gradient: run the model"
                " under torch.no_grad() or torch.inference_mode()"
            )
        rewrite(gm, pairs, plan)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("the rewritten graph:\n%s", readable(gm))
    elif refused:
        logger.warning("no attention was rewritten; %s: %s", refused[0].name, refused[0].reason)
    return sites


def plan_of(config: Config, symbolic: bool = False) -> Plan:
    """What the passes need to know of a configuration.

    Args:
        config: Settings.
        symbolic: Whether a grid may stay symbolic if the configuration lets it.
    """

    def index(grid: Grid | None, place: Place, back: bool) -> TokenIndex:
        return TokenIndex(grid, config.order, config.block_kv, place.dim, place.start, back)

    def replacement(
        grid: Grid | None,
        scale: float | None,
        video: tuple[int, int | None] | None,
        alone: bool,
        in_order: bool,
    ) -> SparseSite | ContinuedSite:
        site = SparseSite(config, grid, scale, video, alone, in_order)
        return ContinuedSite(site) if _keeps(config) else site

    return Plan(
        replacement=replacement,
        min_tokens=config.min_tokens,
        needs_grid=config.needs_grid,
        grid=config.grid,
        exact_frames=config.exact_frames,
        video_start=config.video_start,
        trust_masks=config.trust_masks,
        is_dense_layer=config.is_dense_layer,
        no_padding=_objection_to_padding(config),
        token_index=None if config.order == "none" else index,
        symbolic=symbolic and _needs_no_numbers(config),
    )


def objection_to_layers(sites: Sequence[Site], config: Config) -> str | None:
    """Why ``dense_layers`` cannot be honoured by the graph alone: it does not show its layers.

    The layers of a model are modules in a list, so that their paths hold a number. A block that is
    compiled by itself has none, and is one graph for all layers that are like it.
    """
    layers = [site for site in sites if site.layer is not None]
    numbered = any(re.search(r"(^|\.)\d+(\.|$)", site.name) for site in layers)
    if not config.dense_layers or not layers or numbered:
        return None
    return (
        f"dense_layers={config.dense_layers!r} needs to know which layer runs: this graph has"
        f" {layers[0].name} outside any list of blocks, and no model that is being called shows it"
        " as one of its blocks; call the block through its model, compile the whole model, or use"
        " uta_fx.enable(model, config, blocks=True)"
    )


def _objection_to_padding(config: Config) -> str | None:
    objection = objection_to_lengths(config)
    return objection and f"its attention mask hides padding: {objection}"


def _needs_no_numbers(config: Config) -> bool:
    """Whether all that a site computes is a function of sizes that a graph may have as symbols."""
    return (
        config.grid is None
        and isinstance(config.selection_policy(), (LowDelta, TopK))
        and config.tail_form().kind in ("none", "block", "first_order", "gaussian")
        and config.tail_form().slope == "head"
    )


def _asked_for_symbols() -> bool:
    """Whether this is a compilation with ``dynamic=True``.

    Sizes that Dynamo makes symbols of its own accord, when it sees a second one, are read as
    numbers: that compilation is the quicker one, and as a rule there are few sizes.
    """
    return not torch._dynamo.config.assume_static_by_default


def records_cuda_graphs(mode: str | None, inductor: Mapping[str, Any] | None = None) -> bool:
    """Whether Inductor records runs, each size anew.

    A constant made meanwhile would be of one size, and the next run overwrites what a run returns.
    """
    from torch._inductor import config, list_mode_options

    options = {**(list_mode_options(mode) if mode else {}), **(inductor or {})}
    return bool(options.get("triton.cudagraphs", config.triton.cudagraphs))


def _keeps(config: Config) -> bool:
    policy = config.selection_policy()
    return isinstance(policy, SVG2) and policy.keep


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


def _blocks_around(gm: GraphModule, config: Config, symbolic: bool) -> BlockByBlock | None:
    """What knows the layers of a graph that has none to count: those of the model around it.

    None where ``dense_layers`` needs no such thing, or nothing shows which block this is.

    Raises:
        ValueError: ``dense_layers`` names blocks that the model does not have.
    """
    parameters = parameters_of(gm) if config.dense_layers else {}
    found = block_around(list(parameters.values()))
    if found is None:
        return None
    sites = [site for _, site in understand(gm, plan_of(config, symbolic))]
    objection = objection_to_layers(sites, config)
    if objection is None:
        return None
    model, _ = found
    check_layers(model, config)
    number = len(blocks_of(model))
    dense = [str(index) for index in range(number) if config.is_dense_layer(index, number)]
    logger.info(
        "dense_layers=%r: of the %d blocks of a %s these stay dense: %s",
        config.dense_layers, number, type(model).__name__, ", ".join(dense),
    )  # fmt: skip
    return BlockByBlock(config, list(parameters), objection)


_broken: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose graph is known to break."""


def _note_break(gm: GraphModule) -> None:
    """Warn, once for a model, that its graph breaks behind a part with nothing to make sparse."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    models = _models_being_called()[-1:]
    if reason is None or not reason.graph_break or not _broken.isdisjoint(models):
        return
    _broken.update(models)
    place = "".join(f" at {Path(x.filename).name}:{x.lineno}" for x in reason.user_stack[-1:])
    logger.warning(
        "the graph of a %s breaks%s (%s), and its part before that has nothing that becomes sparse:"
        " what Dynamo leaves out of its graphs runs dense. fullgraph=True avoids the break or says"
        " why it cannot; uta_fx.explain shows the attention",
        type(models[0]).__name__ if models else "function", place, reason.reason.split("\n")[0],
    )  # fmt: skip


def _models_being_called() -> list[nn.Module]:
    """From the innermost outwards, each once."""
    return list(dict.fromkeys(getattr(x, "_orig_mod", x) for x in modules_being_called()))


def _compile_sparse(
    gm: GraphModule, example_inputs: Sequence[Any], compile_inner: Compile, share: bool
) -> Callable[..., Any]:
    """Compile what ``sparsify`` has rewritten."""
    trace_calls(gm, TokenIndex, share=None)
    # where strides are symbols a gather is plain PyTorch: apart, so that Inductor gathers a table
    # once and not in each kernel that reads it
    trace_calls(gm, GatherTokens, share=1 if share and symbols_of(gm) else None)
    alike = 2 if share else None
    if any(isinstance(node.target, ContinuedSite) for node in gm.graph.nodes):
        gm, inputs = carry_state(gm, example_inputs, ContinuedSite)
        trace_calls(gm, ContinuedSite, share=alike)
        with kernels_compiled_beside(gm):
            compiled = compile_inner(gm, inputs)
        return with_state(compiled, inputs[len(example_inputs) :])
    trace_calls(gm, SparseSite, share=alike)
    with kernels_compiled_beside(gm):
        return compile_inner(gm, example_inputs)


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
