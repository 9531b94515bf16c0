"""Files of one node of our domain, for tests of functions and of the plugin."""

import onnx
import torch

from uta_fx.export import onnx_functions
from uta_fx.kernels import reference


def node_file(function, inputs, attributes, outputs):
    """A model of one node with its function.

    Args:
        function: Of the node.
        inputs: Tensors by name.
        attributes: By name.
        outputs: Tensors of the outputs' dtypes and shapes, in order.
    """
    schema = onnx_functions.schemas()[function.name]
    names = [x.name for x in schema.outputs]

    def described(name, x):
        return onnx.helper.make_tensor_value_info(
            name, onnx_functions.ELEMENT_TYPES[x.dtype], x.shape
        )

    node = onnx.helper.make_node(function.name, list(inputs), names, domain="uta", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [described(name, x) for name, x in inputs.items()],
        [described(name, x) for name, x in zip(names, outputs, strict=True)],
    )
    return onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("uta", 1)],
        functions=[function],
        ir_version=10,
    )


def statistics_file(key, value, block_kv):
    """Of ``BlockStatistics``; and what to feed it."""
    outputs = reference.block_statistics(key, value, block_kv)
    named = {"key": key, "value": value}
    function = onnx_functions.block_statistics_function(18)
    return node_file(function, named, {"block_kv": block_kv}, outputs), named


def lists_file(exact):
    """Of ``ListBlocks``."""
    function = onnx_functions.list_blocks_function(18)
    return node_file(function, {"exact": exact}, {}, reference.list_blocks(exact))


def scores_file(inputs, scale, weight, power, block_q, rows):
    """Of ``BlockScores``, by its tensors in order and its numbers; and what to feed it."""
    query, mean = inputs[:2]
    dtype = reference.score_dtype(query.dtype)
    scores = torch.empty(
        *query.shape[:2], -(-query.shape[2] // block_q), mean.shape[2], dtype=dtype
    )
    function = onnx_functions.block_scores_function(18, power)
    attributes = {
        "scale": scale, "variance_weight": weight, "variance_power": power, "block_q": block_q,
        "rows": rows, "score_type": onnx_functions.ELEMENT_TYPES[dtype],
    }  # fmt: skip
    names = [x.name for x in onnx_functions.schemas()["BlockScores"].inputs]
    named = dict(zip(names, inputs, strict=True))
    return node_file(function, named, attributes, [scores]), named


def counted_file(scores, kept, rows):
    """Of ``SelectCounted``; and what to feed it."""
    named = {"scores": scores, "kept": torch.tensor([kept]), "rows": torch.tensor([rows])}
    function = onnx_functions.select_counted_function(18)
    return node_file(function, named, {}, [torch.empty(scores.shape, dtype=torch.bool)]), named


def with_open_sizes(model, known=()):
    """A file whose dimensions have names, but for those of 0 and 1 and those that are known."""
    for tensor in (*model.graph.input, *model.graph.output):
        for index, dim in enumerate(tensor.type.tensor_type.shape.dim):
            if dim.dim_value not in (0, 1, *known):
                dim.dim_param = f"{tensor.name}_{index}"
    return model


def select_file(scores, kept, rows):
    """Of ``SelectBlocks``."""
    function = onnx_functions.select_blocks_function(18)
    exact = torch.empty(scores.shape, dtype=torch.bool)
    return node_file(function, {"scores": scores}, {"kept": kept, "rows": rows}, [exact])


def fit_file(args):
    """Of ``FitTail``, by the arguments of ``uta::fit_tail``; and what to feed it."""
    schema = onnx_functions.schemas()["FitTail"]
    named = dict(zip([x.name for x in schema.inputs], args[:10], strict=True))
    names = ("scale", "variance_weight", "rows", "block_q", "block_kv")
    attributes = dict(zip(names, args[10:], strict=True))
    factors = [torch.empty(args[0].shape[:2]) for _ in range(2)]
    return node_file(onnx_functions.fit_tail_function(18), named, attributes, factors), named
