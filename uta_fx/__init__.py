"""Block-sparse attention with Unified Tail Aggregation, as a torch.compile backend."""

from __future__ import annotations

__version__ = "0.1.0"

from uta_fx.attention import sparse_attention
from uta_fx.config import Config
from uta_fx.enable import disable, enable
from uta_fx.explain import Explanation, explain
from uta_fx.exporters import export_onnx

__all__ = [
    "Config",
    "Explanation",
    "disable",
    "enable",
    "explain",
    "export_onnx",
    "sparse_attention",
]
