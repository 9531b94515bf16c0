"""``uta::select_blocks`` and ``uta::list_blocks``: one rule everywhere, to the bit.

Triton's kernels run in its interpreter without a GPU, compiled with one.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uta_fx.kernels import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("normal", "equal", "ties", "relu", "infinite", "nan", "steep", "zeros")


def scores_of(kind, shape, seed=0, device="cpu"):
    """Float32 scores; equal ones, and numbers that order in a way of their own, in all but two."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return {
        "normal": lambda: x,
        "equal": lambda: torch.full_like(x, 0.3),
        "ties": lambda: (2 * x).round(),
        "relu": lambda: x.relu(),
        "infinite": lambda: x.masked_fill(x > 1, torch.inf).masked_fill(x < -1, -torch.inf),
        "nan": lambda: x.masked_fill(x > 0.5, torch.nan).masked_fill(x < 0, -torch.inf),
        "steep": lambda: (20 * x).exp(),
        "zeros": lambda: torch.where(x > 0, 0.0, -0.0) * (x.abs() > 0.01),
    }[kind]()


@st.composite
def selections(draw, most_rows, most_blocks):
    """Scores, the number to keep and the rows of a budget."""
    heads, rows = draw(st.integers(1, 3)), draw(st.integers(1, most_rows))
    blocks = draw(st.integers(1, most_blocks))
    shape = (draw(st.integers(1, 2)), heads, rows, blocks)
    scores = scores_of(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 1000)))
    group = draw(st.sampled_from([1, rows, heads * rows]))
    return scores.to(draw(st.sampled_from(DTYPES))), draw(st.integers(group, group * blocks)), group


def stated(scores, kept, rows):
    """The rule in plain Python: the best of each row, then by score, then by place."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    values = [-math.inf if math.isnan(x) else x for x in scores.flatten().tolist()]
    blocks = scores.shape[-1]
    for first in range(0, len(values), rows * blocks):
        group = range(first, first + rows * blocks)
        best = {
            max(range(row, row + blocks), key=lambda i: (values[i], -i)) for row in group[::blocks]
        }
        order = sorted(group, key=lambda i: (i not in best, -values[i], i))
        mask[order[:kept]] = True
    return mask.view(scores.shape)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(selections(6, 12))
def test_the_reference_is_the_rule(selection):
    assert torch.equal(reference.select_blocks(*selection), stated(*selection))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(selections(20, 40))
def test_a_cpu_selects_as_the_reference(selection):
    scores, kept, rows = selection
    mask = ops.select_blocks(scores, kept, rows)
    assert torch.equal(mask, reference.select_blocks(scores.double(), kept, rows))
    assert mask.view(-1, rows * scores.shape[-1]).sum(-1).eq(kept).all()
    assert mask.any(-1).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (1, 1, 1, 1), (1, 2, 0, 4)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lists_name_what_the_mask_marks(shape, share):
    """In ascending order, then zeros, with true counts; in the reference and on a CPU."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    for ids, counts in (reference.list_blocks(mask), ops.list_blocks(mask)):
        assert ids.dtype == counts.dtype == torch.int32
        assert counts.shape == shape[:3]
        for row, listed, count in zip(
            mask.flatten(0, 2), ids.flatten(0, 2), counts.flatten(), strict=True
        ):
            kept = row.nonzero()[:, 0].tolist()
            assert listed.tolist() == kept + [0] * (len(row) - len(kept)) and count == len(kept)


def test_scores_of_any_strides_are_taken():
    """Transposed, and expanded over the batch."""
    scores = scores_of("ties", (1, 3, 7, 5))
    expected = reference.select_blocks(scores.mT, 30, 15)
    assert torch.equal(ops.select_blocks(scores.mT, 30, 15), expected)
    wide = ops.select_blocks(scores.mT.expand(2, -1, -1, -1), 30, 15)
    assert torch.equal(wide, expected.expand(2, -1, -1, -1))


