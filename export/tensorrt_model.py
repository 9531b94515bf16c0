"""A whole model as an ONNX file for TensorRT's parser: two dialects.

With plugins, every sparse attention is one or two nodes that our plugins run. TensorRT's parser
takes a function before a plugin (ONNX Runtime does the opposite), so that the file has none: it is
for TensorRT alone. Without plugins everything is standard operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset

from uta_fx.export.onnx_functions import DOMAIN, VERSION, make_schema
from uta_fx.export.onnx_model import Dialect, inline, nodes_of, selection_functions
from uta_fx.export.tensorrt_functions import Form, static_attention_function
from uta_fx.export.tensorrt_ops import PLUGINS


def standard_dialect() -> Dialect:
    """Standard operations alone: for TensorRT-RTX, and for TensorRT without our plugins."""
    return Dialect(lower=_write_out)


def plugin_dialect() -> Dialect:
    """Nodes that TensorRT's parser finds our plugins for."""
    return Dialect(
        translations={getattr(torch.ops.uta, name).default: _translation(name) for name in PLUGINS},
        site_node="attend_listed",
        lower=_address_plugins,
    )


def _write_out(model: ir.Model, opset: int) -> None:
    forms = set()
    for node in nodes_of(model, "SparseAttention"):
        form = _form_of(node)
        forms.add(form)
        node.overload = form.overload
    functions = [static_attention_function(opset, form) for form in forms]
    inline(model, [*selection_functions(model, opset), *functions])
    del model.opset_imports[DOMAIN]


def _form_of(node: ir.Node) -> Form:
    sizes: list[Any] = [value.shape for value in node.inputs if value is not None]
    has_tail = sizes[5][3] > 0
    return Form(
        has_tail=has_tail,
        per_block=has_tail and node.attributes["per_block"].as_int() == 1,
        has_variance=has_tail and sizes[8][2] > 0,
        has_slope=has_tail and sizes[9][2] > 0,
    )


def _translation(name: str) -> Callable[..., Any]:
    """A call of an operator as a node of its name, with its floats and ints as attributes."""
    schema, kinds = getattr(torch.ops.uta, name).default._schema, PLUGINS[name]
    tensors = [x.name for x in schema.arguments if str(x.type) == "Tensor"]
    scalars = {
        x.name: {"float": float, "int": int}[str(x.type)]
        for x in schema.arguments
        if str(x.type) != "Tensor"
    }
    outputs = [x.name or "result" for x in schema.returns]
    node = Op(
        Opset(DOMAIN, VERSION),
        name,
        make_schema(
            name,
            "A plugin of TensorRT.",
            {x: (kind, "") for x, kind in zip(tensors, kinds.inputs, strict=True)},
            {x: (kind, "") for x, kind in zip(outputs, kinds.outputs, strict=True)},
            {x: (kind, "") for x, kind in scalars.items()},
        ),
    )

    def translate(*arguments: Any) -> Any:
        values = dict(zip(scalars, arguments[len(tensors) :], strict=True))
        return node(*arguments[: len(tensors)], **values)

    return translate


def _address_plugins(model: ir.Model, opset: int) -> None:
    """Say on each node which plugin runs it, and that it is compiled ahead of time."""
    model.opset_imports[DOMAIN] = VERSION
    for name in PLUGINS:
        for node in nodes_of(model, name):
            for attribute in (
                ir.AttrString("plugin_namespace", DOMAIN),
                ir.AttrString("plugin_version", "1"),
                ir.AttrInt64("aot", 1),
            ):
                node.attributes[attribute.name] = attribute
    for node in nodes_of(model, "attend_listed"):
        start = node.inputs[5]
        tail = start.producer() if start is not None else None
        if tail is not None and tail.op_type == "attend_tail":
            assert node.name is not None
            tail.name = node.name.replace("attend_listed", "attend_tail")
