"""Prompts to embeddings: transformers' UMT5 encoder, and files that make it unnecessary.

P prompts, T text tokens, C text channels.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import read_header, read_tensors
from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..files import replacing
from .extra import require
from .prompts import PromptSchedule

MAX_TOKENS = 512


class TextEncoder:
    """Encode prompts as Wan was trained: cleaned text, at most 512 tokens, rows past the text zero.

    A 5.7-billion-parameter encoder is used for a moment and then in the way: use it in a `with` block, which drops it
    at its end, or `offload` it between prompts.

    Args:
        model: a `UMT5EncoderModel`, in its final dtype and on its device.
        tokenizer: its tokenizer.
        max_tokens: tokens of a prompt, its end mark included.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = MAX_TOKENS) -> None:
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.channels = int(model.config.d_model)
        self.device, self.dtype = model.device, model.dtype

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TextEncoder:
        """Load `text_encoder` and `tokenizer` of a diffusers folder; nothing is fetched and nothing unpickled.

        Args:
            device: default: cuda if there is one, else cpu.
            dtype: default: bfloat16 on CUDA, float32 on the CPU.

        Raises:
            ConfigError: no such folders, or transformers cannot read them.
            CheckpointError: weights that are damaged, missing, left over or of a wrong shape; names them.
        """
        target = pick_device(device)
        dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        folders = [Path(directory) / name for name in ("text_encoder", "tokenizer")]
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"text encoder: expected a folder {folder}, got none")
        transformers = require("transformers")
        for path in sorted(folders[0].glob("*.safetensors")):
            read_header(path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
            model, info = transformers.UMT5EncoderModel.from_pretrained(
                folders[0], dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, device_map={"": target} if target.type == "cuda" else None,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ConfigError(f"{directory}: expected a UMT5 encoder and its tokenizer, got {error}") from error
        problems = {name: sorted(map(str, keys))[:5] for name, keys in info.items() if keys}
        if problems:
            raise CheckpointError(f"{folders[0]}: weights do not fit: {problems}")
        return cls(model, tokenizer)

    def encode(self, prompt: str) -> Tensor:
        """Return a prompt's embedding [max_tokens, C], zero past its tokens.

        Raises:
            ConfigError: a prompt that is too long, or given to an encoder that was closed.
        """
        if self._model is None:
            raise ConfigError("text encoder: expected an open one, got one that was closed")
        text = clean_prompt(prompt)
        ids = self._tokenizer(text, add_special_tokens=True, return_tensors="pt").input_ids
        count = ids.shape[1]
        if count > self.max_tokens:
            raise ConfigError(f"prompt: expected at most {self.max_tokens} tokens, got {count}: '{text[:40]}...'")
        if self._model.device != self.device:
            self._model.to(self.device)
        ids = ids.to(self.device)
        with torch.no_grad():
            hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        return torch.nn.functional.pad(hidden, (0, 0, 0, self.max_tokens - count))

    def encode_all(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts, [P, max_tokens, C]; one that comes twice is computed once."""
        known = {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts)}
        return torch.stack([known[prompt] for prompt in prompts])

    def offload(self) -> None:
        """Move the weights to the CPU; the next `encode` brings them back."""
        if self._model is not None:
            self._model.to("cpu")
            _release(self.device)

    def close(self) -> None:
        """Drop the weights."""
        self._model = None
        _release(self.device)

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EmbeddedPrompts(NamedTuple):
    """Prompts over time and their embeddings [P, T, C]."""

    schedule: PromptSchedule
    embeds: Tensor


def clean_prompt(prompt: str) -> str:
    """Repair encoding mistakes and HTML entities and join white space, as Wan's own pipeline does."""
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt: expected a string, got {type(prompt).__name__}")
    return " ".join(html.unescape(html.unescape(require("ftfy").fix_text(prompt))).split())


def write_embeds(path: str | os.PathLike[str], prompts: EmbeddedPrompts) -> None:
    """Write embedded prompts to a safetensors file that `read_embeds` reads."""
    names = [f"prompt.{i}" for i in range(len(prompts.schedule))]
    tensors = {name: x.detach().to("cpu", copy=True) for name, x in zip(names, prompts.embeds, strict=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"prompts": json.dumps(list(prompts.schedule))})


def read_embeds(path: str | os.PathLike[str], channels: int, max_tokens: int = MAX_TOKENS) -> EmbeddedPrompts:
    """Read embedded prompts; a file with a single tensor [T, C] or [1, T, C] of any name is one prompt throughout.

    Args:
        channels: of the model's text input.
        max_tokens: shorter embeddings are padded with zeros.

    Raises:
        CheckpointError: a damaged file, tensors of a wrong shape, or contradictory times; names the file.
    """
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        written = (file.metadata() or {}).get("prompts")
    if written is None and len(tensors) == 1:
        (name,) = tensors
        schedule, names = PromptSchedule.single(f"embeds of {Path(path).name}"), [name]
    else:
        schedule = _read_schedule(path, written)
        names = [f"prompt.{i}" for i in range(len(schedule))]
    if set(tensors) != set(names):
        raise CheckpointError(f"{path}: expected the tensors {names[:5]}, got {sorted(tensors)[:5]}")
    rows = []
    for name in names:
        x = tensors[name]
        row = x[0] if x.ndim == 3 and len(x) == 1 else x
        if row.ndim != 2 or row.shape[1] != channels or not 1 <= len(row) <= max_tokens or not row.is_floating_point():
            raise CheckpointError(
                f"{path}: {name}: expected floating [1 to {max_tokens}, {channels}], got {x.dtype} {list(x.shape)}"
            )
        if not bool(torch.isfinite(row).all()):
            raise CheckpointError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
        rows.append(torch.nn.functional.pad(row, (0, 0, 0, max_tokens - len(row))))
    return EmbeddedPrompts(schedule, torch.stack(rows))


def _read_schedule(path: str | os.PathLike[str], written: str | None) -> PromptSchedule:
    try:
        starts, texts = zip(*json.loads(written or "[]"), strict=True)
        return PromptSchedule(starts, texts)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected prompts with their seconds, got {str(written)[:60]!r}") from error


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
