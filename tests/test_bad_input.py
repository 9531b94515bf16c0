"""What is no video transformer, or not ready to be one: a sentence each, and no harm done."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, UMT5Config, UMT5EncoderModel

import uta_fx
from uta_fx import Config

SETTINGS = {"min_tokens": 16, "block_q": 16, "block_kv": 16, "reorder": "none"}


class Layer(nn.Module):
    """Self-attention over video with dropout, behind a patch embedding."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 32, 1), nn.Linear(32, 96)

    def forward(self, video):
        q, k, v = self.qkv(self.patch(video).flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)


def no_attention():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8)


def clip_text_encoder():
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return CLIPTextModel(config), torch.arange(48).remainder(32)[None]


def t5_text_encoder():
    config = UMT5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config), torch.arange(48).remainder(32)[None]


def vae():
    model = AutoencoderKLWan(
        base_dim=136, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    return model, torch.randn(1, 3, 1, 16, 16)


def wrong_grid():
    return Layer(), torch.randn(1, 3, 4, 6, 8)


def first(output):
    """The first tensor of whatever a model returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (no_attention, {}, "the graph has no attention: it is compiled as it is"),
        (clip_text_encoder, {}, "is causal"),
        (t5_text_encoder, {}, "its attention mask differs from query to query"),
        (vae, {}, "query head dim 272 is not from 16 to 256"),
        (wrong_grid, {"grid": (4, 6, 9)}, "grid 4 x 6 x 9 = 216 does not match its 192 tokens"),
        (wrong_grid, {"grid": (4, 8, 6)}, "grid 4 x 8 x 6 is given, but the graph shows 4 x 6 x 8"),
    ],
)
def test_what_the_backend_cannot_help_is_said_and_computed(make, options, reason, caplog):
    """By the log; the output is that of the model alone, whose weights and code stay."""
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    dense, state, names = first(model(x, **returning(model))), copy.deepcopy(model), vars(model)
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        compiled = torch.compile(
            model, backend="uta", options={**SETTINGS, "inner": "eager", **options}
        )
        torch.testing.assert_close(first(compiled(x, **returning(model))), dense)
    assert reason in caplog.text
    assert "forward" not in names and vars(model) is names
    for a, b in zip(state.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def returning(model):
    """Tuples of the models of libraries."""
    return {} if type(model).__module__.startswith(("torch", __name__)) else {"return_dict": False}


@pytest.mark.parametrize("make", [clip_text_encoder, t5_text_encoder, vae])
def test_enable_refuses_other_models_by_name(make):
    """They are as they were."""
    model, _ = make()
    kind = "a VAE" if make is vae else "a text encoder"
    with pytest.raises(TypeError, match=f"got {kind}, {type(model).__name__}"):
        uta_fx.enable(model)
    assert "forward" not in vars(model)


def test_a_model_in_training_is_refused_or_stays_dense():
    """A gradient is an error; dropout a reason; evaluation afterwards is sparse."""
    model, video = Layer().train(), torch.randn(1, 3, 4, 6, 8)
    compiled = torch.compile(model, backend="uta", options={**SETTINGS, "inner": "eager"})
    (site,) = uta_fx.explain(model, video, config=Config(**SETTINGS)).sites
    assert not site.sparse and site.reason == "has dropout (0.5)"
    model.eval()
    with pytest.raises(Exception, match=r"forward-only .* torch.no_grad\(\)"):
        compiled(video)
    model(video).sum().backward()
    assert model.qkv.weight.grad is not None
    with torch.no_grad():
        torch._dynamo.reset()
        assert not torch.equal(compiled(video), model(video))


class Broken(Layer):
    """Attention sample by sample in a loop that Dynamo breaks in, and so leaves out."""

    def forward(self, video):
        q, k, v = self.qkv(self.patch(video).flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        return torch.cat(list(map(self.attend, q, k, v)))

    def attend(self, *tensors):
        for x in tensors:
            torch._dynamo.graph_break("in the middle")
            x.size()
        return F.scaled_dot_product_attention(*(x[None] for x in tensors))


@torch.no_grad()
def test_a_model_whose_graph_breaks_is_named_once(caplog):
    """Not for each part, nor for each call; another model is another."""
    video = torch.randn(1, 3, 4, 6, 8)
    for _ in range(2):
        torch._dynamo.reset()
        model = Broken().eval()
        compiled = torch.compile(model, backend="uta", options={**SETTINGS, "inner": "eager"})
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="uta_fx"):
            for _ in range(2):
                torch.testing.assert_close(compiled(video), model(video))
        (warning,) = (x.getMessage() for x in caplog.records if x.name.startswith("uta_fx"))
        assert "the graph of a Broken breaks at test_bad_input" in warning
        assert "fullgraph=True avoids the break or says why it cannot" in warning


@torch.no_grad()
def test_an_unknown_option_leaves_the_model_alone():
    """The error names it and the likeliest; the model still runs."""
    model, video = Layer().eval(), torch.randn(1, 3, 4, 6, 8)
    dense = model(video)
    with pytest.raises(Exception, match=r"unknown option 'densty' \(did you mean 'density'\?\)"):
        torch.compile(model, backend="uta", options={"densty": 0.1})(video)
    assert torch.equal(model(video), dense) and "forward" not in vars(model)


@torch.no_grad()
def test_settings_that_are_no_config_are_named():
    """By each function that takes them; the model stays as it was, to the bit."""
    model, video = Layer().eval(), torch.randn(1, 3, 4, 6, 8)
    dense, q = model(video), torch.randn(1, 1, 128, 16)
    for call in (
        lambda config: uta_fx.enable(model, config),
        lambda config: uta_fx.explain(model, video, config=config),
        lambda config: uta_fx.sparse_attention(q, q, q, config=config),
        lambda config: uta_fx.export_onnx(model, (video,), "model.onnx", config=config),
    ):
        with pytest.raises(TypeError, match=r"config must be a uta_fx\.Config, got dict"):
            call({"density": 0.3})
    for name in ("backend", "options"):
        with pytest.raises(TypeError, match=f"{name} is uta_fx.enable's own"):
            uta_fx.enable(model, **{name: "inductor"})
    assert "forward" not in vars(model) and torch.equal(model(video), dense)
