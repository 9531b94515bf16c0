"""Which kernels ONNX Runtime's plugin runs for a ``SparseAttention`` node.

They are those of ``triton_attention``, and on Hopper those of ``gluon_attention`` where PyTorch's
operator takes them too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import triton
from triton.runtime.jit import JITFunction

from uta_fx.export.onnxruntime_kernels import (
    DTYPES,
    HOPPER,
    MANY,
    SHARED_KB,
    Kernel,
    NodeOfFile,
    compile_kernel,
    map_type,
    parameter_type,
)
from uta_fx.kernels import triton_attention
from uta_fx.kernels.triton_attention import (
    ID_CHUNK,
    dim_options,
    fit_tile,
    gluon_attention,
    gluon_tail,
)

_POINTERS = {
    "lse": "fp32", "tail_size": "fp32", "sigma2": "bf16", "listed": "u8",
    "ids": "i32", "counts": "i32", "order": "u16", "plan": "i32",
}  # fmt: skip
# what the C source calls a parameter, where a kernel of gluon_attention has another name for it
_NAMES = {
    "_paired_kernel": {
        "ids_ptr": "order_ptr", "size_ptr": "tail_size_ptr", "size_sb": "tail_size_sb",
        "size_sh": "tail_size_sh", "representatives": "blocks_kv",
    },
    "_pair_lists_kernel": {"ids_out_ptr": "order_ptr"},
    "_pooled_variance_kernel": {
        "var_ptr": "tail_var_ptr", "var_sb": "tail_var_sb", "var_sh": "tail_var_sh",
        "var_sr": "tail_var_sr",
    },
}  # fmt: skip


class AttentionVariant(NamedTuple):
    """For which nodes and shapes a set of kernels is compiled; the key as in the C source."""

    dtype: int
    dim: int
    dim_v: int
    block_q: int
    block_kv: int
    sign: int
    has_tail: bool
    per_block: bool
    has_variance: bool
    slopes: int  # 0, 1 (one a head) or 2 (one a query block)
    even: bool
    representatives: int  # bounds the tile of the tail

    @property
    def key(self) -> tuple[int, ...]:
        """What a node must have too."""
        return tuple(map(int, self[:-1]))


def attention_variants(node: NodeOfFile, architecture: int) -> list[AttentionVariant]:
    """One, or two where the length of the keys is not known: ragged or not.

    Raises:
        ValueError: A size that a kernel needs is not known, or the scale is too small for one.
    """
    attributes = node.attributes
    has_tail, length = not node.is_empty(5, 3), node.size(1, 2)
    scale = attributes["scale"]
    least = 0 if gluon_attention is None or not has_tail else gluon_attention.MIN_SCALE
    if 0 < abs(scale) < least:
        raise ValueError(f"scale must be 0 or at least {least} in magnitude, got {scale}")
    lengths = [False, True] if length is None else [length % attributes["block_kv"] == 0]
    return [
        AttentionVariant(
            dtype=node.dtype(0),
            dim=node.known(0, 3),
            dim_v=node.known(2, 3),
            block_q=attributes["block_q"],
            block_kv=attributes["block_kv"],
            sign=(scale > 0) - (scale < 0),
            has_tail=has_tail,
            per_block=has_tail and bool(attributes["per_block"]),
            has_variance=has_tail and not node.is_empty(8, 2),
            slopes=min(node.known(9, 2), 2) if has_tail else 0,
            even=even,
            representatives=node.size_or(5, 3, MANY),
        )
        for even in lengths
    ]


def compile_attention(variant: AttentionVariant, architecture: int) -> dict[str, Kernel]:
    """The kernels of a variant by their place in the C source, in the order in which they run.

    Raises:
        RuntimeError: Triton could not compile one of them.
    """
    dtype = DTYPES[variant.dtype][0]
    sizes = (variant.dim, variant.dim_v, variant.block_q, variant.block_kv)
    paired = paired_tail = False
    if architecture == HOPPER and gluon_attention is not None:
        paired = gluon_attention.takes_sizes(dtype, *sizes)
        paired_tail = paired and gluon_attention.takes_tail_sizes(
            variant.per_block, variant.has_variance, variant.slopes
        )
    kernels = {}
    if variant.per_block or paired:
        kernels["MARK"] = _compile(
            triton_attention._mark_listed_kernel, variant, architecture, {"CHUNK": ID_CHUNK}
        )
    if variant.has_tail and not paired_tail:
        kernels["TAIL"] = _compile_tail(variant, architecture)
    if not paired:
        kernels["LISTED"] = _compile_listed(variant, architecture)
        return kernels
    unaligned = gluon_attention.OF_PARTS["do_not_specialize_on_alignment"]
    kernels["ORDER"] = _compile(
        gluon_attention._pair_lists_kernel, variant, architecture, gluon_attention.ORDER_OPTIONS,
        blocks=2, unaligned=unaligned,
    )  # fmt: skip
    kernels["TURNS"] = _compile(
        gluon_attention._longest_first_kernel, variant, architecture, gluon_attention.TURN_OPTIONS,
        blocks=2 * gluon_attention.RANKED,
    )  # fmt: skip
    if paired_tail:
        kernels["VARIANCE"] = _compile(
            gluon_tail._pooled_variance_kernel, variant, architecture,
            gluon_tail.variance_options(variant.dim, variant.block_q), blocks=gluon_tail.MANY_Q,
        )  # fmt: skip
    options = gluon_attention.paired_options(
        variant.dim, variant.sign, variant.even, paired_tail, variant.has_tail and not paired_tail
    )
    kernels["PAIRED"] = _compile(
        gluon_attention._paired_kernel, variant, architecture, options,
        blocks=2, unaligned=unaligned,
    )  # fmt: skip
    return kernels


def _compile_tail(variant: AttentionVariant, architecture: int) -> Kernel:
    dtype, limit = DTYPES[variant.dtype][0], SHARED_KB[architecture] * 1024
    block = max(16, triton.next_power_of_2(variant.representatives))
    sizes = (dtype, max(variant.dim, variant.dim_v), variant.block_q)
    tile = fit_tile(triton_attention._TAIL_TILES, *sizes, block, 1, 2, limit)
    options = {
        "BLOCK_Q": variant.block_q, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "PER_BLOCK": variant.per_block, "HAS_VARIANCE": variant.has_variance,
        "HAS_SLOPE": variant.slopes > 0, **_dims(variant),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    return _compile(
        triton_attention._tail_kernel, variant, architecture, options,
        programs=variant.block_q // tile.block_m,
    )  # fmt: skip


def _compile_listed(variant: AttentionVariant, architecture: int) -> Kernel:
    dtype, limit = DTYPES[variant.dtype][0], SHARED_KB[architecture] * 1024
    sizes = (dtype, max(variant.dim, variant.dim_v), variant.block_q)
    tile = fit_tile(triton_attention._LISTED_TILES, *sizes, variant.block_kv, 1, 2, limit)
    options = {
        "BLOCK_Q": variant.block_q, "BLOCK_KV": variant.block_kv, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "EVEN": variant.even, "RESUME": variant.has_tail,
        "CHUNK": ID_CHUNK, "RECTIFY": False, "gain_ptr": None, "offset_ptr": None,
        "COUNTED": False, "key_counts_ptr": None, **_dims(variant),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    return _compile(
        triton_attention._listed_kernel, variant, architecture, options,
        programs=variant.block_q // tile.block_m,
    )  # fmt: skip


def _dims(variant: AttentionVariant) -> dict[str, Any]:
    options = dim_options(DTYPES[variant.dtype][0], variant.dim, variant.dim_v)
    return options | {"SIGN": variant.sign, "o_sd": 1}


def _compile(
    function: JITFunction[Any],
    variant: AttentionVariant,
    architecture: int,
    options: Mapping[str, Any],
    *,
    programs: int = 1,
    blocks: int = 1,
    unaligned: Container[str] = (),
) -> Kernel:
    names = _NAMES.get(function.__name__, {})
    maps = [name for name in function.arg_names if name.endswith("_desc")]
    types = _map_types(maps, variant, options) if maps else {}
    dtype = DTYPES[variant.dtype][1]
    return compile_kernel(
        function, architecture, options, names=names, programs=programs, blocks=blocks,
        types={
            name: types.get(name) or parameter_type(names.get(name, name), dtype, _POINTERS)
            for name in function.arg_names
        },
        divisible={
            name
            for name in function.arg_names
            if name not in unaligned and _is_divisible(names.get(name, name), variant)
        },
    )  # fmt: skip


def _map_types(
    names: Iterable[str], variant: AttentionVariant, constants: Mapping[str, Any]
) -> dict[str, str]:
    """Types of tensor maps: of blocks of rows, or of a whole slope where there is a tail."""
    rows = dict.fromkeys(names, gluon_attention.BLOCK)
    if constants["TAIL"]:
        rows["slope_desc"] = variant.dim
    dtype = DTYPES[variant.dtype][1]
    return {name: map_type(dtype, count, variant.dim) for name, count in rows.items()}


def _is_divisible(name: str, variant: AttentionVariant) -> bool:
    """Whether 16 divides a parameter: the plugin checks tensors, which are contiguous."""
    if name.endswith("_ptr"):
        return True
    tensor, _, stride = name.rpartition("_s")
    if len(stride) != 1 or tensor in ("ids", "counts", "tail_size"):
        return False
    dims = {"q": variant.dim, "k": variant.dim, "tail_k": variant.dim, "tail_var": variant.dim}
    return dims.get(tensor, variant.dim_v) % 16 == 0
