"""The moving shapes: prompts and scenes, drawing, the probe, the trained pipeline, its training."""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from uta_fx.moving_shapes import (
    Background,
    Scene,
    Shape,
    agreement,
    held_out_scenes,
    pack,
    parse_prompt,
    probe,
    render,
    sample_scenes,
    unpack,
)
from uta_fx.moving_shapes.scenes import (
    PADDING,
    PROMPT_LENGTH,
    VOCABULARY_SIZE,
    is_held_out,
    tokenize,
)

PROMPT = "a red disc moves left and a blue star bounces up over dark green stripes"
TRAINING_SCRIPT = Path(__file__).parents[1] / "examples" / "train_small_wan.py"


def generator(seed: int = 0) -> torch.Generator:
    """A seeded source of randomness."""
    return torch.Generator().manual_seed(seed)


def rendered(count: int, seed: int = 0) -> tuple[torch.Tensor, list[Scene]]:
    """Clips in [0, 1], and the scenes they show."""
    source = generator(seed)
    packed = sample_scenes(count, source)
    return (render(packed, source) + 1) / 2, unpack(packed)


# Prompts and scenes


def test_a_prompt_is_read_as_the_scene_it_says():
    """A prompt is read as the scene it says."""
    scene = parse_prompt(PROMPT)
    assert scene == Scene(
        shapes=(
            Shape(colour="red", kind="disc", motion="moves", direction="left"),
            Shape(colour="blue", kind="star", motion="bounces", direction="up"),
        ),
        background=Background(hue="green", texture="stripes"),
    )
    assert scene.prompt == PROMPT


def test_prompt_scene_and_packed_row_say_the_same():
    """Prompt scene and packed row say the same."""
    packed = sample_scenes(200, generator())
    scenes = unpack(packed)
    again = pack([parse_prompt(scene.prompt) for scene in scenes])
    assert unpack(again) == scenes
    assert torch.equal(tokenize(again), tokenize(packed))


def test_different_prompts_have_different_tokens():
    """Different prompts have different tokens."""
    packed = sample_scenes(500, generator())
    prompts = {scene.prompt for scene in unpack(packed)}
    tokens = tokenize(packed)
    assert len(tokens.unique(dim=0)) == len(prompts)
    assert tokens.shape == (500, PROMPT_LENGTH)
    assert PADDING <= tokens.min() and tokens.max() < VOCABULARY_SIZE


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: expected a sentence such as .* got an empty one"),
        ("  ", "got an empty one"),
        ("a pink disc moves left over dark red dots", "a colour .red, yellow.* word 2, got 'pink'"),
        ("a red dog moves left over dark red dots", "a kind .disc, square.* word 3, got 'dog'"),
        ("a red disc moves left over dark red", "a texture .stripes.* got the end of the prompt"),
        ("a red disc moves left under dark red dots", "joining word .and, over.* got 'under'"),
        ("a red disc moves left over dark red dots now", "its end before word 10, got 'now'"),
        (
            "a red disc moves left and a red star moves up over dark red dots",
            "shapes: expected different colours, got red, red",
        ),
    ],
)
def test_a_wrong_prompt_is_refused_with_what_was_expected(prompt, message):
    """A wrong prompt is refused with what was expected."""
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt)


def test_a_prompt_that_is_no_string_is_refused():
    """A prompt that is no string is refused."""
    with pytest.raises(TypeError, match="prompt: expected a string, got list"):
        parse_prompt([PROMPT])


def test_a_scene_cannot_be_built_wrong():
    """A scene cannot be built wrong."""
    scene = parse_prompt(PROMPT)
    with pytest.raises(ValueError, match="shapes: expected 1 to 3 shapes, got 0"):
        dataclasses.replace(scene, shapes=())
    with pytest.raises(ValueError, match=r"direction: expected one of left.* got 'north'"):
        dataclasses.replace(scene.shapes[0], direction="north")
    with pytest.raises(ValueError, match=r"texture: expected one of stripes.* got 'sand'"):
        Background(hue="red", texture="sand")


def test_training_never_samples_a_held_out_prompt():
    """Training never samples a held out prompt."""
    assert not is_held_out(sample_scenes(5000, generator())).any()


def test_held_out_scenes_are_held_out_different_and_always_the_same():
    """Held out scenes are held out different and always the same."""
    scenes = held_out_scenes(64)
    assert is_held_out(pack(scenes)).all()
    assert len({scene.prompt for scene in scenes}) == 64
    assert scenes == held_out_scenes(64)
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3}


# Drawing


