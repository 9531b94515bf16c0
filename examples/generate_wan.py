"""Wan 2.1, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_wan.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_wan.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --density 0.1
    python examples/generate_wan.py --tiny
    python examples/generate_wan.py --random --steps 10

Wan 2.2 works too (``--model Wan-AI/Wan2.2-T2V-A14B-Diffusers``): both of its transformers are
enabled. Guidance is two calls of the transformer a step, with and without the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, WanPipeline

import side_by_side
import uta_fx

NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, deformed, still picture"


def main(argv: Sequence[str] | None = None) -> None:
    args = side_by_side.arguments(
        argv, __doc__, model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        height=480, width=832, frames=81, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it: the VAE in float32.
    pipe = side_by_side.random_pipeline(args, "wan")
    if pipe is None:
        vae = AutoencoderKLWan.from_pretrained(
            args.model, subfolder="vae", torch_dtype=torch.float32
        )
        pipe = WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=side_by_side.DTYPE)
    side_by_side.place(pipe, args.offload)

    def generate(clock: side_by_side.Clock) -> torch.Tensor:
        return pipe(
            prompt=args.prompt,
            negative_prompt=NEGATIVE,
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=clock,
            output_type="pt",
        ).frames[0]

    dense = side_by_side.timed_dense(args, pipe, generate)

    # The line that this is about.
    uta_fx.enable(pipe, side_by_side.config_of(args), fullgraph=True)
    sparse = side_by_side.timed(generate)

    side_by_side.show(args, dense, sparse, frames_per_second=16)


if __name__ == "__main__":
    main()
