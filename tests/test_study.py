"""The study: many configurations of one traced model, measured against dense."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from uta_fx import Config
from uta_fx.moving_shapes import held_out_scenes
from uta_fx.moving_shapes.pipeline import MovingShapesPipeline, PromptEncoder
from uta_fx.study.models import MODELS
from uta_fx.study.quality import configurations, markdown, measure, write_json
from uta_fx.study.real_exports import ALL, OTHERS, page
from uta_fx.tails import KINDS


def test_the_table_holds_every_combination_and_the_baselines():
    """Tails x budgets x orders, and pooled top-k with equal rows, at two densities and starts."""
    configs = configurations(Config())
    assert len(configs) == (len(KINDS) * 2 * 2 + 2) * 4
    assert len({config for _, config in configs}) == len(configs)
    assert ("topk, block, row, tile", Config(policy="topk", tail="block", budget="row",
            reorder="tile", density=0.1, dense_until=0.2)) in configs  # fmt: skip


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: model.title)
def test_a_real_model_has_one_layer_of_each_kind_and_its_arguments(model):
    """On the meta device: the class takes the settings, and the released size whole tokens."""
    assert set(model.depth().values()) != {1}
    built, size = model.build(1), model.size()
    assert {len(built.get_submodule(stack)) for stack in model.stacks} <= {1}
    given = model.inputs(model.latent(size), model.grid(size))
    assert given.keys() <= inspect.signature(built.forward).parameters.keys()


def test_rows_of_real_models_are_made_by_name():
    """Others stay as they are, unless other versions made them."""
    with pytest.raises(ValueError, match="only must name models of the table, got Wan 9"):
        page(["Wan 9"])
    with pytest.raises(ValueError, match="only needs a page that these versions made"):
        page(["Latte"], "# Another page")


def test_every_class_has_a_row_of_its_real_size():
    """The page has a row for each entry of the table, in their order, and no other."""
    text = (Path(__file__).parents[1] / "docs" / "onnx_sizes.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if " | " in line]
    assert rows == ["model", *ALL]
    assert {model.class_name for model in MODELS} <= {model.class_name for model in ALL.values()}


def test_a_study_measures_and_leaves_the_pipeline_as_it_was(tmp_path):
    """All exact is dense to rounding, sparse is not, a dense start is better; one graph for all."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4), in_channels=3, out_channels=3, text_dim=128, freq_dim=32,
        num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    pipeline = MovingShapesPipeline(
        transformer, PromptEncoder().eval(), FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    base = Config(density=1.0)
    configs = [
        ("all exact", base),
        ("sparse", dataclasses.replace(base, density=0.1)),
        ("dense start", dataclasses.replace(base, density=0.1, dense_until=0.5)),
    ]
    prompts = [scene.prompt for scene in held_out_scenes(1)]
    scores = list(measure(pipeline, prompts, configs, steps=2, seed=0))
    exact, sparse, started = (score.psnr for score in scores)
    assert exact > 80 > started > sparse
    assert "forward" not in vars(pipeline.transformer)
    table = markdown(scores).splitlines()
    assert len(table) == 5 and "first 50% dense" in table[0] and "-" in table[2]
    write_json(tmp_path / "scores.json", scores)
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["label"] for row in rows] == ["all exact", "sparse", "dense start"]
    assert rows[1]["density"] == "0.1" and rows[1]["psnr"] == sparse


def test_one_row_of_the_page_of_files_is_made_anew(monkeypatch):
    """The others stay; a page of other versions, or an unknown model, is refused."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from uta_fx.study import exports

    monkeypatch.setattr(exports, "_cells", lambda model: ("2", f"first {model.name}"))
    before = exports.page()
    monkeypatch.setattr(exports, "_cells", lambda model: ("4", "second"))
    page = exports.page(["Wan I2V"], before)
    assert page == before.replace("| Wan I2V | 2 | first Wan I2V |", "| Wan I2V | 4 | second |")
    assert page != before
    for only, given, message in (
        (["Wan 9"], before, "only must name models of the table, got Wan 9"),
        (["Wan"], before.replace("PyTorch", "PyTorch 1.0"), "only needs a page that these"),
    ):
        with pytest.raises(ValueError, match=message):
            exports.page(only, given)


def test_the_page_of_files_is_what_this_version_writes():
    """All but the errors: its remarks, its nodes, and a row for every model."""
    from uta_fx.study import exports

    text = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text()
    assert text.endswith(f"{exports.REMARKS}\n\n{exports.nodes()}\n")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if " | " in line]
    names = [model.name for model in exports.MODELS]
    assert rows[: len(names) + 1] == ["model", *names]
