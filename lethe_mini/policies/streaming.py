"""StreamingLLM: the first tokens and the last (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..cache import KVCache, LayerCache
from ..options import option
from ..policy import Pruner


@dataclass(frozen=True)
class StreamingLLM(Pruner):
    """Sinks and recent tokens (arXiv 2309.17453). With --positions compact, as in the original."""

    name: ClassVar[str] = "streaming"
    recent_ratio: float = option(1.0, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.positions.float()
