"""The policies inside transformers: a cache for `generate` that prunes itself.

    cache = pruned(model, Lethe(budget=512))
    model.generate(**inputs, past_key_values=cache, max_new_tokens=4000)
    print(cache.report())

A model of transformers gives new keys and values to its cache, then calls an attention function,
which is not told the cache. So a pruned layer marks the keys with itself, and the attention
function that `pruned` sets finds it there. Tokens lie in the KVCache of this package, and rounds
fall where the engine's do. Layers with a sliding window stay as they are.

transformers counts columns, padding included (`PrunedCache.columns`); the KVCache counts the tokens
of every sequence.
"""

import sys
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention import attend, causal_mask
from ..cache import KVCache
from ..errors import UserError
from ..generation.stats import allocated, token_bytes
from ..kernels import MASS_BLOCK, best_size, lagged, to_device, write
from ..policy import Policy
from ..rope import rope_cos_sin, rotate

NAME = "lethe_mini"  # of the attention, for transformers
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
KNOWN = {"position_ids", "cache_position"}  # tensors given to attention that change nothing here


def pruned(model: PreTrainedModel, policy: Policy) -> "PrunedCache":
    """An empty cache for this model, which the policy prunes. Sets the model's attention to one
    that computes the same and knows such caches. Raises UserError for what cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"pruned() takes a model of transformers, not {type(model).__name__}")
    if not isinstance(policy, Policy):
        raise UserError(f"pruned() takes a policy such as Lethe(budget=512), not {policy!r}")
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if config.is_encoder_decoder or model._is_stateful or not model._supports_attention_backend:
        raise UserError(f"{name} does not use the attention or the cache that pruned() replaces")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UserError(f"pruned() takes a model on one device; {name} is on several")
    layers = DynamicCache(config=config).layers
    others = set(getattr(config, "layer_types", None) or ()) - KINDS
    if others or getattr(config, "num_kv_shared_layers", 0):
        kinds = ", ".join(sorted(others)) or "layers that share keys"
        raise UserError(f"pruned() takes layers of full or sliding attention; {name} has {kinds}")
    if all(getattr(layer, "is_sliding", False) for layer in layers):
        raise UserError(f"every layer of {name} has a sliding window; there is nothing to prune")
    model.set_attn_implementation(NAME)
    return PrunedCache(model, policy, layers)


@dataclass(frozen=True)
class Report:
    """What a PrunedCache holds. Layers are those that are pruned."""

    seen: list[int]  # tokens of each sequence, without padding
    kept: list[list[int]]  # of those, what each layer holds: [sequence][layer]
    evicted: int  # tokens that left, over layers and sequences
    bytes: int  # of all tensors, spare room and bookkeeping included
    bytes_full: int  # of all keys and values, had none left
    rounds: int  # of each sequence, added up

    def __str__(self) -> str:
        held, layers = sum(map(sum, self.kept)), max(1, sum(map(len, self.kept)))
        mean = f"{sum(self.seen):,} tokens seen, {held / layers:,.0f} held per sequence and layer"
        memory = f"{self.bytes / 1e6:,.1f} MB, a full cache {self.bytes_full / 1e6:,.1f} MB"
        return f"{mean}; {self.evicted:,} evicted in {self.rounds} rounds; {memory}"


@dataclass(frozen=True)
class Step:
    """Whose the T new tokens are."""

    real: list  # of each sequence, an index: which are no padding
    counts: list[int]  # of each sequence, how many
    decoding: bool  # one for each sequence, behind its prompt


class PrunedLayer(CacheLayerMixin):
    """What transformers asks of a layer, for the pruned layer `index` of a PrunedCache."""

    is_sliding = supports_early_init = False

    def __init__(self, cache: "PrunedCache", index: int):
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first step makes the storage of all layers."""

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Gives the new keys and values back; the attention function stores them."""
        self.cache.takes_turn(self.index, attends=False)
        key_states.pruned_layer = self
        return key_states, value_states

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Those of a mask for the T new tokens alone, which says which of them are padding.
        query: T, or in older versions the columns of the new tokens."""
        return query if isinstance(query, int) else len(query), self.cache.columns

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions


