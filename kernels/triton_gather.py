"""Triton kernel of ``uta::gather_tokens``: rows of memory in another order."""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels import reference
from uta_fx.kernels.launches import launcher

MOVED = 4096  # elements that a program moves at a time
WIDEST = 1024  # elements of one token among them, at most
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@triton.jit
def _gather_kernel(
    x_ptr,  # [B, L, W], last dimension contiguous
    index_ptr,  # int64 [L], contiguous
    out_ptr,  # [B, L, W], contiguous
    stride_batch, stride_token, tokens, width,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Move the rows of ``TOKENS`` places, ``WIDTH`` elements at a time."""
    batch = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = place < tokens
    source = tl.load(index_ptr + place, mask=inside, other=0)
    from_ptrs = x_ptr + batch * stride_batch + source * stride_token  # [TOKENS]
    to_ptrs = out_ptr + (batch * tokens + place) * width
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < width)[None, :]
        moved = tl.load(from_ptrs[:, None] + column[None, :], mask=mask, other=0)  # [TOKENS, WIDTH]
        tl.store(to_ptrs[:, None] + column[None, :], moved, mask=mask)


def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.gather_tokens``.

    It moves what is one piece of memory for each token, with at most one dimension around the
    tokens; other layouts are left to PyTorch.
    """
    order = reference.memory_order(x)
    place, laid_out = order.index(dim), x.permute(order)
    sizes, strides = laid_out.shape, laid_out.stride()
    around = [i for i in range(place) if sizes[i] != 1]
    width = math.prod(sizes[place + 1 :])
    in_pieces = x.numel() == 0 or not laid_out.select(place, 0)[(0,) * place].is_contiguous()
    if in_pieces or len(around) > 1 or x.itemsize not in WORDS:
        return reference.gather_tokens(x, index, dim)
    gathered, word = torch.empty(sizes, dtype=x.dtype, device=x.device), WORDS[x.itemsize]
    at_once = min(WIDEST, triton.next_power_of_2(width))
    programs = triton.cdiv(sizes[place], MOVED // at_once)
    with torch.cuda.device_of(x):
        launcher(_gather_kernel, (programs, math.prod(sizes[:place])))(
            laid_out.view(word), index.contiguous(), gathered.view(word),
            strides[around[0]] if around else 0, strides[place], sizes[place], width,
            TOKENS=MOVED // at_once, WIDTH=at_once, num_warps=4,
        )  # fmt: skip
    return gathered.permute([order.index(i) for i in range(x.dim())])
