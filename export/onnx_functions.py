"""Our operators in ONNX: functions of standard operations, and the schemas of their nodes.

They stay nodes of our domain in the exported file, with their functions beside them: a runtime that
has kernels for a node runs those, any other runs the function. No function holds a tensor of
Lq x Lk: they walk along the rows of lists, or along the heads (with a state that nobody reads:
TensorRT's parser wants one). Arguments and results are those of ``uta_fx.kernels.reference``,
except that in ONNX a tail always has rank 5, ``[B, H, T, R, D]`` with T = 1 where all query blocks
share their representatives, and that ``per_block`` says whether the representatives stand for key
blocks and leave the softmax of the rows that list theirs. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx.defs import OpSchema
from torch import Tensor

from uta_fx import __version__
from uta_fx.kernels import reference

DOMAIN, VERSION = "uta", 1
VERSION_KEY = "uta_fx.version"  # of the library, in a file's metadata
OPSET = 18  # of the standard operations, and the lowest of an exported file

SPARSE_ATTENTION_HEAD = """
<domain: "uta", opset_import: ["" : OPSET]>
SparseAttention <scale, variance_weight, block_q, block_kv, per_block>
    (query, key, value, block_ids, block_counts,
     tail_key, tail_value, tail_log_size, tail_variance, tail_slope) => (output, lse)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    zero_float = Constant <value_float = 0.0> ()
    minus_infinity = Constant <value_float = -inf> ()
    rows_of_block = Constant <value_int: int = @block_q> ()
    keys_of_block = Constant <value_int: int = @block_kv> ()
    block_q_size = Reshape (rows_of_block, one)
    block_kv_size = Reshape (keys_of_block, one)
    lead = Shape <start = 0, end = 2> (query)
    groups = ReduceProd <keepdims = 1> (lead)
    length_q = Shape <start = 2, end = 3> (query)
    length_kv = Shape <start = 2, end = 3> (key)
    dim = Shape <start = 3, end = 4> (query)
    dim_v = Shape <start = 3, end = 4> (value)
    blocks_q = Shape <start = 2, end = 3> (block_ids)
    listed = Shape <start = 3, end = 4> (block_ids)

    padded_q = Mul (blocks_q, block_q_size)
    missing_q = Sub (padded_q, length_q)
    missing_q_shape = Concat <axis = 0> (lead, missing_q, dim)
    almost = Sub (block_kv_size, one)
    rounded_up = Add (length_kv, almost)
    blocks_kv = Div (rounded_up, block_kv_size)
    padded_kv = Mul (blocks_kv, block_kv_size)
    missing_kv = Sub (padded_kv, length_kv)
    missing_k_shape = Concat <axis = 0> (lead, missing_kv, dim)
    missing_v_shape = Concat <axis = 0> (lead, missing_kv, dim_v)
