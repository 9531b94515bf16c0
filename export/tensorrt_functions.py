"""``SparseAttention`` in standard operations that TensorRT can take: sizes fixed, no lists.

ONNX Runtime runs the function of ``onnx_functions``, which gathers what each row lists: as many
keys as the data say. TensorRT builds no loop whose shapes depend on data, so here every query block
meets all keys, and those of blocks that it does not list are masked. The result is the same and the
memory stays linear in the length, but no arithmetic is saved: this is how a file runs where there
are no plugins (TensorRT-RTX), not how it runs fast. All heads go through the loop together.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx

from uta_fx.export.onnx_functions import SPARSE_ATTENTION_HEAD

_FUNCTION = """
    two = Constant <value_ints = [2]> ()
    last_axis = Constant <value_ints = [-1]> ()
    zero_scalar = Constant <value_int = 0> ()
    one_scalar = Constant <value_int = 1> ()

    query_float = Cast <to = 1> (query)
    missing_q_rows = Expand (zero_float, missing_q_shape)
    padded_query = Concat <axis = 2> (query_float, missing_q_rows)
    query_shape = Concat <axis = 0> (groups, blocks_q, block_q_size, dim)
    query_blocks = Reshape (padded_query, query_shape)

    key_float = Cast <to = 1> (key)
    missing_k_rows = Expand (zero_float, missing_k_shape)
    padded_key = Concat <axis = 2> (key_float, missing_k_rows)
    key_shape = Concat <axis = 0> (groups, padded_kv, dim)
    key_rows = Reshape (padded_key, key_shape)
    keys_by_channel = Transpose <perm = [0, 2, 1]> (key_rows)
    value_float = Cast <to = 1> (value)
    missing_v_rows = Expand (zero_float, missing_v_shape)
    padded_value = Concat <axis = 2> (value_float, missing_v_rows)
    value_shape = Concat <axis = 0> (groups, padded_kv, dim_v)
    values = Reshape (padded_value, value_shape)
    inside = Expand (zero_float, length_kv)
    outside = Expand (minus_infinity, missing_kv)
    ragged = Concat <axis = 0> (inside, outside)
    block_shape = Concat <axis = 0> (blocks_kv, block_kv_size)
    ragged_blocks = Reshape (ragged, block_shape)

    listed_scalar = Squeeze (listed)
    position = Range (zero_scalar, listed_scalar, one_scalar)
    wide_counts = Cast <to = 7> (block_counts)
    counts = Unsqueeze (wide_counts, last_axis)
    used = Less (position, counts)
    wide_ids = Cast <to = 7> (block_ids)
    target = Where (used, wide_ids, blocks_kv)
    one_more = Add (blocks_kv, one)
    map_shape = Concat <axis = 0> (lead, blocks_q, one_more)
    unlisted = Expand (minus_infinity, map_shape)
    target_shape = Shape (target)
    listed_zeros = Expand (zero_float, target_shape)
    spilled = ScatterElements <axis = 3> (unlisted, target, listed_zeros)
    map = Slice (spilled, zero, blocks_kv, last_axis)
    rows_shape = Concat <axis = 0> (groups, blocks_q, blocks_kv)
    bias_rows = Reshape (map, rows_shape)
    blocks_q_scalar = Squeeze (blocks_q)
    row = Range (zero_scalar, blocks_q_scalar, one_scalar)
    first_row = Mul (row, block_q_size)
    rows_left = Sub (length_q, first_row)
    rows_inside = Min (rows_left, block_q_size)
    rows_float = Cast <to = 1> (rows_inside)
    logits_shape = Concat <axis = 0> (groups, block_q_size, blocks_kv, block_kv_size)
    flat_shape = Concat <axis = 0> (groups, block_q_size, padded_kv)
    middle_axes = Constant <value_ints = [1, 3]> ()
    OUTSIDE

    last, block_outputs, block_lses = Scan <num_scan_inputs = 4, scan_input_axes = [1, 1, 0, 0],
        scan_output_axes = [1, 1], body = attend_block (
        float state, q_rows, bias_row, int64 index, float true_rows) =>
        (float next, float[groups, rows, channels] out_rows, float[groups, rows] lse_rows)
    {
        next = Identity (state)
        scale_here = Constant <value_float: float = @scale> ()
        one_float = Constant <value_float = 1.0> ()
        q = Mul (q_rows, scale_here)
        products = MatMul (q, keys_by_channel)
        product_blocks = Reshape (products, logits_shape)
        bias = Unsqueeze (bias_row, middle_axes)
        mask = Add (bias, ragged_blocks)
        masked = Add (product_blocks, mask)
        exact_logits = Reshape (masked, flat_shape)
        INSIDE
        highest = ReduceMax <keepdims = 1> (logits, last_axis)
        nothing = Equal (highest, minus_infinity)
        base = Where (nothing, zero_float, highest)
        below = Sub (logits, base)
        weights = Exp (below)
        total = ReduceSum <keepdims = 1> (weights, last_axis)
        divisor = Where (nothing, one_float, total)
        OUTPUT
        log_total = Log (total)
        lse_column = Add (base, log_total)
        lse_rows = Squeeze (lse_column, last_axis)
    }> (zero_float, query_blocks, bias_rows, row, rows_float)

    padded_output_shape = Concat <axis = 0> (lead, padded_q, dim_v)
    padded_output = Reshape (block_outputs, padded_output_shape)
    whole_output = Slice (padded_output, zero, length_q, two)
    output = CastLike (whole_output, query)
    padded_lse_shape = Concat <axis = 0> (lead, padded_q)
    padded_lse = Reshape (block_lses, padded_lse_shape)
    lse = Slice (padded_lse, zero, length_q, two)
}
"""

_TAIL_OUTSIDE = """
    tails = Shape <start = 2, end = 3> (tail_key)
    representatives = Shape <start = 3, end = 4> (tail_key)
    tail_key_shape = Concat <axis = 0> (groups, tails, representatives, dim)
    tail_key_float = Cast <to = 1> (tail_key)
    tail_keys = Reshape (tail_key_float, tail_key_shape)
    tail_value_shape = Concat <axis = 0> (groups, tails, representatives, dim_v)
    tail_value_float = Cast <to = 1> (tail_value)
    tail_values = Reshape (tail_value_float, tail_value_shape)
    tail_size_shape = Concat <axis = 0> (groups, tails, one, representatives)
    tail_sizes = Reshape (tail_log_size, tail_size_shape)
    tails_scalar = Squeeze (tails)
