"""HunyuanVideo, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_hunyuan.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_hunyuan.py --height 544 --width 960 --frames 61 --offload
    python examples/generate_hunyuan.py --tiny

Video and text are one sequence here: the video's part becomes sparse, every text token stays exact.
The model knows its guidance from training, so a step is one call of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import HunyuanVideoPipeline

import uta_fx
from side_by_side import DTYPE, Clock, arguments, place, show, timed
from uta_fx.study.pipelines import tiny_pipeline


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(
        argv, __doc__, model="hunyuanvideo-community/HunyuanVideo",
        height=720, width=1280, frames=129, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it, its VAE in tiles: a whole clip would not fit a GPU.
    if args.tiny:
        pipe = tiny_pipeline("hunyuan_video")
    else:
        pipe = HunyuanVideoPipeline.from_pretrained(args.model, torch_dtype=DTYPE)
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

    show(args, dense, sparse, frames_per_second=15)


if __name__ == "__main__":
    main()
