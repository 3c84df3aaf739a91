"""compute-sanitizer's memcheck finds nothing in small calls of the Hopper kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitized import CALLS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_no_access_outside_of_an_allocation(call, head_dim) -> None:
    command = [sys.executable, str(Path(__file__).with_name("sanitized.py")), call, str(head_dim)]
    done = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", *command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ran {call} {head_dim}" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-4000:]
