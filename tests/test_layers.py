"""dense_layers in blocks that are compiled one by one and share their code."""

import copy
import gc
import re
import weakref

import accelerate
import pytest
import torch
from test_backend import SMALL, wan, wan_inputs
from torch._dynamo.utils import counters

from uta_fx.backend import uta
from uta_fx.layers import blocks_of
from uta_fx.study.models import MODELS

OPTIONS = SMALL | {"density": 0.3, "grid": (4, 8, 12), "inner": "eager"}
REFUSED = r"dense_layers='0,-1' needs to know which layer runs: .* uta_fx.enable\(.*blocks=True"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def compiled(model, fullgraph=True, **options):
    """The model, its blocks compiled as diffusers does it; the first and the last are dense."""
    options = OPTIONS | {"dense_layers": "0,-1"} | options
    model.compile_repeated_blocks(backend="uta", fullgraph=fullgraph, options=options)
    return model


def run(model):
    """The output of a call."""
    return model(**wan_inputs())[0]


def by_hand(model):
    """The output of a copy of which all blocks but the first and the last are sparse."""
    model = copy.deepcopy(model)
    for block in model.blocks[1:-1]:
        block.compile(backend="uta", fullgraph=True, options=OPTIONS)
    output = run(model)
    torch._dynamo.reset()
    counters.clear()
    return output


def graphs():
    """How many graphs were compiled since ``counters.clear()``."""
    return counters["stats"]["unique_graphs"]


def test_the_named_blocks_are_dense_and_nothing_recompiles():
    """One graph for all blocks, of every model of that class and however many blocks it has."""
    models = [wan(num_layers=layers) for layers in (4, 3)]
    expected = [by_hand(model) for model in models]
    assert not torch.equal(run(models[0]), expected[0])
    for model in models:
        compiled(model)
    run(models[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(run(models[0]), expected[0])
            assert torch.equal(run(models[1]), expected[1])
        copied = compiled(copy.deepcopy(models[0]))
        assert torch.equal(run(copied), expected[0])
    assert graphs() == 1 and not counters["graph_break"]


def test_inductor_compiles_both_variants():
    """In one compilation; as the eager inner backend, but for roundings of other sums."""
    model = wan(num_layers=3)
    expected = by_hand(model)
    compiled(model, inner="inductor")
    torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(model)


def test_blocks_in_a_dict_of_lists_are_counted():
    """Flux 3 has its image's and its condition's so: the first of five stays dense."""
    entry = next(entry for entry in MODELS if entry.name == "Flux 3")
    options = OPTIONS | {"grid": entry.grid, "min_tokens": 48}
    outputs = []
    for dense in (1, 0):
        model = entry.build()
        assert len(blocks_of(model)) == 5
        for block in blocks_of(model)[dense:]:
            block.compile(backend="uta", fullgraph=True, options=options)
        outputs.append(model(**entry.arguments(), return_dict=False)[0])
        torch._dynamo.reset()
    model = entry.build()
    options |= {"dense_layers": "0"}
    model.compile_repeated_blocks(backend="uta", fullgraph=True, options=options)
    outputs.append(model(**entry.arguments(), return_dict=False)[0])
    assert torch.equal(outputs[2], outputs[0]) and not torch.equal(outputs[2], outputs[1])


def test_blocks_that_are_taken_out_are_not_counted():
    """-1 is the last of those that the model has now."""
    model = compiled(wan(num_layers=4))
    run(model)
    model.blocks = model.blocks[:3]
    output = run(model)
    assert torch.equal(output, by_hand(model))


def test_parameters_that_are_replaced_are_followed():
    """As accelerate does with a block that it loads for a call; also in inference mode."""
    model = wan(num_layers=4)
    expected = by_hand(model)
    compiled(model)
    with torch.inference_mode():
        assert torch.equal(run(model), expected)
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.clone())
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_offloading_by_blocks_moves_no_layer(library):
    """Its hooks run around what is compiled or break it: not with fullgraph."""
    model = wan(num_layers=4)
    expected = by_hand(model)
    compiled(model, fullgraph=False)
    if library == "diffusers":
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    else:
        for block in model.blocks:
            weights = {name: x.clone() for name, x in block.state_dict().items()}
            hook = accelerate.hooks.AlignDevicesHook(
                "cpu", offload=True, place_submodules=True, weights_map=weights
            )
            accelerate.hooks.add_hook_to_module(block, hook)
    for _ in range(2):
        assert torch.equal(run(model), expected)


def test_a_model_is_not_kept_alive():
    """Nor do parameters carry a weak reference of ours: PyTorch moves no subclass that has one."""
    references = []
    for options in ({"dense_layers": ""}, {}):
        model = compiled(wan(), **options)
        run(model)
        references.append([len(weakref.getweakrefs(x)) for x in model.parameters()])
        block = weakref.ref(model.blocks[0])
        del model
        gc.collect()
        assert block() is None
        torch._dynamo.reset()
    assert references[0] == references[1]  # Dynamo's own


def block_and_call(model):
    """A block in the middle and how its model calls it."""
    block, seen = model.blocks[1], {}
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    run(model)
    handle.remove()
    return block, lambda: block(*seen["args"], **seen["kwargs"])


def test_a_block_that_no_model_calls_is_refused():
    """When it is compiled, and when it runs what was compiled for another."""
    model = wan()
    _, call = block_and_call(model)
    compiled(model)
    with pytest.raises(Exception, match=REFUSED):
        call()
    run(compiled(wan()))
    with pytest.raises(ValueError, match=REFUSED):
        call()
    run(model)
    call()  # known now


def test_one_block_in_two_places_is_refused():
    """Nothing tells which of them runs."""
    model = wan()
    model.blocks[2] = model.blocks[0]
    with pytest.raises(Exception, match=REFUSED):
        run(compiled(model))


def test_blocks_may_share_some_of_their_parameters():
    """All of them together still say which block it is."""
    model = wan(num_layers=4)
    for block in model.blocks:
        block.attn1.to_q, block.scale_shift_table = (
            model.blocks[0].attn1.to_q,
            model.blocks[0].scale_shift_table,
        )
    expected = by_hand(model)
    assert torch.equal(run(compiled(model)), expected)


def test_layers_that_the_model_does_not_have_are_named():
    """Also by code that was compiled for a model that has them."""
    message = re.escape(
        "dense_layers='3' names blocks that a WanTransformer3DModel does not have: it has 3"
    )
    with pytest.raises(Exception, match=message):
        run(compiled(wan(), dense_layers="3"))
    run(compiled(wan(num_layers=4), dense_layers="3"))
    with pytest.raises(ValueError, match=message):
        run(compiled(wan(), dense_layers="3"))


def test_parameters_that_the_graph_does_not_show_are_refused():
    """As with inline_inbuilt_nn_modules=False, where PyTorch still has it."""

    def hidden(gm, inputs):
        for node in gm.graph.find_nodes(op="placeholder"):
            node.meta.pop("grapharg", None)
        return uta(gm, inputs, options=OPTIONS | {"dense_layers": "0,-1"})

    model = wan()
    model.compile_repeated_blocks(backend=hidden, fullgraph=True)
    with pytest.raises(Exception, match=REFUSED):
        run(model)


def test_which_blocks_stay_dense_is_logged(caplog):
    """By index, once for a compilation."""
    with caplog.at_level("INFO", logger="uta_fx.backend"):
        run(compiled(wan(num_layers=4)))
    assert (
        caplog.text.count("of the 4 blocks of a WanTransformer3DModel these stay dense: 0, 3") == 1
    )
