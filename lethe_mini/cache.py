"""The KV cache: keys, values, positions and scores, slot by slot, for sequences that differ.

A *slot* is a place in the storage, a *position* a token's place in the text. They differ after the
first round of pruning, so every slot carries its position. Three things always hold:

- the held slots of a sequence are 0 .. length - 1, its positions strictly increasing along them;
- each layer has its own length for every sequence: the tokens seen, less those it evicted. What
  lies beyond it is zero and never attended;
- storage stays where it is, and as large, until a round, a sequence that comes or goes, or a token
  without room. So a decoding step, which counts tokens up on the device, can be captured.

Policies (policy.py) decide what stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import BLOCK, Store, blocks, gathered, grown, kept_slots, spare, to_device, widest
from .peers import ALONE
from .rope import rope_cos_sin, rotate


@dataclass(frozen=True)
class Notes:
    """What a cache notes for a policy, beside keys, values and positions."""

    scored: bool = False  # a score per slot, float32 whatever the model's dtype
    window: int = 0  # the last queries, so many
    lag: int = 0  # for LethePlus alone: tokens after which attention to a token counts
    interval: int = 0  # tokens between two rounds: the room that a round leaves
    threshold: int = 0  # where Algorithm 1's thresholds start
    extra: tuple[str, ...] = ()  # numbers per slot that the policy itself writes, by name
    beacons: int = 0  # for Recall alone: past queries of each head


@dataclass
class Seen:
    """Tokens seen, per sequence; a cache and its layers share it."""

    counts: list[int]  # for the host
    next: Tensor  # (B,) int64, the same on the device: the next token's position
    changes: int = 0  # how often a layer evicted tokens or moved its storage


class LayerCache:
    """What one layer holds for B sequences. notes: see Notes. compact: a key's RoPE angle is that
    of its slot, not of its position."""

    def __init__(self, index, config, seen: Seen, dtype, compact, inv_freq, notes: Notes):
        self.index, self.seen, self.notes, self.peers = index, seen, notes, ALONE
        self.compact, self.inv_freq = compact, inv_freq
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch, device = len(seen.counts), seen.next.device
        empty = torch.zeros(batch, kv_heads, 0, device=device)
        wide = torch.zeros(batch, kv_heads, 0, config.head_dim, device=device, dtype=dtype)
        self.store: Store = {"keys": wide, "values": wide, "positions": empty.int()}
        if notes.scored:
            self.store["scores"] = empty
        self.store |= dict.fromkeys(notes.extra, empty)
        # (B, H, window, D), newest last; zeros where there are none yet.
        self.queries = wide.new_zeros(batch, heads, notes.window, config.head_dim)
        self.beacons = wide.new_zeros(batch, heads, notes.beacons, config.head_dim)  # before RoPE
        self.evicted = [0] * batch  # tokens that left, for the host
        self.gone = torch.zeros_like(seen.next)  # (B,) the same on the device
        self.thresholds = [notes.threshold] * batch

    keys = property(lambda self: self.store["keys"][:, :, : self.length])
    values = property(lambda self: self.store["values"][:, :, : self.length])
    positions = property(lambda self: self.store["positions"][:, :, : self.length])
    scores = property(lambda self: self.store["scores"][:, :, : self.length])
    capacity = property(lambda self: self.store["keys"].shape[2])
    length = property(lambda self: max(self.lengths, default=0))  # of the longest sequence
    filled = property(lambda self: self.seen.next - self.gone)  # (B,) lengths, on the device

    @property
    def lengths(self) -> list[int]:
        """Tokens held, per sequence."""
        pairs = zip(self.seen.counts, self.evicted, strict=True)
        return [seen - evicted for seen, evicted in pairs]

    def valid(self) -> Tensor:
        """(B, 1, S) bool: which slots hold a token."""
        slots = torch.arange(self.length, device=self.gone.device)
        return (slots < self.filled[:, None])[:, None]

    def place(self, T: int) -> tuple[Store, Tensor]:
        """For T more tokens of every sequence: what to write to and look at, and the slots (B, T)
        they take. While decoding that is all storage: a new shape at every step would cost time and
        memory."""
        slots = self.filled[:, None] + torch.arange(T, device=self.gone.device)
        if T == 1:
            return self.store, slots
        return {name: t[:, :, : self.length + T] for name, t in self.store.items()}, slots

    def remember(self, q: Tensor) -> None:
        """Keeps the last queries, as many as the policy wants; q: (B, H, T, D)."""
        if self.notes.window:
            newest = torch.cat((self.queries, q), dim=2)[:, :, -self.notes.window :]
            self.queries.copy_(newest)

    def resize(self, capacity: int) -> None:
        """Moves to new storage of so many slots."""
        for name, old in self.store.items():
            self.store[name] = grown(old[:, :, : self.length], capacity)
        self.seen.changes += 1

    def evict(self, rows: list[int], kept: Tensor, counts: list[int]) -> None:
        """Sequence rows[i] keeps the slots kept[i], the others of the batch all. Storage shrinks to
        what is held and the interval's room; it stays where it is if it is hardly larger.

        kept: (len(rows), 1 or H_kv, S) bool, True in counts[i] slots of every head.
        """
        before, device = self.lengths, self.gone.device
        if counts == [before[row] for row in rows]:
            return
        n, row, count = max(counts), *to_device([rows, counts], device)
        old_slots = kept_slots(kept, n)  # (R, 1 or H_kv, n)
        for index, held in zip(rows, counts, strict=True):
            self.evicted[index] += before[index] - held
        turns = self.gone.clone()
        turns -= self.gone.copy_(to_device(self.evicted, device))
        capacity = self.capacity_for(self.length)
        for name, old in self.store.items():
            moved = gathered(old, row, old_slots, count)
            if name == "keys" and self.compact:  # a key turns to its new slot
                turn = torch.arange(n, device=device) - old_slots
                moved = rotate(moved, *rope_cos_sin(turn, self.inv_freq))
            if capacity != old.shape[2]:
                old = grown(old[:, :, : self.length], capacity)
            old[row, :, :n], old[row, :, n:] = moved, 0
            self.store[name] = old
        if self.compact:  # the queries turn with the newest
            turned = rotate(self.queries, *rope_cos_sin(turns[:, None, None], self.inv_freq))
            self.queries.copy_(turned)
        self.seen.changes += 1

    def capacity_for(self, length: int) -> int:
        """Slots for so many tokens and those that come before the next round; what is there, if
        that is hardly more, so that storage need not move."""
        room = self.notes.interval or spare(length, self.gone.device)
        wanted = blocks(length + min(room, max(4 * BLOCK, length // 8)))
        fits = wanted <= self.capacity <= wanted + max(BLOCK, wanted // 8)
        return self.capacity if fits else wanted

    def select(self, rows: list[int], index: Tensor) -> None:
        """Keeps these sequences, in this order; one may appear twice, as a fork of itself.
        index: (len(rows),) the same."""
        length = max((self.lengths[row] for row in rows), default=0)
        for name, old in self.store.items():
            self.store[name] = grown(old[index][:, :, :length], self.capacity_for(length))
        self.queries, self.beacons = self.queries[index], self.beacons[index]
        self.gone = self.gone[index]
        self.evicted = [self.evicted[row] for row in rows]
        self.thresholds = [self.thresholds[row] for row in rows]

    def join(self, other: "LayerCache") -> None:
        """Appends the other's sequences behind these; the other is used up."""
        capacity = self.capacity_for(max(self.length, other.length))
        for layer in (self, other):
            layer.resize(capacity)
        for name in self.store:
            self.store[name] = torch.cat((self.store[name], other.store.pop(name)))
        self.queries = torch.cat((self.queries, other.queries))
        self.beacons = torch.cat((self.beacons, other.beacons))
        self.gone = torch.cat((self.gone, other.gone))
        self.evicted = self.evicted + other.evicted
        self.thresholds = self.thresholds + other.thresholds


