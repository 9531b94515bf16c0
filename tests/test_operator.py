"""The operators on the CPU, against their float64 reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case, double, laid_out, with_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from uta_fx.export import tensorrt_ops  # noqa: F401  # defines operators
from uta_fx.kernels import contract, cpu, ops, reference
from uta_fx.kernels.constants import CONSTANTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_as_accurate_as_eager(args):
    """From lists and from a mask: no worse than the reference in that dtype, plus own roundings.

    Both errors are measured against float64 on the same rounded inputs. The kernel merges two
    softmaxes, which rounds each part and the sum once more in float32, and rounds the output once
    to its dtype: eight units in the last place of the largest output cover both. The log-sum-exp is
    kept in float32 by both; it may err by as much as the logits do, whose products are rounded to
    the input dtype in eager and not in the kernel.
    """
    exact, exact_lse = reference.sparse_attention(*double(args))
    eager, eager_lse = reference.sparse_attention(*args)
    output, lse = ops.sparse_attention(*args)
    masked = ops.block_masked_attention(*with_mask(args))
    torch.testing.assert_close(masked, (output, lse))  # sums in another order
    assert output.dtype == args[0].dtype and lse.dtype == torch.float32
    assert not output.isnan().any()
    rounding = torch.finfo(args[0].dtype).eps * exact.abs().amax().item()
    assert (output - exact).abs().amax() <= (eager - exact).abs().amax() + 8 * rounding
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    lse_error, eager_lse_error = (
        (x - exact_lse).masked_fill(empty, 0).abs().amax() for x in (lse, eager_lse)
    )
    largest = exact_lse.masked_fill(empty, 0).abs().amax().item()
    assert lse_error <= eager_lse_error + 8 * torch.finfo(torch.float32).eps * (1 + largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("slopes", ["none", "head", "row"])
def test_agrees_with_the_reference(dtype, tail, slopes):
    """Ragged on both sides, uneven counts, an empty row, every form of tail."""
    assert_as_accurate_as_eager(Case(dtype=dtype, tail=tail, slopes=slopes).inputs())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        length_q=st.integers(1, 150),
        length_kv=st.integers(1, 150),
        dim=st.sampled_from([16, 24, 64, 72, 80, 88, 96, 112, 128, 200, 256]),
        dim_v=st.sampled_from([16, 48, 64, 72, 112, 128, 256]),
        block_q=st.sampled_from([16, 64, 128]),
        block_kv=st.sampled_from([16, 32, 64]),
        tail=st.sampled_from(["none", "block", "row"]),
        slopes=st.sampled_from(["none", "head", "row"]),
        listed=st.sampled_from([0.0, 0.3, 1.0]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1000),
    ),
    st.sampled_from(list(LAYOUTS)),
)
def test_any_shape_agrees_with_the_reference(case, layout):
    """Lengths, head dims, dtypes, strides, blocks, tails and lists drawn at random."""
    assert_as_accurate_as_eager(laid_out(case.inputs(), layout))


@pytest.mark.parametrize("tail", ["none", "block", "row"])
def test_lists_may_have_no_width(tail):
    """As lists that are empty: what is left is the tail."""
    args = Case(tail=tail, listed=0.0).inputs()
    expected = ops.sparse_attention(*args)
    args[3] = args[3][..., :0]
    assert_as_accurate_as_eager(args)
    assert all(map(torch.equal, ops.sparse_attention(*args), expected))


def test_pieces_are_the_whole(monkeypatch):
    """Head by head in several pieces, the last one smaller, as in one."""
    case = Case(length_q=300, tail="row", slopes="row")
    whole = ops.sparse_attention(*case.inputs())
    monkeypatch.setattr(cpu, "PIECE", 4 * case.block_q * 3)
    assert len(list(cpu._pieces((1, 1, 10), case.block_q * 3))) == 3
    for expected, got in zip(whole, ops.sparse_attention(*case.inputs()), strict=True):
        torch.testing.assert_close(got, expected)


def test_every_block_listed_is_dense_attention():
    """The reference itself is checked against PyTorch."""
    args = double(Case(listed=1.1, tail="none", slopes="none").inputs())
    args[4] = torch.full_like(args[4], args[3].shape[-1])
    args[3] = torch.arange(args[3].shape[-1], dtype=torch.int32).expand(args[3].shape)
    output, _ = reference.sparse_attention(*args)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*args[:3]))


def test_strided_views_are_taken_as_they_come():
    """Transposed [B, L, H, D] views, as models hand them over; the output keeps their strides."""
    args = Case(length_q=100, length_kv=100).inputs()
    expected, _ = ops.sparse_attention(*args)
    for place in range(3):
        args[place] = args[place].transpose(1, 2).contiguous().transpose(1, 2)
    output, _ = ops.sparse_attention(*args)
    assert output.stride() == torch.empty_like(args[0]).stride() != expected.stride()
    torch.testing.assert_close(output, expected)


def test_channels_may_lie_apart():
    """One head, whose blocks are all full: nothing on the way to the kernel copies its queries."""
    args = Case(batch=1, heads=1, length_q=128).inputs()
    expected, _ = ops.sparse_attention(*args)
    for place in range(3):
        args[place] = args[place].mT.contiguous().mT
    output, _ = ops.sparse_attention(*args)
    torch.testing.assert_close(output, expected)


def test_memory_beyond_the_length_never_shows():
    """Keys and values are views into a larger buffer full of NaN and infinity."""
    args = Case(length_kv=100, listed=1.1).inputs()
    expected = ops.sparse_attention(*args)
    for place in (1, 2):
        buffer = torch.full((*args[place].shape[:2], 128, args[place].shape[3]), torch.nan)
        buffer[:, :, 110:] = torch.inf
        buffer[:, :, :100] = args[place]
        args[place] = buffer[:, :, :100]
    torch.testing.assert_close(ops.sparse_attention(*args), expected)


def test_unlisted_keys_do_not_matter():
    """Without a tail, NaN in every key and value of an unlisted block changes nothing."""
    args = Case(tail="none", slopes="none", length_kv=192).inputs()
    args[3] = torch.zeros_like(args[3])
    args[4] = torch.ones_like(args[4])  # block 0 alone
    expected = ops.sparse_attention(*args)
    args[1][:, :, 64:], args[2][:, :, 64:] = torch.nan, torch.nan
    torch.testing.assert_close(ops.sparse_attention(*args), expected, rtol=0, atol=0)


def test_a_row_that_sees_nothing_is_zero():
    """Nothing listed and no tail: zero and a log-sum-exp of -inf, not NaN."""
    args = Case(listed=0.0, tail="none", slopes="none").inputs()
    output, lse = ops.sparse_attention(*args)
    assert output.eq(0).all() and lse.eq(-torch.inf).all()


def test_ids_out_of_range_are_refused():
    """On the CPU by an error; in the reference, as on a GPU, by NaN in that row alone."""
    args = Case().inputs()
    args[4][0, 1, 2] = 1
    args[3][0, 1, 2, 0] = 4
    with pytest.raises(ValueError, match=r"block_ids must lie in \[0, 4\).* to 4"):
        ops.sparse_attention(*args)
    output, lse = reference.sparse_attention(*args)
    assert output[0, 1, 64:96].isnan().all() and lse[0, 1, 64:96].isnan().all()
    assert output.isnan().sum() == 32 * 32
    args = Case().inputs()
    args[4][0, 0, 0] = 9
    with pytest.raises(ValueError, match="block_counts must lie in"):
        ops.sparse_attention(*args)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda q: q.double(), TypeError, "query must be float32"),
        (0, lambda q: q[0], ValueError, "query must be"),
        (0, lambda q: q[..., :8], ValueError, "query must have a head dim from 16 to 256, got 8"),
        (0, lambda q: q[:0], ValueError, r"query must hold a token of a head, got shape \(0, 3"),
        (0, lambda q: q[:, :, :0], ValueError, "query must hold a token of a head"),
        (1, lambda k: k.half(), TypeError, "key must be torch.float32, got torch.float16"),
        (1, lambda k: k[:, :2], ValueError, r"key must have shape \(2, 3, 200, 32\)"),
        (2, lambda v: v[:, :, :9], ValueError, "value must have shape"),
        (3, lambda ids: ids.long(), TypeError, "block_ids must be torch.int32"),
        (4, lambda counts: counts[..., :1], ValueError, "block_counts must have shape"),
        (5, lambda k: k[:, :, :2], ValueError, "one representative for each of the 4 key blocks"),
        (6, lambda v: v.to("meta"), TypeError, "tail_value must be on cpu"),
        (9, lambda h: h.expand(-1, -1, 2, -1, -1), ValueError, "tail_slope must hold 0, 1 or 5"),
        (10, lambda _: math.nan, ValueError, "scale must be a finite number, got nan"),
        (11, lambda _: math.inf, ValueError, "variance_weight must be a finite number, got inf"),
        (12, lambda _: 48, ValueError, "block_q must be one of"),
        (13, lambda _: 0, ValueError, "block_kv must be one of"),
    ],
)
def test_bad_arguments_are_named(place, change, error, message):
    """One sentence that names the argument, what was expected and what came."""
    args = Case().inputs()
    args[place] = change(args[place])
    with pytest.raises(error, match=message):
        ops.sparse_attention(*args)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (1, lambda k: k.half(), TypeError, "key must be torch.float32, got torch.float16"),
        (3, lambda x: x.int(), TypeError, "exact must be torch.bool, got torch.int32"),
        (3, lambda x: x[..., :3], ValueError, r"exact must have shape \(2, 3, 5, 4\), got"),
        (3, lambda x: x.to("meta"), TypeError, "exact must be on cpu"),
        (8, lambda h: h.expand(-1, -1, 2, -1, -1), ValueError, "tail_slope must hold 0, 1 or 5"),
        (11, lambda _: 48, ValueError, "block_q must be one of"),
    ],
)
def test_bad_arguments_beside_a_mask_are_named(place, change, error, message):
    args = with_mask(Case().inputs())
    args[place] = change(args[place])
    with pytest.raises(error, match=message):
        ops.block_masked_attention(*args)


def test_a_mask_needs_keys():
    args = with_mask(Case(tail="none", slopes="none").inputs())
    args[1:4] = args[1][:, :, :0], args[2][:, :, :0], args[3][..., :0]
    with pytest.raises(ValueError, match="key must hold at least one token, got 0"):
        ops.block_masked_attention(*args)


@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_is_refused(masked):
    """The operator is forward-only and says so."""
    args = Case().inputs()
    args[0].requires_grad_()
    if masked:
        output, _ = ops.block_masked_attention(*with_mask(args))
    else:
        output, _ = ops.sparse_attention(*args)
    with pytest.raises(RuntimeError, match="forward-only"):
        output.sum().backward()


@pytest.mark.parametrize(("tail", "dim_v"), [("block", 32), ("row", 32), ("none", 16)])
def test_registration(tail, dim_v):
    """Schema, shape rule, strides and dynamic-shape dispatch agree with the implementation."""
    args = Case(tail=tail, slopes="none", dim_v=dim_v).inputs()
    args[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.uta.sparse_attention.default, tuple(args))
    masked = tuple(with_mask(args))
    torch.library.opcheck(torch.ops.uta.block_masked_attention.default, masked)
    scores = (args[0], args[0][:, :, :4], args[0][:, :, :4].square(), torch.zeros(2, 3, 4))
    torch.library.opcheck(torch.ops.uta.block_scores.default, (*scores, 0.2, 1.0, 1.0, 32, 2))
    torch.library.opcheck(torch.ops.uta.block_statistics.default, (args[1], args[2], 64))


def text_inputs(biased, dtype=torch.float32):
    """Arguments of ``text_attention``; a bias hides the last keys of one sample."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((70, 32), (11, 32), (11, 16))
    q, k, v = (torch.randn(2, 3, *size, generator=generator).to(dtype) for size in sizes)
    bias = torch.randn(2, 3, 11 if biased else 0, generator=generator)
    bias[1, :, 7:] = -torch.inf
    return q, k, v, bias, 0.3, 32


