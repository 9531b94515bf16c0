"""Run Triton kernels in its interpreter where there is no GPU, and skip what needs one."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped, with that reason, on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No compiled code survives a test."""
    yield
    torch._dynamo.reset()
