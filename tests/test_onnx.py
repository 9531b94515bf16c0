"""Models as ONNX files: the functions, the file, and what ONNX Runtime makes of it."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, double
from test_fitting import CASES as FITS
from test_fitting import assert_fit_is_accurate
from torch import nn

from uta_fx import Config, bind_tensors, export_onnx, onnxruntime_session
from uta_fx.explain import FULL_CAPTURE
from uta_fx.kernels import reference
from uta_fx.policies import Radial
from uta_fx.study.models import MODELS
from uta_fx.study.models import SMALL as SMALL_MODEL
from uta_fx.tails import Tail

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx_nodes  # noqa: E402  # need onnx

from uta_fx.export import onnx_functions, onnx_model  # noqa: E402
from uta_fx.export.replace_file import LOCK, folder_beside  # noqa: E402

SMALL = {"min_tokens": 128, "block_q": 32, "block_kv": 32}


def run(model_or_path, inputs):
    """Outputs of ONNX Runtime on the CPU, with nothing of ours registered."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model_or_path, options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def run_node(function, inputs, attributes, expected):
    """Run one node of our domain by its function, whose results have the shapes of ``expected``."""
    arrays = {name: x.numpy() for name, x in inputs.items()}
    outputs = [x.float() for x in expected]
    model = onnx_nodes.node_file(function, inputs, attributes, outputs)
    onnx.checker.check_model(model, full_check=True)
    return [torch.from_numpy(x) for x in run(model.SerializeToString(), arrays)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("slopes", ["none", "head", "row"])
@pytest.mark.parametrize("opset", [18, 23])
def test_the_function_is_the_operator(dtype, tail, slopes, opset):
    """Ragged on both sides, uneven counts, an empty row, every form of tail, opsets 18 and 23.

    Sums are float32 and the output is rounded to its dtype once, so it may err by what the
    reference errs in float32 on the same inputs, and eight units in the last place of the largest
    output.
    """
    args = Case(dtype=dtype, tail=tail, slopes=slopes).inputs()
    exact, exact_lse = reference.sparse_attention(*double(args))
    in_float = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    eager, _ = reference.sparse_attention(*in_float)
    model, inputs = onnx_functions.node_model(args, opset)
    onnx.checker.check_model(model, full_check=True)
    output, lse = map(torch.from_numpy, run(model.SerializeToString(), arrays_of(inputs)))
    assert output.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().amax().item()
    assert (output - exact).abs().amax() <= (eager - exact).abs().amax() + 8 * rounding
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    torch.testing.assert_close(lse[~empty], exact_lse[~empty].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [7, 64, 101])
def test_the_function_of_statistics_is_the_operator(length):
    """Tiny, whole and ragged; the last block counts its true tokens alone."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, length, 24, generator=generator) + 3
    value = torch.randn(2, 3, length, 40, generator=generator)
    expected = reference.block_statistics(key.double(), value.double(), 32)
    function = onnx_functions.block_statistics_function(18)
    results = run_node(function, {"key": key, "value": value}, {"block_kv": 32}, expected)
    for got, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)


def test_the_function_of_statistics_keeps_the_dtype_of_keys():
    """Rounded once: of the means and the variances of channels; sums stay float32."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 70, 16, generator=generator).half() for _ in range(2))
    model, named = onnx_nodes.statistics_file(key, value, 32)
    results = [torch.from_numpy(x) for x in run(model.SerializeToString(), arrays_of(named))]
    for got, exact in zip(results, reference.block_statistics(key, value, 32), strict=True):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, exact, rtol=2 * eps, atol=2e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_function_of_scores_is_the_operator(power):
    """Every power, with the variance in the mass, ragged rows."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "query": torch.randn(2, 3, 101, 24, generator=generator),
        "key_mean": torch.randn(2, 3, 5, 24, generator=generator),
        "key_variance": torch.rand(2, 3, 5, 24, generator=generator),
        "log_size": torch.rand(2, 3, 5, generator=generator),
    }
    attributes = {
        "scale": 0.2, "variance_weight": 0.5, "variance_power": power, "block_q": 32, "rows": 2,
        "score_type": 1,
    }  # fmt: skip
    exact = reference.block_scores(*(x.double() for x in inputs.values()), 0.2, 0.5, power, 32, 2)
    for known in (power, None):  # None: the function for any power
        function = onnx_functions.block_scores_function(18, known)
        (scores,) = run_node(function, inputs, attributes, [exact])
        torch.testing.assert_close(scores, exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        "whole_blocks",
        "one_token",
        "fewer_tokens_than_rows",
        "everything_exact",
        "head_dims_of_their_own",
        "clusters",
        "every_second_block",
        "every_third_cluster",
        "nearly_all_in_tails",
    ],
)
def test_the_function_of_a_fit_is_the_operator(name, dtype):
    """As accurate as a kernel is: sums are float32, and so is the scale."""
    args = FITS[name].inputs(dtype, "cpu")
    args[10] = torch.tensor(args[10]).item()
    model, named = onnx_nodes.fit_file(args)
    onnx.checker.check_model(model, full_check=True)
    found = run(model.SerializeToString(), arrays_of(named))
    assert_fit_is_accurate(args, [torch.from_numpy(x) for x in found])


def test_rows_that_are_not_finite_do_not_count_in_the_function_of_a_fit():
    """Nor make the factors anything but numbers."""
    args = FITS["ragged"].inputs(torch.float32, "cpu")
    model, named = onnx_nodes.fit_file(args)
    args[0][:, :, 4] = torch.nan  # the first row of the sample
    found = [torch.from_numpy(x) for x in run(model.SerializeToString(), arrays_of(named))]
    assert all(x.isfinite().all() and (x != 1).all() for x in found)
    for got, expected in zip(found, reference.fit_tail(*args), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_file_rounds_scores_as_the_operator(tmp_path):
    """To bfloat16, for queries in float16: both by half a unit, of sums in another order."""

    class Scores(nn.Module):
        def forward(self, query, mean):
            arguments = (query, mean, mean.square(), log_size, 0.2, 0.0, 1.0, 32, 2)
            return torch.ops.uta.block_scores.default(*arguments).float()

    generator = torch.Generator().manual_seed(0)
    query, mean = (torch.randn(1, 2, n, 32, generator=generator).half() for n in (70, 5))
    log_size = torch.zeros(1, 2, 5)
    path = tmp_path / "scores.onnx"
    program = torch.export.export(Scores(), (query, mean))
    onnx_model.write_onnx(program, [], path, opset=18, metadata={})
    (scores,) = run(path, {"query": query.numpy(), "mean": mean.numpy()})
    scores, expected = torch.from_numpy(scores), Scores()(query, mean)
    assert torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def wan(layers=1):
    """A small Wan and its inputs."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=3,
        out_channels=3, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=layers,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    return model, wan_inputs()


def wan_inputs(batch=2, words=9, width=24):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 16, width, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, words, 16, generator=generator),
    }