@pytest.mark.parametrize("biased", [False, True])
def test_attention_to_text_is_dense_attention(biased):
    """With the log-sum-exp of its logits, by which it is merged with the video's."""
    args = text_inputs(biased)
    q, k, v, bias, scale, _ = double(args)
    bias = bias[:, :, None] if biased else torch.zeros(1, 1, 1, 11).double()
    output = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    lse = (scale * q @ k.mT + bias).logsumexp(-1)
    torch.testing.assert_close(reference.text_attention(*double(args)), (output, lse))
    eager = reference.text_attention(*args)
    assert_as_accurate_as_float32(ops.text_attention(*args), eager, (output, lse), 32 + 11)


def test_more_operators_are_registered_right():
    """As ``test_registration``, of those that spare Inductor work."""
    torch.library.opcheck(torch.ops.uta.text_attention.default, text_inputs(True))
    torch.library.opcheck(torch.ops.uta.text_attention.default, text_inputs(False))
    torch.library.opcheck(torch.ops.uta.join_text.default, joined_inputs((2, 5, 3)))
    lines = torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.zeros(2, 1, 4, 1)
    torch.library.opcheck(torch.ops.uta.text_bias.default, (*lines, 2, 4, True))
    torch.library.opcheck(torch.ops.uta.weigh_scores.default, weighed_inputs())
    x, index = torch.randn(2, 9, 4, 8).transpose(1, 2), torch.randperm(9)
    torch.library.opcheck(torch.ops.uta.gather_tokens.default, (x, index, 2))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("hidden", [None, "row", "column"])
