"""The trained model as a diffusers pipeline: prompts in, clips out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from uta_fx.moving_shapes.render import FRAMES, SIZE
from uta_fx.moving_shapes.scenes import (
    PADDING,
    PROMPT_LENGTH,
    VOCABULARY_SIZE,
    pack,
    parse_prompt,
    tokenize,
)

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
except ImportError as error:
    raise ImportError(
        "uta_fx.moving_shapes.pipeline needs diffusers: pip install 'uta-fx[diffusers]'"
    ) from error

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the weights that ship with the package."""

CLIP_SHAPE = (3, FRAMES, SIZE, SIZE)


class PromptEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both name their file
    """Embeds the words of a prompt and lets them look at each other, so that colours find shapes.

    Args:
        vocabulary_size: Number of token ids.
        length: Number of tokens of every prompt.
        dim: Width of the embeddings.
        layers: Number of encoder layers.
        heads: Number of attention heads of a layer.
    """

    @register_to_config
    def __init__(
        self,
        vocabulary_size: int = VOCABULARY_SIZE,
        length: int = PROMPT_LENGTH,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, dim)
        self.positions = nn.Parameter(0.5 * torch.randn(length, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed prompts.

        Args:
            tokens: int64 [B, length].

        Returns:
            [B, length, dim], in the dtype of the weights.
        """
        return self.norm(self.blocks(self.words(tokens) + self.positions))


class MovingShapesPipeline(DiffusionPipeline):
    """Generates clips of moving shapes from prompts.

    Args:
        transformer: The denoiser; it predicts noise minus clip from their mixture.
        prompt_encoder: Embeds the prompts.
        scheduler: The noise schedule.
    """

    transformer: WanTransformer3DModel
    prompt_encoder: PromptEncoder
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        prompt_encoder: PromptEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, prompt_encoder=prompt_encoder, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 20,
        seed: int = 0,
        guidance_scale: float = 1.0,
        callback: Callable[[int, int], None] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Generate one clip a prompt.

        Args:
            prompts: B sentences such as ``"a red disc moves left over dark green stripes"``.
            steps: Denoising steps, at least 1.
            seed: Prompt i starts from noise of seed ``seed + i``, drawn on the CPU, so a clip
                depends neither on the device nor on its neighbours.
            guidance_scale: Classifier-free guidance. 1 (default) is none and costs one forward
                a step; any other value doubles the batch.
            callback: Called as ``callback(step, steps)`` after each step, ``step`` from 1.
            latents: Starting noise [B, 3, 16, 64, 64] in place of the seeds' (default None).

        Returns:
            float32 [B, 3, 16, 64, 64] on the pipeline's device, RGB in [0, 1].

        Raises:
            TypeError: If ``prompts`` is one string.
            ValueError: If there is no prompt, a prompt is not in the grammar, ``steps`` is
                under 1, or ``latents`` has another shape.
        """
        noise = _starting_noise(prompts, steps, seed, latents)
        device, dtype = self.device, self.prompt_encoder.dtype
        tokens = tokenize(pack([parse_prompt(prompt) for prompt in prompts])).to(device)
        guided = guidance_scale != 1.0
        if guided:
            tokens = torch.cat([torch.full_like(tokens, PADDING), tokens])
        words = self.prompt_encoder(tokens)

        self.scheduler.set_timesteps(
            sigmas=[1 - step / steps for step in range(steps)], device=device
        )
        # Naming the first step spares the scheduler a search that waits for the device.
        self.scheduler.set_begin_index(0)
        clips = noise.to(device=device, dtype=torch.float32)
        for step, timestep in enumerate(self.scheduler.timesteps, start=1):
            mixture = clips.to(dtype)
            if guided:
                mixture = torch.cat([mixture, mixture])
            velocity = self.transformer(
                hidden_states=mixture,
                timestep=timestep.expand(len(mixture)),
                encoder_hidden_states=words,
                return_dict=False,
            )[0].float()
            if guided:
                free, told = velocity.chunk(2)
                velocity = free + guidance_scale * (told - free)
            clips = self.scheduler.step(
                velocity,  # type: ignore[arg-type]  # diffusers says FloatTensor
                timestep,
                clips,  # type: ignore[arg-type]
                return_dict=False,
            )[0]
            if callback is not None:
                callback(step, steps)
        return clips.add(1).div(2).clamp(0, 1)


def load_pipeline(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    weights: str | Path = WEIGHTS,
) -> MovingShapesPipeline:
    """Load the trained pipeline.

    Args:
        device: Where to put it.
        dtype: Floating point type of its weights; they are stored as bfloat16.
        weights: Folder written by ``save_pretrained``; by default the one in this package.

    Returns:
        The pipeline, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
    """
    weights = Path(weights)
    if not (weights / "model_index.json").is_file():
        raise FileNotFoundError(
            f"weights: expected a folder with model_index.json, got {weights}; "
            "examples/train_small_wan.py trains and writes one"
        )
    pipeline = MovingShapesPipeline(
        transformer=WanTransformer3DModel.from_pretrained(
            weights / "transformer", torch_dtype=dtype
        ),
        prompt_encoder=PromptEncoder.from_pretrained(weights / "prompt_encoder", torch_dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(weights / "scheduler"),
    )
    return pipeline.to(device)


def _starting_noise(
    prompts: Sequence[str], steps: int, seed: int, latents: Tensor | None
) -> Tensor:
    if isinstance(prompts, str):
        raise TypeError("prompts: expected a list of strings, got one string")
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got none")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if latents is None:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return torch.stack([torch.randn(CLIP_SHAPE, generator=g) for g in generators])
    expected = (len(prompts), *CLIP_SHAPE)
    if tuple(latents.shape) != expected:
        raise ValueError(f"latents: expected {list(expected)}, got {list(latents.shape)}")
    return latents
