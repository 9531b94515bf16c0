"""Our kernels inside ONNX Runtime: the library is built and registers here, and runs on a GPU."""

import itertools
import logging
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import SCORED, Case, double, score_inputs
from test_fitting import CASES as FITS
from torch import nn

import uta_fx
from uta_fx.kernels import reference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("triton")

import onnx_nodes  # noqa: E402  # needs onnx

from uta_fx.export import (  # noqa: E402  # need onnx, Triton
    onnx_functions,
    onnxruntime_attention,
    onnxruntime_kernels,
    onnxruntime_plugin,
    onnxruntime_selection,
    onnxruntime_session,
)

CUDA = "CUDAExecutionProvider"
HOPPER = Case(  # what the kernels for Hopper take
    length_q=300, length_kv=555, dim=128, dim_v=128, block_q=64, block_kv=64, dtype=torch.bfloat16
)
HOPPER_64 = replace(HOPPER, dim=64, dim_v=64)
ON_HOPPER = {
    "ragged": HOPPER,
    "even": replace(HOPPER, length_q=256, length_kv=512),
    "no_tail": replace(HOPPER, tail="none"),
    "tail_of_each_query_block": replace(HOPPER, tail="row"),
    "slope_of_each_query_block": replace(HOPPER, slopes="row"),
    "float16": replace(HOPPER, dtype=torch.float16),
    "64_ragged": HOPPER_64,
    "64_even": replace(HOPPER_64, length_q=256, length_kv=512),
    "64_no_tail": replace(HOPPER_64, tail="none", dtype=torch.float16),
    "64_long": replace(HOPPER_64, length_q=260, length_kv=12805, listed=0.2),
}
needs_cuda_runtime = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"
)


def write_node(path, case, version=1):
    """A file with the one node for a case, and what to feed it."""
    args = case.inputs()
    model, inputs = onnx_functions.node_model(args)
    model.opset_import[1].version = version
    onnx.helper.set_model_props(model, {"uta_fx.version": "9.9"})
    onnx.save(model, path)
    return args, inputs


def build(model, library, architecture):
    """In a process of its own: Triton's interpreter, in which tests run, cannot compile."""
    code = (
        "import sys, uta_fx;"
        "uta_fx.build_onnxruntime_plugin(*sys.argv[1:3], architecture=int(sys.argv[3]))"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", code, model, library, str(architecture)],
        check=True, env=environment,
    )  # fmt: skip


def selection_file():
    return onnx_nodes.select_file(torch.zeros(1, 2, 300, 320, dtype=torch.bfloat16), 20000, 300)


def counted_model():
    model, _ = onnx_nodes.counted_file(torch.zeros(1, 2, 5, 12, dtype=torch.bfloat16), 20, 5)
    return onnx_nodes.with_open_sizes(model)


def scores_model():
    inputs = score_inputs(1, 2, 300, 48, 128, torch.bfloat16)
    return onnx_nodes.scores_file(inputs, 0.1, 0.0, 1.0, 64, 16)[0]


def statistics_model():
    return onnx_nodes.statistics_file(*torch.zeros(2, 1, 2, 300, 64).half(), 64)[0]


def fit_model():
    args = replace(FITS["ragged"], dim=128, dim_v=128).inputs(torch.bfloat16, "cpu")
    return onnx_nodes.with_open_sizes(onnx_nodes.fit_file(args)[0], known=[128])


