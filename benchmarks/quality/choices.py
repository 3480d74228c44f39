"""What is compared: policies by name, at budgets with which each holds equally many tokens."""

import hashlib
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from benchmarks.common.coder import checkpoint
from lethe_mini import FullKV, Lethe, LethePlus, Policy
from lethe_mini.checkpoint.load import resolve
from lethe_mini.jsonlines import digest
from lethe_mini.policies import POLICIES

BUDGETS = ["5%", "10%", "25%", "50%"]
TOLERANCE, TRIES = 0.02, 5  # of what a budget allows; readings of a text to come that near
PROTECT = {"no": [False], "yes": [True], "both": [False, True]}  # what --protect asks for

# The parts of LethePlus one by one. Every parameter that varies is written out, so that a name
# means the same whatever the defaults are.
PLAIN = {
    "breakpoint": "none",
    "allocation": "uniform",
    "gamma": 0.98,
    "per_head": False,
    "value_norm": False,
    "even_share": 0.0,
    "cap": 0.0,
    "lag": 0,
    "distinct_ratio": 0.0,
}
COMBINED = {"allocation": "inverse_hoyer", "gamma": 0.995, "per_head": True, "value_norm": True}
# LethePlus as it is, less one of its parts.
TAKEN = {
    "plus-inverse": {"allocation": "inverse_hoyer"},
    "plus-no-distinct": {"distinct_ratio": 0.0},
    "plus-no-lag": {"lag": 0},
    "plus-no-even": {"even_share": 0.0, "cap": 0.0},
    "plus-no-heads": {"per_head": False},
}
CHOICES: dict[str, tuple[type[Policy], dict]] = {
    "full": (FullKV, {}),
    **{name: (POLICIES[name], {}) for name in ("random", "streaming", "h2o", "tova")},
    **{name: (POLICIES[name], {}) for name in ("snapkv", "pyramidkv", "rkv")},
    "lethe": (Lethe, {}),
    "lethe-hoyer": (Lethe, {"allocation": "hoyer"}),
    "lethe-plus": (LethePlus, {}),
    "recall": (POLICIES["recall"], {}),
    "uniform": (LethePlus, PLAIN),
    "hoyer": (LethePlus, PLAIN | {"allocation": "hoyer"}),
    "hoyer-even": (LethePlus, PLAIN | {"allocation": "hoyer", "even_share": 0.5}),
    "inverse": (LethePlus, PLAIN | {"allocation": "inverse_hoyer"}),
    "pyramid": (LethePlus, PLAIN | {"allocation": "pyramid"}),
    "slow": (LethePlus, PLAIN | {"gamma": 0.995}),
    "head": (LethePlus, PLAIN | {"per_head": True}),
    "values": (LethePlus, PLAIN | {"value_norm": True}),
    "slow-head": (LethePlus, PLAIN | {"gamma": 0.995, "per_head": True}),
    "combined": (LethePlus, PLAIN | COMBINED),
    **{name: (LethePlus, changes) for name, changes in TAKEN.items()},
}
USUAL = [name for name in CHOICES if name not in ("full", *TAKEN)]  # what runs by default


@dataclass
class Cell:
    """A choice under one condition. policy: None where there can be none; `why` says the reason."""

    choice: str
    budget: str  # as asked for
    protect: bool
    policy: Policy | None
    why: str = ""

    def facts(self) -> dict:
        """The policy's name and every parameter."""
        return {"name": self.policy.name, **asdict(self.policy)}


def tokens_of(budget: str, length: int) -> int:
    """A budget as a number of tokens: "128" is one, "10%" a part of a text of `length` tokens."""
    if budget.endswith("%"):
        return round(length * float(budget[:-1]) / 100)
    return int(budget)


def budget_text(text: str) -> str:
    """A budget of the command line as it stands. Raises ArgumentTypeError for what is none."""
    number = text.removesuffix("%")
    try:
        fits = 0 < float(number) <= 100 if text.endswith("%") else 0 < int(number) < 2**31
    except ValueError:
        fits = False
    if not fits:
        known = "a number of tokens such as 512, or a share such as 10%"
        raise ArgumentTypeError(f"should be {known}, not {text!r}")
    return text


def at_rounds(result: dict, budget: int | None) -> tuple[float, float]:
    """What was kept, and what the budget allows, as means over rounds.

    Takes `rounds` out of the result: for every round, the tokens seen and the tokens kept.
    """
    rounds = result.pop("rounds")
    kept = sum(held for _, held in rounds) / len(rounds)
    return kept, sum(min(seen, budget or seen) for seen, _ in rounds) / len(rounds)


def at_equal_budget(
    policy: Policy,
    start: int | None,
    read: Callable[[Policy], dict],
    measure: Callable[[dict, int | None], tuple[float, float]] = at_rounds,
) -> dict:
    """Reads with a budget with which the policy keeps as much as its own budget allows.

    A policy with a breakpoint may keep less than its budget. Then the budget is raised and the text
    is read again. start: the budget to begin with (default: the policy's). read(policy) -> a
    result. measure(result, the policy's budget) -> what it kept, and what it should keep. The
    result gets both, as `kept` and `allowed`, and the budget it was read with, as `nominal`.
    """
    budget = getattr(policy, "budget", None)
    nominal = start or budget
    for _ in range(TRIES):
        result = read(policy if budget is None else replace(policy, budget=nominal))
        kept, allowed = measure(result, budget)
        result |= {"kept": kept, "allowed": allowed, "nominal": nominal}
        if abs(kept - allowed) <= TOLERANCE * allowed:
            break
        nominal = round(nominal * allowed / kept)
    return result


def show(value: list[float] | None) -> str:
    """A mean and its interval."""
    return "" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def prompt_column(row: dict) -> str:
    """Was the prompt protected? Empty for the full cache, which keeps all."""
    if row["choice"] == "full":
        return ""
    return "protected" if row["protect"] else "free"


def markdown(rows: list[dict], names: dict[str, str], held: Callable[[dict], str]) -> str:
    """A table with a line per row: choice, prompt, budget, held(row), then figures.

    names: a row's keys, each with its heading; a figure is a mean and its interval.
    """
    lines = [
        "| choice | prompt | budget | holds | " + " | ".join(names.values()) + " |",
        "|---|---|---:|---:|" + "---|" * len(names),
    ]
    for row in rows:
        start = f"| {row['choice']} | {prompt_column(row)} | {row['budget']} |"
        if "error" in row:
            lines.append(f"{start} | {row['error']} |" + " |" * (len(names) - 1))
            continue
        cells = [show(row.get(name)) for name in names]
        lines.append(f"{start} {held(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weights_of(model: str) -> str:
    """A short name for a checkpoint's weights, whatever their folder is called."""
    files = sorted(resolve(checkpoint(model)).glob("*.safetensors"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
