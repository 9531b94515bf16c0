"""Policy svg2: k-means, blocks of clusters, its rule, and the operator over blocks of any size."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, double
from torch._dynamo.testing import CompileCounterWithBackend

import uta_fx
from uta_fx import Config, sparse_attention
from uta_fx.attention import ContinuedSite, SparseSite, clustered_attention
from uta_fx.clusters import Centroids, first_centroids, padded_blocks, sort_into_blocks
from uta_fx.flops import sparse_cost
from uta_fx.kernels import ops, reference
from uta_fx.policies import SVG2
from uta_fx.policies.svg2 import keep_clusters
from uta_fx.tails import KINDS

pytest.importorskip("triton", reason="needs Triton")

from uta_fx.kernels import triton_attention, triton_kmeans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {
    "operator": (ops.kmeans, ops.clustered_attention),
    "triton": (triton_kmeans.kmeans, triton_attention.clustered_attention),
}
SMALL = {"block_q": 32, "block_kv": 16}
FEW = SVG2(query_clusters=5, key_clusters=9, mass=0.6, least=0.1, iterations=4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(length=150, dim=24, dim_v=24, batch=2, heads=2):
    """q, k, v around a few centres, so that clusters differ in size."""
    centres, which = 2 * randn(7, dim), randn(3, batch, heads, length, seed=1).mul(2).long() % 7
    q, k, v = centres[which] + 0.4 * randn(3, batch, heads, length, dim, seed=2)
    return q, k, v[..., :1] * randn(dim_v, seed=3) + randn(batch, heads, length, dim_v, seed=4)


# --- k-means


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("length", "dim", "clusters", "iterations"),
    [(150, 24, 9, 1), (70, 64, 70, 3), (200, 16, 1, 2), (100, 200, 17, 5)],
)
def test_kmeans_is_lloyds_algorithm(kernel, length, dim, clusters, iterations):
    """Float32 distances of random tokens order them as float64 does, but for ties that these lack.

    A mean errs by a rounding for each of its members at most.
    """
    tokens = randn(2, 3, length, dim)
    start = first_centroids(tokens, clusters, 0)
    labels, centroids, sizes = KERNELS[kernel][0](tokens.to(DEVICE), start.to(DEVICE), iterations)
    expected = reference.kmeans(tokens.double(), start.double(), iterations)
    assert torch.equal(labels.cpu(), expected[0]) and torch.equal(sizes.cpu(), expected[2])
    error = (centroids.cpu() - expected[1]).abs().max()
    assert error <= 2**-24 * length * tokens.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter multiplies bfloat16 wrongly without an error
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
def test_kmeans_in_half_precision_takes_a_nearest_centroid(kernel, dtype):
    """Centroids are rounded to the tokens' dtype: a distance moves by 2 |x| |c| half a unit."""
    tokens = randn(1, 2, 90, 32).to(DEVICE, dtype)
    start = first_centroids(tokens, 11, 0) + 0.1
    labels, centroids, sizes = KERNELS[kernel][0](tokens, start, 1)
    x, c = tokens.double(), start.double()
    distance = (x[:, :, :, None] - c[:, :, None]).square().sum(-1)
    taken = distance.gather(-1, labels.long()[..., None])[..., 0]
    slack = torch.finfo(dtype).eps * x.norm(dim=-1) * c.norm(dim=-1).amax() * 2
    assert (taken <= distance.amin(-1) + slack).all()
    members = F.one_hot(labels.long(), 11).double()
    assert torch.equal(members.sum(2), sizes.double())
    means = members.mT @ x / sizes.clamp(min=1)[..., None]
    means = torch.where(sizes[..., None] > 0, means, c)
    assert (centroids - means).abs().max() <= 2**-24 * 90 * x.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_cluster_stays_where_it_is(kernel):
    """And of two equal centroids the first takes the tokens."""
    tokens = randn(1, 1, 40, 16)
    start = torch.stack([torch.zeros(16), torch.full((16,), 99.0), torch.zeros(16)])[None, None]
    labels, centroids, sizes = KERNELS[kernel][0](tokens.to(DEVICE), start.to(DEVICE), 1)
    assert sizes.tolist() == [[[40, 0, 0]]] and not labels.any()
    assert torch.equal(centroids[0, 0, 1:].cpu(), start[0, 0, 1:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_kmeans_gives_the_same_bits_twice(kernel):
    """No sum depends on who comes first."""
    tokens = randn(1, 2, 300, 32).half().to(DEVICE)
    start = first_centroids(tokens, 7, 0)
    first, second = (KERNELS[kernel][0](tokens, start, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kmeans_takes_strided_tokens_and_leaves_its_start_alone():
    """Transposed [B, L, H, D] views, as models hand them over."""
    tokens = randn(2, 50, 3, 16).transpose(1, 2)
    start = first_centroids(tokens, 5, 0)
    before = start.clone()
    for kmeans, _ in KERNELS.values():
        labels, *_ = kmeans(tokens.to(DEVICE), start.to(DEVICE), 2)
        assert torch.equal(labels.cpu(), reference.kmeans(tokens, before, 2)[0])
    assert torch.equal(start, before)


def test_the_start_is_distinct_tokens_and_moves_with_the_seed():
    tokens = torch.arange(96.0)[None, None, :, None].expand(1, 1, 96, 16)
    for clusters in (1, 5, 96):
        chosen = first_centroids(tokens, clusters, 0)[0, 0, :, 0].tolist()
        assert len(set(chosen)) == clusters
        assert first_centroids(tokens, clusters, 1)[0, 0, 0, 0] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"centroids": torch.zeros(1, 1, 0, 16)}, ValueError, "at least 1 a head, got 0"),
        ({"centroids": torch.zeros(1, 2, 3, 16)}, ValueError, "centroids must have shape"),
        ({"centroids": torch.zeros(1, 1, 3, 16).half()}, TypeError, "centroids must be"),
        ({"tokens": torch.zeros(1, 20, 16)}, ValueError, "tokens must be"),
    ],
)
def test_kmeans_refuses_by_name(change, error, message):
    inputs = {"tokens": randn(1, 1, 20, 16), "centroids": randn(1, 1, 3, 16), "iterations": 1}
    with pytest.raises(error, match=message):
        ops.kmeans(**(inputs | change))


