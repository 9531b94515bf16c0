"""The whole operation: orders, policies, budgets and tails on structured inputs."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

from uta_fx import Config, sparse_attention
from uta_fx.attention import operator_arguments, pool_blocks
from uta_fx.hilbert import curve
from uta_fx.kernels import reference
from uta_fx.order import tile_shape, token_order
from uta_fx.policies import LowDelta, TopK, spend_budget
from uta_fx.statistics import block_statistics
from uta_fx.tails import KINDS, Tail

GRID = (8, 8, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"block_q": 32, "block_kv": 32}


def fields(grid=GRID, heads=2, dim=32, seed=0, batch=1):
    """q, k, v that vary smoothly over the grid, as those of video do, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(side) / 8 for side in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)

    def field():
        wave = torch.randn(batch, heads, 3, dim, generator=generator) * 4
        phase = torch.rand(batch, heads, 1, dim, generator=generator) * 6
        noise = torch.randn(batch, heads, len(position), dim, generator=generator)
        return 2 * torch.sin(position @ wave + phase) + 0.3 * noise

    return field(), field(), field()


def error(output, reference):
    """Relative mean squared error."""
    return ((output - reference).square().mean() / reference.square().mean()).item()


NOT_FITTED = Tail(fit=0)


@pytest.mark.parametrize("reorder", ["none", "tile", "morton", "hilbert"])
@pytest.mark.parametrize("tail", [*KINDS, NOT_FITTED], ids=str)
def test_density_one_is_dense_attention(reorder, tail):
    """Whatever the order and the tail; the bound is a few float32 roundings of the sums."""
    q, k, v = fields()
    config = Config(density=1.0, reorder=reorder, tail=tail, **SMALL)
    dense = F.scaled_dot_product_attention(q, k, v)
    output = sparse_attention(q, k, v, config=config, grid=GRID)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    [*(kind for kind in KINDS if kind not in ("none", "normalizer", "rectified")), NOT_FITTED],
    ids=str,
)
@pytest.mark.parametrize("budget", ["site", "row"])
def test_equal_logits_aggregate_without_error(tail, budget):
    """Theorem 3.1: equal tail logits make every aggregating tail equal to dense attention."""
    q, _, v = fields()
    key = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)).expand_as(q)
    config = Config(density=0.2, tail=tail, budget=budget, **SMALL)
    dense = F.scaled_dot_product_attention(q, key, v)
    output = sparse_attention(q, key, v, config=config, grid=GRID)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "tail"),
    [
        *itertools.product(
            ["low_delta", "topk", "topp", "threshold", "rectified"],
            [*KINDS, Tail(slope="query_block")],
        ),
        ("svg2", "gaussian"),
    ],
    ids=str,
)
def test_statistics_in_16_bits_cost_no_accuracy(policy, tail):
    """What is pooled is rounded once; who calculates with it does so in float32.

    It errs as the same inputs in float32 do. Roundings of 2^-8 add far less than a thousandth to
    the relative squared error; blocks that are chosen otherwise had scores that were close.
    """
    q, k, v = (x.bfloat16() for x in fields())
    config = Config(density=0.3, policy=policy, tail=tail, **SMALL)
    dense = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    wide = sparse_attention(q.float(), k.float(), v.float(), config=config, grid=GRID)
    output = sparse_attention(q, k, v, config=config, grid=GRID)
    assert output.dtype == torch.bfloat16
    assert error(output.float(), dense) < 1.05 * error(wide, dense) + 1e-3


def test_dropping_the_tail_is_not_exact_there():
    """The theorem's test can fail: without a tail the same inputs err."""
    q, _, v = fields()
    key = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)).expand_as(q)
    dense = F.scaled_dot_product_attention(q, key, v)
    for tail in ("none", "normalizer"):
        config = Config(density=0.2, tail=tail, **SMALL)
        assert error(sparse_attention(q, key, v, config=config, grid=GRID), dense) > 0.01


def test_gaussian_tail_is_exact_for_gaussian_blocks():
    """Logits and values jointly Gaussian in one large block: mass and value both come out right.

    The block's true mean of exp(delta) scatters around exp(sigma2 / 2) by its own sampling error,
    about sqrt((exp(sigma2) - 1) / n): 0.2 % for n = 2^18 and sigma2 = 0.7; the allowance is five
    of those.
    """
    generator = torch.Generator().manual_seed(0)
    n, dim = 2**18, 16
    k = torch.randn(1, 1, n, dim, generator=generator)
    mix = torch.randn(dim, dim, generator=generator) * 0.3
    v = k @ mix + 0.1 * torch.randn(1, 1, n, dim, generator=generator)
    q = torch.randn(1, 1, 16, dim, generator=generator)
    scale = 0.2
    sigma2 = (q * scale).square().sum(-1)
    assert sigma2.max() < 1.5
    exact = F.scaled_dot_product_attention(q, k, v, scale=scale)
    mean_k, mean_v = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    slope = (k - mean_k).transpose(-1, -2) @ v / n
    value = mean_v + scale * q @ slope  # undamped: Stein's identity
    torch.testing.assert_close(value, exact, rtol=0, atol=0.02)
    mass = (scale * (q - 0) @ (k - mean_k).transpose(-1, -2)).exp().mean(-1)
    torch.testing.assert_close(mass, (sigma2 / 2).exp(), rtol=0.012, atol=0)


