"""FlexAttention in files: our node where its mask is one of whole blocks, else written out."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from uta_fx import Config, export_onnx
from uta_fx.export.mask_groups import group_tokens

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LENGTH, BLOCK, HEADS = 200, 32, 4  # the last block is ragged
BLOCKS = -(-LENGTH // BLOCK)


def inputs(kv_heads=HEADS):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, heads, LENGTH, 16, generator=generator)
        for heads in (HEADS, kv_heads, kv_heads)
    )


def dense(q, k, v, seen, bias=0.0):
    """In float64; a row that sees nothing is zero."""
    k, v = (x.double().repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    logits = (q.double() @ k.mT * q.shape[-1] ** -0.5 + bias).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num() @ v


def run(path, arguments):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    (output,) = session.run(None, dict(zip(names, (x.numpy() for x in arguments), strict=True)))
    nodes = [node.name for node in onnx.load(path).graph.node if node.op_type == "SparseAttention"]
    return output, nodes


class Listed(nn.Module):
    """Lists of its own in the graph: of blocks of which nothing is hidden, and of others."""

    def __init__(self, in_both):
        super().__init__()
        self.in_both = in_both

    def forward(self, q, k, v, whole):
        ids, counts = whole.int().argsort(-1, descending=True).int(), whole.sum(-1).int()
        if self.in_both:  # the first block of each row in the one list, the rest in the other
            lists = (counts.clamp(max=1), ids, counts - counts.clamp(max=1), ids.roll(-1, -1))
        else:
            lists = (torch.zeros_like(counts), ids, counts, ids)
        blocks = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, seq_lengths=(LENGTH, LENGTH))
        return flex_attention(q, k, v, block_mask=blocks)


@torch.no_grad()
@pytest.mark.parametrize("in_both", [False, True])
def test_whole_blocks_become_lists_of_our_node(tmp_path, in_both):
    """NaN in the keys that no row lists, an empty row, a ragged last block."""
    q, k, v = inputs()
    generator = torch.Generator().manual_seed(1)
    whole = torch.rand(2, HEADS, BLOCKS, BLOCKS, generator=generator) < 0.4
    whole[0, 1, 2], whole[..., 3] = False, False
    path = tmp_path / "flex.onnx"
    explanation = export_onnx(Listed(in_both).eval(), (q, k, v, whole), path)
    (site,) = explanation.sites
    assert site.sparse and site.reason == "the blocks that its own FlexAttention lists"
    seen = whole.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :LENGTH, :LENGTH]
    expected = dense(q, k, v, seen)
    k[:, :, 3 * BLOCK : 4 * BLOCK], v[:, :, 3 * BLOCK : 4 * BLOCK] = torch.nan, torch.nan
    output, nodes = run(path, (q, k, v, whole))
    assert len(nodes) == 1 and nodes[0].endswith("/SparseAttention")
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """A mask that looks into a buffer, heads that share keys, and a bias by distance."""

    def __init__(self, biased):
        super().__init__()
        self.biased = biased

    def forward(self, q, k, v, group):
        def shown(b, h, i, j):
            return (group[i] >= group[j]) & (j != 5)

        def bias(score, b, h, i, j):
            return score - 0.01 * (i - j).abs() * (h + 1)

        blocks = create_block_mask(shown, None, None, LENGTH, LENGTH, "cpu", BLOCK)
        score_mod = bias if self.biased else None
        return flex_attention(q, k, v, score_mod, blocks, enable_gqa=True)


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
def test_other_masks_are_written_out(tmp_path, biased):
    """The site stays dense and says why."""
    q, k, v = arguments = inputs(kv_heads=2)
    group = torch.arange(LENGTH) // 50
    path = tmp_path / "flex.onnx"
    config = Config(min_tokens=128)
    (site,) = export_onnx(Masked(biased).eval(), (*arguments, group), path, config=config).sites
    assert not site.sparse and site.reason.startswith("FlexAttention has a")
    for x in (group, group.flip(0)):  # the mask is of the run, not of the export
        seen = (x[:, None] >= x) & (torch.arange(LENGTH) != 5)
        place = torch.arange(LENGTH).double()
        distance = 0.01 * (place[:, None] - place).abs() * torch.arange(1, HEADS + 1)[:, None, None]
        output, nodes = run(path, (*arguments, x))
        expected = dense(q, k, v, seen, -distance if biased else 0.0)
        assert not nodes
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


class Framed(nn.Module):
    """A constant mask that tells frames apart: each sees the first, its own, and no padding."""

    def __init__(self, frame):
        super().__init__()
        place = torch.arange(600)
        self.place, self.frame = place, frame
        group = place // frame
        self.seen = (group[:, None] == group) | (group == 0)
        self.seen &= (place < 590) & (place[:, None] < 590)

    def forward(self, q, k, v):
        def shown(b, h, i, j):
            near = (i // self.frame == j // self.frame) | (j < self.frame)
            return near & (i < 590) & (j < 590)

        mask = create_block_mask(shown, None, None, 600, 600, device="cpu", BLOCK_SIZE=BLOCK)
        return flex_attention(q, k, v, block_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("frame", [70, 1])
def test_a_constant_mask_is_one_of_groups_of_tokens(tmp_path, frame):
    """In blocks of their own, where these hold fewer pairs; NaN in keys that nobody sees."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 600, 16, generator=generator) for _ in range(3))
    model, path = Framed(frame).eval(), tmp_path / "flex.onnx"
    (site,) = export_onnx(model, (q, k, v), path).sites
    assert site.sparse == (frame > 1)
    expected = dense(q, k, v, model.seen)
    if site.sparse:
        assert site.reason == "what its own FlexAttention shows, by groups of tokens"
        k[:, :, 590:], v[:, :, 590:] = torch.nan, torch.nan
    output, nodes = run(path, (q, k, v))
    assert len(nodes) == site.sparse
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_groups_are_what_the_mask_does_not_tell_apart():
    """Tokens anywhere, queries that see nothing, keys that nobody sees, rows in parts."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(3, (500,), generator=generator)
    keys = torch.randint(4, (700,), generator=generator)
    table = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    kinds, keys = kinds.sort()[0].roll(37), keys.roll(11)
    seen = table[kinds][:, keys]
    groups = group_tokens(seen.split(90))
    q = torch.randn(1, 2, 500, 32, generator=generator)
    k, v = (torch.randn(1, 2, 700, 32, generator=generator) for _ in range(2))
    expected = (q.double() @ k.double().mT / 8).masked_fill(~seen, -torch.inf).softmax(-1)
    expected = expected.nan_to_num() @ v.double()
    k[:, :, keys == 3], v[:, :, keys == 3] = torch.nan, torch.nan
    output = groups.attend(q, k, v, 1 / 8)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert not output[:, :, kinds == 2].any()
    assert group_tokens(torch.ones(500, 500).tril().bool().split(90)) is None
