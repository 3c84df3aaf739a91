"""The lines of the README that stream a Wan checkpoint run, with tiny models in the place of the big ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from generator_cases import embedding, make_generator

pytest.importorskip("diffusers")

from swba_infer.wan import WanGenerator

README = Path(__file__).parent.parent.parent / "README.md"


def test_three_lines_stream_a_checkpoint(monkeypatch):
    (code,) = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(ast.parse(code).body) == 3
    asked = []

    def from_pretrained(model: str, base: str) -> SimpleNamespace:
        asked.append((model, base))
        generator = make_generator()
        return SimpleNamespace(stream=lambda prompt: generator.stream(embedding(len(prompt)), frames=7))

    monkeypatch.setattr(WanGenerator, "from_pretrained", from_pretrained)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert asked
    assert names["frame"].dtype == "uint8"
