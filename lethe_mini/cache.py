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

from .attention import rope_cos_sin, rotate

BLOCK = 64  # slots; capacity is always a multiple, so shapes repeat


def blocks(slots: int) -> int:
    """`slots` rounded up to whole blocks."""
    return -(-slots // BLOCK) * BLOCK


class LayerCache:
    """What one layer holds for B sequences. Tensors are (B, H_kv, capacity, ...).

    scored:   keep a score per slot (float32, whatever the model's dtype), added to by `observe`.
    window:   also keep the last `window` queries, for policies that look through them at a round.
    inv_freq: given in compact mode, where a key's RoPE angle is that of its slot.
    """

    def __init__(self, index, batch, kv_heads, head_dim, dtype, device, scored, window, inv_freq):
        self.index = index
        self.window = window
        self.inv_freq = inv_freq
        new = {"dtype": dtype, "device": device}
        self.store = {
            "keys": torch.zeros(batch, kv_heads, 0, head_dim, **new),
            "values": torch.zeros(batch, kv_heads, 0, head_dim, **new),
            "positions": torch.zeros(batch, kv_heads, 0, dtype=torch.int32, device=device),
        }
        if scored:
            self.store["scores"] = torch.zeros(batch, kv_heads, 0, device=device)
        self.queries: Tensor | None = None  # (B, H, up to `window`, D), newest last
        self.thresholds = [0] * batch  # a policy's note per sequence; see Lethe.round
        self._set_lengths([0] * batch)

    # -- what is held ---------------------------------------------------------------------------

    scored = property(lambda self: "scores" in self.store)
    compact = property(lambda self: self.inv_freq is not None)
    keys = property(lambda self: self.store["keys"][:, :, : self.length])
    values = property(lambda self: self.store["values"][:, :, : self.length])
    positions = property(lambda self: self.store["positions"][:, :, : self.length])
    scores = property(lambda self: self.store["scores"][:, :, : self.length])
    capacity = property(lambda self: self.store["keys"].shape[2])

    @property
    def length(self) -> int:
        """S: slots of the longest sequence."""
        return self._longest + self._appended

    @property
    def lengths(self) -> list[int]:
        """Tokens held, per sequence."""
        return [length + self._appended for length in self._base]

    @property
    def held(self) -> int:
        """Tokens held, all sequences together."""
        return self._base_sum + self._appended * len(self._base)

    def lengths_tensor(self) -> Tensor:
        """(B,) int64."""
        return self._base_tensor + self._appended

    def valid(self) -> Tensor:
        """(B, 1, S) bool: which slots hold a token."""
        slots = torch.arange(self.length, device=self._base_tensor.device)
        return (slots < self.lengths_tensor()[:, None])[:, None]

    def _set_lengths(self, lengths: list[int]) -> None:
        # Between two rounds all sequences grow alike: only `_appended` changes, on the host.
        self._base, self._appended = list(lengths), 0
        self._longest, self._base_sum = max(lengths, default=0), sum(lengths)
        self._ragged = len(set(lengths)) > 1
        self._base_tensor = torch.tensor(lengths, device=self.store["keys"].device).long()

    # -- every step -----------------------------------------------------------------------------

    def next_slots(self, T: int) -> Tensor:
        """(B, T): the slots that the next T tokens will take."""
        steps = torch.arange(T, device=self._base_tensor.device)
        return self.lengths_tensor()[:, None] + steps

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> Tensor | None:
        """Stores T tokens. k, v: (B, H_kv, T, D) after RoPE; positions: (B, T).

        Returns the mask for these queries over `attended(T)`, (B or 1, 1, T, slots), True where
        they may look, or None where `attend` needs none. It comes from slots: they are in the order
        of the text.
        """
        T, start = k.shape[2], self.length
        if start + T > self.capacity:
            self._resize(blocks(start + T))
        new = {"keys": k, "values": v, "positions": positions[:, None].expand(k.shape[:3])}
        slots = self.next_slots(T) if self._ragged or (T > 1 and start) else None  # (B, T)
        for name, tensor in new.items():
            if self._ragged:
                rows = torch.arange(k.shape[0], device=k.device)[:, None]
                self.store[name][rows, :, slots] = tensor.transpose(1, 2).to(self.store[name].dtype)
            else:
                self.store[name][:, :, start : start + T] = tensor
        self._appended += T
        if slots is None and T > 1:
            return None
        newest = start if slots is None else slots[:, :, None]
        seen = torch.arange(self.attended(T)[0].shape[2], device=k.device) <= newest
        return seen[:, None] if self._ragged or T > 1 else seen[None, None, None]

    def attended(self, T: int) -> tuple[Tensor, Tensor]:
        """Keys and values for T queries to look at: to the last token; while decoding to the last
        block's end, so that shapes repeat (a new one at every step costs time and memory)."""
        slots = self.capacity if T == 1 else self.length
        return self.store["keys"][:, :, :slots], self.store["values"][:, :, :slots]

    def observe(self, q: Tensor, mass: Tensor | None) -> None:
        """Adds a step's mass (B, H_kv, slots) to the scores: the sum in arXiv 2511.06029, eq. 5."""
        if mass is not None:
            self.store["scores"][:, :, : mass.shape[2]].add_(mass)
        if self.window:
            past = q if self.queries is None else torch.cat((self.queries, q), dim=2)
            self.queries = past[:, :, -self.window :].clone()

    def _resize(self, capacity: int) -> None:
        for name, old in self.store.items():
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]
            self.store[name] = new

    # -- rounds and batches ---------------------------------------------------------------------

    def keep(self, indices: Tensor, counts: list[int]) -> None:
        """Keeps of sequence b the first counts[b] slots named in indices[b, h], in that order.

        indices: (B, H_kv, at least max(counts)) int64, ascending. Every tensor moves together, into
        new storage of just as many blocks as needed; in compact mode keys turn to their new slots.
        """
        before, n = self.lengths_tensor(), max(counts, default=0)
        indices = indices[:, :, :n]
        kept = torch.arange(n, device=indices.device)
        valid = kept < torch.tensor(counts, device=indices.device)[:, None, None]  # (B, 1, n)
        batch, heads = indices.shape[:2]
        rows = torch.arange(batch, device=indices.device)[:, None, None]
        cols = torch.arange(heads, device=indices.device)[:, None]
        for name, old in self.store.items():
            new = old.new_zeros(batch, heads, blocks(n), *old.shape[3:])
            moved = old[rows, cols, indices]
            if name == "keys" and self.compact:
                moved = rotate(moved, *rope_cos_sin(kept - indices, self.inv_freq))
            beyond = ~(valid[..., None] if old.dim() == 4 else valid)
            new[:, :, :n] = moved.masked_fill_(beyond, 0)
            self.store[name] = new
        self._set_lengths(counts)
        if self.queries is not None and self.compact:  # they move with the newest slots
            shift = (self.lengths_tensor() - before)[:, None, None]
            self.queries = rotate(self.queries, *rope_cos_sin(shift, self.inv_freq))

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order; one may appear twice, as a fork of itself."""
        lengths = [self.lengths[row] for row in rows]
        n, index = max(lengths, default=0), torch.tensor(rows, device=self._base_tensor.device)
        for name, old in self.store.items():
            new = old.new_zeros(len(rows), old.shape[1], blocks(n), *old.shape[3:])
            new[:, :, :n] = old[:, :, :n].index_select(0, index.long())
            self.store[name] = new
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index.long())
        self.thresholds = [self.thresholds[row] for row in rows]
        self._set_lengths(lengths)

    def join(self, other: "LayerCache") -> None:
        """Appends the other's sequences behind these."""
        lengths = self.lengths + other.lengths
        capacity = max(self.capacity, other.capacity)
        self._resize(capacity)
        other._resize(capacity)
        for name, mine in self.store.items():
            self.store[name] = torch.cat((mine, other.store[name]))
        if self.queries is not None:  # a short prompt leaves its window partly empty
            wide = max(self.queries.shape[2], other.queries.shape[2])
            parts = (
                torch.nn.functional.pad(q, (0, 0, wide - q.shape[2], 0))
                for q in (self.queries, other.queries)
            )
            self.queries = torch.cat(list(parts))
        self.thresholds = self.thresholds + other.thresholds
        self._set_lengths(lengths)


