r"""Does a model still reason with a pruned cache? It solves problems under every policy.

    python -m benchmarks.accuracy.run --task math500 --model MODEL --budget 10% \
        --policies full lethe lethe-plus h2o
    python -m benchmarks.accuracy.run --task mmlu | FILE.jsonl | gym:NAME,NAME [...]

Tasks. `math500` and `mmlu` come from the hub (HuggingFaceH4/MATH-500; cais/mmlu, eight subjects).
FILE.jsonl has one object a line: `question` (or `problem`), `answer`, and perhaps `choices`, `id`,
`subject`; a `prompt` in place of the `question` is passed on as it is. `gym:` is reasoning-gym,
which makes --problems of each kind: planning (tower_of_hanoi, shortest_path, jugs), code (bf,
codeio), logic (knights_knaves, syllogism, zebra_puzzles) and a hundred more.

Grades. The last answer that the model marked counts: \boxed{}, for letters also "Answer: B", for
reasoning-gym <answer>. math-verify compares formulas. reasoning-gym grades its own problems, and
only the full score is right. A text that was cut off before it marked an answer is wrong. A text
that ended by itself may have no mark; then its last line is its answer.

Policies. All have the same problems, draws, interval and sinks, and the share of recent tokens that
is their own default; a window of queries, whose tokens are always kept, takes at most a quarter of
the budget. A budget is a number of tokens per layer; a percentage of what the full cache holds at
the end, as a mean, which `full` measures first and policies get as a number; or `none`, where
Lethe's Algorithm 1 alone decides. A protected prompt is part of a number, but is held on top of a
percentage, which is then one of the text behind it: prompts are of many lengths, and the longest
would not fit.

Columns. `holds` is what was kept: tokens per layer, as a mean over all steps, and its share of what
a full cache would hold. Intervals are 95 %, by bootstrap over problems; differences are paired,
problem by problem. Where all problems come out alike the interval has no width, which does not mean
certainty. `looped` texts were cut off while they repeated themselves. Tokens/s are those of
decoding at this batch size; with --ray, those of one worker.

With --lines FILE an interrupted run continues where it stopped. The file has every text, so that a
newer grader can grade it again. Runs with other settings can share it, and so can runs with more
problems or samples (which change what a percentage is). The batch size changes no text, only speed
and peak memory.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from benchmarks.accuracy.grading import PACKAGES, Grader, extract, version
from benchmarks.accuracy.problems import SUBJECTS, Problem, load
from benchmarks.common import coder
from benchmarks.common.hardware import hardware
from benchmarks.common.results import Lines, mean_with_interval, write_json
from benchmarks.quality.choices import CHOICES, PROTECT, Cell, budget_text, prompt_column
from lethe_mini import Engine, FullKV, Lethe, Sampling
from lethe_mini.app.cluster import Cluster, without_weights
from lethe_mini.cache import KVCache
from lethe_mini.errors import UserError, writing
from lethe_mini.generation.requests import POSITIONS
from lethe_mini.generation.stats import kv_bytes
from lethe_mini.jsonlines import digest
from lethe_mini.options import check_room
from lethe_mini.policies import SnapKV
from lethe_mini.policy import Policy, Pruner

# A loop repeats at most PERIOD tokens, at least REPEATS times, and has at least LOOP tokens.
PERIOD, REPEATS, LOOP = 256, 4, 32
FULL_MARK = 1 - 1e-9  # reasoning-gym's scores are sums of shares
POLICIES = ["full", "lethe", "lethe-plus", "h2o", "streaming", "random"]  # unless told
DRAWS = ("temperature", "top_p", "seed")

# -- cells -----------------------------------------------------------------------------------------


def make_cells(args: argparse.Namespace, longest: int) -> list[Cell]:
    """The full cache, then every policy at every budget, without and with a protected prompt.

    A cell whose budget is a percentage has no policy yet. Beside other budgets, `none` is only for
    policies that need no budget. longest: tokens of the longest prompt.
    """
    cells = [Cell("full", "", False, FullKV())] if "full" in args.policies else []
    policies = [name for name in args.policies if name != "full"]
    for budget in args.budget:
        for protect in PROTECT[args.protect]:
            for choice in policies:
                cell = Cell(choice, budget, protect, None)
                if not budget.endswith("%"):
                    settle(cell, args, None if budget == "none" else int(budget), longest)
                if budget != "none" or not cell.why or len(args.budget) == 1:
                    cells.append(cell)
    return cells


def on_top(make: type[Pruner]) -> type[Pruner]:
    """The policy with a budget beside the prompt, which is protected: each holds its own on top."""

    @dataclass(frozen=True)
    class OnTop(make):
        name: ClassVar[str] = f"{make.name}, prompt on top"

        def limit(self, prompt: int, seen: int) -> int:
            return self.protected(prompt) + self.budget

        def first_round(self, prompt: int) -> int:
            return self.limit(prompt, seen=0)

        def check_prompt(self, prompt: int) -> None:
            check_room(self.budget, self.min_recent, False)

    return OnTop


def settle(cell: Cell, args: argparse.Namespace, tokens: int | None, longest: int) -> None:
    """Gives a cell its policy, or the reason why it has none."""
    make, changes = CHOICES[cell.choice]
    common = {"interval": args.interval, "sinks": args.sinks, "protect_prompt": cell.protect}
    if tokens is not None and issubclass(make, SnapKV):
        default = make.__dataclass_fields__["window"].default
        common["window"] = max(1, min(default, tokens // 4))
    if cell.protect and cell.budget.endswith("%"):
        make = on_top(make)
    try:
        if tokens is None and make is not Lethe:
            raise UserError(f"{cell.choice} prunes to a budget, so it cannot have none")
        policy = make(budget=tokens, **common, **changes)
        policy.check_prompt(longest)
        cell.policy = policy
    except UserError as error:
        cell.why = str(error).partition(";")[0]


# -- writing ---------------------------------------------------------------------------------------


class Held:
    """Tokens held in all layers, and tokens seen, added up over the steps of every sequence."""

    def __init__(self, sequences: int):
        self.rows: list[int] = []  # the sequence in each row of the next step
        self.steps, self.held, self.seen = ([0] * sequences for _ in range(3))

    def on_token(self, index: int, token: int) -> None:
        self.rows.append(index)

    def on_finish(self, index: int) -> None:
        self.rows.remove(index)  # the sequence leaves the batch before the step

    def on_step(self, cache) -> None:
        for row, index in enumerate(self.rows):
            self.steps[index] += 1
            self.held[index] += sum(layer.lengths[row] for layer in cache.layers)
            self.seen[index] += cache.seen[row]
        self.rows.clear()


def loops(ids: list[int]) -> bool:
    """Does the text end in the same few tokens over and over?"""
    for period in range(1, min(PERIOD, len(ids) // REPEATS) + 1):
        length = max(REPEATS * period, LOOP)
        if length <= len(ids) and ids[-length:-period] == ids[period - length :]:
            return True
    return False


def write_texts(
    engine: Engine,
    jobs: list,
    put: Callable[[list], None],
    policy: Policy,
    watch: Callable[[KVCache, int], None] | None = None,
    *,
    samples: int,
    sampling: Sampling,
    **options,
) -> bool:
    """jobs: [number, token ids] each -> puts [number, sample, result] each, and at last [None,
    None, what they cost]. watch(cache, tokens written) is called at every step. Options:
    generate's. False: Ctrl-C ended it."""
    held = Held(len(jobs) * samples)

    def on_step(cache) -> None:
        written = len(held.rows)
        held.on_step(cache)
        if watch is not None:
            watch(cache, written)

    def on_finish(index: int, one) -> None:
        held.on_finish(index)
        result = {
            "finish_reason": one.finish_reason,
            "prompt_tokens": one.prompt_tokens,
            "tokens": one.generated_tokens,
            "steps": held.steps[index],
            "held": held.held[index] / engine.model.config.num_hidden_layers,
            "seen": held.seen[index],
            "looped": one.finish_reason != "stop" and loops(one.token_ids),
            "text": one.text,
        }
        put([jobs[index // samples][0], index % samples, result])

    result = engine.generate(
        [ids for _, ids in jobs],
        policy,
        sampling=sampling,
        num_samples=samples,
        on_token=held.on_token,
        on_finish=on_finish,
        on_step=on_step,
        **options,
    )
    stats = result.stats
    cost = {
        "tokens": stats.decode_tokens_per_second * stats.decode_seconds,
        "seconds": stats.decode_seconds,
        "kv_bytes_peak": stats.kv_bytes_peak,
    }
    put([None, None, cost])
    return all(one.finish_reason != "interrupted" for one in result.sequences)


class Bench:
    """Writes and grades what the lines lack, cell by cell.

    options: everything that a text depends on, beside the policy and the prompt. cluster: where it
    is written, in place of the engine.
    """

    def __init__(
        self,
        engine: Engine,
        problems: list[Problem],
        lines: Lines,
        options: dict,
        samples: int = 1,
        batch_size: int = 8,
        task: str = "",
        cluster: Cluster | None = None,
    ):
        self.cluster = cluster
        self.engine, self.problems, self.lines, self.options = engine, problems, lines, options
        self.samples, self.batch_size, self.task = samples, batch_size, task
        self.ids = {p.prompt: engine.text.encode_prompt(p.prompt) for p in problems}
        self.longest = max(map(len, self.ids.values()))

    def settings(self, cell: Cell) -> dict:
        return {**self.options, "policy": cell.facts()}

    def text_key(self, cell: Cell, prompt: str, sample: int) -> dict:
        """All that a text depends on. Two problems with the same prompt share a text."""
        return {**self.settings(cell), "prompt": digest({"text": prompt}), "sample": sample}

    def write(self, cell: Cell, bar: tqdm) -> None:
        """Generates the texts that are missing. Raises KeyboardInterrupt if Ctrl-C ended it."""
        missing = {
            prompt: [
                sample
                for sample in range(self.samples)
                if self.lines.get(self.text_key(cell, prompt, sample)) is None
            ]
            for prompt in self.ids
        }
        # Where one sample of a prompt is missing all are run again, since they share its prefill.
        left = [prompt for prompt, samples in missing.items() if samples]
        bar.update(sum(self.samples - len(samples) for samples in missing.values()))
        if not left:
            return
        jobs = [[number, self.ids[prompt]] for number, prompt in enumerate(left)]
        tokens, start, costs = 0, time.perf_counter(), []

        def on_step(cache, written: int) -> None:
            nonlocal tokens
            tokens += written
            rate, kv = tokens / (time.perf_counter() - start), kv_bytes(cache) / 1e6
            bar.set_postfix_str(f"{rate:.0f} tokens/s, KV {kv:.1f} MB", refresh=False)
            bar.update(0)

        def receive(one: list) -> None:
            """What `write_texts` puts; from a cluster perhaps twice."""
            number, sample, result = one
            if number is None:
                costs.append(result)
            elif sample in missing[left[number]]:
                missing[left[number]].remove(sample)
                self.lines.put(self.text_key(cell, left[number], sample), result)
                bar.update()

        draws = ((name, self.options[name]) for name in DRAWS)
        options = {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "max_new_tokens": self.options["max_new_tokens"],
            "positions": self.options["positions"],
            "sampling": Sampling(**{name: value for name, value in draws if value is not None}),
        }
        parts, ended = len(self.costs(cell)), True
        if self.cluster is None:
            ended = write_texts(self.engine, jobs, receive, cell.policy, on_step, **options)
        else:
            serve = partial(write_texts, policy=cell.policy, **options)
            together = max(1, self.batch_size // self.samples)
            for one in self.cluster.run(serve, jobs, together, cell.policy):
                receive(one)
        cost = {
            "tokens": sum(one["tokens"] for one in costs),
            "seconds": sum(one["seconds"] for one in costs),
            "kv_bytes_peak": max(one["kv_bytes_peak"] for one in costs),
            "batch_size": self.batch_size,
        }
        self.lines.put(self.cost_key(cell, parts), cost)
        if not ended:
            raise KeyboardInterrupt

    def cost_key(self, cell: Cell, part: int) -> dict:
        run = {"batch_size": self.batch_size, "problems": digest({"prompts": list(self.ids)})}
        return {**self.settings(cell), **run, "task": self.task, "part": part}

    def costs(self, cell: Cell) -> list[dict]:
        """What runs have cost so far: one entry, or several where a run was interrupted."""
        found: list[dict] = []
        while (cost := self.lines.get(self.cost_key(cell, len(found)))) is not None:
            found.append(cost)
        return found

    def results(self, cell: Cell, grader: Grader) -> list[list[dict]]:
        """For every problem its samples: the text, `answer` and `score`."""
        return [
            [self.graded(problem, self.text(cell, problem, i), grader) for i in range(self.samples)]
            for problem in self.problems
        ]

    def text(self, cell: Cell, problem: Problem, sample: int) -> dict:
        return self.lines.get(self.text_key(cell, problem.prompt, sample))

    def graded(self, problem: Problem, result: dict, grader: Grader) -> dict:
        """The result with its grade, which is in the lines if the same grader has graded it."""
        package = PACKAGES.get(problem.kind)
        key = {
            "grade": problem.kind,
            "by": package and f"{package} {version(package)}",
            "problem": problem.gym or [problem.answer, problem.choices],
            "text": digest({"text": result["text"]}),
            "finish_reason": result["finish_reason"],
        }
        grade = self.lines.get(key)
        if grade is None:
            ended = result["finish_reason"] == "stop"
            answer = extract(problem.kind, result["text"], ended, problem.choices)
            score, error = grader.score(problem, answer)
            grade = self.lines.put(key, {"answer": answer, "score": score, "error": error})
        return {**result, **grade}

    def run(self, args: argparse.Namespace) -> list[dict]:
        """A row per cell. Raises UserError where no policy fits its budget."""
        cells = make_cells(args, self.longest)
        whys = [cell.why for cell in cells if cell.choice != "full"]
        if whys and all(whys):
            raise UserError(f"{whys[0]}; change --budget or --protect")
        for cell in cells:
            if cell.why:  # said now, since the table may come hours later
                print(f"left out: {cell.choice} at {cell.budget}: {cell.why}", file=sys.stderr)
        found: list[list[list[dict]]] = []
        total = len(self.ids) * self.samples * len(cells)
        with Grader() as grader, tqdm(total=total, unit="text", disable=None, miniters=0) as bar:
            for cell in cells:
                if cell.policy is None and not cell.why:
                    self.settle(cell, args, found[0])
                bar.set_description(f"{cell.choice} {cell.budget}".strip(), refresh=False)
                if cell.policy is None:
                    bar.update(len(self.ids) * self.samples)
                    found.append([])
                    continue
                self.write(cell, bar)
                found.append(self.results(cell, grader))
        full = found[0] if cells[0].choice == "full" else None
        return [self.row(cell, mine, full) for cell, mine in zip(cells, found, strict=True)]

    def settle(self, cell: Cell, args: argparse.Namespace, full: list[list[dict]]) -> None:
        """Gives a cell its policy, from a percentage of the full cache's mean length; of its text
        alone, where the prompt is held on top."""
        held = ["tokens"] if cell.protect else ["prompt_tokens", "tokens"]
        ends = [sum(one[name] for name in held) for samples in full for one in samples]
        tokens = round(sum(ends) / len(ends) * float(cell.budget[:-1]) / 100)
        settle(cell, args, max(1, tokens), self.longest)

    def row(self, cell: Cell, mine: list[list[dict]], full: list[list[dict]] | None) -> dict:
        """What the table says of a cell, or why it has no policy."""
        row = {"choice": cell.choice, "budget": cell.budget, "protect": cell.protect}
        if cell.policy is None:
            return row | {"error": cell.why}
        ones = [one for samples in mine for one in samples]
        held, seen, steps = (sum(one[name] for one in ones) for name in ("held", "seen", "steps"))
        costs, less_full = self.costs(cell), None
        tokens, seconds = (sum(cost[name] for cost in costs) for name in ("tokens", "seconds"))
        if full is not None and full is not mine:
            less_full = interval(mine, full)
        groups: dict[str, list] = {}
        for samples, problem in zip(mine, self.problems, strict=True):
            groups.setdefault(problem.group, []).append(samples)
        return row | {
            "policy": cell.facts(),
            "holds": ratio(held, steps),
            "share": ratio(held, seen),
            "accuracy": interval(mine),
            "less_full": less_full,
            "score": sum(one["score"] for one in ones) / len(ones),
            "tokens": sum(one["tokens"] for one in ones) / len(ones),
            "truncated": sum(one["finish_reason"] != "stop" for one in ones) / len(ones),
            "looped": sum(one["looped"] for one in ones) / len(ones),
            "unmarked": sum(one["answer"] is None for one in ones) / len(ones),
            "not_compared": sum(one["error"] is not None for one in ones),
            "kv_bytes_peak": max((cost["kv_bytes_peak"] for cost in costs), default=None),
            "tokens_per_second": ratio(tokens, seconds),
            "parts": costs,
            "groups": {name: interval(samples) for name, samples in groups.items()},
        }


def ratio(a: float, b: float) -> float | None:
    """a / b, or None where there is nothing to divide by."""
    return a / b if b else None


def interval(mine: list[list[dict]], less: list[list[dict]] | None = None) -> list[float]:
    """[mean, low, high]: the share of right samples; less: minus that of others, paired."""

    def right(samples: list[dict]) -> int:
        return sum(one["score"] >= FULL_MARK for one in samples)

    counts = [len(samples) for samples in mine]
    others = [0] * len(mine) if less is None else map(right, less)
    return mean_with_interval([right(a) - b for a, b in zip(mine, others, strict=True)], counts)


# -- the command line ------------------------------------------------------------------------------

HEADS = (
    "policy", "prompt", "budget", "holds", "accuracy %", "less full's", "tokens", "truncated",
    "looped", "peak KV MB", "tokens/s",
)  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown, a line per row."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|" + "---:|" * (len(HEADS) - 2)]
    for row in rows:
        cells = [row["error"]] + [""] * (len(HEADS) - 4) if "error" in row else figures(row)
        lines.append(f"| {' | '.join(label(row) + cells)} |")
    return "\n".join(lines)


def figures(row: dict) -> list[str]:
    """The cells of a row behind its label; empty where something was not measured."""
    holds = peak = rate = ""
    if row["holds"]:
        holds = f"{row['holds']:.0f} ({row['share']:.0%})"
    if row["kv_bytes_peak"] is not None:
        peak = f"{row['kv_bytes_peak'] / 1e6:,.1f}"
    if row["tokens_per_second"]:
        rate = f"{row['tokens_per_second']:,.1f}"
    return [
        holds,
        percent(row["accuracy"]),
        percent(row["less_full"], "+"),
        f"{row['tokens']:,.0f}",
        f"{row['truncated']:.0%}",
        f"{row['looped']:.0%}",
        peak,
        rate,
    ]


def groups_table(rows: list[dict]) -> str:
    """Accuracy by subject or game; empty if there is only one."""
    good = [row for row in rows if "error" not in row]
    names = list(good[0]["groups"])
    if len(names) < 2:
        return ""
    lines = [f"| accuracy % | prompt | budget | {' | '.join(names)} |"]
    lines.append("|---|---|---:|" + "---:|" * len(names))
    for row in good:
        cells = [percent(row["groups"][name]) for name in names]
        lines.append(f"| {' | '.join(label(row) + cells)} |")
    return "\n".join(lines)


def label(row: dict) -> list[str]:
    """The columns that tell rows apart: policy, prompt, budget."""
    budget = row["budget"]
    if budget.endswith("%") and "policy" in row:
        budget = f"{budget} = {row['policy']['budget']}"
    return [row["choice"], prompt_column(row), budget]


def percent(value: list[float] | None, sign: str = "") -> str:
    """A mean and its interval, in %; sign: "+" writes it also where it is positive."""
    if value is None:
        return ""
    mean, low, high = (f"{100 * x:{sign}.1f}" for x in value)
    return f"{mean} [{low}, {high}]"


def budget_or_none(text: str) -> str:
    """A budget of the command line as it stands. Raises ArgumentTypeError for what is none."""
    return text if text == "none" else budget_text(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--task", required=True, help="math500, mmlu, FILE.jsonl, or gym:NAME,NAME")
    add("--problems", type=int, help="how many, of each subject or game (default: all; gym: 50)")
    add("--subjects", nargs="+", default=SUBJECTS, metavar="NAME", help="of mmlu (default: eight)")
    add("--gym-seed", type=int, default=0, help="of reasoning-gym's problems (default: 0)")
    add("--model", default="demo", help="folder, hub id, or demo (default: %(default)s)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--device", default="auto", help="default: %(default)s")
    add("--dtype", default="auto", help="default: %(default)s")
    add(
        "--compile",
        action="store_true",
        help="use torch.compile: it starts slowly and then runs faster",
    )
    add("--policies", nargs="+", default=POLICIES, choices=CHOICES, metavar="NAME",
        help=f"of {', '.join(CHOICES)} (default: {' '.join(POLICIES)})")  # fmt: skip
    add("--budget", nargs="+", type=budget_or_none, default=["10%"], metavar="N|P%|none",
        help="tokens per layer, share of the full cache, or none (default: 10%%)")  # fmt: skip
    add("--protect", choices=[*PROTECT], default="yes",
        help="keep the whole prompt? (default: %(default)s)")  # fmt: skip
    add("--interval", type=int, default=128, help="tokens between rounds (default: %(default)s)")
    add("--sinks", type=int, default=4, help="first tokens, always kept (default: %(default)s)")
    add("--positions", choices=POSITIONS, default="absolute", help="default: %(default)s")
    add("--max-new-tokens", type=int, default=4096, help="of a text (default: %(default)s)")
    add("--samples", type=int, default=1, help="texts per problem (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="texts at once (default: %(default)s)")
    add("--ray", metavar="local|auto|ADDRESS", help="write on the workers of a Ray cluster, each "
        "at this batch size (extra cluster)")  # fmt: skip
    add("--lines", type=Path, help="JSON Lines file to write to, and to continue from")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    Sampling(args.temperature, top_p=args.top_p, seed=args.seed)  # raises UserError
    for name in ("problems", "samples", "batch_size", "max_new_tokens", "interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("greedy samples are all the same; give --temperature, or one sample")
    if "full" not in args.policies and any(one.endswith("%") for one in args.budget):
        raise UserError("a budget in % needs the full cache's length; add full to --policies")
    args.policies = list(dict.fromkeys(args.policies))
    args.budget = list(dict.fromkeys(args.budget))
    return args


def check_writable(path: Path) -> None:
    """Raises UserError now, not after hours of work."""
    existed = path.exists()
    with writing(path):
        path.open("a").close()
        if not existed:
            path.unlink()


def run(argv: list[str] | None) -> int:
    args = arguments(argv)
    files = [path for path in (args.lines, args.json) if path is not None]
    if len({path.absolute() for path in files}) < len(files):
        raise UserError(f"{files[0]} is named twice; give each output a file of its own")
    for path in files:
        check_writable(path)
    lines = Lines(args.lines)
    problems = load(args.task, args.problems, tuple(args.subjects), args.gym_seed)
    if args.ray is None:
        engine = coder.load(args.model, args.device, args.dtype, args.revision, args.compile)
        cluster, device = None, engine.device.type
    else:
        checkpoint = coder.checkpoint(args.model)
        engine = without_weights(checkpoint, args.device, args.dtype, args.revision)
        engine.name = args.model
        how = (args.device, args.revision, args.compile)
        cluster = Cluster.of(args.ray, engine, coder.load, *how)
        device = cluster.device
    greedy = args.temperature == 0
    options = {
        "model": engine.name,
        "revision": args.revision,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": device,
        "compile": args.compile,
        "positions": args.positions,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": None,
        "seed": None,
    }
    if not greedy:  # else they change nothing
        options |= {"top_p": args.top_p, "seed": args.seed}
    how = (args.samples, args.batch_size, args.task, cluster)
    bench = Bench(engine, problems, lines, options, *how)
    rows = bench.run(args)
    how = "greedy" if greedy else f"temperature {args.temperature}, top-p {args.top_p}"
    print(
        f"{args.task}: {len(problems)} problems, {args.samples} texts each, {how}, at most "
        f"{args.max_new_tokens:,} tokens; {engine.name} in {options['dtype']}, batch "
        f"{args.batch_size}; {hardware()}\n\n{table(rows)}"
    )
    if by_group := groups_table(rows):
        print(f"\n{by_group}")
    if lost := sum(row.get("not_compared", 0) for row in rows):
        print(f"\n{lost} answers could not be compared and count as wrong", file=sys.stderr)
    if args.json is not None:
        packages = ("lethe-mini", "torch", *PACKAGES.values())
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        facts = {"versions": versions, "hardware": hardware(), "problems": len(problems)}
        write_json(args.json, args, facts | {"rows": rows})
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(argv)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; with --lines FILE the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
