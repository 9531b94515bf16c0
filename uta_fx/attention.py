"""The operation at one site: reorder, pool, select, aggregate, attend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uta_fx.config import Config
from uta_fx.kernels import ops
from uta_fx.order import Grid, token_order
from uta_fx.policies import Selection
from uta_fx.statistics import block_statistics


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: Config | None = None,
    grid: Grid | None = None,
    scale: float | None = None,
    text: tuple[int, int] = (0, 0),
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Self-attention over video tokens, sparse with the tail aggregated, in one eager call.

    Stands for ``F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)``; the
    same computation that the backend writes into a graph. Forward-only.

    Args:
        query: ``[B, H, L, D]``, float32, float16 or bfloat16, D from 16 to 128.
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        config: Settings; None for the defaults. ``min_tokens``, ``dense_layers``, ``dense_until``,
            ``inner`` and ``strict`` concern graphs and have no effect here.
        grid: Frames, height and width of the video tokens, with their number as product; None takes
            ``config.grid``. With neither they are blocked in the order in which they come.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
        text: How many tokens before and after the video are not video. They attend to everything,
            and every token attends to them exactly.
        attn_mask: Hides text from the video: boolean (True: seen) or added to logits, broadcasts
            to ``[B, H, L, L]``. Its entries for video keys must leave them seen by all video
            queries, and all rows of video queries must be equal: of these the first is read. Rows
            of text queries are free. Needs text.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``.

    Raises:
        ValueError: A shape, grid or head dim does not fit.
        TypeError: A dtype or device does not fit.
        RuntimeError: A gradient is asked for.
    """
    config = config or Config()
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:3] != query.shape[:3]:
            raise ValueError(
                f"{name} must have the batch, heads and length of query,"
                f" {tuple(query.shape[:3])}, got {tuple(tensor.shape[:3])}"
            )
    tokens = query.shape[2] - sum(text)
    if min(text) < 0 or tokens < 1:
        raise ValueError(
            f"text must hold two lengths whose sum is less than that of query, {query.shape[2]},"
            f" got {text}"
        )
    if attn_mask is not None and not any(text):
        raise ValueError("attn_mask hides text from the video: it needs text, got (0, 0)")
    grid = grid or config.grid
    if grid is not None and math.prod(grid) != tokens:
        raise ValueError(
            f"grid must have as many tokens as the video, {tokens},"
            f" got {' x '.join(map(str, grid))} = {math.prod(grid)}"
        )
    if grid is None and config.reorder in ("tile", "morton"):
        raise ValueError(f"grid must be given for reorder={config.reorder!r}, got None")
    video = (text[0], tokens) if any(text) else None
    return _attend(query, key, value, attn_mask, config, grid, scale, video)


@dataclasses.dataclass(frozen=True)
class SparseSite:
    """What takes the place of one attention call in a graph: a function of q, k, v and a mask.

    Attributes:
        config: Settings.
        grid: Frames, height and width of the video tokens; None keeps their order, which is block
            order already or is to be left alone.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
        video: The first video token and how many there are, where others lie around them.
    """

    config: Config
    grid: Grid | None
    scale: float | None
    video: tuple[int, int] | None = None
    __name__ = "sparse_site"  # torch.fx names and prints the target of a node by it

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attend; shapes and meaning as in ``sparse_attention``."""
        return _attend(query, key, value, attn_mask, self.config, self.grid, self.scale, self.video)


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """The index by which a tensor's video tokens are brought into block order, or back.

    Attributes:
        grid: Frames, height and width of the video tokens.
        reorder: As in ``Config``, and not ``"none"``.
        block: Tokens in a block.
        dim: Of the tensor, along which tokens lie.
        start: The first video token; those around the video stay where they are.
        back: From block order into the order of the grid.
    """

    grid: Grid
    reorder: str
    block: int
    dim: int
    start: int
    back: bool
    __name__ = "token_index"  # torch.fx names and prints the target of a node by it

    def __call__(self, x: Tensor) -> Tensor:
        """For a tensor: int64, as long as its dimension ``dim``."""
        index = token_order(self.grid, self.reorder, self.block, x.device)[int(self.back)]
        tokens, length = math.prod(self.grid), x.shape[self.dim]
        if length == tokens:
            return index
        around = torch.arange(length, device=x.device)
        return torch.cat([around[: self.start], index + self.start, around[self.start + tokens :]])


def reorder_tokens(
    query: Tensor, key: Tensor, value: Tensor, config: Config, grid: Grid | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Bring tokens into the order in which they are blocked.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        config: Settings.
        grid: Frames, height and width of the tokens; None keeps their order.

    Returns:
        The three in the new order, and the index that brings the output back: int64 ``[L]``, None
        where they keep their order.
    """
    if grid is None or config.reorder == "none":
        return (query, key, value), None
    order, inverse = token_order(grid, config.reorder, config.block_kv, query.device)
    query, key, value = (x.index_select(2, order) for x in (query, key, value))
    return (query, key, value), inverse


def pool_blocks(
    query: Tensor, key: Tensor, value: Tensor, config: Config, scale: float | None
) -> Selection:
    """Pool the blocks of one site: what a policy looks at.

    Args:
        query: ``[B, H, L, D]``, in the order in which tokens are blocked.
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        config: Settings.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
    """
    return Selection(
        query=query,
        statistics=block_statistics(key, value, config.block_kv),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        density=config.density,
        budget=config.budget,
        block_q=config.block_q,
    )


