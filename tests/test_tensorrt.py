"""Models for TensorRT: what the files hold, what TensorRT-RTX makes of them, and the kernels."""

import ctypes
import dataclasses
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from cases import Case, double
from test_onnx import SMALL, Joint, Padded, arrays_of, compiled, run, wan, wan_inputs
from test_onnx_plugin import Attention

import uta_fx
from uta_fx import Config, build_tensorrt_engine, export_tensorrt
from uta_fx.bench.gate import base2_roundings
from uta_fx.kernels import ops, reference
from uta_fx.kernels.constants import CONSTANTS

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("triton")

from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from uta_fx.export import (  # noqa: E402
    onnx_functions,
    tensorrt_engine,
    tensorrt_functions,
    tensorrt_kernels,
    tensorrt_ops,
    tensorrt_program,
)

SHAPES = [("none", "none"), ("block", "none"), ("block", "head"), ("row", "row")]
SCALARS = {
    name: [x.name for x in getattr(torch.ops.uta, name).default._schema.arguments][
        len(kinds.inputs) :
    ]
    for name, kinds in tensorrt_ops.PLUGINS.items()
}


def has_rtx():
    """Installed; that it can be imported too is for the tests to find."""
    return any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings")))


needs_rtx = pytest.mark.skipif(not has_rtx(), reason="needs TensorRT-RTX")


