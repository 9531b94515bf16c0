"""Put the sparse attention into a diffusers pipeline or a model, in one line, and take it out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from uta_fx.backend import records_cuda_graphs
from uta_fx.config import Config
from uta_fx.hooks import hooks_inside, innermost_forward
from uta_fx.layers import blocks_of, check_layers
from uta_fx.surroundings import with_surroundings

Forward = Callable[..., Any]


def enable(
    target: Any,
    config: Config | None = None,
    *,
    blocks: bool = False,
    warmup: bool = False,
    **compile_options: Any,
) -> Any:
    """Compile a pipeline's transformers, or a model, with ``backend="uta"``, in place.

    Pipelines with two, such as Wan 2.2, have one for each part of the noise schedule.

    With ``config.dense_until`` the transformer is compiled twice, dense by Inductor and sparse by
    us, and each step runs the one that its place in the scheduler's noise schedule asks for:
    neither recompiles when they change.

    What is compiled runs under the hooks that accelerate and diffusers put around a model, so
    ``enable_model_cpu_offload`` may come before or after. Hooks inside it (group offloading, the
    caches of diffusers, layerwise casting) would break the graph: those on whole blocks work with
    ``blocks``, others are refused.

    Args:
        target: A diffusers pipeline with ``transformer`` (and perhaps ``transformer_2``) and
            ``scheduler``, or a module.
        config: Settings; None for the defaults.
        blocks: Compile the model's blocks, each by itself, in place of the whole model. Alike
            blocks share their code. A block does not show its grid, where the video lies beside
            history or reference images, nor that its mask hides text alone: without
            ``config.grid`` the first call of each size traces the whole model for these, which
            takes seconds. ``config.dense_layers`` counts blocks.
        warmup: The first call runs the dense and the sparse variant, so that both are compiled
            before the generation goes on; without it the sparse one is compiled by the first sparse
            step. Needs ``config.dense_until``.
        **compile_options: Handed to ``torch.compile`` (``fullgraph``, ``dynamic``, ``mode``). Under
            a mode with CUDA graphs, outputs are copies: they live on when the next call comes.

    Returns:
        ``target``. A copy of it (``copy.deepcopy``, ``pickle``) is not enabled.

    Raises:
        TypeError: ``target`` is neither, or a text encoder, a VAE or scripted; ``config`` is no
            ``Config``; ``compile_options`` has a ``backend`` or ``options``, what torch.compile
            does not know, or a value of another type.
        ValueError: The target is enabled or compiled already; it has hooks inside; ``mode`` is none
            of Inductor's, or ``config.inner`` is another compiler; ``blocks`` for a model that has
            none; ``dense_until`` without a schedule that can be followed, ``warmup`` without
            ``dense_until``. The next call refuses a hook that is put inside later, and ``blocks``
            without a grid where the model shows none.
    """
    config = Config.of(config)
    _check_options(compile_options, config)
    models = _models_of(target)
    for model in models:
        _check_model(model)
    if config.dense_until:
        _check_schedule(target)
    elif warmup:
        raise ValueError("warmup=True needs config.dense_until: without it there is one variant")
    if blocks and getattr(config.selection_policy(), "keep", False):
        raise ValueError(
            "blocks=True needs a policy with keep=False: alike blocks share their code, and would"
            " share what it keeps from call to call"
        )
    parts = [_blocks_of(model, config) if blocks else [model] for model in models]
    for part in (part for several in parts for part in several):
        _check_hooks(part)
    for model, several in zip(models, parts, strict=True):
        # the graph of a block counts from 0: which block it is must be known here
        common = dataclasses.replace(config, dense_layers="") if blocks else config
        reader = _Reader(model, common) if blocks and config.grid is None else None
        for index, part in enumerate(several):
            original, own = _original(part)
            if blocks and config.is_dense_layer(index, len(several)):
                forward = _dense(original, config, compile_options)
            elif reader is None:
                forward = _compiled(original, target, common, warmup, compile_options)
            else:
                make = functools.partial(
                    _compiled, original, target, warmup=warmup, compile_options=compile_options
                )
                forward = reader.of_block(make)
            _install(part, _Enabled(part, original, forward, own))
        if reader is not None:
            original, own = _original(model)
            _install(model, _Enabled(None, original, reader.of_model(original), own))
    return target


def disable(target: Any) -> Any:
    """Undo ``enable``; a target that is not enabled stays as it is."""
    for model in _models_of(target):
        for part in model.modules():
            space, name = innermost_forward(part)
            enabled = space.get(name)
            if not isinstance(enabled, _Enabled):
                continue
            if enabled.own and space is vars(part) and name == "forward":
                del space[name]
            else:
                space[name] = enabled.original
    return target


def dense_steps(steps: int, dense_until: float) -> int:
    """How many first steps of a schedule run dense: the share ``dense_until``, rounded up."""
    return math.ceil(round(dense_until * steps, 6))


def runs_dense(pipeline: Any, dense_until: float) -> bool:
    """Whether the step that a diffusers pipeline is about to take lies in the dense share.

    Steps are counted, calls are not: neither guidance in two calls nor a cache that leaves some
    out makes the count drift.

    Raises:
        ValueError: The pipeline does not say where in its schedule it is.
    """
    return step_of(pipeline) < dense_steps(len(pipeline.scheduler.timesteps), dense_until)


def step_of(pipeline: Any) -> int:
    """The step that a diffusers pipeline is about to take, from 0, found on the host.

    The scheduler's own counter says it. Schedulers that have none (CogVideoX's) leave it to the
    pipeline's ``current_timestep``: as a rule that is a view of one element of the scheduler's
    ``timesteps``, whose place shows without waiting for the device.

    Raises:
        ValueError: Neither says it.
    """
    scheduler = pipeline.scheduler
    if hasattr(scheduler, "step_index"):
        if scheduler.step_index is not None:
            return int(scheduler.step_index)
        return int(getattr(scheduler, "begin_index", None) or 0)  # before the first step
    _check_schedule(pipeline)
    timestep, timesteps = getattr(pipeline, "current_timestep", None), scheduler.timesteps
    if timestep is None:  # before the first step
        return 0
    if isinstance(timestep, torch.Tensor) and _share_storage(timestep, timesteps):
        return (timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    places = (timesteps == timestep).nonzero()
    if len(places) == 0:
        raise ValueError(
            f"dense_until: the pipeline's current_timestep {float(timestep)} is none of its"
            " scheduler's timesteps"
        )
    return int(places[0])


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _Enabled:
    """The forward of what is compiled, or reads for what is; in a trace the one that was there.

    Attributes:
        original: The forward that it takes the place of.
        own: Whether that is the forward of the part's class.
    """

    def __init__(
        self, compiled: nn.Module | None, original: Forward, forward: Forward, own: bool
    ) -> None:
        functools.update_wrapper(self, original)  # some pipelines look at the signature
        self.original, self.own = original, own
        self._compiled, self._forward = compiled, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        if self._compiled is not None:
            _check_hooks(self._compiled)
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has the forward that was there: ours would run the first one's."""
        return _itself, (self.original,)