@torch.no_grad()
def compiled(model, inputs, **options):
    """What the backend computes."""
    fast = torch.compile(model, backend="uta", options={"inner": "eager", **SMALL, **options})
    return fast(**inputs, return_dict=False)[0]


def arrays_of(inputs):
    return {name: x.numpy() for name, x in inputs.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"tail": "gaussian"},
        {"tail": "bins", "reorder": "morton", "dense_layers": "0"},
    ],
    ids=str,
)
def test_a_file_computes_what_the_backend_computes(tmp_path, options):
    """Float32 differs by rounding alone: a relative error of 1e-4 is the goal, 1e-5 is asked."""
    model, inputs = wan(layers=2)
    path = tmp_path / "model.onnx"
    config = Config(density=0.3, **SMALL, **options)
    explanation = export_onnx(
        model, (), path, config=config, kwargs={**inputs, "return_dict": False}
    )
    (output,) = run(path, arrays_of(inputs))
    expected = compiled(model, inputs, density=0.3, **options).numpy()
    assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)

    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    sparse = [site.name for site in explanation.sites if site.sparse]
    nodes = [node for node in loaded.graph.node if node.domain == "uta"]
    attend = [node.name for node in nodes if node.op_type == "SparseAttention"]
    assert attend == [f"{name}/SparseAttention" for name in sparse]
    assert {node.op_type for node in nodes} <= set(onnx_model.KEPT)
    assert {function.name for function in loaded.functions} == {node.op_type for node in nodes}
    assert [x.name for x in loaded.graph.input] == list(inputs)
    assert [x.name for x in loaded.graph.output] == ["output"]
    names = [node.name for node in loaded.graph.node]
    assert any(name.startswith("blocks.1.ffn.net.2/linear") for name in names)
    assert len(set(names)) == len(names)
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in loaded.graph.initializer}
    for name, x in model.named_parameters():
        form = name if name in weights else f"{name}.transposed"
        np.testing.assert_array_equal(weights[form], (x if form == name else x.mT).detach())
    assert {entry.key for node in loaded.graph.node for entry in node.metadata_props} == {
        "namespace"
    }
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert json.loads(metadata["uta_fx.config"])["density"] == 0.3
    assert [site["name"] for site in json.loads(metadata["uta_fx.sites"])] == [
        site.name for site in explanation.sites
    ]
    assert metadata["uta_fx.version"]
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_file_in_half_precision_errs_no_more_than_the_backend(tmp_path):
    """Against float32; roundings come in another order, hence twice."""
    model, inputs = wan()
    exact = compiled(model, inputs, density=0.3).numpy().astype(np.float64)
    model, inputs = model.half(), {name: x.half() for name, x in inputs.items()}
    path = tmp_path / "model.onnx"
    config = Config(density=0.3, **SMALL)
    export_onnx(model, (), path, config=config, kwargs={**inputs, "return_dict": False})
    (output,) = run(path, arrays_of(inputs))
    assert output.dtype == np.float16
    backend = compiled(model, inputs, density=0.3).numpy()
    assert np.linalg.norm(output - exact) <= 2 * np.linalg.norm(backend - exact)


def shallow(name):
    """An entry of the table with one layer of each kind; Mochi's last is of another kind."""
    pytest.importorskip("diffusers")
    (entry,) = (entry for entry in MODELS if entry.name == name)
    fewer = {"num_layers": 2 if name == "Mochi" else 1, "num_single_layers": 1}
    settings = {**entry.settings, **{x: n for x, n in fewer.items() if x in entry.settings}}
    return dataclasses.replace(entry, settings=settings)


@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX 5B", "LTX-Video", "Mochi", "Allegro"])
def test_a_model_of_diffusers_computes_what_the_backend_computes(tmp_path, name):
    """Joint attention, masks, text whose length only a run knows, boolean and odd operations."""
    entry = shallow(name)
    model, arguments = entry.build(), entry.arguments()
    config = dataclasses.replace(SMALL_MODEL, density=0.3, grid=entry.grid)
    path = tmp_path / "model.onnx"
    kwargs = {**arguments, "return_dict": False}
    explanation = export_onnx(model, (), path, config=config, kwargs=kwargs)
    assert any(site.sparse for site in explanation.sites)
    parts = [part for x in arguments.values() for part in (x if isinstance(x, tuple) else [x])]
    tensors = [x for x in parts if torch.is_tensor(x)]
    names = [x.name for x in onnx.load(path).graph.input]
    outputs = run(path, dict(zip(names, (x.numpy() for x in tensors), strict=True)))
    options = {"inner": "eager", "density": 0.3, "min_tokens": 48, "block_q": 16, "block_kv": 16}
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        expected = torch.compile(model, backend="uta", options=options)(**kwargs)[0].numpy()
    assert np.linalg.norm(outputs[0] - expected) <= 1e-5 * np.linalg.norm(expected)


