"""Which masks hide only text, and which joint attentions therefore become sparse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uta_fx
from uta_fx import Config
from uta_fx.backend import sparsify

GRID = (4, 6, 8)
VIDEO, TEXT, LENGTH = 192, 11, 203
SETTINGS = {"min_tokens": 64, "block_q": 16, "block_kv": 16}


class Joint(nn.Module):
    """Video tokens out of a patch embedding, then text, attend to one another under a mask."""

    def __init__(self, make_mask):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 32, 1)
        self.qkv = nn.Linear(32, 96)
        self.make_mask = make_mask

    def forward(self, video, text, seen):
        video = self.patch(video).flatten(2).transpose(1, 2)
        x = self.qkv(torch.cat([video, text], 1))
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        mask = self.make_mask(seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def inputs():
    generator = torch.Generator().manual_seed(0)
    seen = torch.arange(TEXT) < torch.tensor([[TEXT], [4]])
    return (
        torch.randn(2, 3, *GRID, generator=generator),
        torch.randn(2, TEXT, 32, generator=generator),
        seen,
    )


def concatenated(seen):
    return torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)[:, None, None, :]


def padded(seen):
    return F.pad(seen, (VIDEO, 0), value=True).view(2, 1, 1, LENGTH)


def counted(seen):
    count = VIDEO + seen.sum(1, dtype=torch.int)
    hidden = torch.arange(LENGTH).unsqueeze(0) >= count.unsqueeze(1)
    mask = torch.ones(2, LENGTH, dtype=torch.bool).masked_fill(hidden, False)
    return mask.unsqueeze(1).unsqueeze(1)


def below_a_count(seen):
    return (torch.arange(LENGTH) < (seen.sum(1) + VIDEO).unsqueeze(1))[:, None, None]


def outer(seen):
    rows = F.pad(seen, (VIDEO, 0), value=True).view(2, 1, 1, LENGTH).repeat(1, 1, LENGTH, 1)
    return (rows & rows.transpose(2, 3)).bool()


def of_a_count_of_queries(seen):
    count = (seen.sum(1, keepdim=True) + VIDEO).unsqueeze(1)
    rows = (torch.arange(LENGTH)[None] < count).transpose(1, 2)[:, None]
    return concatenated(seen) & rows.expand(2, 1, LENGTH, LENGTH)


def added(seen):
    text = torch.zeros(2, TEXT).masked_fill(~seen, -1e9)
    return torch.cat([torch.zeros(2, VIDEO), text], 1)[:, None, None, :]


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [concatenated, padded, counted, below_a_count, outer, of_a_count_of_queries, added]
)
def test_a_mask_that_hides_only_text_is_honoured(make):
    """Density 1 equals dense, for a text that is whole and one that is padded."""
    model, arguments = Joint(make), inputs()
    (site,) = uta_fx.explain(model, *arguments, config=Config(**SETTINGS)).sites
    assert site.sparse and (site.kind, site.grid, site.text) == ("joint", GRID, (0, TEXT))
    outputs = {}
    for density in (1.0, 0.3):
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend="uta", fullgraph=True,
            options={**SETTINGS, "density": density, "inner": "aot_eager"},
        )  # fmt: skip
        outputs[density] = compiled(*arguments)
    dense = model(*arguments)
    # rows of padded text see nothing in two of them
    seen = slice(0, VIDEO + 4) if make in (outer, of_a_count_of_queries) else slice(None)
    torch.testing.assert_close(outputs[1.0][:, :, seen], dense[:, :, seen], rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs[0.3], outputs[1.0])


class WithoutHeads(Joint):
    """The same in tensors of three dimensions, the heads among the samples."""

    def forward(self, video, text, seen):
        video = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(torch.cat([video, text], 1)).chunk(3, -1)
        mask = self.make_mask(seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("of", [WithoutHeads, Joint])
def test_a_mask_of_three_dimensions_is_honoured(of):
    """``[2, 1, L]``: of two samples beside ``[B, L, D]``, of two heads beside ``[B, H, L, D]``."""

    def make(seen):
        return torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)[:, None]

    model, arguments = of(make), inputs()
    (site,) = uta_fx.explain(model, *arguments, config=Config(**SETTINGS)).sites
    assert site.sparse and site.text == (0, TEXT), site.reason
    options = {**SETTINGS, "density": 1.0, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    dense = model(*arguments)
    torch.testing.assert_close(compiled(*arguments), dense, rtol=1e-4, atol=1e-5)
    assert not torch.equal(of(lambda seen: None)(*arguments), dense)


def from_outside(seen):
    return F.pad(seen, (VIDEO, 0), value=False)[:, None, None, :]


def video_filled(seen):
    mask = torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)
    return mask.masked_fill(torch.arange(LENGTH) == 3, False)[:, None, None, :]


def a_smaller_count(seen):
    return (torch.arange(LENGTH) < (seen.sum(1) + 100).unsqueeze(1))[:, None, None]


def causal(seen):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def of_queries(seen):
    return concatenated(seen) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def filled_with_a_half(seen):
    mask = torch.full((2, VIDEO), 0.5).to(torch.int)
    return torch.cat([mask, seen.int()], 1).bool()[:, None, None, :]


def shifted(seen):
    return torch.cat([torch.ones(2, VIDEO - 1), seen.float(), torch.ones(2, 1)], 1)[
        :, None, None
    ].bool()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (from_outside, "the graph does not show that its attention mask leaves all video"),
        (video_filled, "the graph does not show that its attention mask leaves all video"),
        (a_smaller_count, "the graph does not show that its attention mask leaves all video"),
        (shifted, "the graph does not show that its attention mask leaves all video"),
        (filled_with_a_half, "the graph does not show that its attention mask leaves all video"),
        (causal, "its attention mask differs from query to query"),
        (of_queries, "its attention mask differs from query to query"),
    ],
)
def test_a_mask_that_may_do_more_leaves_the_site_dense(make, reason):
    """For its own reason."""
    (site,) = uta_fx.explain(Joint(make), *inputs(), config=Config(**SETTINGS)).sites
    assert not site.sparse and site.reason.startswith(reason), site.reason


def as_it_comes(seen):
    return seen[:, None, None, :]


def as_it_comes_added(seen):
    return torch.where(seen, 0.0, -torch.inf)[:, None, None, :]


def as_it_comes_for_queries_too(seen):
    rows = seen.view(2, 1, 1, LENGTH).repeat(1, 1, LENGTH, 1)
    return rows & rows.transpose(2, 3)


@torch.no_grad()
@pytest.mark.parametrize("make", [as_it_comes, as_it_comes_added, as_it_comes_for_queries_too])
def test_a_mask_of_unknown_origin_may_be_trusted(make):
    """Density 1 equals dense; where it hides video all the same, that sample's video is NaN."""
    model, (video, text, seen) = Joint(make), inputs()
    shown = torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)
    (site,) = uta_fx.explain(model, video, text, shown, config=Config(**SETTINGS)).sites
    assert not site.sparse and site.reason.startswith("the graph does not show that its attention")
    options = {**SETTINGS, "density": 1.0, "inner": "aot_eager", "trust_masks": True}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    output, dense = compiled(video, text, shown), model(video, text, shown)
    seen = slice(0, VIDEO + 4) if make is as_it_comes_for_queries_too else slice(None)
    torch.testing.assert_close(output[:, :, seen], dense[:, :, seen], rtol=1e-4, atol=1e-5)
    for hidden in (0, VIDEO - 1):
        shown[0, hidden] = False
        output = compiled(video, text, shown)
        assert output[0, :, :VIDEO].isnan().all()
        torch.testing.assert_close(output[1, :, seen], dense[1, :, seen], rtol=1e-4, atol=1e-5)
        shown[0, hidden] = True


