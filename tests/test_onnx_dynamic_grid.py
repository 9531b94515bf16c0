"""One ONNX file for several grids, none of which it was exported with."""

import itertools
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_dynamic import OPTIONS, SIZES, arguments_of, run
from torch.export import Dim

from uta_fx import Config, export_onnx
from uta_fx.order import COMPUTED_ORDERS, computed_index, token_index
from uta_fx.policies.base import share_of
from uta_fx.study.models import MODELS
from uta_fx.tails import Tail

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("order", COMPUTED_ORDERS)
def test_a_computed_order_is_the_operators(order):
    """Grids with and without ragged tiles, of one frame, with equal sides; both ways."""
    like = torch.empty(0)
    for grid in itertools.product((1, 3, 8), (1, 4, 9), (5, 8, 16)):
        for block, back in itertools.product((16, 64), (False, True)):
            found = computed_index(like, grid, order, block, back)
            assert torch.equal(found, token_index(like, list(grid), order, block, back))


def test_a_share_is_rounded_up_in_whole_numbers():
    assert [share_of(0.1, 30), share_of(0.3, 10), share_of(0.3, 11)] == [3, 3, 4]
    assert [share_of(1e-3, 5), share_of(1.0, 7), share_of(1 / 3, 9)] == [1, 7, 3]


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "video"),
    [
        ({}, dict.fromkeys((2, 3, 4), Dim.DYNAMIC)),
        (
            {"policy": "topk", "tail": Tail(kind="first_order", fit=8), "exact_frames": 2},
            {2: Dim("t", max=32), 3: 2 * Dim("h", max=32), 4: 2 * Dim("w", max=32)},
        ),
    ],
)
def test_one_file_serves_every_grid(tmp_path, settings, video):
    """Ragged and whole blocks; the allowance is that of the files of one grid."""
    entry = next(entry for entry in MODELS if entry.name == "Wan")
    model, path = entry.build(), tmp_path / "model.onnx"
    kwargs = arguments_of(entry, SIZES[0]) | {"return_dict": False}
    shapes = dict.fromkeys(kwargs) | {"hidden_states": video}
    options = {**OPTIONS, **settings, "density": 0.3}
    config = Config(**options)
    export_onnx(model, (), path, config=config, kwargs=kwargs, dynamic_shapes=shapes)
    written = onnx.load(path)
    if find_spec("triton") is not None:
        from uta_fx.export.onnxruntime_plugin import variants_of

        variants = {name: len(x) for name, x in variants_of(written, 90).items()}
        assert variants.pop("BlockScores", None) == (None if settings else 1)
        # ragged blocks and whole ones
        served = {"SelectCounted": 1, "ListBlocks": 1, "FitTail": 1}
        assert variants == {"SparseAttention": 2, **served}
    metadata = {x.key: x.value for x in written.metadata_props}
    sides = [site["grid"] for site in json.loads(metadata["uta_fx.sites"]) if site["sparse"]]
    assert sides and all(isinstance(side, str) for grid in sides for side in grid)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (*SIZES[1:], (4, 8, 16)):
        arguments = arguments_of(entry, size)
        (output,) = session.run(None, {name: x.numpy() for name, x in arguments.items()})
        ((expected,),), _ = run(
            model, entry, [size], dynamic=False, options=options | {"inner": "eager"}
        )
        expected = expected.numpy()
        assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)
