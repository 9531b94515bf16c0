"""FlexAttention in operations that a file can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from uta_fx.export.mask_groups import MaskGroups, group_tokens
from uta_fx.kernels.contract import DTYPES, MAX_HEAD_DIM, MIN_HEAD_DIM
from uta_fx.passes.match_operators import FLEX
from uta_fx.passes.read_node import VIEWS, is_random, name_of, written_by
from uta_fx.passes.site import value_of

LISTED = "the blocks that its own FlexAttention lists"
_NESTING = ("_vmap_increment_nesting", "_vmap_decrement_nesting")
GROUPED = "what its own FlexAttention shows, by groups of tokens"


def spell_out_flex(module: GraphModule) -> dict[Node, str]:
    """Put other operations in the place of FlexAttention, to be traced with the module.

    Where its mask hides whole blocks alone it becomes ``uta::sparse_attention`` over the blocks
    that it lists; where the mask is constant and tells groups of tokens apart, over blocks of these
    groups; otherwise attention written out, with a logit for every pair of tokens. A call stays
    where its log-sum-exp or its maximum is asked for.

    Args:
        module: Changed in place.

    Returns:
        The calls in question, and what each attends to in blocks; empty where it is written out.
    """
    found: dict[Node, str] = {}
    masks = _ConstantMasks(module)
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "__name__", "") != FLEX:
            continue
        for user in [user for user in node.users if not user.users]:
            module.graph.erase_node(user)
        if all(user.args[1] == 0 for user in node.users):
            if _takes_listed_blocks(module, node):
                found[node] = LISTED
                node.target = _listed_blocks
            elif groups := masks.groups(node):
                found[node] = GROUPED
                _group(module, node, groups)
            else:
                found[node] = ""
                node.target = _written_out
            _let_views_copy(node)
    module.recompile()
    return found


def _let_views_copy(node: Node) -> None:
    """Core ATen has views of an output that only FlexAttention's strides allow."""
    for user in node.users:
        if user.target is torch.ops.aten.view.default:
            user.target = torch.ops.aten.reshape.default
        elif name_of(user) in ("getitem", "permute"):
            _let_views_copy(user)


def _takes_listed_blocks(module: GraphModule, node: Node) -> bool:
    arguments: Any = node.args
    key, block_mask = arguments[1], arguments[4]
    return (
        _fits(module, node)
        and _shows_all(getattr(module, block_mask[-1].target))
        and bool(value_of(key).shape[2] > block_mask[-2])  # without a mask all are one block
    )


def _fits(module: GraphModule, node: Node, more: int = 0) -> bool:
    """Whether the operator can stand for a call, with so many channels more in its queries."""
    arguments: Any = node.args
    query, _, value, score_mod = arguments[:4]
    dims = (value_of(query).shape[-1] + more, value_of(value).shape[-1])
    return (
        _changes_nothing(getattr(module, score_mod.target))
        and value_of(query).dtype in DTYPES
        and all(MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM for dim in dims)
    )


