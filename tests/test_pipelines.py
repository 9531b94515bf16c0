"""uta_fx.enable over the real pipelines of diffusers, small and with random weights."""

import dataclasses
import functools
import itertools
import sys

import accelerate
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import MagCacheConfig, SeaCacheConfig
from generation import GRID, generate
from torch import nn
from torch._dynamo.utils import counters

import uta_fx
from uta_fx import Config
from uta_fx.study.pipelines import PIPELINES, tiny_pipeline

SETTINGS = {"min_tokens": 130, "block_q": 16, "block_kv": 16, "inner": "eager"}
SPARSE = Config(density=0.3, **SETTINGS)
HALF = Config(density=0.3, dense_until=0.5, **SETTINGS)
CALLS = {"wan": (2, 1), "hunyuan_video": (2, 1), "cogvideox": (1, 2), "ltx": (1, 2)}
"""Calls of the transformer a step, and their batch: how each pipeline guides."""


def graphs():
    """How many graphs were compiled since ``counters.clear()``."""
    return counters["stats"]["unique_graphs"]


def rms(x):
    """Root mean square."""
    return float(x.square().mean().sqrt())


@pytest.fixture
def wan():
    """The pipeline that most of what follows is about."""
    counters.clear()
    return tiny_pipeline("wan")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_whole_generation_compiles_each_variant_once(name):
    """50 steps, the first ten dense, two prompts: two graphs, no break, however it is guided.

    The dense steps are those of the pipeline without us, to the bit.
    """
    counters.clear()
    pipe, calls = tiny_pipeline(name), []
    dense = generate(pipe, name, steps=50, until=11)
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    config = Config(density=0.3, dense_until=0.2, strict=name != "hunyuan_video", **SETTINGS)
    uta_fx.enable(pipe, config, fullgraph=True)
    sparse = generate(pipe, name, steps=50)
    same = [torch.equal(a, b) for a, b in zip(dense, sparse[:11], strict=True)]
    assert same == [True] * 10 + [False]
    generate(pipe, name, prompt="two blue whales in a calm sea", steps=10)
    assert graphs() == 2 and not counters["graph_break"]
    per_step, batch = CALLS[name]
    assert calls == [batch] * per_step * (50 + 10)
    uta_fx.disable(pipe)
    generate(pipe, name, steps=2)
    assert graphs() == 2 and "forward" not in vars(pipe.transformer)


def test_inductor_compiles_a_generation_once(wan):
    """The same with the compiler that people use: slow, so one block and no dense variant.

    ``test_layers.py`` has both variants.
    """
    wan.transformer.blocks = wan.transformer.blocks[:1]
    config = Config(density=0.3, min_tokens=130)
    dense = generate(wan, "wan", steps=2)[-1]
    uta_fx.enable(wan, config, fullgraph=True)
    sparse = generate(wan, "wan", steps=2)[-1]
    generate(wan, "wan", prompt="a blue whale", steps=2)
    assert graphs() == 1 and not counters["graph_break"]
    assert 0 < rms(sparse - dense) < rms(dense)


