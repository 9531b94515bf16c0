"""Dynamic shapes: one graph for all resolutions, as sparse and as right as one for each."""

import pytest
import torch
import torch.nn.functional as F
from test_masks import Joint
from test_models import flat
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import uta_fx.attention
from uta_fx.backend import plan_of
from uta_fx.config import Config
from uta_fx.kernels import ops
from uta_fx.order import token_index
from uta_fx.passes.sparsify import understand
from uta_fx.study.models import MODELS

SIZES = (
    (3, 10, 18),
    (5, 14, 22),
    (7, 18, 26),
)  # no side like another, nor like a number of channels
OPTIONS = {"min_tokens": 48, "block_q": 16, "block_kv": 16}


def arguments_of(entry, size):
    """The arguments of a model for a video of this size."""
    (frames, height, width), arguments = size, dict(entry.arguments())
    generator = torch.Generator().manual_seed(frames)
    old = arguments["hidden_states"]
    if old.dim() == 3:
        shape = (old.shape[0], frames * height * width, old.shape[2])
        arguments.update(num_frames=frames, height=height, width=width)
    else:
        shape = (*old.shape[:2], frames, height, width)
    if "image_rotary_emb" in arguments:
        shape = (old.shape[0], frames, old.shape[2], height, width)
        arguments["image_rotary_emb"] = tuple(
            torch.randn(frames * height * width // 4, table.shape[1], generator=generator)
            for table in arguments["image_rotary_emb"]
        )
    arguments["hidden_states"] = torch.randn(shape, generator=generator)
    return arguments


def run(model, entry, sizes, **options):
    """Outputs for the sizes, and graphs compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="uta", **options)
    outputs = [flat(compiled(**arguments_of(entry, x), return_dict=False)) for x in sizes]
    return outputs, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "inner", "density"),
    [
        ("Wan", "eager", 1.0),
        ("Wan", "aot_eager", 0.3),
        ("HunyuanVideo", "eager", 0.3),
        ("LTX-Video", "eager", 0.3),
        ("CogVideoX 5B", "eager", 0.3),
    ],
)
def test_a_new_resolution_costs_no_compile(name, inner, density):
    """Density 1 is the dense model, 0.3 what a graph of this size alone gives.

    The allowance: as in ``test_models``, where sums come in another order.
    """
    entry = next(entry for entry in MODELS if entry.name == name)
    model = entry.build()
    options = {**OPTIONS, "density": density, "inner": inner}
    outputs, graphs = run(model, entry, SIZES, dynamic=True, options=options)
    assert graphs == 1
    dense = [flat(model(**arguments_of(entry, size), return_dict=False)) for size in SIZES]
    if density == 1:
        expected = dense
    else:  # of the last size: the graph was traced with the first
        options["inner"] = "eager"
        expected, _ = run(model, entry, SIZES[-1:], dynamic=False, options=options)
        assert not torch.equal(dense[-1][0], expected[0][0])
        outputs = outputs[-1:]
    for output, right in zip(outputs, expected, strict=True):
        for a, b in zip(output, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))


class Twice(Joint):
    """Two layers that are alike."""

    def forward(self, video, text):
        x = torch.cat([self.patch(video).flatten(2).transpose(1, 2), text], 1)
        for _ in range(2):
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def test_inductor_compiles_one_graph_for_two_resolutions():
    """Joint attention, of which nothing is known but symbols; density 1 is dense.

    Alike sites are one subgraph, and nothing in the graph keeps it out of PyTorch's cache.
    """
    model = Twice(None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {**OPTIONS, "density": 1.0}
    compiled = torch.compile(model, backend="uta", dynamic=True, fullgraph=True, options=options)
    for size in ((5, 6, 9), (7, 8, 10)):  # no side like another number of the model
        generator = torch.Generator().manual_seed(0)
        video = torch.randn(2, 3, *size, generator=generator)
        text = torch.randn(2, 13, 32, generator=generator)
        output, dense = compiled(video, text), model(video, text)
        torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["autograd_cache_bypass"] == 0


@torch.no_grad()
@pytest.mark.parametrize("options", [{"policy": "radial"}, {"tail": "bins"}])
def test_what_needs_numbers_has_a_graph_for_each_resolution(options):
    entry = next(entry for entry in MODELS if entry.name == "Wan")
    options = {**OPTIONS, **options, "inner": "eager"}
    _, graphs = run(entry.build(), entry, SIZES[:2], dynamic=True, options=options)
    assert graphs == 2


@torch.no_grad()
def test_min_tokens_is_a_guard():
    """A size on the other side of it is another graph, one on the same side is none."""
    entry = next(entry for entry in MODELS if entry.name == "Wan")
    options = {**OPTIONS, "min_tokens": 200, "inner": "eager"}
    sizes = (SIZES[0], SIZES[1], SIZES[2], (3, 12, 14))  # 135, 385, 819 and 126 tokens
    _, graphs = run(entry.build(), entry, sizes, dynamic=True, options=options)
    assert graphs == 2


def test_sites_have_readable_sides():
    found = []

    def backend(gm, inputs):
        found.extend(site for _, site in understand(gm, plan_of(Config(**OPTIONS), symbolic=True)))
        return gm.forward

    entry = next(entry for entry in MODELS if entry.name == "Wan")
    with torch.no_grad():
        torch.compile(entry.build(), backend=backend, dynamic=True)(**arguments_of(entry, SIZES[0]))
    (grid,) = {site.grid for site in found if site.sparse}
    frames, height, width = map(str, grid)
    assert frames.startswith("s") and height.endswith("//2)") and width.endswith("//2)")
    assert {site.reordered for site in found if site.sparse} == {"once"}


@pytest.fixture
def symbolic():
    """Makes fake tensors of which the lengths along some dimensions are symbols."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def make(*shape, dtype=torch.float32, dynamic=()):
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        kinds = [
            DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(len(shape))
        ]
        return mode.from_tensor(
            torch.zeros(shape, dtype=dtype),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
        )

    return mode, make


def test_operators_take_symbolic_lengths(symbolic):
    """Every shape rule, with a length that stays a symbol."""
    mode, make = symbolic
    x = make(1, 2, 163, 16, dynamic=(2,))
    length = x.shape[2]
    with mode:
        blocks = -(-length // 16)
        mean, variance, value_mean, _, covariance = ops.block_statistics(x, x, 16)
        size = x.new_zeros(1, 2, blocks)
        scores = ops.block_scores(x, mean, variance, size, 0.25, 0.0, 1.0, 16, 2)
        exact = ops.select_blocks(scores, 2 * blocks * 3, 2 * blocks)
        ids, counts = ops.list_blocks(exact)
        tail = (mean, value_mean, size, variance, covariance[:, :, None])
        numbers = (0.25, 0.5, 16, 16)
        outputs = [
            ops.block_masked_attention(x, x, x, exact, *tail, *numbers)[0],
            ops.sparse_attention(x, x, x, ids, counts, *tail, *numbers)[0],
            ops.rectified_attention(
                x, x, x, ids, counts, x[:, :, :5], x[:, :, :5], size[:, :, :1].expand(1, 2, 5),
                size, x.new_zeros(1, 2, blocks, 16), 0.25, 16, 16,
            ),
        ]  # fmt: skip
        counted = x.new_empty(1, 2, 0, dtype=torch.int32)
        fit = (exact, counted, mean, variance, value_mean, size, covariance, 0.25, 0.5, 8, 16, 16)
        assert [y.shape for y in ops.fit_tail(x, x, x, *fit)] == [(1, 2), (1, 2)]
        labels, centroids, _ = ops.kmeans(x, x.new_zeros(1, 2, 7, 16), 1)
        whole = x.new_zeros(1, 2, blocks * 16, 16)
        outputs.append(
            ops.clustered_attention(x, whole, whole, ids, counts, counts, *tail, *numbers)[0]
        )
        index = token_index(x, [length, 2, 3], "tile", 16, False)
    assert all(str(y.shape[2]) == str(length) for y in outputs)
    assert str(labels.shape[2]) == str(length) and centroids.shape == (1, 2, 7, 16)
    assert str(mean.shape[2]) == str(blocks) == str(scores.shape[3]) == str(counts.shape[2])
    assert str(index.shape[0]) == str(6 * length) and index.dtype == torch.int64
    assert not length.node.expr.is_number  # nothing specialised it


@torch.no_grad()
def test_a_grid_of_the_same_number_of_tokens_is_another():
    """The order of tokens is made for the grid of each call."""
    index = uta_fx.attention.TokenIndex(None, "tile", 16, 1, 0, False)
    x = torch.zeros(1, 48)
    a, b = (index(x, grid) for grid in ((2, 4, 6), (2, 6, 4)))
    assert not torch.equal(a, b)
    for found, grid in ((a, (2, 4, 6)), (b, (2, 6, 4))):
        fixed = uta_fx.attention.TokenIndex(grid, "tile", 16, 1, 0, False)
        assert torch.equal(found, fixed(x))


@torch.no_grad()
def test_sizes_that_dynamo_makes_symbols_are_numbers():
    """By default: each size has its graph, none shares the second's."""
    entry = next(entry for entry in MODELS if entry.name == "Wan")
    options = {**OPTIONS, "density": 0.3, "inner": "eager"}
    model = entry.build()
    outputs, graphs = run(model, entry, SIZES, options=options)
    assert graphs == len(SIZES)
    (expected,), _ = run(model, entry, SIZES[-1:], dynamic=False, options=options)
    assert torch.equal(outputs[-1][0], expected[0])
