"""Exported files on a GPU: the plugin's node against the operator, and a whole model.

``python -m uta_fx.bench.onnx`` times the node, ``--whole`` a Wan 1.3B of random weights instead.
The latter in two parts, of which the first leaves the GPU to others for a minute or two:
``--export-only FOLDER`` writes the files, ``--time-only FOLDER`` runs them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import uta_fx
from uta_fx.attention import list_arguments, operator_arguments, pool_blocks, reorder_tokens
from uta_fx.bench.attention import time_interleaved
from uta_fx.bench.inputs import SHAPES, structured_inputs
from uta_fx.export.onnx_functions import node_model
from uta_fx.kernels import ops

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
NOT_ASKED_FOR = 1 << 30
DTYPE = torch.float16  # of the model and its inputs
GRID = (21, 30, 52)


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
            for x in list_arguments(operator_arguments(selection, *ordered[1:], config))
        ]
    expected, expected_lse = ops.sparse_attention(*arguments)
    output, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    with tempfile.TemporaryDirectory() as folder:
        model, inputs = node_model(arguments)
        onnx.save(model, Path(folder) / "node.onnx")
        session = uta_fx.onnxruntime_session(Path(folder) / "node.onnx", PROVIDERS)
    binding = uta_fx.bind_tensors(session, inputs, {"output": output, "lse": lse})
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
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    for name, median in medians.items():
        share = median / medians["torch operator"]
        print(f"  {name:<16}{median:9.3f} ms  ({share:.2f} of the operator's)", flush=True)


def wan_1_3b(layers: int, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Wan 1.3B of random weights and its inputs at 480p and 81 frames; always the same.

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
    frames, height, width = GRID
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator),
    }
    return model, {name: x.to(device, DTYPE) for name, x in inputs.items()}


def export_whole(path: Path, layers: int, density: float, opset: int, device: str) -> None:
    """Write Wan 1.3B to a file; a density of 1 leaves every attention dense."""
    model, inputs = wan_1_3b(layers, device)
    config = uta_fx.Config(density=density)
    if density == 1:
        config = dataclasses.replace(config, min_tokens=NOT_ASKED_FOR)
    kwargs = {**inputs, "return_dict": False}
    uta_fx.export_onnx(model, (), path, config=config, kwargs=kwargs, opset=opset)


class Clock:
    """Prints what happens, and when."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"[{time.perf_counter() - self._start:5.0f} s] {text}", flush=True)


@contextlib.contextmanager
def writers_of(
    folder: Path, layers: int, density: float, opset: int, clock: Clock
) -> Iterator[Callable[[], None]]:
    """Two processes that write ``dense.onnx`` and ``sparse.onnx``; yields what waits for them.

    That raises ``RuntimeError`` where one of them fails; what it said is printed before.
    """
    writers = {
        name: subprocess.Popen(
            [
                sys.executable, "-m", "uta_fx.bench.onnx", "--export", str(path),
                "--layers", str(layers), "--density", str(share), "--opset", str(opset),
            ]
        )
        for name, path, share in (
            ("dense", folder / "dense.onnx", 1.0), ("sparse", folder / "sparse.onnx", density)
        )
    }  # fmt: skip

    def wait() -> None:
        for name, writer in writers.items():
            if writer.wait():
                raise RuntimeError(f"the {name} file was not written (see above)")
            size = sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*"))
            clock.say(f"{name}.onnx is written, {size / 1e9:.2f} GB")

    try:
        yield wait
    finally:
        for writer in writers.values():
            writer.kill()