class Joint(nn.Module):
    """One attention of video tokens, cut from a clip by a convolution, with text around them."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.to_qkv = nn.Linear(32, 96)

    def forward(self, clip, before, after):
        video = self.patch(clip).flatten(2).transpose(1, 2)
        x = torch.cat([before, video, after], 1)
        q, k, v = (
            y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_text_beside_the_video_is_a_second_node(tmp_path):
    """The text's keys are exact for all: a node of its own, named after the same module."""
    torch.manual_seed(0)
    model = Joint().eval()
    inputs = (torch.randn(1, 3, 4, 16, 24), torch.randn(1, 5, 32), torch.randn(1, 7, 32))
    path = tmp_path / "joint.onnx"
    export_onnx(model, inputs, path, config=Config(density=0.4, **SMALL))
    names = ("clip", "before", "after")
    (output,) = run(path, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    options = {"inner": "eager", "density": 0.4, **SMALL}
    expected = torch.compile(model, backend="uta", options=options)(*inputs).numpy()
    assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)
    nodes = [node.name for node in onnx.load(path).graph.node if node.op_type == "SparseAttention"]
    assert len(nodes) == 2
    assert nodes[0].endswith("/video/SparseAttention")
    assert nodes[1].endswith("/text/SparseAttention")


class Mixed(Joint):
    """Attention in bfloat16, the rest in float32, as Sana WM has it."""

    def forward(self, clip):
        x = self.patch(clip).flatten(2).transpose(1, 2)
        q, k, v = (
            y.unflatten(-1, (2, 16)).transpose(1, 2).bfloat16()
            for y in self.to_qkv(x).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.float().transpose(1, 2).flatten(2)


@torch.no_grad()
def test_attention_in_bfloat16_runs_on_a_cpu_in_a_model_of_float32(tmp_path):
    """What selects and aggregates is float32 there; outputs may round to the next number."""
    torch.manual_seed(0)
    model, clip = Mixed().eval(), torch.randn(1, 3, 4, 16, 24)
    path = tmp_path / "mixed.onnx"
    export_onnx(model, (clip,), path, config=Config(density=0.4, **SMALL, strict=True))
    (output,) = run(path, {"clip": clip.numpy()})
    options = {"inner": "eager", "density": 0.4, **SMALL}
    expected = torch.compile(model, backend="uta", options=options)(clip).numpy()
    eps = torch.finfo(torch.bfloat16).eps
    assert np.linalg.norm(output - expected) <= eps * np.linalg.norm(expected)


class Padded(Joint):
    """Clips of several lengths in a batch."""

    def forward(self, clip, lengths):
        x = self.patch(clip).flatten(2).transpose(1, 2)
        q, k, v = (
            y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1)
        )
        shown = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return attended.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_mask_of_padding_is_read_as_lengths(tmp_path):
    """Of the run, not of the export."""
    torch.manual_seed(0)
    model, clip, lengths = Padded().eval(), torch.randn(2, 3, 4, 16, 24), torch.tensor([384, 70])
    path = tmp_path / "padded.onnx"
    export_onnx(model, (clip, lengths), path, config=Config(density=0.4, **SMALL, strict=True))
    options = {"inner": "eager", "density": 0.4, **SMALL}
    fast = torch.compile(model, backend="uta", options=options)
    for lengths in (torch.tensor([384, 70]), torch.tensor([200, 1])):
        (output,) = run(path, {"clip": clip.numpy(), "lengths": lengths.numpy()})
        expected = fast(clip, lengths).numpy()
        assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)


@torch.no_grad()
@pytest.mark.parametrize("joint", [False, True])
def test_rectified_attention_is_the_same_node_and_two_operations(tmp_path, joint):
    """With text or none; the half block of the lists' last row is cut off."""
    torch.manual_seed(0)
    model = Joint().eval()
    words = (5, 7) if joint else (0, 0)
    inputs = (torch.randn(1, 3, 4, 14, 24), *(torch.randn(1, n, 32) for n in words))
    path = tmp_path / "rectified.onnx"
    options = {"policy": "rectified", "tail": "rectified", "density": 0.2, "grid": (4, 7, 12)}
    explanation = export_onnx(model, inputs, path, config=Config(**options, **SMALL))
    assert [site.sparse for site in explanation.sites] == [True]
    names = ("clip", "before", "after")
    (output,) = run(path, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    options |= {"inner": "eager", **SMALL}
    expected = torch.compile(model, backend="uta", options=options)(*inputs).numpy()
    assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)
    (node,) = (
        node.name for node in onnx.load(path).graph.node if node.op_type == "SparseAttention"
    )
    assert node.endswith("/SparseAttention") and "/text" not in node


def test_batch_and_text_may_be_dynamic(tmp_path):
    """One file for every batch and every length of the prompt."""
    model, inputs = wan()
    path = tmp_path / "model.onnx"
    batch, words = torch.export.Dim("batch"), torch.export.Dim("words", max=512)
    shapes = {
        "hidden_states": {0: batch},
        "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: words},
        "return_dict": None,
    }
    config = Config(density=0.3, **SMALL)
    kwargs = {**inputs, "return_dict": False}
    export_onnx(model, (), path, config=config, kwargs=kwargs, dynamic_shapes=shapes)
    for other in (wan_inputs(batch=1), wan_inputs(batch=3, words=20)):
        (output,) = run(path, arrays_of(other))
        expected = compiled(model, other, density=0.3).numpy()
        assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)


class Doubled(nn.Module):
    """Of as many channels again, scaled sample by sample."""

    def forward(self, x, scales):
        return torch.cat([x, x * scales["of samples"][:, None]], 1)


