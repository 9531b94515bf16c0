"""Kernels of ours compiled while Inductor compiles the graph around them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from uta_fx.kernels import ops
from uta_fx.kernels.launches import Launch, note_launches
from uta_fx.passes.locate_video import expected

logger = logging.getLogger(__name__)

WORKERS = 4  # the longest kernel takes about a third of what all take one after another


@contextlib.contextmanager
def kernels_compiled_beside(gm: GraphModule) -> Iterator[None]:
    """Compile the kernels that a graph's operators will launch, beside the body of a ``with``.

    Triton compiles a kernel at its first launch, when nothing else is left to do; most of that time
    it holds no lock of Python's. So threads do it earlier, and no thread is left at the end. Only
    what is not compiled is. An error here is logged: the launch tries again, and raises it.

    Args:
        gm: With operators of ours. Sizes that are symbols are taken as they are in the run that is
            traced; operators with sizes that only a run knows are left to their launch.
    """
    launches = launches_of(gm)
    if not launches:
        yield
        return
    load_driver({index for _, index in launches})
    pool = ThreadPoolExecutor(WORKERS, "uta-compile")
    try:
        for (_, index), some in launches.items():
            pool.submit(_compile, some, index)
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


def _compile(launches: list[Launch], index: int) -> None:
    """Compile one kernel for each of its launches that is unlike those before, and load it."""
    for launch in launches:
        try:
            with torch.cuda.device(index):
                compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
                compiled.run  # noqa: B018 - what launches it is built when it is asked for
        except Exception:
            logger.debug("%s compiles when launched", launch.kernel, exc_info=True)
            # what was compiled but could not be loaded would be taken for ready
            getattr(launch.kernel, "device_caches", {}).pop(index, None)
