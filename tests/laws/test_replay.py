"""The law of traces: what a trace recorded of a run gives back what the cache held."""

from types import SimpleNamespace

import torch
from hypothesis import given
from noise import (
    FEW,
    batch_of,
    feed,
    held_positions,
    prompts_of_a_batch,
    rounds_of_a_batch,
    seeds,
)

from lethe_mini.lens.replay import replay
from lethe_mini.lens.trace import Trace


@FEW
@given(prompts=prompts_of_a_batch, steps=rounds_of_a_batch, seed=seeds)
def test_replaying_a_trace_gives_what_the_cache_held(policy, prompts, steps, seed):
    """Before and after every round, in every layer and head, for sequences of a ragged batch that
    are due at different times."""
    torch.manual_seed(seed)
    trace, cache, owners = begun(policy, prompts), batch_of(policy, prompts), range(len(prompts))
    right = [[] for _ in prompts]
    for T, due in steps:
        feed(cache, T)
        due = due[: len(prompts)]
        if not any(due):
            continue
        before = held_positions(cache)
        trace.round_begins(cache)
        trace.round_ends(cache, due, owners, policy.round(cache, due))
        after = held_positions(cache)
        for row in (row for row, ready in enumerate(due) if ready):
            both = [[layer[row] for layer in held] for held in (before, after)]
            right[row].append((cache.seen[row], *both))
    for row, prompt in enumerate(prompts):
        tokens = [0] * (cache.seen[row] - prompt)
        trace.ends(row, cache.seen[row], SimpleNamespace(token_ids=tokens, finish_reason="length"))
    for index, rounds in enumerate(right):
        replayed = replay(trace.data, index)
        assert [(r["seen"], lists(before), lists(after)) for r, before, after in replayed] == rounds


def begun(policy, prompts):
    """A trace as it is when a run of a model of three layers of two heads begins."""
    config = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2)
    engine = SimpleNamespace(model=SimpleNamespace(config=config), text=None, name="noise")
    trace = Trace()
    trace.begin(engine, policy, [list(range(n)) for n in prompts], 1, 0)
    return trace


def lists(held):
    return [[head.tolist() for head in layer] for layer in held]
