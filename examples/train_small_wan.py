"""Trains the small video model that ships with uta-fx, from nothing, on clips drawn as it goes.

On one GPU, on several, or (tiny) on a CPU:

    python examples/train_small_wan.py --minutes 15 --out run
    torchrun --nproc-per-node 2 examples/train_small_wan.py --minutes 15 --out run
    python examples/train_small_wan.py --tiny --steps 6 --out /tmp/run

``run/weights`` is the pipeline (``load_pipeline(weights="run/weights")``), ``run/checkpoint.pt``
is what ``--resume`` continues from. ``--evaluate`` trains nothing: it generates clips of prompts
that training never shows, measures how far they agree, and draws them on ``run/sheet.png``.

Three stages, one schedule: single frames, then four frames, then all sixteen. Short clips teach
what shapes and patterns look like at a fraction of the price of a whole clip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import textwrap
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn

from uta_fx.moving_shapes import agreement, held_out_scenes, probe, render, sample_scenes
from uta_fx.moving_shapes.pipeline import MovingShapesPipeline, PromptEncoder, load_pipeline
from uta_fx.moving_shapes.scenes import PADDING, tokenize

SHIFT = 1.0
"""Noise schedule of generation: steps of equal size, from noise to clip."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run: clips of ``frames`` frames, ``batch`` a GPU, until ``end`` (0 to 1)."""

    frames: int
    batch: int
    end: float


STAGES = (
    Stage(frames=1, batch=512, end=0.05),
    Stage(frames=4, batch=160, end=0.22),
    Stage(frames=16, batch=48, end=1.0),
)
TINY_STAGES = (Stage(frames=1, batch=4, end=0.5), Stage(frames=2, batch=2, end=1.0))


def build(tiny: bool) -> nn.ModuleDict:
    """The transformer and the prompt encoder, 14.4 M parameters (or a tiny pair for tests)."""
    small = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2)
    full = dict(num_attention_heads=5, attention_head_dim=64, ffn_dim=1280, num_layers=8)
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        in_channels=3,
        out_channels=3,
        text_dim=128,
        freq_dim=256,
        cross_attn_norm=True,
        rope_max_seq_len=1024,
        **(small if tiny else full),
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return nn.ModuleDict({"transformer": transformer, "prompt_encoder": PromptEncoder()})


