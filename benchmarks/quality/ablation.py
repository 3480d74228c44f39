"""The parameters of LethePlus one at a time, on the reasoner, at an equal number of tokens held.

    python -m benchmarks.quality.ablation                              # to choose a value
    python -m benchmarks.quality.ablation --split report --base allocation=uniform    # to report it
    python -m benchmarks.quality.ablation --factors gamma halves --budget 10%

The base is LethePlus with its defaults, a round every 16 tokens, and whatever --base says. Every
other arm differs from the base in what its name says. Chains are read, not written (chains.py): an
arm is right where greedy decoding would write the whole right chain. Arms that vary tau or segments
also have per_head=False and breakpoint=global, or they would change nothing. Budgets are as in
run.py. The tokens held are measured, and an arm's budget is raised or lowered until it holds as
much as the base may. Figures are paired with the base's, problem by problem.

`halves` takes parts away. `no-allocation` divides the budget evenly. `no-rasr` keeps the newest
tokens of each layer's share, beside the distinct ones. `no-distinct` has no places for distinct
tokens. `distinct-alone` has neither budgets by Hoyer nor scores. `none` is StreamingLLM. `no-decay`
has scores that never fade.
"""

import argparse
import json
from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import Lines, write_json
from benchmarks.quality.choices import budget_text
from benchmarks.quality.reading import SPLITS
from benchmarks.quality.reason import Arm, Bench, add_problems, all_batches, rows_of, show_tables
from lethe_mini import Engine, FullKV, LethePlus, UserError
from lethe_mini.cache import KVCache, LayerCache


@dataclass(frozen=True)
class NoRASR(LethePlus):
    """Layer budgets of LethePlus; but of a layer's share the newest tokens stay."""

    name: ClassVar[str] = "no-rasr"

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        return layer.positions.float()


ALONE = {"breakpoint": "none"}  # a curve of positions has none
HALVES = {
    "no-allocation": (LethePlus, {"allocation": "uniform"}),
    "no-rasr": (NoRASR, ALONE),
    "no-distinct": (LethePlus, {"distinct_ratio": 0.0}),
    "distinct-alone": (NoRASR, ALONE | {"allocation": "uniform"}),
    "none": (NoRASR, ALONE | {"allocation": "uniform", "distinct_ratio": 0.0}),
    "no-decay": (LethePlus, {"gamma": 1.0}),
}
PUBLISHED = {"per_head": False, "breakpoint": "global"}  # as in the paper
FACTORS: dict[str, list[dict]] = {
    "tau": [PUBLISHED | {"tau": float(tau)} for tau in (100, 200, 400, 800)],
    "recent_ratio": [{"recent_ratio": ratio} for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "breakpoint": [
        PUBLISHED,
        {"per_head": False, "breakpoint": "segment", "tau": 2.0},
        {"per_head": False, "breakpoint": "none"},
        {"per_head": True, "breakpoint": "global"},
    ],
    "gamma": [{"gamma": gamma} for gamma in (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)],
    "segments": [PUBLISHED | {"segments": parts} for parts in (4, 8, 16, 32, 64)],
    "sinks": [{"sinks": sinks} for sinks in (0, 1, 4, 16)],
    "interval": [{"interval": tokens} for tokens in (4, 8, 16, 32, 64)],
    "allocation": [
        {"allocation": name} for name in ("hoyer", "inverse_hoyer", "uniform", "pyramid")
    ],
    "even_share": [{"even_share": part} for part in (0.0, 0.25, 0.35, 0.5, 0.65, 0.75)],
    "cap": [{"cap": medians} for medians in (0.0, 1.5, 2.0)],
    "lag": [{"lag": tokens} for tokens in (0, 2, 4, 6, 8, 16)],
    "distinct_ratio": [{"distinct_ratio": part} for part in (0.0, 0.25, 0.5, 0.7, 0.8, 0.9)],
    "alike": [{"alike": cosine} for cosine in (0.7, 0.8, 0.85, 0.9, 0.95)],
    "per_head": [{"per_head": value} for value in (False, True)],
    "value_norm": [{"value_norm": value} for value in (False, True)],
    "protect_prompt": [{"protect_prompt": value} for value in (False, True)],
}


def arms_of(args: argparse.Namespace, budget: str) -> list[Arm]:
    """The full cache, the base, and every arm that differs from the base; at one budget."""
    base = {field.name: field.default for field in fields(LethePlus)} | args.base
    base["interval"] = args.interval
    protect, sinks = base["protect_prompt"], base["sinks"]

    def arm(name: str, make: type[LethePlus], changes: dict) -> Arm:
        return Arm(name, make, args.base | changes, budget, protect, args.interval, sinks)

    arms = [Arm("full", FullKV, {}, "", False, args.interval, sinks), arm("base", LethePlus, {})]
    for factor in args.factors:
        if factor == "halves":
            arms += [arm(name, *what) for name, what in HALVES.items()]
            continue
        for changes in FACTORS[factor]:
            if any(base[name] != value for name, value in changes.items()):
                name = ", ".join(f"{key}={value}" for key, value in changes.items())
                arms.append(arm(name, LethePlus, changes))
    return arms


def setting(text: str) -> tuple[str, object]:
    """ "gamma=0.9" as a name and its value. Raises ArgumentTypeError for what LethePlus refuses."""
    name, _, value = text.partition("=")
    known = {field.name for field in fields(LethePlus)} - {"interval", "budget"}
    if name not in known:
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE, of {', '.join(sorted(known))}")
    with suppress(ValueError):  # a word stays as it is
        value = json.loads(value)
    try:
        LethePlus(budget=1, **{name: value})
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
    return name, value


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    every = [*FACTORS, "halves"]
    add("--model", default="reasoner", help="default: %(default)s")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--factors", nargs="+", default=every, choices=every, metavar="NAME",
        help=f"what to vary, of {', '.join(every)} (default: all)")  # fmt: skip
    add("--base", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
        help="options of LethePlus that all arms share (default: its defaults)")  # fmt: skip
    add("--budget", nargs="+", type=budget_text, default=["10%", "25%"], metavar="N|P%",
        help="tokens per layer, or a share of the text (default: 10%% 25%%)")  # fmt: skip
    add("--interval", type=int, default=16, help="tokens between rounds (default: %(default)s)")
    add("--split", choices=SPLITS, default="choose", help="which problems (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    add_problems(parser)
    add("--until-wrong", action="store_true", help="stop at a chain's first error, which is faster")
    add("--lines", type=Path, help="JSON Lines file to write to, and to continue from")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    args.base = dict(args.base)
    return args


def run(engine: Engine, args: argparse.Namespace) -> list[dict]:
    """Rows of every budget, each with the full cache and the base first."""
    bench = Bench(engine, Lines(args.lines), writes=False, room=0, whole=not args.until_wrong)
    by_budget = [arms_of(args, budget) for budget in args.budget]
    arms = [arm for mine in by_budget for arm in mine]
    found = bench.results(arms, *all_batches(engine, args))
    count = len(by_budget[0])
    return rows_of(arms, found, args.families, base=lambda at: at // count * count + 1)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with user_errors():
        base = asdict(LethePlus(budget=1, interval=args.interval, **args.base))
        base["budget"] = args.budget
        engine = Engine.from_pretrained(args.model, "cpu", args.dtype)
        rows = run(engine, args)
        print(f"{args.model} in {args.dtype}, problems to {args.split}; {hardware()}")
        print(f"base: {base}\n")
        show_tables(rows, "base")
        write_json(args.json, args, {"base": base, "hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
