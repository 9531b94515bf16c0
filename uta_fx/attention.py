"""The operation at one site: reorder, pool, select, aggregate, attend."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from uta_fx.arguments import check_call, check_exact_keys, check_lengths
from uta_fx.clusters import Blocks, Centroids, Clusters, apart_from_padding
from uta_fx.config import Config
from uta_fx.kernels import ops
from uta_fx.kernels.reference import join_tokens, joined
from uta_fx.order import Grid, token_order
from uta_fx.passes.read_mask import HIDING
from uta_fx.policies import SVG2, Selection
from uta_fx.statistics import block_statistics, for_heads


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
    lengths: Tensor | None = None,
    exact_keys: Tensor | None = None,
) -> Tensor:
    """Self-attention over video tokens, sparse with the tail aggregated, in one eager call.

    Stands for ``F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)``; the
    same computation that the backend writes into a graph. Forward-only.

    Args:
        query: ``[B, H, L, D]``, float32, float16 or bfloat16, D from 16 to 256.
        key: ``[B, Hkv, L, D]``, where Hkv divides H: consecutive heads of queries share a head of
            keys and values.
        value: ``[B, Hkv, L, Dv]``.
        config: Settings; None for the defaults. ``min_tokens``, ``dense_layers``, ``dense_until``,
            ``inner`` and ``strict`` concern graphs and have no effect here.
        grid: Frames, height and width of the video tokens, with their number as product; None takes
            ``config.grid``. With neither they are blocked in the order in which they come.
        scale: Multiplies the logits, a finite number; None for ``1 / sqrt(D)``.
        text: How many tokens before and after the video are not video. They attend to everything,
            and every token attends to them exactly.
        attn_mask: Hides text from the video: boolean (True: seen) or added to logits, broadcasts
            to ``[B, H, L, L]``. Its entries for video keys must leave them seen by all video
            queries (True, or zero), and all rows of video queries must be equal; where they are
            not, the output for the video is NaN. Rows of text queries are free. Needs text.
        lengths: int32 or int64 ``[B]``, each from 0 to L: only so many tokens of a sample exist,
            those at its start in the order in which they come. The others are padding, which no
            token attends to whatever it holds; their output is zero. The density is a share of all
            blocks, padding or not. A length outside is an error; on a GPU, which would have to be
            waited for, and under ``torch.compile`` the output of that sample is NaN. None where all
            tokens exist; not with text, whose padding ``attn_mask`` hides, in a row for each
            sample.
        exact_keys: Keys that every query attends to exactly, in whole blocks, in the order in which
            tokens come: boolean ``[L]``, or their positions, int64 ``[N]``, each from 0 to L - 1,
            which is checked, and so waits for a GPU, except under ``torch.compile``. What the
            policy keeps comes on top, as for ``Config.exact_frames``. None for no other than those.

    Returns:
        ``[B, H, L, Dv]`` in the dtype of ``query``.

    Raises:
        ValueError: A shape, grid, number or head dim does not fit.
        TypeError: A dtype or device does not fit, or something is no tensor or number.
        RuntimeError: A gradient is asked for.
    """
    config = Config.of(config)
    grid, video = check_call(query, key, value, attn_mask, config, grid, text, scale)
    if exact_keys is not None:
        check_exact_keys(exact_keys, query)
        if exact_keys.dtype != torch.bool:
            none = torch.zeros(query.shape[2], dtype=torch.bool, device=query.device)
            exact_keys = none.index_fill(0, exact_keys, True)
    form = _Form(config, grid, scale, exact_keys=exact_keys, any_mask=True)
    if lengths is not None:
        check_lengths(lengths, query, config, text)
        lengths = lengths[:, None, None]
        right = (lengths >= 0) & (lengths <= query.shape[2])
        return _attend_to_lengths(query, key, value, lengths, right, form)
    return _attend(query, key, value, attn_mask, form, video)[0]


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Centroids | None = None,
    *,
    config: Config,
    grid: Grid | None = None,
    scale: float | None = None,
    text: tuple[int, int] = (0, 0),
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Centroids]:
    """As ``sparse_attention`` with the policy ``svg2``, from one denoising step to the next.

    The centroids of a step are where the clusters of the next begin, which then needs few
    iterations. Keep those of each layer apart; a new video starts anew, with None.

    Args:
        query: As in ``sparse_attention``.
        key: See there.
        value: See there.
        centroids: What the step before returned, with the same batch, heads, head dim and numbers
            of clusters. None to start anew.
        config: With the policy ``svg2``.
        grid: As in ``sparse_attention``.
        scale: See there.
        text: See there.
        attn_mask: See there.

    Returns:
        The output, and the centroids for the next step.

    Raises:
        ValueError: The policy is another one, or centroids have another shape; or as
            ``sparse_attention``.
        TypeError: As ``sparse_attention``.
        RuntimeError: A gradient is asked for.
    """
    policy = config.selection_policy()
    if not isinstance(policy, SVG2):
        raise ValueError(f"config must have the policy svg2, got {config.policy!r}")
    grid, video = check_call(query, key, value, attn_mask, config, grid, text, scale)
    if centroids is not None:
        lead, dim = query.shape[:2], query.shape[3]
        counts = policy.clusters_of(query.shape[2] - sum(text))
        for name, got, clusters in zip(("query", "key"), centroids, counts, strict=True):
            if got.shape != (*lead, clusters, dim):
                raise ValueError(
                    f"centroids.{name} must have shape {(*lead, clusters, dim)},"
                    f" got {tuple(got.shape)}"
                )
    form = _Form(config, grid, scale, any_mask=True)
    output, found = _attend(query, key, value, attn_mask, form, video, centroids=centroids)
    assert found is not None
    return output, found


@dataclasses.dataclass(frozen=True)
class SparseSite:
    """What takes the place of one attention call in a graph: a function of q, k, v and a mask.

    Attributes:
        config: Settings.
        grid: Frames, height and width of the video tokens; None keeps their order, if a call gives
            none either.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
        video: The first video token and how many there are, where others lie around them; None
            for as many as the grid of a call has.
        alone: Whether the video alone has queries, and the others are keys and values.
        in_order: Whether video tokens come in block order already.
    """

    config: Config
    grid: Grid | None
    scale: float | None
    video: tuple[int, int | None] | None = None
    alone: bool = False
    in_order: bool = False
    __name__ = "sparse_site"  # torch.fx names and prints the target of a node by it

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        grid: Grid | None = None,
    ) -> Tensor:
        """Attend; shapes and meaning as in ``sparse_attention``. ``grid`` is that of this call.

        A mask over video alone, which broadcasts to ``[B, H, L, L]`` and is the same for all
        queries, stands for lengths: the tokens that it shows are the first of a sample, or its
        output is NaN where masks are trusted (``Config.trust_masks``). Rows of the others, the
        padding, are zero, where the model has attention of padding to what is shown.
        """
        video, grid = self.video, self.grid if grid is None else grid
        video = self.known_video if video is None or grid is None else (video[0], math.prod(grid))
        form = _Form(self.config, grid, self.scale, self.in_order)
        return _attend(query, key, value, attn_mask, form, video, self.alone)[0]

    @property
    def known_video(self) -> tuple[int, int] | None:
        """``video`` where it does not depend on the grid of a call."""
        if self.video is None:
            return None
        start, tokens = self.video
        assert tokens is not None
        return start, tokens


@dataclasses.dataclass(frozen=True)
class ContinuedSite:
    """A ``SparseSite`` of a policy that clusters, which goes on from where its last call ended.

    Attributes:
        site: What it is but for that.
    """

    site: SparseSite
    __name__ = "continued_site"  # torch.fx names and prints the target of a node by it

    def state_shapes(self, query: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the centroids of ``query`` ``[B, H, L, D]`` and of its keys."""
        policy = self.site.config.selection_policy()
        assert isinstance(policy, SVG2)
        batch, heads, length, dim = query.shape
        video = self.site.known_video
        counts = policy.clusters_of(video[1] if video else length)
        return (batch, heads, counts[0], dim), (batch, heads, counts[1], dim)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend; shapes and meaning as in ``sparse_attention``.

        Args:
            query: See there.
            key: See there.
            value: See there.
            others: The mask, if there is one, and the centroids that the call before returned;
                zeros at the first.

        Returns:
            The output, and centroids of queries and of keys for the next call.
        """
        site, mask = self.site, others[0] if len(others) == 3 else None
        form = _Form(site.config, site.grid, site.scale, site.in_order)
        output, centroids = _attend(
            query, key, value, mask, form, site.known_video, site.alone, Centroids(*others[-2:])
        )
        assert centroids is not None
        return output, *centroids


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """The index by which a tensor's video tokens are brought into block order, or back.

    Attributes:
        grid: Frames, height and width of the video tokens; None where each call gives them.
        order: As in ``Config.reorder``, but neither ``"auto"`` nor ``"none"``.
        block: Tokens in a block.
        dim: Of the tensor, along which tokens lie.
        start: The first video token; those around the video stay where they are.
        back: From block order into the order of the grid.
    """

    grid: Grid | None
    order: str
    block: int
    dim: int
    start: int
    back: bool
    __name__ = "token_index"  # torch.fx names and prints the target of a node by it

    def __call__(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """For a tensor: int64, as long as its dimension ``dim``."""
        grid = self.grid if grid is None else grid
        assert grid is not None
        index = token_order(grid, self.order, self.block, x.device)[int(self.back)]
        tokens, length = math.prod(grid), x.shape[self.dim]
        if statically_known_true(length == tokens):
            return index
        before = torch.arange(self.start, device=x.device)
        after = torch.arange(self.start + tokens, length, device=x.device)
        return torch.cat([before, index + self.start, after])


def reorder_tokens(
    query: Tensor, key: Tensor, value: Tensor, config: Config, grid: Grid | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Bring tokens into the order in which they are blocked.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        config: Settings.
        grid: Frames, height and width of the tokens; None keeps their order.

    Returns:
        The three in the new order, and the index that brings the output back: int64 ``[L]``, None
        where they keep their order.
    """
    if grid is None or config.order == "none":
        return (query, key, value), None
    order, inverse = token_order(grid, config.order, config.block_kv, query.device)
    query, key, value = (x.index_select(2, order) for x in (query, key, value))
    return (query, key, value), inverse