# --- the operator


def counted_case(**fields):
    """Arguments of ``clustered_attention``: counts of every kind, an empty block in each list."""
    arguments = Case(length_kv=256, **fields).inputs()
    counts = randn(2, 3, 4).mul(40).abs().int().clamp(max=64)
    counts[..., 1], counts[..., 2] = 0, 64
    return [*arguments[:5], counts, *arguments[5:]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("dims", [(32, 32), (24, 64)], ids=str)
def test_padding_is_seen_by_nobody(kernel, tail, dims):
    """As the reference in float64, to ten roundings; and padding of any value changes nothing."""
    arguments = counted_case(tail=tail, dim=dims[0], dim_v=dims[1])
    exact, exact_lse = reference.clustered_attention(*double(arguments))
    inside = torch.arange(64) < arguments[5][..., None]  # [B, H, Nk, block_kv]
    results = []
    for filling in (0.0, 1e4):
        for place in (1, 2):
            padding = ~inside.flatten(2, 3)[..., None]
            arguments[place] = arguments[place].masked_fill(padding, filling)
        on_device = [x.to(DEVICE) if torch.is_tensor(x) else x for x in arguments]
        output, lse = (x.cpu() for x in KERNELS[kernel][1](*on_device))
        assert (output - exact).abs().max() <= 10 * 2**-23 * exact.abs().max()
        assert torch.equal(lse.isinf(), exact_lse.isinf())
        finite = ~exact_lse.isinf()
        assert (lse - exact_lse)[finite].abs().max() <= 10 * 2**-23 * exact_lse[finite].abs().max()
        results.append(output)
    assert torch.equal(*results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_full_blocks_are_sparse_attention(kernel):
    """And a row whose listed blocks are all empty is zero, with log-sum-exp -inf."""
    arguments = [x.to(DEVICE) if torch.is_tensor(x) else x for x in counted_case(tail="none")]
    plain = ops.sparse_attention(*arguments[:5], *arguments[6:])
    arguments[5] = torch.full_like(arguments[5], 64)
    for expected, got in zip(plain, KERNELS[kernel][1](*arguments), strict=True):
        torch.testing.assert_close(got, expected)
    arguments[5] = torch.zeros_like(arguments[5])
    output, lse = KERNELS[kernel][1](*arguments)
    assert not output.any() and (lse == -torch.inf).all()


def test_the_operators_keep_the_rules_of_pytorch():
    """Schemas, fakes and dispatch, as ``torch.library.opcheck`` sees them."""
    torch.library.opcheck(torch.ops.uta.clustered_attention.default, tuple(counted_case()))
    tokens = randn(1, 2, 30, 16)
    start = first_centroids(tokens, 4, 0)
    torch.library.opcheck(torch.ops.uta.kmeans.default, (tokens, start, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[:, :, :3], ValueError, "key_counts must have shape"),
        (lambda x: x.long(), TypeError, "key_counts must be torch.int32"),
    ],
)
def test_counts_are_checked(change, error, message):
    arguments = counted_case()
    arguments[5] = change(arguments[5])
    with pytest.raises(error, match=message):
        ops.clustered_attention(*arguments)


def test_a_last_block_must_be_whole():
    arguments = counted_case()
    arguments[1], arguments[2] = arguments[1][:, :, :250], arguments[2][:, :, :250]
    with pytest.raises(ValueError, match="multiple of block_kv, 64, got 250"):
        ops.clustered_attention(*arguments)


# --- blocks of clusters


@pytest.mark.parametrize("sizes", [[3, 0, 40, 16, 1], [60, 0, 0, 0, 0], [12] * 5, [0, 0, 0, 59, 1]])
def test_clusters_lie_one_after_another_from_the_start_of_a_block(sizes):
    """Against a walk through the tokens, one by one; a cluster keeps the order of its tokens."""
    labels = torch.arange(5).repeat_interleave(torch.tensor(sizes))[torch.randperm(60)].int()
    blocks = sort_into_blocks(labels[None, None], torch.tensor(sizes).int()[None, None], 16)
    total = padded_blocks(60, 5, 16)
    assert total * 16 <= 60 + 5 * 15 < (total + 1) * 16
    rows, counts, clusters = [], [], []
    for cluster in range(5):
        members = (labels == cluster).nonzero().flatten()
        for block in members.split(16) if len(members) else ():
            rows.append(block)
            counts.append(len(block))
            clusters.append(cluster)
    assert blocks.count[0, 0].tolist() == counts + [0] * (total - len(counts))
    assert blocks.cluster[0, 0, : len(counts)].tolist() == clusters
    for place, block in enumerate(rows):
        assert torch.equal(blocks.token[0, 0, place * 16 :][: len(block)], block)
    x = randn(1, 1, 60, 8)
    assert torch.equal(blocks.scatter(blocks.gather(x)), x)


def test_statistics_are_those_of_the_true_tokens():
    """Means, variances and the covariance, block by block in float64; padding does not enter.

    The allowance is a few float32 roundings of sums over a block.
    """
    _, key, value = (x.double() + 3 for x in tokens_of(dim=16, dim_v=32))
    labels, _, sizes = reference.kmeans(key, first_centroids(key, 6, 0), 2)
    blocks = sort_into_blocks(labels, sizes, 16)
    got = blocks.statistics(blocks.gather(key.float()), blocks.gather(value.float()))
    covariance = torch.zeros_like(got.covariance, dtype=torch.float64)
    for b, h, n in itertools.product(range(2), range(2), range(blocks.count.shape[2])):
        count = int(blocks.count[b, h, n])
        assert got.size[b, h, n] == count
        if not count:
            assert got.log_size[b, h, n] == -torch.inf and not got.key_mean[b, h, n].any()
            continue
        token = blocks.token[b, h, n * 16 :][:count]
        k, v = key[b, h, token], value[b, h, token]
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(got.key_mean[b, h, n], k.mean(0), **close)
        torch.testing.assert_close(got.key_variance[b, h, n], k.var(0, correction=0), **close)
        torch.testing.assert_close(got.value_mean[b, h, n], v.mean(0), **close)
        spread = v.var(0, correction=0).sum()
        torch.testing.assert_close(got.value_variance[b, h, n], spread, **close)
        covariance[b, h] += (k - k.mean(0)).T @ (v - v.mean(0)) / 150
    torch.testing.assert_close(got.covariance.double(), covariance, rtol=1e-4, atol=1e-5)


# --- the rule and the whole


@pytest.mark.parametrize(
    ("attention", "mass", "least", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.9, 0.0, [True, True, True, False]),  # crosses at the third
        ([0.05, 0.5, 0.15, 0.3], 0.9, 0.0, [False, True, True, True]),  # whatever the order
        ([0.95, 0.03, 0.01, 0.01], 0.9, 0.0, [True, False, False, False]),  # the best in any case
        ([0.95, 0.03, 0.01, 0.01], 0.9, 0.5, [True, True, False, False]),  # at least half of four
        ([0.95, 0.03, 0.01, 0.01], 0.9, 0.49, [True, False, False, False]),  # int(1.96) is 1
        ([0.25, 0.25, 0.25, 0.25], 0.5, 0.0, [True, True, True, False]),  # <= and not <
    ],
)
def test_clusters_are_kept_as_published(attention, mass, least, kept):
    assert keep_clusters(torch.tensor(attention), mass, least).tolist() == kept


