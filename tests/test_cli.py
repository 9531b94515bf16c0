"""The command line: what it writes, and how it refuses."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from imageio import v2 as imageio
from PIL import Image
from typer.testing import CliRunner

import uta_fx
from uta_fx import pictures
from uta_fx.bench import attention as bench
from uta_fx.bench import model as bench_model
from uta_fx.bench import tails as bench_tails
from uta_fx.bench.plot import draw
from uta_fx.cli import main
from uta_fx.commands import app
from uta_fx.kernels import ops
from uta_fx.moving_shapes import load_pipeline
from uta_fx.study.real_models import REAL_MODELS, Size, find_model


def run(*arguments):
    """Run the installed entry point in this interpreter's environment."""
    command = [sys.executable, "-c", "from uta_fx.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def run_here(*arguments):
    """The same in this process, which has imported all that it needs."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["uta-fx", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(
    "command",
    [
        (), ("generate",), ("explain",), ("study",), ("study", "oracle"), ("study", "policies"),
        ("bench",), ("bench", "attention"), ("bench", "model"),
        ("export",), ("export", "onnx"), ("export", "plugin"), ("export", "tensorrt"),
        ("export", "engine"),
    ],
)  # fmt: skip
def test_every_command_has_help(command):
    """With every option explained."""
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert all(len(line.split()) > 2 for line in lines if line.strip().startswith("--"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--density", "0"), "density must be in (0, 1], got 0.0"),
        (
            ("--policy", "best"),
            "policy must be one of low_delta, topk, topp, threshold, radial, sliding_tile",
        ),
        (("--tail", "long"), "tail must be one of"),
        (("--prompt", ""), "got an empty one"),
        (("--prompt", "a pink disc moves left over dark green stripes"), "'pink'"),
        (("--device", "tpu"), "--device must be auto, cpu or cuda, got 'tpu'"),
        (("--output", "/dev/null/x"), "--output /dev/null/x cannot be written"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message):
    """On standard error, with status 2 and no traceback."""
    if "cannot be written" in message and not hasattr(os, "geteuid"):
        pytest.skip("no such file system")
    result = run_here("generate", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("uta-fx: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_export_refuses_in_one_sentence(tmp_path):
    """A file of another kind, and one that is not there."""
    for arguments, message in (
        (("onnx", str(tmp_path / "model.txt")), "path must end in .onnx"),
        (
            ("plugin", str(tmp_path / "no.onnx"), "p.so", "--architecture", "90"),
            "model must be an ONNX file",
        ),
        (("engine", str(tmp_path / "no.onnx"), "m.engine"), "model must be an ONNX file"),
    ):
        result = run_here("export", *arguments)
        assert result.returncode == 2
        assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_export_takes_a_released_model(tmp_path):
    """Its real width, of one layer here, and a short clip; what does not fit is one sentence."""
    folder, path = tmp_path / "wan", tmp_path / "wan.onnx"
    find_model("wan-2.1-1.3b").with_random_weights(1, "cpu").save_pretrained(folder)
    command = ("export", "onnx", str(path), "--model", "wan-2.1-1.3b")
    for more, message in (
        ((), "--model needs --pretrained"),
        (("--pretrained", str(folder), "--height", "481"), "height must be a multiple of 16"),
        (("--pretrained", str(folder), "--clips", "2"), "--clips and --weights are the shipped"),
        (("--pretrained", str(tmp_path)), "no file named config.json"),
    ):
        result = run_here(*command, *more)
        assert result.returncode == 2 and message in result.stderr and not path.exists()
    assert "--size needs --model" in run_here(*command[:3], "--size", "480p").stderr
    result = run_here(*command, "--pretrained", str(folder), "--frames", "17", "--density", "0.1")
    assert result.returncode == 0, result.stderr
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    assert [x.op_type for x in model.graph.node].count("SparseAttention") == 1
    sizes = model.graph.input[0].type.tensor_type
    assert [x.dim_value for x in sizes.shape.dim] == [1, 16, 5, 60, 104]
    assert sizes.elem_type == onnx.TensorProto.FLOAT16


def test_export_writes_one_file_for_every_grid(tmp_path):
    """Frames, rows and columns alone are open; a model that takes its grid as numbers is named."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder, path = tmp_path / "wan", tmp_path / "wan.onnx"
    narrow = {"num_attention_heads": 2, "ffn_dim": 64, "num_layers": 1}
    find_model("wan-2.1-1.3b").model_class()(**narrow).save_pretrained(folder)
    command = ("export", "onnx", str(path), "--pretrained", str(folder), "--dynamic-grid")
    result = run_here(*command, "--model", "ltx-video")
    assert "LTX-Video takes num_frames, height, width as numbers" in result.stderr
    result = run_here(*command, "--model", "wan-2.1-1.3b", "--frames", "17")
    assert result.returncode == 0, result.stderr
    graph = onnx.load(path).graph
    assert [x.op_type for x in graph.node].count("SparseAttention") == 1
    sizes = [[x.dim_value for x in y.type.tensor_type.shape.dim] for y in graph.input]
    assert sizes == [[1, 16, 0, 0, 0], [1], [1, 512, 4096]]


def test_what_depends_on_the_grid_is_open():
    """Rotary tables have a row for each token."""
    real, dynamic = find_model("cogvideox-5b"), torch.export.Dim.DYNAMIC
    shapes = real.dynamic_grid(real.size())
    tables = {0: dynamic}
    assert {name: x for name, x in shapes.items() if x is not None} == {
        "hidden_states": {1: dynamic, 3: dynamic, 4: dynamic},
        "image_rotary_emb": (tables, tables),
    }


@pytest.mark.parametrize("form", ["plugin", "standard"])
def test_export_takes_a_released_model_for_tensorrt(tmp_path, form):
    """Up to where TensorRT is needed, or with TensorRT-RTX to the engine. Narrow, one layer."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder, path, engine = tmp_path / "wan", tmp_path / "wan.trt.onnx", tmp_path / "wan.engine"
    find_model("wan-2.1-1.3b").model_class()(
        num_attention_heads=2, ffn_dim=64, num_layers=1
    ).save_pretrained(folder)
    model = ("--model", "wan-2.1-1.3b", "--pretrained", str(folder), "--frames", "17")
    result = run_here("export", "tensorrt", str(path), "--form", form, *model)
    assert result.returncode == 0, result.stderr
    assert not result.stderr and f"wrote {path}, " in result.stdout
    nodes = [x.op_type for x in onnx.load(path).graph.node if x.domain == "uta"]
    plugins = ["block_scores", "attend_tail", "attend_listed"]
    assert nodes == (plugins if form == "plugin" else [])
    rtx = ("--rtx", "--architecture", "89") if form == "standard" else ()
    package = "tensorrt_rtx" if rtx else "tensorrt"
    result = run_here("export", "engine", str(path), str(engine), *rtx)
    if package in sys.modules or (rtx and "tensorrt_rtx_bindings" in sys.modules):
        assert result.returncode == 0, result.stderr
        assert engine.stat().st_size > 1e6
    else:
        assert f"uta-fx: {package} could not be imported" in result.stderr


def test_export_gives_the_shipped_model_a_dtype(tmp_path):
    """One block of it, from a folder."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder, path = tmp_path / "weights", tmp_path / "model.onnx"
    pipeline = load_pipeline()
    blocks = pipeline.transformer.blocks[:1]
    pipeline.transformer.blocks = blocks
    pipeline.transformer.register_to_config(num_layers=1)
    pipeline.save_pretrained(folder)
    result = run_here("export", "onnx", str(path), "--weights", str(folder), "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    inputs = onnx.load(path).graph.input
    assert {x.type.tensor_type.elem_type for x in inputs} == {onnx.TensorProto.FLOAT16}
    result = run_here("export", "onnx", str(path), "--dtype", "int8")
    assert "--dtype must be auto, float32, float16 or bfloat16, got 'int8'" in result.stderr


def test_bench_looks_at_its_output_before_it_times(tmp_path):
    """A folder in the file's place, or no place at all: one sentence, and no table was begun."""
    for output in (tmp_path, "/dev/null/x.json"):
        result = run_here(
            "bench", "attention", "--shape", "tiny", "--device", "cpu", "--output", str(output)
        )
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.startswith(f"uta-fx: --output {output} cannot be written: ")
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "attention", "--shape", "tiny", "--device", "cpu"),
        ("bench", "tails", "--shape", "tiny", "--device", "cpu"),
        ("bench", "model", "--model", "wan-2.1-1.3b", "--layers", "1", "--device", "cpu"),
        ("study", "policies", "--device", "cpu"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
@pytest.mark.parametrize("density", ["0", "1.5"])
def test_densities_are_looked_at_before_anything_is_printed(density, command):
    """The first is right."""
    result = CliRunner().invoke(app, [*command, "--density", "0.5", "--density", density])
    assert isinstance(result.exception, ValueError) and not result.output
    assert str(result.exception) == f"density must be in (0, 1], got {float(density)}"


def test_bench_writes_what_it_timed(tmp_path):
    """Checked against float64, then timed; a row for each candidate, in the table and the file."""
    output = tmp_path / "tiny.json"
    rows = bench.run(
        ["tiny"], [0.3], device="cpu", dtype=torch.float32, rounds=2, compile=False, output=output
    )
    assert json.loads(output.read_text())["rows"] == rows
    assert {"scores", "kernels", "operation"} < {row["what"] for row in rows}
    # ceil(0.3 * 2 heads * 8 query blocks * 8 key blocks) are exact
    assert {row["kept"] for row in rows if row["density"]} == {39 / 128}
    draw(tmp_path / "tiny.png", rows, "title")
    assert (tmp_path / "tiny.png").stat().st_size > 10000


def test_bench_times_what_is_asked_for():
    rows = bench.run(
        ["tiny"], [0.3], device="cpu", dtype=torch.float32, rounds=2, compile=False,
        only=["in order", "routing"],
    )  # fmt: skip
    timed = {row["what"]: row for row in rows}
    assert set(timed) - {"in order", "routing"} == {"dense flash", "statistics", "scores"}
    assert 0 < timed["in order"]["error"] < 0.5
    with pytest.raises(ValueError, match=r"only must be .* got all, nothing"):
        bench.run(["tiny"], device="cpu", only=["nothing", "all"])


@pytest.mark.parametrize(
    ("operator", "message", "change"),
    [
        (
            "block_masked_attention",
            "output of block_masked_attention .* nothing is",
            lambda result: (result[0] * 1.001, result[1]),
        ),
        ("block_scores", "scores differs from float64 .* nothing is", lambda x: x * 1.001),
        (
            "block_statistics",
            "mean of values of blocks differs from float64: nothing is",
            lambda result: (*result[:2], result[2] * 1.001, *result[3:]),
        ),
        (
            "select_blocks",
            "select_blocks keeps other blocks than its rule: nothing is",
            lambda mask: mask.flip(-1),
        ),
        (
            "fit_tail",
            "gain of a fitted tail differs from float64 .* nothing is",
            lambda result: (result[0], result[1] * 1.001),
        ),
    ],
)
def test_bench_times_nothing_that_is_wrong(
    monkeypatch, capsys, tmp_path, operator, message, change
):
    """A thousandth of a number is enough; there is no row and no file then."""
    compute = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args: change(compute(*args)))
    with pytest.raises(ArithmeticError, match=message):
        bench.run(
            ["tiny"], [0.3], device="cpu", dtype=torch.float32, rounds=2, compile=False,
            output=tmp_path / "tiny.json",
        )  # fmt: skip
    machine, header = capsys.readouterr().out.splitlines()
    assert "structured inputs" in machine and header.split()[0] == "shape"
    assert not list(tmp_path.iterdir())


def test_tails_are_timed_on_the_same_lists(tmp_path):
    """Each once, checked first; a tail costs operations, and without one there is most error."""
    output = tmp_path / "tails.json"
    rows = bench_tails.run(
        "tiny", [0.1], device="cpu", dtype=torch.float32, rounds=2, compile=False, output=output
    )
    assert json.loads(output.read_text())["rows"] == rows
    assert [row["tail"] for row in rows] == list(bench_tails.TAILS)
    none, *others = rows
    assert none["tail_ms"] == none["making"] == none["flops"] == 0
    assert all(row["flops"] > 0 and row["making"] > 0 for row in others)
    assert {row["tail"] for row in rows if row["fit"] is not None} == {"first_order", "gaussian"}
    assert all(row["error"] < none["error"] for row in others)
    with pytest.raises(ValueError, match=r"shape must be one of .*, got 'huge'"):
        bench_tails.run("huge")


def test_bench_takes_policies_that_ask_where_tokens_lie_and_refuses_other_operators():
    rows = bench.run(
        ["tiny"], [0.3], config=uta_fx.Config(policy="window"), device="cpu",
        dtype=torch.float32, rounds=2, compile=False,
    )  # fmt: skip
    assert "operation" in {row["what"] for row in rows}
    for config in (uta_fx.Config(policy="svg2"), uta_fx.Config(tail="rectified")):
        with pytest.raises(ValueError, match="uta-fx study policies times them; got policy"):
            bench.run(["tiny"], [0.3], config=config, device="cpu")


@pytest.mark.parametrize(
    ("name", "whole"), [("wan-2.1-1.3b", True), ("hunyuanvideo", False), ("hunyuanvideo", True)]
)
def test_a_model_is_timed_dense_and_sparse(monkeypatch, tmp_path, name, whole):
    """A row for each density after the dense one; the outputs are compared.

    A block of HunyuanVideo has a mask whose making it does not show.
    """
    real = REAL_MODELS[name]
    narrow = {"num_attention_heads": 2} | ({"ffn_dim": 256} if "ffn_dim" in real.settings else {})
    small = dataclasses.replace(
        real,
        settings={**real.settings, **narrow},
        sizes={"small": Size(height=64, width=96, frames=17)},
    )
    monkeypatch.setitem(REAL_MODELS, "small", small)
    output = tmp_path / "small.json"
    config = uta_fx.Config(min_tokens=64, inner="eager", strict=name != "hunyuanvideo")
    rows = bench_model.run(
        ["small"], [1.0, 0.3], config=config, whole=whole, layers=1, rounds=1, device="cpu",
        output=output,
    )  # fmt: skip
    assert json.loads(output.read_text()) == rows
    assert [row["density"] for row in rows] == [None, 1.0, 0.3]
    assert {row["tokens"] for row in rows} == {5 * 4 * 6}
    dense, full, sparse = rows
    assert dense["error"] == 0 and full["error"] < 2e-2 and sparse["error"] > 2 * full["error"]


def test_a_missing_package_names_its_extra():
    """Without typer the command says what to install."""
    script = "import sys; sys.modules['typer'] = None; from uta_fx.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'uta-fx[demo]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_generate_writes_pictures_and_a_table(tmp_path):
    """The whole way, few steps: two pictures, nothing half written, a table of numbers."""
    output = tmp_path / "new" / "folder"
    result = run(
        "generate", "--steps", "2", "--output", str(output), "--device", "cpu",
        "--prompt", "a red disc moves left over dark green stripes",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["comparison.gif", "contact_sheet.png"]
    for label in ("density", "time a step", "speed-up", "PSNR", "SSIM", "probe agreement"):
        assert label in result.stdout
    gif = Image.open(output / "comparison.gif")
    assert gif.n_frames == 16


def test_explain_lists_every_site(tmp_path):
    """Eight layers of self-attention sparse, eight of cross-attention dense; the graph in files."""
    result = run("explain", "--dump", str(tmp_path / "graphs"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("self-attention over video tokens") == 8
    assert "8 of 16 sites sparse, 1 graph" in result.stdout
    files = sorted(tmp_path.rglob("*.*"))
    assert [path.name for path in files] == ["graph_0.dot", "graph_0.py"]
    assert all(str(path) in result.stdout for path in files)


def test_explain_needs_no_weights_of_a_released_model():
    """Its configuration, another size: as a table, and the same as JSON."""
    size = ("--height", "256", "--width", "320", "--frames", "97", "--density", "0.1")
    arguments = ("explain", "--model", "wan-2.1-1.3b", "--min-tokens", "1024", *size)
    result = run_here(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Wan 2.1 1.3B, 256 x 320, 97 frames, density 0.1\n")
    assert "blocks.1-28.attn1" in result.stdout and "30 of 60 sites sparse" in result.stdout
    report = json.loads(run_here(*arguments, "--json").stdout)
    assert (report["model"], report["frames"], report["density"]) == ("wan-2.1-1.3b", 97, 0.1)
    assert report["sites"][2]["count"] == 28 and report["sites"][2]["grid"] == [25, 16, 20]
    assert f"{report['ideal_speedup']:.2f}x fewer operations" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "wan"), "model must be one of wan-2.1-1.3b, wan-2.1-14b, hunyuanvideo,"),
        (("--model", "mochi", "--frames", "8"), "frames must be one more than a multiple of 6"),
        (("--height", "64"), "--height needs --model"),
    ],
)
def test_explain_refuses_what_is_not_there(arguments, message):
    """In one sentence."""
    result = run_here("explain", *arguments)
    assert result.returncode == 2 and result.stderr.startswith(f"uta-fx: {message}")
    assert len(result.stderr.strip().splitlines()) == 1


def test_pictures_show_what_they_are_given(tmp_path):
    """Frames keep their order and the difference is amplified."""
    dense = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    sparse = dense.clone()
    sparse[1, 0, 2] += 0.1
    rows = pictures.comparison_rows(dense, sparse)
    assert rows["difference x4"][1, 0, 2].allclose(torch.tensor(0.4))
    pictures.write_gif(tmp_path / "a.gif", rows, zoom=2)
    gif = Image.open(tmp_path / "a.gif")
    assert gif.n_frames == 4
    pictures.write_contact_sheet(tmp_path / "a.png", ["one", "two"], rows, frames=3)
    assert Image.open(tmp_path / "a.png").size[0] > 100


@pytest.mark.parametrize("suffix", pictures.VIDEO_SUFFIXES)
def test_videos_stand_side_by_side(tmp_path, suffix):
    """Every frame, in the order that they are given; an odd height becomes even in an MP4."""
    dark = (torch.arange(4) / 10)[:, None, None].expand(3, 4, 33, 20)
    light = 1 - dark
    path = tmp_path / f"a{suffix}"
    pictures.write_side_by_side(path, {"dark": dark, "light": light})
    with imageio.get_reader(path) as reader:
        frames = [np.asarray(frame)[..., :3] for frame in reader]
    assert len(frames) == 4
    for index, frame in enumerate(frames):
        left, right = frame[22:47, 4:16].mean(), frame[22:47, 28:40].mean()
        assert abs(left - 25.5 * index) < 8  # the codec's 3 %
        assert abs(right - 255 + 25.5 * index) < 8
    with pytest.raises(ValueError, match=r"path must end in .mp4 or .gif, got .*a.webm"):
        pictures.write_side_by_side(tmp_path / "a.webm", {"dark": dark})
