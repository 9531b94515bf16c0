"""Exported files on a GPU: the plugin's node against the operator, and a whole model.

``python -m uta_fx.bench.onnx`` times the node, ``--whole`` a Wan 1.3B of random weights instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
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


def wan_1_3b(layers: int, device: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Wan 1.3B of random weights, float16, and its inputs at 480p and 81 frames; always the same.

    Random weights of a process are those of another on the same device.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=layers, rope_max_seq_len=1024,
        ).half().eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 21, 60, 104, generator=generator),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator),
    }
    return model, {name: x.half().to(device) for name, x in inputs.items()}


def export_whole(path: Path, layers: int, density: float, opset: int, device: str) -> None:
    """Write Wan 1.3B to a file; a density of 1 leaves every attention dense."""
    model, inputs = wan_1_3b(layers, device)
    config = uta_fx.Config(density=density)
    if density == 1:
        config = dataclasses.replace(config, min_tokens=NOT_ASKED_FOR)
    kwargs = {**inputs, "return_dict": False}
    uta_fx.export_onnx(model, (), path, config=config, kwargs=kwargs, opset=opset)


def bench_whole(layers: int, density: float, rounds: int, opset: int) -> None:
    """Print the time of one forward of Wan 1.3B: PyTorch and ONNX Runtime, dense and sparse.

    Two processes write the files while this one compiles for PyTorch.

    Raises:
        ArithmeticError: A file's output is not that of the compiled model.
        RuntimeError: A file could not be written; what its process said is printed before.
    """
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        densities = {"dense": 1.0, "sparse": density}
        paths = {name: Path(folder) / f"{name}.onnx" for name in densities}
        writers = {
            name: subprocess.Popen(
                [
                    sys.executable, "-m", "uta_fx.bench.onnx", "--export", str(path),
                    "--layers", str(layers), "--density", str(densities[name]),
                    "--opset", str(opset),
                ]
            )
            for name, path in paths.items()
        }  # fmt: skip
        try:
            calls, expected = _torch_calls(layers, density, say)
            for name, writer in writers.items():
                if writer.wait():
                    raise RuntimeError(f"the {name} file was not written (see above)")
                size = sum(file.stat().st_size for file in Path(folder).glob(f"{name}.onnx*"))
                say(f"{name}.onnx is written, {size / 1e9:.2f} GB")
        finally:
            for writer in writers.values():
                writer.kill()
        inputs = wan_1_3b(0, "cuda")[1]
        outputs = {}
        for name, path in paths.items():
            session = uta_fx.onnxruntime_session(path, PROVIDERS)
            say(f"{name}.onnx is loaded")
            outputs[name] = torch.empty_like(expected[name])
            binding = bind_tensors(session, inputs, {"output": outputs[name]})
            calls[f"onnx {name}"] = _bound(session, binding)
            torch.cuda.synchronize()
            calls[f"onnx {name}"]()
            say(f"{name}.onnx has run")
        _compare(outputs, expected)
        times = time_interleaved(calls, rounds, "cpu", warmup=1)
        say(f"Wan 1.3B 480p, {layers} layers, density {density}, opset {opset}, {rounds} rounds")
    for name, samples in times.items():
        spread = f"{min(samples):.1f} to {max(samples):.1f}"
        print(f"  {name:<16}{statistics.median(samples):9.1f} ms  ({spread})", flush=True)


def _torch_calls(
    layers: int, density: float, say: Callable[[str], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Tensor]]:
    """The compiled models, and what they compute."""
    model, inputs = wan_1_3b(layers, "cuda")
    kwargs = {**inputs, "return_dict": False}
    options: dict[str, Any] = {"density": density}
    models = {
        "dense": torch.compile(model, fullgraph=True),
        "sparse": torch.compile(model, backend="uta", fullgraph=True, options=options),
    }
    expected = {}
    for name, compiled in models.items():
        expected[name] = compiled(**kwargs)[0]
        torch.cuda.synchronize()
        say(f"torch {name} is compiled")
    return {f"torch {name}": _waiting(x, kwargs) for name, x in models.items()}, expected


def _compare(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Print differences in norm, and raise where a file is further off than sparsity itself."""

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a.float() - b.float()).norm() / b.float().norm()).item()

    scale = distance(expected["sparse"], expected["dense"])
    print(f"  torch sparse from torch dense: {scale:.2e}")
    errors = {name: distance(outputs[name], expected[name]) for name in outputs}
    for name, error in errors.items():
        print(f"  onnx {name} from torch {name}: {error:.2e}", flush=True)
    if not all(error < max(scale, 1e-2) for error in errors.values()):
        raise ArithmeticError("a file computes something else: nothing is timed")


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
    parser.add_argument("--whole", action="store_true", help="Wan 1.3B instead of a node")
    parser.add_argument("--layers", type=int, default=30, help="of Wan 1.3B")
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--export", type=Path, help="only write Wan 1.3B to this file")
    parser.add_argument("--device", default="cuda", help="on which --export makes the weights")
    given = parser.parse_args()
    if given.export:
        export_whole(given.export, given.layers, given.density, given.opset, given.device)
        return
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}", flush=True)
    if given.whole:
        bench_whole(given.layers, given.density, given.rounds, given.opset)
    else:
        bench_node(given.shape, given.density, given.rounds)


if __name__ == "__main__":
    main()
