"""Exports of models that are handed objects, or read numbers from tensors."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from uta_fx import Config, export_onnx
from uta_fx.export import branches
from uta_fx.study.models import GRID, MODELS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, feeds):
    """Outputs by name; feeds may hold more than the file takes."""
    session = session_of(path)
    taken = {x.name: np.asarray(feeds[x.name]) for x in session.get_inputs()}
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(None, taken), strict=True))


class Slot:
    """One tensor, or none yet."""

    __slots__ = ("tensor",)


class Memory:
    """Tensors in a list, a dict and a slot, one of them twice, a number and a module."""

    def __init__(self, *tensors):
        self.parts = list(tensors[:1])
        self.named = {"last": tensors[1], "again": tensors[1]} if tensors else {}
        self.slot, self.factor, self.module = Slot(), 3.0, nn.Linear(5, 5)


class Remembers(nn.Module):
    """Reads all that is there, writes into one tensor and puts another in the place of one."""

    def forward(self, x, memory):
        for part in (*memory.parts, *memory.named.values()):
            x = x + memory.factor * part
        if memory.parts:
            memory.parts[0][1:] = 2 * x[1:]
        memory.slot.tensor, memory.returned = x * x, x
        return x


def test_tensors_of_an_object_are_inputs_and_what_is_left_in_it_is_output(tmp_path):
    """Also what is written in place, and a tensor at two places once; the object stays as it is."""
    x, a, b = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    memory, path = Memory(a.clone(), b.clone()), tmp_path / "model.onnx"
    found = export_onnx(Remembers().eval(), (x, memory), path)
    feeds = {"x": x + 1, "memory_parts_0": a - 1, "memory_named_last": 2 * b}
    outputs = run(path, {name: value.numpy() for name, value in feeds.items()})
    given = Memory(*(x.clone() for x in (a - 1, 2 * b)))
    expected = {
        "output": Remembers()(x + 1, given),
        "memory_parts_0_after": given.parts[0],
        "memory_slot_tensor": given.slot.tensor,
        "memory_returned": given.returned,
    }
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-6, atol=1e-6)
    assert any("memory_slot_tensor" in note for note in found.notes)
    assert torch.equal(memory.parts[0], a) and not hasattr(memory.slot, "tensor")


def test_an_object_without_tensors_is_no_input(tmp_path):
    """As a cache is before its first call."""
    path = tmp_path / "model.onnx"
    export_onnx(Remembers().eval(), (torch.ones(4),), path, kwargs={"memory": Memory()})
    assert [x.name for x in session_of(path).get_inputs()] == ["x"]
    outputs = run(path, {"x": np.full(4, 3.0, np.float32)})
    np.testing.assert_array_equal(outputs["output"], np.full(4, 3.0))  # an input as it is
    np.testing.assert_array_equal(outputs["memory_slot_tensor"], np.full(4, 9.0))


class Caches(nn.Module):
    """Reads a dict and a list, puts other tensors into both, writes to one and to an argument."""

    def forward(self, x, named, parts):
        out = x + named["last"] + sum(parts)
        named["last"], named["new"] = 2 * x, x
        parts.append(out)
        parts[0].mul_(3)
        x.add_(1)
        return out


def test_what_is_left_in_containers_and_arguments_is_output(tmp_path):
    """As the call in PyTorch leaves it, which the export does not do to what it is given."""
    x, a, b = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    path = tmp_path / "model.onnx"
    given = x.clone(), {"last": a.clone()}, [b.clone()]
    found = export_onnx(Caches().eval(), given, path)
    assert torch.equal(given[0], x) and torch.equal(given[2][0], b)
    assert given[1].keys() == {"last"} and len(given[2]) == 1
    feeds = {"x": x - 1, "named_last": 2 * a, "parts_0": b + 1}
    outputs = run(path, {name: value.numpy() for name, value in feeds.items()})
    x, named, parts = feeds["x"], {"last": feeds["named_last"]}, [feeds["parts_0"]]
    expected = {"output": Caches()(x, named, parts), "x_after": x}
    expected |= {"named_last_after": named["last"], "named_new": named["new"]}
    expected |= {"parts_0_after": parts[0], "parts_1": parts[1]}
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-6, atol=1e-6)
    assert any("named_last, named_new" in note for note in found.notes)


class Difference(nn.Module):
    """Of what comes of one argument and another."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(x) - 2 * y


