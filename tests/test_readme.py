"""The README's code runs, in one session, top to bottom, as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swba_infer import checkpoint

README = Path(__file__).parent.parent / "README.md"


def test_the_code_in_the_readme_runs(tiny_model, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    if not (checkpoint.PRETRAINED / "freedoom").is_dir():
        monkeypatch.setattr(checkpoint, "resolve_directory", lambda name: tiny_model)
        monkeypatch.setattr("swba_infer.generator.resolve_directory", lambda name: tiny_model)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert capsys.readouterr().out.count("uint8") == 12


def test_every_file_the_readme_names_exists():
    text = README.read_text(encoding="utf-8")
    if "TO BE MEASURED" in text:
        pytest.skip("the README is a draft")
    for name in re.findall(r"\((docs/[^)]+)\)", text):
        assert (README.parent / name).is_file(), name
