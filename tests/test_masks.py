"""Which masks hide only text, and which joint attentions therefore become sparse."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import uta_fx
from uta_fx import Config
from uta_fx.attention import SparseSite
from uta_fx.backend import sparsify
from uta_fx.order import token_order

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


def chosen(seen):
    return torch.where(concatenated(seen), 0.0, -torch.inf)


def scaled_complement(seen):
    """As transformers' extended attention masks."""
    mask = F.pad(seen.float(), (VIDEO, 0), value=1)[:, None, None]
    return (1.0 - mask) * torch.finfo(mask.dtype).min


def a_count_above(seen):
    return ((seen.sum(1) + VIDEO).unsqueeze(1) > torch.arange(LENGTH))[:, None, None]


def up_to_a_count(seen):
    return (torch.arange(LENGTH) <= (seen.sum(1) + (VIDEO - 1)).unsqueeze(1))[:, None, None]


def product_of_rows(seen):
    rows = F.pad(seen.half(), (VIDEO, 0), value=1)
    return rows[:, None, None] * rows[:, None, :, None] > 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        concatenated, padded, counted, below_a_count, a_count_above, up_to_a_count, outer,
        of_a_count_of_queries, added, chosen, scaled_complement, product_of_rows,
    ],
)  # fmt: skip
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


class TextFirst(Joint):
    """Text, then video."""

    def forward(self, video, text, seen):
        video = self.patch(video).flatten(2).transpose(1, 2)
        x = self.qkv(torch.cat([text, video], 1))
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.make_mask(seen))


def places():
    return torch.arange(LENGTH)[None]


def below(seen):
    """A number that may be anything for all that is known, negative too."""
    return places() < (seen.sum(1) - 1)[:, None]


def below_or_behind(seen):
    return (below(seen) | (places() >= TEXT))[:, None, None]


def below_or_after(seen):
    return (below(seen) | (places() > TEXT - 1))[:, None, None]


def not_between(seen):
    return ~(~below(seen) & (places() < TEXT))[:, None, None]


def filled_between(seen):
    hidden = (~below(seen) & (places() < TEXT))[:, None, None]
    return torch.zeros(2, 1, 1, LENGTH).masked_fill(hidden, -torch.inf)


def chosen_between(seen):
    return torch.where(~below(seen) & (places() <= TEXT - 1), -1e4, 0.0)[:, None, None]


def text_weighed(seen):
    return torch.where(places() < TEXT, 0.7, 0.0)[:, None, None]


def video_not_weighed(seen):
    return torch.where(places() >= TEXT, 0.0, -0.7)[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        below_or_behind, below_or_after, not_between, filled_between, chosen_between, text_weighed,
        video_not_weighed,
    ],
)  # fmt: skip
def test_what_places_are_compared_with_is_known_outside_the_video(make):
    """A bound that no video token lies on the other side of."""
    model, arguments = TextFirst(make), inputs()
    (site,) = uta_fx.explain(model, *arguments, config=Config(**SETTINGS)).sites
    assert site.sparse and (site.kind, site.text) == ("joint", (TEXT, 0)), site.reason
    compiled = compiled_with(model, density=1.0, inner="eager")
    dense = model(*arguments)
    torch.testing.assert_close(compiled(*arguments), dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(TextFirst(lambda seen: None)(*arguments), dense, atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda seen: below(seen) | (places() >= TEXT + 1),
        lambda seen: below(seen) | (places() > TEXT),
        lambda seen: below(seen) | (places() < LENGTH - 1),
        lambda seen: below(seen) | (places() <= LENGTH - 2),
        lambda seen: below(seen) | (places().bool() >= TEXT),
        lambda seen: torch.where(~below(seen) & (places() <= TEXT), -1e4, 0.0),
        lambda seen: torch.where(places() < TEXT + 1, 0.7, 0.0),
        lambda seen: torch.where(places() < TEXT, 0.0, 0.7),
        lambda seen: ~below(seen),
        below,
    ],
)
def test_a_bound_that_may_lie_amid_the_video_proves_nothing(make):
    model = TextFirst(lambda seen: make(seen)[:, None, None])
    (site,) = uta_fx.explain(model, *inputs(), config=Config(**SETTINGS)).sites
    assert not site.sparse
    assert site.reason.startswith("the graph does not show that its attention mask leaves all vid")


