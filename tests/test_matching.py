"""Attention in every form in which models write it, and what only looks like it."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uta_fx
from uta_fx import Config
from uta_fx.backend import plan_of, sparsify
from uta_fx.export.program import sparsify_program

SMALL = {"min_tokens": 128, "block_q": 32, "block_kv": 32, "reorder": "none"}
BATCH, HEADS, LENGTH, DIM = 2, 2, 160, 16


def heads(x):
    """``[B, L, H * D] -> [B, H, L, D]``."""
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(heads(q), heads(k), value=heads(v)).transpose(1, 2)


def sdpa_of_three_dimensions(q, k, v):
    q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def matmul(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def matmul_divided(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.matmul(torch.softmax(q @ k.mT / math.sqrt(DIM), dim=-1), v).transpose(1, 2)


def scaled_before(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.matmul(q * DIM**-0.25, (k * DIM**-0.25).transpose(-2, -1))
    return torch.matmul(F.softmax(weights.float(), dim=-1).type(weights.dtype), v)


def scale_on_the_left(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return nn.Softmax(dim=-1)(0.25 * torch.matmul(q, k.transpose(2, 3))) @ v


def softmax_in_float32_with_dropout_off(q, k, v):
    q, k, v = (heads(x).half() for x in (q, k, v))
    weights = F.softmax(q @ k.transpose(-1, -2) * 0.25, dim=-1, dtype=torch.float32).to(v.dtype)
    return (F.dropout(weights, 0.1, training=False) @ v).float()


def bmm(q, k, v):
    q, k, v = (heads(x).reshape(BATCH * HEADS, LENGTH, DIM) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.25).softmax(dim=-1), v)


def baddbmm(q, k, v):
    q, k, v = (heads(x).reshape(BATCH * HEADS, LENGTH, DIM) for x in (q, k, v))
    empty = torch.empty(BATCH * HEADS, LENGTH, LENGTH)
    logits = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.bmm(logits.softmax(dim=-1), v)


def einsum_heads_first(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


def einsum_tokens_first(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in (q, k, v))
    weights = (torch.einsum("blhd,bshd->bhls", q, k) / 4).softmax(-1)
    return torch.einsum("bshd,bhls->blhd", v, weights)


def einsum_with_dots(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.einsum("...id, ...jd", q * 0.5, k * 0.5).softmax(-1)
    return torch.einsum("... i j, ... j d -> ... i d", weights, v)


def scaled_in_place(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = torch.matmul(q, k.transpose(-1, -2)).mul_(2.0)
    logits /= math.sqrt(k.size(-1))
    return logits.softmax(-1) @ v


def grouped(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def grouped_and_repeated(q, k, v):
    q, k, v = map(heads, (q, k, v))
    k, v = (x[:, 1:].repeat_interleave(HEADS, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def grouped_and_expanded(q, k, v):
    q, k, v = map(heads, (q, k, v))
    k, v = (x[:, 1:, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for x in (k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def exponentials(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT * 0.25).exp()
    return weights / weights.sum(-1)[..., None] @ v


def exponentials_of_differences(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    return (weights / torch.sum(weights, dim=-1, keepdim=True)) @ v


def exponentials_in_place(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = (q @ k.mT).float()
    logits -= logits.max(-1, keepdim=True)[0]
    weights = logits.mul_(0.25).exp_()
    weights /= weights.sum(-1, keepdim=True)
    return weights.to(v.dtype) @ v


def exponential_of_log_softmax(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.log_softmax(q @ k.mT * 0.25, dim=-1).exp() @ v


def exponential_less_logsumexp(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT * 0.25
    return torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)) @ v


def divided_after_the_product(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT * 0.25
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return (weights.to(v.dtype) @ v).float() / weights.sum(-1)[..., None]


def einsum_divided_in_place(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.einsum("bhqd,bhkd->bhqk", q * 0.25, k).exp()
    output = torch.einsum("bhqk,bhkd->bhqd", weights, v)
    output /= weights.sum(dim=-1, keepdim=True)
    return output


def powers_of_two(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.exp2(q @ k.mT * (0.25 * math.log2(math.e)))
    return weights / weights.sum(-1, keepdim=True) @ v


def powers_of_two_divided_after_the_product(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = (q * (0.25 * math.log2(math.e))) @ k.mT
    weights = (logits - logits.amax(-1, keepdim=True)).exp2()
    return weights @ v / weights.sum(-1, keepdim=True)


def scaled_by_tensors(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q * k.new_tensor(0.5) @ k.mT * torch.tensor(0.25)
    return (logits / torch.tensor([[[1.5]], [[0.75]]])).softmax(-1) @ v


def scaled_by_tensors_without_heads(q, k, v):
    q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
    scale = torch.linspace(0.2, 0.5, BATCH * HEADS)[:, None, None]
    return (torch.bmm(q, k.mT) * scale).softmax(-1) @ v


def scaled_by_a_mean(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q.mean() * (q @ k.mT)).softmax(-1) @ v


def hidden_by_nothing(q, k, v):
    q, k, v = map(heads, (q, k, v))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return torch.where(mask, q @ k.mT * 0.25, -1e9).softmax(-1) @ v


def under_an_empty_bias(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, torch.zeros(LENGTH, LENGTH))


def keys_before_queries(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (v.mT @ (k @ q.mT).softmax(-2)).mT


def weights_turned(q, k, v):
    """A convolutional autoencoder's: channels first, weights turned behind the softmax."""
    q, k, v = (x.mT for x in (q, k, v))
    weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k) / 4, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))