def test_better_tails_err_less():
    """On smooth fields: dropping > one representative > one a block > Gaussian > fitted."""
    q, k, v = fields()
    dense = F.scaled_dot_product_attention(q, k, v)
    tails = ("none", "single", "block", NOT_FITTED, "gaussian")
    errors = []
    for tail in tails:
        config = Config(density=0.2, tail=tail, **SMALL)
        errors.append(error(sparse_attention(q, k, v, config=config, grid=GRID), dense))
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(tails)


def test_tile_order_errs_less_than_raster_order():
    """Compact blocks aggregate better: the reason for reordering."""
    q, k, v = fields()
    dense = F.scaled_dot_product_attention(q, k, v)
    raster, tile = (
        error(sparse_attention(q, k, v, config=Config(reorder=order, **SMALL), grid=GRID), dense)
        for order in ("none", "tile")
    )
    assert tile < raster / 2


def test_the_slope_can_be_one_for_each_query_block():
    """The dearer slope is another number, not much worse on smooth fields."""
    q, k, v = fields()
    dense = F.scaled_dot_product_attention(q, k, v)
    head, block = (
        error(
            sparse_attention(
                q, k, v, config=Config(tail=Tail(kind="gaussian", slope=slope), **SMALL), grid=GRID
            ),
            dense,
        )
        for slope in ("head", "query_block")
    )
    assert head != block and block < 2 * head


def tile_key(token, grid, block):
    """Tiles as an ox ploughs: rows turn at each frame of tiles, columns at each row of tiles."""
    sides = tile_shape(grid, block)
    rows, columns = (-(-length // side) for length, side in zip(grid[1:], sides[1:], strict=True))
    frame, row, column = (x // side for x, side in zip(token, sides, strict=True))
    row = rows - 1 - row if frame % 2 else row
    column = columns - 1 - column if (frame * rows + row) % 2 else column
    return frame, row, column, token


def morton_key(token, grid, block):
    """Bits of the coordinates, interleaved."""
    return [x >> bit & 1 for bit in reversed(range(max(grid).bit_length())) for x in token]


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 9, 13), (5, 1, 21), (2, 3, 4), (9, 11, 17)])
@pytest.mark.parametrize(("order", "key"), [("tile", tile_key), ("morton", morton_key)])
def test_orders_sort_the_tokens_of_any_grid(grid, order, key):
    """Also where tiles do not divide the grid; and the inverse is the way back."""
    tokens = list(itertools.product(*map(range, grid)))
    expected = sorted(range(len(tokens)), key=lambda i: key(tokens[i], grid, 64))
    forward, inverse = token_order(grid, order, 64, "cpu")
    assert forward.tolist() == expected
    assert forward[inverse].equal(torch.arange(math.prod(grid)))


def test_the_hilbert_curve_visits_neighbours():
    """Every grid of up to 6 x 7 x 9: each token once, and no step moves a side by more than one."""
    for grid in itertools.product(range(1, 7), range(1, 8), range(1, 10)):
        points = list(curve(grid))
        assert sorted(points) == list(itertools.product(*map(range, grid)))
        steps = [
            [abs(x - y) for x, y in zip(a, b, strict=True)] for a, b in itertools.pairwise(points)
        ]
        assert all(max(step) == 1 for step in steps)
        if all(side % 2 == 0 for side in grid):
            assert all(sum(step) == 1 for step in steps)


def test_hilbert_order_is_the_curve():
    """In raster indices, and back; on a cube it is the curve of Hilbert: each eighth is a cube."""
    grid = (4, 6, 5)
    order = token_order(grid, "hilbert", 64, "cpu")
    assert order.order.tolist() == [(f * 6 + y) * 5 + x for f, y, x in curve(grid)]
    assert order.order[order.inverse].equal(torch.arange(120))
    points = torch.tensor(list(curve((8, 8, 8)))).view(8, 64, 3)
    assert (points.amax(1) - points.amin(1)).eq(3).all()


def test_tiles_are_blocks_where_they_divide():
    """Each block of 64 tokens is a 4 x 4 x 4 cube."""
    grid = (8, 8, 8)
    order = token_order(grid, "tile", 64, "cpu").order.view(-1, 64)
    for axis, stride in ((0, 64), (1, 8), (2, 1)):
        coordinate = order // stride % grid[axis]
        assert (coordinate.amax(1) - coordinate.amin(1)).eq(3).all()


