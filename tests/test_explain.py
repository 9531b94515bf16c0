"""uta_fx.explain: a table for people, sites and operations for programs."""

import ast
import dataclasses
import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import uta_fx
from uta_fx import Config
from uta_fx.attention import operator_arguments, pool_blocks
from uta_fx.flops import sparse_cost
from uta_fx.kernels import reference
from uta_fx.policies import LowDelta, TopK
from uta_fx.study.models import MODELS, SMALL
from uta_fx.study.real_models import REAL_MODELS, Size, find_model
from uta_fx.tails import Tail


def test_it_prints_a_table_of_sites():
    """Every line of the table is a site; the last ones count."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16,
            out_channels=16, text_dim=64, freq_dim=256, ffn_dim=128, num_layers=2,
        ).eval()  # fmt: skip
    inputs = [
        torch.empty(size, device="meta") for size in ((1, 16, 21, 60, 104), (1,), (1, 512, 64))
    ]
    explanation = uta_fx.explain(model, *inputs, config=Config(density=0.1))
    lines = str(explanation).splitlines()
    assert len(lines) == 2 + 4 + 3
    assert "blocks.0.attn1" in lines[2] and "21 x 30 x 52" in lines[2] and "sparse" in lines[2]
    assert "cross-attention" in lines[3]
    assert lines[6] == "2 of 4 sites sparse, 1 graph"
    assert lines[8].endswith("(FLOPs, not time)")
    site = explanation.sites[0]
    assert (site.sparse, site.kind, site.layer, site.grid) == (True, "self", 0, (21, 30, 52))
    assert site.shape == (1, 12, 32760, 128)


def test_a_model_without_attention_has_no_site():
    """Nothing is found and nothing is claimed."""
    explanation = uta_fx.explain(nn.Linear(4, 4), torch.ones(4))
    assert explanation.sites == () and "\n0 of 0 sites sparse, 1 graph\n" in str(explanation)
    assert explanation.notes == ("the model has no attention: there is nothing to make sparse",)


def test_a_compiled_model_is_explained_as_the_model_itself():
    """Compiling twice is not needed and not done."""
    compiled = torch.compile(nn.Linear(4, 4))
    assert uta_fx.explain(compiled, torch.ones(4)).graphs == 1


def test_something_else_is_refused():
    """By name."""
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        uta_fx.explain(lambda x: x, torch.ones(4))


class SelfAttention(nn.Module):
    """Projections and one attention, with text in front of the video."""

    def __init__(self, text):
        super().__init__()
        self.text, self.embed = text, nn.Conv3d(4, 32, 1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, video, text):
        tokens = self.embed(video).flatten(2).transpose(1, 2)
        if self.text:
            tokens = torch.cat([text, tokens], 1)
        heads = self.qkv(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_is_not_traced_is_not_said_to_have_no_attention(in_place):
    """Compiled in place, or scripted: Dynamo hands on no graph of it."""
    model, inputs = SelfAttention(5).eval(), (torch.ones(1, 4, 2, 4, 4), torch.ones(1, 5, 32))
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.jit.trace(model, inputs)
    explanation = uta_fx.explain(model, *inputs)
    (note,) = explanation.notes
    assert not explanation.sites and note.startswith("nothing of the model was traced: it was")


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_are_those_of_the_layers(text, device):
    """Counted by hand: patch embedding, two projections, dense attention; and what becomes of it.

    On the CPU torch's own counter has no formula for attention; the sizes are the same.
    """
    video, others = torch.ones(1, 4, 4, 6, 8, device=device), torch.ones(1, 5, 32, device=device)
    model = SelfAttention(text).to(device).eval()
    config = dataclasses.replace(SMALL, density=0.25)
    found = uta_fx.explain(model, video, others, config=config)
    n, length = 192, 192 + text
    attention = 4 * 2 * length * length * 16
    assert found.flops == 2 * n * 4 * 32 + 2 * length * 32 * (96 + 32) + attention
    (site,) = found.sites
    blocks, cost = 192 // 16, site.cost
    assert site.sparse and cost.dense == found.attention_flops == attention
    assert cost.parts == {
        "statistics": 2 * 2 * n * 16 * 16,  # covariance of keys and values
        "scores": 6 * 2 * n // 2 * blocks * 16,  # means twice, variances once; rows in pairs
        "listed": n * n * 2 * 16,  # a quarter of 4 H N N D
        # mean and value, slope; and variance, for each pair of blocks; and all of it for 16 rows,
        # over keys and representatives
        "tail": 2 * 2 * n * (blocks * 2 * 16 + 16 * 16)
        + 2 * 2 * blocks * blocks * 16
        + 16 * 2 * 2 * (n * 2 * 16 + blocks * 3 * 16 + 16 * 16),
        "text": 4 * 2 * 16 * (length * length - n * n),
    }
    assert cost.decided == sum(cost.parts.values())
    assert found.attention_share == found.share(site) == attention / found.flops
    assert found.sparse_share == n * n / (length * length)
    assert found.ideal_speedup == found.flops / (found.flops - attention + cost.decided)


class Alone(nn.Module):
    """One attention without any video in it."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_a_dense_site_costs_what_it_costs():
    """Nothing is saved, and nothing is said to be sparse."""
    found = uta_fx.explain(Alone(), torch.ones(2, 3, 7, 16))
    (site,) = found.sites
    assert site.cost.dense == site.cost.decided == found.flops == 4 * 2 * 3 * 7 * 7 * 16
    assert (found.sparse_share, found.ideal_speedup) == (0.0, 1.0)


