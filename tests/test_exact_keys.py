"""Keys that are exact for all queries: the first frames of a grid, and those that a call names."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import uta_fx
from uta_fx import Config, sparse_attention
from uta_fx.attention import clustered_attention
from uta_fx.order import ORDERS, token_order
from uta_fx.policies import BY_NAME, Policy, Radial, SlidingTile, SpatialTemporal, TopK
from uta_fx.tails import KINDS, Tail

GRID = (3, 5, 7)  # a frame is two blocks of 16 and a part of the third; the last block is ragged
TOKENS = math.prod(GRID)
FRAME = TOKENS // GRID[0]
SMALL = {"block_q": 32, "block_kv": 16, "density": 0.2}


def inputs(tokens=TOKENS, heads=2, heads_kv=2, batch=2):
    """Queries, keys, and values whose channel j says token j: an output is what was attended to."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, tokens, 32, generator=generator)
    key = torch.randn(batch, heads_kv, tokens, 32, generator=generator)
    return query, key, torch.eye(tokens, 128).expand(batch, heads_kv, -1, -1)


def in_blocks_with(exact, order, block_kv=16):
    """Tokens whose block holds one of ``exact``; the blocks of tokens in this order."""
    found = torch.zeros_like(exact)
    for block in order.split(block_kv):
        found[block] = exact[block].any()
    return found


def places_in(order):
    """Tokens in the order of their blocks."""
    return torch.arange(TOKENS) if order == "none" else token_order(GRID, order, 16, "cpu").order


def assert_attends(output, query, key, seen):
    """Float64 attention to what ``seen`` ``[B, H, L, L]`` says; a few roundings of float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    logits = query.double() @ key.mT / math.sqrt(query.shape[3])
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    output = output[..., : seen.shape[-1]].double()
    torch.testing.assert_close(output, weights, rtol=1e-4, atol=1e-7)


POLICIES = {name: policy for name, policy in BY_NAME.items() if name != "svg2"} | {
    "radial": Radial(sink=False),
    "sliding_tile": SlidingTile(tile=(1, 3, 4), windows=((1, 1, 1),)),
    "spatial_temporal": SpatialTemporal(sink=False),
}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        (name, order)
        for name, policy in POLICIES.items()
        for order in getattr(policy, "orders", ORDERS)
        if order != "auto"
    ],
)
def test_blocks_of_the_first_frames_are_exact_for_all(name, order):
    """Beside what the policy keeps without them, and nothing else."""
    query, key, value = inputs(heads_kv=1)
    config = Config(policy=POLICIES[name], tail="none", reorder=order, **SMALL)
    without = sparse_attention(query, key, value, config=config, grid=GRID)
    config = dataclasses.replace(config, exact_frames=1)
    output = sparse_attention(query, key, value, config=config, grid=GRID)
    exact = in_blocks_with(torch.arange(TOKENS) < FRAME, places_in(order))
    kept = without[..., :TOKENS] > 0
    assert not kept[..., exact].all()
    assert_attends(output, query, key, kept | exact)


def test_clusters_have_their_blocks_of_the_first_frames():
    """Of svg2, whose blocks hold other tokens in each head; as one call and from step to step."""
    query, key, value = inputs()
    policy = dataclasses.replace(BY_NAME["svg2"], key_clusters=3, query_clusters=2, mass=0.3)
    config = Config(policy=policy, tail="none", **SMALL)
    without = sparse_attention(query, key, value, config=config, grid=GRID)[..., :TOKENS] > 0
    clusters = policy.cluster(query, key, 32, 16).key
    block_of = clusters.place // 16
    exact = torch.stack(
        [
            torch.isin(of_head, of_head[:FRAME]) for of_sample in block_of for of_head in of_sample
        ]
    ).view(2, 2, 1, TOKENS)  # fmt: skip
    assert not (without | ~exact).all() and not exact.all()
    config = dataclasses.replace(config, exact_frames=1)
    for output in (
        sparse_attention(query, key, value, config=config, grid=GRID),
        clustered_attention(query, key, value, config=config, grid=GRID)[0],
    ):
        assert_attends(output, query, key, without | exact)


@dataclasses.dataclass(frozen=True)
class Also:
    """A policy, and the first blocks for all."""

    policy: Policy
    blocks: int

    def select(self, selection):
        kept = self.policy.select(selection)
        return kept | (torch.arange(kept.shape[-1]) < self.blocks)


@pytest.mark.parametrize("budget", ["site", "head", "row"])
@pytest.mark.parametrize("tail", [*KINDS, Tail(slope="query_block"), Tail(fit=0)], ids=str)
def test_no_tail_stands_for_exact_keys(tail, budget):
    """The same, to the bit, as of a policy that keeps these blocks by itself."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, TOKENS, 32, generator=generator).unbind()
    fields = {"tail": tail, "budget": budget, "reorder": "none", **SMALL}
    expected = sparse_attention(q, k, v, config=Config(policy=Also(TopK(), 3), **fields), grid=GRID)
    config = Config(policy="topk", exact_frames=1, **fields)
    assert torch.equal(sparse_attention(q, k, v, config=config, grid=GRID), expected)
    first = torch.arange(TOKENS) < FRAME
    for exact_keys in (first, first.nonzero()[:, 0], first.nonzero()[::3, 0].flip(0)):
        config = Config(policy="topk", **fields)
        output = sparse_attention(q, k, v, config=config, exact_keys=exact_keys)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("reorder", ["none", "tile"])