def lora(model, seed):
    """Weights of rank 4 for every projection to queries and values, as a LoRA's file has them."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.endswith((".to_q", ".to_v")):
            sizes = {"A": (4, part.in_features), "B": (part.out_features, 4)}
            for letter, size in sizes.items():
                value = 0.3 * torch.randn(size, generator=generator)
                weights[f"transformer.{name}.lora_{letter}.weight"] = value
    return weights


def test_a_lora_costs_what_it_costs_without_us(wan):
    """Swapped: nothing. Scaled and unloaded: what plain torch.compile recompiles, a variant each.

    peft keeps the scale as a number of the layer, and leaves the weights frozen when it unloads:
    Dynamo guards on both.
    """

    def counted(pipe):
        first, second = lora(pipe.transformer, 1), lora(pipe.transformer, 2)
        pipe.load_lora_weights(first, adapter_name="style")
        counts, outputs = [], []
        changes = (
            lambda: None,
            lambda: pipe.load_lora_weights(second, adapter_name="style", hotswap=True),
            lambda: pipe.set_adapters("style", 0.5),
            lambda: pipe.set_adapters("style", 0.25),
            pipe.unload_lora_weights,
        )
        for change in changes:
            change()
            outputs.append(generate(pipe, "wan", steps=2)[-1])
            counts.append(graphs())
        assert not counters["graph_break"]
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
        return counts

    plain = tiny_pipeline("wan")
    for pipe in (wan, plain):
        pipe.transformer.blocks = pipe.transformer.blocks[:1]
        pipe.enable_lora_hotswap(target_rank=4)
    uta_fx.enable(wan, HALF, fullgraph=True)
    ours = counted(wan)
    counters.clear()
    forward = torch.compile(plain.transformer.forward, backend="eager", fullgraph=True)
    plain.transformer.forward = forward
    assert ours == [2 * count for count in counted(plain)]
    assert ours[0] == ours[1] == 2


def test_a_lora_swap_and_a_prompt_cost_nothing(wan):
    """50 steps, the first ten dense, then other weights and words and again dense and sparse.

    Both variants are compiled by the first call; from the second on a recompilation is an error.
    """
    wan.transformer.blocks = wan.transformer.blocks[:1]
    wan.enable_lora_hotswap(target_rank=4)
    wan.load_lora_weights(lora(wan.transformer, 1), adapter_name="style")
    config = dataclasses.replace(SPARSE, dense_until=0.2)
    uta_fx.enable(wan, config, warmup=True, fullgraph=True)
    generate(wan, "wan", steps=50, until=1)
    assert graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        generate(wan, "wan", steps=50)
        wan.load_lora_weights(lora(wan.transformer, 2), adapter_name="style", hotswap=True)
        generate(wan, "wan", prompt="two blue whales in a calm sea", steps=50, until=15)
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.parametrize("name", PIPELINES)
def test_autocast_is_honoured(name):
    """Our part errs no more against float32 than dense attention does under autocast.

    HunyuanVideo's queries are float32 then, its values bfloat16.
    """
    pipe = tiny_pipeline(name)
    recorded = {}
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: recorded.update(kwargs), with_kwargs=True
    )
    generate(pipe, name, steps=1)
    handle.remove()
    call = functools.partial(pipe.transformer, **recorded)
    with torch.no_grad():
        exact = call()[0]
        with torch.autocast("cpu", torch.bfloat16):
            dense = call()[0]
            outputs = []
            for density in (1.0, 0.3):
                uta_fx.enable(pipe, Config(density=density, **SETTINGS), fullgraph=True)
                outputs.append(call()[0])
                uta_fx.disable(pipe)
    assert outputs[0].dtype == dense.dtype
    assert rms(outputs[0] - exact) <= 1.2 * rms(dense - exact)  # both are random: a fifth of room
    assert rms(outputs[1] - outputs[0]) > 0


def test_inference_mode_and_channels_last_change_nothing(wan):
    """The same latents."""
    uta_fx.enable(wan, SPARSE, fullgraph=True)
    expected = generate(wan, "wan")[-1]
    with torch.inference_mode():
        assert torch.equal(generate(wan, "wan")[-1], expected)
    wan.transformer.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(generate(wan, "wan")[-1], expected)


@pytest.mark.parametrize("before", [True, False])
def test_model_offload_comes_and_goes(wan, before):
    """Before or after enable: diffusers takes its hooks off and on after every generation."""
    dense = generate(wan, "wan")[-1]
    if before:
        wan.enable_model_cpu_offload(device="cpu")
    uta_fx.enable(wan, SPARSE, fullgraph=True)
    if not before:
        wan.enable_model_cpu_offload(device="cpu")
    first, second = (generate(wan, "wan")[-1] for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, dense)
    with pytest.raises(ValueError, match="enabled already"):
        uta_fx.enable(wan, SPARSE)
    if before:
        wan.remove_all_hooks()
        assert torch.equal(generate(wan, "wan")[-1], first)
    uta_fx.disable(wan)
    assert torch.equal(generate(wan, "wan")[-1], dense)
    wan.remove_all_hooks()
    assert torch.equal(generate(wan, "wan")[-1], dense)
    assert graphs() == 1


def offload_by_groups(model):
    """Block by block, in diffusers' own way."""
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def offload_by_layers(model):
    """As enable_sequential_cpu_offload does."""
    accelerate.cpu_offload(model, "cpu")


def broadcast_attention(model):
    """A cache whose hooks sit on the attention inside the blocks."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model.enable_cache(config)


def extrapolate_attention(model):
    """Likewise."""
    config = TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"blocks\.\d+\.attn1"])
    model.enable_cache(config)


def cache_first_block(model):
    """A cache that skips all blocks but the first while that one's residual hardly changes."""
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))


