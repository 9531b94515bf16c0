"""Which kernels ONNX Runtime's plugin runs for the nodes that select blocks."""

from __future__ import annotations

from typing import NamedTuple

from onnx import TensorProto

from uta_fx.export.onnxruntime_kernels import Kernel, NodeOfFile, compile_kernel
from uta_fx.kernels import triton_selection
from uta_fx.kernels.triton_selection import SIZES

_NAMES = {"counts_ptr": "digits_ptr"}


class SelectionVariant(NamedTuple):
    """For which ``SelectBlocks`` nodes kernels are compiled; the key as in the C source."""

    dtype: int
    blocks: int  # of keys
    rows: int  # that share a budget

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(self)


def selection_variants(node: NodeOfFile) -> list[SelectionVariant]:
    """The one of a ``SelectBlocks`` node.

    Raises:
        ValueError: How many blocks there are is not known.
    """
    return [SelectionVariant(node.dtype(0), node.known(0, 3), node.attributes["rows"])]


def compile_selection(variant: SelectionVariant, architecture: int) -> dict[str, Kernel]:
    """The kernels of a variant by their place in the C source, in the order in which they run.

    Raises:
        RuntimeError: Triton could not compile one of them.
    """
    kernels = triton_selection.selection_kernels(
        32 if variant.dtype == TensorProto.FLOAT else 16, variant.blocks, variant.rows
    )
    pointers = {
        "bits_ptr": "*i32" if variant.dtype == TensorProto.FLOAT else "*i16",
        "best_ptr": "*i32", "counts_ptr": "*i64", "tied_ptr": "*i32", "kept_ptr": "*u8",
    }  # fmt: skip
    divisible = {*pointers, "share"}  # a program takes so many rows at a time
    assert SIZES.rows % 16 == 0
    divisible |= {x for x in ("rows", "blocks") if getattr(variant, x) % 16 == 0}
    last = len(kernels) - 1
    places = ["IN_ROW"]
    if variant.rows > 1:
        places = ["FIRST", *(f"NEXT + {i}" for i in range(last - 1)), "KEEP"]
    return {
        place: compile_kernel(
            function, architecture, options, names=_NAMES, divisible=divisible,
            types={name: pointers.get(name, "i32") for name in function.arg_names},
        )
        for place, (function, options) in zip(places, kernels, strict=True)
    }  # fmt: skip