FILES = {
    "statistics-90": (90, statistics_model),
    "lists-120": (120, lambda: onnx_nodes.lists_file(torch.zeros(1, 2, 5, 12) > 0)),
    "scores-90": (90, scores_model),
    "scores-80": (80, scores_model),
    "attention-86": (86, lambda: onnx_functions.node_model(Case().inputs())[0]),
    "attention-90": (90, lambda: onnx_functions.node_model(HOPPER.inputs())[0]),
    "selection-90": (90, selection_file),
    "counted-100": (100, counted_model),
    "fit-90": (90, fit_model),
    "fit-86": (86, lambda: onnx_nodes.fit_file(FITS["clusters"].inputs(torch.float32, "cpu"))[0]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_library_is_built_without_a_gpu_and_registers(tmp_path, name):
    """It loads without CUDA; its node wants the CUDA provider, whatever the file's function."""
    tmp_path = tmp_path / 'a "folder" of its own'
    tmp_path.mkdir()
    model, library = tmp_path / "model.onnx", tmp_path / "plugin.so"
    architecture, write = FILES[name]
    onnx.save(write(), model)
    build(model, library, architecture)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "plugin.so"]
    node = onnx.load(model).graph.node[0].op_type
    assert onnxruntime_session.describe_plugin(library) == ([node], architecture)
    with pytest.raises(ValueError, match="plugin must be a library of build_onnxruntime_plugin"):
        onnxruntime_session.describe_plugin(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match=f"Could not find an implementation for {node}"):
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def test_a_node_runs_by_its_function_beside_a_library_without_it(tmp_path):
    """Of the same domain."""
    model, library = tmp_path / "model.onnx", tmp_path / "plugin.so"
    onnx.save(selection_file(), model)
    build(model, library, 90)
    key, value = torch.randn(2, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    statistics, named = onnx_nodes.statistics_file(key, value, 64)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        statistics.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = session.run(None, {name: x.numpy() for name, x in named.items()})
    expected = reference.block_statistics(key.double(), value.double(), 64)
    for got, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, exact.numpy(), rtol=1e-5, atol=1e-5)


def test_a_variant_is_what_the_node_asks_for(tmp_path):
    """One where the length of the keys is known; nodes that are alike share theirs."""
    path = tmp_path / "model.onnx"
    write_node(path, Case(dtype=torch.float16, tail="row", slopes="none"))
    model = onnx.load(path)
    (variant,) = onnxruntime_plugin.variants_of(model, 90)["SparseAttention"]
    assert variant == onnxruntime_attention.AttentionVariant(
        dtype=onnx.TensorProto.FLOAT16, dim=32, dim_v=32, block_q=32, block_kv=64, sign=1,
        has_tail=True, per_block=False, has_variance=False, slopes=0, even=False,
        representatives=3,
    )  # fmt: skip
    model.graph.node.append(model.graph.node[0])
    assert onnxruntime_plugin.variants_of(model, 90) == {"SparseAttention": [variant]}
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "length"
    variants = onnxruntime_plugin.variants_of(model, 90)["SparseAttention"]
    assert [x.even for x in variants] == [False, True]
    model.graph.input[5].type.tensor_type.shape.dim[3].dim_param = "blocks"
    variants = onnxruntime_plugin.variants_of(model, 90)["SparseAttention"]
    assert {x.representatives for x in variants} == {onnxruntime_kernels.MANY}
    assert all(x.has_tail and not x.has_variance for x in variants)
    for index, name in ((0, "dim"), (5, "")):
        model.graph.input[index].type.tensor_type.shape.dim[3].dim_param = name
        with pytest.raises(ValueError, match=f"dimension 3 of its input {index} must be known"):
            onnxruntime_plugin.variants_of(model, 90)


def test_a_node_that_kernels_do_not_serve_keeps_its_function(caplog):
    """And all of its type in the file; the log says why."""
    scores = torch.zeros(1, 2, 5, 12)
    model = onnx_nodes.select_file(scores, 20, 5)
    assert onnxruntime_plugin.variants_of(model, 90) == {
        "SelectBlocks": [onnxruntime_selection.SelectionVariant(onnx.TensorProto.FLOAT, 12, 5)]
    }
    attention, _ = onnx_functions.node_model(Case().inputs())
    for part in ("node", "input"):
        getattr(model.graph, part).extend(getattr(attention.graph, part))
    assert list(onnxruntime_plugin.variants_of(model, 90)) == ["SparseAttention", "SelectBlocks"]
    statistics, _ = onnx_nodes.statistics_file(*torch.zeros(2, 1, 2, 300, 64), 64)
    for part in ("node", "input"):
        getattr(model.graph, part).extend(getattr(statistics.graph, part))
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        served = list(onnxruntime_plugin.variants_of(model, 90))
    assert served == ["SparseAttention", "SelectBlocks"]
    assert "no kernels for BlockStatistics: node : there is no kernel for" in caplog.text
    model, _ = onnx_nodes.statistics_file(*torch.zeros(2, 1, 2, 300, 64).half(), 64)
    assert list(onnxruntime_plugin.variants_of(model, 90)) == ["BlockStatistics"]
    with pytest.raises(ValueError, match="got none with kernels"):
        onnxruntime_plugin.variants_of(model, 80)


class Attention(nn.Module):
    """Self-attention of video tokens, in two heads."""

    def __init__(self, dtype, dim=16):
        super().__init__()
        self.dim = dim
        self.patch = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2), dtype=dtype)
        self.to_qkv = nn.Linear(32, 6 * dim, dtype=dtype)

    def forward(self, clip):
        x = self.patch(clip).flatten(2).transpose(1, 2)
        q, k, v = (
            y.unflatten(-1, (2, self.dim)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, dim=-1)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_exported_file_says_what_a_plugin_needs(tmp_path, dtype):
    """Every size survives the way into the file."""
    path = tmp_path / "model.onnx"
    clip = torch.zeros(1, 3, 4, 16, 24, dtype=dtype)
    config = uta_fx.Config(min_tokens=128, block_q=32, block_kv=32)
    uta_fx.export_onnx(Attention(dtype).eval(), (clip,), path, config=config)
    model = onnx.load(path)
    opset = model.opset_import[0].version
    assert opset == (22 if dtype == torch.bfloat16 else 18)  # ONNX Runtime 1.22 reads up to 22
    variants = onnxruntime_plugin.variants_of(model, 90)
    # at head dim 16 there is no kernel for Hopper, which alone does the statistics
    served = ["SparseAttention", "BlockScores", "SelectBlocks", "ListBlocks", "FitTail"]
    assert list(variants) == served
    (variant,) = variants["SparseAttention"]
    assert variant == onnxruntime_attention.AttentionVariant(
        dtype=onnx_functions.ELEMENT_TYPES[dtype], dim=16, dim_v=16, block_q=32, block_kv=32,
        sign=1, has_tail=True, per_block=True, has_variance=True, slopes=1, even=True,
        representatives=12,
    )  # fmt: skip
    scores = onnx.TensorProto.FLOAT if dtype == torch.float32 else onnx.TensorProto.BFLOAT16
    (of_scores,) = variants["BlockScores"]
    assert (of_scores.dtype, of_scores.dim, of_scores.blocks) == (variant.dtype, 16, 12)
    (selection,) = variants["SelectBlocks"]
    assert (selection.dtype, selection.blocks) == (scores, 12)
    (fit,) = variants["FitTail"]
    assert fit == (variant.dtype, 16, 16, 32, 32, False)


def test_bad_input_to_the_builder(tmp_path):
    """One sentence each, and no library."""
    model, library = tmp_path / "model.onnx", tmp_path / "plugin.so"
    with pytest.raises(ValueError, match="model must be an ONNX file"):
        uta_fx.build_onnxruntime_plugin(model, library, architecture=90)
    write_node(model, Case(), version=2)
    with pytest.raises(ValueError, match=r"written by uta-fx 9\.9 for version 2 of the"):
        uta_fx.build_onnxruntime_plugin(model, library, architecture=90)
    write_node(model, Case())
    with pytest.raises(ValueError, match=r"architecture must be one of 80, 86, .*, got 75"):
        uta_fx.build_onnxruntime_plugin(model, library, architecture=75)
    for wrong in ("90", 90.0):
        with pytest.raises(ValueError, match=f"architecture must be one of .*, got {wrong!r}"):
            uta_fx.build_onnxruntime_plugin(model, library, architecture=wrong)
    with pytest.raises(TypeError, match="path must be the name of a file, got None"):
        uta_fx.build_onnxruntime_plugin(model, None, architecture=90)
    with pytest.raises(TypeError, match="model must be the name of a file, got 5"):
        uta_fx.build_onnxruntime_plugin(5, library, architecture=90)
    with pytest.raises(ValueError, match="path must lie in a folder that exists"):
        uta_fx.build_onnxruntime_plugin(model, tmp_path / "no" / "p.so", architecture=90)
    with pytest.raises(ValueError, match="path must be another file than model, got"):
        uta_fx.build_onnxruntime_plugin(model, model, architecture=90)
    plain = tmp_path / "plain.onnx"
    torch.onnx.export(nn.Linear(4, 4), (torch.ones(1, 4),), plain, dynamo=True, verbose=False)
    with pytest.raises(ValueError, match="must have a node such as uta::SparseAttention"):
        onnxruntime_plugin.variants_of(onnx.load(plain), 90)
    assert not library.exists()


def test_without_a_gpu_the_function_runs(tmp_path, caplog):
    """And the log says so."""
    path = tmp_path / "model.onnx"
    args, inputs = write_node(path, Case())
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    assert "sparse attention runs by its function" in caplog.text
    output, _ = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    exact, _ = reference.sparse_attention(*double(args))
    np.testing.assert_allclose(output, exact, rtol=1e-4, atol=1e-5)


def test_bad_input_to_a_session(tmp_path):
    """What is missing or wrong is named."""
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="path must be an ONNX file"):
        uta_fx.onnxruntime_session(path)
    write_node(path, Case())
    with pytest.raises(ValueError, match=r"providers must be among .*, got NoSuchProvider"):
        uta_fx.onnxruntime_session(path, ["NoSuchProvider"])
    with pytest.raises(ValueError, match="providers must be a list of names or None, got 'C"):
        uta_fx.onnxruntime_session(path, "CPUExecutionProvider")
    with pytest.raises(ValueError, match="providers must be a list of names or None, got 5"):
        uta_fx.onnxruntime_session(path, 5)
    for entry in (5, ("CPUExecutionProvider", "use_arena")):
        with pytest.raises(ValueError, match="providers must be names, or pairs of a name and a"):
            uta_fx.onnxruntime_session(path, [entry])
    with pytest.raises(TypeError, match=r"options must be onnxruntime\.SessionOptions .* got dict"):
        uta_fx.onnxruntime_session(path, options={})
    with pytest.raises(TypeError, match="plugin must be a file, True or False, got None"):
        uta_fx.onnxruntime_session(path, plugin=None)
    with pytest.raises(ValueError, match="plugin must be a file, True or False"):
        uta_fx.onnxruntime_session(path, plugin=tmp_path / "no.so")
    with pytest.raises(ValueError, match="plugin needs CUDAExecutionProvider"):
        uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"], plugin=path)
    bare = onnx.load(path)
    del bare.functions[:]
    onnx.save(bare, path)
    with pytest.raises(ValueError, match="one for plugins of TensorRT, with nodes SparseAttention"):
        uta_fx.onnxruntime_session(path)
    write_node(path, Case(), version=2)
    with pytest.raises(ValueError, match=r"written by uta-fx 9\.9 for version 2 of .* or install"):
        uta_fx.onnxruntime_session(path)
    for text in ("no model", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"path must be an ONNX file, got .*, which is none"):
            uta_fx.onnxruntime_session(path)