def restated(query, key, value, policy, tail):
    """SVG2 of one head in float64, token by token: its output, and the share of pairs it keeps."""
    labels, centroids, sizes = {}, {}, {}
    for name, x, clusters in (
        ("q", query, policy.query_clusters), ("k", key, policy.key_clusters)
    ):  # fmt: skip
        found = reference.kmeans(
            x[None, None], first_centroids(x[None, None], clusters, policy.seed).double(),
            policy.iterations,
        )  # fmt: skip
        labels[name], centroids[name], sizes[name] = (y[0, 0] for y in found)
    scale = query.shape[-1] ** -0.5
    weight = (scale * centroids["q"] @ centroids["k"].T).exp() * sizes["k"]
    weight = weight / weight.sum(-1, keepdim=True)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for a in range(len(weight)):
        held = 0.0
        for rank, b in enumerate(sorted(range(weight.shape[1]), key=lambda b: -weight[a, b])):
            kept[a, b] = (
                rank == 0 or held <= policy.mass or rank < int(policy.least * weight.shape[1])
            )
            held += weight[a, b].item()
    exact = kept[labels["q"].long()][:, labels["k"].long()]
    logits = (scale * query @ key.T).masked_fill(~exact, -torch.inf)
    if tail == "none":
        return logits.softmax(-1) @ value, exact.double().mean().item()
    present = sizes["k"] > 0
    members = F.one_hot(labels["k"].long(), len(sizes["k"])).double()
    means = members.T @ value / sizes["k"].clamp(min=1)[:, None]
    mean_logits = scale * query @ centroids["k"].T + sizes["k"].double().log()
    mean_logits = mean_logits.masked_fill(kept[labels["q"].long()] | ~present, -torch.inf)
    weights = torch.cat([logits, mean_logits], 1).softmax(-1)
    return weights @ torch.cat([value, means]), exact.double().mean().item()


