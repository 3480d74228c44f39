"""Decode speed, time to first token and memory: full cache, Lethe, and what people use instead.

    python -m benchmarks.speed.decode [--batch 1 8] [--length 64 4000] [--policies full lethe@8.3]
        [--compile] [--llama-python PYTHON] [--kvpress-python PYTHON] [--json FILE]
    python -m benchmarks.speed.decode --quick                    # fewer repetitions
    python -m benchmarks.speed.decode --targets                  # scoring, rounds, long texts, prefill
    python -m benchmarks.speed.decode --curve --json FILE        # for plot_decode.py
    python -m benchmarks.speed.decode --shape llama-8b --device cuda --batch 1 4 8 16 32 --length 20000

Every system and policy is a process of its own (decode_worker.py) on the same weights, dtype,
threads and prompt. All stay alive and take turns, a few tokens each, so that what else the machine
does hits all alike; only one computes at a time. Figures are medians over all timed steps of all
turns, beside their quartiles; `x full` is the median over turns of our full cache's time (the same
mode; peers: compiled if there is one) divided by that row's. Where all do not fit into memory at
once (--device cuda, large --shape), they run one after the other, which the output says.

`NAME@P` is a policy that after a prompt of --length tokens keeps P percent of them by a round of
its own; steps are timed from there, without rounds, and `with rounds` adds a round's time shared
out over the interval. `must move` is what a step has to read: all weights once and the keys and
values held; `bound` that over the measured read bandwidth, and `reached` bound over time.
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
from benchmarks.speed.decode_worker import SHAPES  # noqa: E402

WORKER = HERE / "decode_worker.py"
PEERS = ("transformers", "llama.cpp", "kvpress")
ROOM = 1024  # tokens that a peer with a fixed context has room for beyond the prompt
WARM = 128  # tokens of a prompt that every worker reads before anything is measured
SHORT = 1.0  # seconds; a prefill below that is measured three times
MB = 1e6


class WorkerError(Exception):
    """A worker has died or does not answer; one line that says which and why."""


# -- one process per system ------------------------------------------------------------------------


class Worker:
    """A process that measures one system. label: its name in the table; policy: likewise."""

    def __init__(self, label: str, policy: str, kind: str, settings: dict, python=sys.executable):
        self.label, self.policy, self.kind = label, policy, kind
        self.settings, self.python = settings, python
        self.facts: dict = {}
        self.process = None
        self.gone: str | None = None  # why it is of no use any more

    @property
    def name(self) -> str:
        return f"{self.label} {self.policy}".strip()

    def start(self) -> None:
        """Starts the process and loads the system; what fails is noted in `gone`."""
        threads = str(self.settings["threads"])
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with the worker)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        argv = [str(self.python), str(WORKER), self.kind]
        try:
            self.process = subprocess.Popen(argv, env=env, text=True, **pipes)
        except OSError as error:
            self.gone = f"cannot start {self.python}: {error}"
            self.errors.close()
            return
        self.lines: queue.Queue = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            self.facts = self.ask("load", settings=self.settings)
        except WorkerError:
            return  # noted
        if "error" in self.facts:
            self.gone = self.facts.pop("error")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, request: str, **options) -> dict:
        """The worker's answer. Raises WorkerError when none comes."""
        if self.gone is not None:
            raise WorkerError(self.gone)
        limit = self.settings["timeout"]
        try:
            self.process.stdin.write(json.dumps({"do": request, **options}) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except OSError:
            line = None
        except queue.Empty:
            self.process.kill()
            self._lost(f"no answer to `{request}` in {limit:.0f} s")
        if line is None:
            code = self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = ", perhaps for want of memory" if code == -9 else ""
            self._lost(f"died in `{request}` ({how}{hint}){self._last_words()}")
        return json.loads(line)

    def _lost(self, why: str) -> None:
        self.gone = why
        raise WorkerError(why)

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    def cpu_seconds(self) -> float:
        """Processor time that it has used; 0 where the system does not say."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except (OSError, AttributeError):
            return 0.0
        after = stat.rpartition(")")[2].split()
        return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # the end of its input is the end of its work
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=2)
        self.process.stdout.close()
        self.errors.close()
        self.process = None


# -- what the machine is and does ------------------------------------------------------------------


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := info.read_text().partition("model name")[2]):
        return found.partition(":")[2].partition("\n")[0].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Of the machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def commit() -> str:
    """The commit that the benchmark was run from, `+` when files have changed since."""

    def git(*args) -> str:
        argv = ["git", "-C", str(WORKER.parent), *args]
        return subprocess.run(argv, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except OSError:
        return ""


def busy_seconds() -> float:
    """Processor time that the whole machine has spent working; 0 where the system does not say."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Load:
    """Who used the processors while a worker had its turn: it alone, one should hope."""

    def __init__(self, cores: int):
        self.cores = cores
        self.idle_workers, self.others, self.wall = 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def turn(self, worker: Worker, workers: list[Worker]):
        mine, rest = worker.cpu_seconds(), sum(w.cpu_seconds() for w in workers if w is not worker)
        busy, start = busy_seconds(), time.perf_counter()
        yield
        self.wall += time.perf_counter() - start
        idle = sum(w.cpu_seconds() for w in workers if w is not worker) - rest
        self.idle_workers += idle
        self.others += busy_seconds() - busy - (worker.cpu_seconds() - mine) - idle

    def shares(self) -> dict:
        """Of all processor time during turns."""
        whole = max(self.wall * self.cores, 1e-9)
        shares = {"idle_workers": self.idle_workers, "others": self.others}
        return {name: max(0.0, seconds / whole) for name, seconds in shares.items()}


# -- rows ------------------------------------------------------------------------------------------


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def bytes_to_move(facts: dict, state: dict) -> int:
    """What one step must read: every weight once, the keys and values of all tokens held."""
    return facts["weight_bytes"] + state["kv_bytes"]


def make_row(worker: Worker, cell: dict, fill: dict, turns: list[dict], bandwidth: float) -> dict:
    """A row of the table. cell: batch and length; turns: the answers to `steps`; bandwidth: bytes
    per second. Times in seconds."""
    row = {"system": worker.label, "policy": worker.policy, **cell}
    problem = next((x for x in (fill, *turns) if "error" in x), None)
    if problem is not None:
        row["out_of_memory"] = problem.get("out_of_memory", False)
        return {**row, "error": problem["error"]}
    steps = [seconds for turn in turns for seconds in turn["step_seconds"]]
    low, middle, high = quartiles(steps)
    last = turns[-1]
    # Between the first and the last step the cache grows by one token a step.
    mean = {"kv_bytes": (fill["kv_bytes"] + last["kv_bytes"]) / 2}
    move = bytes_to_move(worker.facts, mean)
    row |= {
        "first_token_seconds": fill["seconds"],
        "step_seconds": middle,
        "step_quartiles": [low, high],
        "turn_medians": [statistics.median(turn["step_seconds"]) for turn in turns],
        "tokens_per_second": cell["batch"] / middle,
        "tokens_held": last["tokens"],
        "kv_bytes": last["kv_bytes"],
        "kv_allocated": last["kv_allocated"],
        "memory_peak": max(turn["peak"] for turn in (fill, *turns)),
        "bytes_to_move": move,
        "bandwidth": bandwidth,
        "bound_seconds": move / bandwidth,
        "reached": move / bandwidth / middle,
        "chosen": last["chosen"],
    }
    if rounds := fill.get("round_seconds"):
        row["round_seconds"] = statistics.median(rounds)
        row["step_with_rounds"] = middle + row["round_seconds"] / worker.settings["interval"]
    return row


def find(rows: list[dict], **keys) -> dict | None:
    """The row with these values that has been measured."""
    matches = (r for r in rows if all(r.get(key) == value for key, value in keys.items()))
    return next((row for row in matches if "error" not in row), None)


def baseline(rows: list[dict], row: dict) -> dict | None:
    """Our full cache at the same batch and length: in the row's mode, for peers in the better."""
    modes = [row["system"]] if row["system"].startswith("ours") else ["ours compiled", "ours eager"]
    cell = {"batch": row["batch"], "length": row["length"], "policy": "full"}
    found = (find(rows, system=mode, **cell) for mode in modes)
    return next((one for one in found if one is not None), None)


def speedup(of: dict, against: dict, together: bool = True) -> float:
    """How many times as fast `of` is. In turns that lie side by side the machine was the same, so
    the median of their ratios; else the ratio of medians."""
    if not together:
        return against["step_seconds"] / of["step_seconds"]
    pairs = zip(against["turn_medians"], of["turn_medians"], strict=True)
    return statistics.median(b / a for b, a in pairs)


HEADER = (
    "| batch | length | system | policy | held | ms a step | quartiles | with rounds | tokens/s | "
    "x full | first token s | KV MB | peak MB | must move MB | bound ms | reached |\n"
    "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def table_row(row: dict) -> str:
    """A line of the table."""
    head = f"| {row['batch']} | {row['length']:,} | {row['system']} | {row['policy']} |"
    if "error" in row:
        said = "out of memory" if row.get("out_of_memory") else row["error"]
        return head + f" {said} |" + " |" * 11
    low, high = (1e3 * seconds for seconds in row["step_quartiles"])
    rounds = f"{1e3 * row['step_with_rounds']:.2f}" if "step_with_rounds" in row else ""
    ratio = f"{row['times_full']:.2f}" if row.get("times_full") else ""
    cells = [
        f"{row['tokens_held']:,.0f}",
        f"{1e3 * row['step_seconds']:.2f}",
        f"{low:.2f} to {high:.2f}",
        rounds,
        f"{row['tokens_per_second']:.1f}",
        ratio,
        f"{row['first_token_seconds']:.2f}",
        f"{row['kv_bytes'] / MB:,.1f}",
        f"{row['memory_peak'] / MB:,.0f}",
        f"{row['bytes_to_move'] / MB:,.0f}",
        f"{1e3 * row['bound_seconds']:.2f}",
        f"{row['reached']:.0%}",
    ]
    return f"{head} {' | '.join(cells)} |"


def by_batch(rows: list[dict]) -> str:
    """Throughput and peak memory, policies down and batch sizes across, as the paper's tables have
    them (arXiv 2511.06029, tables 2 and 3)."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        for title, key, scale, form in (
            ("tokens/s", "tokens_per_second", 1, "{:,.1f}"),
            ("peak GB", "memory_peak", 1e9, "{:,.2f}"),
        ):
            lines += ["", f"{title} at {length:,} tokens by batch size", ""]
            lines.append("| system | policy | " + " | ".join(map(str, batches)) + " |")
            lines.append("|---|---|" + "---:|" * len(batches))
            for kind in dict.fromkeys((row["system"], row["policy"]) for row in rows):
                cells = []
                for batch in batches:
                    keys = {"system": kind[0], "policy": kind[1], "batch": batch, "length": length}
                    row = next((r for r in rows if r.items() >= keys.items()), None)
                    if row is None or "error" in row:
                        full = row is not None and row.get("out_of_memory")
                        cells.append("out of memory" if full else "-")
                    else:
                        cells.append(form.format(row[key] / scale))
                lines.append(f"| {kind[0]} | {kind[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement(rows: list[dict]) -> list[str]:
    """How many tokens from the start every system chose as our full cache did: bfloat16 rounds
    differently everywhere, but a system that disagrees at once runs other weights."""
    lines = []
    for row in rows:
        base = None if "error" in row else baseline(rows, row)
        if base is None or row["system"].startswith("ours"):
            continue
        if row["batch"] != 1 or row["policy"] != "full":
            continue
        pairs = list(zip(base["chosen"], row["chosen"], strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        where = f"{row['system']} {row['policy']} at {row['length']:,}"
        lines.append(f"{where}: the first {same} of {len(pairs)} tokens are ours")
    return lines


# -- the run ---------------------------------------------------------------------------------------


class Bench:
    """All workers, and what they have measured so far."""

    def __init__(self, args: argparse.Namespace, out=print):
        self.args, self.out = args, out
        self.rows: list[dict] = []
        self.targets: list[dict] = []
        self.curve: list[dict] = []
        self.notes: list[str] = []
        self.bandwidths: list[float] = []
        self.versions: dict[str, dict] = {}
        self.loads: dict[str, dict] = {}
        self.load = Load(os.cpu_count() or 1)
        self.workers: list[Worker] = []
        self.settings = {
            "folder": None,
            "shape": args.shape,
            "device": args.device,
            "dtype": args.dtype,
            "threads": args.threads,
            "interval": args.interval,
            "timeout": args.timeout,
            "bandwidth_bytes": args.bandwidth_mb * 1_000_000,
            "room": ROOM,
            "budget": None,
            "share": None,
        }
        self.machine = Worker("machine", "", "machine", self.settings)

    # -- workers --

    def start(self) -> None:
        """What the machine is; the checkpoint."""
        self._start(self.machine)
        if self.machine.gone:
            raise WorkerError(self.machine.gone)
        if self.args.shape is None:
            reply = self._checked(self.machine.ask("folder", model=self.args.model))
            self.settings["folder"] = reply["folder"]

    def _start(self, worker: Worker) -> None:
        self.workers.append(worker)
        worker.start()
        facts = dict(worker.facts)
        self.versions[worker.kind] = facts.pop("versions", {})
        self.loads[worker.name] = facts
        if worker.gone:
            self.note(f"{worker.name}: {worker.gone}")
        elif worker is not self.machine:  # the first prefill of a process sets things up
            with contextlib.suppress(WorkerError):
                worker.ask("fill", ids=self.prompt(WARM), batch=1)
                worker.ask("drop")

    def _checked(self, reply: dict) -> dict:
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []

    def note(self, line: str) -> None:
        self.notes.append(line)
        self.out(f"({line})")

    def ours(self, policy: str, compiled: bool, **more) -> Worker:
        """A worker for this package. policy: NAME or NAME@PERCENT."""
        name, _, percent = policy.partition("@")
        share = float(percent) / 100 if percent else None
        settings = {"policy": name, "share": share, "compile": compiled, **more}
        mode = "ours compiled" if compiled else "ours eager"
        return Worker(mode, policy, "ours", {**self.settings, **settings})

    def modes(self) -> list[bool]:
        """Eager, compiled: which of the two."""
        return [False] * self.args.eager + [True] * self.args.compile

    def grid_workers(self) -> list[Worker]:
        """All systems of the grid. Our full cache comes first: the others are compared with it."""
        args = self.args
        policies = sorted(args.policies, key=lambda policy: policy != "full")
        workers = [self.ours(policy, mode) for mode in self.modes() for policy in policies]
        share = next((float(p.partition("@")[2]) for p in policies if "@" in p), 8.3)
        for peer in args.peers:
            if peer == "transformers":
                workers.append(Worker(peer, "full", peer, self.settings))
            elif peer == "kvpress":
                settings = {**self.settings, "share": share / 100}
                python = args.kvpress_python or sys.executable
                workers.append(Worker(peer, f"snapkv@{share:g}", peer, settings, python))
            elif (args.model != "demo" and args.gguf is None) or args.shape is not None:
                self.note("llama.cpp is left out: it needs the demo, or --gguf with these weights")
            else:
                gguf = args.gguf or self._checked(self.machine.ask("gguf"))["path"]
                python = args.llama_python or sys.executable
                for flash in args.llama_flash:
                    settings = {**self.settings, "gguf": str(gguf), "flash": flash}
                    label = peer if flash == "auto" else f"{peer} -fa {flash}"
                    workers.append(Worker(label, "full", peer, settings, python))
        return workers

    # -- turns --

    def bandwidth(self) -> float:
        """Bytes per second, now."""
        reply = self._checked(self.machine.ask("bandwidth"))
        self.bandwidths.append(reply["bytes_per_second"])
        return self.bandwidths[-1]

    def ask(self, worker: Worker, request: str, **options) -> dict:
        """An answer, with an eye on who else computes; what fails is an answer with `error`."""
        try:
            with self.load.turn(worker, self.workers):
                reply = worker.ask(request, **options)
        except WorkerError as error:
            return {"error": str(error)}
        if "error" in reply and not reply.get("out_of_memory"):
            self.note(f"{worker.name}: {reply['error']}")
        return reply

    def prompt(self, tokens: int) -> list[int]:
        where = {"folder": self.settings["folder"], "shape": self.args.shape}
        return self._checked(self.machine.ask("prompt", tokens=tokens, **where))["ids"]

    def fill(self, worker: Worker, ids: list[int], batch: int) -> dict:
        """The answer to `fill`; where that is short, the time is the median of three."""
        replies = [self.ask(worker, "fill", ids=ids, batch=batch)]
        while len(replies) < 3 and replies[0].get("seconds", SHORT) < SHORT:
            replies.append(self.ask(worker, "fill", ids=ids, batch=batch))
        if "error" not in replies[-1]:
            replies[-1]["seconds"] = statistics.median(reply["seconds"] for reply in replies)
        return replies[-1]

    def cell(self, workers: list[Worker], batch: int, length: int, show: bool = True) -> list[dict]:
        """One batch size and length: every worker fills its cache, then they take turns."""
        args, ids = self.args, self.prompt(length)
        fills, turns, here = {}, {worker: [] for worker in workers}, []
        for worker in workers:
            fills[worker] = self.fill(worker, ids, batch)
            if "error" not in fills[worker]:
                # The first steps compile, or touch memory for the first time.
                start = time.perf_counter()
                first = self.ask(worker, "steps", count=0, warm=2)
                if worker.settings.get("compile"):
                    fills[worker]["compile_seconds"] = time.perf_counter() - start
                if "error" in first:
                    fills[worker] = first
        live = [worker for worker in workers if "error" not in fills[worker]]
        for turn in range(args.reps if live else 0):
            here.append(self.bandwidth())
            shift = turn % len(live)
            for worker in live[shift:] + live[:shift]:
                if not any("error" in reply for reply in turns[worker]):
                    turns[worker].append(self.ask(worker, "steps", count=args.steps))
        rows, middle = [], statistics.median(here or self.bandwidths or [1.0])
        for worker in workers:
            cell = {"batch": batch, "length": length}
            row = make_row(worker, cell, fills[worker], turns[worker], middle)
            if "compile_seconds" in fills[worker]:
                row["first_steps_seconds"] = fills[worker]["compile_seconds"]
            self.rows.append(row)
            rows.append(row)
            base = None if "error" in row else baseline(self.rows, row)
            if base is not None and len(base["turn_medians"]) == len(row["turn_medians"]):
                row["times_full"] = speedup(row, base, together=not args.one_at_a_time)
            if show:
                self.out(table_row(row))
        for worker in workers:
            if not worker.gone:
                self.ask(worker, "drop")
        return rows

    def grid(self) -> None:
        args, workers = self.args, self.grid_workers()
        self.out(f"\n{HEADER}")
        for group in [[worker] for worker in workers] if args.one_at_a_time else [workers]:
            for worker in group:
                self._start(worker)
            for length in args.length:
                for batch in args.batch:
                    self.cell(group, batch, length)
            for worker in group:
                worker.close()
                self.workers.remove(worker)

    # -- questions --

    def target(self, what: str, value: float, form: str, **facts) -> None:
        self.targets.append({"what": what, "value": value, "text": form.format(value), **facts})
        self.out(f"| {what} | {form.format(value)} |")

    def from_grid(self) -> None:
        """What the grid's rows say about systems side by side."""
        rows = self.rows
        for row in rows:
            base = None if "error" in row else baseline(rows, row)
            if base is None or base is row:
                continue
            where = f"batch {row['batch']}, {row['length']:,} tokens"
            if row["system"].startswith("ours"):
                what = f"{row['system']}: {row['policy']} against full cache, {where}"
                self.target(what, row["times_full"], "{:.2f}x")
                continue
            what = f"{base['system']}: full cache against {row['system']} {row['policy']}, {where}"
            self.target(what, 1 / row["times_full"], "{:.2f}x")
            for other in rows:
                cell = (other["batch"], other["length"]) == (row["batch"], row["length"])
                pruned = other["system"] == base["system"] and other["policy"] != "full"
                if cell and pruned and "error" not in other and row["policy"] == "full":
                    ratio = speedup(other, row, together=not self.args.one_at_a_time)
                    what = f"{other['system']}: {other['policy']} against {row['system']}, {where}"
                    self.target(what, ratio, "{:.2f}x")

    def run_targets(self) -> None:
        self.out("\n| what | measured |\n|---|---:|")
        self.from_grid()
        for compiled in self.modes():
            self.questions(compiled)

    def questions(self, compiled: bool) -> None:
        """What the grid does not say, of one mode."""
        pair = self.ours("full", compiled), self.ours("lethe@100", compiled)
        try:
            with self.team(*pair) as (full, lethe):
                self.scoring(full, lethe)
                self.prefill(full, lethe)  # before the other settings of the next two
                self.rounds(lethe)
                self.long_text(lethe)
        except WorkerError as error:
            self.note(f"the rest of these questions: {error}")

    @contextlib.contextmanager
    def team(self, *workers: Worker):
        """Workers for one question."""
        for worker in workers:
            self._start(worker)
            if worker.gone:
                raise WorkerError(worker.gone)
        yield list(workers)
        for worker in workers:
            worker.close()
            self.workers.remove(worker)

    def scoring(self, full: Worker, lethe: Worker) -> None:
        """A step of Lethe that never prunes against one of the full cache, at equal length."""
        for batch in self.args.batch:
            pair = self.cell([full, lethe], batch, self.args.target_length, show=False)
            if not any("error" in row for row in pair):
                where = f"batch {batch}, {self.args.target_length:,} tokens"
                cost = 1 / speedup(pair[1], pair[0]) - 1
                self.target(f"{full.label}: cost of scoring a step, {where}", cost, "{:+.1%}")

    def prefill(self, full: Worker, lethe: Worker) -> None:
        """Time with scores against without; how the peak grows with the prompt."""
        args, seconds = self.args, {full: [], lethe: []}
        ids, middle = self.prompt(max(args.prefill)), args.prefill[len(args.prefill) // 2]
        for turn in range(max(2, args.reps // 2)):
            for worker in (full, lethe) if turn % 2 else (lethe, full):
                reply = self._checked(self.ask(worker, "fill", ids=ids[:middle], batch=1))
                seconds[worker].append(reply["seconds"])
        pairs = zip(seconds[full], seconds[lethe], strict=True)
        ratio = statistics.median(with_scores / without for without, with_scores in pairs)
        facts = {"seconds": [statistics.median(seconds[worker]) for worker in (full, lethe)]}
        what = f"{full.label}: prefill of {middle:,} tokens, with scores against without"
        self.target(what, ratio, "{:.2f}x", **facts)
        for worker in (full, lethe):
            self._checked(self.ask(worker, "drop"))
            for tokens in args.prefill:
                reply = self._checked(self.ask(worker, "fill", ids=ids[:tokens], batch=1))
                grown = (reply["peak"] - worker.facts["resident"]) / MB
                with_scores = "with" if worker is lethe else "without"
                what = f"{full.label}: growth in prefill {with_scores} scores, {tokens:,} tokens"
                self.target(what, grown, "{:,.0f} MB", kv_bytes=reply["kv_bytes"])

    def rounds(self, lethe: Worker) -> None:
        """Time in rounds: two intervals of a real run from --target-length tokens on."""
        args = self.args
        budget = max(16, round(0.083 * args.target_length))
        self._checked(self.ask(lethe, "configure", share=None, budget=budget))
        for batch in args.batch:
            ids = self.prompt(args.target_length)
            self._checked(self.ask(lethe, "fill", ids=ids, batch=batch))
            reply = self._checked(self.ask(lethe, "decode", count=2 * args.interval))
            steps, rounds = sum(reply["step_seconds"]), reply["rounds_total"]
            what = (
                f"{lethe.label}: share of decode in rounds, batch {batch}, budget {budget} of "
                f"{args.target_length:,}, interval {args.interval}"
            )
            facts = {"round_seconds": reply["round_seconds"], "step_seconds": steps}
            self.target(what, rounds / (steps + rounds), "{:.1%}", **facts)

    def long_text(self, lethe: Worker) -> None:
        """Time per token late in a long text against early, windows in turn."""
        args = self.args
        budget, (early, late), seen = args.budget, args.long, 16
        changes = {"share": None, "budget": budget, "positions": "compact"}
        self._checked(self.ask(lethe, "configure", **changes))
        self._checked(self.ask(lethe, "fill", ids=self.prompt(seen), batch=1))
        for goal, then in ((early, "snapshot"), (late, "swap")):
            while seen < goal:  # in pieces, so that none outlasts the limit
                count = min(500, goal - seen)
                self._checked(self.ask(lethe, "decode", count=count))
                seen += count
            self._checked(self.ask(lethe, then))
        windows: list[list[float]] = [[], []]  # early, late: seconds a token
        for turn in range(2 * args.windows):
            reply = self._checked(self.ask(lethe, "decode", count=2 * args.interval))
            rounds = reply["rounds_total"] / len(reply["step_seconds"])
            windows[turn % 2] += [seconds + rounds for seconds in reply["step_seconds"]]
            self._checked(self.ask(lethe, "swap"))
        first, last = (statistics.median(seconds) for seconds in windows)
        what = f"{lethe.label}: time per token at {late:,} against {early:,}, budget {budget}"
        self.target(what, last / first, "{:.3f}x", ms=[1e3 * first, 1e3 * last])

    def run_curve(self) -> None:
        """Time per token and memory while a text grows, all workers in turn, window by window."""
        args = self.args
        batch, prompt, windows = args.batch[0], 64, 40
        names = [("full", {}), ("lethe", {"budget": args.budget})]
        team = [self.ours(name, mode, **more) for mode in self.modes() for name, more in names]
        window = max(1, (args.curve_tokens - prompt) // windows)
        with self.team(*team):
            for worker in team:
                reply = self.ask(worker, "fill", ids=self.prompt(prompt), batch=batch)
                self._checked(reply)
                self._checked(self.ask(worker, "decode", count=2))
                facts = {"system": worker.label, "policy": worker.policy, "batch": batch}
                budget = worker.settings["budget"]
                self.curve.append({**facts, "budget": budget, "window": window, "points": []})
            for turn in range(windows):
                self.bandwidth()
                for worker, line in zip(team, self.curve, strict=True):
                    reply = self._checked(self.ask(worker, "decode", count=window))
                    rounds = reply["rounds_total"] / window
                    line["points"].append(
                        {
                            "tokens": reply["seen"],
                            "ms": 1e3 * (statistics.median(reply["step_seconds"]) + rounds),
                            "kv_bytes": reply["kv_bytes"],
                            "kv_allocated": reply["kv_allocated"],
                            "memory_peak": reply["peak"],
                        }
                    )
                if turn % 8 == 7 or turn == 0:
                    self._show_curve(reply["seen"])

    def _show_curve(self, seen: int) -> None:
        for line in self.curve:
            point = line["points"][-1]
            sizes = f"KV {point['kv_bytes'] / MB:,.1f} MB"
            who = f"{line['system']} {line['policy']}"
            self.out(f"{seen:>7,} tokens  {who:<22} {point['ms']:7.2f} ms a token, {sizes}")

    # -- the end --

    def report(self) -> dict:
        """Everything, for JSON."""
        hardware = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "system": platform.platform(),
            **{key: self.machine.facts.get(key) for key in ("gpu", "gpu_memory")},
        }
        middle = quartiles(self.bandwidths) if self.bandwidths else [0.0, 0.0, 0.0]
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(self.args).items()}
        return {
            "settings": settings,
            "hardware": hardware,
            "versions": {"python": platform.python_version(), **self.versions},
            "commit": commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "bandwidth": {"median": middle[1], "quartiles": [middle[0], middle[2]]},
            "processor_shares": self.load.shares(),
            "loaded": self.loads,
            "rows": self.rows,
            "targets": self.targets,
            "curve": self.curve,
            "notes": self.notes,
        }

    def head(self) -> str:
        args, facts = self.args, self.machine.facts
        gpu = f", {facts['gpu']}" if facts.get("gpu") else ""
        model = f"random weights in the shape of {args.shape}" if args.shape else args.model
        lines = [
            f"{model}, {args.dtype} on {args.device}, {args.threads} threads, commit {commit()}",
            f"{processor()}, {os.cpu_count()} cores, {memory_bytes() / 1e9:.0f} GB{gpu}; Python "
            f"{platform.python_version()}, torch {facts['versions']['torch']}",
        ]
        if args.shape:
            lines.append(
                "no checkpoint: prompts are random ids, and scores are put in before each round in "
                "the shape of a trained model's (a few sinks, a decaying tail); read speed and "
                "memory here, nothing else"
            )
        if args.one_at_a_time:
            lines.append("systems run one after the other, so ratios are of medians, not of turns")
        return "\n".join(lines)

    def tail(self) -> str:
        report, lines = self.report(), []
        if len({row["batch"] for row in self.rows}) > 2:
            lines.append(by_batch(self.rows))
        low, high = (rate / 1e9 for rate in report["bandwidth"]["quartiles"])
        lines.append(
            f"\nread bandwidth {report['bandwidth']['median'] / 1e9:.1f} GB/s (quartiles {low:.1f} "
            f"to {high:.1f}, {len(self.bandwidths)} times between the turns)"
        )
        shares = report["processor_shares"]
        lines.append(
            f"during turns {shares['idle_workers']:.1%} of the processors went to workers that "
            f"waited, {shares['others']:.1%} to other programs"
        )
        first = {r["system"] + " " + r["policy"]: r["first_steps_seconds"] for r in self.rows[::-1]
                 if "first_steps_seconds" in r}  # fmt: skip
        if first:
            each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in first.items())
            lines.append(f"the first two steps, compiling included: {each}")
        for kind, versions in self.versions.items():
            named = {k: v for k, v in versions.items() if k != "torch" or kind != "machine"}
            if named and kind not in ("ours", "machine"):
                lines.append(f"{kind}: " + ", ".join(f"{k} {v}" for k, v in named.items()))
        lines += agreement(self.rows)
        if self.notes:
            lines.append("not measured: " + "; ".join(dict.fromkeys(self.notes)))
        return "\n".join(lines)


# -- the command line ------------------------------------------------------------------------------


def weights_estimate(shape: str) -> int:
    """Bytes of a geometry in a dtype of two bytes."""
    s = SHAPES[shape]
    hidden, D = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = hidden * (2 * hidden + 2 * s["num_key_value_heads"] * D)
    layer = attention + 3 * hidden * s["intermediate_size"]
    ends = s["vocab_size"] * hidden * (1 if s["tie_word_embeddings"] else 2)
    return 2 * (s["num_hidden_layers"] * layer + ends)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="a folder, a hub id or demo (default: %(default)s)")
    add("--shape", choices=[*SHAPES], help="random weights of this geometry instead")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    add("--threads", type=int, help="default: as many as there are cores")
    add("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    add("--length", type=int, nargs="+", default=[64, 4000], help="default: 64 4000")
    add("--policies", nargs="+", default=["full", "lethe@8.3"], metavar="NAME[@PERCENT]")
    add("--interval", type=int, default=128, help="tokens between rounds (default: 128)")
    add("--compile", action="store_true", help="also measure this package compiled")
    add("--no-eager", dest="eager", action="store_false", help="and not eager")
    add("--peers", nargs="*", choices=PEERS, help="default: transformers, and what has a python")
    add("--llama-python", help="interpreter that has llama-cpp-python")
    add("--llama-flash", nargs="+", default=["auto", "off"], choices=["auto", "on", "off"])
    add("--gguf", type=Path, help="the same weights for llama.cpp; default: the demo's")
    add("--kvpress-python", help="interpreter that has kvpress")
    add("--reps", type=int, default=9, help="turns of each system in a cell (default: 9)")
    add("--steps", type=int, default=5, help="timed steps in a turn (default: 5)")
    add("--one-at-a-time", action="store_true", help="one worker after the other; saves memory")
    add("--quick", action="store_true", help="3 turns of 3 steps")
    add("--targets", action="store_true", help="also scoring, rounds, prefill, long texts")
    add("--no-grid", dest="grid", action="store_false", help="with --targets: these alone")
    add("--target-length", type=int, default=4096, help="for --targets (default: 4096)")
    add("--prefill", type=int, nargs="+", default=[2000, 4000, 8000], help="for --targets")
    add("--long", type=int, nargs=2, default=[2000, 16000], help="for --targets: early, late")
    add("--windows", type=int, default=4, help="of each kind, for --targets (default: 4)")
    add("--budget", type=int, default=512, help="for --curve and --long (default: 512)")
    add("--curve", action="store_true", help="instead: time per token against generated length")
    add("--curve-tokens", type=int, default=4000, help="default: %(default)s")
    add("--bandwidth-mb", type=int, default=1000, help="block to read (default: 1000)")
    add("--timeout", type=float, default=900, help="seconds a worker may take for an answer")
    add("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    args.threads = args.threads or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    if args.quick:
        args.reps, args.steps = 3, 3
    least = (*args.batch, *args.length, *args.prefill, *args.long, args.reps, args.steps)
    if min(*least, args.windows, args.interval, args.budget, args.threads) < 1:
        parser.error("sizes and counts should be at least 1")
    if max(args.reps * (args.steps + 1) + 2, 0) > ROOM:
        parser.error(f"--reps x --steps should stay below {ROOM}")
    if not args.eager and not args.compile:
        parser.error("--no-eager leaves nothing to measure without --compile")
    if args.peers is None:
        args.peers = ["transformers"]
        args.peers += ["llama.cpp"] if args.llama_python else []
        args.peers += ["kvpress"] if args.kvpress_python else []
    check_policies(parser, args)
    workers = len(args.policies) * (args.eager + args.compile) + len(args.peers)
    large = args.shape is not None and workers * weights_estimate(args.shape) > memory_bytes() / 2
    args.one_at_a_time |= args.device.startswith("cuda") or large
    return args


def check_policies(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from lethe_mini.policies import POLICIES

    for policy in args.policies:
        name, _, percent = policy.partition("@")
        try:
            fits = not percent or 0 < float(percent) <= 100
        except ValueError:
            fits = False
        if name not in POLICIES or not fits:
            known = ", ".join(POLICIES)
            parser.error(f"--policies: {policy!r} is not NAME or NAME@PERCENT; names: {known}")
        if (name == "full") == bool(percent):
            parser.error(f"--policies: {policy!r}: full takes no percentage, the others need one")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
    bench = Bench(args, out=lambda line: print(line, flush=True))
    code = 0
    try:
        bench.start()
        bench.out(bench.head())
        if args.curve:
            bench.run_curve()
        elif args.grid:
            bench.grid()
        if args.targets and not args.curve:
            bench.run_targets()
    except KeyboardInterrupt:
        code = 130
        for another in (signal.SIGINT, signal.SIGTERM):  # would stop the partial table
            signal.signal(another, signal.SIG_IGN)
        bench.note("interrupted: what is above is all there is")
    except WorkerError as error:
        code = 1
        bench.note(f"stopped: {error}")
    finally:
        bench.close()
    if bench.bandwidths:
        bench.out(bench.tail())
    if args.json is not None:
        args.json.write_text(json.dumps(bench.report(), indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
