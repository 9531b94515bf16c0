"""The study of published systems: oracle errors, fitted densities, rows, table and plot."""

import dataclasses
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from uta_fx import Config, sparse_attention
from uta_fx.bench.inputs import Shape
from uta_fx.policies import SVG2, Radial
from uta_fx.study.oracle import (
    RULES,
    OracleError,
    choose_tokens,
    measure_oracle,
    token_oracle,
)
from uta_fx.study.oracle import markdown as oracle_markdown
from uta_fx.study.sites import AttentionCall
from uta_fx.study.systems import (
    SYSTEMS,
    Row,
    Site,
    _operation,
    attention_rows,
    find_systems,
    fit,
    in_order,
    record,
    timed_rows,
)
from uta_fx.study.systems_report import (
    draw,
    equal_time,
    error_at,
    markdown,
    read_json,
    tails_apart,
    write_json,
)

GRID = (4, 8, 8)


def call(seed=0, grid=GRID, dim=16):
    """Fields that vary smoothly over the grid."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(side) / 4 for side in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    q, k, v = (
        2 * torch.sin(position @ torch.randn(1, 2, 3, dim, generator=generator)) for _ in range(3)
    )
    return AttentionCall(0, 0.5, grid, q, k, v)


def test_the_token_oracle_is_its_equations():
    """Row by row: the softmax over the kept keys, and with one more that stands for the others."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 8, generator=generator, dtype=torch.float64).unbind()
    dropped, aggregated, recall = token_oracle(q, k, v, 0.7, 0.3)
    for head in range(2):
        for row in range(20):
            logits = 0.7 * k[0, head] @ q[0, head, row]
            order = logits.argsort(descending=True)
            kept, others = order[:6], order[6:]
            expected = logits[kept].softmax(0) @ v[0, head, kept]
            torch.testing.assert_close(dropped[0, head, row], expected)
            extended = torch.cat([logits[kept], logits[others].mean()[None] + math.log(14)])
            values = torch.cat([v[0, head, kept], v[0, head, others].mean(0)[None]])
            torch.testing.assert_close(aggregated[0, head, row], extended.softmax(0) @ values)
            mass = logits.softmax(0)[kept].sum()
            torch.testing.assert_close(recall[0, head, row], mass)


