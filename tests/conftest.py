"""Shared by all tests: hypothesis profiles, one seed for every test, and the demo checkpoint.

Examples are drawn the same way in every run. HYPOTHESIS_PROFILE=random draws others each time, as
developers want it; HYPOTHESIS_PROFILE=long draws 20,000 of them instead of 100. Where CI is set, a
demo checkpoint that cannot be fetched is a failure, not a skip.
"""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; before torch comes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from lethe_mini.checkpoint.demo import demo_folder
from lethe_mini.errors import UserError

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", parent=untimed, derandomize=True)
settings.register_profile("random", parent=untimed, derandomize=False)
settings.register_profile("long", parent=settings.get_profile("random"), max_examples=20_000)
settings.register_profile(  # the first failure as it comes
    "brief",
    parent=settings.get_profile("default"),
    max_examples=50,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A run in the background may ignore Ctrl-C, and a process that it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--policy", help="path/to/file.py:Class: hold this policy to tests/laws, instead of ours"
    )


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
