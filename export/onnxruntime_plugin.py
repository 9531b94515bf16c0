"""Our kernels as a library of custom operators for ONNX Runtime's CUDA provider.

A library is built for the nodes of one file and for one GPU architecture: the
Triton kernels are compiled ahead of time, which needs no GPU, and go into a shared library that
depends on libc alone. It serves ONNX Runtime 1.22 and later. Its source is
``onnxruntime_plugin.c``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import triton
from triton.runtime.jit import JITFunction

from uta_fx.export import gpu
from uta_fx.export.onnxruntime_attention import attention_variants, compile_attention
from uta_fx.export.onnxruntime_fitting import compile_fit, fit_variants
from uta_fx.export.onnxruntime_kernels import OPEN, SHARED_KB, Kernel, NodeOfFile
from uta_fx.export.onnxruntime_selection import (
    compile_lists,
    compile_scores,
    compile_selection,
    compile_statistics,
    lists_variants,
    scores_variants,
    selection_variants,
    statistics_variants,
)
from uta_fx.export.replace_file import folder_beside
from uta_fx.kernels import reference, triton_attention, triton_fitting
from uta_fx.kernels.triton_attention import gluon_attention
from uta_fx.kernels.triton_selection import PACKED_BLOCKS, SIZES
from uta_fx.kernels.triton_statistics import PROGRAMS

logger = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "uta-fx"
SOURCE = Path(__file__).resolve().with_suffix(".c")
NODES: dict[
    str, tuple[Callable[[NodeOfFile, int], list[Any]], Callable[[Any, int], dict[str, Kernel]]]
] = {
    "SparseAttention": (attention_variants, compile_attention),
    "BlockStatistics": (statistics_variants, compile_statistics),
    "BlockScores": (scores_variants, compile_scores),
    "SelectBlocks": (selection_variants, compile_selection),
    "SelectCounted": (selection_variants, compile_selection),
    "ListBlocks": (lists_variants, compile_lists),
    "FitTail": (fit_variants, compile_fit),
}
"""By type of node: what a node asks of the kernels, and the kernels compiled for it."""

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
    if type(architecture) is not int or architecture not in SHARED_KB:
        known = ", ".join(map(str, SHARED_KB))
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    if not isinstance(triton_attention._listed_kernel, JITFunction):
        raise RuntimeError("kernels cannot be compiled in Triton's interpreter: unset it")
    variants = variants_of(onnx.load(model, load_external_data=False), architecture)
    link_plugin(compile_variants(variants, architecture), architecture, target)


def link_plugin(
    compiled: Sequence[tuple[str, Any, Mapping[str, Kernel]]],
    architecture: int,
    target: Path,
    *,
    driver: str = "libcuda.so.1",
    provider: str = "CUDAExecutionProvider",
) -> None:
    """Compile the C source with these kernels in it.

    Args:
        compiled: Of ``compile_variants``.
        architecture: For which they were compiled.
        target: Library to write; replaced if it is there.
        driver: Library with the CUDA driver's functions, which is opened at the first launch.
        provider: On which the nodes run; tests take the CPU's, beside a stand-in for the driver.

    Raises:
        RuntimeError: There is no C compiler, or it failed.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("a plugin needs a C compiler: neither cc, gcc nor clang was found")
    with folder_beside(target) as folder:
        _write_variants(folder, compiled, architecture)
        library = folder / target.name
        command = [
            compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
            "-fvisibility=hidden", f"-I{folder}", f'-DDRIVER="{driver}"',
            f'-DPROVIDER="{provider}"', str(SOURCE), "-o", str(library), "-ldl", "-lm", "-lpthread",
        ]  # fmt: skip
        # assembly names kernels without their folder, whose name may be anything
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if result.returncode:
            raise RuntimeError(f"the C compiler refused the plugin: {result.stderr.strip()}")
        os.replace(library, target)


def build_cached(model: Path, architecture: int) -> Path:
    """The plugin for a file and an architecture in ``CACHE``, built where it is not there yet."""
    variants = variants_of(onnx.load(model, load_external_data=False), architecture)
    kernels = Path(str(triton_attention.__file__)).parent.glob("*.py")
    files = sorted((*kernels, *SOURCE.parent.glob("onnxruntime_*.py")))
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
    found = gpu.capability()
    fits = [x for x in SHARED_KB if gpu.runs(x, on=found)]
    if not fits:
        raise RuntimeError(
            f"compute capability {found // 10}.{found % 10} is not one of"
            f" {', '.join(f'{x // 10}.{x % 10}' for x in SHARED_KB)}"
        )
    return max(fits)