class KVCache:
    """The layers' caches, and what is counted once per sequence. config: the model's; compact: keys
    turn to their slots at every round; notes: see Notes."""

    def __init__(
        self, config, batch=1, dtype=None, device="cpu", compact=False, notes: Notes = Notes()
    ):
        self.device = torch.device(device)
        # Keys turn again and again, so in float64 where the device has it.
        inv_freq = torch.tensor(config.inv_freq, dtype=widest(self.device), device=self.device)
        self.tokens = Seen([0] * batch, torch.zeros(batch, dtype=torch.long, device=self.device))
        self.layers = [
            LayerCache(index, config, self.tokens, dtype, compact, inv_freq, notes)
            for index in range(config.num_hidden_layers)
        ]
        self.prompt = [0] * batch  # of the tokens seen, those of the prompt
        self._measured, self.peers = -1, ALONE

    seen = property(lambda self: self.tokens.counts)  # tokens seen: the next position
    next = property(lambda self: self.tokens.next)  # (B,) int64, the same on the device
    changes = property(lambda self: self.tokens.changes)
    scores = property(lambda self: [layer.store["scores"] for layer in self.layers])
    # Tokens that left and tokens held, over all layers and sequences.
    evicted = property(lambda self: sum(sum(layer.evicted) for layer in self.layers))
    held = property(lambda self: len(self.layers) * sum(self.seen) - self.evicted)

    def tensors(self) -> list[Tensor]:
        """All that a decoding step or a round reads or writes."""
        layers = [(*x.store.values(), x.queries, x.beacons, x.gone) for x in self.layers]
        return [self.next, *(tensor for layer in layers for tensor in layer)]

    def next_angle(self, row: int) -> int:
        """The RoPE position of a sequence's next token; in compact mode its highest slot."""
        evicted = min(layer.evicted[row] for layer in self.layers)
        return self.seen[row] - (evicted if self.layers[0].compact else 0)

    def reserve(self, T: int) -> None:
        """Room for T more tokens of every sequence. Storage moves only where there is none."""
        seen = max(self.seen, default=0)
        if self._measured != self.changes:  # between two changes all layers grow alike
            room = min(layer.capacity - layer.length for layer in self.layers)
            self._measured, self._full = self.changes, seen + room
        if seen + T > self._full:
            for layer in self.layers:
                if layer.length + T > layer.capacity:
                    layer.resize(layer.capacity_for(layer.length + T))

    def count(self, T: int) -> None:
        """The host's part of T more tokens of every sequence; the device adds them to `next`."""
        self.tokens.counts = [seen + T for seen in self.seen]

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order (LayerCache.select)."""
        index = to_device(rows, self.device)
        for layer in self.layers:
            layer.select(rows, index)
        self.tokens.counts = [self.seen[row] for row in rows]
        self.tokens.next = self.next[index]
        self.tokens.changes += 1
        self.prompt = [self.prompt[row] for row in rows]

    def join(self, other: "KVCache") -> None:
        """Appends the other's sequences; the other is used up, layer by layer, so that the room of
        one layer is needed and not of a second cache."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.join(its)
        self.tokens.counts = self.seen + other.seen
        self.tokens.next = torch.cat((self.next, other.next))
        self.tokens.changes += 1
        self.prompt = self.prompt + other.prompt
