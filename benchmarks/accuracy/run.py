r"""Does a pruned cache still reason? Problems solved under every policy, the answers graded.

    python -m benchmarks.accuracy.run --task math500 --model MODEL --policies full lethe h2o \
        --budget 10%
    python -m benchmarks.accuracy.run --task mmlu | FILE.jsonl | gym:NAME,NAME [...]

`math500` and `mmlu` are fetched from the hub (HuggingFaceH4/MATH-500; cais/mmlu, eight subjects).
FILE.jsonl has an object a line: `question` (or `problem`), `answer`, maybe `choices`, `id`,
`subject`; `prompt` instead of `question` is passed on as it stands. `gym:` is reasoning-gym, which
makes its problems itself, --problems of each kind: planning (tower_of_hanoi, shortest_path, jugs),
code (bf, codeio), logic (knights_knaves, syllogism, zebra_puzzles) and a hundred more.

The last answer marked counts: \boxed{}, for letters also "Answer: B", for reasoning-gym <answer>.
math-verify compares formulas; reasoning-gym grades its own, and only the full mark is right. A text
that was cut before it marked an answer is wrong; one that ended may leave the mark out, and its
last line counts.

Every policy has the same problems, draws, interval and sinks; the share of recent tokens is its
own. Budgets are tokens per layer, a percentage of the full cache's mean length (prompt and text, as
measured: `full` runs first), or `none`, where Lethe's Algorithm 1 alone decides. `holds` is what
was kept: tokens per layer, averaged over all steps, and the share of what a full cache would hold.
Intervals are 95 %, by bootstrap over problems; differences are paired, problem by problem. Where
all problems come out alike the bootstrap gives no width; that is no certainty. `looped` texts were
cut while they repeated themselves. Tokens/s are those of decoding at this batch size.

With --lines FILE a run that was interrupted goes on where it was. The file has every text, so that
a newer grader grades it again, and may be shared by runs with other settings, or with more problems
or samples (which move a budget in %). The batch size changes no text, only speed and peak memory.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.accuracy.grading import PACKAGES, Grader, extract, version
from benchmarks.accuracy.problems import SUBJECTS, Problem, load
from benchmarks.common.results import Lines, mean_with_interval, write_json
from benchmarks.memory.batches import hardware
from benchmarks.quality.choices import CHOICES, Cell
from lethe_mini import Engine
from lethe_mini.app.batch import digest
from lethe_mini.errors import UserError
from lethe_mini.generation.requests import POSITIONS
from lethe_mini.generation.sampling import check_sampling
from lethe_mini.generation.stats import kv_bytes
from lethe_mini.policy import FullKV, Lethe

# A loop repeats at most so many tokens, at least so often, and is at least so long.
PERIOD, REPEATS, LOOP = 256, 4, 32
FULL_MARK = 1 - 1e-9  # reasoning-gym's scores are sums of shares
GENERATE = ("max_new_tokens", "temperature", "top_p", "seed", "positions")

# -- cells -----------------------------------------------------------------------------------------


def make_cells(args: argparse.Namespace, longest: int) -> list[Cell]:
    """Every policy at every budget and protection, the full cache once and first; those whose
    budget is a percentage have no policy yet. Where there are other budgets, `none` goes to those
    alone that can do without. longest: tokens of the longest prompt."""
    cells = [Cell("full", "", False, FullKV())] if "full" in args.policies else []
    for budget in args.budget:
        for protect in {"no": [False], "yes": [True], "both": [False, True]}[args.protect]:
            for choice in args.policies:
                if choice != "full":
                    cells.append(Cell(choice, budget, protect, None))
                    if not budget.endswith("%"):
                        settle(cells[-1], args, None if budget == "none" else int(budget), longest)
                    if budget == "none" and cells[-1].why and len(args.budget) > 1:
                        cells.pop()
    return cells


def settle(cell: Cell, args: argparse.Namespace, tokens: int | None, longest: int) -> None:
    """Gives a cell its policy, or the reason why it cannot have one."""
    make, changes = CHOICES[cell.choice]
    common = {"interval": args.interval, "sinks": args.sinks, "protect_prompt": cell.protect}
    try:
        if tokens is None and make not in (Lethe, Lethe.paper):
            raise UserError(f"{cell.choice} prunes to a budget, so none is no choice for it")
        policy = make(budget=tokens, **common, **changes)
        policy.check(longest)
        cell.policy = policy
    except UserError as error:
        cell.why = str(error).partition(";")[0]


# -- writing ---------------------------------------------------------------------------------------


class Held:
    """Tokens held in all layers, and seen, added up over the steps of every sequence."""

    def __init__(self, sequences: int):
        self.rows: list[int] = []  # which sequence each row of the next step is
        self.steps, self.held, self.seen = ([0] * sequences for _ in range(3))

    def on_token(self, index: int, token: int) -> None:
        self.rows.append(index)

    def on_finish(self, index: int) -> None:
        self.rows.remove(index)  # it leaves the batch before the step

    def on_step(self, cache) -> None:
        for row, index in enumerate(self.rows):
            self.steps[index] += 1
            self.held[index] += sum(layer.lengths[row] for layer in cache.layers)
            self.seen[index] += cache.seen[row]
        self.rows.clear()


def loops(ids: list[int]) -> bool:
    """Does it end in the same few tokens over and over?"""
    for period in range(1, min(PERIOD, len(ids) // REPEATS) + 1):
        length = max(REPEATS * period, LOOP)
        if length <= len(ids) and ids[-length:-period] == ids[period - length :]:
            return True
    return False


class Bench:
    """Writes and grades what the lines have not got, cell after cell.

    options: everything, beside the policy and the prompt, that a text depends on.
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
    ):
        self.engine, self.problems, self.lines, self.options = engine, problems, lines, options
        self.samples, self.batch_size, self.task = samples, batch_size, task
        self.ids = {p.prompt: engine.text.encode_prompt(p.prompt) for p in problems}
        self.longest = max(map(len, self.ids.values()))

    def put(self, key: dict, result: dict) -> dict:
        try:
            return self.lines.put(key, result)
        except OSError as error:
            raise UserError(f"cannot write {self.lines.path}: {error.strerror}") from None

    def settings(self, cell: Cell) -> dict:
        return {**self.options, "policy": cell.facts()}

    def text_key(self, cell: Cell, prompt: str, sample: int) -> dict:
        """All that a text depends on. Two problems with one prompt share it."""
        return {**self.settings(cell), "prompt": digest({"text": prompt}), "sample": sample}

    def write(self, cell: Cell, bar: tqdm) -> None:
        """Generates what is missing. Raises KeyboardInterrupt if Ctrl-C ended it."""
        missing = {
            prompt: [
                sample
                for sample in range(self.samples)
                if self.lines.get(self.text_key(cell, prompt, sample)) is None
            ]
            for prompt in self.ids
        }
        # A prompt is run again whole if a sample of it is missing: samples share its prefill.
        left = [prompt for prompt, samples in missing.items() if samples]
        bar.update(sum(self.samples - len(samples) for samples in missing.values()))
        if not left:
            return
        held, tokens, start = Held(len(left) * self.samples), 0, time.perf_counter()

        def on_token(index: int, token: int) -> None:
            nonlocal tokens
            tokens += 1
            held.on_token(index, token)

        def on_step(cache) -> None:
            held.on_step(cache)
            rate, kv = tokens / (time.perf_counter() - start), kv_bytes(cache) / 1e6
            bar.set_postfix_str(f"{rate:.0f} tokens/s, KV {kv:.1f} MB", refresh=False)
            bar.update(0)

        def on_finish(index: int, one) -> None:
            held.on_finish(index)
            prompt, sample = left[index // self.samples], index % self.samples
            if sample not in missing[prompt]:
                return
            layers = self.engine.model.config.num_hidden_layers
            result = {
                "finish_reason": one.finish_reason,
                "prompt_tokens": one.prompt_tokens,
                "tokens": one.generated_tokens,
                "steps": held.steps[index],
                "held": held.held[index] / layers,
                "seen": held.seen[index],
                "looped": one.finish_reason != "stop" and loops(one.token_ids),
                "text": one.text,
            }
            self.put(self.text_key(cell, prompt, sample), result)
            bar.update()

        result = self.engine.generate(
            [self.ids[prompt] for prompt in left],
            cell.policy,
            num_samples=self.samples,
            batch_size=self.batch_size,
            on_token=on_token,
            on_finish=on_finish,
            on_step=on_step,
            **{name: self.options[name] for name in GENERATE if self.options[name] is not None},
        )
        stats, parts = result.stats, len(self.costs(cell))
        cost = {
            "tokens": stats.decode_tokens_per_second * stats.decode_seconds,
            "seconds": stats.decode_seconds,
            "kv_bytes_peak": stats.kv_bytes_peak,
            "batch_size": self.batch_size,
        }
        self.put(self.cost_key(cell, parts), cost)
        if any(one.finish_reason == "interrupted" for one in result.sequences):
            raise KeyboardInterrupt

    def cost_key(self, cell: Cell, part: int) -> dict:
        run = {"batch_size": self.batch_size, "problems": digest({"prompts": list(self.ids)})}
        return {**self.settings(cell), **run, "task": self.task, "part": part}

    def costs(self, cell: Cell) -> list[dict]:
        """What the runs so far cost: one, or several if they were interrupted."""
        found: list[dict] = []
        while (cost := self.lines.get(self.cost_key(cell, len(found)))) is not None:
            found.append(cost)
        return found

    def results(self, cell: Cell, grader: Grader) -> list[list[dict]]:
        """For every problem its samples: what was written, `answer` and `score`."""
        return [
            [self.graded(problem, self.text(cell, problem, i), grader) for i in range(self.samples)]
            for problem in self.problems
        ]

    def text(self, cell: Cell, problem: Problem, sample: int) -> dict:
        return self.lines.get(self.text_key(cell, problem.prompt, sample))

    def graded(self, problem: Problem, result: dict, grader: Grader) -> dict:
        """The result and its grade, from the lines if the same grader has given it."""
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
            grade = self.put(key, {"answer": answer, "score": score, "error": error})
        return {**result, **grade}

    def run(self, args: argparse.Namespace) -> list[dict]:
        """A row per cell. Raises UserError if there is nothing but the full cache that can be."""
        cells = make_cells(args, self.longest)
        whys = [cell.why for cell in cells if cell.choice != "full"]
        if whys and all(whys):
            raise UserError(f"{whys[0]}; change --budget or --protect")
        for cell in cells:
            if cell.why:  # said now, and in the table hours later
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
        """A percentage is one of the full cache's mean length."""
        ends = [one["prompt_tokens"] + one["tokens"] for samples in full for one in samples]
        tokens = round(sum(ends) / len(ends) * float(cell.budget[:-1]) / 100)
        settle(cell, args, max(1, tokens), self.longest)

    def row(self, cell: Cell, mine: list[list[dict]], full: list[list[dict]] | None) -> dict:
        """What the table says of a cell, or why it cannot be."""
        row = {"choice": cell.choice, "budget": cell.budget, "protect": cell.protect}
        if cell.policy is None:
            return row | {"error": cell.why}
        ones = [one for samples in mine for one in samples]
        sums = {name: sum(one[name] for one in ones) for name in ("held", "seen", "steps")}
        costs = self.costs(cell)
        seconds = sum(cost["seconds"] for cost in costs)
        row |= {
            "policy": cell.facts(),
            "holds": sums["held"] / sums["steps"] if sums["steps"] else None,
            "share": sums["held"] / sums["seen"] if sums["seen"] else None,
            "accuracy": interval(mine),
            "less_full": None if full is None or full is mine else interval(mine, full),
            "score": sum(one["score"] for one in ones) / len(ones),
            "tokens": sum(one["tokens"] for one in ones) / len(ones),
            "truncated": sum(one["finish_reason"] != "stop" for one in ones) / len(ones),
            "looped": sum(one["looped"] for one in ones) / len(ones),
            "unmarked": sum(one["answer"] is None for one in ones) / len(ones),
            "not_compared": sum(one["error"] is not None for one in ones),
            "kv_bytes_peak": max((cost["kv_bytes_peak"] for cost in costs), default=None),
            "tokens_per_second": sum(c["tokens"] for c in costs) / seconds if seconds else None,
            "parts": costs,
        }
        names = dict.fromkeys(problem.group for problem in self.problems)
        row["groups"] = {
            name: interval(
                [one for one, p in zip(mine, self.problems, strict=True) if p.group == name]
            )
            for name in names
        }
        return row


def interval(mine: list[list[dict]], less: list[list[dict]] | None = None) -> list[float]:
    """[mean, low, high] of what is right, per problem and sample; less the others', paired."""

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
        start = label(row)
        if "error" in row:
            cells = [row["error"]] + [""] * (len(HEADS) - 4)
        else:
            cells = [
                f"{row['holds']:.0f} ({row['share']:.0%})" if row["holds"] else "",
                percent(row["accuracy"]),
                percent(row["less_full"], "+"),
                f"{row['tokens']:,.0f}",
                f"{row['truncated']:.0%}",
                f"{row['looped']:.0%}",
                "" if row["kv_bytes_peak"] is None else f"{row['kv_bytes_peak'] / 1e6:,.1f}",
                "" if not row["tokens_per_second"] else f"{row['tokens_per_second']:,.1f}",
            ]
        lines.append(f"| {' | '.join(start + cells)} |")
    return "\n".join(lines)


def groups_table(rows: list[dict]) -> str:
    """Accuracy by subject or game; nothing if there is only one."""
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
    """The columns that tell rows apart."""
    prompt = "" if row["choice"] == "full" else "protected" if row["protect"] else "free"
    tokens = row["policy"]["budget"] if row["budget"].endswith("%") and "policy" in row else None
    return [row["choice"], prompt, row["budget"] + (f" = {tokens}" if tokens else "")]


def percent(value: list[float] | None, sign: str = "") -> str:
    return (
        ""
        if value is None
        else "{:{s}.1f} [{:{s}.1f}, {:{s}.1f}]".format(*(100 * x for x in value), s=sign)
    )


def budget(text: str) -> str:
    """A budget as it may be asked for; else ValueError, which argparse reports."""
    number = float(text[:-1]) if text.endswith("%") else 1 if text == "none" else int(text)
    if not 0 < number < (101 if text.endswith("%") else 2**31):
        raise ValueError
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--task", required=True, help="math500, mmlu, FILE.jsonl, or gym:NAME,NAME")
    add("--problems", type=int, help="so many, of each subject or game (default: all; gym: 50)")
    add("--subjects", nargs="+", default=SUBJECTS, metavar="NAME", help="of mmlu (default: eight)")
    add("--gym-seed", type=int, default=0, help="of reasoning-gym's problems (default: 0)")
    add("--model", default="demo", help="folder, hub id, or demo (default: %(default)s)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--device", default="auto", help="default: %(default)s")
    add("--dtype", default="auto", help="default: %(default)s")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster after")
    add("--policies", nargs="+", default=["full", "lethe", "h2o", "streaming", "random"],
        choices=CHOICES, metavar="NAME", help=f"{', '.join(CHOICES)} (default: five)")  # fmt: skip
    add("--budget", nargs="+", type=budget, default=["10%"], metavar="N|P%|none",
        help="tokens a layer, share of the full cache, or none (default: 10%%)")  # fmt: skip
    add("--protect", choices=["no", "yes", "both"], default="yes",
        help="keep the whole prompt? (default: %(default)s)")  # fmt: skip
    add("--interval", type=int, default=128, help="tokens between rounds (default: %(default)s)")
    add("--sinks", type=int, default=4, help="default: %(default)s")
    add("--positions", choices=POSITIONS, default="absolute", help="default: %(default)s")
    add("--max-new-tokens", type=int, default=4096, help="default: %(default)s")
    add("--samples", type=int, default=1, help="texts per problem (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="texts at once (default: %(default)s)")
    add("--lines", type=Path, help="JSON Lines file to write to, and to go on with")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    check_sampling(args.temperature, 0, args.top_p)
    for name in ("problems", "samples", "batch_size", "max_new_tokens", "interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("greedy texts are all the same; give --temperature, or one sample")
    if "full" not in args.policies and any(one.endswith("%") for one in args.budget):
        raise UserError("a budget in % is one of the full cache's length; add full to --policies")
    args.policies = list(dict.fromkeys(args.policies))
    args.budget = list(dict.fromkeys(args.budget))
    return args


def check_writable(path: Path) -> None:
    """Raises UserError now, not after hours of work."""
    existed = path.exists()
    try:
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def open_lines(path: Path | None) -> Lines:
    try:
        return Lines(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} holds other lines than a benchmark's; name another file") from None


def run(argv: list[str] | None) -> int:
    args = arguments(argv)
    files = [path for path in (args.lines, args.json) if path is not None]
    if len({path.absolute() for path in files}) < len(files):
        raise UserError(f"{files[0]} is named twice; give each output a file of its own")
    for path in files:
        check_writable(path)
    lines = open_lines(args.lines)
    problems = load(args.task, args.problems, tuple(args.subjects), args.gym_seed)
    engine = Engine.from_pretrained(
        args.model, args.device, args.dtype, args.revision, args.compile
    )
    greedy = args.temperature == 0
    options = {
        "model": engine.name,
        "revision": args.revision,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "compile": args.compile,
        "positions": args.positions,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": None if greedy else args.top_p,
        "seed": None if greedy else args.seed,
    }
    bench = Bench(engine, problems, lines, options, args.samples, args.batch_size, args.task)
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
        print("interrupted; with --lines FILE the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
