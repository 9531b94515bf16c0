"""Optional dependencies: loaded when used, and missed in one sentence that names the extra."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import linecache
import traceback
from collections.abc import Iterator
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


@contextlib.contextmanager
def naming_missing_packages() -> Iterator[None]:
    """While somebody's model runs: a package that it misses is named, with the remedy.

    Raises:
        ImportError: It is not installed.
    """
    try:
        yield
    except (ImportError, NameError) as error:
        package = _missing_package(error)
        if package is None:
            raise
        raise ImportError(
            f"model needs the package {package}, which is not installed; install it with: "
            f"pip install {package}"
        ) from error


def _missing_package(error: ImportError | NameError) -> str | None:
    """The package that an error is about; None where it is about something else.

    Libraries import some only where they are installed (diffusers: torchvision), so that otherwise
    a name is not defined: the code around it says what it would be of.
    """
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        return package if _is_missing(package) else None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    code = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            origin = node.module if isinstance(node, ast.ImportFrom) else alias.name
            package = (origin or "").partition(".")[0]
            known_as = alias.asname or alias.name.partition(".")[0]
            if known_as == error.name and not getattr(node, "level", 0) and _is_missing(package):
                return package
    return None


def _is_missing(package: str) -> bool:
    return bool(package) and importlib.util.find_spec(package) is None
