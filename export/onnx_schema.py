"""The published schemas of our nodes: beside what they take, the shapes that they give."""

from __future__ import annotations

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceError

from uta_fx.export.onnx_functions import schemas

_BLOCKS = {
    "SparseAttention": ("Nq", "Lq", "block_q"),
    "BlockStatistics": ("Nk", "L", "block_kv"),
    "BlockScores": ("Nq", "Lq", "block_q"),
}
"""Of a node: a number of blocks, the length that it cuts, the attribute that is their size."""


def published_schema(name: str) -> OpSchema:
    """The schema of a node, with its inference of types and shapes."""
    known = schemas()
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    schema = known[name]
    # the schema itself would hold the function that holds it
    inputs, outputs = list(schema.inputs), list(schema.outputs)
    schema.set_type_and_shape_inference_function(
        lambda context: _infer(context, inputs, outputs, _BLOCKS.get(name))
    )
    return schema


def _infer(
    context: Any,
    inputs: list[OpSchema.FormalParameter],
    outputs: list[OpSchema.FormalParameter],
    blocks: tuple[str, str, str] | None,
) -> None:
    """Outputs from the sizes that inputs share by name; those that contradict each other raise."""
    sizes: dict[str, Any] = {}
    for index, formal in enumerate(inputs):
        given = context.get_input_type(index)
        if given is None or not given.tensor_type.HasField("shape"):
            continue
        names, dims = _names_of_sizes(formal), given.tensor_type.shape.dim
        if len(names) != len(dims):
            raise InferenceError(
                f"{formal.name} must have {len(names)} dimensions, got {len(dims)}"
            )
        for name, dim in zip(names, dims, strict=True):
            known = sizes.setdefault(name, dim)
            if not known.HasField("dim_value"):
                sizes[name] = dim if dim.HasField("dim_value") else known
            # 0 stands for what is absent
            elif dim.HasField("dim_value") and 0 != dim.dim_value != known.dim_value:
                raise InferenceError(
                    f"{formal.name} must have {name} = {known.dim_value}, got {dim.dim_value}"
                )
            if blocks is not None and name == blocks[1] and dim.HasField("dim_value"):
                count = -(-dim.dim_value // context.get_attribute(blocks[2]).i)
                sizes[blocks[0]] = onnx.TensorShapeProto.Dimension(dim_value=count)
    for index, formal in enumerate(outputs):
        output = onnx.TypeProto()
        output.tensor_type.elem_type = _element_type(context, formal, inputs)
        for name in _names_of_sizes(formal):
            output.tensor_type.shape.dim.add().CopyFrom(
                sizes.get(name, onnx.TensorShapeProto.Dimension())
            )
        context.set_output_type(index, output)


def _element_type(
    context: Any, formal: OpSchema.FormalParameter, inputs: list[OpSchema.FormalParameter]
) -> int:
    """Of an output: the only one there is, that of the inputs of its kind, or of an attribute."""
    only = {
        "F": onnx.TensorProto.FLOAT,
        "I": onnx.TensorProto.INT32,
        "M": onnx.TensorProto.BOOL,
    }
    if formal.type_str in only:
        return int(only[formal.type_str])
    for index, x in enumerate(inputs):
        if x.type_str == formal.type_str:
            return int(context.get_input_type(index).tensor_type.elem_type)
    score_type = context.get_attribute("score_type").i
    if score_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16):
        raise InferenceError(f"score_type must be 1 (float32) or 16 (bfloat16), got {score_type}")
    return int(score_type)


def _names_of_sizes(formal: OpSchema.FormalParameter) -> list[str]:
    """From its description, which begins with its shape: ``[B, H, Lq, D]``."""
    return formal.description[1:].partition("]")[0].split(", ")