def pool_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Config,
    scale: float | None,
    grid: Grid | None = None,
    text_key: Tensor | None = None,
    text_bias: Tensor | None = None,
    blocks: Blocks | None = None,
    exact_tokens: Tensor | None = None,
) -> Selection:
    """Pool the blocks of one site: what a policy looks at.

    Args:
        query: ``[B, H, L, D]``, in the order in which tokens are blocked.
        key: ``[B, Hkv, L, D]``.
        value: ``[B, Hkv, L, Dv]``.
        config: Settings.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
        grid: Frames, height and width of the tokens; None where nobody knows.
        text_key: ``[B, Hkv, Lt, D]``, keys beside the blocks that all queries see; None for none.
        text_bias: As in ``Selection``.
        blocks: Where tokens were gathered into blocks that are not full: these.
        exact_tokens: Of ``find_exact_tokens``; ``blocks`` are of what was gathered from its order.
    """
    heads = query.shape[1]
    text_key = key[:, :, :0] if text_key is None else text_key
    statistics = (
        block_statistics(key, value, config.block_kv, heads)
        if blocks is None
        else blocks.statistics(key, value)
    )
    exact_for_all = None
    if exact_tokens is not None:
        exact_for_all = (
            blocks_holding(exact_tokens, config.block_kv)
            if blocks is None
            else blocks.holding(exact_tokens)[:, :, None]
        )
    return Selection(
        query=query,
        key=for_heads(key, heads),
        value=for_heads(value, heads),
        statistics=statistics,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        density=config.density,
        budget=config.budget,
        block_q=config.block_q,
        block_kv=config.block_kv,
        grid=grid,
        order="none" if grid is None else config.order,
        text_key=for_heads(text_key, heads),
        text_bias=text_bias,
        exact_for_all=exact_for_all,
    )