@pytest.mark.parametrize(
    ("put_inside", "named"),
    [
        (offload_by_groups, "group_offloading"),
        (offload_by_layers, "AlignDevicesHook"),
        (broadcast_attention, "pyramid_attention_broadcast"),
        (extrapolate_attention, "taylorseer_cache"),
        (cache_first_block, "fbc_block_hook"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_inside_a_model_are_refused(wan, put_inside, named, before):
    """Named by enable, which then has changed nothing, or by the first call after it."""
    message = rf"hooks inside a WanTransformer3DModel \(.*{named}.*blocks=True"
    if before:
        put_inside(wan.transformer)
    else:
        uta_fx.enable(wan, SPARSE)
        put_inside(wan.transformer)
    with pytest.raises(ValueError, match=message):
        if before:
            uta_fx.enable(wan, SPARSE)
        else:
            generate(wan, "wan")
    if before:
        generate(wan, "wan", steps=1)
    assert graphs() == 0


@pytest.mark.parametrize("before", [True, False])
def test_group_offload_works_by_blocks(wan, before):
    """The hooks run around the compiled blocks, which share one graph."""
    dense = generate(wan, "wan")[-1]
    uta_fx.enable(wan, SPARSE, fullgraph=True)
    expected = generate(wan, "wan")[-1]
    uta_fx.disable(wan)
    counters.clear()
    if before:
        offload_by_groups(wan.transformer)
    uta_fx.enable(wan, Config(density=0.3, grid=GRID, **SETTINGS), blocks=True, fullgraph=True)
    if not before:
        offload_by_groups(wan.transformer)
    assert torch.equal(generate(wan, "wan")[-1], expected)
    assert graphs() == 1 and not counters["graph_break"]
    uta_fx.disable(wan)
    assert torch.equal(generate(wan, "wan")[-1], dense)


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_are_told_what_the_model_around_them_shows(name):
    """Their grid, and that HunyuanVideo's masks hide text alone: the same latents as of the whole.

    The model is traced once; a new size is traced again, and has its own code.
    """
    pipe, outputs = tiny_pipeline(name), []
    for blocks in (False, True):
        uta_fx.enable(pipe, SPARSE, blocks=blocks, fullgraph=True)
        counters.clear()
        outputs.append(generate(pipe, name, steps=2)[-1])
        assert not counters["graph_break"]
        if blocks:
            before = graphs()
            generate(pipe, name, steps=2)
            assert graphs() == before
            other = generate(pipe, name, steps=1, height=192)[-1]
            assert graphs() == 2 * before
            assert torch.equal(generate(pipe, name, steps=2)[-1], outputs[-1])
        uta_fx.disable(pipe)
    torch.testing.assert_close(outputs[1], outputs[0])
    dense = generate(pipe, name, steps=2)[-1]
    assert not torch.equal(outputs[1], dense) and "forward" not in vars(pipe.transformer)
    assert not torch.equal(other, generate(pipe, name, steps=1, height=192)[-1])


def test_blocks_whose_model_does_not_show_a_grid_need_one(wan):
    """Behind hooks inside it, or because it has no video."""
    uta_fx.enable(wan, SPARSE, blocks=True)
    offload_by_groups(wan.transformer)
    with pytest.raises(ValueError, match=r"needs config.grid: hooks inside .*\(group_offloading\)"):
        generate(wan, "wan")
    wan = tiny_pipeline("wan")
    uta_fx.enable(wan, dataclasses.replace(SPARSE, min_tokens=4096), blocks=True)
    with pytest.raises(ValueError, match=r"needs config.grid: the model shows none"):
        generate(wan, "wan")


def test_a_cache_that_skips_blocks_does_not_make_the_schedule_drift(wan, monkeypatch):
    """The first half of the steps is dense by count, though most calls are left out."""
    module, decisions = sys.modules["uta_fx.enable"], []
    runs_dense = module.runs_dense

    def recorded(pipeline, dense_until):
        decisions.append(runs_dense(pipeline, dense_until))
        return decisions[-1]

    monkeypatch.setattr(module, "runs_dense", recorded)
    cache_first_block(wan.transformer)
    config = Config(density=0.3, dense_until=0.5, grid=GRID, **SETTINGS)
    uta_fx.enable(wan, config, blocks=True, fullgraph=True)
    generate(wan, "wan", steps=6)
    # two calls a step; the first step runs both blocks, the others run the first alone
    assert decisions == [True] * 4 + [True] * 2 * 2 + [False] * 2 * 3
    assert graphs() == 2 and not counters["graph_break"]


CACHES = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=0.05),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    ),
    "MagCache": lambda: MagCacheConfig(mag_ratios=[1.0] * 6, num_inference_steps=6, threshold=0.5),
    "SeaCache": SeaCacheConfig,
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_around_blocks_skip_what_they_skip_without_us(wan, name):
    """Dense steps to the bit, density 1 to rounding, and each variant compiled once."""
    uncached, outputs = generate(wan, "wan", steps=6), {}
    for config in (None, dataclasses.replace(SPARSE, density=1.0), HALF):
        pipe = tiny_pipeline("wan")
        pipe.transformer.enable_cache(CACHES[name]())
        counters.clear()
        if config is not None:
            config = dataclasses.replace(config, grid=GRID)
            uta_fx.enable(pipe, config, blocks=True, fullgraph=True)
        outputs[config and config.density] = generate(pipe, "wan", steps=6)
        generate(pipe, "wan", steps=6)
        assert graphs() == (0 if config is None else 2 if config.dense_until else 1)
        assert not counters["graph_break"]
    dense, exact, sparse = outputs[None], outputs[1.0], outputs[0.3]
    assert not torch.equal(dense[-1], uncached[-1])
    # six steps, each the sums of two layers in another order
    torch.testing.assert_close(exact[-1], dense[-1], rtol=0, atol=1e-5 * float(dense[-1].std()))
    assert all(torch.equal(a, b) for a, b in zip(dense[:3], sparse[:3], strict=True))
    assert not torch.equal(dense[-1], sparse[-1])


def test_dense_layers_counts_blocks_that_are_compiled_alone(wan):
    """A block's graph does not know which layer it is; enable does.

    The whole model has its tokens in the order of the blocks in its dense layer too: the same sums
    in another order, some 1e-7 of the largest number for each rounding of two layers and steps.
    """

    def generated(**settings):
        uta_fx.enable(wan, Config(density=0.3, **settings, **SETTINGS), blocks="grid" in settings)
        latents = generate(wan, "wan", steps=2)[-1]
        uta_fx.disable(wan)
        return latents

    first = generated(dense_layers="0", grid=GRID)
    whole = generated(dense_layers="0")
    torch.testing.assert_close(whole, first, rtol=0, atol=1e-5 * float(first.abs().max()))
    other = generated(dense_layers="-1", grid=GRID)
    assert (other - first).abs().max() > 1e-4 * first.abs().max()
    assert torch.equal(generated(dense_layers="0-1", grid=GRID), generate(wan, "wan", steps=2)[-1])
    with pytest.raises(ValueError, match="dense_layers='2' names blocks that a WanTransformer3D"):
        generated(dense_layers="2", grid=GRID)


def test_compile_repeated_blocks_takes_the_backend(wan):
    """The way of diffusers, without a line of ours."""
    uta_fx.enable(wan, SPARSE, fullgraph=True)
    expected = generate(wan, "wan")[-1]
    uta_fx.disable(wan)
    counters.clear()
    options = {"density": 0.3, "grid": GRID, **SETTINGS}
    wan.transformer.compile_repeated_blocks(backend="uta", fullgraph=True, options=options)
    assert torch.equal(generate(wan, "wan")[-1], expected)
    assert graphs() == 1 and not counters["graph_break"]
    with pytest.raises(ValueError, match=r"compiled already .* on a WanTransformerBlock"):
        uta_fx.enable(wan)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
@pytest.mark.parametrize("layers", ["0", "-1", "0-1"])
def test_compile_repeated_blocks_counts_blocks_as_enable_does(name, layers):
    """HunyuanVideo has one of either kind: the index goes on from list to list."""
    trust = name == "hunyuan_video"
    config = Config(density=0.3, grid=GRID, dense_layers=layers, trust_masks=trust, **SETTINGS)
    pipe = tiny_pipeline(name)
    uta_fx.enable(pipe, config, blocks=True)
    expected = generate(pipe, name, steps=2)[-1]
    uta_fx.disable(pipe)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    pipe.transformer.compile_repeated_blocks(backend="uta", fullgraph=True, options=options)
    assert torch.equal(generate(pipe, name, steps=2)[-1], expected)


def test_a_lora_moves_no_layer(wan):
    """Loaded into compiled blocks and unloaded: the dense one stays the first."""
    settings = {"density": 0.3, "grid": GRID, "dense_layers": "0", **SETTINGS}
    weights = lora(wan.transformer, 1)

    def outputs(pipe):
        pipe.load_lora_weights(dict(weights), adapter_name="style")
        with_lora = generate(pipe, "wan", steps=2)[-1]
        pipe.unload_lora_weights()
        return with_lora, generate(pipe, "wan", steps=2)[-1]

    uta_fx.enable(wan, Config(**settings), blocks=True)
    expected = outputs(wan)
    repeated = tiny_pipeline("wan")
    repeated.transformer.compile_repeated_blocks(backend="uta", options=settings)
    generate(repeated, "wan", steps=1)
    found = outputs(repeated)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(*found)


def test_what_is_no_video_transformer_is_named(wan):
    """Each in one sentence."""
    with pytest.raises(TypeError, match="got a text encoder, UMT5EncoderModel"):
        uta_fx.enable(wan.text_encoder)
    with pytest.raises(TypeError, match="got a VAE, AutoencoderKLWan"):
        uta_fx.enable(wan.vae)
    wan.transformer = None
    with pytest.raises(TypeError, match="got WanPipeline, which has vae, text_encoder"):
        uta_fx.enable(wan)
