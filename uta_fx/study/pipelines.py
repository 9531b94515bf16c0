"""The pipelines of diffusers that people generate with, without their checkpoints.

The classes are those of the real pipelines, down to the tokenizers; the weights are random and the
vocabularies are made up, so that nothing is downloaded. What they show is noise. Everything is
small, so that it runs in seconds, or all but the transformer, which has its real size.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from typing import Any

import torch

from uta_fx._optional import require
from uta_fx.study.real_models import DTYPE, find_model

CHARACTERS = [c for c in string.printable if not c.isspace()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the other parts of a pipeline must fit.

    Attributes:
        transformer: The transformer; None for a small one.
        latents: Channels of a latent.
        text_dim: Channels of a text token.
        pooled_dim: Channels of a text as a whole, where a model has those.
        patch: Rows and columns of pixels that LTX-Video's VAE takes as one.
    """

    transformer: Any = None
    latents: int = 4
    text_dim: int = 16
    pooled_dim: int = 16
    patch: int = 1


def tiny_pipeline(name: str) -> Any:
    """A ``DiffusionPipeline`` with seeded random weights, float32, on the CPU.

    Args:
        name: One of ``PIPELINES``.

    Raises:
        ValueError: There is none of that name.
        ImportError: diffusers or transformers are not installed.
    """
    return _with_random_weights(name, Parts)


def real_size_pipeline(name: str, device: torch.device | str) -> Any:
    """As ``tiny_pipeline``, but the transformer has its real size, in bfloat16, on ``device``.

    Args:
        name: One of ``PIPELINES``.
        device: Where the transformer is made; a moment in float32.

    Raises:
        ValueError: There is none of that name.
        ImportError: diffusers or transformers are not installed.
    """
    return _with_random_weights(name, lambda: _real_parts(name, device))


def _real_parts(name: str, device: torch.device | str) -> Parts:
    real = find_model(REAL_SIZES[name])
    transformer: Any = real.with_random_weights(None, device)
    config = transformer.config
    names = ("text_dim", "text_embed_dim", "caption_channels")
    return Parts(
        transformer=transformer,
        latents=config["in_channels"],
        text_dim=next(config[x] for x in names if x in config),
        pooled_dim=config.get("pooled_projection_dim", 0),
        patch=real.compression[1] // 8,
    )


def _with_random_weights(name: str, make_parts: Callable[[], Parts]) -> Any:
    if name not in PIPELINES:
        raise ValueError(f"name must be one of {', '.join(PIPELINES)}, got {name!r}")
    diffusers = require("diffusers", extra="diffusers")
    transformers = require("transformers", extra="diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = make_parts()
        pipeline = PIPELINES[name](diffusers, transformers, parts)
        with torch.no_grad():
            for parameter in pipeline.transformer.parameters():
                if not parameter.any():  # gates that start at zero would hide the attention
                    parameter.normal_(std=0.1)
    for part_name, part in pipeline.components.items():
        if parts.transformer is not None and isinstance(part, torch.nn.Module):
            # Wan's authors keep its VAE in float32
            part.to(torch.float32 if (name, part_name) == ("wan", "vae") else DTYPE)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# fmt: off
def _wan(diffusers: Any, transformers: Any, parts: Parts) -> Any:
    return diffusers.WanPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**_t5(parts))),
        transformer=parts.transformer or diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
            in_channels=parts.latents, out_channels=parts.latents, text_dim=parts.text_dim,
            freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=parts.latents, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * parts.latents, latents_std=[1.0] * parts.latents,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _hunyuan_video(diffusers: Any, transformers: Any, parts: Parts) -> Any:
    text = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return diffusers.HunyuanVideoPipeline(
        tokenizer=_llama_tokenizer(transformers),
        text_encoder=transformers.LlamaModel(
            transformers.LlamaConfig(vocab_size=256, hidden_size=parts.text_dim, head_dim=8, **text)
        ),
        tokenizer_2=_clip_tokenizer(transformers),
        text_encoder_2=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=256, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
                hidden_size=parts.pooled_dim, **text,
            )
        ),
        transformer=parts.transformer or diffusers.HunyuanVideoTransformer3DModel(
            in_channels=parts.latents, out_channels=parts.latents, num_attention_heads=2,
            attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            mlp_ratio=2.0, text_embed_dim=parts.text_dim, pooled_projection_dim=parts.pooled_dim,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=parts.latents, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _cogvideox(diffusers: Any, transformers: Any, parts: Parts) -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**_t5(parts))),
        transformer=parts.transformer or diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=parts.latents,
            out_channels=parts.latents, time_embed_dim=16, text_embed_dim=parts.text_dim,
            num_layers=2, sample_width=16, sample_height=12, sample_frames=17,
            use_rotary_positional_embeddings=True,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=parts.latents, layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.CogVideoXDPMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing",
            rescale_betas_zero_snr=True, snr_shift_scale=1.0,
        ),
    )


def _ltx(diffusers: Any, transformers: Any, parts: Parts) -> Any:
    return diffusers.LTXPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**_t5(parts))),
        transformer=parts.transformer or diffusers.LTXVideoTransformer3DModel(
            in_channels=parts.latents, out_channels=parts.latents, num_attention_heads=2,
            attention_head_dim=16, cross_attention_dim=32, num_layers=2,
            caption_channels=parts.text_dim,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=parts.latents, patch_size=parts.patch, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _t5(parts: Parts) -> dict[str, int]:
    return {
        "vocab_size": 128, "d_model": parts.text_dim, "d_kv": 8, "d_ff": 32, "num_layers": 1,
        "num_heads": 2,
    }
# fmt: on

PIPELINES: dict[str, Callable[[Any, Any, Parts], Any]] = {
    "wan": _wan,
    "hunyuan_video": _hunyuan_video,
    "cogvideox": _cogvideox,
    "ltx": _ltx,
}
"""What builds each, from the modules diffusers and transformers."""

REAL_SIZES = {
    "wan": "wan-2.1-1.3b",
    "hunyuan_video": "hunyuanvideo",
    "cogvideox": "cogvideox-5b",
    "ltx": "ltx-video",
}
"""Which released model each is at its real size."""


def _t5_tokenizer(transformers: Any) -> Any:
    """Knows single characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(c, -1.0) for c in ("▁", *CHARACTERS)]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def _clip_tokenizer(transformers: Any) -> Any:
    """Knows single characters, inside a word and at its end."""
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def _llama_tokenizer(transformers: Any) -> Any:
    """Knows parts of the words around the prompt, which must not take the room of the prompt."""
    module = require("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video", extra="diffusers")
    words = ["<unk>", "<s>", "</s>", "▁", "\n", *CHARACTERS]
    characters = transformers.LlamaTokenizerFast(
        vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="</s>"
    )
    template = module.DEFAULT_PROMPT_TEMPLATE["template"]
    return characters.train_new_from_iterator([template], vocab_size=200, show_progress=False)
