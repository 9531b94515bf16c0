"""The kernels for Hopper: the order of blocks anywhere, the rest on such a GPU."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton")

from cases import laid_out, nan_in_new_memory, with_mask
from test_triton import DEVICE, Case, assert_as_accurate_as_eager

from uta_fx.bench.gate import variance_roundings
from uta_fx.kernels import gluon_attention, gluon_tail, reference, triton_attention
from uta_fx.kernels.gluon_attention import (
    CHUNK,
    COMPARED,
    FIELD,
    ORDER_OPTIONS,
    PLAN,
    RANKED,
    TURN_OPTIONS,
)


def on_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0")


@pytest.mark.parametrize("blocks", [1, 37, 2 * CHUNK + 5])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("ragged", [0, 1])  # how many of the blocks are
@pytest.mark.parametrize("lists", [True, False])
def test_a_pair_finds_its_blocks_where_the_plan_says(lists, ragged, rows, share, blocks):
    generator = torch.Generator().manual_seed(0)
    listed = torch.rand(1, 2, rows, blocks, generator=generator) < share
    listed[:, :, 1:] &= torch.rand(1, 2, rows - 1, blocks, generator=generator) < 0.7
    counts = listed.sum(-1).int()
    counts[0, 1, 0] += 1  # one id was outside
    pairs = -(-rows // 2)
    ids = torch.full((1, 2, pairs, blocks), 60000, dtype=torch.uint16, device=DEVICE)
    plan = torch.full((1, 2, pairs, PLAN), -7, dtype=torch.int32, device=DEVICE)
    gluon_attention._pair_lists_kernel[(pairs, 2)](
        ids, plan, listed.to(DEVICE, torch.uint8),
        counts.to(DEVICE) if lists else None, *counts.stride()[:2],
        2, rows, blocks, blocks - ragged, blocks + 1, CHUNK=CHUNK, PLAN=PLAN, FIELD=FIELD,
    )  # fmt: skip
    for head in range(2):
        for pair in range(pairs):
            alternating, *counts_ab, bad, ragged_rows = plan[0, head, pair, :5].tolist()
            order = ids[0, head, pair].tolist()
            wanted = [set(row.nonzero()[:, 0].tolist()) for row in listed[0, head, 2 * pair :][:2]]
            wanted += [set()] * (2 - len(wanted))
            first = int(ragged_rows > 0)
            for which in range(2):
                own = ragged_rows >> which & 1
                assert own == (ragged == 1 and blocks - 1 in wanted[which])
                places = [0] * own + [
                    first + (2 * i + which if i < alternating else i + alternating)
                    for i in range(counts_ab[which])
                ]
                assert sorted(order[at] for at in places) == sorted(wanted[which])
            union = wanted[0] | wanted[1]
            assert first + alternating + max(counts_ab) == len(union)
            assert set(order[: len(union)]) == union
            assert not first or order[0] == blocks - 1
            assert bad == (lists and head == 1 and pair == 0)


@pytest.mark.parametrize("rows", [1, 2, 7, 2 * COMPARED + 131])
def test_longest_lists_have_their_turn_first(rows):
    generator = torch.Generator().manual_seed(0)
    pairs, blocks = -(-rows // 2), 40
    listed = torch.rand(1, 2, rows, blocks, generator=generator) < torch.rand(
        1, 2, rows, 1, generator=generator
    )
    ids = torch.empty(1, 2, pairs, blocks, dtype=torch.uint16, device=DEVICE)
    plan = torch.full((1, 2, pairs, PLAN), -7, dtype=torch.int32, device=DEVICE)
    gluon_attention._pair_lists_kernel[(pairs, 2)](
        ids, plan, listed.to(DEVICE, torch.uint8), None, 0, 0,
        2, rows, blocks, blocks - 1, blocks, **ORDER_OPTIONS,
    )  # fmt: skip
    gluon_attention._longest_first_kernel[(-(-pairs // RANKED), 2)](plan, rows, **TURN_OPTIONS)
    lengths = torch.nn.functional.pad(listed.sum(-1), (0, rows % 2)).unflatten(-1, (pairs, 2))
    turns = torch.sort(lengths.sum(-1), dim=-1, descending=True, stable=True).indices
    assert torch.equal(plan[..., 6].cpu().long(), turns)


COMPILE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from uta_fx.kernels import gluon_attention as g

map_of = "tensordesc<bf16[1, 1, {}, {}],{!r}>".format
dim = int(sys.argv[2])
tile, slope = map_of(g.BLOCK, dim, g.MAP_LAYOUT), map_of(dim, dim, g.MAP_LAYOUT)
constants = g.paired_options(dim, -1, False, sys.argv[1] == "tail", sys.argv[1] == "resume")
options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
types = {
    "o_ptr": "*bf16", "lse_ptr": "*fp32", "ids_ptr": "*u16", "plan_ptr": "*i32",
    "size_ptr": "*fp32", "listed_ptr": "*u8", "sigma2_ptr": "*bf16",
    "q_desc": tile, "k_desc": tile, "v_desc": tile, "o_desc": tile,
    "tail_k_desc": tile, "tail_v_desc": tile, "slope_desc": slope,
    "scale": "fp32", "scale_log2": "fp32", "half_weight_log2": "fp32",
} | dict.fromkeys(constants, "constexpr")
function = g._paired_kernel
signature = {name: types.get(name, "i32") for name in function.arg_names}
kernel = triton.compile(
    GluonASTSource(function, signature, constants),
    target=GPUTarget("cuda", 90, 32),
    options=options,
)
programs = 2 if dim == 64 else 1  # on a multiprocessor, of whose 228 KB each loses one
assert kernel.metadata.shared <= (228 // programs - 1) * 1024, kernel.metadata.shared
assert 65536 // (384 * options["maxnreg"]) == programs
ptx = kernel.asm["ptx"]
assert ptx.count("wgmma.mma_async") >= 16
# for want of registers the assembler would let each product wait for the one before
assert kernel.asm["sass"].count("WARPGROUP.ARRIVE") <= ptx.count("wgmma.commit_group")
# a barrier that nobody waits for would lie where tiles do, or arguments of the groups of warps
offset = dict(re.findall(r"add.s32\\s+(%r[0-9]+), %r[0-9]+, ([0-9]+);", ptx))
barriers = {int(offset[name]) for name in re.findall(r"mbarrier.init\\S* \\[(%r[0-9]+)\\]", ptx)}
arguments = {int(x) // 8 * 8 for x in re.findall(r"\\[global_smem\\+([0-9]+)\\]", ptx)}
tiles = 2 * g.STAGES + 2
assert min(barriers) >= tiles * g.BLOCK * dim * 2
assert arguments and not barriers & arguments
"""


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["listed", "resume", "tail"])
def test_it_compiles_for_hopper_without_one(kernel, dim, tmp_path):
    """And fits its shared memory; its products are the instructions of Hopper."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = [sys.executable, "-c", COMPILE, kernel, str(dim)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


WITHOUT_GLUON = """
import sys

