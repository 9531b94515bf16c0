"""Our kernels as a library of custom operators for ONNX Runtime's CUDA provider.

A library is built for the ``SparseAttention`` nodes of one file and for one GPU architecture: the
Triton kernels are compiled ahead of time, which needs no GPU, and go into a shared library that
depends on libc alone. It serves ONNX Runtime 1.22 and later. Its source is
``onnxruntime_plugin.c``.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import triton
from triton.runtime.jit import JITFunction

from uta_fx.export import onnxruntime_kernels
from uta_fx.export.onnxruntime_kernels import (
    SHARED_KB,
    Kernel,
    Variant,
    compile_variant,
)
from uta_fx.kernels import triton_attention
from uta_fx.kernels.triton_attention import gluon_attention, gluon_tail

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "uta-fx"
SOURCE = Path(__file__).with_suffix(".c")
MAP_ARGUMENTS = 9  # of one tensor map: itself, four sizes and four strides


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
    variants = variants_of(onnx.load(model, load_external_data=False))
    kernels = [compile_variant(variant, architecture) for variant in variants]
    link_plugin(variants, kernels, architecture, target)


def link_plugin(
    variants: Sequence[Variant],
    kernels: Sequence[Mapping[str, Kernel]],
    architecture: int,
    target: Path,
    *,
    driver: str = "libcuda.so.1",
) -> None:
    """Compile the C source with these kernels in it.

    Args:
        variants: For which nodes.
        kernels: Of each variant, by place.
        architecture: For which they were compiled.
        target: Library to write; replaced if it is there.
        driver: Library with the CUDA driver's functions, which is opened at the first launch.

    Raises:
        RuntimeError: There is no C compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("a plugin needs a C compiler: neither cc, gcc nor clang was found")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        folder = Path(name)
        _write_variants(folder, variants, kernels, architecture)
        library = folder / target.name
        command = [
            compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
            "-fvisibility=hidden", f"-I{folder}", f'-DDRIVER="{driver}"', str(SOURCE),
            "-o", str(library), "-ldl", "-lm", "-lpthread",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the C compiler refused the plugin: {result.stderr.strip()}")
        os.replace(library, target)


def build_cached(model: Path, architecture: int) -> Path:
    """The plugin for a file and an architecture in ``CACHE``, built where it is not there yet."""
    variants = variants_of(onnx.load(model, load_external_data=False))
    modules = (onnxruntime_kernels, triton_attention, gluon_attention, gluon_tail)
    files = [Path(str(module.__file__)) for module in modules if module is not None]
    parts = (repr(variants), triton.__version__, *(x.read_text() for x in (SOURCE, *files)))
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
            slopes=min(known(9, 2), 2) if has_tail else 0,
            even=even,
            representatives=representatives,
        )
        for even in lengths
    ]


def _write_variants(
    folder: Path,
    variants: Sequence[Variant],
    kernels: Sequence[Mapping[str, Kernel]],
    architecture: int,
) -> None:
    """``variants.h``: the kernels as data, each in a section of assembly that includes its file."""
    data, rows = [], []
    for index, (variant, compiled) in enumerate(zip(variants, kernels, strict=True)):
        cells = []
        for which, kernel in compiled.items():
            symbol = f"kernel_{index}_{which}"
            file = folder / f"{symbol}.cubin"
            file.write_bytes(kernel.cubin)
            maps = [
                f"{{ARG_{name}, {swizzle}, {{{', '.join(map(str, box))}}}}}"
                for name, swizzle, box in kernel.maps
            ]
            data += [
                f'__asm__(".section .rodata\\n.balign 16\\n{symbol}:\\n'
                f'.incbin \\"{file}\\"\\n.previous\\n");',
                f'extern const unsigned char {symbol}[] __attribute__((visibility("hidden")));',
                f"static const unsigned char arguments_{symbol}[] = {{{_arguments(kernel)}}};",
                f"static const Map maps_{symbol}[] = {{{', '.join(maps) or '{0}'}}};",
            ]
            cells.append(
                f'[{which}] = {{{symbol}, "{kernel.name}", {kernel.shared}, {kernel.threads},'
                f" {kernel.programs}, {kernel.blocks}, arguments_{symbol},"
                f" sizeof arguments_{symbol}, maps_{symbol}, {len(maps)}}}"
            )
        fields = ", ".join(str(int(value)) for value in variant[:-1])
        rows.append(f"  {{{fields}, {{{', '.join(cells)}}}}},")
    dtypes = sorted({variant.dtype for variant in variants})
    numbers = {"VARIANT_COUNT": len(variants), "DTYPE_COUNT": len(dtypes)} | {
        # without Gluon no kernel asks for them
        name: 1 if gluon_attention is None else getattr(gluon_attention, name)
        for name in ("PLAN", "MAX_BLOCKS", "SHARE", "FILL")
    }
    lines = [
        f'#define ARCHITECTURE "{architecture}"',
        f"enum {{ {', '.join(f'{name} = {x}' for name, x in numbers.items())} }};",
        f"static const int DTYPES[] = {{{', '.join(map(str, dtypes))}}};",
        *data,
        "static const Variant VARIANTS[] = {",
        *rows,
        "};",
    ]
    (folder / "variants.h").write_text("\n".join(lines) + "\n")


def _arguments(kernel: Kernel) -> str:
    """What the kernel is launched with, as the C source numbers it; a map is several of them."""
    mapped = {x.parameter for x in kernel.maps}
    return ", ".join(
        f"ARG_{name} + {i}"
        for name in kernel.parameters
        for i in range(MAP_ARGUMENTS if name in mapped else 1)
    )
