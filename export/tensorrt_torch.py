"""An engine of a whole program by ``torch_tensorrt``, with our plugins inside."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.export import ExportedProgram

from uta_fx._optional import require
from uta_fx.export.onnx_functions import DOMAIN
from uta_fx.export.replace_file import folder_beside
from uta_fx.export.tensorrt_engine import load_tensorrt
from uta_fx.export.tensorrt_ops import PLUGINS
from uta_fx.export.tensorrt_program import with_constants


def check_torch_tensorrt() -> None:
    """Raise what is missing before the work rather than after it.

    Raises:
        ImportError: TensorRT with plugins, torch_tensorrt, Triton or onnx is missing.
        ValueError: There is no GPU.
    """
    load_tensorrt(plugins=True)
    require("torch_tensorrt", extra="tensorrt")
    require("triton", extra="triton")
    if not torch.cuda.is_available():
        raise ValueError(
            "form='engine' needs a CUDA GPU, on which TensorRT times kernels: export with"
            " form='plugin' and build the engine where there is one"
        )


def write_engine(program: ExportedProgram, path: Path) -> None:
    """Build the engine of a program of ``spell_out(..., plugins=True)`` and write it.

    No part of the program may stay with PyTorch: what cannot be converted is an error.
    """
    import torch_tensorrt

    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    program = with_constants(program)
    register_converters()
    engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
        program,
        arg_inputs=args,
        kwarg_inputs=kwargs,
        require_full_compilation=True,
        truncate_double=True,
        attn_bias_is_causal=False,  # it takes any mask of dense attention for causal otherwise
    )
    with folder_beside(path) as folder:
        partial = folder / path.name
        partial.write_bytes(engine)
        os.replace(partial, path)


def register_converters() -> None:
    """Tell ``torch_tensorrt`` that our operators are plugins, compiled ahead of time; once."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.conversion.plugins import generate_plugin_converter

    from uta_fx.export.tensorrt_plugin import register_plugins

    register_plugins()
    for name in PLUGINS:
        if getattr(torch.ops.uta, name).default not in DYNAMO_CONVERTERS:
            generate_plugin_converter(f"{DOMAIN}::{name}", use_aot_if_available=True)
