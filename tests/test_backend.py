"""torch.compile(model, backend="uta"): what is rewritten, what is left alone and why."""

import dataclasses
import logging
import math
import os
import re
import subprocess
import sys
from operator import getitem

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from torch._inductor.utils import fresh_cache
from torch._ops import OpOverload

import uta_fx
from uta_fx import Config
from uta_fx.attention import SparseSite
from uta_fx.backend import sparsify
from uta_fx.kernels import cpu
from uta_fx.passes.trace_calls import trace_calls
from uta_fx.policies import spend_budget

SMALL = {"min_tokens": 128, "block_q": 32, "block_kv": 32}


def wan(**changes):
    """A Wan transformer small enough to trace in a second, in evaluation mode."""
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32,
        "in_channels": 3, "out_channels": 3, "text_dim": 16, "freq_dim": 16, "ffn_dim": 64,
        "num_layers": 3, "cross_attn_norm": True, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**(settings | changes)).eval()


def wan_inputs(frames=4, height=16, width=24, batch=1, text=9):
    """Inputs of ``wan``; 4 x 8 x 12 = 384 tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 3, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=generator),
        "return_dict": False,
    }


def compile_uta(model, **options):
    """Compile with an eager inner backend, which is fast to build and runs the same nodes."""
    options = SMALL | {"inner": "eager"} | options
    return torch.compile(model, backend="uta", fullgraph=True, options=options)


def captured_graph(model, kwargs, config):
    """The rewritten graph and its sites."""
    found = {}

    def backend(gm, inputs):
        found["sites"] = sparsify(gm, inputs, config)
        found["graph"] = gm.graph
        return gm.forward

    with torch.no_grad():
        found["output"] = torch.compile(model, backend=backend, fullgraph=True)(**kwargs)
    return found


@torch.no_grad()
def test_density_one_equals_the_dense_model():
    """Every self-attention goes through the operator, and nothing changes."""
    model, kwargs = wan(), wan_inputs()
    dense = model(**kwargs)[0]
    output = compile_uta(model, density=1.0)(**kwargs)[0]
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sparse_model_is_close_to_the_dense_one_and_not_equal():
    """The rewrite does something, and not too much."""
    model, kwargs = wan(), wan_inputs()
    dense = model(**kwargs)[0]
    output = compile_uta(model, density=0.2)(**kwargs)[0]
    change = ((output - dense).square().mean() / dense.square().mean()).sqrt()
    assert 0 < change < 0.1


def test_self_attention_is_rewritten_and_cross_attention_is_not():
    """Found by where q and k are projected from; in one graph."""
    config = Config(**SMALL, density=0.3)
    found = captured_graph(wan(), wan_inputs(text=384), config)  # text as long as the video
    kinds = [(site.kind, site.sparse) for site in found["sites"]]
    assert kinds == [("self", True), ("cross", False)] * 3
    assert [site.name for site in found["sites"][:2]] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert found["sites"][0].grid == (4, 8, 12)
    targets = [node.target for node in found["graph"].nodes]
    assert sum(target is F.scaled_dot_product_attention for target in targets) == 3
    assert sum(getattr(target, "__name__", "") == "sparse_site" for target in targets) == 3


class Joint(nn.Module):
    """As CogVideoX: a norm lays heads out apart, and the video's part is rotated in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.norm = nn.Linear(64, 3 * 64), nn.LayerNorm(32)

    def forward(self, text, video, table):
        tokens = torch.cat([text, video], 1)
        q, k, v = (x.unflatten(-1, (2, 32)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1))
        q, k = self.norm(q), self.norm(k)
        for x in (q, k):
            x[:, :, text.shape[1] :] = x[:, :, text.shape[1] :] * table
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_parts_of_a_joint_sequence_are_not_copied(monkeypatch):
    """All operators read the video's part of queries, keys and values in the same memory."""
    read = []

    def note(name):
        run = getattr(cpu, name)

        def noted(*args):
            read.append([x.untyped_storage().data_ptr() for x in args[:3]])
            return run(*args)

        monkeypatch.setattr(cpu, name, noted)

    for name in ("fitted_tail", "block_masked_attention", "text_attention", "block_scores"):
        note(name)
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 9, 64), (1, 256, 64), (256, 32)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    config = SMALL | {"grid": (4, 8, 8), "strict": True}
    torch.compile(Joint().eval(), backend="uta", fullgraph=True, options=config)(*inputs)
    scores, *others = read
    assert others == [others[0]] * 3
    assert scores[0] == others[0][0]