def test_operators_have_correct_registrations():
    """Schemas, fakes and dispatch, as ``torch.library.opcheck`` sees them."""
    scores = scores_of("ties", (2, 3, 4, 5))
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.uta.select_blocks.default, (scores.to(dtype), 20, 12))
    torch.library.opcheck(torch.ops.uta.list_blocks.default, (scores > 0,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(3, 4, 5)}, ValueError, r"scores must be \[B, H, Nq, Nk\], got 3"),
        (
            {"scores": torch.zeros(2, 3, 4, 5).half()},
            TypeError,
            "scores must be float32 or bfloat16, got torch.float16",
        ),
        ({"rows": 5}, ValueError, r"rows must divide the rows of a sample, 3 \* 4, got 5"),
        ({"rows": 24, "kept": 30}, ValueError, "rows must divide .* got 24"),
        ({"rows": 0}, ValueError, "rows must divide .* got 0"),
        ({"kept": 11}, ValueError, r"kept must lie in \[12, 60\], .* got 11"),
        ({"kept": 61}, ValueError, r"kept must lie in \[12, 60\], .* got 61"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"scores": torch.zeros(2, 3, 4, 5), "kept": 20, "rows": 12, **change}
    with pytest.raises(error, match=message):
        ops.select_blocks(**arguments)


def test_a_mask_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"exact must be torch.bool, got torch.float32"):
        ops.list_blocks(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"exact must be \[B, H, Nq, Nk\], got 2 dimensions"):
        ops.list_blocks(torch.zeros(2, 2).bool())