class Attending(nn.Module):
    """Dense attention under a mask."""

    def forward(self, query, key, value, mask):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_query_that_sees_no_key_is_zero(tmp_path, opset, dtype):
    """As in PyTorch; the mean of all values, which it may not see, is far from that."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, 8, 16, generator=generator, dtype=dtype) for _ in range(3)]
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, :, 5:], mask[1, :, 3] = False, False
    inputs = dict(zip(("query", "key", "value", "mask"), (*tensors, mask), strict=True))
    path = tmp_path / "model.onnx"
    export_onnx(Attending().eval(), tuple(inputs.values()), path, opset=opset)
    (output,) = run(path, {name: x.numpy() for name, x in inputs.items()})
    exact = Attending()(*(x.double() for x in tensors), mask).numpy()
    assert not exact[1, :, 3].any() and not output[1, :, 3].any()
    # some roundings of numbers up to the size of a value, which is below 4
    np.testing.assert_allclose(output, exact, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("opset", [18, 23])
def test_attention_to_no_keys_is_zero(tmp_path, opset):
    """A text of length 0, which neither the exporter nor ONNX Runtime takes."""
    query, none = torch.ones(2, 3, 8, 16), torch.ones(2, 3, 0, 16)
    inputs = {"query": query, "key": none, "value": none[..., :5], "mask": None}
    path = tmp_path / "model.onnx"
    export_onnx(Attending().eval(), (), path, kwargs=inputs, opset=opset)
    names = [x.name for x in onnx.load(path).graph.input]
    (output,) = run(path, {name: inputs[name].numpy() for name in names})
    np.testing.assert_array_equal(output, np.zeros((2, 3, 8, 5)))


def test_sizes_have_the_names_of_their_dims(tmp_path):
    """What follows from them, too; a viewer shows no ``s47`` where the user has said more."""
    batch, half = torch.export.Dim("batch"), torch.export.Dim("half")
    shapes = {"x": (batch, 2 * half, None), "scales": {"of samples": {0: batch}}}
    inputs = (torch.ones(2, 4, 3), {"of samples": torch.ones(2, 3)})
    path = tmp_path / "model.onnx"
    export_onnx(torch.compile(Doubled().eval()), inputs, path, dynamic_shapes=shapes)
    graph = onnx.load(path).graph
    found = [
        [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
        for x in (*graph.input, *graph.output)
    ]
    assert found == [["batch", "2*half", 3], ["batch", 3], ["batch", "4*half", 3]]


def test_the_size_of_the_video_may_not_where_a_policy_needs_numbers(tmp_path):
    """Radial selects by frames, which are then numbers; nothing is written."""
    model, inputs = wan()
    shapes = {
        "hidden_states": {4: 2 * torch.export.Dim("half_width", min=2, max=64)},
        "timestep": None,
        "encoder_hidden_states": None,
        "return_dict": None,
    }
    kwargs = {**inputs, "return_dict": False}
    with pytest.raises(ValueError, match="leave dimension 4 of hidden_states fixed"):
        export_onnx(
            model, (), tmp_path / "model.onnx", config=Config(policy="radial", **SMALL),
            kwargs=kwargs, dynamic_shapes=shapes,
        )  # fmt: skip
    assert not os.listdir(tmp_path)


DYNAMIC = torch.export.Dim.DYNAMIC


class Fixed(nn.Module):
    """Of two samples, and of two inputs of one length."""

    def forward(self, x, y):
        return x.reshape(2, 2, -1) + y.mean(), x[0] + y


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (({0: "n"}, None), r"as the model needs them: n = 4\. A dimension that is a number"),
        (({1: "n"}, {0: "m"}), r"as the model needs them: m = n\. "),
        (({1: DYNAMIC}, None), r"needs them: You marked L\['x'\].* to be a constant \(6\)\. A dim"),
        (({0: "n"},), r"must fit the arguments: "),
    ],
)
def test_a_dimension_that_the_model_decides_is_named(tmp_path, shapes, message):
    """In the words of ``dynamic_shapes``; nothing is written."""
    dims = [
        x and {dim: y if y is DYNAMIC else torch.export.Dim(y) for dim, y in x.items()}
        for x in shapes
    ]
    inputs = (torch.ones(4, 6), torch.ones(6))
    with pytest.raises(ValueError, match=message):
        export_onnx(Fixed().eval(), inputs, tmp_path / "m.onnx", dynamic_shapes=tuple(dims))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({"x": {2: DYNAMIC}}, ValueError, r"of x, whose sizes are \[4, 6\], counted .*, got 2"),
        (({0: DYNAMIC}, {-1: DYNAMIC}), ValueError, r"of y, whose sizes are \[6\], .*, got -1"),
        (([DYNAMIC], None), ValueError, r"an entry for each dimension of x, .*, got 1"),
        (({0: 3}, None), ValueError, r"must fit the arguments: Static shape constraint of 3"),
        (({0: "n"}, None), ValueError, r"must fit the arguments: Unexpected dimension"),
        (4, TypeError, r"dynamic_shapes must be a dict, a tuple, a list or None, got 4"),
    ],
)
def test_a_dimension_that_is_not_there_is_named(tmp_path, shapes, error, message):
    """torch.export would leave such ones out without a word."""
    inputs = (torch.ones(4, 6), torch.ones(6))
    with pytest.raises(error, match=message):
        export_onnx(Fixed().eval(), inputs, tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert not os.listdir(tmp_path)


@dataclasses.dataclass(frozen=True)
class Looking(Radial):
    """A policy that chooses by what it sees on the host."""

    def select(self, selection):
        assert selection.query.sum() != 0
        return super().select(selection)


def test_a_policy_that_looks_at_values_is_refused(tmp_path):
    """A file cannot do that."""
    model, inputs = wan()
    with pytest.raises(ValueError, match=r"policy=.*Looking.* cannot be exported: what it chooses"):
        export_onnx(
            model, (), tmp_path / "model.onnx", config=Config(policy=Looking(), **SMALL),
            kwargs={**inputs, "return_dict": False},
        )  # fmt: skip
    assert not os.listdir(tmp_path)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    """Before anything is traced."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'uta-fx\[onnx\]'"):
        export_onnx(nn.Linear(4, 4).eval(), (torch.ones(4),), tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)
    for package in ("onnxruntime", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
        for call in (lambda: bind_tensors(None, {}, {}), lambda: onnxruntime_session("m.onnx")):
            with pytest.raises(ImportError, match=rf"{package} could .* 'uta-fx\[onnx\]'"):
                call()


class Untranslatable(nn.Module):
    """An operation that ONNX has no word for."""

    def forward(self, x):
        return torch.linalg.eigvals(x)


class Rounded(nn.Conv1d):
    """It computes in bfloat16 with weights of float32."""

    def __init__(self):
        super().__init__(4, 4, 1)

    def forward(self, x):
        weight = self.weight.bfloat16()
        return nn.functional.conv1d(x[None].bfloat16(), weight)


class Branching(nn.Module):
    """What it does depends on its input."""

    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


BRANCH = Branching.forward.__code__.co_firstlineno + 1  # its line


@pytest.mark.parametrize(
    ("model", "options", "path", "message"),
    [
        (nn.Linear(4, 4).eval(), {}, "model.txt", "path must end in .onnx"),
        (nn.Linear(4, 4).eval(), {}, "no/model.onnx", "path must lie in a folder that exists"),
        (nn.Linear(4, 4).eval(), {"opset": 17}, "model.onnx", "opset must be at least 18 and at"),
        (nn.Linear(4, 4).eval(), {"opset": 99}, "model.onnx", "at most .*, got 99"),
        (nn.Linear(4, 4, device="meta").eval(), {}, "model.onnx", "model must have weights"),
        (nn.Linear(3, 4).eval(), {}, "model.onnx", "See whether it runs with these arguments"),
        (nn.Linear(4, 4).train(), {}, "model.onnx", "model must be in eval mode"),
        (
            nn.Linear(4, 4).eval(),
            {"config": Config(dense_until=0.2)},
            "model.onnx",
            "dense_until=0.2 cannot be exported",
        ),
        (Rounded().eval(), {}, "model.onnx", "written in opset 18: .* take bfloat16 from 22 on"),
        (Untranslatable().eval(), {}, "model.onnx", "cannot be written as ONNX: No ONNX function"),
        (Branching().eval(), {}, "model.onnx", "model cannot be traced by torch.export: "),
        (Branching().eval(), {}, "model.onnx", "unless decide_branches=True takes the way"),
        (nn.Linear(4, 4).eval(), {}, f"{'x' * 250}.onnx", "must have a name of at most 238 bytes"),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, model, options, path, message):
    """One sentence, and nothing half written."""
    with pytest.raises(ValueError, match=message):
        export_onnx(model, (torch.ones(4, 4),), tmp_path / path, **options)
    assert not os.listdir(tmp_path)


def test_settings_that_are_objects_are_noted_by_their_names(tmp_path):
    """As one writes them: of their fields alone nobody could tell whose they are."""
    path = tmp_path / "model.onnx"
    config = Config(policy=Radial(decay=0.3), tail=Tail(kind="block"))
    export_onnx(nn.Linear(4, 4).eval(), (torch.ones(4),), path, config=config)
    (written,) = (x.value for x in onnx.load(path).metadata_props if x.key == "uta_fx.config")
    settings = json.loads(written)
    assert settings["policy"] == repr(config.policy) and "Radial(decay=0.3" in written
    assert settings["tail"] == repr(config.tail)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 26, reason="needs a later onnx")
def test_an_opset_that_the_exporter_does_not_know_is_refused(tmp_path):
    """It would leave the model in another; nothing is written."""
    with pytest.raises(ValueError, match=r"model cannot be written in opset 26: the exporter"):
        export_onnx(nn.GELU().eval(), (torch.ones(4),), tmp_path / "m.onnx", opset=26)
    assert not os.listdir(tmp_path)


def test_an_opset_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"opset must be a whole number or None, got 18\.0"):
        export_onnx(nn.Linear(4, 4).eval(), (torch.ones(4),), tmp_path / "m.onnx", opset=18.0)


