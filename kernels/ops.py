"""The operators: schemas, shape rules and device dispatch.

``uta::block_statistics`` pools keys and values, ``uta::block_scores`` pools attention,
``uta::weigh_scores`` weighs that by head and key block, ``uta::select_blocks`` spends a budget on
scores, ``uta::list_blocks`` makes lists of a mask, and ``uta::sparse_attention`` attends to listed
blocks and a tail; ``uta::block_masked_attention`` takes a mask in place of lists.
``uta::rectified_attention`` attends to listed blocks and text, and scales and shifts what comes of
it. ``uta::text_attention`` attends to a few keys, and ``uta::join_text`` makes one softmax of that
and of the video's. ``uta::kmeans`` groups tokens, and
``uta::clustered_attention`` attends to listed blocks that are not full. ``uta::fit_tail`` fits two
factors of a tail to some rows of exact attention, and ``uta::fitted_tail`` applies them.
``uta::gather_tokens`` brings tokens into another order.

Importing this module needs torch alone; the CPU and Triton kernels are imported when first used.
Schemas hold tensors first, then float and int: what TensorRT's converters can carry. A tensor that
is absent has a dimension of size 0. The operators are forward-only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from uta_fx.kernels import contract, reference
from uta_fx.kernels.reference import score_dtype, text_arguments

# Queries, keys and values are often parts of tensors that hold text too: Inductor copies them for
# each operator that wants the strides of the traced run. Scores and masks of pairs of blocks it
# would pad, and a launcher copy; what is gathered lies in memory as it did.
_ANY_STRIDES = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_AS_TRACED = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIBRARY = torch.library.Library("uta", "DEF")
_LIBRARY.define(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor tail_key, Tensor tail_value, Tensor tail_log_size,"
    " Tensor tail_variance, Tensor tail_slope, float scale, float variance_weight,"
    " int block_q, int block_kv) -> (Tensor output, Tensor lse)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "block_masked_attention(Tensor query, Tensor key, Tensor value, Tensor exact, Tensor tail_key,"
    " Tensor tail_value, Tensor tail_log_size, Tensor tail_variance, Tensor tail_slope,"
    " float scale, float variance_weight, int block_q, int block_kv)"
    " -> (Tensor output, Tensor lse)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "rectified_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor text_key, Tensor text_value, Tensor text_bias, Tensor gain,"
    " Tensor offset, float scale, int block_q, int block_kv) -> Tensor",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "text_attention(Tensor query, Tensor key, Tensor value, Tensor bias, float scale, int block_q)"
    " -> (Tensor output, Tensor lse)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "join_text(Tensor output, Tensor lse, Tensor text_output, Tensor text_lse, Tensor before,"
    " Tensor after) -> Tensor",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "text_bias(Tensor row, Tensor column, SymInt start, SymInt tokens, bool trusted) -> Tensor",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "block_scores(Tensor query, Tensor key_mean, Tensor key_variance, Tensor log_size,"
    " float scale, float variance_weight, float variance_power, int block_q, int rows) -> Tensor",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "block_statistics(Tensor key, Tensor value, int block_kv) -> (Tensor key_mean,"
    " Tensor key_variance, Tensor value_mean, Tensor value_variance, Tensor covariance)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "clustered_attention(Tensor query, Tensor key, Tensor value, Tensor block_ids,"
    " Tensor block_counts, Tensor key_counts, Tensor tail_key, Tensor tail_value,"
    " Tensor tail_log_size, Tensor tail_variance, Tensor tail_slope, float scale,"
    " float variance_weight, int block_q, int block_kv) -> (Tensor output, Tensor lse)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "kmeans(Tensor tokens, Tensor centroids, int iterations) -> (Tensor labels,"
    " Tensor new_centroids, Tensor sizes)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "select_blocks(Tensor scores, SymInt kept, SymInt rows) -> Tensor",
    tags=_AS_TRACED,
)
_LIBRARY.define(
    "list_blocks(Tensor exact) -> (Tensor block_ids, Tensor block_counts)",
    tags=_AS_TRACED,
)
_LIBRARY.define(
    "fit_tail(Tensor query, Tensor key, Tensor value, Tensor exact, Tensor key_counts,"
    " Tensor key_mean, Tensor key_variance, Tensor value_mean, Tensor log_size, Tensor slope,"
    " float scale, float variance_weight, int rows, int block_q, int block_kv)"
    " -> (Tensor mass, Tensor gain)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "fitted_tail(Tensor query, Tensor key, Tensor value, Tensor exact, Tensor key_counts,"
    " Tensor key_mean, Tensor key_variance, Tensor value_mean, Tensor log_size, Tensor slope,"
    " float scale, float variance_weight, int rows, int block_q, int block_kv)"
    " -> (Tensor fitted_log_size, Tensor fitted_slope)",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "weigh_scores(Tensor scores, Tensor query, Tensor key_variance, Tensor value_variance,"
    " float scale, float variance_weight, float value_power, int block_q) -> Tensor",
    tags=_ANY_STRIDES,
)
_LIBRARY.define(
    "gather_tokens(Tensor x, Tensor index, int dim) -> Tensor",
    tags=_AS_TRACED,
)
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _is_exporting() -> bool:
    """Whether torch.export traces; torch 2.11 says so of every function that Dynamo traces."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def sparse_attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::sparse_attention``; arguments and results as in ``reference``.

    Inputs may have any strides with a contiguous last dimension; float32, float16 or bfloat16
    (query, key, value, tail_key, tail_value, tail_variance and tail_slope alike); head dims from
    16 to 256; block sizes 16, 32, 64 or 128. The output has the strides of ``empty_like(query)``.

    Raises:
        ValueError: A shape, block size or head dim is outside the contract, or a number not finite;
            on the CPU also an id outside ``[0, Nk)`` (a GPU cannot report it without stopping, and
            makes the row NaN).
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.sparse_attention.default(*args, **options)