def flow_matching_loss(models: nn.ModuleDict, stage: Stage, generator: torch.Generator) -> Tensor:
    """Draw clips, mix them with noise, and compare the predicted velocity with noise minus clip."""
    device = generator.device

    def uniform() -> Tensor:
        return torch.rand(stage.batch, generator=generator, device=device)

    packed = sample_scenes(stage.batch, generator)
    clips = render(packed, generator, frames=stage.frames)
    tokens = tokenize(packed).masked_fill((uniform() < 0.1)[:, None], PADDING)
    noise = torch.randn(clips.shape, generator=generator, device=device)
    # Most mixtures are noisy ones, where motion is decided; a fifth is spread evenly.
    normal = torch.randn(stage.batch, generator=generator, device=device)
    amount = torch.where(uniform() < 0.8, torch.sigmoid(1.2 + 1.2 * normal), uniform())
    mixture = torch.lerp(clips, noise, amount[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = models["transformer"](
            hidden_states=mixture,
            timestep=1000 * amount,
            encoder_hidden_states=models["prompt_encoder"](tokens),
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - clips)).square().mean()


class Muon:
    """Muon (Jordan, 2024): momentum, then the nearest orthogonal matrix, for hidden matrices.

    Matrices of one shape are updated as one stack. Updates have the root mean square that AdamW's
    have (Liu et al., arXiv:2502.16982), so learning rates compare.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        by_shape = defaultdict(list)
        for parameter in parameters:
            by_shape[tuple(parameter.shape)].append(parameter)
        self.groups = list(by_shape.values())
        self.momentum = momentum
        self.velocities = [torch.zeros_like(torch.stack(group)) for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix at learning rate ``lr``."""
        for group, velocity in zip(self.groups, self.velocities, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(velocity, self.momentum))
            update = update.to(velocity.dtype) * (0.2 * math.sqrt(max(update.shape[1:])) * lr)
            torch._foreach_sub_(group, list(update.unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration on a stack [N, R, C], in bfloat16: singular values go to about 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Training:
    """State of a run: weights, their average, optimisers, and how far it is."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, device
        self.models = build(options.tiny)
        if options.start_from is not None:
            trained = load_pipeline(weights=options.start_from)
            for name, model in self.models.items():
                model.load_state_dict(trained.components[name].state_dict())
        self.models.to(device)
        self.parameters = list(self.models.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        # One buffer holds all gradients: one all-reduce, one norm.
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        pieces = self.gradients.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        blocks = self.models["transformer"].blocks
        hidden = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
        chosen = {id(parameter) for parameter in hidden}
        self.muon = Muon(hidden)
        self.adam = torch.optim.AdamW(
            [p for p in self.parameters if id(p) not in chosen],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.step, self.elapsed = 0, 0.0
        self.generator = torch.Generator(device)

    def update(self, stage: Stage, progress: float) -> Tensor:
        """One optimiser step; returns the loss without waiting for it."""
        rank, ranks = position()
        self.generator.manual_seed((self.options.seed * 1_000_003 + self.step) * ranks + rank)
        self.gradients.zero_()
        loss = flow_matching_loss(self.models, stage, self.generator)
        loss.backward()
        if ranks > 1:
            dist.all_reduce(self.gradients)
            self.gradients /= ranks
        self.gradients *= (1 / (self.gradients.norm() + 1e-6)).clamp(max=1)

        factor = min(1.0, (self.step + 1) / 100, (1 - progress) / (1 - self.options.hold))
        for group in self.adam.param_groups:
            group["lr"] = self.options.lr * factor
        self.adam.step()
        self.muon.step(self.options.muon_lr * factor)
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.step += 1
        return loss.detach()

    def save(self, out: Path) -> None:
        """Write the checkpoint, and the averaged weights as a bfloat16 pipeline."""
        state = {
            "models": self.models.state_dict(),
            "average": self.average,
            "muon": self.muon.velocities,
            "adam": self.adam.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        out.mkdir(parents=True, exist_ok=True)
        torch.save(state, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

        models = build(self.options.tiny)
        for parameter, average in zip(models.parameters(), self.average, strict=True):
            parameter.data = average.to("cpu", torch.bfloat16)
        pipeline = MovingShapesPipeline(
            transformer=models["transformer"],
            prompt_encoder=models["prompt_encoder"],
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )
        pipeline.save_pretrained(out / "weights")

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, map_location=self.device)
        self.models.load_state_dict(state["models"])
        for mine, saved in zip(self.average, state["average"], strict=True):
            mine.copy_(saved)
        for mine, saved in zip(self.muon.velocities, state["muon"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Run the stages until the planned minutes or steps are over."""
    rank, ranks = position()
    training = Training(options, device)
    if options.resume is not None:
        training.load(options.resume)
    if device.type == "cuda":
        training.models["transformer"].compile_repeated_blocks(dynamic=False)
    stages = TINY_STAGES if options.tiny else STAGES
    if options.start_from is not None:
        stages = stages[-1:]
    started, before = time.monotonic(), training.elapsed
    saved = reported = started
    losses: list[Tensor] = []
    clips: dict[int, int] = defaultdict(int)
    seen = 0
    while True:
        training.elapsed = before + time.monotonic() - started
        progress = shared(
            training.step / options.steps
            if options.steps is not None
            else training.elapsed / (60 * options.minutes)
        )
        if progress >= 1:
            break
        stage = next(stage for stage in stages if progress < stage.end)
        losses.append(training.update(stage, progress))
        clips[stage.frames] += stage.batch * ranks
        seen += stage.batch * ranks
        if training.step % options.report == 0:
            loss = torch.stack(losses).mean().item()
            now = time.monotonic()
            if rank == 0:
                left = (training.elapsed / progress - training.elapsed) if progress else math.nan
                print(
                    f"step {training.step:6d}  {100 * progress:5.1f} %  {stage.frames:2d} frames  "
                    f"loss {loss:.4f}  {seen / (now - reported):6.0f} clips/s  "
                    f"{left:5.0f} s left",
                    flush=True,
                )
            losses, seen, reported = [], 0, now
        if rank == 0 and time.monotonic() - saved > 60 * options.save_minutes:
            training.save(options.out)
            saved = time.monotonic()
    if rank == 0:
        training.save(options.out)
        print(f"clips by frames: {json.dumps(clips)}; {training.elapsed:.0f} s", flush=True)


def evaluate(options: argparse.Namespace, device: torch.device) -> None:
    """Generate held-out prompts at several settings; print agreement and draw a sheet."""
    rank, ranks = position()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = load_pipeline(device, dtype, weights=options.out / "weights")
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    scenes = held_out_scenes(options.prompts)
    settings = list(
        itertools.product(options.eval_guidance, options.eval_shift, options.eval_steps)
    )
    results = {}
    for guidance, shift, steps in settings[rank::ranks]:
        pipeline.scheduler.set_shift(shift)
        clips = pipeline(
            [scene.prompt for scene in scenes], steps=steps, guidance_scale=guidance
        ).cpu()
        results[guidance, shift, steps] = agreement(clips, scenes)
        print(
            f"guidance {guidance:.1f}  shift {shift:.1f}  steps {steps:2d}  "
            f"agreement {100 * results[guidance, shift, steps]:5.1f} %",
            flush=True,
        )
        name = f"sheet_g{guidance:g}_s{shift:g}_n{steps}.png"
        if (guidance, shift, steps) == settings[0]:
            name = "sheet.png"
        if name == "sheet.png" or options.all_sheets:
            draw_sheet(clips, scenes, options.out / name)


def draw_sheet(clips: Tensor, scenes: list, path: Path) -> None:
    """Draw six frames of each clip beside its prompt; a cross marks what the probe disputes."""
    from PIL import Image, ImageDraw

    scale, shown, columns = 2, (0, 3, 6, 9, 12, 15), 3
    side, text = 64 * scale, 190
    rows = math.ceil(len(scenes) / columns)
    width = text + side * len(shown) + 8
    sheet = Image.new("RGB", (width * columns, rows * (side + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (clip, scene) in enumerate(zip(clips, scenes, strict=True)):
        left, top = number // rows * width, number % rows * (side + 6)
        marks = "".join("+" if agrees else "x" for agrees in probe(clip, scene).agrees)
        words = "\n".join(textwrap.wrap(scene.prompt, 28))
        pen.text((left + 4, top + 4), f"{marks}\n{words}", fill="black")
        frames = (clip * 255).round().byte().permute(1, 2, 3, 0).numpy()
        for place, frame in enumerate(shown):
            picture = Image.fromarray(frames[min(frame, len(frames) - 1)])
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + text + place * side, top))
    sheet.save(path)


def position() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def shared(value: float) -> float:
    """The first process's value, in every process: one clock decides for all."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, src=0)
    return box.item()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15.0, help="length of the run (15)")
    length.add_argument("--steps", type=int, help="length of the run in steps, repeatable exactly")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from")
    parser.add_argument(
        "--start-from", type=Path, help="folder of a pipeline to train further, on whole clips"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="Muon's learning rate")
    parser.add_argument("--hold", type=float, default=0.35, help="share before the rates decay")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weight average")
    parser.add_argument("--report", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--evaluate", action="store_true", help="measure instead of training")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to evaluate")
    parser.add_argument("--eval-steps", type=int, nargs="+", default=[20])
    parser.add_argument("--eval-guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--eval-shift", type=float, nargs="+", default=[SHIFT])
    parser.add_argument("--all-sheets", action="store_true", help="draw every setting's sheet")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train or evaluate, as the command line says."""
    options = parse_arguments(arguments)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if options.evaluate:
        evaluate(options, device)
    else:
        train(options, device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
