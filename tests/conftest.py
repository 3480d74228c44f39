"""Shared by all tests: hypothesis profiles, one seed for every test, and the demo checkpoint.

HYPOTHESIS_PROFILE=long draws 20,000 examples instead of 100. Where CI is set, examples are drawn
the same way in every run, and a demo checkpoint that cannot be fetched is a failure, not a skip.
"""

import os

import pytest
import torch
from hypothesis import settings

from lethe_mini.checkpoint.demo import demo_folder
from lethe_mini.errors import UserError

settings.register_profile("default", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo():
    """The folder of the demo checkpoint: a small trained model."""
    try:
        return demo_folder()
    except UserError as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))