def variants_of(model: onnx.ModelProto, architecture: int) -> dict[str, list[Any]]:
    """What the nodes of a file ask of the kernels, by type of node.

    A type of which the kernels do not serve all nodes is left out, with the reason in the log; its
    nodes run by their function.

    Raises:
        ValueError: There is no node with kernels, or a size that those of ``SparseAttention`` need
            is not known.
    """
    graph = model.graph
    types = {x.name: x.type.tensor_type for x in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(
            tensor.data_type, tensor.dims
        ).tensor_type
    found: dict[str, list[Any]] = {}
    for name, (variants_of_node, _) in NODES.items():
        nodes = [NodeOfFile(x, types) for x in graph.node if (x.domain, x.op_type) == ("uta", name)]
        try:
            variants = {x for node in nodes for x in variants_of_node(node, architecture)}
        except ValueError as error:
            if name == "SparseAttention":
                raise
            logger.info("no kernels for %s: %s", name, error)
            continue
        if variants:
            found[name] = sorted(variants)
    if not found:
        raise ValueError(
            "model must have a node such as uta::SparseAttention, got none with kernels"
        )
    return found


def compile_variants(
    variants: Mapping[str, Sequence[Any]], architecture: int
) -> list[tuple[str, Any, dict[str, Kernel]]]:
    """A type of node, a variant and its kernels by place, for each of ``variants_of``."""
    return [
        (name, variant, NODES[name][1](variant, architecture))
        for name, of_node in variants.items()
        for variant in of_node
    ]


def _write_variants(
    folder: Path, compiled: Sequence[tuple[str, Any, Mapping[str, Kernel]]], architecture: int
) -> None:
    """``variants.h``: the kernels as data, each in a section of assembly that includes its file."""
    data, rows = [], []
    for index, (node, variant, kernels) in enumerate(compiled):
        cells = []
        for number, (place, kernel) in enumerate(kernels.items()):
            symbol = f"kernel_{index}_{number}"
            file = folder / f"{symbol}.cubin"
            file.write_bytes(kernel.cubin)
            maps = [
                f"{{ARG_{name}, {swizzle}, {{{', '.join(map(str, box))}}}}}"
                for name, swizzle, box in kernel.maps
            ]
            data += [
                f'__asm__(".section .rodata\\n.balign 16\\n{symbol}:\\n'
                f'.incbin \\"{file.name}\\"\\n.previous\\n");',
                f'extern const unsigned char {symbol}[] __attribute__((visibility("hidden")));',
                f"static const unsigned char arguments_{symbol}[] = {{{_arguments(kernel)}}};",
                f"static const Map maps_{symbol}[] = {{{', '.join(maps) or '{0}'}}};",
            ]
            cells.append(
                f'[{place}] = {{{symbol}, "{kernel.name}", {kernel.shared}, {kernel.threads},'
                f" {kernel.programs}, {kernel.blocks}, arguments_{symbol},"
                f" sizeof arguments_{symbol}, maps_{symbol}, {len(maps)}}}"
            )
        key = ", ".join(map(str, variant.key))
        rows.append(f"  {{{_constant(node)}, {{{key}}}, {{{', '.join(cells)}}}}},")
    operators = {(_constant(node), variant.dtype): None for node, variant, _ in compiled}
    numbers = {
        "VARIANT_COUNT": len(compiled), "OPERATOR_COUNT": len(operators),
        "SELECTED_ROWS": SIZES.rows, "SELECTING": SIZES.programs,
        "OPEN": OPEN, "PACKED_BLOCKS": PACKED_BLOCKS,
        "FIT_PROGRAMS": triton_fitting.PROGRAMS, "FIT_KEYS": triton_fitting.MIN_KEYS,
        "FIT_BLOCKS": reference.SAMPLED_BLOCKS,
        "PROGRAMS": PROGRAMS, "PASSES_16": SIZES.passes[0], "PASSES_32": SIZES.passes[1],
    } | {
        # without Gluon no kernel asks for them
        name: 1 if gluon_attention is None else getattr(gluon_attention, name)
        for name in ("PLAN", "MAX_BLOCKS", "SHARE", "FILL")
    }  # fmt: skip
    lines = [
        f'#define ARCHITECTURE "{architecture}"',
        f'#define NODES "{" ".join(dict.fromkeys(node for node, *_ in compiled))}"',
        f"enum {{ {', '.join(f'{name} = {x}' for name, x in numbers.items())} }};",
        "static const Operator OPERATORS[] = {",
        *(f"  {{{node}, {dtype}}}," for node, dtype in operators),
        "};",
        *data,
        "static const Variant VARIANTS[] = {",
        *rows,
        "};",
    ]
    (folder / "variants.h").write_text("\n".join(lines) + "\n")


def _constant(node: str) -> str:
    """``SelectBlocks`` as ``SELECT_BLOCKS``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", node).upper()


def _arguments(kernel: Kernel) -> str:
    """What the kernel is launched with, as the C source numbers it; a map is several of them."""
    mapped = {x.parameter for x in kernel.maps}
    return ", ".join(
        f"ARG_{name} + {i}"
        for name in kernel.parameters
        for i in range(MAP_ARGUMENTS if name in mapped else 1)
    )
