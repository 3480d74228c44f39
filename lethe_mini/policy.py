"""Which tokens to keep: Lethe (arXiv 2511.06029), and the protocol that all policies share.

A round of pruning asks a policy how a total divides over the layers (`weights`), how much each
token matters (`importance`), how many tokens stand out (`salient`), and which stay whatever their
importance (`always`). `Pruner` does the rest, with integers:

    keep = always (protected and recent tokens) + the most important of the rest

Policies are frozen: what changes during a run lives in the cache. The paper is `Lethe`, at the end.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .cache import KVCache, LayerCache, Notes
from .errors import UserError
from .kernels import to_device, widest
from .options import Limits, check_options, option, part, split_budget
from .peers import ALONE


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
    value = (root - l1 / l2.clamp(min=1e-30)) / (root - 1).clamp(min=1e-30)  # eq. 1
    return torch.where((lengths > 1) & (l1 > 0), value.clamp(0, 1), 0.0)


def find_breakpoint(ranked: Tensor, lengths: Tensor, segments: int, tau: float, kind: str):
    """Where each curve of descending scores breaks, (R,) int64; its length if it does not
    (arXiv 2511.06029, eq. 3).

    ranked: (R, S) descending, lengths: (R,) of them, at least 1, cut into `segments` equal parts.
    `global`: the first boundary k with ranked[0] / ranked[k] > tau. `segment`: the start of the
    first part whose own first / last <= tau, where the curve has gone flat; if that is the very
    first part, nothing stands out. Comparisons multiply, so zeros need no special care.
    """
    parts = lengths.clamp(max=segments)[:, None]  # beyond the length cuts would be the same
    cuts = torch.arange(segments + 1, device=ranked.device).minimum(parts)
    cuts = cuts * lengths[:, None] // parts  # (R, segments + 1)
    starts = ranked.gather(1, cuts[:, :-1].clamp(max=ranked.shape[1] - 1))
    ends = ranked.gather(1, cuts[:, 1:] - 1)
    found = starts <= tau * ends if kind == "segment" else ranked[:, :1] > tau * starts  # eq. 3
    found &= cuts[:, :-1] < lengths[:, None]
    first = cuts.gather(1, found.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(first > 0, first, lengths)


def rank(importance: Tensor, valid: Tensor) -> Tensor:
    """Slots, the most important first; of equals the newer; NaN last, and behind it what is not
    valid. (..., S) -> int64."""
    ranked = importance.float().nan_to_num(torch.finfo(torch.float32).min)
    ranked = ranked.masked_fill(~valid, -torch.inf)
    # A stable sort of the flipped row puts the newer of two equals first.
    return ranked.shape[-1] - 1 - ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)


def choose(importance, always: Tensor, valid: Tensor, salient, share: Tensor, peers=ALONE):
    """What R sequences keep in a layer: (R, H_kv, S) bool, and how many slots of each head, (R,).

    importance: (R, 1 or H_kv, S); always: (R, H_kv, S) and valid: (R, 1, S) bool; salient, share:
    (R,). Those of `always` stay whatever their rank; of the `salient` first, as many as `share` has
    room for. The head that keeps most says how many the others keep.
    """
    always = always & valid
    order = rank(importance, valid).expand_as(always)  # slots, the most important first
    stays = always.gather(-1, order)  # the same, by rank
    first = torch.arange(order.shape[-1], device=order.device) < salient[:, None, None]
    least = always.sum(-1)  # (R, H_kv)
    n = (stays | first).sum(-1).minimum(share[:, None]).maximum(least)  # of each head by itself
    n = peers.heads(n).amax(-1)
    others = (~stays).cumsum(-1)  # 1 for the best of those that need not stay
    chosen = stays | (others <= (n[:, None] - least)[..., None])  # eq. 4; n in every head
    return always.scatter(-1, order, chosen), n


@dataclass(frozen=True)
class Round:
    """What a round did, for traces: which sequences it pruned, and layer by layer what decided."""

    rows: list[int]  # of the batch; below, [layer][i] is that of sequence rows[i]
    shares: list[list[int]]  # tokens that a layer might keep
    recent: list[list[int]]  # newest tokens that stay
    salient: list[list[int]]  # tokens that stand out; all, if nothing says which
    hoyer: Tensor | None  # (B, L); None: the policy keeps no scores
    importance: list[Tensor]  # per layer (R, 1 or H_kv, S), of the slots before the round


@dataclass(frozen=True)
class Policy:
    """What the engine asks of a policy."""

    name: ClassVar[str] = ""
    scored: ClassVar[bool] = False  # does the cache keep scores for it?
    window: ClassVar[int] = 0  # how many of the last queries the cache keeps for it

    def notes(self) -> Notes:
        """What a cache notes for this policy."""
        return Notes(self.scored, self.window)

    def check_prompt(self, prompt: int) -> None:
        """Raises UserError if a prompt of so many tokens cannot be served."""

    def decay(self, cache: KVCache) -> None:
        """Called before every decoded token, for what fades in the cache."""

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        """Per sequence: is it time for a round? prefilled: the last tokens came as a prompt."""
        return [False] * len(cache.seen)

    def round(self, cache: KVCache, due: list[bool]) -> Round | None:
        """One pass of pruning over the sequences that are due; the others keep everything."""


@dataclass(frozen=True)
class FullKV(Policy):
    """Keeps everything."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class Pruner(Limits, Policy):
    """What every policy that prunes shares. A new one defines `importance`, more only if it must.
    What all have as options, and how many tokens a sequence may hold: `Limits` (options.py).

    B sequences, of which R are due, S slots; a layer (LayerCache) offers keys, values, positions,
    scores and lengths. All is done for R sequences and all heads at once, on the device.
    """

    def __post_init__(self):
        if type(self).importance is Pruner.importance:
            raise UserError(f"{type(self).__name__} should define importance(layer, cache)")
        check_options(self)

    def notes(self) -> Notes:
        return Notes(self.scored, self.window, 0, self.interval, self.evict_threshold)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        """(B, 1 or H_kv, S): the higher, the longer a token stays. Heads may differ."""

    def scores(self, layer: LayerCache) -> Tensor:
        """(B, 1 or H_kv, S): what Hoyer is taken of, where scores are kept."""
        return layer.scores

    def weights(self, cache: KVCache, sparsity: Tensor | None) -> Tensor:
        """(B, L): the layers' parts of the budget, in any unit; sparsity: (B, L), their Hoyer."""
        return torch.ones(len(cache.seen), len(cache.layers))

    def salient(self, importance: Tensor, layer: LayerCache, rows: Tensor) -> Tensor | None:
        """(R,) int64: how many tokens stand out; None: all. importance: (R, 1 or H_kv, S), of no
        meaning beyond a sequence's length; rows: (R,) of the batch."""

    def recent(self, room: Tensor) -> Tensor:
        """How many of `room` tokens (R,) go to the newest; at least `min_recent`."""
        return part(self.recent_ratio, room).clamp(min=self.min_recent).minimum(room)

    def always(self, layer: LayerCache, rows: Tensor, protected: Tensor, rooms: Tensor) -> Tensor:
        """(R, H_kv, S) bool: which slots of these sequences stay whatever their importance.
        Default: positions below `protected`, and the most recent of the room beside these."""
        slots = torch.arange(layer.length, device=rows.device)
        oldest = layer.filled[rows] - self.recent(rooms)
        first, last = protected[:, None, None], oldest[:, None, None]
        return (layer.positions[rows] < first) | (slots >= last)

    def shares(self, cache: KVCache, rows: list[int], sparsity: Tensor | None) -> Tensor:
        """(L, R) int64: tokens that a layer may keep of a sequence, which add up exactly."""
        weights, device = self.weights(cache, sparsity), cache.device
        weights = weights.to(device, widest(device), non_blocking=True)
        limits = [self.limit(cache.prompt[row], cache.seen[row]) for row in rows]
        floors = [self.protected(cache.prompt[row]) + self.min_recent for row in rows]
        index, limits, floors = to_device([rows, limits, floors], device)
        held = torch.stack([layer.filled[index] for layer in cache.layers], dim=1)  # (R, L)
        totals, floors = limits * held.shape[1], floors[:, None].expand_as(held)
        return split_budget(totals, weights[index], floors, held).t()

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        pairs = zip(cache.seen, cache.prompt, strict=True)
        on_time = [prefilled or (seen - prompt) % self.interval == 0 for seen, prompt in pairs]
        return [ready and self.wants(cache, row) for row, ready in enumerate(on_time)]

    def wants(self, cache: KVCache, row: int) -> bool:
        """Does this sequence hold more than it should?"""
        prompt, seen, L = cache.prompt[row], cache.seen[row], len(cache.layers)
        held = sum(layer.lengths[row] for layer in cache.layers)
        return seen > self.first_round(prompt) and held > self.limit(prompt, seen) * L

    def sparsity(self, cache: KVCache) -> Tensor:
        """(B, L): how concentrated each layer's attention is, the mean over heads."""
        pairs = [(x.peers, hoyer(self.scores(x), x.filled[:, None])) for x in cache.layers]
        return cache.peers.layers(torch.stack([p.heads(x).mean(1) for p, x in pairs], dim=1))

    def round(self, cache: KVCache, due: list[bool]) -> Round:
        rows = [row for row, ready in enumerate(due) if ready]
        sparsity = self.sparsity(cache) if self.scored else None
        shares = self.shares(cache, rows, sparsity)  # (L, R)
        first = [self.protected(cache.prompt[row]) for row in rows]
        index, first = to_device([rows, first], cache.device)
        pairs = zip(cache.layers, shares, strict=True)
        plans = [self.plan(layer, share, cache, index, first) for layer, share in pairs]
        kept, importance, facts = zip(*plans, strict=True)
        counts, *facts = cache.peers.layers(torch.stack(facts, dim=1)).tolist()  # the only wait
        for layer, mask, n in zip(cache.layers, kept, counts, strict=True):
            layer.evict(rows, mask, n)
        return Round(rows, *facts, sparsity, list(importance))

    def plan(self, layer: LayerCache, share: Tensor, cache: KVCache, rows: Tensor, first: Tensor):
        """What a layer keeps of the sequences `rows`: (R, H_kv, S) bool; their importance; and
        (4, R): how many tokens each head keeps, might keep, keeps as recent, and how many stand
        out. share, rows, first (protected positions): (R,)."""
        if not layer.peers.here:  # another device has its tokens, and tells how many stay
            return layer.positions[rows].bool(), None, share.new_zeros(4, len(rows))
        importance, lengths = self.importance(layer, cache)[rows], layer.filled[rows]
        room = share if self.budget is None else share - first.minimum(lengths)  # beside protected
        always = self.always(layer, rows, first, room)
        salient = self.salient(importance, layer, rows)
        salient = lengths if salient is None else salient
        kept, n = choose(importance, always, layer.valid()[rows], salient, share, layer.peers)
        return kept, importance, torch.stack((n, share, self.recent(room), salient))


