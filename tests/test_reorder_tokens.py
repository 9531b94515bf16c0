"""Tokens in block order for a whole graph: each rule, and what is made of them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

from uta_fx import Config
from uta_fx.attention import SparseSite
from uta_fx.backend import plan_of, sparsify
from uta_fx.export.program import sparsify_program
from uta_fx.passes.order_rules import Place, discards, needs
from uta_fx.passes.reorder_tokens import GatherTokens
from uta_fx.passes.sparsify import rewrite, understand

TOKENS = 6
VIDEO = torch.tensor([3, 5, 0, 2, 4, 1])


def captured(function, *inputs):
    """Dynamo's graph of a function, and what it returns."""
    graphs = []

    def call(*args):
        return function(*args)

    def record(gm, _):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(call, backend=record, fullgraph=True, dynamic=False)(*inputs)
    return graphs[0], output


def program_of(function, *inputs):
    """An exported program of a function, and what it returns."""

    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    with torch.no_grad():
        return torch.export.export(Model(), inputs), function(*inputs)


def exported(function, *inputs):
    """The same from torch.export, in ATen's operators."""
    program, output = program_of(function, *inputs)
    return program.module(), output


def decomposed(function, *inputs):
    """The same in core ATen."""
    program, output = program_of(function, *inputs)
    return program.run_decompositions().module(), output


def input_names(gm):
    """In the order of the function's arguments; Dynamo has them in that of their use."""
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    return sorted(names)


def permuted(x, places):
    """A tensor with the tokens at some places in another order."""
    for dim, start, times, width in (Place(*place) for place in places):
        parts = x.unflatten(dim, (times, -1, width))
        index = torch.arange(parts.shape[dim + 1])
        index[start : start + TOKENS] = start + VIDEO
        x = parts.index_select(dim + 1, index).flatten(dim, dim + 2)
    return x


def required(graph, place):
    """Places of the inputs of a graph for a place of its output, by the rules; None for no way."""
    output = next(iter(reversed(graph.nodes))).args[0]
    stack, found = [(output[0] if isinstance(output, (tuple, list)) else output, place)], {}
    while stack:
        node, at = stack.pop()
        if node.op == "placeholder":
            found.setdefault(node.name, set()).add(at)
            continue
        below = needs(node, at, TOKENS)
        if below is None:
            return None
        stack.extend(below.items())
    return found


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def rotated_halves(q, cos):
    a, b = q.chunk(2, -1)
    return q * cos + torch.cat([-b, a], -1) * cos


@torch.library.custom_op("uta_fx_tests::silu", mutates_args=())
def flipped(a: torch.Tensor) -> torch.Tensor:
    """An operation of someone else's that has the name of one of PyTorch's."""
    return a.flip(1)


flipped.register_fake(torch.empty_like)


@torch.library.custom_op("uta_fx_tests::norm_into", mutates_args=("out",))
def norm_into(out: torch.Tensor, a: torch.Tensor) -> None:
    """As libraries of kernels have it: the result goes into what was allocated for it."""
    out.copy_(F.normalize(a, dim=-1) * (1 + torch.arange(a.shape[1])[:, None] / a.shape[1]))


norm_into.register_fake(lambda out, a: None)

MASK = torch.ones(1, 1, 1, 9).bool()