def test_clips_are_frames_of_rgb_in_range_and_repeat_with_their_seed():
    """Clips are frames of RGB in range and repeat with their seed."""
    packed = sample_scenes(3, generator())
    clips = render(packed, generator(1))
    assert clips.shape == (3, 3, 16, 64, 64) and clips.dtype == torch.float32
    assert clips.min() >= -1 and clips.max() <= 1
    assert torch.equal(clips, render(packed, generator(1)))


def test_a_short_clip_is_the_start_of_the_long_one():
    """A short clip is the start of the long one."""
    packed = sample_scenes(3, generator())
    whole, start = render(packed, generator(1)), render(packed, generator(1), frames=4)
    assert torch.equal(start, whole[:, :, :4])


def test_an_impossible_number_of_frames_is_refused():
    """An impossible number of frames is refused."""
    with pytest.raises(ValueError, match="frames: expected 1 to 16, got 17"):
        render(sample_scenes(1, generator()), generator(), frames=17)


# The probe


def test_the_probe_agrees_with_what_was_drawn():
    """The probe agrees with what was drawn."""
    clips, scenes = rendered(100)
    assert agreement(clips, scenes) >= 0.98


def test_the_probe_tells_bounces_from_straight_motion():
    """The probe tells bounces from straight motion."""
    clips, scenes = rendered(60, seed=1)
    right = [
        track.bounces == (shape.motion == "bounces")
        for clip, scene in zip(clips, scenes, strict=True)
        for track, shape in zip(probe(clip, scene).tracks, scene.shapes, strict=True)
    ]
    assert sum(right) >= 0.95 * len(right)


def test_the_probe_is_near_chance_on_clips_of_other_prompts():
    """The probe is near chance on clips of other prompts."""
    clips, scenes = rendered(100)
    # A colour is there in two of seven cases and moves the right way in one of four: 7 %.
    assert agreement(clips.roll(1, 0), scenes) < 0.2


def test_the_probe_survives_noise_and_finds_nothing_in_an_empty_clip():
    """The probe survives noise and finds nothing in an empty clip."""
    clips, scenes = rendered(20)
    noisy = (clips + 0.05 * torch.randn(clips.shape, generator=generator())).clamp(0, 1)
    assert agreement(noisy, scenes) >= 0.95
    track = probe(torch.zeros(3, 16, 64, 64), scenes[0]).tracks[0]
    assert not track.present and track.direction is None


def test_a_shape_that_stands_still_has_no_direction():
    """A shape that stands still has no direction."""
    clips, scenes = rendered(1)
    still = clips[0, :, :1].expand(-1, 16, -1, -1)
    result = probe(still, scenes[0])
    assert all(track.direction is None for track in result.tracks if track.present)
    assert result.agreement == 0


def test_the_probe_refuses_other_shapes():
    """The probe refuses other shapes."""
    scene = parse_prompt(PROMPT)
    with pytest.raises(ValueError, match=r"video: expected \[3, F, H, W\], got \[16, 64, 64\]"):
        probe(torch.zeros(16, 64, 64), scene)
    with pytest.raises(ValueError, match="scenes: expected one for each of 2 clips, got 1"):
        agreement(torch.zeros(2, 3, 16, 64, 64), [scene])


# The pipeline


@pytest.fixture(scope="module")
def pipeline():
    """The trained pipeline, loaded once."""
    pytest.importorskip("diffusers")
    from uta_fx.moving_shapes import load_pipeline

    return load_pipeline()


@pytest.fixture
def shallow(pipeline):
    """The pipeline with one layer of its transformer's eight, where pictures do not matter."""
    blocks = pipeline.transformer.blocks
    pipeline.transformer.blocks = blocks[:1]
    yield pipeline
    pipeline.transformer.blocks = blocks


def test_the_trained_model_draws_what_prompts_it_never_saw_say(pipeline):
    """The trained model draws what prompts it never saw say."""
    scenes = [scene for scene in held_out_scenes(64) if len(scene.shapes) == 1][:3]
    # Four steps are fewer than the model deserves: they go where motion is decided. Two of three by
    # chance is one case in seventy.
    shift = pipeline.scheduler.shift
    pipeline.scheduler.set_shift(3.0)
    clips = pipeline([scene.prompt for scene in scenes], steps=4)
    pipeline.scheduler.set_shift(shift)
    assert clips.shape == (3, 3, 16, 64, 64)
    assert 0 <= clips.min() and clips.max() <= 1
    assert agreement(clips, scenes) > 0.5