def test_providers_and_options_are_onnx_runtime_s(tmp_path):
    path, options = tmp_path / "model.onnx", onnxruntime.SessionOptions()
    write_node(path, Case())
    options.intra_op_num_threads = 3
    providers = [("CPUExecutionProvider", {"use_arena": "0"})]
    session = uta_fx.onnxruntime_session(path, providers, options=options)
    assert session.get_session_options().intra_op_num_threads == 3
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_bad_input_to_a_run(tmp_path):
    """A tensor that is not what the file says is named where it is bound; a session says it too."""
    path = tmp_path / "model.onnx"
    args, inputs = write_node(path, Case())
    session = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    outputs = {"output": torch.empty(*args[0].shape), "lse": torch.empty(args[0].shape[:3])}
    query, lse = inputs["query"], outputs["lse"]
    for kind, name, x, message in (
        ("inputs", "querry", query, "inputs must be among query, key, .*, got querry"),
        ("inputs", "query", query.half(), "query must be torch.float32, got torch.float16"),
        ("inputs", "query", query.numpy(), "query must be a tensor on .*, got ndarray"),
        ("inputs", "query", query.to("meta"), "query must be a tensor on the CPU .*, got meta"),
        (
            "inputs",
            "query",
            query[:, :, 1:],
            r"query must be of sizes \[2, 3, 130, 32\], got .*129",
        ),
        ("inputs", "query", query[0], r"query must be of sizes .*, got \[3, 130, 32\]"),
        ("inputs", "query", query.mT.contiguous().mT, "query must be contiguous, got strides"),
        ("inputs", "query", query._neg_view(), "query must be what lies in memory, got a view"),
        ("outputs", "lsse", lse, "outputs must be among output, lse, got lsse"),
        ("outputs", "lse", lse.double(), "lse must be torch.float32, got torch.float64"),
        ("outputs", "lse", lse[..., 1:], "lse must be of sizes"),
    ):
        given = {"inputs": dict(inputs), "outputs": dict(outputs)}
        given[kind][name] = x
        with pytest.raises(ValueError, match=message):
            uta_fx.bind_tensors(session, **given)
    without = {name: x for name, x in inputs.items() if name != "key"}
    with pytest.raises(ValueError, match="inputs must have key too, got query, value"):
        uta_fx.bind_tensors(session, without, outputs)
    with pytest.raises(TypeError, match="outputs must be a dict of tensors, got list"):
        uta_fx.bind_tensors(session, inputs, [lse])
    with pytest.raises(TypeError, match=r"session must be an onnxruntime\.InferenceSession, got P"):
        uta_fx.bind_tensors(path, inputs, outputs)
    arrays = {name: x.numpy() for name, x in inputs.items()}
    for wrong, message in (
        (query.half(), r"Actual: \(tensor\(float16\)\) , expected: \(tensor\(float\)\)"),
        (query[:, :, 1:], "Got invalid dimensions for input: query"),
    ):
        with pytest.raises(Exception, match=message):
            session.run(None, {**arrays, "query": wrong.numpy()})