if importlib.util.find_spec("package_of_nobody"):  # as libraries do
    from package_of_nobody import transforms


class Importing(nn.Module):
    """It imports what is not installed."""

    def forward(self, x):
        import package_of_nobody.transforms

        return package_of_nobody.transforms(x)


class Naming(nn.Module):
    """It names what was not imported, because it is not installed."""

    def forward(self, x):
        return transforms(x)


@pytest.mark.parametrize("model", [Importing(), Naming()], ids=["import", "name"])
@pytest.mark.parametrize("decide", [False, True])
def test_a_package_that_a_model_misses_is_named(tmp_path, model, decide):
    with pytest.raises(ImportError, match=r"package_of_nobody, .* pip install package_of_nobody"):
        export_onnx(model.eval(), (torch.ones(4),), tmp_path / "model.onnx", decide_branches=decide)
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_seen_before_the_work(tmp_path, monkeypatch):
    """A folder of the file's name, and one that is not ours."""
    folder, model = tmp_path / "folder.onnx", nn.Linear(4, 4).eval()
    folder.mkdir()
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(ValueError, match=r"path must be a file, got the folder .*folder\.onnx"):
        export_onnx(model, (torch.ones(4),), folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for others than root
    with pytest.raises(ValueError, match="path must lie in a folder that can be written to, got"):
        export_onnx(model, (torch.ones(4),), tmp_path / "model.onnx")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_may_be_decided_by_the_inputs(tmp_path, sign):
    """The file says which way it takes, and answers NaN where another would be taken."""
    model, path, x = Branching().eval(), tmp_path / "model.onnx", sign * torch.ones(4, 4)
    explanation = export_onnx(model, (x,), path, decide_branches=True)
    said = f"`return x + 1 if x.sum() > 0 else x` (test_onnx.py:{BRANCH}) is {sign > 0}"
    assert explanation.notes == (f"decided by these inputs, others give NaN: {said}",)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["uta_fx.branches"]) == [said]
    for other in (x, 2 * x, -x):
        (output,) = run(path, {"x": other.numpy()})
        if torch.equal(other, -x):
            assert np.isnan(output).all()
        else:
            np.testing.assert_array_equal(output, model(other))
    assert "forward" not in vars(model)


def test_hunyuan_video_15_takes_every_prompt_and_one_kind_of_image(tmp_path):
    """It asks whether its image is empty; how much of the text is padding a run may change."""
    entry = shallow("HunyuanVideo 1.5")
    model, path = entry.build(), tmp_path / "model.onnx"
    arguments = {**entry.arguments(), "return_dict": False}
    config = dataclasses.replace(SMALL_MODEL, density=0.3)
    explanation = export_onnx(
        model, (), path, config=config, kwargs=arguments, decide_branches=True
    )
    sites = [site for site in explanation.sites if site.kind == "joint"]
    assert [(site.sparse, site.grid, site.text) for site in sites] == [
        (True, entry.grid, (0, 18))  # a plugin and an engine need to know how much text there is
    ]
    options = {
        "inner": "eager", "density": 0.3, "grid": entry.grid, "min_tokens": 48, "block_q": 16,
        "block_kv": 16,
    }  # fmt: skip
    arrays = {name: x.numpy() for name, x in arguments.items() if torch.is_tensor(x)}
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        compiled = torch.compile(model, backend="uta", options=options)
        for words in (7, 3):
            arrays["encoder_attention_mask"][:] = np.arange(11) < words  # and the tensor with it
            (output,) = run(path, arrays)
            expected = compiled(**arguments)[0].numpy()
            assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)
    (output,) = run(path, {**arrays, "image_embeds": np.ones_like(arrays["image_embeds"])})
    assert np.isnan(output).all()


