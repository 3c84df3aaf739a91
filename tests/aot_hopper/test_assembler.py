"""The Hopper kernels are assembled by Triton's own ptxas even after torch.compile chose torch's for the process."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from aot import compile_launches
from hopper_launches import stream, train
from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from swba_infer import doctor
from swba_infer.bench.shapes import select
from swba_kernels import hopper
from swba_kernels.hopper import assembler
from swba_kernels.hopper.assembler import VARIABLE, describe, is_torchs, tritons_own_assembler

pytestmark = pytest.mark.gluon

TORCHS = str(Path(torch.__file__).parent / "bin" / "ptxas")


def jitted() -> list[JITFunction]:
    """Return all jitted functions of the Hopper modules."""
    modules = [importlib.import_module(f"{hopper.__name__}.{x.name}") for x in pkgutil.iter_modules(hopper.__path__)]
    return list({id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}.values())


def entries() -> list[JITFunction]:
    """Return those that the host launches: the others are inlined and not compiled on their own."""
    return [kernel for kernel in jitted() if "_do_compile" in vars(kernel)]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget compiled kernels and the version of the assembler: a new process knows neither."""
    get_ptxas_version.cache_clear()
    for kernel in jitted():
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))


def stub(path: Path) -> str:
    """Write an assembler that says that it is of CUDA 13.0, and assembles nothing."""
    path.write_text('#!/bin/sh\ntest "$1" = --version && echo "release 13.0, V13.0.88" && exit 0\nexit 3\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Choose an assembler that assembles nothing, for kernels that nobody compiled before, and take it for torch's."""
    path = stub(tmp_path / "ptxas")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, path)
    monkeypatch.setattr(assembler, "is_torchs", lambda chosen: chosen == path)
    forget(monkeypatch)
    yield path
    get_ptxas_version.cache_clear()


def test_only_a_path_inside_of_torch_is_torchs(tmp_path: Path) -> None:
    assert is_torchs(TORCHS)
    assert not is_torchs(None)
    assert not is_torchs(str(tmp_path / "ptxas"))
    assert not is_torchs(str(Path(torch.__file__).parent) + "-other/ptxas")
    (tmp_path / "link").symlink_to(Path(torch.__file__).parent)
    assert is_torchs(str(tmp_path / "link" / "bin" / "ptxas"))


def test_the_doctor_names_the_assembler_that_is_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = describe()
    assert os.environ[VARIABLE] == broken
    monkeypatch.delenv(VARIABLE)
    assert named.startswith(f"ptxas {get_ptxas(90).version}, ")
    assert get_ptxas(90).version != "13.0"


def test_no_kernel_of_another_assembler_is_taken_from_the_disk(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if get_ptxas(90).path != broken:
        pytest.skip(f"triton {triton.__version__} does not read {VARIABLE} for Hopper")
    shape = select("decode-b1-h16-d64-bs64-ws32")[0]
    assert "13.0" in get_ptxas_version(90)  # as if torch.compile had compiled something before
    compile_launches(lambda: stream(shape))
    assert "13.0" in get_ptxas_version(90)
    monkeypatch.setenv(VARIABLE, stub(tmp_path / "another"))
    forget(monkeypatch)
    with pytest.raises(PTXASError):
        compile_launches(lambda: stream(shape))


def test_where_triton_has_none_torchs_stays(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(assembler, "_version", missing)
    with tritons_own_assembler():
        assert os.environ[VARIABLE] == broken
    assert os.environ[VARIABLE] == broken
    with pytest.raises(RuntimeError, match="Cannot find"):
        describe()
    assert "kernels cannot be built: Cannot find ptxas" in next(x for x in doctor.report() if x.startswith("hopper"))


def test_two_at_once_set_it_aside_until_both_are_through(broken: str) -> None:
    with tritons_own_assembler():
        with tritons_own_assembler():
            assert VARIABLE not in os.environ
        assert VARIABLE not in os.environ
    assert os.environ[VARIABLE] == broken


def test_the_choice_of_torch_is_set_aside_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCHS)
    with tritons_own_assembler():
        assert VARIABLE not in os.environ
    assert os.environ[VARIABLE] == TORCHS
    with pytest.raises(KeyError), tritons_own_assembler():
        raise KeyError
    assert os.environ[VARIABLE] == TORCHS


def test_the_choice_of_a_user_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with tritons_own_assembler():
        assert os.environ[VARIABLE] == str(tmp_path)
    monkeypatch.delenv(VARIABLE)
    with tritons_own_assembler():
        assert VARIABLE not in os.environ
    assert VARIABLE not in os.environ


def test_no_kernel_is_assembled_by_another_one(broken: str) -> None:
    launched = set()
    for name in ("train-b1-h12-d128-bs1560-ws6-n32760", "train-b4-h16-d64-bs256", "train-b1-h6-d64-bs48"):
        launched |= {kernel for kernel, _ in compile_launches(lambda name=name: train(select(name)[0]))}
    for name in ("decode-b1-h12-d128-bs1560-ws21", "decode-b1-h16-d64-bs64-ws32"):
        launched |= {kernel for kernel, _ in compile_launches(lambda name=name: stream(select(name)[0]))}
    assert launched == {kernel.fn.__name__ for kernel in entries()}
    assert os.environ[VARIABLE] == broken


def test_without_the_decorator_they_would_be(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from swba_kernels.hopper.decode_small import decode_small

    if get_ptxas(90).path != broken:
        pytest.skip(f"triton {triton.__version__} does not read {VARIABLE} for Hopper")
    monkeypatch.delattr(decode_small, "_do_compile")
    with pytest.raises(PTXASError):
        compile_launches(lambda: stream(select("decode-b1-h16-d64-bs64-ws32")[0]))
