"""Settings that must agree: both policies of a pair keep the same tokens, write the same text."""

import dataclasses

import pytest
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
from small_policies import ALONE, cases_of, make, our_cases
from texts import generate, new_model, some_tokens

from lethe_mini.policies import (
    H2O,
    POLICIES,
    FullKV,
    Lethe,
    LethePlus,
    PyramidKV,
    RandomKV,
    SnapKV,
    StreamingLLM,
)
from lethe_mini.policy import Pruner

PRUNERS = [kind for kind in POLICIES.values() if issubclass(kind, Pruner)]
# LethePlus with each of its additions switched off.
WITHOUT = {"even_share": 0.0, "cap": 0.0, "lag": 0, "distinct_ratio": 0.0, "per_head": False}
WITHOUT |= {"allocation": Lethe().allocation}
NEVER = {"allocation": "uniform", "breakpoint": "none"}

AGREE = {  # what it says: the two policies
    "all of the budget shared evenly is uniform": (
        make(LethePlus, even_share=1.0),
        make(LethePlus, allocation="uniform"),
    ),
    "LethePlus without its additions is Lethe": (
        make(LethePlus, breakpoint="global", tau=3.0, **WITHOUT),
        make(Lethe, tau=3.0),
    ),
    "LethePlus without its additions is Lethe, by a share": (
        make(LethePlus, budget=0.4, evict_threshold=11, breakpoint="global", tau=3.0, **WITHOUT),
        make(Lethe, budget=0.4, evict_threshold=11, tau=3.0),
    ),
    "tau above any ratio is no breakpoint": (
        make(Lethe, tau=1e30),
        make(Lethe, breakpoint="none"),
    ),
    "alone, tau above any ratio prunes nothing": (
        make(Lethe, tau=1e30, **ALONE),
        FullKV(),
    ),
    "scores that never decay, per head, are H2O's": (
        make(LethePlus, gamma=1.0, recent_ratio=0.5, **WITHOUT | NEVER | {"per_head": True}),
        make(H2O),
    ),
    "all of the room for recent tokens is StreamingLLM": (
        make(Lethe, recent_ratio=1.0, **NEVER),
        make(StreamingLLM),
    ),
    "random eviction with room for recent tokens alone is StreamingLLM, too": (
        make(RandomKV, recent_ratio=1.0),
        make(StreamingLLM),
    ),
    "a pyramid of equal layers is SnapKV": (make(PyramidKV, beta=1.0), make(SnapKV)),
    "fewer sinks than a protected prompt are no sinks": (
        make(Lethe, sinks=1),
        make(Lethe, sinks=0),
    ),
    **{
        f"all of the text as budget of {kind.name} is the full cache": (
            make(kind, budget=1.0, evict_threshold=1),
            FullKV(),
        )
        for kind in PRUNERS
    },
    **{
        f"a number beyond the text as budget of {kind.name} is the full cache": (
            make(kind, budget=1000),
            FullKV(),
        )
        for kind in PRUNERS
    },
}
agree = pytest.mark.parametrize(("one", "other"), AGREE.values(), ids=AGREE)


@agree
@FEW
@given(prompts=prompts_of_a_batch, steps=rounds_of_a_batch, seed=seeds)
def test_they_keep_the_same_tokens(one, other, prompts, steps, seed):
    """In every layer and head, after every round that a sequence wants."""

    def held(policy):
        torch.manual_seed(seed)
        cache, after = batch_of(policy, prompts), []
        for T, due in steps:
            torch.manual_seed(seed + len(after))
            feed(cache, T)
            wants = policy.due(cache, prefilled=True)
            policy.round(cache, [a and b for a, b in zip(wants, due, strict=False)])
            after.append(held_positions(cache))
        return after

    assert held(one) == held(other)


@agree
def test_they_write_the_same_text(one, other):
    """And hold the same at the end, in a ragged batch."""
    model, prompts = new_model(), [some_tokens(n, seed=n) for n in (3, 11, 5)]
    texts = [generate(model, prompts, policy, max_new_tokens=50) for policy in (one, other)]
    (tokens, _, result), (right, _, expected) = texts
    assert tokens == right
    assert result.stats.kv_tokens_final == expected.stats.kv_tokens_final


def test_settings_that_differ_do_not_agree():
    """The two tests above can fail: other tokens stay where one setting is another."""
    model, prompts = new_model(), [some_tokens(n, seed=n) for n in (3, 11, 5)]
    policies = [make(LethePlus), make(LethePlus, even_share=1.0), make(Lethe), make(H2O)]
    held = [generate(model, prompts, policy, max_new_tokens=50)[1] for policy in policies]
    assert all(a != b for i, a in enumerate(held) for b in held[:i])


def test_every_policy_is_held_to_the_laws():
    """All of the registry, each with three kinds of budget and protection; and every word of an
    option."""
    for kind in PRUNERS:
        budgets = [type(policy.budget) for policy in cases_of(kind).values()]
        assert budgets == [int, int, float]
    cases = our_cases().values()
    assert {type(policy) for policy in cases} == set(POLICIES.values())
    for kind in (Lethe, LethePlus):
        mine = [policy for policy in cases if type(policy) is kind]
        for spec in dataclasses.fields(kind):
            for word in spec.metadata["choices"] or ():
                assert word in {getattr(policy, spec.name) for policy in mine}, word