def test_only_a_module_is_exported(tmp_path):
    """Not a function, with arguments in a tuple and a dict."""
    path, x, linear = tmp_path / "model.onnx", torch.ones(4), nn.Linear(4, 4).eval()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        export_onnx(lambda x: x, (x,), path)
    with pytest.raises(TypeError, match=r"args must be a tuple of .*, got Tensor"):
        export_onnx(linear, x, path)
    with pytest.raises(TypeError, match=r"kwargs must be a dict of .*, got list"):
        export_onnx(linear, (), path, kwargs=[x])


class Returning(nn.Module):
    """Outputs that have no place in a file, under names that are taken there."""

    def __init__(self, other):
        super().__init__()
        self.output_1 = nn.Parameter(torch.ones(4))
        self.other = other

    def forward(self, output_0):
        return {"sum": output_0 + self.output_1, "other": (output_0 * 2, self.other)}


def test_outputs_have_names_of_their_own(tmp_path, caplog):
    """None is no output."""
    path, x = tmp_path / "model.onnx", torch.ones(2, 4)
    export_onnx(Returning(None).eval(), (x,), path)
    assert [x.name for x in onnx.load(path).graph.output] == ["output_0_after", "output_1_after"]
    total, double = run(path, {"output_0": x.numpy()})
    assert (total == 2).all() and (double == 2).all()
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]


def test_an_output_that_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must return tensors, got 3 among its outputs"):
        export_onnx(Returning(3).eval(), (torch.ones(2, 4),), tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)


def test_strict_writes_nothing_where_a_site_stays_dense(tmp_path):
    """As in the backend."""
    model, inputs = wan()
    with pytest.raises(ValueError, match=r"strict: blocks\.0\.attn1 stays dense: "):
        export_onnx(
            model, (), tmp_path / "model.onnx", config=Config(strict=True, grid=(1, 2, 3), **SMALL),
            kwargs={**inputs, "return_dict": False},
        )  # fmt: skip
    assert not os.listdir(tmp_path)


class Rotating(nn.Module):
    """Positions as complex numbers, cut, widened, gathered, turned; an order with equal keys."""

    def forward(self, x, angles):
        turns = torch.polar(torch.ones_like(angles), angles)
        low, high = turns.split([2, 6], -1)
        turns = torch.cat(
            [low.unsqueeze(-2).expand(-1, 3, -1), high.unsqueeze(1).expand(-1, 3, -1)], -1
        )
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turns.index_select(0, angles.argmax(-1) % 4)).flatten(
            -2
        )
        order = torch.sort(angles.round(), dim=-1, descending=True, stable=True)[1]
        positive = torch.sort(angles > 0, descending=True)[0]
        return turned, order, positive


