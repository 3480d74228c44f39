"""Which tokens to keep: Lethe (arXiv 2511.06029) as pure functions, and the protocol of policies.

A round of pruning asks a policy, sequence by sequence: how a total divides over the layers
(`weights`), how much each token matters (`importance`), how many of them stand out (`salient`), and
what stays whatever its importance (`always`). The rest is done here, once, with integers:

    keep = always (protected, recent; Lethe's distinct ones) + the most important of the rest

Policies are frozen: whatever changes during a run lives in the cache.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import pyramid, split_budget
from .cache import BLOCK, KVCache, LayerCache
from .kernels import widened
from .options import check_options, check_room, option


def hoyer(scores: Tensor, lengths: Tensor) -> Tensor:
    """How concentrated attention is, in [0, 1]: 0 uniform, 1 one-hot (arXiv 2511.06029, eq. 1).

    scores: (..., S) non-negative; lengths: (...) int, how many of S count. -> (...) float32. A
    single token, or no mass at all, is as uniform as can be: 0.
    """
    S = scores.shape[-1]
    held = scores.float() * (torch.arange(S, device=scores.device) < lengths[..., None])
    held = held / held.amax(-1, keepdim=True).clamp(min=1e-30)  # tiny scores must not underflow
    l1, l2 = held.sum(-1), held.square().sum(-1).sqrt()
    root = lengths.float().sqrt()
    value = (root - l1 / l2.clamp(min=1e-30)) / (root - 1).clamp(min=1e-30)
    return torch.where((lengths > 1) & (l1 > 0), value.clamp(0, 1), 0.0)


def find_breakpoint(ranked: Tensor, segments: int, tau: float, knee: str) -> int | None:
    """Where the curve of descending scores breaks, or None (arXiv 2511.06029, Algorithm 1).

    ranked: (n,) descending, n at least 1, cut into `segments` equal parts. `global`: the first
    boundary k with ranked[0] / ranked[k] > tau. `segment`: the start of the first part whose own
    first / last <= tau, where the curve has gone flat; if that is the very first part, nothing
    stands out. Comparisons multiply, so zeros need no special care.
    """
    segments = min(segments, len(ranked))  # beyond that the cuts are the same
    cuts = torch.arange(segments + 1, device=ranked.device) * len(ranked) // segments
    starts, ends = ranked[cuts[:-1]], ranked[cuts[1:] - 1]
    found = starts <= tau * ends if knee == "segment" else ranked[0] > tau * starts
    if knee == "none":
        return None
    return int(cuts[int(found.int().argmax())]) or None


def rank(importance: Tensor) -> Tensor:
    """Slots, the most important first; of equals the newer; NaN last. (..., S) -> int64."""
    ranked = importance.float().nan_to_num(torch.finfo(torch.float32).min)
    # A stable sort of the flipped row puts the newer of two equals first.
    return ranked.shape[-1] - 1 - ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)


def repeats(keys: Tensor, lengths: Tensor, near: Tensor) -> Tensor:
    """How well a newer token may stand for each: the highest cosine of its key with a newer one's,
    among the last `near`, about the mean of all keys; 0 if none is alike.

    keys: (B, H_kv, S, D) before RoPE, zero beyond each sequence's length; lengths, near: (B,).
    -> (B, H_kv, S), as exact as the keys' dtype, of no meaning beyond the length.
    """
    S, block, oldest = keys.shape[2], 2 * BLOCK, lengths - near
    mean = keys.sum(2, keepdim=True, dtype=torch.float32) / lengths[:, None, None, None]
    unit = F.normalize(keys - mean, dim=-1)
    unit = widened(unit.to(keys.dtype))[0]  # 16 bits are for the products alone
    slots = torch.arange(S, device=keys.device)
    judges = (slots >= oldest[:, None]) & (slots < lengths[:, None])
    most, start = unit.new_zeros(unit.shape[:3]), max(0, int(oldest.min())) // block * block
    for first in range(start, S, block):  # so that memory is linear in S
        last = first + block
        newer = unit[:, :, first:last] * judges[:, None, first:last, None]
        cosine = newer @ unit[:, :, :last].mT
        cosine[..., first:].tril_(-1)  # no token is newer than itself
        older = most[:, :, :last]
        older.copy_(older.maximum(cosine.amax(2)))
    return most


def choose(importance: Tensor, always: Tensor, salient: int, share: int) -> Tensor:
    """The slots that a sequence keeps in a layer: (H_kv, n) int64, ascending, n for every head.

    importance, always: (H_kv, S). Those of `always` stay whatever their rank; beyond these, of the
    `salient` first by rank as many as `share` has room for. n is that of the head which keeps most.
    """
    order, slots = rank(importance), torch.arange(importance.shape[1], device=importance.device)
    fixed, least = always.gather(-1, order), always.sum(-1, keepdim=True)
    wanted = (fixed | (slots < salient)).sum(-1).max()
    n = wanted.clamp(max=share).maximum(least.max())
    chosen = fixed | ((~fixed).cumsum(-1) <= n - least)
    return always.scatter(-1, order, chosen).nonzero()[:, 1].view(len(order), int(n))


@dataclass(frozen=True)
class Policy:
    """What the engine asks of a policy. This one keeps everything."""

    name: ClassVar[str] = ""
    gamma: ClassVar[float | None] = None  # decay of the scores; None: no scores are kept
    lag: ClassVar[int] = 0  # tokens that a query must be later than a key for its mass to count
    window: ClassVar[int] = 0  # how many of the last queries the cache remembers

    def notes(self) -> dict:
        """What a cache has to note for this policy; see LayerCache."""
        return {"scored": self.gamma is not None, "lag": self.lag, "window": self.window}

    def check(self, prompt: int) -> None:
        """Raises UserError if so long a prompt cannot be served."""

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        """Per sequence: is it time for a round? Decided from its own tokens alone.

        prefilled: the last tokens came as a prompt, not one by one.
        """
        return [False] * len(cache.seen)

    def round(self, cache: KVCache, due: list[bool]) -> None:
        """One pass of pruning over the sequences that are due; the others keep everything."""


@dataclass(frozen=True)
class FullKV(Policy):
    """Keeps everything."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class Pruner(Policy):
    """What every policy that prunes shares. A new one defines `importance`, more only if it must.

    B sequences, S slots; a layer (LayerCache) offers keys, values, positions, scores and lengths.
    """

    min_recent: ClassVar[int] = 1

    budget: int | None = option(None, "tokens per layer after a round, on average", low=1)
    interval: int = option(128, "tokens between two rounds", low=1)
    sinks: int = option(4, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.3, "share of the room that goes to the last tokens", 0, 1)
    protect_prompt: bool = option(True, "keep the whole prompt; it counts inside the budget")

    def __post_init__(self):
        check_options(self)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        """(B, H_kv, S): the higher, the longer a token stays. Heads may differ."""
        raise NotImplementedError

    def weights(self, cache: KVCache) -> list[list[float]]:
        """Per sequence, the layers' shares of the budget, in any unit. Default: equal."""
        return [[1.0] * len(cache.layers) for _ in cache.seen]

    def salient(self, importance: Tensor, layer: LayerCache, row: int) -> int:
        """How many of the most important tokens stand out, of one sequence; importance: (H_kv, its
        length). Default: all of them."""
        return layer.lengths[row]

    def recent(self, room: int) -> int:
        """How many of `room` tokens go to the newest; at least `min_recent`."""
        return min(room, max(self.min_recent, int(self.recent_ratio * room)))

    def always(self, layer: LayerCache, rows, protected, rooms) -> Tensor:
        """(len(rows), H_kv, S) bool: which slots of these sequences stay whatever their importance.
        Default: positions below `protected`, and the most recent of the room beside these."""
        device, pairs = layer.filled.device, zip(rows, rooms, strict=True)
        recent = [layer.lengths[row] - self.recent(room) for row, room in pairs]
        first, last = torch.tensor([protected, recent], device=device)[:, :, None, None]
        slots = torch.arange(layer.length, device=device)
        return (layer.positions[rows] < first) | (slots >= last)

    def protected(self, prompt: int) -> int:
        """First positions that always stay, of a sequence with so long a prompt."""
        return max(self.sinks, prompt) if self.protect_prompt else self.sinks

    def check(self, prompt: int) -> None:
        check_room(self.budget, self.protected(prompt) + self.min_recent, self.protect_prompt)

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        return [
            (prefilled or (seen - prompt) % self.interval == 0) and self.wants(cache, row)
            for row, (seen, prompt) in enumerate(zip(cache.seen, cache.prompt, strict=True))
        ]

    def wants(self, cache: KVCache, row: int) -> bool:
        """Does this sequence hold more than it should?"""
        if self.budget is None:
            return False
        held = sum(layer.lengths[row] for layer in cache.layers)
        return held > self.budget * len(cache.layers)

    def round(self, cache: KVCache, due: list[bool]) -> None:
        rows = [row for row, ready in enumerate(due) if ready]
        protected = [self.protected(cache.prompt[row]) for row in rows]
        for layer, share in zip(cache.layers, self.shares(cache), strict=True):
            importance, counts = self.importance(layer, cache), list(layer.lengths)
            slots = torch.arange(layer.length, device=importance.device)
            kept = slots.repeat(*importance.shape[:2], 1)  # whoever is not due keeps all
            rooms = [
                share[row] - (min(first, counts[row]) if self.budget else 0)
                for row, first in zip(rows, protected, strict=True)
            ]
            for row, always in zip(rows, self.always(layer, rows, protected, rooms), strict=True):
                scores, n = importance[row, :, : counts[row]], counts[row]
                salient = self.salient(scores, layer, row)
                chosen = choose(scores, always[:, :n], salient, share[row])
                counts[row] = chosen.shape[1]
                kept[row, :, : counts[row]] = chosen
            if counts != layer.lengths:
                layer.keep(kept, counts)

    def shares(self, cache: KVCache) -> list[list[int]]:
        """(L, B) tokens each layer may keep: the budget split exactly, or all without a budget."""
        lengths = [layer.lengths for layer in cache.layers]
        if self.budget is None:
            return lengths
        L, columns = len(lengths), []
        for row, weights in enumerate(self.weights(cache)):
            floors = [self.protected(cache.prompt[row]) + self.min_recent] * L
            held = [layer[row] for layer in lengths]
            columns.append(split_budget(self.budget * L, weights, floors, held))
        return [list(row) for row in zip(*columns, strict=True)]


