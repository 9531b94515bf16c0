"""Our kernels as a library of custom operators for ONNX Runtime's CUDA provider.

A library is built for the ``SparseAttention`` nodes of one file and for one GPU architecture: the
Triton kernels are compiled ahead of time, which needs no GPU, and go into a shared library that
depends on libc alone. It serves ONNX Runtime 1.22 and later. Its source is
``onnxruntime_plugin.c``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
import triton
from onnx import TensorProto
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from uta_fx.kernels import triton_attention
from uta_fx.kernels.triton_attention import ID_CHUNK, dot_precision, fit_tile

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "uta-fx"
SOURCE = Path(__file__).with_suffix(".c")
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory of one program by architecture, as NVIDIA's programming guide gives it."""

_DTYPES = {
    TensorProto.FLOAT: (torch.float32, "fp32"),
    TensorProto.FLOAT16: (torch.float16, "fp16"),
    TensorProto.BFLOAT16: (torch.bfloat16, "bf16"),
}
_POINTERS = {"lse": "fp32", "tail_size": "fp32", "ids": "i32", "counts": "i32", "listed": "u8"}
_HEADERS_OF_ROW = ("_sb", "_sh")  # strides that may not fit 32 bits


class Variant(NamedTuple):
    """For which nodes and shapes a set of kernels is compiled; fields as in the C source."""

    dtype: int
    dim: int
    dim_v: int
    block_q: int
    block_kv: int
    sign: int
    has_tail: bool
    per_block: bool
    has_variance: bool
    has_slope: bool
    even: bool
    representatives: int  # bounds the tile of the tail


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: Of its entry.
        cubin: Machine code.
        shared: Bytes of shared memory.
        threads: Of one program.
        tiles: Programs for each query block.
        arguments: Names of its parameters, in order.
    """

    name: str
    cubin: bytes
    shared: int
    threads: int
    tiles: int
    arguments: tuple[str, ...]


def build_plugin(model: Path, architecture: int, target: Path) -> None:
    """Compile the kernels for a file's nodes and link them into a library.

    Args:
        model: ONNX file of ``export_onnx``.
        architecture: Compute capability of the GPU, such as 90 for 9.0.
        target: Library to write; replaced if it is there.

    Raises:
        ValueError: The file has no node of ours, a size that a kernel needs is not known, or the
            architecture is not one of ``SHARED_KB``.
        RuntimeError: There is no C compiler, or it or Triton failed.
    """
    if architecture not in SHARED_KB:
        raise ValueError(
            f"architecture must be one of {', '.join(map(str, SHARED_KB))}, got {architecture}"
        )
    if not isinstance(triton_attention._listed_kernel, JITFunction):
        raise RuntimeError("kernels cannot be compiled in Triton's interpreter: unset it")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("a plugin needs a C compiler: neither cc, gcc nor clang was found")
    variants = variants_of(onnx.load(model, load_external_data=False))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        folder = Path(name)
        kernels = [_compile_variant(variant, architecture) for variant in variants]
        _write_variants(folder, variants, kernels, architecture)
        library = folder / target.name
        command = [
            compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
            "-fvisibility=hidden", f"-I{folder}", str(SOURCE), "-o", str(library),
            "-ldl", "-lm", "-lpthread",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the C compiler refused the plugin: {result.stderr.strip()}")
        os.replace(library, target)


def build_cached(model: Path, architecture: int) -> Path:
    """The plugin for a file and an architecture in ``CACHE``, built where it is not there yet."""
    variants = variants_of(onnx.load(model, load_external_data=False))
    kernels = Path(triton_attention.__file__).read_text()
    parts = (repr(variants), triton.__version__, SOURCE.read_text(), kernels)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    library = CACHE / f"{digest[:16]}.sm_{architecture}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        logger.info("building a plugin for sm_%d: %s", architecture, library)
        build_plugin(model, architecture, library)
    return library


def gpu_architecture() -> int:
    """Which of ``SHARED_KB`` runs on this machine's first GPU.

    Raises:
        RuntimeError: There is no GPU, or none of them does.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("there is no CUDA driver") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    error = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    if error:
        raise RuntimeError(f"the CUDA driver answers with error {error}")
    capability = 10 * major.value + minor.value
    # code for 8.x runs on a later 8.y; from 9.0 on it uses what one chip alone has
    fits = [x for x in SHARED_KB if x == capability or 80 <= x < capability < 90]
    if not fits:
        raise RuntimeError(
            f"compute capability {major.value}.{minor.value} is not one of"
            f" {', '.join(f'{x // 10}.{x % 10}' for x in SHARED_KB)}"
        )
    return max(fits)


