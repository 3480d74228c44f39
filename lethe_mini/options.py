"""Options of a policy, which the command line reads its flags and help from; and their arithmetic:
what a budget is, whether it has room, and how its tokens divide over layers.
"""

import math
from dataclasses import field, fields

from .errors import UserError

Budget = float | int | None  # a share of the text so far, tokens per layer, or no limit


def option(default, help: str, low=None, high=None, choices: dict[str, bool] | None = None):
    """A dataclass field that is also a command-line option: its help, and its closed range or its
    words, each with whether it makes sense where there is no budget."""
    limits = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


def check_options(policy) -> None:
    """Raises UserError for a value of the wrong type, out of its range, or that needs a budget."""
    name = type(policy).__name__
    check_budget(policy.budget)
    if policy.budget is None and policy.needs_budget:
        raise UserError(f"{name} needs a budget: a number such as 512 or a share such as 0.25")
    for spec in fields(policy):
        name, meta = spec.name, spec.metadata
        value = getattr(policy, name)
        low, high, choices = (meta.get(key) for key in ("low", "high", "choices"))
        kind = type(spec.default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits and name != "budget":
            raise UserError(f"{name} should be of type {kind.__name__}, not {value!r}")
        if choices and value not in choices:
            raise UserError(f"{name} should be one of {', '.join(choices)}, not {value!r}")
        most = math.inf if high is None else high
        if low is not None and not (low <= value <= most and value < math.inf):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"{name} should be {span}, not {value}")
        if policy.budget is None and choices and not choices[value]:
            raise UserError(f"{name} {value} needs a budget; give one (--budget)")


def check_budget(budget: Budget) -> None:
    """Raises UserError for what is no budget. An int counts tokens and a float is a share: 1 is
    one token, 1.0 is the whole text."""
    if budget is not None and type(budget) not in (int, float):
        known = "a number of tokens such as 512, a share such as 0.25 (25%), or none"
        raise UserError(f"budget should be {known}, not {budget!r}")
    if type(budget) is int and budget < 1:
        raise UserError(f"budget should be at least 1 token, not {budget}")
    if type(budget) is float and not 0 < budget <= 1:
        raise UserError(
            f"budget should be a share above 0 and at most 1, or a whole number, not {budget}"
        )


def show_budget(budget: Budget) -> str:
    """As the command line writes it: 25%, 512 or none."""
    if budget is None:
        return "none"
    return f"{100 * budget:.12g}%" if isinstance(budget, float) else str(budget)


def check_room(budget: int, need: int, prompt: bool) -> None:
    """Raises UserError if a number of tokens is less than what is always kept, with the prompt or
    without."""
    if budget < need:
        kept, mend = "sinks and recent tokens", "raise --budget"
        if prompt:
            kept, mend = f"the prompt, {kept}", f"{mend} or use --no-protect-prompt"
        raise UserError(
            f"budget {budget} is too small for {kept}, always kept: {need} tokens; {mend}"
        )


def split_budget(
    total: int, weights: list[float], floors: list[int], holds: list[int]
) -> list[int]:
    """Divides `total` tokens over layers in proportion to `weights`, exactly, by largest remainder.

    No layer gets more than it holds nor less than its floor (or what it holds, if that is less).
    The parts add up to `total`, unless the floors need more or the layers hold less.
    """
    floors = [min(floor, hold) for floor, hold in zip(floors, holds, strict=True)]
    total = min(max(total, sum(floors)), sum(holds))
    # A layer's share is level * weight, held within its bounds; more level, more in all. The tiny
    # weight that everyone has lets a layer of weight 0 take what the others cannot hold.
    most = max(weights) or 1.0
    weights = [max(weight / most, 1e-9) for weight in weights]
    low, high = 0.0, (max(holds) + 1) / min(weights)
    for _ in range(100):
        level = (low + high) / 2
        bounds = zip(weights, floors, holds, strict=True)
        shares = [min(max(level * weight, floor), hold) for weight, floor, hold in bounds]
        low, high = (level, high) if sum(shares) < total else (low, level)
    parts = [int(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - shares[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
