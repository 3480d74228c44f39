"""The KV cache: keys, values, positions and scores, slot by slot, for sequences that differ.

A *slot* is a place in the storage, a *position* a token's place in the text. They differ after the
first round of pruning, so every slot carries its position. Three things always hold:

- the held slots of a sequence are 0 .. length - 1, its positions strictly increasing along them;
- each layer has its own length for every sequence, and what lies beyond it is zero, never attended;
- storage moves in blocks of BLOCK slots, and shrinks when a round leaves room.

Policies (policy.py) decide what stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .rope import rope_cos_sin, rotate

BLOCK = 64  # slots; capacity is always a multiple, so shapes repeat

Store = dict[str, Tensor]  # keys, values (B, H_kv, S, D); positions, perhaps scores (B, H_kv, S)


def blocks(slots: int) -> int:
    """`slots` rounded up to whole blocks."""
    return -(-slots // BLOCK) * BLOCK


def write(store: Store, slots: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Puts T tokens in their slots. k, v: (B, H_kv, T, D); slots, positions: (B, T)."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    store["keys"][rows, :, slots] = k.transpose(1, 2)
    store["values"][rows, :, slots] = v.transpose(1, 2)
    heads = k.shape[1]
    store["positions"][rows, :, slots] = positions.int()[..., None].expand(-1, -1, heads)


@dataclass(frozen=True)
class Notes:
    """What a cache notes for a policy, beside keys, values and positions."""

    scored: bool = False  # a score per slot, float32 whatever the model's dtype
    window: int = 0  # the last queries, so many
    lag: int = 0  # for LethePlus alone: tokens after which attention to a token counts


def _grown(x: Tensor, capacity: int) -> Tensor:
    """(B, H_kv, S, ...) in new storage of `capacity` slots, zero beyond S."""
    new = x.new_zeros(*x.shape[:2], capacity, *x.shape[3:])
    new[:, :, : x.shape[2]] = x
    return new


class LayerCache:
    """What one layer holds for B sequences.

    notes: see Notes. compact: a key's RoPE angle is that of its slot, not of its position.
    """

    def __init__(self, index, config, batch, dtype, device, compact, inv_freq, notes: Notes):
        self.index, self.notes = index, notes
        self.compact, self.inv_freq = compact, inv_freq
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        empty = torch.zeros(batch, kv_heads, 0, device=device)
        wide = torch.zeros(batch, kv_heads, 0, config.head_dim, device=device, dtype=dtype)
        self.store: Store = {"keys": wide, "values": wide, "positions": empty.int()}
        if notes.scored:
            self.store["scores"] = empty
        # (B, H, window, D), newest last; zeros where there are none yet.
        self.queries = wide.new_zeros(batch, heads, notes.window, config.head_dim)
        self.thresholds = [0] * batch  # Algorithm 1's, per sequence; 0: Lethe.evict_threshold
        self._hold([0] * batch)

    keys = property(lambda self: self.store["keys"][:, :, : self.length])
    values = property(lambda self: self.store["values"][:, :, : self.length])
    positions = property(lambda self: self.store["positions"][:, :, : self.length])
    scores = property(lambda self: self.store["scores"][:, :, : self.length])
    capacity = property(lambda self: self.store["keys"].shape[2])

    def _hold(self, lengths: list[int]) -> None:
        """Notes the tokens held per sequence: for the host, for the device, and the most of all."""
        self.lengths, self.length = lengths, max(lengths, default=0)
        self.filled = torch.tensor(lengths, device=self.store["keys"].device).long()  # (B,)

    def valid(self) -> Tensor:
        """(B, 1, S) bool: which slots hold a token."""
        slots = torch.arange(self.length, device=self.filled.device)
        return (slots < self.filled[:, None])[:, None]

    def reserve(self, T: int) -> tuple[Store, Tensor]:
        """Makes room for T more tokens of every sequence: what to write to and look at, and (B, T)
        the slots they take. While decoding that is all storage: a new shape at every step would
        cost time and memory."""
        if self.length + T > self.capacity:
            self._resize(blocks(self.length + T))
        slots = self.filled[:, None] + torch.arange(T, device=self.filled.device)
        self.filled = self.filled + T
        self.lengths, self.length = [n + T for n in self.lengths], self.length + T
        if T == 1:
            return self.store, slots
        return {name: t[:, :, : self.length] for name, t in self.store.items()}, slots

    def remember(self, q: Tensor) -> None:
        """Keeps the last queries, as many as the policy wants; q: (B, H, T, D)."""
        window = self.notes.window
        if window:
            self.queries = torch.cat((self.queries, q), dim=2)[:, :, -window:].clone()

    def _resize(self, capacity: int) -> None:
        for name, old in self.store.items():
            self.store[name] = _grown(old[:, :, : self.length], capacity)

    def evict(self, rows: list[int], kept: list[Tensor]) -> None:
        """Sequence rows[i] keeps the slots kept[i], the others all; storage shrinks with them.

        kept[i]: (1 or H_kv, n) int64, ascending, each head's own n slots or the same for all heads.
        """
        B, H_kv = self.store["keys"].shape[:2]
        slots, counts = torch.arange(self.length, device=self.filled.device), list(self.lengths)
        indices = slots.repeat(B, H_kv, 1)  # (B, H_kv, S)
        for row, chosen in zip(rows, kept, strict=True):
            counts[row] = chosen.shape[1]
            indices[row, :, : counts[row]] = chosen
        if counts == self.lengths:
            return
        before = self.filled
        self._hold(counts)
        slots, indices = slots[: self.length], indices[:, :, : self.length]  # (n,), (B, H_kv, n)
        beyond = slots >= self.filled[:, None, None]  # (B, 1, n)
        row, head = (torch.arange(size, device=slots.device)[:, None] for size in (B, H_kv))
        for name, old in self.store.items():
            moved = old[row[..., None], head, indices]  # (B, H_kv, n) or (B, H_kv, n, D)
            moved.masked_fill_(beyond[..., None] if old.dim() == 4 else beyond, 0)
            self.store[name] = _grown(moved, blocks(self.length))
        if self.compact:  # keys turn to their new slots, the queries with the newest
            self.keys.copy_(rotate(self.keys, *rope_cos_sin(slots - indices, self.inv_freq)))
            angles = rope_cos_sin((self.filled - before)[:, None, None], self.inv_freq)
            self.queries = rotate(self.queries, *angles)

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order; one may appear twice, as a fork of itself."""
        self._hold([self.lengths[row] for row in rows])
        for name, old in self.store.items():
            self.store[name] = _grown(old[rows][:, :, : self.length], blocks(self.length))
        self.queries = self.queries[rows]
        self.thresholds = [self.thresholds[row] for row in rows]

    def join(self, other: "LayerCache") -> None:
        """Appends the other's sequences behind these; the other is used up."""
        for layer in (self, other):
            layer._resize(blocks(max(self.length, other.length)))
        for name in self.store:
            self.store[name] = torch.cat((self.store[name], other.store.pop(name)))
        self.queries = torch.cat((self.queries, other.queries))
        self.thresholds = self.thresholds + other.thresholds
        self._hold(self.lengths + other.lengths)