def test_a_mask_that_hides_video_gives_no_bias(added, hidden):
    """Text before and after 4 tokens of video; NaN where trusted and its sample hides video."""
    row, column = torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.ones(2, 1, 4, 1) > 0
    row[0, :, :, [1, 7]] = False
    if hidden is not None:
        (row if hidden == "row" else column.mT)[1, 0, 0, 3] = False
    lines = [torch.where(x, 0.0, -torch.inf) if added else x for x in (row, column)]
    bias = ops.text_bias(*lines, 2, 4, False)
    expected = torch.zeros(2, 1, 1, 5)
    expected[0, 0, 0, [1, 3]] = -torch.inf
    assert torch.equal(bias, expected)
    trusted = ops.text_bias(*lines, 2, 4, True)
    assert torch.equal(trusted[0], expected[0])
    assert torch.equal(trusted[1], expected[1]) if hidden is None else trusted[1].isnan().all()
    assert torch.equal(ops.text_bias(lines[0], lines[0][..., :0], 2, 4, False), expected)


def joined_inputs(sizes, dtype=torch.float32, dim=24):
    """Arguments of ``join_text``; one row sees no text, one sees hardly anything else."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(2, 3, *shape, generator=generator)

    before, output, text_output, after = (randn(sizes[i], dim).to(dtype) for i in (0, 1, 1, 2))
    lse, text_lse = randn(sizes[1]), randn(sizes[1])
    text_lse[0, 0, 0], text_lse[1, 0, 0] = -torch.inf, 40.0
    return output, lse, text_output, text_lse, before, after


@pytest.mark.parametrize("sizes", [(4, 70, 0), (0, 64, 9), (3, 1, 2), (0, 5, 0)])
def test_two_softmaxes_become_one_amid_the_others(sizes):
    """Of values and logits: what attention to all keys at once is."""
    output, lse, text_output, text_lse, before, after = double(list(joined_inputs(sizes)))
    masses = torch.stack([lse, text_lse]).softmax(0)[..., None]
    expected = torch.cat([before, masses[0] * output + masses[1] * text_output, after], 2)
    args = joined_inputs(sizes)
    found = ops.join_text(*args)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (1, torch.ones(2, 3, 4), ValueError, r"lse must have shape \(2, 3, 5\)"),
        (2, torch.ones(2, 3, 5, 8), ValueError, r"text_output must have shape \(2, 3, 5, 24\)"),
        (3, torch.ones(2, 3, 5).double(), TypeError, "text_lse must be torch.float32"),
        (4, torch.ones(2, 2, 24), ValueError, r"before must be \[B, H, L, D\], got 3 dimensions"),
        (5, torch.ones(2, 2, 3, 24), ValueError, r"after must have shape \(2, 3, 3, 24\)"),
        (5, torch.ones(2, 3, 3, 24).half(), TypeError, "after must be torch.float32"),
    ],
)
def test_wrong_inputs_of_join_text_are_named(place, wrong, error, message):
    args = list(joined_inputs((2, 5, 3)))
    args[place] = wrong
    with pytest.raises(error, match=message):
        ops.join_text(*args)


def weighed_inputs(dtype=torch.float32, power=1.0, weight=0.3):
    """Arguments of ``weigh_scores``, 5 query blocks of which the last is ragged."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 5, 6, generator=generator).to(reference.score_dtype(dtype))
    query = torch.randn(2, 3, 130, 24, generator=generator).to(dtype)
    variance = torch.rand(2, 3, 6, 24, generator=generator).to(dtype)
    spread = torch.rand(2, 3, 6, generator=generator)
    spread[0, 0, 1] = 0.0
    return scores, query, variance, spread, 0.4, weight, power, 32


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_scores_are_weighed_by_heads_and_key_blocks(weight, power):
    """Of the first rows of query blocks: ``sigma2`` of every pair, then its mean."""
    scores, query, variance, spread, scale, *_ = args = double(weighed_inputs(power=power))
    args[5] = weight
    rows = (scale * query[:, :, ::32]).square()
    sigma2 = torch.einsum("bhnc,bhkc->bhnk", rows, variance).mean((2, 3), keepdim=True)
    expected = scores * spread[:, :, None] ** (power / 2) * (-weight / 2 * sigma2).exp()
    torch.testing.assert_close(reference.weigh_scores(*args), expected)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(2, 3, 4, 6), r"scores must have shape \(2, 3, 5, 6\)"),
        (3, torch.ones(2, 3, 5), r"value_variance must have shape \(2, 3, 6\)"),
        (4, math.inf, "scale must be a finite number, got inf"),
        (5, math.nan, "variance_weight must be a finite number, got nan"),
        (6, -1.0, "value_power must not be negative, got -1.0"),
        (6, math.nan, "value_power must be a finite number, got nan"),
    ],
)
def test_wrong_inputs_of_weigh_scores_are_named(place, wrong, message):
    args = list(weighed_inputs())
    args[place] = wrong
    with pytest.raises(ValueError, match=message):
        ops.weigh_scores(*args)


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 2, 0)])
def test_gathered_tokens_lie_in_memory_as_before(layout):
    """Numbers as by ``index_select``, dimensions by stride as they were."""
    x = torch.randn(2, 3, 9, 4).permute(layout)
    dim, index = x.shape.index(9), torch.randperm(9)
    gathered = ops.gather_tokens(x, index, dim)
    assert torch.equal(gathered, x.index_select(dim, index))
    assert gathered.stride() == x.stride()