def test_ragged_grids_keep_blocks_compact():
    """A block that straddles tiles still spans few tokens in each direction."""
    grid = (5, 11, 13)
    order = token_order(grid, "tile", 64, "cpu").order
    spans = []
    for block in order.split(64):
        frame, rest = block // (11 * 13), block % (11 * 13)
        spans.append([int(x.max() - x.min()) + 1 for x in (frame, rest // 13, rest % 13)])
    volume = [a * b * c for a, b, c in spans]
    assert sum(volume) / len(volume) < 300  # raster order: 64 tokens span 13 x 6 x 1 or more


def test_site_budget_is_spent_to_the_block():
    """Exactly ceil(density * H * Nq * Nk) blocks a sample, and at least one in every row."""
    scores = torch.rand(2, 3, 10, 20, generator=torch.Generator().manual_seed(0))
    scores[:, 0, 0] = 0.0
    mask = spend_budget(scores, 0.1, "site")
    assert mask.sum((1, 2, 3)).tolist() == [60, 60]
    assert mask.sum(-1).min() >= 1 and mask.sum(-1).max() > 2
    assert spend_budget(scores, 0.001, "site").sum(-1).eq(1).all()


def test_head_budget_is_the_same_in_every_head():
    """Exactly ceil(density * Nq * Nk) blocks a head and sample, where its scores are highest."""
    scores = torch.rand(2, 3, 10, 20, generator=torch.Generator().manual_seed(0))
    scores[:, 0] *= 0.01  # a head that a site budget would forget
    mask = spend_budget(scores, 0.1, "head")
    assert mask.sum((2, 3)).eq(20).all() and mask.sum(-1).min() >= 1
    others = mask.scatter(-1, scores.argmax(-1, keepdim=True), False)
    for head, kept, best in zip(*(x.flatten(0, 1) for x in (scores, others, mask)), strict=True):
        assert head[kept].min() >= head[~best].max()


def test_row_budget_is_the_same_in_every_row():
    """ceil(density * Nk) in each."""
    scores = torch.rand(2, 3, 10, 20, generator=torch.Generator().manual_seed(0))
    assert spend_budget(scores, 0.1, "row").sum(-1).eq(2).all()
    assert spend_budget(scores, 0.3, "row").sum(-1).eq(6).all()  # 0.3 * 20 rounds to 6.000...01


def test_a_sample_does_not_depend_on_its_batch():
    """Samples never compete for a budget."""
    q, k, v = fields(batch=2)
    config = Config(density=0.2, **SMALL)
    both = sparse_attention(q, k, v, config=config, grid=GRID)
    alone = sparse_attention(q[:1], k[:1], v[:1], config=config, grid=GRID)
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize("length", [64, 65, 100, 7])
def test_statistics_are_over_true_tokens(length):
    """A ragged last block has its own mean and variance."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, length, 16, generator=generator).unbind()
    statistics = block_statistics(k, v, 32, k.shape[1])
    assert statistics.size.sum() == length
    torch.testing.assert_close(
        statistics.key_mean[:, :, -1], k[:, :, -(length % 32 or 32) :].mean(2)
    )
    torch.testing.assert_close(
        statistics.key_variance[:, :, -1],
        k[:, :, -(length % 32 or 32) :].var(2, correction=0),
    )
    torch.testing.assert_close(statistics.value_mean[:, :, 0], v[:, :, :32].mean(2))


@pytest.mark.parametrize("budget", ["row", "site"])
@pytest.mark.parametrize("value_power", [0.0, 1.0])
@pytest.mark.parametrize(("power", "variance_weight"), [(1.0, 0.0), (0.5, 1.0)])
def test_low_delta_keeps_the_largest_expected_errors(power, variance_weight, value_power, budget):
    """Its rule, stated pair by pair of rows and block by block in float64.

    The second head's logits vary more. What variances add is relative to their mean in a head, over
    the first row of every query block: that decides what heads get of one budget.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 100, 16, generator=generator).unbind()
    k[:, 1] *= 2
    config = Config(density=0.4, budget=budget, block_q=16, block_kv=16)
    policy = LowDelta(power=power, variance_weight=variance_weight, value_power=value_power)
    exact = policy.select(pool_blocks(q, k, v, config, scale=None))
    scores = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    for head in range(2):
        pairs = [
            (keys.double(), values.double())
            for keys, values in zip(k[0, head].split(16), v[0, head].split(16), strict=True)
        ]
        queries = q[0, head].double() / 4

        def variance(query, keys):
            return (query**2 * keys.var(0, correction=0)).sum(1).mean()

        center = sum(variance(queries[::16], keys) for keys, _ in pairs) / len(pairs)
        for block, rows in enumerate(queries.split(16)):
            for query in rows.split(2):
                mass, error = [], []
                for keys, values in pairs:
                    sigma2 = variance(query, keys)
                    logit = query.mean(0) @ keys.mean(0) + math.log(len(keys))
                    lift = (variance_weight * (sigma2 - center) / 2).exp()
                    spread = values.var(0, correction=0).sum().sqrt()
                    mass.append(logit.exp())
                    error.append(lift * sigma2**power * spread**value_power)
                share = torch.stack(mass) / sum(mass)
                scores[0, head, block] += (share * torch.stack(error)) ** 2
            scores[0, head, block] /= len(rows.split(2))
    assert torch.equal(exact, spend_budget(scores.sqrt(), 0.4, budget))
    assert budget == "row" or exact[0, 0].sum() != exact[0, 1].sum()


@pytest.mark.parametrize("policy", [LowDelta(power=0.5), TopK()])
def test_a_policy_object_stands_for_its_name(policy):
    """Any value with ``select`` is a policy."""
    q, k, v = fields()
    dense = F.scaled_dot_product_attention(q, k, v)
    output = sparse_attention(q, k, v, config=Config(policy=policy, **SMALL), grid=GRID)
    assert error(output, dense) < 0.2


def test_no_grid_keeps_the_order_and_tile_order_asks_for_one():
    """``auto`` without a grid is the order in which the tokens come."""
    q, k, v = fields()
    plain = sparse_attention(q, k, v, config=Config(reorder="none", **SMALL))
    torch.testing.assert_close(sparse_attention(q, k, v, config=Config(**SMALL)), plain)
    with pytest.raises(ValueError, match="grid must be given for reorder='tile'"):
        sparse_attention(q, k, v, config=Config(reorder="tile"))


def joint(text, dtype=torch.float32):
    """Video fields with text tokens around them."""
    generator = torch.Generator().manual_seed(2)
    parts = []
    for video in fields():
        before, after = (torch.randn(1, 2, n, 32, generator=generator) for n in text)
        parts.append(torch.cat([before, video, after], 2).to(dtype))
    return parts


def text_masks(text):
    """None, and masks that hide text from everyone: boolean, added, and of all queries."""
    length = sum(text) + math.prod(GRID)
    seen = torch.ones(1, 1, 1, length, dtype=torch.bool)
    seen[..., 2 if text[0] else length - 2] = False
    rows = seen & torch.ones(length, 1, dtype=torch.bool)
    rows[..., 0 if text[0] else -1, 100] = False  # a text query may see something else
    return {
        "none": None, "boolean": seen, "rows": rows,
        "added": torch.zeros(1, 1, 1, length).masked_fill(~seen, -torch.inf),
    }  # fmt: skip


@pytest.mark.parametrize("text", [(11, 0), (0, 20), (5, 40)])
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "rows"])
def test_density_one_is_dense_joint_attention(text, mask):
    """Text before, after or around the video, seen or hidden; a few float32 roundings."""
    q, k, v = joint(text)
    mask = text_masks(text)[mask]
    config = Config(density=1.0, **SMALL)
    output = sparse_attention(q, k, v, config=config, grid=GRID, text=text, attn_mask=mask)
    dense = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), None if mask is None else _as_double(mask)
    )
    torch.testing.assert_close(output.double(), dense, rtol=1e-4, atol=1e-5)
    # heads join without a copy, which Inductor also needs where lengths are known only to a run
    assert output.transpose(1, 2).is_contiguous()


