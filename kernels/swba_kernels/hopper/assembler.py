"""Which assembler makes machine code of these kernels: Triton's own `ptxas`, with which they were tuned.

Where two warpgroups share the tensor cores, a few instructions decide how they fall into step, and each release of
ptxas places them differently: the fused backward at head dim 128 takes 14% more cycles when that of CUDA 13.0 assembles
it instead of the 12.8 that comes with Triton 3.6. torch brings a ptxas of its own, and torch.compile, the first time
that it compiles for a GPU, makes all of the process use it (TRITON_PTXAS_PATH). So the speed of these kernels would
depend on what ran before them.

Triton 3.9 comes with two, and takes the newer one for Hopper: 13.4, where its `ptxas` is 12.9. On an H200 most of these
kernels are a little faster with 12.9, the fused backward at head dim 128 by 3%. So `ptxas` is taken there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

Kernel = TypeVar("Kernel")
VARIABLE = "TRITON_PTXAS_PATH"
NEWER = "TRITON_PTXAS_BLACKWELL_PATH"  # for GPUs after Hopper, and in Triton 3.9 for Hopper
TUNED_WITH = "12.8"
_lock = Lock()
_users = 0
_changed: dict[str, tuple[str | None, str | None]] = {}  # while there are users: what variables said, and say now


def is_torchs(path: str | None) -> bool:
    """Tell whether a path to ptxas lies inside of torch: one that torch.compile chose.

    Who wants that one for these kernels, too, says so by `triton.knobs.nvidia.ptxas`, or by a link to it.
    """
    home = Path(torch.__file__).parent
    return path is not None and (home in Path(path).parents or home.resolve() in Path(path).resolve().parents)


def describe() -> str:
    """Say which assembler these kernels get, and with which one they were tuned; RuntimeError if there is none."""
    with tritons_own_assembler():
        version = _for_hopper().version
    return f"ptxas {version}, " + (
        "with which they were tuned" if version == TUNED_WITH else f"they were tuned with {TUNED_WITH}"
    )


@contextmanager
def tritons_own_assembler() -> Iterator[None]:
    """Let Triton use its own `ptxas` for Hopper, if it has one, not torch's nor a newer one. What a user chose stays.

    All of the process gets that assembler meanwhile: one that is older than what it used may refuse a kernel of another
    thread that is just then between PTX and machine code.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _choose()


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and _changed:
            _restore()
            _forget()


def _choose() -> None:
    for variable in (VARIABLE, NEWER):
        if is_torchs(os.environ.get(variable)):
            _change(variable, None)
    try:
        taken = _for_hopper()
    except (ImportError, RuntimeError):  # Triton came without one: torch's is better than none
        _restore()
        return
    if NEWER not in os.environ:
        from triton import knobs

        with suppress(OSError, RuntimeError):  # it came without `ptxas`: what it takes for Hopper stays
            if taken != knobs.nvidia.ptxas:
                _change(NEWER, knobs.nvidia.ptxas.path)
    if _changed:
        _forget()


def _change(variable: str, value: str | None) -> None:
    before, _ = _changed.get(variable, (os.environ.get(variable), None))
    _changed[variable] = before, value
    _put(variable, value)


def _restore() -> None:
    """Take the changes back, but for what somebody else has changed meanwhile."""
    for variable, (before, now) in _changed.items():
        if os.environ.get(variable) == now:
            _put(variable, before)
    _changed.clear()


def _put(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _for_hopper() -> Any:
    """Return the ptxas that Triton would use for Hopper (path and version); RuntimeError if it finds none."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return get_ptxas(90)
    except OSError as error:  # a file that cannot be run
        raise RuntimeError(str(error)) from error


def _forget() -> None:
    """Let Triton ask its assembler again for what it remembers of it.

    Its version is a part of the names under which compiled kernels are kept; features are what PTX may make use of.
    """
    from triton.backends.nvidia.compiler import get_features, get_ptxas_version

    get_ptxas_version.cache_clear()
    get_features.cache_clear()


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
