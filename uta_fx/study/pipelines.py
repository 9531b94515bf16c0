"""The pipelines of diffusers that people generate with, in a size that runs in seconds.

The classes are those of the real pipelines, down to the tokenizers; the weights are random and the
vocabularies are made up, so that nothing is downloaded. What they show is noise.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch

from uta_fx._optional import require

CHARACTERS = [c for c in string.printable if not c.isspace()]
TEXT_DIM = 16
LATENTS = 4


def tiny_pipeline(name: str) -> Any:
    """A ``DiffusionPipeline`` with seeded random weights, float32, on the CPU.

    Args:
        name: One of ``PIPELINES``.

    Raises:
        ValueError: There is none of that name.
        ImportError: diffusers or transformers are not installed.
    """
    if name not in PIPELINES:
        raise ValueError(f"name must be one of {', '.join(PIPELINES)}, got {name!r}")
    diffusers = require("diffusers", extra="diffusers")
    transformers = require("transformers", extra="diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PIPELINES[name](diffusers, transformers)
        with torch.no_grad():
            for parameter in pipeline.transformer.parameters():
                if not parameter.any():  # gates that start at zero would hide the attention
                    parameter.normal_(std=0.1)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# fmt: off
def _wan(diffusers: Any, transformers: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**_T5)),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
            in_channels=LATENTS, out_channels=LATENTS, text_dim=TEXT_DIM, freq_dim=16, ffn_dim=32,
            num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _hunyuan_video(diffusers: Any, transformers: Any) -> Any:
    text = {
        "hidden_size": TEXT_DIM, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    return diffusers.HunyuanVideoPipeline(
        tokenizer=_llama_tokenizer(transformers),
        text_encoder=transformers.LlamaModel(
            transformers.LlamaConfig(vocab_size=256, **text)
        ),
        tokenizer_2=_clip_tokenizer(transformers),
        text_encoder_2=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=256, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, **text
            )
        ),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=LATENTS, out_channels=LATENTS, num_attention_heads=2,
            attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            mlp_ratio=2.0, text_embed_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=LATENTS, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _cogvideox(diffusers: Any, transformers: Any) -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**_T5)),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=LATENTS,
            out_channels=LATENTS, time_embed_dim=16, text_embed_dim=TEXT_DIM, num_layers=2,
            sample_width=16, sample_height=12, sample_frames=17,
            use_rotary_positional_embeddings=True,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=LATENTS, layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=diffusers.CogVideoXDPMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing",
            rescale_betas_zero_snr=True, snr_shift_scale=1.0,
        ),
    )


def _ltx(diffusers: Any, transformers: Any) -> Any:
    return diffusers.LTXPipeline(
        tokenizer=_t5_tokenizer(transformers),
        text_encoder=transformers.T5EncoderModel(transformers.T5Config(**_T5)),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=LATENTS, out_channels=LATENTS, num_attention_heads=2,
            attention_head_dim=16, cross_attention_dim=32, num_layers=2,
            caption_channels=TEXT_DIM,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), patch_size=1,
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


_T5 = {
    "vocab_size": 128, "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
}
# fmt: on

PIPELINES: dict[str, Callable[[Any, Any], Any]] = {
    "wan": _wan,
    "hunyuan_video": _hunyuan_video,
    "cogvideox": _cogvideox,
    "ltx": _ltx,
}
"""What builds each, from the modules diffusers and transformers."""


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
