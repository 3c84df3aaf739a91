"""The Hopper kernels are assembled by Triton's own `ptxas`, whatever torch.compile or Triton chose for the process."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from aot import compile_launches
from hopper_launches import prefill, stream, train
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import (
    CUDABackend,
    get_features,
    get_ptxas,
    get_ptxas_version,
    ptx_get_version,
)
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

from swba_infer import doctor
from swba_infer.bench.shapes import select
from swba_kernels import hopper
from swba_kernels.hopper import assembler
from swba_kernels.hopper.assembler import NEWER, VARIABLE, describe, is_torchs, tritons_own_assembler

pytestmark = pytest.mark.gluon

TORCHS = str(Path(torch.__file__).parent / "bin" / "ptxas")
OWN = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
DECODE = "decode-b1-h16-d64-bs64-ws32"
MISSING = "/nowhere/ptxas"


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


def choose(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Let the environment name an assembler for Hopper: one of the two variables is the one that this Triton reads."""
    monkeypatch.setenv(VARIABLE, path)
    monkeypatch.setenv(NEWER, path)


def come_with(monkeypatch: pytest.MonkeyPatch, knob: str, path: str) -> None:
    """Let that be the assembler that Triton came with."""
    monkeypatch.setattr(knobs.nvidia.knob_descriptors[knob], "default_path", path)


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test start in a process where nobody chose an assembler, and forget which one it chose."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(NEWER, raising=False)
    get_ptxas_version.cache_clear()
    yield
    monkeypatch.undo()
    get_ptxas_version.cache_clear()
    get_features.cache_clear()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have an assembler that assembles nothing, and kernels that nobody compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return stub(tmp_path / "ptxas")


