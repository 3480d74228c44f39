"""How good a policy's choice of tokens is: the same texts, the same number of tokens kept.

    python -m benchmarks.quality.run reason [--split choose|report] [--budget 10% ...] [--quick]
    python -m benchmarks.quality.run prose  [--split choose|report] [--budget 128 10% ...] [--quick]
    python -m benchmarks.quality.run own    [--split choose|report] [--budget 128 10% ...] [--quick]
    python -m benchmarks.quality.run needle [--split choose|report] [--budget 128 10% ...] [--quick]

`reason`: the reasoner solves problems. Measured is how often it is right, how long its chains are,
how often they loop (a line three times, or three copies of the same words at the end) and how often
they are cut off (at --room times the right length). With --read it reads the right chains instead,
and its likeliest next tokens are compared with them. That is faster and gives the same answer, for
there is one right chain (chains.py).

`prose`: Python's own help texts, teacher-forced. Measured is nats per token, and agreement with the
full cache: how often the likeliest token is the same, and the Kullback-Leibler divergence from the
full cache's distribution.

`own`: the same, on chains that the model itself wrote with the full cache (own.py). Only what it
wrote is counted.

`needle`: prose states a fact once, goes on, and asks for it. Measured is how likely the answer is,
and how often greedy decoding would write it.

--split choose gives texts for choosing a default or a parameter, --split report those for
reporting. The two share no paragraph, and problems share no seed. Every policy has the same prompt,
interval and sinks, and the share of recent tokens that is its own default. A budget is a number of
tokens per layer, or a percentage of the text (reason.py says of which text); policies always get it
as a number. What is kept is measured. A policy with a breakpoint may keep less than its budget.
Then its budget is raised until it keeps as much as the others, within 2 %. Intervals are 95 %, by
bootstrap over blocks of text or over questions; Wilson's for a share of problems. Differences are
paired, block by block.

With --lines FILE an interrupted run continues where it stopped. Several such files, concatenated,
count as one run's, so two processes can take one family each. Beside the model, `prose` needs
memory for the full cache's log-probabilities of one text, tokens x vocabulary x 4 bytes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import coder
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import Lines, mean_with_interval, write_json
from benchmarks.quality import own, reason
from benchmarks.quality.choices import (
    BUDGETS,
    CHOICES,
    PROTECT,
    USUAL,
    Cell,
    at_equal_budget,
    budget_text,
    markdown,
    tokens_of,
    weights_of,
)
from benchmarks.quality.reading import SPLITS, Reader, stretches, token_stream
from lethe_mini import Engine, FullKV, Policy, UserError
from lethe_mini.jsonlines import digest
from lethe_mini.policies import POLICIES


def make_cells(args: argparse.Namespace, length: int) -> list[Cell]:
    """The full cache, then every choice at every budget, without and with a protected prompt."""
    cells = [Cell("full", "", False, FullKV())]
    for budget in args.budget:
        for protect in PROTECT[args.protect]:
            for choice in args.choice:
                make, changes = CHOICES[choice]
                common = {"interval": args.interval, "sinks": args.sinks, "protect_prompt": protect}
                cell = Cell(choice, budget, protect, None)
                try:
                    tokens = tokens_of(budget, length)
                    policy = make(budget=tokens, **common, **changes)
                    policy.check_prompt(args.prompt)
                    cell.policy = policy
                except UserError as error:
                    cell.why = str(error).partition(";")[0]
                cells.append(cell)
    return cells


class Bench:
    """Runs what the lines lack, text by text, within a text cell by cell, the full cache first."""

    def __init__(self, engine: Engine, lines: Lines, prompt: int):
        self.engine, self.lines, self.prompt = engine, lines, prompt
        self.weights = weights_of(engine.name)
        self.nominal: dict[str, int] = {}  # per policy, the budget that fitted the last text

    def key(self, cell: Cell, **facts) -> dict:
        """All that a result depends on, but for the budget with which the search began."""
        engine = self.engine
        dtype = str(engine.dtype).removeprefix("torch.")
        run = {"weights": self.weights, "dtype": dtype, "device": engine.device.type}
        return {**run, "prompt": self.prompt, "policy": cell.facts(), **facts}

    def result(self, cell: Cell, read: Callable[[Policy], dict], **facts) -> dict:
        """The cell's result for one text, from the lines or by reading it."""
        policy = json.dumps(cell.facts())
        key = self.key(cell, **facts)
        result = self.lines.get(key)
        if result is None:
            start = self.nominal.get(policy)
            result = self.lines.put(key, at_equal_budget(cell.policy, start, read))
        self.nominal[policy] = result["nominal"]
        return result

    def results(self, cells: list[Cell], readings: Iterable, count: int) -> list[list[dict]]:
        """For every cell the results of all `count` texts; none for a cell without a policy.

        readings: for every text, a function that reads it under a policy, and facts that name it.
        """
        able = [cell for cell in cells if cell.policy is not None]
        found: list[list[dict]] = [[] for _ in cells]
        with tqdm(total=len(able) * count, unit="reading", disable=None) as bar:
            for read, facts in readings:
                for cell, results in zip(cells, found, strict=True):
                    if cell.policy is not None:
                        results.append(self.result(cell, read, **facts))
                        bar.update()
        return found


