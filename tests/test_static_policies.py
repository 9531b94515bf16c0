"""Policies that follow from the grid: each against a plain statement of its rule."""

import itertools
import logging
import math

import pytest
import torch

from uta_fx import Config, sparse_attention
from uta_fx.attention import pool_blocks, reorder_tokens
from uta_fx.policies import Radial, SlidingTile, SpatialTemporal, Window
from uta_fx.policies.radial import radial_blocks, reach_of
from uta_fx.policies.sliding_tile import tiles_in_window
from uta_fx.policies.spatial_temporal import sampled_rows

LIKE = torch.empty(0)


def site(policy, grid, *, density=0.3, order="auto", block_q=16, block_kv=16, budget="row", seed=0):
    """What a policy sees of random queries, keys and values; and the tokens of its blocks."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 2, math.prod(grid), 16, generator=generator).unbind()
    config = Config(
        policy=policy, density=density, reorder=order, budget=budget,
        block_q=block_q, block_kv=block_kv,
    )  # fmt: skip
    (q, k, v), inverse = reorder_tokens(q, k, v, config, grid)
    order = torch.arange(math.prod(grid)) if inverse is None else inverse.argsort()
    places = [tuple(x.tolist() for x in torch.unravel_index(i, grid)) for i in order]
    return pool_blocks(q, k, v, config, None, grid), places


def blocks(places, size):
    return [places[i : i + size] for i in range(0, len(places), size)]


def assert_mostly(exact, rows, columns, wanted):
    """Kept is what has at least half of its pairs wanted, and the best of each row."""
    for n, row in enumerate(rows):
        shares = [
            sum(wanted(a, b) for a in row for b in column) / len(row) / len(column)
            for column in columns
        ]
        kept = [m for m, share in enumerate(shares) if share >= 0.5 or share == max(shares)]
        assert exact[n].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("frames", "tokens", "decay", "sink", "density", "token_density"),
    [
        (18, 3840, 0.2, True, 0.287, 0.269),  # Wan 2.1, 69 frames of 768 x 1280
        (21, 3840, 0.2, True, 0.261, 0.241),  # 81 frames
        (
            21,
            1560,
            0.2,
            True,
            0.339,
            0.307,
        ),  # of 480 x 832: blocks straddle frames, the last ragged
        (21, 3840, 0.8, True, 0.342, 0.336),  # Wan 2.2
        (30, 3840, 0.95, False, 0.275, 0.259),  # HunyuanVideo, 117 frames
        (64, 3840, 0.95, False, 0.175, 0.155),  # 253 frames
        (128, 3840, 0.95, False, 0.110, 0.093),  # 509 frames: distant ones are skipped
    ],
)
def test_radial_keeps_what_radial_attention_keeps(
    frames, tokens, decay, sink, density, token_density
):
    """Densities of the published mask, in blocks of 128, and of the rule for single tokens."""
    mask = radial_blocks(LIKE, [frames, tokens, 1], 128, 128, decay, sink)
    assert mask.double().mean().item() == pytest.approx(density, abs=5e-4)
    pairs = 0
    for i, j in itertools.product(range(frames), repeat=2):
        reach = min(reach_of(0 if sink and j == 0 else abs(i - j), tokens, decay, 128), tokens - 1)
        if reach >= 0:
            pairs += tokens * (2 * reach + 1) - reach * (reach + 1)
    assert pairs / (frames * tokens) ** 2 == pytest.approx(token_density, abs=6e-4)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("grid", "block_q", "block_kv"),
    [((9, 5, 7), 16, 16), ((6, 10, 9), 32, 16), ((21, 3, 4), 16, 32)],
)
def test_radial_is_its_rule(grid, block_q, block_kv, sink):
    """Token by token, in frames shorter and longer than a block, with a ragged last block."""
    policy = Radial(decay=0.3, sink=sink)
    selection, _ = site(policy, grid, block_q=block_q, block_kv=block_kv)
    exact = policy.select(selection)
    frames, size = grid[0], grid[1] * grid[2]
    power = 2 ** math.floor(math.log2(size) + 1)
    length = frames * size
    expected = torch.zeros(exact.shape[2:], dtype=torch.bool)
    for i, j in itertools.product(range(frames), repeat=2):
        delta = 0 if sink and j == 0 else abs(i - j)
        bits = len(f"{delta:b}") if delta else 0
        if delta > 1 and power / 2**bits < 128 and delta % (128 * 2**bits // power):
            continue
        width = size if delta <= 1 else max(0.3 * power / 2**bits, block_q, block_kv)
        r, c = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        pairs = torch.zeros(length, length)
        pairs[i * size : (i + 1) * size, j * size : (j + 1) * size] = (
            (r - c).abs() <= width
        ).float()
        for n, m in itertools.product(*map(range, expected.shape)):
            share = pairs[n * block_q : (n + 1) * block_q, m * block_kv : (m + 1) * block_kv].mean(
                0
            )
            if (share > 0).any() and (share > 1 / 3).sum() / (share > 0).sum() > 0.6:
                expected[n, m] = True
    assert exact.equal(expected.expand_as(exact))


def test_sliding_tiles_are_as_dense_as_published():
    """Windows on the 5 x 6 x 10 tiles of HunyuanVideo, and the mean of its published table.

    The shares of the table are rounded to percents, each off by up to half of one.
    """
    table = {
        (5, 6, 10): (0.30, 1.0), (5, 3, 3): (0.28, 0.15), (1, 6, 10): (0.22, 0.2),
        (3, 3, 5): (0.10, 0.15), (5, 1, 10): (0.07, 1 / 6), (5, 6, 1): (0.02, 0.1),
    }  # fmt: skip
    mean = rounding = 0.0
    for window, (share, density) in table.items():
        mask = tiles_in_window((5, 6, 10), window)
        assert mask.double().mean().item() == pytest.approx(density)
        assert mask.sum(1).unique().numel() == 1  # at the border the window stays inside
        mean += share * density
        rounding += 0.005 * density
    assert mean == pytest.approx(0.416, abs=rounding)


@pytest.mark.parametrize("order", ["none", "tile"])
@pytest.mark.parametrize("grid", [(5, 6, 7), (4, 8, 8)])
def test_sliding_tile_is_its_rule(grid, order):
    """Tiles that do not divide the grid, windows that reach over it, one window a head."""
    tile, windows = (2, 4, 3), ((1, 3, 1), (3, 1, 3))
    policy = SlidingTile(tile=tile, windows=windows)
    selection, places = site(policy, grid, order=order, block_kv=32)
    exact = policy.select(selection)
    counts = [math.ceil(length / side) for length, side in zip(grid, tile, strict=True)]
    for head, window in enumerate(windows):

        def seen(a, b, window=window):
            for x, y, side, count, width in zip(a, b, tile, counts, window, strict=True):
                half = width // 2
                center = min(max(x // side, half), count - 1 - half)
                if abs(center - y // side) > half:
                    return False
            return True

        assert_mostly(exact[0, head], blocks(places, 16), blocks(places, 32), seen)


@pytest.mark.parametrize("order", ["none", "tile"])
@pytest.mark.parametrize("sink", [False, True])
def test_bands_are_their_rule(order, sink):
    """A head whose keys depend on the frame is spatial, one whose keys depend on the place not."""
    grid, density = (6, 5, 7), 0.4
    policy = SpatialTemporal(sink=sink, rows=20)
    selection, places = site(policy, grid, order=order, density=density)
    length = math.prod(grid)
    # queries and keys of one frame (head 0), or of one place (head 1), point the same way
    where = torch.tensor([(frame, row * 7 + column) for frame, row, column in places])
    for head, count in enumerate((6, 35)):
        directions = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
        directions = 6 * torch.nn.functional.normalize(directions, dim=1)
        for tensor in (selection.query, selection.key):
            tensor[0, head] = directions[where[:, head]]
    exact = policy.select(selection)
    reach = round(length * (1 - math.sqrt(1 - density)))
    lines = (
        lambda place: (place[0] * 5 + place[1]) * 7 + place[2],
        lambda place: (place[1] * 7 + place[2]) * 6 + place[0],
    )
    for head, line in enumerate(lines):
        kept = exact[0, head].clone()
        columns = blocks(places, 16)
        if sink:
            first = torch.tensor([any(place[0] == 0 for place in block) for block in columns])
            assert kept[:, first].all()
        else:
            first = torch.zeros(len(columns), dtype=torch.bool)
        for n, row in enumerate(columns):
            shares = torch.tensor(
                [
                    sum(abs(line(a) - line(b)) <= reach for a in row for b in block)
                    / len(row) / len(block)
                    for block in columns
                ]
            )  # fmt: skip
            expected = (shares >= 0.5) | (shares == shares.max()) | first
            assert kept[n].equal(expected)


def test_bands_are_as_dense_as_asked_for():
    """On a grid of a real model, within a block on each side."""
    policy = SpatialTemporal(sink=False)
    for density in (0.1, 0.25, 0.5):
        selection, _ = site(policy, (13, 30, 45), density=density, block_q=64, block_kv=64)
        kept = policy.select(selection).double().mean().item()
        assert kept == pytest.approx(density, abs=0.02)


def test_sampled_rows_are_distinct_and_the_same_each_time():
    """And fewer where there are fewer tokens."""
    rows = sampled_rows(LIKE, 1000, 64, 0)
    assert rows.unique().equal(rows) and len(rows) == 64 and rows.max() < 1000
    assert rows.equal(sampled_rows(LIKE, 1000, 64, 0))
    assert not rows.equal(sampled_rows(LIKE, 1000, 64, 1))
    assert sampled_rows(LIKE, 40, 64, 0).equal(torch.arange(40))


@pytest.mark.parametrize("order", ["none", "tile", "hilbert"])
@pytest.mark.parametrize("frame_distance", [1.0, 0.25])
def test_window_keeps_the_nearest(order, frame_distance):
    """By centers of blocks; of equal distances any."""
    policy = Window(frame_distance=frame_distance)
    selection, places = site(policy, (5, 6, 7), order=order, block_q=32)
    exact = policy.select(selection)
    rows, columns = (
        [[sum(x) / len(block) for x in zip(*block, strict=True)] for block in blocks(places, size)]
        for size in (32, 16)
    )
    for n, (f, y, x) in enumerate(rows):
        distances = torch.tensor(
            [math.hypot((f - g) * frame_distance, y - z, x - w) for g, z, w in columns],
            dtype=torch.float64,
        )
        kept = exact[0, 0, n]
        assert kept.sum() == math.ceil(0.3 * len(columns))
        assert distances[kept].max() <= distances[~kept].min() + 1e-9


@pytest.mark.parametrize("name", ["radial", "sliding_tile", "spatial_temporal", "window"])
def test_a_missing_grid_is_named(name):
    """It is not guessed."""
    q = torch.zeros(1, 2, 64, 16)
    with pytest.raises(ValueError, match=f"grid must be given for policy {name}, got None"):
        sparse_attention(q, q, q, config=Config(policy=name, block_q=16, block_kv=16))


def test_a_site_without_a_grid_stays_dense(caplog):
    """And says why: a static policy in raster order needs the grid as well."""

    def attend(x):
        q, k, v = (x * factor for factor in (1, 2, 3))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    x = torch.randn(1, 2, 64, 16)
    options = {"policy": "radial", "min_tokens": 16, "inner": "eager"}
    with torch.no_grad(), caplog.at_level(logging.INFO, "uta_fx.backend"):
        output = torch.compile(attend, backend="uta", options=options)(x)
    torch.testing.assert_close(output, attend(x))
    assert "lie in frames, rows and columns; give grid" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Radial(decay=0), "decay must be above 0, got 0"),
        (lambda: SlidingTile(tile=(0, 8, 8)), r"tile must hold three positive .* \(0, 8, 8\)"),
        (lambda: SlidingTile(windows=((3, 3),)), r"windows must hold three positive .* \(3, 3\)"),
        (lambda: SlidingTile(windows=()), "windows must hold one window, or one a head, got none"),
        (lambda: SpatialTemporal(rows=0), "rows must be at least 1, got 0"),
        (lambda: Window(frame_distance=0), "frame_distance must be above 0, got 0"),
        (
            lambda: Config(policy="radial", reorder="tile"),
            "reorder must be auto or none for policy radial, whose rule has no meaning in another",
        ),
    ],
)
def test_parameters_out_of_range(make, message):
    """The field, what is expected and what came."""
    with pytest.raises(ValueError, match=message):
        make()


def test_windows_must_be_as_many_as_heads():
    """Or one for all."""
    policy = SlidingTile(windows=((1, 1, 1),) * 3)
    selection, _ = site(policy, (4, 4, 4))
    with pytest.raises(
        ValueError, match=r"windows must hold one .* one for each of 2 heads, got 3"
    ):
        policy.select(selection)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["radial", "spatial_temporal", "rectified"])
def test_a_static_policy_is_recorded_into_a_cuda_graph(policy):
    """What it keeps on the device is no part of the graph's memory; later calls see it whole."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 960, 64, generator=generator).cuda().unbind()
    tail = "rectified" if policy == "rectified" else "block"
    config = Config(policy=policy, tail=tail, density=0.3)

    def attend(q, k, v):
        return sparse_attention(q, k, v, config=config, grid=(6, 10, 16))

    with torch.no_grad():
        expected = attend(q, k, v)
        compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.testing.assert_close(compiled(q, k, v).clone(), expected, rtol=1e-3, atol=1e-4)
            torch.compiler.cudagraph_mark_step_begin()