def from_outside(seen):
    return F.pad(seen, (VIDEO, 0), value=False)[:, None, None, :]


def video_filled(seen):
    mask = torch.cat([torch.ones(2, VIDEO, dtype=torch.bool), seen], 1)
    return mask.masked_fill(torch.arange(LENGTH) == 3, False)[:, None, None, :]


def a_smaller_count(seen):
    return (torch.arange(LENGTH) < (seen.sum(1) + 100).unsqueeze(1))[:, None, None]


def a_count_that_may_be_negative(seen):
    count = (seen.int() - 1).sum(1) + VIDEO
    return (torch.arange(LENGTH) < count.unsqueeze(1))[:, None, None]


def a_count_less(seen):
    count = torch.add(seen.sum(1), VIDEO, alpha=-1)
    return (torch.arange(LENGTH) < count.unsqueeze(1))[:, None, None]


def causal(seen):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def of_queries(seen):
    return concatenated(seen) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def filled_with_a_half(seen):
    mask = torch.full((2, VIDEO), 0.5).to(torch.int)
    return torch.cat([mask, seen.int()], 1).bool()[:, None, None, :]


def written_to(seen):
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 3] = False
    return mask[:, None, None]


def complement_of_zeros(seen):
    return (1.0 - F.pad(seen.float(), (VIDEO, 0)))[:, None, None] * -1e4


def chosen_the_other_way(seen):
    return torch.where(concatenated(seen), -torch.inf, 0.0)


def complement_of_more_than_one(seen):
    one_or_three = torch.ones(2, LENGTH, dtype=torch.int) | 2 * F.pad(seen.int(), (0, VIDEO))
    return ((1 - one_or_three) * 1e4)[:, None, None]


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
        (a_count_less, "the graph does not show that its attention mask leaves all video"),
        (a_count_that_may_be_negative, "the graph does not show that its attention mask leaves"),
        (complement_of_zeros, "the graph does not show that its attention mask leaves all video"),
        (chosen_the_other_way, "the graph does not show that its attention mask leaves all vid"),
        (complement_of_more_than_one, "the graph does not show that its attention mask leaves a"),
        (shifted, "the graph does not show that its attention mask leaves all video"),
        (filled_with_a_half, "the graph does not show that its attention mask leaves all video"),
        (written_to, "its attention mask is made of a tensor that is written to"),
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


class Padded(nn.Module):
    """Clips of several lengths in a batch: video alone, under a mask of what exists of each."""

    def __init__(self, make_mask):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 32, 1)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.make_mask = make_mask

    def forward(self, video, known):
        x = self.patch(video).flatten(2).transpose(1, 2)
        mask = self.make_mask(known)
        for _ in range(2):
            q, k, v = (
                part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x


LENGTHS = torch.tensor([VIDEO, 75])
SHOWN = torch.arange(VIDEO) < LENGTHS[:, None]


def clips():
    return torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(0))


def before_a_length(lengths):
    return (torch.arange(VIDEO) < lengths[:, None])[:, None, None]


def not_behind_a_length(lengths):
    return ~(torch.arange(VIDEO)[None] >= lengths.view(2, 1)).view(2, 1, 1, VIDEO)


def above_its_place(lengths):
    return (lengths[:, None, None, None] > torch.arange(VIDEO)).expand(2, 2, VIDEO, VIDEO)


def filled_behind_a_length(lengths):
    hidden = torch.arange(VIDEO)[None] >= lengths[:, None]
    return torch.ones(2, VIDEO, dtype=torch.bool).masked_fill(hidden, False)[:, None, None]


def added_behind_a_length(lengths):
    return torch.where(torch.arange(VIDEO) < lengths[:, None], 0.0, -torch.inf)[:, None, None]


def zeros_filled_behind_a_length(lengths):
    hidden = torch.arange(VIDEO) >= lengths[:, None]
    return torch.zeros(2, VIDEO).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None, None]


def filled_by_name(lengths):
    hidden = torch.arange(VIDEO).ge(other=lengths[:, None])
    return torch.zeros(2, 1, 1, VIDEO).masked_fill(mask=hidden[:, None, None], value=-1e9)


