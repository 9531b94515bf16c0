"""Each policy against a plain statement of its rule."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from uta_fx import Config, sparse_attention
from uta_fx.attention import pool_blocks
from uta_fx.policies import (
    BY_NAME,
    OracleLowDelta,
    OracleTopK,
    OracleTopP,
    Random,
    Threshold,
    TopP,
)
from uta_fx.tails import KINDS

BLOCK = 16


def select(policy, density=1.0, budget="row", length=100, scale=None, batch=1):
    """Inputs of one head pair and what the policy keeps of their ragged blocks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, length, 16, generator=generator).unbind()
    config = Config(density=density, budget=budget, block_q=BLOCK, block_kv=BLOCK)
    return q, k, policy.select(pool_blocks(q, k, v, config, scale=scale))


def pooled_logits(q, k, head, row, scale):
    """Means of blocks multiplied, one by one, in float64."""
    query = q[0, head].double().split(BLOCK)[row].mean(0)
    keys = k[0, head].double().split(BLOCK)
    return [scale * (query @ block.mean(0)).item() for block in keys], [len(x) for x in keys]


@pytest.mark.parametrize(
    ("policy", "density"),
    [(TopP(mass=0.6), 1.0), (TopP(mass=0.95, least=0.5), 1.0), (TopP(mass=0.99), 0.4)],
    ids=str,
)
def test_topp_keeps_the_fewest_blocks_that_hold_the_mass(policy, density):
    """At least its floor of them, and at most the density."""
    q, k, exact = select(policy, density, scale=2.0)
    for head, row in itertools.product(range(2), range(7)):
        logits, sizes = pooled_logits(q, k, head, row, 2.0)
        weights = [math.exp(x) * n for x, n in zip(logits, sizes, strict=True)]
        order = sorted(range(7), key=lambda i: -weights[i])
        expected, held = [], 0.0
        for block in order:
            if held >= policy.mass * sum(weights) and len(expected) >= math.ceil(policy.least * 7):
                break
            expected.append(block)
            held += weights[block]
        expected = sorted(expected[: math.ceil(density * 7)])
        assert exact[0, head, row].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("policy", [Threshold(), Threshold(deviations=0.3, neighbours=0)], ids=str)
def test_threshold_keeps_what_stands_out_and_neighbours(policy):
    """Above the mean of the row's logits by so many of their deviations."""
    q, k, exact = select(policy, scale=2.0)
    for head, row in itertools.product(range(2), range(7)):
        logits, _ = pooled_logits(q, k, head, row, 2.0)
        mean = sum(logits) / 7
        deviation = math.sqrt(sum((x - mean) ** 2 for x in logits) / 7)
        expected = [
            block
            for block in range(7)
            if logits[block] > mean + policy.deviations * deviation
            or abs(block - row) <= policy.neighbours
        ]
        assert exact[0, head, row].nonzero().flatten().tolist() == expected


def true_attention(q, k, head, row, scale):
    """Weights and logits of each row of a query block, in float64: ``[rows, L]``."""
    logits = scale * q[0, head].double().split(BLOCK)[row] @ k[0, head].double().T
    return logits.softmax(-1), logits


def test_oracle_topk_keeps_the_blocks_of_most_true_attention():
    """Averaged over the rows of a query block."""
    q, k, exact = select(OracleTopK(), density=0.4, scale=1.0)
    for head, row in itertools.product(range(2), range(7)):
        attention, _ = true_attention(q, k, head, row, 1.0)
        mass = [block.sum(1).mean().item() for block in attention.split(BLOCK, 1)]
        expected = sorted(sorted(range(7), key=lambda i: -mass[i])[:3])
        assert exact[0, head, row].nonzero().flatten().tolist() == expected


def test_oracle_topp_keeps_the_fewest_blocks_that_truly_hold_the_mass():
    """Recall is at least the mass in every row, and less without the smallest of its blocks."""
    q, k, exact = select(OracleTopP(mass=0.8), scale=1.0)
    for head, row in itertools.product(range(2), range(7)):
        attention, _ = true_attention(q, k, head, row, 1.0)
        mass = torch.stack([block.sum(1).mean() for block in attention.split(BLOCK, 1)])
        kept = mass[exact[0, head, row]]
        assert kept.sum() >= 0.8 > kept.sum() - kept.min()
        assert kept.min() >= mass[~exact[0, head, row]].max()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_oracle_low_delta_keeps_the_largest_true_errors(power):
    """True attention times a power of the true variance of each row's logits, times the values'."""
    policy = OracleLowDelta(power=power)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 100, 16, generator=generator).unbind()
    config = Config(density=0.4, budget="row", block_q=BLOCK, block_kv=BLOCK)
    exact = policy.select(pool_blocks(q, k, v, config, scale=1.0))
    for head, row in itertools.product(range(2), range(7)):
        attention, logits = true_attention(q, k, head, row, 1.0)
        spread = [x.double().var(0, correction=0).sum().sqrt() for x in v[0, head].split(BLOCK)]
        scores = [
            (weights.sum(1) * part.var(1, correction=0) ** power).mean() * nu
            for weights, part, nu in zip(
                attention.split(BLOCK, 1), logits.split(BLOCK, 1), spread, strict=True
            )
        ]
        expected = sorted(sorted(range(7), key=lambda i: -scores[i])[:3])
        assert exact[0, head, row].nonzero().flatten().tolist() == expected