def _as_double(mask):
    return mask if mask.dtype == torch.bool else mask.double()


@pytest.mark.parametrize("hidden", [False, True])
def test_sparse_joint_attention_is_what_it_says(hidden):
    """A plain restatement in float64: one softmax over exact blocks, tail and seen text.

    Operator and restatement get the same blocks and representatives, so that only sums differ: by a
    few roundings of float32.
    """
    text = (5, 40)
    q, k, v = joint(text)
    mask = text_masks(text)["boolean"] if hidden else None
    config = Config(density=0.3, reorder="none", **SMALL)
    output = sparse_attention(q, k, v, config=config, text=text, attn_mask=mask)

    video = slice(5, 5 + math.prod(GRID))
    video_q, video_k, video_v = (x[:, :, video].contiguous() for x in (q, k, v))
    selection = pool_blocks(video_q, video_k, video_v, config, scale=None)
    arguments = operator_arguments(selection, video_k, video_v, config)
    arguments = [
        x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
    ]
    part, lse = reference.block_masked_attention(*arguments)
    outside = [i for i in range(q.shape[2]) if not video.start <= i < video.stop]
    q, k, v = (x.double() for x in (q, k, v))
    logits = q[:, :, video] @ k[:, :, outside].mT / math.sqrt(32)
    if hidden:
        logits = logits.masked_fill(~mask[..., outside], -torch.inf)
    everything = torch.cat([logits, lse[..., None]], -1).softmax(-1)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    expected[:, :, video] = everything[..., :-1] @ v[:, :, outside] + everything[..., -1:] * part
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_hidden_text_cannot_matter():
    """Not even where it is large."""
    text = (11, 0)
    q, k, v = joint(text)
    mask = text_masks(text)["boolean"]
    config = Config(density=0.3, **SMALL)
    outputs = []
    for value in (0.0, 1e4):
        k[:, :, 2] = v[:, :, 2] = value
        outputs.append(
            sparse_attention(q, k, v, config=config, grid=GRID, text=text, attn_mask=mask)
        )
    video = slice(11, None)
    assert torch.equal(outputs[0][:, :, video], outputs[1][:, :, video])


def test_text_that_is_all_hidden_leaves_the_video_alone():
    """No NaN: the video is what it would be without text."""
    q, k, v = joint((11, 0))
    mask = torch.arange(11 + math.prod(GRID)) >= 11
    config = Config(density=0.3, **SMALL)
    output = sparse_attention(q, k, v, config=config, grid=GRID, text=(11, 0), attn_mask=mask[None])
    alone = sparse_attention(*(x[:, :, 11:] for x in (q, k, v)), config=config, grid=GRID)
    torch.testing.assert_close(output[:, :, 11:], alone)


