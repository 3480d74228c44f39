"""RoPE as a checkpoint describes it: what a position turns each pair of a head's numbers by.

`default` is plain RoPE. The others stretch it, so that a model reads longer texts than it was first
trained on: `linear`, `llama3` (Llama 3.1), and `yarn` (arXiv 2309.00071).
"""

import math

import torch

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The numbers that each kind needs, and those that it may have.
ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": LLAMA3, "yarn": ("factor",)}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
YARN_FACTORS = ("attention_factor", "attn_factor", "mscale", "mscale_all_dim")


def inverse_frequencies(
    kind: str, theta: float, head_dim: int, numbers: dict[str, float]
) -> tuple[float, ...]:
    """Radians a position turns each of the D/2 pairs, as exact as float32, for a kind of
    ROPE_TYPES with its numbers."""
    half = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / theta ** (half / head_dim)
    if kind == "linear":
        inv_freq = inv_freq / numbers["factor"]
    elif kind == "llama3":
        # Wavelengths beyond the original context are stretched by `factor`, those well within it
        # stay, and those between are interpolated.
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        turns = numbers["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / numbers["factor"]
    elif kind == "yarn":
        first, last = _ramp(theta, head_dim, numbers)
        keep = 1 - ((half / 2 - first) / (last - first)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / numbers["factor"]
    return tuple(inv_freq.tolist())


def _ramp(theta: float, head_dim: int, numbers: dict[str, float]) -> tuple[float, float]:
    """yarn: the last pair that is left alone, and the first that is stretched whole. A pair turns
    `beta_fast` and `beta_slow` times in the original context there."""

    def pair(turns: float) -> float:
        wavelength = numbers["original_max_position_embeddings"] / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair(numbers["beta_fast"]), pair(numbers["beta_slow"])
    if numbers["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last


def rope_factor(kind: str, numbers: dict[str, float]) -> float:
    """What cos and sin are multiplied by: with yarn, attention is sharper the longer the stretch.

    `attention_factor` is that number. `attn_factor` multiplies it, as in yarn's own code; it is in
    DeepSeek-R1-0528-Qwen3-8B, where the product is 1, and transformers does not read it.
    """
    if kind != "yarn":
        return 1.0
    if "attention_factor" in numbers:
        return numbers["attention_factor"]

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(numbers["factor"]) + 1 if numbers["factor"] > 1 else 1.0

    factor = scale(1.0)
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        factor = scale(numbers["mscale"]) / scale(numbers["mscale_all_dim"])
    return factor * numbers.get("attn_factor", 1.0)
