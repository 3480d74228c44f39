"""The laws of tests/laws notice a policy that breaks one of them, run as a user would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
from dataclasses import dataclass
import torch
from lethe_mini.policy import Pruner, rank

@dataclass(frozen=True)
class Bad(Pruner):
"""
GOOD = """
    def importance(self, layer, cache):
        return layer.positions.float() % 7
"""
BAD = {  # what is wrong: (the class, the law that notices)
    "the prompt is not protected": (
        GOOD
        + """
    def protected(self, prompt):
        return self.sinks
""",
        "keeps_protected_and_newest",
    ),
    "kept slots stand in the order of their rank": (
        GOOD
        + """
    def round(self, cache, due):
        done = super().round(cache, due)
        for layer in cache.layers:
            best = rank(self.importance(layer, cache), layer.valid())
            for t in layer.store.values():
                for row in done.rows:
                    order = best[row, :, : layer.lengths[row]]
                    for head in t[row]:
                        head[: order.shape[1]] = head[order[0]]
        return done
""",
        "in_the_order_of_the_text",
    ),
    "the least important stay": (
        GOOD
        + """
    def round(self, cache, due):
        fair, Bad.importance = Bad.importance, lambda *args: -fair(*args)
        done = super().round(cache, due)
        Bad.importance = fair
        return done
""",
        "most_important_of_the_rest",
    ),
    "a token more than the budget": (
        GOOD
        + """
    def limit(self, prompt, seen):
        return super().limit(prompt, seen) + 1
""",
        "no_more_is_held_than_the_budget",
    ),
    "it prunes before its threshold": (
        GOOD
        + """
    def first_round(self, prompt):
        return 0
""",
        "a_share_waits_for_its_threshold",
    ),
    "keys change": (
        GOOD
        + """
    def round(self, cache, due):
        done = super().round(cache, due)
        for layer in cache.layers:
            layer.store["keys"] *= 1.01
        return done
""",
        "logits_are_those_of_a_full_pass",
    ),
    "it remembers the run before": (
        """
    calls = []
    def importance(self, layer, cache):
        self.calls.append(0)
        return torch.sin(layer.positions.float() * len(self.calls))[:, :1]
""",
        "the_same_run_gives_the_same_result",
    ),
    "a sequence's place in the batch decides": (
        """
    def importance(self, layer, cache):
        rows = torch.arange(len(cache.seen))[:, None, None]
        return torch.sin(layer.positions.float() * (1 + rows))[:, :1]
""",
        "never_depends_on_its_neighbours",
    ),
}


def hold_to_the_laws(file, law):
    """What pytest says of the laws with that in their names, for the policy in a file; it stops at
    the first that fails."""
    command = [sys.executable, "-m", "pytest", "tests/laws", "--policy", f"{file}:Bad", "-k", law]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "brief"}
    return subprocess.run(
        [*command, "-qx", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("body", "law"), BAD.values(), ids=BAD)
def test_a_policy_that_breaks_a_law_fails_there(tmp_path, body, law):
    """And not because it cannot be run at all."""
    file = tmp_path / "bad.py"
    file.write_text(HEAD + body, encoding="utf-8")
    done = hold_to_the_laws(file, law)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert failed
    assert all(law in line for line in failed)
    assert "AssertionError" in done.stdout or "Mismatched elements" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Bad: pass", "a policy is a subclass of Pruner or Policy"),
        (HEAD + "    pass", "should define importance"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_is_no_policy_is_one_line(tmp_path, text, words):
    """It says what would be right, without a traceback."""
    file = tmp_path / "bad.py"
    file.write_text(text, encoding="utf-8")
    done = hold_to_the_laws(file, "shares")
    assert done.returncode == 4
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
