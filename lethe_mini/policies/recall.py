"""Recall: tokens that past queries would look at now or later, and tokens unlike the others.

Attention so far tells the near future. What costs is a token that comes back after a long silence.
Three things know of it. Two are queries turned by RoPE to another time:

- Some past queries that differ most from each other are kept, the *beacons*, as they were before
  RoPE (after arXiv 2609.04971). At a round they are turned to the present and asked again.
- Every query is asked once more, as it would be asked `after` tokens later, of the keys held now.
  It did not see the keys behind it; now it does. The most that any pays is a key's *mark*.

The third needs no query: a value far from the mean of its head's says what few tokens say, and a
fact that is stated once is made of such. These *outliers* have places of their own in each head. Of
the places left a fifth goes to marks, the rest to beacons. There all layers and heads draw from the
same places. A layer holds what its head with most places needs, for its heads hold equally many.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVCache, LayerCache, Notes
from ..errors import UserError
from ..kernels import BLOCK, to_device
from ..options import option, part
from ..policy import Pruner, Round, rank
from ..rope import rope_cos_sin, rotate

SAME = 0.999  # cosine above which two queries are one, rounded differently
AT_ONCE = 8  # layers, times sequences, whose beacons are chosen together; more fit no CPU's cache


@dataclass(frozen=True)
class Recall(Pruner):
    """What past queries want of the keys (after arXiv 2609.04971; the marks are ours)."""

    name: ClassVar[str] = "recall"
    needs_budget: ClassVar[bool] = True

    window: int = option(32, "last queries that are kept, to be asked again", low=1, high=4096)
    beacons: int = option(32, "past queries of each head that are kept", low=1, high=1024)
    outlier_ratio: float = option(0.3, "share of what recent tokens leave that outliers get", 0, 1)
    marked_ratio: float = option(0.2, "share of what outliers leave that marks give", 0, 1)
    after: int = option(256, "tokens until what is marked is asked for", low=0)
    kernel: int = option(9, "slots that share a mark, or how far they lie out; odd", low=1)
    even_share: float = option(0.3, "part of places by beacons that heads share evenly", 0, 1)

    def __post_init__(self):
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise UserError(f"kernel should be odd, not {self.kernel}")

    @property
    def pause(self) -> int:
        """Tokens after which `due` must be asked, so that every query marks."""
        return min(self.window, self.interval)

    def notes(self) -> Notes:
        return Notes(
            window=self.window,
            interval=self.interval,
            threshold=self.evict_threshold,
            extra=("marks", "wanted"),
            beacons=self.beacons,
        )

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        since = [(s - p) % self.interval for s, p in zip(cache.seen, cache.prompt, strict=True)]
        rows = [row for row, n in enumerate(since) if prefilled or n % self.window == 0]
        if rows:
            index = to_device(rows, cache.device)
            some = max(1, AT_ONCE // len(rows))
            for first in range(0, len(cache.layers), some):
                self.look(cache.layers[first : first + some], cache, index)
        return super().due(cache, prefilled)

    def look(self, layers: list[LayerCache], cache: KVCache, rows: Tensor) -> None:
        """Marks the keys of these sequences (R,) and chooses their beacons anew, from the old ones
        and the last queries."""
        pool, there = [], []
        ages = torch.arange(self.window, 0, -1, device=cache.device)
        for layer in layers:
            queries, S = layer.queries[rows], layer.length
            asked = (ages <= cache.next[rows, None])[:, None].expand(queries.shape[:3])
            inv_freq = layer.inv_freq.float()

            later = rotate(queries, *rope_cos_sin(ages + self.after, inv_freq))
            most = largest_attention(later, asked, layer.keys[rows], layer.valid()[rows])
            marks = layer.store["marks"]
            marks[rows, :, :S] = marks[rows, :, :S].maximum(most)

            plain = rotate(queries, *rope_cos_sin(ages - now(layer, cache, rows), inv_freq))
            pool.append(torch.cat((layer.beacons[rows], plain), dim=2))
            there.append(torch.cat((layer.beacons[rows].any(-1), asked), dim=2))
        pool, there = torch.cat(pool), torch.cat(there)  # (layers * R, H, N, D) and (.., N)
        picked = farthest(pool, there, self.beacons)[..., None]
        chosen = pool.gather(2, picked.clamp(min=0).expand(-1, -1, -1, pool.shape[3]))
        chosen = chosen.masked_fill(picked < 0, 0).split(len(rows))
        for layer, beacons in zip(layers, chosen, strict=True):
            layer.beacons[rows] = beacons

    def round(self, cache: KVCache, due: list[bool]) -> Round:
        self.weigh(cache, [row for row, ready in enumerate(due) if ready])
        return super().round(cache, due)

    def weigh(self, cache: KVCache, rows: list[int]) -> None:
        """Writes how much every token of these sequences is wanted, in [0, 3]: an outlier two and
        more; of a place by its mark one more than the mark; by beacons at least a half where it has
        a place among all layers'."""
        index, (first, room) = to_device(rows, cache.device), self.rooms(cache, rows)
        left = room - self.recent(room)
        outliers = part(self.outlier_ratio, left)
        places = (left - outliers) * len(cache.layers) * cache.layers[0].keys.shape[1]
        by_marks = part(self.marked_ratio, places)
        far, marked, asked = [], [], []
        for layer in cache.layers:
            valid = layer.valid()[index]
            free = valid & ~self.always(layer, index, first, room)
            far.append(self.outlying(layer.values[index], valid, free, outliers))
            free = free & (far[-1] == 0)
            marks, most = self.wishes(layer, cache, index, valid)
            marked.append(marks.masked_fill(~free, 0))
            asked.append(most.masked_fill(~free, 0))
        top = threshold(marked, by_marks)
        rest = [x.masked_fill(marks >= top, 0) for x, marks in zip(asked, marked, strict=True)]
        least = threshold(rest, places - by_marks)
        for layer, out, marks, x in zip(cache.layers, far, marked, asked, strict=True):
            wanted = torch.where(marks >= top, 1 + marks, x / (x + least))
            wanted = torch.where(out > 0, 3 - 1 / (1 + out), wanted)
            layer.store["wanted"][index, :, : layer.length] = wanted

    def outlying(self, values: Tensor, valid: Tensor, free: Tensor, n: Tensor) -> Tensor:
        """(R, H_kv, S) float32: how far out the values lie that are each head's `n` (R,)
        farthest of the `free`; 0 elsewhere."""
        far = distance(values, valid)
        # In the first layer equal tokens have equal values; rounding must not choose among them.
        far = F.avg_pool1d(far, self.kernel, 1, self.kernel // 2).bfloat16().float()
        first = torch.arange(free.shape[2], device=free.device) < n[:, None, None]
        out = torch.zeros_like(free).scatter(-1, rank(far, free), first.expand_as(free))
        return far.masked_fill(~(out & free), 0)

    def wishes(self, layer: LayerCache, cache: KVCache, rows: Tensor, valid: Tensor):
        """(R, H_kv, S) float32 each: every key's mark, and the most that a beacon pays it now."""
        marks = layer.store["marks"][rows, :, : layer.length]
        marks = F.max_pool1d(marks, self.kernel, 1, self.kernel // 2)
        turn = rope_cos_sin(now(layer, cache, rows), layer.inv_freq.float())
        beacons = rotate(layer.beacons[rows], *turn)
        return marks, largest_attention(beacons, beacons.any(-1), layer.keys[rows], valid)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.store["wanted"][:, :, : layer.length]

    def weights(self, cache: KVCache, sparsity: Tensor | None) -> Tensor:
        """A layer's part: the places of its head with most, those by beacons partly evened out."""
        first, room = self.rooms(cache, list(range(len(cache.seen))))
        wanted = [layer.store["wanted"] for layer in cache.layers]
        placed = torch.stack([(x >= 1).sum(2).float() for x in wanted], dim=1)  # (B, L, H_kv)
        rest = torch.stack([(x >= 0.5).sum(2).float() for x in wanted], dim=1) - placed
        rest = rest.lerp(rest.mean((1, 2), keepdim=True), self.even_share)
        return (placed + rest).amax(2) + (first + self.recent(room))[:, None]

    def rooms(self, cache: KVCache, rows: list[int]) -> tuple[Tensor, Tensor]:
        """(R,) each: positions that are protected, and how many tokens a layer keeps beside them if
        all keep as many."""
        first = [self.protected(cache.prompt[row]) for row in rows]
        limits = [self.limit(cache.prompt[row], cache.seen[row]) for row in rows]
        first, limits = to_device([first, limits], cache.device)
        return first, limits - first


def now(layer: LayerCache, cache: KVCache, rows: Tensor) -> Tensor:
    """(R, 1, 1): the angle of the next token's query."""
    return (layer.filled if layer.compact else cache.next)[rows][:, None, None]


def farthest(pool: Tensor, there: Tensor, n: int) -> Tensor:
    """(R, H, n) int64: of these vectors (R, H, N, D) the last, then again and again the one least
    alike to all before it, by cosine about the mean; -1 when none is left that is not the same as
    one before it. there: (R, H, N) bool, which exist."""
    vectors, weight = pool.float(), there[..., None].float()
    mean = (vectors * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    unit = F.normalize(vectors - mean, dim=-1)
    cosine = unit @ unit.mT
    nearest = cosine.new_full(there.shape, -2.0).masked_fill(~there, 2.0)
    best = torch.full(there.shape[:2], there.shape[2] - 1, device=pool.device)
    picked = [best]
    while len(picked) < n:
        index = best[..., None, None].expand(-1, -1, 1, there.shape[2])
        nearest = nearest.maximum(cosine.gather(2, index)[:, :, 0]).scatter(2, best[..., None], 2.0)
        likeness, best = nearest.min(-1)
        picked.append(best.masked_fill(likeness > SAME, -1))
    return torch.stack(picked, dim=-1)


def largest_attention(queries: Tensor, there: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """(R, H_kv, S) float32: the most that one of N queries of its group pays to each key.

    queries: (R, H, N, D); there: (R, H, N) bool, which exist; keys: (R, H_kv, S, D); valid:
    (R, 1, S) bool. Queries go in blocks, so memory is linear in N.
    """
    groups = (keys.shape[1], -1)
    queries, there = (x.unflatten(1, groups).flatten(2, 3) for x in (queries, there))
    queries = queries * keys.shape[3] ** -0.5
    most, beyond = torch.zeros(keys.shape[:3], device=keys.device), ~valid[:, :, None]
    for some, exist in zip(queries.split(BLOCK, 2), there.split(BLOCK, 2), strict=True):
        logits = torch.matmul(some, keys.mT).float().masked_fill_(beyond, -torch.inf)
        most = most.maximum((logits.softmax(-1) * exist[..., None]).amax(2))
    return most


def distance(values: Tensor, valid: Tensor) -> Tensor:
    """How far each value lies from the mean of its head's, (R, H_kv, S) float32; 0 where there is
    none. values: (R, H_kv, S, D); valid: (R, 1, S) bool."""
    there, values = valid[..., None].float(), values.float()
    mean = there.mT @ values / there.sum(2, keepdim=True).clamp(min=1)
    return torch.linalg.vector_norm(values - mean, dim=-1) * valid


def threshold(layers: list[Tensor], places: Tensor) -> Tensor:
    """(R, 1, 1): what the last of so many places (R,), over all layers and heads, is worth; layers:
    (R, H_kv, S) each. Infinite where there is no place."""
    ranked = torch.cat([x.flatten(1) for x in layers], dim=1).sort(1, descending=True).values
    last = (places - 1).clamp(0, ranked.shape[1] - 1)
    found = ranked.gather(1, last[:, None])[:, 0].clamp(min=1e-30)
    return found.masked_fill(places < 1, torch.inf)[:, None, None]