@pytest.mark.parametrize("tail", ["none", "block"])
@pytest.mark.parametrize("dim_v", [24, 40])
def test_svg2_is_its_float64_restatement(tail, dim_v):
    """A ragged length, a batch, another head dim for values; not all and not nothing is kept.

    Clusters are smaller than a block, so that the tail has one representative for each.
    """
    q, k, v = tokens_of(length=203, dim_v=dim_v)
    policy = SVG2(query_clusters=7, key_clusters=30, mass=0.6, least=0.1, iterations=3)
    config = Config(policy=policy, tail=tail, block_q=32, block_kv=64)
    output = sparse_attention(q, k, v, config=config)
    for b, h in itertools.product(range(2), range(2)):
        expected, density = restated(*(x[b, h].double() for x in (q, k, v)), policy, tail)
        assert 0.1 < density < 0.7
        assert (output[b, h] - expected).abs().max() <= 1e-5 * v.abs().max()


@pytest.mark.parametrize("tail", [kind for kind in KINDS if kind != "rectified"])
def test_all_clusters_kept_is_dense_attention(tail):
    """In a batch, of a length that no block divides; a few float32 roundings of the sums."""
    q, k, v = tokens_of(length=149)
    policy = SVG2(query_clusters=5, key_clusters=40, least=1.0, iterations=2)
    output = sparse_attention(q, k, v, config=Config(policy=policy, tail=tail, **SMALL))
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    ["single", "bins", "block", "first_order", "gaussian", uta_fx.tails.Tail(slope="query_block")],
)
def test_a_tail_errs_less_than_none(tail):
    """The paper's claim, on tokens around centres."""
    q, k, v = tokens_of()
    dense = F.scaled_dot_product_attention(q, k, v)
    dropped, aggregated = (
        (sparse_attention(q, k, v, config=Config(policy=FEW, tail=t, **SMALL)) - dense)
        .square()
        .mean()
        for t in ("none", tail)
    )
    assert aggregated < 0.75 * dropped


