"""Caches that hold noise, and what a round on them should keep. L = 3, H = 6, H_kv = 2, D = 10."""

import math
from types import SimpleNamespace

import oracles
import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from small_policies import protected_of

from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.rope import inverse_frequencies
from lethe_mini.policies import LethePlus, Recall
from lethe_mini.policy import Lethe, Pruner

FEW = settings(max_examples=max(5, settings.default.max_examples // 10))
seeds = st.integers(0, 2**32)
# Prompts of a batch; and how many tokens come before each round, and which sequences are due.
prompts_of_a_batch = st.lists(st.integers(1, 13), min_size=1, max_size=4)
rounds_of_a_batch = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.booleans(), min_size=4)), max_size=9
)


def new_cache(policy, prompt=0, compact=False, layers=3, dtype=None):
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    sizes["inv_freq"] = inverse_frequencies("default", 10000.0, 10, {})
    config = SimpleNamespace(**sizes, num_hidden_layers=layers)
    cache = KVCache(config, dtype=dtype, compact=compact, notes=policy.notes())
    cache.prompt = [prompt]
    return cache


def feed(cache, T):
    """T tokens of noise for every sequence of every layer, with skewed masses above 0."""
    B = len(cache.seen)
    noise = torch.randn(len(cache.layers), 3, B, 6, T, 10)
    tiny.put(cache, [(k[:, :2], v[:, :2]) for k, v, _ in noise])
    for layer, (_, _, q) in zip(cache.layers, noise, strict=True):
        mass = None
        if layer.notes.scored:
            mass = (torch.rand(B, 2, layer.length) ** 6 + 1e-6) * layer.valid()
        tiny.observe(layer, q, mass)


def batch_of(policy, prompts):
    """A cache of several prompts of noise."""
    cache = new_cache(policy, prompts[0])
    feed(cache, prompts[0])
    for prompt in prompts[1:]:
        other = new_cache(policy, prompt)
        feed(other, prompt)
        cache.join(other)
    return cache


def held_positions(cache):
    """[layer][row][head]: the positions held, in the order of the slots."""
    return [
        [
            [head[:length] for head in row]
            for row, length in zip(layer.positions.tolist(), layer.lengths, strict=True)
        ]
        for layer in cache.layers
    ]


def shares_of(policy, cache):
    """[layer][row]: what the policy lets each layer hold of each sequence."""
    sparsity = policy.sparsity(cache) if policy.scored else None
    return policy.shares(cache, list(range(len(cache.seen))), sparsity).tolist()


def right_choice(policy, cache, due):
    """What the round should keep, [layer][row][head], by the oracle, from the policy's scores."""
    if isinstance(policy, Recall):  # the others' are there before a round
        policy.weigh(cache, [row for row, ready in enumerate(due) if ready])
    before, shares, kept = held_positions(cache), shares_of(policy, cache), []
    for layer, held, share in zip(cache.layers, before, shares, strict=True):
        importance = policy.importance(layer, cache)
        kept.append(list(held))
        for row in (row for row, ready in enumerate(due) if ready):
            positions = held[row]
            scores = [head[: len(positions[0])] for head in importance[row].tolist()]
            scores = scores * len(positions) if len(scores) == 1 else scores
            stay = right_always(policy, layer, cache, row, share[row], positions)
            salient = right_salient(policy, layer, row, scores)
            chosen = oracles.prune(scores, stay, share[row], salient)
            pairs = zip(positions, chosen, strict=True)
            kept[-1][row] = [[head[slot] for slot in slots] for head, slots in pairs]
    return kept


def right_always(policy, layer, cache, row, share, positions):
    """The slots that stay whatever their scores, a set per head. A policy that says this in a way
    of its own is taken at its word."""
    protected, n = protected_of(policy, cache.prompt[row]), len(positions[0])
    room = share - min(protected, n) * (policy.budget is not None)
    if type(policy).always not in (Pruner.always, LethePlus.always):
        given = (torch.tensor([number]) for number in (row, protected, room))
        mask = policy.always(layer, *given)[0, :, :n]
        return [{slot for slot, stays in enumerate(head) if stays} for head in mask.tolist()]
    recent = min(room, max(policy.min_recent, int(policy.recent_ratio * room)))
    distinct = tiny.distinct(policy, layer, row, room, recent)
    return oracles.always(positions, protected, recent, *distinct)


def right_salient(policy, layer, row, scores):
    """How many tokens stand out."""
    n = len(scores[0])
    if not isinstance(policy, Lethe):
        found = policy.salient(torch.tensor([scores]), layer, torch.tensor([row]))
        return n if found is None else int(found)
    if policy.budget is None and n <= layer.thresholds[row]:
        return n
    ranked = [sorted(head, reverse=True) for head in scores]
    mean = [math.fsum(column) / len(ranked) for column in zip(*ranked, strict=True)]
    return oracles.breakpoint(mean, policy.segments, policy.tau, policy.breakpoint) or n
