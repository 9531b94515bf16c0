"""Rectified SpaAttn: selection, gain, offset and the operator, against plain statements."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, double

from uta_fx import Config, sparse_attention
from uta_fx.attention import operator_arguments, pool_blocks, reorder_tokens
from uta_fx.kernels import ops, reference
from uta_fx.order import token_order
from uta_fx.policies import Rectified
from uta_fx.rectification import pooled_shares, rectification
from uta_fx.tails import Tail

GRID = (5, 6, 7)
BLOCK = 16


def site(text=0, density=0.3, mass=0.3, hidden=0, grid=GRID, batch=1):
    """What the policy and the tail see: fields that vary over the grid, and text keys."""
    generator = torch.Generator().manual_seed(0)
    length = math.prod(grid)
    q, k, v = torch.randn(3, batch, 2, length, 16, generator=generator).unbind()
    # means that differ from block to block, or nothing passes the gain test
    drift = torch.linspace(-2, 2, length)[:, None] * torch.randn(2, 1, 16, generator=generator)
    q, k = q + drift, k + drift
    text_key = torch.randn(batch, 2, text, 16, generator=generator)
    bias = torch.zeros(1, 1, 1, text)
    bias[..., :hidden] = -torch.inf
    config = Config(policy=Rectified(mass=mass), density=density, block_q=BLOCK, block_kv=BLOCK)
    (q, k, v), _ = reorder_tokens(q, k, v, config, grid)
    return pool_blocks(q, k, v, config, 0.2, grid, text_key, bias), config


def shares_by_hand(selection, head, row):
    """Softmax over mean keys with the log of how many they are, and over text keys one by one."""
    query = selection.query[0, head].double().split(BLOCK)[row].mean(0)
    keys = selection.key[0, head].double().split(BLOCK)
    logits = [0.2 * (query @ x.mean(0)).item() + math.log(len(x)) for x in keys]
    text = [0.2 * (query @ x.double()).item() for x in selection.text_key[0, head]]
    weights = [math.exp(x) for x in logits]
    texts = [
        math.exp(x) * (bias > -math.inf)
        for x, bias in zip(text, selection.text_bias[0, 0, 0].tolist(), strict=True)
    ]
    total = sum(weights) + sum(texts)
    return [x / total for x in weights], sum(texts) / total


@pytest.mark.parametrize(("text", "hidden"), [(0, 0), (9, 0), (9, 4)])
def test_isolated_pooling_is_a_softmax_with_sizes(text, hidden):
    """The published form: B p / (B Pv + Pt) of a plain softmax, where all blocks hold B keys."""
    selection, _ = site(text, hidden=hidden)
    shares = pooled_shares(selection)
    torch.testing.assert_close(shares.blocks.sum(-1, keepdim=True) + shares.text,
                               torch.ones_like(shares.text))  # fmt: skip
    for head, row in itertools.product(range(2), range(14)):
        blocks, texts = shares_by_hand(selection, head, row)
        assert shares.blocks[0, head, row].tolist() == pytest.approx(blocks, rel=1e-4)
        assert shares.text[0, head, row].item() == pytest.approx(texts, rel=1e-4)

    selection, _ = site(text, hidden=hidden, grid=(4, 4, 4))  # no ragged block
    means = selection.query.unflatten(2, (-1, BLOCK)).mean(3) * 0.2
    logits = torch.cat(
        [
            means @ selection.statistics.key_mean.mT,
            means @ selection.text_key.mT + selection.text_bias,
        ],
        -1,
    )
    p = logits.double().softmax(-1)
    visual, texts = p[..., :4], p[..., 4:].sum(-1, keepdim=True)
    whole = BLOCK * visual.sum(-1, keepdim=True) + texts
    shares = pooled_shares(selection)
    torch.testing.assert_close(shares.blocks.double(), BLOCK * visual / whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(shares.text.double(), texts / whole, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize(("density", "mass"), [(0.3, 0.3), (0.1, 0.7), (0.05, 0.0)])
def test_the_critical_blocks_are_those_of_the_rule(text, density, mass):
    """Ranks up to max(c, k), text among them; neighbours; without text the first frame."""
    selection, config = site(text, density=density, mass=mass)
    exact = config.selection_policy().select(selection)
    order = token_order(GRID, "hilbert", BLOCK, "cpu").order
    places = torch.stack(torch.unravel_index(order, GRID), -1).split(BLOCK)
    for head, row in itertools.product(range(2), range(14)):
        blocks, texts = shares_by_hand(selection, head, row)
        columns = blocks + [texts] * bool(text)
        ranks = sorted(range(len(columns)), key=lambda m: -columns[m])
        running = list(itertools.accumulate(columns[m] for m in ranks))
        count = max(sum(x <= mass for x in running) + 1, int(density * 14))
        kept = {m for m in ranks[:count] if m < 14}
        for m, other in enumerate(places):
            distance = (places[row][:, None] - other).abs().amax(-1)
            if distance.min() <= 1:
                kept.add(m)
        if not text and row < 14 // 5:
            kept |= set(range(14 // 5))
        assert set(exact[0, head, row].nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("keep_rejected", [True, False])
@pytest.mark.parametrize("text", [0, 9])
def test_the_output_is_that_of_the_formula(text, keep_rejected):
    """R times exact attention plus the means that pass the gain test, row by row in float64."""
    selection, _ = site(text)
    q, k, v = selection.query, selection.key, selection.value
    generator = torch.Generator().manual_seed(3)
    text_v = torch.randn(1, 2, text, 16, generator=generator)
    exact = torch.rand(1, 2, 14, 14, generator=generator) < 0.3
    exact |= torch.eye(14, dtype=torch.bool)
    gain, offset = rectification(selection, exact, keep_rejected=keep_rejected)
    passed = 0
    outputs = torch.zeros(2, math.prod(GRID), 16, dtype=torch.float64)
    for head, row in itertools.product(range(2), range(14)):
        blocks, texts = shares_by_hand(selection, head, row)
        rows, keys, values = (x[0, head].double().split(BLOCK) for x in (q, k, v))
        query = rows[row].mean(0)
        spread = (rows[row] - query).abs().mean(0)
        scaling, added = texts, torch.zeros(16, dtype=torch.float64)
        for m, key in enumerate(keys):
            mean = key.mean(0)
            error = (spread @ mean).abs() + (query @ (key - mean).abs().mean(0)).abs()
            if exact[0, head, row, m]:
                scaling += blocks[m]
            elif (query @ mean).abs() > error:
                added += blocks[m] * values[m].mean(0)
                passed += 1
            elif keep_rejected:
                scaling += blocks[m]
        assert gain[0, head, row].item() == pytest.approx(scaling, rel=1e-4)
        torch.testing.assert_close(offset[0, head, row].double(), added, rtol=1e-4, atol=1e-6)
        seen = [key for m, key in enumerate(keys) if exact[0, head, row, m]]
        seen_v = [value for m, value in enumerate(values) if exact[0, head, row, m]]
        all_keys = torch.cat([*seen, selection.text_key[0, head].double()])
        all_values = torch.cat([*seen_v, text_v[0, head].double()])
        weights = (0.2 * rows[row] @ all_keys.T).softmax(-1)
        outputs[head, row * BLOCK : (row + 1) * BLOCK] = scaling * weights @ all_values + added
    assert passed > 20  # of the 275 pairs that are not exact: the test tells some from others
    ids = exact.int().argsort(dim=-1, descending=True, stable=True).int()
    output = ops.rectified_attention(
        q, k, v, ids, exact.sum(-1, dtype=torch.int32), selection.text_key, text_v,
        torch.zeros(1, 2, text), gain, offset, 0.2, BLOCK, BLOCK,
    )  # fmt: skip
    torch.testing.assert_close(output[0].double(), outputs, rtol=1e-4, atol=1e-5)


def rectified_case(text=5, **fields):
    """Arguments of the operator, from those of ``sparse_attention`` and a tail for each row."""
    case = Case(tail="none", slopes="none", **fields)
    args = case.inputs()
    generator = torch.Generator().manual_seed(1)
    lead, rows = (case.batch, case.heads), args[4].shape[-1]
    bias = torch.zeros(*lead, text)
    bias[..., :1] = -torch.inf
    return [
        *args[:5],
        torch.randn(*lead, text, case.dim, generator=generator).to(case.dtype),
        torch.randn(*lead, text, case.dim_v, generator=generator).to(case.dtype),
        bias,
        torch.rand(*lead, rows, generator=generator),
        torch.randn(*lead, rows, case.dim_v, generator=generator),
        case.dim**-0.5, case.block_q, case.block_kv,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("text", "dim_v"), [(0, 32), (5, 32), (5, 48)])
def test_the_cpu_kernel_agrees_with_the_reference(dtype, text, dim_v):
    """As accurate as eager, and eight units of the largest output: two merges and one rounding."""
    args = rectified_case(text, dtype=dtype, dim_v=dim_v)
    exact = reference.rectified_attention(*double(args))
    eager = reference.rectified_attention(*args)
    output = ops.rectified_attention(*args)
    assert output.dtype == dtype and not output.isnan().any()
    rounding = torch.finfo(dtype).eps * exact.abs().amax().item()
    assert (output - exact).abs().amax() <= (eager - exact).abs().amax() + 8 * rounding
    if text == 0:  # the rows that list nothing
        offset = args[9][:, 0, :1].expand(-1, 32, -1)
        torch.testing.assert_close(output[:, 0, :32].float(), offset, rtol=0, atol=4 * rounding)


def test_the_operator_is_one_for_pytorch():
    """Schema, fake and device dispatch; and it refuses what is outside its contract."""
    torch.library.opcheck(torch.ops.uta.rectified_attention.default, rectified_case())
    for place, name in ((5, "text_key"), (7, "text_bias"), (8, "gain"), (9, "offset")):
        args = rectified_case()
        args[place] = args[place][:, :1]
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            ops.rectified_attention(*args)
    args = rectified_case()
    args[8] = args[8].half()
    with pytest.raises(TypeError, match=r"gain must be torch.float32, got torch.float16"):
        ops.rectified_attention(*args)


@pytest.mark.parametrize("text", [(0, 0), (7, 0), (3, 30)])
def test_density_one_is_dense_attention(text):
    """Then nothing is added and the gain is one, text or none."""
    generator = torch.Generator().manual_seed(0)
    length = math.prod(GRID) + sum(text)
    q, k, v = torch.randn(3, 1, 2, length, 16, generator=generator).unbind()
    config = Config(policy="rectified", tail="rectified", density=1.0, block_q=16, block_kv=16)
    output = sparse_attention(q, k, v, config=config, grid=GRID, text=text)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["rectified", "topk", "radial"])
@pytest.mark.parametrize("hidden", [False, True])
def test_joint_attention_is_traced_as_it_is(policy, hidden):
    """One graph by torch.compile, with text that a mask hides; other policies take the tail too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, math.prod(GRID) + 9, 16, generator=generator).unbind()
    mask = torch.ones(1, 1, 1, q.shape[2], dtype=torch.bool)
    mask[..., -4:] = not hidden
    config = Config(policy=policy, tail="rectified", density=0.2, block_q=16, block_kv=16)

    def call(q, k, v, mask):
        return sparse_attention(q, k, v, config=config, grid=GRID, text=(0, 9), attn_mask=mask)

    with torch.no_grad():
        expected = call(q, k, v, mask)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v, mask)
        torch.testing.assert_close(compiled, expected)
        if hidden:  # what is hidden does not matter
            v[:, :, -4:] = 100.0
            torch.testing.assert_close(call(q, k, v, mask)[:, :, :-9], expected[:, :, :-9])