def test_threshold_keeps_what_sol_attn_says_of_gaussian_logits():
    """16, 7 and 2 % at 1, 1.5 and 2 deviations."""
    for deviations, share in ((1.0, 0.159), (1.5, 0.067), (2.0, 0.023)):
        policy = Threshold(deviations=deviations, neighbours=0)
        _, _, exact = select(policy, length=256 * BLOCK)
        assert exact.double().mean().item() == pytest.approx(share, abs=0.005)


def test_threshold_at_its_ends_keeps_neighbours_alone_or_all():
    """Tau without bound: the golden values of Sol-Attn's rule."""
    place = torch.arange(7)
    near = (place[:, None] - place).abs() <= 1
    assert select(Threshold(deviations=math.inf))[2].eq(near).all()
    assert select(Threshold(deviations=-math.inf))[2].all()


def test_random_is_the_same_at_every_call_and_another_with_another_seed():
    """And spends its budget evenly: counts of a row are those of a fair draw, to five sigma."""
    length, density = 128 * BLOCK, 0.25
    _, _, exact = select(Random(), density, "site", length, batch=2)
    assert torch.equal(exact[0], exact[1])
    assert torch.equal(exact, select(Random(), density, "site", length, batch=2)[2])
    other = select(Random(seed=1), density, "site", length, batch=2)[2]
    assert exact.double().mean().item() == pytest.approx(density, abs=0.001)
    sigma = math.sqrt(128 * density * (1 - density))
    for dim in (-1, -2):
        counts = exact[0].sum(dim).double()
        assert (counts - 128 * density).abs().max() <= 5 * sigma
        assert counts.std() == pytest.approx(sigma, rel=0.25)
    # neighbours and other seeds are independent: they agree as often as two fair draws do
    agreement = density**2 + (1 - density) ** 2
    for a, b in (
        (exact[0, :, 1:], exact[0, :, :-1]),
        (exact[0, :, :, 1:], exact[0, :, :, :-1]),
        (exact[0, 0], exact[0, 1]),
        (exact, other),
    ):
        assert (a == b).double().mean().item() == pytest.approx(agreement, abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopP(mass=0), r"mass must be in \(0, 1\], got 0"),
        (lambda: TopP(least=1.5), r"least must be in \[0, 1\], got 1.5"),
        (lambda: Threshold(neighbours=-1), "neighbours must be at least 0, got -1"),
        (lambda: Random(seed=-1), "seed must be in"),
        (lambda: OracleTopP(mass=2), r"mass must be in \(0, 1\], got 2"),
        (lambda: OracleLowDelta(power=-1), "power must not be negative, got -1"),
    ],
)
def test_parameters_out_of_range(make, message):
    """The field, what is expected and what came."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", BY_NAME)
def test_every_policy_goes_with_every_tail(name):
    """Ragged blocks included. So few tokens are one window of tiles: dense.

    Clusters have no blocks that ``rectified`` could weigh: that is said.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 105, 16, generator=generator).unbind()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    outputs = {}
    for tail in KINDS:
        if (name, tail) == ("svg2", "rectified"):
            with pytest.raises(ValueError, match="tail rectified has no meaning with policy svg2"):
                Config(policy=name, tail=tail)
            continue
        config = Config(density=0.4, policy=name, tail=tail, block_q=BLOCK, block_kv=BLOCK)
        outputs[tail] = sparse_attention(q, k, v, config=config, grid=(3, 5, 7))
        assert outputs[tail].isfinite().all()
    exact = [torch.allclose(output, dense, rtol=1e-4, atol=1e-5) for output in outputs.values()]
    assert all(exact) or not any(exact)
    assert all(exact) == (name == "sliding_tile")


@pytest.mark.parametrize("name", BY_NAME)
def test_every_policy_by_its_name_in_the_operation(name):
    """Traced by torch.compile without a break, it gives what it gives by itself."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 96, 16, generator=generator).unbind()
    config = Config(density=0.4, policy=name, block_q=BLOCK, block_kv=BLOCK)

    def call(q, k, v):
        return sparse_attention(q, k, v, config=config, grid=(2, 6, 8))

    with torch.no_grad():
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v)
        torch.testing.assert_close(compiled, call(q, k, v))
    assert not compiled.isnan().any()


@dataclasses.dataclass(frozen=True)
class Returning:
    """A policy of somebody else's, who has not read what to return."""

    made: Any

    def select(self, selection):
        """Whatever the shape of the site."""
        return self.made


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (None, "NoneType"),
        ([True], "list"),
        (torch.ones(1, 2, 6, 6), r"torch.float32 of shape \(1, 2, 6, 6\)"),
        (torch.ones(6, 6, dtype=torch.bool), r"torch.bool of shape \(6, 6\)"),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("tail", ["gaussian", "rectified"])
def test_a_policy_that_selects_by_no_mask_is_named(made, got, tail):
    """What it should return and what it does, however it is called."""
    q = torch.zeros(1, 2, 96, 16)
    fields = {"policy": Returning(made), "tail": tail, "block_q": BLOCK, "block_kv": BLOCK}
    message = (
        rf"select of policy Returning must return a boolean tensor \[B, H, Nq, Nk\], got {got}"
    )
    with pytest.raises(TypeError, match=message):
        sparse_attention(q, q, q, config=Config(**fields))

    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x, 2 * x, 3 * x)

    if made is None:
        options = {**fields, "reorder": "none", "min_tokens": 16, "inner": "eager"}
        compiled = torch.compile(attend, backend="uta", options=options)
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            compiled(q)