def test_tokens_are_chosen_by_their_rules():
    """Row by row; the rows of top-p share one mass, with which they keep what is asked for."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 30, 20, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 20, 8, generator=generator, dtype=torch.float64)
    nucleus = choose_tokens(logits, value, 0.3, "topp")
    assert nucleus.sum() == round(0.3 * nucleus.numel()) and nucleus.any(-1).all()
    held = (logits.softmax(-1) * nucleus).sum(-1)
    last = (logits.softmax(-1)).masked_fill(~nucleus, 1.0).amin(-1)
    assert (held - last).max() <= held.min()  # a mass between these gives just these tokens
    chosen = choose_tokens(logits, value, 0.3, "low_delta")
    for head in range(2):
        nu = [(v - value[head].mean(0)).norm().item() for v in value[head]]
        for row in range(30):
            z = logits[head, row].tolist()
            total, mean = sum(math.exp(x) for x in z), sum(z) / 20
            scores = [math.exp(x) / total * (x - mean) ** 2 * n for x, n in zip(z, nu, strict=True)]
            expected = sorted(sorted(range(20), key=lambda i: -scores[i])[:6])
            assert chosen[head, row].nonzero().flatten().tolist() == expected
    with pytest.raises(ValueError, match="rule must be one of topk, topp, low_delta, got 'best'"):
        choose_tokens(logits, value, 0.3, "best")


@pytest.mark.parametrize("rule", RULES)
def test_the_token_oracle_at_density_one_is_dense(rule):
    """Then there is no tail, and no error."""
    site = call()
    dropped, aggregated, recall = token_oracle(site.query, site.key, site.value, 0.25, 1.0, rule)
    dense = site.dense().double()
    torch.testing.assert_close(dropped, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aggregated, dropped)
    assert recall.min() > 1 - 1e-9


def test_oracle_errors_are_averaged_over_rows_and_calls():
    """In one piece or in several; what is drawn is drawn once."""
    sites = [call(0), call(1)]
    errors = measure_oracle(sites, (0.2, 0.5), ("topk",))
    means = []
    for site in sites:
        exact, _, _ = token_oracle(site.query, site.key, site.value, 0.25, 1.0)
        dropped, aggregated, _ = token_oracle(site.query, site.key, site.value, 0.25, 0.5)
        means.append([(x - exact).square().mean().item() for x in (dropped, aggregated)])
    assert errors[1].dropped == pytest.approx((means[0][0] + means[1][0]) / 2)
    assert errors[1].aggregated == pytest.approx((means[0][1] + means[1][1]) / 2)
    assert measure_oracle(sites, (0.5,), rows=10) == measure_oracle(sites, (0.5,), rows=10)
    rules = [error.rule for error in measure_oracle(sites, (0.5,), rows=10)]
    assert rules == ["topk", "topp", "low_delta"]
    table = oracle_markdown([OracleError("topk", 0.5, 1e-2, 1e-3, 0.9)])
    assert "| Top-K + UTA | 1.00e-03 (-90.0%) |" in table and "| 50% |" in table


def test_a_density_is_reached_or_said_not_to_be():
    """By a system that has another parameter; what cannot be kept gives no configuration."""
    kept = Site((torch.randn(1, 1, 6144, 16),) * 3, (6, 32, 32)).kept
    (radial,) = find_systems(["Radial"])
    least = kept(Config(policy=Radial(decay=2**-8)))
    assert fit(radial, least / 2, kept) is None
    assert kept(fit(radial, 0.8, kept)) == pytest.approx(0.8, rel=0.2)
    (topk,) = find_systems(["Top-K"])
    assert fit(topk, 0.3, kept).density == 0.3
    with pytest.raises(ValueError, match=r"system must be among Top-K, .* ours, got Top"):
        find_systems(["Top"])


@pytest.fixture(scope="module")
def rows():
    """Every system on a small call."""
    return [row for row, _ in attention_rows([call()], (0.5, 1.0))]


def test_every_system_has_a_row_for_every_density(rows):
    """Of numbers that fit together: all kept is dense, half kept errs and is recalled in part."""
    assert [(row.system, row.density) for row in rows] == [
        (system.name, density) for system in SYSTEMS for density in (0.5, 1.0)
    ]
    for row in rows:
        if row.kept is not None:
            assert row.errors == (pytest.approx(row.error),)
        if row.kept == 1:
            assert row.mse < 1e-9 and row.recall == pytest.approx(1, abs=1e-5)
        elif row.kept is not None:
            assert row.mse > 0 and 0 < row.recall < 1
            assert abs(row.kept - row.density) <= 0.2 * row.density
    whole = [row for row in rows if row.density == 1]
    assert sum(row.kept == 1 for row in whole) > len(whole) / 2


def test_recall_and_error_are_those_of_the_blocks():
    """Stated once more for the nearest blocks, token by token in float64."""
    site = call()
    config = Config(policy="window", tail="none", density=0.5, reorder="none", budget="row")
    measured = Site((site.query, site.key, site.value), GRID)
    exact, _, _ = measured.exact(config)
    attention = (site.query.double() @ site.key.double().mT / 4).softmax(-1)
    tokens = exact.repeat_interleave(64, 2).repeat_interleave(64, 3)
    assert measured.recall(config) == pytest.approx((attention * tokens).sum(-1).mean().item())
    inside = attention * tokens
    output = inside / inside.sum(-1, keepdim=True) @ site.value.double()
    torch.testing.assert_close(measured.output(config).double(), output, rtol=1e-4, atol=1e-5)


def test_clusters_are_counted_by_their_tokens():
    """Share and recall of kept pairs of tokens, stated by what each token sees."""
    site = call()
    policy = SVG2(query_clusters=3, key_clusters=7, mass=0.5, least=0.0)
    config = Config(policy=policy, tail="none")
    measured = Site((site.query, site.key, site.value), GRID)
    attention = (site.query.double() @ site.key.double().mT / 4).softmax(-1)
    # what a query sees of a value that is one-hot by key is its attention
    one_hot = torch.eye(site.key.shape[2]).expand(*site.key.shape[:2], -1, -1)
    seen = torch.cat(
        [
            sparse_attention(site.query, site.key, part, config=config) > 0
            for part in one_hot.split(16, 3)
        ],
        3,
    )
    assert 0 < measured.kept(config) < 1
    assert measured.kept(config) == pytest.approx(seen.double().mean().item())
    recall = (attention * seen).sum(-1).mean().item()
    assert measured.recall(config) == pytest.approx(recall, rel=1e-5)


def test_times_are_measured_where_a_density_is_reached(tmp_path, rows):
    """And the table, the file and the plot hold what there is."""
    shape = Shape(name="small", batch=1, heads=2, grid=GRID, dim=16)
    site = call(3)
    chosen = find_systems(["Top-K + single", "ours"])
    some = [row for row in rows if row.system in ("Top-K + single", "ours")]
    inputs = (site.query, site.key, site.value)
    timed = list(timed_rows(some, shape, inputs, chosen, rounds=2, compile=False))
    for row in timed:
        assert row.ms > 0 and row.speedup > 0
        assert row.timed_kept == pytest.approx(row.density, abs=0.01)
        assert (row.timed_error < 1e-9) == (row.timed_kept == 1)
    empty = Row(system="Radial", density=0.1)
    pictured = [dataclasses.replace(row, psnr=30.0) for row in timed]
    table = markdown([*pictured, empty])
    assert table.splitlines()[0].startswith("| system | density | kept | MSE |")
    assert "speed-up" in table and table.splitlines()[6].count(" - ") == 9
    assert "ms" not in markdown(rows)
    write_json(tmp_path / "rows.json", {"machine": "here"}, pictured)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"] == "here" and read_json(tmp_path / "rows.json") == pictured
    pytest.importorskip("matplotlib")
    draw(tmp_path / "rows.png", [*pictured, empty], "title")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_dense_is_scaled_dot_product_attention():
    """The baseline of every error."""
    site = call()
    torch.testing.assert_close(
        site.dense(), F.scaled_dot_product_attention(site.query, site.key, site.value)
    )


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    """By an error, before any work."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from uta_fx.commands import app

    for arguments, message in (
        (("--system", "Best"), "system must be among Top-K"),
        (("--shape", "huge"), "--shape must be one of wan-1.3b-480p"),
    ):
        command = ["study", "policies", "--output", str(tmp_path), *arguments]
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, ValueError) and message in str(result.exception)


