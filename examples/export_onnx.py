"""Export the shipped model to ONNX and generate a clip with ONNX Runtime alone.

    python examples/export_onnx.py [folder] [steps]

Four steps, each a function below: export the model with sparse attention inside, generate a clip
from the file in a process that never imports torch, run the file on tensors of PyTorch where they
lie, generate the same clip in PyTorch and compare.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

PROMPT = "a red disc moves right and a cyan star moves left over dark purple stripes"
DENSITY = 0.2


def export(folder: Path) -> None:
    """Write the denoiser, what the prompt says, and the noise to start from."""
    import torch

    import uta_fx
    from uta_fx.moving_shapes import load_pipeline, parse_prompt
    from uta_fx.moving_shapes.scenes import pack, tokenize

    pipeline = load_pipeline()
    noise = np.random.default_rng(0).standard_normal((1, 3, 16, 64, 64), dtype=np.float32)
    with torch.no_grad():
        words = pipeline.prompt_encoder(tokenize(pack([parse_prompt(PROMPT)])))
    np.savez(folder / "inputs.npz", noise=noise, words=words.numpy())

    explanation = uta_fx.export_onnx(
        pipeline.transformer,
        (),
        folder / "model.onnx",
        config=uta_fx.Config(density=DENSITY),
        kwargs={
            "hidden_states": torch.from_numpy(noise),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": words,
            "return_dict": False,
        },
    )
    print(explanation)


def generate_without_torch(folder: Path, steps: int) -> None:
    """The whole sampler: the file, ONNX Runtime and two lines of arithmetic a step."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    metadata = session.get_modelmeta().custom_metadata_map
    sparse = [site["name"] for site in json.loads(metadata["uta_fx.sites"]) if site["sparse"]]
    print(f"ONNX Runtime {onnxruntime.__version__}: {len(sparse)} sparse attentions in the file")

    inputs = np.load(folder / "inputs.npz")
    clip, words = inputs["noise"], inputs["words"]
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)  # share of noise, from all to none
    for sigma, next_sigma in itertools.pairwise(sigmas):
        velocity = session.run(
            ["output"],
            {
                "hidden_states": clip,
                "timestep": np.full(1, 1000 * sigma, np.float32),
                "encoder_hidden_states": words,
            },
        )[0]
        clip = clip + (next_sigma - sigma) * velocity
    np.save(folder / "clip.npy", np.clip((clip + 1) / 2, 0, 1))
    assert "torch" not in sys.modules


def run_on_tensors(folder: Path) -> float:
    """One call beside torch: the session reads and writes its tensors, and nothing is copied.

    Returns the relative error to the call with numpy.
    """
    import torch

    import uta_fx

    session = uta_fx.onnxruntime_session(folder / "model.onnx")  # on a GPU by our kernels
    on_gpu = torch.cuda.is_available() and "CUDAExecutionProvider" in session.get_providers()
    device = "cuda" if on_gpu else "cpu"
    inputs = np.load(folder / "inputs.npz")
    tensors = {
        "hidden_states": torch.from_numpy(inputs["noise"]).to(device),
        "timestep": torch.full((1,), 1000.0, device=device),
        "encoder_hidden_states": torch.from_numpy(inputs["words"]).to(device),
    }
    velocity = torch.empty_like(tensors["hidden_states"])
    binding = uta_fx.bind_tensors(session, tensors, {"output": velocity})
    if on_gpu:
        torch.cuda.synchronize()  # the session has a stream of its own
    session.run_with_iobinding(binding)
    arrays = {name: x.cpu().numpy() for name, x in tensors.items()}
    expected = torch.from_numpy(session.run(["output"], arrays)[0])
    return ((velocity.cpu() - expected).norm() / expected.norm()).item()


def compare(folder: Path, steps: int, inner: str = "inductor") -> float:
    """The same clip by the torch.compile backend, both side by side; how far apart they are."""
    import torch

    import uta_fx
    from uta_fx.generate import psnr
    from uta_fx.moving_shapes import load_pipeline
    from uta_fx.pictures import comparison_rows, write_gif

    pipeline = load_pipeline()
    uta_fx.enable(pipeline, uta_fx.Config(density=DENSITY, inner=inner))
    noise = torch.from_numpy(np.load(folder / "inputs.npz")["noise"])
    by_torch = pipeline([PROMPT], steps=steps, latents=noise)
    by_onnx = torch.from_numpy(np.load(folder / "clip.npy"))
    pictures = comparison_rows(by_torch, by_onnx).values()
    labels = ("PyTorch", "ONNX", "difference x4")
    write_gif(folder / "comparison.gif", dict(zip(labels, pictures, strict=True)))
    return psnr(by_torch, by_onnx)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "folder", type=Path, nargs="?", default=Path("onnx_demo"), help="to write to"
    )
    options.add_argument("steps", type=int, nargs="?", default=16, help="denoising steps")
    options.add_argument("--generate-only", action="store_true", help="from a folder made before")
    given = options.parse_args()
    if given.generate_only:
        return generate_without_torch(given.folder, given.steps)
    given.folder.mkdir(exist_ok=True)
    export(given.folder)
    again = [sys.executable, __file__, str(given.folder), str(given.steps), "--generate-only"]
    subprocess.run(again, check=True)
    error = run_on_tensors(given.folder)
    print(f"on tensors of PyTorch, without a copy: the same to a relative error of {error:.0e}")
    print(f"PyTorch and ONNX Runtime agree to {compare(given.folder, given.steps):.1f} dB")
    print(f"{given.folder}/comparison.gif: PyTorch, ONNX Runtime, and their difference")


if __name__ == "__main__":
    main()
