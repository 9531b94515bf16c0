"""Every model of ``uta_fx.study.models`` as an ONNX file: does it export, and what does it compute.

``python -m uta_fx.study.exports docs/onnx.md`` writes the page of the documentation;
``--only "Sana WM"`` makes a row of it anew and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_leaves

from uta_fx.config import Config
from uta_fx.explain import FULL_CAPTURE, Explanation
from uta_fx.export.flex_attention import GROUPED, LISTED
from uta_fx.export.onnx_model import KEPT
from uta_fx.export.state import opened
from uta_fx.exporters import export_onnx, onnx_schema, sparse_program
from uta_fx.study.models import MODELS, SMALL, Model

HEADER = """# Models as ONNX files

Made by `python -m uta_fx.study.exports docs/onnx.md`: small random configurations of the model
classes of diffusers {diffusers}, exported with density 0.3 by PyTorch {torch} and run by ONNX
Runtime {onnxruntime} on a CPU, float32. Error: of the file's output relative to that of
`torch.compile(model, backend="uta")`, in norm. A model whose attention stays dense exports too;
[models.md](models.md) says why it does. *Decided*: there the class asks whether a tensor is true,
and with `decide_branches=True` the file takes the way that its example inputs take (and answers
NaN where others would take another); so for numbers that it reads from tensors, where it cannot be
exported otherwise. *Own blocks*, *own groups*: the class attends by FlexAttention to blocks that it
lists itself, or under a mask of its own that tells groups of tokens apart, which in the file the
sparse node does.

| model | sparse nodes | error, or why there is no file |
|---|---|---|"""

REMARKS = """\
* FlexAttention under a mask that depends on inputs, or that tells all tokens apart, is written out
  in the file, with a logit for each pair of tokens: such a file is for short videos.
* The error of a class with FlexAttention is to the model itself, uncompiled, with its block lists
  honoured: PyTorch's eager FlexAttention leaves them out.
* Wan Animate 2 hands over keys and values in an object of its own: its tensors are inputs of the
  file of the generation pass and outputs of that of the reference pass, of the same names. It reads
  the sizes of its video from tensors in every layer, at which `torch.compile` breaks its graph: the
  error of the reference pass, sparse in the file alone, is to the exported program in PyTorch.
* Sana WM computes its softmax attention in bfloat16 in a model of any dtype, hence its error."""

NODES = """\
## Nodes of domain `uta`

