"""R-KV: tokens that matter and that no other token repeats (arXiv 2505.24133)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache, LayerCache
from ..options import option
from .snapkv import SnapKV
from .window import window_logits


@dataclass(frozen=True)
class RKV(SnapKV):
    """lam * importance - (1 - lam) * redundancy, per KV head (arXiv 2505.24133).

    lam is 0.1 as in the paper's text and the reference (one table has it the other way round). The
    reference takes redundancy from the batch's first sequence; here each has its own.
    """

    name: ClassVar[str] = "rkv"
    window: int = option(8, "last queries to look through; their tokens are kept", low=1)
    kernel: int = option(7, "slots that a score is pooled over, odd", low=1)
    lam: float = option(0.1, "weight of importance against redundancy", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        logits, asked = window_logits(layer, cache)
        weights = logits.amax(2).softmax(dim=-1) * asked[:, None, :, None]  # (B, H_kv, W, S)
        mean = weights.sum(2) / asked.sum(-1)[:, None, None]
        attention = F.max_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
        return self.lam * attention - (1 - self.lam) * redundancy(layer.keys, layer.valid())


def redundancy(keys: Tensor, valid: Tensor, threshold: float = 0.5, block: int = 128) -> Tensor:
    """How much a key repeats others (arXiv 2505.24133): keys (B, H_kv, S, D), valid (B, 1, S) ->
    (B, H_kv, S) float32, the softmax over the keys of their mean cosine with all others.

    Of what is alike (cosine above `threshold`) each key forgives the latest. Keys go in blocks of
    rows, so memory is linear in S.
    """
    unit = F.normalize(keys.float(), dim=-1) * valid[..., None]
    S = keys.shape[2]
    slots = torch.arange(S, device=keys.device)
    total = torch.zeros(keys.shape[:3], device=keys.device)
    for start in range(0, S, block):
        rows = slots[start : start + block, None]
        cosine = unit[:, :, start : start + block] @ unit.transpose(2, 3)  # (B, H_kv, block, S)
        cosine = cosine.masked_fill(rows == slots, 0)
        latest = torch.where(cosine > threshold, slots, -1).amax(-1, keepdim=True)
        total += cosine.masked_fill(slots == latest, 0).sum(2)
    mean = total / valid.sum(-1, keepdim=True)
    return mean.masked_fill(~valid, -torch.inf).softmax(dim=-1)