def _itself(thing: Any) -> Any:
    return thing


class _Reader:
    """Tells the blocks of a model what they do not show, for each size of its inputs.

    Args:
        model: That holds them.
        config: Settings without a grid.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._model, self._config = model, config
        self._known: dict[Any, Config] = {}
        self._current = config

    def of_model(self, original: Forward) -> Forward:
        """What runs in place of the model's forward: reads, and runs it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            sizes = tuple(x.shape if isinstance(x, torch.Tensor) else type(x) for x in leaves)
            numbers = tuple(x for x in leaves if isinstance(x, int))
            if (sizes, numbers) not in self._known:
                _check_visible(self._model)
                whole = _with_own_code(original, "whole", _copied)
                self._known[sizes, numbers] = with_surroundings(self._config, whole, args, kwargs)
            self._current = self._known[sizes, numbers]
            return original(*args, **kwargs)

        return forward

    def of_block(self, make: Callable[..., Forward]) -> Forward:
        """What runs in place of a block's forward: what ``make`` makes of the settings."""
        made: dict[Config, Forward] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._current not in made:
                made[self._current] = make(config=self._current)
            return made[self._current](*args, **kwargs)

        return forward


def _original(part: nn.Module) -> tuple[Forward, bool]:
    """The forward under all hooks, and whether it is that of the part's class."""
    space, name = innermost_forward(part)
    original = space.get(name, part.forward)
    return original, getattr(original, "__func__", None) is type(part).forward