@torch.no_grad()
def test_inductor_compiles_the_whole_model_once():
    """One graph, no recompilation from the second step on; the same result as eager."""
    model, kwargs = wan(num_layers=1), wan_inputs()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        model, backend="uta", fullgraph=True,
        options={**SMALL, "density": 0.3, "inductor": {"max_autotune": False}},
    )  # fmt: skip
    first = compiled(**kwargs)[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (400.0, 3.0):
            compiled(**{**kwargs, "timestep": torch.full((1,), step)})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    torch.testing.assert_close(
        first, compile_uta(model, density=0.3)(**kwargs)[0], rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_a_compilation_is_found_again_in_the_cache():
    """AOTAutograd's cache takes the rewritten graph and tells one configuration from another."""
    module, x = nn.Sequential(Attention(), nn.Linear(32, 8)), torch.randn(1, 256, 64)
    options = {"reorder": "none", "tail": "block"}
    with fresh_cache():
        for density, found in ((0.3, "miss"), (0.3, "hit"), (0.6, "miss")):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            output = compile_uta(module, inner="inductor", density=density, **options)(x)
            assert torch._dynamo.utils.counters["aot_autograd"][f"autograd_cache_{found}"] == 1
            eager = compile_uta(module, density=density, **options)(x)
            torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)


def test_calls_that_are_alike_are_traced_once():
    """What the caches see: operators alone, in one module for all layers."""
    modules = []

    def backend(gm, inputs):
        sparsify(gm, inputs, Config(**SMALL))
        trace_calls(gm, SparseSite, share=None)
        assert not any(isinstance(node.target, SparseSite) for node in gm.graph.nodes)
        modules.extend(gm.get_submodule(n.target) for n in gm.graph.find_nodes(op="call_module"))
        return gm.forward

    with torch.no_grad():
        torch.compile(wan(), backend=backend, fullgraph=True)(**wan_inputs())
    assert len(modules) == 3 and len(set(modules)) == 1
    targets = [node.target for node in modules[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.uta.block_masked_attention.default in targets
    assert all(isinstance(target, OpOverload) or target is getitem for target in targets)


@pytest.mark.parametrize("least", [3, 4])
def test_inductor_compiles_alike_calls_once(least):
    """Three layers call one subgraph, which is only worth it for so many calls."""
    found = []

    def backend(gm, inputs):
        sparsify(gm, inputs, Config(**SMALL))
        trace_calls(gm, SparseSite, share=least)
        subgraph = torch.ops.higher_order.invoke_subgraph
        found.extend(gm.graph.find_nodes(op="call_function", target=subgraph))
        return gm.forward

    with torch.no_grad():
        output = torch.compile(wan(), backend=backend, fullgraph=True)(**wan_inputs())[0]
        eager = compile_uta(wan())(**wan_inputs())[0]
    assert len(found) == (3 if least == 3 else 0)
    assert len({node.args[0].target for node in found}) == (1 if least == 3 else 0)
    torch.testing.assert_close(output, eager)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A policy that makes a tensor of Python numbers."""

    weights: tuple[float, ...]

    def select(self, selection):
        """Every row alike: the blocks with the largest weights."""
        rows = torch.zeros(1, 2, 256 // selection.block_q, 1, device=selection.query.device)
        weights = torch.tensor(self.weights, device=selection.query.device)
        return spend_budget(rows + weights, selection.density, "row")


@torch.no_grad()
def test_a_policy_may_hold_constants():
    """Each time its own, cache or not."""
    module, x = Attention(), torch.randn(1, 256, 64)
    with fresh_cache():
        for weights in (range(8), range(8, 0, -1)):
            config = {"policy": Weighted(tuple(weights)), "tail": "none", "reorder": "none"}
            output = compile_uta(module, inner="inductor", **config)(x)
            eager = compile_uta(module, **config)(x)
            torch.testing.assert_close(output, eager, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [(False, (1, 2, 3, 3, 3)), (None, (1, 2, 3, 3, 3)), (True, (1, 2, 2, 2, 2))],
)
def test_a_new_resolution_costs_one_compile_and_is_right(dynamic, expected):
    """A grid is never carried over from another resolution with the same number of tokens.

    Nor with dynamic=True, where one graph serves all but a height that equals the number of
    channels (of which the dense model has a graph too); one that was there before costs nothing.
    """
    model = wan(num_layers=1)
    options = {**SMALL, "inner": "eager", "density": 1.0}
    compiled = torch.compile(model, backend="uta", dynamic=dynamic, options=options)
    torch._dynamo.utils.counters.clear()
    sizes = ((16, 24), (24, 16), (16, 32), (16, 24), (24, 16))
    for (height, width), graphs in zip(sizes, expected, strict=True):
        kwargs = wan_inputs(height=height, width=width)
        torch.testing.assert_close(compiled(**kwargs)[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_dense_layers_stay_dense():
    """By index, in the order of the graph."""
    config = Config(**SMALL, dense_layers="0,-1")
    sites = [s for s in captured_graph(wan(), wan_inputs(), config)["sites"] if s.kind == "self"]
    assert [site.sparse for site in sites] == [False, True, False]
    assert sites[0].reason == "dense_layers names layer 0"


@torch.no_grad()
@pytest.mark.parametrize("layers", ["3", "0-3", "-4", "0,7"])
def test_dense_layers_that_are_not_there_are_said(caplog, layers):
    """By ``explain`` and in the log; the layers that are there are still honoured."""
    model, kwargs = wan(), wan_inputs()
    config = Config(**SMALL, dense_layers=f"1,{layers}")
    explanation = uta_fx.explain(model, **kwargs, config=config)
    (note,) = explanation.notes
    assert str(explanation).endswith(f"note: {note}")
    assert note == (
        f"dense_layers='1,{layers}' names layers that the graph does not have:"
        " it has 3 of self-attention"
    )
    with caplog.at_level(logging.WARNING, logger="uta_fx.backend"):
        sites = captured_graph(model, kwargs, config)["sites"]
    assert note in caplog.text
    assert sites[2].reason == "dense_layers names layer 1"


@torch.no_grad()
def test_dense_layers_concern_graphs_with_self_attention_alone():
    """Another part of the model is compiled with the same options."""
    config = Config(dense_layers="0-1,-1")
    (note,) = uta_fx.explain(nn.Linear(4, 4), torch.ones(4), config=config).notes
    assert note == "the model has no attention: there is nothing to make sparse"
    assert uta_fx.explain(wan(), **wan_inputs(), config=config).notes == ()


class Attention(nn.Module):
    """Self-attention over 256 tokens, with whatever a model may hand to SDPA."""

    def __init__(self, heads=2, dim=32, project_kv=True, **options):
        super().__init__()
        self.q, self.k = nn.Linear(64, heads * dim), nn.Linear(64, heads * dim)
        self.heads, self.options, self.project_kv = heads, options, project_kv

    def forward(self, x):
        """``[B, L, 64]`` to ``[B, H, L, D]``."""
        q, k = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k))
        if not self.project_kv:
            k = x.flip(1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, **self.options)


class Mapped(Attention):
    """Sample by sample."""

    def forward(self, x):
        return torch.func.vmap(lambda sample: Attention.forward(self, sample))(x[:, None])


@pytest.mark.parametrize(
    ("module", "config", "reason"),
    [
        (Attention(is_causal=True), {}, "is causal"),
        (Mapped(), {"grid": (4, 8, 8)}, "is inside a transform of torch.func, such as vmap"),
        (Attention(dropout_p=0.5), {}, r"has dropout \(0.5\)"),
        (Attention(scale=math.inf), {}, r"its scale is no finite number \(inf\)"),
        (Attention(attn_mask=torch.zeros(256, 256)), {"reorder": "none"}, "its attention mask"),
        (Attention(heads=8, dim=8), {}, "query head dim 8 is not from 16 to 256"),
        (Attention().double(), {}, "dtype torch.float64 is not float32, float16 or bfloat16"),
        (Attention(project_kv=False), {}, "the graph does not show that queries and keys"),
        (Attention(), {"min_tokens": 257}, "256 tokens are fewer than min_tokens=257"),
        (Attention(), {}, "the graph does not show how its 256 tokens lie in frames"),
        (Attention(), {"grid": (4, 8, 9)}, "grid 4 x 8 x 9 = 288 does not match its 256 tokens$"),
        (Attention(), {"grid": (4, 8, 7)}, ".*; where the video lies in them is video_start"),
        (Attention(), {"grid": (4, 8, 7), "video_start": 33}, "grid 4 x 8 x 7 = 224 does not"),
    ],
)  # fmt: skip
def test_what_cannot_be_rewritten_stays_dense_and_says_why(module, config, reason):
    """One sentence a site, from ``explain``; ``strict`` makes an error of it."""
    x = torch.randn(1, 256, 64).to(module.q.weight.dtype)
    (site,) = uta_fx.explain(module, x, config=Config(**SMALL | config)).sites
    assert not site.sparse and site.expected is ("min_tokens" not in config)
    assert re.match(reason, site.reason), site.reason
    if site.expected:
        with torch.no_grad(), pytest.raises(Exception, match=r"strict: .* stays dense"):
            compile_uta(module, strict=True, **config)(x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"min_tokens": 385}, {"dense_layers": "0--1"}])
def test_strict_is_about_what_a_user_would_expect_sparse(options):
    """Cross-attention, short sites and layers named dense are no error."""
    model, kwargs = wan(num_layers=2), wan_inputs()
    output = compile_uta(model, strict=True, **options)(**kwargs)[0]
    torch.testing.assert_close(output, model(**kwargs)[0])
    sites = uta_fx.explain(model, **kwargs, config=Config(**SMALL | options)).sites
    assert len(sites) == 4 and not any(site.expected for site in sites)


@torch.no_grad()
def test_a_given_grid_or_no_reordering_makes_a_bare_attention_sparse():
    """What the graph does not say the user may."""
    module, x = Attention(), torch.randn(1, 256, 64)
    for config in ({"grid": (4, 8, 8)}, {"reorder": "none"}):
        (site,) = uta_fx.explain(module, x, config=Config(**SMALL | config)).sites
        assert site.sparse
        output = compile_uta(module, density=1.0, **config)(x)
        torch.testing.assert_close(output, module(x), rtol=1e-4, atol=1e-5)


class TwoTables(Attention):
    """Video tokens to which a table of two sides is added."""

    def __init__(self, *sides):
        super().__init__()
        self.table = nn.Parameter(torch.randn(*sides, 64))

    def forward(self, clip):
        return super().forward(clip.flatten(2).transpose(1, 2) + self.table.flatten(0, 1))


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ((4, 64), "self-attention over video tokens"),  # frames by tokens of a frame
        ((32, 8), "self-attention over video tokens"),  # rows of all frames
        ((8, 32), "the graph claims 1 x 8 x 32 and 4 x 8 x 8 for its tokens; give grid"),
        ((64, 4), "the graph claims 1 x 64 x 4 and 4 x 8 x 8 for its tokens; give grid"),
    ],
)
def test_two_sides_seen_as_one_are_no_other_grid(sides, reason):
    """What contradicts the grid is named."""
    clip = torch.randn(1, 64, 4, 8, 8)
    (site,) = uta_fx.explain(TwoTables(*sides), clip, config=Config(**SMALL)).sites
    assert site.reason == reason and (site.grid == (4, 8, 8)) == site.sparse


class Interleaved(nn.Module):
    """Each frame is followed by text of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.qkv = nn.Conv3d(3, 32, 1), nn.Linear(32, 96)

    def forward(self, video, text):
        frames = self.patch(video).flatten(3).permute(0, 2, 3, 1)  # [B, F, H W, C]
        x = torch.cat([frames, text], 2).flatten(1, 2)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


class FrameByFrame(Attention):
    """Frames of a clip embedded one after another and joined."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 64, 1)

    def forward(self, clip):
        frames = [self.patch(frame).flatten(2).transpose(1, 2) for frame in clip.unbind(2)]
        return super().forward(torch.cat(frames, 1))


def test_frames_that_are_joined_need_a_grid_and_say_so():
    """To the graph they are images of their own."""
    module, clip = FrameByFrame(), torch.randn(1, 3, 4, 8, 8)
    config = SMALL | {"min_tokens": 100}
    (site,) = uta_fx.explain(module, clip, config=Config(**config)).sites
    assert not site.sparse and site.reason == (
        "64 tokens are fewer than min_tokens=100, the longest of several grids in its 256 tokens;"
        " give grid if these are one video"
    )
    (site,) = uta_fx.explain(module, clip, config=Config(**config, grid=(4, 8, 8))).sites
    assert (site.grid, site.sparse, site.text) == ((4, 8, 8), True, None)


def test_frames_with_text_between_them_are_no_grid():
    """Text keys are exact for all, or the site is dense."""
    inputs = torch.zeros(1, 3, 4, 5, 8), torch.zeros(1, 4, 3, 32)
    (site,) = uta_fx.explain(Interleaved(), *inputs, config=Config(min_tokens=64)).sites
    assert (site.grid, site.sparse) == (None, False)
    assert site.reason.startswith("the graph does not show how its 172 tokens lie in frames")


@torch.no_grad()
def test_an_explicit_scale_is_kept():
    """Also a scale of zero, which is a value and not an absence."""
    for scale in (0.0, 0.3):
        module, x = Attention(scale=scale), torch.randn(1, 256, 64)
        output = compile_uta(module, density=1.0, reorder="none")(x)
        torch.testing.assert_close(output, module(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_rewritten_is_said(caplog):
    """A backend that does nothing warns."""
    with caplog.at_level(logging.WARNING, logger="uta_fx.backend"):
        compile_uta(Attention())(torch.randn(1, 256, 64))
    assert "no attention was rewritten" in caplog.text


@torch.no_grad()
def test_the_log_has_a_line_for_each_site_and_the_graph(caplog):
    """At INFO and at DEBUG."""
    with caplog.at_level(logging.DEBUG, logger="uta_fx"):
        compile_uta(Attention(), reorder="none")(torch.randn(1, 256, 64))
    ours = [record for record in caplog.records if record.name.startswith("uta_fx")]
    line, graph = (record.getMessage() for record in ours)
    assert line == (
        "scaled_dot_product_attention (self, B H L D 1 x 2 x 256 x 32, 256 keys): sparse,"
        " self-attention over video tokens"
    )
    assert graph.startswith("the rewritten graph:") and "uta_fx_attention_sparse_site(" in graph


def test_a_gradient_is_refused_by_name():
    """Instead of a wrong or missing gradient."""
    with pytest.raises(Exception, match="forward-only"):
        compile_uta(Attention(), reorder="none")(torch.randn(1, 256, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": 0.2}, "unknown option 'densty'"),
        ({"density": 2}, "density must be in"),
        ({"dense_until": 0.2}, "dense_until=0.2 needs uta_fx.enable"),
        ({"inner": "nonesuch"}, "inner must be one of .*inductor.*, got 'nonesuch'"),
        ({"mode": "max-autotune"}, "options mode and inductor need inner='inductor'"),
    ],
)
@torch.no_grad()
def test_bad_options_are_errors(options, message):
    """They reach the user through torch.compile with their sentence."""
    with pytest.raises(Exception, match=message):
        compile_uta(Attention(), **options)(torch.randn(1, 256, 64))


def test_options_that_are_no_mapping_are_an_error():
    """One sentence, as of a mapping with a bad value."""
    compiled = torch.compile(Attention(), backend="uta", options=["density"])
    with pytest.raises(Exception, match=r"options must be a dict such as .*, got \['density'\]"):
        compiled(torch.randn(1, 256, 64))


def test_the_backend_is_found_without_an_import():
    """By its entry point, in a fresh process; and the core needs neither Triton nor diffusers.

    Its log is one of those that torch's own switch turns on.
    """
    script = (
        "import sys, torch\n"
        "for name in ('triton', 'diffusers', 'onnx', 'rich', 'typer', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "assert 'uta' in torch._dynamo.list_backends()\n"
        "import torch.nn.functional as F\n"
        "def attend(x): return F.scaled_dot_product_attention(x, x, x)\n"
        "f = torch.compile(attend, backend='uta', options={'inner': 'eager'})\n"
        "x = torch.ones(1, 1, 4, 8)\n"
        "assert torch.equal(f(x), x) and 'uta_fx' in sys.modules\n"
        "import uta_fx\n"
        "q = torch.randn(1, 1, 128, 16)\n"
        "assert uta_fx.sparse_attention(q, q, q).shape == q.shape\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "uta_fx"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "uta_fx/backend.py" in done.stderr and "4 tokens are fewer than" in done.stderr


@torch.no_grad()
def test_global_state_is_as_it_was():
    """Inductor's configuration and the model's code do not change."""
    model, kwargs = wan(num_layers=1), wan_inputs()
    import torch._inductor.config as inductor_config

    before, forward = inductor_config.get_config_copy(), type(model).forward
    compile_uta(model)(**kwargs)
    assert inductor_config.get_config_copy() == before
    assert type(model).forward is forward and "forward" not in vars(model)