@pytest.fixture
def torchs(broken: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose that assembler, and take it for torch's."""
    choose(monkeypatch, broken)
    monkeypatch.setattr(assembler, "is_torchs", lambda chosen: chosen == broken)
    return broken


def test_only_a_path_inside_of_torch_is_torchs(tmp_path: Path) -> None:
    assert is_torchs(TORCHS)
    assert not is_torchs(None)
    assert not is_torchs(str(tmp_path / "ptxas"))
    assert not is_torchs(str(Path(torch.__file__).parent) + "-other/ptxas")
    (tmp_path / "link").symlink_to(Path(torch.__file__).parent)
    assert is_torchs(str(tmp_path / "link" / "bin" / "ptxas"))


def test_the_doctor_names_the_assembler_that_is_used(torchs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "build_obstacle", lambda: None)
    version = knobs.nvidia.knob_descriptors["ptxas"].transform(OWN).version
    assert describe().startswith(f"ptxas {version}, ")
    assert f"built by this Triton (ptxas {version}, " in next(x for x in doctor.report() if x.startswith("hopper"))
    assert get_ptxas(90).path == torchs


def test_no_kernel_of_another_assembler_is_taken_from_the_disk(
    torchs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "13.0" in get_ptxas_version(90)  # as if torch.compile had compiled something before
    compile_launches(lambda: stream(select(DECODE)[0]))
    assert "13.0" in get_ptxas_version(90)
    choose(monkeypatch, stub(tmp_path / "another"))
    forget(monkeypatch)
    with pytest.raises(PTXASError):
        compile_launches(lambda: stream(select(DECODE)[0]))


def test_where_triton_has_none_torchs_stays(torchs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    come_with(monkeypatch, "ptxas", MISSING)
    come_with(monkeypatch, "ptxas_blackwell", MISSING)
    with tritons_own_assembler():
        assert get_ptxas(90).path == torchs
    assert os.environ[VARIABLE] == os.environ[NEWER] == torchs
    choose(monkeypatch, MISSING)
    with pytest.raises(RuntimeError, match="Cannot find"):
        describe()
    assert "kernels cannot be built: Cannot find ptxas" in next(x for x in doctor.report() if x.startswith("hopper"))


def test_where_triton_has_only_the_one_that_it_takes_for_hopper_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = get_ptxas(90)
    if own.path == OWN:
        pytest.skip(f"triton {triton.__version__} takes its ptxas")
    come_with(monkeypatch, "ptxas", MISSING)
    with tritons_own_assembler():
        assert get_ptxas(90) == own
        assert NEWER not in os.environ
    choose(monkeypatch, TORCHS)
    assert describe().startswith(f"ptxas {own.version}, ")


def test_the_one_that_triton_takes_for_hopper_is_not_needed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    come_with(monkeypatch, "ptxas_blackwell", broken)
    before = get_ptxas(90).path, get_ptxas_version(90)
    ((_, report),) = [x for x in compile_launches(lambda: stream(select(DECODE)[0])) if x[0] == "decode_small"]
    version = ptx_get_version(knobs.nvidia.ptxas.version)
    assert f".version {version // 10}.{version % 10}\n" in report.ptx
    assert (get_ptxas(90).path, get_ptxas_version(90)) == before
    assert VARIABLE not in os.environ
    assert NEWER not in os.environ


def test_ptx_has_only_features_that_the_assembler_knows(torchs: str) -> None:
    """Triton remembers them by options alone: those of a kernel that another assembler made would be taken for ours."""
    options = CUDABackend(GPUTarget("cuda", 90, 32)).parse_options({})

    def known() -> bool:
        return int(re.search(r"\d+", get_features(options, 90))[0]) <= ptx_get_version(get_ptxas(90).version)

    outside = get_features(options, 90)
    with tritons_own_assembler():
        assert known()
    assert known()
    assert get_features(options, 90) == outside


def test_two_at_once_set_it_aside_until_both_are_through(torchs: str) -> None:
    with tritons_own_assembler():
        with tritons_own_assembler():
            assert get_ptxas(90).path == OWN
        assert get_ptxas(90).path == OWN
    assert get_ptxas(90).path == torchs


def test_the_choice_of_torch_is_set_aside_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, TORCHS)
    with tritons_own_assembler():
        assert get_ptxas(90).path == OWN
    assert os.environ[VARIABLE] == os.environ[NEWER] == TORCHS
    with pytest.raises(KeyError), tritons_own_assembler():
        raise KeyError
    assert os.environ[VARIABLE] == os.environ[NEWER] == TORCHS


@pytest.mark.parametrize("before", [None, TORCHS])
def test_a_choice_that_somebody_makes_meanwhile_stays(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """Of both variables, whether they said something before or not."""
    for variable in (VARIABLE, NEWER):
        monkeypatch.delenv(variable, raising=False)
        if before:
            monkeypatch.setenv(variable, before)
    with tritons_own_assembler():
        for variable in (VARIABLE, NEWER):
            monkeypatch.setenv(variable, f"/somewhere/{variable}")
    assert all(os.environ[variable] == f"/somewhere/{variable}" for variable in (VARIABLE, NEWER))


@pytest.mark.parametrize("variables", [(VARIABLE,), (NEWER,), (VARIABLE, NEWER)], ids=" and ".join)
def test_the_choice_of_a_user_stays(broken: str, monkeypatch: pytest.MonkeyPatch, variables: tuple[str, ...]) -> None:
    """TRITON_PTXAS_PATH alone means these kernels under every Triton, also where Triton does not read it for Hopper."""
    for variable in variables:
        monkeypatch.setenv(variable, broken)
    before = {x: os.environ.get(x) for x in (VARIABLE, NEWER)}
    chosen = broken if VARIABLE in variables else get_ptxas(90).path
    with tritons_own_assembler():
        assert get_ptxas(90).path == chosen
    assert {x: os.environ.get(x) for x in (VARIABLE, NEWER)} == before


@pytest.mark.parametrize("propagated", [True, False])
def test_the_choice_of_a_user_in_python_stays(broken: str, monkeypatch: pytest.MonkeyPatch, propagated: bool) -> None:
    """Even if it is torch's."""
    monkeypatch.setattr(assembler, "is_torchs", lambda chosen: chosen == broken)
    monkeypatch.setattr(knobs, "propagate_env", propagated)
    knob = "ptxas" if get_ptxas(90).path == OWN else "ptxas_blackwell"
    with knobs.nvidia.scope():
        setattr(knobs.nvidia, knob, broken)
        before = os.environ.get(VARIABLE), os.environ.get(NEWER)
        with tritons_own_assembler():
            assert get_ptxas(90).path == broken
        assert get_ptxas(90).path == broken
        assert (os.environ.get(VARIABLE), os.environ.get(NEWER)) == before


def test_no_kernel_is_assembled_by_another_one(torchs: str) -> None:
    launched = set()
    for name in ("train-b1-h12-d128-bs1560-ws6-n32760", "train-b4-h16-d64-bs256", "train-b1-h6-d64-bs48"):
        launched |= {kernel for kernel, _ in compile_launches(lambda name=name: train(select(name)[0]))}
    for name in ("decode-b1-h12-d128-bs1560-ws21", DECODE):
        launched |= {kernel for kernel, _ in compile_launches(lambda name=name: stream(select(name)[0]))}
    launched |= {kernel for kernel, _ in compile_launches(lambda: prefill(64, 64, 0, None, parts=3))}
    assert launched == {kernel.fn.__name__ for kernel in entries()}
    assert get_ptxas(90).path == torchs


def test_without_the_decorator_they_would_be(torchs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from swba_kernels.hopper.decode_small import decode_small

    monkeypatch.delattr(decode_small, "_do_compile")
    with pytest.raises(PTXASError):
        compile_launches(lambda: stream(select(DECODE)[0]))