def heads_after_keys(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in (q, k, v))
    logits = torch.einsum("bihd,bjhd->bijh", q, k) / 4
    logits = logits - logits.amax(2, keepdim=True)
    return torch.einsum("bijh,bjhd->bihd", torch.special.softmax(logits + 1.0, 2), v)


def times_the_inverse_of_the_sum(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT * 0.25).exp()
    return weights @ v * (1 / weights.sum(-1, keepdim=True))


def powers_of_a_number(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = 1.5 ** (q @ k.mT)
    return weights * torch.einsum("bhij->bhi", weights)[..., None].reciprocal() @ v


def softmin_of_the_opposite(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.softmin(-(q @ k.mT) * 0.25, dim=-1) @ v


def products_of_five_dimensions(q, k, v):
    q, k, v = (heads(x)[:, None] for x in (q, k, v))
    return ((q @ k.mT * 0.25).softmax(-1) @ v)[:, 0]


def sdpa_of_five_dimensions(q, k, v):
    q, k, v = (heads(x).unflatten(0, (1, BATCH)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 2)


def sdpa_of_two_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[1], k[1], v[1])


def one_head_of_keys(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k[:, :1].mT * 0.25).softmax(-1) @ v[:, :1]


def one_head_of_keys_by_einsum(q, k, v):
    q, k, v = heads(q), k[..., :DIM], v[..., :DIM]
    weights = torch.einsum("bhid,bjd->bhij", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", weights, v)


def grouped_by_einsum(q, k, v):
    """Of four heads, two share keys."""
    q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in (q, k, v))
    q = torch.stack([q, q * 2], 3)
    weights = torch.einsum("bigrd,bjgd->bgrij", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bgrij,bjgd->bigrd", weights, v)


def depth_of_two_dimensions(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, 2, DIM // 2)) for x in (q, k, v))
    weights = torch.einsum("bihcd,bjhcd->bhij", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bhij,bjhcd->bihdc", weights, v)


def normalized(q, k, v):
    q, k, v = map(heads, (q, k, v))
    q, k = F.normalize(q, dim=-1), k / k.norm(2, -1, keepdim=True).clamp_min(1e-6)
    return (q @ k.mT * 5).softmax(-1) @ v


def einsum_with_dots_and_capitals(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.einsum("...AC,...BC->...AB", q, k).mul(0.25).softmax(-1)
    return torch.einsum("...AB,...BD->...AD", weights, v)


def einsum_of_numbers(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4]).mul(0.25).softmax(-1)
    return torch.einsum(weights, [..., 0, 1], v, [..., 1, 2])


def linear_of_keys(q, k, v):
    return F.linear(F.linear(q[1], k[1]).mul(0.2).softmax(-1), v[1].T)


def inner(q, k, v):
    return torch.softmax(torch.inner(q[1], k[1]) / 5, -1).mm(v[1])


def tensordot(q, k, v):
    weights = torch.tensordot(k[1], q[1], dims=([-1], [1])).mul(0.2).softmax(0)
    return torch.tensordot(weights.t(), v[1], 1)


def by_other_names(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = torch.negative(torch.true_divide(torch.linalg.matmul(q, k.mT), -4.0))
    return torch.special.log_softmax(logits, -1).exp() @ v


def sdpa_of_aten(q, k, v):
    return torch.ops.aten.scaled_dot_product_attention(*map(heads, (q, k, v)))


def addmm(q, k, v):
    logits = torch.addmm(q.new_zeros(LENGTH), q[1], k[1].t(), beta=0, alpha=0.2)
    return logits.softmax(-1) @ v[1]


def keys_of_one_head(q, k, v):
    q, k, v = heads(q), k[1, :, :DIM], v[1, :, :DIM]
    return (q @ k.mT * 0.25).softmax(-1) @ v


def viewed(q, k, v):
    """Of which a view is taken, as it may be of what a product makes."""
    q, k, v = map(heads, (q, k, v))
    return ((q @ k.mT * 0.3).softmax(-1) @ v).view(BATCH * HEADS, LENGTH, DIM)


def cleared(q, k, v):
    """As SDPA is where rows may see nothing."""
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT * 0.25
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, logits.softmax(-1)) @ v


def normed_and_written(q, k, v):
    """A norm of several outputs, and a part that is written to, as rotary embeddings do."""
    q, k, v = map(heads, (q, k, v))
    q, k = F.layer_norm(q, (DIM,)), F.layer_norm(k, (DIM,))
    q[:, :, 10:] = q[:, :, 10:] * 2
    k[:, :, 10:] = k[:, :, 10:] * 2
    return F.scaled_dot_product_attention(q, k, v)


def rotated_into_empty_tensors(q, k, v):
    """As Wan's rotary embedding: each half is written for itself."""

    def rotated(x):
        a, b = x[..., 0::2], x[..., 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = a * 0.6 - b * 0.8
        out[..., 1::2] = a * 0.8 + b * 0.6
        return out

    q, k, v = map(heads, (q, k, v))
    return F.scaled_dot_product_attention(rotated(q), rotated(k), v)


def heads_apart_between_the_products(q, k, v):
    """As Megatron's: batch and heads are one dimension in the products, two in the softmax."""
    q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
    logits = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=0.25)
    weights = F.dropout(logits.view(BATCH, HEADS, LENGTH, LENGTH).softmax(-1), 0.1, training=False)
    return torch.bmm(weights.view(logits.shape), v).view(BATCH, HEADS, LENGTH, DIM)


def flattened(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    return logits.flatten(0, 1).softmax(-1).view_as(logits) @ v


FORMS = (
    sdpa, sdpa_of_three_dimensions, grouped, grouped_and_repeated, grouped_and_expanded, matmul,
    matmul_divided, scaled_before, scale_on_the_left,
    softmax_in_float32_with_dropout_off, bmm, baddbmm, einsum_heads_first, einsum_tokens_first,
    einsum_with_dots, scaled_in_place, exponentials, exponentials_of_differences,
    exponentials_in_place, exponential_of_log_softmax, exponential_less_logsumexp,
    divided_after_the_product, einsum_divided_in_place, powers_of_two,
    powers_of_two_divided_after_the_product, hidden_by_nothing, under_an_empty_bias,
    scaled_by_tensors, scaled_by_tensors_without_heads, scaled_by_a_mean,
)  # fmt: skip
LAYOUTS = (
    keys_before_queries, weights_turned, heads_after_keys, times_the_inverse_of_the_sum,
    powers_of_a_number, softmin_of_the_opposite, products_of_five_dimensions,
    sdpa_of_five_dimensions, sdpa_of_two_dimensions, one_head_of_keys, one_head_of_keys_by_einsum,
    grouped_by_einsum, depth_of_two_dimensions, linear_of_keys, inner, tensordot, addmm,
    normalized, keys_of_one_head, einsum_with_dots_and_capitals, einsum_of_numbers,
    heads_apart_between_the_products, flattened, by_other_names, sdpa_of_aten, cleared, viewed,
)  # fmt: skip


class Attention(nn.Module):
    """Self-attention of one form behind projections."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, HEADS * DIM) for _ in range(3))
        self.form = form

    def forward(self, x):
        return self.form(self.q(x), self.k(x), self.v(x))


def tokens():
    return torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(0))


def rewritten(module, x, density):
    """The output of the rewritten graph, and how many softmaxes are left in it."""
    left = []

    def backend(gm, inputs):
        sites = sparsify(gm, inputs, Config(**SMALL, density=density))
        assert [site.sparse for site in sites] == [True], sites
        gm.graph.eliminate_dead_code()
        gm.recompile()
        left.append(sum("softmax" in node.name for node in gm.graph.nodes))
        return gm.forward

    with torch.no_grad():
        return torch.compile(module, backend=backend, fullgraph=True)(x), left[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_found_and_density_one_leaves_its_result(form):
    """To rounding: float32 sums in another order, or one rounding of float16."""
    module, x = Attention(form).eval(), tokens()
    output, left = rewritten(module, x, 1.0)
    half = form is softmax_in_float32_with_dropout_off
    torch.testing.assert_close(output, module(x).detach(), rtol=0, atol=2e-3 if half else 2e-6)
    assert left == 0 and not torch.equal(rewritten(module, x, 0.3)[0], output)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_found_after_export(form):
    """The same forms in ATen."""
    module, x = Attention(form).eval(), tokens()
    program = torch.export.export(module, (x,))
    sparse, sites = sparsify_program(program, plan_of(Config(**SMALL, density=1.0)))
    assert [site.sparse for site in sites] == [True]
    half = form is softmax_in_float32_with_dropout_off
    torch.testing.assert_close(sparse.module()(x), module(x), rtol=0, atol=2e-3 if half else 2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "form",
    [
        sdpa, grouped, under_an_empty_bias, matmul, viewed, einsum_tokens_first,
        depth_of_two_dimensions, einsum_divided_in_place, hidden_by_nothing, scaled_by_tensors,
        heads_apart_between_the_products, normed_and_written, rotated_into_empty_tensors,
    ],
    ids=lambda form: form.__name__,
)  # fmt: skip
def test_a_form_is_found_in_core_aten(form):
    """Where every product is a bmm between views, and SDPA clears rows that see nothing."""
    module, x = Attention(form).eval(), tokens()
    program = torch.export.export(module, (x,)).run_decompositions()
    sparse, sites = sparsify_program(program, plan_of(Config(**SMALL, density=1.0)))
    assert [(site.kind, site.sparse) for site in sites] == [("self", True)]
    torch.testing.assert_close(sparse.module()(x), module(x), rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "parts",
    [
        lambda k: (k, k.flip(2)),
        lambda k: (k.flip(2), k),
        lambda k: (torch.zeros_like(k), k.flip(2)),
    ],
    ids=["written", "kept", "new"],
)
def test_keys_that_are_other_tokens_in_part_are_no_self_attention_in_core_aten(parts):
    """What is written into a tensor counts, and what is left of what was there."""

    def form(q, k, v):
        q, k, v = map(heads, (q, k, v))
        k, other = parts(k)
        k[..., 10:] = other[..., 10:]
        return F.scaled_dot_product_attention(q, k, v)

    program = torch.export.export(Attention(form).eval(), (tokens(),))
    for x in (program, program.run_decompositions()):
        _, (site,) = sparsify_program(x, plan_of(Config(**SMALL, density=1.0)))
        assert (site.kind == "self", site.sparse) == (False, False)


@torch.no_grad()
def test_tokens_written_into_a_part_of_new_tensors_are_unknown_in_core_aten():
    """They may be the same for queries and keys, which is no cross-attention."""

    def written(x):
        out = torch.zeros(x.shape)
        out[:, :, 5:] = x[:, :, 5:]
        return out

    def form(q, k, v):
        q, k, v = map(heads, (q, k, v))
        return F.scaled_dot_product_attention(written(q), written(k), v)

    program = torch.export.export(Attention(form).eval(), (tokens(),)).run_decompositions()
    _, (site,) = sparsify_program(program, plan_of(Config(**SMALL, density=1.0)))
    assert (site.kind, site.sparse) == ("unknown", False)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(1, 1), (2, 1)])
def test_core_aten_of_one_sample_or_one_head_is_found(sides):
    """Dimensions of size 1 come and go there."""
    batch, heads = sides

    def form(q, k, v):
        q, k, v = (x[:batch, :, : heads * DIM].unflatten(-1, (heads, DIM)) for x in (q, k, v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k) + torch.zeros(batch, 1, 1, LENGTH)
        return torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v)

    module, x = Attention(form).eval(), tokens()
    program = torch.export.export(module, (x,)).run_decompositions()
    sparse, sites = sparsify_program(program, plan_of(Config(**SMALL, density=1.0)))
    assert [(site.kind, site.sparse) for site in sites] == [("self", True)]
    torch.testing.assert_close(sparse.module()(x), module(x), rtol=0, atol=2e-6)


class OverVideo(nn.Module):
    """A form over the tokens of a video."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.attention = nn.Conv3d(3, 32, 1), Attention(form)

    def forward(self, video):
        return self.attention(self.patch(video).flatten(2).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS + LAYOUTS, ids=lambda form: form.__name__)
def test_every_form_has_the_grid_of_a_video(form):
    """Before and after export; in block order, density 1 is the form itself."""
    video = torch.randn(BATCH, 3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    module = OverVideo(form).eval()
    settings = {**SMALL, "reorder": "tile", "density": 1.0}
    (site,) = uta_fx.explain(module, video, config=Config(**settings)).sites
    assert (site.kind, site.grid, site.sparse) == ("self", (4, 5, 8), True)
    torch._dynamo.reset()
    options = {**settings, "inner": "eager"}
    compiled = torch.compile(module, backend="uta", fullgraph=True, options=options)
    program = torch.export.export(module, (video,))
    sparse, sites = sparsify_program(program, plan_of(Config(**settings)))
    assert [(x.grid, x.sparse) for x in sites] == [((4, 5, 8), True)]
    atol = 2e-3 if form is softmax_in_float32_with_dropout_off else 2e-6
    for output in (compiled(video), sparse.module()(video)):
        torch.testing.assert_close(output, module(video), rtol=0, atol=atol)


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_multi_head_attention_of_torch_is_found(need_weights):
    """Also where it makes weights that nobody asks for."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    x = tokens()
    output, _ = rewritten(First(), x, 1.0)
    torch.testing.assert_close(output, First()(x).detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("added", [False, True])
def test_the_padding_of_a_multi_head_attention_is_read_as_lengths(added):
    """A boolean key_padding_mask, or one that is added; density 1 is torch's own."""
    torch.manual_seed(0)
    lengths = torch.tensor([LENGTH, 70])

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()

        def forward(self, x):
            hidden = torch.arange(LENGTH) >= lengths[:, None]
            mask = torch.where(hidden, -torch.inf, 0.0) if added else hidden
            return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    module, x = Padded(), tokens()
    output, _ = rewritten(module, x, 1.0)
    torch.testing.assert_close(output[:, :70], module(x).detach()[:, :70], rtol=0, atol=2e-6)


def test_a_multi_head_attention_with_more_than_attention_stays_dense():
    """Its weights are asked for, or it has a mask or no batch: one site, with the reason."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(HEADS * DIM, HEADS, batch_first=True).eval()

        def forward(self, x, mask=None):
            asked = mask is None and x.dim() == 3
            output, weights = self.attention(x, x, x, attn_mask=mask, need_weights=asked)
            return (output, weights) if asked else output

    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for x, arguments, reason in (
        (tokens(), (), "returns its weights"),
        (tokens(), (mask,), "has attn_mask"),
        (tokens()[0], (), "has no batch"),
    ):
        found = uta_fx.explain(Weights(), x, *arguments, config=Config(**SMALL)).sites
        assert [site.reason for site in found] == [f"nn.MultiheadAttention {reason}"]


class Encoder(nn.Module):
    """Layers of torch over the tokens of a video."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 32, 1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, HEADS, 64, batch_first=True) for _ in range(2)
        )

    def forward(self, video):
        x = self.patch(video).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_the_encoder_layer_of_torch_is_named_or_found():
    """One operator, which says how to make it several; then both layers have the grid."""
    module, video = Encoder().eval(), torch.randn(BATCH, 3, 4, 5, 8)
    config = Config(**{**SMALL, "reorder": "tile"})
    fast = uta_fx.explain(module, video, config=config).sites
    assert [(site.kind, site.sparse) for site in fast] == [("self", False)] * 2
    assert "torch.backends.mha.set_fastpath_enabled(False)" in fast[0].reason
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch._dynamo.reset()
        found = uta_fx.explain(module, video, config=config).sites
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [(site.grid, site.sparse) for site in found] == [((4, 5, 8), True)] * 2


def capped(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.tanh(q @ k.mT / 50).mul(50).softmax(-1) @ v


def sharpened(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT).softmax(-1).pow(2) @ v


def wrong_dimension(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT).softmax(-2) @ v


def weights_returned(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def cleared_by_queries(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    empty = (logits == -torch.inf).all(-2, keepdim=True)
    return torch.where(empty, 0.0, logits.softmax(-1)) @ v


def dropped_out(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


def filled(q, k, v):
    q, k, v = map(heads, (q, k, v))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(mask, -torch.inf).softmax(-1) @ v


def filled_with_a_bias(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT).masked_fill(torch.ones(LENGTH, dtype=torch.bool), -2.0).softmax(-1) @ v


def filled_by_the_logits(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    few = logits.amax(-2, keepdim=True) < 0
    return logits.masked_fill(few, -torch.inf).softmax(-1) @ v


def filled_below_the_least(q, k, v):
    q, k, v = map(heads, (q, k, v))
    mask = torch.arange(LENGTH) >= 100
    return F.softmin((q @ k.mT).masked_fill(mask[None], -1e5), dim=-1) @ v


def over_no_dimension(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.log_softmax(q @ k.mT, _stacklevel=5).exp() @ v


def filled_twice(q, k, v):
    q, k, v = map(heads, (q, k, v))
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    logits = (q @ k.mT).masked_fill(mask, -torch.inf)
    return torch.where(mask, -torch.inf, logits).softmax(-1) @ v


def filled_and_negated(q, k, v):
    q, k, v = map(heads, (q, k, v))
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    return ((q @ k.mT).masked_fill(mask, -torch.inf) * -1.0).softmax(-1) @ v


def one_of_two_logits(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.where(torch.ones(LENGTH) > 0, q @ k.mT, k @ q.mT).softmax(-1) @ v


def times_twice_the_inverse_of_the_sum(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    return weights @ v * (2 / weights.sum(-1, keepdim=True))


def product_divided_by_another_sum(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + 1)


def product_divided_over_queries(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    return weights @ v / weights.sum(-2, keepdim=True).mT


def with_a_sink(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = torch.cat([q @ k.mT, q.new_zeros(BATCH, HEADS, LENGTH, 1)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def values_written_to(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    output = weights @ v
    v[:, :, 0] = 0.0
    return output / weights.sum(-1, keepdim=True)


def powers_of_two_under_a_bias(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = torch.exp2(q @ k.mT + torch.zeros(LENGTH))
    return weights / weights.sum(-1, keepdim=True) @ v


def biased(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT * 0.25 + torch.eye(LENGTH)).softmax(-1) @ v


def filled_and_turned(q, k, v):
    q, k, v = map(heads, (q, k, v))
    hidden = torch.arange(LENGTH)[:, None] >= 100
    return (k @ q.mT).masked_fill(hidden, -torch.inf).softmax(-2).mT @ v


def turned_less_than_each_key(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = k @ q.mT
    return (logits - logits.amax(-1, keepdim=True)).mT.softmax(-1) @ v


def over_one_bias_of_five_dimensions(q, k, v):
    q, k, v = (heads(x)[None] for x in (q, k, v))
    hidden = torch.arange(LENGTH) >= 100
    return F.scaled_dot_product_attention(q, k, v, ~hidden[None])


def keys_of_one_sample(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.scaled_dot_product_attention(q[:, None], k[None], v[None])


def keys_without_a_batch(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.scaled_dot_product_attention(q[:, :1], k[:, 0], v[:, 0])


def heads_apart_under_a_mask(q, k, v):
    q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
    mask = torch.arange(LENGTH) < 100
    logits = torch.where(mask, (q @ k.mT).unflatten(0, (BATCH, HEADS)), -torch.inf)
    return logits.softmax(-1).flatten(0, 1) @ v


def heads_turned_while_apart(q, k, v):
    q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
    weights = (q @ k.mT).unflatten(0, (BATCH, HEADS)).softmax(-1)
    return weights.transpose(0, 1).flatten(0, 1) @ v


def einsum_of_three(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).softmax(-1)
    return torch.einsum("bhij,bhjd,h->bihd", weights, v, torch.ones(HEADS))


def logits_of_three(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.einsum("bhid,bhjd,d->bhij", q, k, torch.ones(DIM)).softmax(-1) @ v


def logits_of_two_products(q, k, v):
    q, k, v = map(heads, (q, k, v))
    text, video = k.split([10, LENGTH - 10], 2)
    return torch.cat([q @ text.mT, q @ video.mT], -1).softmax(-1) @ v


def summed_by_broadcasting(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def values_summed_by_broadcasting(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1)
    return (weights * v.unsqueeze(2)).sum(-2)


def projected_keys_with_a_bias(q, k, v):
    return F.linear(q[0], k[0], q.new_ones(LENGTH)).softmax(-1) @ v[0]


@torch.library.custom_op("elsewhere::softmax", mutates_args=())
def not_a_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Of a library that has no more than the name in common with PyTorch."""
    return x.relu()


@torch.library.custom_op("elsewhere::matmul", mutates_args=())
def not_a_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Likewise."""
    return x @ y + 1


not_a_softmax.register_fake(lambda x, dim: torch.empty_like(x))
not_a_matmul.register_fake(lambda x, y: x @ y)


def softmax_of_elsewhere(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.ops.elsewhere.softmax(q @ k.mT, -1) @ v


def product_of_elsewhere(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.ops.elsewhere.matmul((q @ k.mT).softmax(-1), v)


def gumbel(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return F.gumbel_softmax(q @ k.mT, dim=-1) @ v


def values_of_one_sample(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT).softmax(-1) @ v[0, 0]


def mask_scaled(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return ((q @ k.mT + torch.zeros(LENGTH, LENGTH)) * 0.25).softmax(-1) @ v


def scale_of_logits(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    return (logits * logits.mean()).softmax(-1) @ v


def scale_of_tokens(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT * q.mean(-1, keepdim=True)).softmax(-1) @ v


def mask_scaled_by_a_tensor(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return ((q @ k.mT + torch.zeros(LENGTH, LENGTH)) * torch.tensor(0.25)).softmax(-1) @ v


def mask_added_twice(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return torch.add(q @ k.mT, torch.zeros(LENGTH, LENGTH), alpha=2).softmax(-1) @ v


def not_divided(q, k, v):
    q, k, v = map(heads, (q, k, v))
    return (q @ k.mT).exp() @ v


def divided_by_more(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    return weights / (weights.sum(-1, keepdim=True) + 1) @ v


def divided_over_queries(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).exp()
    return weights / weights.sum(-2, keepdim=True) @ v


def less_than_each_key(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    return (logits - logits.amax(-2, keepdim=True)).softmax(-1) @ v


def logits_scaled_by_a_statement(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    logits.mul_(0.25)
    return logits.softmax(-1) @ v


def logits_filled_by_a_statement(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    logits.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1) @ v


def logits_written_to(q, k, v):
    q, k, v = map(heads, (q, k, v))
    logits = q @ k.mT
    largest = logits.mul_(2).amax(-1, keepdim=True)
    return (logits - largest).softmax(-1) @ v


def scale_written_to(q, k, v):
    q, k, v = map(heads, (q, k, v))
    scale = q.mean()
    logits = q @ k.mT * scale
    scale.zero_()
    return logits.softmax(-1) @ v


def written_to(q, k, v):
    q, k, v = map(heads, (q, k, v))
    weights = (q @ k.mT).softmax(-1)
    k[:, :, 0] = 0.0
    return weights @ v


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (capped, "looks like attention, but tanh changes the logits"),
        (cleared_by_queries, "looks like attention, but where changes the weights"),
        (sharpened, "looks like attention, but pow changes the weights"),
        (wrong_dimension, "looks like attention, but its softmax is over dimension -2, which i"),
        (filled_and_turned, "looks like attention, but its products are laid out in a way"),
        (turned_less_than_each_key, "looks like attention, but sub changes the logits"),
        (over_one_bias_of_five_dimensions, "has an attention mask, or a scale, and several dimens"),
        (keys_of_one_sample, "its tensors differ in batch or heads"),
        (keys_without_a_batch, "its tensors differ in the number of dimensions"),
        (heads_apart_under_a_mask, "looks like attention, but its mask or scale is of logits that"),
        (heads_turned_while_apart, "looks like attention, but its products are laid out in a way"),
        (einsum_of_three, "looks like attention, but its weights go into an einsum of 3 tensors"),
        (logits_of_three, "looks like attention, but its logits come out of an einsum of 3 tensor"),
        (logits_of_two_products, "looks like attention, but its logits are of several products"),
        (summed_by_broadcasting, "looks like attention, but its logits come out of sum, which is"),
        (values_summed_by_broadcasting, "looks like attention, but its weights go into sum, which"),
        (projected_keys_with_a_bias, "looks like attention, but its logits come out of linear, wh"),
        (softmax_of_elsewhere, "looks like attention, but elsewhere::softmax is not known to be a"),
        (
            product_of_elsewhere,
            "looks like attention, but its weights go into elsewhere::matmul, ",
        ),
        (gumbel, "looks like attention, but gumbel_softmax is not known to be a plain softmax"),
        (values_of_one_sample, "looks like attention, but its products are laid out in a way that"),
        (weights_returned, "looks like attention, but its logits or weights are used elsewhere"),
        (dropped_out, "looks like attention, but it has dropout"),
        (filled, "its attention mask differs from query to query"),
        (filled_with_a_bias, "looks like attention, but its logits are filled with -2.0, which"),
        (filled_by_the_logits, "looks like attention, but its mask is computed from its logits"),
        (filled_below_the_least, "looks like attention, but its mask is scaled"),
        (over_no_dimension, "looks like attention, but its softmax does not say over which dim"),
        (filled_twice, "looks like attention, but it has two masks"),
        (filled_and_negated, "looks like attention, but its mask is scaled"),
        (one_of_two_logits, "looks like attention, but where changes the logits"),
        (times_twice_the_inverse_of_the_sum, "looks like attention, but its weights are not expon"),
        (product_divided_by_another_sum, "looks like attention, but its weights are not exponent"),
        (product_divided_over_queries, "looks like attention, but its weights are not exponentia"),
        (with_a_sink, "looks like attention, but getitem changes the weights"),
        (values_written_to, "looks like attention, but its queries, keys or values are"),
        (powers_of_two_under_a_bias, "looks like attention, but its mask is scaled"),
        (biased, "its attention mask differs from query to query"),
        (mask_scaled, "looks like attention, but its mask is scaled"),
        (scale_of_logits, "looks like attention, but its scale is computed from its logits"),
        (scale_of_tokens, "looks like attention, but its scale differs from token to token"),
        (mask_scaled_by_a_tensor, "looks like attention, but its mask is scaled"),
        (mask_added_twice, "looks like attention, but its mask is scaled"),
        (not_divided, "looks like attention, but its weights are not exponentials divided by"),
        (divided_by_more, "looks like attention, but its weights are not exponentials divided by"),
        (divided_over_queries, "looks like attention, but its softmax is over dimension -2, which"),
        (less_than_each_key, "looks like attention, but sub changes the logits"),
        (logits_scaled_by_a_statement, "looks like attention, but its logits or weights are used"),
        (logits_filled_by_a_statement, "looks like attention, but its logits or weights are used"),
        (logits_written_to, "looks like attention, but its logits are written to"),
        (scale_written_to, "looks like attention, but its queries, keys or values are wr"),
        (written_to, "looks like attention, but its queries, keys or values are wr"),
    ],
)
def test_a_near_miss_stays_dense_and_says_which_condition_failed(form, reason):
    """One site each, with the condition."""
    (site,) = uta_fx.explain(Attention(form).eval(), tokens(), config=Config(**SMALL)).sites
    assert not site.sparse and re.match(reason, site.reason), site.reason
    assert site.expected and (site.kind, site.length_kv) == ("self", LENGTH)


def test_heads_may_attend_one_by_one():
    """A site each, of two dimensions; density 1 is the loop itself."""

    def loop(q, k, v):
        heads = zip(*(x[0].unflatten(-1, (HEADS, DIM)).unbind(1) for x in (q, k, v)), strict=True)
        return torch.stack([(q @ k.T * 0.25).softmax(-1) @ v for q, k, v in heads], 1)

    module, x = Attention(loop).eval(), tokens()
    sites = uta_fx.explain(module, x, config=Config(**SMALL)).sites
    assert [(site.sparse, site.shape) for site in sites] == [(True, (1, 1, LENGTH, DIM))] * HEADS
    torch._dynamo.reset()
    options = {**SMALL, "density": 1.0, "inner": "eager", "strict": True}
    with torch.no_grad():
        compiled = torch.compile(module, backend="uta", fullgraph=True, options=options)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=2e-6)


def test_a_convolution_of_one_position_is_a_projection():
    """As in the attention of autoencoders; one of several positions is not."""

    class Convolutions(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.patch = nn.Conv3d(3, 32, 1)
            convolution = nn.Conv1d(32, HEADS * DIM, size, padding=size // 2)
            self.q, self.k, self.v = (copy.deepcopy(convolution) for _ in range(3))

        def forward(self, video):
            x = self.patch(video).flatten(2)
            return matmul(*(f(x).mT for f in (self.q, self.k, self.v)))

    video, config = torch.randn(1, 3, 4, 5, 8), Config(**SMALL)
    (site,) = uta_fx.explain(Convolutions(1), video, config=config).sites
    assert site.sparse and site.grid == (4, 5, 8)
    (site,) = uta_fx.explain(Convolutions(3), video, config=config).sites
    assert not site.sparse and site.kind == "unknown"


@torch.no_grad()
@pytest.mark.parametrize("form", [einsum_tokens_first, sdpa_of_three_dimensions, grouped])
def test_a_form_goes_all_the_way_through_the_backend(form):
    """Layouts that are brought to [B, H, L, D] first, with the compiler behind the passes."""
    module, x = Attention(form).eval(), tokens()
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        options = {**SMALL, "density": 1.0, "inner": inner, "strict": True}
        compiled = torch.compile(module, backend="uta", fullgraph=True, options=options)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=2e-6)


class Parted(nn.Module):
    """Video queries alone, on keys of the text before and after them and of the video."""

    def __init__(self, mask=None, first=0):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 32, 1), nn.Linear(32, 3 * HEADS * DIM)
        self.mask, self.first = mask, first

    def forward(self, video, text):
        video = self.patch(video).flatten(2).transpose(1, 2)
        x = torch.cat([text[:, :5], video, text[:, 5:]], 1)
        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        stop = 5 + video.shape[1]
        return F.scaled_dot_product_attention(q[:, :, self.first : stop], k, v, self.mask)


@torch.no_grad()
def test_queries_may_be_the_video_alone():
    """As where text is causal and attends by itself; density 1 is dense."""
    video, text = torch.randn(BATCH, 3, 4, 6, 8), torch.randn(BATCH, 12, 32)
    settings = {"min_tokens": 128, "block_q": 32, "block_kv": 32}
    module = Parted(first=5)
    (site,) = uta_fx.explain(module, video, text, config=Config(**settings)).sites
    assert site.sparse and (site.kind, site.grid, site.text) == ("joint", (4, 6, 8), (5, 7))
    assert (site.shape[2], site.length_kv) == (192, 204)
    products = 4 * BATCH * HEADS * 192 * DIM
    assert site.cost.dense == products * 204 and site.cost.sparsified == products * 192
    outputs = []
    for density in (1.0, 0.3):
        torch._dynamo.reset()
        options = {**settings, "density": density, "inner": "aot_eager"}
        compiled = torch.compile(module, backend="uta", fullgraph=True, options=options)
        outputs.append(compiled(video, text))
    torch.testing.assert_close(outputs[0], module(video, text), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Parted(), "its queries are a part of its tokens, but not the video alone"),
        (Parted(torch.zeros(192, 204), 5), "has an attention mask for queries that are a part of"),
    ],
)
def test_other_parts_of_the_tokens_stay_dense(module, reason):
    """Text among the queries, or a mask."""
    inputs = torch.randn(BATCH, 3, 4, 6, 8), torch.randn(BATCH, 12, 32)
    (site,) = uta_fx.explain(module, *inputs, config=Config(min_tokens=128)).sites
    assert not site.sparse and site.reason.startswith(reason), site.reason


def test_what_is_not_attention_is_no_site():
    """A softmax alone, two products without one, a router, linear attention, a pooling."""

    def router(q, k, v):
        return q.softmax(-1) * k @ v.mT

    def linear(q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)

    def pooling(q, k, v):
        return (q.softmax(1) * v).sum(1)

    for form in (router, linear, pooling):
        assert not uta_fx.explain(Attention(form).eval(), tokens(), config=Config(**SMALL)).sites


class Rotated(nn.Module):
    """Queries and keys of a clip, each rotated by a table that is made for it alone."""

    def __init__(self, between):
        super().__init__()
        self.patch = nn.Conv3d(3, HEADS * DIM, (1, 2, 2), (1, 2, 2))
        self.to_qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.between = between

    def forward(self, clip, rows, columns):
        x = self.patch(clip)
        frames, height, width = x.shape[2:]
        q, k, v = self.to_qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)

        def table():
            down = rows[:height, None].expand(-1, width, -1)
            along = columns[None, :width].expand(height, -1, -1)
            return (down + along).expand(frames, -1, -1, -1).flatten(0, 2)

        q = heads(q) * table()
        rows, columns = self.between(rows, columns)
        k = heads(k) * table()
        return F.scaled_dot_product_attention(q, k, heads(v))


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (lambda *tables: tables, "self"),
        (lambda rows, columns: (rows.flip(0), columns), "cross"),
        (lambda rows, columns: (rows + torch.rand_like(rows), columns), "cross"),
    ],
)
def test_tables_that_are_made_alike_are_one(between, kind):
    """Not those of other tensors, nor of random ones: such keys have more to their positions."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in ((1, 3, 4, 16, 20), (9, DIM))]
    program = torch.export.export(Rotated(between), (*inputs, inputs[1].clone().repeat(2, 1)))
    _, (site,) = sparsify_program(program, plan_of(Config(**SMALL)))
    assert site.kind == kind
    assert site.sparse == (kind == "self")
