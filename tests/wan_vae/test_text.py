"""Prompts become what diffusers' Wan pipeline makes of them, from a folder or from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swba_infer.errors import CheckpointError, ConfigError
from swba_infer.wan.prompts import PromptSchedule, parse_prompts
from swba_infer.wan.text import EmbeddedPrompts, TextEncoder, clean_prompt, read_embeds, write_embeds

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "sleeps", "it's", "&", "\u00e9t\u00e9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder with a small UMT5 encoder and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("wan")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        dropout_rate=0.0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.UMT5EncoderModel(config).save_pretrained(directory / "text_encoder")
    return directory


@pytest.fixture
def encoder(folder: Path) -> TextEncoder:
    pytest.importorskip("ftfy")
    return TextEncoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("prompt", ["a cat runs", "  A&amp;amp; a \n cat  it\u2019s  \u00c3\u00a9t\u00c3\u00a9 ", ""])
def test_an_embedding_is_what_diffusers_pipeline_makes(encoder: TextEncoder, folder: Path, prompt: str) -> None:
    pytest.importorskip("diffusers")
    from diffusers import WanPipeline

    class Pipeline:
        text_encoder, tokenizer, device = encoder._model, encoder._tokenizer, torch.device("cpu")
        _execution_device = device

    expected = WanPipeline._get_t5_prompt_embeds(Pipeline(), prompt, max_sequence_length=512)[0]  # type: ignore[arg-type]
    actual = encoder.encode(prompt)
    assert actual.shape == expected.shape == (512, 16)
    assert (actual - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(actual.abs().sum(1) > 0, expected.abs().sum(1) > 0)


def test_cleaning_repairs_text_and_joins_white_space() -> None:
    pytest.importorskip("ftfy")
    assert clean_prompt("  \u201cA\u201d &amp;lt; \t b\u00c3\u00a9 \n") == '"A" < b\u00e9'
    with pytest.raises(ConfigError, match="expected a string, got int"):
        clean_prompt(3)  # type: ignore[arg-type]


def test_a_prompt_that_comes_twice_has_one_embedding(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda prompt: calls.append(prompt) or encode(prompt))
    embeds = encoder.encode_all(["a cat", "a dog", "a cat"])
    assert calls == ["a cat", "a dog"]
    assert torch.equal(embeds[0], embeds[2])
    assert not torch.equal(embeds[0], embeds[1])


def test_a_prompt_that_is_too_long_is_refused(encoder: TextEncoder) -> None:
    assert encoder.encode("a " * 511).shape == (512, 16)
    with pytest.raises(ConfigError, match=r"expected at most 512 tokens, got 513: 'a a "):
        encoder.encode("a " * 512)


def test_a_closed_encoder_lets_its_weights_go(folder: Path) -> None:
    pytest.importorskip("ftfy")
    import weakref

    with TextEncoder.from_pretrained(folder, device="cpu") as encoder:
        weights = weakref.ref(encoder._model.shared.weight)
        before = encoder.encode("a cat")
        encoder.offload()
        assert torch.equal(encoder.encode("a cat"), before)
    assert weights() is None
    with pytest.raises(ConfigError, match="one that was closed"):
        encoder.encode("a cat")


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ConfigError, match=r"expected a folder .*text_encoder, got none"):
        TextEncoder.from_pretrained(tmp_path, device="cpu")
    copy = tmp_path / "wan"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    save_file({key: x for key, x in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"missing_keys.*{name}"):
        TextEncoder.from_pretrained(copy, device="cpu")
    save_file({**tensors, "extra": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys.*extra"):
        TextEncoder.from_pretrained(copy, device="cpu")
    save_file({**tensors, name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"mismatched_keys.*{name}"):
        TextEncoder.from_pretrained(copy, device="cpu")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated"):
        TextEncoder.from_pretrained(copy, device="cpu")
    weights.unlink()
    with pytest.raises(ConfigError, match="expected a UMT5 encoder"):
        TextEncoder.from_pretrained(copy, device="cpu")


def test_a_file_may_hold_the_tied_embedding_twice(folder: Path, tmp_path: Path, encoder: TextEncoder) -> None:
    import shutil

    copy = tmp_path / "wan"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, weights, {"format": "pt"})
    assert torch.equal(TextEncoder.from_pretrained(copy, device="cpu").encode("a cat"), encoder.encode("a cat"))


def test_embeds_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "embeds.safetensors"
    prompts = EmbeddedPrompts(parse_prompts("0s: a\n2.5s: b"), torch.randn(2, 6, 16))
    write_embeds(path, prompts)
    schedule, embeds = read_embeds(path, channels=16, max_tokens=8)
    assert schedule == prompts.schedule
    assert torch.equal(embeds[:, :6], prompts.embeds)
    assert embeds.shape == (2, 8, 16)
    assert not embeds[:, 6:].any()


@pytest.mark.parametrize("shape", [(5, 16), (1, 5, 16)])
def test_a_lone_tensor_is_one_prompt_for_the_whole_video(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "one.safetensors"
    x = torch.randn(shape)
    save_file({"prompt_embeds": x}, path)
    schedule, embeds = read_embeds(path, channels=16)
    assert schedule.starts == (0.0,)
    assert torch.equal(embeds[0, :5], x.view(5, 16))


def metadata(prompts: Any) -> dict[str, str]:
    return {"prompts": json.dumps(prompts)}


@pytest.mark.parametrize(
    ("tensors", "written", "message"),
    [
        ({"x": torch.zeros(5, 8)}, None, r"x: expected floating \[1 to 512, 16\], got torch.float32 \[5, 8\]"),
        ({"x": torch.zeros(513, 16)}, None, "got torch.float32 .513, 16"),
        ({"x": torch.zeros(2, 5, 16)}, None, "got torch.float32 .2, 5, 16"),
        ({"x": torch.zeros(5, 16, dtype=torch.int32)}, None, "got torch.int32"),
        ({"x": torch.full((5, 16), float("nan"))}, None, "expected finite numbers"),
        ({"x": torch.zeros(5, 16), "y": torch.zeros(5, 16)}, None, "expected prompts with their seconds, got 'None'"),
        ({"prompt.1": torch.zeros(5, 16)}, metadata([[0, "a"]]), r"expected the tensors \['prompt.0'\]"),
        ({"prompt.0": torch.zeros(5, 16)}, metadata([[1, "a"]]), "expected prompts with their seconds"),
        ({"prompt.0": torch.zeros(5, 16)}, {"prompts": "{"}, "expected prompts with their seconds, got '{'"),
        ({"prompt.0": torch.zeros(5, 16)}, metadata([["0", "a"]]), "expected prompts with their seconds"),
        ({"prompt.0": torch.zeros(5, 16)}, {"prompts": 100_000 * "["}, "expected prompts with their seconds"),
    ],
)
def test_embeds_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], written: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "embeds.safetensors"
    save_file(tensors, path, metadata=written)
    with pytest.raises(CheckpointError, match=message):
        read_embeds(path, channels=16)


def test_schedules_of_embeds_are_plain_schedules() -> None:
    assert list(PromptSchedule.single("a cat")) == [(0.0, "a cat")]