def time_whole(
    folder: Path,
    layers: int,
    density: float,
    rounds: int,
    clock: Clock,
    *,
    wait: Callable[[], None] = lambda: None,
    providers: Sequence[str] = PROVIDERS,
    inner: str = "inductor",
) -> dict[str, list[float]]:
    """Time one forward of Wan 1.3B, dense and sparse, in PyTorch and from the two files.

    In PyTorch every block is compiled by itself, by ``inner`` or with ``backend="uta"``. Everything
    runs where the first of ``providers`` does.

    Args:
        folder: With ``dense.onnx`` and ``sparse.onnx``.
        layers: Of the model, as in the files.
        density: As in the second file.
        rounds: Timed forwards of each, in turns.
        clock: Says what is done.
        wait: Called before the files are read.
        providers: Of ONNX Runtime.
        inner: Compiles what is not ours.

    Returns:
        Milliseconds of each forward.

    Raises:
        ArithmeticError: A file's output is not that of the compiled model; nothing is timed.
    """
    device = "cuda" if providers[0].startswith("CUDA") else "cpu"
    with torch.no_grad():
        calls, expected = _torch_calls(layers, density, device, inner, clock)
        wait()
        inputs = wan_1_3b(0, device)[1]
        outputs = {}
        for name in expected:
            path = folder / f"{name}.onnx"
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            session = uta_fx.onnxruntime_session(path, providers, options=options)
            clock.say(f"{path.name} is loaded; {_placement(session, providers[0])}")
            outputs[name] = torch.empty_like(expected[name])
            binding = uta_fx.bind_tensors(session, inputs, {"output": outputs[name]})
            calls[f"onnx {name}"] = _bound(session, binding)
            _synchronize(device)
            calls[f"onnx {name}"]()
            clock.say(f"{path.name} has run")
        _compare(outputs, expected)
        times = time_interleaved(calls, rounds, "cpu", warmup=1)
    clock.say(f"Wan 1.3B 480p, {layers} layers, density {density}, {DTYPE}, {rounds} rounds")
    for name, samples in times.items():
        spread = f"{min(samples):.1f} to {max(samples):.1f}"
        print(f"  {name:<16}{statistics.median(samples):9.1f} ms  ({spread})", flush=True)
    return times


def _torch_calls(
    layers: int, density: float, device: str, inner: str, clock: Clock
) -> tuple[dict[str, Callable[[], Any]], dict[str, Tensor]]:
    """The models with compiled blocks, and what they compute."""
    config = uta_fx.Config(density=density, grid=GRID, inner=inner)
    calls, expected = {}, {}
    for name in ("dense", "sparse"):
        model, inputs = wan_1_3b(layers, device)
        if name == "sparse":
            uta_fx.enable(model, config, blocks=True, fullgraph=True)
        else:
            for block in model.get_submodule("blocks").children():
                block.compile(fullgraph=True, backend=inner)
        kwargs = {**inputs, "return_dict": False}
        expected[name] = model(**kwargs)[0]
        _synchronize(device)
        clock.say(f"torch {name} is compiled")
        calls[f"torch {name}"] = _waiting(model, kwargs, device)
    return calls, expected


def _placement(session: Any, provider: str) -> str:
    """How many operations run elsewhere than by a provider, and which most often."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return "where operations run is not known: ONNX Runtime is too old to say"
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    others = Counter(kind for place, kind in nodes if place != provider)
    most = ", ".join(f"{count} {kind}" for kind, count in others.most_common(6))
    return f"{others.total()} of {len(nodes)} operations not by {provider} ({most or 'none'})"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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


def _waiting(model: nn.Module, kwargs: dict[str, Any], device: str) -> Callable[[], None]:
    def call() -> None:
        model(**kwargs)
        _synchronize(device)

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
    parser.add_argument("--export", type=Path, help="write one file of Wan 1.3B and do no more")
    parser.add_argument("--export-only", type=Path, help="folder for both files of Wan 1.3B")
    parser.add_argument("--time-only", type=Path, help="folder with both files")
    parser.add_argument("--device", default="cuda", help="on which --export makes the weights")
    given = parser.parse_args()
    if given.export:
        export_whole(given.export, given.layers, given.density, given.opset, given.device)
        return
    clock = Clock()
    files = (given.layers, given.density, given.opset, clock)
    if given.export_only:
        given.export_only.mkdir(parents=True, exist_ok=True)
        with writers_of(given.export_only, *files) as wait:
            wait()
        return
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}", flush=True)
    if given.time_only:
        time_whole(given.time_only, given.layers, given.density, given.rounds, clock)
    elif given.whole:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with writers_of(folder, *files) as wait:
                time_whole(folder, given.layers, given.density, given.rounds, clock, wait=wait)
    else:
        bench_node(given.shape, given.density, given.rounds)


if __name__ == "__main__":
    main()
