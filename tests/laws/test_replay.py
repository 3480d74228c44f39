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
    are due at different times; and a sequence may leave."""
    torch.manual_seed(seed)
    trace, cache, live = begun(policy, prompts), batch_of(policy, prompts), [*range(len(prompts))]
    right = [[] for _ in prompts]
    for number, (T, due) in enumerate(steps):
        feed(cache, T)
        due, before = due[: len(live)], held_positions(cache)
        trace.round_begins(cache)
        trace.round_ends(cache, due, live, policy.round(cache, due))
        after = held_positions(cache)
        for row in (row for row, ready in enumerate(due) if ready):
            both = [[layer[row] for layer in held] for held in (before, after)]
            right[live[row]].append((cache.seen[row], *both))
        if number == 4 and len(live) > 1:
            ends(trace, live.pop(0), cache.seen[0])
            cache.select(list(range(1, len(live) + 1)))
    for row, index in enumerate(live):
        ends(trace, index, cache.seen[row])
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


def ends(trace, index, seen):
    """A sequence has ended after so many tokens."""
    new = [0] * (seen - trace.data["sequences"][index]["prompt_tokens"])
    trace.ends(index, seen, SimpleNamespace(token_ids=new, finish_reason="length"))


def lists(held):
    return [[head.tolist() for head in layer] for layer in held]
