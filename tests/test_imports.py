"""Who may import whom, read from the source; and what importing a package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "swba_kernels"
ENGINE = ROOT / "swba_infer"
TRITON_PACKAGES = ("swba_kernels.portable", "swba_kernels.hopper")
LAZY = {"triton", "av", "PIL", "rich", "vizdoom", "matplotlib", "fastapi", "diffusers", "transformers"}

# From the bottom up: a module of swba_infer may import the modules before it. Unlisted ones are leaves (errors, files).
LAYERS = ["cache", "context", "engine", "generator", "cli"]


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the absolute name of each import of a file; `from a import b` yields both a and a.b."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT if ENGINE in path.parents else ROOT / "kernels").parent.parts
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_tree_is_where_this_test_looks() -> None:
    assert len(sources(KERNELS)) > 5
    assert sources(ENGINE)


@pytest.mark.parametrize("path", sources(KERNELS), ids=name_of)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    allowed = {"swba_kernels", "torch", "triton"} | set(sys.stdlib_module_names)
    assert {x.split(".")[0] for x in imports(path)} <= allowed


@pytest.mark.parametrize("path", sources(KERNELS), ids=name_of)
def test_only_kernel_files_import_triton(path: Path) -> None:
    if path.parent == KERNELS:
        assert not [x for x in imports(path) if within(x, "triton")]
        loaded = [x for x in imports(path, top_level_only=True) if x.startswith(TRITON_PACKAGES)]
        assert not loaded, "kernels are imported when an op first runs"


def test_the_reference_and_the_fast_kernels_do_not_know_each_other() -> None:
    assert {x for x in imports(KERNELS / "reference.py") if within(x, "swba_kernels")} <= {
        "swba_kernels.pattern",
        "swba_kernels.pattern.BlockWindow",
    }
    for path in sources(KERNELS):
        if path.name != "reference.py":
            assert not [x for x in imports(path) if within(x, "swba_kernels.reference")], path


@pytest.mark.parametrize("path", sources(ENGINE), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    used = [x for x in imports(path) if within(x, "swba_infer")]
    module = path.relative_to(ENGINE).with_suffix("").parts[0]
    if module in LAYERS:
        above = LAYERS[LAYERS.index(module) + 1 :]
        assert not [x for x in used for y in above if within(x, f"swba_infer.{y}")]
    if module == "models":
        for banned in ("engine", "generator", "cache", "cli", "bench", "training"):
            assert not [x for x in used if within(x, f"swba_infer.{banned}")]


def test_nothing_imports_a_second_copy_of_the_kernels() -> None:
    for path in (x for folder in ("kernels", "swba_infer", "tests", "demos") for x in sources(ROOT / folder)):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [x for x in names if within(x, "kernels")], path


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["swba_kernels", "swba_infer"])
def test_importing_a_package_loads_nothing_optional(package: str) -> None:
    # torch itself may load triton, so it comes first; whatever is loaded after that is ours.
    code = (
        f"import sys, torch; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; before = set(sys.modules)\n"
        f"import {package}\n"
        f"late = {{x.split('.')[0] for x in set(sys.modules) - before}} & {LAZY!r}\n"
        "assert not late, late\n"
        "assert not [x for x in sys.modules if x.startswith(('swba_kernels.portable', 'swba_kernels.reference'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_attention_works_where_triton_cannot_be_imported() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
        "import torch; sys.modules['triton'] = None\n"
        "import swba_kernels as s\n"
        "x = torch.randn(1, 1, 8, 8)\n"
        "assert s.attention(x, x, x, 4, 2, 1.0).shape == x.shape\n"
        "try:\n"
        "    s.block_window_attention(x, x, x, s.BlockWindow(4, 4), impl='triton')\n"
        "except ValueError as error:\n"
        "    assert 'triton is not installed' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('impl=triton ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
