"""Launches of kernels: made as usual, or only noted, so that kernels are compiled before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Launch:
    """One launch, as far as it decides what is compiled.

    Attributes:
        kernel: Of Triton or Gluon.
        args: What it is called with, a ``Pointer`` in place of each tensor, in tensor maps too.
        options: What it is called with by name.
    """

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Pointer:
    """What Triton looks at in a tensor.

    Attributes:
        dtype: Of the tensor.
        address: Where it lies, beyond a multiple of 16 bytes.
    """

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """As of a tensor."""
        return self.address


_noted: ContextVar[list[Launch] | None] = ContextVar("uta_noted_launches", default=None)


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``; within ``note_launches``, what notes the launch instead."""
    noted = _noted.get()
    if noted is None:
        launch: Callable[..., Any] = kernel[grid]
        return launch

    def note(*args: Any, **options: Any) -> None:
        noted.append(Launch(kernel, tuple(map(_without_memory, args)), options))

    return note


def _without_memory(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.dtype, x.data_ptr() % 16)
    base = getattr(x, "base", None)  # of a tensor map
    return dataclasses.replace(x, base=_without_memory(base)) if isinstance(base, Tensor) else x


def note_launches(function: Callable[..., Any], args: Sequence[Any]) -> list[Launch]:
    """What ``function`` would launch: a function that launches kernels, called with fake tensors.

    Args:
        function: Calls kernels through ``launcher``.
        args: For it; tensors among them are of one ``FakeTensorMode``, and each that is not a view
            is taken to lie at a multiple of 16 bytes, as PyTorch allocates.
    """
    mode = next(x.fake_mode for x in args if isinstance(x, FakeTensor))
    launches: list[Launch] = []
    token = _noted.set(launches)
    try:
        with mode, _FakeAddresses():
            function(*args)
    finally:
        _noted.reset(token)
    return launches


class _FakeAddresses(TorchFunctionMode):
    """Fake tensors, which lie nowhere, have addresses too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            return args[0].storage_offset() * args[0].itemsize
        return func(*args, **(kwargs or {}))