# The words of Lethe's options, and whether each makes sense without a budget.
ALLOCATIONS = {"inverse_hoyer": True, "hoyer": False, "uniform": False}
BREAKPOINTS = {"global": True, "segment": True, "none": False}


@dataclass(frozen=True)
class Lethe(Pruner):
    """Budgets by Hoyer, scores by RASR, a breakpoint by Algorithm 1 (arXiv 2511.06029).

    With a budget, a layer keeps its share or, if that is less, what stands out. Without one
    (`budget=None`) Algorithm 1 alone decides, each layer at a threshold of its own.
    """

    name: ClassVar[str] = "lethe"
    scored: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False

    allocation: str = option("inverse_hoyer", "divides budget over layers", choices=ALLOCATIONS)
    breakpoint: str = option("global", "where the curve of scores breaks", choices=BREAKPOINTS)
    tau: float = option(400.0, "how large a ratio makes a breakpoint", low=1)
    segments: int = option(16, "parts the curve of scores is cut into", low=2)
    gamma: float = option(0.99, "decay of the scores per decoded token", 0, 1)

    def decay(self, cache: KVCache) -> None:
        torch._foreach_mul_(cache.scores, self.gamma)  # eq. 5; the model then adds the step's mass

    def scores(self, layer: LayerCache) -> Tensor:
        return layer.peers.heads(layer.scores).sum(1, keepdim=True)  # eq. 2: over all heads

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return self.scores(layer)

    def weights(self, cache: KVCache, sparsity: Tensor) -> Tensor:
        if self.allocation == "uniform":
            return super().weights(cache, sparsity)
        return sparsity if self.allocation == "inverse_hoyer" else 1 - sparsity

    def salient(self, importance: Tensor, layer: LayerCache, rows: Tensor) -> Tensor | None:
        """Algorithm 1: the tokens before the breakpoint, or all of them if there is none."""
        if self.breakpoint == "none":
            return None
        # Every head's curve, then their mean: heads may hold different tokens.
        valid, lengths = layer.valid()[rows], layer.filled[rows]
        ranked = importance.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True).values
        found = find_breakpoint(ranked.mean(1), lengths, self.segments, self.tau, self.breakpoint)
        if self.budget is not None:
            return found
        thresholds = to_device(layer.thresholds, rows.device)[rows]
        return torch.where(lengths > thresholds, found, lengths)

    def wants(self, cache: KVCache, row: int) -> bool:
        if self.budget is not None:
            return super().wants(cache, row)
        return any(layer.lengths[row] > layer.thresholds[row] for layer in cache.layers)

    def round(self, cache: KVCache, due: list[bool]) -> Round:
        before = [layer.lengths for layer in cache.layers]
        done = super().round(cache, due)
        # A layer tries again when it holds twice what it kept. Without a breakpoint it kept all, so
        # its threshold doubles (Algorithm 1).
        for layer, held in zip(cache.layers, before, strict=True):
            for row in done.rows if self.budget is None else ():
                if held[row] > layer.thresholds[row]:
                    layer.thresholds[row] = max(layer.thresholds[row], 2 * layer.lengths[row])
        return done