def test_what_has_no_fixed_size_may_be_bound_in_any(tmp_path):
    path, linear = tmp_path / "model.onnx", nn.Linear(4, 4).eval()
    uta_fx.export_onnx(
        linear, (torch.ones(2, 4),), path, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    session = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    for batch in (1, 3):
        x, output = torch.randn(batch, 4), torch.empty(batch, 4)
        binding = uta_fx.bind_tensors(session, {"input": x}, {"output": output})
        session.run_with_iobinding(binding)
        torch.testing.assert_close(output, linear(x).detach())


def open_node(path, inputs, outputs, caplog):
    """A session for a file of one node by the plugin, bound to tensors on the GPU."""
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"])
    assert "run by the plugin" in caplog.text
    on_gpu = {name: x.cuda().contiguous() for name, x in inputs.items()}
    torch.cuda.synchronize()
    return session, uta_fx.bind_tensors(session, on_gpu, outputs)


def open_on_gpu(path, case, caplog):
    """A session for a case by the plugin, bound to tensors on the GPU; outputs; the operator's."""
    args, inputs = write_node(path, case)
    output = torch.empty(*args[0].shape[:3], args[2].shape[-1], dtype=case.dtype, device="cuda")
    lse = torch.empty(args[0].shape[:3], device="cuda")
    bound = open_node(path, inputs, {"output": output, "lse": lse}, caplog)
    expected = uta_fx.kernels.ops.sparse_attention(
        *(x.cuda() if torch.is_tensor(x) else x for x in args)
    )
    return bound, (output, lse), expected


def assert_gives_twice(bound, results, expected):
    """Bit for bit, each time over results that are wrong."""
    session, binding = bound
    for _ in range(2):
        for x in results:
            x.fill_(torch.nan if x.is_floating_point() else -1)
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x, y)