class _ConstantMasks:
    """Groups of tokens that the masks of a graph do not tell apart; layers may have one mask."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[Any, Any] = {}
        self._known: list[tuple[Any, Sequence[Tensor], MaskGroups | None]] = []

    def groups(self, node: Node) -> MaskGroups | None:
        """Those of a call whose mask is one constant; None for others.

        That is, lists and buffers follow from no input, and there is one mask for every sample and
        head.
        """
        arguments: Any = node.args
        query, key, _, _, block_mask, *_, buffers = arguments
        sizes = (value_of(query).shape[2], value_of(key).shape[2])
        if not (_fits(self._module, node, 1) and all(isinstance(size, int) for size in sizes)):
            return None
        mask_mod = getattr(self._module, block_mask[-1].target)
        sample, head, *_ = mask_mod.graph.nodes
        tensors = (tuple(block_mask[2:6]), tuple(buffers))
        if sample.users or head.users:
            return None
        if tensors not in self._values:
            self._values[tensors] = _constants(self._module, tensors)
        if self._values[tensors] is None:
            return None
        lists, buffers = self._values[tensors]
        *_, block_q, block_kv, _ = block_mask
        blocks = _masks((None, None, *lists, block_q, block_kv, None), sizes[1])
        if any(x.shape[:2] != (1, 1) for x in blocks):
            return None
        same = (sizes, block_q, block_kv, mask_mod.code)
        values = (*blocks, *buffers)
        for other, other_values, groups in self._known:
            if same == other and all(map(torch.equal, values, other_values)):
                return groups
        groups = group_tokens(_rows(mask_mod, blocks, buffers, (block_q, block_kv), sizes))
        self._known.append((same, values, groups))
        return groups


def _rows(
    mask_mod: GraphModule,
    blocks: Sequence[Tensor],
    buffers: Sequence[Tensor],
    sides: tuple[int, int],
    sizes: tuple[int, int],
) -> Iterator[Tensor]:
    """A mask of tokens, boolean ``[n, Lk]`` for the n queries of one block after another."""
    device = blocks[0].device
    for row, start in enumerate(range(0, sizes[0], sides[0])):
        queries = torch.arange(start, min(start + sides[0], sizes[0]), device=device)
        partly, *whole = (
            x[0, 0, row].repeat_interleave(min(sides[1], sizes[1]))[: sizes[1]] for x in blocks
        )
        seen = (whole[0] if whole else torch.zeros_like(partly)).repeat(len(queries), 1)
        if len(keys := partly.nonzero()[:, 0]):
            first = keys.new_zeros(1)
            shown = _for_each_pair(mask_mod, (), (first, first, queries, keys), buffers)
            seen[:, keys] |= shown[0, 0]
        yield seen.cpu()


def _group(module: GraphModule, node: Node, groups: MaskGroups) -> None:
    """Put ``_grouped`` in the place of a call, with the groups as buffers of the module."""
    arguments: Any = node.args
    query, key, value, _, _, scale, *_ = arguments
    index = []
    with module.graph.inserting_before(node):
        for name, tensor in groups._asdict().items():
            module.register_buffer(f"{node.name}_{name}", tensor.to(value_of(query).device))
            index.append(module.graph.get_attr(f"{node.name}_{name}"))
    node.target, node.args = _grouped, (query, key, value, scale, *index)


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *groups: Tensor
) -> tuple[Tensor]:
    """The output ``[B, H, L, Dv]`` by groups of tokens."""
    key, value = _for_heads(query, key), _for_heads(query, value)
    return (MaskGroups(*groups).attend(query, key, value, scale),)


def _listed_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: GraphModule,
    block_mask: Sequence[Any],
    scale: float,
    *others: Any,
) -> tuple[Tensor]:
    """The output ``[B, H, L, Dv]`` over the blocks of both lists; no mask differs inside them."""
    *_, block_q, block_kv, _ = block_mask
    batch, heads, _, dim = query.shape
    key, value = _for_heads(query, key), _for_heads(query, value)
    parts = _masks(block_mask, key.shape[2])
    exact = parts[0] if len(parts) == 1 else parts[0] | parts[1]
    exact = exact.expand(batch, heads, *exact.shape[2:])
    ids, counts = torch.ops.uta.list_blocks.default(exact)
    none, sums = query.new_empty(batch, heads, 0, dim), torch.float32
    return torch.ops.uta.sparse_attention.default(
        query, key, value, ids, counts,
        none, value[:, :, :0], query.new_empty(batch, heads, 0, dtype=sums), none,
        query.new_empty(batch, heads, 0, dim, value.shape[-1]), scale, 0.0, block_q, block_kv,
    )[:1]  # fmt: skip


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: GraphModule,
    block_mask: Sequence[Any],
    scale: float,
    options: Any,
    score_buffers: Sequence[Tensor] = (),
    mask_buffers: Sequence[Tensor] = (),
) -> tuple[Tensor]:
    """The output ``[B, H, L, Dv]``; a row that sees nothing is zero."""
    *_, block_q, block_kv, mask_mod = block_mask
    key, value = _for_heads(query, key), _for_heads(query, value)
    sizes = (*query.shape[:3], key.shape[2])
    index = [torch.arange(size, device=query.device) for size in sizes]
    logits = (query.float() @ key.float().mT) * scale
    if not _changes_nothing(score_mod):
        logits = _for_each_pair(score_mod, (logits,), index, score_buffers)
    partly, *whole = (_of_tokens(x, block_q, block_kv, sizes) for x in _masks(block_mask, sizes[3]))
    seen = _for_each_pair(mask_mod, (), index, mask_buffers) & partly
    for mask in whole:
        seen = seen | mask
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return (weights.to(query.dtype) @ value,)


def _for_heads(query: Tensor, x: Tensor) -> Tensor:
    """Keys or values for each head and sample of the queries."""
    batch, heads = query.shape[:2]
    return x.expand(batch, *x.shape[1:]).repeat_interleave(heads // x.shape[1], 1)


def _masks(block_mask: Sequence[Any], length: int) -> list[Tensor]:
    """Which blocks it lists: those with a mask inside and, where there are any, those without."""
    blocks = -(-length // block_mask[-2])
    lists = (block_mask[2:4], block_mask[4:6])  # each with how many count before which they are
    return [_mask(counts, ids, blocks) for counts, ids in lists if counts is not None]


def _mask(counts: Tensor, ids: Tensor, blocks: int) -> Tensor:
    """Boolean ``[B, H, Nq, blocks]`` from lists of blocks ``[B, H, Nq, M]`` and their lengths."""
    place = torch.arange(ids.shape[-1], device=ids.device)
    target = torch.where(place < counts[..., None], ids, blocks).long()
    mask = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter(-1, target, torch.ones_like(target, dtype=torch.bool))[..., :blocks]


def _of_tokens(mask: Tensor, block_q: int, block_kv: int, sizes: Sequence[int]) -> Tensor:
    """A mask of blocks as one of tokens."""
    rows = mask.repeat_interleave(min(block_q, sizes[2]), 2)[:, :, : sizes[2]]
    return rows.repeat_interleave(min(block_kv, sizes[3]), 3)[..., : sizes[3]]


def _changes_nothing(score_mod: GraphModule) -> bool:
    """Whether it returns the logit as it is."""
    nodes = list(score_mod.graph.nodes)
    return nodes[-1].args[0] is nodes[0]


def _shows_all(mask_mod: GraphModule) -> bool:
    """Whether it is true of every pair."""
    result = next(iter(reversed(mask_mod.graph.nodes))).args[0]
    return result.target in (torch.ops.aten.new_ones.default, torch.ops.aten.ones.default)


def _for_each_pair(
    function: GraphModule,
    logits: tuple[Tensor, ...],
    index: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> Tensor:
    """A function of (a logit,) sample, head, query, key and buffers, for all: ``[B, H, L, Lk]``."""
    run: Any = _Scalars(function).run
    for axis in reversed(range(4)):
        own = [0 if place == axis else None for place in range(4)]
        run = torch.vmap(run, (*(0 for _ in logits), *own, *(None for _ in buffers)))
    result: Tensor = run(*logits, *index, *buffers)
    return result


def _constants(module: GraphModule, arguments: Any) -> Any:
    """Arguments with values for nodes; None where one follows from an input.

    Or from what is random or written to.
    """
    written: set[Node] = set()
    for x in (x for node in module.graph.nodes for x in written_by(node)):
        written.add(x)
        while name_of(x) in VIEWS and x.all_input_nodes:
            x = x.all_input_nodes[0]
            written.add(x)
    needed: set[Node] = set()
    stack: list[Node] = []
    map_arg(arguments, stack.append)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        if node.op == "placeholder" or node in written or is_random(node):
            return None
        needed.add(node)
        stack += node.all_input_nodes
    interpreter = Interpreter(module)
    for node in module.graph.nodes:
        # what a vmap in the model computes has to run inside of it again
        if node in needed or getattr(node.target, "__name__", "") in _NESTING:
            interpreter.env[node] = interpreter.run_node(node)
    return map_arg(arguments, interpreter.env.__getitem__)


class _Scalars(Interpreter):
    """Runs such a function; ``buffer[index]`` in it is an operation by a wrapped name."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") == "flat_apply":
            _, _, _, buffer, *places = args
            return torch.ops.aten.index.Tensor(buffer, places)
        return super().call_function(target, args, kwargs)
