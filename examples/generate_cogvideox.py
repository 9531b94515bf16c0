"""CogVideoX, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_cogvideox.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_cogvideox.py --density 0.1 --dense-until 0.3 --offload
    python examples/generate_cogvideox.py --tiny
    python examples/generate_cogvideox.py --random --steps 10

Text and video are one sequence here: the video's part becomes sparse, every text token stays exact.
Guidance is a batch of two: each sample has its own budget of exact blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import CogVideoXPipeline

import side_by_side
import uta_fx


def main(argv: Sequence[str] | None = None) -> None:
    args = side_by_side.arguments(
        argv, __doc__, model="THUDM/CogVideoX-5b",
        height=480, width=720, frames=49, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it, its VAE in tiles to save memory.
    pipe = side_by_side.random_pipeline(args, "cogvideox")
    if pipe is None:
        pipe = CogVideoXPipeline.from_pretrained(args.model, torch_dtype=side_by_side.DTYPE)
    pipe.vae.enable_tiling()
    side_by_side.place(pipe, args.offload)

    def generate(clock: side_by_side.Clock) -> torch.Tensor:
        return pipe(
            prompt=args.prompt,
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=6.0,
            use_dynamic_cfg=True,
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=clock,
            output_type="pt",
        ).frames[0]

    dense = side_by_side.timed_dense(args, pipe, generate)

    # The line that this is about.
    uta_fx.enable(pipe, side_by_side.config_of(args), fullgraph=True)
    sparse = side_by_side.timed(generate)

    side_by_side.show(args, dense, sparse, frames_per_second=8)


if __name__ == "__main__":
    main()
