"""Options of a policy, which the command line reads its flags and help from; and their arithmetic:
what a budget is, whether it has room, and how its tokens divide over layers.
"""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from .errors import UserError
from .kernels import widest

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


@dataclass(frozen=True)
class Limits:
    """The options of every policy that prunes, and how many tokens they let a sequence hold."""

    needs_budget: ClassVar[bool] = True
    min_recent: ClassVar[int] = 1  # newest tokens that stay in any case

    budget: Budget = option(
        0.25, "tokens per layer after a round, on average: a number, a share of the text, or none"
    )
    interval: int = option(128, "tokens between two rounds", low=1)
    sinks: int = option(4, "first tokens, always kept", low=0)
    recent_ratio: float = option(0.3, "share of the room that goes to the last tokens", 0, 1)
    protect_prompt: bool = option(True, "keep the whole prompt; it counts inside the budget")
    evict_threshold: int = option(
        512, "tokens before the first round, where the budget is no number", low=1
    )

    def protected(self, prompt: int) -> int:
        """First positions that always stay, of a sequence with so long a prompt."""
        return max(self.sinks, prompt) if self.protect_prompt else self.sinks

    def limit(self, prompt: int, seen: int) -> int:
        """Tokens per layer, on average, that a sequence may hold after a round. A share counts the
        tokens seen; it never falls below the protected ones and its room at `evict_threshold`."""
        if self.budget is None:
            return seen
        if isinstance(self.budget, int):
            return self.budget
        room = max(self.min_recent, int(self.budget * self.evict_threshold))
        return max(int(self.budget * seen), self.protected(prompt) + room)

    def first_round(self, prompt: int) -> int:
        """Tokens seen above which a sequence may have a round."""
        if isinstance(self.budget, int):
            return self.budget
        return max(self.evict_threshold, self.limit(prompt, seen=0))

    def check_prompt(self, prompt: int) -> None:
        if isinstance(self.budget, int):
            check_room(self.budget, self.protected(prompt) + self.min_recent, self.protect_prompt)


def part(share: float, of: Tensor) -> Tensor:
    """A share of whole numbers, rounded down: int64 as they are."""
    return (of.to(widest(of.device)) * share).long()


def split_budget(totals: Tensor, weights: Tensor, floors: Tensor, holds: Tensor) -> Tensor:
    """Divides tokens over L layers in proportion to `weights`, exactly, by largest remainder.

    totals: (R,) int64; weights: (R, L), floors, holds: (R, L) int64 -> (R, L) int64. No layer gets
    more than it holds nor less than its floor (or what it holds, if that is less). The parts of a
    row add up to its total, unless the floors need more or the layers hold less.
    """
    floors = floors.minimum(holds)
    totals = totals.maximum(floors.sum(1)).minimum(holds.sum(1))[:, None]
    # A layer's share is level * weight, held within its bounds; more level, more in all. The tiny
    # weight that everyone has lets a layer of weight 0 take what the others cannot hold.
    weights = weights.to(widest(weights.device))
    most = weights.amax(1, keepdim=True)
    weights = torch.where(most > 0, weights / most.clamp(min=1e-300), 1.0).clamp(min=1e-9)

    def at(level: Tensor) -> Tensor:
        """(R, n) levels -> the shares there (R, n, L)."""
        shares = level[..., None] * weights[:, None]
        return shares.maximum(floors[:, None]).minimum(holds[:, None])

    # The sum is a straight line between the levels at which a layer meets a bound.
    levels = torch.cat((floors / weights, holds / weights), dim=1).sort(dim=1).values  # (R, 2L)
    sums = at(levels).sum(-1)
    last = levels.shape[1] - 1
    low = ((sums <= totals).sum(1, keepdim=True) - 1).clamp(0, last)
    high = (low + 1).clamp(max=last)
    (a, b), (below, above) = ((x.gather(1, low), x.gather(1, high)) for x in (levels, sums))
    level = a + (totals - below) / (above - below).clamp(min=1e-30) * (b - a)
    shares = at(level)[:, 0]
    parts = shares.long()
    order = (parts - shares).argsort(dim=1, stable=True)  # the largest remainder first
    missing = totals - parts.sum(1, keepdim=True)
    ups = torch.arange(parts.shape[1], device=parts.device) < missing
    return parts.scatter_add(1, order, ups.long())
