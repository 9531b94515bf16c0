"""Models at their real widths as ONNX files: are they written and read, and what do they compute.

``python -m uta_fx.study.real_exports docs/onnx_sizes.md`` writes the page of the documentation;
``--only "Wan VACE 14B"`` makes a row of it anew and leaves the others as they are.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from uta_fx._optional import require
from uta_fx.config import Config
from uta_fx.explain import Explanation
from uta_fx.export.state import opened
from uta_fx.exporters import export_onnx
from uta_fx.order import Grid
from uta_fx.study.exports import (
    expected_outputs,
    open_quietly,
    page_arguments,
    rows_before,
    run_file,
    tensors_of,
    text_of,
)
from uta_fx.study.models import MODELS
from uta_fx.study.real_models import (
    REAL_MODELS,
    WAN_SIZES,
    RealModel,
    Size,
    meta,
    wan_inputs,
)

SMALL_GRID = (4, 12, 16)  # of the video whose file is run
IMAGE_GRID = (1, 24, 32)
RUN_GRIDS = {
    "Latte": (16, 32, 32),  # it has one
    "AnyFlow FAR 14B, without its cache": (8, 12, 16),  # so that a frame is compressed
    "Kandinsky 6 super-resolution": (4, 16, 16),  # of blocks of 8 x 8 tokens
}
SMALL_SETTINGS: dict[str, Any] = {"density": 0.3, "min_tokens": 512}
TEXT = 512
JOYIMAGE_TEXT = 1024 + 128  # an image and what to do with it
AUDIO = 218  # of 121 frames, 24 a second

PACKED = ("Cosmos 3 Omni", "Flux.1 dev", "Flux.3", "Sana WM refiner, without its cache")
"""Models whose graph does not show how their tokens lie: their grid is given."""

DECIDED = ("HunyuanVideo 1.5", "Wan Animate 2, reference pass")
"""Models that ask for values of tensors: written with ``decide_branches``."""

HEADER = """# Models at their real widths as ONNX files

Made by `python -m uta_fx.study.real_exports docs/onnx_sizes.md`: released configurations of the
model classes of diffusers {diffusers}, with one layer of each kind and random weights, exported by
PyTorch {torch} on a CPU. *Real size*: in float16 with the default settings, for the video or image
that the model was released for; the file passes the checks of onnx and is loaded by ONNX Runtime
{onnxruntime}, and is not run. *Run*: in float32 with density 0.3, for a video of {grid} tokens
(Latte: 16 x 32 x 32, AnyFlow FAR: 8 x 12 x 16, Kandinsky 6 super-resolution: 4 x 16 x 16) or an
image of {image}; the error of the file's output in ONNX Runtime on the CPU, relative to that of
`torch.compile(model, backend="uta")`, in norm.

* Settings have not been compared with released files for EasyAnimate, Kandinsky 5 Lite, Latte,
  ConsisID, Allegro, ChronoEdit, AnyFlow, HunyuanVideo I2V, CogVideoX 1.5 and all from HunyuanVideo
  Framepack on. Of these AnyFlow FAR, MiniMax H3, JoyImage and, but for its 24 layers, Stable
  Diffusion 3.5 have those of diffusers' conversion scripts, and Motif-Video those of its authors'
  nodes for ComfyUI. The others have their classes' own defaults, with switches that the release
  needs for Framepack, Kandinsky 6 and Flux.1 dev, and with ModelScope's widths for the temporal
  transformer.
* Latte's frames of 1,024 tokens are shorter than `min_tokens`; attention over video is linear in
  Sana-Video and in three layers of four of Sana WM; the temporal transformer attends across 16
  frames alone. MiniMax H3 scatters text, sound and video into one sequence by indices that only a
  run knows, and stays dense.
* Cosmos is without its padding mask, which torchvision would resize. AnyFlow FAR and the refiner of
  Sana WM are without their caches, with the whole video at once. Sana WM is without the attention
  of its camera branch: on a CPU its class computes the camera in float32 alone. The generation pass
  of Wan Animate 2 has not been tried at its real size. JoyImage's other image is not counted;
  Framepack and Helios make 33 frames at a time.