"""
"""Begins each text of ``SparseAttention``: its sizes, and what its blocks lack of whole ones."""

_SPARSE_ATTENTION = """
    minus_one = Constant <value_ints = [-1]> ()

    missing_q_zeros = ConstantOfShape (missing_q_shape)
    missing_q_rows = CastLike (missing_q_zeros, query)
    padded_query = Concat <axis = 2> (query, missing_q_rows)
    query_shape = Concat <axis = 0> (minus_one, block_q_size, dim)
    query_blocks = Reshape (padded_query, query_shape)

    missing_k_zeros = ConstantOfShape (missing_k_shape)
    missing_k_rows = CastLike (missing_k_zeros, key)
    padded_key = Concat <axis = 2> (key, missing_k_rows)
    key_shape = Concat <axis = 0> (minus_one, block_kv_size, dim)
    key_blocks = Reshape (padded_key, key_shape)
    missing_v_zeros = ConstantOfShape (missing_v_shape)
    missing_v_rows = CastLike (missing_v_zeros, value)
    padded_value = Concat <axis = 2> (value, missing_v_rows)
    value_shape = Concat <axis = 0> (minus_one, block_kv_size, dim_v)
    value_blocks = Reshape (padded_value, value_shape)
    inside_zeros = ConstantOfShape (length_kv)
    missing_kv_shape = Expand (minus_infinity, missing_kv)
    key_bias = Concat <axis = 0> (inside_zeros, missing_kv_shape)
    bias_shape = Concat <axis = 0> (minus_one, block_kv_size)
    bias_blocks = Reshape (key_bias, bias_shape)

    tails = Shape <start = 2, end = 3> (tail_key)
    tails_lead = Concat <axis = 0> (lead, tails)
    tail_key_lead = Concat <axis = 0> (tails_lead, one, dim)
    sentinel_key_zeros = ConstantOfShape (tail_key_lead)
    sentinel_key = CastLike (sentinel_key_zeros, tail_key)
    tail_keys = Concat <axis = 3> (tail_key, sentinel_key)
    tail_value_lead = Concat <axis = 0> (tails_lead, one, dim_v)
    sentinel_value_zeros = ConstantOfShape (tail_value_lead)
    sentinel_value = CastLike (sentinel_value_zeros, tail_value)
    tail_values = Concat <axis = 3> (tail_value, sentinel_value)
    tail_size_lead = Concat <axis = 0> (tails_lead, one)
    sentinel_size = Expand (minus_infinity, tail_size_lead)
    tail_sizes = Concat <axis = 3> (tail_log_size, sentinel_size)
    representatives = Shape <start = 3, end = 4> (tail_sizes)
    tail_keys_shape = Concat <axis = 0> (minus_one, representatives, dim)
    tail_key_rows = Reshape (tail_keys, tail_keys_shape)
    tail_values_shape = Concat <axis = 0> (minus_one, representatives, dim_v)
    tail_value_rows = Reshape (tail_values, tail_values_shape)
    tail_sizes_shape = Concat <axis = 0> (minus_one, representatives)
    tail_size_rows = Reshape (tail_sizes, tail_sizes_shape)
    variances = Shape <start = 2, end = 3> (tail_variance)
    missing_variances = Sub (representatives, variances)
    missing_variance_shape = Concat <axis = 0> (lead, missing_variances, dim)
    missing_variance_zeros = ConstantOfShape (missing_variance_shape)
    missing_variance_rows = CastLike (missing_variance_zeros, tail_variance)
    padded_variance = Concat <axis = 2> (tail_variance, missing_variance_rows)
    variance_rows = Reshape (padded_variance, tail_keys_shape)
    slopes = Shape <start = 2, end = 3> (tail_slope)
    slopes_or_one = Max (slopes, one)
    missing_slopes = Sub (slopes_or_one, slopes)
    missing_slope_shape = Concat <axis = 0> (lead, missing_slopes, dim, dim_v)
    missing_slope_zeros = ConstantOfShape (missing_slope_shape)
    missing_slope = CastLike (missing_slope_zeros, tail_slope)
    padded_slope = Concat <axis = 2> (tail_slope, missing_slope)
    slope_shape = Concat <axis = 0> (minus_one, dim, dim_v)
    slope_rows = Reshape (padded_slope, slope_shape)

    all_rows = Mul (groups, blocks_q)
    zero_scalar = Squeeze (zero)
    one_scalar = Squeeze (one)
    all_rows_scalar = Squeeze (all_rows)
    row = Range (zero_scalar, all_rows_scalar, one_scalar)
    head = Div (row, blocks_q)
    block = Mod (row, blocks_q)
    first_tail = Mul (head, tails)
    tail_of_block = Mod (block, tails)
    tail_row = Add (first_tail, tail_of_block)
    first_slope = Mul (head, slopes_or_one)
    slope_of_block = Mod (block, slopes_or_one)
    slope_row = Add (first_slope, slope_of_block)
    first_query_row = Mul (block, block_q_size)
    query_rows_left = Sub (length_q, first_query_row)
    query_rows_inside = Min (query_rows_left, block_q_size)
    query_rows = Cast <to = 1> (query_rows_inside)
    ids_shape = Concat <axis = 0> (minus_one, listed)
    wide_ids = Cast <to = 7> (block_ids)
    ids = Reshape (wide_ids, ids_shape)
    counts_shape = Constant <value_ints = [-1, 1]> ()
    wide_counts = Cast <to = 7> (block_counts)
    counts = Reshape (wide_counts, counts_shape)

    block_outputs, block_lses = Scan <num_scan_inputs = 7, body = attend_row (
        q_row, int64[m] ids_row, int64[1] count, int64 head_row, int64 tail_of_row,
        int64 slope_of_row, float true_rows) => (float[rows, channels] out_row, float[rows] lse_row)
    {
        scale_row = Constant <value_float: float = @scale> ()
        weight = Constant <value_float: float = @variance_weight> ()
        half = Constant <value_float = 0.5> ()
        one_float = Constant <value_float = 1.0> ()
        leaves = Constant <value_int: int = @per_block> ()
        last_axis = Constant <value_ints = [1]> ()
        end = Constant <value_ints = [9223372036854775807]> ()

        chosen = Slice (ids_row, zero, count, zero)
        first_block = Mul (head_row, blocks_kv)
        blocks = Add (chosen, first_block)
        chosen_keys = Gather (key_blocks, blocks)
        chosen_values = Gather (value_blocks, blocks)
        chosen_bias = Gather (bias_blocks, chosen)
        tokens = Mul (count, block_kv_size)
        keys_shape = Concat <axis = 0> (tokens, dim)
        values_shape = Concat <axis = 0> (tokens, dim_v)
        listed_keys = Reshape <allowzero = 1> (chosen_keys, keys_shape)
        listed_values = Reshape <allowzero = 1> (chosen_values, values_shape)
        listed_bias = Reshape <allowzero = 1> (chosen_bias, tokens)

        row_tail_keys = Gather (tail_key_rows, tail_of_row)
        row_tail_values = Gather (tail_value_rows, tail_of_row)
        row_tail_sizes = Gather (tail_size_rows, tail_of_row)
        left_out_count = Mul (count, leaves)
        left_out = Slice (chosen, zero, left_out_count, zero)
        left_out_shape = Shape (left_out)
        left_out_sizes = Expand (minus_infinity, left_out_shape)
        tail_bias = ScatterElements <axis = 0> (row_tail_sizes, left_out, left_out_sizes)

        keys_typed = Concat <axis = 0> (listed_keys, row_tail_keys)
        keys = Cast <to = 1> (keys_typed)
        values_typed = Concat <axis = 0> (listed_values, row_tail_values)
        values = Cast <to = 1> (values_typed)
        bias = Concat <axis = 0> (listed_bias, tail_bias)
        q_float = Cast <to = 1> (q_row)
        q = Mul (q_float, scale_row)
        keys_by_channel = Transpose <perm = [1, 0]> (keys)
        products = MatMul (q, keys_by_channel)
        row_variance = Gather (variance_rows, head_row)
        row_variance_float = Cast <to = 1> (row_variance)
        variance_by_channel = Transpose <perm = [1, 0]> (row_variance_float)
        square_total = ReduceSumSquare <keepdims = 1> (q, zero)
        square_mean = Div (square_total, true_rows)
        sigma2 = MatMul (square_mean, variance_by_channel)
        half_weight = Mul (half, weight)
        lift = Mul (sigma2, half_weight)
        no_lift_shape = Concat <axis = 0> (one, tokens)
        no_lift = ConstantOfShape (no_lift_shape)
        all_lift = Concat <axis = 1> (no_lift, lift)
        biased = Add (products, bias)
        logits = Add (biased, all_lift)

        highest = ReduceMax <keepdims = 1> (logits, last_axis)
        nothing = Equal (highest, minus_infinity)
        base = Where (nothing, zero_float, highest)
        below = Sub (logits, base)
        weights = Exp (below)
        total = ReduceSum <keepdims = 1> (weights, last_axis)
        divisor = Where (nothing, one_float, total)
        weighted = MatMul (weights, values)
        mean = Div (weighted, divisor)
        tail_weights = Slice (weights, tokens, end, last_axis)
        damping = Add (sigma2, one_float)
        damped = Div (tail_weights, damping)
        gain_total = ReduceSum <keepdims = 1> (damped, last_axis)
        gain = Div (gain_total, divisor)
        row_slope = Gather (slope_rows, slope_of_row)
        row_slope_float = Cast <to = 1> (row_slope)
        along = MatMul (q, row_slope_float)
        rise = Mul (along, gain)
        out_row = Add (mean, rise)
        log_total = Log (total)
        lse_column = Add (base, log_total)
        lse_row = Squeeze (lse_column, last_axis)
    }> (query_blocks, ids, counts, head, tail_row, slope_row, query_rows)

    padded_output_shape = Concat <axis = 0> (lead, padded_q, dim_v)
    padded_output = Reshape (block_outputs, padded_output_shape)
    token_axis = Constant <value_ints = [2]> ()
    whole_output = Slice (padded_output, zero, length_q, token_axis)
    output = CastLike (whole_output, query)
    padded_lse_shape = Concat <axis = 0> (lead, padded_q)
    padded_lse = Reshape (block_lses, padded_lse_shape)
    lse = Slice (padded_lse, zero, length_q, token_axis)
}
"""

_BLOCK_STATISTICS = """
<domain: "uta", opset_import: ["" : OPSET]>
BlockStatistics <block_kv> (key, value)
    => (key_mean, key_variance, value_mean, value_variance, covariance)
{
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    one_float = Constant <value_float = 1.0> ()
    keys_of_block = Constant <value_int: int = @block_kv> ()
    block_size = Reshape (keys_of_block, one)
    lead = Shape <start = 0, end = 2> (key)
    length = Shape <start = 2, end = 3> (key)
    dim = Shape <start = 3, end = 4> (key)
    dim_v = Shape <start = 3, end = 4> (value)
    almost = Sub (block_size, one)
    rounded_up = Add (length, almost)
    blocks = Div (rounded_up, block_size)
    padded = Mul (blocks, block_size)
    missing = Sub (padded, length)
    inside_ones = Expand (one_float, length)
    outside_zeros = ConstantOfShape (missing)
    inside_row = Concat <axis = 0> (inside_ones, outside_zeros)
    inside_shape = Concat <axis = 0> (blocks, block_size, one)
    inside = Reshape (inside_row, inside_shape)
    in_block = Constant <value_ints = [1]> ()
    size = ReduceSum <keepdims = 1> (inside, in_block)

    token_axis = Constant <value_ints = [3]> ()
    last_axis = Constant <value_ints = [-1]> ()
    key_float = Cast <to = 1> (key)
    missing_k_shape = Concat <axis = 0> (lead, missing, dim)
    missing_k = ConstantOfShape (missing_k_shape)
    padded_key = Concat <axis = 2> (key_float, missing_k)
    key_shape = Concat <axis = 0> (lead, blocks, block_size, dim)
    keys = Reshape (padded_key, key_shape)
    key_total = ReduceSum <keepdims = 1> (keys, token_axis)
    key_center = Div (key_total, size)
    key_mean_float = Squeeze (key_center, token_axis)
    key_mean = CastLike (key_mean_float, key)
    key_off = Sub (keys, key_center)
    key_deviation = Mul (key_off, inside)
    key_square = ReduceSumSquare <keepdims = 1> (key_deviation, token_axis)
    key_spread = Div (key_square, size)
    key_variance_float = Squeeze (key_spread, token_axis)
    key_variance_rounded = CastLike (key_variance_float, key)
    key_variance_again = Cast <to = 1> (key_variance_rounded)
    beyond_float16 = IsInf (key_variance_again)
    largest = Constant <value_float = 65504.0> ()
    key_variance_limited = Where (beyond_float16, largest, key_variance_float)
    key_variance = CastLike (key_variance_limited, key)

    value_float = Cast <to = 1> (value)
    missing_v_shape = Concat <axis = 0> (lead, missing, dim_v)
    missing_v = ConstantOfShape (missing_v_shape)
    padded_value = Concat <axis = 2> (value_float, missing_v)
    value_shape = Concat <axis = 0> (lead, blocks, block_size, dim_v)
    values = Reshape (padded_value, value_shape)
    value_total = ReduceSum <keepdims = 1> (values, token_axis)
    value_center = Div (value_total, size)
    value_mean_float = Squeeze (value_center, token_axis)
    value_mean = CastLike (value_mean_float, key)
    value_off = Sub (values, value_center)
    value_deviation = Mul (value_off, inside)
    value_square = ReduceSumSquare <keepdims = 1> (value_deviation, token_axis)
    value_spread = Div (value_square, size)
    channel_variance = Squeeze (value_spread, token_axis)
    value_variance = ReduceSum <keepdims = 0> (channel_variance, last_axis)

    deviation_shape = Concat <axis = 0> (lead, padded, dim)
    deviations = Reshape (key_deviation, deviation_shape)
    deviations_by_channel = Transpose <perm = [0, 1, 3, 2]> (deviations)
    products = MatMul (deviations_by_channel, padded_value)
    tokens = Cast <to = 1> (length)
    covariance = Div (products, tokens)
}
"""

_BLOCK_SCORES = """
<domain: "uta", opset_import: ["" : OPSET]>
BlockScores <scale, variance_weight, variance_power, block_q, rows, score_type>
    (query, key_mean, key_variance, log_size) => (scores)
{
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    rows_of_block = Constant <value_int: int = @block_q> ()
    block_size = Reshape (rows_of_block, one)
    rows_of_group = Constant <value_int: int = @rows> ()
    group_size = Reshape (rows_of_group, one)
    groups_of_block = Div (block_size, group_size)
    lead = Shape <start = 0, end = 2> (query)
    length = Shape <start = 2, end = 3> (query)
    dim = Shape <start = 3, end = 4> (query)
    columns = Shape <start = 2, end = 3> (key_mean)
    first = Squeeze (one)
    zero = Sub (first, first)

    almost_group = Sub (group_size, one)
    length_up = Add (length, almost_group)
    groups = Div (length_up, group_size)
    group_count = Squeeze (groups)
    group = Range (zero, group_count, first)
    first_row = Mul (group, group_size)
    rows_left = Sub (length, first_row)
    rows_inside = Min (rows_left, group_size)
    rows_column = Unsqueeze (rows_inside, one)
    true_rows = Cast <to = 1> (rows_column)
    grouped_length = Mul (groups, group_size)
    missing_rows = Sub (grouped_length, length)
    missing_rows_shape = Concat <axis = 0> (missing_rows, dim)
    missing_queries = ConstantOfShape (missing_rows_shape)
    group_shape = Concat <axis = 0> (groups, group_size, dim)

    almost_block = Sub (groups_of_block, one)
    groups_up = Add (groups, almost_block)
    blocks = Div (groups_up, groups_of_block)
    block_count = Squeeze (blocks)
    block = Range (zero, block_count, first)
    first_group = Mul (block, groups_of_block)
    groups_left = Sub (groups, first_group)
    groups_inside = Min (groups_left, groups_of_block)
    groups_column = Unsqueeze (groups_inside, one)
    true_groups = Cast <to = 1> (groups_column)
    padded_groups = Mul (blocks, groups_of_block)
    missing_groups = Sub (padded_groups, groups)
    missing_shape = Concat <axis = 0> (missing_groups, columns)
    missing_scores = ConstantOfShape (missing_shape)
    block_shape = Concat <axis = 0> (blocks, groups_of_block, columns)

    query_shape = Concat <axis = 0> (minus_one, length, dim)
    mean_shape = Concat <axis = 0> (minus_one, columns, dim)
    size_shape = Concat <axis = 0> (minus_one, columns)
    queries = Reshape (query, query_shape)
    means = Reshape (key_mean, mean_shape)
    variances = Reshape (key_variance, mean_shape)
    sizes = Reshape (log_size, size_shape)
    nothing = Constant <value_float = 0.0> ()
    last, head_scores = Scan <num_scan_inputs = 4, body = score_head (
        float state, q_head, mean_head, variance_head, float[n] size_head) =>
        (float next, float[blocks, n] score_rows)
    {
        next = Identity (state)
        scale_head = Constant <value_float: float = @scale> ()
        weight = Constant <value_float: float = @variance_weight> ()
        half = Constant <value_float = 0.5> ()
        in_group = Constant <value_ints = [1]> ()
        q_float = Cast <to = 1> (q_head)
        q_scaled = Mul (q_float, scale_head)
        q_padded = Concat <axis = 0> (q_scaled, missing_queries)
        q_groups = Reshape (q_padded, group_shape)
        q_total = ReduceSum <keepdims = 0> (q_groups, in_group)
        q = Div (q_total, true_rows)
        square_total = ReduceSumSquare <keepdims = 0> (q_groups, in_group)
        q_square = Div (square_total, true_rows)
        mean_float = Cast <to = 1> (mean_head)
        mean_by_channel = Transpose <perm = [1, 0]> (mean_float)
        products = MatMul (q, mean_by_channel)
        variance_float = Cast <to = 1> (variance_head)
        variance_by_channel = Transpose <perm = [1, 0]> (variance_float)
        sigma2 = MatMul (q_square, variance_by_channel)
        biased = Add (products, size_head)
        half_weight = Mul (half, weight)
        lift = Mul (sigma2, half_weight)
        log_p = LogSoftmax <axis = -1> (biased)
        log_mass = Add (log_p, lift)
        p = Exp (log_mass)
        WEIGHTED
        all_groups = Concat <axis = 0> (weighted, missing_scores)
        by_block = Reshape (all_groups, block_shape)
        total = ReduceSumSquare <keepdims = 0> (by_block, in_group)
        mean_square = Div (total, true_groups)
        score_rows = Sqrt (mean_square)
    }> (nothing, queries, means, variances, sizes)
    score_shape = Concat <axis = 0> (lead, blocks, columns)
    score_float = Reshape (head_scores, score_shape)
    scores = Cast <to: int = @score_type> (score_float)
}
"""

_SELECT_BLOCKS = """
<domain: "uta", opset_import: ["" : OPSET]>
HEADER => (exact)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    infinity = Constant <value_float = inf> ()
    minus_infinity = Constant <value_float = -inf> ()
    largest = Constant <value_float = 3.4028234663852886e38> ()
