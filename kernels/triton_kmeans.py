"""Triton kernels of ``uta::kmeans``: which centroid is nearest, and the means that follow.

The first streams centroids past a tile of tokens and keeps the nearest so far; no matrix of tokens
by centroids is stored. Tokens are then sorted by label, and the second kernel adds up each
cluster's in that order: sums of the same bits every time, as atomics would not be.
"""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.triton_attention import dot_precision, last_contiguous

# (bytes of an element, padded head dim): tokens and centroids in a tile
_TILES = {
    (2, 256): (64, 64), (2, 128): (128, 64), (2, 64): (128, 64), (2, 32): (128, 64),
    (2, 16): (128, 64),
    (4, 256): (32, 16), (4, 128): (32, 32), (4, 64): (64, 32), (4, 32): (64, 32),
    (4, 16): (64, 32),
}  # fmt: skip
ROWS = 32  # that a program adds up at a time


@triton.jit
def _assign_kernel(
    x_ptr,
    c_ptr,  # [B, H, C, D], contiguous, in the dtype of x
    norms_ptr,  # float32 [B, H, C]: squared norms of these
    labels_ptr,  # int32 [B, H, L]
    x_sb, x_sh, x_sm,
    heads, length, clusters,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # tokens of a program, centroids of a step
    D: tl.constexpr, D_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the nearest centroid of BLOCK_M tokens, the first of several."""
    tile = tl.program_id(0).to(tl.int64)  # 64-bit before they are multiplied by strides
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    offs_n, d = tl.arange(0, BLOCK_N), tl.arange(0, D_PADDED)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m, inside_d = row < length, d < D
    x_ptrs = x_ptr + batch * x_sb + head * x_sh + row[:, None] * x_sm + d[None, :]
    x = tl.load(x_ptrs, mask=inside_m[:, None] & inside_d[None, :], other=0.0)
    nearest = tl.full([BLOCK_M], float("inf"), tl.float32)
    label = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, clusters, BLOCK_N):
        n = start + offs_n
        inside_n = n < clusters
        place = batch_head * clusters + n
        c_mask = inside_n[:, None] & inside_d[None, :]
        c = tl.load(c_ptr + place[:, None] * D + d[None, :], mask=c_mask, other=0.0)
        norms = tl.load(norms_ptr + place, mask=inside_n, other=float("inf"))  # [BLOCK_N]
        product = tl.dot(x, tl.trans(c), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        distance = norms[None, :] - 2.0 * product  # but for the token's own square
        least = tl.min(distance, 1)
        label = tl.where(least < nearest, start + tl.argmin(distance, 1), label)
        nearest = tl.minimum(nearest, least)
    tl.store(labels_ptr + batch_head * length + row, label, mask=inside_m)


@triton.jit
def _mean_kernel(
    x_ptr,
    order_ptr,  # int64 [B * H * L], tokens of all heads by head and label
    first_ptr,  # int64 [B * H * C + 1], where each cluster starts there
    c_ptr,  # float32 [B, H, C, D], contiguous: replaced where there is a member
    x_sb, x_sh, x_sm,
    heads, length, clusters,
    ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Move one centroid to the mean of its members."""
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    place = batch_head * clusters + tl.program_id(0)
    first, last = tl.load(first_ptr + place), tl.load(first_ptr + place + 1)
    d, rows = tl.arange(0, D_PADDED), tl.arange(0, ROWS)
    inside_d = d < D
    x_base = x_ptr + batch * x_sb + head * x_sh
    total = tl.zeros([D_PADDED], tl.float32)
    for start in range(first, last, ROWS):
        inside = start + rows < last
        token = tl.load(order_ptr + start + rows, mask=inside, other=0) - batch_head * length
        x_mask = inside[:, None] & inside_d[None, :]
        x = tl.load(x_base + token[:, None] * x_sm + d[None, :], mask=x_mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)  # [D_PADDED]
    if last > first:
        mean = total / (last - first).to(tl.float32)
        tl.store(c_ptr + place * D + d, mean, mask=inside_d)


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels; arguments and results as in ``reference.kmeans``.

    An iteration is two launches, a sort of B * H * L labels and a search in them; nothing waits for
    the host. In 16 bits a token goes to the nearest of the centroids as rounded to its dtype.
    """
    batch, heads, length, dim = tokens.shape
    clusters = centroids.shape[2]
    tokens = last_contiguous(tokens)
    centroids = centroids.clone(memory_format=torch.contiguous_format)
    labels = tokens.new_empty((batch, heads, length), dtype=torch.int32)
    first = torch.empty(0)
    padded = triton.next_power_of_2(dim)
    block_m, block_n = _TILES[tokens.itemsize, padded]
    block_n = min(block_n, max(16, triton.next_power_of_2(clusters)))
    sizes = (*tokens.stride()[:3], heads, length, clusters)
    heads_before = torch.arange(batch * heads, dtype=torch.int32, device=tokens.device)[:, None]
    every = torch.arange(batch * heads * clusters + 1, dtype=torch.int32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        for _ in range(iterations):
            rounded = centroids.to(tokens.dtype)
            launcher(_assign_kernel, (triton.cdiv(length, block_m), batch * heads))(
                tokens, rounded, rounded.float().square().sum(-1), labels, *sizes,
                BLOCK_M=block_m, BLOCK_N=block_n, D=dim, D_PADDED=padded,
                PRECISION=dot_precision(tokens.dtype), num_warps=4, num_stages=2,
            )  # fmt: skip
            of_all = (labels.view(batch * heads, length) + heads_before * clusters).flatten()
            ordered, order = of_all.sort(stable=True)
            first = torch.searchsorted(ordered, every)
            launcher(_mean_kernel, (clusters, batch * heads))(
                tokens, order, first, centroids, *sizes,
                ROWS=ROWS, D=dim, D_PADDED=padded, num_warps=1,
            )  # fmt: skip
    return labels, centroids, first.diff().int().view(batch, heads, clusters)
