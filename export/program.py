"""A ``torch.export`` program with sparse attention inside: what every exporter starts from."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from uta_fx.passes.site import Site
from uta_fx.passes.sparsify import Plan, rewrite, understand


def sparsify_program(program: ExportedProgram, plan: Plan) -> tuple[ExportedProgram, list[Site]]:
    """Run the backend's passes on an exported program.

    Args:
        program: From ``torch.export.export``, before any decomposition.
        plan: What the passes are told.

    Returns:
        A program in which each sparse site is pooling, selection and ``uta::sparse_attention``,
        traced for the shapes of the original's example inputs; and the sites.

    Raises:
        ValueError: The program carries no example inputs to trace with.
    """
    if program.example_inputs is None:
        raise ValueError("program must carry example inputs, got an exported program without them")
    args, kwargs = program.example_inputs
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    pairs = understand(module, plan)
    rewrite(module, pairs, plan)
    with torch.no_grad():
        return torch.export.export(module, args, kwargs), [site for _, site in pairs]
