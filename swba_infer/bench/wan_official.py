"""The causal Wan transformer that Self-Forcing published, as a peer: its own modules, read from a checkout.

Only `wan/modules/causal_model.py` and what that imports runs, and none of it is changed but the attention function,
which becomes torch's scaled_dot_product_attention, and the limit of its window, which counts 1560 tokens a frame. A
pass is called as their pipeline calls it: a full cache is shifted in the first pass of a block, the passes after
overwrite that block's slots. Their conversion of the flow to clean latents is no part of it, nor is it of ours.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from ..config import StreamConfig
from ..errors import ConfigError, NumericsError
from ..models.wan import WanTransformer
from ..models.wan_config import WanConfig
from ..wan.names import official_name
from ..wan.sampler import RenoisingSampler
from ..wan.synthetic import random_wan
from .peers import BACKENDS, Unavailable
from .wan_block import EngineStream, Work
from .wan_stream import TINY

# Name to (backend of scaled_dot_product_attention, compiled).
OFFICIAL = {
    "official-flash": ("flash", False),
    "official-cudnn": ("cudnn", False),
    "official-cudnn-compiled": ("cudnn", True),
}
LAST_FRAME = 1024  # of their table of rotary angles
EXACT = 1e-5
_FILE = Path("wan", "modules", "causal_model.py")


class OfficialStream:
    """One stream of the published model, with the caches that its pipeline makes.

    Args:
        model: a `CausalWanModel` with the window and the sinks of `stream`.
        text: [1, T, text_dim].
        backend: of attention, a name of `BACKENDS`.
    """

    def __init__(self, model: Any, size: WanConfig, stream: StreamConfig, text: Tensor, backend: str) -> None:
        self.model, self.text, self.backend = model, text, BACKENDS[backend]
        self.start = 0
        self.longest = stream.capacity_tokens
        self.caches = [_cache(size, stream, text) for _ in range(size.num_layers)]
        self.prompt_caches: list[dict[str, Any]] = [{"is_init": False} for _ in range(size.num_layers)]

    @torch.no_grad()
    def step(self, latents: Tensor, timestep: float, commit: bool) -> Tensor:
        """Run one pass; their code overwrites the newest block until `commit` moves the stream on."""
        frames = latents.shape[2]
        with sdpa_kernel(self.backend):
            flow = self.model(
                latents,
                t=torch.full((1, frames), timestep, device=latents.device),
                context=self.text,
                seq_len=self.longest,
                kv_cache=self.caches,
                crossattn_cache=self.prompt_caches,
                current_start=self.start,
            )
        if commit:
            self.start += frames * self.model.frame_tokens
        return flow


class Official:
    """The published code, checked against ours.

    Args:
        folder: of the checkout; it holds `wan/modules/causal_model.py`.

    Raises:
        ConfigError: the folder is not such a checkout.
        Unavailable: a module that the code imports is missing.
        NumericsError: it does not compute what our model computes.
    """

    def __init__(self, folder: Path) -> None:
        self._module = _import(folder)
        self.error = self._check()

    def make(self, name: str, model: WanTransformer, stream: StreamConfig, text: Tensor) -> OfficialStream:
        """Return a variant of `OFFICIAL` with the weights of `model`, all of them in the dtype of `text`."""
        backend, compiled = OFFICIAL[name]
        if backend == "cudnn" and text.device.type != "cuda":
            raise Unavailable(f"cuDNN attention needs a CUDA device, got {text.device}")
        return self.stream(model, stream, text, backend, compiled)

    def stream(
        self, model: WanTransformer, stream: StreamConfig, text: Tensor, backend: str, compiled: bool = False
    ) -> OfficialStream:
        """Return an empty stream of the published model with the weights of ours."""
        weights = {official_name(name): tensor.to(text.dtype) for name, tensor in model.state_dict().items()}
        theirs = self._model(model.config, stream, weights)
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            for block in theirs.blocks:
                block.compile()
        return OfficialStream(theirs, model.config, stream, text, backend)

    def _model(self, size: WanConfig, stream: StreamConfig, weights: Mapping[str, Tensor]) -> Any:
        window = stream.window_frames + stream.sink_frames
        with torch.device("meta"):
            model = self._module.CausalWanModel(
                patch_size=(1, size.patch, size.patch), text_len=size.text_len, in_dim=size.channels, dim=size.dim,
                ffn_dim=size.ffn_dim, freq_dim=size.freq_dim, text_dim=size.text_dim, out_dim=size.channels,
                num_heads=size.num_attention_heads, num_layers=size.num_layers, local_attn_size=window,
                sink_size=stream.sink_frames, cross_attn_norm=size.cross_attn_norm, eps=size.eps,
            )  # fmt: skip
        model.load_state_dict(weights, strict=True, assign=True)
        head = {"dim": size.attention_head_dim, "num_heads": 1, "num_layers": 0}
        model.freqs = self._module.CausalWanModel(**head, ffn_dim=1, text_dim=1).freqs
        for block in model.blocks:
            block.self_attn.max_attention_size = stream.capacity_tokens
        model.frame_tokens = size.tokens_per_frame
        return model.requires_grad_(False).eval()

    def _check(self) -> float:
        """Return the largest relative error of a short stream of a tiny model in float32; its window turns over."""
        size = replace(TINY, num_attention_heads=2)
        stream = StreamConfig(
            tokens_per_frame=size.tokens_per_frame, frames_per_block=2, window_frames=4, sink_frames=1
        )
        device = torch.device("cpu")
        model = random_wan(size, device=device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        work = Work.draw(size, stream, RenoisingSampler.with_steps(2), device, torch.float32)
        ours = EngineStream(model, stream, work.text, captured=False)
        theirs = self.stream(model, stream, work.text, "math")
        passes = [(x, t, False) for x, t in zip(work.noisy, work.timesteps, strict=True)]
        worst = 0.0
        for clean in (*work.history, *work.history):
            for latents, timestep, commit in (*passes, (clean, work.committed, True)):
                expected = ours.step(latents, timestep, commit)
                error = ((theirs.step(latents, timestep, commit) - expected).norm() / expected.norm()).item()
                if not error < EXACT:
                    raise NumericsError(f"official: expected the flow of our model within {EXACT}, got {error:.2g}")
                worst = max(worst, error)
        return worst


def attend(q: Tensor, k: Tensor, v: Tensor, k_lens: None = None) -> Tensor:
    """Attend in their layout, [B, N, H, D], with the backend that is allowed at the moment."""
    if k_lens is not None:
        raise NotImplementedError(f"k_lens: expected None, got {k_lens}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cache(size: WanConfig, stream: StreamConfig, text: Tensor) -> dict[str, Tensor]:
    """Return a layer's cache, as their pipeline makes it: keys and values [1, N, H, D] and two counters."""
    shape = (1, stream.capacity_tokens, size.num_attention_heads, size.attention_head_dim)
    cache = {name: torch.zeros(shape, dtype=text.dtype, device=text.device) for name in ("k", "v")}
    ends = ("global_end_index", "local_end_index")
    return {**cache, **{name: torch.zeros(1, dtype=torch.long, device=text.device) for name in ends}}


