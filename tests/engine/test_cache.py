"""KVCache against lists: a machine appends, prunes, forks, joins and drops sequences at random.

After every step all that the cache holds equals what a model of plain lists holds: keys, values,
positions, scores, queries, lengths. Numbers are small multiples of 1/4 and sums are exact, so equal
means equal. Sizes: L = 2, H_kv = 3, H = 6, D = 4, up to four sequences, a window of five queries.
"""

import math
import random
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lethe_mini.cache import KVCache, Notes
from lethe_mini.checkpoint.rope import inverse_frequencies
from lethe_mini.generation.stats import allocated, token_bytes
from lethe_mini.kernels import BLOCK
from lethe_mini.policies import (
    H2O,
    RKV,
    TOVA,
    LethePlus,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
)
from lethe_mini.policy import FullKV, Lethe

L, KV_HEADS, HEADS, D, WINDOW, MOST = 2, 3, 6, 4, 5, 4
PROMPTS = st.integers(1, 9) | st.integers(30, 70)
SIZES = SimpleNamespace(
    num_hidden_layers=L,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=D,
    inv_freq=inverse_frequencies("default", 10000.0, D, {}),
)
POLICIES = {
    "full": lambda **_: FullKV(),
    "streaming": StreamingLLM,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": lambda **kwargs: SnapKV(window=WINDOW, **kwargs),
    "pyramidkv": lambda **kwargs: PyramidKV(window=WINDOW, beta=3.0, **kwargs),
    "rkv": lambda **kwargs: RKV(window=WINDOW, **kwargs),
    "random": RandomKV,
    "lethe": lambda **kwargs: Lethe(tau=8.0, **kwargs),
    "lethe-alone": lambda **kwargs: alone(tau=2.0, **kwargs),
    "lethe-alone-segment": lambda **kwargs: alone(
        breakpoint="segment", segments=3, tau=2.0, **kwargs
    ),
    "lethe-plus": LethePlus,
    "lethe-plus-layer": lambda **kwargs: LethePlus(
        breakpoint="global", tau=8.0, per_head=False, **kwargs
    ),
    "lethe-plus-distinct": lambda **kwargs: LethePlus(distinct_ratio=0.7, alike=0.2, **kwargs),
    "lethe-plus-norm": lambda **kwargs: LethePlus(per_head=False, value_norm=True, **kwargs),
}

INTERVAL = 21
NOTES = Notes(scored=True, window=WINDOW, interval=INTERVAL, threshold=8)


def alone(budget, **kwargs):
    """Algorithm 1 without a budget."""
    return Lethe(budget=None, evict_threshold=NOTES.threshold, **kwargs)


def blocks(slots):
    return math.ceil(slots / BLOCK) * BLOCK


def protected(policy, prompt):
    """How many first positions the policy promises to keep."""
    return max(policy.sinks, prompt) if policy.protect_prompt else policy.sinks


class Row:
    """One sequence of the model: slots[layer][head] is a list of [key, value, position, score]."""

    def __init__(self, prompt):
        self.prompt, self.seen = prompt, 0
        self.slots = [[[] for _ in range(KV_HEADS)] for _ in range(L)]
        self.queries = [[] for _ in range(L)]  # [layer][time][head]
        self.thresholds = [NOTES.threshold] * L

    def copy(self):
        twin = Row(self.prompt)
        twin.seen, twin.thresholds = self.seen, list(self.thresholds)
        twin.slots = [[[list(slot) for slot in head] for head in layer] for layer in self.slots]
        twin.queries = [list(layer) for layer in self.queries]
        return twin

    def length(self, layer):
        return len(self.slots[layer][0])