`uta_fx.onnx_schema(name)` is this as a schema of the onnx package, with inference of types and
shapes; every file has the functions of its nodes, of standard operations, too. A file for another
version of the domain is refused: export the model again. Nq, Nk: numbers of blocks of queries and
keys."""


def page(only: Collection[str] = (), before: str = "") -> str:
    """The documentation's page, Markdown.

    Args:
        only: Models to export; none for all of them.
        before: The page as it was, from which the rows of all others are taken.

    Raises:
        ValueError: A model is not known, or the page is of other versions.
    """
    return f"{table(only, before)}\n\n{REMARKS}\n\n{nodes()}\n"


def nodes() -> str:
    """What the nodes of our domain take and give, Markdown."""
    return "\n\n".join([NODES, *map(_node, KEPT)])


def _node(name: str) -> str:
    schema = onnx_schema(name)
    lines = [
        f"### `{schema.domain}::{schema.name}`, version {schema.since_version}\n",
        f"{schema.doc}\n",
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


def table(only: Collection[str] = (), before: str = "") -> str:
    """Which models export, Markdown; arguments as of ``page``."""
    import diffusers

    header = HEADER.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        onnxruntime=onnxruntime.__version__,
    )
    rows = rows_before(header, {model.name for model in MODELS}, only, before)
    lines = [header]
    for model in MODELS:
        kept = rows.get(model.name) if only and model.name not in only else None
        lines.append(kept or f"| {model.name} | {' | '.join(_cells(model))} |")
    return "\n".join(lines)


def rows_before(
    header: str, names: Collection[str], only: Collection[str], before: str
) -> dict[str, str]:
    """The rows of a page as it was, by their first cell.

    Args:
        header: How a page begins that these versions make.
        names: Models that a page may have.
        only: Models whose rows are made anew; none for all of them.
        before: The page.

    Raises:
        ValueError: A model is not known, or rows are to stay and the page is of other versions.
    """
    if unknown := set(only) - set(names):
        raise ValueError(f"only must name models of the table, got {', '.join(sorted(unknown))}")
    if only and not before.startswith(header):
        raise ValueError("only needs a page that these versions made: make all of it")
    return {row.strip("| ").partition(" | ")[0]: row for row in before.splitlines()}


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
            found = export_onnx(
                model, (), path, config=config, kwargs=arguments, decide_branches=True
            )
        except ValueError as error:
            return "", re.sub(r" object at 0x\w+", "", str(error).partition(". ")[0])
        with opened(model, (), arguments) as given:
            tensors = tensors_of(given.kwargs)
        try:
            outputs, nodes = run_file(path, tensors)
        except NoKernel as error:
            reason = str(error).rpartition(" : ")[2]
            return "", f"it is written, and ONNX Runtime cannot run it: {reason}"
    expected = expected_outputs(model, config, arguments, found, entry.dense)
    errors = [(a - b).norm() / b.norm() for a, b in zip(outputs, expected, strict=True)]
    notes = [note.partition(": ")[2] for note in found.notes if note.startswith("decided")]
    notes = [f"decided: {note}" for note in notes]
    kinds = {LISTED: "own blocks", GROUPED: "own groups"}
    notes += dict.fromkeys(kinds[x.reason] for x in found.sites if x.reason in kinds)
    return str(nodes), "; ".join([f"{max(errors).item():.1e}", *notes])


def expected_outputs(
    model: torch.nn.Module,
    config: Config,
    arguments: dict[str, Any],
    found: Explanation,
    dense: str,
) -> list[Tensor]:
    """What a file should answer: what the backend does, where the model lets it.

    Args:
        model: That was exported.
        config: Settings, likewise.
        arguments: Likewise.
        found: In the file.
        dense: Why the backend leaves its attention dense (``Model.dense``), or empty. FlexAttention
            is computed by the model itself; what is sparse in the file alone by its program.
    """
    if dense.startswith("FlexAttention"):
        with torch.no_grad(), _honoured_lists():
            return tensors_of(model(**arguments))
    if dense and any(site.sparse for site in found.sites):  # in one graph, not in several
        program, *_ = sparse_program(model, (), arguments, None, config, decide_branches=True)
        with opened(model, (), arguments) as given:
            return tensors_of(program.module()(**given.kwargs))
    return compiled_outputs(model, config, arguments)


def compiled_outputs(
    model: torch.nn.Module, config: Config, arguments: dict[str, Any]
) -> list[Tensor]:
    """Outputs of the backend."""
    torch._dynamo.reset()
    options = {x.name: getattr(config, x.name) for x in dataclasses.fields(config)}
    options["inner"] = "eager"
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        compiled = torch.compile(model, backend="uta", options=options)
        return tensors_of(compiled(**arguments))


@contextlib.contextmanager
def _honoured_lists() -> Iterator[None]:
    """Eager FlexAttention that shows no block that its mask does not list."""
    eager: Any = flex.flex_attention

    def honest(*args: Any, block_mask: Any = None, **options: Any) -> Any:
        listed, inside = block_mask.to_dense().bool(), block_mask.mask_mod
        (rows, columns), (batch, heads) = block_mask.BLOCK_SIZE, listed.shape[:2]
        block_mask.mask_mod = lambda b, h, i, j: (
            listed[b % batch, h % heads, i // rows, j // columns] & inside(b, h, i, j)
        )
        return eager(*args, block_mask=block_mask, **options)

    with mock.patch.object(flex, "flex_attention", honest):
        yield


def run_file(path: Path, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Outputs of a file, and how many sparse nodes it has."""
    session = open_quietly(path)
    names = [x.name for x in session.get_inputs()]
    arrays = [x.numpy() for x in tensors]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    nodes = onnx.load(path).graph.node
    return [torch.from_numpy(x) for x in outputs], sum(
        node.op_type == "SparseAttention" for node in nodes
    )


def open_quietly(
    path: Path, level: Any = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
) -> onnxruntime.InferenceSession:
    """A session on the CPU that logs nothing, its graph optimised as far as ``level``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def tensors_of(structure: Any) -> list[Tensor]:
    """The tensors in arguments or outputs, in their order."""
    return [x for x in tree_leaves(structure) if isinstance(x, Tensor)]


def page_arguments(doc: str | None) -> tuple[Path, Sequence[str]]:
    """What the command line of a page says: the page, and which models to make anew, none for all.

    Args:
        doc: Of the command's module; its first line tells what the command does.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("path", type=Path, help="page to write, or to make rows of anew")
    parser.add_argument("--only", nargs="+", default=(), metavar="MODEL", help="names of the table")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    return given.path, given.only


def text_of(path: Path) -> str:
    """A page as it is; empty where there is none."""
    return path.read_text() if path.is_file() else ""


def main() -> None:
    """Write the page."""
    path, only = page_arguments(__doc__)
    path.write_text(page(only, text_of(path)))


if __name__ == "__main__":
    main()
