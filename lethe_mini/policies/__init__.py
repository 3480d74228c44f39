"""The other policies, each its paper's choice of tokens behind the protocol of policy.py.

What is common (sinks, recent tokens, prompt protection, budget, interval) is common code, so a
comparison differs in the choice alone. The defaults are those of the reference code; where that
differs from its paper, or has a plain slip, a line says what is done here.

To add a policy, write it here and list it in POLICIES: command line and tests find it there.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import pyramid
from ..cache import KVCache, LayerCache
from ..errors import UserError
from ..options import option
from ..policy import FullKV, Lethe, Policy, Pruner


def window_logits(layer: LayerCache, cache: KVCache) -> tuple[Tensor, Tensor]:
    """The last W queries against every key held: logits (B, H_kv, G, W, S) float32, -inf where a
    query may not look, and which of the W queries there are at all, (B, W) bool."""
    queries, keys = layer.queries, layer.keys
    B, _, W, D = queries.shape
    grouped = queries.view(B, keys.shape[1], -1, W, D) * D**-0.5
    logits = torch.matmul(grouped, keys.transpose(2, 3)[:, :, None]).float()
    seen = torch.tensor(cache.seen, device=cache.device)
    places = seen[:, None] + torch.arange(-W, 0, device=cache.device)  # (B, W)
    ahead = layer.positions[:, :, None] > places[:, None, :, None]  # (B, H_kv, W, S)
    hidden = (ahead | ~layer.valid()[:, :, None])[:, :, None]
    # A query that was never asked looks everywhere, so that its softmax is finite; callers drop it.
    asked = places >= 0
    return logits.masked_fill(hidden & asked[:, None, None, :, None], -torch.inf), asked


def window_attention(layer: LayerCache, cache: KVCache) -> Tensor:
    """Attention of the last W queries, (B, H_kv, G, W, S) float32; rows that do not exist are 0."""
    logits, asked = window_logits(layer, cache)
    weights = logits.softmax(dim=-1)
    return weights * (asked[:, None, None, :, None] & layer.valid()[:, :, None, None])


@dataclass(frozen=True)
class StreamingLLM(Pruner):
    """Sinks and recent tokens (arXiv 2309.17453). With --positions compact, as in the original."""

    name: ClassVar[str] = "streaming"
    recent_ratio: float = option(1.0, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.positions.float()


@dataclass(frozen=True)
class H2O(Pruner):
    """Heavy hitters: all the mass since the start, per KV head (arXiv 2306.14048).

    The budget is halved exactly between heavy and recent ones, where the reference rounds two
    ratios apart and may keep a token less.
    """

    name: ClassVar[str] = "h2o"
    gamma: ClassVar[float] = 1.0
    sinks: int = option(0, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.5, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.scores


@dataclass(frozen=True)
class TOVA(Pruner):
    """The last query's attention, mean over all heads; the last token stays (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"
    window: ClassVar[int] = 1
    sinks: int = option(0, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.0, "share of the room that goes to the last tokens", 0, 1)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        weights = window_attention(layer, cache)[:, :, :, -1]  # (B, H_kv, G, S)
        return weights.mean((1, 2))[:, None].expand(-1, weights.shape[1], -1)


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


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice; budgets fall linearly from low to high layers (arXiv 2406.02069).

    They add up to the total exactly: the reference divides with floors and overspends it.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: float = option(20.0, "the lowest share is 1/beta of the mean", low=1)

    def weights(self, cache: KVCache) -> list[list[float]]:
        return [pyramid(len(cache.layers), self.beta) for _ in cache.seen]


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


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (FullKV, Lethe, StreamingLLM, H2O, TOVA, SnapKV, PyramidKV, RKV, RandomKV)
}
