"""Tensors that follow from numbers alone: operators that compute once and hand out copies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

CONSTANTS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}
"""What each operator of ``constant`` returns, as a function of its arguments but the first."""


def constant(
    schema: str,
    shape: Callable[..., Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make an operator of a function of numbers and strings that returns a CPU tensor.

    The operator takes a tensor before them, for its device. It is opaque to whoever traces it: what
    it returns is computed when it is first traced or called, kept on the device, and copied by each
    call, without a word to the host. Exporters write it as a constant.

    Args:
        schema: Of the arguments, such as ``"int[] grid, float decay"``.
        shape: Of what the function returns, from the same arguments, where these may be symbolic
            (``SymInt[]``): then nothing is computed before a run, which does so once for each grid.
        dtype: Of what it returns; read with ``shape`` alone.

    Returns:
        A decorator; what it returns is called as ``function(like, *arguments)``.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.lru_cache(maxsize=32)
        def kept(device: torch.device, arguments: tuple[Any, ...]) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return function(*arguments).to(device)

        def call(like: Tensor, *arguments: Any) -> Tensor:
            return kept(like.device, _hashable(arguments)).clone()

        def fake(like: Tensor, *arguments: Any) -> Tensor:
            if shape is not None and _is_symbolic(arguments):
                return like.new_empty(shape(*arguments), dtype=dtype)
            on_gpu = like.device.type == "cuda" and torch.cuda.is_available()
            device = like.device if on_gpu else torch.device("cpu")
            with unset_fake_temporarily():
                # made now: a run may be recorded into a CUDA graph, which owns what it allocates
                result = kept(device, _hashable(arguments))
            return like.new_empty(result.shape, dtype=result.dtype)

        operator = torch.library.custom_op(
            f"uta::{function.__name__}",
            call,
            mutates_args=(),
            schema=f"(Tensor like, {schema}) -> Tensor",
        )
        operator.register_fake(fake)
        overload = getattr(torch.ops.uta, function.__name__).default
        CONSTANTS[overload] = function

        @functools.wraps(function)
        def operation(like: Tensor, *arguments: Any) -> Tensor:
            # nothing to lay out, where ``like`` may be a part of a tensor
            result: Tensor = overload(like.new_empty(0), *arguments)
            return result

        return operation

    return decorate


def _is_symbolic(arguments: tuple[Any, ...]) -> bool:
    return any(
        isinstance(x, torch.SymInt)
        for argument in arguments
        for x in (argument if isinstance(argument, (list, tuple)) else (argument,))
    )


def _hashable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(x) if isinstance(x, (list, tuple)) else x for x in arguments)