NUMBERS
    score_shape = Shape (scores)
    blocks = Shape <start = 3, end = 4> (scores)
    group_size = Mul (rows, blocks)
    group_shape = Concat <axis = 0> (minus_one, group_size)

    score_float = Cast <to = 1> (scores)
    missing = IsNaN (score_float)
    known = Where (missing, minus_infinity, score_float)
    numbers = Min (known, largest)
    best_column = ArgMax <axis = -1, keepdims = 1> (known)
    first_column = Squeeze (zero)
    end_column = Squeeze (blocks)
    step = Squeeze (one)
    column = Range (first_column, end_column, step)
    best = Equal (best_column, column)
    best_first = Where (best, infinity, numbers)
    ranked = Reshape (best_first, group_shape)
    kept_scores, ids = TopK <axis = -1, largest = 1, sorted = 0> (ranked, kept)
    false = Cast <to = 9> (zero)
    true = Cast <to = 9> (one)
    ranked_shape = Shape (ranked)
    ids_shape = Shape (ids)
    none = Expand (false, ranked_shape)
    all_of_them = Expand (true, ids_shape)
    mask = ScatterElements <axis = -1> (none, ids, all_of_them)
    exact = Reshape (mask, score_shape)
}
"""
"""TopK, the best of the rows made higher than all: of equal scores it takes the first.

