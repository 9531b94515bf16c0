"""The Triton kernels against float64: in Triton's interpreter without a GPU, compiled with one."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uta_fx.bench.gate import base2_roundings, require_statistics
from uta_fx.kernels import reference

pytest.importorskip("triton", reason="needs Triton")

from cases import LAYOUTS, laid_out, nan_in_new_memory, poisoned, with_mask

from uta_fx.kernels import (
    triton_attention,
    triton_gather,
    triton_join,
    triton_scores,
    triton_statistics,
    triton_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly without an error
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def rounding(dtype):
    """What a number loses of itself when it is stored: half a unit in the last place.

    A whole one in Triton's interpreter, which cuts off the bits that 16-bit numbers lack.
    """
    cuts = DEVICE == "cpu" and dtype != torch.float32
    return torch.finfo(dtype).eps / (1 if cuts else 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of the operator, drawn from a seed."""

    batch: int = 1
    heads: int = 2
    length_q: int = 70
    length_kv: int = 90
    dim: int = 32
    dim_v: int = 32
    block_q: int = 32
    block_kv: int = 16
    listed: float = 0.4  # probability that a block is listed
    tail: str = "block"  # none, block (one representative a key block) or row (five a query block)
    variance: bool = True
    slopes: str = "head"  # none, head or row
    scale: float | None = None
    variance_weight: float = 0.8
    seed: int = 0

    def inputs(self, dtype):
        """Arguments of the operator, by position."""
        generator = torch.Generator().manual_seed(self.seed)
        lead = (self.batch, self.heads)

        def randn(*shape):
            return torch.randn(*lead, *shape, generator=generator).to(DEVICE, dtype)

        rows, blocks = -(-self.length_q // self.block_q), -(-self.length_kv // self.block_kv)
        order = torch.rand(*lead, rows, blocks, generator=generator).argsort(-1)
        counts = (torch.rand(order.shape, generator=generator) < self.listed).sum(-1)
        shape = {"none": (0,), "block": (blocks,), "row": (rows, 5)}[self.tail]
        variances = blocks if self.variance and self.tail == "block" else 0
        slopes = {"none": 0, "head": 1, "row": rows}[self.slopes]
        return [
            randn(self.length_q, self.dim),
            randn(self.length_kv, self.dim),
            randn(self.length_kv, self.dim_v),
            order.int().to(DEVICE),
            counts.int().to(DEVICE),
            randn(*shape, self.dim),
            randn(*shape, self.dim_v),
            (torch.rand(*lead, *shape, generator=generator) * 4).to(DEVICE),
            randn(variances, self.dim).square(),
            randn(slopes, self.dim, self.dim_v) * 0.3,
            self.dim**-0.5 if self.scale is None else self.scale,
            self.variance_weight,
            self.block_q,
            self.block_kv,
        ]


CASES = {
    "everything": Case(),
    "whole_blocks": Case(length_q=64, length_kv=96),
    "slope_of_each_query_block": Case(slopes="row"),
    "no_variance": Case(variance=False),
    "no_slope": Case(slopes="none"),
    "representatives_alone": Case(variance=False, slopes="none"),
    "no_tail": Case(tail="none"),
    "own_tail_of_each_query_block": Case(tail="row"),
    "own_tail_and_slope": Case(tail="row", slopes="row", block_kv=32),
    "damping_without_mass": Case(variance_weight=0.0),
    "nothing_listed": Case(listed=0.0),
    "everything_listed": Case(listed=1.0),
    "nothing_at_all": Case(listed=0.0, tail="none"),
    "one_token": Case(length_q=1, length_kv=1, block_kv=32),
    "one_block": Case(length_q=30, length_kv=32, block_kv=32),
    "head_dims_of_their_own": Case(dim=24, dim_v=48),
    "wide_values": Case(dim=16, dim_v=80, block_kv=32),
    "head_dims_of_models": Case(dim=72, dim_v=96, heads=1),
    "wide_head_dims": Case(dim=200, dim_v=256, heads=1, slopes="row"),
    "small_query_blocks": Case(block_q=16, block_kv=64, length_kv=200),
    "large_query_blocks": Case(block_q=128, block_kv=128, length_q=150, length_kv=300),
    "negative_scale": Case(scale=-0.2),
    "zero_scale": Case(scale=0.0),
    "steep_logits": Case(scale=2.0, variance_weight=0.1),
}


def double(args):
    """The same rounded inputs in float64."""
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def assert_as_accurate_as_eager(args, result=None, more=(0.0, 0.0)):
    """From lists and from a mask: no worse than the reference in that dtype, plus own roundings.

    Both errors are measured against float64 on the same rounded inputs. On top of what eager errs:
    the output is rounded once, and so is the tail's part between the two kernels (half a unit each,
    of at most the largest output: together ``eps``). The softmax is base 2 (``base2_roundings``).
    ``more`` is what a kernel's other roundings may add to the error of the output and of the
    log-sum-exp.
    """
    results = (
        [result]
        if result
        else [
            triton_attention.sparse_attention(*args),
            triton_attention.block_masked_attention(*with_mask(args)),
        ]
    )
    exact = reference.sparse_attention(*double(args))
    eager = reference.sparse_attention(*args)
    for output, lse in results:
        _assert_as_accurate(args, output, lse, *exact, *eager, more)


def _assert_as_accurate(args, output, lse, exact, exact_lse, eager, eager_lse, more):
    seen = exact_lse != -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen)
    assert output.dtype == args[0].dtype and lse.dtype == torch.float32
    assert not output[~seen].any()
    if not seen.any():
        return
    base2, base2_lse = base2_roundings(args, exact, exact_lse)
    rounding = torch.finfo(output.dtype).eps * exact.abs().max() + base2
    error = (output.double() - exact).abs().max()
    assert error <= (eager.double() - exact).abs().max() + rounding + more[0]
    lse_error = (lse.double() - exact_lse)[seen].abs().max()
    assert lse_error <= (eager_lse.double() - exact_lse)[seen].abs().max() + base2_lse + more[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_as_accurate_as_eager(case, dtype):
    assert_as_accurate_as_eager(case.inputs(dtype))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.integers(1, 2),
        length_q=st.integers(1, 80),
        length_kv=st.integers(1, 80),
        dim=st.sampled_from([16, 32, 40, 88, 112, 144, 256]),
        dim_v=st.sampled_from([16, 32, 80, 256]),
        block_q=st.sampled_from([16, 32]),
        block_kv=st.sampled_from([16, 32]),
        listed=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
        tail=st.sampled_from(["none", "block", "row"]),
        variance=st.booleans(),
        slopes=st.sampled_from(["none", "head", "row"]),
        seed=st.integers(0, 1000),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_attention_of_any_shape_is_as_accurate_as_eager(case, dtype, layout):
    assert_as_accurate_as_eager(laid_out(case.inputs(dtype), layout))


@pytest.mark.parametrize("listed", [0.0, 0.5])
@pytest.mark.parametrize("tail", ["block", "row"])
def test_an_empty_tail_leaves_no_nan(tail, listed):
    args = Case(tail=tail, listed=listed).inputs(torch.float32)
    args[7][:, 0] = -torch.inf  # no entry in this head
    args[7][:, 1, 1:] = -torch.inf  # one block, or one row of five, in this one
    assert_as_accurate_as_eager(args)


@pytest.mark.parametrize("tail", ["none", "block", "row"])
def test_lists_may_have_no_width(tail):
    """What is left is the tail."""
    args = Case(tail=tail, listed=0.0).inputs(torch.float32)
    args[3] = args[3][..., :0]
    assert_as_accurate_as_eager(args)


def test_inputs_may_be_strided():
    args = Case(batch=2, length_q=70, length_kv=70).inputs(torch.float32)
    expected = triton_attention.sparse_attention(*args)
    fused = torch.stack(args[:3], 0).permute(1, 3, 2, 0, 4).contiguous()  # [B, L, H, 3, D]
    args[:3] = fused.permute(3, 0, 2, 1, 4).unbind(0)
    for i in range(3, 10):  # heads last but one, as in a model, and a part of a larger tensor
        wide = torch.cat([args[i], args[i]], -1).movedim(1, -2).contiguous().movedim(-2, 1)
        args[i] = wide[..., : args[i].shape[-1]]
    output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])
    assert output.stride() == torch.empty_like(args[0]).stride()


