"""Policies by name, with those of some options that a policy has."""

from dataclasses import fields

from lethe_mini.policies import POLICIES
from lethe_mini.policy import Policy


def make_policy(name: str, **options) -> Policy:
    """The full cache has no budget, Lethe has no window: what a policy lacks is left out.

    Raises UserError for a value that the policy refuses.
    """
    known = {spec.name for spec in fields(POLICIES[name])}
    return POLICIES[name](**{key: value for key, value in options.items() if key in known})