Infinity counts as the largest number below it. Runtimes sort no bfloat16.
"""

_LIST_BLOCKS = """
<domain: "uta", opset_import: ["" : OPSET]>
ListBlocks (exact) => (block_ids, block_counts)
{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    lead = Shape <start = 0, end = 3> (exact)
    blocks = Shape <start = 3, end = 4> (exact)
    first_column = Squeeze (zero)
    end_column = Squeeze (blocks)
    step = Squeeze (one)
    wide_column = Range (first_column, end_column, step)
    column = Cast <to = 6> (wide_column)
    one_if_listed = Cast <to = 7> (exact)
    running = CumSum (one_if_listed, last_axis)
    place = Sub (running, one)
    target = Where (exact, place, blocks)
    target_shape = Shape (target)
    ids = Expand (column, target_shape)
    one_more = Add (blocks, one)
    spilled_shape = Concat <axis = 0> (lead, one_more)
    narrow_zero = Cast <to = 6> (zero)
    zeros = Expand (narrow_zero, spilled_shape)
    spilled = ScatterElements <axis = -1> (zeros, target, ids)
    block_ids = Slice (spilled, zero, blocks, last_axis)
    listed = Cast <to = 6> (exact)
    block_counts = ReduceSum <keepdims = 0> (listed, last_axis)
}
"""
"""Running counts say where a block goes; what is not listed goes to one column too many."""

_FIT_TAIL = """
<domain: "uta", opset_import: ["" : OPSET]>
FitTail <scale, variance_weight, rows, block_q, block_kv>
    (query, key, value, exact, key_counts, key_mean, key_variance, value_mean, log_size, slope)
    => (mass, gain)
{
    first = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    row_axis = Constant <value_ints = [2]> ()
    last_axis = Constant <value_ints = [-1]> ()
    one_by_one = Constant <value_ints = [1, 1]> ()
    zero_float = Constant <value_float = 0.0> ()
    one_float = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    infinity = Constant <value_float = inf> ()
    minus_infinity = Constant <value_float = -inf> ()
    row_count = Constant <value_int: int = @rows> ()
    rows_of_block = Constant <value_int: int = @block_q> ()
    keys_of_block = Constant <value_int: int = @block_kv> ()
    least_blocks = Constant <value_ints = [SAMPLED_BLOCKS]> ()
    scale_number = Constant <value_float: float = @scale> ()
    weight = Constant <value_float: float = @variance_weight> ()
    lead = Shape <start = 0, end = 2> (query)
    query_size = Shape <start = 2, end = 3> (query)
    length_q = Squeeze (query_size)
    key_size = Shape <start = 2, end = 3> (key)
    length_kv = Squeeze (key_size)

    i = Range (first, row_count, one)
    twice = Mul (i, two)
    odd = Add (twice, one)
    of_length = Mul (odd, length_q)
    parts = Mul (row_count, two)
    row = Div (of_length, parts)
    query_block = Div (row, rows_of_block)
    sample = Gather <axis = 2> (query, row)
    sample_float = Cast <to = 1> (sample)
    q = Mul (sample_float, scale_number)

    blocks = Shape <start = 2, end = 3> (key_mean)
    spacing = Div (blocks, least_blocks)
    spacing_number = Squeeze (spacing)
    every = Max (spacing_number, one)
    block_count = Squeeze (blocks)
    sampled_count = Div (block_count, every)
    sampled = Range (first, sampled_count, one)
    golden = Constant <value_int = GOLDEN> ()
    whole_turn = Constant <value_int = 65536> ()
    angle = Mul (sampled, golden)
    rest_of_turn = Mod (angle, whole_turn)
    place_in_turn = Mul (rest_of_turn, every)
    place_beyond = Div (place_in_turn, whole_turn)
    first_of_every = Mul (sampled, every)
    block = Add (first_of_every, place_beyond)
    first_key = Mul (block, keys_of_block)
    first_key_column = Unsqueeze (first_key, last_axis)
    place = Range (first, keys_of_block, one)
    keys_size = Unsqueeze (keys_of_block, last_axis)
    number_of_block = Add (first_key_column, place)
    minus_one = Constant <value_ints = [-1]> ()
    number = Reshape (number_of_block, minus_one)
    last_key = Sub (length_kv, one)
    number_there = Min (number, last_key)
    exists = Less (number, length_kv)
    counted = Shape <start = 2, end = 3> (key_counts)
    not_counted = Sub (blocks, counted)
    whole_shape = Concat <axis = 0> (lead, not_counted)
    whole = Expand (keys_of_block, whole_shape)
    wide_counts = Cast <to = 7> (key_counts)
    counts = Concat <axis = 2> (wide_counts, whole)
    count = Gather <axis = 2> (counts, block)
    count_column = Unsqueeze (count, last_axis)
    place_counts = Less (place, count_column)
    keys_shape = Concat <axis = 0> (lead, minus_one)
    key_counts_itself = Reshape (place_counts, keys_shape)
    counts_key = And (key_counts_itself, exists)
    inside = Unsqueeze (counts_key, row_axis)
    sampled_key = Gather <axis = 2> (key, number_there)
    sampled_value = Gather <axis = 2> (value, number_there)
    block_listed = Gather <axis = 3> (exact, block)
    block_mean = Gather <axis = 2> (key_mean, block)
    block_variance = Gather <axis = 2> (key_variance, block)
    block_value = Gather <axis = 2> (value_mean, block)
    block_size = Gather <axis = 2> (log_size, block)
    key_float = Cast <to = 1> (sampled_key)
    key_by_channel = Transpose <perm = [0, 1, 3, 2]> (key_float)
    products = MatMul (q, key_by_channel)
    logits = Where (inside, products, minus_infinity)
    highest = ReduceMax <keepdims = 1> (logits, last_axis)
    below = Sub (logits, highest)
    powers = Exp (below)
    total = ReduceSum <keepdims = 1> (powers, last_axis)
    weights = Div (powers, total)
    listed = Gather <axis = 2> (block_listed, query_block)
    not_listed = Not (listed)
    block_in_tail = Cast <to = 1> (not_listed)
    by_block = Unsqueeze (block_in_tail, last_axis)
    all_axes = Shape (block_in_tail)
    wide_shape = Concat <axis = 0> (all_axes, keys_size)
    by_key = Expand (by_block, wide_shape)
    sample_shape = Shape (weights)
    in_tail = Reshape (by_key, sample_shape)
    of_tail = Mul (weights, in_tail)
    of_lists = Sub (weights, of_tail)
    true_mass = ReduceSum <keepdims = 1> (of_tail, last_axis)
    exact_mass = ReduceSum <keepdims = 1> (of_lists, last_axis)
    value_float = Cast <to = 1> (sampled_value)
    true_values = MatMul (of_tail, value_float)
    exact_values = MatMul (of_lists, value_float)

    block_row = Range (first, rows_of_block, one)
    first_row = Mul (query_block, rows_of_block)
    first_row_column = Unsqueeze (first_row, last_axis)
    members = Add (first_row_column, block_row)
    last_row = Sub (length_q, one)
    members_there = Min (members, last_row)
    is_there = Less (members, length_q)
    there_row = Cast <to = 1> (is_there)
    there = Unsqueeze (there_row, last_axis)
    neighbours = Gather <axis = 2> (query, members_there)
    neighbours_float = Cast <to = 1> (neighbours)
    neighbours_scaled = Mul (neighbours_float, scale_number)
    neighbours_inside = Mul (neighbours_scaled, there)
    neighbour_axis = Constant <value_ints = [-2]> ()
    square_total = ReduceSumSquare <keepdims = 0> (neighbours_inside, neighbour_axis)
    true_rows = ReduceSum <keepdims = 0> (there, neighbour_axis)
    squares = Div (square_total, true_rows)
    variance_float = Cast <to = 1> (block_variance)
    variance_by_channel = Transpose <perm = [0, 1, 3, 2]> (variance_float)
    sigma2 = MatMul (squares, variance_by_channel)
    mean_float = Cast <to = 1> (block_mean)
    mean_by_channel = Transpose <perm = [0, 1, 3, 2]> (mean_float)
    mean_products = MatMul (q, mean_by_channel)
    size_row = Unsqueeze (block_size, row_axis)
    sized = Add (mean_products, size_row)
    relative = Sub (sized, highest)
    half_weight = Mul (half, weight)
    lift = Mul (sigma2, half_weight)
    mass_logits = Add (relative, lift)
    mass_powers = Exp (mass_logits)
    all_masses = Div (mass_powers, total)
    masses = Where (listed, zero_float, all_masses)
    damping = Add (sigma2, one_float)
    damped = Div (masses, damping)
    damped_total = ReduceSum <keepdims = 1> (damped, last_axis)
    slope_products = MatMul (q, slope)
    along = Mul (damped_total, slope_products)
    value_mean_float = Cast <to = 1> (block_value)
    values = MatMul (masses, value_mean_float)
    mass_of_tail = ReduceSum <keepdims = 1> (masses, last_axis)

    ridged = Constant <value_float = RIDGED> ()
    largest_determinant = Mul (ridged, ridged)
    tiny = Constant <value_float = TINY> ()
    least = Constant <value_float = LEAST> ()
    most = Constant <value_float = MOST> ()
    two_axes = Constant <value_ints = [-2, -1]> ()
    factor_shape = Concat <axis = 0> (lead, one_by_one)
    of_mass_0 = Expand (one_float, factor_shape)
    of_slope_0 = Expand (one_float, factor_shape)
STEPS
    gain_factor = Div (of_slope_LAST, of_mass_LAST)
    mass = Squeeze (of_mass_LAST, two_axes)
    gain = Squeeze (gain_factor, two_axes)
}
"""
"""Blocks whose keys are not counted hold ``block_kv``; what is beyond the last key is left out."""

_FIT_STEP = """
    given_mass_N = Mul (of_mass_P, mass_of_tail)
    more_N = Sub (given_mass_N, true_mass)
    total_N = Add (exact_mass, given_mass_N)
    of_values_N = Mul (of_mass_P, values)
    of_along_N = Mul (of_slope_P, along)
    given_values_N = Add (of_values_N, of_along_N)
    more_share_N = Div (more_N, total_N)
    of_more_N = Mul (exact_values, more_share_N)
    with_tail_N = Add (of_more_N, true_values)
    given_tail_N = Div (given_values_N, total_N)
    rest_N = Sub (with_tail_N, given_tail_N)
    all_values_N = Add (exact_values, given_values_N)
    mass_share_N = Div (mass_of_tail, total_N)
    of_given_N = Mul (all_values_N, mass_share_N)
    to_values_N = Sub (values, of_given_N)
    u_N = Div (to_values_N, total_N)
    x_N = Div (along, total_N)
    mass_beyond_N = Sub (of_mass_P, one_float)
    u_beyond_N = Mul (mass_beyond_N, u_N)
    slope_beyond_N = Sub (of_slope_P, one_float)
    x_beyond_N = Mul (slope_beyond_N, x_N)
    y_without_slope_N = Add (rest_N, u_beyond_N)
    y_N = Add (y_without_slope_N, x_beyond_N)