* HunyuanVideo 1.5 and Wan Animate 2 are written with `decide_branches`. The grid is given to
  Cosmos 3 Omni, the refiner of Sana WM, Flux.1 and Flux.3, whose graphs do not show it.
  [onnx.md](onnx.md) says what errors are relative to with FlexAttention (AnyFlow FAR, Kandinsky 6
  super-resolution) and in Wan Animate 2.

| model | size, tokens | sparse sites | file, seconds to write | run: sparse sites | error |
|---|---|---|---|---|---|"""


# fmt: off
def _wan_image_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return wan_inputs(latent, grid) | {
        "hidden_states": meta(1, 36, *latent),
        "encoder_hidden_states_image": meta(1, 257, 1280),
    }


def _wan_5b_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return wan_inputs(latent, grid) | {
        "hidden_states": meta(1, 48, *latent), "timestep": meta(1, math.prod(grid)),
    }


def _wan_vace_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return wan_inputs(latent, grid) | {
        "control_hidden_states": meta(1, 96, *latent), "control_hidden_states_scale": meta(1),
    }


def _wan_animate_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Of its frames one is the reference."""
    frames, height, width = latent
    return _wan_image_inputs(latent, grid) | {
        "pose_hidden_states": meta(1, 16, frames - 1, height, width),
        "face_pixel_values": meta(1, 3, 4 * (frames - 2) + 1, 512, 512),
    }


def _skyreels_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Diffusion forcing: a time for each frame."""
    return wan_inputs(latent, grid) | {
        "timestep": meta(1, latent[0]), "enable_diffusion_forcing": True, "fps": [1],
    }


def _anyflow_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """A step between two times, of each frame."""
    frames, height, width = latent
    return wan_inputs(latent, grid) | {
        "hidden_states": meta(1, frames, 16, height, width),
        "timestep": meta(1, frames), "r_timestep": meta(1, frames),
    }


def _ltx2_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, math.prod(grid), 128),
        "audio_hidden_states": meta(1, 126, 128),
        "encoder_hidden_states": meta(1, 1024, 3840),
        "audio_encoder_hidden_states": meta(1, 1024, 3840),
        "timestep": meta(1),
        "encoder_attention_mask": meta(1, 1024, dtype=torch.int64),
        "audio_encoder_attention_mask": meta(1, 1024, dtype=torch.int64),
        "num_frames": grid[0], "height": grid[1], "width": grid[2], "fps": 24.0,
        "audio_num_frames": 126,
    }


def _allegro_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    *tables, in_time, in_rows, in_columns = get_3d_rotary_pos_embed_allegro(
        96, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(in_time.long(), in_rows.long(), in_columns.long())
    return {
        "hidden_states": meta(1, 4, *latent),
        "encoder_hidden_states": meta(1, TEXT, 4096),
        "encoder_attention_mask": meta(1, TEXT, dtype=torch.int64),
        "timestep": meta(1),
        "image_rotary_emb": (tuple(tables), tuple(x[None] for x in positions.T.contiguous())),
    }


def _latte_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 4, *latent),
        "encoder_hidden_states": meta(1, 120, 4096),
        "timestep": meta(1),
    }


def _easyanimate_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "encoder_hidden_states": meta(1, 256, 3584),
        "timestep": meta(1),
    }


def _cosmos_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "encoder_hidden_states": meta(1, TEXT, 1024),
        "timestep": meta(1),
        "fps": 30,
    }


def _cosmos_2_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return _cosmos_inputs(latent, grid) | {
        "condition_mask": meta(1, 1, *latent), "timestep": meta(1, 1, latent[0], 1, 1), "fps": 16,
    }


def _kandinsky_5_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Beside the noise the condition, and whether a frame has one; channels come last."""
    return {
        "hidden_states": meta(1, *latent, 33),
        "encoder_hidden_states": meta(1, 256, 3584),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "visual_rope_pos": tuple(torch.arange(side) for side in grid),
        "text_rope_pos": torch.arange(256),
        "scale_factor": (1.0, 2.0, 2.0),
    }