def test_a_last_dimension_that_is_not_contiguous_is_taken_too():
    args = Case().inputs(torch.float32)
    expected = triton_attention.sparse_attention(*args)
    for i in (0, 1, 2, 5, 6, 8):
        args[i] = args[i].mT.contiguous().mT
    output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])
    assert output.stride() == torch.empty_like(args[0]).stride()


@pytest.mark.parametrize("tail", ["block", "row"])
def test_memory_beyond_the_tensors_cannot_matter(tail):
    case = Case(tail=tail, dim=24, dim_v=48, slopes="row")
    args = case.inputs(torch.float32)
    expected = triton_attention.sparse_attention(*args)
    args = laid_out(args, "inside NaN")
    with nan_in_new_memory():
        output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


def test_blocks_that_are_not_listed_cannot_matter():
    args = Case(tail="none", listed=0.6).inputs(torch.float32)
    args[3] = args[3].sort(-1).values  # then every row lists the first blocks only
    args[4].clamp_(max=3)
    expected = triton_attention.sparse_attention(*args)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, :, 48:], args[2][:, :, 48:] = torch.nan, torch.nan
    output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


def test_ids_after_the_count_are_ignored():
    args = Case().inputs(torch.float32)
    expected = triton_attention.sparse_attention(*args)
    unused = torch.arange(args[3].shape[-1], device=DEVICE) >= args[4][..., None]
    args[3] = args[3].masked_fill(unused, 2**31 - 1)
    output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("tail", ["none", "block"])