@pytest.mark.parametrize("kind", ["keys", "a value", "causal", "rows", "one entry"])
def test_a_mask_that_hides_video_gives_nan(kind):
    """Or one that differs by query: in the samples in which it does, for the video alone."""
    text, length = (11, 20), 31 + math.prod(GRID)
    q, k, v = (x.expand(2, -1, -1, -1).contiguous() for x in joint(text))
    mask = torch.ones(2, 1, 1 if kind in ("keys", "a value") else length, length, dtype=torch.bool)
    if kind == "keys":
        mask[1, ..., 40:50] = False
    elif kind == "a value":
        mask = torch.zeros(mask.shape)
        mask[1, ..., 40] = -0.5
    elif kind == "causal":
        mask[1].logical_and_(torch.ones(length, length).tril().bool())
    elif kind == "rows":
        mask[1, :, 12, 3] = False
    else:
        mask[1, :, 100, 77] = False
    config = Config(density=0.3, **SMALL)
    arguments = {"config": config, "grid": GRID, "text": text}
    output = sparse_attention(q, k, v, attn_mask=mask, **arguments)
    video = slice(11, length - 20)
    assert output[1, :, video].isnan().all() and not output[1, :, :11].isnan().any()
    whole = sparse_attention(q, k, v, attn_mask=torch.ones_like(mask[:1, :, :1]) == 1, **arguments)
    torch.testing.assert_close(output[0], whole[0])


@pytest.mark.parametrize(
    "tail", [*KINDS, Tail(kind="first_order", fit=0), Tail(kind="gaussian", fit=0)], ids=str
)
def test_float16_does_not_run_over(tail):
    """Neither variances of keys in an outlying channel nor slopes: no infinity, no NaN."""
    q, k, v = fields()
    k[..., 7] *= 600 / k[..., 7].std()
    v = 2000 * (v + k[..., :1] / k[..., :1].std())
    config = Config(density=0.3, tail=tail, **SMALL)
    args = [x.half() for x in (q, k, v)]
    assert sparse_attention(*args, grid=GRID, config=config).isfinite().all()


def test_a_users_own_code_may_be_compiled_around_it():
    """A call inside a compiled function: one graph, of our operators, the same numbers."""
    q, k, v = fields()
    operators = []

    def note(gm, inputs):
        operators.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    def normed(query, key, value):
        query, key = (F.normalize(x, dim=-1) for x in (query, key))
        return 2 * sparse_attention(query, key, value, config=Config(**SMALL), grid=GRID)

    compiled = torch.compile(normed, backend=note, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), normed(q, k, v))
    for name in ("weigh_scores", "select_blocks", "fitted_tail", "block_masked_attention"):
        assert operators.count(f"uta.{name}.default") == 1


@pytest.mark.parametrize("tail", [*KINDS, NOT_FITTED], ids=str)
@pytest.mark.parametrize("text", [(0, 0), (3, 5)])
def test_heads_may_share_keys(tail, text):
    """Four heads of queries on two of keys: what each head has of its own when they are repeated.

    The head dim of the values is another one than that of the keys.
    """
    q, k, v = fields(heads=4)
    k, v = k[:, 1:3], v[:, 1:3, :, :16]
    pads = (0, 0, *text)
    q, k, v = (F.pad(x, pads, value=0.5) for x in (q, k, v))
    config = Config(density=0.2, tail=tail, **SMALL)
    shared = sparse_attention(q, k, v, config=config, grid=GRID, text=text)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(
        shared, sparse_attention(q, k, v, config=config, grid=GRID, text=text), rtol=1e-5, atol=1e-6
    )
    assert shared.shape == (*q.shape[:3], 16)


def test_bad_inputs_are_named():
    """Shapes, grids and gradients."""
    q, k, v = fields()
    with pytest.raises(ValueError, match=r"grid must have .* 512, got 8 x 8 x 9 = 576"):
        sparse_attention(q, k, v, grid=(8, 8, 9))
    with pytest.raises(ValueError, match="key must have the batch and length of query"):
        sparse_attention(q, k[:, :, :100], v)
    with pytest.raises(ValueError, match=r"value must have .* got \(1, 1, 512\)"):
        sparse_attention(q, k, v[:, :1])
    with pytest.raises(ValueError, match=r"a number of heads that divides its, \(1, 2, 512\)"):
        sparse_attention(q, k.repeat(1, 2, 1, 1), v)
    with pytest.raises(ValueError, match=r"text must hold two lengths .* 512, got \(500, 12\)"):
        sparse_attention(q, k, v, text=(500, 12))
    with pytest.raises(ValueError, match="attn_mask hides text from the video: it needs text"):
        sparse_attention(q, k, v, attn_mask=torch.ones(512, dtype=torch.bool))
    with pytest.raises(ValueError, match="value must be"):
        sparse_attention(q, k, v[0])
    with pytest.raises(RuntimeError, match="forward-only"):
        sparse_attention(q.requires_grad_(), k, v, grid=GRID).sum().backward()