def _consisid_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    frames, height, width = latent
    tokens = math.prod(grid)
    return {
        "hidden_states": meta(1, frames, 32, height, width),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1),
        "image_rotary_emb": (meta(tokens, 64), meta(tokens, 64)),
        "id_cond": meta(1, 1280),
        "id_vit_hidden": [meta(1, 577, 1024) for _ in range(5)],
    }


def _sana_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "encoder_hidden_states": meta(1, 300, 2304),
        "encoder_attention_mask": meta(1, 300, dtype=torch.int64),
        "timestep": meta(1),
    }


def _flux_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, math.prod(grid), 64),
        "encoder_hidden_states": meta(1, TEXT, 4096),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
        "img_ids": _places(grid),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": meta(1),
    }


def _flux_3_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Places have a fourth axis, along which the text lies."""
    text = torch.nn.functional.pad(torch.arange(480.0)[:, None], (3, 0))
    return {
        "hidden_states": meta(1, math.prod(grid), 128),
        "encoder_hidden_states": meta(1, len(text), 20480),
        "timestep": meta(1),
        "img_ids": torch.nn.functional.pad(_places(grid) / 2, (0, 1)),
        "txt_ids": text,
    }


def _places(grid: Grid) -> torch.Tensor:
    """Frame, row and column of each token."""
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))


def _sd3_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """The text is of two encoders: 77 and 256 tokens."""
    return {
        "hidden_states": meta(1, 16, *latent[1:]),
        "encoder_hidden_states": meta(1, 77 + 256, 4096),
        "pooled_projections": meta(1, 2048),
        "timestep": meta(1),
    }


def _qwen_image_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, math.prod(grid), 64),
        "encoder_hidden_states": meta(1, TEXT, 3584),
        "encoder_hidden_states_mask": meta(1, TEXT, dtype=torch.int64),
        "timestep": meta(1),
        "img_shapes": [grid],
    }


def _joyimage_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Of two images, the last of which is the new one; the text sees the other."""
    return {
        "hidden_states": meta(1, 2, 16, *latent),
        "encoder_hidden_states": meta(1, JOYIMAGE_TEXT, 4096),
        "timestep": meta(1),
    }


def _joyimage_plus_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """The new image and, as large, another."""
    return {
        "hidden_states": meta(1, 2 * math.prod(grid), 16, 1, 2, 2),
        "encoder_hidden_states": meta(1, JOYIMAGE_TEXT, 4096),
        "timestep": meta(1),
        "shape_list": [[grid, grid]],
    }


