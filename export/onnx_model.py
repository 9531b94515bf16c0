"""A whole model as an ONNX file with sparse attention inside."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import operator
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes import Sequential as Passes
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    RemoveUnusedNodesPass,
)
from onnxscript import opset18
from onnxscript.optimizer import fold_constants
from onnxscript.values import Op, Opset
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from uta_fx import __version__
from uta_fx.export.onnx_functions import (
    DOMAIN,
    VERSION,
    VERSION_KEY,
    block_scores_function,
    block_statistics_function,
    fit_tail_function,
    list_blocks_function,
    places_of_weights,
    schemas,
    select_blocks_function,
    select_counted_function,
    sparse_attention_function,
)
from uta_fx.export.replace_file import folder_beside
from uta_fx.kernels.constants import CONSTANTS
from uta_fx.passes.site import Site

SITES_KEY = "uta_fx.sites"
ATTENTION_OPSET = 23  # from which on dense attention is one operation
DENSE = torch.ops.aten.scaled_dot_product_attention.default
LARGE = 1536 * 1024**2
"""Bytes of weights that a file holds itself: ONNX files end at 2 GiB."""
REPLACED = "replaced"
"""Beside a file that is written: the names of the weights of the one in whose place it comes."""
KEPT = (
    "SparseAttention",
    "BlockStatistics",
    "BlockScores",
    "SelectBlocks",
    "SelectCounted",
    "ListBlocks",
    "FitTail",
)
"""Nodes of our domain in a file, beside their functions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """What becomes of our operators in a file.

    Attributes:
        translations: How the exporter writes operators, beside and before the common ways.
        site_node: The node of our domain that is named after its site.
        lower: Given the model and its opset, what is done to the nodes of our domain.
    """

    translations: Mapping[Callable[..., Any], Callable[..., Any]] = dataclasses.field(
        default_factory=dict
    )
    site_node: str = "SparseAttention"
    lower: Callable[[ir.Model, int], None]


