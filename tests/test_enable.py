"""uta_fx.enable and disable on a module and on a pipeline."""

import copy
import inspect
import pickle
import types

import pytest
import torch
from torch import nn

import uta_fx
from uta_fx import Config
from uta_fx.enable import _as_made, dense_steps, runs_dense, step_of

FAST = {"inner": "eager", "min_tokens": 64, "reorder": "none", "block_q": 16, "block_kv": 16}


class Model(nn.Module):
    """One self-attention over 128 tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        """``[B, 128, 32]`` to ``[B, 1, 128, 32]``."""
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q * 3, k * 3, v)


def schedule(steps, step):
    """What a diffusers scheduler shows of itself."""
    return types.SimpleNamespace(timesteps=torch.linspace(1000, 1, steps), step_index=step)


def pipeline_of(model, scheduler):
    """A pipeline as far as ``enable`` looks at one."""
    return types.SimpleNamespace(transformer=model, scheduler=scheduler)


@torch.no_grad()
def test_a_module_is_enabled_and_disabled():
    """In place, and back to the very same code."""
    model, x = Model(), torch.randn(1, 128, 32)
    dense = model(x)
    assert uta_fx.enable(model, Config(density=0.2, **FAST), fullgraph=True) is model
    assert not torch.equal(model(x), dense)
    with pytest.raises(ValueError, match="target is enabled already"):
        uta_fx.enable(model)
    uta_fx.disable(model)
    assert "forward" not in vars(model) and torch.equal(model(x), dense)
    uta_fx.disable(model)  # nothing to undo is no error


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_is_a_model_of_its_own(copied):
    """With its own weights, and not enabled."""
    model, x = Model(), torch.randn(1, 128, 32)
    uta_fx.enable(model, Config(density=0.2, **FAST))
    other = copied(model)
    with torch.no_grad():
        sparse, dense = model(x), Model.forward(model, x)
        assert torch.equal(other(x), dense) and not torch.equal(sparse, dense)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(x).any() and torch.equal(model(x), sparse)
    assert "forward" not in vars(uta_fx.disable(model))


def test_a_trace_sees_what_was_there():
    """Of a model that is enabled."""
    model, x = Model(), torch.randn(1, 128, 32)
    expected = uta_fx.explain(model, x, config=Config(**FAST)).to_dict()
    uta_fx.enable(model, Config(**FAST))
    assert uta_fx.explain(model, x, config=Config(**FAST)).to_dict() == expected


@torch.no_grad()
def test_the_schedule_decides_between_dense_and_sparse():
    """The first steps equal the dense model; switching recompiles nothing."""
    model, x = Model(), torch.randn(1, 128, 32)
    dense = model(x)
    pipeline = pipeline_of(model, schedule(10, None))
    config = Config(density=0.2, dense_until=0.25, **FAST)
    uta_fx.enable(pipeline, config, fullgraph=True)
    for step in (None, 1, 2, 3, 9):
        pipeline.scheduler.step_index = step
        assert torch.equal(model(x), dense) is ((step or 0) < 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (9, 0, 5, 1):
            pipeline.scheduler.step_index = step
            model(x)


@torch.no_grad()
def test_warmup_compiles_both_variants_by_the_first_call():
    """Whichever that is; and it changes no output."""
    x = torch.randn(1, 128, 32)
    for first in (0, 9):
        model = Model()
        dense, pipeline = model(x), pipeline_of(model, schedule(10, first))
        config = Config(density=0.2, dense_until=0.5, **FAST)
        uta_fx.enable(pipeline, config, warmup=True, fullgraph=True)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        outputs = {}
        for step in (first, 9 - first):
            pipeline.scheduler.step_index = step
            outputs[step] = model(x)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        assert torch.equal(outputs[0], dense) and not torch.equal(outputs[9], dense)
    with pytest.raises(ValueError, match=r"warmup=True needs config\.dense_until"):
        uta_fx.enable(Model(), Config(**FAST), warmup=True)


@torch.no_grad()
def test_a_scheduler_that_takes_the_place_of_another_decides():
    """As pipelines let users do it, after ``enable``."""
    model, x = Model(), torch.randn(1, 128, 32)
    dense = model(x)
    pipeline = pipeline_of(model, schedule(10, None))
    uta_fx.enable(pipeline, Config(density=0.2, dense_until=0.2, **FAST), fullgraph=True)
    pipeline.scheduler = schedule(10, 9)
    assert not torch.equal(model(x), dense)
    pipeline.scheduler = types.SimpleNamespace(timesteps=torch.arange(10))
    with pytest.raises(ValueError, match=r"counts its steps \(step_index\) or a pipeline that"):
        model(x)


@torch.no_grad()
def test_both_transformers_of_a_pipeline_are_enabled_and_disabled():
    """Wan 2.2 has one for each part of the schedule."""
    models, x = (Model(), Model()), torch.randn(1, 128, 32)
    dense = models[0](x)
    pipeline = types.SimpleNamespace(transformer=models[0], transformer_2=models[1])
    uta_fx.enable(pipeline, Config(density=0.2, **FAST), fullgraph=True)
    assert not any(torch.equal(model(x), dense) for model in models)
    uta_fx.disable(pipeline)
    assert not any("forward" in vars(model) for model in models)


@pytest.mark.parametrize(
    ("steps", "until", "expected"),
    [(10, 0.2, 2), (30, 0.2, 6), (10, 0.25, 3), (7, 0, 0), (5, 1, 5)],
)
def test_the_dense_share_is_rounded_up_to_whole_steps(steps, until, expected):
    """And a product that misses an integer by rounding counts as it."""
    assert dense_steps(steps, until) == expected
    pipelines = [pipeline_of(None, schedule(steps, step)) for step in range(steps)]
    assert sum(runs_dense(pipeline, until) for pipeline in pipelines) == expected


def test_a_scheduler_that_counts_no_steps_is_followed_by_the_timestep():
    """CogVideoX's: a timestep's place shows where it lies in memory, of which nothing is read."""
    timesteps = torch.arange(20, device="meta")[5:15]  # reading it would raise
    pipeline = pipeline_of(None, types.SimpleNamespace(timesteps=timesteps))
    pipeline.current_timestep = None
    assert step_of(pipeline) == 0
    for step, timestep in enumerate(timesteps):
        pipeline.current_timestep = timestep
        assert step_of(pipeline) == step
        pipeline.current_timestep = timestep.expand(2)
        assert step_of(pipeline) == step


def test_a_timestep_that_is_a_copy_is_followed_by_its_value():
    """As in pipelines that make numbers of them."""
    timesteps = torch.tensor([900, 600, 300])
    pipeline = pipeline_of(None, types.SimpleNamespace(timesteps=timesteps))
    for timestep in (600, torch.tensor(600)):
        pipeline.current_timestep = timestep
        assert step_of(pipeline) == 1
    pipeline.current_timestep = 500
    with pytest.raises(ValueError, match=r"500\.0 is none of its scheduler's timesteps"):
        step_of(pipeline)


@pytest.mark.parametrize(("begin", "expected"), [(None, 0), (4, 4)])
def test_a_schedule_may_begin_later(begin, expected):
    """Video to video starts inside it, and the counter is empty before the first step."""
    scheduler = schedule(10, None)
    scheduler.begin_index = begin
    assert step_of(pipeline_of(None, scheduler)) == expected


@torch.no_grad()
def test_two_variants_may_recompile_as_often_as_one():
    """Dynamo gives up at a number of graphs for one piece of code: each variant has its own."""
    model = Model()
    pipeline = pipeline_of(model, schedule(10, None))
    config = Config(density=0.2, dense_until=0.5, **FAST)
    uta_fx.enable(pipeline, config, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for batch in (1, 2, 3):
            for step in (0, 9):
                pipeline.scheduler.step_index = step
                model(torch.randn(batch, 128, 32))


@torch.no_grad()
def test_what_had_taken_the_place_of_forward_comes_back():
    """Code that others patched in is compiled, and there again after disable."""
    model, x = Model(), torch.randn(1, 128, 32)
    original = model.forward
    patched = model.forward = lambda x: original(x) + 1
    uta_fx.enable(model, Config(density=1.0, **FAST))
    torch.testing.assert_close(model(x), patched(x))
    uta_fx.disable(model)
    assert model.forward is patched


@torch.no_grad()
def test_a_mode_reaches_the_backend(monkeypatch):
    """torch.compile would take either a mode or our options."""
    modes = []

    def record(gm, inputs, inner, mode, inductor):
        modes.append((inner, mode))
        return gm.forward

    monkeypatch.setattr("uta_fx.backend._compile", record)
    config = Config(**FAST | {"inner": "inductor"})
    model = uta_fx.enable(Model(), config, mode="max-autotune-no-cudagraphs")
    model(torch.randn(1, 128, 32))
    assert modes == [("inductor", "max-autotune-no-cudagraphs")]


@pytest.mark.parametrize("settings", [{}, {"blocks": True}, {"blocks": True, "grid": (4, 4, 8)}])
@pytest.mark.parametrize(
    ("options", "inner", "error", "message"),
    [
        ({"density": 0.2}, "eager", TypeError, "density is no option of uta_fx.enable: settings"),
        ({"fooo": 1}, "eager", TypeError, "those of torch.compile are fullgraph, dynamic, mode"),
        ({"fullgraph": "no"}, "eager", TypeError, "fullgraph must be True or False, got 'no'"),
        ({"dynamic": "x"}, "eager", TypeError, "dynamic must be True, False or None, got 'x'"),
        ({"mode": 3}, "inductor", TypeError, "mode must be a name or None, got 3"),
        ({"mode": "nope"}, "inductor", ValueError, "mode must be one of default, .*, got 'nope'"),
        ({"mode": "default"}, "eager", ValueError, "mode='default' needs inner='inductor', got in"),
        ({"shapes_spec": 3}, "eager", TypeError, "shapes_spec must be"),
    ],
)
def test_options_of_the_compiler_are_checked_before_anything_is_changed(
    settings, options, inner, error, message
):
    """However the model is compiled, and where PyTorch would not look before the first call."""
    if "shapes_spec" in options and "shapes_spec" not in PARAMETERS:
        pytest.skip("this PyTorch does not have the option")
    model, settings = Asking(), dict(settings)
    blocks = settings.pop("blocks", False)
    config = Config(**FAST | {"inner": inner} | settings)
    with pytest.raises(error, match=message):
        uta_fx.enable(model, config, blocks=blocks, **options)
    assert not any("forward" in vars(part) for part in model.modules())


PARAMETERS = inspect.signature(torch.compile).parameters


def test_what_cannot_be_enabled_is_named():
    """Neither a pipeline nor a module; no schedule to follow."""
    with pytest.raises(TypeError, match=r"target must be a torch.nn.Module or a pipeline"):
        uta_fx.enable("wan")
    with pytest.raises(ValueError, match="needs a pipeline with a scheduler, got a Model"):
        uta_fx.enable(Model(), Config(dense_until=0.2))
    with pytest.raises(TypeError, match="a pipeline with a transformer, got SimpleNamespace"):
        uta_fx.enable(types.SimpleNamespace(unet=Model()))
    with pytest.raises(TypeError, match="a module in Python, got a scripted one"):
        uta_fx.enable(torch.jit.trace(Model(), torch.randn(1, 128, 32)))
    uncounted = pipeline_of(Model(), types.SimpleNamespace())
    with pytest.raises(ValueError, match="dense_until needs a scheduler that counts its steps"):
        uta_fx.enable(uncounted, Config(dense_until=0.2))


def compiled_in_place(forward=False):
    """A model that was compiled, itself or its forward."""
    model = Model()
    if forward:
        model.forward = torch.compile(model.forward)
    else:
        model.compile()
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: torch.compile(Model()),
        lambda: nn.Sequential(torch.compile(Model())),
        lambda: pipeline_of(torch.compile(Model()), None),
        lambda: compiled_in_place(),
        lambda: compiled_in_place(forward=True),
    ],
)
def test_a_model_that_is_compiled_already_is_refused(compiled):
    """In each way to compile it, as a whole, in a part or in a pipeline."""
    with pytest.raises(ValueError, match=r"target is compiled already \(torch.compile on a"):
        uta_fx.enable(compiled())


class Asking(nn.Module):
    """Looks at the values of a clip between embedding it and its blocks, which breaks its graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Model() for _ in range(2))

    def forward(self, clip):
        x = self.patch(clip).flatten(2).mT
        if clip.mean() > 0:
            x = x * 2
        for block in self.blocks:
            x = x + block(x)[:, 0]
        return x


