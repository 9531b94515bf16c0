"""The tiny pipelines' latents, for tests with and without a GPU."""

import torch

GRID = (5, 6, 8)  # of 17 frames of 96 x 128 pixels, but for LTX-Video
GUIDANCE = {"hunyuan_video": {"negative_prompt": "", "true_cfg_scale": 2.0}}


def generate(pipe, name, prompt="a red fox", steps=4, until=None, height=96):
    """Latents after each step, of ``steps`` or of the first ``until`` of them."""
    latents = []

    def keep(pipeline, step, timestep, tensors):
        latents.append(tensors["latents"].clone())
        pipeline._interrupt = len(latents) == until
        return tensors

    pipe(
        prompt=prompt, height=height, width=128, num_frames=17, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), callback_on_step_end=keep,
        output_type="latent", **GUIDANCE.get(name, {}),
    )  # fmt: skip
    return latents
