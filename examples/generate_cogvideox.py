"""CogVideoX, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_cogvideox.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_cogvideox.py --density 0.1 --dense-until 0.3 --offload
    python examples/generate_cogvideox.py --tiny

Text and video are one sequence here: the video's part becomes sparse, every text token stays exact.
Guidance is a batch of two: each sample has its own budget of exact blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import CogVideoXPipeline

import uta_fx
from side_by_side import DTYPE, Clock, arguments, place, show, timed
from uta_fx.study.pipelines import tiny_pipeline


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(
        argv, __doc__, model="THUDM/CogVideoX-5b",
        height=480, width=720, frames=49, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it, its VAE in tiles to save memory.
    if args.tiny:
        pipe = tiny_pipeline("cogvideox")
    else:
        pipe = CogVideoXPipeline.from_pretrained(args.model, torch_dtype=DTYPE)
    pipe.vae.enable_tiling()
    place(pipe, args.offload)

    def generate(clock: Clock) -> torch.Tensor:
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

    show(args, dense, sparse, frames_per_second=8)


if __name__ == "__main__":
    main()
