"""Write a rewritten graph as code to read, and as a picture for Graphviz."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from uta_fx.attention import ContinuedSite, SparseSite
from uta_fx.passes.find_calls import module_path
from uta_fx.passes.read_node import name_of
from uta_fx.passes.site import recorded


def readable(gm: GraphModule) -> str:
    """A graph as Python: an operation a line, with shapes and the model's own lines beside it."""
    return str(gm.print_readable(print_output=False))


def dot(gm: GraphModule, dense: Collection[Node]) -> str:
    """A graph in Graphviz's language, weights left out.

    Args:
        gm: After the rewrite, or before it.
        dense: Attention that stays dense: orange, where sparse attention is green.

    Returns:
        An operation each in a box of the module whose forward makes it, with the shape of what it
        makes.
    """
    boxes: dict[str, list[Node]] = defaultdict(list)
    drawn = [node for node in gm.graph.nodes if not _is_weight(node)]
    for node in drawn:
        boxes[module_path(node)].append(node)
    lines = ["digraph {", '  node [shape=box, style=filled, fillcolor=white, fontname="monospace"]']
    for number, (path, nodes) in enumerate(boxes.items()):
        lines.append(f"  subgraph cluster_{number} {{")
        lines.append(f"    label={json.dumps(path)}")
        lines += [f'    "{node.name}" [{_look(node, dense)}]' for node in nodes]
        lines.append("  }")
    kept = set(drawn)
    lines += [
        f'  "{source.name}" -> "{node.name}"'
        for node in drawn
        for source in node.all_input_nodes
        if source in kept
    ]
    return "\n".join((*lines, "}", ""))


def write(folder: Path, name: str, gm: GraphModule, dense: Collection[Node]) -> list[Path]:
    """Write ``name.py`` and ``name.dot`` and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.py", folder / f"{name}.dot"]
    for path, text in zip(paths, (readable(gm), dot(gm, dense)), strict=True):
        path.write_text(text)
    return paths


def _look(node: Node, dense: Collection[Node]) -> str:
    label = name_of(node) if node.op.startswith("call") else node.op
    value = recorded(node)
    if isinstance(value, torch.Tensor):
        label += "\n" + " x ".join(map(str, value.shape))
    colour = "orange" if node in dense else ""
    site = node.target.site if isinstance(node.target, ContinuedSite) else node.target
    if isinstance(site, SparseSite):
        colour = "palegreen"
        label += f"\ndensity {site.config.density:g}"
        if site.grid:
            label += "\ngrid " + " x ".join(map(str, site.grid))
    return f"label={json.dumps(label)}" + (f", fillcolor={colour}" if colour else "")


def _is_weight(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(recorded(node), torch.nn.Parameter)
