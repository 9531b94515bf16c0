"""ONNX Runtime's plugin launches what PyTorch's operator launches, on a stand-in for a GPU."""

import ctypes
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import SCORED, Case, score_inputs
from test_fitting import CASES as FITS

from uta_fx import bind_tensors, onnxruntime_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("triton")

import onnx_nodes  # noqa: E402  # need onnx, Triton
import plugin_runtime  # noqa: E402

from uta_fx.export import (  # noqa: E402
    onnx_functions,
    onnxruntime_kernels,
    onnxruntime_plugin,
)
from uta_fx.kernels import (  # noqa: E402
    gluon_attention,
    gluon_scores,
    gluon_statistics,
    gluon_tail,
    triton_attention,
    triton_fitting,
    triton_scores,
    triton_selection,
    triton_statistics,
)

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ROOT / ".venv" / "onnxruntime-1.22"
LIMITS = {90: 227 * 1024, 86: 99 * 1024}
KERNELS = {
    triton_attention: ("_mark_listed_kernel", "_tail_kernel", "_listed_kernel"),
    gluon_attention: ("_pair_lists_kernel", "_longest_first_kernel", "_paired_kernel"),
    gluon_tail: ("_pooled_variance_kernel",),
    triton_scores: ("_scores_kernel",),
    gluon_scores: ("_scores_kernel",),
    gluon_statistics: ("_statistics_kernel",),
    triton_statistics: ("_sum_kernel",),
    triton_selection: (
        "_list_kernel",
        "_first_pass_kernel",
        "_next_pass_kernel",
        "_keep_kernel",
        "_keep_in_row_kernel",
    ),
    triton_fitting: ("_square_kernel", "_sample_kernel", "_solve_kernel"),
}
UNREAD = {  # what a kernel does not read where a constant of it is false
    "TAIL": ("tail_", "slope_desc", "size_", "sigma2_"),
    "HAS_VARIANCE": ("tail_var_",),
    "HAS_SLOPE": ("slope_",),
    "PER_BLOCK": ("listed_",),
}
MADE = {  # in PyTorch in memory of its own each time, in the plugin in the same
    "_pair_lists_kernel": ("ids_out_ptr", "plan_ptr"),
    "_pooled_variance_kernel": ("sigma2_ptr",),
}

ORDER = "_pair_lists_kernel _longest_first_kernel"
WHOLE = f"_mark_listed_kernel {ORDER} _pooled_variance_kernel _paired_kernel"
LISTS = f"_mark_listed_kernel {ORDER} _paired_kernel"
RESUMED = f"_mark_listed_kernel _tail_kernel {ORDER} _paired_kernel"
PLAIN = "_mark_listed_kernel _tail_kernel _listed_kernel"
HOPPER = Case(
    length_q=300, length_kv=555, dim=128, dim_v=128, block_q=64, block_kv=64, dtype=torch.bfloat16
)
CASES = {
    "everything": (HOPPER, WHOLE),
    "even": (replace(HOPPER, length_q=256, length_kv=512), WHOLE),
    "one_block": (replace(HOPPER, length_q=60, length_kv=60), WHOLE),
    "head_dim_64": (replace(HOPPER, dim=64, dim_v=64), WHOLE),
    "float16": (replace(HOPPER, dtype=torch.float16), WHOLE),
    "long": (replace(HOPPER, batch=1, heads=1, length_q=70 * 64, length_kv=8200), WHOLE),
    "no_tail": (replace(HOPPER, tail="none"), LISTS),
    "tail_of_each_query_block": (replace(HOPPER, tail="row"), RESUMED),
    "no_slope": (replace(HOPPER, slopes="none"), RESUMED),
    "slope_of_each_query_block": (replace(HOPPER, slopes="row"), RESUMED),
    "float32": (replace(HOPPER, dtype=torch.float32), PLAIN),
    "other_blocks": (replace(HOPPER, block_kv=32), PLAIN),
    "other_head_dim": (replace(HOPPER, dim=96, dim_v=96), PLAIN),
    "no_tail_plain": (Case(tail="none"), "_listed_kernel"),
    "rows_plain": (Case(tail="row", slopes="row"), "_tail_kernel _listed_kernel"),
}


def known_as(kernel, constants):
    """A kernel's name, with the number of its pass."""
    return f"{kernel.__name__}{constants.get('NUMBER', '')}"


