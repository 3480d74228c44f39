"""SnapKV: the tokens that the last queries look at (arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache, LayerCache
from ..errors import UserError
from ..options import option
from ..policy import Pruner
from .window import window_attention


@dataclass(frozen=True)
class SnapKV(Pruner):
    """The mass of the last queries, smoothed, and those queries' tokens (arXiv 2404.14469).

    The paper chooses once, after the prompt; here every round chooses anew.
    """

    name: ClassVar[str] = "snapkv"
    sinks: int = option(0, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.0, "share of the room that goes to the last tokens", 0, 1)
    window: int = option(64, "last queries to look through; their tokens are kept", low=1)
    kernel: int = option(5, "slots that a score is pooled over, odd", low=1)

    def __post_init__(self):
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise UserError(f"kernel should be odd, not {self.kernel}")

    @property
    def min_recent(self) -> int:
        return self.window

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        mass = window_attention(layer, cache).sum((2, 3))  # (B, H_kv, S)
        return F.avg_pool1d(mass, self.kernel, stride=1, padding=self.kernel // 2)