def one_less_the_mask(lengths):
    return ((1 - before_a_length(lengths).to(torch.float32)) * -10000.0).expand(2, 2, 1, VIDEO)


PROVEN = [
    before_a_length, not_behind_a_length, above_its_place, filled_behind_a_length,
    added_behind_a_length, zeros_filled_behind_a_length, filled_by_name, one_less_the_mask,
]  # fmt: skip
TRUSTED = [as_it_comes, as_it_comes_added]


def compiled_with(model, **options):
    torch._dynamo.reset()
    options = {**SETTINGS, "inner": "aot_eager", **options}
    return torch.compile(model, backend="uta", fullgraph=True, options=options)


@torch.no_grad()
@pytest.mark.parametrize("reorder", ["none", "tile"])
@pytest.mark.parametrize("make", PROVEN + TRUSTED)
def test_a_mask_of_padding_is_read_as_lengths(make, reorder):
    """Density 1 equals dense on the tokens that exist, whatever the padding holds."""
    model, video, options = Padded(make), clips(), {"reorder": reorder}
    known = LENGTHS if make in PROVEN else SHOWN
    if make in TRUSTED:
        for site in uta_fx.explain(model, video, known, config=Config(**SETTINGS)).sites:
            assert not site.sparse and "trust_masks=True takes it to" in site.reason
        options["trust_masks"] = True
    explanation = uta_fx.explain(model, video, known, config=Config(**SETTINGS, **options))
    for site in explanation.sites:
        assert site.sparse and (site.kind, site.grid, site.text) == ("self", GRID, None)
        assert "of each sample the first that its mask shows" in site.reason
        assert ("trusted: NaN" in site.reason) == (make in TRUSTED)
        assert site.reordered == (None if reorder == "none" else "once")
    assert 0 < explanation.sparse_share <= 1
    dense = model(video, known)
    exact = compiled_with(model, density=1.0, **options)
    torch.testing.assert_close(exact(video, known)[SHOWN], dense[SHOWN], rtol=1e-4, atol=1e-5)
    other = video.flatten(2).mT.where(SHOWN[..., None], 7.0).mT.unflatten(2, GRID)
    torch.testing.assert_close(exact(other, known)[SHOWN], dense[SHOWN], rtol=1e-4, atol=1e-5)
    sparse = compiled_with(model, density=0.3, **options)(video, known)
    assert sparse.isfinite().all() and not torch.equal(sparse[SHOWN], dense[SHOWN])


def fill_where_not(logits, mask):
    return logits.masked_fill(~mask, -torch.inf)


def fill_where_zero(logits, mask):
    return logits.masked_fill(mask.float() == 0, -1e9)


def fill_behind_a_length(logits, mask):
    hidden = torch.arange(VIDEO) >= mask.sum(-1, keepdim=True)
    return logits.masked_fill_(hidden, torch.finfo(logits.dtype).min)


def choose_where(logits, mask):
    return torch.where(mask, logits, torch.full([], torch.finfo(logits.dtype).min)) - 1.0


def choose_where_not(logits, mask):
    return torch.where(mask.logical_not(), -torch.inf, logits)


def choose_by_method(logits, mask):
    return logits.where(mask, -torch.inf)


class WrittenOut(nn.Module):
    """Attention by hand, with logits that are filled where a mask hides keys."""

    def __init__(self, fill, rank=4):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.qkv = nn.Conv3d(3, 32, 1), nn.Linear(32, 96)
        self.fill, self.rank = fill, rank

    def forward(self, video, mask):
        x = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.rank == 4:
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v))
            mask = mask[:, :, None]
        return self.fill(q @ k.mT * 0.25, mask).softmax(-1) @ v


class WithLengths(nn.Module):
    """The same, under a mask that is made of lengths."""

    def __init__(self, written_out):
        super().__init__()
        self.written_out = written_out

    def forward(self, video, lengths):
        return self.written_out(video, (torch.arange(VIDEO) < lengths[:, None])[:, None])