def test_text_stays_exact():
    """Text around the video is no part of a cluster; with everything kept all is dense."""
    q, k, v = tokens_of()
    config = Config(policy=SVG2(query_clusters=3, key_clusters=4, least=1.0, iterations=2), **SMALL)
    output = sparse_attention(q, k, v, config=config, text=(7, 12))
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


def test_samples_and_heads_do_not_see_each_other():
    q, k, v = tokens_of()
    config = Config(policy=FEW, **SMALL)
    whole = sparse_attention(q, k, v, config=config)
    for b, h in itertools.product(range(2), range(2)):
        alone = sparse_attention(*(x[b : b + 1, h : h + 1] for x in (q, k, v)), config=config)
        torch.testing.assert_close(whole[b : b + 1, h : h + 1], alone)


def test_a_step_goes_on_from_the_centroids_of_the_one_before():
    """Two steps of 3 and 2 iterations end where one of 5 ends, and the start is left alone."""
    q, k, v = tokens_of()
    config = Config(policy=SVG2(query_clusters=5, key_clusters=9, iterations=3), **SMALL)
    _, centroids = clustered_attention(q, k, v, config=config)
    kept = [x.clone() for x in centroids]
    output, after = clustered_attention(q, k, v, centroids, config=config)
    assert all(torch.equal(a, b) for a, b in zip(kept, centroids, strict=True))
    once = Config(policy=SVG2(query_clusters=5, key_clusters=9, iterations=5), **SMALL)
    expected, end = clustered_attention(q, k, v, config=once)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(after, end, strict=True))


def test_centroids_are_inputs_of_a_compiled_graph():
    """Two graphs, one to start and one to go on, however many steps there are."""
    q, k, v = tokens_of()
    config = Config(policy=FEW, **SMALL)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(q, k, v, centroids):
        return clustered_attention(q, k, v, centroids, config=config)

    got = expected = None
    with torch.no_grad():
        for noise in range(4):
            inputs = (q + noise / 10, k + noise / 10, v)
            output, got = step(*inputs, got)
            reference_output, expected = clustered_attention(*inputs, expected, config=config)
            torch.testing.assert_close(output, reference_output)
    assert counter.frame_count == 2


