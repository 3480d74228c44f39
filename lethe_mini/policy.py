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
from .options import check_options, check_room, option, split_budget


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


def find_breakpoint(ranked: Tensor, segments: int, tau: float, kind: str) -> int | None:
    """Where the curve of descending scores breaks, or None (arXiv 2511.06029, eq. 3).

    ranked: (n,) descending, n at least 1, cut into `segments` equal parts. `global`: the first
    boundary k with ranked[0] / ranked[k] > tau. `segment`: the start of the first part whose own
    first / last <= tau, where the curve has gone flat; if that is the very first part, nothing
    stands out. Comparisons multiply, so zeros need no special care.
    """
    if kind == "none":
        return None
    segments = min(segments, len(ranked))  # beyond that the cuts are the same
    cuts = torch.arange(segments + 1, device=ranked.device) * len(ranked) // segments
    starts, ends = ranked[cuts[:-1]], ranked[cuts[1:] - 1]
    if kind == "segment":
        found = starts <= tau * ends
    else:
        found = ranked[0] > tau * starts  # eq. 3
    return int(cuts[int(found.int().argmax())]) or None


def rank(importance: Tensor) -> Tensor:
    """Slots, the most important first; of equals the newer; NaN last. (..., S) -> int64."""
    ranked = importance.float().nan_to_num(torch.finfo(torch.float32).min)
    # A stable sort of the flipped row puts the newer of two equals first.
    return ranked.shape[-1] - 1 - ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)


def choose(importance: Tensor, always: Tensor, salient: int, share: int) -> Tensor:
    """The slots that a sequence keeps in a layer: (H_kv, n) int64, ascending, n for every head.

    importance: (1 or H_kv, S); always: (H_kv, S). Those of `always` stay whatever their rank. Of
    the `salient` first by rank, as many stay as `share` has room for. The head that keeps most
    says how many the others keep.
    """
    order = rank(importance).expand_as(always)  # (H_kv, S) slots, the most important first
    stays = always.gather(-1, order)  # (H_kv, S) the same, by rank
    first = torch.arange(order.shape[1], device=order.device) < salient  # (S,) by rank
    least = always.sum(-1, keepdim=True)  # (H_kv, 1)
    wanted = (stays | first).sum(-1).max()
    n = wanted.clamp(max=share).maximum(least.max())
    others = (~stays).cumsum(-1)  # (H_kv, S) 1 for the best of those that need not stay
    chosen = stays | (others <= n - least)  # eq. 4; (H_kv, S) by rank, n in every head
    return always.scatter(-1, order, chosen).nonzero()[:, 1].view(-1, int(n))


