"""What a call of ``sparse_attention`` may be given: everything else is refused before it begins."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from uta_fx.config import Config
from uta_fx.kernels.contract import check_device, check_dtype, check_finite, check_heads
from uta_fx.order import Grid, checked_grid
from uta_fx.policies import LowDelta, Threshold, TopK, TopP


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    config: Config,
    grid: Grid | None,
    text: tuple[int, int],
    scale: float | None,
) -> tuple[Grid | None, tuple[int, int] | None]:
    """The grid, and where the video lies, once they and the rest fit together.

    Args:
        query: As of ``sparse_attention``, as all that follow.
        key: See there.
        value: See there.
        attn_mask: See there.
        config: See there.
        grid: See there.
        text: See there.
        scale: See there.

    Returns:
        The grid of this call; the first video token and how many there are, None without text.

    Raises:
        ValueError: As ``sparse_attention``.
        TypeError: As ``sparse_attention``.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        check_heads(name, tensor)
        check_dtype(name, tensor, query.dtype)
        check_device(name, tensor, query)
    batch, heads, length, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if heads % key.shape[1] or tensor.shape[:3] != (batch, key.shape[1], length):
            raise ValueError(
                f"{name} must have the batch and length of query, and a number of heads that"
                f" divides its, {(batch, heads, length)}, the same for key and value;"
                f" got {tuple(tensor.shape[:3])}"
            )
    if key.shape[3] != dim:
        raise ValueError(f"key must have the head dim of query, {dim}, got {key.shape[3]}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a number or None, got {scale!r}")
        check_finite(scale=scale)
    tokens = length - sum(_checked_text(text, length))
    if attn_mask is not None:
        _check_mask(attn_mask, query, text)
    grid = config.grid if grid is None else checked_grid(grid)
    if grid is not None and math.prod(grid) != tokens:
        raise ValueError(
            f"grid must have as many tokens as the video, {tokens},"
            f" got {' x '.join(map(str, grid))} = {math.prod(grid)}"
        )
    if grid is None and config.reorder not in ("auto", "none"):
        raise ValueError(f"grid must be given for reorder={config.reorder!r}, got None")
    if grid is None and config.exact_frames:
        raise ValueError(f"grid must be given for exact_frames={config.exact_frames}, got None")
    if grid is not None:
        config.check_frames(grid)
    return grid, (text[0], tokens) if any(text) else None


def check_lengths(lengths: Tensor, query: Tensor, config: Config, text: tuple[int, int]) -> None:
    """Raise where lengths of samples do not fit; arguments as of ``sparse_attention``."""
    _check_tensor("lengths", lengths)
    if lengths.shape != query.shape[:1]:
        raise ValueError(
            f"lengths must have shape {tuple(query.shape[:1])}, got {tuple(lengths.shape)}"
        )
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.device != query.device:
        raise TypeError(f"lengths must be on {query.device} as query is, got {lengths.device}")
    if any(text):
        raise ValueError(f"lengths are of video alone: text must be (0, 0), got {text}")
    if objection := objection_to_lengths(config):
        raise ValueError(objection)
    if not lengths.is_cuda and _has_numbers(lengths):
        _check_range("lengths must be", lengths, query.shape[2])


def check_exact_keys(keys: Tensor, query: Tensor) -> None:
    """Raise where keys that are exact for all do not fit; arguments as of ``sparse_attention``."""
    _check_tensor("exact_keys", keys)
    length = query.shape[2]
    if keys.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"exact_keys must be torch.bool or torch.int64, got {keys.dtype}")
    if keys.dim() != 1 or (keys.dtype == torch.bool and keys.shape[0] != length):
        wanted = f"[L], here [{length}]" if keys.dtype == torch.bool else "[N]"
        raise ValueError(f"exact_keys must have shape {wanted}, got {tuple(keys.shape)}")
    check_device("exact_keys", keys, query)
    if keys.dtype != torch.bool and keys.numel() and _has_numbers(keys):
        _check_range("exact_keys must hold positions", keys, length - 1)


def objection_to_lengths(config: Config) -> str | None:
    """Why these settings cannot be of samples of different lengths, or None."""
    if not isinstance(config.selection_policy(), (LowDelta, TopK, TopP, Threshold)):
        return (
            "lengths need a policy low_delta, topk, topp or threshold, which know of blocks that"
            f" are not full; got {config.policy}"
        )
    if config.tail_form().kind == "rectified":
        return "lengths need a tail in the softmax, got rectified"
    return None


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be one dense tensor, got a nested tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, with strides, got {tensor.layout}")


def _has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be read, which they cannot be in a trace or of ``meta``."""
    traced = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
    return not (traced or tensor.is_meta)


def _check_range(what: str, numbers: Tensor, most: int) -> None:
    low, high = (int(x) for x in numbers.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{what} from 0 to {most}, got {low if low < 0 else high}")


def _checked_text(text: Any, length: int) -> tuple[int, int]:
    if (
        not isinstance(text, (tuple, list))
        or len(text) != 2
        or any(isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)) for x in text)
        or min(text) < 0
        or sum(text) >= length
    ):
        raise ValueError(
            f"text must hold two lengths whose sum is less than that of query, {length}, got {text}"
        )
    return text[0], text[1]


def _check_mask(mask: Tensor, query: Tensor, text: tuple[int, int]) -> None:
    if not any(text):
        raise ValueError("attn_mask hides text from the video: it needs text, got (0, 0)")
    _check_tensor("attn_mask", mask)
    batch, heads, length, _ = query.shape
    whole = (batch, heads, length, length)
    sizes = (*(1,) * (4 - mask.dim()), *mask.shape)
    if mask.dim() > 4 or any(x not in (1, y) for x, y in zip(sizes, whole, strict=True)):
        raise ValueError(f"attn_mask must broadcast to {whole}, got shape {tuple(mask.shape)}")
    if sizes[3] != length:
        raise ValueError(
            f"attn_mask must have an entry for each of the {length} keys, got {sizes[3]}"
        )
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be torch.bool, torch.float32 or of the dtype of query,"
            f" {query.dtype}, got {mask.dtype}"
        )
    check_device("attn_mask", mask, query)