def test_an_id_outside_makes_its_rows_nan_and_no_others(bad, tail):
    args = Case(tail=tail, listed=0.6).inputs(torch.float32)  # six key blocks
    args[4][:, 1, 1] = 3
    expected, expected_lse = triton_attention.sparse_attention(*args)
    args[3][:, 1, 1, 2] = bad
    output, lse = triton_attention.sparse_attention(*args)
    rows = torch.zeros_like(lse, dtype=torch.bool)
    rows[:, 1, 32:64] = True
    assert output[rows].isnan().all() and lse[rows].isnan().all()
    assert torch.equal(output[~rows], expected[~rows])
    assert torch.equal(lse[~rows], expected_lse[~rows])


@dataclasses.dataclass(frozen=True)
class ScoresCase:
    """Inputs of ``block_scores``, drawn from a seed."""

    length_q: int = 150
    blocks: int = 37
    dim: int = 32
    block_q: int = 32
    rows: int = 2
    variance_weight: float = 0.7
    power: float = 1.0

    def inputs(self, dtype):
        """Arguments of the operator, by position."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(1, 2, *shape, generator=generator).to(DEVICE, dtype)

        return [
            randn(self.length_q, self.dim),
            randn(self.blocks, self.dim),
            randn(self.blocks, self.dim).square(),
            (torch.rand(1, 2, self.blocks, generator=generator) * 4).to(DEVICE),
            self.dim**-0.5,
            self.variance_weight,
            self.power,
            self.block_q,
            self.rows,
        ]


SCORES_CASES = {
    "power_one": ScoresCase(),
    "power_zero": ScoresCase(power=0.0),
    "power_half": ScoresCase(power=0.5),
    "power_any": ScoresCase(power=1.7),
    "no_weight": ScoresCase(variance_weight=0.0),
    "mass_alone": ScoresCase(variance_weight=0.0, power=0.0),
    "small_blocks": ScoresCase(block_q=16, blocks=16),
    "large_blocks": ScoresCase(block_q=128, blocks=130),
    "one_row": ScoresCase(length_q=1, blocks=1),
    "padded_head_dim": ScoresCase(dim=40),
    "wide_head_dim": ScoresCase(dim=200),
    "a_block_in_parts": ScoresCase(block_q=128, rows=1, length_q=200),
    "a_wide_block_in_parts": ScoresCase(block_q=128, rows=1, length_q=200, dim=256),
    "row_by_row": ScoresCase(rows=1),
    "eight_rows_as_one": ScoresCase(rows=8, length_q=147),
}


def assert_scores_are_accurate(args):
    """Scores err relatively by what their parts do.

    A score is the root mean square of products p * exp(w sigma2 / 2) * sigma2^power, none negative,
    so that its relative error is at most that of the worst product. A group's mean query and its
    mean of (s q)^2 are rounded to the query's dtype: half a unit of sigma2, and half a unit of the
    absolute products that a logit is the sum of, which moves p by twice what it moves a logit
    (numerator and denominator). All else happens in float32: a logit x is rounded a few times,
    2^-24 of itself each, which counts twice likewise, and a sum over D or Nk terms errs by at most
    2^-24 for each. In 16 bits the score is rounded to bfloat16, by half a unit of itself, or by a
    whole one in Triton's interpreter, which cuts bits off; where a query block is scored in parts
    (at a head dim beyond 128, of 128 groups) so is a sum of squares in between, which the root
    halves.
    """
    scores = triton_scores.block_scores(*args)
    exact = reference.block_scores(*double(args))
    query, mean, variance, log_size, scale, weight, power, _, rows = double(args)
    sigma2 = reference.pooled_variance(query, variance, scale, rows)
    groups = torch.cat([x.mean(3) for x in reference.split_blocks(query * scale, rows)], 2)
    products = groups.abs() @ mean.mT.abs()
    logits = products + log_size[:, :, None] + weight / 2 * sigma2
    half_unit = torch.finfo(args[0].dtype).eps / 2
    terms = query.shape[-1] + mean.shape[-2] + rows + 8
    allowed = half_unit * (power + weight / 2 * sigma2.max().item() + 2 * products.max().item())
    allowed += 2**-24 * (8 * logits.max().item() + terms)
    if args[0].dtype != torch.float32:
        allowed = (1 + allowed) * (1 + 1.5 * rounding(torch.bfloat16)) - 1
    assert scores.dtype == reference.score_dtype(args[0].dtype) and (scores >= 0).all()
    assert ((scores.double() - exact).abs() <= allowed * exact).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SCORES_CASES.values(), ids=SCORES_CASES.keys())
def test_scores_are_as_accurate_as_their_parts(case, dtype):
    assert_scores_are_accurate(case.inputs(dtype))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    case=st.builds(
        ScoresCase,
        length_q=st.integers(1, 200),
        blocks=st.integers(1, 70),
        dim=st.sampled_from([16, 72, 112, 256]),
        block_q=st.sampled_from([16, 64, 128]),
        rows=st.sampled_from([1, 2, 4]),
        variance_weight=st.sampled_from([0.0, 0.5]),
        power=st.sampled_from([0.0, 0.5, 1.0, 1.3]),
    ),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_scores_of_any_shape_are_as_accurate_as_their_parts(case, dtype):
    assert_scores_are_accurate(case.inputs(dtype))


def test_a_batch_of_one_may_have_a_stride_of_zero():
    """As Inductor writes it: what the copy engine needs is there, and the output is as promised."""
    args = Case(batch=1, length_kv=70).inputs(torch.float32)
    expected = triton_attention.sparse_attention(*args)
    for place in range(3):
        args[place] = args[place].as_strided(args[place].shape, (0, *args[place].stride()[1:]))
        assert all(triton_attention.last_contiguous(args[place]).stride())
    output, lse = triton_attention.sparse_attention(*args)
    assert output.stride() == torch.empty_like(args[0]).stride()
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


def test_a_bias_of_nan_is_seen():
    """Where a mask may not be trusted: the text's part is NaN, by which the video's is merged."""
    q, k, v, *_ = Case(length_kv=11).inputs(torch.float32)
    bias = torch.full((1, 2, 11), torch.nan, device=DEVICE)
    arguments = reference.text_arguments(q, k, v, bias, 0.3, 32)
    for result in triton_attention.sparse_attention(*arguments):
        assert result.isnan().all()


def test_scores_take_strided_and_poisoned_inputs():
    args = ScoresCase(dim=40).inputs(torch.float32)
    expected = triton_scores.block_scores(*args)
    args[:4] = [poisoned(x) for x in args[:4]]
    assert torch.equal(triton_scores.block_scores(*args), expected)


def test_scores_of_every_second_row_are_those_of_a_strided_query():
    args = ScoresCase().inputs(torch.float32)
    every_second = args[0][:, :, ::2]
    expected = triton_scores.block_scores(every_second.contiguous(), *args[1:])
    assert torch.equal(triton_scores.block_scores(every_second, *args[1:]), expected)


def token_layouts():
    """Tensors with 37 tokens, by what is peculiar in their memory, and where their tokens lie."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return {
        "several tokens a program": (randn(2, 37, 70), 1),
        "one token in two pieces": (randn(1, 37, 1500).half(), 1),
        "the end of a sequence": (randn(2, 50, 24)[:, 13:], 1),
        "heads in front": (randn(1, 5, 37, 16), 2),
        "heads within": (randn(2, 37, 5, 16).transpose(1, 2), 2),
        "complex": (torch.complex(randn(37, 9), randn(37, 9)), 0),
        "boolean": (randn(37, 9) > 0, 0),
        # left to PyTorch
        "samples and heads in front": (randn(2, 3, 37, 16), 2),
        "channels first": (randn(9, 37).T, 0),
        "every second channel": (randn(1, 37, 40)[..., ::2], 1),
        "nothing": (randn(0, 37, 4), 1),
    }


