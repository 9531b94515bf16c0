"""Which block of a model runs, seen from inside of what is compiled for one block by itself.

Alike blocks share their compiled code, and their parameters are inputs of it: whose they are says
which block runs. The model around it is among the modules that are being called.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from uta_fx.config import Config

Compiled = Callable[..., Any]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What diffusers names blocks: the modules in the lists of a model, or of a dict of it."""
    parts = [
        inner
        for part in model.children()
        for inner in (part.values() if isinstance(part, nn.ModuleDict) else (part,))
    ]
    return [block for part in parts if isinstance(part, nn.ModuleList) for block in part]


def check_layers(model: nn.Module, config: Config) -> None:
    """Raise a ValueError where ``dense_layers`` names blocks that the model does not have."""
    number = len(blocks_of(model))
    if not config.dense_layers_fit(number):
        raise ValueError(
            f"dense_layers={config.dense_layers!r} names blocks that a {type(model).__name__} does"
            f" not have: it has {number}"
        )


def parameters_of(gm: GraphModule) -> dict[int, nn.Parameter]:
    """The parameters that a graph from Dynamo is compiled with, by their place in its inputs."""
    nodes = gm.graph.find_nodes(op="placeholder")
    values = [getattr(node.meta.get("grapharg"), "example", None) for node in nodes]
    return {i: value for i, value in enumerate(values) if isinstance(value, nn.Parameter)}


def block_around(parameters: Sequence[nn.Parameter]) -> tuple[nn.Module, nn.Module] | None:
    """The innermost model that is being called and has all parameters in one of its blocks.

    Returns:
        The model and the block; None where there is no such model, or several of its blocks have
        them all.
    """
    if not parameters:
        return None
    wanted = {id(parameter) for parameter in parameters}
    for model in modules_being_called():
        owners = [
            block
            for block in blocks_of(model)
            if wanted <= {id(parameter) for parameter in block.parameters()}
        ]
        if owners:
            return (model, owners[0]) if len(owners) == 1 else None
    return None


def modules_being_called() -> list[nn.Module]:
    """From the innermost outwards.

    Read from the frames of ``Module.__call__`` alone: to look at the locals of a frame keeps what
    they hold until it ends, and here those are the arguments, which it keeps anyway.
    """
    modules = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            modules.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return modules


class BlockByBlock:
    """Decides for compiled code that blocks share whether the block that runs stays dense.

    Keeps no module alive and refers to no parameter, not even weakly: PyTorch does not move a model
    of tensor subclasses that are referred to so.

    Args:
        config: With ``dense_layers``.
        parameters: Places of the parameters among the inputs of the code.
        objection: What is raised for a block of which nothing shows whose it is.
    """

    def __init__(self, config: Config, parameters: Sequence[int], objection: str) -> None:
        self._config, self._parameters, self._objection = config, tuple(parameters), objection
        self._known: dict[tuple[int, ...], _Place] = {}

    def choose(self, dense: Compiled, sparse: Compiled) -> Compiled:
        """Calls one or the other, by the block that the inputs belong to.

        The call takes some microseconds to decide; a millisecond for a block that it sees for the
        first time.

        Raises:
            ValueError: Nothing shows which block of a model it is, or ``dense_layers`` names blocks
                that this model does not have.
        """

        def call(*inputs: Any) -> Any:
            return (dense if self._is_dense(inputs) else sparse)(*inputs)

        return call

    def _is_dense(self, inputs: Sequence[Any]) -> bool:
        parameters = [inputs[place] for place in self._parameters]
        key = tuple(map(id, parameters))
        place = self._known.get(key)
        layer = place and place.layer(parameters[0])
        if layer is None:
            place = self._find(parameters)
            layer = place.layer(parameters[0])
            assert layer is not None
            gone = (None, place.block())
            others = {k: known for k, known in self._known.items() if known.block() not in gone}
            self._known = others | {key: place}
        return self._config.is_dense_layer(*layer)

    def _find(self, parameters: Sequence[nn.Parameter]) -> _Place:
        found = block_around(parameters)
        if found is None:
            raise ValueError(self._objection)
        model, block = found
        check_layers(model, self._config)
        owner, name = next(
            (part, name)
            for part in block.modules()
            for name, parameter in part._parameters.items()
            if parameter is parameters[0]
        )
        return _Place(weakref.ref(model), weakref.ref(block), weakref.ref(owner), name)


class _Place(NamedTuple):
    """A block in its model, known by one of its parameters.

    Attributes:
        model: That holds the block in a list.
        block: Itself.
        owner: Its part that has the parameter.
        name: Of the parameter there.
    """

    model: weakref.ref[nn.Module]
    block: weakref.ref[nn.Module]
    owner: weakref.ref[nn.Module]
    name: str

    def layer(self, parameter: nn.Parameter) -> tuple[int, int] | None:
        """The block's index among the model's and how many these are, as they are now.

        None where the parameter is not the block's any more, or the block not the model's.
        """
        model, block, owner = self.model(), self.block(), self.owner()
        if model is None or owner is None or owner._parameters.get(self.name) is not parameter:
            return None
        blocks = blocks_of(model)
        return (blocks.index(block), len(blocks)) if block in blocks else None