def written_out(args):
    """One attention in standard operations, and what to feed it."""
    model, inputs = onnx_functions.node_model(args)
    has_tail = args[5].shape[-2] > 0
    form = tensorrt_functions.Form(
        has_tail=has_tail,
        per_block=has_tail and args[5].dim() == 4,
        has_variance=args[8].shape[2] > 0,
        has_slope=args[9].shape[2] > 0,
    )
    del model.functions[:]
    model.functions.append(tensorrt_functions.static_attention_function(18, form))
    model.graph.node[0].overload = form.overload
    onnx.checker.check_model(model, full_check=True)
    inlined = ir.from_proto(model)
    InlinePass()(inlined)
    RemoveUnusedNodesPass()(inlined)
    used = {value for node in inlined.graph for value in node.inputs}
    for value in [x for x in inlined.graph.inputs if x not in used]:
        inlined.graph.inputs.remove(value)
    names = [value.name for value in inlined.graph.inputs]
    return ir.to_proto(inlined), {name: inputs[name] for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tail", "slopes"), SHAPES)
def test_the_written_out_attention_is_the_operator(dtype, tail, slopes):
    """As the function for ONNX Runtime: sums in float32, one rounding at the end."""
    pytest.importorskip("onnxruntime")
    args = Case(dtype=dtype, tail=tail, slopes=slopes).inputs()
    exact, exact_lse = reference.sparse_attention(*double(args))
    in_float = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    eager, _ = reference.sparse_attention(*in_float)
    model, inputs = written_out(args)
    output, lse = map(torch.from_numpy, run(model.SerializeToString(), arrays_of(inputs)))
    assert output.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.abs().amax().item()
    assert (output - exact).abs().amax() <= (eager - exact).abs().amax() + 8 * rounding
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    torch.testing.assert_close(lse[~empty], exact_lse[~empty].float(), rtol=1e-5, atol=1e-5)


@needs_rtx
@pytest.mark.parametrize(("tail", "slopes"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rtx_builds_the_written_out_attention(tmp_path, dtype, tail, slopes):
    """An engine for two architectures, on a machine that has neither."""
    model, _ = written_out(Case(dtype=dtype, tail=tail, slopes=slopes).inputs())
    onnx.save(model, tmp_path / "node.onnx")
    build_tensorrt_engine(
        tmp_path / "node.onnx", tmp_path / "node.engine", rtx=True, architectures=(89, 120)
    )
    assert (tmp_path / "node.engine").stat().st_size > 1e5
    assert sorted(os.listdir(tmp_path)) == ["node.engine", "node.onnx"]


NUMBERS = {
    "small": lambda x: x.abs().pow(20) * 1e-5,
    "ties": lambda x: x.round(),
    "negative": lambda x: -x.abs(),
    "wide": lambda x: (40 * x).exp().clamp(min=1e-37),
    "half": lambda x: x.half(),
    "coarse": lambda x: x.bfloat16(),
    "zero": torch.zeros_like,
    "infinite": lambda x: torch.where(x > 0, torch.inf, torch.where(x < -1, -torch.inf, x)),
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("k", [1, 40, 99, 100])
def test_the_search_for_a_threshold_is_topk(numbers, k):
    """The k largest and no others, exactly k of them where some are equal."""
    x = NUMBERS[numbers](torch.randn(3, 100, generator=torch.Generator().manual_seed(0)))
    values, indices = tensorrt_program.large_topk(x, k)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(values, x.gather(-1, indices))
    assert torch.equal(values.sort(-1, descending=True).values, x.topk(k).values)


@pytest.mark.parametrize("rows", [1, 5, 10])
@pytest.mark.parametrize("numbers", ["small", "ties", "negative", "coarse"])
def test_a_selection_is_spelled_out(numbers, rows, limit_of_four):
    """By the search for a threshold, which takes the first of equal scores as the operator does."""

    class Select(torch.nn.Module):
        def forward(self, scores):
            exact = ops.select_blocks(scores, 5 * rows, rows)
            return exact, *ops.list_blocks(exact)

    scores = NUMBERS[numbers](torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(0)))
    program = torch.export.export(Select(), (scores,))
    plain = tensorrt_program.spell_out(program, plugins=False)
    called = {str(node.target) for node in plain.graph.nodes}
    assert not [name for name in called if name.startswith("uta") or "topk" in name]
    for got, want in zip(plain.module()(scores), Select()(scores), strict=True):
        assert torch.equal(got, want)


def small_wan():
    """One layer and one clip, for what is slow."""
    model, _ = wan()
    model.blocks = model.blocks[:1]
    return model, wan_inputs(batch=1)


@pytest.fixture
def limit_of_four(monkeypatch):
    """TensorRT's limit of topk, so low that small models meet it."""
    monkeypatch.setattr(tensorrt_program, "MAX_K", 4)


def test_a_file_of_standard_operations_computes_what_the_backend_computes(tmp_path, limit_of_four):
    """Run by ONNX Runtime, which knows no more of us than TensorRT-RTX does."""
    pytest.importorskip("onnxruntime")
    model, inputs = small_wan()
    path = tmp_path / "model.onnx"
    export_tensorrt(
        model, (), path, config=Config(density=0.3, **SMALL),
        kwargs={**inputs, "return_dict": False}, form="standard",
    )  # fmt: skip
    (output,) = run(path, arrays_of(inputs))
    expected = compiled(model, inputs, density=0.3).numpy()
    assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)
    loaded = onnx.load(path)
    assert not loaded.functions
    assert {node.domain for node in loaded.graph.node} == {""}
    assert not [node for node in loaded.graph.node if node.op_type == "TopK"]
    if has_rtx():
        build_tensorrt_engine(path, tmp_path / "model.engine", rtx=True, architectures=[86])
        assert (tmp_path / "model.engine").stat().st_size > 1e5


def run_in_interpreter(name, inputs, outputs, attributes):
    """Launch the entry kernel of a plugin on CPU tensors, without compiling it."""
    shapes = [tuple(x.shape) for x in inputs]
    layer = tensorrt_kernels._LAYERS[name](shapes, inputs[0].dtype, 227 * 1024, **attributes)
    layer.kernel[layer.grid](*inputs, *outputs, **layer.constants, **layer.options)


def run_by_driver(name, inputs, outputs, attributes):
    """Launch the PTX as TensorRT does: pointers of inputs, then of outputs, and nothing else."""
    major, minor = torch.cuda.get_device_capability()
    compiled_kernel = tensorrt_kernels.compile_layer(
        name, [tuple(x.shape) for x in inputs], inputs[0].dtype, attributes, 10 * major + minor
    )
    driver = ctypes.CDLL("libcuda.so.1")

    def check(error):
        assert error == 0, f"the CUDA driver answers with error {error}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuModuleLoadData(ctypes.byref(module), compiled_kernel.ptx.encode()))
    entry = compiled_kernel.name.encode()
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, entry))
    check(driver.cuFuncSetAttribute(function, 8, compiled_kernel.shared))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *outputs)]
    addresses = (ctypes.c_void_p * len(pointers))(
        *(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in pointers)
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(
        driver.cuLaunchKernel(
            function, *compiled_kernel.grid, 1, compiled_kernel.threads, 1, 1,
            compiled_kernel.shared, stream, addresses, None,
        )
    )  # fmt: skip
    torch.cuda.synchronize()
    check(driver.cuModuleUnload(module))


@pytest.fixture
def launched_by(request):
    """The operators of TensorRT alone, for a while with kernels."""
    library = torch.library.Library("uta", "IMPL")
    for name in ("attend_tail", "attend_listed"):

        def launch(*arguments, name=name):
            count = len(tensorrt_ops.PLUGINS[name].inputs)
            inputs = [x.contiguous() for x in arguments[:count]]
            values = inputs[3 if name == "attend_tail" else 2]
            output = inputs[0].new_empty((*inputs[0].shape[:3], values.shape[-1]))
            lse = inputs[0].new_empty(inputs[0].shape[:3], dtype=torch.float32)
            attributes = dict(zip(SCALARS[name], arguments[count:], strict=True))
            request.param(name, inputs, (output, lse), attributes)
            return output, lse

        library.impl(name, launch, "CUDA" if request.param is run_by_driver else "CPU")
    yield request.param
    library._destroy()


def check_steps(args, device="cpu"):
    """The error that eager makes in the same dtype, and what the kernels round beside it.

    The tail's part is rounded between the two steps, and the softmax is base 2.
    """
    exact, exact_lse = reference.sparse_attention(*double(args))
    eager, _ = reference.sparse_attention(*args)
    on_device = [x.to(device) if torch.is_tensor(x) else x for x in args]
    output, lse = (x.cpu() for x in tensorrt_ops.attend_in_steps(*on_device))
    empty = exact_lse == -torch.inf
    base2, _ = base2_roundings(args, exact, exact_lse)
    rounding = torch.finfo(args[0].dtype).eps * exact.abs().amax().item() + base2
    assert (output - exact).abs().amax() <= (eager - exact).abs().amax() + rounding
    assert torch.equal(lse == -torch.inf, empty)
    assert (lse - exact_lse)[~empty].abs().amax() <= 16 * torch.finfo(args[0].dtype).eps


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")


@needs_interpreter
@pytest.mark.parametrize("launched_by", [run_in_interpreter], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tail", "slopes"), [*SHAPES, ("block", "row")])
def test_the_two_steps_are_the_operator(launched_by, dtype, tail, slopes):
    """In Triton's interpreter: ragged, an empty row, every form of tail."""
    check_steps(Case(dtype=dtype, tail=tail, slopes=slopes).inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("launched_by", [run_by_driver], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tail", "slopes"), [*SHAPES, ("block", "row")])
@pytest.mark.parametrize("dim", [32, 128])
def test_the_two_steps_by_the_cuda_driver_are_the_operator(launched_by, dtype, tail, slopes, dim):
    """The PTX that TensorRT gets, launched as TensorRT launches it."""
    check_steps(Case(dtype=dtype, tail=tail, slopes=slopes, dim=dim, dim_v=dim).inputs(), "cuda")


def scores_case(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, 101, 32, generator=generator).to(dtype),
        torch.randn(2, 3, 5, 32, generator=generator).to(dtype),
        torch.rand(2, 3, 5, 32, generator=generator).to(dtype),
        torch.rand(2, 3, 5, generator=generator),
    ]
    attributes = {
        "scale": 0.2,
        "variance_weight": 0.5,
        "variance_power": 1.0,
        "block_q": 32,
        "rows": 2,
    }
    exact = reference.block_scores(*(x.double() for x in inputs), *attributes.values())
    return inputs, attributes, exact


@pytest.mark.parametrize(
    ("launch", "dtype"),
    [
        pytest.param(run_in_interpreter, torch.float32, marks=needs_interpreter),
        pytest.param(run_in_interpreter, torch.float16, marks=needs_interpreter),
        pytest.param(run_by_driver, torch.float32, marks=pytest.mark.gpu),
        pytest.param(run_by_driver, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_the_scores_are_the_operator(launch, dtype):
    """(s q)^2 is rounded to the dtype once, and the score to its own: a few roundings of each."""
    inputs, attributes, exact = scores_case(dtype)
    device = "cuda" if launch is run_by_driver else "cpu"
    scores = torch.empty(exact.shape, dtype=reference.score_dtype(dtype), device=device)
    launch("block_scores", [x.to(device) for x in inputs], [scores], attributes)
    allowed = 8 * torch.finfo(scores.dtype).eps * exact.amax()
    assert (scores.cpu() - exact).abs().amax() <= allowed


LAYERS = {
    "attend_tail": (
        [(1, 2, 200, 128), (1, 2, 4, 4), (1, 2, 1, 4, 128), (1, 2, 1, 4, 128), (1, 2, 1, 4),
         (1, 2, 4, 128), (1, 2, 1, 128, 128)],
        {"scale": 0.1, "variance_weight": 0.5, "block_q": 64, "per_block": 1, "has_variance": 1,
         "has_slope": 1},
    ),
    "attend_listed": (
        [(1, 2, 200, 128), (1, 2, 200, 128), (1, 2, 200, 128), (1, 2, 4, 4), (1, 2, 4),
         (1, 2, 200, 128), (1, 2, 200)],
        {"scale": 0.1, "block_q": 64, "block_kv": 64, "resume": 1},
    ),
    "block_scores": (
        [(1, 2, 200, 128), (1, 2, 4, 128), (1, 2, 4, 128), (1, 2, 4)],
        {"scale": 0.1, "variance_weight": 0.0, "variance_power": 1.0, "block_q": 64, "rows": 4},
    ),
}  # fmt: skip


KERNELS = [
    (name, dtype, architecture, small)
    for name in LAYERS
    for dtype, architecture, small in (
        ("bfloat16", 90, False), ("bfloat16", 90, True), ("float16", 86, False),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    """All of them, from one process of its own: Triton's interpreter cannot compile."""
    code = (
        "import dataclasses, json, sys, torch\n"
        "from uta_fx.export.tensorrt_kernels import compile_layer\n"
        "kernels, layers = json.loads(sys.argv[1])\n"
        "compiled = [compile_layer(name, layers[name][0], getattr(torch, dtype), layers[name][1],"
        " architecture, small=small) for name, dtype, architecture, small in kernels]\n"
        "print(json.dumps([dataclasses.asdict(x) for x in compiled]))\n"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, json.dumps([KERNELS, LAYERS])]
    done = subprocess.run(command, check=True, env=environment, capture_output=True)
    made = [tensorrt_kernels.Compiled(**fields) for fields in json.loads(done.stdout)]
    return dict(zip(KERNELS, made, strict=True))


@pytest.mark.parametrize("key", KERNELS, ids=str)
def test_the_ptx_is_assembled(tmp_path, kernels, key):
    """By the assembler that Triton takes, whose version is the PTX's; pointers alone go in."""
    name, _, architecture, small = key
    kernel = kernels[key]
    path = tmp_path / "kernel.ptx"
    path.write_text(kernel.ptx)
    assembler = get_ptxas(architecture).path
    target = re.search(r"^\.target (\w+)", kernel.ptx, re.MULTILINE)[1]
    assert target.rstrip("a") == f"sm_{architecture}"
    command = [assembler, f"-arch={target}", path, "-o", tmp_path / "kernel.cubin"]
    subprocess.run(command, check=True)
    entry = re.search(r"\.entry (\w+)\(([^)]*)\)", kernel.ptx)
    assert entry[1] == kernel.name
    pointers = len("".join(tensorrt_ops.PLUGINS[name]))
    assert entry[2].count(".param .u64 .ptr .global") == entry[2].count(".param") == pointers
    assert kernel.shared <= (48 if small else 227) * 1024


def test_the_tuned_tile_asks_for_more_shared_memory(kernels):
    """At head dim 128, so that the other one is worth a tactic."""
    assert kernels["attend_listed", "bfloat16", 90, False].shared > 48 * 1024


def test_a_file_for_the_plugins_names_them(tmp_path):
    """No function, which TensorRT's parser would take instead; names of the modules; metadata."""
    model, inputs = small_wan()
    path = tmp_path / "model.trt.onnx"
    explanation = export_tensorrt(
        model,
        (),
        path,
        config=Config(density=0.3, **SMALL),
        kwargs={**inputs, "return_dict": False},
    )
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert not loaded.functions
    ours = [node for node in loaded.graph.node if node.domain == "uta"]
    sparse = [site.name for site in explanation.sites if site.sparse]
    for name in ("attend_tail", "attend_listed"):
        assert [x.name for x in ours if x.op_type == name] == [f"{site}/{name}" for site in sparse]
    assert len(ours) == 3 * len(sparse)
    for node in ours:
        attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        expected = {"plugin_namespace": b"uta", "plugin_version": b"1", "aot": 1}
        assert expected.items() <= attributes.items()
        assert attributes.keys() == expected.keys() | set(SCALARS[node.op_type])
        assert len(node.input) == len(tensorrt_ops.PLUGINS[node.op_type].inputs)
    assert {"uta_fx.version", "uta_fx.config"} <= {x.key for x in loaded.metadata_props}
    assert os.listdir(tmp_path) == ["model.trt.onnx"]


@needs_interpreter
@pytest.mark.parametrize("launched_by", [run_in_interpreter], indirect=True)
@torch.no_grad()
def test_a_program_in_steps_computes_what_the_backend_computes(launched_by, limit_of_four):
    """What both ways to an engine start from, with the kernels that the engine would launch."""
    model, inputs = small_wan()
    kwargs = {**inputs, "return_dict": False}
    settings = {"density": 0.3, "reorder": "morton", "exact_frames": 1}
    config = Config(**settings, **SMALL)
    program, *_ = uta_fx.exporters.sparse_program(model, (), kwargs, None, config, False)
    program = tensorrt_program.with_constants(tensorrt_program.spell_out(program, plugins=True))
    names = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.uta.sparse_attention.default not in names
    assert torch.ops.aten.topk.default not in names
    assert names.isdisjoint(CONSTANTS)
    output = program.module()(**kwargs)[0]
    expected = compiled(model, inputs, **settings)
    assert (output - expected).norm() <= 1e-5 * expected.norm()


def test_text_is_not_copied_for_every_query_block(tmp_path):
    """All of them see the same text: its node has one set of representatives."""
    inputs = (torch.zeros(1, 3, 4, 16, 24), torch.zeros(1, 5, 32), torch.zeros(1, 7, 32))
    path = tmp_path / "joint.trt.onnx"
    export_tensorrt(Joint().eval(), inputs, path, config=Config(density=0.4, **SMALL))
    loaded = onnx.load(path)
    (tail,) = [node for node in loaded.graph.node if node.name.endswith("/text/attend_tail")]
    producers = {output: node for node in loaded.graph.node for output in node.output}
    assert producers[tail.input[2]].op_type == "Unsqueeze"


def test_a_video_with_padding_stays_dense(tmp_path):
    """And with ``strict`` there is no file."""
    inputs = (torch.randn(2, 3, 4, 16, 24), torch.tensor([384, 70]))
    model, config = Padded().eval(), Config(density=0.4, **SMALL)
    (site,) = export_tensorrt(model, inputs, tmp_path / "m.onnx", config=config).sites
    assert not site.sparse and "files for TensorRT leave to dense" in site.reason
    config = dataclasses.replace(config, strict=True)
    with pytest.raises(ValueError, match=r"strict: .* its attention mask hides padding"):
        export_tensorrt(model, inputs, tmp_path / "strict.onnx", config=config)
    assert os.listdir(tmp_path) == ["m.onnx"]


class NewerThan:
    """An export that another release wrote."""

    def __init__(self, folder):
        model, _ = onnx_functions.node_model(Case().inputs())
        model.opset_import[1].version = 2
        self.path = folder / "newer.onnx"
        onnx.save(model, self.path)


def test_bad_input_to_an_export_leaves_no_file(tmp_path):
    """One sentence each."""
    model = Attention(torch.float32).eval()
    clip = (torch.zeros(1, 3, 4, 16, 24),)
    for options, path, message in (
        ({"form": "trt"}, "m.onnx", "form must be one of plugin, standard, engine, got 'trt'"),
        ({}, "m.engine", "path must end in .onnx for form='plugin'"),
        ({"form": "engine"}, "m.onnx", "path must end in .engine for form='engine'"),
        ({}, "no/m.onnx", "path must lie in a folder that exists"),
        ({"opset": 17}, "m.onnx", "opset must be at least 18 and at most"),
        ({"config": Config(policy=Peeking(), **SMALL)}, "m.onnx", "cannot be exported: what it"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            export_tensorrt(model, clip, tmp_path / path, **options)
    assert not os.listdir(tmp_path)


@dataclasses.dataclass(frozen=True)
class Peeking:
    """A policy that asks for a value while it is traced."""

    def select(self, selection):
        scores = selection.statistics.value_variance[:, :, None]
        scores = scores.expand(-1, -1, -(-selection.query.shape[2] // selection.block_q), -1)
        return scores > 0 if selection.query.sum() > 0 else scores >= 0


def test_bad_input_to_an_engine(tmp_path):
    """What is wrong is said before TensorRT is asked for."""
    node, _ = onnx_functions.node_model(Case().inputs())
    onnx.save(node, tmp_path / "runtime.onnx")
    path = tmp_path / "model.trt.onnx"
    clip = (torch.zeros(1, 3, 4, 16, 24),)
    export_tensorrt(Attention(torch.float32).eval(), clip, path, config=Config(**SMALL))
    engine = tmp_path / "m.engine"
    newer, plain = NewerThan(tmp_path).path, tmp_path / "plain.onnx"
    onnx.save(written_out(Case().inputs())[0], plain)
    for model, options, message in (
        (tmp_path / "no.onnx", {}, "model must be an ONNX file"),
        (newer, {}, "for version 2 of the operators"),
        (tmp_path / "runtime.onnx", {"rtx": True}, "model must be a file of export_tensorrt"),
        (path, {"rtx": True}, "TensorRT-RTX has no plugins: export the model with form='standard'"),
        (path, {"architectures": [90]}, "architectures are TensorRT-RTX's"),
        (plain, {"rtx": True, "architectures": ()}, "architectures must be numbers such as"),
        (plain, {"rtx": True, "architectures": "89"}, "architectures must be numbers such as"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            build_tensorrt_engine(model, engine, **options)
    with pytest.raises(ValueError, match="path must be another file than model, got"):
        build_tensorrt_engine(path, path)
    with pytest.raises(ValueError, match="path must lie in a folder that exists"):
        build_tensorrt_engine(path, tmp_path / "no" / "m.engine")
    assert not engine.exists()


@needs_rtx
def test_what_rtx_refuses_is_said_in_its_words(tmp_path):
    """An architecture, and a node that it has no kernel for; no engine is left."""
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"], name="the_node")],
        "g",
        [make("x", onnx.TensorProto.FLOAT, [4, 4])],
        [make("y", onnx.TensorProto.FLOAT, [])],
    )
    imports = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / "det.onnx")
    engine = tmp_path / "m.engine"
    with pytest.raises(ValueError, match=r"architectures must be among 75, .*, got 90"):
        build_tensorrt_engine(tmp_path / "det.onnx", engine, rtx=True, architectures=[90])
    with pytest.raises(RuntimeError, match=r"tensorrt_rtx\w* cannot read .*det.onnx: .*Det"):
        build_tensorrt_engine(tmp_path / "det.onnx", engine, rtx=True)
    assert os.listdir(tmp_path) == ["det.onnx"]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "tensorrt could not be imported .*pip install 'uta-fx.tensorrt.'"),
        ("10.8.0.43", "need TensorRT 10.9 or later, and not 10.14, got 10.8.0.43"),
        ("10.14.1.48", "need TensorRT 10.9 or later, and not 10.14, got 10.14.1.48"),
    ],
)
def test_a_tensorrt_that_will_not_do_is_refused(monkeypatch, tmp_path, version, message):
    """Missing, too old, or the release whose plugins do not work."""
    module = types.ModuleType("tensorrt")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module if version else None)
    with pytest.raises(ImportError, match=message):
        tensorrt_engine.load_tensorrt(plugins=True)
    with pytest.raises(ImportError, match=message):
        export_tensorrt(torch.nn.Linear(1, 1), (), tmp_path / "m.engine", form="engine")


def tensorrt_with_plugins():
    try:
        return tensorrt_engine.load_tensorrt(plugins=True)
    except ImportError as error:
        pytest.skip(str(error))


def test_tensorrt_takes_the_plugins():
    """Registered once, with what the operators' schemas say."""
    tensorrt_with_plugins()
    from tensorrt.plugin._lib import QDP_REGISTRY

    from uta_fx.export.tensorrt_plugin import register_plugins

    register_plugins()
    register_plugins()
    for name, kinds in tensorrt_ops.PLUGINS.items():
        plugin = QDP_REGISTRY[f"uta::{name}"]
        assert len(plugin.input_tensor_names) == len(kinds.inputs)
        assert list(plugin.input_attrs) == plugin.aot_impl_attr_names == SCALARS[name]
        assert plugin.num_outputs == len(kinds.outputs)


@pytest.mark.gpu
def test_tensorrt_builds_an_engine_with_the_plugins(tmp_path, caplog):
    """By its parser, from the file; the kernels are compiled for this GPU. It computes the same."""
    trt = tensorrt_with_plugins()
    model, inputs = wan()
    path = tmp_path / "model.trt.onnx"
    kwargs = {**inputs, "return_dict": False}
    export_tensorrt(model, (), path, config=Config(density=0.3, **SMALL), kwargs=kwargs)
    with caplog.at_level(logging.DEBUG, logger="uta_fx"):
        build_tensorrt_engine(path, tmp_path / "model.engine")
    expected = compiled(model, inputs, density=0.3)
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(
        (tmp_path / "model.engine").read_bytes()
    )
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    tensors = {name: x.cuda() for name, x in inputs.items()}
    tensors["output"] = output = torch.empty(expected.shape, device="cuda")
    for name, x in tensors.items():
        context.set_tensor_address(name, x.data_ptr())
    torch.cuda.synchronize()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    # TensorRT multiplies in TF32, whose unit roundoff is 2^-11, a dozen times one after the other
    assert (output.cpu() - expected).norm() <= 12 * 2**-11 * expected.norm()


@pytest.mark.gpu
def test_torch_tensorrt_builds_an_engine_with_the_plugins(tmp_path):
    """The whole model, nothing left to PyTorch."""
    tensorrt_with_plugins()
    pytest.importorskip("torch_tensorrt")
    model, inputs = wan()
    kwargs = {name: x.cuda() for name, x in inputs.items()}
    export_tensorrt(
        model.cuda(), (), tmp_path / "model.engine", config=Config(density=0.3, **SMALL),
        kwargs={**kwargs, "return_dict": False}, form="engine",
    )  # fmt: skip
    assert (tmp_path / "model.engine").stat().st_size > 1e5