def _import(folder: Path) -> ModuleType:
    """Import the model's module without the packages around it, which need much that the model does not."""
    root = folder.resolve()
    if not (root / _FILE).is_file():
        raise ConfigError(f"official: expected a folder with {_FILE}, got {folder}")
    fresh = "wan" not in sys.modules
    for name in ("wan", "wan.modules"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        known = sys.modules.setdefault(name, package)
        if list(getattr(known, "__path__", [])) != package.__path__:
            raise ConfigError(f"official: expected no other package {name!r} to be imported, got {known}")
    try:
        module = importlib.import_module("wan.modules.causal_model")
        base = importlib.import_module("wan.modules.model")
    except (ImportError, RuntimeError) as error:  # diffusers' lazy imports raise RuntimeError
        if fresh:
            for name in [name for name in sys.modules if name == "wan" or name.startswith("wan.")]:
                del sys.modules[name]
        missing = _missing(error)
        reason = f"it needs the module {missing}, which is not installed" if missing else str(error).strip()
        raise Unavailable(f"the official code cannot be imported: {reason}") from error
    module.attention = attend  # type: ignore[attr-defined]
    base.flash_attention = attend  # type: ignore[attr-defined]
    return module


def _missing(error: BaseException | None) -> str | None:
    """Return the name of the module that was not found, also where another exception hides that."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        error = error.__cause__ or error.__context__
    return None
