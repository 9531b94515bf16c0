"""The kernels of our TensorRT plugins: which, with which constants, on which grid, and as PTX.

Needs Triton and neither TensorRT nor a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from uta_fx.export.onnxruntime_kernels import SHARED_KB
from uta_fx.export.tensorrt_ops import PLUGINS
from uta_fx.kernels import triton_attention, triton_scores, triton_tensorrt
from uta_fx.kernels.reference import score_dtype
from uta_fx.kernels.triton_attention import (
    ID_CHUNK,
    LOG2_E,
    dim_options,
    dot_precision,
    fit_tile,
)

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_SMALL_SHARED = 48 * 1024  # bytes that any launch may use without asking for them

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One launch.

    Attributes:
        kernel: Entry of ``uta_fx.kernels.triton_tensorrt``.
        constants: All its parameters but pointers.
        grid: Programs along x and y.
        options: ``num_warps`` and ``num_stages``.
    """

    kernel: JITFunction[Any]
    constants: Mapping[str, Any]
    grid: tuple[int, int]
    options: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What TensorRT wants to know of a kernel.

    Attributes:
        name: Of its entry.
        ptx: Its code; the entry's parameters are the pointers of inputs and outputs alone.
        grid: Programs along x and y.
        threads: Of one program.
        shared: Bytes of shared memory of one program.
    """

    name: str
    ptx: str
    grid: tuple[int, int]
    threads: int
    shared: int


def attend_tail_layer(
    shapes: Sequence[Shape], dtype: torch.dtype, limit: int, *, scale: float,
    variance_weight: float, block_q: int, per_block: int, has_variance: int, has_slope: int,
) -> Layer:  # fmt: skip
    """The launch of ``uta::attend_tail`` on inputs of these shapes, with so much shared memory."""
    (batch, heads, length_q, dim), dim_v = shapes[0], shapes[3][-1]
    tails, representatives = shapes[2][2:4]
    block = max(16, triton.next_power_of_2(representatives))
    sizes = (dtype, max(dim, dim_v), block_q)
    tile = fit_tile(triton_attention._TAIL_TILES, *sizes, block, 1, 2, limit)
    constants = {
        "HEADS": heads, "LENGTH_Q": length_q, "TAILS": tails, "REPRESENTATIVES": representatives,
        "SLOPES": shapes[6][2] if has_slope else 1,
        "SCALE": abs(scale), "HALF_WEIGHT_LOG2": variance_weight / 2 * LOG2_E.value,
        "BLOCK_Q": block_q, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "PER_BLOCK": bool(per_block), "HAS_VARIANCE": bool(has_variance),
        "HAS_SLOPE": bool(has_slope), **_scale(scale), **dim_options(dtype, dim, dim_v),
    }  # fmt: skip
    grid = (-(-length_q // block_q) * (block_q // tile.block_m), batch * heads)
    return Layer(triton_tensorrt.attend_tail_entry, constants, grid, _options(tile))


def attend_listed_layer(
    shapes: Sequence[Shape], dtype: torch.dtype, limit: int, *, scale: float, block_q: int,
    block_kv: int, resume: int,
) -> Layer:  # fmt: skip
    """The launch of ``uta::attend_listed`` likewise."""
    (batch, heads, length_q, dim), (length_kv, dim_v) = shapes[0], shapes[2][2:]
    sizes = (dtype, max(dim, dim_v), block_q)
    tile = fit_tile(triton_attention._LISTED_TILES, *sizes, block_kv, 1, 2, limit)
    blocks_q, max_blocks = shapes[3][2:]
    constants = {
        "HEADS": heads, "LENGTH_Q": length_q, "LENGTH_KV": length_kv, "BLOCKS_Q": blocks_q,
        "MAX_BLOCKS": max_blocks, "BLOCK_Q": block_q, "BLOCK_KV": block_kv,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "EVEN": length_kv % block_kv == 0,
        "RESUME": bool(resume), "CHUNK": ID_CHUNK, **_scale(scale),
        **dim_options(dtype, dim, dim_v),
    }  # fmt: skip
    grid = (blocks_q * (block_q // tile.block_m), batch * heads)
    return Layer(triton_tensorrt.attend_listed_entry, constants, grid, _options(tile))


def block_scores_layer(
    shapes: Sequence[Shape], dtype: torch.dtype, limit: int, *, scale: float,
    variance_weight: float, variance_power: float, block_q: int, rows: int,
) -> Layer:  # fmt: skip
    """The launch of ``uta::block_scores`` likewise."""
    (batch, heads, length_q, dim), blocks = shapes[0], shapes[1][2]
    most = max(16, triton.next_power_of_2(blocks))
    tile = fit_tile(
        triton_scores._TILES, dtype, dim, triton_scores.MAX_BLOCK, most, 2, 2, limit
    )  # fmt: skip
    constants = {
        "HEADS": heads, "LENGTH_Q": length_q, "BLOCKS_Q": -(-length_q // block_q),
        "BLOCKS": blocks, "SCALE": scale, "SCALE_LOG2": scale * LOG2_E.value,
        "HALF_WEIGHT_LOG2": variance_weight / 2 * LOG2_E.value, "POWER_VALUE": variance_power,
        "BLOCK_Q": block_q, "ROWS": rows, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "D": dim, "D_PADDED": triton.next_power_of_2(dim), "WEIGHTED": variance_weight != 0,
        "POWER": triton_scores._POWERS.get(variance_power, "any"),
        "PRECISION": dot_precision(dtype),
    }  # fmt: skip
    grid = (triton.cdiv(length_q, max(tile.block_m * rows, block_q)), batch * heads)
    return Layer(triton_tensorrt.block_scores_entry, constants, grid, _options(tile))


_LAYERS: dict[str, Callable[..., Layer]] = {
    "attend_tail": attend_tail_layer,
    "attend_listed": attend_listed_layer,
    "block_scores": block_scores_layer,
}


def compile_layer(
    name: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    attributes: Mapping[str, Any],
    architecture: int,
    *,
    small: bool = False,
) -> Compiled:
    """Compile the kernel of one plugin layer ahead of time.

    Args:
        name: Of the plugin, one of ``uta_fx.export.tensorrt_ops.PLUGINS``.
        shapes: Of its inputs.
        dtype: Of the model: float32, float16 or bfloat16.
        attributes: The operator's floats and ints.
        architecture: Compute capability: 80, 86, 89, 90, 100 or 120.
        small: Keep to the shared memory that a launch may use without asking for it.

    Raises:
        RuntimeError: Triton cannot compile it, or it needs scratch memory.
        ValueError: The architecture is another.
    """
    if architecture not in SHARED_KB:
        raise ValueError(
            f"architecture must be one of {', '.join(map(str, SHARED_KB))}, got {architecture}"
        )
    limit = _SMALL_SHARED if small else SHARED_KB[architecture] * 1024
    layer = _LAYERS[name](shapes, dtype, limit, **attributes)
    if not isinstance(layer.kernel, JITFunction):
        raise RuntimeError("kernels cannot be compiled in Triton's interpreter: unset it")
    names = layer.kernel.arg_names
    types = {"T": _POINTERS[dtype], "S": _POINTERS[score_dtype(dtype)], "F": "*fp32", "I": "*i32"}
    kinds = "".join(PLUGINS[name])
    pointers = {name: types[kind] for name, kind in zip(names, kinds, strict=False)}
    assert len(pointers) == len(kinds) == len(names) - len(layer.constants)
    signature = {name: pointers.get(name, "constexpr") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    try:
        compiled = triton.compile(
            ASTSource(layer.kernel, signature, dict(layer.constants), aligned),
            target=GPUTarget("cuda", architecture, 32),
            options=dict(layer.options),
        )
    except Exception as error:
        raise RuntimeError(
            f"Triton could not compile {name} for sm_{architecture}: {error}"
        ) from error
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise RuntimeError(f"{name} needs scratch memory, which a plugin of TensorRT has not")
    return Compiled(
        name=metadata.name,
        ptx=_without_scratch(compiled.asm["ptx"], len(pointers)),
        grid=layer.grid,
        threads=32 * metadata.num_warps,
        shared=metadata.shared,
    )


def _without_scratch(ptx: str, pointers: int) -> str:
    """Take the two parameters off that Triton adds for memory which these kernels do not use."""
    found = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx)
    assert found is not None
    parameters = found[2].split(",")
    assert len(parameters) == pointers + 2, found[2]
    rest = ptx[found.end() :]
    assert not any(f"{found[1]}_param_{pointers + i}" in rest for i in range(2))
    kept = ",".join(parameters[:pointers])
    return f"{ptx[: found.start(2)]}{kept}\n{ptx[found.end(2) :]}"


def _scale(scale: float) -> dict[str, Any]:
    return {
        "SIGN": (scale > 0) - (scale < 0),
        "SCALE_LOG2": (abs(scale) or 1.0) * LOG2_E.value,
    }


def _options(tile: triton_attention.Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
