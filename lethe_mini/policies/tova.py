"""TOVA: the tokens that the last query looks at (arXiv 2401.06104)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..cache import KVCache, LayerCache
from ..options import option
from ..policy import Pruner
from .window import window_attention


@dataclass(frozen=True)
class TOVA(Pruner):
    """The last query's attention, mean over all heads; the last token stays (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"
    window: ClassVar[int] = 1
    sinks: int = option(0, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.0, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        weights = window_attention(layer, cache)[:, :, :, -1]  # (B, H_kv, G, S)
        return layer.peers.heads(weights).mean((1, 2))[:, None]  # (B, 1, S)
