"""Inputs of ``uta::sparse_attention`` that several test files share."""

import contextlib
import dataclasses

import pytest
import torch

from uta_fx.kernels import reference


@dataclasses.dataclass
class Case:
    """Inputs of the operator; every field of the shape can be drawn at random."""

    batch: int = 2
    heads: int = 3
    length_q: int = 130
    length_kv: int = 200
    dim: int = 32
    dim_v: int = 32
    block_q: int = 32
    block_kv: int = 64
    tail: str = "block"  # none, block (one representative a key block) or row (some a query block)
    slopes: str = "head"  # none, head or row
    listed: float = 0.4
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self):
        """Arguments of the operator, by position."""
        generator = torch.Generator().manual_seed(self.seed)
        lead = (self.batch, self.heads)

        def randn(*shape):
            return torch.randn(*lead, *shape, generator=generator).to(self.dtype)

        rows, blocks = -(-self.length_q // self.block_q), -(-self.length_kv // self.block_kv)
        mask = torch.rand(*lead, rows, blocks, generator=generator) < self.listed
        mask[:, 0, 0] = False  # a row that lists nothing
        shape = {"none": (0,), "block": (blocks,), "row": (rows, 3)}[self.tail]
        log_size = torch.rand(*lead, *shape, generator=generator) * 4
        if self.tail == "row":
            log_size[..., 0] = -torch.inf  # a bin that nothing fell into
        variances = blocks if self.tail == "block" and self.slopes != "none" else 0
        slopes = {"none": 0, "head": 1, "row": rows}[self.slopes] if self.tail != "none" else 0
        return [
            randn(self.length_q, self.dim),
            randn(self.length_kv, self.dim),
            randn(self.length_kv, self.dim_v),
            mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int(),
            mask.sum(-1, dtype=torch.int32),
            randn(*shape, self.dim),
            randn(*shape, self.dim_v),
            log_size,
            randn(variances, self.dim).square(),
            randn(slopes, self.dim, self.dim_v) * 0.1,
            self.dim**-0.5,
            1.0,
            self.block_q,
            self.block_kv,
        ]


SCORED = {  # dtype; D, length, Nk; weight, power, block_q, rows
    "hopper": (torch.bfloat16, 128, 1000, 48, 0.0, 1.0, 64, 16),
    "hopper_64": (torch.float16, 64, 300, 5, 0.0, 1.0, 64, 8),
    "hopper_variance_in_the_mass": (torch.bfloat16, 128, 1000, 48, 0.5, 1.0, 64, 16),
    "hopper_half_power": (torch.float16, 128, 300, 7, 0.0, 0.5, 64, 16),
    "any_power": (torch.float16, 96, 300, 7, 0.0, 0.3, 32, 1),
    "no_power": (torch.bfloat16, 64, 300, 32, 0.0, 0.0, 64, 16),
    "float32": (torch.float32, 24, 300, 7, 1.0, 1.0, 32, 4),
}
"""Calls of ``uta::block_scores`` that kernels of several kinds serve, by name."""


def score_inputs(batch, heads, length, blocks, dim, dtype):
    """Tensors of ``uta::block_scores``, in order."""
    generator = torch.Generator().manual_seed(0)
    lead = (batch, heads)
    query = torch.randn(*lead, length, dim, generator=generator)
    mean = torch.randn(*lead, blocks, dim, generator=generator)
    variance = torch.rand(*lead, blocks, dim, generator=generator)
    log_size = torch.rand(*lead, blocks, generator=generator) * 4
    return [query.to(dtype), mean.to(dtype), variance.to(dtype), log_size]


def double(args):
    """The same rounded inputs in float64."""
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


def with_mask(args):
    """Arguments of ``uta::block_masked_attention`` from those of ``uta::sparse_attention``.

    The mask has strides of its own, as one that is sliced out of a larger one has.
    """
    query, key, value, ids, counts, *rest = args
    mask, _ = reference.listed_blocks(ids, counts, -(-key.shape[2] // rest[-1]))
    return [query, key, value, torch.cat([mask, ~mask], -1)[..., : mask.shape[-1]], *rest]


def poisoned(x):
    """The same values inside a larger buffer of NaN: beyond each end of every dimension but two.

    Strides that 16 divides, which is all that a kernel is compiled for, stay such and no others:
    sums run in the same order.
    """
    buffer = x.new_full((*x.shape[:2], *(size + 16 for size in x.shape[2:])), torch.nan)
    view = buffer[(..., *(slice(8, 8 + size) for size in x.shape[2:]))]
    view.copy_(x)
    return view


LAYOUTS = {
    "contiguous": lambda x: x,
    "inside NaN": poisoned,
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
}
"""How a tensor ``[B, H, L, D]`` may lie in memory."""


def laid_out(args, layout):
    """The same arguments, all tensors of numbers laid out so."""
    place = LAYOUTS[layout]
    return [place(x) if torch.is_tensor(x) and x.is_floating_point() else x for x in args]


@contextlib.contextmanager
def nan_in_new_memory():
    """What ``new_empty`` and ``empty_like`` allocate holds NaN."""
    allocate = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        x = allocate(self, *shape, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
        yield
