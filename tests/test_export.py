"""The backend's passes on a torch.export graph."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from uta_fx import Config
from uta_fx.backend import plan_of
from uta_fx.export.program import sparsify_program

SMALL = {"min_tokens": 128, "block_q": 32, "block_kv": 32}


@torch.no_grad()
def test_a_wan_program_keeps_its_result_and_holds_the_operator():
    """Self-attention becomes the operator, cross-attention stays, density 1 changes nothing.

    Gathered are the patches and two rotary tables, and the tokens on their way out.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=3,
        out_channels=3, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    args = (torch.randn(1, 3, 4, 16, 24), torch.full((1,), 500.0), torch.randn(1, 9, 16))
    program = torch.export.export(model, args, {"return_dict": False})
    sparse, sites = sparsify_program(program, plan_of(Config(density=1.0, **SMALL)))
    assert [(site.kind, site.sparse) for site in sites] == [("self", True), ("cross", False)] * 2
    assert [site.name for site in sites[:2]] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert sites[0].grid == (4, 8, 12)
    targets = [node.target for node in sparse.graph.nodes]
    assert targets.count(torch.ops.uta.sparse_attention.default) == 2
    assert torch.ops.uta.block_masked_attention.default not in targets  # files have lists
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == 2
    assert targets.count(torch.ops.aten.index_select.default) == 4
    assert {site.reordered for site in sites if site.sparse} == {"once"}
    output = sparse.module()(*args, return_dict=False)[0]
    torch.testing.assert_close(output, model(*args, return_dict=False)[0], rtol=1e-4, atol=1e-5)


class Sorted(nn.Module):
    """Text of which the valid part comes first, and zeros for the rest."""

    def forward(self, text, seen):
        sorted_ = torch.cat([text[seen], torch.zeros_like(text[~seen])])
        shown = torch.cat([seen[seen], seen[~seen]])
        return sorted_.view(sorted_.shape[0], 2, -1), shown


class Cut(nn.Module):
    """The valid part of a text alone."""

    def forward(self, text, seen):
        return text[seen], torch.cat([text[seen], text[seen]])


def test_what_a_mask_and_its_complement_select_has_a_known_length():
    """And no operation whose output does not."""
    text, seen = torch.randn(7, 4), torch.tensor([0, 1, 0, 1, 1, 0, 1]).bool()
    program = torch.export.export(Sorted(), (text, seen))
    sparse, _ = sparsify_program(program, plan_of(Config()))
    values = tree_leaves([node.meta.get("val") for node in sparse.graph.nodes])
    assert all(isinstance(x, torch.Tensor) for x in values if x is not None)
    assert all(isinstance(n, int) for x in values if x is not None for n in x.shape)
    for mask in (seen, ~seen, seen & False, seen | True):
        for got, expected in zip(sparse.module()(text, mask), Sorted()(text, mask), strict=True):
            assert torch.equal(got, expected)
    program = torch.export.export(Cut(), (text, seen))
    sparse, _ = sparsify_program(program, plan_of(Config()))
    assert torch.equal(sparse.module()(text, ~seen)[1], Cut()(text, ~seen)[1])


def test_a_program_without_inputs_is_refused():
    """There is nothing to trace with."""
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(4),))
    program.example_inputs = None
    with pytest.raises(ValueError, match="program must carry example inputs"):
        sparsify_program(program, plan_of(Config()))