class KVCache:
    """The layers' caches, and what is counted once per sequence.

    config: the model's; compact: keys turn to their slots at every round; notes: see Notes.
    """

    def __init__(
        self, config, batch=1, dtype=None, device="cpu", compact=False, notes: Notes = Notes()
    ):
        self.device = torch.device(device)
        # Keys turn again and again, so in float64 where the device has it.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        inv_freq = torch.tensor(config.inv_freq, device=self.device, dtype=wide)
        self.layers = [
            LayerCache(index, config, batch, dtype, self.device, compact, inv_freq, notes)
            for index in range(config.num_hidden_layers)
        ]
        self.seen = [0] * batch  # tokens seen: the next position
        self.prompt = [0] * batch  # of these, tokens of the prompt

    scores = property(lambda self: [layer.store["scores"] for layer in self.layers])
    held = property(lambda self: sum(sum(layer.lengths) for layer in self.layers))  # tokens, in all

    def next_angle(self, row: int) -> int:
        """The RoPE position of a sequence's next token; in compact mode its highest slot."""
        if not self.layers[0].compact:
            return self.seen[row]
        return max(layer.lengths[row] for layer in self.layers)

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order (LayerCache.select)."""
        for layer in self.layers:
            layer.select(rows)
        self.seen = [self.seen[row] for row in rows]
        self.prompt = [self.prompt[row] for row in rows]

    def join(self, other: "KVCache") -> None:
        """Appends the other's sequences; the other is used up, layer by layer, so that the room of
        one layer is needed and not of a second cache."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.join(its)
        self.seen = self.seen + other.seen
        self.prompt = self.prompt + other.prompt