def rows_of(cells: list[Cell], found: list[list[dict]]) -> list[dict]:
    """A row per cell: the choice, and the tokens kept, allowed and asked for, as means over texts;
    or why there is no policy."""
    rows = []
    for cell, results in zip(cells, found, strict=True):
        row = {"choice": cell.choice, "budget": cell.budget, "protect": cell.protect}
        if cell.policy is None:
            row["error"] = cell.why
        else:
            row["policy"] = cell.facts()
            for name in ("kept", "allowed", "nominal"):
                row[name] = sum(one[name] or 0 for one in results) / len(results)
        rows.append(row)
    return rows


# -- prose -----------------------------------------------------------------------------------------


class Prose:
    """One stretch of text. The last of its ids is predicted, not read."""

    def __init__(self, bench: Bench, ids: list[int], block: int):
        self.bench, self.ids, self.block = bench, ids, block
        self.prompt = bench.prompt
        self.counted: slice | torch.Tensor = slice(None)  # of the tokens behind the prompt
        self.full: torch.Tensor | None = None  # log-probabilities (T, vocab), once needed

    def log_probs(self, reader: Reader) -> Iterable[torch.Tensor]:
        """Log-probabilities of what follows each token behind the prompt, in chunks (T, vocab)."""
        prompt = self.prompt
        for _ in reader.read(self.ids[:prompt], last_only=True):
            pass
        for logits in reader.read(self.ids[prompt:-1]):
            yield logits.log_softmax(dim=-1)

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """Sums over blocks of the tokens that count: nats, KL from the full cache in nats,
        agreements with it."""
        engine = self.bench.engine
        if self.full is None:
            full = self.log_probs(Reader(engine, FullKV(), self.prompt))
            self.full = torch.cat(list(full))
        reader, done = Reader(engine, policy, self.prompt), 0
        targets = torch.tensor(self.ids[self.prompt + 1 :], device=self.full.device)
        columns: dict[str, list[torch.Tensor]] = {"nats": [], "kl": [], "agree": []}
        for ours in self.log_probs(reader):
            theirs = self.full[done : done + len(ours)]
            right = targets[done : done + len(ours), None]
            columns["nats"].append(-ours.gather(-1, right)[:, 0])
            columns["kl"].append((theirs.exp() * (theirs - ours)).sum(-1))
            columns["agree"].append((ours.argmax(-1) == theirs.argmax(-1)).float())
            done += len(ours)
        counted = {name: torch.cat(parts).cpu()[self.counted] for name, parts in columns.items()}
        blocks = {name: values.split(self.block) for name, values in counted.items()}
        sums = {name: [part.sum().item() for part in parts] for name, parts in blocks.items()}
        counts = [len(part) for part in blocks["nats"]]
        return {**sums, "tokens": counts, "rounds": reader.rounds}


class Own(Prose):
    """The model's own chains, of which only what it wrote counts."""

    def __init__(self, bench: Bench, text: own.Text, block: int):
        super().__init__(bench, text.ids, block)
        self.prompt = text.prompt
        self.counted = torch.tensor(text.own[text.prompt + 1 :])


