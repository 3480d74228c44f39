"""Rotary position embedding: how far a position turns each pair of a key's or a query's numbers."""

import torch
from torch import Tensor


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, factor=1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle: positions (...) int, inv_freq (D/2) -> (..., D/2) float32.
    factor: ModelConfig.rope_factor, for queries and new keys; a key that turns again has it.

    Angles are taken in the dtype of inv_freq. Models were trained with float32, where the angle of
    position 8,000 is off by up to 5e-4; only in float64 does turning by a, then b, turn by a + b.
    """
    angles = positions.to(inv_freq.dtype)[..., None] * inv_freq
    return angles.cos().float() * factor, angles.sin().float() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) by their angles. x: (..., D); cos, sin: (..., D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
