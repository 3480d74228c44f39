"""LethePlus: Lethe with five additions of ours. docs/LETHE_PLUS.md explains them.

It adds five things to policy.py's Lethe: places for tokens that no newer key resembles, a lag
before attention counts, a choice per head, a part of the budget that layers share evenly, and a cap
on what one layer counts. Each is an option, and a value switches it off. Dense layers get more.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache, LayerCache, Notes
from ..kernels import BLOCK, to_device, widened
from ..options import option, part
from ..policy import ALLOCATIONS, BREAKPOINTS, Lethe
from ..rope import rope_cos_sin, rotate
from .pyramidkv import pyramid


@dataclass(frozen=True)
class LethePlus(Lethe):
    """Lethe (arXiv 2511.06029) with additions of ours; it needs a budget."""

    name: ClassVar[str] = "lethe-plus"
    needs_budget: ClassVar[bool] = True

    allocation: str = option(
        "hoyer", "divides the budget over layers", choices=ALLOCATIONS | {"pyramid": False}
    )
    breakpoint: str = option("none", "where the curve of scores breaks", choices=BREAKPOINTS)
    even_share: float = option(0.65, "part of the budget that layers share evenly", 0, 1)
    cap: float = option(1.5, "most that a layer counts by Hoyer, in medians; 0: no limit", low=0)
    lag: int = option(4, "tokens after which attention to a token counts", 0, 4096)
    distinct_ratio: float = option(
        0.8, "share of what recent tokens leave that goes to tokens that none repeats", 0, 1
    )
    alike: float = option(0.8, "cosine of two keys above which the newer repeats the older", 0, 1)
    per_head: bool = option(True, "every KV head chooses its own tokens")
    value_norm: bool = option(False, "weigh a token's score by the norm of its value")

    def notes(self) -> Notes:
        return replace(super().notes(), lag=self.lag)

    def scores(self, layer: LayerCache) -> Tensor:
        return layer.scores if self.per_head else super().scores(layer)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        if not self.value_norm:
            return self.scores(layer)
        weighed = layer.scores * layer.values.float().norm(dim=-1)  # (B, H_kv, S)
        return weighed if self.per_head else layer.peers.heads(weighed).sum(1, keepdim=True)

    def weights(self, cache: KVCache, sparsity: Tensor) -> Tensor:
        if self.allocation == "pyramid":
            return pyramid(len(cache.layers)).expand(len(cache.seen), -1)
        weights = super().weights(cache, sparsity)  # (B, L)
        if self.cap:  # a layer whose attention is uniform averages over many tokens; few will do
            weights = weights.minimum(self.cap * weights.quantile(0.5, dim=1, keepdim=True))
        return torch.lerp(weights, weights.mean(1, keepdim=True), self.even_share)

    def always(self, layer: LayerCache, rows: Tensor, protected: Tensor, rooms: Tensor) -> Tensor:
        """And the newest tokens that no newer one repeats: facts that no query has asked for."""
        kept = super().always(layer, rows, protected, rooms)  # (R, H_kv, S)
        if not self.distinct_ratio:
            return kept
        recent = self.recent(rooms)
        places = part(self.distinct_ratio, rooms - recent)[:, None, None]
        # What is judged for the first time was recent at the last round: newer tokens are near. The
        # host knows no layer's share, but that hardly any has twice the mean.
        most = [2 * int(self.recent_ratio * self.limit(0, seen)) for seen in layer.seen.counts]
        most = [max(n, self.min_recent) for n in most]
        near = recent.minimum(to_device(most, rows.device)[rows]) + self.interval
        oldest = min(n - m for n, m in zip(layer.lengths, most, strict=True)) - self.interval
        cosine = repeats(keys_before_rope(layer, rows), layer.filled[rows], near, oldest)
        cosine = cosine[..., : layer.length]  # (R, H_kv, S)
        if not self.per_head:
            cosine = layer.peers.heads(cosine).mean(1, keepdim=True)
        distinct = ~kept & (cosine <= self.alike) & layer.valid()[rows]
        newest = distinct.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest
        return kept | distinct & (newest <= places)


def keys_before_rope(layer: LayerCache, rows: Tensor) -> Tensor:
    """(R, H_kv, capacity, D): these sequences' keys as they were before RoPE. All storage, as while
    decoding, so that shapes repeat; beyond a sequence's length it is zero."""
    slots = torch.arange(layer.capacity, device=rows.device)
    angles = slots if layer.compact else layer.store["positions"][rows]
    return rotate(layer.store["keys"][rows], *rope_cos_sin(-angles, layer.inv_freq.float()))


def repeats(keys: Tensor, lengths: Tensor, near: Tensor, oldest: int) -> Tensor:
    """How well a newer token may stand for each: the highest cosine of its key with a newer one's,
    among the last `near`, about the mean of all keys; 0 if none is alike.

    keys: (B, H_kv, S, D) before RoPE, zero beyond each sequence's length; lengths, near: (B,);
    oldest: no token in a slot before it is near. -> (B, H_kv, S), as exact as the keys' dtype, of
    no meaning beyond the length.
    """
    S, block = keys.shape[2], 2 * BLOCK
    mean = keys.sum(2, keepdim=True, dtype=torch.float32) / lengths[:, None, None, None]
    unit = F.normalize(keys - mean, dim=-1)
    unit = widened(unit.to(keys.dtype))[0]  # 16 bits are for the products alone
    slots = torch.arange(S, device=keys.device)
    judges = (slots >= (lengths - near)[:, None]) & (slots < lengths[:, None])
    most, start = unit.new_zeros(unit.shape[:3]), max(0, oldest) // block * block
    for first in range(start, S, block):  # so that memory is linear in S
        last = first + block
        newer = unit[:, :, first:last] * judges[:, None, first:last, None]
        cosine = newer @ unit[:, :, :last].mT
        cosine[..., first:].tril_(-1)  # no token is newer than itself
        older = most[:, :, :last]
        older.copy_(older.maximum(cosine.amax(2)))
    return most