class CacheMachine(RuleBasedStateMachine):
    """Rows of lists beside a cache; every rule does the same to both."""

    @initialize(prompt=PROMPTS, seed=st.integers(0, 2**32))
    def begin(self, prompt, seed):
        """One sequence and its prompt."""
        self.chance = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.halvings = 0
        self.cache, self.rows = self.prefilled(prompt)

    def prefilled(self, prompt):
        cache = KVCache(SIZES, dtype=torch.float32, notes=NOTES)
        cache.prompt, rows = [prompt], [Row(prompt)]
        self.extend(cache, rows, prompt)
        return cache, rows

    def draw(self, *shape):
        return torch.randint(-9, 10, shape, generator=self.numbers) / 4

    def extend(self, cache, rows, T):
        """T tokens through all layers: appended, looked at, observed."""
        B = len(rows)
        for index, layer in enumerate(cache.layers):
            slots = layer.place(T)[1].tolist()
            assert slots == [[row.length(index) + t for t in range(T)] for row in rows]
        tokens = [self.draw(2, B, KV_HEADS, T, D) for _ in cache.layers]
        masks = tiny.put(cache, tokens)
        for index, layer in enumerate(cache.layers):
            before = [row.length(index) for row in rows]
            self.check_mask(masks[index], before, T, layer)
            for row, keys, values in zip(rows, *tokens[index].tolist(), strict=True):
                for head in range(KV_HEADS):
                    row.slots[index][head] += [
                        [keys[head][t], values[head][t], row.seen + t, 0.0] for t in range(T)
                    ]
            self.observe(layer, index, rows, self.draw(B, HEADS, T, D))
        for row in rows:
            row.seen += T

    def check_mask(self, mask, before, T, layer):
        """A query sees all slots up to its own; None where plain causality says the same. A single
        query is shown all storage, so that shapes repeat."""
        S = layer.capacity if T == 1 else layer.length
        assert layer.length == max(before) + T
        right = [[[s <= n + t for s in range(S)] for t in range(T)] for n in before]
        if mask is None:
            assert T > 1
            assert all(
                seen == [[s <= S - T + t for s in range(S)] for t in range(T)] for seen in right
            )
        else:
            assert mask[:, 0].expand(len(before), -1, -1).tolist() == right

    def observe(self, layer, index, rows, q):
        """A step's mass, from 1/4 to 16 on what is held and nothing beyond."""
        shape = (len(rows), KV_HEADS, layer.length)
        mass = 2.0 ** torch.randint(-2, 5, shape, generator=self.numbers) * layer.valid()
        tiny.observe(layer, q, mass)
        for row, new, asked in zip(rows, mass.tolist(), q.transpose(1, 2).tolist(), strict=True):
            for head, received in zip(row.slots[index], new, strict=True):
                for slot, one in zip(head, received[: len(head)], strict=True):
                    slot[3] += one
            row.queries[index] = (row.queries[index] + asked)[-WINDOW:]

    # -- what can happen ------------------------------------------------------------------------

    @precondition(lambda self: self.cache.layers[0].length < 200)
    @rule(T=PROMPTS)
    def append(self, T):
        """All sequences grow by T."""
        self.extend(self.cache, self.rows, T)

    @rule(times=st.integers(1, 3))
    def step(self, times):
        """Single tokens, as in decoding."""
        for _ in range(times):
            self.extend(self.cache, self.rows, 1)

    @rule(gamma=st.sampled_from([1.0, 0.5, 0.0]))
    def decay(self, gamma):
        """Eq. 5's factor. (Ten halvings at most keep the sums exact.)"""
        self.halvings += gamma == 0.5
        gamma = 1.0 if gamma == 0.5 and self.halvings > 10 else gamma
        Lethe(gamma=gamma).decay(self.cache)
        for row in self.rows:
            for slot in (slot for layer in row.slots for head in layer for slot in head):
                slot[3] *= gamma

    @rule(data=st.data())
    def evict(self, data):
        """Any ascending choice of some sequences, another for each layer and head, as many in
        every head."""
        for index, layer in enumerate(self.cache.layers):
            some = data.draw(st.sets(st.integers(0, len(self.rows) - 1)))
            kept = []
            for row in some:
                n = self.rows[row].length(index)
                count = data.draw(st.integers(n // 2, n) | st.integers(0, n))
                heads = [sorted(self.chance.sample(range(n), count)) for _ in range(KV_HEADS)]
                kept.append(heads)
                self.apply(self.rows[row], index, heads)
            layer.evict(list(some), *tiny.mask_of(kept))

    def apply(self, row, index, chosen):
        row.slots[index] = [
            [head[slot] for slot in slots]
            for head, slots in zip(row.slots[index], chosen, strict=True)
        ]

    @precondition(lambda self: min(r.length(i) for r in self.rows for i in range(L)) > 0)
    @rule(
        name=st.sampled_from(sorted(POLICIES)),
        budget=st.integers(6, 30),
        sinks=st.integers(0, 5),
        protect_prompt=st.sampled_from([False, False, True]),
        recent_ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        due=st.lists(st.sampled_from([True, True, False]), min_size=MOST, max_size=MOST),
    )
    def round(self, name, due, **parameters):
        """A round of any policy on any of the sequences, after whatever another one left."""
        policy, due = POLICIES[name](**parameters), due[: len(self.rows)]
        right = [] if name == "full" else self.right_choice(policy, due)
        policy.round(self.cache, due)
        for index, row, chosen in right:
            self.apply(row, index, chosen)

    def right_choice(self, policy, due):
        """(layer, row, [head][slot]) that the oracle keeps of the sequences that are due."""
        sparsity = policy.sparsity(self.cache) if policy.scored else None
        shares = policy.shares(self.cache, list(range(len(self.rows))), sparsity).tolist()
        for number, row in enumerate(self.rows):
            mine = [share[number] for share in shares]
            lengths = [row.length(index) for index in range(L)]
            assert all(share <= n for share, n in zip(mine, lengths, strict=True))
            if policy.budget is not None:
                floor = protected(policy, row.prompt) + policy.min_recent
                floors = [min(floor, n) for n in lengths]
                assert sum(mine) == min(sum(lengths), max(sum(floors), policy.budget * L))
        found = []
        for index, layer in enumerate(self.cache.layers):
            importance = policy.importance(layer, self.cache)
            for number, row in enumerate(self.rows):
                if not due[number]:
                    continue
                n = row.length(index)
                scores = importance[number].expand(KV_HEADS, -1)[:, :n].tolist()
                self.check_scores(policy, scores, row.slots[index])
                salient, threshold = n, row.thresholds[index]
                tried = isinstance(policy, Lethe) and (policy.budget is not None or n > threshold)
                if tried:
                    salient = self.salient(policy, scores)
                always = protected(policy, row.prompt)
                room = shares[index][number]
                room -= min(always, n) if policy.budget is not None else 0
                recent = min(room, max(policy.min_recent, int(policy.recent_ratio * room)))
                positions = [[slot[2] for slot in head] for head in row.slots[index]]
                apart = tiny.distinct(policy, layer, number, room, recent)
                stay = oracles.always(positions, always, recent, *apart)
                chosen = oracles.prune(scores, stay, shares[index][number], salient)
                if tried and policy.budget is None:
                    row.thresholds[index] = max(threshold, 2 * len(chosen[0]))
                found.append((index, row, chosen))
        return found

    def check_scores(self, policy, scores, slots):
        """H2O and plain Lethe rank by the scores themselves."""
        held = [[slot[3] for slot in head] for head in slots]
        if getattr(policy, "value_norm", False):
            return
        if isinstance(policy, H2O) or getattr(policy, "per_head", False):
            assert scores == held
        elif isinstance(policy, Lethe):
            assert scores == [[math.fsum(column) for column in zip(*held, strict=True)]] * KV_HEADS

    def salient(self, policy, scores):
        """Algorithm 1: the tokens before the breakpoint, or all."""
        ranked = zip(*(sorted(head, reverse=True) for head in scores), strict=True)
        ranked = [math.fsum(column) for column in ranked]
        found = oracles.breakpoint(ranked, policy.segments, policy.tau, policy.breakpoint)
        return found or len(scores[0])

    @rule(data=st.data())
    def select(self, data):
        """Sequences leave, change places, or fork."""
        some = st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=MOST)
        rows = data.draw(some)
        self.cache.select(rows)
        self.rows = [self.rows[row].copy() for row in rows]

    @precondition(lambda self: len(self.rows) < MOST)
    @rule(prompt=PROMPTS)
    def join(self, prompt):
        """Another prompt, of any length, comes in."""
        other, rows = self.prefilled(prompt)
        self.cache.join(other)
        self.rows += rows

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_cache_holds_what_the_lists_hold(self):
        """Slot by slot, and per sequence."""
        rows = self.rows
        assert self.cache.seen == [row.seen for row in rows]
        assert self.cache.prompt == [row.prompt for row in rows]
        for index, layer in enumerate(self.cache.layers):
            assert layer.thresholds == [row.thresholds[index] for row in rows]
            held = [getattr(layer, name).tolist() for name in ("keys", "values", "positions")]
            held.append(layer.scores.tolist())
            for number, row in enumerate(rows):
                n = row.length(index)
                for head, slots in enumerate(row.slots[index]):
                    for field, of in enumerate(held):
                        assert of[number][head][:n] == [slot[field] for slot in slots]
                    positions = [slot[2] for slot in slots]
                    assert positions == sorted(set(positions))
                asked = row.queries[index]
                queries = layer.queries[number].transpose(0, 1).tolist()
                assert queries[len(queries) - len(asked) :] == asked

    @invariant()
    def storage_is_in_blocks_and_owned_and_clean(self):
        """Capacity is not much more than what is held and the interval's room, nothing lies beyond
        a length, and bytes add up."""
        B, token = len(self.rows), KV_HEADS * D * 4 * 2
        most = 0
        assert token_bytes(self.cache) == token
        for index, layer in enumerate(self.cache.layers):
            lengths = [row.length(index) for row in self.rows]
            assert layer.lengths == lengths
            assert layer.filled.tolist() == lengths
            assert layer.length == max(lengths)
            wanted = blocks(max(lengths) + INTERVAL)
            assert max(lengths) <= layer.capacity <= wanted + max(BLOCK, wanted // 8)
            assert layer.capacity % BLOCK == 0
            slots = range(max(lengths))
            assert layer.valid()[:, 0].tolist() == [[s < n for s in slots] for n in lengths]
            for name, tensor in layer.store.items():
                assert tensor.shape[:3] == (B, KV_HEADS, layer.capacity), name
                assert tensor.is_contiguous()
                for row, n in enumerate(lengths):
                    assert not tensor[row, :, n:].any(), name
            most += B * layer.capacity * (token + KV_HEADS * (4 + 4))
            most += B * HEADS * D * 4 * WINDOW + B * 8
            assert layer.queries.shape[2] == WINDOW
        assert allocated(self.cache) == most + B * 8
        assert self.cache.held == sum(sum(layer.lengths) for layer in self.cache.layers)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(settings.default, stateful_step_count=30)


@given(
    st.integers(1, 300),
    st.integers(0, 299),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_a_round_gives_memory_back(before, after, interval, dtype):
    """Capacity and bytes fall with what is held, to whole blocks for it and the interval; but
    storage that is hardly larger stays where it is."""
    after = min(before, after)
    cache = KVCache(SIZES, dtype=dtype, notes=Notes(interval=interval))
    tiny.put(cache, torch.randn(L, 2, 1, KV_HEADS, before, D).to(dtype))
    capacity, wanted = cache.layers[0].capacity, blocks(after + interval)
    for layer in cache.layers:
        layer.evict([0], *tiny.mask_of([[range(after)]]))
        stays = wanted <= capacity <= wanted + max(BLOCK, wanted // 8) or after == before
        assert layer.capacity == (capacity if stays else wanted)
    per_slot = KV_HEADS * (2 * D * dtype.itemsize + 4)
    assert allocated(cache) == 8 + L * (8 + layer.capacity * per_slot)
    assert cache.held * token_bytes(cache) == L * after * KV_HEADS * 2 * D * dtype.itemsize


@pytest.mark.parametrize("rows", [[], [0], [1, 0, 1]])
def test_no_sequence_at_all_is_a_batch_too(rows):
    """The last ones may leave; and what is left is just theirs."""
    cache = KVCache(SIZES, batch=2, notes=NOTES)
    tiny.put(cache, torch.randn(L, 2, 2, KV_HEADS, 7, D))
    for layer in cache.layers:
        tiny.observe(layer, torch.randn(2, HEADS, 7, D), torch.rand(2, KV_HEADS, 7))
    cache.select(rows)
    assert cache.seen == [7] * len(rows)
    assert cache.held == L * 7 * len(rows)
    assert [layer.queries.shape[0] for layer in cache.layers] == [len(rows)] * L