# a function, its inputs, and the places of its output that may come permuted
COMMUTE = {
    "add, broadcast": (lambda a, b: a + b, (x(2, 6, 4), x(6, 1)), {(1, 0)}),
    "add, one row": (lambda a, b: a * (1 + b), (x(2, 6, 4), x(2, 1, 4)), {(1, 0)}),
    "linear": (F.linear, (x(2, 6, 4), x(5, 4)), {(1, 0)}),
    "linear over tokens": (F.linear, (x(2, 4, 6), x(7, 6)), set()),
    "layer norm": (lambda a: F.layer_norm(a, (4,)), (x(2, 6, 4),), {(1, 0)}),
    "layer norm over tokens": (lambda a: F.layer_norm(a, (6, 4)), (x(2, 6, 4),), set()),
    "rms norm": (lambda a, w: F.rms_norm(a, (4,), w), (x(2, 6, 4), x(4)), {(1, 0)}),
    "group norm": (lambda a: F.group_norm(a, 2), (x(2, 4, 6),), {(2, 0)}),
    "softmax over tokens": (lambda a: a.softmax(1), (x(2, 6, 4),), {(1, 0)}),
    "cumsum over tokens": (lambda a: a.cumsum(1), (x(2, 6, 4),), set()),
    "cumsum over channels": (lambda a: a.cumsum(-1), (x(2, 6, 4),), {(1, 0)}),
    "heads": (lambda a: a.unflatten(2, (2, 2)).transpose(1, 2), (x(2, 6, 4),), {(2, 0)}),
    "heads joined": (lambda a: a.permute(0, 2, 1, 3).flatten(2), (x(2, 2, 6, 3),), {(1, 0)}),
    "rows and columns": (lambda a: a.unflatten(1, (2, 3)), (x(2, 6, 4),), set()),
    "tokens flattened": (lambda a: a.flatten(1, 2), (x(2, 2, 3, 4),), set()),
    "batch and tokens": (lambda a: a.flatten(0, 1), (x(1, 6, 4),), {(0, 0)}),
    "batches and tokens": (lambda a: a.flatten(0, 1), (x(2, 6, 4),), {(0, 0, 2)}),
    "tokens and channels": (lambda a: a.flatten(1), (x(2, 6, 4),), {(1, 0, 1, 4)}),
    "all in one": (lambda a: a.flatten(), (x(2, 6, 4),), {(0, 0, 2, 4)}),
    "batches apart": (lambda a: a.unflatten(0, (2, 9)), (x(18, 4),), {(1, n) for n in range(4)}),
    "batches, otherwise": (lambda a: a.flatten(0, 1), (x(3, 4, 4),), set()),
    "a product of batches": (
        lambda a, b, c: torch.addmm(a, F.silu(b), c), (x(12, 1), x(12, 4), x(4, 5)),
        {(0, n) for n in range(7)} | {(0, 0, 2)},
    ),
    "a sum along batches": (lambda a: a.flatten(0, 1).cumsum(0), (x(2, 6, 4),), set()),
    "a part of batches": (lambda a: a.flatten(0, 1)[6:18], (x(2, 12, 4),), set()),
    "movedim": (lambda a: a.movedim(1, -1), (x(2, 6, 4),), {(2, 0)}),
    "a new dimension": (lambda a: a[:, None, ..., None], (x(2, 6, 4),), {(2, 0)}),
    "expand": (lambda a: a.unsqueeze(0).expand(3, -1, -1), (x(6, 4),), {(1, 0)}),
    "constant along tokens": (lambda a: a.expand(2, 6, 4), (x(2, 1, 4),), {(1, 0)}),
    "repeat of tokens": (lambda a: a.repeat(1, 2, 1), (x(2, 6, 4),), set()),
    "text before": (lambda a, b: torch.cat([a, b], 1), (x(2, 3, 4), x(2, 6, 4)), {(1, 3)}),
    "text behind": (lambda a, b: torch.cat([b, a], 1), (x(2, 3, 4), x(2, 6, 4)), {(1, 0)}),
    "twice the same": (lambda a: torch.cat([a, a], 1), (x(2, 6, 4),), set()),
    "a part of a split": (lambda a: a.split([3, 6], 1)[1], (x(2, 9, 4),), {(1, 0)}),
    "a split through tokens": (lambda a: a.split([4, 5], 1)[0], (x(2, 9, 4),), set()),
    "a chunk": (lambda a: a.chunk(2, -1)[1], (x(2, 6, 4),), {(1, 0)}),
    "unbind": (lambda a: a.unbind(0)[1], (x(2, 6, 4),), {(0, 0)}),
    "stack": (lambda a, b: torch.stack([a, b], 1), (x(2, 6, 4), x(2, 6, 4) + 1), {(2, 0)}),
    "a slice": (lambda a: a[:, 2:, 1::2], (x(2, 9, 4),), {(1, 0), (1, 1)}),
    "every second token": (lambda a: a[:, ::2], (x(2, 12, 4),), set()),
    "one sample": (lambda a: a[1], (x(2, 6, 4),), {(0, 0)}),
    "flipped": (lambda a: a.flip(1), (x(2, 6, 4),), set()),
    "by the name of another": (flipped, (x(2, 6, 4),), set()),
    "pad behind": (lambda a: F.pad(a, (0, 0, 0, 2)), (x(2, 6, 4),), {(1, 0)}),
    "pad before": (lambda a: F.pad(a, (0, 0, 2, 0)), (x(2, 6, 4),), {(1, 2)}),
    "matmul": (torch.matmul, (x(2, 6, 4), x(2, 4, 5)), {(1, 0)}),
    "logits": (lambda q, k: q @ k.transpose(1, 2), (x(2, 6, 4), x(2, 6, 4) - 1), {(1, 0), (2, 0)}),
    "baddbmm": (torch.baddbmm, (x(2, 6, 1), x(2, 6, 4), x(2, 4, 5)), {(1, 0)}),
    "einsum": (
        lambda a, b: torch.einsum("bld,bmd->blm", a, b), (x(2, 6, 4), x(2, 5, 4)), {(1, 0)},
    ),
    "outer": (torch.outer, (x(6), x(4)), {(0, 0)}),
    "convolution": (lambda a, w: F.conv1d(a, w, padding=1), (x(2, 4, 6), x(4, 4, 3)), set()),
    "cross-attention": (
        F.scaled_dot_product_attention, (x(2, 2, 6, 4), x(2, 2, 5, 4), x(2, 2, 5, 4) + 1), {(2, 0)},
    ),
    "queries that are keys": (
        lambda a, b: F.scaled_dot_product_attention(a, a, b),
        (x(2, 2, 6, 4), x(2, 2, 6, 4) + 1), {(2, 0)},
    ),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (x(2, 2, 6, 4), x(2, 2, 6, 4) + 1, x(2, 2, 6, 4) + 2), set(),
    ),
    "mean over channels": (lambda a: a.mean(-1, keepdim=True), (x(2, 6, 4),), {(1, 0)}),
    "norm over channels": (lambda a: a.norm(2, -1), (x(2, 6, 4),), {(1, 0)}),
    "complex": (
        lambda a, b: torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b)),
        (x(2, 6, 4, 2), x(6, 1, 2)), {(1, 0)},
    ),
    "rotation of halves": (rotated_halves, (x(2, 6, 4), x(6, 4)), {(1, 0)}),
    "where": (lambda a, b: torch.where(a > 0, a, b), (x(2, 6, 4), x(6, 4)), {(1, 0)}),
    "one hot of an argmax": (lambda a: a.argmax(1), (x(2, 6, 6),), set()),
    "sorted": (lambda a: a.sort(1)[0], (x(2, 6, 4),), set()),
    "dropout in training": (lambda a: F.dropout(a, 0.5, True), (x(2, 6, 4),), set()),
    "as another": (lambda a, b: b.type_as(a), (x(2, 6, 4), x(2, 6, 4).double()), {(1, 0)}),
    "no tokens in it": (lambda a: torch.zeros_like(a) + 1, (x(2, 6, 4),), {(1, 0)}),
    "positions": (lambda a: torch.arange(6) + a, (x(1),), set()),
}  # fmt: skip


