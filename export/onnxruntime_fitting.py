"""Which kernels ONNX Runtime's plugin runs for a ``FitTail`` node: those of ``triton_fitting``."""

from __future__ import annotations

from typing import NamedTuple

from uta_fx.export.onnxruntime_kernels import (
    DTYPES,
    SHARED_KB,
    Kernel,
    NodeOfFile,
    compile_kernel,
    parameter_type,
)
from uta_fx.kernels import triton_fitting
from uta_fx.kernels.contract import MAX_FIT_ROWS

_POINTERS = {
    "exact": "u8", "counts": "i32", "square": "fp32", "size": "fp32",
    "slope": "fp32", "masses": "fp32", "mass": "fp32", "gain": "fp32",
}  # fmt: skip


class FitVariant(NamedTuple):
    """For which ``FitTail`` nodes kernels are compiled; the key as in the C source."""

    dtype: int
    dim: int
    dim_v: int
    block_q: int
    block_kv: int
    counted: bool  # key blocks say how many keys they hold

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(map(int, self))


def fit_variants(node: NodeOfFile, architecture: int) -> list[FitVariant]:
    """The one of a ``FitTail`` node.

    Raises:
        ValueError: A size that a kernel needs is not known, or there are more rows than it takes.
    """
    rows = node.attributes["rows"]
    if not 1 <= rows <= MAX_FIT_ROWS:
        raise ValueError(f"node {node.name}: rows must lie in [1, {MAX_FIT_ROWS}], got {rows}")
    return [
        FitVariant(
            dtype=node.dtype(0),
            dim=node.known(0, 3),
            dim_v=node.known(2, 3),
            block_q=node.attributes["block_q"],
            block_kv=node.attributes["block_kv"],
            counted=not node.is_empty(4, 2),
        )
    ]


def compile_fit(variant: FitVariant, architecture: int) -> dict[str, Kernel]:
    """The kernels of a variant by their place in the C source, in the order in which they run.

    Raises:
        RuntimeError: Triton could not compile one of them.
    """
    dtype, name = DTYPES[variant.dtype]
    sizes = (dtype, variant.dim, variant.dim_v, variant.block_q, variant.block_kv)
    tile = triton_fitting.sample_tile(*sizes, SHARED_KB[architecture] * 1024)
    kernels = {
        "SQUARE": (
            triton_fitting._square_kernel,
            triton_fitting.square_options(variant.dim, variant.block_q),
        ),
        "SAMPLE": (
            triton_fitting._sample_kernel,
            triton_fitting.sample_options(*sizes, variant.counted, tile) | {"size_sn": 1},
        ),
        "SOLVE": (triton_fitting._solve_kernel, triton_fitting.solve_options(*sizes[:3])),
    }
    divisible = set()
    for tensor, dim in (("q", variant.dim), ("k", variant.dim), ("v", variant.dim_v)):
        if dim % 16 == 0:
            divisible |= {f"{tensor}_s{place}" for place in "bhmn"}
    return {
        place: compile_kernel(
            function, architecture, options,
            types={x: parameter_type(x, name, _POINTERS) for x in function.arg_names},
            divisible=divisible | {x for x in function.arg_names if x.endswith("_ptr")},
        )
        for place, (function, options) in kernels.items()
    }  # fmt: skip
