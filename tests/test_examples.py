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
    assert example.compare(tmp_path, 2, inner="eager") >= 45
    assert (tmp_path / "comparison.gif").stat().st_size > 0