class KVCache:
    """The layers' caches, and what is counted once per sequence.

    config: the model's sizes; scored, window: see LayerCache; compact: the model's RoPE
    frequencies, if keys are to turn to their slots at every round.
    """

    def __init__(
        self, config, batch=1, dtype=None, device="cpu", scored=False, window=0, compact=None
    ):
        sizes = (batch, config.num_key_value_heads, config.head_dim)
        dtype, device = dtype or torch.get_default_dtype(), torch.device(device)
        if compact is not None:  # turned again and again, so in float64 where the device has it
            compact = compact.to(torch.float32 if device.type == "mps" else torch.float64)
        self.layers = [
            LayerCache(index, *sizes, dtype, device, scored, window, compact)
            for index in range(config.num_hidden_layers)
        ]
        self.device = device
        self.seen = [0] * batch  # tokens seen: the next position
        self.prompt = [0] * batch  # of these, tokens of the prompt

    def seen_tensor(self) -> Tensor:
        """(B,) int64: the next token's position."""
        return torch.tensor(self.seen, device=self.device)

    def next_angle(self, row: int) -> int:
        """The RoPE position of a sequence's next token; in compact mode its highest slot."""
        if not self.layers[0].compact:
            return self.seen[row]
        return max(layer.lengths[row] for layer in self.layers)

    def advance(self, T: int) -> None:
        """T more tokens of every sequence have gone through all layers."""
        self.seen = [seen + T for seen in self.seen]

    def decay(self, gamma: float) -> None:
        """The factor of arXiv 2511.06029, eq. 5; once per decoded token, once per prefill."""
        if gamma != 1:
            torch._foreach_mul_([layer.store["scores"] for layer in self.layers], gamma)

    @property
    def held(self) -> int:
        """Tokens held: all layers, all sequences."""
        return sum(layer.held for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        keys = self.layers[0].store["keys"]
        return 2 * keys.shape[1] * keys.shape[3] * keys.element_size()

    @property
    def allocated(self) -> int:
        """Bytes of all tensors: keys, values, positions, scores, queries, with their spare room."""
        tensors = [t for layer in self.layers for t in (*layer.store.values(), layer.queries)]
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def select(self, rows: list[int]) -> None:
        """Keeps these sequences, in this order (LayerCache.select)."""
        for layer in self.layers:
            layer.select(rows)
        self.seen = [self.seen[row] for row in rows]
        self.prompt = [self.prompt[row] for row in rows]

    def join(self, other: "KVCache") -> None:
        """Appends the other's sequences; the other is used up."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.join(its)
            its.store.clear()  # so that a join needs the room of one layer, not of a second cache
        self.seen = self.seen + other.seen
        self.prompt = self.prompt + other.prompt
