"""Attention in functions that Dynamo leaves whole."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import uta_fx
from uta_fx import Config
from uta_fx.backend import plan_of
from uta_fx.export.program import sparsify_program
from uta_fx.passes.inline_subgraphs import inline_subgraphs

SETTINGS = {"min_tokens": 128, "block_q": 32, "block_kv": 32}


class Block(nn.Module):
    """Attention over the tokens of a video, and half its input."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x * 0.5, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Region(Block):
    """The same, compiled once by Inductor."""

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return super().forward(x)


def checkpointed(block, x):
    return sum(checkpoint(block, x, use_reentrant=False))


def one_in_another(block, x):
    return checkpoint(lambda x: checkpointed(block, x) * 2, x, use_reentrant=False)


def under_autocast(block, x):
    with torch.autocast("cpu", torch.float16):
        return sum(block(x))


def without_autocast(block, x):
    with torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False):
        return sum(block(x.float()))


@torch.no_grad()
def without_gradients(block, x):
    return sum(block(x))


def region(block, x):
    return sum(block(x))


def branch(block, x):
    return torch.cond(x.sum() > 0, lambda x: sum(block(x)), lambda x: x * 1.0, (x,))


class Model(nn.Module):
    """A video through one block twice, each time by ``call``."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.call = nn.Conv3d(3, 32, 1), call
        self.block = Region() if call is region else Block()

    def forward(self, video):
        x = self.call(self.block, self.patch(video).flatten(2).transpose(1, 2).contiguous())
        return self.call(self.block, x)


def clip():
    return torch.randn(1, 3, 4, 5, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("call", [checkpointed, one_in_another, region])
def test_attention_in_a_function_is_that_of_the_graph(call):
    """With the grid of the graph around it; density 1 is dense, to the order of sums."""
    model, video = Model(call).eval(), clip()
    sites = uta_fx.explain(model, video, config=Config(**SETTINGS)).sites
    assert [(x.sparse, x.grid, x.reordered) for x in sites] == [(True, (4, 5, 8), "once")] * 2
    torch._dynamo.reset()
    options = {**SETTINGS, "density": 1.0, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    torch.testing.assert_close(compiled(video), model(video), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [under_autocast, without_autocast, without_gradients])
def test_a_region_of_torch_export_is_a_part_of_the_graph(call):
    """One operator in the program; density 1 is dense, to sums' order or a rounding of float16."""
    model, video = Model(call).eval(), clip()
    program = torch.export.export(model, (video,))
    assert any("wrap_with" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        plan = plan_of(Config(**SETTINGS, density=1.0))
        sparse, sites = sparsify_program(program, plan)
        assert [(x.name, x.sparse, x.grid) for x in sites] == [("block", True, (4, 5, 8))] * 2
        assert not any("wrap_with" in str(node.target) for node in sparse.graph.nodes)
        torch._dynamo.reset()
        options = {**SETTINGS, "density": 1.0, "inner": "eager", "strict": True}
        compiled = torch.compile(program.module(), backend="uta", fullgraph=True, options=options)
        expected = model(video)
        tolerance = 2**-10 if call is under_autocast else 1e-5
        for output in (sparse.module()(video), compiled(video)):
            assert output.dtype == expected.dtype
            torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def test_with_gradients_a_checkpoint_stays():
    """What is kept of it is its caller's decision."""
    operators = []

    def backend(gm, inputs):
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                inline_subgraphs(gm)
            operators.append(sum("checkpoint" in str(x.target) for x in gm.graph.nodes))
        return gm

    torch._dynamo.reset()
    torch.compile(Model(checkpointed), backend=backend, fullgraph=True)(clip())
    assert operators == [2, 0]


@torch.no_grad()
def test_a_branch_is_named_where_it_is_not_looked_into(caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "uta_fx"):
        options = {**SETTINGS, "inner": "eager"}
        torch.compile(Model(branch), backend="uta", fullgraph=True, options=options)(clip())
    assert "no attention outside cond: it is compiled as it is" in caplog.text
    notes = uta_fx.explain(Model(branch), clip(), config=Config(**SETTINGS)).notes
    assert notes == (
        "operations inside cond are not counted",
        "the model has no attention outside of these: there is nothing to make sparse",
    )