def written(begin, end, step=1, dim=1):
    """What it is to write into a part of a copy."""

    def write(a, b):
        out = a.clone()
        out.transpose(dim, 0)[begin:end:step] = b.transpose(dim, 0)
        return out

    return write


# of weights that are permuted, of one input in two orders, and of a cat and a view
OTHERWISE_IN_CORE_ATEN = {"linear over tokens", "queries that are keys", "stack"}
# what core ATen alone has as a value
COMMUTE_AS_VALUES = {
    "written behind text": (written(3, 9), (x(2, 9, 4), x(2, 6, 4)), {(1, 3)}),
    "written before tokens": (written(0, 3), (x(2, 9, 4), x(2, 3, 4)), {(1, 3)}),
    "written across tokens": (written(1, 5), (x(2, 9, 4), x(2, 4, 4)), set()),
    "every second one written": (written(0, 12, 2), (x(2, 12, 4), x(2, 6, 4)), set()),
    "every second channel written": (written(0, 4, 2, 2), (x(2, 6, 4), x(2, 6, 2)), {(1, 0)}),
    "one row written": (lambda a, b: torch.ops.aten.copy(a, b), (x(2, 6, 4), x(1, 4)), {(1, 0)}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trace"),
    [(name, trace) for name in COMMUTE for trace in (captured, exported)]
    + [(name, decomposed) for name in COMMUTE if name not in OTHERWISE_IN_CORE_ATEN]
    + [(name, decomposed) for name in COMMUTE_AS_VALUES],
)
def test_operations_commute_with_a_permutation_where_a_rule_says_so(name, trace):
    """And a rule says so at all places of six tokens at which one would expect it."""
    function, inputs, expected = (COMMUTE | COMMUTE_AS_VALUES)[name]
    gm, output = trace(function, *inputs)
    names = input_names(gm)
    assert len(names) == len(inputs)
    places = [
        Place(dim, start, times, width)
        for dim, size in enumerate(output.shape)
        for times, width in ((1, 1), (2, 1), (1, 4), (2, 4))
        if size % (times * width) == 0
        for start in range(size // (times * width) - TOKENS + 1)
    ]
    commuting = {place: required(gm.graph, place) for place in places}
    found = {place for place, needed in commuting.items() if needed is not None}
    # four channels and five rows are fewer than six tokens: nothing else has a place
    assert found == {Place(*place) for place in expected}
    for place in found:
        moved = [
            permuted(tensor, commuting[place].get(key, ()))
            for key, tensor in zip(names, inputs, strict=True)
        ]
        torch.testing.assert_close(function(*moved), permuted(output, [place]))


DISCARD = {
    "mean over tokens": (lambda a: a.mean(1), (x(2, 6, 4),), [{(1, 0)}]),
    "sum of all": (lambda a: a.sum(), (x(2, 6, 4),), [{(1, 0)}]),
    "keys and values": (
        F.scaled_dot_product_attention,
        (x(2, 2, 5, 4), x(2, 2, 9, 4), x(2, 2, 9, 4) + 1), [set(), {(2, 3)}, {(2, 3)}],
    ),
    "linear attention": (
        lambda k, v: torch.matmul(k, v), (x(2, 4, 6), x(2, 6, 4)), [{(2, 0)}, {(1, 0)}],
    ),
    "an einsum": (
        lambda k, v: torch.einsum("bld,ble->bde", k, v), (x(2, 6, 4), x(2, 6, 4) + 1),
        [{(1, 0)}, {(1, 0)}],
    ),
    "text before": (lambda a: a[:, :3], (x(2, 9, 4),), [{(1, 3)}]),
    "text behind": (lambda a: a.narrow(1, 6, 3), (x(2, 9, 4),), [{(1, 0)}]),
    "a shape": (lambda a: torch.zeros_like(a), (x(2, 6, 4),), [{(1, 0)}]),
    "what is written over": (
        lambda a, b: torch.ops.aten.copy(a, b), (x(2, 6, 4), x(2, 6, 4) + 1), [{(1, 0)}, set()],
    ),
}  # fmt: skip
KEEP = {
    "keys without values": (
        F.scaled_dot_product_attention,
        (x(2, 2, 5, 4), x(2, 2, 9, 4), x(2, 2, 9, 4) + 1), [set(), {(2, 3)}, set()],
    ),
    "masked keys": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        (x(2, 2, 5, 4), x(2, 2, 9, 4), x(2, 2, 9, 4), MASK), [set(), {(2, 3)}, {(2, 3)}, set()],
    ),
    "another start": (
        lambda k, v: torch.matmul(k, v), (x(2, 4, 9), x(2, 9, 4)), [{(2, 0)}, {(1, 3)}],
    ),
    "mean over channels": (lambda a: a.mean(2), (x(2, 6, 4),), [{(1, 0)}]),
    "video in a slice": (lambda a: a[:, :4], (x(2, 9, 4),), [{(1, 3)}]),
    "argmax": (lambda a: a.argmax(1), (x(2, 6, 4),), [{(1, 0)}]),
    "memory that is written over": (
        lambda a, b: a.copy_(b), (x(2, 6, 4), x(2, 6, 4) + 1), [{(1, 0)}, set()],
    ),
    "mean over parts": (lambda a: a.mean(0), (x(12, 4),), [{(0, 0, 2)}]),
    "a part with no token of its own": (lambda a: a[6:], (x(12, 4),), [{(0, 0, 2)}]),
    "keys that are queries": (
        lambda a, b: F.scaled_dot_product_attention(a, a, b),
        (x(2, 2, 6, 4), x(2, 2, 6, 4) + 1), [{(2, 0)}, {(2, 0)}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("trace", [captured, exported])
@pytest.mark.parametrize("name", [*DISCARD, *KEEP])
def test_the_order_of_an_operand_is_discarded_where_it_does_not_matter(name, trace):
    """Sums over tokens and slices without any; not where one of two factors alone is permuted."""
    function, inputs, places = (DISCARD | KEEP)[name]
    gm, output = trace(function, *inputs)
    names = input_names(gm)
    held = {key: {Place(*place) for place in at} for key, at in zip(names, places, strict=True)}
    last = next(iter(reversed(gm.graph.nodes))).args[0]
    last = last[0] if isinstance(last, (tuple, list)) else last
    answers = {
        discards(last, node, place, TOKENS, lambda other: held.get(other.name, set()))
        for node in gm.graph.nodes
        for place in held.get(node.name, ())
    }
    assert answers == {name in DISCARD}
    if name in DISCARD:
        moved = [permuted(tensor, at) for tensor, at in zip(inputs, places, strict=True)]
        torch.testing.assert_close(function(*moved), output)


# ---- whole graphs --------------------------------------------------------------------------------

GRID = (2, 8, 8)
LENGTH = 2 * 8 * 8
SMALL = Config(min_tokens=64, block_q=16, block_kv=16, density=0.3)


def rotate(q, cos, sin):
    """As Wan does it: into an empty tensor, in place."""
    a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(q)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(q)


class Layer(nn.Module):
    """Attention with a rotation, and a projection; in between something else, where given."""

    def __init__(self, between=None, attend=F.scaled_dot_product_attention):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.between, self.attend = between, attend

    def forward(self, h, cos, sin):
        q, k, v = (
            part.unflatten(2, (2, 16)).transpose(1, 2)
            for part in self.qkv(F.layer_norm(h, (32,))).chunk(3, -1)
        )
        attended = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h if self.between is None else self.between(h)


class Video(nn.Module):
    """Patches, layers, and back to frames; rotary tables are inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.patch, self.layers = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), nn.ModuleList(layers)
        self.last = nn.Linear(32, 12)

    def forward(self, video, cos, sin):
        h = self.patch(video).flatten(2).transpose(1, 2)
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.last(h).unflatten(1, GRID).permute(0, 4, 1, 2, 3)


def written_out(q, k, v):
    return (q @ k.transpose(-1, -2) * 16**-0.5).softmax(-1) @ v


def weighed_by_place(q, k, v):
    """Queries and keys each by positions of their own making."""
    q, k = (x * torch.arange(LENGTH, dtype=x.dtype).cos()[:, None] for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


class Frames(nn.Module):
    """A convolution over each frame."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, h):
        frames = h.transpose(1, 2).unflatten(2, GRID).transpose(1, 2).flatten(0, 1)
        mixed = self.conv(frames).unflatten(0, (-1, 2)).transpose(1, 2)
        return h + mixed.flatten(2).transpose(1, 2)


def build(*layers):
    """A model with seeded weights and its inputs."""
    torch.manual_seed(0)
    model = Video(*(layer() for layer in layers)).eval()
    return model, (torch.randn(2, 3, 2, 16, 16), torch.randn(LENGTH, 8), torch.randn(LENGTH, 8))


def variants(model, inputs, config=SMALL, **options):
    """Dense, density 1, and sparse reordered around each site and once: outputs, sites, graph."""
    graphs, found = [], []

    def record(gm, example):
        graphs.append(gm)
        graphs.append(copy.deepcopy(gm))
        sparsify(graphs[-1], example, dataclasses.replace(config, density=1.0))
        graphs.append(copy.deepcopy(gm))
        plan = dataclasses.replace(plan_of(config), token_index=None)
        rewrite(graphs[-1], understand(graphs[-1], plan), plan)
        graphs.append(copy.deepcopy(gm))
        found.extend(sparsify(graphs[-1], example, config))
        return lambda *args: graphs[chosen](*args)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=record, fullgraph=True, **options)
        outputs = []
        for chosen in range(4):  # noqa: B007 (read by the compiled graph)
            outputs.append(compiled(*inputs))
    return outputs, [site for site in found if site.sparse], graphs[-1].graph


def check(outputs):
    """Density 1 is dense, and order changes nothing: to some ten roundings in a row."""
    dense, exact, local, once = outputs
    atol = 2e-6 * float(dense.abs().max())
    torch.testing.assert_close(exact, dense, rtol=0, atol=atol)
    torch.testing.assert_close(once, local, rtol=0, atol=atol)
    assert float((once - dense).abs().max()) > atol


def gathers(graph):
    """How many there are, and how many between the first and the last sparse site."""
    nodes = list(graph.nodes)
    sites = [i for i, node in enumerate(nodes) if isinstance(node.target, SparseSite)]
    places = [i for i, node in enumerate(nodes) if isinstance(node.target, GatherTokens)]
    return len(places), sum(sites[0] < i < sites[-1] for i in places)


@pytest.mark.parametrize("reorder", ["tile", "morton"])
def test_tokens_are_reordered_once_with_the_rotary_tables(reorder):
    """Patches and both tables on the way in, one gather on the way out, none in three layers."""
    model, inputs = build(Layer, Layer, Layer)
    outputs, sites, graph = variants(model, inputs, dataclasses.replace(SMALL, reorder=reorder))
    check(outputs)
    assert [site.reordered for site in sites] == ["once"] * 3
    assert gathers(graph) == (4, 0)
    targets = [node.target for node in graph.nodes if isinstance(node.target, SparseSite)]
    assert [target.in_order for target in targets] == [True] * 3


def test_positions_that_are_made_apart_are_the_same():
    """It is self-attention, though queries and keys have a table each."""
    model, inputs = build(lambda: Layer(attend=weighed_by_place), lambda: Layer())
    outputs, sites, graph = variants(model, inputs)
    check(outputs)
    assert [(site.kind, site.reordered) for site in sites] == [("self", "once")] * 2
    assert gathers(graph)[1] == 0


def test_tokens_in_their_own_order_need_no_gather():
    """And the sites say nothing about it."""
    model, inputs = build(Layer, Layer)
    outputs, sites, graph = variants(model, inputs, dataclasses.replace(SMALL, reorder="none"))
    check(outputs)
    assert [site.reordered for site in sites] == [None] * 2
    assert gathers(graph) == (0, 0)


def test_a_convolution_between_layers_is_given_frames_and_is_named():
    """Tokens come back for it alone, which is still fewer gathers than around each site."""
    model, inputs = build(lambda: Layer(Frames()), Layer)
    outputs, sites, graph = variants(model, inputs)
    check(outputs)
    assert {site.reordered for site in sites} == {
        "in parts: unflatten in layers.0.between needs the model's order"
    }
    assert gathers(graph) == (6, 2)


class Written(nn.Module):
    """What another library's kernel writes into memory that was made for it."""

    def forward(self, h):
        out = torch.empty_like(h)
        torch.ops.uta_fx_tests.norm_into(out, h)
        return h + out


class Counted(nn.Module):
    """Tokens of all batches one after another, and what no rule knows."""

    def forward(self, h):
        return h + h.flatten(0, 1).cumsum(0).unflatten(0, (2, -1)) / h.shape[1]


def test_tokens_merged_with_batches_are_brought_into_the_model_s_order_before():
    """Where an operation needs it: one index gathers no such dimension."""
    model, inputs = build(Layer, lambda: Layer(Counted()), Layer)
    outputs, sites, _ = variants(model, inputs)
    check(outputs)
    assert {site.reordered for site in sites} == {
        "in parts: flatten in layers.1.between needs the model's order"
    }


@torch.no_grad()
def test_core_aten_of_several_samples_is_reordered_once():
    """Where linear layers merge batches with tokens, and rotations are values."""
    model, inputs = build(Layer, Layer, Layer)
    program = torch.export.export(model, inputs).run_decompositions()
    plan = plan_of(dataclasses.replace(SMALL, reorder="tile", density=1.0))
    sparse, sites = sparsify_program(program, plan)
    assert [(site.kind, site.reordered) for site in sites] == [("self", "once")] * 3
    targets = [node.target for node in sparse.graph.nodes]
    assert targets.count(torch.ops.aten.index_select.default) == 4
    dense = model(*inputs)
    atol = 2e-6 * float(dense.abs().max())
    torch.testing.assert_close(sparse.module()(*inputs), dense, rtol=0, atol=atol)


@torch.no_grad()
def test_core_aten_of_a_dynamic_batch_is_sparse():
    """Each site reorders its own: how many samples are merged with the tokens is no number."""
    model, inputs = build(Layer, Layer)
    shapes = ({0: torch.export.Dim("batch", min=2, max=8)}, None, None)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes).run_decompositions()
    plan = plan_of(dataclasses.replace(SMALL, reorder="tile", density=1.0))
    sparse, sites = sparsify_program(program, plan, shapes)
    reason = "here: view in layers.0.qkv needs the model's order"
    assert [(x.kind, x.sparse, x.reordered) for x in sites] == [("self", True, reason)] * 2
    inputs = (torch.cat([inputs[0], inputs[0][:1] * 2]), *inputs[1:])
    dense = model(*inputs)
    atol = 2e-6 * float(dense.abs().max())
    torch.testing.assert_close(sparse.module()(*inputs), dense, rtol=0, atol=atol)


def test_a_tensor_that_a_kernel_writes_into_keeps_the_model_s_order():
    """Its entries depend on where they are, which no rule knows."""
    model, inputs = build(lambda: Layer(Written()), Layer)
    outputs, sites, _ = variants(model, inputs)
    check(outputs)
    assert {site.reordered for site in sites} == {
        "in parts: uta_fx_tests::norm_into in layers.0.between needs the model's order"
    }


def test_a_kernel_of_triton_may_write_into_all_that_it_takes():
    """Which it does is in its code: it takes nothing that was gathered.

    Dynamo traces kernels where there is a GPU: what it makes of them is put into a graph by hand.
    """
    model, inputs = build(lambda: Layer(Written()), Layer)
    gm, _ = captured(model, *inputs)
    (node,) = (x for x in gm.graph.nodes if "norm_into" in str(x.target))
    node.target, (out, h) = triton_kernel_wrapper_mutation, node.args
    node.args, node.kwargs = (), {"kernel_idx": 0, "grid": [(1,)], "kwargs": {"x": h, "out": out}}
    sites = sparsify(gm, inputs, SMALL)
    assert not any(isinstance(x.target, GatherTokens) for x in node.all_input_nodes)
    assert [site.reordered.partition(":")[0] for site in sites] == ["in parts"] * 2


def test_where_more_runs_along_the_tokens_than_it_saves_each_site_reorders_its_own():
    """One layer whose gate is as wide as eight times its tokens."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Video(Layer())

        def forward(self, video, cos, sin, gate):
            h = self.inner.patch(video).flatten(2).transpose(1, 2)
            h = self.inner.layers[0](h * gate.mean(-1), cos, sin)
            return self.inner.last(h).unflatten(1, GRID)

    _, inputs = build(Layer)
    outputs, sites, graph = variants(Gated().eval(), (*inputs, torch.randn(2, LENGTH, 32, 8)))
    check(outputs)
    assert [site.reordered for site in sites] == [
        "here: there is more that runs along the tokens than queries, keys and values"
    ]
    assert gathers(graph) == (0, 0)


def test_queries_out_of_an_operation_that_is_not_understood_are_reordered_around_the_site():
    """A cumulative sum over tokens: the site says what needs the model's order."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q.cumsum(2), k, v)

    model, inputs = build(lambda: Layer(attend=attend), *[Layer] * 4)
    outputs, sites, graph = variants(model, inputs)
    check(outputs)
    reason = "cumsum in layers.0 needs the model's order"
    assert [site.reordered for site in sites] == [f"here: {reason}"] + [f"in parts: {reason}"] * 4
    # patches, tables, out; queries, keys, values and output of the first site
    assert gathers(graph) == (8, 1)


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, written_out])
def test_a_dense_layer_keeps_the_order_of_the_sparse_ones(attend):
    """Softmax attention commutes with a permutation, however it is written."""
    model, inputs = build(Layer, lambda: Layer(attend=attend), Layer)
    outputs, sites, graph = variants(model, inputs, dataclasses.replace(SMALL, dense_layers="1"))
    check(outputs)
    assert [site.reordered for site in sites] == ["once"] * 2
    assert gathers(graph) == (4, 0)