class Recorder:
    """Stands in for a Triton kernel; keeps its launches, arguments by name."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            names = [name for name in self.kernel.arg_names if name not in options]
            given = dict(zip(names, args, strict=True)) | options
            self.launches.append((known_as(self.kernel, given), grid, given))

        return launch


class Compiler:
    """Stands in for ``triton.compile``; keeps by kernel what it is compiled for.

    That is its signature, constants, options, and the parameters that 16 divides.
    """

    def __init__(self):
        self.given = {}

    def __call__(self, source, target, options):
        names, signature = source.fn.arg_names, source.signature
        constants = {names[index]: x for (index,), x in source.constants.items()}
        name = known_as(source.fn, constants)
        divisible = {names[index] for (index,) in source.attrs}
        self.given[name] = (signature, constants, options, divisible)
        maps = [kind for kind in signature.values() if kind.startswith("tensordesc")]
        metadata = SimpleNamespace(
            name=name, shared=60000, num_warps=options.get("num_warps", 4),
            global_scratch_size=0, profile_scratch_size=0,
            tensordesc_meta=[{"swizzle": 3, "block_size": [1, 1, 64, 32]}] * len(maps),
        )  # fmt: skip
        return SimpleNamespace(asm={"cubin": b"none"}, metadata=metadata)


def as_map(x):
    """A descriptor of Triton's as the driver is told, in the boxes of ``Compiler``."""
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}[x.base.dtype]
    return plugin_runtime.TensorMap(
        x.base.data_ptr(), dtype, tuple(x.shape), tuple(x.strides), (1, 1, 64, 32), 3
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return plugin_runtime.build_driver(tmp_path_factory.mktemp("driver"))


def prepare(path, case, architecture, driver, monkeypatch):
    """A plugin's runtime for a case; what its kernels were compiled with; the operator's launches.

    The latter end with its outputs.
    """
    args = case.inputs()
    model, inputs = onnx_functions.node_model(args)
    return prepare_node(
        path, model, inputs, lambda: triton_attention.sparse_attention(*args), architecture, driver,
        monkeypatch,
    )  # fmt: skip


def prepare_node(path, model, inputs, operator, architecture, driver, monkeypatch):
    """As ``prepare``, for a file of one node and a call of its operator."""
    monkeypatch.setattr(gluon_attention, "on_hopper", lambda x: architecture == 90)
    for module in (gluon_scores, gluon_statistics):
        monkeypatch.setattr(module, "on_hopper", lambda x: architecture == 90)
    for module in (triton_attention, triton_fitting, triton_scores):
        monkeypatch.setattr(module, "shared_limit", lambda x: LIMITS[architecture])
    compiler = Compiler()
    monkeypatch.setattr(onnxruntime_kernels.triton, "compile", compiler)
    variants = onnxruntime_plugin.variants_of(model, architecture)
    compiled = onnxruntime_plugin.compile_variants(variants, architecture)
    onnxruntime_plugin.link_plugin(compiled, architecture, path, driver=str(driver))
    launches = []
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    outputs = operator()
    signatures = {name: signature for name, (signature, *_) in compiler.given.items()}
    runtime = plugin_runtime.Runtime(
        path, driver, model.graph.node[0], inputs.values(), outputs, signatures
    )
    return runtime, compiler.given, launches


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", LIMITS)
def test_launches_are_the_operator_s(tmp_path, architecture, name, driver, monkeypatch):
    """The same kernels with the same constants, grids, tensors and numbers, in the same order."""
    case, kernels = CASES[name]
    runtime, compiled, expected = prepare(
        tmp_path / "plugin.so", case, architecture, driver, monkeypatch
    )
    if architecture == 90:
        assert " ".join(name for name, *_ in expected) == kernels
    assert_launches(runtime, compiled, expected)


def test_launches_for_every_grid_are_the_operator_s(tmp_path, driver, monkeypatch):
    """Lengths, numbers of blocks and of representatives are constants of no kernel for Hopper."""
    args = replace(HOPPER, length_kv=512).inputs()  # whole blocks, for which it compiles last
    model, inputs = onnx_functions.node_model(args)
    onnx_nodes.with_open_sizes(model, known=[HOPPER.dim])
    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, inputs, lambda: triton_attention.sparse_attention(*args), 90,
        driver, monkeypatch,
    )  # fmt: skip
    assert_launches(runtime, compiled, expected)