FILLS = [
    fill_where_not, fill_where_zero, fill_behind_a_length, choose_where, choose_where_not,
    choose_by_method,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("fill", "rank"), [(fill, 4) for fill in FILLS] + [(fill_where_not, 3), (choose_where, 3)]
)
def test_logits_that_are_filled_are_read_as_a_mask(fill, rank):
    """As lengths, where it is one of padding: density 1 equals dense on the tokens that exist."""
    model, video = WithLengths(WrittenOut(fill, rank)), clips()
    (site,) = uta_fx.explain(model, video, LENGTHS, config=Config(**SETTINGS)).sites
    assert site.sparse and (site.kind, site.grid) == ("self", GRID), site.reason
    assert site.reason.endswith("of each sample the first that its mask shows")
    dense = model(video, LENGTHS).movedim(-2, -1)[..., :75]
    compiled = compiled_with(model, density=1.0, inner="eager")
    exact = compiled(video, LENGTHS).movedim(-2, -1)[..., :75]
    torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fill", [fill_where_not, choose_where])
def test_logits_filled_by_a_mask_of_unknown_origin_may_be_trusted(fill):
    """It is given as an input; a hole in it makes its sample NaN."""
    model, video, shown = WrittenOut(fill), clips(), SHOWN.clone()[:, None]
    (site,) = uta_fx.explain(model, video, shown, config=Config(**SETTINGS)).sites
    assert not site.sparse and "trust_masks=True takes it to" in site.reason
    compiled = compiled_with(model, density=1.0, trust_masks=True, inner="eager")
    output, dense = compiled(video, shown), model(video, shown)
    torch.testing.assert_close(output[..., :75, :], dense[..., :75, :], rtol=1e-4, atol=1e-5)
    shown[0, 0, 7] = False
    output = compiled(video, shown)
    assert output[0].isnan().all() and output[1].isfinite().all()


class WrittenOutBesideText(Joint):
    """Joint attention by hand."""

    def forward(self, video, text, seen):
        video = self.patch(video).flatten(2).transpose(1, 2)
        x = self.qkv(torch.cat([video, text], 1))
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        return (q @ k.mT * 0.25).masked_fill(self.make_mask(seen), -torch.inf).softmax(-1) @ v


def not_shown(seen):
    return ~concatenated(seen)


def from_a_count_on(seen):
    return torch.arange(LENGTH) >= (seen.sum(1) + VIDEO).view(2, 1, 1, 1)


def not_shown_to_those_shown(seen):
    return ~outer(seen)


def hidden_or_hidden_from(seen):
    hidden = ~F.pad(seen, (VIDEO, 0), value=True).view(2, 1, 1, LENGTH)
    return hidden | hidden.repeat(1, 1, LENGTH, 1).transpose(2, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [not_shown, from_a_count_on, not_shown_to_those_shown, hidden_or_hidden_from]
)
def test_logits_that_are_filled_beside_text_are_read_as_a_mask(make):
    """Which hides text alone."""
    model, arguments = WrittenOutBesideText(make), inputs()
    (site,) = uta_fx.explain(model, *arguments, config=Config(**SETTINGS)).sites
    assert site.sparse and (site.kind, site.text) == ("joint", (0, TEXT)), site.reason
    compiled = compiled_with(model, density=1.0, inner="eager")
    output, dense = compiled(*arguments), model(*arguments)
    seen = slice(0, VIDEO + 4)  # rows of padded text may see nothing
    torch.testing.assert_close(output[:, :, seen], dense[:, :, seen], rtol=1e-4, atol=1e-5)


def video_filled_too(seen):
    return ~concatenated(seen) | (torch.arange(LENGTH) == 3)


def causally_filled(seen):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def causally_by_frames(seen):
    frame = torch.arange(LENGTH) // 48
    return frame[:, None] < frame


def what_is_shown(seen):
    return concatenated(seen)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (video_filled_too, "the graph does not show that its attention mask leaves all video"),
        (what_is_shown, "the graph does not show that its attention mask leaves all video"),
        (causally_filled, "its attention mask differs from query to query"),
        (causally_by_frames, "its attention mask differs from query to query"),
    ],
)
def test_logits_that_are_filled_with_more_stay_dense(make, reason):
    """For the reason that the mask would give in SDPA."""
    sites = uta_fx.explain(WrittenOutBesideText(make), *inputs(), config=Config(**SETTINGS)).sites
    assert [site.sparse for site in sites] == [False] and sites[0].reason.startswith(reason)


