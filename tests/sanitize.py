"""Every operator on small inputs, for a tool that watches memory.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Names of operators choose among them. Nothing is compared here; the tests do that.
"""

import sys

import test_fitting
import torch
from cases import SCORED, Case, score_inputs, with_mask

import uta_fx
from uta_fx.kernels import ops

DIMS = (64, 128)  # those of the kernels for Hopper
LENGTHS = (64, 300, 520)


def attention(*, tails=("none", "block"), dtype=torch.bfloat16):
    """Arguments of ``uta::sparse_attention``, on the GPU."""
    for dim in DIMS:
        for length in LENGTHS:
            for tail in tails:
                case = Case(
                    batch=1,
                    heads=2,
                    length_q=length,
                    length_kv=length,
                    dim=dim,
                    dim_v=dim,
                    block_q=64,
                    tail=tail,
                    dtype=dtype,
                )
                yield [x.cuda() if torch.is_tensor(x) else x for x in case.inputs()]


def masked():
    for args in attention():
        ops.block_masked_attention(*with_mask(args))


def listed():
    for args in attention():
        ops.sparse_attention(*args)


def plain():
    """Triton's kernels, which other GPUs have: representatives of bins and float32 take them."""
    for args in attention(tails=("row",)):
        ops.sparse_attention(*args)
    for args in attention(dtype=torch.float32):
        ops.sparse_attention(*args)


def statistics():
    for _, key, value, *_ in attention(tails=("none",)):
        ops.block_statistics(key, value, 64)


def scores():
    for dtype, dim, length, blocks, *options in SCORED.values():
        tensors = [x.cuda() for x in score_inputs(1, 2, length, blocks, dim, dtype)]
        ops.block_scores(*tensors, dim**-0.5, *options)


def selection():
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((1, 1), (9, 9), (40, 300)):
            values = torch.rand(1, 2, rows, columns, device="cuda").to(dtype)
            mask = ops.select_blocks(values, (rows * columns + 3) // 4 * 2, 2 * rows)
            ops.select_blocks(values, (columns + 1) // 2, 1)
            ops.list_blocks(mask)


def fits():
    for dim in DIMS:
        for length in LENGTHS:
            for dtype in (torch.bfloat16, torch.float32):
                case = test_fitting.Case(length_q=length, length_kv=length, dim=dim, dim_v=dim)
                ops.fitted_tail(*case.inputs(dtype, "cuda"))


def whole_calls():
    """What lies between the others: scores are weighed, tokens gathered, text is joined."""
    for dim in DIMS:
        query, key, value = torch.randn(3, 1, 2, 487, dim, device="cuda", dtype=torch.bfloat16)
        for text in ((7, 0), (3, 4)):
            uta_fx.sparse_attention(query, key, value, grid=(4, 12, 10), text=text)
        index = torch.randperm(487, device="cuda")
        ops.gather_tokens(query, index, 2)


def operators_of_their_own():
    """Clusters of keys, and attention that is rectified."""
    query, key, value = torch.randn(3, 1, 2, 480, 64, device="cuda", dtype=torch.bfloat16)
    for options in ({"policy": "svg2"}, {"tail": "rectified", "policy": "topk"}):
        config = uta_fx.Config(density=0.4, **options)
        uta_fx.sparse_attention(query, key, value, grid=(4, 12, 10), config=config)


CASES = {
    case.__name__: case
    for case in (
        masked,
        listed,
        plain,
        statistics,
        scores,
        selection,
        fits,
        whole_calls,
        operators_of_their_own,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        CASES[name]()
        torch.cuda.synchronize()
        print(name, "ran")
