"""Exported files on a GPU: the plugin's node against the operator, and a whole model.

``python -m uta_fx.bench.onnx`` times the node; ``--layers 30`` a Wan 1.3B of random weights too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

import uta_fx
from uta_fx.attention import operator_arguments, pool_blocks, reorder_tokens
from uta_fx.bench.attention import time_interleaved
from uta_fx.bench.inputs import SHAPES, structured_inputs
from uta_fx.export.onnx_functions import node_model
from uta_fx.export.onnxruntime_session import bind_tensors
from uta_fx.kernels import ops

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
NOT_ASKED_FOR = 1 << 30


def bench_node(shape_name: str, density: float, rounds: int) -> None:
    """Print the time of the plugin's node and of the operator on the same arguments.

    Raises:
        ArithmeticError: They differ by more than two roundings; nothing is timed.
    """
    config, shape = uta_fx.Config(density=density), SHAPES[shape_name]
    with torch.no_grad():
        query, key, value = structured_inputs(shape, "cuda", torch.bfloat16)
        ordered, _ = reorder_tokens(query, key, value, config, shape.grid)
        selection = pool_blocks(*ordered, config, None)
        arguments = [
            x.contiguous() if isinstance(x, Tensor) else x
            for x in operator_arguments(selection, *ordered[1:], config)
        ]
    expected, expected_lse = ops.sparse_attention(*arguments)
    output, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    with tempfile.TemporaryDirectory() as folder:
        model, inputs = node_model(arguments)
        onnx.save(model, Path(folder) / "node.onnx")
        session = uta_fx.onnxruntime_session(Path(folder) / "node.onnx", PROVIDERS)
    binding = bind_tensors(session, inputs, {"output": output, "lse": lse})
    torch.cuda.synchronize()
    session.run_with_iobinding(binding)
    difference = (output.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= 2 * torch.finfo(output.dtype).eps:
        raise ArithmeticError(f"plugin and operator differ by {difference:.1e}: nothing is timed")

    def operator() -> None:
        ops.sparse_attention(*arguments)
        torch.cuda.synchronize()

    calls = {"torch operator": operator, "onnx node": lambda: session.run_with_iobinding(binding)}
    times = time_interleaved(calls, rounds, "cpu")  # by the host's clock: the two have two streams
    print(f"{shape_name}, density {density}, largest difference {difference:.1e} of the output")
    for name, samples in times.items():
        print(f"  {name:<16}{statistics.median(samples):9.3f} ms")


def bench_model(layers: int, density: float, rounds: int, opset: int) -> None:
    """Print the time of one forward of Wan 1.3B at 480p and 81 frames, float16, random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=layers, rope_max_seq_len=1024,
        ).half().eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 21, 60, 104, device="cuda").half(),
        "timestep": torch.full((1,), 500.0, device="cuda").half(),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda").half(),
    }
    kwargs = {**inputs, "return_dict": False}
    sparse = uta_fx.Config(density=density)
    dense = dataclasses.replace(sparse, min_tokens=NOT_ASKED_FOR)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {}
        options: dict[str, Any] = {"density": density}
        fast = torch.compile(model, backend="uta", fullgraph=True, options=options)
        slow = torch.compile(model, fullgraph=True)
        expected = fast(**kwargs)[0]
        calls["torch dense"] = _waiting(slow, kwargs)
        calls["torch sparse"] = _waiting(fast, kwargs)
        for name, config in (("onnx dense", dense), ("onnx sparse", sparse)):
            path = Path(folder) / f"{name.replace(' ', '_')}.onnx"
            start = time.perf_counter()
            uta_fx.export_onnx(model, (), path, config=config, kwargs=kwargs, opset=opset)
            exported = time.perf_counter() - start
            session = uta_fx.onnxruntime_session(path, PROVIDERS)
            print(f"{name}: exported in {exported:.0f} s, loaded in"
                  f" {time.perf_counter() - start - exported:.0f} s", flush=True)  # fmt: skip
            output = torch.empty_like(expected)
            binding = bind_tensors(session, inputs, {"output": output})
            calls[name] = _bound(session, binding)
            calls[name]()
            error = (output.float() - expected.float()).norm() / expected.float().norm()
            print(f"  relative to torch sparse: {error.item():.2e}", flush=True)
        times = time_interleaved(calls, rounds, "cpu")
    print(f"Wan 1.3B 480p, {layers} layers, density {density}, opset {opset}")
    for name, samples in times.items():
        print(f"  {name:<16}{statistics.median(samples):9.1f} ms")


def _waiting(model: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[], None]:
    def call() -> None:
        model(**kwargs)
        torch.cuda.synchronize()

    return call


def _bound(session: Any, binding: Any) -> Callable[[], None]:
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="wan-1.3b-480p", help="of the node")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=0, help="of Wan 1.3B (it has 30); 0: none")
    parser.add_argument("--opset", type=int, default=23)
    given = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}", flush=True)
    bench_node(given.shape, given.density, given.rounds)
    if given.layers:
        bench_model(given.layers, given.density, given.rounds, given.opset)


if __name__ == "__main__":
    main()
