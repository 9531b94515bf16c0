"""K-means and attention to clusters, in operations that an exporter has.

Clusters padded to blocks become ``uta::sparse_attention`` by one more channel: 1 in each query, and
in a key of padding a number that no logit of a true key comes near.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

import uta_fx.kernels.ops  # noqa: F401  # registers the operators

PADDING = -3e4  # float16 holds it, and times the scale of any head dim it is far below all logits


def spell_out_clusters(program: ExportedProgram) -> ExportedProgram:
    """The same program without ``uta::kmeans`` and ``uta::clustered_attention``."""
    table: dict[Any, Any] = {
        torch.ops.uta.kmeans.default: _kmeans,
        torch.ops.uta.clustered_attention.default: clustered_attention,
    }
    found = (program.graph.find_nodes(op="call_function", target=target) for target in table)
    if not any(found):
        return program
    table[torch.ops.aten.searchsorted.Tensor] = _searchsorted
    return program.run_decompositions(table)


def _kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.kmeans``, without a table of tokens by clusters that is kept."""
    x, means = tokens.float(), centroids.float()
    for _ in range(iterations):
        distance = means.square().sum(-1)[:, :, None] - 2 * x @ means.mT
        labels = distance.argmin(-1)  # [B, H, L]
        sizes = means.new_zeros(means.shape[:-1]).scatter_add(2, labels, torch.ones_like(x[..., 0]))
        sums = torch.zeros_like(means).scatter_add(2, labels[..., None].expand(x.shape), x)
        moved = sums / sizes.clamp(min=1)[..., None]
        means = torch.where(sizes[..., None] > 0, moved, means)
    return labels.int(), means, sizes.int()


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_ids: Tensor,
    block_counts: Tensor,
    key_counts: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_log_size: Tensor,
    tail_variance: Tensor,
    tail_slope: Tensor,
    scale: float,
    variance_weight: float,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """``uta::sparse_attention`` of one channel more."""
    row = torch.arange(block_kv, device=key.device)
    padding = (row >= key_counts[..., None]).flatten(2)[..., None]  # [B, H, Nk * block_kv, 1]
    channel = torch.where(padding, PADDING if scale > 0 else -PADDING, 0.0).to(key.dtype)
    output, lse = torch.ops.uta.sparse_attention.default(
        F.pad(query, (0, 1), value=1.0), torch.cat([key, channel], -1), value,
        block_ids, block_counts, F.pad(tail_key, (0, 1)), tail_value, tail_log_size,
        F.pad(tail_variance, (0, 1)), F.pad(tail_slope, (0, 0, 0, 1)),
        scale, variance_weight, block_q, block_kv,
    )  # fmt: skip
    return output, lse


def _searchsorted(ordered: Tensor, values: Tensor, **options: Any) -> Tensor:
    """How many of ``ordered`` ``[..., N]`` are at most each of ``values`` ``[..., M]``."""
    if not options.pop("right", False) or any(options.values()):
        return NotImplemented
    return (ordered[..., None, :] <= values[..., None]).sum(-1)
