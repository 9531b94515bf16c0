"""The way of a graph through the passes: find, understand, decide, rewrite."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from uta_fx.kernels.contract import DTYPES, MAX_HEAD_DIM, MIN_HEAD_DIM
from uta_fx.passes.classify_call import classify_call
from uta_fx.passes.expand_multi_head import expand_multi_head
from uta_fx.passes.find_calls import SDPA_TARGETS, Call, find_calls
from uta_fx.passes.inline_subgraphs import inline_subgraphs
from uta_fx.passes.locate_video import (
    Video,
    has_several_grids,
    is_clear,
    is_symbolic,
    locate_video,
    settle_grids,
    symbols_of,
    tokens_in,
)
from uta_fx.passes.read_mask import hides, pads, shows_all
from uta_fx.passes.read_node import VIEWS, name_of
from uta_fx.passes.reorder_tokens import (
    MakeIndex,
    Region,
    SparseCall,
    find_regions,
    insert_gathers,
)
from uta_fx.passes.site import Grid, Operand, Side, Site, recorded, value_of
from uta_fx.passes.trace_axes import Size, Trace, equal, length, place_in, plain, same

Replacement = Callable[..., Any]
"""Returns a tensor; or a tuple that begins with it, for ``carry_state`` to take apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the passes are told, without knowing of policies and tails.

    Attributes:
        replacement: Makes what takes the place of a call, a function of q, k, v and, where there
            is one, the mask: from the site's grid, the call's scale (None for torch's default), of
            a joint site the first video token and how many there are, whether they alone have
            queries, and whether they are in block order already. Where the grid is symbolic, it is
            None here and the function takes it too, as ``grid``.
        min_tokens: Sites with fewer video tokens stay dense.
        needs_grid: Whether a site without a known grid stays dense.
        grid: Given by the user; None to read it from the graph.
        exact_frames: Sites with no more frames than these stay dense: all their keys are exact.
        video_start: Given beside the grid: the first token of the video, where the graph does not
            show it.
        trust_masks: Whether a mask that the graph does not show to hide text alone, or padding at
            the end of a video, is taken to.
        no_padding: Why a site whose mask hides padding of its video stays dense; None where it
            does not.
        is_dense_layer: Of a layer's index and the number of layers.
        token_index: Makes a function that gives, for a tensor, the index that brings the tokens of
            a grid at a place of it into block order, or (True) back; None to leave the order of
            tokens to each replacement alone.
        symbolic: Whether a grid may stay symbolic, where it is clear; otherwise it is read as
            numbers, which specialises the graph.
    """

    replacement: Callable[
        [Grid | None, float | None, tuple[int, int | None] | None, bool, bool], Replacement
    ]
    min_tokens: int
    needs_grid: bool
    grid: Grid | None
    exact_frames: int
    trust_masks: bool
    is_dense_layer: Callable[[int, int], bool]
    no_padding: str | None = None
    video_start: int | None = None
    token_index: MakeIndex | None = None
    symbolic: bool = False


def understand(gm: GraphModule, plan: Plan) -> list[tuple[Call, Site]]:
    """Describe and decide every attention call of the graph, which goes on to compute the same."""
    inline_subgraphs(gm)
    expand_multi_head(gm)
    trace = Trace(gm)
    calls = find_calls(gm, lambda size: not _is_short(size, plan))
    found = [_without_idle_mask(call) for call in calls]
    axes = [trace.axis(x.query.node, x.query.token_dim) for x in found]
    if plan.symbolic and all(is_clear(gm, trace, axis) for axis in axes):
        sites = _sites(found, trace, plan)
    else:
        sites = None
    if sites is None or any(site.expected and not site.sparse for _, site in sites):
        # what cannot be shown of symbols may be shown of numbers
        plan = dataclasses.replace(plan, symbolic=False)
        if settle_grids(gm, trace, axes):
            trace = Trace(gm)
            sites = None
        sites = sites or _sites(found, trace, plan)
    reasons = {
        node: reason
        for region in _regions(gm, sites, plan)
        for node, reason in region.reasons.items()
    }
    return [
        (call, dataclasses.replace(site, reordered=reasons.get(call.node))) for call, site in sites
    ]


def _without_idle_mask(call: Call) -> Call:
    """The same call, without a mask that hides nothing."""
    mask = call.attn_mask
    if not isinstance(mask, Node) or not shows_all(mask, inverted=call.inverted):
        return call
    return dataclasses.replace(call, attn_mask=None)


def _sites(found: Sequence[Call], trace: Trace, plan: Plan) -> list[tuple[Call, Site]]:
    """What is decided about each call."""
    calls = [(call, classify_call(call, trace)) for call in found]
    layers = [call for call, kind in calls if _is_layer(call, kind, plan)]
    sites = []
    for call, kind in calls:
        layer = layers.index(call) if call in layers else None
        sites.append((call, _describe(call, kind, layer, len(layers), trace, plan)))
    return sites


def _regions(gm: GraphModule, sites: Sequence[tuple[Call, Site]], plan: Plan) -> list[Region]:
    """Where the sparse sites' tokens are reordered for more than one site."""
    if plan.token_index is None:
        return []
    return find_regions(
        gm,
        [
            SparseCall(call, site.grid, 0 if site.text is None else int(site.text[0]))
            for call, site in sites
            if site.sparse and site.grid is not None
        ],
    )


def _is_layer(call: Call, kind: str, plan: Plan) -> bool:
    """Whether a call counts as a layer of the model: not the few tokens of a text refiner."""
    return kind in ("self", "joint") and not _is_short(call.query.shape[-2], plan)


def _describe(
    call: Call, kind: str, layer: int | None, layers: int, trace: Trace, plan: Plan
) -> Site:
    query, key = call.query, call.key
    video: Video | str = ""
    if kind in ("self", "joint"):
        video = _video_among_keys(call, trace, plan)
    known = video if isinstance(video, Video) else None
    tokens = known.tokens if known else query.shape[-2]
    exemption = _exemption(kind, tokens, layer, layers, plan)
    if (
        exemption
        and known
        and _is_short(tokens, plan)
        and not _is_short(key.shape[-2], plan)
        and has_several_grids(trace, trace.axis(call.key.node, call.key.token_dim))
    ):
        exemption += (
            f", the longest of several grids in its {key.shape[-2]} tokens; give grid if these are"
            " one video"
        )
    objection = (
        exemption
        or call.objection
        or _objection_to_arguments(call)
        or _objection_to_kind(kind)
        or (None if known and is_symbolic(known.grid) else _objection_to_length(tokens, kind))
        or _objection_to_video(video, kind, plan)
        or _objection_to_mask(call, known, plan)
    )
    text = None
    if known and not same(known.tokens, key.shape[-2]):
        text = (_plain(known.before), _plain(known.after))
        kind = "joint"
    return Site(
        name=call.path,
        kind=kind,
        shape=tuple(_plain(size) for size in query.shape),
        length_kv=_plain(key.shape[-2]),
        dtype=call.dtype,
        layer=layer,
        grid=known.grid if known else None,
        text=text,
        expected=exemption is None,
        sparse=objection is None,
        reason=objection or _merit(call, kind, text),
    )


def _video_among_keys(call: Call, trace: Trace, plan: Plan) -> Video | str:
    """Where the video lies among the keys: its queries may be all that there are."""
    tokens = trace.axis(call.query.node, call.query.token_dim)
    keys = trace.axis(call.key.node, call.key.token_dim)
    video = locate_video(trace, tokens, plan.grid, plan.video_start, plan.symbolic)
    if isinstance(video, str) or equal(tokens, keys):
        return video
    if not same(video.tokens, length(tokens)):
        return "its queries are a part of its tokens, but not the video alone"
    before = place_in(keys, tokens)
    assert before is not None
    if plan.video_start not in (None, before):
        return f"video_start={plan.video_start} is given, but the graph shows it from {before} on"
    return dataclasses.replace(video, before=before, after=length(keys) - before - length(tokens))


def _merit(call: Call, kind: str, text: object) -> str:
    """Why a call becomes sparse."""
    if text is None and call.attn_mask is not None:
        merit = "self-attention over video tokens, of each sample the first that its mask shows"
        trusted = pads(call.attn_mask, inverted=call.inverted) is not None
        return merit + ("; trusted: NaN where it shows others" if trusted else "")
    if kind == "self":
        return "self-attention over video tokens"
    return "joint attention: video tokens sparse, text exact for all and dense"


def rewrite(gm: GraphModule, sites: Sequence[tuple[Call, Site]], plan: Plan) -> None:
    """Put the sparse attention exactly where each call stood that is to be sparse.

    Exactly there, because models rotate q and k in place: dataflow does not show it.
    """
    regions = _regions(gm, sites, plan)
    nodes = set(gm.graph.nodes)
    sides = _sides(gm, {site.grid for _, site in sites if site.sparse and site.grid is not None})
    computed = [node for node in gm.graph.nodes if node not in nodes]
    for node in computed:
        if recorded(node) is None:
            target: Any = node.target
            node.meta["val"] = target(*torch.fx.map_arg(node.args, recorded))
    in_order = {node for region in regions for node in region.calls}
    moved: dict[tuple[Node, Node], Node] = {}
    for region in regions:
        assert plan.token_index is not None
        moved |= insert_gathers(gm, region, plan.token_index, sides.get(region.grid))
    for call, site in sites:
        if not site.sparse:
            continue
        symbolic = site.grid is not None and is_symbolic(site.grid)
        video, alone = None, False
        if site.text is not None:
            assert site.grid is not None and isinstance(site.text[0], int)
            tokens = tokens_in(site.grid, call.key.shape[-2])
            video = (site.text[0], None if symbolic else int(tokens))
            alone = same(call.query.shape[-2], tokens)
        with gm.graph.inserting_before(call.place):
            operands = [
                _canonical(gm.graph, x, moved.get((call.place, x.node), x.node), call.dtype)
                for x in (call.query, call.key, call.value)
            ]
            operands[0] = _scaled(gm.graph, operands[0], call)
            masks = () if call.attn_mask is None else (_mask(gm.graph, call),)
            sparse = gm.graph.call_function(
                plan.replacement(
                    None if symbolic else site.grid,
                    call.scale,
                    video,
                    alone,
                    call.node in in_order,
                ),
                (*operands, *masks),
                {"grid": sides[site.grid]} if symbolic and site.grid else None,
            )
            sparse = _laid_out(gm.graph, sparse, call)
        sparse.meta = dict(call.node.meta)  # same shape, dtype and source line
        call.node.replace_all_uses_with(sparse)
        gm.graph.erase_node(call.node)
        if call.operator not in (None, call.node):
            for other in list(call.operator.users):  # outputs that nobody uses
                gm.graph.erase_node(other)
            gm.graph.erase_node(call.operator)
    # gathers of inputs stand after the last input too, and take them
    for node in reversed(computed):
        gm.graph.find_nodes(op="placeholder")[-1].append(node)
    gm.graph.lint()
    gm.recompile()


def _sides(gm: GraphModule, grids: set[Grid]) -> dict[Grid, tuple[int | Node, ...]]:
    """The sides of symbolic grids, computed from the graph's inputs after the last of them."""
    inputs = gm.graph.find_nodes(op="placeholder")
    tracer = torch.fx.proxy.GraphAppendingTracer(gm.graph)
    proxies: dict[sympy.Symbol, torch.fx.Proxy] = {}
    made: dict[Side, int | Node] = {}
    found: dict[Grid, tuple[int | Node, ...]] = {}
    with gm.graph.inserting_before(inputs[-1].next if inputs else None):
        wanted = {x for grid in grids for side in grid for x in sympy.sympify(side).free_symbols}
        for symbol, (node, dim, times) in symbols_of(gm).items():
            if symbol not in wanted:
                continue
            if dim is not None:
                size = recorded(node).shape[dim]
                node = gm.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                node.meta["val"] = size
            if times != 1:
                node = gm.graph.call_function(operator.floordiv, (node, times))
            proxies[symbol] = torch.fx.Proxy(node, tracer)
        for grid in filter(is_symbolic, grids):
            for side in grid:
                if isinstance(side, int):
                    made[side] = side
                elif side not in made:
                    made[side] = sympy_interp(PythonReferenceAnalysis, proxies, side).node
            found[grid] = tuple(made[side] for side in grid)
    return found


def _canonical(graph: Graph, operand: Operand, node: Node, dtype: torch.dtype) -> Node:
    """A node that is laid out as an operand, as ``[B, H, L, D]``."""
    if operand.dtype != dtype:
        node = _emit(graph, "to", node, dtype)
    dims = [dim for group in operand.order for dim in group]
    if dims != sorted(dims):
        node = _emit(graph, "permute", node, dims)
    for place, group in enumerate(operand.order):
        if not group:
            node = _emit(graph, "unsqueeze", node, place)
        elif len(group) > 1:
            node = _emit(graph, "flatten", node, place, place + len(group) - 1)
    return node


def _emit(graph: Graph, method: str, node: Node, *args: Any) -> Node:
    """A call of a tensor's method, and what tracing would have recorded of it."""
    new = graph.call_method(method, (node, *args))
    name = "val" if "val" in node.meta else "example_value"
    new.meta = {name: getattr(value_of(node), method)(*torch.fx.map_arg(args, value_of))}
    return new


def _scaled(graph: Graph, query: Node, call: Call) -> Node:
    """Queries ``[B, H, L, D]`` with the tensors in them by which the call's logits are scaled."""
    for method, scale in call.scales:
        if not call.query.order[1] and value_of(scale).dim() == 3:
            scale = _emit(graph, "unsqueeze", scale, 1)
        query = _emit(graph, method, query, scale)
    return query if value_of(query).dtype == call.dtype else _emit(graph, "to", query, call.dtype)


def _mask(graph: Graph, call: Call) -> Node:
    """The mask for ``[B, H, L, D]``: a call without heads may have one for each sample."""
    mask: Node = call.attn_mask
    if call.inverted:
        mask = _emit(graph, "logical_not", mask)
    if not call.query.order[1] and value_of(mask).dim() == 3:
        return _emit(graph, "unsqueeze", mask, 1)
    return mask


def _laid_out(graph: Graph, node: Node, call: Call) -> Node:
    """The output as the call's own node has it: order of dimensions, dtype, strides for views."""
    value = value_of(call.node)
    for place, group in reversed(list(enumerate(call.output))):
        if not group:
            node = graph.call_method("squeeze", (node, place))
        elif len(group) > 1:
            node = graph.call_method("unflatten", (node, place, [value.shape[x] for x in group]))
    dims = [dim for group in call.output for dim in group]
    if dims != sorted(dims):
        order = [dims.index(dim) for dim in range(len(dims))]
        node = graph.call_method("permute", (node, order))
    dtype = value.dtype
    if dtype != call.dtype:
        node = graph.call_method("to", (node, dtype))
    if value.is_contiguous() and _is_viewed(call.node):
        node = graph.call_method("contiguous", (node,))
    return node


def _is_viewed(node: Node) -> bool:
    """Whether somebody takes a view of a tensor, which fails where its strides do not allow it."""
    return any(
        name_of(user) == "view"
        or (name_of(user) in VIEWS and name_of(user) != "contiguous" and _is_viewed(user))
        for user in node.users
    )


def _exemption(kind: str, tokens: Size, layer: int | None, layers: int, plan: Plan) -> str | None:
    """Why no user would expect this call to become sparse, or None."""
    if kind == "cross":
        return "cross-attention: queries and keys are different tokens"
    if _is_short(tokens, plan):
        return f"{tokens} tokens are fewer than min_tokens={plan.min_tokens}"
    if layer is not None and plan.is_dense_layer(layer, layers):
        return f"dense_layers names layer {layer}"
    return None


def _is_short(tokens: Size, plan: Plan) -> bool:
    try:
        # a guard that a size may cross, or that it is this one
        return bool((tokens if plan.symbolic else int(tokens)) < plan.min_tokens)
    except RuntimeError:
        return False  # a length known only at run time


def _objection_to_arguments(call: Call) -> str | None:
    """Why the operator cannot stand for this call, or None."""
    query, key, value = call.query, call.key, call.value
    if torch._C._functorch.is_functorch_wrapped_tensor(value_of(call.node)):
        return "is inside a transform of torch.func, such as vmap"
    if len(query.order) != 4 or len(key.order) != 4:
        return f"query has {len(query.order)} dimensions, not the 4 of [B, H, L, D]"
    if objection := _objection_to_rank(call):
        return objection
    if call.is_causal is not False:
        return "is causal"
    if call.dropout_p != 0.0:
        return f"has dropout ({call.dropout_p})"
    if not (call.scale is None or isinstance(call.scale, (int, float))):
        return "its scale is computed in the graph"
    if call.scale is not None and not math.isfinite(call.scale):
        return f"its scale is no finite number ({call.scale})"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not float32, float16 or bfloat16"
    if call.node.target not in SDPA_TARGETS and not query.dtype == key.dtype == value.dtype:
        return f"its tensors differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if not all(
        same(a, b) or (place == 1 and call.enable_gqa is not False and _divides(b, a))
        for x in (key, value)
        for place, (a, b) in enumerate(zip(query.shape[:2], x.shape[:2], strict=True))
    ):
        return "its tensors differ in batch or heads"
    if not same(key.shape[1], value.shape[1]):
        return "its keys and values differ in heads"
    for name, dim in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
            return f"{name} head dim {dim} is not from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None