@pytest.mark.parametrize(
    ("batch", "heads", "parts", "launched"),
    [
        (2, 5, 5, [2, 2, 1, 2, 2, 1]),  # some heads of a sample at a time
        (5, 2, 2, [4, 4, 2]),  # those of some samples
        (1, 13, 2, [7, 6]),
    ],
)
@pytest.mark.parametrize("tail", ["block", "none"])
def test_heads_in_parts_are_the_operator_s(
    tmp_path, tail, batch, heads, parts, launched, driver, monkeypatch
):
    """What is made for pairs of blocks is made for as many heads, and in the same workspace."""
    case = replace(HOPPER, batch=batch, heads=heads, tail=tail)
    made = 3 * (2 * 9 + 4 * gluon_attention.PLAN) + (2 * 5 * 9 if tail == "block" else 0)
    monkeypatch.setattr(gluon_attention, "FILL", 1)
    monkeypatch.setattr(gluon_attention, "SHARE", parts * 2 * (5 + 2 * 9) * 64 * 128 // made)
    runtime, compiled, expected = prepare(tmp_path / "plugin.so", case, 90, driver, monkeypatch)
    grids = [grid for name, grid, _ in expected if name == "_paired_kernel"]
    assert [heads for _, heads in grids] == launched
    assert_launches(runtime, compiled, expected)


def assert_launches(runtime, compiled, expected):
    """Run the plugin's node: it launches what is expected, as it was compiled."""
    runtime.run()
    assert not runtime.scratch  # all workspace is given back
    # where memory starts: its size, and where the operator's is; others are workspace
    spans = {0: (0, 0)} | {x.data_ptr(): (x.nbytes, x.data_ptr()) for x in runtime.tensors}
    for launch, (kernel, grid, arguments) in zip(runtime.launches, expected, strict=True):
        grid = (*grid, 1)[:2]
        assert (launch.kernel, launch.grid, launch.shared) == (kernel, grid, 60000)
        assert launch.threads == 32 * arguments.get("num_warps", 4)
        _, constants, options, divisible = compiled[kernel]
        assert not any(launch.arguments[name] % 16 for name in divisible)
        for name, value in (constants | options).items():
            assert value == arguments.pop(name), (kernel, name)
        unread = tuple(
            x for name, prefixes in UNREAD.items() if constants.get(name) is False for x in prefixes
        )
        assert arguments.keys() == launch.arguments.keys()
        for name, value in arguments.items():
            got = launch.arguments[name]
            if torch.is_tensor(value):
                start = max(x for x in spans if x <= got)
                if name in MADE.get(kernel, ()) or got >= start + max(spans[start][0], 1):
                    start, (size, _) = got, spans.get(got, (0, 0))
                    spans[got] = max(size, value.nbytes), value.data_ptr()
                got, value = spans[start][1] + got - start, value.data_ptr()
            elif isinstance(value, float):
                value = ctypes.c_float(value).value
            elif not isinstance(value, int):
                value = as_map(value)
            assert got == value or name.startswith(unread), (kernel, name)
    starts = sorted(spans)
    assert all(start + spans[start][0] <= after for start, after in itertools.pairwise(starts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "dim"), [(2, 3, 300, 128), (1, 1, 64, 64), (1, 24, 64 * 60, 64)]
)
def test_launches_of_statistics_are_the_operator_s(
    tmp_path, batch, heads, length, dim, dtype, driver, monkeypatch
):
    """One that pools and one that adds up; the latter writes where ONNX Runtime reads."""
    key, value = torch.zeros(2, batch, heads, length, dim, dtype=dtype)
    model, named = onnx_nodes.statistics_file(key, value, 64)
    results = []

    def pool():
        results.extend(triton_statistics.block_statistics(key, value, 64))
        return results

    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, named, pool, 90, driver, monkeypatch
    )
    assert [name for name, *_ in expected] == ["_statistics_kernel", "_sum_kernel"]
    assert_launches(runtime, compiled, expected)


@pytest.mark.parametrize(("blocks", "known"), [(5, True), (64, True), (300, True), (300, False)])
def test_launches_of_lists_are_the_operator_s(tmp_path, blocks, known, driver, monkeypatch):
    """One launch for all rows."""
    exact = torch.zeros(2, 3, 7, blocks, dtype=torch.bool)
    model = onnx_nodes.lists_file(exact)
    if not known:
        onnx_nodes.with_open_sizes(model)
    results = []

    def lists():
        results.extend(triton_selection.list_blocks(exact))
        return results

    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, {"exact": exact}, lists, 86, driver, monkeypatch
    )
    assert [name for name, *_ in expected] == ["_list_kernel"]
    assert_launches(runtime, compiled, expected)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("architecture", LIMITS)