SEEN = torch.ones(512, dtype=torch.bool)


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2, n, 32) for n in (5, 7)], layout=layout)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"value": nested(torch.strided)},
            TypeError,
            "value must be .* got a nested tensor",
        ),
        ({"query": nested(torch.jagged)}, TypeError, "query must be .* got a nested tensor"),
        ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
        ({"key": SEEN.to_sparse()}, TypeError, "key must be a dense tensor, .*torch.sparse_coo"),
        (
            {"query": torch.ones(1, 2, 512, 32).int()},
            TypeError,
            "query must be float32, float16 or",
        ),
        ({"key": torch.ones(1, 2, 512, 32).half()}, TypeError, "key must be torch.float32, got"),
        ({"value": torch.ones(1, 2, 512, 32, device="meta")}, TypeError, "value must be on cpu"),
        ({"value": torch.ones(1, 2, 512, 8)}, ValueError, "value must have a head dim from 16"),
        ({"key": torch.ones(1, 2, 512, 64)}, ValueError, "key must have the head dim of query, 32"),
        ({"query": torch.ones(1, 2, 0, 32)}, ValueError, "query must hold a token of a head, got"),
        ({"query": torch.ones(0, 2, 512, 32)}, ValueError, r"got shape \(0, 2, 512, 32\)"),
        ({"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
        ({"scale": True}, TypeError, "scale must be a number or None, got True"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": -math.inf}, ValueError, "scale must be a finite number, got -inf"),
        ({"grid": (True, 8, 64)}, ValueError, r"grid must be three ints .*, got \(True, 8, 64\)"),
        ({"grid": (8, 64)}, ValueError, r"grid must be three ints .*, got \(8, 64\)"),
        ({"grid": (8.0, 8, 8)}, ValueError, "grid must be three ints"),
        ({"grid": (-8, -8, 8)}, ValueError, "grid must hold positive sides"),
        ({"text": 5}, ValueError, "text must hold two lengths .* 512, got 5"),
        ({"text": (1, 2, 3)}, ValueError, "text must hold two lengths"),
        ({"text": (True, 0)}, ValueError, r"text must hold two lengths .* got \(True, 0\)"),
        ({"text": (5.0, 0)}, ValueError, r"text must hold two lengths .* got \(5.0, 0\)"),
        ({"attn_mask": SEEN[:3]}, ValueError, r"attn_mask must broadcast to \(1, 2, 512, 512\)"),
        ({"attn_mask": SEEN[:1]}, ValueError, "attn_mask must have an entry for each of the 512"),
        ({"attn_mask": SEEN[None, None, None, None]}, ValueError, "attn_mask must broadcast to"),
        ({"attn_mask": SEEN.expand(1, 3, 1, 512)}, ValueError, "attn_mask must broadcast to"),
        ({"attn_mask": SEEN.long()}, TypeError, "attn_mask must be torch.bool, .* got torch.int64"),
        ({"attn_mask": SEEN.to("meta")}, TypeError, "attn_mask must be on cpu"),
        ({"lengths": [512]}, TypeError, "lengths must be a tensor, got list"),
    ],
)
def test_a_call_refuses_by_name(change, error, message):
    """Before anything is computed."""
    arguments = dict(zip(("query", "key", "value"), fields(), strict=True))
    arguments |= {"text": (5, 0)} if "attn_mask" in change else {}
    with pytest.raises(error, match=message):
        sparse_attention(**arguments | change)


def test_a_mask_may_have_few_dimensions():
    """What broadcasts is taken."""
    q, k, v = fields()
    mask = SEEN.clone()
    mask[2] = False
    config = Config(density=1.0, reorder="none", **SMALL)
    dense = F.scaled_dot_product_attention(q, k, v, mask[None])
    for shape in ((512,), (1, 512), (1, 1, 512)):
        output = sparse_attention(q, k, v, config=config, text=(5, 0), attn_mask=mask.view(shape))
        torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


LENGTHS = torch.tensor([512, 70, 1, 300])


def masked(lengths, tokens=512):
    """The mask that the lengths stand for."""
    return (torch.arange(tokens) < lengths[:, None])[:, None, None]


PLACES = LAYOUTS | {
    "one sample for all": lambda x: x[:1].expand(x.shape),
    "one head for all": lambda x: x[:, :1].expand(x.shape),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_that_can_be_exact_is_dense_attention(data):
    """Shapes, strides, heads that share keys, dtypes, text, masks, lengths, tails drawn at random.

    Exact is a call at density 1, and one at any density of which all video keys are equal, with a
    tail that aggregates. In 16 bits a weight, a representative, the output of each of two parts and
    what they are merged to are rounded, each by half a unit of at most the largest value: two and a
    half units. Sums in float32 add what the tests above allow.
    """
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    grid = draw(st.tuples(*[st.integers(1, 6)] * 3))
    extra = draw(st.sampled_from(["nothing", "text", "masked text", "lengths"]))
    text = draw(st.tuples(st.integers(0, 9), st.integers(1, 20))) if "text" in extra else (0, 0)
    equal = draw(st.booleans())
    config = Config(
        density=draw(st.sampled_from([0.01, 0.3])) if equal else 1.0,
        tail=draw(
            st.sampled_from(["single", "bins", "block", "first_order", "gaussian", NOT_FITTED])
        ),
        policy=draw(st.sampled_from(["low_delta", "topk"])),
        budget=draw(st.sampled_from(["site", "head", "row"])),
        reorder=draw(st.sampled_from(["none", "tile", "morton", "hilbert"])),
        block_q=draw(st.sampled_from([16, 64, 128])),
        block_kv=draw(st.sampled_from([16, 32, 64])),
    )
    batch, shared, times = (draw(st.integers(1, 2)) for _ in range(3))
    dims = [16, 40, 64, 72, 80, 88, 96, 112, 256]
    dim, dim_v = draw(st.sampled_from(dims)), draw(st.sampled_from(dims))
    tokens, (before, after) = math.prod(grid), text
    length = tokens + before + after
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def randn(heads, channels):
        return torch.randn(batch, heads, length, channels, generator=generator)

    query, key, value = randn(shared * times, dim), randn(shared, dim), randn(shared, dim_v)
    video = slice(before, before + tokens)
    if equal:
        key[:, :, video] = key[:, :, before : before + 1]
    place = [PLACES[draw(st.sampled_from(sorted(PLACES)))] for _ in range(3)]
    query, key, value = (f(x.to(dtype)) for f, x in zip(place, (query, key, value), strict=True))
    mask = lengths = None
    there = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    if extra == "masked text":
        there[..., :before] = torch.rand(batch, 1, 1, before, generator=generator) < 0.5
        there[..., before + tokens :] = torch.rand(batch, 1, 1, after, generator=generator) < 0.5
        mask = there
    if extra == "lengths":
        lengths = torch.randint(tokens + 1, (batch,), generator=generator)
        there = masked(lengths, tokens)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), there, enable_gqa=True
    )
    if lengths is not None:
        exact = exact.where(there.mT, 0.0)
        query, key, value = (x.where(there.mT, torch.nan) for x in (query, key, value))
    output = sparse_attention(
        query, key, value, config=config, grid=grid, text=text, attn_mask=mask, lengths=lengths
    )
    assert output.dtype == dtype and output.shape == (*query.shape[:3], dim_v)
    largest = value.double().nan_to_num().abs().max()
    allowed = 2.5 * torch.finfo(dtype).eps * largest if dtype != torch.float32 else 0.0
    error = (output.double() - exact).abs()
    assert (error <= allowed + 1e-5 + 1e-4 * exact.abs()).all()


