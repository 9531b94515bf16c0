"""LTX-Video, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_ltx.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_ltx.py --height 704 --width 1216 --density 0.2
    python examples/generate_ltx.py --tiny

Its VAE compresses 32 times in height and width: at the default size there are only 6930 tokens.
Guidance is a batch of two: each sample has its own budget of exact blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import LTXPipeline

import uta_fx
from side_by_side import DTYPE, Clock, arguments, place, show, timed
from uta_fx.study.pipelines import tiny_pipeline

NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(
        argv, __doc__, model="Lightricks/LTX-Video",
        height=480, width=704, frames=161, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it.
    if args.tiny:
        pipe = tiny_pipeline("ltx")
    else:
        pipe = LTXPipeline.from_pretrained(args.model, torch_dtype=DTYPE)
    place(pipe, args.offload)

    def generate(clock: Clock) -> torch.Tensor:
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

    # What we compare with: every step dense, compiled by Inductor.
    uta_fx.enable(pipe, uta_fx.Config(dense_until=1, inner=args.inner), fullgraph=True)
    dense = timed(generate)
    uta_fx.disable(pipe)

    # The line that this is about. The first steps lay out the picture and stay dense.
    config = uta_fx.Config(
        density=args.density,
        dense_until=args.dense_until,
        min_tokens=args.min_tokens,
        inner=args.inner,
        strict=True,  # an error where a video self-attention would stay dense
    )
    uta_fx.enable(pipe, config, fullgraph=True)
    sparse = timed(generate)

    show(args, dense, sparse, frames_per_second=24)


if __name__ == "__main__":
    main()