def test_launches_of_scores_are_the_operator_s(tmp_path, architecture, name, driver, monkeypatch):
    """By the kernel for Hopper where the operator takes it."""
    dtype, dim, length, blocks, weight, power, block_q, rows = SCORED[name]
    inputs = score_inputs(2, 3, length, blocks, dim, dtype)
    numbers = (0.25, weight, power, block_q, rows)
    model, named = onnx_nodes.scores_file(inputs, *numbers)
    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, named,
        lambda: [triton_scores.block_scores(*inputs, *numbers)], architecture, driver, monkeypatch,
    )  # fmt: skip
    by_maps = architecture == 90 and name.startswith("hopper")
    assert [("mean_desc" in given) for *_, given in expected] == [by_maps]
    assert_launches(runtime, compiled, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "blocks_q", "blocks", "kept", "rows"),
    [
        (2, 3, 7, 19, 60, 7),
        (1, 2, 300, 320, 20000, 300),
        (1, 2, 1100, 64, 9000, 2200),
        (1, 1100, 40, 16, 90, 40),  # more budgets than programs
        (1, 3, 5, 12, 4, 1),
        (1, 2, 5, 12, 60, 5),  # all
    ],
)
def test_launches_of_the_selection_are_the_operator_s(
    tmp_path, batch, heads, blocks_q, blocks, kept, rows, dtype, driver, monkeypatch
):
    """The same passes over the same scores."""
    scores = torch.zeros(batch, heads, blocks_q, blocks, dtype=dtype)
    model = onnx_nodes.select_file(scores, kept, rows)
    masks = []

    def select():
        masks.append(triton_selection.select_blocks(scores, kept, rows))
        return masks

    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, {"scores": scores}, select, 86, driver, monkeypatch
    )
    assert bool(expected) == (kept < rows * blocks)
    assert_launches(runtime, compiled, expected)
    assert expected or masks[0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "blocks_q", "blocks", "kept", "rows"),
    [(1, 2, 300, 320, 20000, 600), (2, 2, 5, 2048, 4, 1), (1, 2, 5, 12, 60, 5)],
)
def test_launches_of_a_counted_selection_are_the_operator_s(
    tmp_path, batch, heads, blocks_q, blocks, kept, rows, dtype, driver, monkeypatch
):
    """One library for every size, whose numbers are read from the CPU's memory."""
    scores = torch.zeros(batch, heads, blocks_q, blocks, dtype=dtype)
    model, named = onnx_nodes.counted_file(scores, kept, rows)
    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", onnx_nodes.with_open_sizes(model), named,
        lambda: [triton_selection.select_blocks(scores, kept, rows)], 86, driver, monkeypatch,
    )  # fmt: skip
    assert_launches(runtime, compiled, expected)