def block_masked_attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::block_masked_attention``; arguments and results as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``; there is no id that could lie outside.
    """
    return torch.ops.uta.block_masked_attention.default(*args, **options)


def clustered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::clustered_attention``; arguments and results as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``.
    """
    return torch.ops.uta.clustered_attention.default(*args)


def kmeans(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``uta::kmeans``; arguments and results as in ``reference``, centroids in float32.

    The same inputs give the same bits.

    Raises:
        ValueError: A shape, head dim or number of iterations is outside the contract.
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.kmeans.default(tokens, centroids, iterations)


def rectified_attention(*args: Any) -> Tensor:
    """Call ``uta::rectified_attention``; arguments and result as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``; ``gain``, ``offset`` and ``text_bias``
    are float32.
    """
    return torch.ops.uta.rectified_attention.default(*args)


def text_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::text_attention``; arguments and results as in ``reference``.

    Inputs, errors and strides as in ``sparse_attention``, which is what exporters see.
    """
    if _is_exporting():
        return sparse_attention(*text_arguments(*args))
    return torch.ops.uta.text_attention.default(*args)


def join_text(*args: Any) -> Tensor:
    """Call ``uta::join_text``; arguments and result as in ``reference``.

    Exporters see what it does.
    """
    if _is_exporting():
        return reference.join_text(*args)
    return torch.ops.uta.join_text.default(*args)


def text_bias(*args: Any) -> Tensor:
    """Call ``uta::text_bias``; arguments and result as in ``reference``.

    Exporters see what it does.
    """
    if _is_exporting():
        return reference.text_bias(*args)
    return torch.ops.uta.text_bias.default(*args)


def block_scores(*args: Any) -> Tensor:
    """Call ``uta::block_scores``; arguments and result as in ``reference``."""
    return torch.ops.uta.block_scores.default(*args)


def block_statistics(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    """Call ``uta::block_statistics``; arguments and results as in ``reference``."""
    return torch.ops.uta.block_statistics.default(key, value, block_kv)


def select_blocks(scores: Tensor, kept: int, rows: int) -> Tensor:
    """Call ``uta::select_blocks``; arguments and result as in ``reference``.

    Scores in float32 or bfloat16. The same on every device, to the bit.

    Raises:
        ValueError: The scores are not ``[B, H, Nq, Nk]``, or a number is outside the contract.
        TypeError: The scores are neither float32 nor bfloat16.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.select_blocks.default(scores, kept, rows)


def list_blocks(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``uta::list_blocks``; argument and results as in ``reference``.

    Raises:
        ValueError: The mask is not ``[B, H, Nq, Nk]``.
        TypeError: It is not boolean.
    """
    return torch.ops.uta.list_blocks.default(exact)


def fit_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::fit_tail``; arguments and results as in ``reference``, float32.

    ``rows`` from 1 to ``MAX_FIT_ROWS``. Inputs as in ``sparse_attention``; the same inputs give the
    same bits.

    Raises:
        ValueError: A shape, block size, head dim or number of rows is outside the contract.
        TypeError: A dtype or device is outside the contract.
        RuntimeError: A gradient is asked for.
    """
    return torch.ops.uta.fit_tail.default(*args)


def fitted_tail(*args: Any) -> tuple[Tensor, Tensor]:
    """Call ``uta::fitted_tail``; arguments and results as in ``reference``, errors as ``fit_tail``.

    Exporters see what it does.
    """
    if _is_exporting():
        return reference.by_factors(*fit_tail(*args), *args)
    return torch.ops.uta.fitted_tail.default(*args)


def weigh_scores(*args: Any) -> Tensor:
    """Call ``uta::weigh_scores``; arguments and result as in ``reference``.

    Exporters see what it does.
    """
    if _is_exporting():
        return reference.weigh_scores(*args)
    return torch.ops.uta.weigh_scores.default(*args)


def gather_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Call ``uta::gather_tokens``; arguments and result as in ``reference``.

    Inductor would fuse a gather with what reads it, and tune that. Exporters see what it does.
    """
    if _is_exporting():
        return reference.gather_tokens(x, index, dim)
    return torch.ops.uta.gather_tokens.default(x, index, dim)


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output, with the strides of ``empty_like(query)``, and the log-sum-exp, uninitialised."""
    if value.shape[-1] == query.shape[-1]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _attention_outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, value)


def _rectified_output(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_outputs(query, value)[0]


def _kmeans_outputs(tokens: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, ...]:
    return (
        tokens.new_empty(tokens.shape[:3], dtype=torch.int32),
        centroids.new_empty(centroids.shape),
        tokens.new_empty(centroids.shape[:3], dtype=torch.int32),
    )


def _scores_output(query: Tensor, key_mean: Tensor, *rest: Any) -> Tensor:
    block_q = rest[-2]
    shape = (*query.shape[:2], -(-query.shape[2] // block_q), key_mean.shape[-2])
    return query.new_empty(shape, dtype=score_dtype(query.dtype))


def _statistics_outputs(key: Tensor, value: Tensor, block_kv: int) -> Statistics:
    (batch, heads, length, dim), dim_v = key.shape, value.shape[-1]
    blocks = -(-length // block_kv)
    by_channel = ((blocks, dim), (blocks, dim), (blocks, dim_v))
    mean, variance, value_mean = (key.new_empty((batch, heads, *shape)) for shape in by_channel)
    value_variance, covariance = (
        key.new_empty((batch, heads, *shape), dtype=torch.float32)
        for shape in ((blocks,), (dim, dim_v))
    )
    return mean, variance, value_mean, value_variance, covariance


def _selection_output(scores: Tensor, kept: int, rows: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _lists_outputs(exact: Tensor) -> tuple[Tensor, Tensor]:
    return (
        exact.new_empty(exact.shape, dtype=torch.int32),
        exact.new_empty(exact.shape[:3], dtype=torch.int32),
    )


def _fit_outputs(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mass, gain = (query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2))
    return mass, gain


def _fitted_outputs(*args: Any) -> tuple[Tensor, Tensor]:
    key, log_size, slope = args[1], args[8], args[9]
    fitted_slope = key.new_empty((*slope.shape[:2], 1, *slope.shape[2:]))
    return log_size.new_empty(log_size.shape), fitted_slope


def _joined_output(output: Tensor, *others: Tensor) -> Tensor:
    (batch, heads, _, dim), parts = output.shape, (output, *others[-2:])
    return output.new_empty((batch, sum(x.shape[2] for x in parts), heads, dim)).transpose(1, 2)


def _weighed_output(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores)


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of what the operator of that name takes: of anything, where it has no check."""
    check = getattr(contract, f"check_{name}", None)
    if check is None:
        return function

    def call(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return call


def _in_module(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of kernels, which is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"uta_fx.kernels.{module}"), name)(*args)

    return call


def _refuse_gradient(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the operators of uta are forward-only: run the model under torch.no_grad() or"
        " torch.inference_mode()"
    )


LAUNCHERS: dict[Any, Callable[..., Any]] = {}
"""What each operator calls on GPUs."""

# what there is for a CPU is in the module of that name
for _name, _on_gpu, _outputs in (
    ("sparse_attention", "triton_attention", _attention_outputs),
    ("block_masked_attention", "triton_attention", _attention_outputs),
    ("clustered_attention", "triton_attention", _attention_outputs),
    ("kmeans", "triton_kmeans", _kmeans_outputs),
    ("rectified_attention", "triton_attention", _rectified_output),
    ("text_attention", "triton_attention", _attention_outputs),
    ("join_text", "triton_join", _joined_output),
    ("text_bias", "reference", reference.text_bias),
    ("block_scores", "triton_scores", _scores_output),
    ("block_statistics", "triton_statistics", _statistics_outputs),
    ("select_blocks", "triton_selection", _selection_output),
    ("list_blocks", "triton_selection", _lists_outputs),
    ("fit_tail", "triton_fitting", _fit_outputs),
    ("fitted_tail", "triton_fitting", _fitted_outputs),
    ("weigh_scores", "triton_weights", _weighed_output),
    ("gather_tokens", "triton_gather", reference.gather_tokens),
):
    _cpu, _cuda = (_checked(_name, _in_module(module, _name)) for module in ("cpu", _on_gpu))
    # PyTorch's own operations, which autocast around the operator would reach
    _LIBRARY.impl(_name, torch.autocast("cpu", enabled=False)(_cpu), "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"uta::{_name}", _checked(_name, _outputs), lib=_LIBRARY)
    torch.library.register_autograd(f"uta::{_name}", _refuse_gradient, lib=_LIBRARY)
    LAUNCHERS[getattr(torch.ops.uta, _name).default] = _cuda