"""
_VARIANCE_OUTSIDE = """
    variance_shape = Concat <axis = 0> (groups, representatives, dim)
    variance_float = Cast <to = 1> (tail_variance)
    variances = Reshape (variance_float, variance_shape)
    variance_by_channel = Transpose <perm = [0, 2, 1]> (variances)
"""
_SLOPE_OUTSIDE = """
    slopes = Shape <start = 2, end = 3> (tail_slope)
    slopes_scalar = Squeeze (slopes)
    slope_shape = Concat <axis = 0> (groups, slopes, dim, dim_v)
    slope_float = Cast <to = 1> (tail_slope)
    slope_rows = Reshape (slope_float, slope_shape)
"""
_TAIL_INSIDE = """
        tail_index = Mod (index, tails_scalar)
        row_tail_keys = Gather <axis = 1> (tail_keys, tail_index)
        row_tail_values = Gather <axis = 1> (tail_values, tail_index)
        row_tail_sizes = Gather <axis = 1> (tail_sizes, tail_index)
        tail_keys_by_channel = Transpose <perm = [0, 2, 1]> (row_tail_keys)
        tail_products = MatMul (q, tail_keys_by_channel)
        tail_sized = Add (tail_products, row_tail_sizes)
"""
_LEAVE = """
        unlisted_here = Equal (bias_row, minus_infinity)
        tail_bias_row = Where (unlisted_here, zero_float, minus_infinity)
        tail_bias = Unsqueeze (tail_bias_row, one)
        tail_left = Add (tail_sized, tail_bias)
