"""The GPU of this machine, as its driver describes it: without PyTorch or Triton."""

from __future__ import annotations

import ctypes


def capability() -> int:
    """Compute capability of the first GPU, such as 90 for 9.0.

    Raises:
        RuntimeError: There is no driver, or it knows no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("there is no CUDA driver") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    error = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    if error:
        raise RuntimeError(f"the CUDA driver answers with error {error}")
    return 10 * major.value + minor.value


def runs(architecture: int, on: int) -> bool:
    """Whether code for an architecture runs on a GPU of a compute capability.

    Code for 8.x runs on a later 8.y; from 9.0 on it uses what one chip alone has.
    """
    return architecture == on or 80 <= architecture < on < 90
