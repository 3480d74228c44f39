"""Random eviction: the bar that a score has to pass (arXiv 2609.03430)."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import KVCache, LayerCache
from ..options import option
from ..policy import Pruner


@dataclass(frozen=True)
class RandomKV(Pruner):
    """A uniform draw per KV head, anew at every round (arXiv 2609.03430): the bar for any score."""

    name: ClassVar[str] = "random"
    seed: int = option(0, "seed of the draws", low=0)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        draws = torch.zeros(layer.positions.shape)
        for row, length in enumerate(layer.lengths):
            # From what the sequence itself has seen, so that neighbours change nothing.
            key = random.Random(f"{self.seed}-{layer.index}-{cache.seen[row]}").getrandbits(63)
            generator = torch.Generator().manual_seed(key)
            draws[row, :, :length] = torch.rand(draws.shape[1], length, generator=generator)
        return draws.to(layer.positions.device)
