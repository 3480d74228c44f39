"""What is compared: policies by name, at budgets of which as much is kept as they allow."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from lethe_mini import Lethe
from lethe_mini.checkpoint.load import resolve
from lethe_mini.policies import POLICIES
from lethe_mini.policy import FullKV, Policy

BUDGETS = ["5%", "10%", "25%", "50%"]
TOLERANCE, TRIES = 0.02, 5  # of what a budget allows; readings of a text to come that near

# The parts of Lethe one by one. All parameters that are varied are written out, so that a name
# means the same whatever the defaults are.
PLAIN = {
    "knee": "none",
    "allocation": "uniform",
    "gamma": 0.98,
    "granularity": "layer",
    "value_norm": False,
    "even_share": 0.0,
    "cap": 0.0,
    "lag": 0,
    "distinct_ratio": 0.0,
}
CHOICES: dict[str, tuple[Callable[..., Policy], dict]] = {
    "full": (FullKV, {}),
    **{name: (POLICIES[name], {}) for name in ("random", "streaming", "h2o", "tova")},
    **{name: (POLICIES[name], {}) for name in ("snapkv", "pyramidkv", "rkv")},
    "lethe": (Lethe, {}),
    "paper": (Lethe.paper, {}),
    "uniform": (Lethe, PLAIN),
    "hoyer": (Lethe, PLAIN | {"allocation": "hoyer"}),
    "hoyer-even": (Lethe, PLAIN | {"allocation": "hoyer", "even_share": 0.5}),
    "inverse": (Lethe, PLAIN | {"allocation": "inverse_hoyer"}),
    "pyramid": (Lethe, PLAIN | {"allocation": "pyramid"}),
    "slow": (Lethe, PLAIN | {"gamma": 0.995}),
    "head": (Lethe, PLAIN | {"granularity": "head"}),
    "values": (Lethe, PLAIN | {"value_norm": True}),
    "slow-head": (Lethe, PLAIN | {"gamma": 0.995, "granularity": "head"}),
    "combined": (
        Lethe,
        PLAIN
        | {
            "allocation": "inverse_hoyer",
            "gamma": 0.995,
            "granularity": "head",
            "value_norm": True,
        },
    ),
}


@dataclass
class Cell:
    """A choice under one condition. policy: None where `why` it cannot be."""

    choice: str
    budget: str  # as asked for
    protect: bool
    policy: Policy | None
    why: str = ""

    def facts(self) -> dict:
        """The policy's name and every parameter."""
        return {"name": self.policy.name, **asdict(self.policy)}


def tokens_of(budget: str, length: int) -> int:
    """ "128" is tokens, "10%" a part of a text of so many."""
    return round(length * float(budget[:-1]) / 100) if budget.endswith("%") else int(budget)


def budget_text(text: str) -> str:
    """A budget as it may be asked for; else ValueError, which argparse reports."""
    tokens_of(text, 1)
    return text


def at_rounds(result: dict, budget: int | None) -> tuple[float, float]:
    """Means of what was kept and of what so large a budget allows, from the result's `rounds`:
    (tokens seen, tokens kept) of each, which are taken out of it."""
    rounds = result.pop("rounds")
    kept = sum(held for _, held in rounds) / len(rounds)
    return kept, sum(min(seen, budget or seen) for seen, _ in rounds) / len(rounds)


def at_equal_budget(
    policy: Policy,
    start: int | None,
    read: Callable[[Policy], dict],
    measure: Callable[[dict, int | None], tuple[float, float]] = at_rounds,
) -> dict:
    """Reads with the budget, `start` at first, at which as much is kept as the policy's allows.

    read(policy) -> a result. measure(result, the policy's budget) -> what it kept and what it
    should have. Both are added to the result, as `kept` and `allowed`, and the budget it was read
    with, as `nominal`.
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
    return "" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def markdown(rows: list[dict], names: dict[str, str], held: Callable[[dict], str]) -> str:
    """A table of rows: choice, prompt, budget, what held(row) says, and of every name, under its
    heading, a mean and its interval."""
    lines = [
        "| choice | prompt | budget | holds | " + " | ".join(names.values()) + " |",
        "|---|---|---:|---:|" + "---|" * len(names),
    ]
    for row in rows:
        prompt = "" if row["choice"] == "full" else "protected" if row["protect"] else "free"
        start = f"| {row['choice']} | {prompt} | {row['budget']} |"
        if "error" in row:
            lines.append(f"{start} | {row['error']} |" + " |" * (len(names) - 1))
            continue
        cells = [show(row.get(name)) for name in names]
        lines.append(f"{start} {held(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weights_of(model: str) -> str:
    """Names a checkpoint's weights, whatever their folder is called."""
    files = sorted(resolve(model).glob("*.safetensors"))
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def digest(ids: list[int]) -> str:
    """Names a text."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