def prose_readings(bench: Bench, texts: list, block: int, read: type[Prose] = Prose) -> Iterable:
    """For Bench.results, one at a time, since a text holds the full cache's log-probabilities."""
    for text in texts:
        one = read(bench, text, block)
        facts = {"task": read.__name__.lower(), "text": digest(one.ids), "block": block}
        facts["prompt"] = one.prompt
        yield one.read, facts


def run_prose(
    bench: Bench,
    cells: list[Cell],
    texts: list,
    block: int,
    rival: str = "random",
    read: type[Prose] = Prose,
) -> list[dict]:
    """A row per cell, figures with their intervals; `over_rival` compares with that choice at the
    same budget and protection."""
    found = bench.results(cells, prose_readings(bench, texts, block, read), len(texts))
    joined = [
        {name: [x for one in ones for x in one[name]] for name in ("nats", "kl", "agree", "tokens")}
        for ones in found
    ]
    rows = rows_of(cells, found)
    for cell, row, mine in zip(cells, rows, joined, strict=True):
        if cell.policy is None:
            continue
        for name in ("nats", "kl", "agree"):
            row[name] = mean_with_interval(mine[name], mine["tokens"])
        row["gap"] = difference(mine, joined[0], "nats")
        condition = (cell.budget, cell.protect)
        rivals = [
            theirs
            for other, theirs in zip(cells, joined, strict=True)
            if other.choice == rival and (other.budget, other.protect) == condition
        ]
        row["over_rival"] = difference(mine, rivals[0], "nats") if rivals else None
    return rows


def difference(mine: dict, theirs: dict, name: str) -> list[float]:
    """[mean, low, high] of mine minus theirs, paired block by block."""
    less = [a - b for a, b in zip(mine[name], theirs[name], strict=True)]
    return mean_with_interval(less, mine["tokens"])


# -- needle ----------------------------------------------------------------------------------------

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "grey", "brown", "purple", "orange"]
THINGS = [
    "lighthouse",
    "harbour",
    "castle",
    "bridge",
    "garden",
    "market",
    "library",
    "station",
    "tower",
    "mill",
]


@dataclass
class Needle:
    """ids: prose with the fact in it, then the question; answer: the tokens that should follow."""

    ids: list[int]
    answer: list[int]
    haystack: int  # tokens of prose and fact, in which the fact stands somewhere
    distance: int  # tokens from the end of the fact to the answer


def make_needle(
    engine: Engine, prose: list[int], haystack: int, later: int, prompt: int, rng: random.Random
) -> Needle:
    """`haystack` tokens of prose with a fact somewhere behind the prompt, `later` tokens more, and
    the question."""
    name = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    number = rng.randrange(1000, 10000)

    def encode(text: str) -> list[int]:
        return engine.text.encode(text, add_special_tokens=False)

    fact = encode(f"\n\nThe secret number of the {name} is {number}.\n\n")
    question = encode(f"\n\nThe secret number of the {name} is")
    length = haystack - len(fact) + later
    first = rng.randrange(len(prose) - length + 1)
    prose = prose[first : first + length]
    place = rng.randint(prompt, haystack - len(fact))
    ids = prose[:place] + fact + prose[place:] + question
    return Needle(ids, encode(f" {number}"), haystack, len(ids) - place - len(fact))


class Recall:
    """Asks for one needle."""

    def __init__(self, bench: Bench, needle: Needle):
        self.bench, self.needle = bench, needle

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """The answer's probability, and whether it is what greedy decoding writes."""
        bench, needle = self.bench, self.needle
        reader = Reader(bench.engine, policy, bench.prompt)
        *_, last = reader.read(needle.ids, last_only=True)
        # The answer's last token predicts nothing here. If each token is the likeliest one, greedy
        # decoding would have written the same.
        logits = torch.cat([last[-1:], *reader.read(needle.answer[:-1])]).log_softmax(dim=-1)
        right = torch.tensor(needle.answer, device=logits.device)
        log_prob = logits.gather(-1, right[:, None]).sum()
        match = bool((logits.argmax(-1) == right).all())
        return {"probability": log_prob.exp().item(), "match": match, "rounds": reader.rounds}


