from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(kind: str, out: Path) -> Path:
    pytest.importorskip("hatchling")
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_both_packages_and_no_kernels_folder(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"swba_infer", "swba_kernels"}
    for name in ("swba_infer/cli.py", "swba_kernels/pattern.py", "swba_kernels/portable/forward.py"):
        assert name in names


def test_the_wheel_holds_the_shipped_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = ROOT / "swba_infer" / "pretrained"
    wanted = {str(path.relative_to(ROOT)) for path in shipped.rglob("*") if path.is_file()}
    assert wanted <= names
    for path in shipped.rglob("*.safetensors"):
        assert path.stat().st_size <= 16_000_000, path


def test_the_wheel_declares_what_the_readme_promises(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        assert any(entry.endswith("/licenses/LICENSE") for entry in archive.namelist())
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    core = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert core == {"Requires-Dist: numpy>=1.24", "Requires-Dist: safetensors>=0.4.3", "Requires-Dist: torch>=2.9"}
    assert "swba-infer = swba_infer.cli:main" in points


def test_the_installed_wheel_runs_outside_the_checkout(wheel, tmp_path):
    """A bare environment that sees this one's libraries, but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    import numpy
    import safetensors
    import torch

    libraries = {str(Path(module.__file__).parent.parent) for module in (numpy, safetensors, torch)}
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; sys.path += {sorted(libraries)!r}\n"
        "import swba_infer, swba_kernels, swba_infer.cli\n"
        f"assert {str(tmp_path)!r} in swba_infer.__file__ and {str(tmp_path)!r} in swba_kernels.__file__\n"
        "raise SystemExit(swba_infer.cli.main(['doctor']))\n"
    )
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "decode: " in done.stdout


def test_the_source_distribution_builds_without_the_repository(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = archive.getnames()
    paths = {name.split("/", 1)[1] for name in names if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "kernels/swba_kernels/pattern.py", "swba_infer/cli.py"} <= paths
    assert not [path for path in paths if path.startswith((".venv", "out/", "runs/"))]


def test_no_module_called_kernels_comes_from_here():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