def blocks_holding(tokens: Tensor, block: int) -> Tensor:
    """Blocks ``[ceil(L / block)]`` that hold one of some tokens, a boolean ``[L]``."""
    missing = -tokens.shape[0] % block
    return F.pad(tokens, (0, missing)).unflatten(0, (-1, block)).any(1)


def pool_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Config,
    scale: float | None,
    grid: Grid | None = None,
    text_key: Tensor | None = None,
    text_bias: Tensor | None = None,
    centroids: Centroids | None = None,
    exact_tokens: Tensor | None = None,
) -> Selection:
    """As ``pool_blocks``; a policy that clusters gets the blocks of its clusters.

    Args:
        query: See there.
        key: See there.
        value: See there.
        config: See there.
        scale: See there.
        grid: See there.
        text_key: See there.
        text_bias: See there.
        centroids: Where clusters start; None for anew.
        exact_tokens: See there.
    """
    policy = config.selection_policy()
    clusters: Clusters | None = None
    if isinstance(policy, SVG2):
        key, value = (for_heads(x, query.shape[1]) for x in (key, value))
        clusters = policy.cluster(query, key, config.block_q, config.block_kv, centroids)
        query = clusters.query.gather(query)
        key, value = clusters.key.gather(key), clusters.key.gather(value)
        grid = None  # tokens lie elsewhere
    blocks = clusters.key if clusters is not None else None
    selection = pool_blocks(
        query, key, value, config, scale, grid, text_key, text_bias, blocks, exact_tokens
    )
    return dataclasses.replace(selection, clusters=clusters)


