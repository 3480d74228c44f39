"""The KV cache: keys, values, positions and scores, slot by slot, for sequences that differ.

A *slot* is a place in the storage, a *position* a token's place in the text. They differ after the
first round of pruning, so every slot carries its position. Three things always hold:

- the held slots of a sequence are 0 .. length - 1, its positions strictly increasing along them;
- each layer has its own length for every sequence, and what lies beyond it is zero, never attended;
- storage moves in blocks of BLOCK slots, and shrinks when a round leaves room.

Policies (policy.py) decide what stays; nothing here knows why.
"""

import torch
from torch import Tensor

from .rope import inverse_frequencies, rope_cos_sin, rotate

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


class LayerCache:
    """What one layer holds for B sequences.

    scored:   keep a score per slot (float32, whatever the model's dtype), of the mass from queries
              at least `lag` slots later.
    window:   also keep the last `window` queries, for policies that look through them at a round.
    compact:  a key's RoPE angle is that of its slot, not of its position.
    """

    def __init__(
        self, index, config, batch, dtype, device, compact, inv_freq, scored=False, lag=0, window=0
    ):
        self.index, self.lag, self.window = index, lag, window
        self.compact, self.inv_freq = compact, inv_freq
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        empty = torch.zeros(batch, kv_heads, 0, device=device)
        wide = torch.zeros(batch, kv_heads, 0, config.head_dim, device=device, dtype=dtype)
        self.store: Store = {"keys": wide, "values": wide, "positions": empty.int()}
        if scored:
            self.store["scores"] = empty
        # (B, H, window, D), newest last; zeros where there are none yet.
        self.queries = wide.new_zeros(batch, heads, window, config.head_dim)
        self.thresholds = [0] * batch  # a policy's note per sequence; see Lethe.round
        self._hold([0] * batch)

    scored = property(lambda self: "scores" in self.store)
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

    def content(self, rows: list[int]) -> Tensor:
        """(len(rows), H_kv, capacity, D): these sequences' keys as they were before RoPE. All
        storage, as while decoding: shapes repeat; beyond a sequence's length it is zero."""
        slots = torch.arange(self.capacity, device=self.filled.device)
        keys = self.store["keys"][rows]
        for row, one in zip(rows, keys, strict=True):  # turned in place, for the memory's sake
            angles = slots if self.compact else self.store["positions"][row]
            one.copy_(rotate(one, *rope_cos_sin(-angles, self.inv_freq.float())))
        return keys

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
        """Keeps the last `window` queries; q: (B, H, T, D)."""
        if self.window:
            self.queries = torch.cat((self.queries, q), dim=2)[:, :, -self.window :].clone()

    def _resize(self, capacity: int) -> None:
        for name, old in self.store.items():
            self.store[name] = new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]

    def keep(self, indices: Tensor, counts: list[int], rows: list[int] | None = None) -> None:
        """Keeps of sequence rows[b] (default: b) the first counts[b] slots named in indices[b, h].

        indices: (B, H_kv, at least max(counts)) int64, ascending. Every tensor moves, in the same
        way, into new storage of just as many blocks as needed; in compact mode keys turn to their
        new slots.
        """
        rows = list(range(len(counts))) if rows is None else rows
        n, device = max(counts, default=0), indices.device
        indices, kept = indices[:, :, :n], torch.arange(n, device=device)
        beyond = kept >= torch.tensor(counts, device=device)[:, None, None]  # (B, 1, n)
        row = torch.tensor(rows, device=device).long()
        head = torch.arange(indices.shape[1], device=device)[:, None]
        for name, old in self.store.items():
            moved = old[row[:, None, None], head, indices]
            if name == "keys" and self.compact:
                moved = rotate(moved, *rope_cos_sin(kept - indices, self.inv_freq))
            moved.masked_fill_(beyond[..., None] if old.dim() == 4 else beyond, 0)
            new = old.new_zeros(*moved.shape[:2], blocks(n), *old.shape[3:])
            new[:, :, :n] = moved
            self.store[name] = new
        before = self.filled[row]
        self._hold(counts)
        self.queries = self.queries[row]
        if self.compact:  # they move with the newest slots
            shift = (self.filled - before)[:, None, None]
            self.queries = rotate(self.queries, *rope_cos_sin(shift, self.inv_freq))
        self.thresholds = [self.thresholds[r] for r in rows]

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order; one may appear twice, as a fork of itself."""
        heads = self.store["keys"].shape[1]
        all_slots = torch.arange(self.length, device=self.filled.device)
        self.keep(all_slots.expand(len(rows), heads, -1), [self.lengths[r] for r in rows], rows)

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

    config: the model's; compact: keys turn to their slots at every round; notes: see LayerCache.
    """

    def __init__(self, config, batch=1, dtype=None, device="cpu", compact=False, **notes):
        self.device = torch.device(device)
        # Keys turn again and again, so in float64 where the device has it.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        inv_freq = inverse_frequencies(config).to(self.device, wide)
        self.layers = [
            LayerCache(index, config, batch, dtype, self.device, compact, inv_freq, **notes)
            for index in range(config.num_hidden_layers)
        ]
        self.seen = [0] * batch  # tokens seen: the next position
        self.prompt = [0] * batch  # of these, tokens of the prompt

    held = property(lambda self: sum(sum(layer.lengths) for layer in self.layers))  # tokens, in all

    def next_angle(self, row: int) -> int:
        """The RoPE position of a sequence's next token; in compact mode its highest slot."""
        if not self.layers[0].compact:
            return self.seen[row]
        return max(layer.lengths[row] for layer in self.layers)

    def decay(self, gamma: float) -> None:
        """The factor of arXiv 2511.06029, eq. 5; once per decoded token, once per prefill."""
        if gamma != 1:
            torch._foreach_mul_([layer.store["scores"] for layer in self.layers], gamma)

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