def run_needle(bench: Bench, cells: list[Cell], needles: list[Needle]) -> list[dict]:
    """A row per cell: recall over the needles, with its interval."""
    readings = (
        (
            Recall(bench, needle).read,
            {"task": "needle", "text": digest(needle.ids), "answer": needle.answer},
        )
        for needle in needles
    )
    found = bench.results(cells, readings, len(needles))
    rows, ones = rows_of(cells, found), [1] * len(needles)
    for cell, row, mine in zip(cells, rows, found, strict=True):
        if cell.policy is None:
            continue
        for name in ("match", "probability"):
            values = [float(one[name]) for one in mine]
            less = [x - float(full[name]) for x, full in zip(values, found[0], strict=True)]
            row[name] = mean_with_interval(values, ones)
            row[f"{name}_less_full"] = mean_with_interval(less, ones)
    return rows


# -- the command line ------------------------------------------------------------------------------

HEADS = {
    "prose": {
        "nats": "nats/token",
        "gap": "over full",
        "over_rival": "over rival",
        "agree": "same top-1",
        "kl": "KL",
    },
    "needle": {
        "match": "recall",
        "match_less_full": "less full's",
        "probability": "probability",
        "probability_less_full": "less full's",
    },
}


def table(task: str, rows: list[dict]) -> str:
    """A table in Markdown. Figures are means with their intervals."""
    return markdown(rows, HEADS[task], lambda row: f"{row['kept']:.0f}")


QUICK = {  # a few minutes on two cores in all
    "prose": {"texts": 1, "tokens": 640, "budget": ["25%"]},
    "own": {"texts": 1, "tokens": 320, "count": 4, "max_new_tokens": 160, "budget": ["25%"]},
    "needle": {"needles": 4, "haystack": [500], "budget": ["25%"]},
    "reason": {"problems": 10, "budget": ["25%"]},
}
QUICK_CHOICES = ["random", "streaming", "lethe", "lethe-plus"]