def operator_arguments(
    selection: Selection, key: Tensor, value: Tensor, config: Config
) -> tuple[Any, ...]:
    """Select and aggregate: the arguments of ``uta::sparse_attention`` for one site.

    Args:
        selection: Of ``pool_blocks``.
        key: ``[B, H, L, D]``, in the order in which tokens are blocked.
        value: ``[B, H, L, Dv]``.
        config: Settings; those that ``selection`` holds too are taken from there.
    """
    tail = config.tail_form()
    exact = config.selection_policy().select(selection)
    representatives = tail.representatives(selection, exact, key, value, config.block_kv)
    return (
        selection.query, key, value, *list_blocks(exact), *representatives,
        selection.scale, tail.mass_weight, selection.block_q, config.block_kv,
    )  # fmt: skip


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    config: Config,
    grid: Grid | None,
    scale: float | None,
    video: tuple[int, int] | None,
) -> Tensor:
    """A function and not a method: torch 2.11 cannot trace values of our own in a user's code."""
    if video is None:
        return _attend_to_video(query, key, value, config, grid, scale)[0]
    # one set of numbers for all: a graph need not know that lengths of a run are equal
    sizes = [*video, query.shape[2] - sum(video)]
    start = sizes[0]
    before_q, q, after_q = query.split(sizes, 2)
    (text_k, k), (text_v, v) = (_parted(x, sizes, 2) for x in (key, value))
    # one row of video too: a graph need not know that there is any text
    others_q = torch.cat([before_q, q[:, :, :1], after_q], 2)
    row = rows = None
    if attn_mask is not None:
        row, rows = _parted(attn_mask, sizes, -1)[0], attn_mask
        if attn_mask.shape[-2] != 1:
            row = row[..., start : start + 1, :]
            before, video_rows, after = attn_mask.split(sizes, -2)
            rows = torch.cat([before, video_rows[..., :1, :], after], -2)

    output, lse = _attend_to_video(q, k, v, config, grid, scale)
    text, text_lse = _attend_to_text(q, text_k, text_v, row, config, scale)
    # two softmaxes over disjoint keys as one; a row that sees no text has text_lse -inf
    share = (text_lse - lse).sigmoid()[..., None]
    output = torch.lerp(output.float(), text.float(), share).to(query.dtype)
    others = F.scaled_dot_product_attention(others_q, key, value, attn_mask=rows, scale=scale)
    # as SDPA lays out what comes of [B, L, H, D]: models join the heads next, without a copy
    parts = (others[:, :, :start], output, others[:, :, start + 1 :])
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _attend_to_video(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Config,
    grid: Grid | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, H, L, Dv]`` and the log-sum-exp ``[B, H, L]`` over video keys."""
    (query, key, value), inverse = reorder_tokens(query, key, value, config, grid)
    selection = pool_blocks(query, key, value, config, scale)
    output, lse = ops.sparse_attention(*operator_arguments(selection, key, value, config))
    if inverse is None:
        return output, lse
    return output.index_select(2, inverse), lse.index_select(2, inverse)


def _attend_to_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    config: Config,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """As ``_attend_to_video``, over text keys, with a mask ``[B or 1, H or 1, 1, Lt]``.

    To the operator each text key is a representative of itself: no key block is listed, and the
    mask goes where the log of how many keys a representative stands for does.
    """
    (batch, heads, length, dim), block = query.shape, config.block_q
    blocks = -(-length // block)
    size = torch.zeros(key.shape[2], device=query.device)
    if mask is not None:
        bias = mask.float()
        if mask.dtype == torch.bool:
            bias = torch.where(mask, 0.0, -torch.inf)
        size = bias.expand(batch, heads, 1, -1)
    none = query.new_zeros(batch, heads, blocks, 1, dtype=torch.int32)
    return ops.sparse_attention(
        query, key, value, none, none[..., 0],
        key[:, :, None].expand(-1, -1, blocks, -1, -1),
        value[:, :, None].expand(-1, -1, blocks, -1, -1),
        size.expand(batch, heads, blocks, -1),
        query.new_empty(batch, heads, 0, dim),
        query.new_empty(batch, heads, 0, dim, value.shape[-1]),
        dim**-0.5 if scale is None else scale, 0.0, block, config.block_kv,
    )  # fmt: skip


def _parted(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, Tensor]:
    """What lies around the video along ``dim``, and the video."""
    before, video, after = x.split(sizes, dim)
    return torch.cat([before, after], dim), video


def list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a mask of blocks into the operator's lists.

    Args:
        exact: Boolean ``[B, H, Nq, Nk]``.

    Returns:
        int32 ``[B, H, Nq, Nk]``, ids in ascending order, then padding; int32 ``[B, H, Nq]``.
    """
    blocks = exact.shape[-1]
    position = exact.cumsum(-1, dtype=torch.int32)
    # an unlisted block writes to one column too many
    target = torch.where(exact, position - 1, blocks).long()
    ids = torch.arange(blocks, dtype=torch.int32, device=exact.device).expand(exact.shape)
    listed = torch.zeros((*exact.shape[:-1], blocks + 1), dtype=torch.int32, device=exact.device)
    return listed.scatter(-1, target, ids)[..., :blocks], position[..., -1]
