"""Conditioning: what a step is given besides its tokens, in the same form for eager and captured steps."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import StreamStateError


class Conditioning(NamedTuple):
    """Keyword arguments of one forward: `values` may change from step to step, `static` shape the computation.

    A tensor is a value, as given. So are an int (0-dim int64) and a float (0-dim float32); they stay Python numbers
    until `tensor` makes them tensors, so that a captured step can fill its own buffers.
    """

    values: dict[str, Tensor | int | float]
    static: dict[str, bool | str | None]

    def signature(self) -> tuple[Any, ...]:
        """Return what a captured step depends on: names, shapes and dtypes of the values, the static ones in full."""
        values = (
            (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, (), scalar_dtype(value))
            for name, value in self.values.items()
        )
        return tuple(sorted(values, key=lambda item: item[0])), tuple(sorted(self.static.items()))

    def tensors(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments with every value as a tensor on the device."""
        made = {name: as_tensor(value, device) for name, value in self.values.items()}
        return {**made, **self.static}


def scalar_dtype(value: int | float) -> torch.dtype:
    """Return the dtype of the tensor that stands for a Python number."""
    return torch.int64 if isinstance(value, int) else torch.float32


def as_tensor(value: Tensor | int | float, device: torch.device) -> Tensor:
    """Return a conditioning value as a tensor on the device, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=not value.is_pinned()) if value.device != device else value
    return torch.full((), value, dtype=scalar_dtype(value), device=device)


def accepted_names(forward: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str]] | None:
    """Return the conditioning names that `forward(tokens, context, ...)` accepts, and those it requires.

    None if it takes any keyword.
    """
    parameters = list(inspect.signature(forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return frozenset(p.name for p in named), frozenset(p.name for p in named if p.default is p.empty)


def read_conditioning(given: Mapping[str, Any], names: tuple[frozenset[str], frozenset[str]] | None) -> Conditioning:
    """Sort keyword arguments into values and static ones.

    Raises:
        StreamStateError: a name that the model does not take, one that it needs and that is missing, or a value that
            is neither a tensor nor a number, bool, str or None.
    """
    if names is not None:
        accepted, required = names
        unknown, missing = sorted(set(given) - accepted), sorted(required - set(given))
        if unknown or missing:
            raise StreamStateError(
                f"conditioning: expected {sorted(accepted) or 'none'} (required: {sorted(required) or 'none'}), "
                + (f"got unknown {unknown}" if unknown else f"{missing} missing")
            )
    values: dict[str, Tensor | int | float] = {}
    static: dict[str, bool | str | None] = {}
    for name, value in given.items():
        if value is None or isinstance(value, bool | str):
            static[name] = value
        elif isinstance(value, Tensor):
            values[name] = value
        elif isinstance(value, numbers.Integral):
            values[name] = int(value)
        elif isinstance(value, numbers.Real):
            values[name] = float(value)
        else:
            raise StreamStateError(
                f"{name}: expected a tensor, a number, a bool, a str or None, got {type(value).__name__}"
            )
    return Conditioning(values, static)
