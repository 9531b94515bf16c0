"""LTX-Video, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_ltx.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_ltx.py --height 704 --width 1216 --density 0.2
    python examples/generate_ltx.py --tiny
    python examples/generate_ltx.py --random --steps 10

Its VAE compresses 32 times in height and width: at the default size there are only 6930 tokens.
Guidance is a batch of two: each sample has its own budget of exact blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import LTXPipeline

import side_by_side
import uta_fx

NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"


def main(argv: Sequence[str] | None = None) -> None:
    args = side_by_side.arguments(
        argv, __doc__, model="Lightricks/LTX-Video",
        height=480, width=704, frames=161, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it.
    pipe = side_by_side.random_pipeline(args, "ltx")
    if pipe is None:
        pipe = LTXPipeline.from_pretrained(args.model, torch_dtype=side_by_side.DTYPE)
    side_by_side.place(pipe, args.offload)

    def generate(clock: side_by_side.Clock) -> torch.Tensor:
        return pipe(
            prompt=args.prompt,
            negative_prompt=NEGATIVE,
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=clock,
            output_type="pt",
        ).frames[0]

    dense = side_by_side.timed_dense(args, pipe, generate)

    # The line that this is about.
    uta_fx.enable(pipe, side_by_side.config_of(args), fullgraph=True)
    sparse = side_by_side.timed(generate)

    side_by_side.show(args, dense, sparse, frames_per_second=24)


if __name__ == "__main__":
    main()
