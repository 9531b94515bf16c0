"""The backend's passes on a torch.export graph."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from uta_fx import Config
from uta_fx.backend import plan_of
from uta_fx.export import branches
from uta_fx.export.branches import find_branches
from uta_fx.export.narrow_masks import narrow_masks
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


class AllPairs(nn.Module):
    """A mask for every pair of video and text, as HunyuanVideo 1.5 has it; text may be first."""

    def __init__(self, text_first):
        super().__init__()
        self.patch, self.to_qkv = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)
        self.text_first = text_first

    def forward(self, clip, text, seen):
        video = self.patch(clip).flatten(2).transpose(1, 2)
        shown = torch.ones(video.shape[:2], dtype=torch.bool)
        order = 1 if self.text_first else -1
        x, keys = (torch.cat(y[::order], 1) for y in ([text, video], [seen, shown]))
        tokens = x.shape[1]
        columns = keys.view(-1, 1, 1, tokens).repeat(1, 1, tokens, 1)
        mask = (columns & columns.transpose(2, 3)).bool()
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, -1))
        output = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return output.transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("text_first", [False, True])
def test_a_mask_is_computed_where_it_is_read_alone(text_first):
    """Of its rows those of text, and one for the video: nothing in the graph has all pairs."""
    torch.manual_seed(0)
    model = AllPairs(text_first).eval()
    seen = torch.arange(7).expand(2, 7) < torch.tensor([[7], [3]])
    args = (torch.randn(2, 3, 4, 16, 24), torch.randn(2, 7, 32), seen)
    program = torch.export.export(model, args)
    sparse, (site,) = sparsify_program(program, plan_of(Config(density=1.0, **SMALL)))
    assert site.sparse and site.text == ((7, 0) if text_first else (0, 7))
    masks = [x.meta["val"] for x in sparse.graph.nodes if "val" in x.meta]
    masks = [x for x in masks if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
    assert max(x.shape.numel() for x in masks if x.dim() == 4) <= 2 * 7 * 391
    for mask in (seen, ~seen | (torch.arange(7) < 2)):
        shown = [mask, torch.ones(2, 384, dtype=torch.bool)]
        rows = torch.cat(shown if text_first else shown[::-1], 1)
        got, expected = (f(*args[:2], mask)[rows] for f in (sparse.module(), model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Written(nn.Module):
    """A mask that is combined and then written to, of which a part is read."""

    def forward(self, a, b):
        mask = a & b
        mask[:, :2] = True
        return mask[:, 1:3]


def test_a_mask_that_is_written_to_stays():
    a, b = (torch.rand(4, 5, generator=torch.Generator().manual_seed(i)) > 0.5 for i in range(2))
    program = torch.export.export(Written(), (a, b))
    narrow_masks(program)
    assert torch.equal(program.module()(a, b), Written()(a, b))


class ReadTwice(nn.Module):
    """Two parts of one part of a mask, as two attentions take them."""

    def forward(self, a, b):
        both = a & b
        mask = ~both & both | a
        return mask[:, 1:4][:, 1:], mask[:, 1:4][:, :2]


@pytest.mark.filterwarnings("error")
def test_a_part_of_a_mask_that_is_read_twice_is_there_for_both():
    """And nothing is erased twice, of which torch.fx warns."""
    a, b = (torch.rand(4, 5, generator=torch.Generator().manual_seed(i)) > 0.5 for i in range(2))
    program = torch.export.export(ReadTwice(), (a, b))
    narrow_masks(program)
    program.graph.lint()
    assert max(x.meta["val"].numel() for x in program.graph.nodes if x.op == "call_function") < 20
    for got, expected in zip(program.module()(a, b), ReadTwice()(a, b), strict=True):
        assert torch.equal(got, expected)


class Asking(nn.Module):
    """It asks about its input and, perhaps, about what attention makes of it."""

    def __init__(self, also_after):
        super().__init__()
        self.also_after, self.kept = also_after, {}

    def forward(self, x, image):
        if (image == 0).all():
            x = -x
        pairs = self.kept.setdefault("pairs", torch.ones(x.shape[2], x.shape[2]) > 0)
        self.last = pairs
        y = nn.functional.scaled_dot_product_attention(x, x, x, pairs)
        if self.also_after and y.sum() > 0:
            y = y + 1
        return y


def asked(model, x):
    return [branch.taken for branch in find_branches(model, (x, torch.zeros(3)), {})]


def test_what_is_asked_of_inputs_needs_no_attention():
    """No machine has a place for the mask: 2^50 bytes."""
    model = Asking(False)
    assert asked(model, torch.zeros(1, 1, 2**24, 1)) == [True]
    assert not model.kept and not hasattr(model, "last")  # which would have no values


def test_what_is_asked_of_attention_is_computed(monkeypatch):
    """Everything is large here."""
    monkeypatch.setattr(branches, "LARGE", 0)
    x = torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(0)).abs()
    assert asked(Asking(True), x) == [True, False]
    assert asked(Asking(True), -x) == [True, True]


def test_a_program_without_inputs_is_refused():
    """There is nothing to trace with."""
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(4),))
    program.example_inputs = None
    with pytest.raises(ValueError, match="program must carry example inputs"):
        sparsify_program(program, plan_of(Config()))