PRODUCTS
    abs_1_N = Add (abs_uu_N, abs_ux_N)
    abs_2_N = Add (abs_1_N, abs_xx_N)
    abs_3_N = Add (abs_2_N, abs_uy_N)
    largest_N = Add (abs_3_N, abs_xy_N)
    finite_N = Less (largest_N, infinity)
SUMS
    root_u_N = Sqrt (uu_N)
    size_u_N = Max (root_u_N, tiny)
    root_x_N = Sqrt (xx_N)
    size_x_N = Max (root_x_N, tiny)
    along_u_N = Div (uy_N, size_u_N)
    along_x_N = Div (xy_N, size_x_N)
    both_sizes_N = Mul (size_u_N, size_x_N)
    both_N = Div (ux_N, both_sizes_N)
    both_square_N = Mul (both_N, both_N)
    determinant_N = Sub (largest_determinant, both_square_N)
    ridged_u_N = Mul (ridged, along_u_N)
    both_x_N = Mul (both_N, along_x_N)
    right_u_N = Sub (ridged_u_N, both_x_N)
    left_u_N = Mul (determinant_N, size_u_N)
    change_u_N = Div (right_u_N, left_u_N)
    of_u_N = Add (change_u_N, one_float)
    ridged_x_N = Mul (ridged, along_x_N)
    both_u_N = Mul (both_N, along_u_N)
    right_x_N = Sub (ridged_x_N, both_u_N)
    left_x_N = Mul (determinant_N, size_x_N)
    change_x_N = Div (right_x_N, left_x_N)
    of_x_N = Add (change_x_N, one_float)
    of_mass_N = Clip (of_u_N, least, most)
    x_for_mass_N = Div (of_x_N, of_mass_N)
    x_gain_N = Clip (x_for_mass_N, zero_float, most)
    of_slope_N = Mul (of_mass_N, x_gain_N)