def _motif_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Beside the noise the condition, and whether a frame has one."""
    return {
        "hidden_states": meta(1, 33, *latent),
        "encoder_hidden_states": meta(1, TEXT, 2560),
        "encoder_attention_mask": meta(1, TEXT, dtype=torch.int64),
        "timestep": meta(1),
    }


def _kandinsky_6_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """With sound; otherwise as Kandinsky 5."""
    return {
        "hidden_states": meta(1, *latent, 33),
        "audio_hidden_states": meta(1, AUDIO, 20),
        "encoder_hidden_states": meta(1, 256, 3584),
        "pooled_projections": meta(1, 768),
        "timestep": meta(1),
    }


def _framepack_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """After the first image come 9 frames, then the past, of which 1, 2 and 16 frames are left."""
    _, height, width = latent
    times = torch.arange(1 + latent[0] + 1 + 2 + 16).split([1, latent[0], 1, 2, 16])
    return {
        "hidden_states": meta(1, 16, *latent),
        "encoder_hidden_states": meta(1, 256, 4096),
        "encoder_attention_mask": meta(1, 256, dtype=torch.int64),
        "pooled_projections": meta(1, 768),
        "image_embeds": meta(1, 729, 1152),
        "guidance": meta(1),
        "timestep": meta(1),
        "indices_latents": times[1],
        "latents_clean": meta(1, 16, 2, height, width),
        "indices_latents_clean": torch.cat([times[0], times[2]]),
        "latents_history_2x": meta(1, 16, 2, height, width),
        "indices_latents_history_2x": times[3],
        "latents_history_4x": meta(1, 16, 16, height, width),
        "indices_latents_history_4x": times[4],
    }


def _helios_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """After the first image the past, of which 16, 2 and 1 frames are left, then 9 frames."""
    _, height, width = latent
    times = torch.arange(1 + 16 + 2 + 1 + latent[0])[None].split([1, 16, 2, 1, latent[0]], dim=1)
    return wan_inputs(latent, grid) | {
        "indices_hidden_states": times[4],
        "indices_latents_history_short": torch.cat([times[0], times[3]], dim=1),
        "indices_latents_history_mid": times[2],
        "indices_latents_history_long": times[1],
        "latents_history_short": meta(1, 16, 2, height, width),
        "latents_history_mid": meta(1, 16, 2, height, width),
        "latents_history_long": meta(1, 16, 16, height, width),
    }


def _temporal_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    frames, height, width = latent
    return {"hidden_states": meta(frames, 320, height, width), "num_frames": frames}


def _anyflow_far_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """One frame, then three at a time."""
    more, rest = divmod(latent[0] - 1, 3)
    parts = [1] + more * [3] + ([rest] if rest else [])
    return _anyflow_inputs(latent, grid) | {"chunk_partition": parts}


def _cosmos_3_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Text, then video, in one sequence without a batch."""
    tokens = math.prod(grid)
    video = torch.arange(TEXT, TEXT + tokens)
    places = torch.cat([torch.arange(float(TEXT))[:, None].expand(-1, 3), _places(grid)])
    places[TEXT:, 0] += TEXT + 15000  # time goes on far behind the text
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": places.T.contiguous(),
        "und_len": TEXT, "sequence_length": TEXT + tokens,
        "vision_tokens": [meta(1, 48, *latent)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video.clone(),
        "vision_timesteps": meta(tokens),
        "vision_noisy_frame_indexes": [torch.arange(grid[0])],
    }


def _minimax_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Text, then sound, then video in one sequence, with a time for video and one for sound."""
    sound, video = 207, math.prod(grid)
    kinds = torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor([TEXT, sound, video]))
    text_places, sound_places, video_places = torch.arange(len(kinds)).split([TEXT, sound, video])
    places = torch.cat([torch.zeros(TEXT + sound, 3), _places(grid)])
    return {
        "hidden_states": meta(1, video, 96),
        "audio_hidden_states": meta(1, sound, 32),
        "encoder_hidden_states": meta(1, TEXT, 5120),
        "timestep": meta(2, dtype=torch.float32),
        "timestep_indices": (kinds == 2).long(), "token_tags": kinds,
        "position_ids": places,
        "video_indices": video_places, "audio_indices": sound_places, "text_indices": text_places,
    }


def _sana_wm_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Without the camera of each frame, to which layers attend in bfloat16."""
    return {
        "hidden_states": meta(1, 128, *latent),
        "timestep": meta(1, 1, latent[0], dtype=torch.float32),
        "encoder_hidden_states": meta(1, 1, 300, 2304),
        "mask": meta(1, 300, dtype=torch.int64),
        "chunk_plucker": meta(1, 48, *latent),
    }


def _sana_refiner_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    tokens = math.prod(grid)
    return {
        "hidden_states": meta(1, tokens, 128),
        "encoder_hidden_states": meta(1, 1024, 3840),
        "encoder_attention_mask": meta(1, 1024, dtype=torch.int64),
        "timestep": meta(1, tokens, dtype=torch.float32),
        "video_rotary_emb": (meta(1, tokens, 4096), meta(1, tokens, 4096)),
    }


def _kandinsky_6_sr_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {"hidden_states": meta(1, *latent, 129), "timestep": meta(1)}