@pytest.mark.parametrize("reorder", ["none", "tile"])
@pytest.mark.parametrize("tail", [*(x for x in KINDS if x != "rectified"), NOT_FITTED], ids=str)
def test_density_one_is_dense_attention_of_the_tokens_that_exist(reorder, tail):
    """As with all tokens; heads share keys, and padding of NaN is seen by nobody."""
    q, k, v = fields(batch=4)
    k, v = k[:, :1], v[:, :1]
    config = Config(density=1.0, tail=tail, reorder=reorder, **SMALL)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=masked(LENGTHS), enable_gqa=True)
    there = masked(LENGTHS).mT
    q, k, v = (x.where(there, torch.nan) for x in (q, k, v))
    output = sparse_attention(q, k, v, config=config, grid=GRID, lengths=LENGTHS)
    torch.testing.assert_close(output, dense.where(there, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["low_delta", "topk", "topp", "threshold"])
@pytest.mark.parametrize(
    "tail", ["single", "bins", "block", "first_order", "gaussian", NOT_FITTED], ids=str
)
def test_equal_logits_aggregate_without_error_what_exists(tail, policy):
    """The theorem of the paper, sample by sample, with lengths in the middle of blocks."""
    q, _, v = fields(batch=4)
    key = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1)).expand_as(q)
    config = Config(density=0.1, tail=tail, policy=policy, **SMALL)
    dense = F.scaled_dot_product_attention(q, key, v, attn_mask=masked(LENGTHS))
    output = sparse_attention(q, key, v, config=config, grid=GRID, lengths=LENGTHS)
    there = masked(LENGTHS).mT
    torch.testing.assert_close(output, dense.where(there, 0.0), rtol=1e-4, atol=1e-5)


def test_a_sample_with_a_length_errs_as_by_itself():
    """Density 0.3 of its blocks: within a tenth of the error of the sample that ends there."""
    q, k, v = fields(batch=2)
    lengths = torch.tensor([320, 512])
    dense = F.scaled_dot_product_attention(*(x[:1, :, :320] for x in (q, k, v)))
    alone = [x[:1, :, :320] for x in (q, k, v)]
    wanted = sparse_attention(*alone, config=Config(density=0.3, reorder="none", **SMALL))
    config = Config(density=0.3 * 10 / 17, reorder="none", **SMALL)  # of its blocks and of padding
    output = sparse_attention(q, k, v, config=config, lengths=lengths)[:1, :, :320]
    assert error(output, dense) < 1.1 * error(wanted, dense)


