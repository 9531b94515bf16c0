"""Kernels of ONNX Runtime's plugin, compiled ahead of time without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import onnx
import torch
import triton
from onnx import TensorProto
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from uta_fx.kernels.triton_attention import gluon_attention

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory of one program by architecture, as NVIDIA's programming guide gives it."""

HOPPER = 90
MANY = 2048
"""Blocks of keys where a file leaves their number open: no kernel has a larger tile of them."""
OPEN = -2
"""In the key of a variant: any number, where others are at least -1."""
DTYPES = {
    TensorProto.FLOAT: (torch.float32, "fp32"),
    TensorProto.FLOAT16: (torch.float16, "fp16"),
    TensorProto.BFLOAT16: (torch.bfloat16, "bf16"),
}
"""Of a file, in PyTorch and in Triton."""


def map_type(dtype: str, rows: int, dim: int) -> str:
    """Triton's type of a tensor map of so many rows."""
    return f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{gluon_attention.MAP_LAYOUT!r}>"


def parameter_type(name: str, dtype: str, pointers: Mapping[str, str]) -> str:
    """Triton's type of a parameter that is no tensor map.

    Args:
        name: Of the parameter. Strides of samples and heads may not fit 32 bits.
        dtype: Triton's, of the node's tensors.
        pointers: Those of tensors of another dtype, by their names without ``_ptr``.
    """
    if name.endswith("_ptr"):
        return "*" + pointers.get(name.removesuffix("_ptr"), dtype)
    if name in ("scale", "scale_log2", "half_weight_log2", "power"):
        return "fp32"
    return "i64" if name.endswith(("_sb", "_sh")) else "i32"


class NodeOfFile:
    """A node, and what a file says of its inputs.

    Args:
        node: The node.
        types: Of all values that have one, by name.

    Attributes:
        name: Of the node.
        attributes: By name.
    """

    def __init__(self, node: onnx.NodeProto, types: Mapping[str, Any]) -> None:
        self.attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        self.name = node.name
        self._node, self._types = node, types

    def dtype(self, index: int) -> int:
        """Element type of an input, 0 where it is not known."""
        name = self._node.input[index]
        return int(self._types[name].elem_type) if name in self._types else 0

    def size(self, index: int, dim: int) -> int | None:
        """A dimension of an input, None where it is not known."""
        name = self._node.input[index]
        sizes = self._types[name].shape.dim if name in self._types else ()
        if dim < len(sizes) and sizes[dim].HasField("dim_value"):
            return int(sizes[dim].dim_value)
        return None

    def size_or(self, index: int, dim: int, other: int) -> int:
        """A dimension of an input, ``other`` where it is not known."""
        value = self.size(index, dim)
        return other if value is None else value

    def is_empty(self, index: int, dim: int) -> bool:
        """Whether a dimension of an input is 0, which one that the file names is not.

        Raises:
            ValueError: It is not known.
        """
        name = self._node.input[index]
        sizes = self._types[name].shape.dim if name in self._types else ()
        if dim < len(sizes) and sizes[dim].dim_param:
            return False
        return self.known(index, dim) == 0

    def known(self, index: int, dim: int) -> int:
        """A dimension of an input.

        Raises:
            ValueError: It is not known.
        """
        value = self.size(index, dim)
        if value is None:
            raise ValueError(
                f"node {self.name}: dimension {dim} of its input {index} must be known to"
                " build a plugin for it"
            )
        return value


class Map(NamedTuple):
    """How the copy engine cuts a tensor that a kernel has a map of."""

    parameter: str
    swizzle: int
    box: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: Of its entry.
        cubin: Machine code.
        shared: Bytes of shared memory.
        threads: Of one program.
        programs: How many there are for ``blocks`` blocks, or rows.
        blocks: See ``programs``.
        parameters: Their names in the C source, in order.
        maps: Of the parameters that are tensor maps, in order.
    """

    name: str
    cubin: bytes
    shared: int
    threads: int
    programs: int
    blocks: int
    parameters: tuple[str, ...]
    maps: tuple[Map, ...]


def compile_kernel(
    function: JITFunction[Any],
    architecture: int,
    options: Mapping[str, Any],
    *,
    types: Mapping[str, str],
    divisible: Container[str],
    names: Mapping[str, str] | None = None,
    programs: int = 1,
    blocks: int = 1,
) -> Kernel:
    """Compile one kernel of Triton or Gluon.

    Args:
        function: The kernel.
        architecture: Compute capability.
        options: Its constants and the compiler's options.
        types: Triton's, of its other parameters.
        divisible: Which of those 16 divides.
        names: What the C source calls a parameter, where it has another name for it.
        programs: See ``Kernel``.
        blocks: See ``Kernel``.

    Raises:
        RuntimeError: Triton could not compile it.
    """
    constants = {name: x for name, x in options.items() if name in function.arg_names}
    parameters = [name for name in function.arg_names if name not in constants]
    signature = {
        name: types[name] if name in parameters else "constexpr" for name in function.arg_names
    }
    mapped = [name for name in parameters if types[name].startswith("tensordesc")]
    source: type[ASTSource] = ASTSource
    if mapped:
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name in parameters and name not in mapped and name in divisible
    }
    try:
        compiled = triton.compile(
            source(function, signature, constants, attributes),
            target=GPUTarget("cuda", architecture, 32),
            options={name: x for name, x in options.items() if name not in constants},
        )
    except Exception as error:
        raise RuntimeError(
            f"Triton could not compile {function.__name__} for sm_{architecture}: {error}"
        ) from error
    metadata = compiled.metadata
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    cuts = metadata.tensordesc_meta if mapped else ()
    known_as = names or {}
    return Kernel(
        name=metadata.name,
        cubin=compiled.asm["cubin"],
        shared=metadata.shared,
        threads=32 * metadata.num_warps,
        programs=programs,
        blocks=blocks,
        parameters=tuple(known_as.get(name, name) for name in parameters),
        maps=tuple(
            Map(name, cut["swizzle"], tuple(cut["block_size"]))
            for name, cut in zip(mapped, cuts, strict=True)
        ),
    )
