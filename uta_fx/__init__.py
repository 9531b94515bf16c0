"""Block-sparse attention with Unified Tail Aggregation, as a torch.compile backend."""

from __future__ import annotations

__version__ = "0.1.0"

from uta_fx.attention import sparse_attention
from uta_fx.config import Config
from uta_fx.enable import disable, enable
from uta_fx.explain import Explanation, explain
from uta_fx.exporters import (
    bind_tensors,
    build_onnxruntime_plugin,
    build_tensorrt_engine,
    export_onnx,
    export_tensorrt,
    onnx_schema,
    onnxruntime_session,
)

__all__ = [
    "Config",
    "Explanation",
    "bind_tensors",
    "build_onnxruntime_plugin",
    "build_tensorrt_engine",
    "disable",
    "enable",
    "explain",
    "export_onnx",
    "export_tensorrt",
    "onnx_schema",
    "onnxruntime_session",
    "sparse_attention",
]