def test_bound_tensors_live_as_long_as_their_binding(tmp_path):
    """A session reads and writes where they lie."""
    path = tmp_path / "model.onnx"
    args, inputs = write_node(path, Case())
    session = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    output, lse = torch.empty(*args[0].shape), torch.empty(args[0].shape[:3])
    binding = uta_fx.bind_tensors(session, inputs, {"output": output, "lse": lse})
    bound = [weakref.ref(x) for x in (*inputs.values(), output, lse)]
    del args, inputs, output, lse
    assert all(x() is not None for x in bound)
    session.run_with_iobinding(binding)
    del binding
    assert all(x() is None for x in bound)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["none", "block", "row"])
@pytest.mark.parametrize("slopes", ["none", "head", "row"])
def test_the_plugin_is_the_operator(tmp_path, dtype, tail, slopes, caplog):
    """Bit for bit what the operator computes in PyTorch: the same kernels on the same inputs."""
    case = Case(dtype=dtype, tail=tail, slopes=slopes)
    (session, binding), got, expected = open_on_gpu(tmp_path / "model.onnx", case, caplog)
    session.run_with_iobinding(binding)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("name", ON_HOPPER)
def test_the_plugin_is_the_operator_on_hopper_too(tmp_path, name, caplog):
    """Where the operator takes the kernels for Hopper, so does the plugin; also the second time."""
    case = ON_HOPPER[name]
    assert_gives_twice(*open_on_gpu(tmp_path / "model.onnx", case, caplog))


