"""Every policy in every token order it has, with every tail in every order, as a file."""

import dataclasses

import pytest
import torch
from torch import nn

from uta_fx import Config
from uta_fx.attention import SparseSite
from uta_fx.backend import plan_of
from uta_fx.export.program import sparsify_program
from uta_fx.order import ORDERS
from uta_fx.policies import BUDGETS, BY_NAME, SVG2, SlidingTile
from uta_fx.tails import KINDS, Tail

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from uta_fx.export.clusters import spell_out_clusters  # noqa: E402  # need onnx
from uta_fx.export.onnx_model import write_onnx  # noqa: E402
from uta_fx.export.tensorrt_model import standard_dialect  # noqa: E402
from uta_fx.export.tensorrt_program import spell_out  # noqa: E402

GRID = (5, 6, 9)  # in blocks of 64 and of 16 the last is ragged
SMALL = {"density": 0.3, "min_tokens": 64, "block_q": 64, "block_kv": 16, "grid": GRID}
POLICIES = {
    **BY_NAME,
    "sliding_tile": SlidingTile(tile=(2, 3, 3), windows=((1, 1, 1), (3, 1, 1))),  # fits the grid
    "svg2": SVG2(iterations=2),  # each iteration is nodes of its own
}
TAILS = (*KINDS, Tail(kind="gaussian", fit=0))
FOR_TENSORRT = (
    "low_delta", "radial", "sliding_tile", "spatial_temporal", "window", "rectified",
)  # fmt: skip
"""One that scores blocks, and all that ask operators of constants."""
REFUSED = {("svg2", "rectified"): "tail rectified has no meaning with policy svg2"}


def settings_of(name):
    """Of one policy: each of its orders with another tail and budget; other policies, others.

    In every second order a first frame is exact.

    Tails go round twice as fast as orders: over all policies each meets each.
    """
    policy, first = POLICIES[name], list(POLICIES).index(name)
    for turn, order in enumerate(x for x in ORDERS if x != "auto"):
        if order in getattr(policy, "orders", ORDERS):
            tail, budget = TAILS[(first + 2 * turn) % len(TAILS)], BUDGETS[(first + turn) % 3]
            yield {
                "policy": policy, "tail": tail, "reorder": order, "budget": budget,
                "exact_frames": turn % 2, **SMALL,
            }  # fmt: skip


def test_each_tail_meets_each_order():
    settings = [x for name in POLICIES for x in settings_of(name)]
    met = {(x["tail"], x["reorder"]) for x in settings}
    assert met == {(tail, order) for tail in TAILS for order in ORDERS[1:]}


class Attends(nn.Module):
    """As many attentions to one video as there are settings."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        self.to_qkv = nn.Linear(32, 96)

    def operands(self, x):
        """Of two heads of 16 channels."""
        parts = self.to_qkv(4 * x).chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (2, 16)).transpose(1, 2) for part in parts)

    def forward(self, x):
        query, key, value = self.operands(x)
        attend = nn.functional.scaled_dot_product_attention
        return tuple(attend(query, key, value) for _ in range(self.count))


def for_onnx_runtime(program, found, path):
    """As ``export_onnx`` writes it."""
    write_onnx(spell_out_clusters(program), found, path, opset=18, metadata={})


def for_tensorrt(program, found, path):
    """As ``export_tensorrt(form="standard")`` writes it."""
    program = spell_out(program, plugins=False)
    write_onnx(program, found, path, opset=18, metadata={}, dialect=standard_dialect())


@pytest.mark.parametrize(
    ("name", "write"),
    [(name, for_onnx_runtime) for name in POLICIES]
    + [(name, for_tensorrt) for name in FOR_TENSORRT],
)
@torch.no_grad()
def test_a_file_computes_what_the_sites_do_or_the_settings_are_refused(tmp_path, name, write):
    """All sites of a policy in one graph; float32 differs by the order of sums alone.

    So by what roundings do: one of every number of the operands is drawn, and how far it moves the
    output of a site, fourfold, is what all roundings on the way may.
    """
    configs = []
    for settings in settings_of(name):
        if message := REFUSED.get((name, settings["tail"])):
            with pytest.raises(ValueError, match=message):
                Config(**settings)
        else:
            configs.append(Config(**settings))
    torch.manual_seed(0)
    model, x = Attends(len(configs)).eval(), torch.randn(1, 270, 32)
    sites = [SparseSite(config, GRID, None) for config in configs]
    waiting = iter(sites)
    plan = dataclasses.replace(
        plan_of(Config(reorder="none", **SMALL)), replacement=lambda *_: next(waiting)
    )
    program, found = sparsify_program(torch.export.export(model, (x,)), plan)
    assert [site.sparse for site in found] == [True] * len(configs)
    path = tmp_path / "model.onnx"
    write(program, found, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"x": x.numpy()})
    operands, generator = model.operands(x), torch.Generator().manual_seed(0)
    off = [2 * torch.rand(y.shape, generator=generator) - 1 for y in operands]
    eps = torch.finfo(torch.float32).eps
    rounded = [torch.addcmul(y, y, by, value=eps) for y, by in zip(operands, off, strict=True)]
    for site, output, dense in zip(sites, outputs, model(x), strict=True):
        expected = site(*operands)
        moved = (site(*rounded) - expected).norm()
        error = (torch.from_numpy(output) - expected).norm()
        assert error <= 4 * moved, site.config
        assert (expected - dense).norm() >= 0.1 * dense.norm()  # there is a tail to speak of