def variants_of(model: onnx.ModelProto) -> list[Variant]:
    """What the ``SparseAttention`` nodes of a file ask of the kernels.

    Raises:
        ValueError: There is no such node, or a size that a kernel needs is not known.
    """
    graph = model.graph
    types = {x.name: x.type.tensor_type for x in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(
            tensor.data_type, tensor.dims
        ).tensor_type
    found = []
    for node in graph.node:
        if (node.domain, node.op_type) == ("uta", "SparseAttention"):
            found += _variants_of_node(node, types)
    if not found:
        raise ValueError("model must have a node uta::SparseAttention, got a file without one")
    return sorted(set(found))


def _variants_of_node(node: onnx.NodeProto, types: dict[str, Any]) -> list[Variant]:
    """One, or two where the length of the keys is not known: ragged or not."""

    def size(index: int, dim: int) -> int | None:
        sizes = types[node.input[index]].shape.dim if node.input[index] in types else ()
        if dim < len(sizes) and sizes[dim].HasField("dim_value"):
            return int(sizes[dim].dim_value)
        return None

    def known(index: int, dim: int) -> int:
        value = size(index, dim)
        if value is None:
            raise ValueError(
                f"node {node.name}: dimension {dim} of its input {index} must be known to build a"
                " plugin for it"
            )
        return value

    attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    representatives = known(5, 3)
    has_tail = representatives > 0
    length = size(1, 2)
    lengths = [False, True] if length is None else [length % attributes["block_kv"] == 0]
    return [
        Variant(
            dtype=types[node.input[0]].elem_type,
            dim=known(0, 3),
            dim_v=known(2, 3),
            block_q=attributes["block_q"],
            block_kv=attributes["block_kv"],
            sign=(attributes["scale"] > 0) - (attributes["scale"] < 0),
            has_tail=has_tail,
            per_block=has_tail and bool(attributes["per_block"]),
            has_variance=has_tail and known(8, 2) > 0,
            has_slope=has_tail and known(9, 2) > 0,
            even=even,
            representatives=representatives,
        )
        for even in lengths
    ]


def _compile_variant(variant: Variant, architecture: int) -> list[Kernel | None]:
    """Kernels of ``uta_fx.kernels.triton_attention``: of the map, the tail, the lists."""
    dtype, limit = _DTYPES[variant.dtype][0], SHARED_KB[architecture] * 1024
    sizes = (dtype, max(variant.dim, variant.dim_v), variant.block_q)
    dims = {
        "D": variant.dim, "D_PADDED": triton.next_power_of_2(variant.dim),
        "DV": variant.dim_v, "DV_PADDED": triton.next_power_of_2(variant.dim_v),
        "SIGN": variant.sign, "PRECISION": dot_precision(dtype), "o_sd": 1,
    }  # fmt: skip
    mark = tail = None
    if variant.per_block:
        mark = _compile(
            triton_attention._mark_listed_kernel, variant, architecture, {"CHUNK": ID_CHUNK}
        )
    if variant.has_tail:
        block = max(16, triton.next_power_of_2(variant.representatives))
        tile = fit_tile(triton_attention._TAIL_TILES, *sizes, block, 1, 2, limit)
        constants = {
            "BLOCK_Q": variant.block_q, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "PER_BLOCK": variant.per_block, "HAS_VARIANCE": variant.has_variance,
            "HAS_SLOPE": variant.has_slope, **dims,
        }  # fmt: skip
        tail = _compile(triton_attention._tail_kernel, variant, architecture, constants, tile)
    tile = fit_tile(triton_attention._LISTED_TILES, *sizes, variant.block_kv, 1, 2, limit)
    constants = {
        "BLOCK_Q": variant.block_q, "BLOCK_KV": variant.block_kv, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "EVEN": variant.even, "RESUME": variant.has_tail,
        "CHUNK": ID_CHUNK, "RECTIFY": False, "gain_ptr": None, "offset_ptr": None,
        "COUNTED": False, "key_counts_ptr": None, **dims,
    }  # fmt: skip
    listed = _compile(triton_attention._listed_kernel, variant, architecture, constants, tile)
    return [mark, tail, listed]


def _compile(
    kernel: JITFunction[Any],
    variant: Variant,
    architecture: int,
    constants: dict[str, Any],
    tile: triton_attention.Tile | None = None,
) -> Kernel:
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else _parameter_type(name, variant) for name in names
    }
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name] != "constexpr" and _is_divisible(name, variant)
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages} if tile else {}
    try:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options=options,
        )
    except Exception as error:
        raise RuntimeError(
            f"Triton could not compile {kernel.__name__} for sm_{architecture}: {error}"
        ) from error
    metadata = compiled.metadata
    assert metadata.global_scratch_size == 0
    return Kernel(
        name=metadata.name,
        cubin=compiled.asm["cubin"],
        shared=metadata.shared,
        threads=32 * metadata.num_warps,
        tiles=variant.block_q // tile.block_m if tile else 1,
        arguments=tuple(name for name in names if name not in constants),
    )