@torch.no_grad()
@pytest.mark.parametrize("make", TRUSTED)
def test_a_trusted_mask_that_hides_more_than_padding_gives_nan(make):
    """Of its sample alone: a hole, padding at the start, or nothing shown."""
    model, video = Padded(make), clips()
    compiled, dense = compiled_with(model, density=1.0, trust_masks=True), model(video, SHOWN)
    for hidden in (slice(30, 31), slice(0, 1), slice(None)):
        shown = SHOWN.clone()
        shown[0, hidden] = False
        output = compiled(video, shown)
        assert output[0].isnan().all()
        torch.testing.assert_close(output[1, :75], dense[1, :75], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_trusted_mask_that_weighs_keys_gives_nan():
    """What is added is neither 0 nor far below all logits."""
    model, video, added = Padded(lambda mask: mask), clips(), torch.zeros(2, 1, 1, VIDEO)
    compiled = compiled_with(model, density=1.0, trust_masks=True)
    torch.testing.assert_close(compiled(video, added), model(video, added), rtol=1e-4, atol=1e-5)
    added[1, ..., -1] = -1.0
    output = compiled(video, added)
    assert output[0].isfinite().all() and output[1].isnan().all()


@pytest.mark.parametrize("in_order", [False, True])
def test_padding_is_zero_and_heads_may_have_lengths_of_their_own(in_order):
    """A mask ``[B, H, 1, L]``, also for tokens that are in block order already."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, VIDEO, 16, generator=generator)
    shown = torch.arange(VIDEO) < torch.tensor([[VIDEO, 64], [1, 90]])[..., None, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).where(shown.mT, 0.0)
    config = Config(density=1.0, **SETTINGS)
    order, inverse = token_order(GRID, "tile", 16, "cpu")
    if in_order:
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
    output = SparseSite(config, GRID, None, in_order=in_order)(q, k, v, shown)
    if in_order:
        output = output.index_select(2, inverse)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


class Shapes(TorchDispatchMode):
    """Of every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.seen += [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor)]
        return result


@torch.no_grad()
def test_no_matrix_of_tokens_by_tokens_is_made_of_a_mask_of_padding():
    """By any operator of the rewritten graph."""
    shapes = Shapes()

    def backend(gm, inputs):
        sparsify(gm, inputs, Config(**SETTINGS))

        def run(*arguments):
            with shapes:
                return gm(*arguments)

        return run

    torch.compile(Padded(before_a_length), backend=backend, fullgraph=True)(clips(), LENGTHS)
    assert shapes.seen and all(shape.count(VIDEO) < 2 for shape in shapes.seen)


def behind_a_length(lengths):
    return (torch.arange(VIDEO) >= lengths[:, None])[:, None, None]


def before_a_length_of_each_key(lengths):
    return (torch.arange(VIDEO) < lengths[:, None] - torch.arange(VIDEO) % 2)[:, None, None]


def with_a_hole(lengths):
    mask = torch.arange(VIDEO) < lengths[:, None]
    mask[:, 3] = False
    return mask[:, None, None]


def with_a_hole_through_a_view(lengths):
    mask = torch.arange(VIDEO) < lengths[:, None]
    mask.T[3:5].fill_(False)
    return mask[:, None, None]


def shuffled(lengths):
    places = torch.arange(VIDEO)[torch.arange(VIDEO) * 5 % VIDEO]
    return (places < lengths[:, None])[:, None, None]


def weighing(lengths):
    return torch.where(torch.arange(VIDEO) < lengths[:, None], 0.0, -3.0)[:, None, None]


def the_mask_less_one(lengths):
    return (before_a_length(lengths).to(torch.float32) - 1) * -10000.0


def the_mask_twice(lengths):
    shown = before_a_length(lengths).to(torch.float32)
    return torch.sub(1, shown, alpha=2) * -10000.0


