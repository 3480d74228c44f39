"""PyramidKV: SnapKV with more room in the lower layers (arXiv 2406.02069)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import KVCache
from ..options import option
from .snapkv import SnapKV


def pyramid(layers: int, beta: float = 20.0) -> Tensor:
    """(layers,) float64: weights that fall linearly from the first layer to the last, mean 1."""
    low, high = 1 / beta, 2 - 1 / beta
    falls = [high - (high - low) * i / max(1, layers - 1) for i in range(layers)]
    return torch.tensor(falls, dtype=torch.float64)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice; budgets fall linearly from low to high layers (arXiv 2406.02069).

    They add up to the total exactly: the reference divides with floors and overspends it.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: float = option(20.0, "the lowest share is 1/beta of the mean", low=1)

    def weights(self, cache: KVCache, sparsity: Tensor | None) -> Tensor:
        return pyramid(len(cache.layers), self.beta).expand(len(cache.seen), -1)
