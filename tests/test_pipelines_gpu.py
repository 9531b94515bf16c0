"""uta_fx.enable and torch.compile on a GPU: offloading by streams, CUDA graphs, backends."""

import dataclasses

import generation
import pytest
import torch
import triton
import triton.language as tl
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch._dynamo.utils import counters

import uta_fx
from uta_fx import Config
from uta_fx.study.pipelines import tiny_pipeline

pytestmark = pytest.mark.gpu

SETTINGS = {"density": 0.3, "min_tokens": 130, "block_q": 16, "block_kv": 16, "inner": "eager"}
SPARSE = Config(**SETTINGS)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def generate(pipe, name="wan", **options):
    """Latents after the last step."""
    return generation.generate(pipe, name, **options)[-1]


def assert_as_near(got, expected, dense):
    """Equal but for rounding and blocks that tie: up to a tenth of what sparsity changes."""
    assert torch.isfinite(got).all()
    away = (expected - dense).norm()
    assert away > 0 and (got - expected).norm() < 0.1 * away


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_group_offload_works_by_blocks(use_stream, before):
    """Weights that a stream of its own brings are there when the compiled block needs them."""
    pipe = tiny_pipeline("wan").to("cuda")
    dense = generate(pipe)
    config = dataclasses.replace(SPARSE, grid=generation.GRID)
    uta_fx.enable(pipe, config, blocks=True, fullgraph=True)
    expected = generate(pipe)
    uta_fx.disable(pipe)
    pipe.transformer.to("cpu")

    def offload():
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
            offload_type="block_level", num_blocks_per_group=1, use_stream=use_stream,
        )  # fmt: skip

    if before:
        offload()
    uta_fx.enable(pipe, config, blocks=True, fullgraph=True)
    if not before:
        offload()
    assert torch.equal(generate(pipe), expected)
    assert not torch.equal(expected, dense) and not counters["graph_break"]


@pytest.mark.parametrize("blocks", [False, True])
def test_cuda_graphs_give_the_same(blocks):
    """``mode="reduce-overhead"`` of a schedule with both variants, and nothing keeps it away."""
    pipe = tiny_pipeline("wan").to("cuda")
    dense = generate(pipe)
    config = dataclasses.replace(
        SPARSE, inner="inductor", dense_until=0.5, grid=generation.GRID if blocks else None
    )
    outputs = []
    for options in ({}, {"mode": "reduce-overhead"}):
        counters.clear()
        uta_fx.enable(pipe, config, blocks=blocks, fullgraph=True, **options)
        generate(pipe)
        outputs.append(generate(pipe))
        uta_fx.disable(pipe)
        torch.compiler.reset()
    assert not counters["inductor"]["cudagraph_skips"]
    assert_as_near(outputs[1], outputs[0], dense)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_two_resolutions_are_those_of_a_cpu(name, monkeypatch):
    """Each is sparse, in float32, and coming back to the first costs nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    outputs = {}
    for device in ("cpu", "cuda"):
        counters.clear()
        pipe = tiny_pipeline(name).to(device)
        dense = [generate(pipe, name, steps=1, height=height) for height in (96, 192)]
        uta_fx.enable(pipe, SPARSE, fullgraph=True)
        sparse = [generate(pipe, name, steps=1, height=height) for height in (96, 192)]
        graphs = counters["stats"]["unique_graphs"]
        assert torch.equal(generate(pipe, name, steps=1), sparse[0])
        assert counters["stats"]["unique_graphs"] == graphs
        outputs[device] = [x.cpu() for x in sparse], [x.cpu() for x in dense]
    for got, expected, without in zip(outputs["cuda"][0], *outputs["cpu"], strict=True):
        assert_as_near(got, expected, without)


@pytest.mark.parametrize("backend", ["native", "_native_cudnn", "_native_flash"])
def test_attention_backends_of_diffusers_are_found(backend, monkeypatch):
    """Each names a kernel of PyTorch's for all attention, which rounds in its own way.

    At density 1 the video's attention becomes ours, and errs as the dense model in 16 bits does.
    """
    # the last one that was named serves every model of a process
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    pipe = tiny_pipeline("wan").to("cuda")
    exact = generate(pipe, steps=2)
    pipe.to(torch.float16)
    pipe.transformer.set_attention_backend(backend)
    error = (generate(pipe, steps=2) - exact).norm()
    outputs = []
    for density in (1.0, 0.3):
        config = dataclasses.replace(SPARSE, density=density, strict=True)
        uta_fx.enable(pipe, config, fullgraph=True)
        outputs.append(generate(pipe, steps=2))
        uta_fx.disable(pipe)
    assert (outputs[0] - exact).norm() < 2 * error < (outputs[1] - exact).norm()


@triton.jit
def _double(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


class WithKernel(nn.Module):
    """Attention over video whose queries a user's Triton kernel writes."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(4, 64, 2, 2)
        self.to_qkv = nn.Linear(64, 192)

    def forward(self, video):
        x = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (2, 32)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, 2))
        q = q.contiguous()
        doubled = torch.zeros_like(q)
        _double[(triton.cdiv(q.numel(), 1024),)](q, doubled, q.numel(), BLOCK=1024)
        return nn.functional.scaled_dot_product_attention(doubled, k, v)


@pytest.mark.parametrize("density", [1.0, 0.3])
@torch.no_grad()
def test_a_kernel_of_the_models_own_is_not_lost(density):
    """At density 1 the model is the dense one; at 0.3 its site is near it or stays dense."""
    torch.manual_seed(0)
    model, video = WithKernel().cuda(), torch.randn(1, 4, 8, 24, 24, device="cuda")
    dense = model(video)
    options = SETTINGS | {"density": density}
    compiled = torch.compile(model, backend="uta", fullgraph=True, options=options)
    got = compiled(video)
    # float32 sums of 576 products in another order
    bound = 576 * torch.finfo(torch.float32).eps if density == 1 else 0.5
    assert (got - dense).norm() < bound * dense.norm()
