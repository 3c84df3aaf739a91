"""Which assembler makes machine code of these kernels: Triton's own, with which they were tuned.

Where two warpgroups share the tensor cores, a few instructions decide how they fall into step, and each release of
ptxas places them differently: the fused backward at head dim 128 takes 14% more cycles when that of CUDA 13.0 assembles
it instead of the 12.8 that comes with Triton 3.6. torch brings a ptxas of its own, and torch.compile, the first time
that it compiles for a GPU, makes all of the process use it (TRITON_PTXAS_PATH). So the speed of these kernels would
depend on what ran before them.
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
_lock = Lock()
_users = 0
_torchs: str | None = None  # what is set aside while there are users


def is_torchs(path: str | None) -> bool:
    """Tell whether a path to ptxas lies inside of torch: one that torch.compile chose.

    Who wants that one for these kernels, too, says so by `triton.knobs.nvidia.ptxas`, or by a link to it.
    """
    home = Path(torch.__file__).parent
    return path is not None and (home in Path(path).parents or home.resolve() in Path(path).resolve().parents)


def describe() -> str:
    """Say which assembler these kernels get, and with which one they were tuned; RuntimeError if there is none."""
    with tritons_own_assembler():
        version = _version()
    return f"ptxas {version}, " + (
        "with which they were tuned" if version == TUNED_WITH else f"they were tuned with {TUNED_WITH}"
    )


@contextmanager
def tritons_own_assembler() -> Iterator[None]:
    """Let Triton use its own ptxas, if it has one, in place of torch's. What a user chose stays.

    All of the process gets that assembler meanwhile.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _users, _torchs
    with _lock:
        _users += 1
        path = os.environ.get(VARIABLE)
        if _users > 1 or not is_torchs(path):
            return
        del os.environ[VARIABLE]
        try:
            _version()
        except (ImportError, RuntimeError):  # Triton came without one: torch's is better than none
            os.environ[VARIABLE] = str(path)
            return
        _torchs = path
        _forget_version()


def _leave() -> None:
    global _users, _torchs
    with _lock:
        _users -= 1
        if _users == 0 and _torchs is not None:
            os.environ[VARIABLE], _torchs = _torchs, None
            _forget_version()


def _version() -> str:
    """Return the version of the ptxas that Triton would use for Hopper; RuntimeError if it finds none."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return get_ptxas(90).version
    except OSError as error:  # a file that cannot be run
        raise RuntimeError(str(error)) from error


def _forget_version() -> None:
    """Let Triton ask its assembler again: the version is a part of the names under which it keeps compiled kernels."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    get_ptxas_version.cache_clear()


def own_assembler(kernel: Kernel) -> Kernel:
    """Make a jitted kernel be compiled with Triton's own assembler; return the same kernel.

    (Under Triton's AsyncCompileMode it is compiled later, by the assembler that the process then uses.)
    """
    jitted: Any = kernel
    compile_now = getattr(jitted, "_do_compile", None)  # in 3.6, 3.7 and 3.9: called once for each new specialisation
    if compile_now is None:  # Triton's interpreter compiles nothing
        return kernel

    @wraps(compile_now)
    def compile_with_own(*args: Any, **options: Any) -> Any:
        with tritons_own_assembler():
            return compile_now(*args, **options)

    jitted._do_compile = compile_with_own
    return kernel