@pytest.mark.parametrize("name", ["SVG2", "ours"])
def test_recall_is_that_of_the_tokens_whatever_the_blocks(name):
    """Of clusters and of tiles: what a token sees exactly, token by token."""
    site = call()
    (system,) = find_systems([name])
    config = system.config(0.5)
    measured = Site((site.query, site.key, site.value), GRID)
    exact, rows, columns = measured.exact(config)
    attention = (site.query.double() @ site.key.double().mT / 4).softmax(-1)
    seen = torch.zeros(2, 256, 256, dtype=torch.bool)
    for head in range(2):
        for i in range(256):
            seen[head, i] = exact[0, head, rows[0, head, i]][columns[0, head]]
    assert measured.kept(config) == pytest.approx(seen.double().mean().item())
    assert measured.recall(config) == pytest.approx((attention[0] * seen).sum(-1).mean().item())


@pytest.mark.gpu
@pytest.mark.parametrize("system", find_systems(None), ids=lambda system: system.name)
def test_a_recorded_operation_gives_what_it_gives_by_itself(system):
    """Launched again from a CUDA graph, bit for bit: no policy waits for the host."""
    site = call(grid=(8, 16, 16), dim=64)
    inputs = tuple(x.cuda().bfloat16() for x in (site.query, site.key, site.value))
    config = system.config(0.5)
    with torch.no_grad():
        operation = functools.partial(_operation(config, inputs, (8, 16, 16), False), *inputs)
        expected = operation()
        replay = record(operation)
        replay().zero_()
        torch.testing.assert_close(replay(), expected, rtol=0, atol=0)