@pytest.mark.parametrize(
    ("lengths", "options", "wrong", "message"),
    [
        (LENGTHS[:3], {}, ValueError, r"lengths must have shape \(4,\), got \(3,\)"),
        (LENGTHS.float(), {}, TypeError, "lengths must be int32 or int64, got torch.float32"),
        (LENGTHS.to("meta"), {}, TypeError, "lengths must be on cpu as query is, got meta"),
        (LENGTHS + 1, {}, ValueError, "lengths must be from 0 to 512, got 513"),
        (LENGTHS - 2, {}, ValueError, "lengths must be from 0 to 512, got -1"),
        (LENGTHS, {"text": (12, 0)}, ValueError, r"text must be \(0, 0\), got \(12, 0\)"),
        (LENGTHS, {"policy": "window"}, ValueError, "lengths need a policy .* got window"),
        (LENGTHS, {"tail": "rectified"}, ValueError, "lengths need a tail in the softmax"),
    ],
)
def test_bad_lengths_are_named(lengths, options, wrong, message):
    fields_of_config = {name: x for name, x in options.items() if name != "text"}
    config = Config(reorder="none", **fields_of_config, **SMALL)
    text = options.get("text", (0, 0))
    with pytest.raises(wrong, match=message):
        sparse_attention(*fields(batch=4), config=config, text=text, lengths=lengths)


OUTSIDE = torch.tensor([512, -1, 1, 513])


def assert_nan_outside(output, attend):
    """In the samples of ``OUTSIDE`` whose length is impossible, and the others as without them."""
    wrong = torch.tensor([False, True, False, True], device=output.device)
    expected = attend(OUTSIDE.clamp(0, 512).to(output.device))
    assert output[wrong].isnan().all() and torch.equal(output[~wrong], expected[~wrong])


@pytest.mark.parametrize("reorder", ["none", "tile"])
def test_a_length_that_a_graph_cannot_refuse_makes_its_sample_nan(reorder):
    q, k, v = fields(batch=4)
    config = Config(reorder=reorder, **SMALL)

    def attend(lengths):
        return sparse_attention(q, k, v, config=config, grid=GRID, lengths=lengths)

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert_nan_outside(compiled(OUTSIDE), attend)


@pytest.mark.parametrize("without", [torch._subclasses.FakeTensorMode(), torch.device("meta")])
def test_lengths_and_positions_without_numbers_are_taken(without):
    """Fake tensors, as in a trace, and those of ``meta``."""
    with without:
        q = torch.empty(2, 2, 100, 32)
        given = {"lengths": torch.ones(2).int(), "exact_keys": torch.ones(3).long()}
        assert sparse_attention(q, q, q, **given).shape == q.shape


@pytest.mark.gpu
def test_lengths_replay_in_a_cuda_graph():
    """Nothing waits for the host: lengths come with the replay, and an impossible one makes NaN."""
    q, k, v = (x.to("cuda", torch.bfloat16) for x in fields(batch=4))
    config, held = Config(**SMALL), LENGTHS.cuda()

    def attend(lengths):
        return sparse_attention(q, k, v, config=config, grid=GRID, lengths=lengths)

    attend(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend(held)
    held.copy_(OUTSIDE)
    graph.replay()
    assert_nan_outside(output, attend)


def repeated_fields(dim, batch=2):
    """Inputs whose blocks are alike in groups of four, so that scores tie, in bfloat16."""
    q, k, v = fields((2, 8, 8), dim=dim, batch=batch)
    return [x.repeat(1, 1, 4, 1).to(DEVICE, torch.bfloat16) for x in (q, k, v)]


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize(
    "change",
    [
        *({"tail": tail} for tail in (*KINDS, NOT_FITTED)),
        {"tail": Tail(slope="query_block")},
        {"budget": "row"},
        {"policy": "topk", "budget": "head"},
        {"policy": "topp"},
        {"policy": "svg2"},
    ],
    ids=str,
)
def test_the_same_inputs_give_the_same_bits_twice(change, dim):
    """Ties between scores among them."""
    q, k, v = repeated_fields(dim)
    config = Config(density=0.3, block_q=64, block_kv=64, **change)
    first = sparse_attention(q, k, v, config=config, grid=(8, 8, 8))
    for _ in range(3):
        assert torch.equal(sparse_attention(q, k, v, config=config, grid=(8, 8, 8)), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("text", [(0, 0), (70, 9)])
@pytest.mark.parametrize("tail", ["gaussian", NOT_FITTED], ids=str)
def test_the_whole_operation_replays_in_a_cuda_graph(tail, text, dim):
    """Nothing waits for the host; other inputs give other lists in the replay."""
    config = Config(density=0.3, block_q=64, block_kv=64, tail=tail)

    def inputs(seed):
        tokens = fields((1, 1, 640 + sum(text)), dim=dim, seed=seed)
        return [x.to("cuda", torch.bfloat16) for x in tokens]

    def attend(q, k, v):
        return sparse_attention(q, k, v, config=config, grid=(8, 10, 8), text=text)

    held = inputs(0)
    attend(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend(*held)
    for old, new in zip(held, inputs(5), strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(output, attend(*held))