class PrunedCache(Cache):
    """A cache of transformers, for one model; `report` tells what it holds."""

    def __init__(self, model: PreTrainedModel, policy: Policy, layers: list):
        full = [i for i, layer in enumerate(layers) if not getattr(layer, "is_sliding", False)]
        for index, place in enumerate(full):
            layers[place] = PrunedLayer(self, index)
        super().__init__(layers=layers)
        self.model, self.module = weakref.ref(model), None  # module: of the first layer
        self.policy, self.depth = policy, len(full)
        self.kv: KVCache | None = None  # made by the first step, which knows all sizes
        self.step: Step | None = None
        self.columns = self.rounds = self.turn = 0
        self.reading = False  # are the last tokens a prompt whose round is still to come?

    def refused(self, *args, **kwargs):
        raise UserError(
            "a pruned cache only goes on: no beam search, no assisted decoding, no crop or reset"
        )

    crop = reset = reorder_cache = activate_past_recording = refused
    batch_repeat_interleave = batch_select_indices = refused

    def report(self) -> Report:
        """What the cache holds, after the prompt's round if that is still to come."""
        if self.kv is None:
            return Report([], [], 0, 0, 0, 0)
        self.prune_prompt()
        kv, rows = self.kv, range(len(self.kv.seen))
        kept = [[layer.lengths[row] for layer in kv.layers] for row in rows]
        full = sum(kv.seen) * self.depth * token_bytes(kv)
        return Report(list(kv.seen), kept, kv.evicted, allocated(kv), full, self.rounds)

    def takes_turn(self, index: int, attends: bool) -> None:
        """Raises UserError unless each layer takes its keys, then attends, once, in order."""
        now = 2 * index + attends
        if now != self.turn and (now > 0 or self.turn == 1):
            raise UserError(
                f"{type(self.model()).__name__} does not call the attention that pruned() set: "
                "it has its own, shares keys between layers, or another one was set since"
            )
        self.turn = now + 1

    def attend(self, index: int, module, q: Tensor, k: Tensor, v: Tensor, mask, cap) -> Tensor:
        """One layer's part of a step: stores the new tokens, attends, notes what the policy asks
        for. q: (B, H, T, D); k, v: (B, H_kv, T, D); mask: (B, 1, T, T) bool or None. Returns
        (B, H, T, D), zero for padding."""
        self.takes_turn(index, attends=True)
        if index == 0:
            self.begin(module, q, k, mask)
        kv, layer, T = self.kv, self.kv.layers[index], q.shape[2]
        if k.shape != v.shape or k.device != kv.device or k.shape[1::2] != layer.keys.shape[1::2]:
            raise UserError(f"{type(module).__name__}: all keys and values should have one size")
        if self.step.decoding:
            store, slots = layer.place(1)
            write(store, slots, k, v, kv.next[:, None])
            out = self.look(layer, q, store, causal_mask(slots, store["keys"].shape[2]), cap)
            layer.remember(q)
        else:
            out = torch.zeros_like(q)
            for row, real in enumerate(self.step.real):
                self.read(layer, row, real, q, k, v, out, cap)
        if index == self.depth - 1:
            self.end(T)
        return out

    def read(
        self, layer, row: int, real, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cap
    ) -> None:
        """Part of a prompt of one sequence, alone, as the engine reads it. real: which of the T
        tokens are its own."""
        q, k, v = (x[row : row + 1, :, real] for x in (q, k, v))
        seen, held, n = self.kv.seen[row], layer.lengths[row], q.shape[2]
        if n == 0:
            return
        count = torch.arange(n, device=q.device)[None]
        store = {name: t[row : row + 1, :, : held + n] for name, t in layer.store.items()}
        write(store, held + count, k, v, seen + count)
        out[row : row + 1, :, real] = self.look(layer, q, store, None, cap)
        if layer.notes.window:
            newest = torch.cat((layer.queries[row : row + 1], q), dim=2)
            layer.queries[row] = newest[0, :, -layer.notes.window :]

    def look(self, layer, q: Tensor, store, mask, cap) -> Tensor:
        """Attention over a store, whose scores grow by the mass."""
        scored, lag, kv = layer.notes.scored, layer.notes.lag, (store["keys"], store["values"])
        if cap is None:
            out, mass = attend(q, *kv, mask, scored, lag)
        else:
            out, mass = capped(q, *kv, mask, cap, lag)
        if scored:
            store["scores"].add_(mass)
        return out

    def begin(self, module, q: Tensor, k: Tensor, mask) -> None:
        """Before the first layer of a step: whose tokens they are, and what is due before them."""
        B, _, T, _ = q.shape
        if self.kv is None:
            self.make(module, q, k)
        elif module is not self.module():
            raise UserError("this cache belongs to another model; make one for each")
        kv, real = self.kv, real_tokens(mask, B, T)
        if len(kv.seen) != B:
            raise UserError(f"the cache holds {len(kv.seen)} sequences, not {B}; make a new one")
        counts = [T if isinstance(index, slice) else len(index) for index in real]
        after = [seen + n for seen, n in zip(kv.seen, counts, strict=True)]
        shown = after if mask is None else getattr(mask, "shown", after)
        if list(shown) != after:
            raise UserError(
                f"attention_mask shows {shown} tokens of the sequences, and the cache has seen "
                f"{after}; a mask spans all tokens and cannot hide what was read"
            )
        self.step = Step(real, counts, T == 1 and min(counts) == 1 and any(kv.seen))
        if self.step.decoding:
            self.prune_prompt()
            self.policy.decay(kv)
        elif kv.seen == kv.prompt:  # the first prompt, perhaps in chunks
            for n in after:
                self.policy.check_prompt(n)
        elif not self.reading:  # one prompt is one update, however it is chunked
            self.policy.decay(kv)
        kv.reserve(max(counts))

    def end(self, T: int) -> None:
        """After the last layer of a step: counts, and a round where one is due. A prompt's round
        waits for the first decoded token, for more of the prompt may come."""
        kv, step = self.kv, self.step
        after = [seen + n for seen, n in zip(kv.seen, step.counts, strict=True)]
        if not step.decoding:
            self.reading = True
            kv.prompt = after if kv.prompt == kv.seen else kv.prompt
            kv.tokens.changes += 1  # sequences did not grow alike, so room is measured anew
        kv.tokens.counts = after
        kv.next.add_(to_device(step.counts, kv.device))
        self.columns += T
        if step.decoding:
            self.prune()

    def prune_prompt(self) -> None:
        """The round after a prompt."""
        if self.reading:
            self.reading = False
            self.prune(prefilled=True)

    @torch.inference_mode(False)  # as in `attention`
    @torch.no_grad()
    def prune(self, prefilled: bool = False) -> None:
        """A round for the sequences that are due."""
        due = self.policy.due(self.kv, prefilled)
        if any(due):
            self.policy.round(self.kv, due)
            self.rounds += sum(due)

    def make(self, module, q: Tensor, k: Tensor) -> None:
        """The storage, when the first keys tell its sizes."""
        model, policy = self.model(), self.policy
        if not any(module is one for one in model.modules()):
            raise UserError("this cache was made for another model; make one for each")
        notes, (B, H, _, D) = policy.notes(), q.shape
        inv_freq = frequencies(model, module, D)
        if not inv_freq and (notes.beacons or getattr(policy, "distinct_ratio", 0)):
            raise UserError(
                f"{type(policy).__name__} turns keys and queries by RoPE, and not as "
                f"{type(model).__name__} does; take another policy"
            )
        sizes = SimpleNamespace(
            num_attention_heads=H, num_key_value_heads=k.shape[1], head_dim=D,
            num_hidden_layers=self.depth, inv_freq=inv_freq,
        )  # fmt: skip
        self.kv = KVCache(sizes, B, k.dtype, k.device, notes=notes)
        self.module = weakref.ref(module)


