"""The published schema of ``uta::SparseAttention``: beside what it takes, the shapes it gives."""

from __future__ import annotations

from typing import Any

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceError

from uta_fx.export.onnx_functions import schemas


def sparse_attention_schema() -> OpSchema:
    """The schema, with its inference of types and shapes."""
    schema = schemas()["SparseAttention"]
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _infer(context: Any) -> None:
    """Outputs from the sizes that inputs share by name; those that contradict each other raise."""
    schema = schemas()["SparseAttention"]
    sizes: dict[str, Any] = {}
    for index, formal in enumerate(schema.inputs):
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
    query = context.get_input_type(0)
    for index, formal in enumerate(schema.outputs):
        output = onnx.TypeProto()
        sums = onnx.TensorProto.FLOAT
        output.tensor_type.elem_type = query.tensor_type.elem_type if index == 0 else sums
        for name in _names_of_sizes(formal):
            output.tensor_type.shape.dim.add().CopyFrom(
                sizes.get(name, onnx.TensorShapeProto.Dimension())
            )
        context.set_output_type(index, output)


def _names_of_sizes(formal: OpSchema.FormalParameter) -> list[str]:
    """From its description, which begins with its shape: ``[B, H, Lq, D]``."""
    return formal.description[1:].partition("]")[0].split(", ")
