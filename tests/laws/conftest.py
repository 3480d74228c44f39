"""Every law runs for every policy: ours, or with `--policy path/to/mine.py:Mine` that one.

A test that takes `policy`, `pruner` or `scored` is run for all policies, for those that prune, or
for those that keep scores. One that takes `model` or `exact_model` is run for a model of every
family: for the first with all policies, for the others with the policies as they are.
"""

import pytest
import torch
from small_policies import cases_of, our_cases
from texts import FAMILIES, new_model

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
    families = "family" in metafunc.fixturenames
    kinds = [name for name in KINDS if name in metafunc.fixturenames]
    if families and not kinds:
        metafunc.parametrize("family", FAMILIES)
    for name in kinds:
        cases = metafunc.config.stash[CASES].items()
        chosen = {case: policy for case, policy in cases if KINDS[name](policy)}
        if not families:
            metafunc.parametrize(name, chosen.values(), ids=chosen)
            continue
        first, *others = FAMILIES
        rows = {case: (policy, first) for case, policy in chosen.items()}
        plain = [(case, policy) for case, policy in chosen.items() if case == case_of(policy)]
        rows |= {f"{case}-{family}": (one, family) for family in others for case, one in plain}
        metafunc.parametrize((name, "family"), list(rows.values()), ids=rows)


def case_of(policy):
    """The name of a policy's first case: as it is."""
    return policy.name or type(policy).__name__


@pytest.fixture
def model(family):
    return new_model(family)


@pytest.fixture
def exact_model(family):
    """In float64, so that rounding, which differs with the size of a batch, decides nothing."""
    return new_model(family, torch.float64)