def _install(part: nn.Module, enabled: _Enabled) -> None:
    space, name = innermost_forward(part)
    space[name] = enabled


def _compiled(
    original: Forward, target: Any, config: Config, warmup: bool, compile_options: dict[str, Any]
) -> Forward:
    """What runs in place of one forward."""
    sparse = _sparse(original, config, compile_options)
    if not config.dense_until:
        return sparse
    dense = _dense(original, config, compile_options)
    cold = warmup

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal cold
        # the pipeline's scheduler decides, whichever it has at the time of a call
        variant, other = (dense, sparse)[:: 1 if runs_dense(target, config.dense_until) else -1]
        if cold:
            cold = False
            other(*args, **kwargs)
        return variant(*args, **kwargs)

    return forward


def _dense(original: Forward, config: Config, compile_options: dict[str, Any]) -> Forward:
    forward = _with_own_code(original, "dense")
    compiled = torch.compile(forward, backend=config.inner, **compile_options)
    return _keeps_outputs(_takes_one_sample(compiled), compile_options)


def _sparse(original: Forward, config: Config, compile_options: dict[str, Any]) -> Forward:
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "dense_until"
    }
    # torch.compile takes mode or options, not both: ours goes with the options
    mode = {"mode": compile_options["mode"]} if "mode" in compile_options else {}
    others = {name: value for name, value in compile_options.items() if name != "mode"}
    forward = _with_own_code(original, "sparse")
    compiled = torch.compile(forward, backend="uta", options=fields | mode, **others)
    return _keeps_outputs(_takes_one_sample(compiled), compile_options)


