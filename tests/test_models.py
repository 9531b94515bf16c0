"""Every video transformer of diffusers: its attention found, rewritten and unharmed."""

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections import Counter

import diffusers
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import uta_fx
from uta_fx.attention import SparseSite
from uta_fx.backend import plan_of, sparsify
from uta_fx.explain import FULL_CAPTURE, explain
from uta_fx.export.program import sparsify_program
from uta_fx.passes.reorder_tokens import GatherTokens
from uta_fx.passes.sparsify import rewrite, understand
from uta_fx.study.models import MODELS, MORE, OTHERS, SMALL


def flat(output):
    """All tensors of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for part in output for x in flat(part)] if isinstance(output, (list, tuple)) else []


def run_variants(model, arguments, config):
    """Trace once, run dense, at density 1, and sparse with tokens reordered around each site.

    Returns:
        The four outputs, the last as ``config`` has it; its sites; its graphs.
    """
    sites, rewritten, variant = [], [], 0

    def backend(gm, inputs):
        exact, local, sparse = (copy.deepcopy(gm) for _ in range(3))
        sparsify(exact, inputs, dataclasses.replace(config, density=1.0))
        plan = dataclasses.replace(plan_of(config), token_index=None)
        rewrite(local, understand(local, plan), plan)
        sites.extend(sparsify(sparse, inputs, config))
        rewritten.append(sparse.graph)
        graphs = [gm, exact, local, sparse]
        return lambda *args: graphs[variant](*args)

    outputs = []
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        compiled = torch.compile(model, backend=backend, dynamic=False)
        for variant in range(4):  # noqa: B007 (read by the compiled graphs)
            outputs.append(flat(compiled(**arguments(), return_dict=False)))
    return outputs, sites, rewritten


# between whose layers no token is gathered
WITHOUT_GATHERS = {
    "Wan", "Wan 2.2 TI2V, a time for each token", "Wan I2V", "Wan VACE", "HunyuanVideo",
    "CogVideoX 2B", "CogVideoX 5B", "CogVideoX I2V", "CogVideoX 1.5", "LTX-Video", "LTX-2", "Mochi",
}  # fmt: skip
# what needs the model's order in between, or why each site reorders its own
NOT_ONCE = {
    "Wan Animate": "in parts: unflatten in face_adapter.0 needs the model's order",
    "HunyuanVideo I2V, token replace": "in parts: getitem in transformer_blocks.0 needs",
    "HunyuanVideo Framepack": "here: getitem in transformer_blocks.0.attn needs the model's order",
}


def gathers_of_layers(graph):
    """Gathers of tokens from the first sparse site on to the last."""
    nodes = list(graph.nodes)
    sites = [i for i, node in enumerate(nodes) if isinstance(node.target, SparseSite)]
    layers = nodes[sites[0] : sites[-1] + 1] if sites else []
    return [
        node
        for node in layers
        if isinstance(node.target, GatherTokens)
        or (isinstance(node.target, SparseSite) and not node.target.in_order)
    ]


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_every_attention_of_a_model_is_found_and_rewritten_without_harm(entry):
    """Sites by kind as the architecture has them; density 1 is the dense model, 0.3 is not.

    Tokens are reordered once for the whole graph, which changes nothing, or a known reason says
    why not.

    The allowance: the same sums in another order, 1e-7 of the largest output for each of the some
    ten roundings in a row between two attentions of a small model.
    """
    try:
        model = entry.build()
    except ImportError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(SMALL, density=0.3, grid=entry.grid)
    (dense, exact, local, sparse), sites, graphs = run_variants(model, entry.arguments, config)
    assert Counter(site.kind for site in sites) == entry.sites(model.config)
    for a, b in [*zip(dense, exact, strict=True), *zip(local, sparse, strict=True)]:
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(a.abs().max()))
    for site in sites:
        reordered = NOT_ONCE.get(entry.name, "once") if site.sparse else ""
        assert (site.reordered or "").startswith(reordered), site.reordered
    if entry.name in WITHOUT_GATHERS:
        assert not any(gathers_of_layers(graph) for graph in graphs)
    changed = any(not torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))
    assert changed == any(site.sparse for site in sites)
    for site in sites:
        short = isinstance(site.shape[-2], int) and site.shape[-2] < SMALL.min_tokens
        if site.kind != "cross" and not short:
            assert site.sparse != bool(entry.dense), site.reason
            assert site.sparse or site.reason.startswith(entry.dense), site.reason


@pytest.mark.parametrize(
    ("name", "sites", "before"),
    [
        ("Wan", 2, 3), ("HunyuanVideo", 4, 4), ("CogVideoX 5B", 2, 3), ("LTX-Video", 2, 2),
        ("Mochi", 6, 2),
    ],
)  # fmt: skip
def test_no_gather_is_left_between_the_layers_that_a_compiler_sees(name, sites, before):
    """Of the operators that a model is traced into: some before its attention, one behind.

    Mochi selects the tokens of its text, whose number only a run knows.
    """
    entry, graphs = next(entry for entry in MODELS if entry.name == name), []

    def compile_inner(gm, inputs):
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    look = f"look at {name}"
    torch._dynamo.register_backend(aot_autograd(fw_compiler=compile_inner), name=look)
    options = {"min_tokens": 48, "block_q": 16, "block_kv": 16, "inner": look}
    with torch.no_grad():
        compiled = torch.compile(entry.build(), backend="uta", fullgraph=True, options=options)
        compiled(**entry.arguments())
    (graph,) = graphs
    nodes = list(graph.graph.nodes)
    ours = [i for i, node in enumerate(nodes) if str(node.target).startswith("uta.block")]
    gathers = [
        i
        for i, node in enumerate(nodes)
        if re.search(r"\.(index|gather|take)", str(node.target))
        and all(isinstance(size, int) for size in node.meta["val"].shape)
    ]
    assert len(ours) == sites * 3
    assert [sum(i < ours[0] for i in gathers), sum(i > ours[-1] for i in gathers)] == [before, 1]
    assert len(gathers) == before + 1


def wider(arguments):
    """The arguments of a video of twice the width."""
    changed = dict(arguments)
    along = -1 if arguments["hidden_states"].dim() == 5 else 1
    changed["hidden_states"] = torch.cat([arguments["hidden_states"]] * 2, along)
    if "width" in arguments:
        changed["width"] = 2 * arguments["width"]
    if "image_rotary_emb" in arguments:
        changed["image_rotary_emb"] = tuple(
            torch.cat([table] * 2) for table in arguments["image_rotary_emb"]
        )
    return changed


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "reordered"),
    [("Wan", "once"), ("HunyuanVideo", "once"), ("CogVideoX 5B", "once"), ("LTX-Video", "once"),
     ("Cosmos", "once"), ("Latte", "once"), ("AnyFlow FAR", None)],
)  # fmt: skip
def test_core_aten_of_a_model_has_the_sites_of_its_program(name, reordered):
    """Kinds, and where tokens are reordered; density 1 is the dense model.

    FlexAttention stays an operation there, of which a view counts on the strides.
    """
    (entry,) = (x for x in MODELS if x.name == name)
    model, inputs = entry.build(), entry.arguments() | {"return_dict": False}
    program = torch.export.export(model, (), inputs, strict=False)
    plan = plan_of(dataclasses.replace(SMALL, grid=entry.grid, density=1.0))
    _, sites = sparsify_program(program, plan)
    sparse, found = sparsify_program(program.run_decompositions(), plan)
    assert [(x.name, x.kind, x.sparse, x.reordered) for x in found] == [
        (x.name, x.kind, x.sparse, x.reordered) for x in sites
    ]
    assert {x.reordered for x in found if x.sparse} == {reordered}
    for a, b in zip(flat(model(**inputs)), flat(sparse.module()(**inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(a.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "CogVideoX 5B", "LTX-Video", "LTX-2"])
def test_another_size_is_one_graph_more_and_as_sparse(name, dynamic):
    """Though Dynamo then has symbols where it had numbers; and it is right."""
    entry = next(entry for entry in MODELS if entry.name == name)
    model, compiled_sites = entry.build(), []

    def backend(gm, inputs):
        config = dataclasses.replace(SMALL, density=1.0)
        compiled_sites.append([x for x in sparsify(gm, inputs, config) if x.expected])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    first = entry.arguments()
    for arguments, graphs in ((first, 1), (wider(first), 2), (first, 2)):
        dense = flat(model(**arguments, return_dict=False))
        for a, b in zip(dense, flat(compiled(**arguments, return_dict=False)), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=2e-6 * float(a.abs().max()))
        assert len(compiled_sites) == graphs
    for sites, grid in zip(compiled_sites, ((4, 6, 8), (4, 6, 16)), strict=True):
        assert {(x.sparse, x.grid, x.reordered) for x in sites} == {(True, grid, "once")}


def test_every_video_transformer_of_diffusers_is_there():
    """By the names of its classes; few have no 3D in them, and are listed too."""
    names = {name for name in dir(diffusers) if re.search(r"Transformer.*3DModel$", name)}
    assert len(names) >= 30
    assert names <= {entry.class_name for entry in MODELS}


def test_every_other_class_that_takes_frames_is_there_or_named():
    """By the code of its forward; the decoder of LTX-2.5 is among the VAEs."""
    found = set()
    for folder in ("transformers", "unets", "controlnets", "latent_upscaler"):
        package = importlib.import_module(f"diffusers.models.{folder}")
        for part in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if "flax" in part.name:
                continue
            for name, value in vars(importlib.import_module(part.name)).items():
                ours = inspect.isclass(value) and issubclass(value, diffusers.ModelMixin)
                if ours and hasattr(diffusers, name) and value.__module__ == part.name:
                    if re.search(r"\bnum_frames\b", inspect.getsource(value.forward)):
                        found.add(name)
    known = {entry.class_name for entry in (*MODELS, *OTHERS)}
    # images that may have a frame; music; what docs/models.md says in words
    left = {"HunyuanImageTransformer2DModel", "MiniMaxMusic3ConditionEncoder"}
    assert len(found & known) >= 20
    assert {name for name in found - known if name not in MORE} <= left


def test_a_model_with_convolutions_has_the_sites_that_it_has():
    """Those inside a frame become sparse, those across few frames do not."""
    entry = next(entry for entry in OTHERS if entry.class_name == "SparseControlNetModel")
    sites = entry.explain().sites
    assert Counter(site.kind for site in sites) == entry.sites(None)
    for site in sites:
        inside = site.kind == "self" and site.length_kv >= SMALL.min_tokens
        assert site.sparse == inside, site.reason


def test_a_repeated_block_by_itself_is_sparse_with_a_given_grid():
    """HunyuanVideo 1.5, whose whole graph breaks where it asks whether there is an image."""
    entry = next(entry for entry in MODELS if entry.name == "HunyuanVideo 1.5")
    model, found = entry.build(), []
    with torch.no_grad():
        dense = model(**entry.arguments(), return_dict=False)[0]

    def backend(gm, inputs):
        config = dataclasses.replace(SMALL, density=1.0, grid=entry.grid)
        found.extend(sparsify(gm, inputs, config))
        return gm.forward

    for block in model.transformer_blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        output = model(**entry.arguments(), return_dict=False)[0]
    assert [(site.kind, site.sparse) for site in found] == [("joint", True)]
    assert found[0].reordered == "once"
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-6 * float(dense.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Helios", "HunyuanVideo Framepack", "JoyImage Edit Plus"])
def test_blocks_are_told_where_the_video_lies_beside_history_and_references(name, caplog):
    """What they do not show; density 1 is the model itself."""
    entry = next(entry for entry in MODELS if entry.name == name)
    model = entry.build()
    dense = model(**entry.arguments(), return_dict=False)[0]
    config = dataclasses.replace(SMALL, density=1.0, inner="eager")
    uta_fx.enable(model, config, blocks=True)
    with caplog.at_level("INFO", logger="uta_fx"):
        output = model(**entry.arguments(), return_dict=False)[0]
    found = [message for message in caplog.messages if "(joint, " in message]
    assert found and all(": sparse, joint attention" in message for message in found)
    assert not any("(self, " in message for message in caplog.messages)
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-6 * float(dense.abs().max()))


@pytest.mark.parametrize(("layers", "noted"), [("0,3", False), ("4", True)])
def test_dense_layers_count_joint_layers_and_no_text_refiners(layers, noted):
    """HunyuanVideo: four joint layers, and a refiner of the text that is none."""
    entry = next(entry for entry in MODELS if entry.name == "HunyuanVideo")
    config = dataclasses.replace(SMALL, dense_layers=layers)
    found = explain(entry.build(), config=config, **entry.arguments())
    joint = [site for site in found.sites if site.kind == "joint"]
    assert [site.layer for site in joint] == [0, 1, 2, 3]
    assert [site.sparse for site in joint] == ([True] * 4 if noted else [False, True, True, False])
    assert bool(found.notes) == noted