def test_the_backend_runs_it():
    """A model's graph, rewritten: what the eager call gives, and no graph for a second call."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x).view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    model = Attention().eval()
    options = {"policy": FEW, "min_tokens": 16, "strict": True, "inner": "aot_eager", **SMALL}
    compiled = torch.compile(model, backend="uta", options=options, fullgraph=True)
    config = Config(policy=FEW, **SMALL)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            x = randn(1, 120, 32, seed=seed)
            q, k, v = model.qkv(x).view(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
            torch.testing.assert_close(compiled(x), sparse_attention(q, k, v, config=config))


class TwoLayers(torch.nn.Module):
    """Self-attention twice."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def split(self, x):
        return self.qkv(x).view(len(x), -1, 3, 2, 16).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        for _ in range(2):
            output = F.scaled_dot_product_attention(*self.split(x))
            x = x + output.transpose(1, 2).flatten(2)
        return x, x.shape[1]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_compiled_graph_keeps_the_centroids_of_each_site(inner):
    """As eager calls that hand them on; and no step is compiled anew.

    The first call is under inference mode, as some pipelines run, the next under another.
    """
    policy = SVG2(query_clusters=5, key_clusters=9, mass=0.6, continued=2, keep=True)
    options = {"policy": policy, "min_tokens": 16, "strict": True, "inner": inner, **SMALL}
    torch.manual_seed(0)
    model = TwoLayers().eval()
    compiled = torch.compile(model, backend="uta", options=options, fullgraph=True)
    config = Config(policy=policy, **SMALL)
    nothing = Centroids(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 9, 16))
    kept = [nothing, nothing]

    def step(seed):
        x = randn(2, 120, 32, seed=seed)
        got, length = compiled(x)
        for layer in range(2):
            q, k, v = model.split(x)
            output, kept[layer] = clustered_attention(q, k, v, kept[layer], config=config)
            x = x + output.transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, x)
        assert length == 120

    with torch.inference_mode():
        step(0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(1)
            step(2)


def test_a_kept_state_changes_the_next_call():
    """The test above can fail: the same input twice, and the second time it starts elsewhere."""
    policy = SVG2(query_clusters=5, key_clusters=9, mass=0.6, continued=1, keep=True)
    options = {"policy": policy, "min_tokens": 16, "inner": "aot_eager", **SMALL}
    torch.manual_seed(0)
    compiled = torch.compile(TwoLayers().eval(), backend="uta", options=options, fullgraph=True)
    with torch.no_grad():
        first, second = (compiled(randn(1, 120, 32))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_site_with_text_and_mask_goes_on_too():
    """What a graph's call becomes, by itself: the mask comes before the centroids."""
    q, k, v = tokens_of()
    mask = torch.ones(1, 1, 1, 150, dtype=torch.bool)
    mask[..., -4:] = False
    config = Config(policy=FEW, **SMALL)
    site = ContinuedSite(SparseSite(config, None, None, video=(7, 131)))
    zeros = [torch.zeros(shape) for shape in site.state_shapes(q)]
    output, *centroids = site(q, k, v, mask, *zeros)
    expected, found = clustered_attention(
        q, k, v, Centroids(*zeros), config=config, text=(7, 12), attn_mask=mask
    )
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(centroids, found, strict=True))


def test_blocks_that_share_their_code_keep_nothing():
    config = Config(policy=SVG2(keep=True), grid=(4, 4, 4))
    with pytest.raises(ValueError, match="blocks=True needs a policy with keep=False"):
        uta_fx.enable(TwoLayers().eval(), config, blocks=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SVG2(query_clusters=0), "query_clusters must be at least 1, got 0"),
        (lambda: SVG2(key_clusters=0), "key_clusters must be at least 1, got 0"),
        (lambda: SVG2(mass=1.5), r"mass must be in \(0, 1\], got 1.5"),
        (lambda: SVG2(least=-0.1), r"least must be in \[0, 1\], got -0.1"),
        (lambda: SVG2(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: SVG2(continued=0), "continued must be at least 1, got 0"),
        (lambda: SVG2(seed=-1), "seed must be at least 0, got -1"),
        (lambda: Config(policy="svg2", tail="rectified"), "tail rectified .* policy svg2"),
    ],
)
def test_parameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_clusters_than_tokens_names_the_field_and_the_remedy():
    q, k, v = tokens_of()
    for name in ("query_clusters", "key_clusters"):
        config = Config(policy=SVG2(**{name: 151}))
        with pytest.raises(ValueError, match=f"{name} .* 150, got 151: pass fewer, or None"):
            sparse_attention(q, k, v, config=config)


