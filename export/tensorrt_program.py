"""What TensorRT does not take of a program, spelled out in operations that it takes.

Both ways to an engine start here: the one over an ONNX file and the one over ``torch_tensorrt``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from uta_fx.export.tensorrt_ops import attend_in_steps
from uta_fx.kernels import reference
from uta_fx.kernels.constants import CONSTANTS

MAX_K = 3840  # of TensorRT's ITopKLayer
_SMALLEST, _LARGEST = 2.0**-126, 3.4e38  # between them a positive threshold is looked for
_WAYS = 16  # into which a step of the search cuts what is left
_GEOMETRIC, _ARITHMETIC = 3, 7  # steps: 254 octaves to 1/16, and that to two neighbouring numbers


def spell_out(program: ExportedProgram, *, plugins: bool) -> ExportedProgram:
    """A program of ``torch.export`` without the operations that TensorRT refuses.

    ``topk`` of more than ``MAX_K`` elements becomes a search for the threshold,
    ``uta::rectified_attention`` ``uta::sparse_attention``, and ``uta::block_statistics``,
    ``uta::select_blocks``, ``uta::list_blocks`` and ``uta::fit_tail`` plain PyTorch. Everything
    else stays as it is.

    Args:
        program: Of ``uta_fx.export.program.sparsify_program``.
        plugins: ``uta::sparse_attention`` becomes the operators of ``tensorrt_ops``.
    """
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.topk.default: _large_topk,
        torch.ops.uta.block_statistics.default: reference.block_statistics,
    }
    table[torch.ops.uta.rectified_attention.default] = _rectified_attention
    table[torch.ops.uta.select_blocks.default] = _select_blocks
    table[torch.ops.uta.list_blocks.default] = _list_blocks
    table[torch.ops.uta.fit_tail.default] = reference.fit_tail
    if plugins:
        table[torch.ops.uta.sparse_attention.default] = attend_in_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's deprecations
        program = program.run_decompositions(table)
    _skip_expansions(program.graph_module)
    return program


def with_constants(program: ExportedProgram) -> ExportedProgram:
    """The same program with what operators of constants return as buffers, for ``torch_tensorrt``.

    An ONNX file has them as constants already.
    """
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule) and program.example_inputs is not None
    nodes = [x for x in module.graph.nodes if x.target in CONSTANTS]
    for index, node in enumerate(nodes):
        like, *arguments = node.args
        made = CONSTANTS[node.target](*arguments).to(like.meta["val"].device)
        module.register_buffer(f"uta_constant_{index}", made, persistent=False)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(f"uta_constant_{index}"))
        module.graph.erase_node(node)
    module.recompile()
    args, kwargs = program.example_inputs
    return torch.export.export(module, args, kwargs) if nodes else program


def _select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    """``uta::select_blocks`` by ``topk``, of finite scores.

    Which of equal scores are kept is TensorRT's choice up to ``MAX_K`` of them, and beyond that the
    operator's.
    """
    scores = scores.float()
    best = torch.zeros_like(scores, dtype=torch.bool)
    best = best.scatter(-1, scores.argmax(-1, keepdim=True), True)
    flat = scores.masked_fill(best, torch.inf).reshape(-1, rows * scores.shape[-1])
    chosen = flat.topk(kept, dim=-1, sorted=False).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, chosen, True)
    return mask.view(scores.shape)


def _list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """``uta::list_blocks`` by running counts; what is not listed goes to one column too many."""
    blocks = exact.shape[-1]
    position = exact.cumsum(-1, dtype=torch.int32)
    target = torch.where(exact, position - 1, blocks).long()
    ids = torch.arange(blocks, dtype=torch.int32, device=exact.device).expand(exact.shape)
    listed = torch.zeros((*exact.shape[:-1], blocks + 1), dtype=torch.int32, device=exact.device)
    return listed.scatter(-1, target, ids)[..., :blocks], position[..., -1]


def _rectified_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    gain: Tensor,
    offset: Tensor,
    scale: float,
    block_q: int,
    block_kv: int,
) -> Tensor:
    """``uta::rectified_attention`` by ``uta::sparse_attention``, gain and offset after it."""
    tail = reference.text_as_tail(query, text_key, text_value, text_bias, block_q)
    arguments = (query, key, value, block_ids, block_counts, *tail, scale, 0.0, block_q, block_kv)
    output, _ = torch.ops.uta.sparse_attention.default(*arguments)
    rows = torch.arange(query.shape[2], device=query.device) // block_q
    gains, offsets = (x.index_select(2, rows) for x in (gain, offset))
    return (output.float() * gains[..., None] + offsets).to(query.dtype)


def _skip_expansions(gm: torch.fx.GraphModule) -> None:
    """Take what was expanded where one of the copies is sliced off again.

    Text that every query block sees is expanded for the operator, and would be copied for each.
    """
    aten = torch.ops.aten
    for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        source = node.args[0]
        if source.target is not aten.expand.default:
            continue
        origin = source.args[0]
        if origin.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(origin)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def large_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k, sorted=False)`` along the last dimension without a sort.

    The k-th largest value is searched for: ten steps, each of which counts how many values exceed
    15 thresholds, leave two neighbouring float32 numbers. (Bisection has fewer counts in all, but
    TensorRT-RTX does not come to an end with a chain of 35.) Of values equal to it the first ones
    are taken, so that it is k in any case. Numbers within 1e-38 of zero count as zero.

    Args:
        x: Floating, without NaN, at most float32.
        k: From 1 to the size of the last dimension.

    Returns:
        Values and int64 indices, each with k in the last dimension, in order of the index.
    """
    total = x.shape[-1]
    wide = x.float()
    # among numbers of one sign: from above if the k-th largest is positive, else from below
    positive = (wide > _SMALLEST).sum(-1, keepdim=True) >= k
    magnitude = torch.where(positive, wide, -wide).clamp(min=0)
    rank = torch.where(positive, k, total - k + 1)

    def reaches(thresholds: Tensor) -> Tensor:
        return (magnitude[..., None, :] > thresholds[..., None]).sum(-1) >= rank

    zero = torch.zeros_like(wide[..., :1])
    smallest, largest = zero + _SMALLEST, zero + _LARGEST
    low, high = smallest, largest  # the value sought lies in (low, high]
    part = torch.arange(1, _WAYS, device=x.device) / _WAYS
    for step in range(_GEOMETRIC + _ARITHMETIC):
        if step < _GEOMETRIC:
            cuts = (low.log2() + part * (high.log2() - low.log2())).exp2()
        else:
            cuts = low + part * (high - low)
        edges = torch.cat([low, cuts.clamp(low, high), high], -1)
        reached = reaches(edges[..., 1:-1]).sum(-1, keepdim=True)
        low, high = edges.gather(-1, reached), edges.gather(-1, reached + 1)
    tiny, huge = ~reaches(smallest), reaches(largest)
    low = torch.where(tiny, -1.0, torch.where(huge, largest, low))
    high = torch.where(tiny, smallest, torch.where(huge, torch.inf, high))

    beyond = ~positive & (
        wide > _SMALLEST
    )  # the k-th largest is not positive: all these are larger
    equal = (magnitude > low) & (magnitude <= high) & ~beyond
    greater = torch.where(positive, magnitude > high, magnitude <= low) | beyond
    taken = greater.sum(-1, keepdim=True)
    place = torch.where(
        greater,
        greater.cumsum(-1, dtype=torch.int32) - 1,
        taken + torch.where(equal, equal.cumsum(-1, dtype=torch.int32) - 1, k),
    ).clamp(max=k)  # one column too many for what is not taken
    ids = torch.arange(total, device=x.device).expand(x.shape)
    # TensorRT scatters no more elements than there are places
    spilled = torch.zeros((*x.shape[:-1], total + 1), dtype=torch.int64, device=x.device)
    indices = spilled.scatter(-1, place.long(), ids)[..., :k]
    return x.gather(-1, indices), indices


def _large_topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    last = dim in (-1, x.dim() - 1)
    if k <= MAX_K or not largest or sorted or not last or not x.is_floating_point():
        return NotImplemented
    return large_topk(x, k)
