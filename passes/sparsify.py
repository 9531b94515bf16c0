"""The way of a graph through the passes: find, understand, decide, rewrite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule

from uta_fx.kernels.ops import DTYPES, MAX_HEAD_DIM, MIN_HEAD_DIM
from uta_fx.passes.classify_call import classify_call
from uta_fx.passes.find_calls import Call, find_calls
from uta_fx.passes.read_grid import read_grid
from uta_fx.passes.site import Grid, Site, value_of

Replacement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the passes are told, without knowing of policies and tails.

    Attributes:
        replacement: Makes the function of q, k and v that takes the place of a call, from the
            site's grid and the call's scale (None for torch's default).
        min_tokens: Sites with fewer tokens stay dense.
        needs_grid: Whether a site without a known grid stays dense.
        grid: Given by the user; None to read it from the graph.
        is_dense_layer: Of a layer's index and the number of layers.
    """

    replacement: Callable[[Grid | None, float | None], Replacement]
    min_tokens: int
    needs_grid: bool
    grid: Grid | None
    is_dense_layer: Callable[[int, int], bool]


def understand(gm: GraphModule, plan: Plan) -> list[tuple[Call, Site]]:
    """Describe and decide every attention call of the graph, which stays as it is."""
    calls = [(call, classify_call(call)) for call in find_calls(gm)]
    layers = [call for call, kind in calls if kind == "self"]
    sites = []
    for call, kind in calls:
        query, key = value_of(call.query), value_of(call.key)
        layer = layers.index(call) if kind == "self" else None
        grid = _grid_of(gm, plan, query) if kind == "self" else None
        exemption = _exemption(kind, query, layer, len(layers), plan)
        objection = (
            exemption
            or _objection_to_arguments(call, query, key)
            or _objection_to_kind(kind)
            or _objection_to_length(query)
            or _objection_to_grid(grid, query, plan)
        )
        sites.append(
            (
                call,
                Site(
                    name=call.path,
                    kind=kind,
                    shape=tuple(_plain(size) for size in query.shape),
                    length_kv=_plain(key.shape[-2]) if key.dim() > 1 else "?",
                    dtype=query.dtype,
                    layer=layer,
                    grid=grid,
                    expected=exemption is None,
                    sparse=objection is None,
                    reason=objection or "self-attention over video tokens",
                ),
            )
        )
    return sites


def rewrite(gm: GraphModule, sites: Sequence[tuple[Call, Site]], plan: Plan) -> None:
    """Put the sparse attention exactly where each call stood that is to be sparse.

    Exactly there, because models rotate q and k in place: dataflow does not show it.
    """
    for call, site in sites:
        if not site.sparse:
            continue
        with gm.graph.inserting_before(call.node):
            sparse = gm.graph.call_function(
                plan.replacement(site.grid, call.scale), (call.query, call.key, call.value)
            )
        sparse.meta = dict(call.node.meta)  # same shape, dtype and source line
        call.node.replace_all_uses_with(sparse)
        gm.graph.erase_node(call.node)
    gm.graph.lint()
    gm.recompile()


def _grid_of(gm: GraphModule, plan: Plan, query: torch.Tensor) -> Grid | None:
    if query.dim() != 4:
        return None
    try:
        tokens, batch = int(query.shape[2]), int(query.shape[0])
    except RuntimeError:
        return None  # a size known only at run time
    if plan.grid is not None:
        return plan.grid if math.prod(plan.grid) == tokens else None
    return read_grid(gm, batch, tokens)


def _exemption(
    kind: str, query: torch.Tensor, layer: int | None, layers: int, plan: Plan
) -> str | None:
    """Why no user would expect this call to become sparse, or None."""
    if kind == "cross":
        return "cross-attention: queries and keys are projected from different tensors"
    if _is_short(query, plan):
        return f"{query.shape[-2]} tokens are fewer than min_tokens={plan.min_tokens}"
    if layer is not None and plan.is_dense_layer(layer, layers):
        return f"dense_layers names layer {layer}"
    return None


def _is_short(query: torch.Tensor, plan: Plan) -> bool:
    try:
        return bool(query.shape[-2] < plan.min_tokens)
    except RuntimeError:
        return False  # a length known only at run time


def _objection_to_arguments(call: Call, query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why the operator cannot stand for this call, or None."""
    if query.dim() != 4 or key.dim() != 4:
        return f"query has {query.dim()} dimensions, not the 4 of [B, H, L, D]"
    if call.attn_mask is not None:
        return "has an attention mask"
    if call.is_causal is not False:
        return "is causal"
    if call.dropout_p != 0.0:
        return f"has dropout ({call.dropout_p})"
    if call.enable_gqa is not False and query.shape[1] != key.shape[1]:
        return "shares keys among heads (grouped queries)"
    if not (call.scale is None or isinstance(call.scale, (int, float))):
        return "its scale is computed in the graph"
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not float32, float16 or bfloat16"
    for name, dim in (("query", query.shape[-1]), ("value", value_of(call.value).shape[-1])):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
            return f"{name} head dim {dim} is not from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None


def _objection_to_kind(kind: str) -> str | None:
    if kind == "unknown":
        return "the graph does not show that queries and keys are projected from one tensor"
    return None


def _objection_to_length(query: torch.Tensor) -> str | None:
    try:
        int(query.shape[2])
    except RuntimeError:
        return "its length is known only at run time"
    return None


def _objection_to_grid(grid: Grid | None, query: torch.Tensor, plan: Plan) -> str | None:
    if grid is not None or not plan.needs_grid:
        return None
    tokens = int(query.shape[2])
    if plan.grid is not None:
        sides = " x ".join(map(str, plan.grid))
        return f"grid {sides} = {math.prod(plan.grid)} does not match its {tokens} tokens"
    return f"no patch embedding in the graph makes its {tokens} tokens; give grid"


def _plain(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)