def test_one_tensor_for_two_arguments_is_two_inputs(tmp_path):
    """So is a weight of the model."""
    model, path = Difference().eval(), tmp_path / "model.onnx"
    x, y = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for example in ((x, x), (x, model.linear.weight)):
        export_onnx(model, example, path)
        outputs = run(path, {"x": x.numpy(), "y": y.numpy()})
        expected = model(x, y).detach()
        np.testing.assert_allclose(outputs["output"], expected, rtol=1e-5, atol=1e-6)


class Keeps(nn.Module):
    """Reads and writes a buffer, or writes to it alone, or keeps a tensor and a number."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls, self.previous = how, 0, {}
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x):
        out = 2 * x
        if self.how == "buffer":
            out = out + self.kept
        if self.how == "attributes":
            self.calls, self.previous["x"] = self.calls + 1, x
        else:
            self.kept.copy_(x)
        return out


def test_a_model_that_reads_what_its_last_call_wrote_is_refused(tmp_path):
    """By its buffer; what is written alone is lost, and what is no buffer is noted."""
    path, x = tmp_path / "model.onnx", torch.ones(4)
    with pytest.raises(ValueError, match=r"model must not keep .* that writes its buffer kept:"):
        export_onnx(Keeps("buffer").eval(), (x,), path)
    assert not path.exists()
    found = export_onnx(Keeps("written").eval(), (x,), path)
    assert found.notes == () and list(run(path, {"x": x.numpy()})) == ["output"]
    model = Keeps("attributes").eval()
    (note,) = export_onnx(model, (x,), path).notes
    assert "the model sets calls, previous['x'] as it runs: every run of the file starts" in note
    assert (model.calls, model.previous) == (0, {})


class Asks(nn.Module):
    """Counts and notes its calls, and asks for a value."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(self.seen))
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize("large", [1 << 20, 8, 2])
def test_finding_out_how_a_model_decides_leaves_it_as_it_was(tmp_path, monkeypatch, large):
    """Though it is run for that, also where its tensors, and its buffer, are large."""
    monkeypatch.setattr(branches, "LARGE", large)
    model = Asks().eval()
    export_onnx(model, (torch.ones(4),), tmp_path / "model.onnx", decide_branches=True)
    assert model.calls == 0 and model.seen == []