SELECTED = [  # batch, heads, Nq, Nk, kept, rows
    (2, 3, 7, 19, 60, 7),
    (1, 2, 300, 320, 20000, 300),
    (1, 2, 33, 64, 300, 66),
    (1, 3, 5, 12, 4, 1),
    (1, 2, 5, 12, 60, 5),
]


def scores_with_ties(*shape, dtype):
    """Many equal ones, and some that are no number."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = (scores * 4).round() / 4
    scores[..., 1, :3] = torch.nan
    scores[..., 2, :] = -torch.inf
    return scores.to(dtype)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SELECTED, ids=str)
def test_the_plugin_selects_as_the_operator(tmp_path, sizes, dtype, caplog):
    """The same blocks, twice."""
    *shape, kept, rows = sizes
    scores = scores_with_ties(*shape, dtype=dtype)
    path = tmp_path / "model.onnx"
    onnx.save(onnx_nodes.select_file(scores, kept, rows), path)
    exact = torch.empty(scores.shape, dtype=torch.bool, device="cuda")
    session, binding = open_node(path, {"scores": scores}, {"exact": exact}, caplog)
    expected = uta_fx.kernels.ops.select_blocks(scores.cuda(), kept, rows)
    for wrong in (False, True):
        exact.fill_(wrong)
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        assert torch.equal(exact, expected)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plugin_selects_by_numbers_of_the_run(tmp_path, dtype, caplog):
    """One session for all sizes keeps the blocks that the operator keeps."""
    path = tmp_path / "model.onnx"
    model, _ = onnx_nodes.counted_file(torch.zeros(2, 3, 7, 19, dtype=dtype), 60, 7)
    onnx.save(onnx_nodes.with_open_sizes(model), path)
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"])
    assert "SelectCounted run by the plugin" in caplog.text
    for *shape, kept, rows in SELECTED:
        scores = scores_with_ties(*shape, dtype=dtype).cuda()
        numbers = {"kept": torch.tensor([kept]), "rows": torch.tensor([rows])}
        exact = torch.empty(shape, dtype=torch.bool, device="cuda")
        torch.cuda.synchronize()
        binding = uta_fx.bind_tensors(session, {"scores": scores, **numbers}, {"exact": exact})
        session.run_with_iobinding(binding)
        assert torch.equal(exact, uta_fx.kernels.ops.select_blocks(scores, kept, rows))


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "length", "dim"), [(3, 300, 128), (12, 5000, 128), (2, 60, 64)])
def test_the_plugin_pools_as_the_operator(tmp_path, heads, length, dim, dtype, caplog):
    """Bit for bit, twice, where there is the kernel for Hopper; elsewhere the function runs."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, heads, length, dim, generator=generator).to(dtype)
    path = tmp_path / "model.onnx"
    model, named = onnx_nodes.statistics_file(key, value, 64)
    onnx.save(model, path)
    expected = uta_fx.kernels.ops.block_statistics(key.cuda(), value.cuda(), 64)
    results = [torch.empty_like(x) for x in expected]
    names = [x.name for x in model.graph.output]
    outputs = dict(zip(names, results, strict=True))
    assert_gives_twice(open_node(path, named, outputs, caplog), results, expected)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("blocks", [5, 64, 300])
