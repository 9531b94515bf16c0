"""Export the shipped model for TensorRT, build an engine, and generate a clip with it.

    python examples/export_tensorrt.py [folder] [steps]

With TensorRT 10.9 or later (pip install 'uta-fx[tensorrt]') and a GPU, our kernels are compiled
into the engine. With TensorRT-RTX (pip install 'uta-fx[tensorrt-rtx]') the attention is standard
operations; its engine is built on any machine and runs on a GeForce or an RTX card. Three steps,
each a function below: export, build, and generate the clip both ways and compare.
"""

import argparse
import importlib
import importlib.util
import itertools
from pathlib import Path

import torch

import uta_fx
from uta_fx.generate import psnr
from uta_fx.moving_shapes import load_pipeline, parse_prompt
from uta_fx.moving_shapes.pipeline import CLIP_SHAPE
from uta_fx.moving_shapes.scenes import pack, tokenize
from uta_fx.pictures import comparison_rows, write_gif

PROMPT = "a red disc moves right and a cyan star moves left over dark purple stripes"
CONFIG = uta_fx.Config(density=0.2)


def find_tensorrt() -> str | None:
    """Which of the two is installed: first the one that has plugins."""
    names = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
    return next((name for name in names if importlib.util.find_spec(name)), None)


def start(pipeline) -> dict[str, torch.Tensor]:
    """The noise to start from, and what the prompt says."""
    noise = torch.randn(1, *CLIP_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = pipeline.prompt_encoder(tokenize(pack([parse_prompt(PROMPT)])))
    return {
        "hidden_states": noise, "timestep": torch.zeros(1), "encoder_hidden_states": words,
    }  # fmt: skip


def export(pipeline, path: Path, form: str) -> None:
    """The denoiser as an ONNX file; its sizes are those of the inputs, and stay so."""
    explanation = uta_fx.export_tensorrt(
        pipeline.transformer, (), path, config=CONFIG, form=form,
        kwargs={**start(pipeline), "return_dict": False},
    )  # fmt: skip
    print(explanation)


def build(path: Path, engine: Path, library: str) -> None:
    """TensorRT times kernels on the GPU of this machine; TensorRT-RTX needs none."""
    uta_fx.build_tensorrt_engine(path, engine, rtx=library != "tensorrt")
    print(f"{engine}: {engine.stat().st_size / 1e6:.0f} MB")


def generate(pipeline, engine: Path, library: str, steps: int) -> torch.Tensor:
    """The whole sampler: the engine, and two lines of arithmetic a step. PyTorch holds memory."""
    trt = importlib.import_module(library)
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    context = runtime.deserialize_cuda_engine(engine.read_bytes()).create_execution_context()
    tensors = {name: x.cuda() for name, x in start(pipeline).items()}
    tensors["output"] = torch.empty_like(tensors["hidden_states"])
    for name, x in tensors.items():
        context.set_tensor_address(name, x.data_ptr())
    stream = torch.cuda.Stream()
    sigmas = torch.linspace(1, 0, steps + 1).tolist()  # share of noise, from all to none
    with torch.cuda.stream(stream):
        for sigma, next_sigma in itertools.pairwise(sigmas):
            tensors["timestep"].fill_(1000 * sigma)
            context.execute_async_v3(stream.cuda_stream)
            tensors["hidden_states"].add_(tensors["output"], alpha=next_sigma - sigma)
    stream.synchronize()
    return ((tensors["hidden_states"] + 1) / 2).clamp(0, 1).cpu()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "folder", type=Path, nargs="?", default=Path("tensorrt_demo"), help="to write to"
    )
    options.add_argument("steps", type=int, nargs="?", default=16, help="denoising steps")
    given = options.parse_args()
    library = find_tensorrt()
    if library is None:
        raise SystemExit(
            "Neither TensorRT nor TensorRT-RTX is installed. With an NVIDIA GPU:"
            " pip install 'uta-fx[tensorrt]'; to build for a GeForce or RTX card, on any machine:"
            " pip install 'uta-fx[tensorrt-rtx]'"
        )
    given.folder.mkdir(exist_ok=True)
    form = "plugin" if library == "tensorrt" else "standard"
    path, engine = given.folder / "model.trt.onnx", given.folder / "model.engine"
    pipeline = load_pipeline()
    export(pipeline, path, form)
    build(path, engine, library)
    if not torch.cuda.is_available():
        raise SystemExit("The engine is built; there is no GPU here to run it on.")
    by_engine = generate(pipeline, engine, library, given.steps)
    noise = start(pipeline)["hidden_states"]
    uta_fx.enable(pipeline.to("cuda"), CONFIG)
    by_torch = pipeline([PROMPT], steps=given.steps, latents=noise).cpu()
    labels = ("PyTorch", "TensorRT", "difference x4")
    rows = zip(labels, comparison_rows(by_torch, by_engine).values(), strict=True)
    write_gif(given.folder / "comparison.gif", dict(rows))
    print(f"PyTorch and TensorRT agree to {psnr(by_torch, by_engine):.1f} dB")
    print(f"{given.folder}/comparison.gif: PyTorch, TensorRT, and their difference")


if __name__ == "__main__":
    main()
