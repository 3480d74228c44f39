"""Random eviction: the bar that a score has to pass (arXiv 2609.03430)."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..cache import KVCache, LayerCache
from ..kernels import uniform
from ..options import option
from ..policy import Pruner


@dataclass(frozen=True)
class RandomKV(Pruner):
    """A uniform draw per KV head, anew at every round (arXiv 2609.03430): the bar for any score."""

    name: ClassVar[str] = "random"
    seed: int = option(0, "seed of the draws", low=0)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        heads, slots = (torch.arange(n, device=cache.device) for n in layer.positions.shape[1:])
        # From what the sequence itself has seen, so that neighbours change nothing.
        heads = heads[:, None] + layer.peers.first
        counts = (cache.next[:, None, None] << 40) + (heads << 28) + slots
        return uniform(random.Random(f"{self.seed}-{layer.index}").getrandbits(63), counts)
