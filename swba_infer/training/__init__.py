"""Record a world, train a model of it, and measure what came out."""

from __future__ import annotations
