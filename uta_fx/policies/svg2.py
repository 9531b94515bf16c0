"""Keep the clusters of keys that hold most attention of a cluster of queries: Sparse VideoGen2."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from uta_fx.clusters import Centroids, Clusters, first_centroids, sort_into_blocks
from uta_fx.kernels import ops
from uta_fx.policies.base import Selection

PUBLISHED_TOKENS = 21 * 45 * 80  # of Wan at 720p, which has 300 clusters of queries
LEAST_KEYS = 16  # on average in a cluster, where their number is left to us


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

    Published: the tail dropped; 1000 clusters of keys always, and of queries 300 for Wan at 720p,
    200 at 480p, 400 for HunyuanVideo at 720p; k-means started from tokens drawn by chance, with up
    to 50 iterations, and 2 at later steps, which start from the centroids of the step before. Here
    it starts from tokens spread evenly, and an iteration count is a count, so that nothing waits
    for the host. Later steps go on where the step before ended if ``keep`` is set, which concerns
    compiled graphs alone, or if ``uta_fx.attention.clustered_attention`` is told where that was.

    Attributes:
        query_clusters: Clusters of queries, from 1 to the number of video tokens L; None for
            ``300 sqrt(L / 75600)``, which is what was published to within six in a hundred.
        key_clusters: Clusters of keys, likewise; None for 1000, but no more than one for 16 tokens.
        mass: Share of a query cluster's attention to keep, in (0, 1].
        least: Share of the clusters to keep in any case, in [0, 1]; never none.
        iterations: Of k-means from a new start, at least 1. More than 10 gain next to nothing on
            the trained model (``docs/measured.md``).
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

    query_clusters: int | None = None
    key_clusters: int | None = None
    mass: float = 0.9
    least: float = 0.1
    iterations: int = 10
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
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def clusters_of(self, tokens: int) -> tuple[int, int]:
        """How many clusters of queries and of keys there are for so many video tokens.

        Raises:
            ValueError: There are more than tokens.
        """
        suited = {
            "query_clusters": round(300 * math.sqrt(tokens / PUBLISHED_TOKENS)),
            "key_clusters": min(1000, tokens // LEAST_KEYS),
        }
        counts = []
        for name, number in suited.items():
            count = getattr(self, name)
            if count is None:
                count = max(1, number)
            elif count > tokens:
                raise ValueError(
                    f"{name} of policy svg2 must be at most the number of video tokens, {tokens},"
                    f" got {count}: pass fewer, or None for as many as suit them"
                )
            counts.append(count)
        return counts[0], counts[1]

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
        query_clusters, key_clusters = self.clusters_of(query.shape[2])
        start = Centroids(
            first_centroids(query, query_clusters, self.seed),
            first_centroids(key, key_clusters, self.seed),
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
