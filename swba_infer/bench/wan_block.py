"""What `bench wan-step` measures: the passes of one block through a Wan transformer, and their FLOPs.

C latent channels, F frames of a block, T text tokens, height and width of a latent frame.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import StreamConfig
from ..engine import StreamingEngine
from ..models.wan import WanTransformer, compile_layers, patchify, unpatchify
from ..models.wan_config import WanConfig
from ..wan.sampler import RenoisingSampler
from .peers import Unavailable

# Name to (compiled, captured in a CUDA graph); the first is what `swba-infer generate` runs on a GPU.
OURS = {
    "swba-compiled-graph": (True, True),
    "swba-compiled": (True, False),
    "swba-eager-graph": (False, True),
    "swba-eager": (False, False),
}
PROBES = 2  # passes of `fill` beside those that commit


class Stepper(Protocol):
    """One stream of a transformer; every committed pass moves it on by a block."""

    def step(self, latents: Tensor, timestep: float, commit: bool) -> Tensor:
        """Return the flow [1, C, F, height, width] that is predicted for noisy latents of that shape."""
        ...


class Work(NamedTuple):
    """What a block is, as random numbers.

    Attributes:
        history: clean blocks that fill the window [blocks, 1, C, F, height, width].
        noisy: the input of each denoising step [steps, 1, C, F, height, width].
        timesteps: of the denoising steps.
        committed: timestep of the commit pass, whose input is the last of `history`.
        text: the prompt, [1, T, text_dim].
    """

    history: Tensor
    noisy: Tensor
    timesteps: tuple[float, ...]
    committed: float
    text: Tensor

    @classmethod
    def draw(
        cls,
        size: WanConfig,
        stream: StreamConfig,
        sampler: RenoisingSampler,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Work:
        """Draw it from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)
        frames = stream.frames_per_block
        blocks = -(-(stream.window_frames + stream.sink_frames) // frames)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        block = (1, size.channels, frames, size.latent_height, size.latent_width)
        history, noisy = random(blocks, *block), random(sampler.steps, *block)
        timesteps = tuple(step.timestep for step in sampler.schedule())
        text = random(1, size.text_len, size.text_dim)
        return cls(history, noisy, timesteps, sampler.commit.timestep, text)


class BlockTime(NamedTuple):
    """Milliseconds of a block's denoising steps together, and of its commit pass."""

    denoise: float
    commit: float


class EngineStream:
    """A model in the engine, on one lane.

    Args:
        captured: whether to replay CUDA graphs.
    """

    def __init__(self, model: WanTransformer, stream: StreamConfig, text: Tensor, captured: bool) -> None:
        self.size = model.config
        self.engine = StreamingEngine(model, stream, cuda_graph=captured)
        for name, value in model.encode_prompt(text).items():
            self.engine.set_state(name, value)

    def step(self, latents: Tensor, timestep: float, commit: bool) -> Tensor:
        """Run one pass of the engine."""
        size = self.size
        out = self.engine.step(patchify(latents, size.patch), commit=commit, timestep=timestep)
        return unpatchify(out, size.latent_height, size.latent_width, size.patch)


def make_ours(name: str, model: WanTransformer, stream: StreamConfig, text: Tensor) -> EngineStream:
    """Return a variant of `OURS` on the weights of `model`, which stays as it is."""
    compiled, captured = OURS[name]
    if captured and text.device.type != "cuda":
        raise Unavailable(f"CUDA graphs need a CUDA device, got {text.device}")
    with torch.device("meta"):
        twin = WanTransformer(model.config)
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    twin.requires_grad_(False)
    if compiled:
        compile_layers(twin)
    return EngineStream(twin, stream, text, captured)


def fill(stepper: Stepper, work: Work) -> dict[str, Tensor]:
    """Commit the history of `work` to an empty stream; return what it predicted before and on the full window."""
    outputs = {"first block": stepper.step(work.noisy[0], work.timesteps[0], commit=False).clone()}
    for clean in work.history:
        stepper.step(clean, work.committed, commit=True)
    return {**outputs, "full window": stepper.step(work.noisy[-1], work.timesteps[-1], commit=False).clone()}


def time_blocks(stepper: Stepper, work: Work, blocks: int, device: torch.device) -> list[BlockTime]:
    """Run blocks without a pause; time them on the GPU's clock where there is one."""
    marks = [_mark(device)]
    for _ in range(blocks):
        for noisy, timestep in zip(work.noisy, work.timesteps, strict=True):
            stepper.step(noisy, timestep, commit=False)
        marks.append(_mark(device))
        stepper.step(work.history[-1], work.committed, commit=True)
        marks.append(_mark(device))
    _wait(device)
    ms = [_between(a, b) for a, b in pairwise(marks)]
    return [BlockTime(*pair) for pair in zip(ms[::2], ms[1::2], strict=True)]


def pass_flops(model: WanTransformer, stream: StreamConfig) -> dict[str, int]:
    """Return the FLOPs that one pass of a block on a full window cannot do without.

    "matmul" is that of the linear layers; what depends on the prompt alone is computed once a stream and not counted.
    "attention" is 4 head_dim per visible pair and head, that to the prompt's tokens included.
    """
    size = model.config
    tokens = stream.block_tokens
    matmul = 2 * tokens * size.token_channels * size.dim
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            matmul += 2 * _rows(name, tokens, stream.frames_per_block) * module.in_features * module.out_features
    seen = stream.capacity_tokens + size.text_len
    return {"matmul": matmul, "attention": 4 * size.dim * size.num_layers * tokens * seen}


def _rows(name: str, tokens: int, frames: int) -> int:
    """Return to how many vectors a pass applies a linear layer."""
    if "text_embedder" in name or name.endswith(("attn2.to_k", "attn2.to_v")):
        return 0
    return frames if "condition_embedder" in name else tokens


def _mark(device: torch.device) -> Any:
    """Return a point in time: an event on CUDA, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(a: Any, b: Any) -> float:
    return 1e3 * (b - a) if isinstance(a, float) else a.elapsed_time(b)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