@pytest.mark.parametrize("name", list(token_layouts()))
def test_tokens_are_gathered_in_any_layout(name):
    """The same numbers and strides as the reference's."""
    x, dim = token_layouts()[name]
    index = torch.randperm(37, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = triton_gather.gather_tokens(x, index, dim)
    expected = reference.gather_tokens(x, index, dim)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("sizes", "dim"), [((11, 300, 0), 64), ((0, 40, 130), 72), ((5, 1, 2), 16), ((0, 129, 0), 256)]
)
def test_two_softmaxes_are_joined_accurately(sizes, dim, layout, dtype):
    """Attention of others is copied.

    The share is a sigmoid of numbers below 64, which errs by 2^-24 of these and some units in the
    last place; the sum of two parts is rounded a few times, and as it is stored.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(2, 3, *shape, generator=generator).to(DEVICE)

    before, output, text, after = (randn(sizes[i], dim).to(dtype) for i in (0, 1, 1, 2))
    lse, text_lse = randn(sizes[1]), randn(sizes[1])
    text_lse[0, 0, 0], text_lse[1, 0, 0] = -torch.inf, 40.0
    place = LAYOUTS[layout]
    rows = [place(x) for x in (output, text, before, after)]
    found = triton_join.join_text(rows[0], lse, rows[1], text_lse, *rows[2:])
    exact = reference.join_text(*(x.double() for x in (output, lse, text, text_lse, before, after)))
    assert found.dtype == dtype and found.stride() == exact.stride()
    first, last = sizes[0], sizes[0] + sizes[1]
    assert torch.equal(found[:, :, :first], before) and torch.equal(found[:, :, last:], after)
    largest = torch.maximum(output.abs(), text.abs()).double()
    error = (found - exact)[:, :, first:last].abs()
    assert (error <= (rounding(dtype) + 2**-24 * (64 + 15)) * largest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("weight", "power"), [(0.3, 1.0), (0.3, 0.7), (0.0, 1.0), (0.3, 0.0)])
def test_weighed_scores_are_as_accurate_as_their_weights(dtype, weight, power):
    """An exponential, a root and two products, rounded to the dtype of the scores.

    Sums of n positive numbers err by 2^-24 n of themselves at most, and so does the exponent, which
    is below 1 here; powers and exponentials in base 2 err by some units in the last place.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 300, 24, generator=generator).to(dtype)
    variance = torch.rand(2, 2, 21, 24, generator=generator).to(dtype)
    spread = torch.rand(2, 2, 21, generator=generator)
    spread[0, 0, 0] = 0.0
    scores = torch.rand(2, 2, 10, 21, generator=generator).to(reference.score_dtype(dtype))
    args = [x.to(DEVICE) for x in (scores, q, variance, spread)]
    numbers = (0.2, weight, power, 32)
    exact = reference.weigh_scores(*(x.double() for x in args), *numbers)
    found = triton_weights.weigh_scores(poisoned(args[0]), *map(poisoned, args[1:]), *numbers)
    assert found.dtype == scores.dtype
    allowed = rounding(found.dtype) + 2**-24 * (21 + 24 + 10 + 16)
    assert ((found - exact).abs() <= allowed * exact).all()