def test_schemas_are_what_plugins_of_tensorrt_take():
    """Tensors first, then float, int, bool, str; constants are in no file."""
    kinds = ["Tensor", "float", "int", "bool", "str"]
    constant = {operator._schema.name for operator in CONSTANTS}
    schemas = [x for x in torch._C._jit_get_all_schemas() if x.name.startswith("uta::")]
    found = set()
    for schema in schemas:
        if schema.name in constant:
            continue
        places = [
            kinds.index({"SymInt": "int"}.get(str(x.type), str(x.type))) for x in schema.arguments
        ]
        assert places == sorted(places) and places[0] == 0, schema
        assert all(str(x.type) == "Tensor" for x in schema.returns), schema
        found.add(schema.name)
    assert {"uta::sparse_attention", "uta::select_blocks", "uta::attend_listed"} <= found


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_block_scores_are_root_mean_squares_over_true_rows(power, rows):
    """The ragged last query block takes its own groups alone, its last group its own rows alone."""
    q, mean = Case().inputs()[0].double(), torch.randn(2, 3, 5, 32, dtype=torch.float64)
    variance, log_size = torch.rand(2, 3, 5, 32).double(), torch.rand(2, 3, 5)
    scores = reference.block_scores(q, mean, variance, log_size, 0.2, 1.0, power, 32, rows)
    assert scores.shape == (2, 3, 5, 5)
    for block, start in ((1, 32), (4, 128)):
        groups = q[:, :, start : min(start + 32, 130)].split(rows, 2)
        squares = []
        for group in groups:
            sigma2 = torch.einsum("bhic,bhnc->bhin", (group * 0.2) ** 2, variance).mean(2)
            logits = torch.einsum("bhc,bhnc->bhn", group.mean(2) * 0.2, mean)
            mass = (logits + log_size).softmax(-1) * (sigma2 / 2).exp()
            squares.append((mass * sigma2**power) ** 2)
        torch.testing.assert_close(scores[:, :, block], torch.stack(squares).mean(0).sqrt())