def of_queries_too(lengths):
    rows = before_a_length(lengths)
    return rows & rows.mT


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (behind_a_length, {}, "the graph does not show that its attention mask hides the end"),
        (before_a_length_of_each_key, {}, "the graph does not show that its attention mask hides"),
        (with_a_hole, {}, "its attention mask is made of a tensor that is written to"),
        (with_a_hole_through_a_view, {}, "its attention mask is made of a tensor that is written"),
        (shuffled, {}, "the graph does not show that its attention mask hides the end"),
        (weighing, {}, "the graph does not show that its attention mask hides the end"),
        (the_mask_less_one, {}, "the graph does not show that its attention mask hides the end"),
        (the_mask_twice, {}, "the graph does not show that its attention mask hides the end"),
        (of_queries_too, {"trust_masks": True}, "its attention mask differs from query to query"),
        (before_a_length, {"policy": "window"}, "its attention mask hides padding: lengths need a"),
        (before_a_length, {"tail": "rectified"}, "its attention mask hides padding: lengths need"),
    ],
)
def test_a_mask_of_a_video_that_is_not_padding_leaves_the_site_dense(make, options, reason):
    config = Config(**SETTINGS, **options)
    for site in uta_fx.explain(Padded(make), clips(), LENGTHS, config=config).sites:
        assert not site.sparse and site.reason.startswith(reason), site.reason


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


def amid(q, text):
    return torch.cat([q[:, :100], text, q[:, 100:]], 1)


def twice(q, text):
    """A reference of as many tokens, of which the graph does not show how they lie."""
    return torch.cat([q.flip(1), text, q], 1)


def in_two_parts(q, text):
    """A first frame of its own."""
    return torch.cat([text, q[:, :48].flip(1), q[:, 48:].flip(1)], 1)


def of_one_source(q, text):
    """In which something is added to a first part alone."""
    x = torch.cat([text, q, text], 1).flip(1)
    first, rest = text[:, :1].expand(-1, 48, -1), text[:, 1:2].expand(-1, LENGTH - 37, -1)
    return x + torch.cat([first, rest], 1)


def video_alone(q, text):
    return q


CUT = r"video_start=%s is given, but grid 4 x 6 x 8 = 192 from there on cuts the %s tokens"


@pytest.mark.parametrize(
    ("join", "start", "text"),
    [
        (after, TEXT, (TEXT, 0)),
        (after, 0, CUT % (0, r"11 \+ 192") + " that the graph shows: it matches those from 11 on"),
        (after, 10, CUT % (10, r"11 \+ 192")),
        (after, 12, r"192 does not match its 11 \+ 192 tokens from video_start=12 on"),
        (amid, 0, CUT % (0, r"100 \+ 11 \+ 92") + " that the graph shows$"),
        (twice, 0, (0, LENGTH)),
        (twice, LENGTH, (LENGTH, 0)),
        (twice, 100, CUT % (100, r"192 \+ 11 \+ 192") + ".* those from 0 or 203 on"),
        (in_two_parts, TEXT, (TEXT, 0)),
        (in_two_parts, TEXT + 1, r"does not match its 11 \+ 48 \+ 144 tokens from"),
        (of_one_source, 5, (5, 17)),
        (video_alone, 5, None),
    ],
)
def test_a_start_that_is_given_must_not_contradict_the_graph(join, start, text):
    """It decides where the graph shows nothing: amid a source, or which sources are the video."""
    config = Config(**SETTINGS, grid=GRID, video_start=start)
    (site,) = uta_fx.explain(Sequence(join), *inputs(), config=config).sites
    assert site.sparse is not isinstance(text, str), site
    if site.sparse:
        assert site.text == text
    else:
        assert re.search(text, site.reason), site.reason


def test_a_start_does_not_excuse_a_wrong_grid():
    config = Config(**SETTINGS, grid=(4, 8, 6), video_start=LENGTH)
    (site,) = uta_fx.explain(Sequence(twice), *inputs(), config=config).sites
    assert site.reason == "grid 4 x 8 x 6 is given, but the graph shows 4 x 6 x 8"


class VideoAsks(Sequence):
    """Of a sequence the video alone has queries."""

    def forward(self, video, text, _):
        x = self.join(self.patch(video).flatten(2).transpose(1, 2), text)
        q, k = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qk(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q[:, :, TEXT:], k, k)


@pytest.mark.parametrize("start", [None, 0, TEXT])
def test_a_start_is_that_among_the_keys(start):
    """Where queries are a part of them too."""
    config = Config(**SETTINGS, grid=GRID, video_start=start)
    (site,) = uta_fx.explain(VideoAsks(after), *inputs(), config=config).sites
    assert site.sparse is (start != 0), site
    if start == 0:
        assert site.reason == "video_start=0 is given, but the graph shows it from 11 on"


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