def test_the_plugin_lists_as_the_operator(tmp_path, blocks, caplog):
    """The same lists, twice."""
    exact = torch.rand(2, 3, 7, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    path = tmp_path / "model.onnx"
    onnx.save(onnx_nodes.lists_file(exact), path)
    expected = uta_fx.kernels.ops.list_blocks(exact.cuda())
    ids, counts = results = [torch.empty_like(x) for x in expected]
    outputs = {"block_ids": ids, "block_counts": counts}
    assert_gives_twice(open_node(path, {"exact": exact}, outputs, caplog), results, expected)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "name",
    ["ragged", "head_dims_of_their_own", "several_parts", "clusters", "every_third_cluster"],
)
def test_the_plugin_fits_as_the_operator(tmp_path, name, known, dtype, caplog):
    """Bit for bit, twice, for the scale of the file."""
    case, path = FITS[name], tmp_path / "model.onnx"
    args = case.inputs(dtype, "cpu")
    args[10] = 0.25
    model, named = onnx_nodes.fit_file(args)
    if not known:
        onnx_nodes.with_open_sizes(model, known=[case.dim, case.dim_v])
    onnx.save(model, path)
    expected = uta_fx.kernels.ops.fit_tail(*(x.cuda() if torch.is_tensor(x) else x for x in args))
    mass, gain = results = [torch.empty_like(x) for x in expected]
    bound = open_node(path, named, {"mass": mass, "gain": gain}, caplog)
    assert_gives_twice(bound, results, expected)


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("name", SCORED)
def test_the_plugin_scores_as_the_operator(tmp_path, name, caplog):
    """Bit for bit, twice; where the operator takes the kernel for Hopper, so does the plugin."""
    dtype, dim, length, blocks, *numbers = SCORED[name]
    inputs, path = score_inputs(2, 3, length, blocks, dim, dtype), tmp_path / "model.onnx"
    numbers = (0.25, *numbers)  # the scale
    model, named = onnx_nodes.scores_file(inputs, *numbers)
    onnx.save(model, path)
    expected = uta_fx.kernels.ops.block_scores(*(x.cuda() for x in inputs), *numbers)
    scores = torch.empty_like(expected)
    bound = open_node(path, named, {"scores": scores}, caplog)
    assert_gives_twice(bound, [scores], [expected])


@pytest.mark.gpu
@needs_cuda_runtime
def test_workspace_is_given_back(tmp_path, caplog):
    """The GPU has as much memory after many runs as before: once, where others use it meanwhile."""
    case = replace(HOPPER, length_q=64 * 300, length_kv=64 * 300)  # 11 MB of workspace
    (session, binding), _, _ = open_on_gpu(tmp_path / "model.onnx", case, caplog)
    free = []
    for _ in range(6):
        for _ in range(20):
            session.run_with_iobinding(binding)
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert any(after >= before for before, after in itertools.pairwise(free))


