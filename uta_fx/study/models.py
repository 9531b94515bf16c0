"""Every video transformer of diffusers in a size that traces in seconds, and what is in each.

``python -m uta_fx.study.models > docs/models.md`` makes the table in the documentation.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from uta_fx._optional import require
from uta_fx.config import Config
from uta_fx.explain import Explanation, explain

GRID = (4, 6, 8)
VIDEO = 4 * 6 * 8
IMAGE = (1, 8, 12)
TEXT = 11
SMALL = Config(min_tokens=48, block_q=16, block_kv=16)


class Random(Protocol):
    """Random numbers of a shape."""

    def __call__(self, *shape: int) -> Tensor: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A small random configuration of one model class.

    Attributes:
        name: Of the class and, where there are several of one class, of the variant.
        class_name: In diffusers.
        settings: What the class is built from.
        inputs: Makes its arguments from a source of random numbers.
        sites: Attention calls by kind that the architecture has, from the model's configuration.
        grid: To give where the graph does not show it.
        dense: Why its long self- or joint attention stays dense (how the reason starts); empty
            where it becomes sparse.
        note: What a reader of the table should know about the model's sites.
        keeps: Whether it keeps from its first call what it makes then by a compiler of its own (a
            block mask): it is then built with that, made without one.
    """

    name: str
    class_name: str
    settings: Mapping[str, Any]
    inputs: Callable[[Random], dict[str, Any]]
    sites: Callable[[Any], dict[str, int]]
    grid: tuple[int, int, int] | None = None
    dense: str = ""
    note: str = ""
    keeps: bool = False

    def build(self) -> torch.nn.Module:
        """A model with seeded random weights, in evaluation mode."""
        diffusers = require("diffusers", extra="diffusers")
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(diffusers, self.class_name)(**self.settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():  # gates that start at zero would hide the attention
                    parameter.normal_(std=0.1)
        model.eval()
        if self.keeps:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                model(**self.arguments())
        return model

    def arguments(self) -> dict[str, Any]:
        """Seeded inputs, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        return self.inputs(lambda *shape: torch.randn(*shape, generator=generator))

    def explain(self) -> Explanation:
        """What the backend would do to it."""
        torch._dynamo.reset()
        config = dataclasses.replace(SMALL, grid=self.grid)
        return explain(self.build(), config=config, **self.arguments())


def _time(batch: int = 1) -> Tensor:
    return torch.full((batch,), 500.0)


def _self_and_cross(config: Any) -> dict[str, int]:
    return {"self": config.num_layers, "cross": config.num_layers}


def _joint(config: Any) -> dict[str, int]:
    return {"joint": config.num_layers}


# fmt: off
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
    "cross_attn_norm": True, "rope_max_seq_len": 32,
}


def _wan_inputs(x: Random, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": x(1, channels, 4, 12, 16),
        "timestep": _time(),
        "encoder_hidden_states": x(1, TEXT, 16),
    }


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2,
    "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan_inputs(x: Random, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": x(2, channels, 4, 12, 16),
        "timestep": _time(2),
        "encoder_hidden_states": x(2, TEXT, 16),
        "encoder_attention_mask": torch.tensor([[1] * TEXT, [1] * 7 + [0] * (TEXT - 7)]),
        "pooled_projections": x(2, 8),
        "guidance": torch.full((2,), 1000.0),
    }


def _hunyuan_sites(config: Any) -> dict[str, int]:
    return {
        "joint": config.num_layers + config.num_single_layers, "self": config.num_refiner_layers,
    }


COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 16,
    "sample_height": 12, "sample_frames": 13, "patch_size": 2, "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
}


def _cogvideox_inputs(x: Random, channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": x(1, 4, channels, 12, 16),
        "encoder_hidden_states": x(1, TEXT, 16),
        "timestep": _time(),
    }


LTX2 = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16,
    "rope_double_precision": False,
}

KANDINSKY = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
    "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}


def _positions(length: int, axes: int) -> Tensor:
    return torch.arange(length)[:, None].expand(-1, axes).float()


def _minimax_layout() -> dict[str, Any]:
    """Text, then audio, then video in one packed sequence."""
    audio, total = 6, TEXT + 6 + VIDEO
    tags = torch.tensor([1] * TEXT + [2] * audio + [0] * VIDEO)
    return {
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(), "token_tags": tags,
        "position_ids": _positions(total, 3),
        "video_indices": torch.arange(TEXT + audio, total),
        "audio_indices": torch.arange(TEXT, TEXT + audio),
        "text_indices": torch.arange(TEXT),
    }


WAN_ANIMATE_2 = {
    "patch_size": (1, 2, 2), "text_len": TEXT, "in_dim": 8, "dim": 32, "ffn_dim": 32,
    "freq_dim": 16, "text_dim": 16, "out_dim": 4, "num_heads": 2, "num_layers": 2,
    "cross_attn_norm": True, "use_img_emb": True,
}


def _wan_animate_2_inputs(x: Random, frames: int = 4) -> dict[str, Any]:
    module = require("diffusers.models.transformers.transformer_wan_animate_2", extra="diffusers")
    return {
        "hidden_states": [x(4, frames, 12, 16)],
        "timestep": torch.ones(1),
        "encoder_hidden_states": [x(TEXT, 16)],
        "condition_latents": [x(4, frames, 12, 16)],
        "encoder_hidden_states_image": x(1, 9, 1280),
        "kv_cache": module.WanAnimate2KVCache(2), "kv_cache_mode": "extract",
        "seq_len": frames * 6 * 8,
        "offset_grid_sizes": torch.tensor([GRID]),
    }


def _wan_animate_2_generation(x: Random) -> dict[str, Any]:
    """One frame more than the reference, whose keys and values the cache has."""
    arguments = _wan_animate_2_inputs(x, 5)
    for layer in arguments["kv_cache"].layer_caches:
        layer.store(x(1, VIDEO, 2, 16), x(1, VIDEO, 2, 16))
    return arguments | {
        "kv_cache_mode": "cached", "offset_grid_sizes": None,
        "reference_grid_sizes": torch.tensor([GRID]), "origin_len": 13, "origin_area": [96, 128],
    }


MODELS = (
    Model(
        name="Wan",
        class_name="WanTransformer3DModel",
        settings=WAN,
        inputs=_wan_inputs,
        sites=_self_and_cross,
    ),
    Model(
        name="Wan 2.2 TI2V, a time for each token",
        class_name="WanTransformer3DModel",
        settings=WAN,
        inputs=lambda x: _wan_inputs(x) | {"timestep": torch.full((1, VIDEO), 500.0)},
        sites=_self_and_cross,
    ),
    Model(
        name="Wan I2V",
        class_name="WanTransformer3DModel",
        settings=WAN | {"in_channels": 8, "image_dim": 16, "added_kv_proj_dim": 32},
        inputs=lambda x: (
            _wan_inputs(x, 8)
            | {"encoder_hidden_states": x(1, 512, 16), "encoder_hidden_states_image": x(1, 9, 16)}
        ),
        sites=lambda c: {"self": c.num_layers, "cross": 2 * c.num_layers},
    ),
    Model(
        name="Wan VACE",
        class_name="WanVACETransformer3DModel",
        settings=WAN | {"vace_layers": [0, 1], "vace_in_channels": 12},
        inputs=lambda x: (
            _wan_inputs(x)
            | {
                "control_hidden_states": x(1, 12, 4, 12, 16),
                "control_hidden_states_scale": torch.ones(2),
            }
        ),
        sites=lambda c: {
            "self": c.num_layers + len(c.vace_layers), "cross": c.num_layers + len(c.vace_layers),
        },
    ),
    Model(
        name="Wan Animate",
        class_name="WanAnimateTransformer3DModel",
        settings=WAN
        | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 32,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs=lambda x: (
            _wan_inputs(x, 12)
            | {
                "encoder_hidden_states": x(1, 512, 16),  # the class tells image from text by 512
                "encoder_hidden_states_image": x(1, 9, 16),
                "pose_hidden_states": x(1, 4, 3, 12, 16),
                "face_pixel_values": x(1, 3, 9, 16, 16),
            }
        ),
        sites=lambda c: {
            "self": c.num_layers,
            "cross": 2 * c.num_layers + c.num_layers // c.inject_face_latents_blocks,
        },
        note="between layers, each frame attends to the face in it",
    ),
    Model(
        name="SkyReels V2",
        class_name="SkyReelsV2Transformer3DModel",
        settings=WAN,
        inputs=_wan_inputs,
        sites=_self_and_cross,
    ),
    Model(
        name="SkyReels V2, block-causal",
        class_name="SkyReelsV2Transformer3DModel",
        settings=WAN | {"num_frame_per_block": 2},
        inputs=_wan_inputs,
        sites=_self_and_cross,
        dense="its attention mask differs from query to query",
    ),
    Model(
        name="ChronoEdit",
        class_name="ChronoEditTransformer3DModel",
        settings=WAN,
        inputs=_wan_inputs,
        sites=_self_and_cross,
    ),
    Model(
        name="AnyFlow",
        class_name="AnyFlowTransformer3DModel",
        # gathering a time for each token pays from three layers on
        settings=WAN | {"gate_value": 0.25, "deltatime_type": "r", "num_layers": 3},
        inputs=lambda x: {
            "hidden_states": x(1, 4, 4, 12, 16),
            "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "encoder_hidden_states": x(1, TEXT, 16),
        },
        sites=_self_and_cross,
    ),
    Model(
        name="AnyFlow FAR",
        class_name="AnyFlowFARTransformer3DModel",
        settings=WAN
        | {
            "gate_value": 0.25, "deltatime_type": "r", "compressed_patch_size": (1, 4, 4),
            "full_chunk_limit": 3,
        },
        inputs=lambda x: {
            "hidden_states": x(1, 4, 4, 16, 16),
            "timestep": torch.full((1, 4), 500.0),
            "r_timestep": torch.full((1, 4), 250.0),
            "encoder_hidden_states": x(1, TEXT, 16),
            "chunk_partition": [2, 2],
        },
        sites=_self_and_cross,
        dense="FlexAttention has a block mask",
        note="the mask is block-causal",
    ),
    Model(
        name="Helios",
        class_name="HeliosTransformer3DModel",
        settings={key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
        | {
            "rope_dim": (4, 6, 6), "has_multi_term_memory_patch": True, "guidance_cross_attn": True,
            "zero_history_timestep": True, "is_amplify_history": False,
        },
        inputs=lambda x: (
            _wan_inputs(x)
            | {
                "indices_hidden_states": torch.ones(1, 4),
                "indices_latents_history_short": torch.ones(1, 1),
                "indices_latents_history_mid": torch.ones(1, 2),
                "indices_latents_history_long": torch.ones(1, 4),
                "latents_history_short": x(1, 4, 1, 12, 16),
                "latents_history_mid": x(1, 4, 2, 12, 16),
                "latents_history_long": x(1, 4, 4, 12, 16),
            }
        ),
        sites=lambda c: {"joint": c.num_layers, "cross": c.num_layers},
    ),
    Model(
        name="HunyuanVideo",
        class_name="HunyuanVideoTransformer3DModel",
        settings=HUNYUAN,
        inputs=_hunyuan_inputs,
        sites=_hunyuan_sites,
    ),
    Model(
        name="HunyuanVideo I2V, token replace",
        class_name="HunyuanVideoTransformer3DModel",
        settings=HUNYUAN | {"image_condition_type": "token_replace"},
        inputs=_hunyuan_inputs,
        sites=_hunyuan_sites,
        note="each layer modulates the first frame apart from the others",
    ),
    Model(
        name="HunyuanVideo 1.5",
        class_name="HunyuanVideo15Transformer3DModel",
        settings={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1,
            "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
        },
        inputs=lambda x: {
            "hidden_states": x(1, 4, *GRID),
            "timestep": _time(),
            "encoder_hidden_states": x(1, TEXT, 16),
            "encoder_attention_mask": torch.tensor([[1] * 7 + [0] * (TEXT - 7)]),
            "encoder_hidden_states_2": x(1, 4, 8),
            "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": torch.zeros(1, 3, 8),
        },
        sites=lambda c: {"joint": c.num_layers, "self": c.num_refiner_layers},
        grid=GRID,
        note="the class asks whether its image is empty: a graph before, and one after, all layers",
    ),
    Model(
        name="HunyuanVideo Framepack",
        class_name="HunyuanVideoFramepackTransformer3DModel",
        settings=HUNYUAN
        | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        inputs=lambda x: (
            {key: value[:1] for key, value in _hunyuan_inputs(x).items() if key != "guidance"}
            | {
                "guidance": torch.full((1,), 1000.0),
                "image_embeds": x(1, 3, 16),
                "indices_latents": torch.arange(4.0),
                "latents_clean": x(1, 4, 1, 12, 16),
                "indices_latents_clean": torch.ones(1),
                "latents_history_2x": x(1, 4, 2, 12, 16),
                "indices_latents_history_2x": torch.ones(2),
                "latents_history_4x": x(1, 4, 4, 12, 16),
                "indices_latents_history_4x": torch.ones(4),
            }
        ),
        sites=_hunyuan_sites,
        note="with one sample, text is cut to a length that only a run knows",
    ),
    Model(
        name="CogVideoX 2B",
        class_name="CogVideoXTransformer3DModel",
        settings=COGVIDEOX,
        inputs=_cogvideox_inputs,
        sites=_joint,
    ),
    Model(
        name="CogVideoX 5B",
        class_name="CogVideoXTransformer3DModel",
        settings=COGVIDEOX | {"use_rotary_positional_embeddings": True},
        inputs=lambda x: _cogvideox_inputs(x) | {"image_rotary_emb": (x(VIDEO, 16), x(VIDEO, 16))},
        sites=_joint,
    ),
    Model(
        name="CogVideoX I2V",
        class_name="CogVideoXTransformer3DModel",
        settings=COGVIDEOX
        | {
            "in_channels": 8, "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
        inputs=lambda x: (
            _cogvideox_inputs(x, 8) | {"image_rotary_emb": (x(VIDEO, 16), x(VIDEO, 16))}
        ),
        sites=_joint,
    ),
    Model(
        name="CogVideoX 1.5",
        class_name="CogVideoXTransformer3DModel",
        settings=COGVIDEOX | {"patch_size_t": 2, "use_rotary_positional_embeddings": True},
        inputs=lambda x: {
            "hidden_states": x(1, 8, 4, 12, 16),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
            "image_rotary_emb": (x(VIDEO, 16), x(VIDEO, 16)),
        },
        sites=_joint,
    ),
    Model(
        name="ConsisID",
        class_name="ConsisIDTransformer3DModel",
        settings=COGVIDEOX
        | {
            "attention_head_dim": 24, "use_rotary_positional_embeddings": True,
            "is_train_face": True, "is_kps": False, "cross_attn_interval": 1,
            "cross_attn_dim_head": 16, "cross_attn_num_heads": 2, "LFE_id_dim": 8, "LFE_vit_dim": 8,
            "LFE_depth": 5, "LFE_dim_head": 16, "LFE_num_heads": 2, "LFE_num_id_token": 1,
            "LFE_num_querie": 1, "LFE_output_dim": 32, "LFE_ff_mult": 1, "LFE_num_scale": 1,
        },
        inputs=lambda x: (
            _cogvideox_inputs(x)
            | {
                "image_rotary_emb": (x(VIDEO, 24), x(VIDEO, 24)),
                "id_cond": x(1, 8),
                "id_vit_hidden": [x(1, 2, 8)],
            }
        ),
        sites=lambda c: {
            "joint": c.num_layers + c.LFE_depth, "cross": c.num_layers // c.cross_attn_interval,
        },
        note="five layers join learned queries and features of a face",
    ),
    Model(
        name="LTX-Video",
        class_name="LTXVideoTransformer3DModel",
        settings={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16,
        },
        inputs=lambda x: {
            "hidden_states": x(1, VIDEO, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "num_frames": GRID[0], "height": GRID[1], "width": GRID[2],
        },
        sites=_self_and_cross,
    ),
    Model(
        name="LTX-2",
        class_name="LTX2VideoTransformer3DModel",
        settings=LTX2,
        inputs=lambda x: {
            "hidden_states": x(1, VIDEO, 4),
            "audio_hidden_states": x(1, 9, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "audio_encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "num_frames": GRID[0], "height": GRID[1], "width": GRID[2], "audio_num_frames": 9,
            "fps": 25.0,
        },
        sites=lambda c: {"self": 2 * c.num_layers, "cross": 4 * c.num_layers},
    ),
    Model(
        name="Mochi",
        class_name="MochiTransformer3DModel",
        settings={
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
            "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
            "time_embed_dim": 4, "max_sequence_length": TEXT,
        },
        inputs=lambda x: {
            "hidden_states": x(2, 4, 4, 12, 16),
            "encoder_hidden_states": x(2, TEXT, 16),
            "timestep": _time(2),
            "encoder_attention_mask": torch.tensor(
                [[True] * TEXT, [True] * 7 + [False] * (TEXT - 7)]
            ),
        },
        sites=lambda c: {"joint": 2 * c.num_layers, "cross": 1},
        note="one site for each sample of the batch; the pooling of the text is the cross site",
    ),
    Model(
        name="Allegro",
        class_name="AllegroTransformer3DModel",
        settings={
            "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "cross_attention_dim": 48, "sample_width": 16, "sample_height": 12,
            "sample_frames": 4, "caption_channels": 16,
        },
        inputs=lambda x: {
            "hidden_states": x(2, 4, 4, 12, 16),
            "encoder_hidden_states": x(2, TEXT, 16),
            "timestep": _time(2),
        },
        sites=_self_and_cross,
    ),
    Model(
        name="Latte",
        class_name="LatteTransformer3DModel",
        settings={
            "sample_size": 16, "num_layers": 2, "patch_size": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "caption_channels": 16, "in_channels": 4, "out_channels": 4,
            "cross_attention_dim": 32, "norm_type": "ada_norm_single", "video_length": 4,
            "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
        },
        inputs=lambda x: {
            "hidden_states": x(1, 4, 4, 16, 16),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
        },
        sites=lambda c: {"self": 2 * c.num_layers, "cross": c.num_layers},
        note="a site inside each frame and a short one across frames in every layer",
    ),
    Model(
        name="EasyAnimate",
        class_name="EasyAnimateTransformer3DModel",
        settings={
            "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 1,
            "num_layers": 2, "out_channels": 4, "patch_size": 2, "sample_height": 12,
            "sample_width": 16, "text_embed_dim": 16, "time_embed_dim": 8,
            "time_position_encoding_type": "3d_rope",
        },
        inputs=lambda x: {
            "hidden_states": x(2, 4, 4, 12, 16),
            "encoder_hidden_states": x(2, TEXT, 16),
            "timestep": _time(2),
        },
        sites=_joint,
    ),
    Model(
        name="Cosmos",
        class_name="CosmosTransformer3DModel",
        settings={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4,
            "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False, "extra_pos_embed_type": "learnable",
        },
        inputs=lambda x: _wan_inputs(x) | {"attention_mask": torch.ones(1, TEXT), "fps": 30},
        sites=_self_and_cross,
    ),
    Model(
        name="Cosmos 3 Omni",
        class_name="Cosmos3OmniTransformer",
        settings={
            "head_dim": 16, "hidden_act": "relu2", "hidden_size": 32, "intermediate_size": 32,
            "latent_channel": 2, "latent_patch_size": 1, "num_attention_heads": 2,
            "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 2,
            "qk_norm_for_text": False, "rope_axes_dim": [3, 3, 2], "vocab_size": 32,
        },
        inputs=lambda x: {
            "input_ids": torch.arange(TEXT),
            "text_indexes": torch.arange(TEXT),
            "position_ids": torch.zeros(3, TEXT + VIDEO, dtype=torch.long),
            "und_len": TEXT, "sequence_length": TEXT + VIDEO,
            "vision_tokens": [x(1, 2, *GRID)],
            "vision_token_shapes": [GRID],
            "vision_sequence_indexes": torch.arange(TEXT, TEXT + VIDEO),
            "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + VIDEO),
            "vision_timesteps": torch.ones(VIDEO),
            "vision_noisy_frame_indexes": [torch.arange(GRID[0])],
        },
        sites=lambda c: {"self": c.num_hidden_layers, "joint": c.num_hidden_layers},
        grid=GRID,
        note="grouped queries; text is causal by itself, video attends to text and video",
    ),
    Model(
        name="Kandinsky 5",
        class_name="Kandinsky5Transformer3DModel",
        settings=KANDINSKY,
        inputs=lambda x: {
            "hidden_states": x(1, 4, 12, 16, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
            "pooled_projections": x(1, 8),
            "visual_rope_pos": tuple(torch.arange(side) for side in GRID),
            "text_rope_pos": torch.arange(TEXT),
        },
        sites=lambda c: {
            "self": c.num_visual_blocks + c.num_text_blocks, "cross": c.num_visual_blocks,
        },
    ),
    Model(
        name="Kandinsky 6",
        class_name="Kandinsky6Transformer3DModel",
        settings=KANDINSKY | {"visual_cond": False},
        inputs=lambda x: {
            "hidden_states": x(1, 4, 12, 16, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": _time(),
            "pooled_projections": x(1, 8),
        },
        sites=lambda c: {
            "self": c.num_visual_blocks + 2 * c.num_text_blocks, "cross": c.num_visual_blocks,
        },
    ),
    Model(
        name="Sana-Video",
        class_name="SanaVideoTransformer3DModel",
        settings={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
            "cross_attention_dim": 32, "caption_channels": 16, "mlp_ratio": 2.5, "sample_size": 8,
            "patch_size": (1, 2, 2), "rope_max_seq_len": 32, "qk_norm": "rms_norm_across_heads",
        },
        inputs=_wan_inputs,
        sites=lambda c: {"cross": c.num_layers},
        note="self-attention is linear attention: there is no softmax to make sparse",
    ),
    Model(
        name="MotifVideo",
        class_name="MotifVideoTransformer3DModel",
        settings={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "num_layers": 2, "num_single_layers": 2, "num_decoder_layers": 0, "mlp_ratio": 2.0,
            "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm", "text_embed_dim": 16,
            "image_embed_dim": 4, "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": False, "enable_text_cross_attention_single": False,
        },
        inputs=_wan_inputs,
        sites=lambda c: {"joint": c.num_layers + c.num_single_layers},
    ),
    Model(
        name="MiniMax H3",
        class_name="MiniMaxH3Transformer3DModel",
        settings={
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6,
            "patch_size": (1, 2, 2), "text_dim": 16, "freq_dim": 8, "time_embed_hidden_dim": 24,
            "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        inputs=lambda x: (
            {
                "hidden_states": x(1, VIDEO, 16),
                "audio_hidden_states": x(1, 6, 6),
                "encoder_hidden_states": x(1, TEXT, 16),
            }
            | _minimax_layout()
        ),
        sites=lambda c: {"self": c.num_layers + c.num_refiner_layers},
        dense="the graph does not show how its 209 tokens (out of index_copy) lie",
        note="text, audio and video are scattered into one sequence by indices of the run",
    ),
    Model(
        name="Wan Animate 2, reference pass",
        class_name="WanAnimate2Transformer3DModel",
        settings=WAN_ANIMATE_2,
        inputs=_wan_animate_2_inputs,
        sites=lambda c: {"unknown": 1, "cross": 2},
        dense="the graph does not show that queries and keys",
        note="the class breaks into many graphs, one of them with the attention of every layer",
    ),
    Model(
        name="Wan Animate 2, generation pass",
        class_name="WanAnimate2Transformer3DModel",
        settings=WAN_ANIMATE_2,
        inputs=_wan_animate_2_generation,
        sites=lambda c: {"unknown": 1, "cross": 2},
        dense="FlexAttention has a block mask",
        note="each frame attends to the video and to its own frame of the reference",
        keeps=True,
    ),
    Model(
        name="Kandinsky 6 super-resolution",
        class_name="Kandinsky6SRTransformer3DModel",
        settings={
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        inputs=lambda x: {"hidden_states": x(1, 2, 16, 16, 9), "timestep": _time()},
        sites=lambda c: {"self": c.num_visual_blocks},
        dense="FlexAttention has a block mask",
        note="the mask is sparse attention of the model's own (NABLA)",
    ),
    Model(
        name="Sana WM",
        class_name="SanaWMTransformer3DModel",
        settings={
            "in_channels": 4, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2,
            "linear_head_dim": 16, "caption_channels": 16, "image_size": 64,
        },
        inputs=lambda x: {
            "hidden_states": x(1, 4, *GRID),
            "timestep": torch.full((1, 1, 4), 500.0),
            "encoder_hidden_states": x(1, 1, TEXT, 16),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
        sites=lambda c: {"self": c.num_layers // c.softmax_every_n, "cross": c.num_layers},
        note="one layer in four has softmax attention, the others are linear",
    ),
    Model(
        name="Sana WM refiner",
        class_name="SanaWMLTX2RefinerTransformer3DModel",
        settings=LTX2,
        inputs=lambda x: {
            "hidden_states": x(1, VIDEO, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": torch.full((1, VIDEO), 500.0),
            "video_rotary_emb": (x(1, VIDEO, 32), x(1, VIDEO, 32)),
        },
        sites=_self_and_cross,
        grid=GRID,
    ),
    Model(
        name="JoyImage Edit",
        class_name="JoyImageEditTransformer3DModel",
        settings={
            "patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2,
            "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256,
        },
        inputs=lambda x: {
            "hidden_states": x(1, 4, 4, 12, 16),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": torch.ones(1),
        },
        sites=_joint,
    ),
    Model(
        name="JoyImage Edit Plus",
        class_name="JoyImageEditPlusTransformer3DModel",
        settings={
            "patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2,
            "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256,
        },
        inputs=lambda x: {
            "hidden_states": x(1, VIDEO + 96, 4, 1, 2, 2),
            "encoder_hidden_states": x(1, TEXT, 16),
            "timestep": torch.ones(1),
            "shape_list": [[GRID, IMAGE]],
        },
        sites=_joint,
        note="a reference image in the sequence counts as text; with a mask: `trust_masks`",
    ),
    Model(
        name="Temporal transformer (AnimateDiff)",
        class_name="TransformerTemporalModel",
        settings={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "num_layers": 1,
            "norm_num_groups": 1,
        },
        inputs=lambda x: {"hidden_states": x(4, 8, 6, 8), "num_frames": 4},
        sites=lambda c: {"self": 2 * c.num_layers},
        note="attention across frames alone: short",
    ),
    Model(
        name="Flux",
        class_name="FluxTransformer2DModel",
        settings={
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
            "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda x: {
            "hidden_states": x(1, 96, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "pooled_projections": x(1, 8),
            "img_ids": _positions(96, 3),
            "txt_ids": torch.zeros(TEXT, 3),
            "timestep": torch.ones(1),
        },
        sites=lambda c: {"joint": c.num_layers + c.num_single_layers},
        grid=IMAGE,
    ),
    Model(
        name="Flux 3",
        class_name="Flux3Transformer2DModel",
        settings={
            "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
            "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
        },
        inputs=lambda x: {
            "hidden_states": x(1, 96, 4),
            "encoder_hidden_states": x(1, TEXT, 16),
            "img_ids": _positions(96, 4),
            "txt_ids": torch.zeros(TEXT, 4),
            "timestep": torch.ones(1),
        },
        sites=lambda c: {"self": 2 * c.num_layers, "joint": c.num_single_layers},
        grid=IMAGE,
    ),
    Model(
        name="Stable Diffusion 3",
        class_name="SD3Transformer2DModel",
        settings={
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32,
            "joint_attention_dim": 16, "pooled_projection_dim": 8, "out_channels": 4,
            "pos_embed_max_size": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        inputs=lambda x: {
            "hidden_states": x(2, 4, 16, 24),
            "encoder_hidden_states": x(2, TEXT, 16),
            "pooled_projections": x(2, 8),
            "timestep": _time(2),
        },
        sites=lambda c: {"joint": c.num_layers, "self": len(c.dual_attention_layers)},
    ),
    Model(
        name="Qwen-Image",
        class_name="QwenImageTransformer2DModel",
        settings={
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=lambda x: {
            "hidden_states": x(1, 96, 16),
            "encoder_hidden_states": x(1, TEXT, 16),
            "encoder_hidden_states_mask": torch.tensor([[1] * 7 + [0] * (TEXT - 7)]),
            "timestep": torch.ones(1),
            "img_shapes": [(1, 8, 12)],
        },
        sites=_joint,
    ),
)


UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
    "cross_attention_dim": 16, "norm_num_groups": 2,
}
BLOCKS_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 16,
}


def _unet_inputs(x: Random) -> dict[str, Any]:
    return {
        "sample": x(1, 4, 4, 16, 16),
        "timestep": torch.full((1,), 5),
        "encoder_hidden_states": x(1, TEXT, 16),
    }


def _motion_inputs(x: Random) -> dict[str, Any]:
    return _unet_inputs(x) | {"encoder_hidden_states": x(4, TEXT, 16)}


ACROSS = "attention inside each frame, and short attention across frames; convolutions between"

OTHERS: tuple[Model, ...] = (
    Model(
        name="UNet of AnimateDiff",
        class_name="UNetMotionModel",
        settings=UNET | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
        },
        inputs=_motion_inputs,
        sites=lambda _: {"self": 18, "cross": 4},
        note=ACROSS,
    ),
    Model(
        name="ControlNet of AnimateDiff (SparseCtrl)",
        class_name="SparseControlNetModel",
        settings={key: value for key, value in UNET.items() if key != "out_channels"} | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "num_attention_heads": 2, "motion_num_attention_heads": 2,
            "conditioning_embedding_out_channels": (8, 8),
            "use_simplified_condition_embedding": True,
        },
        inputs=lambda x: _motion_inputs(x) | {
            "controlnet_cond": x(1, 4, 4, 16, 16),
            "conditioning_mask": x(1, 1, 4, 16, 16),
        },
        sites=lambda _: {"self": 4, "cross": 2},
        note=ACROSS,
    ),
    Model(
        name="UNet of ModelScope",
        class_name="UNet3DConditionModel",
        settings=UNET | BLOCKS_3D,
        inputs=_unet_inputs,
        sites=lambda _: {"self": 14, "cross": 4},
        note=ACROSS,
    ),
    Model(
        name="UNet of I2VGen-XL",
        class_name="I2VGenXLUNet",
        settings=UNET | BLOCKS_3D | {"cross_attention_dim": 64},
        inputs=lambda x: _unet_inputs(x) | {
            "encoder_hidden_states": x(1, TEXT, 64),
            "fps": torch.tensor([8]),
            "image_latents": x(1, 4, 4, 16, 16),
            "image_embeddings": x(1, 64),
        },
        sites=lambda _: {"self": 15, "cross": 4},
        note=ACROSS,
    ),
    Model(
        name="UNet of Stable Video Diffusion",
        class_name="UNetSpatioTemporalConditionModel",
        settings={
            "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 64),
            "layers_per_block": 1, "cross_attention_dim": 16, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24, "num_frames": 4,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_attention_heads": (2, 4),
        },
        inputs=lambda x: {
            "sample": x(1, 4, 8, 16, 16),
            "timestep": torch.full((1,), 5),
            "encoder_hidden_states": x(1, 1, 16),
            "added_time_ids": torch.zeros(1, 3),
        },
        sites=lambda _: {"self": 8, "cross": 8},
        note=ACROSS,
    ),
    Model(
        name="Decoder of LTX-2.5",
        class_name="LTX2VideoDiffusionDecoderModel",
        settings={
            "latent_channels": 4, "patch_size": 2, "decoder_head_dim": 16,
            "decoder_stage_channels": (32,) * 5, "decoder_stage_depths": (1,) * 5,
            "decoder_stage_kernels": ((3, 3, 3),) * 4, "decoder_stage5_kernel": (3, 3, 3),
            "decoder_upsample_channel_reductions": (1,) * 4, "decoder_t_emb_dim": 16,
        },
        inputs=lambda x: {"z": x(1, 4, 2, 3, 4)},
        sites=lambda _: {"self": 5},
        note="neighbourhood attention: the mask is sparse attention of the model's own",
    ),
)
"""Classes that take videos and are no transformers of tokens."""
# fmt: on


HEADER = """# What is found in the models of diffusers {version}

Small random configurations of every video transformer, and some image relatives: their attention
calls by kind, how many become sparse, and why the others stay dense (cross-attention always does).
*self*: tokens of one origin among themselves; *joint*: video and text, history or conditioning in
one sequence; *cross*: queries and keys are different tokens. Where tokens come packed and nothing
in the graph says how they lie, a grid is given (`Config.grid`). Tokens are reordered *once* for the
whole graph, after the patch embedding and back before the unpatchify, where every operation in
between provably does not depend on their order; else *in parts* of the graph, or *here*, around
each sparse call. Made by `python -m uta_fx.study.models`.

| model | graphs | attention calls | sparse | grid | tokens reordered | left dense |
|---|---|---|---|---|---|---|
"""


MORE = """
Classes that take videos and are no transformers of tokens. `CosmosControlNetModel` needs
torchvision and is not traced here: its blocks are those of Cosmos. VAEs are left alone,
`uta_fx.enable` refuses them (the decoder of LTX-2.5 with them), and
`Kandinsky6SRLatentUpscalerBank` has no attention.

| model | graphs | attention calls | sparse | grid | tokens reordered | left dense |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The document, in Markdown; takes a minute or two."""
    diffusers = require("diffusers", extra="diffusers")
    rows, others = ([_row(x, x.explain()) for x in models] for models in (MODELS, OTHERS))
    header = HEADER.format(version=diffusers.__version__)
    return "\n".join([header + rows[0], *rows[1:], MORE + others[0], *others[1:]])


def _row(model: Model, found: Explanation) -> str:
    kinds = Counter(site.kind for site in found.sites)
    sparse = [site for site in found.sites if site.sparse]
    grid = "-"
    if sparse:
        grid = "given" if model.grid else "read"
    reasons = Counter(
        # lengths differ, the reason does not
        (site.kind, re.sub(r"^[0-9]+ tokens are", "tokens are", site.reason.split(":")[0]))
        for site in found.sites
        if not site.sparse and site.kind != "cross"
    )
    reordered = dict.fromkeys(site.reordered for site in sparse if site.reordered)
    dense = [f"{count} {kind}: {reason}" for (kind, reason), count in reasons.items()]
    calls = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    left = "; ".join(dense + ([model.note] if model.note else []))
    return (
        f"| {model.name} | {found.graphs} | {calls or 'none'} | {len(sparse)} | {grid} |"
        f" {'; '.join(reordered) or '-'} | {left or '-'} |"
    )


if __name__ == "__main__":
    torch._logging.set_logs(all=logging.CRITICAL)
    print(table())