def _parameter_type(name: str, variant: Variant) -> str:
    if name.endswith("_ptr"):
        return "*" + _POINTERS.get(name.removesuffix("_ptr"), _DTYPES[variant.dtype][1])
    if name in ("scale", "scale_log2", "half_weight_log2"):
        return "fp32"
    return "i64" if name.endswith(_HEADERS_OF_ROW) else "i32"


def _is_divisible(name: str, variant: Variant) -> bool:
    """Whether 16 divides a parameter: ONNX Runtime aligns tensors, and they are contiguous."""
    if name.endswith("_ptr"):
        return True
    tensor, _, stride = name.rpartition("_s")
    if len(stride) != 1 or tensor in ("ids", "counts", "tail_size"):
        return False
    dims = {"q": variant.dim, "k": variant.dim, "tail_k": variant.dim, "tail_var": variant.dim}
    return dims.get(tensor, variant.dim_v) % 16 == 0


def _write_variants(
    folder: Path,
    variants: Sequence[Variant],
    kernels: Iterable[Sequence[Kernel | None]],
    architecture: int,
) -> None:
    """``variants.h``: the kernels as data, each in a section of assembly that includes its file."""
    data, rows = [], []
    for index, (variant, compiled) in enumerate(zip(variants, kernels, strict=True)):
        cells = []
        for which, kernel in enumerate(compiled):
            if kernel is None:
                cells.append("{0}")
                continue
            symbol = f"kernel_{index}_{which}"
            file = folder / f"{symbol}.cubin"
            file.write_bytes(kernel.cubin)
            arguments = ", ".join(f"ARG_{name}" for name in kernel.arguments)
            data += [
                f'__asm__(".section .rodata\\n.balign 16\\n{symbol}:\\n'
                f'.incbin \\"{file}\\"\\n.previous\\n");',
                f'extern const unsigned char {symbol}[] __attribute__((visibility("hidden")));',
                f"static const unsigned char arguments_{symbol}[] = {{{arguments}}};",
            ]
            cells.append(
                f'{{{symbol}, "{kernel.name}", {kernel.shared}, {kernel.threads}, {kernel.tiles},'
                f" arguments_{symbol}, {len(kernel.arguments)}}}"
            )
        fields = ", ".join(str(int(value)) for value in variant[:-1])
        rows.append(f"  {{{fields}, {{{', '.join(cells)}}}}},")
    dtypes = sorted({variant.dtype for variant in variants})
    lines = [
        f'#define ARCHITECTURE "{architecture}"',
        f"enum {{ VARIANT_COUNT = {len(variants)}, DTYPE_COUNT = {len(dtypes)} }};",
        f"static const int DTYPES[] = {{{', '.join(map(str, dtypes))}}};",
        *data,
        "static const Variant VARIANTS[] = {",
        *rows,
        "};",
    ]
    (folder / "variants.h").write_text("\n".join(lines) + "\n")