def shared(parser: argparse.ArgumentParser, model: str, interval: int, choices: list[str]) -> None:
    """The options of all tasks."""
    add = parser.add_argument
    add("--model", default=model, help="default: %(default)s")
    add("--device", default="auto", help="default: %(default)s")
    add("--dtype", default="float32", help="default: %(default)s")
    add(
        "--split",
        choices=SPLITS,
        default="report",
        help="which half of the texts (default: report)",
    )
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    every = [name for name in CHOICES if name != "full"]
    add("--choice", nargs="+", default=choices, choices=every, metavar="NAME",
        help=f"policies, of {', '.join(every)} (default: {', '.join(choices)})")  # fmt: skip
    add("--budget", nargs="+", type=budget_text, default=BUDGETS, metavar="N|P%",
        help="tokens per layer, or a share of the text (default: %(default)s)")  # fmt: skip
    add("--protect", choices=[*PROTECT], default="both", help="keep the whole prompt? (both)")
    add("--interval", type=int, default=interval, help="tokens between rounds (%(default)s)")
    add("--sinks", type=int, default=4, help="first tokens, always kept (%(default)s)")
    add("--lines", type=Path, help="JSON Lines file to write to, and to continue from")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    add("--quick", action="store_true", help="few choices and texts: minutes")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    solve = tasks.add_parser("reason", help="problems that the reasoner solves step by step")
    shared(solve, "reasoner", 16, [name for name in USUAL if name in POLICIES])
    reason.add_problems(solve)
    add = solve.add_argument
    add(
        "--room",
        type=float,
        default=1.2,
        help="most tokens, in lengths of the right chain (%(default)s)",
    )
    add("--read", action="store_true", help="read the right chains instead of writing")
    add("--until-wrong", action="store_true", help="with --read: stop at a chain's first error")
    prose = tasks.add_parser("prose", help="nats per token, and agreement with the full cache")
    shared(prose, "demo", 128, USUAL)
    add = prose.add_argument
    add("--prompt", type=int, default=128, help="tokens that are the prompt (%(default)s)")
    add("--texts", type=int, default=10, help="how many (default: %(default)s)")
    add("--tokens", type=int, default=2304, help="of each (default: %(default)s)")
    add("--rival", default="random", choices=USUAL, help="policy to compare with (%(default)s)")
    add(
        "--block",
        type=int,
        default=128,
        help="tokens that the bootstrap draws together (%(default)s)",
    )
    chains = tasks.add_parser("own", help="the same, on what the model itself wrote")
    shared(chains, "demo", 64, USUAL)
    chains.set_defaults(prompt=0)  # every text has its own
    add = chains.add_argument
    add("--problems", default="gym:gsm_symbolic", help="gym:NAME,NAME or FILE.jsonl (%(default)s)")
    add("--count", type=int, default=150, help="problems of each kind (default: %(default)s)")
    add("--max-new-tokens", type=int, default=512, help="of a chain (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="chains written at once (default: %(default)s)")
    add("--tokens", type=int, default=1500, help="least of a text (default: %(default)s)")
    add("--alone", action="store_true", help="one problem a text, instead of as many as it takes")
    add("--texts", type=int, default=16, help="most of them (default: %(default)s)")
    add("--rival", default="random", choices=USUAL, help="policy to compare with (%(default)s)")
    add("--block", type=int, default=128, help="tokens that the bootstrap draws together (128)")
    needle = tasks.add_parser("needle", help="recall of a fact stated once")
    shared(needle, "demo", 128, USUAL)
    add = needle.add_argument
    add("--prompt", type=int, default=128, help="tokens that are the prompt (%(default)s)")
    add("--needles", type=int, default=100, help="for each length (default: %(default)s)")
    add("--haystack", type=int, nargs="+", default=[500, 1000, 2000, 4000],
        help="tokens of text with the fact in it (default: 500 1000 2000 4000)")  # fmt: skip
    add("--later", type=int, default=500, help="tokens between it and the question (%(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK[args.task], choice=QUICK_CHOICES)
    if args.task == "reason":
        if args.until_wrong and not args.read:
            parser.error("--until-wrong needs --read")
        return args
    if args.task == "own":
        return args
    shortest = args.tokens if args.task == "prose" else min(args.haystack)
    if not 0 < args.prompt <= shortest - 64:
        parser.error(f"--prompt should be from 1 to {shortest - 64}, not {args.prompt}")
    return args


def run(engine: Engine, args: argparse.Namespace) -> list[dict]:
    """The rows of a task; for `needle`, haystack by haystack."""
    if args.task == "reason":
        return reason.run(engine, args)
    bench = Bench(engine, Lines(args.lines), args.prompt)
    if args.task == "own":
        texts = own.texts(engine, args, bench.lines, bench.weights)
        args.prompt = max(text.prompt for text in texts)  # of the longest, for make_cells
        cells = make_cells(args, own.mean_length(texts))
        return run_prose(bench, cells, texts, args.block, args.rival, Own)
    if args.task == "prose":
        texts = stretches(engine, args.split, args.seed, args.texts, args.tokens)
        return run_prose(bench, make_cells(args, args.tokens), texts, args.block, args.rival)
    prose, rows = token_stream(engine, args.split, args.seed), []
    for haystack in args.haystack:
        needles = [
            make_needle(
                engine,
                prose,
                haystack,
                args.later,
                args.prompt,
                random.Random(f"{args.split}-{args.seed}-{haystack}-{number}"),
            )
            for number in range(args.needles)
        ]
        cells = make_cells(args, haystack + args.later)
        rows += [row | {"haystack": haystack} for row in run_needle(bench, cells, needles)]
    return rows


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with user_errors():
        engine = coder.load(args.model, args.device, args.dtype)
        rows = run(engine, args)
        print(f"{args.task}, {args.model} in {args.dtype}, texts to {args.split}; {hardware()}\n")
        show(args, rows)
        write_json(args.json, args, {"hardware": hardware(), "rows": rows})


def show(args: argparse.Namespace, rows: list[dict]) -> None:
    """Prints the tables of a task."""
    if args.task == "reason":
        reason.show_tables(rows)
    elif args.task in ("prose", "own"):
        print(table("prose", rows), "\n")
    else:
        for haystack in args.haystack:
            mine = [row for row in rows if row["haystack"] == haystack]
            print(f"a fact in {haystack:,} tokens, {args.needles} of them:\n")
            print(table("needle", mine), "\n")


if __name__ == "__main__":
    main()
