"""Which assembler makes machine code of these kernels: Triton's own, with which they were tuned.

Where two warpgroups share the tensor cores, the order of a few instructions decides how they fall into step, and each
release of ptxas orders them in its own way: the fused backward at head dim 128 takes 14% more cycles when that of
CUDA 13.0 assembles it instead of the 12.8 that comes with Triton 3.6. torch brings a ptxas of its own, and
torch.compile, the first time that it compiles for a GPU, makes all of the process use it (TRITON_PTXAS_PATH). So the
speed of these kernels would depend on what ran before them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

Kernel = TypeVar("Kernel")
VARIABLE = "TRITON_PTXAS_PATH"  # Triton 3.9 reads it for older GPUs only: torch's choice does not reach Hopper there
TUNED_WITH = "12.8"
_LOCK = Lock()


def is_torchs(path: str | None) -> bool:
    """Tell whether a path to ptxas is one inside of torch, which torch.compile chose, and no user."""
    return path is not None and Path(torch.__file__).resolve().parent in Path(path).resolve().parents


def describe() -> str:
    """Say which assembler these kernels get, and with which one they were tuned. Needs Triton."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tritons_own_assembler():
        found = get_ptxas(90)
    tuned = "with which they were tuned" if found.version == TUNED_WITH else f"they were tuned with {TUNED_WITH}"
    return f"ptxas {found.version}, {tuned}"


@contextmanager
def tritons_own_assembler() -> Iterator[None]:
    """Let Triton use its own ptxas in place of torch's. What a user chose, by the variable or by a knob, stays."""
    with _LOCK:
        path = os.environ.get(VARIABLE)
        if not is_torchs(path):
            yield
            return
        del os.environ[VARIABLE]
        try:
            yield
        finally:
            os.environ[VARIABLE] = str(path)


def own_assembler(kernel: Kernel) -> Kernel:
    """Make a jitted kernel be compiled with Triton's own assembler; return the same kernel.

    For as long as it is being compiled, all of the process gets that assembler.
    """
    jitted: Any = kernel
    compile_now = jitted._do_compile  # the same in 3.6, 3.7 and 3.9: called once for each new specialisation

    @wraps(compile_now)
    def compile_with_own(*args: Any, **options: Any) -> Any:
        with tritons_own_assembler():
            return compile_now(*args, **options)

    jitted._do_compile = compile_with_own
    return kernel