def test_scores_need_blocks():
    q, mean = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 0, 16)
    with pytest.raises(ValueError, match="key_mean must hold at least one block, got 0"):
        ops.block_scores(q, mean, mean, torch.zeros(1, 1, 0), 1.0, 0.0, 1.0, 32, 2)


@pytest.mark.parametrize("place", range(3))
def test_numbers_of_scores_must_be_finite(place):
    q, mean = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 3, 16)
    numbers = [1.0, 0.0, 1.0]
    numbers[place] = math.nan
    name = ("scale", "variance_weight", "variance_power")[place]
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
        ops.block_scores(q, mean, mean.square(), torch.zeros(1, 1, 3), *numbers, 32, 2)


@pytest.mark.parametrize("rows", [0, 3, 16])
def test_rows_that_do_not_divide_a_block_are_named(rows):
    q, mean = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 3, 16)
    with pytest.raises(ValueError, match=f"rows must divide block_q, 32, .* got {rows}"):
        ops.block_scores(q, mean, mean.square(), torch.zeros(1, 1, 3), 1.0, 0.0, 1.0, 32, rows)


def test_the_variance_of_logits_is_that_of_the_whole_query_block():
    """By the mean square of its true rows; the ragged last block has few."""
    q = torch.randn(1, 2, 70, 16, dtype=torch.float64)
    variance = torch.rand(1, 2, 3, 16, dtype=torch.float64)
    sigma2 = reference.pooled_variance(q, variance, -0.3, 32)
    for block, rows in enumerate(q.split(32, 2)):
        expected = ((0.3 * rows).square()[:, :, :, None] * variance[:, :, None]).sum(-1).mean(2)
        torch.testing.assert_close(sigma2[:, :, block], expected)


