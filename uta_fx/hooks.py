"""What other libraries hang around and into a model: hooks for offloading, caching and casting.

accelerate and diffusers put a function of theirs in the place of ``module.forward`` and keep what
was there. Whatever should run under all of them belongs where the innermost one keeps it: there it
survives that hooks come and go, as they do at the end of every generation with
``enable_model_cpu_offload``.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def innermost_forward(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where the forward that runs under all hooks of a module is kept.

    Returns:
        A namespace and a name in it. The name is absent where the module has no hooks and nothing
        else took the place of its class's ``forward``.
    """
    space, name = vars(module), "forward"
    references = list(getattr(space.get("_diffusers_hook"), "_fn_refs", ()))
    while isinstance(wrapper := space.get(name), functools.partial):
        library = wrapper.func.__module__.partition(".")[0]
        if library == "accelerate":
            space, name = vars(module), "_old_forward"
        elif library == "diffusers" and references:
            reference = references.pop()  # the last hook is the outermost
            space = vars(reference)
            name = "forward" if reference.original_forward is None else "original_forward"
        else:
            break
    return space, name


def hooks_inside(module: nn.Module) -> list[str]:
    """Names of the hooks on the parts of a module, sorted; its own do not count.

    Takes a quarter of a millisecond for a thousand parts.
    """
    found = set()
    waiting = list(module._modules.values())
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        attributes = vars(part)
        if "_hf_hook" in attributes:
            found.add(type(attributes["_hf_hook"]).__name__)
        if "_diffusers_hook" in attributes:
            found.update(attributes["_diffusers_hook"].hooks)
        waiting.extend(part._modules.values())
    return sorted(found)