def _wan_animate_2_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Of the first pass, which leaves its keys and values in an object."""
    module = require("diffusers.models.transformers.transformer_wan_animate_2", extra="diffusers")
    return {
        "hidden_states": [meta(16, *latent)],
        "timestep": meta(1, dtype=torch.float32),
        "encoder_hidden_states": [meta(TEXT, 4096)],
        "condition_latents": [meta(20, *latent)],
        "encoder_hidden_states_image": meta(1, 257, 1280),
        "kv_cache": module.WanAnimate2KVCache(1), "kv_cache_mode": "extract",
        "seq_len": math.prod(grid),
        "offset_grid_sizes": torch.tensor([grid]),
    }


class _InChunks(RealModel):
    """17 frames are 5 of the latent; the last 5 are 2."""

    def latent(self, size: Size) -> Grid:
        _, height, width = self.compression
        return (size.frames - 5) // 17 * 5 + 2, size.height // height, size.width // width


WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
JOYIMAGE = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "theta": 10000}
HD = {"720p": Size(720, 1280, 81)}
IMAGE = {"1024p": Size(1024, 1024, 1)}

OTHERS = (
    RealModel(
        title="Wan 2.1 I2V 14B",
        class_name="WanTransformer3DModel",
        settings=WAN_I2V,
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=HD,
        inputs=_wan_image_inputs,
    ),
    RealModel(
        title="Wan 2.2 TI2V 5B",
        class_name="WanTransformer3DModel",
        settings={
            "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336,
            "num_layers": 30,
        },
        stacks={"blocks": "num_layers"},
        compression=(4, 16, 16),
        patch=(1, 2, 2),
        sizes={"704p": Size(704, 1280, 121)},
        inputs=_wan_5b_inputs,
    ),
    RealModel(
        title="Wan 2.2 I2V A14B",
        class_name="WanTransformer3DModel",
        settings={"in_channels": 36},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=HD,
        inputs=lambda latent, grid: (
            wan_inputs(latent, grid) | {"hidden_states": meta(1, 36, *latent)}
        ),
    ),
    RealModel(
        title="ChronoEdit 14B",
        class_name="ChronoEditTransformer3DModel",
        settings=WAN_I2V,
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 29)},
        inputs=_wan_image_inputs,
    ),
    RealModel(
        title="AnyFlow 14B",
        class_name="AnyFlowTransformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": WAN_SIZES["480p"]},
        inputs=_anyflow_inputs,
    ),
    RealModel(
        title="HunyuanVideo I2V, token replace",
        class_name="HunyuanVideoTransformer3DModel",
        settings={"image_condition_type": "token_replace"},
        stacks={
            "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 129)},
        inputs=REAL_MODELS["hunyuanvideo"].inputs,
    ),
    RealModel(
        title="CogVideoX 1.5 5B",
        class_name="CogVideoXTransformer3DModel",
        settings={
            "num_attention_heads": 48, "num_layers": 42, "patch_size_t": 2, "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(2, 2, 2),
        sizes={"768p": Size(768, 1360, 85)},  # 81 frames, whose latents are made an even number
        inputs=REAL_MODELS["cogvideox-5b"].inputs,
    ),
    RealModel(
        title="Wan VACE 14B",
        class_name="WanVACETransformer3DModel",
        settings={"vace_layers": [0]},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=HD,
        inputs=_wan_vace_inputs,
    ),
    RealModel(
        title="Wan 2.2 Animate 14B",
        class_name="WanAnimateTransformer3DModel",
        settings=WAN_I2V | {"inject_face_latents_blocks": 1},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 81)},  # 77 frames and the reference
        inputs=_wan_animate_inputs,
    ),
    RealModel(
        title="SkyReels V2 T2V 14B",
        class_name="SkyReelsV2Transformer3DModel",
        settings={"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 121)},
        inputs=wan_inputs,
    ),
    RealModel(
        title="SkyReels V2 DF 1.3B",
        class_name="SkyReelsV2Transformer3DModel",
        settings={
            "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30,
            "inject_sample_info": True,
        },
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"540p": Size(544, 960, 97)},
        inputs=_skyreels_inputs,
    ),
    RealModel(
        title="LTX-2",
        class_name="LTX2VideoTransformer3DModel",
        settings={"rope_type": "split"},
        stacks={"transformer_blocks": "num_layers"},
        compression=(8, 32, 32),
        patch=(1, 1, 1),
        sizes={"512p": Size(512, 768, 121)},
        inputs=_ltx2_inputs,
    ),
    RealModel(
        title="Allegro",
        class_name="AllegroTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 85)},  # 88 frames of which 22 are latent
        inputs=_allegro_inputs,
    ),
    RealModel(
        title="Latte",
        class_name="LatteTransformer3DModel",
        settings={
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
            "out_channels": 8, "num_layers": 28, "cross_attention_dim": 1152, "patch_size": 2,
            "activation_fn": "gelu-approximate", "attention_bias": True,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
            "caption_channels": 4096, "sample_size": 64,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes={"512p": Size(512, 512, 16)},
        inputs=_latte_inputs,
    ),
    RealModel(
        title="EasyAnimate 5.1 12B",
        class_name="EasyAnimateTransformer3DModel",
        settings={
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "add_norm_text_encoder": True,
            "mmdit_layers": 48,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"512p": Size(512, 512, 49)},
        inputs=_easyanimate_inputs,
    ),
    RealModel(
        title="Cosmos 1 7B Text2World, no padding mask",  # torchvision would resize it
        class_name="CosmosTransformer3DModel",
        settings={"concat_padding_mask": False},
        stacks={"transformer_blocks": "num_layers"},
        compression=(8, 8, 8),
        patch=(1, 2, 2),
        sizes={"704p": Size(704, 1280, 121)},
        inputs=_cosmos_inputs,
    ),
    RealModel(
        title="Cosmos Predict 2 2B Video2World, no padding mask",
        class_name="CosmosTransformer3DModel",
        settings={
            "in_channels": 17, "num_attention_heads": 16, "rope_scale": (1.0, 3.0, 3.0),
            "extra_pos_embed_type": None, "concat_padding_mask": False,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"704p": Size(704, 1280, 93)},
        inputs=_cosmos_2_inputs,
    ),
    RealModel(
        title="Kandinsky 5 Lite",
        class_name="Kandinsky5Transformer3DModel",
        settings={
            "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168,
            "visual_cond": True,
        },
        stacks={
            "visual_transformer_blocks": "num_visual_blocks",
            "text_transformer_blocks": "num_text_blocks",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"512p": Size(512, 768, 121)},
        inputs=_kandinsky_5_inputs,
    ),
    RealModel(
        title="ConsisID",
        class_name="ConsisIDTransformer3DModel",
        settings={
            "num_attention_heads": 48, "in_channels": 32, "num_layers": 42,
            "use_rotary_positional_embeddings": True, "is_train_face": True,
            "cross_attn_interval": 1,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": Size(480, 720, 49)},
        inputs=_consisid_inputs,
    ),
    RealModel(
        title="Sana-Video 2B",
        class_name="SanaVideoTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": WAN_SIZES["480p"]},
        inputs=_sana_inputs,
    ),
    RealModel(
        title="HunyuanVideo Framepack",
        class_name="HunyuanVideoFramepackTransformer3DModel",
        settings={"has_image_proj": True, "has_clean_x_embedder": True},
        stacks={
            "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 33)},  # at a time, of 129
        inputs=_framepack_inputs,
    ),
    RealModel(
        title="Helios 14B",
        class_name="HeliosTransformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"384p": Size(384, 640, 33)},  # at a time, of 132
        inputs=_helios_inputs,
    ),
    RealModel(
        title="Motif-Video 2B",
        class_name="MotifVideoTransformer3DModel",
        settings={
            "num_attention_heads": 12, "num_layers": 12, "text_embed_dim": 2560,
            "enable_text_cross_attention_single": True,
            "num_single_layers": 2, "num_decoder_layers": 1,  # of 24 and 8: one of either kind
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"736p": Size(736, 1280, 121)},
        inputs=_motif_inputs,
    ),
    RealModel(
        title="Kandinsky 6",
        class_name="Kandinsky6Transformer3DModel",
        settings={
            "text_token_padding": True, "ca_rope": True, "cross_gates": True,
            "fix_modulation": True,
        },
        stacks={
            "visual_transformer_blocks": "num_visual_blocks",
            "video_text_transformer_blocks": "num_text_blocks",
            "audio_text_transformer_blocks": "num_text_blocks",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"512p": Size(512, 768, 121)},
        inputs=_kandinsky_6_inputs,
    ),
    RealModel(
        title="AnyFlow FAR 14B, without its cache",
        class_name="AnyFlowFARTransformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": WAN_SIZES["480p"]},
        inputs=_anyflow_far_inputs,
    ),
    RealModel(
        title="Cosmos 3 Omni",
        class_name="Cosmos3OmniTransformer",
        settings={},
        stacks={"layers": "num_hidden_layers"},
        compression=(4, 16, 16),
        patch=(1, 2, 2),
        sizes={"704p": Size(704, 1280, 189)},
        inputs=_cosmos_3_inputs,
    ),
    _InChunks(
        title="MiniMax H3",
        class_name="MiniMaxH3Transformer3DModel",
        settings={},
        stacks={
            "transformer_blocks": "num_layers",
            "token_refiner.refiner_blocks": "num_refiner_layers",
        },
        compression=(4, 16, 16),
        patch=(1, 2, 2),
        sizes={"768p": Size(768, 1344, 124)},
        inputs=_minimax_inputs,
    ),
    RealModel(
        title="Sana WM, without its camera branch",
        class_name="SanaWMTransformer3DModel",
        settings={"num_layers": 4, "chunk_plucker_post_attn_blocks": 4},  # of 20, one of softmax
        stacks={},
        compression=(8, 32, 32),
        patch=(1, 1, 1),
        sizes={"704p": Size(704, 1280, 161)},
        inputs=_sana_wm_inputs,
    ),
    RealModel(
        title="Sana WM refiner, without its cache",
        class_name="SanaWMLTX2RefinerTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(8, 32, 32),
        patch=(1, 1, 1),
        sizes={"704p": Size(704, 1280, 161)},
        inputs=_sana_refiner_inputs,
    ),
    RealModel(
        title="Kandinsky 6 super-resolution",
        class_name="Kandinsky6SRTransformer3DModel",
        settings={},
        stacks={"visual_transformer_blocks": "num_visual_blocks"},
        compression=(4, 16, 16),
        patch=(1, 1, 1),
        sizes={"512p": Size(512, 768, 121)},  # a tile
        inputs=_kandinsky_6_sr_inputs,
    ),
    RealModel(
        title="Wan Animate 2, reference pass",
        class_name="WanAnimate2Transformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"800p": Size(800, 640, 81)},
        inputs=_wan_animate_2_inputs,
    ),
    RealModel(
        title="Flux.1 dev",
        class_name="FluxTransformer2DModel",
        settings={"guidance_embeds": True},
        stacks={
            "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_flux_inputs,
    ),
    RealModel(
        title="Flux.3",
        class_name="Flux3Transformer2DModel",
        settings={},
        stacks={
            "mode_blocks.image": "num_layers", "mode_blocks.image_cond": "num_layers",
            "txt_mode_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_flux_3_inputs,
    ),
    RealModel(
        title="Stable Diffusion 3.5 Medium",
        class_name="SD3Transformer2DModel",
        settings={
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_sd3_inputs,
    ),
    RealModel(
        title="Qwen-Image",
        class_name="QwenImageTransformer2DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_qwen_image_inputs,
    ),
    RealModel(
        title="JoyImage Edit",
        class_name="JoyImageEditTransformer3DModel",
        settings=JOYIMAGE,
        stacks={"double_blocks": "num_layers"},
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_joyimage_inputs,
    ),
    RealModel(
        title="JoyImage Edit Plus",
        class_name="JoyImageEditPlusTransformer3DModel",
        settings=JOYIMAGE,
        stacks={"double_blocks": "num_layers"},
        compression=(1, 8, 8),
        patch=(1, 2, 2),
        sizes=IMAGE,
        inputs=_joyimage_plus_inputs,
    ),
    RealModel(
        title="Temporal transformer of ModelScope",
        class_name="TransformerTemporalModel",
        settings={"num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 320},
        stacks={},  # it is one layer
        compression=(1, 8, 8),
        patch=(1, 1, 1),
        sizes={"256p": Size(256, 256, 16)},
        inputs=_temporal_inputs,
    ),
)
# fmt: on

ALL = {model.title: model for model in (*REAL_MODELS.values(), *OTHERS)}


def header() -> str:
    """What the table is of, and its first lines."""
    import diffusers

    return HEADER.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        onnxruntime=onnxruntime.__version__,
        grid=" x ".join(map(str, SMALL_GRID)),
        image=" x ".join(map(str, IMAGE_GRID[1:])),
    )


def page(only: Collection[str] = (), before: str = "") -> str:
    """The documentation's page, Markdown.

    Args:
        only: Models to export; none for all of them.
        before: The page as it was, from which the rows of all others are taken.

    Raises:
        ValueError: A model is not known, or the page is of other versions.
    """
    start = header()
    rows = rows_before(start, ALL, only, before or start)
    lines = [start]
    for title, model in ALL.items():
        if not only or title in only:
            rows[title] = f"| {title} | {' | '.join(_cells(model))} |"
        if title in rows:
            lines.append(rows[title])
    return "\n".join(lines) + "\n"


def _cells(real: RealModel) -> tuple[str, ...]:
    size = real.size()
    video = f"{size}: {math.prod(real.grid(size)):,}"
    with tempfile.TemporaryDirectory() as name:
        return video, *_real_size(real, size, Path(name)), *_run(real, Path(name))


def _real_size(real: RealModel, size: Size, folder: Path) -> tuple[str, str]:
    """Of the file in float16: its sparse sites, bytes and time."""
    model = _model(real, torch.float16)
    given = _arguments(real, real.latent(size), real.grid(size), torch.float16)
    path, start = folder / "real.onnx", time.perf_counter()
    config = Config(grid=real.grid(size) if real.title in PACKED else None)
    found = export_onnx(
        model, (), path, config=config, kwargs=given, decide_branches=real.title in DECIDED
    )
    seconds = time.perf_counter() - start
    del model, given
    gc.collect()
    open_quietly(path, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    files = list(folder.iterdir())
    total = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    return _sparse(found), f"{total / 1e9:.2f} GB, {seconds:.0f} s"


def _run(real: RealModel, folder: Path) -> tuple[str, str]:
    """Of the file in float32 of a small video: its sparse sites and its error."""
    image = real.size().frames == 1
    grid = RUN_GRIDS.get(real.title, IMAGE_GRID if image else SMALL_GRID)
    packed = real.by_block or real.title in PACKED
    config = Config(**SMALL_SETTINGS, grid=grid if packed else None)
    latent = tuple(side * patch for side, patch in zip(grid, real.patch, strict=True))
    model, path = _model(real, torch.float32), folder / "small.onnx"
    given = _arguments(real, latent, grid, torch.float32)  # type: ignore[arg-type]
    decide = real.title in DECIDED
    found = export_onnx(model, (), path, config=config, kwargs=given, decide_branches=decide)
    dense = next(x.dense for x in MODELS if x.class_name == real.class_name)
    expected = expected_outputs(model, config, given, found, dense)
    with opened(model, (), given) as arguments:
        tensors = tensors_of(arguments.kwargs)
    del model
    gc.collect()
    outputs, _ = run_file(path, tensors)
    errors = [(a - b).norm() / b.norm() for a, b in zip(outputs, expected, strict=True)]
    return _sparse(found), f"{max(errors).item():.1e}"


def _sparse(found: Explanation) -> str:
    return str(sum(site.sparse for site in found.sites))


def _model(real: RealModel, dtype: torch.dtype) -> torch.nn.Module:
    """One layer of each kind; gates that start at zero would hide the attention.

    What ``from_pretrained`` leaves in float32 stays in it.
    """
    model: Any = real.with_random_weights(1, "cpu", dtype=dtype)
    wide = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
        if wide & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model  # type: ignore[no-any-return]


def _arguments(real: RealModel, latent: Grid, grid: Grid, dtype: torch.dtype) -> dict[str, Any]:
    """Of one step, random numbers."""
    generator = torch.Generator().manual_seed(0)
    return real.arguments(latent, grid, dtype, lambda x: torch.randn(x, generator=generator))


def main() -> None:
    """Write the page, row by row."""
    path, only = page_arguments(__doc__)
    for title in only or ALL:
        path.write_text(page([title], text_of(path)))


if __name__ == "__main__":
    main()