def assert_as_accurate_as_float32(results, eager, exact, terms):
    """Float32 arithmetic in another order than the reference's.

    A sum of ``terms`` numbers errs by 2^-24 of their absolute sum for each addition, whatever the
    order: where the reference happens to err less, that bound counts. Where the reference rounds
    its result, so do they, by half a unit.
    """
    for got, mine, true in zip(results, eager, exact, strict=True):
        half_unit = torch.finfo(mine.dtype).eps / 2
        bound = (2**-24 * terms + half_unit) * true.abs().max()
        assert got.dtype == mine.dtype and got.shape == true.shape
        assert (got - true).abs().max() <= 2 * (mine - true).abs().max() + bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 32, 75, 130])
@pytest.mark.parametrize(("power", "weight"), [(0.0, 0.0), (0.5, 1.0), (1.0, 0.5)])
def test_block_scores_agree_with_the_reference(monkeypatch, dtype, length, power, weight):
    """Ragged, in several pieces, strided, without a number from beyond the end."""
    monkeypatch.setattr(cpu, "PIECE", 2 * 32 * 5)
    query, mean = (randn_transposed(2, n, 3, 48).to(dtype) for n in (length, 5))
    args = (query, mean, mean.square(), torch.rand(2, 3, 5), 48**-0.5, weight, power, 32, 2)
    results = (ops.block_scores(*args), reference.block_scores(*args))
    assert results[0].dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    exact = reference.block_scores(*double(args))
    assert_as_accurate_as_float32(results[:1], results[1:], [exact], terms=32 + 48 + 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 32, 64, 75])
