"""Find the calls of scaled_dot_product_attention in a graph."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

SDPA_TARGETS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)

# what Dynamo and export put around module names: L['self']._modules['blocks'] is blocks
_NOT_MODULES = {"L", "self", "__dict__", "_modules", "_orig_mod"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One SDPA node with its arguments bound by name, torch's defaults filled in."""

    node: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False

    @property
    def path(self) -> str:
        """Path of the calling module, such as ``blocks.0.attn1``, or else the node's name."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        words = re.findall(r"\w+", str(stack[-1][0])) if stack else []
        return ".".join(word for word in words if word not in _NOT_MODULES) or self.node.name


def find_calls(gm: GraphModule) -> list[Call]:
    """Every SDPA call of the graph, in order; positional and keyword arguments alike."""
    return [
        Call(node, **_BOUND.bind(*node.args, **node.kwargs).arguments)
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target in SDPA_TARGETS
    ]


# the builtin itself has no signature to bind
_BOUND = inspect.Signature(
    [
        inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if field.default is dataclasses.MISSING
        else inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default
        )
        for field in dataclasses.fields(Call)[1:]
    ]
)