def frequencies(model, module, D: int) -> tuple[float, ...]:
    """Radians a position turns each of the D/2 pairs, as the model's own functions turn them; none
    where these do not turn all pairs (i, i + D/2) by angles that are always the same."""
    rope = next((one for one in model.modules() if hasattr(one, "rope_type")), None)
    turn = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    kind = getattr(rope, "rope_type", "dynamic")
    each, name = (["full_attention"], "full_attention_") if isinstance(kind, dict) else ([], "")
    kind = kind["full_attention"] if each else kind
    if turn is None or kind in ("dynamic", "longrope"):
        return ()
    inv_freq, factor = (getattr(rope, name + x) for x in ("inv_freq", "attention_scaling"))
    if 2 * len(inv_freq) != D:
        return ()
    inv_freq = inv_freq.float()
    x = torch.linspace(1, 2, D, device=inv_freq.device).view(1, 1, 1, D)
    place = torch.tensor([[7]], device=x.device)
    theirs, _ = turn(x, x, *rope(x, place, *each))
    ours = rotate(x, *rope_cos_sin(place[:, None], inv_freq, factor))
    return tuple(inv_freq.tolist()) if torch.allclose(ours, theirs, atol=1e-4) else ()


def real_tokens(mask: Tensor | None, B: int, T: int) -> list:
    """Which of T tokens of each sequence are no padding, as an index. mask: (B, 1, T, T) bool, what
    transformers made of the attention mask, or None. Raises UserError unless it is causal."""
    if mask is None:
        return [slice(None)] * B
    fits = mask.dtype == torch.bool and mask.shape[1:] == (1, T, T)
    looks = mask[:, 0] if fits else mask.new_zeros(1, T, T, dtype=torch.bool)
    real = looks.diagonal(dim1=1, dim2=2)  # a token that is real sees itself
    causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril() & real[:, None]
    if not fits or ((looks != causal) & real[..., None]).any():
        raise UserError("a pruned cache takes causal attention and a mask of two dimensions")
    return [slice(None) if row.all() else row.nonzero()[:, 0] for row in real.expand(B, T)]


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float, lag: int = 0):
    """`attend` with logits capped to (-cap, cap), as Gemma 2 asks for: the output and the mass. A
    mask may be False in a whole row. Queries go in blocks, so memory is linear in S."""
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    out, mass = torch.empty_like(q), torch.zeros(B, H_kv, S, device=q.device)
    slots, places = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)
    block = best_size(MASS_BLOCK, q.device)
    for first in range(0, T, block):
        some = slice(first, first + block)
        looks = (slots <= places[some, None])[None, None] if mask is None else mask[:, :, some]
        rows = q[:, :, some].reshape(B, H_kv, -1, D) * D**-0.5  # (B, H_kv, G * t, D)
        logits = torch.matmul(rows, k.mT).float().view(B, H_kv, H // H_kv, -1, S)
        logits = (logits / cap).tanh_().mul_(cap)
        weights = logits.masked_fill_(~looks[:, :, None], -1e30).softmax(dim=-1)
        mass += (weights * lagged(looks, lag)[:, :, None]).sum(dim=(2, 3))
        values = torch.matmul(weights.flatten(2, 3).to(v.dtype), v)
        out[:, :, some] = values.view(B, H, -1, D)
    return out, mass


@torch.compiler.disable
def attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **kwargs
):
    """What transformers calls in every layer: (B, H, T, D) and keys, values (B, H_kv, S, D) ->
    (B, T, H, D) and None. Where the keys belong to no pruned layer, it does as PyTorch does."""
    layer, D = getattr(key, "pruned_layer", None), query.shape[3]
    if layer is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if scaling not in (None, D**-0.5):
        query = query * (scaling * D**0.5)
    if layer is None:
        out, _ = capped(query, key, value, attention_mask, softcap)
        return out.transpose(1, 2).contiguous(), None
    asked = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in KNOWN]
    if asked or dropout or not kwargs.get("is_causal", True):
        what = ", ".join(asked) or ("dropout" if dropout else "attention that is not causal")
        raise UserError(
            f"a pruned cache cannot serve {type(module).__name__}, which asks for {what}"
        )
    with torch.inference_mode(False), torch.no_grad():  # storage outlives the caller's mode
        out = layer.cache.attend(layer.index, module, query, key, value, attention_mask, softcap)
    return out.transpose(1, 2).contiguous(), None


def mask(*args, attention_mask=None, allow_is_causal_skip=True, **kwargs) -> Tensor | None:
    """The mask of PyTorch's attention, which also tells how many tokens the caller's shows."""
    hides = attention_mask is not None and not attention_mask.all()
    made = sdpa_mask(
        *args, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not hides, **kwargs,
    )  # fmt: skip
    if made is not None and attention_mask is not None:
        made.shown = attention_mask.sum(-1).tolist()
    return made


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
