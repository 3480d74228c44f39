"""Laws of a round, on caches of noise: what it keeps, how much of it, and in what order."""

import dataclasses

import oracles
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise import (
    FEW,
    batch_of,
    feed,
    held_positions,
    new_cache,
    prompts_of_a_batch,
    right_choice,
    rounds_of_a_batch,
    seeds,
    shares_of,
)
from small_policies import has_breakpoint, limit_of, protected_of

from lethe_mini.policy import Lethe, Policy


@FEW
@given(prompts=prompts_of_a_batch, steps=rounds_of_a_batch, seed=seeds)
def test_a_round_keeps_protected_and_newest_tokens_in_the_order_of_the_text(
    policy, prompts, steps, seed
):
    """In every sequence that is due, whatever came before; the others keep everything. Positions
    increase strictly, and all heads of a layer keep as many."""
    torch.manual_seed(seed)
    cache = batch_of(policy, prompts)
    for T, due in steps:
        feed(cache, T)
        due, before = due[: len(prompts)], held_positions(cache)
        policy.round(cache, due)
        for old, new in zip(before, held_positions(cache), strict=True):
            for row, prompt in enumerate(prompts):
                seen = cache.seen[row]
                if not due[row]:
                    assert new[row] == old[row]
                for head, had in zip(new[row], old[row], strict=True):
                    assert head == sorted(set(head))
                    assert set(head) <= set(had)
                    assert set(range(min(seen, protected_of(policy, prompt)))) <= set(head)
                    recent = min(seen, getattr(policy, "min_recent", 1))
                    assert set(range(seen - recent, seen)) <= set(head)


@FEW
@given(prompts=prompts_of_a_batch, steps=rounds_of_a_batch, seed=seeds)
def test_a_round_keeps_what_must_stay_and_the_most_important_of_the_rest(
    pruner, prompts, steps, seed
):
    """The same tokens as the plain oracle, in every layer and head, from the policy's scores."""
    torch.manual_seed(seed)
    cache = batch_of(pruner, prompts)
    for T, due in steps:
        feed(cache, T)
        due = due[: len(prompts)]
        right = right_choice(pruner, cache, due)
        pruner.round(cache, due)
        assert held_positions(cache) == right


@FEW
@given(prompts=prompts_of_a_batch, steps=rounds_of_a_batch, seed=seeds)
def test_shares_add_up_and_no_more_is_held_than_the_budget(pruner, prompts, steps, seed):
    """To the token, whether the budget is a number or a share of the text so far; no layer's share
    is more than it holds or less than its floor. Without a breakpoint all of it is used."""
    torch.manual_seed(seed)
    cache = batch_of(pruner, prompts)
    for T, due in steps:
        feed(cache, T)
        shares, before = shares_of(pruner, cache), held_positions(cache)
        due = due[: len(prompts)]
        done = pruner.round(cache, due)
        rows = [row for row, ready in enumerate(due) if ready]
        assert done.rows == rows
        assert done.shares == [[share[row] for row in rows] for share in shares]
        for row, prompt in enumerate(prompts):
            limit = limit_of(pruner, prompt, cache.seen[row])
            if limit is None:
                continue
            mine, holds = [s[row] for s in shares], [len(layer[row][0]) for layer in before]
            total, floor = limit * len(holds), protected_of(pruner, prompt) + pruner.min_recent
            assert sum(mine) == min(total, sum(holds))
            assert all(min(floor, n) <= one <= n for one, n in zip(mine, holds, strict=True))
            if due[row]:
                held = [layer.lengths[row] for layer in cache.layers]
                assert all(n <= one for n, one in zip(held, mine, strict=True))
                assert has_breakpoint(pruner) or held == mine


@FEW
@given(
    share=st.floats(0.01, 1),
    threshold=st.integers(1, 60),
    prompt=st.integers(1, 50),
    steps=st.integers(1, 90),
)
def test_a_share_waits_for_its_threshold_and_never_lacks_room(
    pruner, share, threshold, prompt, steps
):
    """No prompt is refused, nothing is due before `evict_threshold` tokens, and from then on a
    round leaves at most the share of what was seen, or the floor."""
    pruner = dataclasses.replace(pruner, budget=share, evict_threshold=threshold)
    pruner.check_prompt(prompt)
    cache = new_cache(pruner, prompt)
    feed(cache, prompt)
    for step in range(steps):
        seen, limit = cache.seen[0], limit_of(pruner, prompt, cache.seen[0])
        held = [layer.lengths[0] for layer in cache.layers]
        due = pruner.due(cache, prefilled=step == 0)
        assert due in ([False], [True])
        assert not (due[0] and seen <= threshold)
        assert not (due[0] and sum(held) <= limit * 3)
        on_time = step == 0 or (seen - prompt) % pruner.interval == 0
        first = max(threshold, limit_of(pruner, prompt, 0))
        if on_time and seen > first and sum(held) > limit * 3:
            assert due[0]
        if due[0]:
            pruner.round(cache, due)
            assert sum(layer.lengths[0] for layer in cache.layers) <= limit * 3
        feed(cache, 1)


@FEW
@given(steps=st.lists(st.integers(1, 6), min_size=3, max_size=25), seed=seeds)
def test_scores_move_with_their_key(scored, steps, seed):
    """After any rounds each score is that of its position in a cache that never evicted: the
    decayed sum of its mass (eq. 5)."""
    if type(scored).decay not in (Policy.decay, Lethe.decay):
        pytest.skip("a policy whose scores decay in a way of its own")
    policy, chance = dataclasses.replace(scored), torch.Generator().manual_seed(seed)
    gamma = policy.gamma if type(policy).decay is Lethe.decay else 1.0
    cache, ledger = new_cache(policy, prompt=4), {}
    for T in steps:
        for past in ledger.values():
            past.append(0.0)
        policy.decay(cache)
        everyone = torch.rand(3, 2, cache.seen[0] + T, generator=chance) ** 5
        tiny.put(cache, torch.randn(3, 2, 1, 2, T, 10, generator=chance))
        for index, layer in enumerate(cache.layers):
            mass = everyone[index].gather(-1, layer.positions[0].long())
            tiny.observe(layer, None, mass[None])
            for head, masses in enumerate(everyone[index].tolist()):
                for position, one in enumerate(masses):
                    ledger.setdefault((index, head, position), [0.0])[-1] = one
        policy.round(cache, [True])
        for index, layer in enumerate(held_positions(cache)):
            scores = cache.layers[index].scores[0].tolist()
            for head, positions in enumerate(layer[0]):
                right = [oracles.rasr(ledger[index, head, p], gamma) for p in positions]
                assert scores[head] == pytest.approx(right, rel=1e-4)