# The words of Lethe's options, and whether each makes sense without a budget.
ALLOCATIONS = {"hoyer": True, "inverse_hoyer": False, "uniform": False, "pyramid": False}
KNEES = {"auto": True, "global": True, "segment": True, "none": False}
GRANULARITIES = {"auto": True, "layer": True, "head": True}


@dataclass(frozen=True)
class Lethe(Pruner):
    """Budgets by Hoyer, scores by RASR, a breakpoint by Algorithm 1 (arXiv 2511.06029)."""

    name: ClassVar[str] = "lethe"

    allocation: str = option("hoyer", "divides the budget over layers", choices=ALLOCATIONS)
    even_share: float = option(0.65, "part of the budget by Hoyer that layers share evenly", 0, 1)
    cap: float = option(1.5, "most that a layer counts by Hoyer, in medians; 0: no limit", low=0)
    knee: str = option(
        "auto", "what makes a breakpoint (auto: none with a budget, else global)", choices=KNEES
    )
    tau: float = option(400.0, "how large a ratio makes a breakpoint", low=1)
    segments: int = option(16, "parts the curve of scores is cut into", low=2)
    gamma: float = option(0.99, "decay of the scores per decoded token", 0, 1)
    lag: int = option(4, "with a budget: tokens after which attention counts", 0, 4096)
    distinct_ratio: float = option(
        0.8, "with a budget: share of what recent tokens leave for those never repeated", 0, 1
    )
    alike: float = option(0.8, "cosine of two keys above which the newer repeats the older", 0, 1)
    evict_threshold: int = option(512, "without a budget: length at which a layer prunes", low=1)
    granularity: str = option(
        "auto", "who chooses (auto: head with a budget, else layer)", choices=GRANULARITIES
    )
    value_norm: bool = option(False, "weigh a token's score by the norm of its value")

    @classmethod
    def paper(cls, **changes) -> "Lethe":
        """Every parameter as the paper reads; what it leaves open stays at the default."""
        published = {"even_share": 0.0, "cap": 0.0, "lag": 0, "distinct_ratio": 0.0}
        published |= {"knee": "global", "granularity": "layer", "protect_prompt": False}
        return cls(**{**published, **changes})

    def notes(self) -> dict:
        # A breakpoint is a ratio: to what no query could count for yet, it would be infinite.
        return super().notes() | ({} if self.budget else {"lag": 0})

    @property
    def per_head(self) -> bool:
        """Does each KV head choose for itself?"""
        return self.granularity in (("auto", "head") if self.budget else ("head",))

    def _merged(self, scores: Tensor) -> Tensor:
        """(B, 1 or H_kv, S): added up, but per head, where a slot is another token in every one."""
        return scores if self.per_head else scores.sum(1, keepdim=True)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        scores = layer.scores
        if self.value_norm:
            scores = scores * layer.values.float().norm(dim=-1)
        return self._merged(scores).expand_as(scores)

    def always(self, layer: LayerCache, rows, protected, rooms) -> Tensor:
        """And the newest tokens that no newer one repeats: facts that nothing has asked for yet."""
        kept = super().always(layer, rows, protected, rooms)
        recent = [self.recent(room) for room in rooms]
        pairs = zip(rooms, recent, strict=True)
        counts = [int(self.distinct_ratio * (room - newest)) for room, newest in pairs]
        if not self.budget or not any(counts):
            return kept
        # From round to round, what is judged for the first time was recent: newer ones are near.
        device = kept.device
        near = torch.tensor(recent, device=device) + self.interval
        cosine = repeats(layer.content(rows), layer.filled[rows], near)[..., : layer.length]
        cosine = cosine if self.per_head else cosine.mean(1, keepdim=True)
        distinct = ~kept & (cosine <= self.alike)
        place = distinct.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest
        return kept | distinct & (place <= torch.tensor(counts, device=device)[:, None, None])

    def weights(self, cache: KVCache) -> list[list[float]]:
        if self.allocation in ("uniform", "pyramid"):
            L = len(cache.layers)
            return [[1.0] * L if self.allocation == "uniform" else pyramid(L) for _ in cache.seen]
        per_layer = [
            hoyer(self._merged(layer.scores), layer.filled[:, None]).mean(1)
            for layer in cache.layers
        ]
        sparsity = torch.stack(per_layer, dim=1)  # (B, L)
        shares = sparsity if self.allocation == "inverse_hoyer" else 1 - sparsity
        if self.cap:  # attention that is uniform beside all others averages, and misses little
            shares = shares.minimum(self.cap * shares.quantile(0.5, dim=1, keepdim=True))
        return torch.lerp(shares, shares.mean(1, keepdim=True), self.even_share).tolist()

    def wants(self, cache: KVCache, row: int) -> bool:
        if self.budget is not None:
            return super().wants(cache, row)
        return any(layer.lengths[row] > self._threshold(layer, row) for layer in cache.layers)

    def _threshold(self, layer: LayerCache, row: int) -> int:
        return layer.thresholds[row] or self.evict_threshold

    def round(self, cache: KVCache, due: list[bool]) -> None:
        before = [layer.lengths for layer in cache.layers]
        super().round(cache, due)
        # A layer tries again when it holds twice what it kept: without a breakpoint, where it kept
        # all, its threshold so doubles, and no layer tries at every step (Algorithm 1).
        for layer, lengths in zip(cache.layers, before, strict=True) if not self.budget else ():
            for row in (row for row, ready in enumerate(due) if ready):
                threshold = self._threshold(layer, row)
                if lengths[row] > threshold:
                    layer.thresholds[row] = max(threshold, 2 * layer.lengths[row])

    def salient(self, importance: Tensor, layer: LayerCache, row: int) -> int:
        """Algorithm 1: the tokens before the breakpoint, or all of them if there is none."""
        length = importance.shape[1]
        knee = self.knee if self.knee != "auto" else "none" if self.budget else "global"
        early = self.budget is None and length <= self._threshold(layer, row)
        if early or knee == "none":
            return length
        # Every head's curve, then their mean: after a round a slot is another token in every head.
        ranked = importance.sort(dim=-1, descending=True).values.mean(0).cpu()
        return find_breakpoint(ranked, self.segments, self.tau, knee) or length
