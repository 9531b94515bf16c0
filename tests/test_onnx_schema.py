"""The published schemas of our nodes: what they say, and the types and shapes that they infer."""

import pytest
import torch
from cases import Case, score_inputs
from test_fitting import CASES as FITS

onnx = pytest.importorskip("onnx")

import onnx_nodes  # noqa: E402  # these need onnx

import uta_fx  # noqa: E402
from uta_fx.export.onnx_functions import ELEMENT_TYPES, node_model, schemas  # noqa: E402

ATTRIBUTES = {
    "SparseAttention": {"scale", "variance_weight", "block_q", "block_kv", "per_block"},
    "BlockStatistics": {"block_kv"},
    "BlockScores": {"scale", "variance_weight", "variance_power", "block_q", "rows", "score_type"},
    "SelectBlocks": {"kept", "rows"},
    "SelectCounted": set(),
    "ListBlocks": set(),
    "FitTail": {"scale", "variance_weight", "rows", "block_q", "block_kv"},
}


@pytest.fixture
def registered():
    published = [uta_fx.onnx_schema(name) for name in ATTRIBUTES]
    for schema in published:
        onnx.defs.register_schema(schema)
    yield
    for schema in published:
        onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)


def bare(model):
    """A node without its function and without a word on its outputs; and what was said of them."""
    del model.functions[:]
    said = [onnx.ValueInfoProto.FromString(x.SerializeToString()) for x in model.graph.output]
    for output in model.graph.output:
        output.ClearField("type")
    return model, said


def bare_attention(case):
    return bare(node_model(case.inputs())[0])[0]


def inferred(model):
    return list(onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output)


def shape_of(value):
    return [x.dim_value or x.dim_param for x in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_it_says_what_the_node_is(name):
    schema = uta_fx.onnx_schema(name)
    assert (schema.domain, schema.name, schema.since_version) == ("uta", name, 1)
    assert set(schema.attributes) == ATTRIBUTES[name]
    assert schema.doc and schema.has_type_and_shape_inference_function
    parts = (*schema.inputs, *schema.outputs, *schema.attributes.values())
    assert all(part.description for part in parts)


def test_every_node_of_a_file_has_one():
    """Sparse attention is the one that is meant where no name is given; others are refused."""
    assert set(schemas()) == set(ATTRIBUTES)
    assert uta_fx.onnx_schema().name == "SparseAttention"
    with pytest.raises(ValueError, match=r"name must be one of SparseAttention, .*, got 'Sparse'"):
        uta_fx.onnx_schema("Sparse")


@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_inferred(registered, tail, dtype):
    model = bare_attention(Case(tail=tail, dtype=dtype, dim_v=48))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "tokens"
    output, lse = inferred(model)
    assert output.type.tensor_type.elem_type == model.graph.input[0].type.tensor_type.elem_type
    assert lse.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert shape_of(output) == [2, 3, "tokens", 48]
    assert shape_of(lse) == [2, 3, "tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nodes_of_the_selection_give_what_their_operators_give(registered, dtype):
    """Dtypes and sizes of the results of the reference; the last block is ragged."""
    key, value = torch.ones(2, 3, 101, 24, dtype=dtype), torch.ones(2, 3, 101, 40, dtype=dtype)
    statistics, _ = onnx_nodes.statistics_file(key, value, 32)
    scores, _ = onnx_nodes.scores_file(score_inputs(2, 3, 101, 5, 24, dtype), 0.2, 0.5, 1.0, 32, 8)
    chosen = onnx_nodes.select_file(torch.ones(2, 3, 4, 5), 6, 4)
    counted, _ = onnx_nodes.counted_file(torch.ones(2, 3, 4, 5), 6, 4)
    lists = onnx_nodes.lists_file(torch.ones(2, 3, 4, 5, dtype=torch.bool))
    fit, _ = onnx_nodes.fit_file(FITS["head_dims_of_their_own"].inputs(dtype, "cpu"))
    of_clusters, _ = onnx_nodes.fit_file(FITS["clusters"].inputs(dtype, "cpu"))
    for model in (statistics, scores, chosen, counted, lists, fit, of_clusters):
        model, said = bare(model)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        assert list(model.graph.output) == said
        onnx.checker.check_model(model, full_check=True)


def test_a_length_that_is_not_known_leaves_its_blocks_unknown(registered):
    model, _ = onnx_nodes.statistics_file(torch.ones(2, 3, 70, 16), torch.ones(2, 3, 70, 16), 32)
    model, _ = bare(model)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[2].dim_param = "tokens"
    mean, *_, covariance = inferred(model)
    assert not isinstance(shape_of(mean).pop(2), int)  # without a name, or one of the package
    assert shape_of(covariance) == [2, 3, 16, 16]


def test_sizes_that_contradict_each_other_are_named(registered):
    model = bare_attention(Case())
    model.graph.input[1].type.tensor_type.shape.dim[3].dim_value = 40
    with pytest.raises(Exception, match="key must have D = 32, got 40"):
        inferred(model)
    model = bare_attention(Case())
    del model.graph.input[4].type.tensor_type.shape.dim[2]
    with pytest.raises(Exception, match="block_counts must have 3 dimensions, got 2"):
        inferred(model)
    model = bare_attention(Case(length_q=130, block_q=32))
    model.graph.input[3].type.tensor_type.shape.dim[2].dim_value = 4
    with pytest.raises(Exception, match="block_ids must have Nq = 5, got 4"):
        inferred(model)


def test_a_score_type_that_is_none_is_named(registered):
    inputs = score_inputs(1, 2, 70, 3, 16, torch.float32)
    model, _ = bare(onnx_nodes.scores_file(inputs, 0.2, 0.5, 1.0, 32, 8)[0])
    (attribute,) = (x for x in model.graph.node[0].attribute if x.name == "score_type")
    attribute.i = ELEMENT_TYPES[torch.int32]
    with pytest.raises(Exception, match=r"score_type must be 1 .* got 6"):
        inferred(model)
