"""The operation at one site: reorder, pool, select, aggregate, attend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
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
) -> Tensor:
    """Self-attention over video tokens, sparse with the tail aggregated, in one eager call.

    Stands for ``F.scaled_dot_product_attention(query, key, value, scale=scale)``; the same
    computation that the backend writes into a graph. Forward-only.

    Args:
        query: ``[B, H, L, D]``, float32, float16 or bfloat16, D from 16 to 128.
        key: ``[B, H, L, D]``.
        value: ``[B, H, L, Dv]``.
        config: Settings; None for the defaults. ``min_tokens``, ``dense_layers``, ``dense_until``,
            ``inner`` and ``strict`` concern graphs and have no effect here.
        grid: Frames, height and width with product L; None takes ``config.grid``. With neither the
            tokens are blocked in the order in which they come.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.

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
    grid = grid or config.grid
    if grid is not None and math.prod(grid) != query.shape[2]:
        raise ValueError(
            f"grid must have as many tokens as query, {query.shape[2]},"
            f" got {' x '.join(map(str, grid))} = {math.prod(grid)}"
        )
    if grid is None and config.reorder in ("tile", "morton"):
        raise ValueError(f"grid must be given for reorder={config.reorder!r}, got None")
    return _attend(query, key, value, config, grid, scale)


@dataclasses.dataclass(frozen=True)
class SparseSite:
    """What takes the place of one attention call in a graph: a function of q, k and v.

    Attributes:
        config: Settings.
        grid: Frames, height and width of the tokens; None keeps their order.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
    """

    config: Config
    grid: Grid | None
    scale: float | None
    __name__ = "sparse_site"  # torch.fx names and prints the target of a node by it

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; shapes as in ``sparse_attention``."""
        return _attend(query, key, value, self.config, self.grid, self.scale)


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
    config: Config,
    grid: Grid | None,
    scale: float | None,
) -> Tensor:
    (query, key, value), inverse = reorder_tokens(query, key, value, config, grid)
    selection = pool_blocks(query, key, value, config, scale)
    output, _ = ops.sparse_attention(*operator_arguments(selection, key, value, config))
    return output if inverse is None else output.index_select(2, inverse)


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
