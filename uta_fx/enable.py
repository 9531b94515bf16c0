"""Put the sparse attention into a diffusers pipeline or a model, in one line, and take it out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from uta_fx.config import Config


def enable(target: Any, config: Config | None = None, **compile_options: Any) -> Any:
    """Compile a pipeline's transformers, or a model, with ``backend="uta"``, in place.

    Pipelines with two, such as Wan 2.2, have one for each part of the noise schedule.

    With ``config.dense_until`` the transformer is compiled twice, dense by Inductor and sparse by
    us, and each step runs the one that its place in the scheduler's noise schedule asks for:
    neither recompiles when they change.

    Args:
        target: A diffusers pipeline with ``transformer`` (and perhaps ``transformer_2``) and
            ``scheduler``, or a module.
        config: Settings; None for the defaults.
        **compile_options: Handed to ``torch.compile`` (``fullgraph``, ``dynamic``, ``mode``).

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is neither.
        ValueError: It is enabled already, or ``dense_until`` is asked for without a scheduler that
            counts its steps (``step_index``; CogVideoX's own schedulers do not).
    """
    config = config or Config()
    models = _models_of(target)
    if any(_is_enabled(model) for model in models):
        raise ValueError("target is enabled already: call uta_fx.disable first")
    if config.dense_until:
        if getattr(target, "scheduler", None) is None:
            raise ValueError(
                f"dense_until={config.dense_until} needs a pipeline with a scheduler, got a"
                f" {type(target).__name__}"
            )
        _check_counts(target.scheduler)
    for model in models:
        model.forward = _Enabled(_compiled(model.forward, target, config, compile_options))
    return target


def _compiled(
    original: Callable[..., Any], target: Any, config: Config, compile_options: dict[str, Any]
) -> Callable[..., Any]:
    """What runs in place of one model's forward."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "dense_until"
    }
    # torch.compile takes mode or options, not both: ours goes with the options
    mode = {"mode": compile_options["mode"]} if "mode" in compile_options else {}
    others = {name: value for name, value in compile_options.items() if name != "mode"}
    sparse = torch.compile(original, backend="uta", options=fields | mode, **others)
    if not config.dense_until:
        return sparse
    dense = torch.compile(original, backend=config.inner, **compile_options)
    return _switch(dense, sparse, target, config.dense_until)


def disable(target: Any) -> Any:
    """Undo ``enable``; a target that is not enabled stays as it is."""
    for model in _models_of(target):
        if _is_enabled(model):
            del model.forward
    return target


def dense_steps(steps: int, dense_until: float) -> int:
    """How many first steps of a schedule run dense: the share ``dense_until``, rounded up."""
    return math.ceil(round(dense_until * steps, 6))


def runs_dense(scheduler: Any, dense_until: float) -> bool:
    """Whether the step that a diffusers scheduler is about to take lies in the dense share.

    The scheduler's own step counter decides, on the host and without a synchronisation: steps that
    a cache skips are counted, calls are not.

    Raises:
        ValueError: The scheduler does not count its steps.
    """
    _check_counts(scheduler)
    step = scheduler.step_index or 0  # None before the first step
    return step < dense_steps(len(scheduler.timesteps), dense_until)


def _check_counts(scheduler: Any) -> None:
    if not hasattr(scheduler, "step_index"):
        raise ValueError(
            "dense_until needs a scheduler that counts its steps (step_index), got a"
            f" {type(scheduler).__name__}"
        )


@dataclasses.dataclass(frozen=True)
class _Enabled:
    """The forward of an enabled model."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def _is_enabled(model: torch.nn.Module) -> bool:
    return isinstance(vars(model).get("forward"), _Enabled)


def _switch(
    dense: Callable[..., Any], sparse: Callable[..., Any], pipeline: Any, dense_until: float
) -> Callable[..., Any]:
    """The pipeline's scheduler decides, whichever it has at the time of a call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        variant = dense if runs_dense(pipeline.scheduler, dense_until) else sparse
        return variant(*args, **kwargs)

    return forward


def _models_of(target: Any) -> list[torch.nn.Module]:
    if isinstance(target, torch.nn.Module):
        return [target]
    found = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    models = [model for model in found if isinstance(model, torch.nn.Module)]
    if not models:
        raise TypeError(
            "target must be a torch.nn.Module or a pipeline with a transformer,"
            f" got {type(target).__name__}"
        )
    return models
