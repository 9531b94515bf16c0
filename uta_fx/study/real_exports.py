"""Models at their real widths as ONNX files: are they written and read, and what do they compute.

``python -m uta_fx.study.real_exports docs/onnx_sizes.md`` writes the page of the documentation;
``--only "Wan VACE 14B"`` makes a row of it anew and leaves the others as they are.
"""

from __future__ import annotations

import gc
import math
import tempfile
import textwrap
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from uta_fx.config import Config
from uta_fx.explain import Explanation
from uta_fx.exporters import export_onnx
from uta_fx.order import Grid
from uta_fx.study.exports import (
    compiled_outputs,
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
LATTE_GRID = (16, 32, 32)  # it has one
SMALL_SETTINGS: dict[str, Any] = {"density": 0.3, "min_tokens": 512}
TEXT = 512

HEADER = """# Models at their real widths as ONNX files

Made by `python -m uta_fx.study.real_exports docs/onnx_sizes.md`: released configurations of the
model classes of diffusers {diffusers}, with one layer of each kind and random weights, exported by
PyTorch {torch} on a CPU. *Real size*: in float16 with the default settings, for the video that the
model was released for; the file passes the checks of onnx and is loaded by ONNX Runtime
{onnxruntime}, and is not run. *Run*: in float32, for a video of {grid} tokens (Latte:
{latte}) with density 0.3; the error of the file's output in ONNX Runtime on the CPU, relative to
that of `torch.compile(model, backend="uta")`, in norm. Latte's frames of 1,024 tokens are shorter
than `min_tokens`, Sana-Video's attention over video is linear. Cosmos is without its padding mask,
which torchvision would resize. The settings of EasyAnimate, Kandinsky 5 Lite, Latte, ConsisID,
Allegro, ChronoEdit, AnyFlow, HunyuanVideo I2V and CogVideoX 1.5 have not been compared with
released files. HunyuanVideo 1.5 is written with `decide_branches`.

{others}

| model | video, tokens | sparse sites | file, seconds to write | run: sparse sites | error |
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


WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
HD = {"720p": Size(720, 1280, 81)}

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
)
# fmt: on

ALL = {model.title: model for model in (*REAL_MODELS.values(), *OTHERS)}


def header() -> str:
    """What the table is of, and its first lines."""
    import diffusers

    others = sorted({x.class_name for x in MODELS} - {x.class_name for x in ALL.values()})
    return HEADER.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        onnxruntime=onnxruntime.__version__,
        grid=" x ".join(map(str, SMALL_GRID)),
        latte=" x ".join(map(str, LATTE_GRID)),
        others=textwrap.fill(
            "Classes that are files at small widths alone ([onnx.md](onnx.md)), because nobody has"
            f" put their released settings into this table yet: {', '.join(others)}.",
            100,
        ),
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
    found = export_onnx(model, (), path, kwargs=given, decide_branches=real.by_block)
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
    grid = LATTE_GRID if real.title == "Latte" else SMALL_GRID
    config = Config(**SMALL_SETTINGS, grid=grid if real.by_block else None)
    latent = tuple(side * patch for side, patch in zip(grid, real.patch, strict=True))
    model, path = _model(real, torch.float32), folder / "small.onnx"
    given = _arguments(real, latent, grid, torch.float32)  # type: ignore[arg-type]
    expected = compiled_outputs(model, config, given)
    found = export_onnx(model, (), path, config=config, kwargs=given, decide_branches=real.by_block)
    del model
    gc.collect()
    outputs, _ = run_file(path, tensors_of(given))
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