def test_it_errs_less_than_what_it_rectifies():
    """On smooth fields, at its own selection: less than half of the error of dropping the tail."""
    generator = torch.Generator().manual_seed(0)
    grid = (8, 8, 8)
    axes = [torch.arange(side) / 8 for side in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    q, k, v = (
        torch.sin(position @ torch.randn(1, 4, 3, 32, generator=generator)) for _ in range(3)
    )
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = {}
    for tail in ("none", "rectified"):
        config = Config(policy="rectified", tail=tail, density=0.2, block_q=32, block_kv=32)
        output = sparse_attention(q, k, v, config=config, grid=grid)
        errors[tail] = (output - dense).square().mean()
    assert errors["rectified"] < errors["none"] / 2


def test_there_are_no_representatives():
    """The inputs of the other operator do not exist for it; parameters have ranges."""
    selection, config = site()
    config = Config(tail="rectified", block_q=BLOCK, block_kv=BLOCK)
    with pytest.raises(ValueError, match="tail rectified has no representatives"):
        operator_arguments(selection, selection.key, selection.value, config)
    with pytest.raises(ValueError, match=r"mass must be in \[0, 1\], got 1.5"):
        Rectified(mass=1.5)
    with pytest.raises(ValueError, match="reach must be at least 0, got -1"):
        Rectified(reach=-1)
    with pytest.raises(ValueError, match="grid must be given for policy rectified"):
        sparse_attention(*selection.query.expand(3, -1, -1, -1, -1).unbind(),
                         config=Config(policy="rectified"))  # fmt: skip
    with pytest.raises(ValueError, match="keep_rejected concerns the tail rectified alone"):
        Tail(kind="block", keep_rejected=False)
