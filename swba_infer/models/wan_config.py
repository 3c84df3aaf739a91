"""The sizes of a Wan transformer, under the names of diffusers' `WanTransformer3DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..config import check_keys
from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConfig:
    """Sizes of a `WanTransformer`; the defaults are those of Wan 2.1 T2V 1.3B at 832 x 480.

    Args:
        num_layers, num_attention_heads, attention_head_dim, ffn_dim: of the transformer.
        channels: of a latent frame, in and out.
        patch: latent rows and columns of a token's side; a token spans one latent frame.
        text_dim, text_len: numbers of a text token, and text tokens of a prompt, padding included.
        freq_dim: sinusoids of a timestep.
        cross_attn_norm: whether a norm with parameters stands before cross-attention.
        eps: of all norms.
        latent_height, latent_width: of a latent frame; multiples of `patch`. Not part of the weights.
    """

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    channels: int = 16
    patch: int = 2
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    cross_attn_norm: bool = True
    eps: float = 1e-6
    latent_height: int = 60
    latent_width: int = 104

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cross_attn_norm":
                if not isinstance(value, bool):
                    raise ConfigError(f"cross_attn_norm: expected a bool, got {value!r}")
            elif field.name == "eps":
                if not isinstance(value, float) or not 0 < value < 1:
                    raise ConfigError(f"eps: expected a float between 0 and 1, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name}: expected an int of at least 1, got {value!r}")
        if self.attention_head_dim % 8:
            raise ConfigError(f"attention_head_dim: expected a multiple of 8, got {self.attention_head_dim}")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim: expected an even number, got {self.freq_dim}")
        for name in ("latent_height", "latent_width"):
            if getattr(self, name) % self.patch:
                raise ConfigError(
                    f"{name}: expected a multiple of the patch size {self.patch}, got {getattr(self, name)}"
                )

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rows(self) -> int:
        """Token rows of a frame."""
        return self.latent_height // self.patch

    @property
    def columns(self) -> int:
        """Token columns of a frame."""
        return self.latent_width // self.patch

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    @property
    def token_channels(self) -> int:
        """Numbers in a token."""
        return self.channels * self.patch * self.patch

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that turn with the frame, the row and the column: 44, 42, 42 of 128."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    def at(self, height: int, width: int, scale: int) -> WanConfig:
        """Return this config for video of `height` x `width` pixels.

        Args:
            scale: pixels of a latent's side: 8 for the VAE of Wan 2.1, 16 for that of Wan 2.2 TI2V-5B.

        Raises:
            ConfigError: the size is not a multiple of `scale * patch`.
        """
        step = scale * self.patch
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % step:
                raise ConfigError(f"{name}: expected a positive multiple of {step} pixels, got {value!r}")
        return replace(self, latent_height=height // scale, latent_width=width // scale)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanConfig:
        """Build from a dict such as `to_dict` returns; unknown keys raise ConfigError."""
        check_keys("model", cls, values)
        return cls(**values)


def wan_1_3b(**overrides: Any) -> WanConfig:
    """Return the sizes of Wan 2.1 T2V 1.3B: Self-Forcing, CausVid, LongLive."""
    return WanConfig(**overrides)


def wan_14b(**overrides: Any) -> WanConfig:
    """Return the sizes of Wan 2.1 T2V 14B: Krea realtime."""
    sizes: dict[str, Any] = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
    return WanConfig(**{**sizes, **overrides})


def wan_ti2v_5b(**overrides: Any) -> WanConfig:
    """Return the sizes of Wan 2.2 TI2V 5B, at 1280 x 704."""
    sizes = {"num_attention_heads": 24, "ffn_dim": 14336, "channels": 48, "latent_height": 44, "latent_width": 80}
    return WanConfig(**{**sizes, **overrides})


PRESETS = {"1.3B": wan_1_3b, "14B": wan_14b, "TI2V-5B": wan_ti2v_5b}
