"""The examples run."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import uta_fx
from uta_fx.moving_shapes import load_pipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OLDEST = ROOT / ".venv" / "onnxruntime-1.22"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the shipped model as a file and a clip of it, by a process without torch."""
    for package in ("diffusers", "onnxruntime", "onnxscript", "PIL"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("exported")
    load("export_onnx").export(folder)
    assert "8 sparse attentions in the file" in generate(sys.executable, folder)
    return folder


def generate(python, folder):
    """Two steps of the example by another process; returns what it says."""
    command = [python, EXAMPLES / "export_onnx.py", folder, "2", "--generate-only"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assert_nothing_is_copied(run, monkeypatch):
    """What a session is bound to it reads when it runs, and its output is the tensor."""
    bound, bind = [], uta_fx.bind_tensors

    def bind_empty(session, inputs, outputs):
        """Inputs get their numbers after they are bound."""
        numbers = [x.clone() for x in inputs.values()]
        for x in inputs.values():
            x.fill_(torch.nan)
        binding = bind(session, inputs, outputs)
        for x, wanted in zip(inputs.values(), numbers, strict=True):
            x.copy_(wanted)
        bound.append((binding, outputs))
        return binding

    monkeypatch.setattr(uta_fx, "bind_tensors", bind_empty)
    assert run() < 1e-6
    ((binding, outputs),) = bound
    addresses = [x.data_ptr() for x in binding.get_outputs()]
    assert addresses == [x.data_ptr() for x in outputs.values()]


@torch.no_grad()
def test_a_clip_without_torch_is_the_clip_with_it(exported, monkeypatch):
    """The goals are 45 dB and, for one call, a relative error of 1e-4."""
    example = load("export_onnx")
    model, arrays = load_pipeline().transformer, np.load(exported / "inputs.npz")
    inputs = {
        "hidden_states": torch.from_numpy(arrays["noise"]),
        "timestep": torch.full((1,), 700.0),
        "encoder_hidden_states": torch.from_numpy(arrays["words"]),
    }
    options = {"density": example.DENSITY, "inner": "eager"}
    expected = torch.compile(model, backend="uta", options=options)(**inputs, return_dict=False)[0]
    session = uta_fx.onnxruntime_session(exported / "model.onnx", ["CPUExecutionProvider"])
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    assert np.linalg.norm(output - expected.numpy()) <= 1e-4 * expected.norm()
    assert_nothing_is_copied(lambda: example.run_on_tensors(exported), monkeypatch)
    assert example.compare(exported, 2, inner="eager") >= 45
    assert (exported / "comparison.gif").stat().st_size > 0


def test_the_oldest_onnx_runtime_generates_the_same_clip(exported, tmp_path):
    """Versions round differently, and no more: a relative error of 1e-4 is the goal."""
    if not (OLDEST / ".ready").is_file():
        pytest.skip(f"needs ONNX Runtime 1.22: make {(OLDEST / '.ready').relative_to(ROOT)}")
    for name in ("model.onnx", "inputs.npz"):
        shutil.copy(exported / name, tmp_path)
    assert generate(OLDEST / "bin" / "python", tmp_path).startswith("ONNX Runtime 1.22.")
    clip, expected = (np.load(folder / "clip.npy") for folder in (tmp_path, exported))
    assert np.linalg.norm(clip - expected) <= 1e-4 * np.linalg.norm(expected)


def test_an_engine_is_built_where_there_is_no_gpu(tmp_path, capsys):
    """By TensorRT-RTX, of the shipped model's first layer: all of them take half a minute."""
    pytest.importorskip("diffusers")
    pytest.importorskip("onnxscript")
    pytest.importorskip("tensorrt_rtx_bindings")
    example = load("export_tensorrt")
    pipeline = example.load_pipeline()
    pipeline.transformer.blocks = pipeline.transformer.blocks[:1]
    path, engine = tmp_path / "model.trt.onnx", tmp_path / "model.engine"
    example.export(pipeline, path, "standard")
    assert "1 of 2 sites sparse" in capsys.readouterr().out
    example.build(path, engine, "tensorrt_rtx_bindings")
    assert engine.stat().st_size > 1e6


def test_without_tensorrt_the_example_says_what_to_install(monkeypatch):
    """Before it does anything."""
    pytest.importorskip("diffusers")
    example = load("export_tensorrt")
    monkeypatch.setattr(example, "find_tensorrt", lambda: None)
    monkeypatch.setattr(sys, "argv", ["export_tensorrt.py"])
    with pytest.raises(SystemExit, match=r"pip install 'uta-fx\[tensorrt-rtx\]'"):
        example.main()