def test_complex_numbers_and_a_stable_order_are_written(tmp_path):
    """What the exporter itself has no words for: rotary embeddings in complex arithmetic."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(4, 3, 16, generator=generator), torch.randn(4, 8, generator=generator))
    path = tmp_path / "model.onnx"
    export_onnx(Rotating().eval(), inputs, path)
    turned, *orders = run(path, {"x": inputs[0].numpy(), "angles": inputs[1].numpy()})
    expected, *expected_orders = Rotating()(*inputs)
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-6)
    for order, expected in zip(orders, expected_orders, strict=True):
        np.testing.assert_array_equal(order, expected)


class Narrow(nn.Module):
    """What ONNX or ONNX Runtime has no words for in 16 bits, or in two dtypes."""

    def forward(self, x, wide, mask):
        rows, places = x[0], torch.tensor([[2], [0], [2], [1]]).expand(-1, x.shape[-1])
        shown = rows[mask]
        head, rest = torch.cat([rows, shown]).split_with_sizes([rows.shape[0], shown.shape[0]])
        return (
            torch.einsum("bij->bji", x), torch.einsum("d,ij->dij", wide, rows),
            rows.sort(dim=-1, stable=True)[0], torch.zeros_like(rows).scatter_add(0, places, rows),
            head, rest,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_16_bits_are_written(tmp_path, dtype):
    """In bfloat16 the file is checked; ONNX Runtime's CPU provider runs hardly any of it."""
    generator = torch.Generator().manual_seed(0)
    x, wide = torch.randn(1, 4, 8, generator=generator).to(dtype), torch.arange(3.0)
    mask = torch.tensor([True, False, True, True])
    path = tmp_path / "model.onnx"
    export_onnx(Narrow().eval(), (x, wide, mask), path)
    onnx.checker.check_model(path, full_check=True)
    if dtype == torch.bfloat16:
        return
    results = run(path, {"x": x.numpy(), "wide": wide.numpy(), "mask": mask.numpy()})
    for got, expected in zip(results, Narrow()(x, wide, mask), strict=True):
        np.testing.assert_allclose(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


class Widened(nn.Module):
    """What ONNX Runtime's CPU provider has in float32, in dtypes in which it has it not."""

    def forward(self, x):
        padded = nn.functional.pad(x.bfloat16(), (0, 3, 1, 0), value=2.5)
        return padded.float(), nn.functional.avg_pool1d(x.double(), 2, 2)


def test_rows_are_padded_and_averaged_in_any_dtype(tmp_path):
    """Padding in bfloat16 is exact; averages of float64 are rounded as float32."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    export_onnx(Widened().eval(), (x,), path)
    padded, averaged = run(path, {"x": x.numpy()})
    expected, means = Widened()(x)
    np.testing.assert_array_equal(padded, expected)
    assert averaged.dtype == np.float64
    # one rounding of either number, of their sum and of its half
    np.testing.assert_allclose(averaged, means, rtol=0, atol=4 * 2**-24 * x.abs().max().item())


def test_a_model_in_bfloat16_needs_a_gpu(tmp_path):
    """ONNX Runtime's CPU provider has no product of matrices in bfloat16; the error says so."""
    path = tmp_path / "model.onnx"
    layer = nn.Linear(8, 8, dtype=torch.bfloat16).eval()
    export_onnx(layer, (torch.ones(2, 8, dtype=torch.bfloat16),), path)
    with pytest.raises(RuntimeError, match="for its dtype; a model in bfloat16 needs a GPU"):
        onnxruntime_session(path, ["CPUExecutionProvider"])


class Factored(nn.Module):
    """Directions from the QR factors of a weight, as Wan Animate has them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 5, generator=generator))

    def forward(self, x):
        basis, factor = torch.linalg.qr(self.weight + 1e-8)
        return x @ basis.mT, factor


def test_factors_are_written_as_reflections(tmp_path):
    """With the signs that PyTorch has from LAPACK."""
    model, path = Factored().eval(), tmp_path / "model.onnx"
    export_onnx(model, (torch.ones(2, 5),), path)
    results = run(path, {"x": np.ones((2, 5), np.float32)})
    for got, expected in zip(results, model(torch.ones(2, 5)), strict=True):
        np.testing.assert_allclose(got, expected.detach(), rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    """Weights in several forms, one of them of two layers, and as many rows as are asked for."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Linear(16, rows)
        self.twice = nn.Linear(16, 16, bias=False)
        self.table = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        return self.rows(self.twice(self.twice(x).sin()) + self.table[None])


def test_forms_of_a_weight_are_named_after_it(tmp_path):
    """However many there are; a viewer shows no ``val_12`` for a weight."""
    path, x = tmp_path / "model.onnx", torch.ones(2, 3, 16)
    model = Tied(4).eval()
    export_onnx(model, (x,), path)
    weights = {w.name for w in onnx.load(path).graph.initializer if w.dims}
    assert weights == {
        "rows.weight.transposed", "rows.bias", "table.unsqueezed", "twice.weight.transposed",
    }  # fmt: skip
    (output,) = run(path, {"x": x.numpy()})
    np.testing.assert_allclose(output, model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [False, True])
def test_tensors_may_be_inference_tensors(tmp_path, weights):
    """As those are that a pipeline makes under ``torch.inference_mode``, its model too."""
    with torch.inference_mode(weights):
        model = Tied(4).eval()
    with torch.inference_mode():
        x = torch.ones(2, 3, 16)
        expected = model(x)
    export_onnx(model, (x,), tmp_path / "model.onnx")
    (output,) = run(tmp_path / "model.onnx", {"x": x.numpy()})
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert all(weight.requires_grad for weight in model.parameters())


def write_tied(path, rows):
    """Export a model with that many output channels; give what it computes of ones."""
    torch.manual_seed(rows)
    model, x = Tied(rows).eval(), torch.ones(2, 3, 16)
    export_onnx(model, (x,), path)
    return model(x).detach().numpy()


def test_large_weights_lie_in_a_second_file(tmp_path, monkeypatch):
    """Large is here more than nothing. They move together; the next export takes their place."""
    monkeypatch.setattr(onnx_model, "LARGE", 0)
    path, elsewhere = tmp_path / "model.onnx", tmp_path / "elsewhere"
    (tmp_path / "model.onnx.json").write_text("of the user")
    for rows in (40, 20):
        expected = write_tied(path, rows)
        name, data, other = sorted(os.listdir(tmp_path))
        assert re.fullmatch(r"model\.onnx\.[0-9a-f]{8}\.data", data)
        assert (name, other) == ("model.onnx", "model.onnx.json")
    elsewhere.mkdir()
    for name in (data, "model.onnx"):
        (tmp_path / name).rename(elsewhere / name)
    (output,) = run(elsewhere / "model.onnx", {"x": np.ones((2, 3, 16), np.float32)})
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    (elsewhere / data).rename(tmp_path / data)
    with pytest.raises(ValueError, match=rf"its weights beside it, {data} is not there"):
        onnxruntime_session(elsewhere / "model.onnx")
    (tmp_path / data).rename(elsewhere / data)
    link = tmp_path / "link.onnx"
    link.symlink_to(elsewhere / "model.onnx")
    onnxruntime_session(link)  # its weights are where it leads
    monkeypatch.undo()
    write_tied(elsewhere / "model.onnx", 30)
    assert os.listdir(elsewhere) == ["model.onnx"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_export_that_is_cut_off_leaves_one_whole_file(tmp_path, monkeypatch, renames):
    """Before and between the two renames the old one, then the new one, with its own weights.

    Interrupted, it cleans up; killed, it leaves what the next export of this file removes.
    """
    monkeypatch.setattr(onnx_model, "LARGE", 0)
    path, killed = tmp_path / "model.onnx", tmp_path / "killed"
    rename, left = os.replace, [None] * renames

    def replace(source, place):
        if Path(place).parent == path.parent:  # onnx renames as well
            if not left:
                raise KeyboardInterrupt
            left.pop()
        rename(source, place)

    def drop(path, folder):
        if not killed.exists():
            shutil.copytree(path.parent, killed)
        onnx_model_drop(path, folder)

    def check(path, expected):
        (output,) = run(path, {"x": np.ones((2, 3, 16), np.float32)})
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)

    onnx_model_drop, expected = onnx_model._drop_weights, write_tied(path, 40)
    with monkeypatch.context() as context, contextlib.suppress(KeyboardInterrupt):
        context.setattr(onnx_model.os, "replace", replace)
        context.setattr(onnx_model, "_drop_weights", drop)
        expected = write_tied(path, 42)
    check(path, expected)
    assert len(os.listdir(tmp_path)) == 3  # with its weights, and the folder beside it
    check(killed / path.name, expected)
    assert len(os.listdir(killed)) == (3 if renames == 0 else 4)
    (of_others := killed / ".model.onnx.uta_fx.made by hand").mkdir()
    expected = write_tied(killed / path.name, 20)
    check(killed / path.name, expected)
    of_others.rmdir()
    assert len(os.listdir(killed)) == 2


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, monkeypatch):
    """As ``torch.save`` and ``onnx.save`` do; weights lie where ONNX Runtime looks for them."""
    monkeypatch.setattr(onnx_model, "LARGE", 0)
    folder, link = tmp_path / "models", tmp_path / "model.onnx"
    folder.mkdir()
    link.symlink_to("models/first.onnx")
    for rows in (4, 6):  # first it leads to nothing
        expected = write_tied(link, rows)
        assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["model.onnx", "models"]
        name, data = sorted(os.listdir(folder))
        assert name == "first.onnx" and data.startswith("first.onnx.")
        (output,) = run(folder / name, {"x": np.ones((2, 3, 16), np.float32)})
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_no_device_is_replaced(tmp_path):
    """Such as ``/dev/null``; here a pipe."""
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"path must be a file or new, got .*model\.onnx"):
        write_tied(tmp_path / "model.onnx", 4)


