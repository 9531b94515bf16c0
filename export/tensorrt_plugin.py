"""Our kernels as plugins of TensorRT: registered in Python, compiled into the engine.

They are *quickly deployable* plugins with an ahead-of-time implementation, which TensorRT has since
10.9: what a layer returns is declared by a function, and its kernel is handed over as PTX while an
engine is built. The engine then runs without Python and without anything of ours.

Signatures are read off the operators' schemas.
"""

# no postponed annotations: TensorRT reads them

import inspect
import types
from collections.abc import Callable
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
import torch

from uta_fx.export.onnx_functions import DOMAIN
from uta_fx.export.onnxruntime_plugin import gpu_architecture
from uta_fx.export.tensorrt_kernels import compile_layer
from uta_fx.export.tensorrt_ops import PLUGINS

_DTYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
}
_TYPE_NAMES = {"T": "FP32|FP16|BF16", "S": "FP32|BF16|BF16", "F": "FP32", "I": "INT32"}
_TUNED, _SMALL = 1, 2
"""Tactics, of which TensorRT takes the faster: the tuned tile, and one that needs no more than
48 KB of shared memory."""


def register_plugins() -> None:
    """Register ``uta::attend_tail``, ``uta::attend_listed`` and ``uta::block_scores``, once."""
    for name in PLUGINS:
        if not hasattr(trtp.op, DOMAIN) or not hasattr(getattr(trtp.op, DOMAIN), name):
            _register(name)


def _register(name: str) -> None:
    schema = getattr(torch.ops.uta, name).default._schema
    tensors = [x.name for x in schema.arguments if str(x.type) == "Tensor"]
    scalars = {
        x.name: {"float": float, "int": int}[str(x.type)]
        for x in schema.arguments
        if str(x.type) != "Tensor"
    }
    kinds = PLUGINS[name]
    arguments = {**dict.fromkeys(tensors, trtp.TensorDesc), **scalars}
    results = types.GenericAlias(tuple, (trtp.TensorDesc,) * len(kinds.outputs))

    def describe(*descriptions: Any, **attributes: Any) -> Any:
        inputs = [*descriptions, *(attributes.pop(x) for x in tensors[len(descriptions) :])]
        shapes = _output_shapes(name, inputs, attributes)
        of_scores = trt.float32 if inputs[0].dtype == trt.float32 else trt.bfloat16
        dtypes = {"T": inputs[0].dtype, "S": of_scores, "F": trt.float32}
        return tuple(
            trtp.from_shape_expr(shape, dtypes[kind])
            for shape, kind in zip(shapes, kinds.outputs, strict=True)
        )

    def offer(*_: Any) -> list[Any]:
        combination = trtp.AutoTuneCombination(
            ", ".join(_TYPE_NAMES[kind] for kind in kinds.inputs + kinds.outputs), "LINEAR"
        )
        combination.tactics([_TUNED, _SMALL])
        return [combination]

    def implement(*everything: Any) -> Any:
        inputs, values = everything[: len(tensors)], everything[len(tensors) : -2]
        compiled = compile_layer(
            name,
            [tuple(x.shape) for x in inputs],
            _DTYPES[inputs[0].dtype],
            dict(zip(scalars, values, strict=True)),
            gpu_architecture(),
            small=everything[-1] == _SMALL,
        )
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y = compiled.grid
        launch.block_x, launch.shared_mem = compiled.threads, compiled.shared
        return compiled.name, compiled.ptx, launch, trtp.SymIntExprs(0)

    identity = f"{DOMAIN}::{name}"
    trtp.register(identity)(_with_signature(describe, arguments, results))
    trtp.autotune(identity)(
        _with_signature(offer, {**arguments, "outputs": results}, list[trtp.AutoTuneCombination])
    )
    trtp.aot_impl(identity)(
        _with_signature(
            implement,
            {**arguments, "outputs": results, "tactic": int},
            tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
        )
    )


def _with_signature(
    function: Callable[..., Any], arguments: dict[str, Any], returns: Any
) -> Callable[..., Any]:
    """Give a function of anything the signature that TensorRT is to see."""
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for name, kind in arguments.items()
        ],
        return_annotation=returns,
    )
    return function


def _output_shapes(name: str, inputs: list[Any], attributes: dict[str, Any]) -> list[Any]:
    batch, heads, length, _ = inputs[0].shape_expr
    if name == "block_scores":
        return [(batch, heads, trtp.cdiv(length, attributes["block_q"]), inputs[1].shape_expr[2])]
    values = inputs[3 if name == "attend_tail" else 2].shape_expr
    return [(batch, heads, length, values[len(values) - 1]), (batch, heads, length)]