def test_a_part_that_drops_out_is_refused(tmp_path):
    """The model is in eval mode, and one of its parts is not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.25))).eval()
    model[1][0].train()
    with pytest.raises(ValueError, match=r"in all its parts .* 1\.0 drops out .* with p=0\.25"):
        export_onnx(model, (torch.ones(4, 4),), tmp_path / "model.onnx")
    model[1][0].p = 0.0
    export_onnx(model, (torch.ones(4, 4),), tmp_path / "model.onnx")


class Stubborn:
    """Nobody copies it."""

    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


def test_an_object_that_cannot_be_copied_is_refused(tmp_path):
    """By the name of the argument."""
    with pytest.raises(ValueError, match="memory must be tensors, containers of them or an object"):
        export_onnx(Remembers().eval(), (torch.ones(4), Stubborn()), tmp_path / "model.onnx")


class Sized(nn.Module):
    """Reads sizes from tensors, one as a list and one as an index, to split an axis by them."""

    def forward(self, x, sizes, first):
        if sizes.sum() > 0:
            x = x + 1
        height, width = sizes.tolist()
        x = x.view(height, width)
        return x[int(first) :].softmax(0) if height * width > 2 else x


def test_numbers_that_a_trace_needs_are_those_of_the_inputs(tmp_path):
    """The file answers NaN to others; without being told so there is none."""
    model, path = Sized().eval(), tmp_path / "model.onnx"
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([3, 4]), torch.tensor(1))
    with pytest.raises(ValueError, match="no size read from one, unless decide_branches=True"):
        export_onnx(model, inputs, path)
    found = export_onnx(model, inputs, path, decide_branches=True)
    assert any("height, width = sizes.tolist()" in x and "[3, 4]" in x for x in found.notes)
    feeds = {"x": x.numpy(), "sizes": np.array([3, 4]), "first": np.array(1)}
    np.testing.assert_allclose(run(path, feeds)["output"], model(*inputs), rtol=1e-6)
    for other in ({"sizes": np.array([4, 3])}, {"first": np.array(2)}):
        assert np.isnan(run(path, feeds | other)["output"]).all()


class Counted(nn.Module):
    """A number that may stay open, and a branch that may not."""

    def forward(self, x, mask):
        x = x + 1 if x.sum() > 0 else x
        return x * mask.sum().item()


def test_numbers_that_a_trace_does_not_need_stay_open(tmp_path):
    """Though branches are decided."""
    path, x = tmp_path / "model.onnx", torch.ones(4)
    found = export_onnx(Counted().eval(), (x, torch.tensor([1, 1, 0])), path, decide_branches=True)
    assert len([note for note in found.notes if note.startswith("decided")]) == 1
    outputs = run(path, {"x": x.numpy(), "mask": np.array([1, 1, 1])})
    np.testing.assert_array_equal(outputs["output"], np.full(4, 6.0))


def arrays(arguments):
    """By the names of a file's inputs."""
    named = {}
    for name, value in arguments.items():
        parts = {f"{name}_0": value[0]} if isinstance(value, list) else {name: value}
        named |= {key: x.numpy() for key, x in parts.items() if torch.is_tensor(x)}
    return named


@torch.no_grad()
def test_wan_animate_2_generates_from_the_cache_of_its_reference_file(tmp_path):
    """Two files, each with a sparse node in every layer: what one leaves is what the other takes.

    At density 1 they are the model. At 0.3 the reference file is not.
    """
    pytest.importorskip("diffusers")
    reference, generation = (x for x in MODELS if x.name.startswith("Wan Animate 2"))
    model, first, second = generation.build(), reference.arguments(), generation.arguments()
    paths, found = [tmp_path / "reference.onnx", tmp_path / "generation.onnx"], []
    for path, arguments in zip(paths, (first, second), strict=True):
        config = Config(density=1.0, min_tokens=48, block_q=16, block_kv=16)
        kwargs = {**arguments, "return_dict": False}
        found.append(
            export_onnx(model, (), path, config=config, kwargs=kwargs, decide_branches=True)
        )
        nodes = [x for x in onnx.load(path).graph.node if x.op_type == "SparseAttention"]
        assert len(nodes) == model.config.num_layers
    sparse = [[(site.kind, site.grid) for site in x.sites if site.sparse] for x in found]
    assert sparse == [[("self", GRID)] * 2, [("unknown", None)] * 2]
    cache, random = first["kv_cache"], copy.deepcopy(second["kv_cache"])
    expected = [model(**first, return_dict=False)[0][0]]
    second["kv_cache"] = cache
    expected.append(model(**second, return_dict=False)[0][0])
    left = run(paths[0], arrays(first))
    outputs = [left["output"], run(paths[1], arrays(second) | left)["output"]]
    for output, tensor in zip(outputs, expected, strict=True):
        assert np.linalg.norm(output - tensor.numpy()) <= 1e-5 * tensor.norm()
    for index, layer in enumerate(cache.layer_caches):
        key = left[f"kv_cache_layer_caches_{index}_key"]
        np.testing.assert_allclose(key, layer.key, rtol=1e-4, atol=1e-5)
    assert not torch.equal(random.layer_caches[0].key, cache.layer_caches[0].key)
    other = arrays(second) | left | {"reference_grid_sizes": np.array([[4, 8, 6]])}
    assert np.isnan(run(paths[1], other)["output"]).all()