def _objection_to_rank(call: Call) -> str | None:
    """Why dimensions that are several of a batch, of heads or of depth cannot be one, or None."""
    sides = call.query, call.key, call.value
    batches = [[value_of(x.node).shape[dim] for dim in x.order[0]] for x in sides]
    if any(
        len(batch) != len(batches[0]) or not all(map(same, batch, batches[0])) for batch in batches
    ):
        return "its tensors differ in batch or heads"
    layouts = [(x.node, x.order) for x in sides] + [(call.node, call.output)]
    merged = [
        value_of(node).shape[dim]
        for node, order in layouts
        for group in order
        if len(group) > 1
        for dim in group
    ]
    if not all(isinstance(plain(size), int) for size in merged):
        return "its batch or heads are several dimensions, of sizes known only at run time"
    factors = [tensor for _, tensor in call.scales]
    masks = [] if call.attn_mask is None else [call.attn_mask]
    if merged and (masks or factors):
        return "has an attention mask, or a scale, and several dimensions of batch, heads or depth"
    rank = value_of(call.node).dim()
    if any(value_of(x).dim() > rank for x in (*masks, *factors)):
        return f"has an attention mask, or a scale, of more than its {rank} dimensions"
    return None


def _divides(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a > 0 and b % a == 0


def _objection_to_kind(kind: str) -> str | None:
    if kind == "unknown":
        return "the graph does not show that queries and keys are projected from one tensor"
    return None


def _objection_to_length(tokens: Size, kind: str) -> str | None:
    try:
        int(tokens)
    except RuntimeError:
        # where there is text beside the video, the video's length may be known all the same
        return "its length is known only at run time" if kind == "self" else None
    return None


def _objection_to_video(video: Video | str, kind: str, plan: Plan) -> str | None:
    if isinstance(video, str):
        # a video in its own order needs no grid where all tokens are of one origin
        return video if plan.needs_grid or plan.grid is not None or kind == "joint" else None
    try:
        int(video.before)
    except RuntimeError:
        return "how many tokens lie before the video is known only at run time"
    frames = video.grid[0]
    if isinstance(frames, int) and frames <= plan.exact_frames:
        return f"exact_frames={plan.exact_frames} keeps all keys of its {frames} frames"
    return None


def _objection_to_mask(call: Call, video: Video | None, plan: Plan) -> str | None:
    if call.attn_mask is None:
        return None
    if video is None or same(video.tokens, call.key.shape[-2]):
        padding = pads(call.attn_mask, trusted=plan.trust_masks, inverted=call.inverted)
        return padding or plan.no_padding
    if same(video.tokens, call.query.shape[-2]):
        return "has an attention mask for queries that are a part of its tokens"
    before = int(video.before)
    tokens = video.tokens if is_symbolic(video.grid) else int(video.tokens)
    return hides(
        call.attn_mask, before, before + tokens, trusted=plan.trust_masks, inverted=call.inverted
    )


def _plain(size: Size) -> int | str:
    number = plain(size)
    return number if isinstance(number, int) else str(number)
