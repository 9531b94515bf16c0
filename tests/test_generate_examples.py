"""The examples that generate videos, on small pipelines: in memory, and loaded from a folder."""

import dataclasses
import importlib

import pytest
from imageio import v2 as imageio

from uta_fx.study.pipelines import REAL_SIZES, tiny_pipeline
from uta_fx.study.real_models import REAL_MODELS

EXAMPLES = {
    "generate_wan": "wan",
    "generate_hunyuan": "hunyuan_video",
    "generate_cogvideox": "cogvideox",
    "generate_ltx": "ltx",
}
NARROW = {
    "hunyuan_video": {"num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1},
    "ltx": {"num_attention_heads": 2, "cross_attention_dim": 128, "num_layers": 1},
}
"""Settings with which a transformer of real size is a small one; its text and latents are real."""
ROWS = ("density", "dense first steps", "time a step", "speed-up", "PSNR", "SSIM")
EAGER = ["--inner", "eager", "--min-tokens", "260"]
SMALL = ["--height", "96", "--width", "160", "--frames", "17", "--steps", "3"]


@pytest.fixture
def example(monkeypatch, request):
    """Load one as Python does that runs it: its folder comes first."""
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")
    return importlib.import_module


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_from_memory_and_from_a_folder(name, example, tmp_path, capsys):
    """A video and a table; what from_pretrained loads, once offloaded, gives the same video."""
    main = example(name).main
    folder, tiny, loaded = tmp_path / "model", tmp_path / "tiny.mp4", tmp_path / "loaded.mp4"
    main(["--tiny", "--steps", "3", "--out", str(tiny)])
    table = capsys.readouterr().out
    assert all(row in table for row in ROWS) and str(tiny) in table
    tiny_pipeline(EXAMPLES[name]).save_pretrained(folder)
    offload = ["--offload"] if name == "generate_wan" else []
    main(["--model", str(folder), *SMALL, *EAGER, *offload, "--out", str(loaded)])
    assert loaded.read_bytes() == tiny.read_bytes()
    with imageio.get_reader(tiny) as reader:
        assert reader.count_frames() == 17
        first = reader.get_data(0)
    assert first.shape == (96 + 18, 3 * 160 + 2 * 4, 3) and first.std() > 0


@pytest.mark.parametrize("name", ["generate_hunyuan", "generate_ltx"])
def test_an_example_runs_with_a_transformer_of_real_size(name, example, monkeypatch, tmp_path):
    """Here a narrow one: what surrounds it fits the text and the latents of the released model."""
    pipeline = EXAMPLES[name]
    real = REAL_MODELS[REAL_SIZES[pipeline]]
    narrow = dataclasses.replace(real, settings={**real.settings, **NARROW[pipeline]})
    monkeypatch.setitem(REAL_MODELS, REAL_SIZES[pipeline], narrow)
    video = tmp_path / "random.gif"
    # LTX-Video compresses 32 times in height and width
    size = ("384", "512") if name == "generate_ltx" else ("96", "160")
    main = example(name).main
    main([
        "--random", "--height", size[0], "--width", size[1], "--frames", "17", "--steps", "2",
        "--dense-until", "0", *EAGER, "--out", str(video),
    ])  # fmt: skip
    with imageio.get_reader(video) as reader:
        assert reader.get_data(0).std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.webm"], "--out must end in .mp4 or .gif, got a.webm"),
        (["--steps", "5", "--dense-until", "1"], "--steps must be at least 7"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(arguments, message, example, capsys):
    """As argparse names them."""
    with pytest.raises(SystemExit):
        example("generate_ltx").main(arguments)
    assert message in capsys.readouterr().err
