"""The commands of ``uta-fx``: each reads options, calls the package and shows a result."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from uta_fx._optional import require
from uta_fx.config import Config

if TYPE_CHECKING:
    from uta_fx.explain import Explanation
    from uta_fx.study.real_models import RealModel, Size

typer = require("typer", extra="demo")
rich_console = require("rich.console", extra="demo")
rich_progress = require("rich.progress", extra="demo")
rich_table = require("rich.table", extra="demo")

app = typer.Typer(
    name="uta-fx",
    help="Sparse attention with Unified Tail Aggregation for video diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
export_app = typer.Typer(
    help="Write models as files that run without PyTorch.", no_args_is_help=True
)
app.add_typer(export_app, name="export")
study_app = typer.Typer(invoke_without_command=True)
app.add_typer(study_app, name="study")
bench_app = typer.Typer(help="Time what was made against what there was.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
console = rich_console.Console()

DEFAULT_PROMPTS = (
    "a red disc moves right and a cyan star moves left over dark purple stripes",
    "a yellow square spins up over dark teal checks",
)
DEFAULTS = Config()

Density = Annotated[
    float, typer.Option(help="Share of key blocks that stay exact, above 0, at most 1.")
]
PolicyName = Annotated[
    str,
    typer.Option(
        help="What chooses the exact blocks: low_delta, topk, topp, threshold; from the grid alone"
        " radial, sliding_tile, window; spatial_temporal, svg2, rectified; random, and for study"
        " oracle_topk, oracle_topp, oracle_low_delta."
    ),
]
TailName = Annotated[
    str,
    typer.Option(
        help="What stands for the rest: none, normalizer, single, bins, block, first_order,"
        " gaussian or rectified."
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="site: one budget for a whole attention call; head: one a head; row: equal rows."
    ),
]
Reorder = Annotated[str, typer.Option(help="Token order: tile, morton, hilbert, none, or auto.")]
DenseUntil = Annotated[
    float, typer.Option(help="Share of the noise schedule that runs dense at its start, 0 to 1.")
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the first prompt; the next ones count up.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, float16 or bfloat16; auto takes bfloat16 on a GPU and float32 on a CPU."
    ),
]
Inputs = Annotated[
    str,
    typer.Option(
        help="structured: smooth fields and noise; random: normal numbers; trained: of the"
        " shipped model, on clips enlarged to the shape."
    ),
]
RELEASED = (
    "wan-2.1-1.3b, wan-2.1-14b, hunyuanvideo, hunyuanvideo-1.5, cogvideox-5b, ltx-video or mochi"
)
ClipSize = Annotated[
    str | None,
    typer.Option(help="Of the clip of --model: 480p, 720p; the model's own default without."),
]
Height = Annotated[int | None, typer.Option(help="Rows of pixels, in place of --size's.")]
Width = Annotated[int | None, typer.Option(help="Columns of pixels, in place of --size's.")]
Frames = Annotated[int | None, typer.Option(help="Frames, in place of --size's.")]
ExportedModel = Annotated[
    str | None,
    typer.Option(
        help=f"A released model, with --pretrained: {RELEASED}; without it the shipped model."
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Weights of --model for diffusers: a folder, or a name on the Hub."),
]
ExportedDtype = Annotated[
    str,
    typer.Option(
        help="Of the file: float32, float16 or bfloat16; auto takes float16 for --model and float32"
        " for the shipped model."
    ),
]
DecideBranches = Annotated[
    bool,
    typer.Option(
        "--decide-branches",
        help="Write the way that a model takes without an image, where it asks (HunyuanVideo 1.5);"
        " it is run once.",
    ),
]
DynamicGrid = Annotated[
    bool,
    typer.Option(
        "--dynamic-grid",
        help="One file for every number of frames, rows and columns; the policies low_delta and"
        " topk, and the tails none, block, first_order and gaussian.",
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option(help="JSON file to write; its folder is made if it is not there.")
]
Output = Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.")]


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What the clip shows; give it several times for several clips. Grammar: a red disc"
            " moves left [and a blue square bounces up] over dark green stripes."
        ),
    ] = None,
    density: Density = 0.2,
    policy: PolicyName = str(DEFAULTS.policy),
    tail: TailName = str(DEFAULTS.tail),
    budget: Budget = DEFAULTS.budget,
    reorder: Reorder = DEFAULTS.reorder,
    dense_until: DenseUntil = DEFAULTS.dense_until,
    steps: Steps = 16,
    seed: Seed = 0,
    device: Device = "auto",
    output: Output = Path("demo"),
) -> None:
    """Generate clips with the shipped model, dense and sparse, and show them side by side.

    Writes comparison.gif (dense, sparse, difference) and contact_sheet.png, and prints how long a
    step takes and how far the pictures are apart.
    """
    from uta_fx.generate import compare
    from uta_fx.moving_shapes import load_pipeline, parse_prompt
    from uta_fx.pictures import comparison_rows, write_contact_sheet, write_gif

    for module in ("matplotlib", "PIL", "skimage"):
        require(module, extra="demo")  # missed now rather than after the work
    prompts = list(prompt or DEFAULT_PROMPTS)
    for text in prompts:
        parse_prompt(text)
    target = _device(device)
    config = Config(
        density=density, policy=policy, tail=tail, budget=budget, reorder=reorder,
        dense_until=dense_until, inner=_inner(target),
    )  # fmt: skip
    _check_folder(output)
    pipeline = load_pipeline(target, torch.float32 if target.type == "cpu" else torch.bfloat16)
    console.print(f"{len(prompts)} clips of 16 frames, {steps} steps, on {_name(target)}")
    with _bar() as bar:
        tasks = {name: bar.add_task(name, total=steps) for name in ("dense", "sparse")}
        result = compare(
            pipeline, prompts, config, steps=steps, seed=seed,
            progress=lambda name, step, _: bar.update(tasks[name], completed=step),
        )  # fmt: skip
    rows = comparison_rows(result.dense.videos, result.sparse.videos)
    gif = _publish(output, "comparison.gif", lambda path: write_gif(path, rows))
    sheet = _publish(
        output, "contact_sheet.png", lambda path: write_contact_sheet(path, prompts, rows)
    )

    table = rich_table.Table(title=f"{config.policy}, {config.tail}, one budget a {config.budget}")
    for heading in ("", "dense", "sparse"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows_of_table = [
        ("density", "1", f"{density:g}"),
        (
            "time a step",
            f"{result.dense_step_seconds:.3f} s",
            f"{result.sparse_step_seconds:.3f} s",
        ),
        ("speed-up a step", "", f"{result.speedup:.2f}x"),
        ("dense first steps", "", f"{result.dense_steps} of {steps}"),
        ("PSNR", "", f"{result.psnr:.1f} dB"),
        ("SSIM", "", f"{result.ssim:.4f}"),
        ("probe agreement", f"{result.dense.agreement:.0%}", f"{result.sparse.agreement:.0%}"),
    ]
    for row in rows_of_table:
        table.add_row(*row)
    console.print(table)
    if target.type == "cuda":
        console.print(
            "The 4096 tokens of this model are too few for a GPU to gain from: uta-fx bench"
            " attention times the sizes of real models."
        )
    console.print(f"{gif}\n{sheet}", soft_wrap=True)


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A released model, from its configuration alone: {RELEASED}; without it the"
            " shipped model."
        ),
    ] = None,
    size: ClipSize = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    density: Density = DEFAULTS.density,
    min_tokens: Annotated[
        int, typer.Option(help="Sites with fewer tokens stay dense.")
    ] = DEFAULTS.min_tokens,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    dump: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the rewritten graphs: graph_0.py to read and graph_0.dot for Graphviz,"
            " and so on."
        ),
    ] = None,
) -> None:
    """List every attention of a model: sparse or dense, why, and what it saves in operations.

    Traces on the meta device: no weights, no GPU, seconds.
    """
    config = Config(density=density, min_tokens=min_tokens)
    if dump is not None:
        _check_folder(dump)
    about: dict[str, Any] = {"density": density}
    if model is None:
        _need_model(size=size, height=height, width=width, frames=frames)
        about["model"], found = "moving-shapes", _explain_shipped(config)
    else:
        from uta_fx.study.real_models import find_model

        real = find_model(model)
        clip = real.size(size, height=height, width=width, frames=frames)
        about |= {"model": model, **vars(clip)}
        found = real.explain(clip, config)
        if not as_json:
            print(f"{real.title}, {clip}, density {density:g}\n")
    print(json.dumps(about | found.to_dict(), indent=2) if as_json else found)
    if dump is not None:
        files = found.dump(dump)
        if not as_json:
            print(*files, sep="\n")


def _explain_shipped(config: Config) -> Explanation:
    from uta_fx.explain import explain as explain_model
    from uta_fx.moving_shapes import load_pipeline
    from uta_fx.moving_shapes.pipeline import CLIP_SHAPE

    pipeline = load_pipeline().to("meta")
    words = torch.empty(
        1, pipeline.prompt_encoder.config.length, pipeline.prompt_encoder.config.dim, device="meta"
    )
    return explain_model(
        pipeline.transformer,
        hidden_states=torch.empty(1, *CLIP_SHAPE, device="meta"),
        timestep=torch.empty(1, device="meta"),
        encoder_hidden_states=words,
        return_dict=False,
        config=config,
    )


@study_app.callback()
def study(
    context: typer.Context,  # type: ignore[name-defined]  # mypy does not follow require
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 16,
    policy: PolicyName = str(DEFAULTS.policy),
    steps: Steps = 30,
    seed: Seed = 0,
    device: Device = "auto",
    output: Output = Path("study"),
) -> None:
    """Measure what choices are worth; without a command every tail, budget and token order.

    Generates the same prompts and seeds dense and in every combination, and compares the pictures;
    writes quality.md and quality.json as it goes. Takes minutes on a GPU and hours on a CPU.
    """
    if context.invoked_subcommand is not None:
        return
    from uta_fx.moving_shapes import held_out_scenes, load_pipeline
    from uta_fx.study.quality import Score, configurations, markdown, measure, write_json

    _check_folder(output)
    target = _device(device)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    pipeline = load_pipeline(target)
    texts = [scene.prompt for scene in held_out_scenes(prompts)]
    configs = configurations(Config(policy=policy))
    scores: list[Score] = []

    def table() -> str:
        return (
            f"{prompts} prompts, {steps} steps, policy {policy}, {_name(target)}, torch"
            f" {torch.__version__}: PSNR against dense in dB (probe agreement;"
            f" dense {scores[0].dense_agreement:.0%})\n\n{markdown(scores)}\n"
        )

    with _bar() as bar:
        task = bar.add_task("configurations", total=len(configs))
        for score in measure(pipeline, texts, configs, steps=steps, seed=seed):
            scores.append(score)
            # an interrupted study keeps what it has measured
            _publish(output, "quality.md", lambda path: path.write_text(table()))
            _publish(output, "quality.json", lambda path: write_json(path, scores))
            bar.update(task, advance=1, description=score.label)
    print(table())


@study_app.command("oracle")
def study_oracle(
    rows: Annotated[
        int | None, typer.Option(min=1, help="Query rows of each call to look at; default all.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    output: Output = Path("study"),
) -> None:
    """Keep single tokens by their true scores, drop or aggregate the others: the UTA paper's table.

    By three rules: the highest logits, the fewest tokens that hold a share of attention, and what
    would err most if it were aggregated.

    Mean squared error of the attention output in float64, over all layers, heads and three noise
    levels of the shipped model; writes oracle.json. On a CPU give --rows 64: a minute.
    """
    from uta_fx.moving_shapes import load_pipeline
    from uta_fx.study.oracle import markdown, measure_oracle, to_json
    from uta_fx.study.sites import trained_calls

    _check_folder(output)
    target = _device(device)
    torch.set_float32_matmul_precision("highest")
    calls = list(trained_calls(load_pipeline(target), seed=seed))
    with _bar() as bar:
        task = bar.add_task("attention calls", total=len(calls))
        errors = measure_oracle(calls, rows=rows, progress=lambda: bar.update(task, advance=1))
    _publish(output, "oracle.json", lambda path: path.write_text(to_json(errors)))
    print(
        f"{len(calls)} attention calls, {rows or 'all'} rows each, {_name(target)}, torch"
        f" {torch.__version__}: mean squared error, and recall\n\n{markdown(errors)}\n"
    )


@study_app.command("policies")
def study_policies(
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of blocks to keep; several times for several; default 0.1 to 0.5,"
            " and for ours less too."
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="System to measure; several times for several; default the UTA paper's and ours."
            " A name that is none lists them all."
        ),
    ] = None,
    calls: Annotated[
        int | None, typer.Option(min=1, help="How many attention calls of the model; default all.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=0, help="How many held-out prompts to generate; 0 for no pictures.")
    ] = 8,
    steps: Steps = 30,
    shape: Annotated[
        str | None, typer.Option(help="Shape to time the operation at, of uta-fx bench attention.")
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            help="Time the operation compiled by Inductor, ten seconds more for each row, and not"
            " recorded as it is."
        ),
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            help="Keep what policies.json in the folder holds of systems and densities that are not"
            " measured now, as of the same machine."
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    output: Output = Path("study"),
) -> None:
    """Put published sparse attentions side by side, each with its tail dropped and aggregated.

    Error and recall on the shipped model's own queries, keys and values, PSNR of its clips against
    dense, and, with --shape, the time and error of the operation at a real size. Writes
    policies.json, policies.md and policies.png as it goes; a row that fails says so, and the others
    are measured. Below the table it says who errs less than ours in the same time. Minutes on a
    GPU; on a CPU try --calls 2 --prompts 0.
    """
    from uta_fx.bench.inputs import SHAPES, trained_inputs
    from uta_fx.moving_shapes import held_out_scenes, load_pipeline
    from uta_fx.study import systems as study
    from uta_fx.study import systems_report as report
    from uta_fx.study.sites import trained_calls

    require("matplotlib", extra="demo")
    _check_densities(density)
    _check_folder(output)
    chosen = study.find_systems(system)
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    target = _device(device)
    pipeline = load_pipeline(target)
    title = f"{_name(target)}, torch {torch.__version__}"
    before = output / "policies.json"
    known = report.read_json(before) if add and before.exists() else []
    rows = {(row.system, row.density): row for row in known}
    measured: dict[tuple[str, float], study.Row] = {}
    configs: dict[tuple[str, float], Config] = {}

    def keep(row: study.Row) -> None:
        key = (row.system, row.density)
        rows[key] = measured[key] = row
        found = study.in_order(rows.values())
        about = {"machine": title, "calls": len(seen), "shape": shape}
        about |= {"prompts": prompts, "steps": steps}
        _publish(output, "policies.json", lambda path: report.write_json(path, about, found))
        table = f"{title}\n\n{report.markdown(found)}\n"
        _publish(output, "policies.md", lambda path: path.write_text(table))

    with _bar() as bar:
        total = sum(len(density or one.densities) for one in chosen)
        task = bar.add_task("attention", total=total)
        torch.set_float32_matmul_precision("highest")
        seen = list(trained_calls(pipeline, seed=seed))
        # as many as are asked for, from all layers and noise levels
        seen = seen[:: max(1, len(seen) // calls)][:calls] if calls else seen
        for row, config in study.attention_rows(seen, density, chosen):
            keep(row)
            if config is not None:
                configs[row.system, row.density] = config
            bar.update(task, advance=1, description=f"attention: {row.system}")
        torch.set_float32_matmul_precision("high")  # TF32 where there is any
        if shape is not None:
            task = bar.add_task("time", total=len(measured))
            dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
            inputs = trained_inputs(SHAPES[shape], target, dtype, seed)
            for row in study.timed_rows(
                list(measured.values()), SHAPES[shape], inputs, chosen, compile=compiled
            ):
                keep(row)
                bar.update(task, advance=1, description=f"time: {row.system}")
        if prompts:
            task = bar.add_task("pictures", total=len(configs))
            texts = [scene.prompt for scene in held_out_scenes(prompts)]
            configured = [(measured[key], config) for key, config in configs.items()]
            for row in study.pictured_rows(configured, pipeline, texts, steps, seed):
                keep(row)
                bar.update(task, advance=1, description=f"pictures: {row.system}")
    found = study.in_order(rows.values())
    _publish(output, "policies.png", lambda path: report.draw(path, found, title))
    print(f"{title}\n\n{report.markdown(found)}\n")
    if any(row.failure for row in measured.values()):
        raise typer.Exit(1)


@bench_app.command("attention")
def bench_attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Shape to time, several times for several: wan-1.3b-480p, wan-14b-720p,"
            " hunyuan-720p, cogvideox-5b, ltx-720p, mochi-480p, which are the default; or"
            " power-of-two, cpu-4k-64, cpu-4k-128, cpu-16k-64, cpu-16k-128, tiny."
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Density to time, several times for several; 0.05 to 0.5 by default."),
    ] = None,
    inputs: Inputs = "structured",
    policy: PolicyName = str(DEFAULTS.policy),
    tail: TailName = str(DEFAULTS.tail),
    budget: Budget = DEFAULTS.budget,
    block_q: Annotated[int, typer.Option(help="Query tokens in a block.")] = DEFAULTS.block_q,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds; medians are printed.")] = 15,
    device: Device = "auto",
    dtype: Dtype = "auto",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="What to time beside dense attention, several times for several: operation,"
            " in order, kernels, from lists, flex, reorder, statistics, scores, routing, listed or"
            " tail; all by default."
        ),
    ] = None,
    output: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to write: speed-up against density, error against time."),
    ] = None,
) -> None:
    """Time the attention operation against the best dense kernel, at shapes of real models.

    Checks sampled rows against float64 first: no time is printed when they disagree. The operation
    includes pooling, selection and tail. Dense baselines and candidates take turns.
    """
    from uta_fx.bench.attention import DEFAULT_SHAPES, DENSITIES, describe, run

    _check_densities(density)
    target = _device(device)
    of_inputs = _dtype(dtype, target)
    config = Config(policy=policy, tail=tail, budget=budget, block_q=block_q)
    if output is not None:
        _check_file(output, "--output")
    if plot is not None:
        require("matplotlib", extra="demo")
        _check_file(plot, "--plot")
        if only and not {"operation", "in order", "flex"} & set(only):
            raise ValueError("--plot draws operation, in order and flex: --only names none of them")
    rows = run(
        shape or DEFAULT_SHAPES,
        density or DENSITIES,
        config=config,
        inputs=inputs,
        device=str(target),
        dtype=of_inputs,
        rounds=rounds,
        only=only or (),
        output=output,
    )
    if plot is not None:
        from uta_fx.bench.plot import draw

        draw(plot, rows, f"{describe(str(target), of_inputs, config)}, {inputs} inputs")


@bench_app.command("tails")
def bench_tails(
    shape: Annotated[str, typer.Option(help="Shape to time.")] = "wan-1.3b-480p",
    density: Annotated[
        list[float] | None, typer.Option(help="Density to time; several times for several.")
    ] = None,
    inputs: Inputs = "structured",
    policy: PolicyName = str(DEFAULTS.policy),
    budget: Budget = DEFAULTS.budget,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds; medians are printed.")] = 9,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: JsonFile = None,
) -> None:
    """Time every form of the tail on the same lists of exact blocks, and say what it is worth.

    In milliseconds: the whole kernel, what it takes longer by than without a tail, and making the
    representatives; its share in time and in operations; the error against dense attention.
    """
    from uta_fx.bench.tails import run

    _check_densities(density)
    target = _device(device)
    if output is not None:
        _check_file(output, "--output")
    run(
        shape,
        density or (0.05, 0.1, 0.25, 0.5),
        config=Config(policy=policy, budget=budget),
        inputs=inputs,
        device=str(target),
        dtype=_dtype(dtype, target),
        rounds=rounds,
        output=output,
    )


@bench_app.command("model")
def bench_model(
    model: Annotated[
        list[str],
        typer.Option(help="Released model, as uta-fx explain names it; several times for several."),
    ],
    size: Annotated[
        str | None, typer.Option(help="Size of the clip, such as 480p or 720p; default its own.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Density to time; several times for several.")
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Compile the model as one graph; without it block by block."),
    ] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="At most so many of each kind of layer; default all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed forwards; medians are printed.")] = 3,
    device: Device = "auto",
    output: JsonFile = None,
) -> None:
    """Time one forward of a released model, dense and sparse, with random weights.

    Needs no checkpoint; the architecture has its real size. Compilation finds empty caches.
    """
    require("diffusers", extra="diffusers")
    from uta_fx.bench.model import run

    _check_densities(density)
    if output is not None:
        _check_file(output, "--output")
    run(
        model,
        density or (0.25, 0.1),
        size=size,
        whole=whole,
        layers=layers,
        rounds=rounds,
        device=str(_device(device)),
        output=output,
    )


Weights = Annotated[
    Path | None,
    typer.Option(help="Folder that examples/train_small_wan.py wrote; the shipped one without."),
]
Clips = Annotated[int, typer.Option(min=1, help="Clips in a batch.")]


@export_app.command("onnx")
def export_onnx(
    output: Annotated[Path, typer.Argument(help="File to write, ending in .onnx.")],
    model: ExportedModel = None,
    pretrained: Pretrained = None,
    size: ClipSize = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    dtype: ExportedDtype = "auto",
    dynamic_grid: DynamicGrid = False,
    decide_branches: DecideBranches = False,
    weights: Weights = None,
    density: Density = DEFAULTS.density,
    policy: PolicyName = str(DEFAULTS.policy),
    tail: TailName = str(DEFAULTS.tail),
    budget: Budget = DEFAULTS.budget,
    reorder: Reorder = DEFAULTS.reorder,
    clips: Clips = 1,
) -> None:
    """Write the shipped denoiser, or a released one, as an ONNX file with sparse attention inside.

    Other models: uta_fx.export_onnx in Python.
    """
    from uta_fx.exporters import check_place
    from uta_fx.exporters import export_onnx as write

    check_place(output, ".onnx")  # before weights are loaded
    config = Config(density=density, policy=policy, tail=tail, budget=budget, reorder=reorder)
    clip = {"size": size, "height": height, "width": width, "frames": frames}
    shapes = _dynamic_grid(model, clip) if dynamic_grid else None
    exported, arguments = _exported_model(model, pretrained, clip, dtype, weights, clips)
    print(
        write(
            exported, (), output, config=config, kwargs=arguments, dynamic_shapes=shapes,
            decide_branches=decide_branches,
        )
    )  # fmt: skip
    print(_written(output))


@export_app.command("tensorrt")
def export_tensorrt(
    output: Annotated[
        Path, typer.Argument(help="File to write, ending in .onnx; in .engine for --form engine.")
    ],
    form: Annotated[
        str,
        typer.Option(
            help="plugin (TensorRT with our kernels), standard (for TensorRT-RTX) or engine (by"
            " torch_tensorrt, on a GPU)."
        ),
    ] = "plugin",
    model: ExportedModel = None,
    pretrained: Pretrained = None,
    size: ClipSize = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    dtype: ExportedDtype = "auto",
    decide_branches: DecideBranches = False,
    weights: Weights = None,
    density: Density = DEFAULTS.density,
    policy: PolicyName = str(DEFAULTS.policy),
    tail: TailName = str(DEFAULTS.tail),
    budget: Budget = DEFAULTS.budget,
    reorder: Reorder = DEFAULTS.reorder,
    clips: Clips = 1,
) -> None:
    """Write the shipped denoiser, or a released one, for TensorRT, with sparse attention inside.

    Other models: uta_fx.export_tensorrt in Python.
    """
    from uta_fx.exporters import check_place
    from uta_fx.exporters import export_tensorrt as write

    check_place(output)  # before weights are loaded
    config = Config(density=density, policy=policy, tail=tail, budget=budget, reorder=reorder)
    clip = {"size": size, "height": height, "width": width, "frames": frames}
    exported, arguments = _exported_model(model, pretrained, clip, dtype, weights, clips)
    if form == "engine":
        device = _device("cuda")
        exported = exported.to(device)
        arguments = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
    print(
        write(
            exported, (), output, config=config, kwargs=arguments, form=form,
            decide_branches=decide_branches,
        )
    )  # fmt: skip
    print(_written(output))


@export_app.command("engine")
def export_engine(
    model: Annotated[
        Path, typer.Argument(help="File of uta-fx export tensorrt or uta_fx.export_tensorrt.")
    ],
    output: Annotated[Path, typer.Argument(help="Engine to write, such as model.engine.")],
    rtx: Annotated[
        bool, typer.Option("--rtx", help="Build with TensorRT-RTX, which needs no GPU for it.")
    ] = False,
    architecture: Annotated[
        list[int] | None,
        typer.Option(help="Compute capability to build for, such as 89; RTX takes several."),
    ] = None,
) -> None:
    """Build a TensorRT engine from an ONNX file of ours.

    TensorRT builds for the GPU of this machine.
    """
    from uta_fx.exporters import build_tensorrt_engine

    try:
        build_tensorrt_engine(model, output, rtx=rtx, architectures=architecture or None)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    print(f"wrote {output}, {output.stat().st_size / 1e6:.0f} MB")


@export_app.command("plugin")
def export_plugin(
    model: Annotated[
        Path, typer.Argument(help="File of uta-fx export onnx or uta_fx.export_onnx.")
    ],
    output: Annotated[Path, typer.Argument(help="Library to write, such as model.sm_90.so.")],
    architecture: Annotated[
        int, typer.Option(help="Compute capability of the GPU: 80, 86, 89, 90, 100 or 120.")
    ],
) -> None:
    """Compile our kernels for a file's sparse attention into a library for ONNX Runtime.

    Needs no GPU. Register it with SessionOptions.register_custom_ops_library, beside CUDA alone.
    """
    from uta_fx.exporters import build_onnxruntime_plugin

    try:
        build_onnxruntime_plugin(model, output, architecture=architecture)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    print(f"wrote {output}, {output.stat().st_size / 1e3:.0f} kB, for sm_{architecture}")


def _exported_model(
    name: str | None,
    pretrained: str | None,
    clip: Mapping[str, Any],
    dtype: str,
    weights: Path | None,
    clips: int,
) -> tuple[Any, dict[str, Any]]:
    """The model that is asked for, and its arguments for a clip."""
    of_file = _dtype("float16" if name and dtype == "auto" else dtype, torch.device("cpu"))
    if name is None:
        _need_model(**clip, pretrained=pretrained)
        return _shipped_model(weights, clips, of_file)
    from uta_fx.study.real_models import find_model

    if pretrained is None:
        raise ValueError(
            "--model needs --pretrained: a folder of its weights, or a name on the Hub"
        )
    if clips != 1 or weights is not None:
        raise ValueError("--clips and --weights are the shipped model's, --model takes neither")
    real = find_model(name)
    return real.pretrained(pretrained, of_file, _size(real, clip))


def _size(real: RealModel, clip: Mapping[str, Any]) -> Size:
    return real.size(clip["size"], **{side: x for side, x in clip.items() if side != "size"})


def _dynamic_grid(name: str | None, clip: Mapping[str, Any]) -> dict[str, Any]:
    """``dynamic_shapes`` for the arguments of ``_exported_model``."""
    from uta_fx.study.real_models import find_model

    if name is not None:
        real = find_model(name)
        return real.dynamic_grid(_size(real, clip))
    fixed = dict.fromkeys(("timestep", "encoder_hidden_states", "return_dict"))
    return {"hidden_states": dict.fromkeys((2, 3, 4), torch.export.Dim.DYNAMIC), **fixed}


def _need_model(**options: Any) -> None:
    """Raise a ValueError for an option that is given, and means something with --model alone."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} needs --model: the shipped model has one size")


