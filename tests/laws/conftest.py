"""Every law runs for every policy: ours, or with `--policy path/to/mine.py:Mine` that one.

A test that takes `policy`, `pruner` or `scored` is run for all policies, for those that prune, or
for those that keep scores.
"""

import pytest
from small_policies import cases_of, our_cases

from lethe_mini.errors import UserError
from lethe_mini.policies import find_policy
from lethe_mini.policy import Pruner

KINDS = {
    "policy": lambda policy: True,
    "pruner": lambda policy: isinstance(policy, Pruner),
    "scored": lambda policy: policy.scored,
}


CASES = pytest.StashKey()  # name -> policy


def pytest_configure(config):
    """Finds the policies before anything is collected: an error in one's own is one line."""
    own = config.getoption("policy")
    try:
        config.stash[CASES] = our_cases() if own is None else cases_of(find_policy(own))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc):
    for name, fits in KINDS.items():
        if name in metafunc.fixturenames:
            cases = metafunc.config.stash[CASES].items()
            chosen = {case: policy for case, policy in cases if fits(policy)}
            metafunc.parametrize(name, chosen.values(), ids=chosen)
