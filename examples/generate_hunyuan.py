"""HunyuanVideo, dense and sparse: the same prompt and noise, side by side, with times and PSNR.

    python examples/generate_hunyuan.py --prompt "a red fox runs through snow" --out fox.mp4
    python examples/generate_hunyuan.py --height 544 --width 960 --frames 61 --offload
    python examples/generate_hunyuan.py --tiny
    python examples/generate_hunyuan.py --random --steps 10

Video and text are one sequence here: the video's part becomes sparse, every text token stays exact.
The model knows its guidance from training, so a step is one call of the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import HunyuanVideoPipeline

import side_by_side
import uta_fx


def main(argv: Sequence[str] | None = None) -> None:
    args = side_by_side.arguments(
        argv, __doc__, model="hunyuanvideo-community/HunyuanVideo",
        height=720, width=1280, frames=129, steps=50,
    )  # fmt: skip

    # The pipeline as its authors load it, its VAE in tiles: a whole clip would not fit a GPU.
    pipe = side_by_side.random_pipeline(args, "hunyuan_video")
    if pipe is None:
        pipe = HunyuanVideoPipeline.from_pretrained(args.model, torch_dtype=side_by_side.DTYPE)
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
            generator=torch.Generator().manual_seed(args.seed),
            callback_on_step_end=clock,
            output_type="pt",
        ).frames[0]

    dense = side_by_side.timed_dense(args, pipe, generate)

    # The line that this is about.
    uta_fx.enable(pipe, side_by_side.config_of(args), fullgraph=True)
    sparse = side_by_side.timed(generate)

    side_by_side.show(args, dense, sparse, frames_per_second=15)


if __name__ == "__main__":
    main()
