"""An ONNX Runtime session in which our kernel runs where it can."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, NotImplemented
from torch import Tensor

from uta_fx.export import gpu
from uta_fx.export.onnx_functions import (
    DOMAIN,
    ELEMENT_TYPES,
    beside_weights,
    check_version,
    nodes_of_ours,
)

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"


def open_session(
    path: Path,
    providers: Sequence[Any] | None,
    plugin: Path | bool,
    options: onnxruntime.SessionOptions | None,
) -> onnxruntime.InferenceSession:
    """See ``uta_fx.onnxruntime_session``."""
    model = check_version(path, "path")
    spelled_out = {x.name for x in model.functions if x.domain == DOMAIN}
    if bare := nodes_of_ours(model) - spelled_out:
        raise ValueError(
            f"path must be a file of export_onnx, got one for plugins of TensorRT, with nodes"
            f" {min(bare)}: {path}"
        )
    path = beside_weights(model, path, "path")
    available = onnxruntime.get_available_providers()
    if providers is None:
        providers = [name for name in (CUDA, "CPUExecutionProvider") if name in available]
    if isinstance(providers, str) or not isinstance(providers, Sequence):
        raise ValueError(f"providers must be a list of names or None, got {providers!r}")
    names = [_provider_name(entry) for entry in providers]
    unknown = [name for name in names if name not in available]
    if unknown:
        raise ValueError(
            f"providers must be among {', '.join(available)}, got {', '.join(unknown)}"
        )
    options = onnxruntime.SessionOptions() if options is None else options
    if not isinstance(options, onnxruntime.SessionOptions):
        raise TypeError(
            f"options must be onnxruntime.SessionOptions or None, got {type(options).__name__}"
        )
    library = _library(path, names, plugin)
    if library is not None:
        nodes, architecture = describe_plugin(library)
        with contextlib.suppress(RuntimeError):  # without a driver nothing runs on CUDA
            found = gpu.capability()
            if not gpu.runs(architecture, on=found):
                raise ValueError(
                    f"plugin must be for the architecture of this GPU, sm_{found}, got"
                    f" one for sm_{architecture}: build it for that, or let plugin=True do so"
                )
        options.register_custom_ops_library(str(library))
        logger.info(
            "%s: %s run by the plugin %s, what else is ours by its function",
            path, ", ".join(nodes), library,
        )  # fmt: skip
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except NotImplemented as error:
        raise RuntimeError(
            f"{path} needs an operation that {', '.join(names)} lacks for its dtype; a model in"
            " bfloat16 needs a GPU's provider: for the CPU export it in float16 or float32"
            f" ({error})"
        ) from error
    except Fail as error:
        if "Domain already set" not in str(error):
            raise
        raise ValueError(
            "options must be new ones for each session with a plugin, got some in which one is"
            " registered already"
        ) from error


def _provider_name(entry: Any) -> str:
    """Of a name, or a name with options."""
    match entry:
        case str(name) | (str(name), dict()):
            return name
    raise ValueError(f"providers must be names, or pairs of a name and a dict, got {entry!r}")


def bind(
    session: onnxruntime.InferenceSession,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> onnxruntime.IOBinding:
    """See ``uta_fx.bind_tensors``."""
    if not isinstance(session, onnxruntime.InferenceSession):
        raise TypeError(
            f"session must be an onnxruntime.InferenceSession, got {type(session).__name__}"
        )
    for kind, tensors in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(tensors, Mapping):
            raise TypeError(f"{kind} must be a dict of tensors, got {type(tensors).__name__}")
    if missing := [x.name for x in session.get_inputs() if x.name not in inputs]:
        raise ValueError(f"inputs must have {', '.join(missing)} too, got {', '.join(inputs)}")
    binding = session.io_binding()
    for kind, tensors, said, bind_one in (
        ("inputs", inputs, session.get_inputs(), binding.bind_input),
        ("outputs", outputs, session.get_outputs(), binding.bind_output),
    ):
        known = {x.name: x for x in said}
        if odd := sorted(tensors.keys() - known.keys()):
            raise ValueError(f"{kind} must be among {', '.join(known)}, got {', '.join(odd)}")
        for name, x in tensors.items():
            if problem := _misfit(x, known[name].type, known[name].shape):
                raise ValueError(f"{name} must be {problem}")
            place = x.device.index or 0
            bind_one(
                name, x.device.type, place, ELEMENT_TYPES[x.dtype], tuple(x.shape), x.data_ptr()
            )
    binding.tensors = [*inputs.values(), *outputs.values()]  # it has their addresses alone
    return binding


def _misfit(x: Tensor, kind: str, sizes: Sequence[int | str | None]) -> str | None:
    """What a tensor must be and is not: ONNX Runtime names neither it nor all that is wrong."""
    if not isinstance(x, Tensor) or x.device.type not in ("cpu", "cuda"):
        got = x.device if isinstance(x, Tensor) else type(x).__name__
        return f"a tensor on the CPU or a GPU, got {got}"
    name = onnx.TensorProto.DataType.Name
    dtypes = {f"tensor({name(number).lower()})": x for x, number in ELEMENT_TYPES.items()}
    if dtypes.get(kind) != x.dtype:
        return f"{dtypes.get(kind, kind)}, got {x.dtype}"
    if len(sizes) != x.dim() or any(
        isinstance(size, int) and size != given for size, given in zip(sizes, x.shape, strict=True)
    ):
        return f"of sizes {list(sizes)}, got {list(x.shape)}"
    if x.is_neg() or x.is_conj():
        return "what lies in memory, got a view that negates it: take x.resolve_neg()"
    return None if x.is_contiguous() else f"contiguous, got strides {x.stride()}"


def describe_plugin(library: Path) -> tuple[list[str], int]:
    """Which types of nodes run by a plugin, and the architecture that its kernels are for.

    Raises:
        ValueError: It is none.
    """
    try:
        loaded = ctypes.CDLL(str(library))
        functions = loaded.uta_nodes, loaded.uta_architecture
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"plugin must be a library of build_onnxruntime_plugin, got {library}: {error}"
        ) from error
    for function in functions:
        function.restype = ctypes.c_char_p
    nodes, architecture = (function().decode() for function in functions)
    return nodes.split(), int(architecture)


def _library(path: Path, providers: Sequence[str], plugin: Path | bool) -> Path | None:
    """The plugin to register; None, with the reason in the log, where the function runs."""
    if isinstance(plugin, Path):
        if not plugin.is_file():
            raise ValueError(f"plugin must be a file, True or False, got {plugin}")
        if CUDA not in providers:
            raise ValueError(f"plugin needs {CUDA} among the providers, got {', '.join(providers)}")
        return plugin
    if not plugin or CUDA not in providers:
        logger.info("%s: sparse attention runs by its function", path)
        return None
    try:
        from uta_fx.export.onnxruntime_plugin import build_cached, gpu_architecture

        return build_cached(path, gpu_architecture())
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        reason = error
    logger.warning("%s: sparse attention runs by its function, not by a plugin: %s", path, reason)
    return None
