"""The published schema of our node: what it says, and the shapes that it infers."""

import pytest
import torch
from cases import Case

onnx = pytest.importorskip("onnx")

import uta_fx  # noqa: E402
from uta_fx.export.onnx_functions import node_model  # noqa: E402  # needs onnx


@pytest.fixture
def registered():
    schema = uta_fx.onnx_schema()
    onnx.defs.register_schema(schema)
    yield schema
    onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def bare_model(case):
    """A node without its function and without a word on its outputs."""
    model, _ = node_model(case.inputs())
    del model.functions[:]
    for output in model.graph.output:
        output.ClearField("type")
    return model


def shape_of(value):
    return [x.dim_value or x.dim_param for x in value.type.tensor_type.shape.dim]


def test_it_says_what_the_node_is():
    schema = uta_fx.onnx_schema()
    assert (schema.domain, schema.name, schema.since_version) == ("uta", "SparseAttention", 1)
    assert [x.name for x in schema.outputs] == ["output", "lse"]
    assert set(schema.attributes) == {
        "scale", "variance_weight", "block_q", "block_kv", "per_block"
    }  # fmt: skip
    parts = (*schema.inputs, *schema.outputs, *schema.attributes.values())
    assert all(part.description for part in parts)


@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_inferred(registered, tail, dtype):
    model = bare_model(Case(tail=tail, dtype=dtype, dim_v=48))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "tokens"
    output, lse = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output
    assert output.type.tensor_type.elem_type == model.graph.input[0].type.tensor_type.elem_type
    assert lse.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert shape_of(output) == [2, 3, "tokens", 48]
    assert shape_of(lse) == [2, 3, "tokens"]


def test_sizes_that_contradict_each_other_are_named(registered):
    model = bare_model(Case())
    model.graph.input[1].type.tensor_type.shape.dim[3].dim_value = 40
    with pytest.raises(Exception, match="key must have D = 32, got 40"):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
    model = bare_model(Case())
    del model.graph.input[4].type.tensor_type.shape.dim[2]
    with pytest.raises(Exception, match="block_counts must have 3 dimensions, got 2"):
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