@torch.no_grad()
def test_a_mask_that_differs_between_queries_is_not_trusted():
    """It is not one of keys and one of queries."""
    arguments, config = inputs(), Config(**SETTINGS, trust_masks=True)
    for make in (causal, of_queries):
        (site,) = uta_fx.explain(Joint(make), *arguments, config=config).sites
        assert site.reason == "its attention mask differs from query to query"


class Sorted(Joint):
    """Text that is valid before text that is not, as HunyuanVideo 1.5 sorts it."""

    def forward(self, video, text, seen):
        video = self.patch(video).flatten(2).transpose(1, 2)
        text, mask = self.make_mask(text[0], seen[1])
        x = self.qkv(torch.cat([video, text[None]], 1))
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        length = q.shape[2]
        shown = F.pad(mask[None], (length - mask.shape[0], 0), value=True)
        rows = shown.view(1, 1, 1, length).repeat(1, 1, length, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows & rows.transpose(2, 3))


def by_a_mask_and_its_complement(text, seen):
    return torch.cat([text[seen], text[~seen]]), torch.cat([seen[seen], seen[~seen]])


def by_two_masks(text, seen):
    other = seen & (text[:, 0] < 0)
    return torch.cat([text[seen], text[~seen]]), torch.cat([seen[seen], seen[~other]])