# what a Triton without Gluon, or with other names in it, leads to
sys.modules["uta_fx.kernels.gluon_attention"] = None
import torch
from test_triton import Case, assert_as_accurate_as_eager
from uta_fx.kernels import triton_attention

assert triton_attention.gluon_attention is None and triton_attention.gluon_tail is None
case = Case(length_q=70, length_kv=130, dim=16, dim_v=16, block_q=64, block_kv=64)
assert_as_accurate_as_eager(case.inputs(torch.float16))
"""


def test_plain_triton_serves_where_gluon_is_missing():
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    script = [sys.executable, "-c", WITHOUT_GLUON]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_only_what_it_serves_is_taken():
    x = torch.zeros(1, 2, 128, 128, dtype=torch.float16, device=DEVICE)
    assert gluon_attention.takes(x, x, x, x, 64, 64) == on_hopper()
    assert gluon_attention.takes(*[x[..., :64]] * 4, 64, 64) == on_hopper()
    short = x[..., :32]
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape)
    odd = torch.zeros(1, 2, 128, 129, dtype=x.dtype, device=DEVICE)[..., :128]
    for case in (
        (x, x, x, x, 128, 64), (x, x, x, x, 64, 32), (*[x.float()] * 4, 64, 64),
        (short, short, short, short, 64, 64), (x, x, short, short, 64, 64),
        (x, shifted, x, x, 64, 64), (shifted, x, x, x, 64, 64), (x, x, odd, x, 64, 64),
        (x, x, x, odd, 64, 64), (x, x, x, x.mT, 64, 64),
        (x, x[:, :1].expand(1, 2, 128, 128), x, x, 64, 64),
    ):  # fmt: skip
        assert not gluon_attention.takes(*case)


def test_no_more_blocks_than_16_bits_number_are_taken(monkeypatch):
    x = torch.zeros(1, 1, 130, 64, dtype=torch.float16, device=DEVICE)
    monkeypatch.setattr(gluon_attention, "on_hopper", lambda x: True)
    assert gluon_attention.MAX_BLOCKS - 1 == torch.iinfo(torch.uint16).max
    assert gluon_attention.takes(x, x, x, x, 64, 64)
    monkeypatch.setattr(gluon_attention, "MAX_BLOCKS", 2)
    assert not gluon_attention.takes(x, x, x, x, 64, 64)
    assert gluon_attention.takes(x, x[:, :, :128], x[:, :, :128], x, 64, 64)


@pytest.mark.parametrize(
    ("batch_heads", "tokens", "dim", "most"),
    [
        (40, 75600, 128, 20),  # Wan 14B at 720p: twice
        (12, 32760, 128, 12),  # Wan 1.3B at 480p, CogVideoX-5b: at once
        (48, 17550, 64, 48),
        (5, 75600, 128, 5),  # so few heads that half of them would leave a GPU idle
        (80, 75600, 128, 40),
        (1, 1, 64, 1),
    ],
)
def test_what_is_made_for_pairs_of_blocks_is_a_share_of_the_inputs(batch_heads, tokens, dim, most):
    blocks = -(-tokens // 64)
    assert gluon_attention.heads_at_a_time(batch_heads, blocks, blocks, dim, True) == most


@pytest.mark.parametrize("most", [1, 2, 3, 7, 20])  # heads at a time, of three samples of three
@pytest.mark.parametrize("tail", ["block", "none"])
@pytest.mark.parametrize("counted", [True, False])
def test_heads_in_parts_are_the_whole(counted, tail, most, monkeypatch):
    case = dataclasses.replace(CASE, batch=3, heads=3, length_q=130, length_kv=200, tail=tail)
    args = case.inputs(torch.float32)
    query, key, value, exact, *rest = with_mask(args)
    heads = []

    def attend_part(query, key, value, output, lse, listed, counts, max_blocks, tail, *others):
        heads.append(query.shape[0] * query.shape[1])
        given = tail or [x[: query.shape[0], : query.shape[1]] for x in rest[:5]]
        result = reference.block_masked_attention(
            query, key, value, listed.bool(), *given, *others[:2], 64, 64
        )
        output.copy_(result[0])
        lse.copy_(result[1])
        assert max_blocks == 4 and others[2] is False
        assert counts is None if not counted else torch.equal(counts, listed.sum(-1).int())

    monkeypatch.setattr(gluon_attention, "heads_at_a_time", lambda *_: most)
    monkeypatch.setattr(gluon_attention, "_attend_part", attend_part)
    output, lse = torch.full_like(query, torch.nan), torch.full_like(query[..., 0], torch.nan)
    gluon_attention.attend(
        query, key, value, output, lse, exact.contiguous().view(torch.uint8),
        args[4] if counted else None, 4, gluon_tail.Tail(*rest[:5]) if tail == "block" else None,
        *rest[5:7], False,
    )  # fmt: skip
    expected = reference.block_masked_attention(query, key, value, exact, *rest)
    torch.testing.assert_close((output, lse), expected)
    assert sum(heads) == 9 and max(heads) <= max(most, 1)


def test_only_a_tail_that_it_serves_is_taken():
    tail = gluon_tail.Tail(*CASE.inputs(torch.float16)[5:10])
    assert gluon_attention.takes_tail(tail, 0.1)
    assert gluon_attention.takes_tail(tail, 0.0)
    assert not gluon_attention.takes_tail(tail, -1e-31)
    for change in (
        {"variance": tail.variance[:, :, :0]},
        {"slope": tail.slope[:, :, :0]},
        {"slope": torch.cat([tail.slope, tail.slope], 2)},
        {"key": tail.key[:, :, None], "value": tail.value[:, :, None]},
        {"key": tail.key[:, :1].expand(tail.key.shape)},
        {"slope": tail.slope[:, :1].expand(tail.slope.shape)},
    ):
        assert not gluon_attention.takes_tail(tail._replace(**change), 0.1)


CASE = Case(length_q=300, length_kv=555, dim=128, dim_v=128, block_q=64, block_kv=64)
CASES = {
    "everything": CASE,
    "whole_blocks": dataclasses.replace(CASE, length_q=256, length_kv=512),
    "no_tail": dataclasses.replace(CASE, tail="none"),
    "own_tail_of_each_query_block": dataclasses.replace(CASE, tail="row"),
    "odd_blocks": dataclasses.replace(CASE, batch=2, heads=3, length_q=130, length_kv=700),
    "one_token": dataclasses.replace(CASE, length_q=1, length_kv=1),
    "nothing_listed": dataclasses.replace(CASE, listed=0.0),
    "nothing_at_all": dataclasses.replace(CASE, listed=0.0, tail="none"),
    "everything_listed": dataclasses.replace(CASE, listed=1.0),
    "negative_scale": dataclasses.replace(CASE, scale=-0.2),
    "zero_scale": dataclasses.replace(CASE, scale=0.0),
    "steep_logits": dataclasses.replace(CASE, scale=2.0, variance_weight=0.1),
    "no_variance": dataclasses.replace(CASE, variance=False),
    "no_slope": dataclasses.replace(CASE, slopes="none"),
    "damping_without_mass": dataclasses.replace(CASE, variance_weight=0.0),
    "long_tail": dataclasses.replace(CASE, length_q=260, length_kv=12805, listed=0.2),
    "rings_run_round": dataclasses.replace(CASE, length_kv=40000, listed=0.2, tail="none"),
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_are_as_accurate_as_eager(dim, case, dtype):
    args = dataclasses.replace(case, dim=dim, dim_v=dim).inputs(dtype)
    assert gluon_attention.takes(*args[:3], args[0], 64, 64)
    assert_as_accurate_as_eager(args, more=variance_roundings(args))


def with_counts(args, seed):
    """Of each row as many blocks as before, or none, or all."""
    counts = args[4]
    kind = torch.randint(4, counts.shape, generator=torch.Generator().manual_seed(seed))
    kind = kind.to(counts.device)
    args[4] = counts.masked_fill(kind == 0, 0).masked_fill(kind == 1, args[3].shape[-1])
    return args


LENGTHS = st.one_of(st.integers(1, 700), st.integers(1, 10).map(lambda blocks: 64 * blocks))


# the reference in 16 bits shows on a CPU that what is drawn can be tested
@pytest.mark.parametrize(
    "kernels",
    [reference, pytest.param(triton_attention, marks=[pytest.mark.gpu, needs_hopper])],
    ids=["reference", "hopper"],
)
@pytest.mark.parametrize("tail", ["block", "none", "row"])  # its own, none, one to go on from
@settings(max_examples=10 if on_hopper() else 4, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        length_q=LENGTHS,
        length_kv=LENGTHS,
        block_q=st.just(64),
        block_kv=st.just(64),
        listed=st.sampled_from([0.1, 0.5, 0.9]),
        scale=st.sampled_from([None, -0.2]),
        seed=st.integers(0, 1000),
    ),
    dim=st.sampled_from(gluon_attention.HEAD_DIMS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "inside NaN", "tokens before heads"]),
)
def test_pairs_of_any_shape_are_as_accurate_as_eager(kernels, tail, case, dim, dtype, layout):
    """From lists and from a mask, into memory of NaN."""
    case = dataclasses.replace(case, dim=dim, dim_v=dim, tail=tail)
    args = laid_out(with_counts(case.inputs(dtype), case.seed), layout)
    assert gluon_attention.takes(*args[:3], args[0], 64, 64) == on_hopper()
    assert all(map(gluon_attention.is_addressable, args[:3]))
    assert gluon_attention.takes_tail(gluon_tail.Tail(*args[5:10]), args[10]) == (tail == "block")
    with nan_in_new_memory():
        results = [
            kernels.sparse_attention(*args),
            kernels.block_masked_attention(*with_mask(args)),
        ]
    for result in results:
        assert_as_accurate_as_eager(args, result, more=variance_roundings(args))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0.3, 2.0, 30.0])  # below, about and beyond what weights may lag
@pytest.mark.parametrize("dim", [64, 128])
def test_a_maximum_may_rise_from_block_to_block(dim, step, dtype):
    case = dataclasses.replace(CASE, dim=dim, dim_v=dim, length_kv=1555, listed=0.8, scale=0.125)
    args = case.inputs(dtype)
    args[0][..., 0] = 8.0
    blocks = torch.arange(args[1].shape[2], device=DEVICE) // 64
    args[1][..., 0] = (step * blocks).to(dtype)  # times 8 times 0.125: of each logit
    args[5][..., 0] = (step * torch.arange(args[5].shape[2], device=DEVICE)).to(dtype)
    assert_as_accurate_as_eager(args, more=variance_roundings(args))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("share", [5 * 10**3, 10**4, 10**6])  # fewer and fewer heads
@pytest.mark.parametrize("tail", ["none", "block"])
@pytest.mark.parametrize("dim", [64, 128])
def test_heads_in_parts_give_the_same_bits(dim, tail, share, monkeypatch):
    case = dataclasses.replace(CASE, dim=dim, dim_v=dim, batch=2, heads=5, tail=tail)
    args = with_mask(case.inputs(torch.bfloat16))
    expected = triton_attention.block_masked_attention(*args)
    monkeypatch.setattr(gluon_attention, "FILL", 1)
    monkeypatch.setattr(gluon_attention, "SHARE", share)
    for got, want in zip(triton_attention.block_masked_attention(*args), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("row", [2, 3, 4])  # first and second of a pair, and one without a second
@pytest.mark.parametrize("tail", ["none", "block"])
@pytest.mark.parametrize("dim", [64, 128])
def test_an_id_outside_makes_its_rows_nan_and_no_others(dim, tail, row):
    """The neighbour's blocks come in another order: its weights are rounded apart, and its output.

    Half a unit of each weight in both orders, of at most the largest value; a unit of the output.
    """
    case = dataclasses.replace(CASE, dim=dim, dim_v=dim, tail=tail, listed=0.6)
    args = case.inputs(torch.bfloat16)
    args[4][:, 1, row] = 3
    expected, expected_lse = triton_attention.sparse_attention(*args)
    args[3][:, 1, row, 2] = 2**31 - 1
    output, lse = triton_attention.sparse_attention(*args)
    rows = torch.zeros_like(lse, dtype=torch.bool)
    rows[:, 1, row * 64 : row * 64 + 64] = True
    assert output[rows].isnan().all() and lse[rows].isnan().all()
    others = output[~rows].double() - expected[~rows].double()
    largest = max(args[2].abs().max(), args[6].abs().max() if args[6].numel() else 0)
    assert others.abs().max() <= torch.finfo(output.dtype).eps * (largest + expected.abs().max())
    assert torch.allclose(lse[~rows], expected_lse[~rows], rtol=1e-6, atol=1e-6)
    pair = row // 2 * 128
    rows[:, 1, pair : pair + 128] = True
    assert torch.equal(output[~rows], expected[~rows])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_strides_and_memory_beyond_cannot_matter(dim):
    """Heads before tokens in memory, NaN after the last token, and in blocks nobody lists."""
    case = dataclasses.replace(CASE, dim=dim, dim_v=dim, batch=2, tail="none", listed=0.6)
    args = case.inputs(torch.bfloat16)
    args[3] = args[3].sort(-1).values
    args[4].clamp_(max=4)  # of nine: the first four
    args[3][:, 0, 1, 0] = 8  # the ragged one
    expected = triton_attention.sparse_attention(*args)
    for i, x in enumerate(args[:3]):
        wide = x.new_full((2, x.shape[2] + 64, 2, dim), torch.nan)
        args[i] = wide[:, : x.shape[2]].movedim(1, 2)
        args[i].copy_(x)
    for i in (1, 2):
        args[i][:, :, 4 * 64 : 8 * 64] = torch.nan
    assert gluon_attention.takes(*args[:3], args[0], 64, 64)
    output, lse = triton_attention.sparse_attention(*args)
    assert torch.equal(output, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.gpu
@needs_hopper
def test_offsets_beyond_32_bits():
    """The last head of a key tensor of more than 2^31 elements."""
    length = 1 << 17
    key = torch.empty(1, length, 132, 128, device=DEVICE, dtype=torch.bfloat16)
    key = key.permute(0, 2, 1, 3)[:, -2:]
    key[:, :, -256:] = torch.randn(1, 2, 256, 128, device=DEVICE)
    args = dataclasses.replace(CASE, length_kv=128, tail="none").inputs(torch.bfloat16)
    blocks = length // 64
    ids = torch.tensor([blocks - 1, blocks - 3], device=DEVICE, dtype=torch.int32)
    args[1] = args[2] = key
    args[3] = ids.expand(*args[4].shape, 2)
    args[4] = torch.full_like(args[4], 2)
    assert gluon_attention.takes(*args[:3], args[0], 64, 64)
    result = triton_attention.sparse_attention(*args)
    args[1] = args[2] = key[:, :, -256:]
    args[3] = args[3] - (blocks - 4)
    assert_as_accurate_as_eager(args, result)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_a_cuda_graph_replays_with_new_lists(dim):
    case = dataclasses.replace(CASE, dim=dim, dim_v=dim)
    args = case.inputs(torch.bfloat16)
    triton_attention.sparse_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = triton_attention.sparse_attention(*args)
    fresh = dataclasses.replace(case, seed=1).inputs(torch.bfloat16)
    for old, new in zip(args, fresh, strict=True):
        if torch.is_tensor(old):
            old.copy_(new)
    graph.replay()
    for got, want in zip(result, triton_attention.sparse_attention(*args), strict=True):
        assert torch.equal(got, want)