@pytest.mark.parametrize("shape", [(2, 3, 37, 29), (1, 2, 70, 3), (1, 1, 1, 1), (2, 40, 2, 5)])
def test_scores_are_weighed_wherever_heads_begin(shape):
    """Programs that end inside a row or a head, and some that see many heads."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, blocks_q, blocks = shape
    scores = torch.rand(*shape, generator=generator).to(torch.bfloat16).to(DEVICE)
    q = torch.zeros(batch, heads, 16 * blocks_q, 16, dtype=torch.bfloat16, device=DEVICE)
    variance = torch.zeros(batch, heads, blocks, 16, dtype=torch.bfloat16, device=DEVICE)
    weights = 2.0 ** torch.randint(-3, 4, (batch, heads, blocks), generator=generator).to(DEVICE)
    numbers = (0.2, 0.3, 2.0, 16)
    for rows in (scores, scores.transpose(2, 3).contiguous().transpose(2, 3)):
        found = triton_weights.weigh_scores(rows, q, variance, weights, *numbers)
        assert torch.equal(found, scores * weights[:, :, None].bfloat16())
        assert found.stride() == rows.stride()


def assert_statistics_are_accurate(key, value, block_kv):
    """Of their dtypes, and within what roundings are allowed."""
    results = triton_statistics.block_statistics(key, value, block_kv)
    assert [x.dtype for x in results] == [key.dtype] * 3 + [torch.float32] * 2
    require_statistics(results, key, value, block_kv)


STATISTICS_CASES = {  # length, head dims of keys and values, block_kv
    "whole": (128, 32, 32, 32),
    "ragged": (150, 32, 32, 64),
    "tiny": (5, 16, 16, 16),
    "padded_head_dims": (70, 40, 24, 32),
    "large_blocks": (300, 64, 32, 128),
    "wide_head_dims": (70, 200, 256, 32),
}


def statistics_inputs(length, dim, dim_v, dtype, heads=2):
    """Keys and values that do not centre on zero."""
    generator = torch.Generator().manual_seed(length)
    key = torch.randn(2, heads, length, dim, generator=generator) + 3
    value = torch.randn(2, heads, length, dim_v, generator=generator) - 2
    return key.to(DEVICE, dtype), value.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STATISTICS_CASES.values(), ids=STATISTICS_CASES.keys())
def test_statistics_err_by_their_roundings(case, dtype):
    *sizes, block_kv = case
    assert_statistics_are_accurate(*statistics_inputs(*sizes, dtype), block_kv)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 150),
    dims=st.tuples(*[st.sampled_from([16, 72, 112, 144, 256])] * 2),
    block_kv=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_statistics_of_any_shape_err_by_their_roundings(length, dims, block_kv, dtype):
    assert_statistics_are_accurate(*statistics_inputs(length, *dims, dtype), block_kv)


def test_statistics_of_many_blocks_share_programs(monkeypatch):
    """Fewer programs than blocks: each adds several up, the last one fewer."""
    monkeypatch.setattr(triton_statistics, "PROGRAMS", 8)
    assert_statistics_are_accurate(*statistics_inputs(170, 16, 32, torch.float32), 16)


def test_statistics_take_strided_and_poisoned_inputs():
    key, value = statistics_inputs(75, 40, 24, torch.float32)
    assert_statistics_are_accurate(poisoned(key), poisoned(value), 32)
    layout = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    assert_statistics_are_accurate(*layout, 32)


LARGE = [
    Case(
        heads=3, length_q=4000, length_kv=4000, dim=dim, dim_v=dim, block_q=block_q, block_kv=64,
        listed=0.2, slopes=slopes,
    )
    for dim, block_q, slopes in (
        (128, 128, "head"), (128, 64, "row"), (64, 128, "row"), (256, 64, "head"), (72, 64, "head")
    )
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.dim}-{case.block_q}")
def test_large_attention_is_as_accurate_as_eager(case, dtype):
    assert_as_accurate_as_eager(case.inputs(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("block_q", [32, 64, 128])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_large_scores_are_as_accurate_as_their_parts(dim, block_q):
    case = ScoresCase(length_q=4000, blocks=300, dim=dim, block_q=block_q)
    assert_scores_are_accurate(case.inputs(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_large_statistics_err_by_their_roundings(dim, dtype):
    assert_statistics_are_accurate(*statistics_inputs(9000, dim, dim, dtype, heads=5), 64)


@pytest.mark.parametrize(
    ("of_all", "of_products", "legacy", "expected"),
    [
        ("none", "none", None, "ieee"),
        ("tf32", "none", None, "tf32"),
        ("none", "tf32", None, "tf32"),
        ("tf32", "ieee", None, "ieee"),
        ("ieee", "tf32", None, "tf32"),
        ("none", "none", "high", "tf32"),
        ("none", "tf32", "highest", "ieee"),
    ],
)
def test_float32_is_multiplied_as_pytorch_does(of_all, of_products, legacy, expected):
    """By whichever of its settings the user says so; the last one counts."""
    backends, before = torch.backends, torch.get_float32_matmul_precision()
    try:
        backends.fp32_precision, backends.cuda.matmul.fp32_precision = of_all, of_products
        if legacy:
            torch.set_float32_matmul_precision(legacy)
        assert triton_attention.dot_precision(torch.float32) == expected
        assert triton_attention.dot_precision(torch.float16) == "ieee"
    finally:
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_tf32_is_used_where_it_is_allowed():
    """TF32 rounds a product's operands to 11 bits: float16's error bounds it."""
    args = Case(dim=64, dim_v=64, length_q=200, length_kv=300, block_kv=64).inputs(torch.float32)
    exact, _ = reference.sparse_attention(*double(args))
    half, _ = reference.sparse_attention(
        *(x.half() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        output, _ = triton_attention.sparse_attention(*args)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (output - exact).abs().max() <= 2 * (half - exact).abs().max()
    assert not torch.equal(output, triton_attention.sparse_attention(*args)[0])


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_lists():
    case = Case(length_q=300, length_kv=333, dim=64, dim_v=64, block_q=64, block_kv=64)
    args = case.inputs(torch.bfloat16)
    scores_args = [args[0], args[5], args[8], args[7], args[10], 1.0, 1.0, 64, 2]
    triton_attention.sparse_attention(*args)
    triton_scores.block_scores(*scores_args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = triton_attention.sparse_attention(*args)
        scores = triton_scores.block_scores(*scores_args)
    fresh = dataclasses.replace(case, seed=1).inputs(torch.bfloat16)
    for old, new in zip(args, fresh, strict=True):
        if torch.is_tensor(old):
            old.copy_(new)
    graph.replay()
    for got, want in zip(result, triton_attention.sparse_attention(*args), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(scores, triton_scores.block_scores(*scores_args))


def test_offsets_beyond_32_bits():
    """The last head of a key tensor of more than 2^31 elements, nearly all never touched."""
    heads, length, dim = 132, 1 << 17, 128
    key = torch.empty(1, length, heads, dim, device=DEVICE, dtype=torch.float16)
    key = key.permute(0, 2, 1, 3)[:, -2:]
    key[:, :, -256:] = torch.randn(1, 2, 256, dim, device=DEVICE)
    args = Case(length_kv=128, dim=dim, dim_v=dim, block_kv=64, tail="none").inputs(torch.float16)
    blocks = length // 64
    ids = torch.tensor([blocks - 1, blocks - 3], device=DEVICE, dtype=torch.int32)
    args[1] = args[2] = key
    args[3] = ids.expand(*args[4].shape, 2)
    args[4] = torch.full_like(args[4], 2)
    result = triton_attention.sparse_attention(*args)
    args[1] = args[2] = key[:, :, -256:]
    args[3] = args[3] - (blocks - 4)
    assert_as_accurate_as_eager(args, result)


def far_apart(tensors, dim):
    """The same values, with 2^33 bytes from one index of dimension ``dim`` to the next.

    That is more than 2^31 elements of each dtype. All lie in one buffer, which is not touched
    between them: without a GPU it takes no memory.
    """
    apart = 1 << 33
    sizes = [x[:1].numel() * x.element_size() if dim == 0 else x.nbytes for x in tensors]
    starts = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
    buffer = torch.empty(apart + starts[-1], dtype=torch.uint8, device=DEVICE)
    moved = []
    for x, start in zip(tensors, starts, strict=False):
        of_dtype = buffer[start : start + (buffer.numel() - start) // 8 * 8].view(x.dtype)
        strides = [x.stride(i) if i != dim else apart // x.element_size() for i in range(x.dim())]
        view = of_dtype.as_strided(x.shape, strides, of_dtype.storage_offset())
        moved.append(view.copy_(x))
    return moved


@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("dim", [0, 1])  # samples, and heads
def test_any_input_may_have_more_elements_than_32_bits_count(dim, tail):
    case = Case(batch=2, length_q=34, length_kv=34, tail=tail, slopes="row")
    args = case.inputs(torch.float16)
    for attend, inputs in (
        (triton_attention.sparse_attention, args),
        (triton_attention.block_masked_attention, with_mask(args)),
    ):
        expected = attend(*inputs)
        tensors = [x for x in inputs if torch.is_tensor(x)]
        moved = [x.contiguous() for x in tensors]
        far = far_apart(moved, dim)
        assert all(x.stride(dim) >= 2**31 for x in far)
        for got, want in zip(attend(*far, *inputs[len(far) :]), expected, strict=True):
            assert torch.equal(got, want)
    key, value = far_apart(args[1:3], dim)
    want = triton_statistics.block_statistics(*args[1:3], 16)
    assert all(map(torch.equal, triton_statistics.block_statistics(key, value, 16), want))
    scores = [args[0], args[1][:, :, :5], args[2][:, :, :5].square(), torch.zeros(2, 2, 5)]
    scores = [x.contiguous().to(DEVICE) for x in scores]
    numbers = (0.2, 0.0, 1.0, 32, 2)
    want = triton_scores.block_scores(*scores, *numbers)
    assert torch.equal(triton_scores.block_scores(*far_apart(scores, dim), *numbers), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize("dim_v", [32, 48])
def test_rectified_attention_agrees_with_the_reference(dtype, text, dim_v):
    """Gain and offset of each query block, ragged rows, rows without a list; text or none.

    As ``sparse_attention``: the error of eager in that dtype, plus one unit of the largest output
    for each of two roundings.
    """
    case = Case(tail="none", dim_v=dim_v, listed=0.3)
    args = case.inputs(dtype)
    generator = torch.Generator().manual_seed(5)
    lead, rows = (case.batch, case.heads), args[4].shape[-1]
    args[4][:, 0, 0] = 0
    new = [
        torch.randn(*lead, text, case.dim, generator=generator).to(DEVICE, dtype),
        torch.randn(*lead, text, dim_v, generator=generator).to(DEVICE, dtype),
        torch.randn(*lead, text, generator=generator).to(DEVICE),
        torch.rand(*lead, rows, generator=generator).to(DEVICE),
        torch.randn(*lead, rows, dim_v, generator=generator).to(DEVICE),
    ]
    args = [*args[:5], *new, case.dim**-0.5, case.block_q, case.block_kv]
    output = triton_attention.rectified_attention(*args)
    exact = reference.rectified_attention(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    )
    eager = reference.rectified_attention(*args)
    unit = torch.finfo(dtype).eps * exact.abs().max().item()
    assert output.dtype == dtype
    assert (output - exact).abs().max() <= (eager - exact).abs().max() + 2 * unit
