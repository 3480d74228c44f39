"""Do the tests see what they should? Plants classic faults, one at a time, in a copy.

    python tests/mutation_check.py

Prints which test caught which fault; exits 1 if a fault survives, or if the copy fails without one.
A fault is a replacement of text that must stand in its file exactly once, so that this script fails
rather than tests nothing when the code has moved on.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/engine/test_cache.py",
    "tests/laws/test_rounds.py",
    "tests/laws/test_texts.py::test_logits_are_those_of_a_full_pass_without_the_evicted",
)
FAULTS = {  # what is wrong: file, right text, wrong text
    "recent window one short": ("policy.py", "slots >= last", "slots > last"),
    "kept slots in another order": (
        "kernels.py",
        "kept.cumsum(-1) - 1",
        "kept.sum(-1, keepdim=True) - kept.cumsum(-1)",
    ),
    "scores stay when keys move": (
        "cache.py",
        "moved = gathered(old, row, old_slots, count)",
        "moved = gathered(old, row, old_slots, count)"
        ' if name != "scores" else old[row, :, :n].clone()',
    ),
    "position taken from the slot": (
        "model.py",
        "positions + cache.next[:, None]",
        "positions + cache.layers[0].filled[:, None]",
    ),
    "a round forgets what left": (
        "cache.py",
        "turns -= self.gone.copy_",
        "turns -= self.gone + 0 *",
    ),
    "sinks unprotected": ("options.py", "else self.sinks", "else 0"),
    "scores never fade": ("policy.py", "torch._foreach_mul_(cache.scores, self.gamma)", "return"),
    "a share of the prompt alone": ("options.py", "self.budget * seen", "self.budget * prompt"),
}


def copy_to(folder: Path) -> None:
    """The package and its tests."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lethe_mini", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def plant(folder: Path, file: str, right: str, wrong: str) -> None:
    """Replaces the one place; exits if it is not there or not alone."""
    path = folder / "lethe_mini" / file
    text = path.read_text()
    if text.count(right) != 1:
        sys.exit(f"{file} should hold {right!r} once, not {text.count(right)} times; mend FAULTS")
    path.write_text(text.replace(right, wrong))


def failing_test(folder: Path) -> str | None:
    """The first test that fails there, or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    # The copy comes first on the path, before any installed package.
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    env["HYPOTHESIS_PROFILE"] = "brief"  # few examples, and the first failure as it comes
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if run.returncode == 0:
        return None
    if run.returncode != 1 or found is None:
        sys.exit(f"pytest could not run:\n{run.stdout}{run.stderr}")
    return found[1].removeprefix("tests/")


def main() -> int:
    survivors = 0
    for name, fault in {"none": None, **FAULTS}.items():
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            copy_to(folder)
            if fault is not None:
                plant(folder, *fault)
            caught = failing_test(folder)
        seconds = f"{time.monotonic() - start:4.0f} s"
        print(f"{name:32} {seconds}  {caught or 'all tests pass'}", flush=True)
        survivors += (caught is None) == (fault is not None)
    print("every fault is caught" if not survivors else f"{survivors} not as it should be")
    return min(1, survivors)


if __name__ == "__main__":
    sys.exit(main())