SHAPE = (1, 2, 192, 16)


@pytest.mark.parametrize(
    ("config", "products"),
    [
        ({"policy": LowDelta(power=0.0, variance_weight=0.0)}, 1),
        ({"policy": LowDelta(variance_weight=0.5, power=0.0, rows=1)}, 3),
        ({"policy": TopK()}, 1 / 16),  # means of 16 queries
    ],
)
def test_policies_cost_what_they_multiply(config, products):
    """Products of queries with means or variances of key blocks: 2 H L Nk D each."""
    config = dataclasses.replace(SMALL, **config)
    cost = sparse_cost(SHAPE, SHAPE, 16, torch.float32, 192, (4, 6, 8), config)
    assert cost.parts["scores"] == products * 2 * 2 * 192 * 12 * 16


@pytest.mark.parametrize("kind", ["none", "bins", "block", "gaussian"])
def test_a_tail_costs_what_its_reference_multiplies(kind):
    """With all blocks listed: torch counts the operator written in plain PyTorch."""
    tail = Tail(kind=kind)
    config = dataclasses.replace(SMALL, density=1.0, tail=tail)
    cost = sparse_cost(SHAPE, SHAPE, 16, torch.float32, 192, (4, 6, 8), config)
    x = torch.ones(1, 2, 192, 16)
    selection = pool_blocks(x, x, x, config, None)
    arguments = operator_arguments(selection, x, x, config)
    with FlopCounterMode(display=False) as counter:
        reference.block_masked_attention(*arguments)
        if tail.fit_rows:
            reference.fit_tail(*tail.fit_arguments(selection, arguments[3], x, x))
    # the reference multiplies a row's weights with the values twice: all of them, and the tail's
    twice = 2 * 2 * tail.fit_rows * 192 * 16
    assert cost.parts["listed"] + cost.parts["tail"] == counter.get_total_flops() - twice


def test_a_fit_costs_what_its_reference_multiplies():
    """But for the values, which the reference multiplies twice, once for the tail alone."""
    costs = [
        sparse_cost(SHAPE, SHAPE, 16, torch.float32, 192, (4, 6, 8), config).decided
        for config in (dataclasses.replace(SMALL, tail=Tail(fit=rows)) for rows in (0, 5))
    ]
    x = torch.ones(1, 2, 192, 16)
    selection = pool_blocks(x, x, x, SMALL, None)
    exact = SMALL.selection_policy().select(selection)
    with FlopCounterMode(display=False) as counter:
        reference.fit_tail(*Tail(fit=5).fit_arguments(selection, exact, x, x))
    products = counter.get_total_flops() - 2 * 2 * 5 * 192 * 16
    assert costs[1] - costs[0] == products


def test_the_rewritten_graph_can_be_read_and_drawn(tmp_path):
    """Code that is Python, with the sparse attention in it; a picture with each operation once."""
    entry = next(entry for entry in MODELS if entry.name == "Wan")
    found = entry.explain()
    code, picture = found.dump(tmp_path / "graphs")
    assert (code.name, picture.name) == ("graph_0.py", "graph_0.dot")
    ast.parse(code.read_text())
    assert code.read_text().count("= uta_fx_attention_sparse_site(") == 2
    drawn = picture.read_text()
    assert drawn.count("palegreen") == 2 and drawn.count("orange") == 2
    assert 'label="blocks.1.attn1"' in drawn and "grid 4 x 6 x 8" in drawn
    assert drawn.count("{") == drawn.count("}") and "weight" not in drawn
    # the model's own graph is as it was
    assert found.dump(tmp_path)[0].read_text() == code.read_text()


def test_a_report_is_also_json():
    """Numbers, strings and lists alone; the shares add up."""
    entry = next(entry for entry in MODELS if entry.name == "HunyuanVideo")
    found = entry.explain()
    report = json.loads(json.dumps(found.to_dict()))
    assert report["sites"][0]["dtype"] == "float32"
    assert sum(site["share"] for site in report["sites"]) == pytest.approx(
        report["attention_share"]
    )
    assert 1 < report["ideal_speedup"] == found.ideal_speedup
    assert report["sparse_share"] < 1


def test_what_is_not_counted_is_said():
    """Operators that take functions: torch's counter refuses them."""

    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x + 1, (x,))

    found = uta_fx.explain(Branches(), torch.ones(4, 4))
    assert found.flops == 0
    assert found.notes[0] == "operations inside cond are not counted"


