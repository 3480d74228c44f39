"""The policies that the laws run for: small budgets and frequent rounds, so that much happens."""

import dataclasses

from lethe_mini.policies import POLICIES
from lethe_mini.policy import FullKV, Lethe, Pruner

BUDGET, SINKS, WINDOW = 19, 2, 5
SHARE = {"budget": 0.4, "evict_threshold": 11}
ALONE = {"budget": None, "evict_threshold": 11}  # Algorithm 1 without a budget


def make(kind, **changes):
    """A policy with a small budget and frequent rounds, as far as it has such options."""
    common = {"budget": BUDGET, "interval": 3, "sinks": SINKS, "window": WINDOW} | changes
    names = {spec.name for spec in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in common.items() if name in names})


def cases_of(kind):
    """A policy as it is, and if it prunes without protection and with a share of the text."""
    name = kind.name or kind.__name__
    cases = {name: make(kind)}
    if issubclass(kind, Pruner):
        cases[f"{name}-unprotected"] = make(kind, protect_prompt=False)
        cases[f"{name}-share"] = make(kind, **SHARE)
    return cases


def our_cases():
    """All policies of the registry, and Lethe's and LethePlus' options one by one."""
    cases = {}
    for kind in POLICIES.values():
        cases |= cases_of(kind)
    for name, kinds in VARIANTS.items():
        for variant, changes in kinds.items():
            cases[f"{name}-{variant}"] = make(POLICIES[name], **changes)
    return cases


VARIANTS = {
    "lethe": {
        "breakpoint": {"tau": 3.0},
        "segment": {"breakpoint": "segment", "tau": 1.5, "segments": 7},
        "no-breakpoint": {"breakpoint": "none"},
        "hoyer": {"allocation": "hoyer", "breakpoint": "none"},
        "uniform": {"allocation": "uniform", "breakpoint": "none"},
        "alone": {**ALONE, "tau": 2.0, "segments": 5},
        "alone-segment": {**ALONE, "evict_threshold": 9, "breakpoint": "segment", "tau": 1.5},
        "alone-unprotected": {**ALONE, "tau": 3.0, "protect_prompt": False},
    },
    "lethe-plus": {
        "layer": {"per_head": False},
        "value-norm": {"value_norm": True},
        "inverse": {"allocation": "inverse_hoyer"},
        "uniform": {"allocation": "uniform"},
        "pyramid": {"allocation": "pyramid", "breakpoint": "global", "tau": 3.0},
        "breakpoint": {"breakpoint": "global", "tau": 3.0, "per_head": False},
        "segment": {"breakpoint": "segment", "tau": 1.5, "segments": 7},
        "distinct": {"distinct_ratio": 0.6, "recent_ratio": 0.2, "alike": 0.3},
        "distinct-layer": {"distinct_ratio": 1.0, "per_head": False, "alike": 0.2},
        "not-distinct": {"distinct_ratio": 0.0, "protect_prompt": False},
    },
    "recall": {
        "marks-alone": {"marked_ratio": 1.0, "after": 7, "kernel": 1, "outlier_ratio": 0.0},
        "beacons-alone": {
            "marked_ratio": 0.0,
            "outlier_ratio": 0.0,
            "beacons": 3,
            "even_share": 0.0,
        },
        "outliers-alone": {"outlier_ratio": 1.0, "kernel": 3},
        "small-window": {"window": 2, "interval": 5, "beacons": 1, "even_share": 1.0},
    },
}


def protected_of(policy, prompt):
    """How many first positions the policy promises to keep."""
    sinks, whole = getattr(policy, "sinks", 0), getattr(policy, "protect_prompt", False)
    return max(sinks, prompt) if whole else sinks


def limit_of(policy, prompt, seen):
    """Tokens per layer, on average, that a sequence may hold after a round; None: no limit."""
    budget = getattr(policy, "budget", None)
    if not isinstance(budget, float):
        return budget
    room = max(policy.min_recent, int(budget * policy.evict_threshold))
    return max(int(budget * seen), protected_of(policy, prompt) + room)


def has_breakpoint(policy):
    return isinstance(policy, Lethe) and policy.breakpoint != "none"


def bounded(policy):
    """Does it hold a number of tokens, however long the text?"""
    return not isinstance(policy, FullKV) and isinstance(policy.budget, int)