def test_written_out_attention_is_reordered_once():
    """What its softmax and first product were is left behind unused."""
    model, inputs = build(*[lambda: Layer(attend=written_out)] * 2)
    outputs, sites, graph = variants(model, inputs)
    check(outputs)
    assert [site.reordered for site in sites] == ["once"] * 2
    assert gathers(graph) == (4, 0)


def test_memory_of_the_model_that_is_written_to_keeps_its_order():
    """Values are kept in a buffer that outlives the graph: nothing permuted may be left in it."""

    class Kept(Layer):
        def __init__(self):
            super().__init__(attend=self.keep)
            self.register_buffer("kept", torch.zeros(2, 2, LENGTH, 16))

        def keep(self, q, k, v):
            self.kept.copy_(v)
            return F.scaled_dot_product_attention(q, k, self.kept)

    model, inputs = build(Kept, Layer)
    outputs, sites, _ = variants(model, inputs)
    check(outputs)
    assert sites[0].reordered.startswith("here: ")
    with torch.no_grad():
        kept = model.layers[0].kept.clone()
        model(*inputs)
    torch.testing.assert_close(model.layers[0].kept, kept)


def test_a_dynamic_batch_is_reordered_once():
    """Its size is a symbol in every shape."""
    model, inputs = build(Layer, Layer)
    for tensor in inputs[:1]:
        torch._dynamo.mark_dynamic(tensor, 0)
    outputs, sites, graph = variants(model, inputs)
    check(outputs)
    assert isinstance(sites[0].shape[0], str)
    assert gathers(graph) == (4, 0)


def test_two_videos_of_different_grids_are_each_reordered_once():
    """Streams that meet nowhere: a region each."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Video(Layer(), Layer()), Video(Layer())

        def forward(self, video, cos, sin, other):
            h = self.second.patch(other).flatten(2).transpose(1, 2)
            h = self.second.layers[0](h, cos, sin)
            return torch.cat([self.first(video, cos, sin).flatten(1), h.flatten(1)], 1)

    _, inputs = build(Layer)
    outputs, sites, graph = variants(Two().eval(), (*inputs, torch.randn(2, 3, 4, 16, 8)))
    check(outputs)
    assert [site.grid for site in sites] == [(4, 8, 4), GRID, GRID]
    assert gathers(graph)[0] == sum(node.target.__class__ is GatherTokens for node in graph.nodes)
    assert {site.reordered for site in sites} <= {"once"}