def find_exact_tokens(
    query: Tensor, config: Config, grid: Grid | None, exact_keys: Tensor | None
) -> Tensor | None:
    """Which tokens have keys that are exact for all: boolean ``[L]``, in block order.

    Args:
        query: ``[B, H, L, D]``.
        config: Settings.
        grid: Frames, height and width of the tokens; None keeps their order.
        exact_keys: Boolean ``[L]``, those of a call beside ``Config.exact_frames``, in the model's
            order.

    Returns:
        None where there are none.
    """
    if exact_keys is None and not config.exact_frames:
        return None
    place = _raster_places(query, config, grid)
    exact = None if exact_keys is None else exact_keys.index_select(0, place)
    if config.exact_frames:
        assert grid is not None
        of_frames = place < config.exact_frames * grid[1] * grid[2]
        exact = of_frames if exact is None else exact | of_frames
    return exact


def _raster_places(query: Tensor, config: Config, grid: Grid | None) -> Tensor:
    """Where each token of ``[B, H, L, D]`` in block order comes from: int64 ``[L]``."""
    if grid is None or config.order == "none":
        return torch.arange(query.shape[2], device=query.device)
    return token_order(grid, config.order, config.block_kv, query.device).order


def choose_exact(selection: Selection, config: Config) -> Tensor:
    """What the policy chooses, and what is exact for all: boolean ``[B, H, Nq, Nk]``.

    Raises:
        TypeError: A policy of the user's own chooses by something else.
    """
    policy = config.selection_policy()
    exact: Any = policy.select(selection)
    if not isinstance(exact, Tensor) or exact.dtype != torch.bool or exact.dim() != 4:
        got = (
            f"{exact.dtype} of shape {tuple(exact.shape)}"
            if isinstance(exact, Tensor)
            else type(exact).__name__
        )
        raise TypeError(
            f"select of policy {type(policy).__name__} must return a boolean tensor"
            f" [B, H, Nq, Nk], got {got}"
        )
    return exact if selection.exact_for_all is None else exact | selection.exact_for_all


