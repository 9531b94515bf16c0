"""Triton kernel of ``uta::join_text``: attention over the video and over the text as one."""
# pyright: reportArgumentType=false
# (Triton declares launch arguments as constexpr; an int is what one passes)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uta_fx.kernels.launches import launcher
from uta_fx.kernels.triton_attention import LOG2_E, last_contiguous

MOVED = 4096  # elements that a program writes


# whatever strides a batch of one is given
@triton.jit(do_not_specialize=["o_sb", "text_sb", "before_sb", "after_sb"])
def _join_kernel(
    o_ptr, text_ptr, before_ptr, after_ptr,  # last dimensions contiguous
    lse_ptr, text_lse_ptr,  # float32 [B, H, L], contiguous
    joined_ptr,  # [B, L1 + L + L2, H, Dv], contiguous
    o_sb, o_sh, o_sm,
    text_sb, text_sh, text_sm,
    before_sb, before_sh, before_sm,
    after_sb, after_sh, after_sm,
    heads, first, length, tokens,  # tokens before the video, of it, and in all
    ROWS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """Write ROWS tokens of one head."""
    batch_head = tl.program_id(1).to(tl.int64)  # 64-bit before it is multiplied by a stride
    batch, head = batch_head // heads, batch_head % heads
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dv = tl.arange(0, DV_PADDED)
    inside_dv = (dv < DV)[None, :]
    row = place - first  # of the video
    of_video = (row >= 0) & (row < length)
    mask = of_video[:, None] & inside_dv
    wide = row.to(tl.int64)[:, None]
    o_ptrs = o_ptr + batch * o_sb + head * o_sh + wide * o_sm + dv[None, :]
    text_ptrs = text_ptr + batch * text_sb + head * text_sh + wide * text_sm + dv[None, :]
    o = tl.load(o_ptrs, mask=mask, other=0.0)  # [ROWS, DV_PADDED]
    text = tl.load(text_ptrs, mask=mask, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + batch_head * length + row, mask=of_video, other=0.0)  # [ROWS]
    text_lse = tl.load(text_lse_ptr + batch_head * length + row, mask=of_video, other=0.0)
    share = 1.0 / (1.0 + tl.exp2((lse - text_lse) * LOG2_E))[:, None]
    both = o.to(tl.float32)
    both = (both + share * (text - both)).to(o.dtype)

    earlier = (row < 0)[:, None] & inside_dv
    before_ptrs = before_ptr + batch * before_sb + head * before_sh + dv[None, :]
    before_ptrs += place.to(tl.int64)[:, None] * before_sm
    both = tl.where(earlier, tl.load(before_ptrs, mask=earlier, other=0.0), both)
    later = ((row >= length) & (place < tokens))[:, None] & inside_dv
    after_ptrs = after_ptr + batch * after_sb + head * after_sh + dv[None, :]
    after_ptrs += (wide - length) * after_sm
    both = tl.where(later, tl.load(after_ptrs, mask=later, other=0.0), both)
    place = (batch * tokens + place)[:, None] * heads + head
    tl.store(joined_ptr + place * DV + dv[None, :], both, mask=mask | earlier | later)


def join_text(
    output: Tensor,
    lse: Tensor,
    text_output: Tensor,
    text_lse: Tensor,
    before: Tensor,
    after: Tensor,
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference``."""
    batch, heads, length, dim_v = output.shape
    first = before.shape[2]
    tokens = first + length + after.shape[2]
    rows = [last_contiguous(x) for x in (output, text_output, before, after)]
    joined = output.new_empty((batch, tokens, heads, dim_v))
    padded = triton.next_power_of_2(dim_v)
    at_once = MOVED // padded
    with torch.cuda.device_of(output):
        launcher(_join_kernel, (triton.cdiv(tokens, at_once), batch * heads))(
            *rows, lse.contiguous(), text_lse.contiguous(), joined,
            *(stride for x in rows for stride in x.stride()[:3]),
            heads, first, length, tokens,
            ROWS=at_once, DV=dim_v, DV_PADDED=padded, num_warps=4,
        )  # fmt: skip
    return joined.transpose(1, 2)
