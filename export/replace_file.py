"""A folder beside a file that is to be written, from which it is renamed when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "uta_fx.lock"


@contextlib.contextmanager
def folder_beside(
    target: Path, tidy: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """A folder on the file system of ``target``, which is removed in the end.

    A process that is killed leaves its folder. The next one for the same target removes it: its
    name and the lock in it say that it is ours, and that nobody holds the lock, that nobody writes
    there any more. Where there are no such locks, it stays.

    Args:
        target: File to write; its folder exists.
        tidy: Called with the folder, or one that was left, before it is removed.
    """
    prefix = f".{target.name}.uta_fx."
    for left in [x for x in target.parent.iterdir() if x.name.startswith(prefix)]:
        with contextlib.suppress(OSError), (left / LOCK).open("r+b") as lock:
            if _take(lock):
                tidy(left)
                shutil.rmtree(left)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as name,
        (Path(name) / f"{LOCK}.new").open("wb") as lock,
    ):
        folder = Path(name)
        if _take(lock):  # nobody finds it before it is held
            os.rename(folder / f"{LOCK}.new", folder / LOCK)
        try:
            yield folder
        finally:
            tidy(folder)


def _take(lock: IO[bytes]) -> bool:
    """Hold the lock of an open file until that is closed, if nobody does and there are locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
