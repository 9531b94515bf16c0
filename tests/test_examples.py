"""The examples run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_clip_without_torch_is_the_clip_with_it(tmp_path, capsys):
    """Two steps in a process that never imports torch; the goal is 45 dB."""
    for package in ("diffusers", "onnxruntime", "onnxscript", "PIL"):
        pytest.importorskip(package)
    example = load("export_onnx")
    example.export(tmp_path)
    assert "8 of 16 sites sparse" in capsys.readouterr().out
    script = EXAMPLES / "export_onnx.py"
    subprocess.run([sys.executable, script, tmp_path, "2", "--generate-only"], check=True)
    assert example.run_on_tensors(tmp_path) < 1e-6
    assert example.compare(tmp_path, 2, inner="eager") >= 45
    assert (tmp_path / "comparison.gif").stat().st_size > 0


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
