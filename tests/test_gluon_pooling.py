"""Scores and statistics of blocks by the kernels for Hopper."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from test_gluon import needs_hopper, on_hopper
from test_triton import (
    DEVICE,
    ScoresCase,
    assert_scores_are_accurate,
    assert_statistics_are_accurate,
    poisoned,
    statistics_inputs,
)

from uta_fx.kernels import gluon_scores, gluon_statistics, triton_scores, triton_statistics

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from uta_fx.kernels import gluon_scores, gluon_statistics
from uta_fx.kernels.gluon_attention import MAP_LAYOUT

dim = int(sys.argv[2])
tile = f"tensordesc<bf16[1, 1, 64, {dim}],{MAP_LAYOUT!r}>"
if sys.argv[1] in ("scores", "half"):
    module, function = gluon_scores, gluon_scores._scores_kernel
    weight, power = (0.0, 0.5) if sys.argv[1] == "half" else (0.3, 1.0)
    constants = module.score_options(dim, weight, power, 64, 2)
    types = {"q_ptr": "*bf16", "scores_ptr": "*bf16", "mean_desc": tile, "var_desc": tile}
    types |= {"scale": "fp32", "scale_log2": "fp32", "half_weight_log2": "fp32"}
else:
    module, function = gluon_statistics, gluon_statistics._statistics_kernel
    constants = module.statistics_options(dim)
    types = {"k_desc": tile, "v_desc": tile}
    types |= dict.fromkeys(("k_mean_ptr", "k_var_ptr", "v_mean_ptr"), "*bf16")
options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
names = function.arg_names
types = dict.fromkeys((x for x in names if x.endswith("_ptr")), "*fp32") | types
signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
kernel = triton.compile(
    GluonASTSource(function, signature, constants),
    target=GPUTarget("cuda", 90, 32),
    options=options,
)
assert kernel.metadata.shared <= 227 * 1024, kernel.metadata.shared
assert kernel.asm["ptx"].count("wgmma.mma_async") >= 4
"""


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["scores", "half", "statistics"])
def test_it_compiles_for_hopper_without_one(kernel, dim, tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = [sys.executable, "-c", COMPILE, kernel, str(dim)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_only_what_it_serves_is_taken():
    x = torch.zeros(1, 2, 128, 128, dtype=torch.float16, device=DEVICE)
    plain = {"variance_power": 1.0, "block_q": 64, "rows": 2}

    def takes(query=x, mean=x, **change):
        return gluon_scores.takes(query, mean, mean, **(plain | change))

    assert takes() == takes(x[..., :64], x[..., :64]) == takes(rows=16) == on_hopper()
    assert takes(variance_power=0.5) == on_hopper()
    assert not takes(x.float()) and not takes(x[..., :32], x[..., :32])
    assert not takes(variance_power=0.75)
    assert not takes(mean=x[:, :1].expand(x.shape))

    assert gluon_statistics.takes(x, x, 64) == on_hopper()
    assert not gluon_statistics.takes(x, x, 32) and not gluon_statistics.takes(x, x[..., :64], 64)
    assert not gluon_statistics.takes(x.float(), x.float(), 64)
    assert not gluon_statistics.takes(x, x[:, :1].expand(x.shape), 64)


CASE = ScoresCase(dim=128, length_q=700, blocks=77, block_q=64, variance_weight=0.0)
CASES = {
    "everything": CASE,
    "half_power": dataclasses.replace(CASE, power=0.5),
    "variance_in_the_mass": dataclasses.replace(CASE, variance_weight=0.7),
    "half_power_with_it": dataclasses.replace(CASE, variance_weight=0.7, power=0.5),
    "one_token": dataclasses.replace(CASE, length_q=1, blocks=1),
    "whole_tiles": dataclasses.replace(CASE, length_q=1024, blocks=128),
    "the_second_half_is_empty": dataclasses.replace(CASE, length_q=250, blocks=64),
    "single_rows": dataclasses.replace(CASE, rows=1),
    "many_rows": dataclasses.replace(CASE, rows=16),
    "small_blocks": dataclasses.replace(CASE, block_q=16),
    "large_blocks": dataclasses.replace(CASE, block_q=128),
    "the_ring_runs_round": dataclasses.replace(CASE, blocks=1000),
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dim", [64, 128])
def test_scores_are_as_accurate_as_their_parts(dim, case, dtype):
    args = dataclasses.replace(case, dim=dim).inputs(dtype)
    assert gluon_scores.takes(*args[:3], *args[6:])
    assert_scores_are_accurate(args)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 64, 700, 4096])
@pytest.mark.parametrize("dim", [64, 128])
def test_statistics_err_by_their_roundings(dim, length, dtype):
    key, value = statistics_inputs(length, dim, dim, dtype)
    assert gluon_statistics.takes(key, value, 64)
    assert_statistics_are_accurate(key, value, 64)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dim", [64, 128])
def test_strided_and_poisoned_inputs_give_the_same_bits(dim):
    def placed(x):
        """Heads after tokens in memory, NaN after the last token."""
        wide = x.new_full((x.shape[0], x.shape[2] + 64, x.shape[1], dim), torch.nan)
        view = wide[:, : x.shape[2]].movedim(1, 2)
        return view.copy_(x)

    args = dataclasses.replace(CASE, dim=dim).inputs(torch.bfloat16)
    expected = triton_scores.block_scores(*args)
    args[:3], args[3] = [placed(x) for x in args[:3]], poisoned(args[3])
    assert gluon_scores.takes(*args[:3], *args[6:])
    assert torch.equal(triton_scores.block_scores(*args), expected)

    key, value = statistics_inputs(700, dim, dim, torch.bfloat16)
    expected = triton_statistics.block_statistics(key, value, 64)
    key, value = placed(key), placed(value)
    assert gluon_statistics.takes(key, value, 64)
    for got, want in zip(triton_statistics.block_statistics(key, value, 64), expected, strict=True):
        assert torch.equal(got, want)