"""
"""Step N after step P; of a product that is not finite the whole row does not count."""


def sparse_attention_function(opset: int) -> onnx.FunctionProto:
    """What a ``SparseAttention`` node computes, in standard operations of that opset."""
    text = SPARSE_ATTENTION_HEAD + _SPARSE_ATTENTION
    return onnx.parser.parse_function(text.replace("OPSET", str(opset)))


def block_statistics_function(opset: int) -> onnx.FunctionProto:
    """What a ``BlockStatistics`` node computes, in standard operations of that opset."""
    return onnx.parser.parse_function(_BLOCK_STATISTICS.replace("OPSET", str(opset)))


def block_scores_function(opset: int, variance_power: float | None) -> onnx.FunctionProto:
    """What a ``BlockScores`` node computes, in standard operations of that opset.

    Args:
        opset: Of the operations.
        variance_power: The node's, or None for any.
    """
    # a power of numbers one by one is slow, and the common ones need none
    known: dict[float | None, str] = {
        0.0: "weighted = Identity (p)",
        1.0: "weighted = Mul (p, sigma2)",
    }
    weighted = known.get(
        variance_power,
        "power = Constant <value_float: float = @variance_power> ()\n"
        "        spread = Pow (sigma2, power)\n"
        "        weighted = Mul (p, spread)",
    )
    text = _BLOCK_SCORES.replace("OPSET", str(opset)).replace("WEIGHTED", weighted)
    return onnx.parser.parse_function(text)


def select_blocks_function(opset: int) -> onnx.FunctionProto:
    """What a ``SelectBlocks`` node computes, in standard operations of that opset."""
    numbers = (
        "    kept_number = Constant <value_int: int = @kept> ()\n"
        "    rows_number = Constant <value_int: int = @rows> ()\n"
        "    kept = Reshape (kept_number, one)\n"
        "    rows = Reshape (rows_number, one)"
    )
    return _selecting("SelectBlocks <kept, rows> (scores)", numbers, opset)


def select_counted_function(opset: int) -> onnx.FunctionProto:
    """What a ``SelectCounted`` node computes, in standard operations of that opset."""
    return _selecting("SelectCounted (scores, kept, rows)", "", opset)


def _selecting(header: str, numbers: str, opset: int) -> onnx.FunctionProto:
    text = _SELECT_BLOCKS.replace("HEADER", header).replace("NUMBERS", numbers)
    return onnx.parser.parse_function(text.replace("OPSET", str(opset)))


def list_blocks_function(opset: int) -> onnx.FunctionProto:
    """What a ``ListBlocks`` node computes, in standard operations of that opset."""
    return onnx.parser.parse_function(_LIST_BLOCKS.replace("OPSET", str(opset)))


def fit_tail_function(opset: int) -> onnx.FunctionProto:
    """What a ``FitTail`` node computes, in standard operations of that opset."""
    products, sums = [], []
    for a, b in ("uu", "ux", "xx", "uy", "xy"):
        products += [
            f"    pair_{a}{b}_N = Mul ({a}_N, {b}_N)",
            f"    of_row_{a}{b}_N = ReduceSum <keepdims = 1> (pair_{a}{b}_N, last_axis)",
            f"    abs_{a}{b}_N = Abs (of_row_{a}{b}_N)",
        ]
        sums += [
            f"    counts_{a}{b}_N = Where (finite_N, of_row_{a}{b}_N, zero_float)",
            f"    {a}{b}_N = ReduceSum <keepdims = 1> (counts_{a}{b}_N, row_axis)",
        ]
    step = _FIT_STEP.strip("\n").replace("PRODUCTS", "\n".join(products))
    step = step.replace("SUMS", "\n".join(sums))
    steps = [
        step.replace("_N", f"_{number}").replace("_P", f"_{number - 1}")
        for number in range(1, reference.STEPS + 1)
    ]
    text = _FIT_TAIL.replace("STEPS", "\n".join(steps)).replace("LAST", str(reference.STEPS))
    for name, number in {
        "RIDGED": 1 + reference.RIDGE,
        "TINY": torch.finfo(torch.float32).tiny ** 0.5,
        "LEAST": 1 / reference.LIMIT,
        "MOST": reference.LIMIT,
    }.items():
        text = text.replace(name, f"{float(number)!r}")
    for name in ("SAMPLED_BLOCKS", "GOLDEN"):
        text = text.replace(name, str(getattr(reference, name)))
    return onnx.parser.parse_function(text.replace("OPSET", str(opset)))


def schemas() -> dict[str, OpSchema]:
    """The schemas of our nodes by name."""
    return {
        schema.name: schema
        for schema in (
            make_schema(
                "SparseAttention",
                "Attention over listed key blocks and over representatives of the rest, in one"
                " softmax (Unified Tail Aggregation).",
                {
                    "query": ("T", "[B, H, Lq, D]"),
                    "key": ("T", "[B, H, Lk, D]"),
                    "value": ("T", "[B, H, Lk, Dv]"),
                    "block_ids": ("I", "[B, H, Nq, M], ids in [0, Nk) of the listed key blocks"),
                    "block_counts": ("I", "[B, H, Nq], how many of a row's ids count"),
                    "tail_key": ("T", "[B, H, T, R, D], T 1 or Nq, R 0 for no tail"),
                    "tail_value": ("T", "[B, H, T, R, Dv]"),
                    "tail_log_size": ("F", "[B, H, T, R], log of how many keys each stands for"),
                    "tail_variance": ("T", "[B, H, R, D], or [B, H, 0, D] for none"),
                    "tail_slope": ("T", "[B, H, S, D, Dv], S 0 (none), 1 or Nq"),
                },
                {
                    "output": ("T", "[B, H, Lq, Dv]"),
                    "lse": ("F", "[B, H, Lq], natural log-sum-exp"),
                },
                {
                    "scale": (float, "multiplies the logits"),
                    "variance_weight": (float, "share of half the logit variance in the logit"),
                    "block_q": (int, "query rows in a block"),
                    "block_kv": (int, "keys in a block; the last may be ragged"),
                    "per_block": (int, "1: representative r leaves the rows that list block r"),
                },
            ),
            make_schema(
                "BlockStatistics",
                "Means and variances of the blocks of keys and values, over their true tokens.",
                {"key": ("T", "[B, H, L, D]"), "value": ("T", "[B, H, L, Dv]")},
                {
                    "key_mean": ("T", "[B, H, Nk, D]"),
                    "key_variance": ("T", "[B, H, Nk, D], of each channel"),
                    "value_mean": ("T", "[B, H, Nk, Dv]"),
                    "value_variance": ("F", "[B, H, Nk], summed over the channels"),
                    "covariance": ("F", "[B, H, D, Dv], of keys and values inside their blocks"),
                },
                {"block_kv": (int, "keys in a block; the last may be ragged")},
            ),
            make_schema(
                "BlockScores",
                "Attention of mean query rows on mean keys, raised by half the variance of the"
                " logit inside the key block, times a power of it; of the groups of a query block"
                " the root mean square.",
                {
                    "query": ("T", "[B, H, Lq, D]"),
                    "key_mean": ("T", "[B, H, Nk, D]"),
                    "key_variance": ("T", "[B, H, Nk, D], of each channel"),
                    "log_size": ("F", "[B, H, Nk], log of how many keys are in each block"),
                },
                {"scores": ("S", "[B, H, Nq, Nk]")},
                {
                    "scale": (float, "multiplies the logits"),
                    "variance_weight": (float, "share of half the logit variance in the mass"),
                    "variance_power": (float, "exponent of the variance in the score"),
                    "block_q": (int, "query rows in a block"),
                    "rows": (int, "query rows in a group"),
                    "score_type": (int, "of the scores: 1 float32, or 16 bfloat16"),
                },
            ),
            make_schema(
                "SelectBlocks",
                "The best key block of every row, and of the others those with the highest scores.",
                {"scores": ("S", "[B, H, Nq, Nk], NaN counts as -inf")},
                {"exact": ("M", "[B, H, Nq, Nk], the blocks that are kept")},
                {
                    "kept": (int, "blocks that each budget keeps; of equal ones the first"),
                    "rows": (int, "consecutive rows of a sample that share a budget"),
                },
            ),
            make_schema(
                "SelectCounted",
                "As SelectBlocks, for numbers that follow from sizes that only a run knows.",
                {
                    "scores": ("S", "[B, H, Nq, Nk], NaN counts as -inf"),
                    "kept": ("N", "[1], blocks that each budget keeps; of equal ones the first"),
                    "rows": ("N", "[1], consecutive rows of a sample that share a budget"),
                },
                {"exact": ("M", "[B, H, Nq, Nk], the blocks that are kept")},
                {},
            ),
            make_schema(
                "ListBlocks",
                "The lists of SparseAttention from a mask of blocks.",
                {"exact": ("M", "[B, H, Nq, Nk], the blocks to list")},
                {
                    "block_ids": ("I", "[B, H, Nq, Nk], ascending, then zeros"),
                    "block_counts": ("I", "[B, H, Nq], how many of a row's ids count"),
                },
                {},
            ),
            make_schema(
                "FitTail",
                "By how much the mass of the representatives and the slope of a tail should be"
                " larger: a few query rows of each head attend to all keys, or from"
                f" {2 * reference.SAMPLED_BLOCKS} key blocks on to one of every s blocks with s ="
                f" Nk / {reference.SAMPLED_BLOCKS}, and a regression on them says it.",
                {
                    "query": ("T", "[B, H, Lq, D]"),
                    "key": ("T", "[B, H, Lk, D]"),
                    "value": ("T", "[B, H, Lk, Dv]"),
                    "exact": ("M", "[B, H, Nq, Nk], the blocks that are kept"),
                    "key_counts": (
                        "I",
                        "[B, H, C], how many keys of a block count; C Nk, or 0 where all do",
                    ),
                    "key_mean": ("T", "[B, H, Nk, D]"),
                    "key_variance": ("T", "[B, H, Nk, D], of each channel"),
                    "value_mean": ("T", "[B, H, Nk, Dv]"),
                    "log_size": ("F", "[B, H, Nk], log of how many keys are in each block"),
                    "slope": ("F", "[B, H, D, Dv]"),
                },
                {
                    "mass": ("F", "[B, H], a factor of the mass"),
                    "gain": ("F", "[B, H], a factor of the slope"),
                },
                {
                    "scale": (float, "multiplies the logits"),
                    "variance_weight": (float, "share of half the logit variance in the logit"),
                    "rows": (int, "R, how many query rows: row i is (2 i + 1) Lq / (2 R)"),
                    "block_q": (int, "query rows in a block"),
                    "block_kv": (int, "keys in a block; the last may be ragged"),
                },
            ),
        )
    }


def make_schema(
    name: str,
    doc: str,
    inputs: dict[str, tuple[str, str]],
    outputs: dict[str, tuple[str, str]],
    attributes: dict[str, tuple[type, str]],
) -> OpSchema:
    """The schema of a node of our domain, all of whose attributes are required.

    Args:
        name: Of the node.
        doc: What it computes.
        inputs: By name, type (T of the model, S of scores, F float32, I int32, M bool, N int64)
            and meaning.
        outputs: As inputs.
        attributes: By name, ``float`` or ``int`` and meaning.
    """
    types = {float: OpSchema.AttrType.FLOAT, int: OpSchema.AttrType.INT}
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[OpSchema.FormalParameter(x, kind, text) for x, (kind, text) in inputs.items()],
        outputs=[OpSchema.FormalParameter(x, kind, text) for x, (kind, text) in outputs.items()],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "of the model"),
            ("S", ["tensor(float)", "tensor(bfloat16)"], "of scores"),
            ("F", ["tensor(float)"], "of sums"),
            ("I", ["tensor(int32)"], "of lists"),
            ("M", ["tensor(bool)"], "of masks"),
            ("N", ["tensor(int64)"], "of numbers"),
        ],
        attributes=[
            OpSchema.Attribute(x, types[kind], text, required=True)
            for x, (kind, text) in attributes.items()
        ],
    )


def nodes_of_ours(model: onnx.ModelProto) -> set[str]:
    """Of which types a file has nodes of our domain."""
    return {node.op_type for node in model.graph.node if node.domain == DOMAIN}


def check_version(path: Path, name: str) -> onnx.ModelProto:
    """Read a file without the weights beside it.

    Args:
        path: The file.
        name: Of the argument that gave it.

    Raises:
        ValueError: It is none, or from another version of our operators.
    """
    problem = f"{name} must be an ONNX file, got {path}"
    if not path.is_file():
        raise ValueError(problem)
    try:
        model = onnx.load(path, load_external_data=False)
        if not model.HasField("graph"):  # an empty file
            raise DecodeError
    except DecodeError as error:
        raise ValueError(f"{problem}, which is none") from error
    versions = [x.version for x in model.opset_import if x.domain == DOMAIN]
    if versions not in ([], [VERSION]):
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        writer = f"uta-fx {metadata.get(VERSION_KEY, 'of a version that it does not name')}"
        raise ValueError(
            f"{path} was written by {writer} for version {versions[0]} of the operators of domain"
            f" {DOMAIN!r}, and uta-fx {__version__} has version {VERSION}: export the model again"
            " with this release, or install that one"
        )
    return model


def places_of_weights(model: onnx.ModelProto) -> set[str]:
    """The files that hold weights of another, as that names them: relative to its folder."""
    entries = (y for x in model.graph.initializer for y in x.external_data)
    return {y.value for y in entries if y.key == "location"}


def beside_weights(model: onnx.ModelProto, path: Path, name: str) -> Path:
    """The place of a file beside which its weights lie: its own, or where a link leads.

    Args:
        model: The file, as of ``check_version``.
        path: Of the file.
        name: Of the argument that gave it.

    Raises:
        ValueError: They lie at neither.
    """
    places = places_of_weights(model)
    for candidate in (path, path.resolve()):
        lost = [place for place in places if not (candidate.parent / place).is_file()]
        if not lost:
            return candidate
    raise ValueError(f"{name} must have its weights beside it, {lost[0]} is not there: {path}")


ELEMENT_TYPES = {
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}


def node_model(
    arguments: Sequence[Any], opset: int = OPSET
) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """A model of one ``SparseAttention`` node, for tests and measurements.

    Args:
        arguments: Of ``uta::sparse_attention``, by position.
        opset: Of the standard operations.

    Returns:
        The model, with inputs as the schema names them and outputs ``output`` and ``lse``; and what
        to feed it.
    """
    tensors, (scale, variance_weight, block_q, block_kv) = list(arguments[:10]), arguments[10:]
    per_block = tensors[5].dim() == 4
    if per_block:
        tensors[5:8] = [x.unsqueeze(2) for x in tensors[5:8]]
    schema = schemas()["SparseAttention"]
    inputs = dict(zip([x.name for x in schema.inputs], tensors, strict=True))
    query, value = tensors[0], tensors[2]
    output = (*query.shape[:3], value.shape[-1])
    make_value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node(
        "SparseAttention", list(inputs), ["output", "lse"], name="attention", domain=DOMAIN,
        scale=scale, variance_weight=variance_weight, block_q=block_q, block_kv=block_kv,
        per_block=int(per_block and tensors[5].shape[3] > 0),
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [make_value(name, ELEMENT_TYPES[x.dtype], x.shape) for name, x in inputs.items()],
        [
            make_value("output", ELEMENT_TYPES[query.dtype], output),
            make_value("lse", onnx.TensorProto.FLOAT, output[:3]),
        ],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        functions=[sparse_attention_function(opset)],
        ir_version=10,
    )
    return model, inputs