def write_onnx(
    program: ExportedProgram,
    sites: Sequence[Site],
    path: Path,
    *,
    opset: int,
    metadata: Mapping[str, str],
    left: Sequence[str] = (),
    sizes: Mapping[str, str] | None = None,
    dialect: Dialect | None = None,
) -> None:
    """Write a program from ``sparsify_program`` as an ONNX file.

    Weights lie in the file up to ``LARGE``, beyond that in a second one beside it. Both are written
    in another folder, checked, and then renamed, the file of weights first: it has a new name each
    time, so that no file is ever with the weights of another, whenever this may be cut off. What a
    killed process left of that goes with the next call.

    Args:
        program: Of ``uta_fx.export.program.sparsify_program``.
        sites: Of the same call.
        path: Where to; an existing file is replaced.
        opset: Version of the standard operations.
        metadata: Goes into the model's metadata, beside the version of the library and the sites.
        left: Names of the last outputs, as of ``Opened``. One of an input or a weight gets
            ``_after``, as do ``output``, ``output_0`` ... of the others.
        sizes: What symbols of the program are called in the file; None for as they are.
        dialect: What becomes of our operators; None for nodes beside their functions.

    Raises:
        ValueError: An operation of the model has no translation, or none in that opset; or it
            returns what is no tensor.
    """
    dialect = dialect or Dialect(lower=keep_nodes)
    returned = [spec.arg for spec in program.graph_signature.output_specs]
    constants = [x.value for x in returned if isinstance(x, ConstantArgument)]
    if others := [x for x in constants if x is not None]:
        raise ValueError(
            f"model must return tensors, got {others[0]!r} among its outputs: export a module that"
            " returns its tensors alone"
        )
    try:
        with _without_their_own_worries():
            program = _without_factors(_in_float32(_without_gaps(program)))
            program = _with_plain_attention(program, whole_masks=opset >= ATTENTION_OPSET)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table={**_translations(), **dialect.translations},
                verbose=False,
                optimize=False,  # its rewriter takes as long as all the rest and finds little
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what the exporter wraps says which operation it is
            cause = cause.__cause__
        raise ValueError(
            f"model cannot be written as ONNX: {cause}. Write this operation in others, or export a"
            " module without it"
        ) from error
    assert exported is not None
    model = exported.model
    if model.opset_imports[""] != opset:  # the exporter then leaves its own
        raise ValueError(
            f"model cannot be written in opset {opset}: the exporter does not know how all of its"
            " operations are written there. Take a lower opset"
        )
    _name_forms_of_weights(model)
    _hide_by_infinity(model)
    with _without_their_own_worries():
        fold_constants(model)
    _name_nodes(model)
    _name_sites(nodes_of(model, dialect.site_node), [site for site in sites if site.sparse])
    dialect.lower(model, opset)
    tidy = Passes(
        IdentityEliminationPass(), CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass()
    )
    tidy(model)
    _spell_out_boolean_where(model)
    _name_sizes(model.graph, sizes or {})
    own = len(model.graph.outputs) - len(left)
    names = ["output"] if own == 1 else [f"output_{index}" for index in range(own)]
    taken = {x.name for x in model.graph.inputs} | model.graph.initializers.keys()
    names = [f"{name}_after" if name in taken else name for name in [*names, *left]]
    _name_outputs(model.graph, names)
    model.metadata_props[VERSION_KEY] = __version__
    model.metadata_props.update(metadata)
    model.metadata_props[SITES_KEY] = json.dumps([_description(site) for site in sites])
    weights = [x.const_value for x in model.graph.initializers.values()]
    large = sum(x.nbytes for x in weights if x is not None) > LARGE
    data = f"{path.name}.{secrets.token_hex(4)}.data" if large else None
    with folder_beside(path, lambda folder: _drop_weights(path, folder)) as folder:
        ir.save(model, folder / path.name, external_data=data)
        try:
            onnx.checker.check_model(folder / path.name, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ValueError(
                f"model cannot be written in opset {opset}: {str(error).strip().rstrip('.')}. A"
                " later opset may know this: convolutions take bfloat16 from 22 on"
            ) from error
        (folder / REPLACED).write_text("\n".join(_files_of_weights(path)))
        if data is not None:
            os.replace(folder / data, path.parent / data)
        os.replace(folder / path.name, path)


def _drop_weights(path: Path, folder: Path) -> None:
    """Delete the file of weights that is in no use now, wherever a write has ended.

    While its own file is still in the folder, that is the one that it names; afterwards what the
    file in whose place it came has named.
    """
    written, replaced = folder / path.name, folder / REPLACED
    if written.exists():
        names = _files_of_weights(written)
    else:
        names = replaced.read_text().splitlines() if replaced.exists() else []
    for name in names:
        (path.parent / name).unlink(missing_ok=True)


def _files_of_weights(path: Path) -> list[str]:
    """The files beside an ONNX file that bear its name and hold its weights; none of no such file.

    One under another name may belong to several.
    """
    try:
        places = places_of_weights(onnx.load(path, load_external_data=False))
    except (FileNotFoundError, DecodeError):
        return []
    return [x for x in places if x.startswith(f"{path.name}.") and Path(x).name == x]


def _name_sizes(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Call symbols in shapes by their names: ``2*s44`` by ``2*half_width``."""
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*graph.inputs, *(x for node in graph for x in node.outputs)):
        if value.shape is not None:
            texts = (x if isinstance(x, int) else x.value for x in value.shape)
            value.shape = ir.Shape(
                symbol.sub(lambda x: names[x[0]], text) if isinstance(text, str) else text
                for text in texts
            )


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Name outputs; what is an input, or another output, as well becomes a value of its own."""
    named = set(graph.inputs)
    for index, (output, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        value = output
        if output in named:
            copied = ir.node("Identity", [output], name=f"{name}/Identity")
            graph.append(copied)
            (value,) = copied.outputs
            value.shape, value.type = output.shape, output.type
            graph.outputs[index] = value
        value.name = name
        named.add(value)


@contextlib.contextmanager
def _without_their_own_worries() -> Iterator[None]:
    """No word on operators of torchvision, None, nodes that stay, opsets or deprecations."""
    names = (
        "torch.onnx._internal.exporter._core",
        "torch.onnx._internal.exporter._registration",
        "onnxscript.optimizer._constant_folding",
        "onnxscript.version_converter",
        "onnx_ir._convenience",
    )
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


def _without_gaps(program: ExportedProgram) -> ExportedProgram:
    """What the exporter cannot write for some dtypes or sizes, by operations that it can.

    For complex numbers it has few words. Einsum wants one dtype, which is not bfloat16, and so do
    sequences, as which it writes parts whose sizes only a run knows.
    """
    aten = torch.ops.aten
    rare = (aten.split_with_sizes.default, aten.einsum.default)
    common = (aten.expand.default, aten.unsqueeze.default, aten.index_select.default)
    gaps = (*rare, *common)
    nodes = [x for gap in gaps for x in program.graph.find_nodes(op="call_function", target=gap)]
    if not any(x.target in rare or x.args[0].meta["val"].is_complex() for x in nodes):
        return program

    def split(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
        if not x.is_complex() and all(isinstance(size, int) for size in sizes):
            return NotImplemented
        ends = itertools.accumulate(sizes)
        return [x.narrow(dim, end - size, size) for size, end in zip(sizes, ends, strict=True)]

    def expand(x: torch.Tensor, sizes: Sequence[int], implicit: bool = False) -> Any:
        if not x.is_complex():
            return NotImplemented
        return torch.view_as_complex(torch.view_as_real(x).expand(*sizes, 2))

    def unsqueeze(x: torch.Tensor, dim: int) -> Any:
        if not x.is_complex():
            return NotImplemented
        return torch.view_as_complex(torch.view_as_real(x).unsqueeze(dim - (dim < 0)))

    def index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
        if not x.is_complex():
            return NotImplemented
        parts = torch.view_as_real(x).index_select(dim - (dim < 0), index)
        return torch.view_as_complex(parts)

    products = torch.export.default_decompositions()[aten.einsum.default]

    def einsum(equation: str, tensors: Sequence[torch.Tensor], path: Any = None) -> Any:
        dtypes = {x.dtype for x in tensors}
        if len(dtypes) == 1 and torch.bfloat16 not in dtypes:
            return NotImplemented
        return products(equation, tensors, path=path)

    spelled = (split, einsum, expand, unsqueeze, index_select)
    return program.run_decompositions(dict(zip(gaps, spelled, strict=True)))


def _in_float32(program: ExportedProgram) -> ExportedProgram:
    """What ONNX Runtime's CPU provider has in float32 and not in some dtypes, in float32 there."""
    aten = torch.ops.aten
    gaps = {aten.pad.default: torch.bfloat16, aten.avg_pool1d.default: torch.float64}

    def widened(gap: Any, dtype: torch.dtype) -> Callable[..., Any]:
        def compute(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if x.dtype != dtype:
                return NotImplemented
            return gap(x.float(), *arguments, **options).to(dtype)

        return compute

    dtypes = {
        (gap, node.args[0].meta["val"].dtype)
        for gap in gaps
        for node in program.graph.find_nodes(op="call_function", target=gap)
    }
    if not dtypes & set(gaps.items()):
        return program
    return program.run_decompositions({gap: widened(gap, dtype) for gap, dtype in gaps.items()})


def _with_plain_attention(program: ExportedProgram, whole_masks: bool) -> ExportedProgram:
    """Dense attention as the exporter takes it; with ``whole_masks`` as ONNX Runtime's node does.

    Its CPU provider wants a row for each query and a column for each key, of which ONNX takes one.
    Neither takes none: attention to no keys, such as a text of length 0, is zero.
    """

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        if _is(key.shape[-2], 0):
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        if query.dim() == 3:
            mask = None if mask is None else mask[None]
            tensors = (query[None], key[None], value[None], mask)
            return DENSE(*tensors, *arguments, **options)[0]
        if mask is None or not whole_masks:
            return NotImplemented
        sizes = query.shape[-2], key.shape[-2]
        pairs = zip(mask.shape[-2:], sizes, strict=True)
        if not any(_is(got, 1) and not _is(size, 1) for got, size in pairs):
            return NotImplemented
        mask = mask.expand(*mask.shape[:-2], *sizes)
        return DENSE(query, key, value, mask, *arguments, **options)

    for call in program.graph.find_nodes(op="call_function", target=DENSE):
        query, key = (x.meta["val"] for x in call.args[:2])
        if query.dim() == 3 or _is(key.shape[-2], 0) or (whole_masks and call.args[3:4]):
            return program.run_decompositions({DENSE: compute})
    return program


def _is(size: int | torch.SymInt, number: int) -> bool:
    return isinstance(size, int) and size == number


def _without_factors(program: ExportedProgram) -> ExportedProgram:
    """QR factors of a matrix with more rows than columns, as many reflections as it has columns."""
    qr = torch.ops.aten.linalg_qr.default
    if not program.graph.find_nodes(op="call_function", target=qr):
        return program
    return program.run_decompositions({qr: _reduced_qr})


def _reduced_qr(matrix: torch.Tensor, mode: str = "reduced") -> Any:
    """Householder's reflections, with signs as LAPACK takes them."""
    if mode != "reduced" or matrix.dim() != 2 or matrix.shape[0] <= matrix.shape[1]:
        return NotImplemented
    length, columns = matrix.shape
    rows = torch.arange(length, device=matrix.device)
    factor, reflections = matrix, []
    for column in range(columns):
        below = factor[:, column : column + 1] * (rows >= column)[:, None]
        first = below[column]
        size = below.square().sum().sqrt()
        away = torch.where(first < 0, -size, size)
        normal = below + away * (rows == column)[:, None]
        reflections.append((normal, 2 / normal.square().sum()))
        factor = factor - reflections[-1][1] * normal @ (normal.mT @ factor)
    basis = torch.eye(length, columns, dtype=matrix.dtype, device=matrix.device)
    for normal, weight in reversed(reflections):
        basis = basis - weight * normal @ (normal.mT @ basis)
    return basis, factor[:columns].triu()


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes our operators, as nodes of our domain, and some of PyTorch's."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter  # slow to import

    domain = Opset(DOMAIN, VERSION)
    nodes = {name: Op(domain, name, schema) for name, schema in schemas().items()}

    def sparse_attention(
        query: Any,
        key: Any,
        value: Any,
        block_ids: Any,
        block_counts: Any,
        tail_key: Any,
        tail_value: Any,
        tail_log_size: Any,
        tail_variance: Any,
        tail_slope: Any,
        scale: float,
        variance_weight: float,
        block_q: int,
        block_kv: int,
    ) -> Any:
        if block_ids.shape[3] == 0:  # no lists: a column that nothing reads, TensorRT has no empty
            axis = opset18.Constant(value_ints=[3])
            block_ids = opset18.Unsqueeze(block_counts, axis)
            block_ids.shape = ir.Shape([*block_counts.shape, 1])
            block_ids.dtype = block_counts.dtype
        per_block = len(tail_key.shape) == 4
        tail = (tail_key, tail_value, tail_log_size)
        if per_block:
            axis = opset18.Constant(value_ints=[2])
            tail = tuple(_sized_like(opset18.Unsqueeze(x, axis), x) for x in tail)
        return nodes["SparseAttention"](
            query, key, value, block_ids, block_counts, *tail, tail_variance, tail_slope,
            scale=scale, variance_weight=variance_weight, block_q=block_q, block_kv=block_kv,
            per_block=int(per_block and tail_key.shape[2] != 0),
        )  # fmt: skip

    def rectified_attention(
        query: Any,
        key: Any,
        value: Any,
        block_ids: Any,
        block_counts: Any,
        text_key: Any,
        text_value: Any,
        text_bias: Any,
        gain: Any,
        offset: Any,
        scale: float,
        block_q: int,
        block_kv: int,
    ) -> Any:
        """The same node, with the text as its tail; gain and offset after it."""
        zero, two, four = (opset18.Constant(value_ints=[number]) for number in (0, 2, 4))
        text = (
            _sized_like(opset18.Unsqueeze(x, two), x) for x in (text_key, text_value, text_bias)
        )
        lead, dim, dim_v = list(query.shape[:2]), query.shape[3], value.shape[3]
        variance = opset18.Slice(query, zero, zero, two)
        variance.shape, variance.dtype = ir.Shape([*lead, 0, dim]), query.dtype
        slope = opset18.Expand(
            opset18.Unsqueeze(variance, four), opset18.Constant(value_ints=[1, 1, 1, 1, dim_v])
        )
        slope.shape, slope.dtype = ir.Shape([*lead, 0, dim, dim_v]), query.dtype
        output, _ = nodes["SparseAttention"](
            query, key, value, block_ids, block_counts, *text, variance, slope, scale=scale,
            variance_weight=0.0, block_q=block_q, block_kv=block_kv, per_block=0,
        )  # fmt: skip
        rows = opset18.Constant(value_ints=[row // block_q for row in range(query.shape[2])])
        gains = opset18.Gather(
            opset18.Unsqueeze(gain, opset18.Constant(value_ints=[3])), rows, axis=2
        )
        scaled = opset18.Mul(opset18.Cast(output, to=ir.DataType.FLOAT), gains)
        return opset18.CastLike(opset18.Add(scaled, opset18.Gather(offset, rows, axis=2)), query)

    def block_statistics(key: Any, value: Any, block_kv: int) -> Any:
        return nodes["BlockStatistics"](key, value, block_kv=block_kv)

    def block_scores(
        query: Any,
        key_mean: Any,
        key_variance: Any,
        log_size: Any,
        scale: float,
        variance_weight: float,
        variance_power: float,
        block_q: int,
        rows: int,
    ) -> Any:
        wide = query.dtype == ir.DataType.FLOAT
        return nodes["BlockScores"](
            query, key_mean, key_variance, log_size, scale=scale,
            variance_weight=variance_weight, variance_power=variance_power, block_q=block_q,
            rows=rows, score_type=ir.DataType.FLOAT if wide else ir.DataType.BFLOAT16,
        )  # fmt: skip

    def one_number(x: Any) -> Any:
        """As a tensor of one dimension."""
        if isinstance(x, int):
            return opset18.Constant(value_ints=[x])
        numbers = opset18.Reshape(x, opset18.Constant(value_ints=[1]))
        numbers.shape, numbers.dtype = ir.Shape([1]), ir.DataType.INT64
        return numbers

    def select_blocks(scores: Any, kept: Any, rows: Any) -> Any:
        if not (isinstance(kept, int) and isinstance(rows, int)):
            return nodes["SelectCounted"](scores, one_number(kept), one_number(rows))
        return nodes["SelectBlocks"](scores, kept=kept, rows=rows)

    def floordiv(a: Any, b: Any) -> Any:
        """Rounded down, also below zero, where the exporter's own rounds to zero."""
        return opset18.Div(opset18.Sub(a, opset18.Mod(a, b)), b)

    def list_blocks(exact: Any) -> Any:
        return nodes["ListBlocks"](exact)

    def fit_tail(
        query: Any,
        key: Any,
        value: Any,
        exact: Any,
        key_counts: Any,
        key_mean: Any,
        key_variance: Any,
        value_mean: Any,
        log_size: Any,
        slope: Any,
        scale: float,
        variance_weight: float,
        rows: int,
        block_q: int,
        block_kv: int,
    ) -> Any:
        return nodes["FitTail"](
            query, key, value, exact, key_counts, key_mean, key_variance, value_mean, log_size,
            slope, scale=scale, variance_weight=variance_weight, rows=rows, block_q=block_q,
            block_kv=block_kv,
        )  # fmt: skip

    def squeeze(x: Any, dim: int) -> Any:
        """Where a dimension is not 1 PyTorch leaves it, and ONNX does not."""
        if x.shape[dim] != 1:
            return opset18.Identity(x)
        return opset18.Squeeze(x, opset18.Constant(value_ints=[dim]))

    def sort(x: Any, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: of equal values the one with the lower index comes first."""
        dim %= len(x.shape)
        wider = {ir.DataType.BOOL: ir.DataType.INT32, ir.DataType.BFLOAT16: ir.DataType.FLOAT}
        ranked = opset18.Cast(x, to=wider[x.dtype]) if x.dtype in wider else x
        values, order = opset18.TopK(
            ranked,
            opset18.Shape(x, start=dim, end=dim + 1),
            axis=dim,
            largest=int(descending),
            sorted=1,
        )
        return opset18.CastLike(values, x) if x.dtype in wider else values, order

    def stable_sort(
        x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
    ) -> Any:
        return sort(x, dim, descending)

    def scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
        """Numbers of 16 bits add up in float32: ONNX Runtime's CPU provider adds no others."""
        if x.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return opset18.ScatterElements(x, index, source, axis=dim, reduction="add")
        wide, more = (opset18.Cast(y, to=ir.DataType.FLOAT) for y in (x, source))
        total = opset18.ScatterElements(wide, index, more, axis=dim, reduction="add")
        return opset18.CastLike(total, x)

    def slice_scatter(
        x: Any,
        source: Any,
        dim: int = 0,
        start: int | None = None,
        end: int | None = None,
        step: int = 1,
    ) -> Any:
        """Numbers side by side with those that they do not replace.

        Models turn pairs of channels so (rotary embeddings). The exporter's own form, ScatterND,
        takes an index for each number.
        """
        sizes, dim = list(x.shape), dim % len(x.shape)
        size, count, inner = sizes[dim], source.shape[dim], sizes[dim + 1 :]
        several = step > 1
        known = all(isinstance(n, int) for n in (size, count, *(inner if several else ())))
        first = slice(start, end).indices(size)[0] if known else 0
        if not known or (several and (count * step != size or first >= step)):
            return aten_slice_scatter(x, source, dim, start, end, step)

        def numbers(*values: int) -> Any:
            return opset18.Constant(value_ints=list(values))

        if several:  # in a dimension of their own; a 0 is a size that stays
            x = opset18.Reshape(x, numbers(*[0] * dim, count, step, *inner))
            source = opset18.Reshape(source, numbers(*[0] * dim, count, 1, *inner))
        axis = dim + several
        rest = first + (1 if several else count), step if several else size
        before, after = (
            [opset18.Slice(x, numbers(low), numbers(high), numbers(axis))] if high > low else []
            for low, high in ((0, first), rest)
        )
        joined = opset18.Concat(*before, source, *after, axis=axis)
        return opset18.Reshape(joined, numbers(*[0] * dim, size, *inner)) if several else joined

    def written(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        """An operator that returns a constant, as that constant."""

        def constant(like: Any, *arguments: Any) -> Any:
            return opset18.Constant(
                value=onnx.numpy_helper.from_array(function(*arguments).numpy())
            )

        return constant

    return {
        **{overload: written(function) for overload, function in CONSTANTS.items()},
        operator.floordiv: floordiv,
        torch.ops.aten.squeeze.dim: squeeze,
        torch.ops.aten.slice_scatter.default: slice_scatter,
        torch.ops.aten.scatter_add.default: scatter_add,
        torch.ops.aten.sort.default: sort,
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.uta.sparse_attention.default: sparse_attention,
        torch.ops.uta.rectified_attention.default: rectified_attention,
        torch.ops.uta.block_statistics.default: block_statistics,
        torch.ops.uta.block_scores.default: block_scores,
        torch.ops.uta.select_blocks.default: select_blocks,
        torch.ops.uta.list_blocks.default: list_blocks,
        torch.ops.uta.fit_tail.default: fit_tail,
    }


def _sized_like(unsqueezed: ir.Value, x: ir.Value) -> ir.Value:
    """Note the sizes of ``x`` with a dimension of 1 in the third place."""
    assert x.shape is not None
    unsqueezed.shape, unsqueezed.dtype = ir.Shape([*x.shape[:2], 1, *x.shape[2:]]), x.dtype
    return unsqueezed


def nodes_of(model: ir.Model, name: str) -> list[ir.Node]:
    """The nodes ``uta::name``, in the order in which they run."""
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, name)]


def keep_nodes(model: ir.Model, opset: int) -> None:
    """Leave the nodes in ``KEPT`` beside their functions; inline the functions of the others."""
    sizes = {
        node: [(value.shape, value.dtype) for value in node.inputs]
        for name in KEPT
        for node in nodes_of(model, name)
    }
    attention = [sparse_attention_function(opset)] if nodes_of(model, "SparseAttention") else []
    inline(model, [*selection_functions(model, opset), *attention], keep=KEPT)
    for node, known in sizes.items():  # a plugin is built for them; inlining forgets some
        for value, (shape, dtype) in zip(node.inputs, known, strict=True):
            value.shape, value.dtype = shape, dtype


def selection_functions(model: ir.Model, opset: int) -> list[onnx.FunctionProto]:
    """What those nodes of a model compute that come before attention."""
    powers = {
        node.attributes["variance_power"].as_float() for node in nodes_of(model, "BlockScores")
    }
    power = powers.pop() if len(powers) == 1 else None
    functions = {
        "BlockStatistics": block_statistics_function(opset),
        "BlockScores": block_scores_function(opset, power),
        "SelectBlocks": select_blocks_function(opset),
        "SelectCounted": select_counted_function(opset),
        "ListBlocks": list_blocks_function(opset),
        "FitTail": fit_tail_function(opset),
    }
    return [function for name, function in functions.items() if nodes_of(model, name)]


def inline(
    model: ir.Model, functions: Iterable[onnx.FunctionProto], keep: Container[str] = ()
) -> None:
    """Put functions beside a graph and in the place of their nodes, except those to keep."""
    for proto in functions:
        function = ir.from_proto(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
    InlinePass(criteria=lambda function: function.name not in keep)(model)


def _spell_out_boolean_where(model: ir.Model) -> None:
    """``Where`` of two booleans as logic: ONNX Runtime has no kernel for it."""
    for node in list(model.graph):
        if node.op_type != "Where" or node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        condition, yes, no = node.inputs
        parts = [
            ir.node("Not", [condition]),
            ir.node("And", [condition, yes]),
            ir.node("And", [None, no]),
            ir.node("Or", [None, None]),
        ]
        parts[2].replace_input_with(0, parts[0].outputs[0])
        for place in range(2):
            parts[3].replace_input_with(place, parts[1 + place].outputs[0])
        for part in parts:
            part.outputs[0].dtype = ir.DataType.BOOL
        result, value = node.outputs[0], parts[3].outputs[0]
        value.name, value.shape = result.name, result.shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], parts, node.outputs, [value]
        )


def _hide_by_infinity(model: ir.Model) -> None:
    """Give zeros where a mask hides every key of a query, as PyTorch and ONNX's Attention do.

    The exporter puts zero for NaN, which a softmax of nothing but -inf is, and yet hides keys by
    the lowest number, of which the softmax is the same for all.
    """
    for node in model.graph:
        written_for = node.metadata_props.get("namespace", "")
        if node.op_type != "Where" or not written_for.endswith(f": {DENSE}"):
            continue
        hidden = ir.convenience.get_const_tensor(node.inputs[2])
        if hidden is not None and hidden.numpy() == hidden.dtype.min:
            infinity = ir.tensor(-math.inf, dtype=hidden.dtype)
            constant = ir.node("Constant", [], {"value": infinity})
            constant.outputs[0].shape, constant.outputs[0].dtype = ir.Shape([]), hidden.dtype
            model.graph.insert_before(node, constant)
            node.replace_input_with(2, constant.outputs[0])


def _name_forms_of_weights(model: ir.Model) -> None:
    """Name the forms of a weight after it: folding leaves ``weight.transposed`` in its place.

    Once: layers that share a weight share its forms.
    """
    forms = {
        "Cast": "cast",
        "Reshape": "reshaped",
        "Transpose": "transposed",
        "Unsqueeze": "unsqueezed",
    }
    weights = set(model.graph.initializers.values())
    seen: Counter[str] = Counter()
    made: dict[Any, ir.Value] = {}
    for node in model.graph:
        if node.op_type in forms and node.inputs[0] in weights:
            form = node.outputs[0]
            how = node.op_type, node.inputs, repr(sorted(node.attributes.items()))
            if made.setdefault(how, form) is not form and not form.is_graph_output():
                ir.convenience.replace_all_uses_with(form, made[how])
                continue
            name = f"{node.inputs[0].name}.{forms[node.op_type]}"
            form.name = f"{name}_{seen[name]}" if seen[name] else name
            seen[name] += 1
            weights.add(form)


def _name_nodes(model: ir.Model) -> None:
    """Name nodes after the modules that they are of, which a viewer shows, such as Netron.

    Of what the exporter notes beside a node its namespace alone stays, by which viewers fold a
    graph: stack traces hold the paths of this machine.
    """
    for node in model.graph:
        notes = node.metadata_props
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))  # and its own
        path = scopes[-2] if len(scopes) > 1 else ""
        node.name = f"{path}/{(node.name or '').removeprefix('node_')}".removeprefix("/")
        for key in [key for key in notes if key != "namespace"]:
            del notes[key]


def _name_sites(nodes: Sequence[ir.Node], sites: Sequence[Site]) -> None:
    """Name the nodes after the modules that attend.

    A joint site is two, its video and its text, or one for both (``rectified``).
    """
    names = []
    for site in sites:
        if site.text is None or len(nodes) == len(sites):
            names.append(site.name)
        else:
            names += [f"{site.name}/video", f"{site.name}/text"]
    seen: Counter[str] = Counter()
    for name, node in zip(names, nodes, strict=True):
        call = f".{seen[name]}" if seen[name] else ""  # of a module that attends more than once
        node.name = f"{name}/{node.op_type}{call}"
        seen[name] += 1


def _description(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "shape": site.shape,
        "grid": site.grid and [side if isinstance(side, int) else str(side) for side in site.grid],
        "text": site.text,
        "sparse": site.sparse,
        "reason": site.reason,
    }