def test_a_folder_that_is_written_to_is_left_alone(tmp_path):
    """By two at once, of which one ends before the other."""
    target = tmp_path / "model.onnx"
    with folder_beside(target) as first:
        with folder_beside(target) as second:
            (second / "part").write_text("of a file")
        assert os.listdir(first) == [LOCK] and os.listdir(tmp_path) == [first.name]
    assert not os.listdir(tmp_path)


def test_a_file_that_is_no_model_is_replaced(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("not a model")
    write_tied(path, 4)
    onnx.checker.check_model(path)


MEASURE = """
import resource, sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = np.random.default_rng(0).standard_normal((1, 3, 16, 64, 64), np.float32)
session.run(None, {"clip": clip})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class SelfAttention(nn.Module):
    """Of the 16,384 video tokens of a clip, four heads."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 128, (1, 2, 2), (1, 2, 2))
        self.to_qkv = nn.Linear(128, 384)

    def forward(self, clip):
        x = self.patch(clip).flatten(2).transpose(1, 2)
        q, k, v = (
            y.unflatten(-1, (4, 32)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_no_tensor_has_a_place_for_every_pair_of_tokens(tmp_path):
    """All logits would be 4.3 GB in float32; the goal is 1.5 GB above the weights."""
    path = tmp_path / "model.onnx"
    clip = torch.zeros(1, 3, 16, 64, 64)
    export_onnx(SelfAttention().eval(), (clip,), path, config=Config(density=0.1))
    command = [sys.executable, "-c", MEASURE, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) * 1024 < 0.75e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 10])
@pytest.mark.parametrize("kind", ["normal", "ties", "infinite", "nan"])
def test_a_file_selects_as_the_operators(tmp_path, kind, rows, dtype):
    """The best of every row, then the highest, of equal ones the first; and lists of them."""

    class Select(torch.nn.Module):
        def forward(self, scores):
            exact = torch.ops.uta.select_blocks.default(scores.to(dtype), 4 * rows, rows)
            return exact, *torch.ops.uta.list_blocks.default(exact)

    x = torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(0))
    scores = {
        "normal": x,
        "ties": x.round(),
        "infinite": x.masked_fill(x < 0, -torch.inf).masked_fill(x > 2, torch.inf),
        "nan": x.masked_fill(x > 1, torch.nan).masked_fill(x < 0, -torch.inf),
    }[kind]
    path = tmp_path / "select.onnx"
    program = torch.export.export(Select(), (scores,))
    onnx_model.write_onnx(program, [], path, opset=18, metadata={})
    results = run(path, {"scores": scores.numpy()})
    for got, want in zip(results, Select()(scores), strict=True):
        assert torch.equal(torch.from_numpy(got), want)


class Attends(nn.Module):
    """Dense attention in forms that the exporter or ONNX Runtime's node does not take."""

    def forward(self, q, k, v, mask):
        attend = nn.functional.scaled_dot_product_attention
        padding, rows = mask[:, None, :1], mask[:, None, :, :1].float()
        return (
            attend(q, k, v, attn_mask=padding), attend(q, k, v, attn_mask=rows),
            attend(q[0], k[0], v[0], attn_mask=mask[0]), attend(q[0], k[0], v[0]),
        )  # fmt: skip


@pytest.mark.parametrize("opset", [18, 23])
def test_dense_attention_is_written_in_every_form(tmp_path, opset):
    """Masks that queries or keys share, three dimensions; one operation each from 23 on."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (9, 7, 7))
    mask = torch.rand(2, 9, 7, generator=generator) < 0.7
    mask[..., 0] = True  # a row that sees nothing has no result
    model, path = Attends().eval(), tmp_path / "model.onnx"
    export_onnx(model, (q, k, v, mask), path, opset=opset)
    feed = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "mask": mask.numpy()}
    for got, expected in zip(run(path, feed), model(q, k, v, mask), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("Attention") == (4 if opset >= 23 else 0)


class Assigns(nn.Module):
    """Numbers replaced in place: channels of a rotary embedding, every third token, some tokens."""

    def forward(self, x, y):
        turned = torch.empty_like(x)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned[..., 0::2] = a * y - b
        turned[..., 1::2] = a + b * y
        third, some, last, tall = x.clone(), x.clone(), x.clone(), x.clone()
        third[:, 1::3] = y[:, 1::3].repeat_interleave(2, -1)
        some[:, 2:5] = 0.5
        last[:, -3:] = x[:, :3]
        tall[1:, ::4] = x[1:, ::4] + 1  # tokens are no multiple of four
        return turned, third, some, last, tall


def test_numbers_are_replaced_without_an_index_each(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, 8, generator=generator), torch.randn(2, 9, 4, generator=generator)
    model = Assigns().eval()
    export_onnx(model, (x, y), tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "ScatterND" for node in nodes) == 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), (x, y), strict=True)}
    for got, expected in zip(session.run(None, feed), model(x, y), strict=True):
        assert torch.equal(torch.from_numpy(got), expected)
