"""Kernels that are compiled while Inductor compiles the graph are those that it then launches."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from uta_fx import compile_kernels
from uta_fx.kernels import ops
from uta_fx.kernels.launches import Launch, Pointer, launcher, note_launches

MODEL = """
import torch
from uta_fx.tails import Tail


class Joint(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.qkv = torch.nn.Linear(256, 3 * 256, dtype=dtype)

    def forward(self, text, video):
        tokens = torch.cat([text, video.flatten(2).transpose(1, 2)], 1)
        q, k, v = (
            x.unflatten(-1, (4, 64)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1)
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def run(dtype, device, batch=2):
    generator = torch.Generator(device).manual_seed(0)
    model = Joint(dtype).to(device)
    shapes = (batch, 30, 256), (batch, 256, 5, 12, 15)
    inputs = [torch.randn(x, device=device, generator=generator).to(dtype) for x in shapes]
    options = {"min_tokens": 64, "grid": (5, 12, 15), "strict": True, "tail": Tail(fit=16)}
    with torch.no_grad():
        return torch.compile(model, backend="uta", options=options)(*inputs)
"""

# a driver says that there is an H100; what a kernel is compiled for is noted, and not compiled
DRIVER = """
import contextlib
import threading
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from uta_fx import compile_kernels
from uta_fx.kernels import cpu, gluon_attention, gluon_scores, gluon_statistics, ops


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver._active = Driver()
torch.cuda.device_of = torch.cuda.device = lambda x: contextlib.nullcontext()
compile_kernels.may_compile = lambda: True
compile_kernels.device_of = lambda args: 0
compile_kernels.load_driver = lambda indices: None
for module in (gluon_attention, gluon_scores, gluon_statistics):
    module.on_hopper = lambda x: True
before, launched = set(), set()


def note(kernel, key, *rest):
    asked = launched if threading.current_thread() is threading.main_thread() else before
    asked.add((kernel.__module__, kernel.__name__, key))


JITFunction._do_compile = note
"""

KEYS = (
    MODEL
    + DRIVER
    + """
running = []
for op, launch in ops.LAUNCHERS.items():
    name = op._schema.name.removeprefix("uta::")

    def run_and_launch(*args, run=getattr(cpu, name), launch=launch):
        if not running:  # one operator may run another on a CPU
            launch(*args)
        running.append(run)
        result = run(*args)
        running.pop()
        return result

    setattr(cpu, name, run_and_launch)
for batch in (2, 1):  # strides of a batch of one are not those of the traced run
    run(torch.bfloat16, "cpu", batch)
    assert before == launched, before ^ launched
names = {name for _, name, _ in before}
assert {"_statistics_kernel", "_scores_kernel", "_paired_kernel", "_tail_kernel"} <= names, names
assert {"_square_kernel", "_sample_kernel", "_solve_kernel"} <= names, names
"""
)

# two kernels, one of which is given maps of tensors; nothing is launched. Workers have another
# ptxas, and the cache another place than when they started
APART = (
    DRIVER.replace("JITFunction._do_compile = note", "")
    + """
import os
from pathlib import Path
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas_version
from uta_fx.kernels.launches import note_launches

folder = Path(os.environ["TRITON_CACHE_DIR"])
folder.mkdir()
ptxas = folder / "ptxas"
ptxas.write_text("#!/bin/sh\\necho Cuda compilation tools, release 99.9, V99.9.99")
ptxas.chmod(0o700)
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **rest: found.append((src.name, cache_hit))
with FakeTensorMode():
    keys = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16)
launch = ops.LAUNCHERS[torch.ops.uta.block_statistics.default]
launches = note_launches(launch, (keys, keys, 64))
os.environ["TRITON_PTXAS_PATH"] = str(ptxas)
assert compile_kernels.compile_apart(launches[:1], 0) is None, "no worker has started"
AsyncCompile.wait_pool_ready()
del os.environ["TRITON_PTXAS_PATH"]
pool = AsyncCompile.process_pool()
versions = [pool.submit(get_ptxas_version, 90).result() for _ in range(4)]
assert all("99.9" in version for version in versions) and "99.9" not in get_ptxas_version(90)
os.environ["TRITON_CACHE_DIR"] = str(folder / "elsewhere")
jobs = [compile_kernels.compile_apart([launch], 0) for launch in launches]
for job in jobs:
    job.result()
assert compile_kernels.compile_apart(launches[:1], 0) is None, "it was asked before"
for launch in launches:
    launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
assert found == [("_statistics_kernel", True), ("_sum_kernel", True)], found
"""
)

# HunyuanVideo's 33 x 45 x 80 tokens, which go by eight heads
PARTS = (
    DRIVER
    + """
from torch._subclasses.fake_tensor import FakeTensorMode
from uta_fx.kernels.launches import note_launches


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(1, 24, *shape, dtype=dtype)


with FakeTensorMode():
    blocks = 1857
    tokens = [empty(118800, 128) for _ in range(3)]
    tail = [empty(blocks, 128), empty(blocks, 128), empty(blocks, dtype=torch.float32)]
    slope = [empty(blocks, 128), empty(1, 128, 128)]
    exact = empty(blocks, blocks, dtype=torch.bool)
launch = ops.LAUNCHERS[torch.ops.uta.block_masked_attention.default]
launches = note_launches(launch, (*tokens, exact, *tail, *slope, 0.1, 0.5, 64, 64))
assert len(launches) == 3 * 4, len(launches)
for launch in launches:
    launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
assert len(launched) == 4, launched
"""
)


def run_script(script, tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        environment[name] = str(tmp_path / name)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_what_is_compiled_before_is_what_launches_ask_for(tmp_path):
    """Types, strides of 1, what 16 divides, constants and options, as Inductor lays tensors out."""
    pytest.importorskip("triton")
    run_script(KEYS, tmp_path)


def test_parts_of_the_heads_share_their_kernels(tmp_path):
    """However many heads they are, and wherever in memory they begin."""
    pytest.importorskip("triton")
    run_script(PARTS, tmp_path)


def test_workers_leave_kernels_in_the_cache(tmp_path):
    """What the process that launches them asks for is found there."""
    pytest.importorskip("triton")
    run_script(APART, tmp_path)


ON_GPU = (
    MODEL
    + """
import threading
from triton import knobs

compiled = []


def listener(*, src, cache_hit, **rest):
    if getattr(src.fn, "module", "").startswith("uta_fx"):
        compiled.append((src.name, threading.current_thread().name))


knobs.compilation.listener = listener
assert run(torch.bfloat16, "cuda").isfinite().all()
assert compiled and all(thread.startswith("uta-compile") for _, thread in compiled), compiled
"""
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_launch_compiles_anything(tmp_path):
    run_script(ON_GPU, tmp_path)


def test_without_a_gpu_nothing_is_compiled():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert not compile_kernels.may_compile()


class Toy(torch.nn.Module):
    """Attention alone."""

    def forward(self, x):
        q = x.flatten(2).transpose(1, 2)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def sparse_toy():
    options = {"min_tokens": 64, "inner": "eager", "strict": True, "grid": (4, 8, 8)}
    return torch.compile(Toy(), backend="uta", options=options)


class Video(torch.nn.Module):
    """Attention over the tokens of a clip of any size."""

    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv3d(3, 16, 1)

    def forward(self, clip):
        q = self.patch(clip).flatten(2).transpose(1, 2)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were one."""
    torch._dynamo.reset()
    monkeypatch.setattr(compile_kernels, "may_compile", lambda: True)
    monkeypatch.setattr(compile_kernels, "device_of", lambda args: 0)
    monkeypatch.setattr(compile_kernels, "load_driver", lambda indices: None)


def test_an_error_is_left_to_the_launch(on_gpu, monkeypatch):
    """Where launches are noted, and where a kernel is compiled."""
    x = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sparse_toy()(x)
    calls = []

    class Kernel:
        def warmup(self, *args, **options):
            calls.append("compiled")
            raise RuntimeError("does not compile")

    def launch(*args):
        calls.append("noted")
        launcher(Kernel(), (1,))(*args)

    def fail(*args):
        calls.append("failed")
        raise RuntimeError("cannot be noted")

    for op in ops.LAUNCHERS:
        monkeypatch.setitem(ops.LAUNCHERS, op, launch)
    monkeypatch.setitem(ops.LAUNCHERS, torch.ops.uta.block_masked_attention.default, fail)
    torch._dynamo.reset()
    assert torch.equal(sparse_toy()(x), expected)
    assert {"noted", "failed"} <= set(calls)


@torch.no_grad()
def test_under_symbols_kernels_are_those_of_the_first_size(on_gpu, monkeypatch):
    """And the next size is the same graph: nobody asked a symbol for its value."""
    noted = []

    class Kernel:
        def warmup(self, *args, **options):
            raise RuntimeError("there is no GPU")

    def launch(query, *args):
        noted.append(query.shape)
        if query.shape[2] % 16 == 0 and query.shape[2] > 200:  # guards, if these were symbols
            launcher(Kernel(), (1,))(query, query.shape[2])

    for op in ops.LAUNCHERS:
        monkeypatch.setitem(ops.LAUNCHERS, op, launch)
    torch._dynamo.utils.counters.clear()
    options = {"min_tokens": 64, "block_q": 16, "block_kv": 16, "inner": "eager", "strict": True}
    compiled = torch.compile(Video(), backend="uta", dynamic=True, options=options)
    for size in ((4, 6, 10), (5, 7, 9)):
        compiled(torch.randn(1, 3, *size))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (1, 1, 240, 16) in noted and all(type(x) is int for shape in noted for x in shape)


def test_what_cannot_be_loaded_is_left_to_the_launch(monkeypatch):
    """Which asks for it anew: on that device it is as if it had not been compiled."""

    class Compiled:
        @property
        def run(self):
            raise RuntimeError("no room")

    class Kernel:
        def __init__(self):
            self.device_caches = {0: "its kernels", 1: "those of another device"}

        def warmup(self, *args, **options):
            return Compiled()

    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    kernel = Kernel()
    compile_kernels._load([Launch(kernel, (), {})], 0, None)
    assert kernel.device_caches == {1: "those of another device"}


def test_the_graphs_error_is_the_one_that_is_raised(on_gpu):
    gm = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(ValueError, match="of the graph"):
        with compile_kernels.kernels_compiled_beside(gm):
            raise ValueError("of the graph")


def test_a_launch_is_noted_with_addresses():
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, args, options))

    kernel, x = Kernel(), torch.zeros(4, 3)

    def launch(x, number):
        launcher(kernel, (2, 3))(x[1], x[2].new_zeros(5), number, WARPS=4)

    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    (noted,) = note_launches(launch, (fake, 7))
    assert noted.kernel is kernel and noted.options == {"WARPS": 4} and not launched
    assert noted.args == (Pointer(torch.float32, 12), Pointer(torch.float32, 0), 7)
    launch(x, 7)
    assert launched[0][0] == (2, 3) and launched[0][1][2] == 7
