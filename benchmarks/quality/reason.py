"""The reasoner under every policy: `run.py reason`, and what it shares with ablation.py.

A budget is a percentage of a problem's text, that is prompt and chain, as a mean over a batch of
problems of about one size. A protected prompt is held on top, and the percentage is of the chain
alone, for a prompt takes up to a third of its text, which most budgets could not hold. The number
of tokens really held is measured, as a mean over layers and all tokens written. Tables show it
beside its share of what the full cache holds at the same tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from benchmarks.common.results import Lines, mean_with_interval, wilson
from benchmarks.quality.chains import Batch, batches
from benchmarks.quality.choices import (
    CHOICES,
    PROTECT,
    at_equal_budget,
    markdown,
    tokens_of,
    weights_of,
)
from lethe_mini import Engine, FullKV, Lethe, Policy, SnapKV
from lethe_mini.errors import UserError
from lethe_mini.jsonlines import digest
from lethe_mini.reasoner.problems import BEYOND, TRAINED


@dataclass(frozen=True)
class Arm:
    """A policy under one condition; its budget in tokens depends on the problems."""

    choice: str
    make: type[Policy]
    changes: dict
    budget: str  # as asked for: "128" or "10%"
    protect: bool
    interval: int  # of the policy, unless `changes` has another; the budget allows for this one
    sinks: int

    def policy(self, batch: Batch) -> Policy:
        """The policy for a batch. Raises UserError for a budget that is too small."""
        if self.make is FullKV:
            return FullKV()
        options = {"interval": self.interval, "sinks": self.sinks, "protect_prompt": self.protect}
        if self.protect:
            room = tokens_of(self.budget, batch.chain)
            budget = room + batch.prompt
        else:
            budget = room = tokens_of(self.budget, batch.length)
        if issubclass(self.make, SnapKV):
            # It always keeps the tokens of its last queries. They should take a part of the room.
            default = self.make.__dataclass_fields__["window"].default
            options["window"] = max(1, min(default, room // 4))
        policy = self.make(budget=budget, **(options | self.changes))
        policy.check_prompt(batch.prompt)
        return policy


def arms_of(args) -> list[Arm]:
    """The full cache, then every choice at every budget, without and with a protected prompt."""
    arms = [Arm("full", FullKV, {}, "", False, args.interval, args.sinks)]
    for budget in args.budget:
        for protect in PROTECT[args.protect]:
            arms += [
                Arm(choice, *CHOICES[choice], budget, protect, args.interval, args.sinks)
                for choice in args.choice
            ]
    return arms


def measured(batch: Batch, arm: Arm, way: Callable[[Policy], dict], whole: bool) -> dict:
    """The batch's result under the arm, with a budget with which it holds as much as is allowed.

    way: measures under a policy. whole: it reads the right chains from end to end. Otherwise the
    budget is found beforehand: by reading, where a breakpoint may keep less, or else by counting.
    """
    policy, right = arm.policy(batch), [len(chain) for chain in batch.chains]

    def measure(result: dict, budget: int | None) -> tuple[float, float]:
        """Held and allowed, both less the tokens since the last round, which no budget counts."""
        between = (getattr(policy, "interval", 1) + 1) / 2
        allowed = batch.held(result["tokens"], budget, arm.interval)
        return result["held"] - between, allowed - between

    def count(policy: Policy) -> dict:
        budget, interval = getattr(policy, "budget", None), getattr(policy, "interval", 1)
        return {"tokens": right, "held": batch.held(right, budget, interval)}

    breaks = isinstance(policy, Lethe) and policy.breakpoint != "none"
    find = batch.read if whole or breaks else count
    found = at_equal_budget(policy, None, find, measure)
    if whole:
        return found
    nominal = found["nominal"]
    result = way(policy if nominal is None else replace(policy, budget=nominal))
    if "solved" not in result:  # chains were left early; this is what they would hold to their ends
        result |= {"held": found["held"], "full": batch.held(right)}
        result["steps"] = sum(right) - len(right)
    return result | {"nominal": nominal}


class Bench:
    """Measures what the lines lack, batch by batch, within a batch arm by arm."""

    def __init__(self, engine: Engine, lines: Lines, writes: bool, room: float, whole: bool):
        self.engine, self.lines = engine, lines
        self.writes, self.room, self.whole = writes, room, whole and not writes
        dtype = str(engine.dtype).removeprefix("torch.")
        self.facts = {
            "weights": weights_of(engine.name),
            "dtype": dtype,
            "device": engine.device.type,
        }
        self.facts |= {"room": room} if writes else {"whole": whole}

    def result(self, batch: Batch, arm: Arm) -> dict:
        """The arm's result, from the lines or measured; one with `error` where there is none."""
        try:
            policy = arm.policy(batch)
        except UserError as error:
            return {"error": str(error).partition(";")[0], "family": batch.family}
        facts = {"name": policy.name, **asdict(policy)}
        key = self.facts | {"problems": digest(batch.prompts), "policy": facts}
        if facts.get("interval", arm.interval) != arm.interval:
            key["allowed_at"] = arm.interval
        result = self.lines.get(key)
        if result is None:
            try:
                result = measured(batch, arm, self._way(batch), self.whole)
            except UserError as error:  # the search lowered the budget too far
                result = {"error": str(error).partition(";")[0]}
            result |= {"family": batch.family, "numbers": list(batch.numbers)}
            result |= {"right": [len(chain) for chain in batch.chains]}
            self.lines.put(key, result)
        return result | {"policy": facts | {"nominal": result.get("nominal")}}

    def _way(self, batch: Batch) -> Callable[[Policy], dict]:
        if self.writes:
            return lambda policy: batch.write(policy, self.room)
        return lambda policy: batch.read(policy, self.whole)

    def results(self, arms: list[Arm], every: Iterable[Batch], count: int) -> list[list[dict]]:
        """For every arm the results of all `count` batches."""
        found: list[list[dict]] = [[] for _ in arms]
        with tqdm(total=len(arms) * count, unit="batch", disable=None) as bar:
            for batch in every:
                for arm, results in zip(arms, found, strict=True):
                    bar.set_description(f"{batch.family} {arm.choice} {arm.budget}")
                    results.append(self.result(batch, arm))
                    bar.update()
        return found