def test_block_statistics_agree_with_the_reference(dtype, length):
    """Ragged and strided, with values far from zero."""
    key = randn_transposed(2, length, 3, 16).to(dtype)
    value = randn_transposed(2, length, 3, 24).to(dtype) + 5
    exact = reference.block_statistics(key.double(), value.double(), 32)
    eager = reference.block_statistics(key, value, 32)
    results = ops.block_statistics(key, value, 32)
    dtypes = [dtype] * 3 + [torch.float32] * 2
    assert [x.dtype for x in results] == [x.dtype for x in eager] == dtypes
    unit = torch.finfo(dtype).eps / 2 + 2**-24 * 32 * 24  # of one rounding, and of float32's sums
    for got, mine, true in zip(results[:3], eager[:3], exact[:3], strict=True):
        allowed = 2 * (mine - true).abs().max() + unit * true.abs().max()
        assert (got - true).abs().max() <= allowed
    assert_as_accurate_as_float32(results[3:], eager[3:], exact[3:], terms=32 * 24)


def randn_transposed(batch, length, heads, dim):
    """``[B, H, L, D]`` as models hand it over."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, heads, dim, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 31, 32, 64, 75])
def test_block_statistics_are_those_of_each_block(length):
    """Block by block, over the true tokens alone; value head dims of their own."""
    generator = torch.Generator().manual_seed(length)
    k = torch.randn(2, 3, length, 16, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 3, length, 24, generator=generator, dtype=torch.float64) + 5
    mean, variance, value_mean, value_variance, covariance = reference.block_statistics(k, v, 32)
    total = torch.zeros(2, 3, 16, 24, dtype=torch.float64)
    for block, start in enumerate(range(0, length, 32)):
        keys, values = k[:, :, start : start + 32], v[:, :, start : start + 32]
        n = keys.shape[2]
        torch.testing.assert_close(mean[:, :, block], keys.sum(2) / n)
        torch.testing.assert_close(variance[:, :, block], keys.var(2, correction=0))
        torch.testing.assert_close(value_mean[:, :, block], values.sum(2) / n)
        spread = (values - values.mean(2, keepdim=True)).square().sum((2, 3)) / n
        torch.testing.assert_close(value_variance[:, :, block], spread)
        deviation = keys - keys.mean(2, keepdim=True)
        total += torch.einsum("bhnc,bhnd->bhcd", deviation, values)
    torch.testing.assert_close(covariance, total / length)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": lambda k: k[0]}, ValueError, "key must be .* got 3 dimensions"),
        ({"key": lambda k: k.long()}, TypeError, "key must be float32, float16 or bfloat16"),
        ({"key": lambda k: k[..., :8]}, ValueError, "key must have a head dim from 16 to 256"),
        ({"key": lambda k: k[:, :, :0]}, ValueError, "key must hold a token of a head"),
        ({"value": lambda v: v[:, :, 1:]}, ValueError, "value must have shape"),
        ({"value": lambda v: v.half()}, TypeError, "value must be torch.float32"),
        ({"block_kv": lambda _: 33}, ValueError, "block_kv must be one of"),
    ],
)
def test_bad_arguments_of_block_statistics_are_named(change, error, message):
    """Before anything is computed."""
    arguments = {"key": torch.randn(1, 2, 40, 32), "value": torch.randn(1, 2, 40, 16)}
    arguments["block_kv"] = 32
    arguments |= {name: alter(arguments[name]) for name, alter in change.items()}
    with pytest.raises(error, match=message):
        ops.block_statistics(**arguments)


def test_more_heads_than_a_grid_holds_are_refused_on_a_gpu():
    with torch._subclasses.FakeTensorMode():
        cpu = torch.empty(2, 40000, 64, 16)
        gpu = torch.empty(2, 40000, 64, 16, device="cuda")
    contract.check_block_statistics(cpu, cpu, 64)
    with pytest.raises(ValueError, match=r"key must have at most 65535 heads .* got 2 \* 40000"):
        contract.check_block_statistics(gpu, gpu, 64)
