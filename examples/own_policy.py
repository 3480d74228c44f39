"""A policy of one's own: tokens stay whose keys have a small norm (arXiv 2406.11430).

    python generate.py --policy examples/own_policy.py:KeyNorm
    python -m pytest tests/laws --policy examples/own_policy.py:KeyNorm
    python generate.py --policy examples/own_policy.py:KeyNorm --largest --budget 50%

The first command writes text with it, and the second tests that it obeys the laws of the cache. In
the third, each option is a flag of its own name: `--largest`, and those of `Pruner`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lethe_mini.cache import KVCache, LayerCache
from lethe_mini.options import option
from lethe_mini.policy import Pruner


@dataclass(frozen=True)
class KeyNorm(Pruner):
    """Keeps the tokens whose keys have the smallest norm; every KV head chooses its own."""

    name: ClassVar[str] = "key-norm"
    largest: bool = option(False, "keep the largest norms instead")

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        norm = layer.keys.float().norm(dim=-1)  # (B, H_kv, S)
        return norm if self.largest else -norm
