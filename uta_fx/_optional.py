"""Optional dependencies: loaded when used, and missed in one sentence that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of ``uta-fx`` brings it.

    Args:
        module: Dotted name of the module to import.
        extra: Name of the extra in ``uta-fx``'s metadata that installs it.

    Raises:
        ImportError: The module, or a module that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); install it with: "
            f"pip install 'uta-fx[{extra}]'"
        ) from error