@dataclass(frozen=True)
class Round:
    """What a round did, for traces: which sequences it pruned, and layer by layer what decided."""

    rows: list[int]  # of the batch; below, [layer][i] is that of sequence rows[i]
    shares: list[list[int]]  # tokens that a layer might keep
    hoyer: Tensor | None  # (B, L); None: the policy keeps no scores
    recent: list[list[int]]  # newest tokens that stay
    breakpoints: list[list[int | None]]  # tokens that stand out; None: all do
    importance: list[Tensor]  # per layer (B, 1 or H_kv, S), of the slots before the round


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
class Pruner(Policy):
    """What every policy that prunes shares. A new one defines `importance`, more only if it must.

    B sequences, S slots; a layer (LayerCache) offers keys, values, positions, scores and lengths.
    """

    min_recent: ClassVar[int] = 1
    needs_budget: ClassVar[bool] = True

    budget: float | int | None = option(
        0.25, "tokens per layer after a round, on average: a number, a share of the text, or none"
    )
    interval: int = option(128, "tokens between two rounds", low=1)
    sinks: int = option(4, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.3, "share of the room that goes to the last tokens", 0, 1)
    protect_prompt: bool = option(True, "keep the whole prompt; it counts inside the budget")
    evict_threshold: int = option(
        512, "tokens before the first round, where the budget is no number", low=1
    )

    def __post_init__(self):
        if type(self).importance is Pruner.importance:
            raise UserError(f"{type(self).__name__} should define importance(layer, cache)")
        check_options(self)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        """(B, 1 or H_kv, S): the higher, the longer a token stays. Heads may differ."""

    def scores(self, layer: LayerCache) -> Tensor:
        """(B, 1 or H_kv, S): what Hoyer is taken of, where scores are kept."""
        return layer.scores

    def weights(self, cache: KVCache, sparsity: Tensor | None) -> Tensor:
        """(B, L): the layers' parts of the budget, in any unit; sparsity: (B, L), their Hoyer."""
        return torch.ones(len(cache.seen), len(cache.layers))

    def salient(self, importance: Tensor, layer: LayerCache, row: int) -> int:
        """How many of a sequence's tokens stand out; importance: (1 or H_kv, its length)."""
        return layer.lengths[row]

    def recent(self, room: int) -> int:
        """How many of `room` tokens go to the newest; at least `min_recent`."""
        return min(room, max(self.min_recent, int(self.recent_ratio * room)))

    def always(self, layer: LayerCache, rows, protected, rooms) -> Tensor:
        """(len(rows), H_kv, S) bool: which slots of these sequences stay whatever their importance.
        Default: positions below `protected`, and the most recent of the room beside these."""
        pairs = zip(rows, rooms, strict=True)
        oldest = [layer.lengths[row] - self.recent(room) for row, room in pairs]
        bounds = torch.tensor([protected, oldest], device=layer.filled.device)
        first, last = bounds[:, :, None, None]  # (len(rows), 1, 1) each
        slots = torch.arange(layer.length, device=layer.filled.device)
        return (layer.positions[rows] < first) | (slots >= last)

    def protected(self, prompt: int) -> int:
        """First positions that always stay, of a sequence with so long a prompt."""
        return max(self.sinks, prompt) if self.protect_prompt else self.sinks

    def limit(self, prompt: int, seen: int) -> int:
        """Tokens per layer, on average, that a sequence may hold after a round. A share counts the
        tokens seen; it never falls below the protected ones and its room at `evict_threshold`."""
        if self.budget is None:
            return seen
        if isinstance(self.budget, int):
            return self.budget
        room = max(self.min_recent, int(self.budget * self.evict_threshold))
        return max(int(self.budget * seen), self.protected(prompt) + room)

    def first_round(self, prompt: int) -> int:
        """Tokens seen above which a sequence may have a round."""
        if isinstance(self.budget, int):
            return self.budget
        return max(self.evict_threshold, self.limit(prompt, seen=0))

    def check_prompt(self, prompt: int) -> None:
        if isinstance(self.budget, int):
            check_room(self.budget, self.protected(prompt) + self.min_recent, self.protect_prompt)

    def shares(self, cache: KVCache, rows: list[int], sparsity: Tensor | None) -> list[list[int]]:
        """[layer][i]: tokens that sequence rows[i] may keep there, which add up exactly."""
        weights, columns = self.weights(cache, sparsity).tolist(), []
        for row in rows:
            prompt, held = cache.prompt[row], [layer.lengths[row] for layer in cache.layers]
            floors = [self.protected(prompt) + self.min_recent] * len(held)
            total = self.limit(prompt, cache.seen[row]) * len(held)
            columns.append(split_budget(total, weights[row], floors, held))
        return [[column[i] for column in columns] for i in range(len(cache.layers))]

    def due(self, cache: KVCache, prefilled: bool = False) -> list[bool]:
        return [
            (prefilled or (seen - prompt) % self.interval == 0) and self.wants(cache, row)
            for row, (seen, prompt) in enumerate(zip(cache.seen, cache.prompt, strict=True))
        ]

    def wants(self, cache: KVCache, row: int) -> bool:
        """Does this sequence hold more than it should?"""
        prompt, seen, L = cache.prompt[row], cache.seen[row], len(cache.layers)
        held = sum(layer.lengths[row] for layer in cache.layers)
        return seen > self.first_round(prompt) and held > self.limit(prompt, seen) * L

    def sparsity(self, cache: KVCache) -> Tensor:
        """(B, L): how concentrated each layer's attention is, the mean over heads."""
        layers = [hoyer(self.scores(layer), layer.filled[:, None]) for layer in cache.layers]
        return torch.stack([heads.mean(1) for heads in layers], dim=1)

    def round(self, cache: KVCache, due: list[bool]) -> Round:
        rows = [row for row, ready in enumerate(due) if ready]
        sparsity = self.sparsity(cache) if self.scored else None
        done = Round(rows, self.shares(cache, rows, sparsity), sparsity, [], [], [])
        for layer in cache.layers:
            self.prune(layer, cache, done)
        return done

    def prune(self, layer: LayerCache, cache: KVCache, done: Round) -> None:
        """The round of one layer, which it adds to `done`."""
        rows, share, importance = done.rows, done.shares[layer.index], self.importance(layer, cache)
        protected = [self.protected(cache.prompt[row]) for row in rows]
        lengths = [layer.lengths[row] for row in rows]
        rooms = list(share)  # for tokens that are not protected
        if self.budget is not None:
            sizes = zip(share, protected, lengths, strict=True)
            rooms = [n - min(first, held) for n, first, held in sizes]
        always = self.always(layer, rows, protected, rooms)  # (len(rows), H_kv, S)
        kept, breakpoints = [], []
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            scores = importance[row, :, :n]  # (1 or H_kv, n)
            salient = self.salient(scores, layer, row)
            kept.append(choose(scores, always[i, :, :n], salient, share[i]))
            breakpoints.append(salient if salient < n else None)
        layer.evict(rows, kept)
        done.recent.append([self.recent(room) for room in rooms])
        done.breakpoints.append(breakpoints)
        done.importance.append(importance)