@pytest.mark.parametrize(("dtype", "known"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    "name",
    [
        "ragged",
        "one_token",
        "wide_head_dims",
        "several_parts",
        "clusters",
        "many_heads",
        "every_second_block",
    ],
)
@pytest.mark.parametrize("architecture", LIMITS)
def test_launches_of_a_fit_are_the_operator_s(
    tmp_path, architecture, name, known, dtype, driver, monkeypatch
):
    """One library for every size but head dims; as many programs as the operator's."""
    many = replace(FITS["several_parts"], heads=50, length_q=40, dim=16, dim_v=16)
    case = replace((FITS | {"many_heads": many})[name], scale=-0.25)
    args = case.inputs(dtype, "cpu")
    model, named = onnx_nodes.fit_file(args)
    if not known:
        onnx_nodes.with_open_sizes(model, known=[case.dim, case.dim_v])
    results = []

    def fit():
        results.extend(triton_fitting.fit_tail(*args))
        return results

    runtime, compiled, expected = prepare_node(
        tmp_path / "plugin.so", model, named, fit, architecture, driver, monkeypatch
    )
    assert [name for name, *_ in expected] == list(KERNELS[triton_fitting])
    assert_launches(runtime, compiled, expected)


def test_a_fit_that_kernels_cannot_serve_is_refused(tmp_path, driver, monkeypatch):
    """More rows than a tile before there is a library, a mask of other blocks in a run."""
    args = FITS["ragged"].inputs(torch.float32, "cpu")
    model, named = onnx_nodes.fit_file([*args[:12], 17, *args[13:]])
    (node,) = model.graph.node
    with pytest.raises(ValueError, match="got none with kernels"):
        onnxruntime_plugin.variants_of(model, 90)
    next(x for x in node.attribute if x.name == "rows").i = 16
    runtime, *_ = prepare_node(
        tmp_path / "plugin.so", model, named, lambda: triton_fitting.fit_tail(*args), 90, driver,
        monkeypatch,
    )  # fmt: skip
    runtime.tensors[3] = runtime.tensors[3][..., 1:].contiguous()
    with pytest.raises(RuntimeError, match="a column for each of 5 key blocks, got 4"):
        runtime.run()
    assert not runtime.launches and not runtime.scratch


RUN = """
import ctypes, json, sys
import numpy, onnxruntime

driver, *files = sys.argv[1:]
sizes, launched = [ctypes.c_uint32] * 4, []
kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *sizes, ctypes.c_void_p)
hook = kind(lambda name, *rest: launched.append(name.decode()))
hooked = ctypes.c_void_p.in_dll(ctypes.CDLL(driver), "launched")
hooked.value = ctypes.cast(hook, ctypes.c_void_p).value
for file in files:
    launched.clear()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(f"{file}.so")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(f"{file}.onnx", options, providers=providers)
    outputs = session.run(None, dict(numpy.load(f"{file}.npz")))
    print(json.dumps([onnxruntime.__version__, launched, [x.shape for x in outputs]]))
"""


@pytest.mark.parametrize("python", [sys.executable, OLDEST / "bin" / "python"], ids=["now", "1.22"])
def test_onnx_runtime_itself_runs_every_node(tmp_path, python, driver, monkeypatch):
    """Its own table of functions has at their places what the library takes; nothing is computed.

    The library is the one for CUDA but for the name of the provider. Workspace ONNX Runtime 1.22
    gives on a GPU alone: where there is no stream it ends the process.
    """
    is_oldest = python != sys.executable
    if is_oldest and not (OLDEST / ".ready").is_file():
        pytest.skip(f"needs ONNX Runtime 1.22: make {(OLDEST / '.ready').relative_to(ROOT)}")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime_kernels.triton, "compile", Compiler())
    scores, exact = torch.zeros(1, 2, 300, 320), torch.zeros(2, 3, 7, 300) > 0
    of_scores = score_inputs(2, 3, 300, 7, 24, torch.float32)
    files = [
        onnx_functions.node_model(Case(tail="none").inputs()),
        onnx_nodes.scores_file(of_scores, 0.25, 0.5, 1.0, 32, 4),
        (onnx_nodes.select_file(scores, 80, 1), {"scores": scores}),
        onnx_nodes.counted_file(scores, 80, 1),
        (onnx_nodes.lists_file(exact), {"exact": exact}),
    ]
    if not is_oldest:
        files += [
            onnx_functions.node_model(replace(HOPPER, dtype=torch.float16).inputs()),
            onnx_nodes.statistics_file(*torch.zeros(2, 2, 3, 300, 128).half(), 64),
            onnx_nodes.counted_file(scores, 20000, 300),
            onnx_nodes.fit_file(FITS["clusters"].inputs(torch.float16, "cpu")),
        ]
    expected, paths = [], []
    for index, (model, inputs) in enumerate(files):
        paths.append(tmp_path / f"{index}")
        variants = onnxruntime_plugin.variants_of(model, 90)
        compiled = onnxruntime_plugin.compile_variants(variants, 90)
        onnxruntime_plugin.link_plugin(
            compiled, 90, paths[-1].with_suffix(".so"), driver=str(driver),
            provider="CPUExecutionProvider",
        )  # fmt: skip
        onnx.save(model, paths[-1].with_suffix(".onnx"))
        np.savez(paths[-1].with_suffix(".npz"), **{name: x.numpy() for name, x in inputs.items()})
        ((_, _, kernels),) = compiled
        in_row = int(inputs.get("rows", [0])[0]) == 1
        names = [
            kernel.name
            for place, kernel in kernels.items()
            if "rows" not in inputs or (place == "IN_ROW") == in_row
        ]
        sizes = [
            [dim.dim_value for dim in x.type.tensor_type.shape.dim] for x in model.graph.output
        ]
        expected.append([names, sizes])
    command = [python, "-c", RUN, driver, *paths]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    versions, *got = zip(*map(json.loads, result.stdout.splitlines()), strict=True)
    assert [list(x) for x in zip(*got, strict=True)] == expected
    assert not is_oldest or versions[0].startswith("1.22.")