def test_a_system_that_fails_leaves_the_others(monkeypatch):
    """Its rows say why, in one line."""
    whole = Site.output

    def output(self, config):
        if config.policy == "topk":
            raise RuntimeError("out of blocks\nand more")
        return whole(self, config)

    monkeypatch.setattr(Site, "output", output)
    chosen = find_systems(["Top-K", "ours"])
    found = list(attention_rows([call()], (0.5,), chosen))
    assert found[0] == (
        Row(system="Top-K", density=0.5, failure="RuntimeError: out of blocks"),
        None,
    )
    assert found[1][0].mse > 0 and found[1][0].failure is None
    assert markdown([row for row, _ in found]).endswith("Top-K at 0.5: RuntimeError: out of blocks")


def test_the_report_says_who_errs_less_in_the_same_time():
    """Between two of our times on a line through logarithms; beyond them what is known."""

    def row(system, ms, error, density=0.1):
        return Row(system=system, density=density, ms=ms, timed_error=error)

    ours = [row("ours", 2.0, 1e-2), row("ours", 8.0, 1e-4, 0.5)]
    assert equal_time(ours) == [] == equal_time([row("SVG2", 1.0, 1.0)])
    curve = [(2.0, 1e-2), (8.0, 1e-4)]
    assert error_at(curve, 4.0) == pytest.approx(1e-3)
    assert error_at(curve, 1.9) is None and error_at(curve, 9.0) == 1e-4
    others = [row("SVG2", 4.0, 2e-3), row("Top-K", 4.0, 9e-4), row("Radial", 1.5, 1e-1)]
    first, lower, faster = equal_time([*ours, *others, Row(system="Radial", density=0.5)])
    assert first == "At equal time ours has the lowest error beside 1 of 3 rows of other systems."
    assert (
        lower == "Lower than ours at equal time: Top-K at 0.1 (4.00 ms, 9.0e-04 against 1.0e-03)."
    )
    assert faster.endswith("row of ours (2.00 ms): Radial at 0.1 (1.50 ms, 1.0e-01).")
    assert markdown([*ours, *others]).splitlines()[-3:] == [first, lower, faster]


def test_the_report_says_where_a_tail_helps():
    """At which densities, at the timed shape, and on how many calls by themselves."""

    def row(system, density, errors, timed=None):
        mean = sum(errors) / len(errors)
        return Row(system=system, density=density, error=mean, errors=errors, timed_error=timed)

    rows = [
        row("Radial", 0.3, (2.0, 2.0), 1.0),
        row("Radial", 0.5, (1.0, 1.0), 0.5),
        Row(system="Radial", density=0.1),
        row("Radial + single", 0.3, (3.0, 0.5), 2.0),
        row("Radial + single", 0.5, (2.0, 0.5), 0.4),
        row("ours", 0.5, (0.1, 0.1), 0.1),
    ]
    assert tails_apart(rows) == [
        "Radial + single errs less than Radial at 1 of 2 densities on the model's calls,"
        " at 1 of 2 densities on the timed shape, on 2 of 4 single calls."
    ]
    assert tails_apart(rows[-1:]) == [] == tails_apart(rows[3:])


def test_a_study_measures_ours_at_less_too_and_sorts_its_rows():
    """So that its times reach those of others, whatever was measured first."""
    ours, topk = find_systems(["ours", "Top-K"])
    assert set(topk.densities) < set(ours.densities) and min(ours.densities) < min(topk.densities)
    rows = [Row(system=name, density=d) for name in ("ours", "Top-K") for d in (0.5, 0.1)]
    assert [(row.system, row.density) for row in in_order(rows)] == [
        ("Top-K", 0.1), ("Top-K", 0.5), ("ours", 0.1), ("ours", 0.5),
    ]  # fmt: skip
