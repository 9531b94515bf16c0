"""Which kernels ONNX Runtime's plugin runs for the nodes that select blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

from onnx import TensorProto

from uta_fx.export.onnxruntime_kernels import (
    DTYPES,
    HOPPER,
    MANY,
    OPEN,
    SHARED_KB,
    Kernel,
    NodeOfFile,
    compile_kernel,
    map_type,
    parameter_type,
)
from uta_fx.kernels import triton_scores, triton_selection, triton_statistics
from uta_fx.kernels.triton_attention import gluon_attention
from uta_fx.kernels.triton_scores import gluon_scores
from uta_fx.kernels.triton_selection import SIZES
from uta_fx.kernels.triton_statistics import gluon_statistics

_NAMES = {"counts_ptr": "digits_ptr"}
_POWERS = (0.0, 0.5, 1.0)  # that kernels know; the C source numbers them so


class StatisticsVariant(NamedTuple):
    """For which ``BlockStatistics`` nodes kernels are compiled; the key as in the C source."""

    dtype: int
    dim: int
    dim_v: int
    block_kv: int

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(self)


def statistics_variants(node: NodeOfFile, architecture: int) -> list[StatisticsVariant]:
    """The one of a ``BlockStatistics`` node.

    Raises:
        ValueError: A size that a kernel needs is not known, or there is no kernel: only that for
            Hopper stores means in 16 bits.
    """
    block = node.attributes["block_kv"]
    variant = StatisticsVariant(node.dtype(0), node.known(0, 3), node.known(1, 3), block)
    if (
        architecture != HOPPER
        or gluon_statistics is None
        or not gluon_attention.takes_sizes(
            DTYPES[variant.dtype][0], variant.dim, variant.dim_v, block, block
        )
    ):
        raise ValueError(f"node {node.name}: there is no kernel for {variant} on sm_{architecture}")
    return [variant]


def compile_statistics(variant: StatisticsVariant, architecture: int) -> dict[str, Kernel]:
    """The kernels of a variant by their place in the C source, in the order in which they run.

    Raises:
        RuntimeError: Triton could not compile one of them.
    """
    name = DTYPES[variant.dtype][1]
    tile = map_type(name, variant.block_kv, variant.dim)
    types = {"k_desc": tile, "v_desc": tile} | dict.fromkeys(
        ("k_mean_ptr", "k_var_ptr", "v_mean_ptr"), f"*{name}"
    )
    floats = ("v_var_ptr", "cov_ptr", "sums_ptr", "total_ptr")
    pool, add = gluon_statistics._statistics_kernel, triton_statistics._sum_kernel
    types |= dict.fromkeys(floats, "*fp32")
    types = dict.fromkeys((*pool.arg_names, *add.arg_names), "i32") | types
    divisible = {parameter for parameter in types if parameter.endswith("_ptr")}
    return {
        "POOL": compile_kernel(
            pool, architecture, gluon_statistics.statistics_options(variant.dim), types=types,
            divisible=divisible, names={"cov_ptr": "sums_ptr"},
        ),
        "SUM": compile_kernel(
            add, architecture, triton_statistics.SUM_OPTIONS, types=types,
            divisible=divisible | {"size"}, blocks=triton_statistics.SUM_COLUMNS,
        ),
    }  # fmt: skip


class ScoresVariant(NamedTuple):
    """For which ``BlockScores`` nodes a kernel is compiled; the key as in the C source."""

    dtype: int
    dim: int
    blocks: int  # of keys, or OPEN
    block_q: int
    rows: int  # of a group
    weighted: bool  # the variance takes part in the mass
    power: int  # its place in ``_POWERS``, or beyond

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(map(int, self))


def scores_variants(node: NodeOfFile, architecture: int) -> list[ScoresVariant]:
    """The one of a ``BlockScores`` node.

    Raises:
        ValueError: A size that a kernel needs is not known.
    """
    attributes = node.attributes
    power = attributes["variance_power"]
    return [
        ScoresVariant(
            dtype=node.dtype(0),
            dim=node.known(0, 3),
            blocks=node.size_or(1, 2, OPEN),
            block_q=attributes["block_q"],
            rows=attributes["rows"],
            weighted=attributes["variance_weight"] != 0,
            power=_POWERS.index(power) if power in _POWERS else len(_POWERS),
        )
    ]


def compile_scores(variant: ScoresVariant, architecture: int) -> dict[str, Kernel]:
    """The kernel of a variant, as PyTorch's operator takes it.

    Raises:
        RuntimeError: Triton could not compile it.
    """
    dtype, name = DTYPES[variant.dtype]
    weight, power = float(variant.weighted), (*_POWERS, -1.0)[variant.power]  # of their kinds
    numbers = (weight, power, variant.block_q, variant.rows)
    function: Any
    if (
        architecture == HOPPER
        and gluon_scores is not None
        and gluon_scores.takes_sizes(dtype, variant.dim, *numbers[1:])
    ):
        function = gluon_scores._scores_kernel
        options = gluon_scores.score_options(variant.dim, *numbers)
        rows = gluon_scores.rows_of_program(variant.dim, variant.rows)
    else:
        function, limit = triton_scores._scores_kernel, SHARED_KB[architecture] * 1024
        blocks = MANY if variant.blocks == OPEN else variant.blocks
        tile = triton_scores.score_tile(dtype, variant.dim, blocks, limit)
        options = triton_scores.score_options(dtype, variant.dim, *numbers, tile)
        rows = triton_scores.rows_of_program(tile, variant.block_q, variant.rows)
    wide = "fp32" if variant.dtype == TensorProto.FLOAT else "bf16"
    pointers = {"size": "fp32", "scores": wide}
    types = {
        x: map_type(name, gluon_scores.TILE, variant.dim)
        if x.endswith("_desc")
        else parameter_type(x, name, pointers)
        for x in function.arg_names
    }
    divisible = {"q_ptr", "mean_ptr", "var_ptr", "size_ptr", "scores_ptr"}
    if variant.dim % 16 == 0:
        divisible |= {"q_sb", "q_sh", "q_sm", "mean_sb", "mean_sh", "mean_sn"}
        divisible |= {"var_sb", "var_sh", "var_sn"}
    if variant.blocks % 16 == 0:
        divisible |= {"blocks", "size_sb", "size_sh"}
    kernel = compile_kernel(
        function, architecture, options, types=types, divisible=divisible, blocks=rows
    )
    return {"SCORE": kernel}


class SelectionVariant(NamedTuple):
    """For which ``SelectBlocks`` nodes kernels are compiled; the key as in the C source."""

    dtype: int
    blocks: int  # of keys, or OPEN
    rows: int  # that share a budget, or OPEN

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(self)


def selection_variants(node: NodeOfFile, architecture: int) -> list[SelectionVariant]:
    """The one of a ``SelectBlocks`` or ``SelectCounted`` node."""
    rows = node.attributes.get("rows", OPEN)
    return [SelectionVariant(node.dtype(0), node.size_or(0, 3, OPEN), rows)]


def compile_selection(variant: SelectionVariant, architecture: int) -> dict[str, Kernel]:
    """The kernels of a variant by their place in the C source, in the order in which they run.

    Raises:
        RuntimeError: Triton could not compile one of them.
    """
    width = 32 if variant.dtype == TensorProto.FLOAT else 16
    blocks = MANY if variant.blocks == OPEN else variant.blocks
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {}
    if variant.rows in (1, OPEN):
        in_row = triton_selection.selection_kernels(width, blocks, 1)
        kernels |= zip(("IN_ROW",), in_row, strict=True)
    if variant.rows != 1:
        passes = triton_selection.selection_kernels(width, blocks, variant.rows)
        places = ("FIRST", *(f"NEXT + {i}" for i in range(len(passes) - 2)), "KEEP")
        kernels |= zip(places, passes, strict=True)
    pointers = {
        "bits_ptr": "*i32" if variant.dtype == TensorProto.FLOAT else "*i16",
        "best_ptr": "*i32", "counts_ptr": "*i64", "tied_ptr": "*i32", "kept_ptr": "*u8",
    }  # fmt: skip
    divisible = {*pointers, "share"}  # a program takes so many rows at a time
    assert SIZES.rows % 16 == 0
    divisible |= {x for x in ("rows", "blocks") if getattr(variant, x) % 16 == 0}  # not OPEN
    return {
        place: compile_kernel(
            function, architecture, options, names=_NAMES, divisible=divisible,
            types={name: pointers.get(name, "i32") for name in function.arg_names},
        )
        for place, (function, options) in kernels.items()
    }  # fmt: skip


class ListsVariant(NamedTuple):
    """For which ``ListBlocks`` nodes a kernel is compiled; the key as in the C source."""

    dtype: int
    blocks: int  # of keys, or OPEN

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(self)


def lists_variants(node: NodeOfFile, architecture: int) -> list[ListsVariant]:
    """The one of a ``ListBlocks`` node."""
    return [ListsVariant(TensorProto.BOOL, node.size_or(0, 3, OPEN))]


def compile_lists(variant: ListsVariant, architecture: int) -> dict[str, Kernel]:
    """The kernel of a variant.

    Raises:
        RuntimeError: Triton could not compile it.
    """
    pointers = {"kept_ptr": "*u8", "ids_ptr": "*i32", "counts_ptr": "*i32"}
    options = triton_selection.list_options(MANY if variant.blocks == OPEN else variant.blocks)
    kernel = compile_kernel(
        triton_selection._list_kernel, architecture, options,
        types={"rows": "i32", "blocks": "i32"} | pointers, blocks=SIZES.list_rows,
        divisible={*pointers, *(["blocks"] if variant.blocks % 16 == 0 else [])},
    )  # fmt: skip
    return {"LIST": kernel}