def test_a_node_reads_and_writes_the_tensors_that_are_bound(tmp_path, driver, monkeypatch):
    """Nothing is copied on the way into a session or out of it: its kernel gets their addresses."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime_kernels.triton, "compile", Compiler())
    exact = torch.zeros(2, 3, 7, 300) > 0
    model, path = onnx_nodes.lists_file(exact), tmp_path / "plugin.so"
    compiled = onnxruntime_plugin.compile_variants(onnxruntime_plugin.variants_of(model, 90), 90)
    onnxruntime_plugin.link_plugin(
        compiled, 90, path, driver=str(driver), provider="CPUExecutionProvider"
    )
    file, options = tmp_path / "model.onnx", onnxruntime.SessionOptions()
    onnx.save(model, file)
    options.register_custom_ops_library(str(path))
    session = onnxruntime_session(file, ["CPUExecutionProvider"], options=options)
    outputs = {
        "block_ids": torch.empty(exact.shape, dtype=torch.int32),
        "block_counts": torch.empty(exact.shape[:-1], dtype=torch.int32),
    }
    binding = bind_tensors(session, {"exact": exact}, outputs)
    got = []
    hook = plugin_runtime.HOOK(
        lambda name, x, y, threads, shared, addresses: got.extend(
            ctypes.c_uint64.from_address(addresses[i]).value for i in range(3)
        )
    )
    launched = ctypes.c_void_p.in_dll(ctypes.CDLL(str(driver)), "launched")
    monkeypatch.setattr(launched, "value", ctypes.cast(hook, ctypes.c_void_p).value)
    session.run_with_iobinding(binding)
    assert got == [x.data_ptr() for x in (exact, *outputs.values())]
    options.register_custom_ops_library(str(path))
    with pytest.raises(ValueError, match="options must be new ones for each session with a plugin"):
        onnxruntime_session(file, ["CPUExecutionProvider"], options=options)


def test_budgets_that_do_not_fit_are_refused(tmp_path, driver, monkeypatch):
    """Numbers of a run that would have the kernels write elsewhere."""
    scores = torch.zeros(1, 2, 5, 12)
    model, named = onnx_nodes.counted_file(scores, 20, 5)
    runtime, *_ = prepare_node(
        tmp_path / "plugin.so", onnx_nodes.with_open_sizes(model), named,
        lambda: [triton_selection.select_blocks(scores, 20, 5)], 86, driver, monkeypatch,
    )  # fmt: skip
    for kept, rows in ((4, 5), (61, 5), (20, 4), (20, 0)):
        named["kept"][0], named["rows"][0] = kept, rows
        with pytest.raises(
            RuntimeError, match=f"{kept} blocks for every {rows} rows are no budget"
        ):
            runtime.run()
        assert not runtime.launches
    many = scores.new_zeros(1, 1, 1, triton_selection.PACKED_BLOCKS + 1)
    named["kept"][0], named["rows"][0], runtime.tensors[0] = 2, 1, many
    with pytest.raises(RuntimeError, match="must have at most 32768 blocks in a row, got 32769"):
        runtime.run()


def test_bad_tensors_are_refused(tmp_path, driver, monkeypatch):
    """By a sentence of ONNX Runtime's status; nothing is launched, no workspace kept."""
    runtime, *_ = prepare(tmp_path / "plugin.so", HOPPER, 90, driver, monkeypatch)
    query, key = runtime.tensors[:2]
    shifted = key.new_zeros(key.numel() + 1)[1:].view(key.shape)
    narrow, shorter = query[..., :120].contiguous(), key[:, :, :-64].contiguous()
    for wrong, message in (
        ((query, shifted), "input 1 must begin at a multiple of 16 bytes"),
        ((query, shorter), "one representative for each of 8 key blocks, got 1 x 9"),
        ((narrow, key), "was not built for this node"),
        ((query, key[0]), "input 1 must have 4 dimensions, got 3"),
    ):
        runtime.tensors[:2] = wrong
        with pytest.raises(RuntimeError, match=message):
            runtime.run()
        assert not runtime.launches and not runtime.scratch