@pytest.mark.gpu
@needs_cuda_runtime
def test_a_whole_file_runs_by_the_plugin(tmp_path, caplog):
    """It computes what its functions compute on the CPU, whose sums are float32.

    Both round to float16; where that changes a score, another block is kept, whose share is small.
    """
    torch.manual_seed(0)
    path, clip = tmp_path / "model.onnx", torch.randn(1, 3, 8, 32, 48).half()
    module = Attention(torch.float16, dim=64).eval()
    uta_fx.export_onnx(module, (clip,), path, config=uta_fx.Config(min_tokens=128))
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"])
    hopper = torch.cuda.get_device_capability() == (9, 0)
    statistics = "BlockStatistics, " if hopper else ""
    assert f"SparseAttention, {statistics}BlockScores, SelectBlocks, ListBlocks, " in caplog.text
    assert "ListBlocks, FitTail run by" in caplog.text
    on_cpu = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    (got,), (expected,) = (x.run(None, {"clip": clip.numpy()}) for x in (session, on_cpu))
    error = np.linalg.norm(got.astype(np.float64) - expected)
    assert error <= 0.02 * np.linalg.norm(expected.astype(np.float64))


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("budget", ["site", "row"])
def test_a_file_for_every_grid_runs_by_the_plugin(tmp_path, budget, caplog):
    """Ragged and whole blocks; the allowance is that of a file for one grid."""
    torch.manual_seed(0)
    path, clip = tmp_path / "model.onnx", torch.randn(1, 3, 6, 28, 44).half()
    sides = ({side: torch.export.Dim.DYNAMIC for side in (2, 3, 4)},)
    module = Attention(torch.float16, dim=64).eval()
    config = uta_fx.Config(min_tokens=128, budget=budget)
    uta_fx.export_onnx(module, (clip,), path, config=config, dynamic_shapes=sides)
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"])
    hopper = torch.cuda.get_device_capability() == (9, 0)
    statistics = "BlockStatistics, " if hopper else ""
    assert f"SparseAttention, {statistics}BlockScores, SelectCounted, ListBlocks, " in caplog.text
    assert "ListBlocks, FitTail run by" in caplog.text
    on_cpu = uta_fx.onnxruntime_session(path, ["CPUExecutionProvider"])
    for clip in (torch.randn(1, 3, 8, 32, 48).half(), torch.randn(1, 3, 5, 30, 46).half()):
        (got,), (expected,) = (x.run(None, {"clip": clip.numpy()}) for x in (session, on_cpu))
        error = np.linalg.norm(got.astype(np.float64) - expected)
        assert error <= 0.02 * np.linalg.norm(expected.astype(np.float64))


@pytest.mark.gpu
@needs_cuda_runtime
def test_a_plugin_for_another_gpu_says_which(tmp_path):
    """Given by hand; one that is built here fits."""
    path, library = tmp_path / "model.onnx", tmp_path / "plugin.so"
    _, inputs = write_node(path, Case())
    build(path, library, 120 if torch.cuda.get_device_capability() != (12, 0) else 90)
    with pytest.raises(ValueError, match=r"plugin must be for .*, got one for sm_(120|90): build"):
        uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"], plugin=library)
    options = onnxruntime.SessionOptions()  # nor does it run where it is registered by hand
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=[CUDA, "CPUExecutionProvider"])
    with pytest.raises(Exception, match=r"for sm_(120|90) \(build the plugin for the"):
        session.run(None, {name: x.numpy() for name, x in inputs.items()})


@pytest.mark.gpu
@needs_cuda_runtime
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_model_in_16_bits_errs_as_in_pytorch(tmp_path, dtype, caplog):
    """The shipped model: against float32, the file errs at most twice what the operator does."""
    from uta_fx.moving_shapes import load_pipeline

    pipeline = load_pipeline()
    inputs = {
        "hidden_states": torch.randn(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": pipeline.prompt_encoder(torch.zeros(1, 24).long()),
    }
    model = pipeline.transformer.cuda()
    config = uta_fx.Config(density=0.3)
    results = []
    for kind in (torch.float32, dtype):
        given = {name: x.cuda().to(kind) for name, x in inputs.items()}
        compiled = torch.compile(
            model.to(kind), backend="uta", options={"density": 0.3, "inner": "eager"}
        )
        results.append(compiled(**given, return_dict=False)[0].float())
        torch.compiler.reset()
    exact, by_torch = results
    path = tmp_path / "model.onnx"
    on_cpu = {name: x.cpu() for name, x in given.items()}
    uta_fx.export_onnx(model.cpu(), (), path, config=config, kwargs=on_cpu | {"return_dict": False})
    with caplog.at_level(logging.INFO, logger="uta_fx"):
        session = uta_fx.onnxruntime_session(path, [CUDA, "CPUExecutionProvider"])
    assert "run by the plugin" in caplog.text
    output = torch.empty_like(given["hidden_states"])
    torch.cuda.synchronize()
    session.run_with_iobinding(uta_fx.bind_tensors(session, given, {"output": output}))
    error = (by_torch - exact).norm()
    assert 0 < error and (output.float() - exact).norm() <= 2 * error