# The words of Lethe's options, and whether each makes sense without a budget.
ALLOCATIONS = {"hoyer": True, "inverse_hoyer": False, "uniform": False}
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

    allocation: str = option("hoyer", "divides the budget over layers", choices=ALLOCATIONS)
    breakpoint: str = option("global", "where the curve of scores breaks", choices=BREAKPOINTS)
    tau: float = option(400.0, "how large a ratio makes a breakpoint", low=1)
    segments: int = option(16, "parts the curve of scores is cut into", low=2)
    gamma: float = option(0.99, "decay of the scores per decoded token", 0, 1)

    def decay(self, cache: KVCache) -> None:
        torch._foreach_mul_(cache.scores, self.gamma)  # eq. 5; the model then adds the step's mass

    def scores(self, layer: LayerCache) -> Tensor:
        return layer.scores.sum(1, keepdim=True)  # eq. 2: over all heads, (B, 1, S)

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return self.scores(layer)

    def weights(self, cache: KVCache, sparsity: Tensor) -> Tensor:
        if self.allocation == "uniform":
            return super().weights(cache, sparsity)
        return sparsity if self.allocation == "inverse_hoyer" else 1 - sparsity

    def salient(self, importance: Tensor, layer: LayerCache, row: int) -> int:
        """Algorithm 1: the tokens before the breakpoint, or all of them if there is none."""
        length = importance.shape[1]
        if self.budget is None and length <= self.threshold(layer, row):
            return length
        # Every head's curve, then their mean: heads may hold different tokens.
        ranked = importance.sort(dim=-1, descending=True).values.mean(0).cpu()
        return find_breakpoint(ranked, self.segments, self.tau, self.breakpoint) or length

    def threshold(self, layer: LayerCache, row: int) -> int:
        """The length beyond which a layer prunes."""
        return layer.thresholds[row] or self.evict_threshold

    def wants(self, cache: KVCache, row: int) -> bool:
        if self.budget is not None:
            return super().wants(cache, row)
        return any(layer.lengths[row] > self.threshold(layer, row) for layer in cache.layers)

    def prune(self, layer: LayerCache, cache: KVCache, done: Round) -> None:
        before = layer.lengths
        super().prune(layer, cache, done)
        # A layer tries again when it holds twice what it kept. Without a breakpoint it kept all, so
        # its threshold doubles (Algorithm 1).
        for row in done.rows:
            threshold = self.threshold(layer, row)
            if self.budget is None and before[row] > threshold:
                layer.thresholds[row] = max(threshold, 2 * layer.lengths[row])