"""
_VARIANCE_INSIDE = """
        weight = Constant <value_float: float = @variance_weight> ()
        half = Constant <value_float = 0.5> ()
        half_weight = Mul (half, weight)
        square_total = ReduceSumSquare <keepdims = 1> (q, one)
        square_mean = Div (square_total, true_rows)
        sigma2 = MatMul (square_mean, variance_by_channel)
        lift = Mul (sigma2, half_weight)
        tail_lifted = Add (tail_left, lift)
"""
_TAIL_OUTPUT = """
        exact_weights = Slice (weights, zero, padded_kv, last_axis)
        all_logits = Add (padded_kv, representatives)
        tail_weights = Slice (weights, padded_kv, all_logits, last_axis)
        exact_sum = MatMul (exact_weights, values)
        tail_sum = MatMul (tail_weights, row_tail_values)
        weighted = Add (exact_sum, tail_sum)
        mean = Div (weighted, divisor)
"""
_SLOPE_OUTPUT = """
        slope_index = Mod (index, slopes_scalar)
        row_slope = Gather <axis = 1> (slope_rows, slope_index)
        gain_total = ReduceSum <keepdims = 1> (damped, last_axis)
        gain = Div (gain_total, divisor)
        along = MatMul (q, row_slope)
        rise = Mul (along, gain)
        out_rows = Add (mean, rise)
"""


class Form(NamedTuple):
    """Which parts a node has: of its tail, and of what stands for it."""

    has_tail: bool
    per_block: bool
    has_variance: bool
    has_slope: bool

    @property
    def overload(self) -> str:
        """Tells the functions of different forms apart."""
        return "".join("01"[part] for part in self)


def static_attention_function(opset: int, form: Form) -> onnx.FunctionProto:
    """What ``SparseAttention`` nodes of one form compute, for TensorRT.

    Args:
        opset: Of the standard operations.
        form: Of the nodes; the function's overload says which.

    Returns:
        A function like that of ``onnx_functions.sparse_attention_function``; ids of blocks must lie
        in ``[0, Nk)``.
    """
    outside, inside, output = "", "", "exact_sum = MatMul (weights, values)\n"
    output += "        out_rows = Div (exact_sum, divisor)"
    tail_logits = "tail_sized"
    if form.has_tail:
        outside, inside, output = _TAIL_OUTSIDE, _TAIL_INSIDE, _TAIL_OUTPUT
        inside += _LEAVE if form.per_block else "        tail_left = Identity (tail_sized)\n"
        tail_logits = "tail_left"
        if form.has_variance:
            outside, inside = outside + _VARIANCE_OUTSIDE, inside + _VARIANCE_INSIDE
            tail_logits = "tail_lifted"
        if form.has_slope:
            outside += _SLOPE_OUTSIDE
            if form.has_variance:
                output += "        damping = Add (sigma2, one_float)\n"
                output += "        damped = Div (tail_weights, damping)\n"
            else:
                output += "        damped = Identity (tail_weights)\n"
            output += _SLOPE_OUTPUT
        else:
            output += "        out_rows = Identity (mean)\n"
        inside += f"        logits = Concat <axis = 2> (exact_logits, {tail_logits})\n"
    else:
        inside = "logits = Identity (exact_logits)"
    text = (SPARSE_ATTENTION_HEAD + _FUNCTION).replace("OPSET", str(opset))
    for place, part in (("OUTSIDE", outside), ("INSIDE", inside), ("OUTPUT", output)):
        text = text.replace(f"{place}\n", f"{part}\n")
    function = onnx.parser.parse_function(text)
    function.overload = form.overload
    return function
