"""Every video transformer of diffusers: its attention found, rewritten and unharmed."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch

from uta_fx.backend import sparsify
from uta_fx.explain import FULL_CAPTURE, explain
from uta_fx.study.models import MODELS, SMALL


def flat(output):
    """All tensors of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for part in output for x in flat(part)] if isinstance(output, (list, tuple)) else []


def run_variants(model, arguments, configs):
    """Trace once, run dense and as each configuration rewrites it.

    Returns:
        The outputs, dense first, and the sites of the last configuration.
    """
    sites, variant = [], 0

    def backend(gm, inputs):
        graphs = [gm]
        for config in configs:
            graphs.append(copy.deepcopy(gm))
            found = sparsify(graphs[-1], inputs, config)
        sites.extend(found)
        return lambda *args: graphs[variant](*args)

    outputs = []
    with torch.no_grad(), torch._dynamo.config.patch(FULL_CAPTURE):
        compiled = torch.compile(model, backend=backend, dynamic=False)
        for variant in range(len(configs) + 1):  # noqa: B007 (read by the compiled graphs)
            outputs.append(flat(compiled(**arguments(), return_dict=False)))
    return outputs, sites


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_every_attention_of_a_model_is_found_and_rewritten_without_harm(entry):
    """Sites by kind as the architecture has them; density 1 is the dense model, 0.3 is not.

    The allowance: the same sums in another order, 1e-7 of the largest output for each of the some
    ten roundings in a row between two attentions of a small model.
    """
    try:
        model = entry.build()
    except ImportError as error:
        pytest.skip(str(error))
    configs = [dataclasses.replace(SMALL, density=d, grid=entry.grid) for d in (1.0, 0.3)]
    (dense, exact, sparse), sites = run_variants(model, entry.arguments, configs)
    assert Counter(site.kind for site in sites) == entry.sites(model.config)
    for a, b in zip(dense, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(a.abs().max()))
    changed = any(not torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))
    assert changed == any(site.sparse for site in sites)
    for site in sites:
        short = isinstance(site.shape[-2], int) and site.shape[-2] < SMALL.min_tokens
        if site.kind != "cross" and not short:
            assert site.sparse != bool(entry.dense), site.reason
            assert site.sparse or site.reason.startswith(entry.dense), site.reason


def test_a_repeated_block_by_itself_is_sparse_with_a_given_grid():
    """HunyuanVideo 1.5: its whole graph does not prove the mask harmless, that of a block does."""
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
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-6 * float(dense.abs().max()))


def test_a_mask_that_is_trusted_makes_a_whole_model_sparse():
    """HunyuanVideo 1.5, whose text is sorted by what a run finds valid."""
    entry = next(entry for entry in MODELS if entry.name == "HunyuanVideo 1.5")
    model = entry.build()
    configs = [
        dataclasses.replace(SMALL, density=d, grid=entry.grid, trust_masks=True) for d in (1.0, 0.3)
    ]
    (dense, exact, sparse), sites = run_variants(model, entry.arguments, configs)
    assert [site.sparse for site in sites if site.kind == "joint"] == [True, True]
    torch.testing.assert_close(exact[0], dense[0], rtol=0, atol=2e-6 * float(dense[0].abs().max()))
    assert not torch.equal(sparse[0], dense[0])


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
