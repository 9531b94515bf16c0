"""The measurement of whole exported models runs to its end, on a small model and a CPU."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("triton")

from uta_fx.bench import onnx as bench  # noqa: E402  # needs onnx, onnxruntime
from uta_fx.export import onnxruntime_plugin  # noqa: E402  # needs onnx, Triton


def small_wan(layers, device):
    """Like ``bench.wan_1_3b``, in float32."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers, rope_max_seq_len=64,
        ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    frames, height, width = bench.GRID
    return model, {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
    }


def test_files_are_written_and_timed(tmp_path, monkeypatch, capsys):
    """Their outputs are those of the compiled models, or nothing would be timed."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "wan_1_3b", small_wan)
    monkeypatch.setattr(bench, "GRID", (8, 16, 32))
    for name, density in (("dense", 1.0), ("sparse", 0.3)):
        bench.export_whole(tmp_path / f"{name}.onnx", 1, density, 23, "cpu")
    variants = onnxruntime_plugin.variants_of(onnx.load(tmp_path / "sparse.onnx"), 90)
    (variant,) = variants["SparseAttention"]
    assert variant.representatives == 64 and variant.even
    times = bench.time_whole(
        tmp_path, 1, 0.3, 1, bench.Clock(), providers=("CPUExecutionProvider",), inner="eager"
    )
    assert list(times) == ["torch dense", "torch sparse", "onnx dense", "onnx sparse"]
    assert all(len(samples) == 1 for samples in times.values())
    said = capsys.readouterr().out
    assert "sparse.onnx is loaded; 0 of" in said and "by CPUExecutionProvider (none)" in said


def test_a_file_of_another_model_is_not_timed(tmp_path, monkeypatch):
    """Here one whose density is another."""
    a = {"dense": torch.ones(8), "sparse": torch.ones(8) + 0.01}
    bench._compare(a, a)
    with pytest.raises(ArithmeticError, match="something else"):
        bench._compare({"dense": a["dense"], "sparse": a["sparse"] + 0.1}, a)