@torch.no_grad()
@pytest.mark.parametrize("sign", [-1, 1])
def test_blocks_are_told_their_grid_by_a_model_whose_graph_breaks(sign):
    """What a graph hands to the next one lies there as it lay: the same as with a grid given."""
    clip, outputs = sign * torch.rand(1, 3, 4, 8, 16), []
    for grid in ((4, 4, 8), None):
        config = Config(**{**FAST, "reorder": "tile"}, density=0.3, grid=grid, strict=True)
        model = uta_fx.enable(Asking(), config, blocks=True, fullgraph=True)
        outputs.append(model(clip))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], Asking()(clip))


@torch.no_grad()
@pytest.mark.parametrize(("batch", "graphs"), [(1, 1), (2, 2)])
def test_a_block_compiles_once_for_one_sample(batch, graphs):
    """The tokens of the first layer are part of a longer sequence: their first stride is its."""
    model, x = Model(), torch.randn(batch, 160, 32)
    config = Config(density=0.2, **FAST)
    parts = x[:, 32:], torch.randn(batch, 128, 32)
    expected = [uta_fx.enable(Model(), config, fullgraph=True)(part.clone()) for part in parts]
    uta_fx.enable(model, config, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert all(torch.equal(model(part), x) for part, x in zip(parts, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("shape", [(), (1,), (1, 3, 4), (1, 1, 5), (2, 3, 4)])
def test_tensors_as_they_are_made_are_left_alone(shape):
    """And so are those to which somebody has given a mark."""
    x = torch.zeros(shape)
    assert _as_made(x) is x
    part = torch.zeros(1, 4, 5)[:, 1:]
    torch._dynamo.mark_dynamic(part, 1)
    assert _as_made(part) is part
    assert _as_made(torch.zeros(1, 4, 5)[:, 1:]).stride() == (15, 5, 1)
    assert _as_made("text") == "text"


def test_blocks_need_a_list_of_blocks():
    with pytest.raises(ValueError, match="a model with a list of blocks, got a Model"):
        uta_fx.enable(Model(), Config(grid=(2, 8, 8)), blocks=True)
