"""Tails fitted to a few rows of exact attention: the rule restated, and the operator against it."""

import dataclasses
import math

import pytest
import torch
from cases import LAYOUTS, double, laid_out

from uta_fx import Config
from uta_fx.attention import pool_blocks
from uta_fx.bench.gate import exact_fit
from uta_fx.kernels import ops, reference
from uta_fx.kernels.reference import LIMIT, RIDGE, STEPS
from uta_fx.policies import LowDelta
from uta_fx.tails import Tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly without an error
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_a_fitted_tail_is_a_regression_on_sampled_rows(density):
    """Restated row by row in float64; the ridge is two equations more.

    The last of the rows is one of the six of a ragged query block.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=generator) for _ in range(3))
    v = v + k @ torch.randn(16, 16, generator=generator)  # so that there is a slope
    config = Config(density=density, reorder="none", block_q=16, block_kv=32)
    selection = pool_blocks(q, k, v, config, None)
    exact = LowDelta().select(selection)
    made = Tail(fit=12).representatives(selection, exact, k, v, 32)
    pooled = {name: x.double() for name, x in vars(selection.statistics).items()}
    q, k, v = (x.double() for x in (q, k, v))
    for head in range(2):
        rows = []  # exact output; exact part, tail's means and slope, each with its mass
        for i in ((2 * row + 1) * 70 // 24 for row in range(12)):
            query, block = selection.scale * q[0, head, i], i // 16
            p = (k[0, head] @ query).softmax(0)
            square = (selection.scale * q[0, head, 16 * block : 16 * block + 16]).square().mean(0)
            parts = torch.zeros(3, 17, dtype=torch.float64)
            with_mass = torch.cat([v[0, head], torch.ones(70, 1).double()], 1)
            for b in range(3):
                keys = slice(32 * b, min(32 * b + 32, 70))
                if exact[0, head, block, b]:
                    parts[0] += p[keys] @ with_mass[keys]
                    continue
                sigma2 = square @ pooled["key_variance"][0, head, b]
                mass = (query @ pooled["key_mean"][0, head, b] + sigma2 / 4).exp()
                mass = mass * (keys.stop - keys.start) / (k[0, head] @ query).exp().sum()
                parts[1, :16] += mass * pooled["value_mean"][0, head, b]
                parts[1, 16] += mass
                parts[2, :16] += mass / (1 + sigma2) * (query @ pooled["covariance"][0, head])
            rows.append((p @ v[0, head], parts))
        assert block == 4 and not exact[0, head, 4].all()
        mass = slope = 1.0
        for _ in range(STEPS):
            lines = [], [], []
            for output, (listed, of_means, of_slope) in rows:
                total = listed + mass * of_means + slope * of_slope
                given, total = total[:16] / total[16], total[16]
                u, x = (of_means[:16] - given * of_means[16]) / total, of_slope[:16] / total
                for line, of_row in zip(
                    lines, (u, x, output - given + (mass - 1) * u + (slope - 1) * x), strict=True
                ):
                    line.append(of_row)
            u, x, rest = (torch.cat(line) for line in lines)
            ridge = (torch.stack([u.norm(), x.norm()]) * RIDGE**0.5).diag()
            equations = torch.cat([torch.stack([u, x], 1), ridge])
            rest = torch.cat([rest, torch.zeros(2).double()])[:, None]
            of_u, of_x = (1 + torch.linalg.lstsq(equations, rest).solution[:, 0]).tolist()
            mass = min(max(of_u, 1 / LIMIT), LIMIT)
            slope = mass * min(max(of_x / mass, 0.0), LIMIT)
        assert 1 / LIMIT < mass < LIMIT and 0 < slope / mass < LIMIT  # nothing but the equations
        found = (made.log_size - selection.statistics.log_size)[0, head].double()
        covariance = selection.statistics.covariance[0, head]
        torch.testing.assert_close(
            found, torch.full((3,), math.log(mass)).double(), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            made.slope[0, head, 0], covariance * (slope / mass), rtol=1e-4, atol=1e-5
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of the operator, drawn from a seed."""

    batch: int = 1
    heads: int = 2
    length_q: int = 150
    length_kv: int = 300
    dim: int = 32
    dim_v: int = 32
    block_q: int = 32
    block_kv: int = 64
    rows: int = 16
    exact: float = 0.4  # probability that a block is
    counted: bool = False
    scale: float | None = None
    seed: int = 0

    def inputs(self, dtype, device=DEVICE):
        """Arguments of the operator, by position; statistics are those of the keys and values."""
        generator = torch.Generator().manual_seed(self.seed)
        lead = (self.batch, self.heads)

        def randn(*shape):
            return torch.randn(*lead, *shape, generator=generator)

        rows, blocks = -(-self.length_q // self.block_q), -(-self.length_kv // self.block_kv)
        shared = randn(1, self.dim)
        query, key = randn(self.length_q, self.dim) + shared, randn(self.length_kv, self.dim)
        # later keys have larger logits: sums begin anew again and again
        key = key + shared * torch.linspace(-0.5, 0.5, self.length_kv)[:, None]
        mix = torch.randn(self.dim, self.dim_v, generator=generator) * self.dim**-0.5
        value = randn(self.length_kv, self.dim_v) + randn(1, self.dim_v) + key @ mix
        query, key, value = (x.to(dtype) for x in (query, key, value))
        exact = torch.rand(*lead, rows, blocks, generator=generator) < self.exact
        sizes = torch.full((blocks,), float(self.block_kv))
        sizes[-1] = self.length_kv - self.block_kv * (blocks - 1)
        counts = torch.empty(*lead, 0, dtype=torch.int32)
        if self.counted:
            counts = torch.randint(0, self.block_kv + 1, (*lead, blocks), generator=generator).int()
            counts[..., -1] = 0
        log_size = counts.float().log() if self.counted else sizes.log().repeat(*lead, 1)
        mean, variance, value_mean, _, slope = reference.block_statistics(key, value, self.block_kv)
        tensors = (query, key, value, exact, counts, mean, variance, value_mean, log_size, slope)
        scale = self.dim**-0.5 if self.scale is None else self.scale
        numbers = (scale, 0.5, self.rows, self.block_q, self.block_kv)
        return [*(x.to(device) for x in tensors), *numbers]


CASES = {
    "ragged": Case(),
    "whole_blocks": Case(length_q=128, length_kv=256),
    "one_token": Case(length_q=1, length_kv=1, exact=0.0, rows=3),
    "one_row": Case(rows=1),
    "fewer_tokens_than_rows": Case(length_q=5, length_kv=40, block_kv=16),
    "everything_exact": Case(exact=1.0),
    "nothing_exact": Case(exact=0.0),
    "head_dims_of_their_own": Case(dim=24, dim_v=80, length_kv=150),
    "wide_head_dims": Case(dim=200, dim_v=256, heads=1, length_kv=150, rows=5),
    "large_blocks": Case(block_q=128, block_kv=128),
    "small_blocks": Case(block_q=16, block_kv=16, length_kv=100),
    "several_steps_of_means": Case(block_q=16, block_kv=16, length_kv=1000, heads=1),
    "several_parts": Case(length_kv=3100, block_kv=128, heads=1, batch=2),
    "clusters": Case(length_kv=320, counted=True),
    "every_second_block": Case(block_q=16, block_kv=16, length_kv=4795, heads=1),
    "every_third_cluster": Case(block_q=16, block_kv=16, length_kv=6400, heads=1, counted=True),
    "negative_scale": Case(scale=-0.3),
    "zero_scale": Case(scale=0.0),
    "nearly_all_in_tails": Case(scale=1.0, block_q=16, block_kv=16, exact=0.2),
}


def of_sampled_rows(args):
    """What the rows see, plainly: of keys and of means.

    Of the row's softmax over the keys of the sampled blocks: what lists and what the tail have of
    the output; the share of the lists; the log-sum-exp. Of that over the means of the tail's
    blocks: value, log-sum-exp, damping.
    """
    query, key, value, exact, counts, mean, variance, value_mean, log_size, _, *numbers = args
    scale, weight, rows, block_q, block_kv = numbers
    place = (2 * torch.arange(rows) + 1) * query.shape[2] // (2 * rows)
    sample = query[:, :, place] * scale
    listed = exact[:, :, place // block_q]
    of_keys = listed.repeat_interleave(block_kv, -1)[..., : key.shape[2]]
    every = max(1, exact.shape[3] // 64)
    unseen = torch.ones(exact.shape[3], dtype=torch.bool, device=key.device)
    for i in range(exact.shape[3] // every):
        unseen[i * every + int(i * 40503 / 65536 % 1 * every)] = False
    logits = sample @ key.mT
    logits[..., unseen.repeat_interleave(block_kv)[: key.shape[2]]] = -torch.inf
    if counts.shape[2]:
        inside = torch.arange(block_kv, device=key.device) < counts[..., None]
        logits = logits.masked_fill(~inside.flatten(2)[:, :, None], -torch.inf)
    p = logits.softmax(-1)
    sigma2 = reference.pooled_variance(query, variance, scale, block_q)[:, :, place // block_q]
    of_means = sample @ mean.mT + log_size[:, :, None] + weight / 2 * sigma2
    of_means = of_means.masked_fill(listed | unseen, -torch.inf)
    m = of_means.softmax(-1).nan_to_num(0.0)  # a row without a tail
    return (
        (p * of_keys) @ value, (p * ~of_keys) @ value, (p * of_keys).sum(-1), logits.logsumexp(-1),
        m @ value_mean, of_means.logsumexp(-1), (m / (1 + sigma2)).sum(-1),
    )  # fmt: skip


def roundings(args):
    """By how much, relatively, a kernel's weights and what is summed with them may be off.

    A logit is a sum of products that are exact in float32, and errs by 2^-24 of their absolute sum
    for each addition; so does, of the means, the variance of the logits. A softmax doubles that.
    Sums over keys err by 2^-24 for each addition, within a block of keys and from step to step, of
    at least 16 keys each. In 16 bits weights are rounded, and what a program leaves.
    """
    query, key, _, _, _, mean, variance, *_ = double(args)
    scale, dim = abs(args[10]), query.shape[3]
    sums = (query.abs() @ key.abs().mT).amax() * scale, (query.abs() @ mean.abs().mT).amax() * scale
    sigma2 = reference.pooled_variance(query, variance, scale, args[13]).amax()
    logit = 2**-24 * (dim + 8) * (max(sums) + 5 + sigma2)
    unit = torch.finfo(args[0].dtype).eps if args[0].dtype != torch.float32 else 0.0
    return (2 * logit + 2**-24 * (args[14] + key.shape[2] // 16 + 8) + unit).item()


@pytest.mark.parametrize("blocks", [1, 127, 128, 129, 191, 192, 275, 1182, 2048, 5000])
def test_one_block_of_every_few_is_looked_at(blocks):
    """Wherever that is among them: of 16 columns of blocks none is looked at much more often."""
    every = reference.spacing(blocks)
    sample = [reference.sampled_block(i, every) for i in range(blocks // every)]
    assert min(blocks, 64) <= len(sample) < 128
    assert [block // every for block in sample] == [*range(len(sample))]
    assert torch.equal(
        torch.tensor(sample), reference.sampled_block(torch.arange(len(sample)), every)
    )
    columns = torch.tensor(sample).remainder(16).bincount(minlength=16)
    assert blocks < 255 or columns.max() <= 2 * len(sample) / 16


@pytest.fixture
def kernels():
    """The module that launches them."""
    pytest.importorskip("triton", reason="needs Triton")
    from uta_fx.kernels import triton_fitting

    return triton_fitting


def joined(values, masses):
    """As ``of_sampled_rows``, of what the second kernel leaves: ``[B, H, P, ...]``."""
    values, masses = values.double(), masses.double()
    lse, exact_share, lse_of_means, damping = masses.unbind(3)
    lse, lse_of_means = lse * math.log(2), lse_of_means * math.log(2)
    share, share_of_means = lse.softmax(2), lse_of_means.softmax(2).nan_to_num(0.0)
    of_lists, of_tail = ((share[..., None] * values[:, :, :, i]).sum(2) for i in range(2))
    return (
        of_lists, of_tail, (share * exact_share).sum(2), lse.logsumexp(2),
        (share_of_means[..., None] * values[:, :, :, 2]).sum(2), lse_of_means.logsumexp(2),
        (share_of_means * damping).sum(2),
    )  # fmt: skip


def assert_parts_are_accurate(kernels, args):
    """Each number errs by the roundings of what it is a weighted mean of, at most."""
    found = joined(*kernels.attend_sampled_rows(*args[:9], *args[10:]))
    expected = of_sampled_rows(double(args))
    unit, largest = roundings(args), args[2].double().abs().max()
    names = ("lists", "tail", "share", "lse", "means", "lse of means", "damping")
    sizes = (largest, largest, 1.0, 1.0, largest, 1.0, 1.0)
    for name, got, true, size in zip(names, found, expected, sizes, strict=True):
        assert not got.isnan().any(), name
        empty = true == -torch.inf
        assert torch.equal(got == -torch.inf, empty), name
        error = (got - true)[~empty].abs()
        assert not error.numel() or error.max() <= unit * size, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_rows_see_is_accurate(kernels, case, dtype):
    assert_parts_are_accurate(kernels, case.inputs(dtype))


def assert_fit_is_accurate(args, found):
    """The factors err by as much as roundings move them, and eager errs."""
    exact, allowed = exact_fit(args)
    for got, true, by, eager in zip(found, exact, allowed, reference.fit_tail(*args), strict=True):
        assert got.dtype == torch.float32 and got.shape == true.shape
        assert ((got - true).abs() <= (eager - true).abs() + by).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ragged", "clusters", "nearly_all_in_tails"])
def test_the_reference_adds_no_error_to_roundings(name, dtype):
    """Also where the lists of a row and its representatives have next to none of its softmax."""
    args = CASES[name].inputs(dtype, "cpu")
    exact, allowed = exact_fit(args)
    for got, true, by in zip(reference.fit_tail(*args), exact, allowed, strict=True):
        assert ((got - true).abs() <= by).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_fit_as_the_reference_does(kernels, case, dtype):
    args = case.inputs(dtype)
    assert_fit_is_accurate(args, kernels.fit_tail(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "clusters", "everything_exact"])
def test_kernels_apply_the_factors(kernels, name, layout, dtype):
    """A logarithm errs by some units in the last place, a product is rounded as it is stored."""
    args = laid_out(CASES[name].inputs(dtype), layout)
    log_size, slope = kernels.fitted_tail(*args)
    expected = reference.by_factors(*kernels.fit_tail(*args), *args)
    torch.testing.assert_close(log_size, expected[0], rtol=2**-22, atol=2**-22)
    assert torch.equal(slope, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ragged", "clusters", "everything_exact"])
def test_the_cpu_fits_as_the_reference_does(name, layout, dtype):
    args = laid_out(CASES[name].inputs(dtype, "cpu"), layout)
    assert_fit_is_accurate(args, ops.fit_tail(*args))


def test_without_a_tail_factors_are_one(kernels):
    args = CASES["everything_exact"].inputs(torch.float32)
    for found in (*kernels.fit_tail(*args), *reference.fit_tail(*args)):
        assert torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_how_tensors_lie(kernels, layout, monkeypatch):
    """Nor on memory beyond them, or on what was in memory that is allocated."""
    args = Case(dim=40, dim_v=24, length_kv=2100).inputs(torch.float32)
    expected = kernels.fit_tail(*args)
    allocate = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        x = allocate(self, *shape, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    args = laid_out(args, layout)
    args[3] = torch.cat([args[3], ~args[3]], -1)[..., : args[3].shape[-1]]
    assert all(map(torch.equal, kernels.fit_tail(*args), expected))


@pytest.mark.parametrize("dim", [0, 1])  # samples, and heads
def test_inputs_may_have_more_elements_than_32_bits_count(kernels, dim):
    from test_triton import far_apart  # needs Triton

    args = Case(batch=2, length_q=34, length_kv=48, block_kv=16, counted=True).inputs(torch.float16)
    expected = kernels.fit_tail(*args)
    args[:10] = far_apart(args[:10], dim)
    assert all(x.stride(dim) >= 2**31 for x in args[:10])
    assert all(map(torch.equal, kernels.fit_tail(*args), expected))


def test_padding_of_clusters_cannot_matter(kernels):
    args = CASES["clusters"].inputs(torch.float32)
    expected = kernels.fit_tail(*args)
    outside = torch.arange(64, device=DEVICE) >= args[4][..., None]
    outside = outside.flatten(2)[..., None]
    args[1], args[2] = (x.masked_fill(outside, torch.nan) for x in args[1:3])
    assert all(map(torch.equal, kernels.fit_tail(*args), expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_do_not_count(kernels, bad):
    """Of 150 rows the sample takes 4, 14, 23, ...

    Without those of the first query block, where logits have no variance that is a number, the fit
    is another, and a number.
    """
    args = Case().inputs(torch.float32)
    whole = reference.fit_tail(*args)
    args[0][:, :, 4] = bad
    args[5:7] = [x.clone() for x in args[5:7]]
    found, expected = kernels.fit_tail(*args), reference.fit_tail(*args)
    for got, want, with_it in zip(found, expected, whole, strict=True):
        assert want.isfinite().all() and not torch.equal(want, with_it)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_operator_is_traced_as_it_runs():
    torch.library.opcheck(torch.ops.uta.fit_tail.default, Case().inputs(torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (1, lambda k: k[:, :1], ValueError, r"key must have shape \(1, 2, 300, 32\)"),
        (2, lambda v: v.half(), TypeError, "value must be torch.float32"),
        (3, lambda x: x[..., :2], ValueError, r"exact must have shape \(1, 2, 5, 5\)"),
        (3, lambda x: x.int(), TypeError, "exact must be torch.bool"),
        (4, lambda _: torch.ones(1, 2, 5).int(), ValueError, "a multiple of block_kv, 64, got 300"),
        (5, lambda x: x[:, :, 1:], ValueError, "key_mean must have shape"),
        (8, lambda x: x.double(), TypeError, "log_size must be torch.float32"),
        (9, lambda x: x[..., 1:], ValueError, r"slope must have shape \(1, 2, 32, 32\)"),
        (10, lambda _: -math.inf, ValueError, "scale must be a finite number, got -inf"),
        (12, lambda _: 17, ValueError, r"rows must lie in \[1, 16\], got 17"),
        (13, lambda _: 48, ValueError, "block_q must be one of"),
    ],
)
def test_bad_arguments_are_named(index, change, error, message):
    args = Case().inputs(torch.float32, "cpu")
    args[index] = change(args[index])
    with pytest.raises(error, match=message):
        ops.fit_tail(*args)


@pytest.mark.parametrize("fit", [-1, 17, 1.5])
def test_a_number_of_rows_that_cannot_be_is_named(fit):
    with pytest.raises(ValueError, match="fit must be a number of rows from 0 to 16, or None, got"):
        Tail(fit=fit)


LARGE = {
    "heads_of_a_model": Case(
        heads=12, length_q=4000, length_kv=9000, dim=128, dim_v=128, block_q=64
    ),
    "narrow": Case(heads=5, length_q=4000, length_kv=9000, dim=64, dim_v=64, block_q=128),
    "wide": Case(heads=3, length_q=3000, length_kv=5000, dim=256, dim_v=200),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE.keys())
def test_large_fits_are_accurate(kernels, case, dtype):
    args = case.inputs(dtype)
    assert_parts_are_accurate(kernels, args)
    found = kernels.fit_tail(*args)
    assert_fit_is_accurate(args, found)
    assert all(map(torch.equal, kernels.fit_tail(*args), found))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs(kernels):
    case = LARGE["heads_of_a_model"]
    args = case.inputs(torch.bfloat16)
    kernels.fit_tail(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.fit_tail(*args)
    for old, new in zip(
        args, dataclasses.replace(case, seed=1).inputs(torch.bfloat16), strict=True
    ):
        if torch.is_tensor(old):
            old.copy_(new)
    graph.replay()
    assert all(map(torch.equal, kernels.fit_tail(*args), found))