def _shipped_model(
    weights: Path | None, clips: int, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The shipped denoiser, and its arguments for so many clips."""
    from uta_fx.moving_shapes import load_pipeline
    from uta_fx.moving_shapes.pipeline import CLIP_SHAPE, WEIGHTS

    pipeline = load_pipeline(dtype=dtype, weights=weights or WEIGHTS)
    words = pipeline.prompt_encoder.config
    return pipeline.transformer, {
        "hidden_states": torch.zeros(clips, *CLIP_SHAPE, dtype=dtype),
        "timestep": torch.zeros(clips, dtype=dtype),
        "encoder_hidden_states": torch.zeros(clips, words.length, words.dim, dtype=dtype),
        "return_dict": False,
    }


def _written(file: Path) -> str:
    """How large an ONNX file is, with its weights beside it."""
    beside = [x for x in file.parent.glob("*.data") if x.name.startswith(f"{file.name}.")]
    megabytes = sum(x.stat().st_size for x in (file, *beside)) / 1e6
    return f"wrote {file}, {megabytes:.0f} MB{' with its weights beside it' if beside else ''}"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA GPU is available to torch {torch.__version__}")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32, float16 or bfloat16, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _inner(device: torch.device) -> str:
    """Inductor, or a backend that needs no C++ compiler where there is none."""
    if device.type == "cuda":
        return "inductor"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        console.print(
            "No C++ compiler was found, which Inductor needs on a CPU: both runs use"
            " inner='aot_eager' and are slower than they could be."
        )
        return "aot_eager"
    return DEFAULTS.inner


def _check_densities(densities: list[float] | None) -> None:
    for density in densities or ():
        Config(density=density)


def _check_folder(folder: Path) -> None:
    """Fail before the work rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--output {folder} cannot be written: {error.strerror}") from None


def _check_file(file: Path, option: str) -> None:
    """As ``_check_folder``; a file that was not there is not there afterwards."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise OSError(f"{option} {file} cannot be written: {error.strerror}") from None


def _publish(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    """Write under a temporary name, then rename: a reader never finds half a file."""
    partial, final = folder / f".partial-{name}", folder / name
    try:
        write(partial)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return final


def _bar() -> Any:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        console=console,
    )
