"""Rotary position embedding: how far a position turns each pair of a key's or a query's numbers."""

import math

import torch
from torch import Tensor

from .config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position turns each of the D/2 pairs: (D/2,) float32, RoPE scaling applied."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / config.rope_theta ** (half / config.head_dim)
    scaling = config.rope_scaling
    if config.rope_type == "linear":
        return inv_freq / scaling["factor"]
    if config.rope_type == "llama3":
        # Wavelengths beyond the original context are stretched by `factor`, those well within it
        # stay, and those between are interpolated.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]
    return inv_freq


def rope_cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle: positions (...) int, inv_freq (D/2) -> (..., D/2) float32.

    Angles are taken in the dtype of inv_freq. Models were trained with float32, where the angle of
    position 8,000 is off by up to 5e-4; only in float64 does turning by a, then b, turn by a + b.
    """
    angles = positions.to(inv_freq.dtype)[..., None] * inv_freq
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) by their angles. x: (..., D); cos, sin: (..., D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
