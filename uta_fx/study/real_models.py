"""Video transformers at their real sizes, traced without weights on the meta device.

``python -m uta_fx.study.real_models > docs/flops.md`` makes the table in the documentation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_map, tree_map_only

from uta_fx._optional import require
from uta_fx.config import Config
from uta_fx.explain import Explanation, explain
from uta_fx.order import Grid

DTYPE = torch.bfloat16
TRACED = 3
"""Layers of a stack that are traced: the first, one for all between, the last."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a clip, in pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.height} x {self.width}{frames}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealModel:
    """A released model: its class, its configuration and what it is given at a size.

    Attributes:
        title: Its name for people.
        class_name: In diffusers.
        settings: What the class is built from, where it differs from the class's own defaults.
        stacks: The lists of alike layers in it, by attribute, and the setting that says how many
            there are.
        compression: How many frames, rows and columns of pixels one latent is.
        patch: How many latents, in frames, rows and columns, one token is.
        sizes: By name; the first is the default, the one it was made for.
        inputs: Makes the arguments of one step, of one sample, from the latent's frames, rows and
            columns and from the token grid.
        prepare: Makes the model ready for inputs without values.
        by_block: Each layer is compiled by itself, with a grid given.
    """

    title: str
    class_name: str
    settings: Mapping[str, Any]
    stacks: Mapping[str, str]
    compression: Grid
    patch: Grid
    sizes: Mapping[str, Size]
    inputs: Callable[[Grid, Grid], dict[str, Any]]
    prepare: Callable[[Any], None] = lambda model: None
    by_block: bool = False

    def size(
        self,
        name: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> Size:
        """One of its sizes, or another.

        Args:
            name: In ``sizes``; None for the first.
            height: In place of that of the named size, and so on.
            width: Likewise.
            frames: Likewise.

        Raises:
            ValueError: There is no size of that name; the message names those that there are.
        """
        name = name or next(iter(self.sizes))
        if name not in self.sizes:
            valid = ", ".join(self.sizes)
            raise ValueError(f"size must be one of {valid} for {self.title}, got {name!r}")
        given = {"height": height, "width": width, "frames": frames}
        changed = {side: value for side, value in given.items() if value is not None}
        return dataclasses.replace(self.sizes[name], **changed)

    def latent(self, size: Size) -> Grid:
        """Frames, rows and columns of the latent of a clip.

        Raises:
            ValueError: The clip cannot be cut into whole tokens; the message names which side.
        """
        frames, height, width = self.compression
        for name, value, unit in (
            ("height", size.height, height * self.patch[1]),
            ("width", size.width, width * self.patch[2]),
        ):
            if value < unit or value % unit:
                raise ValueError(
                    f"{name} must be a multiple of {unit} for {self.title}, got {value}"
                )
        if size.frames < 1 or (size.frames - 1) % frames:
            raise ValueError(
                f"frames must be one more than a multiple of {frames} for {self.title},"
                f" got {size.frames}"
            )
        return (size.frames - 1) // frames + 1, size.height // height, size.width // width

    def grid(self, size: Size) -> Grid:
        """Frames, rows and columns of its video tokens."""
        frames, height, width = (
            side // patch for side, patch in zip(self.latent(size), self.patch, strict=True)
        )
        return frames, height, width

    def build(self, layers: int | None = None) -> torch.nn.Module:
        """The model without weights, in evaluation mode.

        Args:
            layers: At most so many of each stack; None for all.
        """
        with torch.device("meta"):
            model = self._model(layers)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(DTYPE)
        self.prepare(model)
        return model

    def with_random_weights(
        self,
        layers: int | None,
        device: torch.device | str,
        seed: int = 0,
        dtype: torch.dtype = DTYPE,
    ) -> torch.nn.Module:
        """The model with the random weights of its class, in evaluation mode.

        Args:
            layers: At most so many of each stack; None for all.
            device: Where it is made; a moment in float32.
            seed: Of the weights.
            dtype: Likewise.
        """
        torch.manual_seed(seed)
        with torch.device(device):
            return self._model(layers).to(dtype)

    def pretrained(
        self, place: str, dtype: torch.dtype, size: Size
    ) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model with released weights, and arguments of zeros for a clip (masks are ones).

        Args:
            place: A folder of a pipeline or of the model alone, or a pipeline's name on the Hub.
            dtype: Of the weights and arguments.
            size: Of the clip; one sample of a batch.

        Raises:
            ValueError: The clip cannot be cut into whole tokens.
            OSError: There is no such model.
        """
        latent, grid = self.latent(size), self.grid(size)
        folder = Path(place)
        alone = folder.is_dir() and not (folder / "transformer").is_dir()
        model = self.model_class().from_pretrained(
            place, subfolder=None if alone else "transformer", torch_dtype=dtype
        )

        return model.eval(), self.arguments(latent, grid, dtype)

    def arguments(
        self,
        latent: Grid,
        grid: Grid,
        dtype: torch.dtype,
        draw: Callable[[torch.Size], Tensor] = torch.zeros,
    ) -> dict[str, Any]:
        """Of one step, with values: numbers that are drawn, and masks of ones.

        Args:
            latent: Frames, rows and columns of the latent video.
            grid: Its tokens.
            dtype: Of what ``inputs`` has in ``DTYPE``.
            draw: Numbers of such a shape.
        """

        def fill(x: Tensor) -> Tensor:
            of_file = dtype if x.dtype == DTYPE else x.dtype
            if not x.is_meta:
                return x.to(of_file)
            if not x.is_floating_point():
                return torch.ones(x.shape, dtype=x.dtype)
            return draw(x.shape).to(of_file)

        filled: dict[str, Any] = tree_map_only(Tensor, fill, self.inputs(latent, grid))
        return {**filled, "return_dict": False}

    def dynamic_grid(self, size: Size) -> dict[str, Any]:
        """``dynamic_shapes`` of ``export_onnx``: what follows from frames, height and width.

        Args:
            size: Of the clip that ``pretrained`` makes arguments for.

        Raises:
            ValueError: The model takes its grid as numbers.
        """
        frames, height, width = self.compression
        larger = Size(
            size.height + height * self.patch[1],
            size.width + width * self.patch[2],
            size.frames + frames * self.patch[0],
        )
        here, there = (self.inputs(self.latent(x), self.grid(x)) for x in (size, larger))
        numbers = [name for name, x in here.items() if isinstance(x, int) and x != there[name]]
        if numbers:
            raise ValueError(
                f"--dynamic-grid cannot be: {self.title} takes {', '.join(numbers)} as numbers,"
                " which are constants of a file. Export one file for each size"
            )

        def differing(x: Any, y: Any) -> dict[int, Any] | None:
            if not isinstance(x, Tensor):
                return None
            pairs = enumerate(zip(x.shape, y.shape, strict=True))
            return {dim: Dim.DYNAMIC for dim, (a, b) in pairs if a != b} or None

        return {**tree_map(differing, here, there), "return_dict": None}

    def _model(self, layers: int | None) -> torch.nn.Module:
        depth = self.depth()
        cut = {name: min(layers or depth[x], depth[x]) for x, name in self.stacks.items()}
        model: torch.nn.Module = self.model_class()(**{**self.settings, **cut})
        return model.eval()

    def depth(self) -> dict[str, int]:
        """How many layers each stack has."""
        defaults = inspect.signature(self.model_class()).parameters
        return {
            stack: self.settings.get(name, defaults[name].default)
            for stack, name in self.stacks.items()
        }

    def explain(
        self, size: Size, config: Config | None = None, *, whole: bool = False
    ) -> Explanation:
        """What the backend would do to it, and what that would save; takes seconds.

        Args:
            size: Of the clip; one sample of a batch.
            config: Settings; None for the defaults.
            whole: Trace every layer, instead of the first, the second and the last of each stack,
                the second in place of all between. ``dense_layers`` needs every layer anyway.

        Raises:
            ValueError: The clip cannot be cut into whole tokens.
        """
        config = Config.of(config)
        latent, grid = self.latent(size), self.grid(size)
        model = self.build(None if whole or config.dense_layers else TRACED)
        arguments = self.inputs(latent, grid)
        torch._dynamo.reset()
        with _counting_all_text():
            found = explain(model, config=config, **arguments)
            if self.by_block:
                config = dataclasses.replace(config, grid=grid)
                found = _explain_blocks(found, model, next(iter(self.stacks)), arguments, config)
        if not (whole or config.dense_layers):
            found = extrapolate(found, self.depth())
        return found

    def model_class(self) -> Any:
        """In diffusers."""
        return getattr(require("diffusers", extra="diffusers"), self.class_name)


def find_model(name: str) -> RealModel:
    """The model of a name.

    Raises:
        ValueError: There is none; the message names those that there are.
    """
    if name not in REAL_MODELS:
        raise ValueError(f"model must be one of {', '.join(REAL_MODELS)}, got {name!r}")
    return REAL_MODELS[name]


def extrapolate(found: Explanation, depth: Mapping[str, int]) -> Explanation:
    """What was found in the first, second and last layer of each stack, for all layers.

    Args:
        found: Of a model whose stacks are cut to ``TRACED`` layers.
        depth: How many layers each stack really has.

    Returns:
        The second layer counts for all between the first and the last; ``layer`` of a site is that
        of the first layer that it stands for.
    """
    sites, layer = [], 0
    for site in found.sites:
        name, times = _place(site.name, depth)
        sites.append(dataclasses.replace(site, name=name, count=site.count * times))
        if site.layer is not None:
            sites[-1] = dataclasses.replace(sites[-1], layer=layer)
            layer += times
    flops: Counter[str] = Counter()
    for path, count in (found.module_flops or {}).items():
        name, times = _place(path, depth)
        flops[name] += count * times
    stacks = [f"{count} {name}" for name, count in depth.items() if count > TRACED]
    note = f"of {' and '.join(stacks)} the first, second and last were traced; the second stands"
    notes = (*found.notes, f"{note} for all between") if stacks else found.notes
    return dataclasses.replace(found, sites=tuple(sites), module_flops=flops, notes=notes)


def _place(path: str, depth: Mapping[str, int]) -> tuple[str, int]:
    """The path in the whole model, and for how many layers it stands."""
    stack, _, rest = path.partition(".")
    index, dot, inner = rest.partition(".")
    layers = depth.get(stack, 0)
    if layers <= TRACED or index == "0" or not index:
        return path, 1
    if index == "1":
        return f"{stack}.1-{layers - 2}{dot}{inner}", layers - 2
    return f"{stack}.{layers - 1}{dot}{inner}", 1


def _explain_blocks(
    found: Explanation,
    model: torch.nn.Module,
    stack: str,
    arguments: Mapping[str, Any],
    config: Config,
) -> Explanation:
    """The same with each layer of a stack compiled by itself, which the first one speaks for."""
    blocks = model.get_submodule(stack)
    inputs: list[Any] = []
    hook = next(blocks.children()).register_forward_pre_hook(
        lambda module, args: inputs.extend(args)
    )
    with hook, torch.no_grad():
        model(**arguments)
    (alone,) = explain(next(blocks.children()), *inputs, config=config).sites
    sites, reasons = [], []
    for site in found.sites:
        if site.name.startswith(f"{stack}."):
            reasons.append(site.reason)
            site = dataclasses.replace(alone, name=site.name, layer=site.layer, count=site.count)
        sites.append(site)
    note = (
        f"{stack} are taken as compiled one by one (compile_repeated_blocks), with"
        f" grid={config.grid} given; the model as a whole leaves them dense: {reasons[0]}"
    )
    return dataclasses.replace(found, sites=tuple(sites), notes=(*found.notes, note))


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def _counting_all_text() -> Iterator[None]:
    """A mask of the meta device has no values: all tokens count, as with the longest prompt."""
    settings: Any = torch.fx.experimental._config
    with settings.patch(meta_nonzero_assume_all_nonzero=True), warnings.catch_warnings():
        # of Mochi, whose rotary tables need float32 and get it without autocast too
        warnings.filterwarnings("ignore", "In CPU autocast")
        yield


def _branch_on_values(model: Any) -> None:
    """HunyuanVideo 1.5 asks for values: whether there is an image, which texts are padding.

    Masks and image come with values on the CPU, and leave it where the model computes on them.
    """
    embedder = model.image_embedder.to_empty(device="cpu")
    embedder.register_forward_hook(lambda module, inputs, output: output.to("meta"))
    for module in (model.context_embedder, *model.transformer_blocks):
        module.register_forward_pre_hook(
            lambda module, inputs: tree_map_only(Tensor, lambda x: x.to("meta"), inputs)
        )


def _rotate_on_cpu(model: Any) -> None:
    """Mochi makes its rotary tables under autocast, which the meta device does not have."""
    model.pos_frequencies = torch.nn.Parameter(
        torch.empty_like(model.pos_frequencies, device="cpu")
    )
    model.rope.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"device": "cpu"}), with_kwargs=True
    )
    model.rope.register_forward_hook(
        lambda module, args, output: tuple(table.to("meta") for table in output)
    )


# fmt: off
WAN_SIZES = {"480p": Size(480, 832, 81), "720p": Size(720, 1280, 81)}


def wan_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    """Of Wan 2.1, with a text of 512 tokens."""
    return {
        "hidden_states": meta(1, 16, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 512, 4096),
    }


def _hunyuan_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 256, 4096),
        "encoder_attention_mask": meta(1, 256, dtype=torch.int64),
        "pooled_projections": meta(1, 768),
        "guidance": meta(1),
    }


def _hunyuan_15_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 65, *latent),
        "timestep": meta(1),
        "encoder_hidden_states": meta(1, 1000, 3584),
        "encoder_attention_mask": torch.ones(1, 1000, dtype=torch.int64),
        "encoder_hidden_states_2": meta(1, 256, 1472),
        "encoder_attention_mask_2": torch.ones(1, 256, dtype=torch.int64),
        "image_embeds": torch.zeros(1, 729, 1152, dtype=DTYPE),
    }


def _cogvideox_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    frames, height, width = latent
    tokens = math.prod(grid)
    return {
        "hidden_states": meta(1, frames, 16, height, width),
        "encoder_hidden_states": meta(1, 226, 4096),
        "timestep": meta(1),
        "image_rotary_emb": (meta(tokens, 64), meta(tokens, 64)),
    }


def _ltx_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, math.prod(grid), 128),
        "encoder_hidden_states": meta(1, 128, 4096),
        "timestep": meta(1),
        "encoder_attention_mask": meta(1, 128),
        "num_frames": grid[0], "height": grid[1], "width": grid[2],
    }


def _mochi_inputs(latent: Grid, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 12, *latent),
        "encoder_hidden_states": meta(1, 256, 4096),
        "timestep": meta(1),
        "encoder_attention_mask": meta(1, 256, dtype=torch.bool),
    }


REAL_MODELS = {
    "wan-2.1-1.3b": RealModel(
        title="Wan 2.1 1.3B",
        class_name="WanTransformer3DModel",
        settings={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=WAN_SIZES,
        inputs=wan_inputs,
    ),
    "wan-2.1-14b": RealModel(
        title="Wan 2.1 14B",
        class_name="WanTransformer3DModel",
        settings={},
        stacks={"blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes=dict(reversed(WAN_SIZES.items())),
        inputs=wan_inputs,
    ),
    "hunyuanvideo": RealModel(
        title="HunyuanVideo",
        class_name="HunyuanVideoTransformer3DModel",
        settings={},
        stacks={
            "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
        },
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"720p": Size(720, 1280, 129), "480p": Size(480, 832, 129)},
        inputs=_hunyuan_inputs,
    ),
    "hunyuanvideo-1.5": RealModel(
        title="HunyuanVideo 1.5",
        class_name="HunyuanVideo15Transformer3DModel",
        settings={"task_type": "t2v", "target_size": 960},
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 16, 16),
        patch=(1, 1, 1),
        sizes={"720p": Size(720, 1280, 121), "480p": Size(480, 832, 121)},
        inputs=_hunyuan_15_inputs,
        prepare=_branch_on_values,
        by_block=True,
    ),
    "cogvideox-5b": RealModel(
        title="CogVideoX-5B",
        class_name="CogVideoXTransformer3DModel",
        settings={
            "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
        },
        stacks={"transformer_blocks": "num_layers"},
        compression=(4, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": Size(480, 720, 49)},
        inputs=_cogvideox_inputs,
    ),
    "ltx-video": RealModel(
        title="LTX-Video",
        class_name="LTXVideoTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(8, 32, 32),
        patch=(1, 1, 1),
        sizes={
            "512p": Size(512, 704, 161), "480p": Size(480, 832, 161), "720p": Size(704, 1280, 161),
        },
        inputs=_ltx_inputs,
    ),
    "mochi": RealModel(
        title="Mochi 1",
        class_name="MochiTransformer3DModel",
        settings={},
        stacks={"transformer_blocks": "num_layers"},
        compression=(6, 8, 8),
        patch=(1, 2, 2),
        sizes={"480p": Size(480, 848, 163)},
        inputs=_mochi_inputs,
        prepare=_rotate_on_cpu,
    ),
}
# fmt: on


HEADER = """# What there is to gain, in operations

One step of one sample through the transformers of released models, at their own sizes, counted by
`uta-fx explain --model ...` (torch {torch}, diffusers {diffusers}, no weights): the operations of
the dense model, the share of attention in them, the share of the attention's operations that become
sparse (text, which stays exact, does not), and how many times fewer operations the model then has:
the speed-up if every operation took the same time. Operations are not time: for that see
[measured.md](measured.md). Settings are the defaults but for the density; texts are as long as the
longest prompt. Made by `python -m uta_fx.study.real_models`.

| model | size | video tokens | TFLOPs | attention | of it sparse | density 0.25 | density 0.1 |
|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The document, in Markdown; takes minutes."""
    diffusers = require("diffusers", extra="diffusers")
    rows, notes = [], []
    for model in REAL_MODELS.values():
        for size in model.sizes.values():
            found = [model.explain(size, Config(density=density)) for density in (0.25, 0.1)]
            rows.append(_row(model, size, *found))
        if model.by_block:
            notes.append(f"\n\n{model.title}, last size: {found[0].notes[0]}.")
    header = HEADER.format(torch=torch.__version__, diffusers=diffusers.__version__)
    return header + "\n".join(rows) + "".join(notes)


def _row(model: RealModel, size: Size, found: Explanation, sparser: Explanation) -> str:
    grid = model.grid(size)
    tokens = f"{' x '.join(map(str, grid))} = {math.prod(grid)}"
    return (
        f"| {model.title} | {size} | {tokens} | {(found.flops or 0) / 1e12:.1f} |"
        f" {found.attention_share:.1%} | {found.sparse_share:.1%} |"
        f" {found.ideal_speedup:.2f}x | {sparser.ideal_speedup:.2f}x |"
    )


if __name__ == "__main__":
    torch._logging.set_logs(all=logging.CRITICAL)
    print(table())