def test_named_keys_are_in_the_order_of_the_call(reorder):
    """Scattered ones, together with the first frame; no keys are none."""
    query, key, value = inputs(heads_kv=1)
    config = Config(tail="none", reorder=reorder, **SMALL)
    without = sparse_attention(query, key, value, config=config, grid=GRID)
    none = torch.zeros(0, dtype=torch.int64)
    output = sparse_attention(query, key, value, config=config, grid=GRID, exact_keys=none)
    assert torch.equal(output, without)
    exact_keys = torch.tensor([101, 60])
    config = dataclasses.replace(config, exact_frames=1)
    output = sparse_attention(query, key, value, config=config, grid=GRID, exact_keys=exact_keys)
    exact = torch.arange(TOKENS) < FRAME
    exact[exact_keys] = True
    exact = in_blocks_with(exact, places_in(reorder))
    assert_attends(output, query, key, (without[..., :TOKENS] > 0) | exact)


def test_positions_count_text_before_the_video():
    """Text is exact for all in any case, its rows are dense, and positions are of the whole."""
    query, key, value = inputs(TOKENS + 16)
    config = Config(tail="none", reorder="none", **SMALL)
    call = {"grid": GRID, "text": (7, 9)}
    without = sparse_attention(query, key, value, config=config, **call)[..., : TOKENS + 16] > 0
    exact_keys = torch.tensor([3, 7 + 50, 7 + TOKENS + 2])  # text, video, text
    output = sparse_attention(query, key, value, config=config, exact_keys=exact_keys, **call)
    block = 7 + 48
    seen = without.clone()
    seen[..., block : block + 16] = True
    assert not seen.equal(without)
    assert_attends(output, query, key, seen)
    config = dataclasses.replace(config, exact_frames=1)
    output = sparse_attention(query, key, value, config=config, exact_keys=exact_keys, **call)
    seen[..., 7 : 7 + 48] = True
    assert_attends(output, query, key, seen)


@pytest.mark.parametrize("reorder", ["none", "tile"])
def test_padding_is_attended_to_by_nobody_exact_or_not(reorder):
    """Samples of different lengths: blocks are of the tokens that are there, in their order."""
    query, key, value = inputs(batch=3)
    lengths = torch.tensor([TOKENS, 20, 0])
    config = Config(tail="none", reorder=reorder, **SMALL)
    call = {"grid": GRID, "lengths": lengths}
    seen = sparse_attention(query, key, value, config=config, **call)[..., :TOKENS] > 0
    config = dataclasses.replace(config, exact_frames=1)
    output = sparse_attention(query, key, value, config=config, **call)
    places = places_in(reorder)
    for sample, length in enumerate(lengths):
        exact = in_blocks_with(torch.arange(TOKENS) < FRAME, places[places < length])
        exact[length:] = False
        seen[sample, :, :length] |= exact
    assert_attends(output, query, key, seen)


