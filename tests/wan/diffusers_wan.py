"""diffusers' `WanTransformer3DModel` as an independent reference: small, random, and masked to a block window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="parity tests need the extra [wan]")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from swba_infer.config import StreamConfig
from swba_infer.models.wan import WanTransformer, patchify, unpatchify
from swba_infer.models.wan_config import WanConfig

SIZES = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, channels=4, text_dim=20, text_len=16,
    freq_dim=32, latent_height=4, latent_width=6,
)  # fmt: skip


class WindowProcessor(WanAttnProcessor):
    """Hold back, in self-attention only, what the window hides."""

    mask: Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = None if rotary_emb is None else self.mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def random_reference(config: WanConfig = SIZES, seed: int = 0) -> WanTransformer3DModel:
    """Return diffusers' model with weights that let every branch, norm and bias count."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.channels,
        out_channels=config.channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1.5 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    model.set_attn_processor(WindowProcessor())
    return model.eval()


def as_ours(reference: WanTransformer3DModel, config: WanConfig = SIZES) -> WanTransformer:
    """Return our model with the reference's weights."""
    model = WanTransformer(config)
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


def window_mask(stream: StreamConfig, frames: int) -> Tensor:
    """Return which token sees which, bool [N, N], from the definition of a block window in whole frames."""
    frame = torch.arange(frames)
    first = stream.first_block_frames or stream.frames_per_block
    block_end = first + torch.where(frame < first, 0, (frame - first) // stream.frames_per_block + 1) * (
        stream.frames_per_block
    )
    q_end, k = block_end.clamp(max=frames)[:, None], frame[None]
    seen = (k < q_end) & ((k >= q_end - stream.window_frames) | (k < stream.sink_frames))
    return seen.repeat_interleave(stream.tokens_per_frame, 0).repeat_interleave(stream.tokens_per_frame, 1)


def run_reference(
    reference: WanTransformer3DModel,
    stream: StreamConfig,
    tokens: Tensor,
    timestep: Tensor,
    text: Tensor,
    config: WanConfig = SIZES,
) -> Tensor:
    """Run tokens [L, N, C] with timesteps [L, F] and text [L, T, text_dim] through diffusers' model."""
    latents = unpatchify(tokens, config.latent_height, config.latent_width, config.patch)
    for processor in reference.attn_processors.values():
        processor.mask = window_mask(stream, latents.shape[2])
    text = torch.nn.functional.pad(text, (0, 0, 0, config.text_len - text.shape[1]))
    spread = timestep.repeat_interleave(config.tokens_per_frame, 1)
    with torch.no_grad():
        out = reference(latents, spread, text, return_dict=False)[0]
    return patchify(out, config.patch)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
