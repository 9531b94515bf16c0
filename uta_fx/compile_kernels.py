"""Kernels of ours compiled while Inductor compiles the graph around them."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from uta_fx.kernels import ops
from uta_fx.kernels.launches import Launch, note_launches
from uta_fx.passes.locate_video import expected

logger = logging.getLogger(__name__)

THREADS = 8  # that wait for kernels, and load them


@contextlib.contextmanager
def kernels_compiled_beside(gm: GraphModule) -> Iterator[None]:
    """Compile the kernels that a graph's operators will launch, beside the body of a ``with``.

    Triton compiles a kernel at its first launch, when nothing else is left to do. So Inductor's
    worker processes do it earlier, and threads load what they leave in Triton's cache; where these
    workers have not started yet the threads compile it. No thread is left at the end. Only what is
    not compiled is. An error here is logged: the launch tries again, and raises it.

    Args:
        gm: With operators of ours. Sizes that are symbols are taken as they are in the run that is
            traced; operators with sizes that only a run knows are left to their launch.
    """
    launches = launches_of(gm)
    if not launches:
        yield
        return
    load_driver({index for _, index in launches})
    pool = ThreadPoolExecutor(THREADS, "uta-compile")
    try:
        for (kernel, index), some in launches.items():
            compiled = None
            try:
                compiled = compile_apart(some, index)
            except Exception:
                logger.debug("no worker compiles %s", kernel, exc_info=True)
            pool.submit(_load, some, index, compiled)
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def launches_of(gm: GraphModule) -> dict[tuple[Any, int], list[Launch]]:
    """What a graph's operators will launch on GPUs, by kernel and index of the device."""
    launches: dict[tuple[Any, int], list[Launch]] = {}
    if not may_compile():
        return launches
    for part in gm.modules():
        if not isinstance(part, GraphModule):
            continue
        for node in part.graph.nodes:
            launcher = ops.LAUNCHERS.get(node.target)
            args = torch.fx.map_arg(node.args, lambda x: x.meta.get("val"))
            index = device_of(args) if launcher is not None else None
            if launcher is None or index is None:
                continue
            try:
                with FakeTensorMode():
                    noted = note_launches(launcher, torch.fx.map_arg(node.args, _in_numbers))
            except Exception:
                logger.debug("kernels of %s compile when launched", node.target, exc_info=True)
                continue
            for launch in noted:
                launches.setdefault((launch.kernel, index), []).append(launch)
    return launches


def _in_numbers(node: Node) -> Any:
    """What was recorded of a node, without symbols: a launcher that asks of one adds a guard."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return expected(value)
    if not isinstance(value, Tensor):
        return value
    shape, strides = list(map(expected, value.shape)), list(map(expected, value.stride()))
    offset = expected(value.storage_offset())
    needed = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    whole = torch.empty(max(needed, offset), dtype=value.dtype, device=value.device)
    return whole.as_strided(shape, strides, offset)


def may_compile() -> bool:
    """Whether there is a GPU, and compiling in threads is neither declined nor unsafe."""
    from torch._inductor import config  # slow to import: only when compiling

    # processes that Inductor forks off a process with threads may hang
    return (
        torch.cuda.is_available()
        and config.compile_threads != 1
        and config.worker_start_method != "fork"
    )


def load_driver(indices: set[int]) -> None:
    """Load Triton's driver, which threads that need it at the same time would load twice."""
    from uta_fx.kernels.triton_attention import shared_limit

    for index in indices:
        shared_limit(torch.empty(0, device=f"cuda:{index}"))  # asks it


def device_of(args: tuple[Any, ...]) -> int | None:
    """Index of the GPU on which an operator's tensors are; None where they are elsewhere."""
    tensor = next((x for x in args if isinstance(x, Tensor)), None)
    if tensor is None or not tensor.is_cuda:
        return None
    return torch.cuda.current_device() if tensor.device.index is None else tensor.device.index


_compiled_apart: set[str] = set()  # what workers were given, in words


def compile_apart(launches: list[Launch], index: int) -> Future[None] | None:
    """Have a worker of Inductor's compile one kernel for each of its launches.

    Args:
        launches: Of the same kernel.
        index: Of the GPU to compile for.

    Returns:
        Done when Triton's cache has the kernels; None where no worker is ready, or was asked
        before.
    """
    from torch._inductor.async_compile import AsyncCompile
    from triton.runtime.driver import driver

    kernel = launches[0].kernel
    module, name = kernel.__module__, kernel.__name__
    with torch.cuda.device(index):
        target = driver.active.get_current_target()
    calls = [(launch.args, launch.options) for launch in launches]
    job = repr((module, name, target, calls))
    findable = getattr(sys.modules.get(module), name, None) is kernel
    if job in _compiled_apart or not findable or not AsyncCompile.use_process_pool():
        return None
    future: Future[None] = AsyncCompile.process_pool().submit(
        compile_in_worker, module, name, calls, target, _tools()
    )
    _compiled_apart.add(job)
    return future


def _tools() -> dict[str, str | None]:
    """The environment variables that say what Triton compiles with, and where it keeps that."""
    from triton import knobs

    names = [knob.key for knob in knobs.nvidia.knob_descriptors.values()]
    return {name: os.environ.get(name) for name in (*names, "TRITON_CACHE_DIR")}


class _Target:
    """What Triton asks its driver while it compiles, where there is a GPU only to compile for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_in_worker(
    module: str,
    name: str,
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    target: Any,
    tools: Mapping[str, str | None],
) -> None:
    """Compile a kernel into Triton's cache, in a process that launches nothing.

    Args:
        module: Where the kernel is.
        name: Of it there.
        calls: Positional arguments and options of its launches.
        target: Triton's name of the GPU.
        tools: Environment variables of the process that launches it, None where it has none.
            Inductor has its workers take another ptxas, by which kernels are other ones to the
            cache.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    driver.set_active(_Target(target))  # type: ignore[arg-type]
    kernel = getattr(importlib.import_module(module), name)
    with knobs.nvidia.scope():
        knobs.nvidia.reset()
        for variable, value in tools.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        _forget_tools()
        for args, options in calls:
            kernel.warmup(*args, grid=(1,), **options)
    _forget_tools()
    kernel.device_caches.clear()  # the next job may name another folder


def _forget_tools() -> None:
    """Have Triton ask again what it has asked once in a process."""
    from triton.backends.nvidia import compiler

    compiler.get_ptxas_version.cache_clear()
    compiler.get_features.cache_clear()


def _load(launches: list[Launch], index: int, compiled: Future[None] | None) -> None:
    """Load one kernel for each of its launches that is unlike those before."""
    if compiled is not None:
        try:
            compiled.result()
        except Exception:
            logger.debug("%s is not compiled apart", launches[0].kernel, exc_info=True)
    for launch in launches:
        try:
            with torch.cuda.device(index):
                kernel = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
                kernel.run  # noqa: B018 - what launches it is built when it is asked for
        except Exception:
            logger.debug("%s compiles when launched", launch.kernel, exc_info=True)
            # what was compiled but could not be loaded would be taken for ready
            getattr(launch.kernel, "device_caches", {}).pop(index, None)