def by_a_mask_that_changes(text, seen):
    seen = seen.clone()
    chosen, mask = [text[seen]], [seen[seen]]
    seen[0] = False
    return torch.cat([*chosen, text[~seen]]), torch.cat([*mask, seen[~seen], seen[seen]])


@torch.no_grad()
@pytest.mark.parametrize(
    ("sort", "known"),
    [
        (by_a_mask_and_its_complement, True),
        (by_two_masks, False),
        (by_a_mask_that_changes, False),
    ],
)
def test_text_that_is_sorted_by_its_mask_is_as_long_as_before(sort, known):
    """Only where what is selected provably adds up is it known where the video ends."""
    model, (video, text, seen) = Sorted(sort), inputs()
    arguments = (video[:1], text, seen)
    config = Config(**SETTINGS, grid=GRID)
    (site,) = uta_fx.explain(model, *arguments, config=config).sites
    assert site.sparse == known, site.reason
    if not known:
        assert site.reason.startswith("the graph does not show that its attention mask leaves")
        return
    options = {**SETTINGS, "density": 1.0, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    for words in (4, TEXT):  # of the prompt
        arguments[2][1] = torch.arange(TEXT) < words
        output, expected = (f(*arguments)[:, :, : VIDEO + words] for f in (compiled, model))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def scattered(q, text):
    x = q.new_zeros(q.shape[0], LENGTH, q.shape[2])
    return x.index_copy(1, torch.arange(LENGTH), torch.cat([q, text], 1))


def written(q, text):
    """The text where the cat had video."""
    x = torch.cat([q, text], 1)
    x[:, :TEXT] = text
    return x


def written_through_a_view(q, text):
    x = torch.cat([q, text], 1)
    x.transpose(1, 2)[:, :, :TEXT].copy_(text.mT)
    return x


def reversed_(q, text):
    return torch.cat([q, text], 1).flip(1)


def cut_and_joined(q, text):
    """The same as one cat."""
    x = torch.cat([q, text], 1)
    return torch.cat([x[:, :100] * 2, x[:, 100:-TEXT], x[:, -TEXT:]], 1)


def after(q, text):
    return torch.cat([text, q + 1], 1).clone()


class Sequence(nn.Module):
    """Attention over a sequence that something was done to."""

    def __init__(self, join):
        super().__init__()
        self.patch, self.qk, self.join = nn.Conv3d(3, 32, 1), nn.Linear(32, 64), join

    def forward(self, video, text, _):
        x = self.join(self.patch(video).flatten(2).transpose(1, 2), text)
        q, k = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qk(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize(
    ("join", "text"),
    [
        (cut_and_joined, (0, TEXT)),
        (after, (TEXT, 0)),
        (scattered, None),
        (written, None),
        (written_through_a_view, None),
        (reversed_, None),
    ],
)
def test_text_is_located_or_it_is_not(join, text):
    """A sequence whose order the graph does not show has no video to be sparse."""
    (site,) = uta_fx.explain(Sequence(join), *inputs(), config=Config(**SETTINGS)).sites
    assert site.text == text and site.sparse == (text is not None), site
    if text is None:
        assert "give grid" in site.reason


def test_a_text_as_long_as_the_video_is_told_from_it():
    """By where it comes from."""
    model, (video, _, seen) = Sequence(after), inputs()
    text = torch.randn(2, VIDEO, 32)
    (site,) = uta_fx.explain(model, video, text, seen, config=Config(**SETTINGS)).sites
    assert site.sparse and site.text == (VIDEO, 0)


@torch.no_grad()
def test_a_new_text_length_or_resolution_is_right():
    """With sizes that Dynamo makes dynamic of its own accord."""
    model = Joint(lambda seen: None)
    compiled = torch.compile(
        model, backend="uta", options={**SETTINGS, "density": 1.0, "inner": "eager"}
    )
    video, text, seen = inputs()
    for n, frames in ((11, 4), (7, 4), (9, 3), (5, 4)):
        arguments = (video[:, :, :frames], text[:, :n], seen)
        torch.testing.assert_close(compiled(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)


def test_a_dynamic_graph_shows_its_video_too():
    """``dynamic=True``: the grid is read as numbers, the text may stay a symbol."""
    found = []

    def backend(gm, inputs):
        found.extend(sparsify(gm, inputs, Config(**SETTINGS)))
        return gm.forward

    with torch.no_grad():
        torch.compile(Joint(lambda seen: None), backend=backend, dynamic=True)(*inputs())
    assert [site.grid for site in found if site.sparse] == [GRID]
