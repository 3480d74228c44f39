"""What several tests of benchmarks share: every policy with frequent rounds, and few examples."""

import dataclasses

from hypothesis import settings

from lethe_mini import FullKV, Lethe, LethePlus
from lethe_mini.policies import POLICIES

FEW = settings(max_examples=max(5, settings.default.max_examples // 10))


def make(policy, **changes):
    """A policy with a small budget and frequent rounds, as far as it has these options."""
    options = {"budget": 19, "interval": 3, "sinks": 2, "window": 5} | changes
    names = {spec.name for spec in dataclasses.fields(policy)}
    return policy(**{name: value for name, value in options.items() if name in names})


ALL = {name: make(policy) for name, policy in POLICIES.items()}
ALL |= {
    f"{name}-unprotected": make(policy, protect_prompt=False)
    for name, policy in POLICIES.items()
    if policy is not FullKV
}
ALL |= {
    f"lethe-{name}": make(Lethe, **changes)
    for name, changes in {
        "hoyer": {"allocation": "hoyer", "breakpoint": "none"},
        "global": {"tau": 3.0},
        "segment": {"breakpoint": "segment", "tau": 1.5, "segments": 7},
        "alone": {"budget": None, "evict_threshold": 11, "tau": 2.0, "segments": 5},
        "alone-segment": {
            "budget": None,
            "evict_threshold": 9,
            "breakpoint": "segment",
            "tau": 1.5,
        },
    }.items()
}
ALL |= {
    f"lethe-plus-{name}": make(LethePlus, **changes)
    for name, changes in {
        "layer": {"per_head": False},
        "value-norm": {"value_norm": True},
        "inverse": {"allocation": "inverse_hoyer"},
        "uniform": {"allocation": "uniform"},
        "pyramid": {"allocation": "pyramid", "breakpoint": "global", "tau": 3.0},
        "global": {"breakpoint": "global", "tau": 3.0, "per_head": False},
        "segment": {"breakpoint": "segment", "tau": 1.5, "segments": 7},
        "distinct": {"distinct_ratio": 0.6, "recent_ratio": 0.2, "alike": 0.3},
        "distinct-layer": {"distinct_ratio": 1.0, "per_head": False, "alike": 0.2},
        "not-distinct": {"distinct_ratio": 0.0, "protect_prompt": False},
    }.items()
}
