"""Keep the clusters of keys that hold most attention of a cluster of queries: Sparse VideoGen2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.clusters import Centroids, Clusters, first_centroids, sort_into_blocks
from uta_fx.kernels import ops
from uta_fx.policies.base import Selection


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SVG2:
    """The rule of Sparse VideoGen2 (arXiv:2505.18875).

    K-means of each head groups queries into clusters a and keys into clusters b. With centroids
    q_a and k_b, a attends to all tokens of the clusters that hold most of

        P_ab = softmax_b(s q_a.k_b + ln |b|)

    until they hold the share ``mass``, and in any case to the share ``least`` of all clusters. So
    tokens are sorted by cluster, which takes the place of tiles: ``Config.reorder`` is the order
    within a cluster (``"auto"``: the model's own). Each cluster is padded to whole blocks; a query
    block's list names the blocks of its clusters, and padding is seen by nobody. In a tail each
    block of a cluster that is not kept is a block like any other. ``Config.density`` and
    ``Config.budget`` have no effect: ``mass`` decides.

    Published: the tail dropped; 300 clusters of queries for Wan at 720p, 200 at 480p, 400 for
    HunyuanVideo at 720p; k-means started from tokens drawn by chance, with up to 50 iterations,
    and 2 at later steps, which start from the centroids of the step before. Here it starts from
    tokens spread evenly, and an iteration count is a count, so that nothing waits for the host.
    Later steps go on where the step before ended if ``keep`` is set, which concerns compiled graphs
    alone, or if ``uta_fx.attention.clustered_attention`` is told where that was.

    Attributes:
        query_clusters: Clusters of queries, from 1 to the number of video tokens.
        key_clusters: Clusters of keys, likewise.
        mass: Share of a query cluster's attention to keep, in (0, 1].
        least: Share of the clusters to keep in any case, in [0, 1]; never none.
        iterations: Of k-means from a new start, at least 1.
        continued: Of k-means from the centroids of the step before, at least 1.
        seed: Another seed starts from other tokens; at least 0.
        keep: Whether a compiled graph starts each call from where it ended the last, with
            ``continued`` iterations in each, the first too. As published, calls with and without a
            prompt share their centroids, and a new video starts from those of the video before:
            what it gives depends on what ran before. Needs the whole model in one graph, because
            alike blocks that are compiled one by one share their code and what that keeps. Takes
            4 (Cq + Ck) D bytes for each head of a layer, 1 GB in all for Wan 14B.

    Raises:
        ValueError: A field is outside its range; more clusters than tokens when it is used.
    """

    query_clusters: int = 300
    key_clusters: int = 1000
    mass: float = 0.9
    least: float = 0.1
    iterations: int = 50
    continued: int = 2
    seed: int = 0
    keep: bool = False

    order: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be in (0, 1], got {self.mass}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be in [0, 1], got {self.least}")
        for name in ("query_clusters", "key_clusters", "iterations", "continued"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def cluster(
        self,
        query: Tensor,
        key: Tensor,
        block_q: int,
        block_kv: int,
        centroids: Centroids | None = None,
    ) -> Clusters:
        """Group the tokens of one site.

        Args:
            query: ``[B, H, L, D]``.
            key: ``[B, H, L, D]``.
            block_q: Query rows in a block.
            block_kv: Keys in a block.
            centroids: Those of the step before; zeros where there was none; None for a new start
                with as many iterations as that takes.

        Raises:
            ValueError: There are more clusters than tokens.
        """
        length = query.shape[2]
        for name in ("query_clusters", "key_clusters"):
            if getattr(self, name) > length:
                raise ValueError(
                    f"{name} of policy svg2 must be at most the number of video tokens, {length},"
                    f" got {getattr(self, name)}: pass policy=uta_fx.policies.SVG2({name}=...)"
                    f" with fewer, such as a {'250th' if name == 'query_clusters' else '75th'} of"
                    " the tokens"
                )
        start = Centroids(
            first_centroids(query, self.query_clusters, self.seed),
            first_centroids(key, self.key_clusters, self.seed),
        )
        if centroids is not None:
            start = Centroids(
                *(
                    torch.where((kept == 0).all(), new, kept)
                    for new, kept in zip(start, centroids, strict=True)
                )
            )
        iterations = self.iterations if centroids is None else self.continued
        query_labels, query_means, query_sizes = ops.kmeans(query, start.query, iterations)
        key_labels, key_means, key_sizes = ops.kmeans(key, start.key, iterations)
        return Clusters(
            Centroids(query_means, key_means),
            key_sizes,
            sort_into_blocks(query_labels, query_sizes, block_q),
            sort_into_blocks(key_labels, key_sizes, block_kv),
        )

    def select(self, selection: Selection) -> Tensor:
        """Boolean ``[B, H, Nq, Nk]``.

        Raises:
            ValueError: The blocks of the selection are not those of clusters.
        """
        clusters = selection.clusters
        if clusters is None:
            raise ValueError("policy svg2 needs a Selection whose blocks are those of clusters")
        query, key = clusters.centroids
        logits = selection.scale * query @ key.mT + clusters.key_sizes.log()[:, :, None]
        return clusters.blocks_of(keep_clusters(logits.softmax(-1), self.mass, self.least))


def keep_clusters(attention: Tensor, mass: float, least: float) -> Tensor:
    """The clusters that come first by attention, up to the one that crosses ``mass``.

    The best of a row is kept in any case, and so are ``int(least * Ck)``.

    Args:
        attention: ``[..., Ck]``; a row sums to 1.
        mass: In (0, 1].
        least: In [0, 1].

    Returns:
        Boolean ``[..., Ck]``.
    """
    ranked, order = attention.sort(dim=-1, descending=True, stable=True)
    above = ranked.cumsum(-1) - ranked
    rank = torch.arange(ranked.shape[-1], device=attention.device)
    kept = (above <= mass) | (rank < int(least * ranked.shape[-1]))
    return torch.zeros_like(kept).scatter(-1, order, kept)