def operator_arguments(
    selection: Selection, key: Tensor, value: Tensor, config: Config
) -> tuple[Any, ...]:
    """Select and aggregate: the arguments of ``uta::block_masked_attention`` for one site.

    Args:
        selection: Of ``pool_blocks``.
        key: ``[B, Hkv, L, D]``, in the order in which tokens are blocked.
        value: ``[B, Hkv, L, Dv]``.
        config: Settings; those that ``selection`` holds too are taken from there.
    """
    tail = config.tail_form()
    key, value = (for_heads(x, selection.query.shape[1]) for x in (key, value))
    exact = choose_exact(selection, config)
    representatives = tail.representatives(selection, exact, key, value, config.block_kv)
    return (
        selection.query, key, value, exact, *representatives,
        selection.scale, tail.mass_weight, selection.block_q, config.block_kv,
    )  # fmt: skip


def list_arguments(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of ``uta::sparse_attention`` from those of ``uta::block_masked_attention``."""
    query, key, value, exact, *rest = arguments
    return (query, key, value, *ops.list_blocks(exact), *rest)


def _attend_to_gathered(arguments: Sequence[Any], blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``uta::clustered_attention``: keys and values were gathered into blocks that are not full."""
    lists = list_arguments(arguments)
    return ops.clustered_attention(*lists[:5], blocks.count, *lists[5:])


class _Form(NamedTuple):
    """What all parts of one call of attention go by.

    A tuple, of functions that are no methods: torch 2.11 cannot trace values of our own in a user's
    code.

    Attributes:
        config: Settings.
        grid: Frames, height and width of the video tokens; None keeps their order.
        scale: Multiplies the logits; None for ``1 / sqrt(D)``.
        in_order: Whether video tokens come in block order already.
        exact_keys: Boolean ``[L]``, keys that are exact for all beside ``config.exact_frames``, in
            the model's order; None for no other.
        any_mask: Whether nobody has looked at the mask: its whole part for the video is read, and
            the output NaN where it hides any video, or differs by query.
    """

    config: Config
    grid: Grid | None
    scale: float | None
    in_order: bool = False
    exact_keys: Tensor | None = None
    any_mask: bool = False


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    form: _Form,
    video: tuple[int, int] | None,
    alone: bool = False,
    centroids: Centroids | None = None,
) -> tuple[Tensor, Centroids | None]:
    """The output and, of a policy that clusters, where the next step may start."""
    config = form.config
    while attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[None]
    if video is None and attn_mask is not None:
        lengths, right = _lengths(attn_mask, query)
        known = right if config.trust_masks else None
        return _attend_to_lengths(query, key, value, lengths, known, form), None
    if config.tail_form().kind == "rectified":
        key, value = (for_heads(x, query.shape[1]) for x in (key, value))
        if video is None:
            none = (key[:, :, :0], value[:, :, :0])
            return _attend_rectified(query, (key, value), none, None, form), None
    if video is None:
        output, _, centroids = _attend_to_video(query, key, value, form, centroids=centroids)
        return output, centroids
    # one set of numbers for all: a graph need not know that lengths of a run are equal
    sizes = [*video, key.shape[2] - sum(video)]
    start = sizes[0]
    (text_k, k), (text_v, v) = (_parted(x, sizes, 2) for x in (key, value))
    if form.exact_keys is not None:
        form = form._replace(exact_keys=_parted(form.exact_keys, sizes, 0)[1])
    if alone:
        nobody = v.new_empty((*query.shape[:2], 0, v.shape[3]))
        around = nobody, nobody
        return _attend_to_both(query, (k, v), (text_k, text_v), None, form, centroids, around)
    # where a graph does not know that there is any text, a row of video attends with it
    spare = 0 if isinstance(sizes[2], int) and sizes[0] + sizes[2] else 1
    before_q, q, after_q = query.split(sizes, 2)
    others_q = joined([before_q, q[:, :, :spare], after_q], 2)
    bias = rows = None
    if attn_mask is not None:
        row = rows = attn_mask
        column = row[..., :0]
        if attn_mask.shape[-2] != 1:
            row = attn_mask[..., start : start + 1, :]
            before, video_rows, after = attn_mask.split(sizes, -2)
            if config.trust_masks:
                column = video_rows[..., start : start + 1]
            rows = joined([before, video_rows[..., :spare, :], after], -2)
        bias = ops.text_bias(row, column, start, sizes[1], config.trust_masks)
        if form.any_mask:
            bias = bias + _misread(attn_mask, row, sizes)

    others = F.scaled_dot_product_attention(
        others_q, key, value, attn_mask=rows, scale=form.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    around = others[:, :, :start], others[:, :, start + spare :]
    return _attend_to_both(q, (k, v), (text_k, text_v), bias, form, centroids, around)


def _misread(mask: Tensor, row: Tensor, sizes: Sequence[int]) -> Tensor:
    """0 where all rows of video queries show all video and are equal, NaN elsewhere.

    Args:
        mask: ``[B or 1, H or 1, L or 1, L]``.
        row: ``[B or 1, H or 1, 1, L]``, of the first query of the video.
        sizes: How many tokens lie before the video, are video, and lie after it.

    Returns:
        float32 ``[B or 1, H or 1, 1, 1]``.
    """
    rows = mask if mask.shape[-2] == 1 else mask.split(sizes, -2)[1]
    before, shown, after = rows.split(sizes, -1)
    shown = shown if mask.dtype == torch.bool else shown == 0
    right = shown.flatten(2).all(-1)
    first, _, last = row.split(sizes, -1)
    for part, of_row in ((before, first), (after, last)):
        right = right & (part == of_row).flatten(2).all(-1)
    return torch.where(right, 0.0, torch.nan)[..., None, None]


def _lengths(mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of each sample a mask shows, and whether these are its first.

    Args:
        mask: The same for all queries; broadcasts to ``[B, H, L, L]``.
        query: ``[B, H, L, D]``.

    Returns:
        int64 and boolean ``[B, H, 1]``.
    """
    batch, heads, tokens, _ = query.shape
    row = mask[..., :1, :].expand(batch, heads, 1, tokens)[:, :, 0]
    if mask.dtype == torch.bool:
        shown, hidden = row, ~row
    else:
        shown, hidden = row == 0, row <= HIDING
    lengths = shown.sum(-1, keepdim=True)
    first = torch.arange(tokens, device=mask.device) < lengths
    right = torch.where(first, shown, hidden).all(-1, keepdim=True) & (lengths > 0)
    return lengths, right


def _attend_to_both(
    query: Tensor,
    video: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    bias: Tensor | None,
    form: _Form,
    centroids: Centroids | None,
    around: tuple[Tensor, Tensor],
) -> tuple[Tensor, Centroids | None]:
    """Video queries over keys and values of the video and of the text, ``bias`` that of text.

    ``around`` is attention of the tokens before and after the video, which comes with the output.
    """
    if form.config.tail_form().kind == "rectified":
        output = _attend_rectified(query, video, text, bias, form)
        return join_tokens([around[0], output, around[1]]), None
    output, lse, centroids = _attend_to_video(query, *video, form, text[0], bias, centroids)
    of_text = _attend_to_text(query, *text, bias, form)
    return ops.join_text(output, lse, *of_text, *around), centroids


def _attend_to_video(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    form: _Form,
    text_key: Tensor | None = None,
    text_bias: Tensor | None = None,
    centroids: Centroids | None = None,
) -> tuple[Tensor, Tensor, Centroids | None]:
    """The output ``[B, H, L, Dv]``, the log-sum-exp ``[B, H, L]`` over video keys, and centroids.

    Centroids are those that a policy that clusters found, starting from ``centroids``.
    """
    config, grid = form.config, form.grid
    (query, key, value), inverse = _in_block_order(query, key, value, form)
    exact_tokens = find_exact_tokens(query, config, grid, form.exact_keys)
    selection = pool_tokens(
        query, key, value, config, form.scale, grid, text_key, text_bias, centroids, exact_tokens
    )
    clusters = selection.clusters
    # keys that heads share are copied for each once, in the selection
    arguments = operator_arguments(selection, selection.key, selection.value, config)
    if clusters is None:
        output, lse = ops.block_masked_attention(*arguments)
    else:
        centroids = clusters.centroids
        output, lse = _attend_to_gathered(arguments, clusters.key)
        output = clusters.query.scatter(output)
        lse = clusters.query.scatter(lse[..., None])[..., 0]
    if inverse is not None:
        output, lse = output.index_select(2, inverse), lse.index_select(2, inverse)
    return output, lse, centroids


def _attend_to_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    right: Tensor | None,
    form: _Form,
) -> Tensor:
    """The output ``[B, H, L, Dv]`` of samples that end after ``lengths`` tokens, zero beyond.

    ``lengths`` ``[B, H or 1, 1]`` are of the model's order, also where tokens come in block order.
    Where they are not ``right``, which is of that shape, all of the output is NaN.
    """
    config, (batch, heads) = form.config, query.shape[:2]
    place = _raster_places(query, config, form.grid)
    exact_tokens = find_exact_tokens(query, config, form.grid, form.exact_keys)
    (query, key, value), inverse = _in_block_order(query, key, value, form)
    inside = place < lengths
    padding = query.new_zeros(())
    if right is not None:
        inside = inside & right
        padding = torch.where(right, 0.0, torch.nan).to(query.dtype)[..., None]
    inside = inside.expand(batch, heads, -1)
    of_query, of_key = apart_from_padding(inside, config.block_q, config.block_kv)
    query = of_query.gather(query)
    key, value = (of_key.gather(for_heads(x, heads)) for x in (key, value))
    selection = pool_blocks(
        query, key, value, config, form.scale, blocks=of_key, exact_tokens=exact_tokens
    )
    output, _ = _attend_to_gathered(operator_arguments(selection, key, value, config), of_key)
    output = of_query.scatter(output).where(inside[..., None], padding)
    return output if inverse is None else output.index_select(2, inverse)


def _attend_rectified(
    query: Tensor,
    video: tuple[Tensor, Tensor],
    text: tuple[Tensor, Tensor],
    text_bias: Tensor | None,
    form: _Form,
) -> Tensor:
    """The output ``[B, H, L, Dv]`` over video and text, with the tail ``rectified``."""
    config, grid, (text_key, text_value) = form.config, form.grid, text
    (query, key, value), inverse = _in_block_order(query, *video, form)
    selection = pool_blocks(
        query, key, value, config, form.scale, grid, text_key, text_bias,
        exact_tokens=find_exact_tokens(query, config, grid, form.exact_keys),
    )  # fmt: skip
    exact = choose_exact(selection, config)
    if text_bias is None:
        text_bias = text_key.new_zeros(1, 1, 1, text_key.shape[2], dtype=torch.float32)
    output = ops.rectified_attention(
        query, key, value, *ops.list_blocks(exact),
        text_key, text_value, text_bias.expand(*text_key.shape[:2], 1, -1)[:, :, 0],
        *config.tail_form().rectification(selection, exact),
        selection.scale, config.block_q, config.block_kv,
    )  # fmt: skip
    return output if inverse is None else output.index_select(2, inverse)


def _attend_to_text(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    form: _Form,
) -> tuple[Tensor, Tensor]:
    """As ``_attend_to_video``, over text keys, with a bias ``[B or 1, H or 1, 1, Lt]``."""
    heads = query.shape[1]
    key, value = (for_heads(x, heads) for x in (key, value))
    if bias is None:
        bias = query.new_empty(*query.shape[:2], 0, dtype=torch.float32)
    else:
        bias = bias.expand(*query.shape[:2], 1, -1)[:, :, 0]
    scale = query.shape[-1] ** -0.5 if form.scale is None else form.scale
    return ops.text_attention(query, key, value, bias, scale, form.config.block_q)


def _in_block_order(
    query: Tensor, key: Tensor, value: Tensor, form: _Form
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """As ``reorder_tokens``, of tokens that may come in that order."""
    return reorder_tokens(query, key, value, form.config, None if form.in_order else form.grid)


def _parted(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, Tensor]:
    """What lies around the video along ``dim``, and the video."""
    before, video, after = x.split(sizes, dim)
    return joined([before, after], dim), video