def test_clusters_are_as_many_for_each_token_as_published():
    """At 720p those of the paper; never none."""
    assert SVG2().clusters_of(75600) == (300, 1000)  # Wan at 720p
    assert SVG2().clusters_of(32760) == (pytest.approx(200, rel=0.06), 1000)  # at 480p
    assert SVG2().clusters_of(118800) == (pytest.approx(400, rel=0.06), 1000)  # HunyuanVideo
    assert SVG2().clusters_of(4096) == (70, 256)
    assert SVG2(key_clusters=7).clusters_of(10) == (3, 7)
    assert SVG2().clusters_of(1) == (1, 1)


class Attention(torch.nn.Module):
    """Self-attention whose input is cut into queries, keys and values."""

    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("tail", ["single", "gaussian"])
def test_an_onnx_file_computes_it(tmp_path, tail):
    """K-means, padding and all, by standard operations and ``SparseAttention``."""
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    q, k, v = tokens_of()
    x = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4).flatten(2).contiguous()
    config = Config(policy=FEW, tail=tail, min_tokens=16, grid=(1, 10, 15), **SMALL)
    path = tmp_path / "model.onnx"
    found = uta_fx.export_onnx(Attention().eval(), (x,), path, config=config)
    assert [site.sparse for site in found.sites] == [True]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = sparse_attention(q, k, v, config=config)
    error = (torch.from_numpy(output) - expected).norm() / expected.norm()
    assert error <= 1e-5  # the goal of files is 1e-4


def test_export_refuses_by_name_what_it_cannot_hold(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model, arguments = torch.nn.Identity().eval(), (randn(2),)
    kept = Config(policy=SVG2(keep=True), min_tokens=16, **SMALL)
    with pytest.raises(ValueError, match=r"keep=True of policy svg2 .* Take keep=False"):
        uta_fx.export_onnx(model, arguments, tmp_path / "x.onnx", config=kept)
    config = Config(policy=FEW, min_tokens=16, **SMALL)
    with pytest.raises(ValueError, match=r"policy svg2 cannot be exported to .* Take topp"):
        uta_fx.export_tensorrt(model, arguments, tmp_path / "x.onnx", config=config)


def test_operations_are_counted():
    """K-means by its distances, centroids against centroids, and the listed share of L x L."""
    shape, dim = (1, 2, 160, 32), 32
    cost = sparse_cost(shape, shape, dim, torch.float32, 160, None, Config(policy=FEW, density=0.5))
    distances = 4 * 2 * 2 * 160 * (5 + 9) * 32
    assert cost.parts["scores"] == distances + 2 * 2 * 5 * 9 * 32
    assert cost.parts["listed"] == 0.5 * cost.dense


def test_centroids_must_fit():
    """The policy that has none, and those of another policy."""
    q, k, v = tokens_of()
    with pytest.raises(ValueError, match="config must have the policy svg2, got 'topk'"):
        clustered_attention(q, k, v, config=Config(policy="topk"))
    _, centroids = clustered_attention(q, k, v, config=Config(policy=FEW, **SMALL))
    other = SVG2(query_clusters=5, key_clusters=8)
    with pytest.raises(ValueError, match=r"centroids.key must have shape .2, 2, 8, 24., got"):
        clustered_attention(q, k, v, centroids, config=Config(policy=other, **SMALL))


def test_padding_is_bounded():
    """Every cluster ends in one block that is not full: no shape depends on the data."""
    for length, clusters, block in ((100, 7, 16), (5, 5, 64), (75600, 1000, 64)):
        worst = [1] * (clusters - 1) + [length - clusters + 1]
        assert sum(math.ceil(size / block) for size in worst) <= padded_blocks(
            length, clusters, block
        )
