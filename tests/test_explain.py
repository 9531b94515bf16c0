"""uta_fx.explain: a table for people, sites for programs."""

import pytest
import torch
from torch import nn

import uta_fx
from uta_fx import Config


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
    assert explanation.sites == () and str(explanation).endswith("0 of 0 sites sparse, 1 graph")


def test_a_compiled_model_is_explained_as_the_model_itself():
    """Compiling twice is not needed and not done."""
    compiled = torch.compile(nn.Linear(4, 4))
    assert uta_fx.explain(compiled, torch.ones(4)).graphs == 1


def test_something_else_is_refused():
    """By name."""
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        uta_fx.explain(lambda x: x, torch.ones(4))
