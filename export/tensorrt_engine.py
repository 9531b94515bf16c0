"""An engine from an ONNX file, by TensorRT or TensorRT-RTX."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from uta_fx.export.onnx_functions import beside_weights, check_version, nodes_of_ours
from uta_fx.export.replace_file import folder_beside
from uta_fx.export.tensorrt_ops import PLUGINS

logger = logging.getLogger(__name__)

FIRST_WITH_PLUGINS = (10, 9)
BROKEN_PLUGINS = (10, 14)


def build_engine(
    model: Path, target: Path, *, rtx: bool, architectures: Sequence[int] | None
) -> None:
    """See ``uta_fx.build_tensorrt_engine``."""
    checked = check_version(model, "model")
    model = beside_weights(checked, model, "model")
    ours = nodes_of_ours(checked)
    needs_plugins = bool(ours & PLUGINS.keys())
    if ours - PLUGINS.keys():
        raise ValueError(
            f"model must be a file of export_tensorrt, got one with nodes {min(ours)}: {model}"
        )
    if rtx and needs_plugins:
        raise ValueError(
            "TensorRT-RTX has no plugins: export the model with form='standard', got a file with"
            " nodes for our plugins"
        )
    if architectures is not None and not rtx:
        raise ValueError(
            "architectures are TensorRT-RTX's: TensorRT builds for the GPU that it runs on"
        )
    is_sequence = isinstance(architectures, (tuple, list))
    if architectures is not None and not (is_sequence and architectures):
        raise ValueError(
            f"architectures must be numbers such as (86, 120), or None, got {architectures!r}"
        )
    trt = load_rtx() if rtx else load_tensorrt(plugins=needs_plugins)
    if needs_plugins:
        from uta_fx.export.tensorrt_plugin import register_plugins

        register_plugins()
    engine = _build(trt, model, _flags(trt, rtx, needs_plugins), architectures)
    with folder_beside(target) as folder:
        partial = folder / target.name
        partial.write_bytes(engine)
        os.replace(partial, target)


def load_tensorrt(*, plugins: bool) -> ModuleType:
    """Import TensorRT, of a version that has what a file needs.

    Raises:
        ImportError: It is missing, too old, or the one whose plugins do not work.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ImportError(
            f"tensorrt could not be imported ({error}); install it with:"
            " pip install 'uta-fx[tensorrt]', or build for TensorRT-RTX"
        ) from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if plugins and (version < FIRST_WITH_PLUGINS or version == BROKEN_PLUGINS):
        raise ImportError(
            f"plugins that are compiled ahead of time need TensorRT 10.9 or later, and not 10.14,"
            f" got {trt.__version__}"
        )
    return trt


def load_rtx() -> ModuleType:
    """Import TensorRT-RTX, whose bindings are installed under either of two names.

    Raises:
        ImportError: It is missing.
    """
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error
    raise ImportError(
        f"tensorrt_rtx could not be imported ({missing}); install it with:"
        " pip install 'uta-fx[tensorrt-rtx]'"
    ) from missing


def _flags(trt: ModuleType, rtx: bool, plugins: bool) -> int:
    """Of the network: dtypes are those of the file, and plugins are compiled into the engine."""
    known = trt.NetworkDefinitionCreationFlag
    names = [] if rtx else ["STRONGLY_TYPED"]  # TensorRT-RTX and TensorRT 11 know no other way
    names += ["PREFER_AOT_PYTHON_PLUGINS"] if plugins else []
    return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))


def _build(trt: ModuleType, model: Path, flags: int, architectures: Sequence[int] | None) -> bytes:
    capabilities = [_capability(trt, architecture) for architecture in architectures or ()]
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        """The last error is what users are told."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)
            logger.debug("%s", message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        raise RuntimeError(f"{trt.__name__} cannot read {model}: {_reason(errors)}")
    config = builder.create_builder_config()
    if architectures is not None:
        config.num_compute_capabilities = len(architectures)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"{trt.__name__} cannot build an engine of {model}: {_reason(errors)}")
    return bytes(engine)


def _capability(trt: ModuleType, architecture: int) -> Any:
    known = {
        int(name.removeprefix("SM")): value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if architecture not in known:
        raise ValueError(
            f"architectures must be among {', '.join(map(str, sorted(known)))} with"
            f" {trt.__name__} {trt.__version__}, got {architecture}"
        )
    return known[architecture]


def _reason(errors: Sequence[str]) -> str:
    """The first line of the first error, which says where, and the last of the last: why."""
    if not errors:
        return "it does not say why"
    lines = [line for error in errors for line in error.strip().splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"