@pytest.mark.parametrize("name", ["hunyuanvideo", "mochi"])
def test_the_second_layer_stands_for_those_between(name):
    """Five layers traced whole cost what three of them say: both stacks, a last layer unlike them.

    Of Mochi the last layer has no feed-forward for the text.
    """
    real = find_model(name)
    layers = dict.fromkeys(real.stacks.values(), 5)
    real = dataclasses.replace(real, settings={**real.settings, **layers})
    size = Size(256, 256, 1 + 8 * real.compression[0])
    config = Config(min_tokens=1024)
    whole, traced = real.explain(size, config, whole=True), real.explain(size, config)
    assert traced.flops == whole.flops and traced.ideal_speedup == whole.ideal_speedup
    assert traced.sparse_share == whole.sparse_share > 0.5

    def calls(found):
        return Counter(
            (site.name.split(".")[0], site.cost.dense, site.cost.decided)
            for site in found.sites
            for _ in range(site.count)
        )

    assert calls(traced) == calls(whole)
    assert (
        "blocks.1-3." in traced.sites[-2].name and traced.sites[-1].layer == whole.sites[-1].layer
    )
    assert traced.notes[-1].endswith("the second stands for all between")


def test_every_column_of_a_real_model_is_what_its_architecture_says():
    """Wan 1.3B at 480p, by hand: width 1536, 12 heads, feed-forward 8960, text 512 x 4096."""
    real = find_model("wan-2.1-1.3b")
    found = real.explain(real.size("480p"), Config(density=0.1))
    length, width, text, layers = 21 * 30 * 52, 1536, 512, 30
    own, cross = 4 * length**2 * width, 4 * length * text * width
    dense = layers * (
        2 * length * width * (6 * width + 2 * 8960) + 2 * text * width * 2 * width + own + cross
    )
    dense += 2 * length * width * (16 * 4 + 16 * 4)  # patches in and out
    dense += 2 * text * (4096 * width + width**2) + 2 * width * (256 + width + 6 * width)
    assert found.flops == dense
    saved = layers * (own - found.sites[0].cost.decided)
    assert found.ideal_speedup == dense / (dense - saved)
    assert found.sparse_share == own / (own + cross)
    shape = f"1, 12, {length}, 128"
    rows = [re.split(r" {2,}", line) for line in str(found).splitlines()]
    for place, (blocks, layer, calls) in enumerate((("0", 0, 1), ("1-28", 1, 28), ("29", 29, 1))):
        first, second = rows[2 + 2 * place : 4 + 2 * place]
        assert first[:-1] == [
            f"blocks.{blocks}.attn1", f"{calls}", f"{layer}", "self", shape, f"{length}",
            "21 x 30 x 52", "-", f"{own / 1e12:.3f}", f"{calls * own / dense:.1%}", "sparse",
            f"{found.sites[0].cost.decided / 1e12:.3f}", "once",
        ]  # fmt: skip
        assert second[:-1] == [
            f"blocks.{blocks}.attn2", f"{calls}", "-", "cross", shape, "512", "-", "-",
            f"{cross / 1e12:.3f}", f"{calls * cross / dense:.1%}", "dense", "-", "-",
        ]  # fmt: skip
    (row,) = [x for x in found.to_dict()["sites"] if x["name"] == "blocks.29.attn1"]
    assert (row["layer"], row["grid"], row["share"]) == (29, (21, 30, 52), own / dense)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_have_their_attention_sparse(name):
    """At their own sizes: 90 % of the attention's operations at least, on every layer."""
    real = find_model(name)
    found = real.explain(real.size())
    assert found.sparse_share >= 0.9 and found.ideal_speedup > 1.2
    layers = sum(site.count for site in found.sites if site.sparse)
    assert layers == sum(real.depth().values())


def test_dense_layers_of_a_real_model_are_its_own():
    """They are counted in the whole model, not among the traced layers."""
    real = find_model("cogvideox-5b")
    real = dataclasses.replace(real, settings={**real.settings, "num_layers": 5})
    found = real.explain(real.size(), Config(dense_layers="3"))
    assert [site.sparse for site in found.sites] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wan-3", {}, "model must be one of wan-2.1-1.3b, .*, got 'wan-3'"),
        ("mochi", {"name": "720p"}, "size must be one of 480p for Mochi 1, got '720p'"),
        ("ltx-video", {"height": 720}, "height must be a multiple of 32 for LTX-Video, got 720"),
        ("wan-2.1-14b", {"width": 0}, "width must be a multiple of 16 for Wan 2.1 14B, got 0"),
        ("mochi", {"frames": 60}, "frames must be one more than a multiple of 6 .*, got 60"),
    ],
)
def test_models_and_sizes_that_are_not_there(name, size, message):
    """By name, with what there is."""
    with pytest.raises(ValueError, match=message):
        real = find_model(name)
        real.grid(real.size(**size))