def _takes_one_sample(compiled: Forward) -> Forward:
    """The same, compiled once for a batch of one, whatever its stride.

    It has none by which anything is found, but Dynamo compares it: the first block of CogVideoX is
    given a part of a longer sequence, all others what the one before has made.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*map(_as_made, args), **{key: _as_made(x) for key, x in kwargs.items()})

    return forward


def _as_made(x: Any) -> Any:
    """A tensor that is a contiguous batch of one, with the stride that PyTorch makes it with."""
    plain = type(x) is torch.Tensor and not vars(x)  # no marks of a user's for Dynamo either
    if not plain or x.shape[:1] != (1,) or not x.is_contiguous():
        return x
    own = (max(x.numel(), 1), *x.stride()[1:])
    return x if x.stride() == own else x.as_strided(x.shape, own)


def _keeps_outputs(compiled: Forward, compile_options: dict[str, Any]) -> Forward:
    """The same, with outputs that outlive the next call.

    Those of a CUDA graph do not, and a pipeline that guides in two calls needs both; so does a
    block that follows another of the same code.
    """
    if "mode" not in compile_options or not records_cuda_graphs(compile_options["mode"]):
        return compiled

    def forward(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, compiled(*args, **kwargs))

    return forward


def _copied(function: types.FunctionType, variant: str) -> types.FunctionType:
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{variant}")
    copy = types.FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_shared_copy = functools.cache(_copied)


def _with_own_code(forward: Forward, variant: str, copied: Forward = _shared_copy) -> Forward:
    """The same method with code of its own, as a rule one piece for each variant.

    Dynamo counts recompilations by piece of code, and gives up at its ``recompile_limit``: two
    variants of one piece would get there in half the time.
    """
    if not isinstance(forward, types.MethodType) or not isinstance(
        forward.__func__, types.FunctionType
    ):
        return forward
    return types.MethodType(copied(forward.__func__, variant), forward.__self__)


def _models_of(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    models = [model for model in found if isinstance(model, nn.Module)]
    if not models:
        parts = getattr(target, "components", {})
        modules = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        raise TypeError(
            "target must be a torch.nn.Module or a pipeline with a transformer,"
            f" got {type(target).__name__}"
            + (f", which has {', '.join(modules)}" if modules else "")
        )
    return models


def _blocks_of(model: nn.Module, config: Config) -> list[nn.Module]:
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"blocks=True needs a model with a list of blocks, got a {_name(model)}")
    check_layers(model, config)
    return blocks


def _check_options(compile_options: dict[str, Any], config: Config) -> None:
    """Raise where torch.compile would, here or when it is called later."""
    own = ("model", "backend", "options")
    valid = [name for name in inspect.signature(torch.compile).parameters if name not in own]
    for name, value in compile_options.items():
        if name in own:
            raise TypeError(f"{name} is uta_fx.enable's own: settings are fields of config")
        if name not in valid:
            raise TypeError(
                f"{name} is no option of uta_fx.enable: settings are fields of config, and those"
                f" of torch.compile are {', '.join(valid)}"
            )
        kind, expected = _OPTIONS.get(name, (object, ""))
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {expected}, got {value!r}")
    mode = compile_options.get("mode")
    if mode is not None:
        from torch._inductor import list_mode_options

        modes = list(list_mode_options())
        if mode not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
        if config.inner != "inductor":
            raise ValueError(f"mode={mode!r} needs inner='inductor', got inner={config.inner!r}")
    torch.compile(_itself, backend="eager", **compile_options)  # some exclude each other


_OPTIONS: dict[str, tuple[Any, str]] = {
    "fullgraph": (bool, "True or False"),
    "dynamic": (bool | None, "True, False or None"),
    "mode": (str | None, "a name or None"),
    "name": (str | None, "a name or None"),
    "disable": (bool, "True or False"),
    "recompile_limit": (int | None, "an int or None"),
    "isolate_recompiles": (bool, "True or False"),
}
"""Those of torch.compile whose types are known."""


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"target must be a module in Python, got a scripted one, {_name(model)}: torch.compile"
            " does not trace it"
        )
    for library, kind in _OTHER_MODELS.items():
        if any(base.__module__.startswith(library) for base in type(model).__mro__):
            raise TypeError(
                f"target must be a video transformer or its pipeline, got {kind}, {_name(model)}"
            )
    for part in model.modules():
        space, name = innermost_forward(part)
        forward = space.get(name)
        if isinstance(forward, _Enabled):
            raise ValueError("target is enabled already: call uta_fx.disable first")
        compiled = (
            part._compiled_call_impl is not None
            or isinstance(part, torch._dynamo.OptimizedModule)
            or hasattr(forward, "_torchdynamo_orig_callable")
        )
        if compiled:
            raise ValueError(
                f"target is compiled already (torch.compile on a {_name(part)}): pass it as it was"
                " before, uta_fx.enable compiles it"
            )


_OTHER_MODELS = {
    "transformers.": "a text encoder",
    "diffusers.models.autoencoders.": "a VAE",
}


def _check_hooks(part: nn.Module) -> None:
    hooks = hooks_inside(part)
    if hooks:
        raise ValueError(
            f"hooks inside a {_name(part)} ({', '.join(hooks)}) would break its compiled graph:"
            " hooks around a whole model (enable_model_cpu_offload) work, and around its blocks"
            " (group offloading by blocks, FirstBlockCache) with uta_fx.enable(..., blocks=True)"
        )


def _check_visible(model: nn.Module) -> None:
    hooks = hooks_inside(model)
    if hooks:
        raise ValueError(
            f"blocks=True needs config.grid: hooks inside a {_name(model)} ({', '.join(hooks)})"
            " hide how its tokens lie"
        )


def _check_schedule(pipeline: Any) -> None:
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        raise ValueError(f"dense_until needs a pipeline with a scheduler, got a {_name(pipeline)}")
    if not hasattr(scheduler, "step_index") and not (
        hasattr(type(pipeline), "current_timestep") or hasattr(pipeline, "current_timestep")
    ):
        raise ValueError(
            "dense_until needs a scheduler that counts its steps (step_index) or a pipeline that"
            f" shows its current_timestep, got a {_name(scheduler)} in a {_name(pipeline)}"
        )


def _name(thing: Any) -> str:
    return type(thing).__name__