def add_problems(parser) -> None:
    """The options that say which problems."""
    add = parser.add_argument
    families = list(TRAINED)
    add("--families", nargs="+", default=families, choices=families, help="default: all")
    add("--problems", type=int, default=200, help="of each family (default: %(default)s)")
    add("--batch", type=int, default=50, help="problems at once, at most (default: %(default)s)")
    add("--beyond", action="store_true", help="longer problems than the reasoner was trained on")


def all_batches(engine: Engine, args) -> tuple[Iterator[Batch], int]:
    """The batches of all families, and how many. They are made one at a time, since each holds the
    prompts that it has read."""
    sizes = BEYOND if args.beyond else TRAINED
    seed = f"quality-{args.split}-{args.seed}"
    made = (
        batch
        for family in args.families
        for batch in batches(engine, family, sizes[family], seed, args.problems, args.batch)
    )
    return made, len(args.families) * -(-args.problems // args.batch)


# -- figures ---------------------------------------------------------------------------------------


def columns(results: list[dict]) -> dict:
    """The results of several batches as one: lists are joined, `held` and `full` become sums over
    steps."""
    joined: dict = {"held": 0.0, "full": 0.0, "steps": 0}
    for one in results:
        joined["steps"] += one["steps"]
        joined["held"] += one["held"] * one["steps"]
        joined["full"] += one["full"] * one["steps"]
        for name, value in one.items():
            if isinstance(value, list):
                joined.setdefault(name, []).extend(value)
    return joined


def figures(mine: dict, base: dict) -> dict:
    """[mean, low, high] of everything that was measured. `less_...` is the difference to the base,
    paired problem by problem. mine, base: of `columns`."""
    ones = [1] * len(mine["exact"])

    def share(name: str) -> list[float]:
        good = sum(mine[name])
        return [good / len(ones), *wilson(good, len(ones))]

    def less(name: str, per: list) -> list[float]:
        pairs = zip(mine[name], base[name], strict=True)
        return mean_with_interval([float(a) - float(b) for a, b in pairs], per)

    row = {
        "problems": len(ones),
        "held": mine["held"] / mine["steps"],
        "share": mine["held"] / mine["full"],
        "exact": share("exact"),
    }
    reach = [first / right for first, right in zip(mine["first"], mine["right"], strict=True)]
    row |= {"less_exact": less("exact", ones), "reach": mean_with_interval(reach, ones)}
    if "solved" in mine:
        row |= {
            "solved": share("solved"),
            "less_solved": less("solved", ones),
            "length": mean_with_interval(mine["tokens"], mine["right"]),
            "looped": share("looped"),
            "truncated": share("truncated"),
        }
        return row
    if mine["tokens"] == mine["right"] == base["tokens"]:  # read to the ends
        row["wrong"] = mean_with_interval(mine["wrong"], mine["right"])
        row["nats"] = mean_with_interval(mine["nats"], mine["right"])
        row["less_nats"] = less("nats", mine["right"])
    return row


def rows_of(
    arms: list[Arm], found: list[list[dict]], families: list[str], base: Callable[[int], int]
) -> list[dict]:
    """A row per arm and family, and per arm one of all families.

    base(index of an arm) -> the index of the arm that it is compared with.
    """
    rows, groups = [], list(families)
    if len(families) > 1:
        groups.append("all")
    for family in groups:
        for index, (arm, results) in enumerate(zip(arms, found, strict=True)):
            mine, theirs = (
                [one for one in ones if family == "all" or one["family"] == family]
                for ones in (results, found[base(index)])
            )
            row = {"family": family, "choice": arm.choice, "budget": arm.budget}
            row["protect"] = arm.changes.get("protect_prompt", arm.protect)
            errors = [one["error"] for one in mine + theirs if "error" in one]
            if errors:
                rows.append(row | {"error": errors[0]})
                continue
            facts = [one["policy"] for one in mine]
            values = {name: [one[name] for one in facts] for name in facts[0]}
            row["policy"] = {name: one_or_all(each) for name, each in values.items()}
            rows.append(row | figures(columns(mine), columns(theirs)))
    return rows


def one_or_all(values: list):
    """The value that all batches have, or a list where they differ."""
    if any(value != values[0] for value in values):
        return values
    return values[0]


WRITTEN = {
    "solved": "accuracy",
    "less_solved": "less full's",
    "reach": "right up to",
    "length": "length / right length",
    "looped": "loops",
    "truncated": "cut off",
}
READ = {
    "exact": "whole chain right",
    "less_exact": "less {base}'s",
    "reach": "right up to",
    "wrong": "words wrong",
    "less_nats": "nats/word over {base}'s",
}


def table(rows: list[dict], base: str = "full") -> str:
    """A table in Markdown, of rows of one family. Figures are means with their intervals."""
    names = WRITTEN if any("solved" in row for row in rows) else READ
    heads = {name: head.format(base=base) for name, head in names.items()}
    return markdown(rows, heads, lambda row: f"{row['held']:.0f}, {row['share']:.1%}")


def show_tables(rows: list[dict], base: str = "full") -> None:
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        count = max(row.get("problems", 0) for row in mine)
        print(f"{family}, {count} problems:\n\n{table(mine, base)}\n")


def run(engine: Engine, args) -> list[dict]:
    """The rows of `run.py reason`."""
    bench = Bench(engine, Lines(args.lines), not args.read, args.room, not args.until_wrong)
    arms = arms_of(args)
    found = bench.results(arms, *all_batches(engine, args))
    return rows_of(arms, found, args.families, base=lambda index: 0)
