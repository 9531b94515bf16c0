"""Every model of ``uta_fx.study.models`` as an ONNX file: does it export, and what does it compute.

``python -m uta_fx.study.exports > docs/onnx.md`` makes the table in the documentation.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from torch import Tensor
from torch.utils._pytree import tree_leaves

from uta_fx.explain import FULL_CAPTURE
from uta_fx.exporters import export_onnx, onnx_schema
from uta_fx.study.models import MODELS, SMALL, Model

HEADER = """# Models as ONNX files

Made by `python -m uta_fx.study.exports`: small random configurations of the model classes of
diffusers {diffusers}, exported with density 0.3 by PyTorch {torch} and run by ONNX Runtime
{onnxruntime} on a CPU, float32. Error: of the file's output relative to that of
`torch.compile(model, backend="uta")`, in norm. A model whose attention stays dense exports too;
[models.md](models.md) says why it does.

| model | sparse nodes | error, or why there is no file |
|---|---|---|"""


def page() -> str:
    """The documentation's page, Markdown."""
    return f"{table()}\n\n{node()}"


def node() -> str:
    """What the node of our domain takes and gives, Markdown."""
    schema = onnx_schema()
    lines = [
        f"## The node `{schema.domain}::{schema.name}`, version {schema.since_version}\n",
        f"{schema.doc} `uta_fx.onnx_schema()` is this as a schema of the onnx package, with"
        " inference of shapes; every file has the node's function of standard operations too.\n",
        "| | | type | |\n|---|---|---|---|",
    ]
    types = {
        constraint.type_param_str: ", ".join(x[7:-1] for x in constraint.allowed_type_strs)
        for constraint in schema.type_constraints  # tensor(float) and so on
    }
    for kind, formals in (("input", schema.inputs), ("output", schema.outputs)):
        for x in formals:
            lines.append(f"| {kind} | `{x.name}` | {types[x.type_str]} | {x.description} |")
    for name, x in sorted(schema.attributes.items()):
        lines.append(f"| attribute | `{name}` | {x.type.name.lower()} | {x.description} |")
    return "\n".join(lines)


def table() -> str:
    """Which models export, Markdown."""
    import diffusers

    lines = [
        HEADER.format(
            diffusers=diffusers.__version__,
            torch=torch.__version__.partition("+")[0],
            onnxruntime=onnxruntime.__version__,
        )
    ]
    for model in MODELS:
        lines.append(f"| {model.name} | {' | '.join(_cells(model))} |")
    return "\n".join(lines)


def _cells(entry: Model) -> tuple[str, str]:
    try:
        model = entry.build()
    except ImportError as error:
        return "", str(error)
    arguments = {**entry.arguments(), "return_dict": False}
    config = dataclasses.replace(SMALL, density=0.3, grid=entry.grid)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(model, (), path, config=config, kwargs=arguments)
        except ValueError as error:
            return "", re.sub(r" object at 0x\w+", "", str(error).partition(". ")[0])
        try:
            outputs, nodes = _run(path, arguments)
        except NoKernel as error:
            reason = str(error).rpartition(" : ")[2]
            return "", f"it is written, and ONNX Runtime cannot run it: {reason}"
    torch._dynamo.reset()
    options: dict[str, Any] = {
        "density": 0.3, "grid": entry.grid, "inner": "eager", "min_tokens": SMALL.min_tokens,
        "block_q": SMALL.block_q, "block_kv": SMALL.block_kv,
    }  # fmt: skip
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        compiled = torch.compile(model, backend="uta", options=options)
        expected = _tensors(compiled(**arguments))
    errors = [(a - b).norm() / b.norm() for a, b in zip(outputs, expected, strict=True)]
    return str(nodes), f"{max(errors).item():.1e}"


def _run(path: Path, arguments: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Outputs of a file, and how many sparse nodes it has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    tensors = [x.numpy() for x in _tensors(arguments)]
    outputs = session.run(None, dict(zip(names, tensors, strict=True)))
    nodes = onnx.load(path).graph.node
    return [torch.from_numpy(x) for x in outputs], sum(node.domain == "uta" for node in nodes)


def _tensors(structure: Any) -> list[Tensor]:
    return [x for x in tree_leaves(structure) if isinstance(x, Tensor)]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(page())
