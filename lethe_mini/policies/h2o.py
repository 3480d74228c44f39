"""H2O: the tokens that received most attention since the start (arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..cache import KVCache, LayerCache
from ..options import option
from ..policy import Pruner


@dataclass(frozen=True)
class H2O(Pruner):
    """Heavy hitters: all the mass since the start, per KV head (arXiv 2306.14048).

    The budget is halved exactly between heavy and recent ones, where the reference rounds two
    ratios apart and may keep a token less.
    """

    name: ClassVar[str] = "h2o"
    scored: ClassVar[bool] = True
    sinks: int = option(0, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.5, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.scores
