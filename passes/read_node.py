"""Read what a node of a graph does, whoever wrote it: Dynamo or torch.export."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Node

from uta_fx.passes.match_operators import overloads
from uta_fx.passes.site import recorded

# operations whose output may share memory with their input: a cast to what a tensor is returns it
VIEWS = (
    "transpose", "t", "T", "mT", "H", "mH", "permute", "movedim", "moveaxis", "view", "view_as",
    "reshape", "reshape_as", "unflatten", "flatten", "squeeze", "unsqueeze", "expand", "expand_as",
    "broadcast_to", "getitem", "getattr", "chunk", "split", "split_with_sizes", "tensor_split",
    "unbind", "narrow", "select", "slice", "contiguous", "to", "type", "type_as", "float", "half",
    "bfloat16", "double", "bool", "int", "long", "detach", "alias", "real", "imag", "conj",
    "view_as_complex", "view_as_real", "dropout", "identity", "lift_fresh", "requires_grad",
    "nan_to_num",
)  # fmt: skip

NEGATIONS = ("invert", "bitwise_not", "logical_not")
"""Operations that turn a mask into its complement."""


def is_call(node: Any) -> bool:
    """Whether a node is an operation on others."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method")


def name_of(node: Node) -> str:
    """What a node does: ``add`` for ``operator.add``, ``Tensor.add`` and ``aten.add.Tensor``.

    An operation that is not PyTorch's or Python's may do something else under the same name, and
    has that of its library in front: ``library::add``. A node that calls nothing has its kind.
    """
    target = node.target
    if not is_call(node):
        return node.op
    if isinstance(target, str):
        name = target
    elif found := overloads(target):
        name = found[0]._schema.name.removeprefix("aten::")
    else:
        name = getattr(target, "__name__", str(target))
        library = (getattr(target, "__module__", None) or "torch").partition(".")[0]
        if library not in ("torch", "_operator", "builtins"):
            name = f"{library}::{name}"
    # operators and methods in place: iadd, __iadd__, add_
    name = name.strip("_") if name != "_" else name
    return _ALIASES.get(name, name)


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def written_by(node: Node) -> tuple[Node, ...]:
    """The tensors that an operation writes into; their values, not what autograd knows of them."""
    target = node.target
    if not is_call(node) or name_of(node) == "detach":
        return ()
    if isinstance(target, HigherOrderOperator):
        # somebody's Triton kernel: which of its tensors it writes into is in its code alone
        is_kernel = target.name() == "triton_kernel_wrapper_mutation"
        return tuple(node.all_input_nodes) if is_kernel else ()
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        written = [
            argument(node, place, parameter.name)
            for overload in overloads(target)
            for place, parameter in enumerate(overload._schema.arguments)
            if parameter.alias_info is not None and parameter.alias_info.is_write
        ]
        return tuple(dict.fromkeys(x for x in written if isinstance(x, Node)))
    if isinstance(node.kwargs.get("out"), Node):
        return (node.kwargs["out"],)  # type: ignore[return-value]
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_operator = getattr(target, "__module__", "") == "_operator"
    if (
        name == "setitem"
        or (in_operator and name.strip("_") in _IN_PLACE)
        or (
            # operator.and_ is no more than a name that Python does not reserve
            not in_operator
            and name.endswith("_")
            and not name.endswith("__")
            and name != "requires_grad_"
        )
        or argument(node, _INPLACE_ARGUMENT.get(name, len(node.args)), "inplace") is True
    ):
        return (argument(node, 0, "input"),)
    return ()


def is_random(node: Node) -> bool:
    """Whether two calls with the same arguments may give different values."""
    seeded = torch.Tag.nondeterministic_seeded
    return name_of(node) in _RANDOM or any(seeded in x.tags for x in overloads(node.target))


def reduced_dims(node: Node) -> set[int]:
    """The dimensions that a reduction sums over."""
    rank = len(recorded(argument(node, 0, "input")).shape)
    with_order = name_of(node) in ("norm", "linalg_vector_norm")
    dims = argument(node, 2 if with_order else 1, "dim")
    if isinstance(dims, bool):
        raise TypeError("unbiased in place of dim")
    if dims is None:
        return set(range(rank))
    return {dim % rank for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}


def equation_of(node: Node) -> tuple[list[str], str, list[Node]]:
    """Letters of the operands and of the output of an einsum, and the operands.

    Dots are capital letters in their place, which are aligned at their end; an output that is not
    written has the letters that come once, as torch has it. Dimensions may be numbered too, each
    operand before its list.
    """
    arguments: Any = node.args
    equation, *operands = arguments
    if isinstance(equation, Node):
        equation, operands = _spelled(arguments)
    elif isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    left, arrow, output = str(equation).replace(" ", "").partition("->")
    inputs = left.split(",")
    widths = [
        recorded(x).dim() - len(letters.replace("...", ""))
        for letters, x in zip(inputs, operands, strict=True)
        if "..." in letters
    ]
    free = [x for x in string.ascii_uppercase if x not in equation]
    capitals = "".join(free[: max(widths, default=0)])
    if not arrow:
        once = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        output = ("..." if widths else "") + "".join(once)
    places = iter(widths)
    inputs = [
        letters.replace("...", capitals[len(capitals) - next(places) :])
        if "..." in letters
        else letters
        for letters in inputs
    ]
    return inputs, output.replace("...", capitals), operands


def _spelled(arguments: Sequence[Any]) -> tuple[str, list[Node]]:
    """Equation and operands of an einsum whose dimensions are numbered, the output's last."""
    operands = [x for x in arguments if isinstance(x, Node)]
    words = [
        "".join("..." if x is Ellipsis else string.ascii_letters[x] for x in numbers)
        for numbers in arguments
        if not isinstance(numbers, Node)
    ]
    inputs, output = words[: len(operands)], words[len(operands) :]
    return "->".join([",".join(inputs), *output]), operands


_ALIASES = {
    "radd": "add", "iadd": "add", "rsub": "sub", "isub": "sub", "rmul": "mul", "imul": "mul",
    "truediv": "div", "rtruediv": "div", "itruediv": "div", "swapaxes": "transpose",
    "swapdims": "transpose", "concat": "cat", "concatenate": "cat", "unsafe_view": "view",
    "narrow_copy": "narrow", "multiply": "mul", "divide": "div", "subtract": "sub",
    "special_softmax": "softmax", "numpy_T": "T", "clamp_min": "clamp", "clamp_max": "clamp",
    "true_divide": "div", "negative": "neg", "clip": "clamp", "linalg_matmul": "matmul",
    "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp",
    "special_exp2": "exp2", "safe_softmax": "softmax", "greater": "gt",
    "greater_equal": "ge", "less": "lt",
    "less_equal": "le", "not_equal": "ne",
}  # fmt: skip

_IN_PLACE = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "imatmul", "ilshift", "irshift",
}  # fmt: skip
# where torch.nn.functional takes it by its place
_INPLACE_ARGUMENT = {
    "relu": 1, "silu": 1, "mish": 1, "hardswish": 1, "relu6": 1, "leaky_relu": 2, "elu": 2,
    "dropout": 3,
}  # fmt: skip

_RANDOM = {
    "dropout", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal",
    "new_empty", "empty_like",
}  # fmt: skip