def test_selection_is_two_operators_of_a_graph():
    """What Inductor sees between scores and attention: nothing for it to compile."""
    from uta_fx.policies import spend_budget

    def select(scores):
        return ops.list_blocks(spend_budget(scores, 0.3, "site"))

    graph = torch.fx.experimental.proxy_tensor.make_fx(select)(torch.zeros(1, 2, 8, 8)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [name for name in called if "getitem" not in name] == [
        "uta.select_blocks.default",
        "uta.list_blocks.default",
    ]


def small_sizes(**changes):
    """Several programs to a group, and several tiles to a program, the last of each ragged."""
    triton_selection = pytest.importorskip("uta_fx.kernels.triton_selection", exc_type=ImportError)
    small = {"programs": 3, "rows": 2, "columns": 16, "scores": 64, "kept_scores": 32}
    return triton_selection.Sizes(**{**small, "row_columns": 16, **changes})


def assert_triton_selects(scores, kept, rows, sizes):
    from uta_fx.kernels import triton_selection

    scores = scores.to(DEVICE)
    mask = triton_selection.select_blocks(scores, kept, rows, sizes=sizes)
    assert torch.equal(mask, reference.select_blocks(scores, kept, rows))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(selections(5, 40))
def test_triton_selects_as_the_reference(selection):
    assert_triton_selects(*selection, small_sizes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_selects_whatever_the_scores(kind, dtype):
    """A budget of all rows of each of two samples."""
    assert_triton_selects(scores_of(kind, (2, 2, 3, 37)).to(dtype), 60, 6, small_sizes())


@pytest.mark.parametrize("passes", [(2, 4), (3, 6), (5, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_selects_however_many_digits(passes, dtype):
    """Of equal lengths and not."""
    scores = scores_of("normal", (1, 2, 3, 37)).to(dtype)
    assert_triton_selects(scores, 50, 6, small_sizes(passes=passes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_triton_selects_with_the_shipped_sizes(rows, dtype):
    from uta_fx.kernels.triton_selection import SIZES

    assert_triton_selects(scores_of("normal", (1, 2, 4, 50)).to(dtype), 13 * rows, rows, SIZES)


@pytest.mark.parametrize("kept", [6, 7, 221, 222])
def test_triton_keeps_from_one_a_row_to_all(kept):
    assert_triton_selects(scores_of("ties", (1, 2, 3, 37)), kept, 6, small_sizes())


@pytest.mark.parametrize("kept", range(3, 16, 2))
def test_triton_keeps_the_first_of_equal_scores(kept):
    """Wherever among the programs, and in the tiles of one, the budget ends."""
    scores = torch.zeros(1, 1, 3, 5)
    assert_triton_selects(scores, kept, 3, small_sizes(rows=1, columns=4, scores=4, kept_scores=4))


def test_triton_selects_among_columns_that_16_bits_do_not_count():
    """A key of bfloat16 and its column fit into 32 bits only up to 2^15 columns."""
    scores = torch.zeros(1, 1, 2, (1 << 15) + 3, dtype=torch.bfloat16)
    scores[..., 0, -1] = scores[..., 1, 1 << 15] = 1.0
    sizes = small_sizes(columns=1 << 14, scores=1 << 14, kept_scores=1 << 14)
    assert_triton_selects(scores, 9, 2, sizes)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_triton_lists_as_the_reference(share):
    sizes = small_sizes(list_columns=16)
    from uta_fx.kernels import triton_selection

    mask = torch.rand(2, 1, 5, 37, generator=torch.Generator().manual_seed(0)).to(DEVICE) < share
    results = triton_selection.list_blocks(mask, sizes=sizes)
    for got, want in zip(results, reference.list_blocks(mask), strict=True):
        assert torch.equal(got, want)


COMPILE = """
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from uta_fx.kernels import triton_selection as module
from uta_fx.kernels.triton_selection import SIZES

TYPES = {"best": "i32", "tied": "i32", "kept": "u8", "ids": "i32"}

def shared(kernel, num_warps, bits=32, counts="i64", **constants):
    types = {**TYPES, "bits": f"i{bits}", "counts": counts}
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name], aligned[i,] = "*" + types[name[:-4]], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps}
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared

for bits, passes in zip((16, 32), SIZES.passes):
    common = {"PASSES": passes, "BITS": bits, "DIGITS": 1 << -(-bits // passes),
              "ROWS": SIZES.rows}
    for packed in {bits == 16, False}:
        print(shared(module._first_pass_kernel, SIZES.num_warps, bits, COLUMNS=SIZES.columns,
                     PACKED=packed, **common))
    for number in range(1, passes):
        print(shared(module._next_pass_kernel, SIZES.num_warps, bits, NUMBER=number,
                     SCORES=SIZES.scores, **common))
    print(shared(module._keep_kernel, SIZES.num_warps, bits, SCORES=SIZES.kept_scores,
                 PROGRAMS=2048, **common))
    print(shared(module._keep_in_row_kernel, SIZES.row_warps, bits, COLUMNS=SIZES.row_columns))
print(shared(module._list_kernel, SIZES.num_warps, counts="i32", ROWS=SIZES.list_rows,
             COLUMNS=SIZES.list_columns))
"""


def test_selection_compiles_for_hopper_without_a_gpu():
    pytest.importorskip("triton", reason="needs Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) > 10 and max(sizes) <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", ["row", "head", "site"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_selects_as_the_reference(kind, budget, dtype):
    """Several turns to a program; the same bits twice."""
    heads, rows = 6, 300
    scores = scores_of(kind, (2, heads, rows, 431), device=DEVICE).to(dtype)
    group = {"row": 1, "head": rows, "site": heads * rows}[budget]
    for density in (0.02, 0.25, 0.9):
        kept = max(group, int(density * group * 431))
        mask = ops.select_blocks(scores, kept, group)
        assert torch.equal(mask, reference.select_blocks(scores, kept, group))
        assert torch.equal(mask, ops.select_blocks(scores, kept, group))
    for got, want in zip(ops.list_blocks(mask), reference.list_blocks(mask), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "blocks"), [(300, 320), (66, 64), (40, 16), (96, 768)], ids=str)
def test_a_gpu_selects_among_columns_loaded_several_at_a_time(rows, blocks, dtype):
    """16 divides their number; rows, and columns, fill their last tile or do not."""
    for kind in ("ties", "nan"):
        scores = scores_of(kind, (1, 2, rows, blocks), device=DEVICE).to(dtype)
        mask = ops.select_blocks(scores, rows * blocks // 5, rows)
        assert torch.equal(mask, reference.select_blocks(scores, rows * blocks // 5, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays_with_new_scores(dtype):
    """Few scores are equal at first, and nearly all when it is replayed."""
    scores = scores_of("normal", (1, 4, 200, 250), device=DEVICE).to(dtype)
    ops.list_blocks(ops.select_blocks(scores, 40000, 800))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.list_blocks(ops.select_blocks(scores, 40000, 800))
    for kind in ("steep", "equal", "relu"):
        scores.copy_(scores_of(kind, scores.shape, seed=1))
        graph.replay()
        want = reference.list_blocks(reference.select_blocks(scores, 40000, 800))
        for got, expected in zip(results, want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.gpu
def test_more_scores_than_32_bits_count():
    """All are zero but those of the last row; every row's best is its first."""
    rows, blocks = 1 << 16, 33000
    scores = torch.zeros(1, 1, rows, blocks, device=DEVICE)
    scores[:, :, -1] = 1.0
    mask = ops.select_blocks(scores, rows + blocks - 1 + 5, rows)[0, 0]
    counts = mask.sum(-1)
    assert counts[0] == 6 and counts[1:-1].eq(1).all() and counts[-1] == blocks
    assert mask[:, 0].all() and mask[0, :6].all()
    ids, listed = ops.list_blocks(mask[None, None])
    assert torch.equal(listed[0, 0], counts.int())
    assert ids[0, 0, -1].tolist() == list(range(blocks)) and ids[0, 0, 0, :6].tolist() == [
        *range(6)
    ]