def test_every_call_of_the_transformer_has_the_same_shapes(shallow):
    """Every call of the transformer has the same shapes."""
    seen, steps = [], []

    def note(module, args, kwargs):
        assert not args and kwargs.pop("return_dict") is False
        seen.append({name: (value.shape, value.dtype) for name, value in kwargs.items()})
        steps.append(shallow.scheduler.step_index)

    hook = shallow.transformer.register_forward_pre_hook(note, with_kwargs=True)
    calls = []
    try:
        shallow([PROMPT], steps=2, guidance_scale=1.5, callback=lambda *call: calls.append(call))
    finally:
        hook.remove()
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert seen[0]["hidden_states"][0] == (2, 3, 16, 64, 64)
    assert steps[1] == 1 and calls == [(1, 2), (2, 2)]


def test_a_clip_depends_on_its_seed_alone(shallow):
    """A clip depends on its seed alone."""
    noise = torch.randn(3, 16, 64, 64, generator=generator(7))
    seeded = shallow([PROMPT], steps=1, seed=7)
    assert torch.equal(seeded, shallow([PROMPT], steps=1, latents=noise[None]))
    # Another batch size may round differently, no more.
    pair = shallow([PROMPT, PROMPT], steps=1, seed=6)
    torch.testing.assert_close(pair[1:], seeded, atol=1e-3, rtol=0)


def test_the_pipeline_refuses_what_it_cannot_do(pipeline):
    """The pipeline refuses what it cannot do."""
    with pytest.raises(TypeError, match="prompts: expected a list of strings, got one string"):
        pipeline(PROMPT)
    with pytest.raises(ValueError, match="prompts: expected at least one prompt, got none"):
        pipeline([])
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        pipeline([PROMPT], steps=0)
    with pytest.raises(ValueError, match=r"latents: expected \[1, 3, 16, 64, 64\], got \[1, 3\]"):
        pipeline([PROMPT], latents=torch.zeros(1, 3))


def test_missing_weights_are_named(tmp_path):
    """Missing weights are named."""
    pytest.importorskip("diffusers")
    from uta_fx.moving_shapes import load_pipeline

    with pytest.raises(
        FileNotFoundError, match=r"weights: expected a folder with model_index\.json"
    ):
        load_pipeline(weights=tmp_path)


def test_without_diffusers_the_world_works_and_the_pipeline_names_the_extra():
    """Without diffusers the world works and the pipeline names the extra."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import uta_fx.moving_shapes as world\n"
        "world.held_out_scenes(1)\n"
        "try: world.load_pipeline\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs diffusers: pip install 'uta-fx[diffusers]'" in done.stdout


# The training script


@pytest.fixture(scope="module")
def script():
    """The training script as a module."""
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("train_small_wan", TRAINING_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_resumed_run_ends_where_an_unbroken_one_does(script, tmp_path, capsys, request):
    """A resumed run ends where an unbroken one does; in one thread, where sums have one order."""
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    tiny = ["--tiny", "--report", "1"]
    script.main([*tiny, "--steps", "4", "--out", str(tmp_path / "whole")])
    options = script.parse_arguments([*tiny, "--steps", "4", "--out", str(tmp_path / "parts")])
    first = script.Training(options, torch.device("cpu"))
    for step in range(2):
        first.update(script.TINY_STAGES[0], step / 4)
    first.save(tmp_path / "parts")
    checkpoint = str(tmp_path / "parts" / "checkpoint.pt")
    script.main([*tiny, "--steps", "4", "--out", str(tmp_path / "parts"), "--resume", checkpoint])

    ends = [torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "parts")]
    assert ends[0]["step"] == ends[1]["step"] == 4
    for mine, other in zip(ends[0]["average"], ends[1]["average"], strict=True):
        torch.testing.assert_close(mine, other)
    assert "loss" in capsys.readouterr().out


def test_what_training_writes_can_be_evaluated_and_trained_further(script, tmp_path, capsys):
    """What training writes can be evaluated and trained further."""
    out, again = str(tmp_path / "run"), str(tmp_path / "again")
    script.main(["--tiny", "--steps", "2", "--out", out])
    script.main(["--tiny", "--evaluate", "--prompts", "2", "--eval-steps", "1", "--out", out])
    assert "agreement" in capsys.readouterr().out
    assert (tmp_path / "run" / "sheet.png").is_file()
    script.main(["--tiny", "--steps", "1", "--out", again, "--start-from", f"{out}/weights"])
    assert (tmp_path / "again" / "weights" / "model_index.json").is_file()


def test_orthogonalize_brings_singular_values_near_one(script):
    """Orthogonalize brings singular values near one."""
    matrices = torch.randn(3, 64, 128, generator=generator())
    for stack in (matrices, matrices.mT):
        values = torch.linalg.svdvals(script.orthogonalize(stack).float())
        # Five Newton-Schulz steps of these coefficients land between 0.6 and 1.25.
        assert 0.6 < values.min() and values.max() < 1.25