class Clip(torch.nn.Module):
    """Self-attention over a video of patches."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = torch.nn.Conv3d(2, 32, 1), torch.nn.Linear(32, 96)

    def forward(self, video):
        x = 3 * self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
@pytest.mark.parametrize(("dynamic", "inner"), [(False, "inductor"), (True, "aot_eager")])
def test_a_compiled_model_sees_its_first_frame_exactly(dynamic, inner):
    """As the eager call does; with a symbolic grid in each of its sizes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Clip().eval()
    settings = {"exact_frames": 1, "min_tokens": 16, "reorder": "tile", **SMALL}
    compiled = torch.compile(
        model, backend="uta", dynamic=dynamic, fullgraph=True,
        options={"inner": inner, **settings},
    )  # fmt: skip
    config = Config(**settings)
    for grid in [GRID, (4, 6, 9)][: 1 + dynamic]:
        video = torch.randn(1, 2, *grid)
        x = 3 * model.patch(video).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in model.qkv(x).chunk(3, -1))
        expected, other = (
            sparse_attention(q, k, v, config=dataclasses.replace(config, exact_frames=n), grid=grid)
            for n in (1, 0)
        )
        torch.testing.assert_close(compiled(video), expected, rtol=1e-4, atol=1e-5)
        assert (expected - other).abs().max() > 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_site_that_cannot_have_them_stays_dense():
    """Without a grid nobody knows the first frame; where there are no others all keys are exact."""

    class Attention(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, 2 * x, 3 * x)

    config = Config(exact_frames=1, min_tokens=16, reorder="none")
    (site,) = uta_fx.explain(Attention(), torch.randn(1, 2, 64, 16), config=config).sites
    assert not site.sparse and "give grid" in site.reason
    (site,) = uta_fx.explain(Clip().eval(), torch.randn(1, 2, 1, 8, 8), config=config).sites
    assert not site.sparse and site.reason == "exact_frames=1 keeps all keys of its 1 frames"


@torch.no_grad()
def test_explain_counts_them():
    """The blocks that hold any of them, of which the policy keeps its share anyway."""
    video = torch.randn(1, 2, *GRID)
    places = token_order(GRID, "tile", SMALL["block_kv"], torch.device("cpu")).order
    blocks = [(part < GRID[1] * GRID[2]).any() for part in places.split(SMALL["block_kv"])]
    share = sum(blocks).item() / len(blocks)
    settings = {"min_tokens": 16, **SMALL}
    listed = [
        uta_fx.explain(Clip().eval(), video, config=Config(exact_frames=n, **settings))
        .sites[0]
        .cost.parts["listed"]
        for n in (0, 1)
    ]
    assert listed[1] / listed[0] == pytest.approx((0.2 + 0.8 * share) / 0.2, rel=1e-4)
    assert 1 / 3 < share < 1


def test_none_cost_nothing():
    """Not an operation more in the graph, and one with them."""
    q, k, v = torch.randn(3, 1, 2, TOKENS, 16).unbind()

    def operations(**fields):
        config = Config(**fields, **SMALL)
        gm = make_fx(lambda q, k, v: sparse_attention(q, k, v, config=config, grid=GRID))(q, k, v)
        return [str(node.target) for node in gm.graph.nodes]

    assert operations(exact_frames=0) == operations()
    assert not any("bitwise_or" in name for name in operations())
    assert sum("bitwise_or" in name for name in operations(exact_frames=1)) == 1


Q = torch.zeros(1, 2, TOKENS, 16)


@pytest.mark.parametrize(
    ("config", "call", "error", "message"),
    [
        ({"exact_frames": 1}, {}, ValueError, "grid must be given for exact_frames=1, got None"),
        (
            {"exact_frames": 4}, {"grid": GRID}, ValueError,
            "exact_frames must be at most the frames of the grid, 3, got 4",
        ),
        ({}, {"exact_keys": [1, 2]}, TypeError, "exact_keys must be a tensor, got list"),
        (
            {}, {"exact_keys": torch.tensor([1.0])}, TypeError,
            "exact_keys must be torch.bool or torch.int64, got torch.float32",
        ),
        (
            {}, {"exact_keys": torch.ones(4, dtype=torch.bool)}, ValueError,
            r"exact_keys must have shape \[L\], here \[105\], got \(4,\)",
        ),
        (
            {}, {"exact_keys": torch.tensor(3)}, ValueError,
            r"exact_keys must have shape \[N\], got \(\)",
        ),
        (
            {}, {"exact_keys": torch.tensor([0, 105])}, ValueError,
            "exact_keys must hold positions from 0 to 104, got 105",
        ),
        (
            {}, {"exact_keys": torch.tensor([0, -1])}, ValueError,
            "exact_keys must hold positions from 0 to 104, got -1",
        ),
        (
            {}, {"exact_keys": torch.ones(1, dtype=torch.int64, device="meta")}, TypeError,
            "exact_keys must be on cpu",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(config, call, error, message):
    """Before anything is computed."""
    with pytest.raises(error, match=message):
        sparse_attention(Q, Q, Q, config=Config(**config, reorder="none"), **call)
