"""Decoding speed, time to the first token and memory: full cache, LethePlus, other engines.

    python -m benchmarks.speed.decode [--batch 1 8] [--length 64 4000] [--compile] [--json FILE]
        [--policies full lethe-plus@8.3] [--llama-python PYTHON] [--kvpress-python PYTHON]
    python -m benchmarks.speed.decode --quick          # fewer repetitions
    python -m benchmarks.speed.decode --targets        # scoring, rounds, long texts, prefill, too
    python -m benchmarks.speed.decode --curve --json FILE                # for plot_decode
    python -m benchmarks.speed.decode --shape llama-8b --device cuda --batch 1 4 8 16 32

Every system and policy runs in a process of its own (decode_worker.py), with the same weights,
dtype, threads and prompt. All processes stay alive and take turns of a few tokens, and only one
computes at a time. So other programs on the machine slow all of them alike. A figure is the median
over all timed steps of all turns, with its quartiles. `x full` is how many times as fast a row is
as our full cache: the median over turns of the ratio. Ours are compared in their own mode, other
engines with our compiled mode where it runs. With --device cuda, and for a large --shape, not all
systems fit into memory. They then run one after the other, and the output says so.

`NAME@P` is a policy with a budget of P percent of --length tokens. It prunes once, behind the
prompt, and the steps are timed from there on, without rounds. `with rounds` adds a round's time,
divided by the interval. `must move` is what a step has to read: all weights once, and the keys and
values held. `bound` is the time that this takes at the measured read bandwidth. `reached` is bound
divided by time.
"""

import argparse
import contextlib
import os
import platform
import signal
import statistics
import sys
import time
from pathlib import Path

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import commit, hardware, memory_bytes, processor
from benchmarks.common.results import write_json
from benchmarks.speed.rows import (
    HEADER,
    MB,
    agreement,
    baseline,
    by_batch,
    make_row,
    quartiles,
    speedup,
    table_row,
)
from benchmarks.speed.shapes import SHAPES, weights_estimate
from benchmarks.speed.workers import Load, Worker, WorkerError
from lethe_mini.policies import POLICIES

PEERS = ("transformers", "pruned", "llama.cpp", "kvpress")
ROOM = 1024  # tokens beyond the prompt, for an engine with a context of fixed size
WARM = 128  # tokens of a prompt that every worker reads before anything is measured
SHORT = 1.0  # seconds; a shorter prefill is measured three times


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
        """Asks what the machine is, and finds the checkpoint."""
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
        elif worker is not self.machine:  # a process's first prefill takes longer
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
        """Whether compiled, of each mode that is asked for."""
        asked = {False: self.args.eager, True: self.args.compile}
        return [compiled for compiled, wanted in asked.items() if wanted]

    def grid_workers(self) -> list[Worker]:
        """All systems of the grid; our full cache first, since the others are compared with it."""
        args = self.args
        policies = sorted(args.policies, key=lambda policy: policy != "full")
        workers = [self.ours(policy, mode) for mode in self.modes() for policy in policies]
        share = next((float(p.partition("@")[2]) for p in policies if "@" in p), 8.3)
        for peer in args.peers:
            if peer == "transformers":
                workers.append(Worker(peer, "full", peer, self.settings))
            elif peer == "pruned":
                settings = {**self.settings, "share": share / 100}
                workers.append(Worker("transformers, pruned", f"snapkv@{share:g}", peer, settings))
            elif peer == "kvpress":
                settings = {**self.settings, "share": share / 100}
                python = args.kvpress_python or sys.executable
                workers.append(Worker(peer, f"snapkv@{share:g}", peer, settings, python))
            elif (args.model != "demo" and args.gguf is None) or args.shape is not None:
                self.note(
                    "llama.cpp is left out: it needs --model demo, or --gguf with the weights"
                )
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
        """The worker's answer, or one with `error`. Notes who else used the processors."""
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
        """The answer to `fill`. A short prefill is measured three times; the median counts."""
        replies = [self.ask(worker, "fill", ids=ids, batch=batch)]
        while len(replies) < 3 and replies[0].get("seconds", SHORT) < SHORT:
            replies.append(self.ask(worker, "fill", ids=ids, batch=batch))
        if "error" not in replies[-1]:
            replies[-1]["seconds"] = statistics.median(reply["seconds"] for reply in replies)
        return replies[-1]

    def cell(self, workers: list[Worker], batch: int, length: int, show: bool = True) -> list[dict]:
        """One batch size and length: every worker reads the prompt, then they take turns."""
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
        groups = [workers]
        if args.one_at_a_time:
            groups = [[worker] for worker in workers]
        self.out(f"\n{HEADER}")
        for group in groups:
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
        """Ratios between the grid's rows."""
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
        """What the grid does not say, in one mode."""
        pair = self.ours("full", compiled), self.ours("lethe-plus@100", compiled)
        try:
            with self.team(*pair) as (full, plus):
                self.scoring(full, plus)
                self.prefill(full, plus)  # before the next two change the policy's settings
                self.rounds(plus)
                self.long_text(plus)
            for policy in ("lethe@100", "recall@100"):
                with self.team(self.ours(policy, compiled)) as (worker,):
                    self.rounds(worker)
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

    def scoring(self, full: Worker, plus: Worker) -> None:
        """A step of LethePlus that never prunes, against one of the full cache at equal length."""
        for batch in self.args.batch:
            pair = self.cell([full, plus], batch, self.args.target_length, show=False)
            if not any("error" in row for row in pair):
                where = f"batch {batch}, {self.args.target_length:,} tokens"
                cost = 1 / speedup(pair[1], pair[0]) - 1
                self.target(f"{full.label}: cost of scoring a step, {where}", cost, "{:+.1%}")

    def prefill(self, full: Worker, plus: Worker) -> None:
        """Time with scores against time without; how the peak grows with the prompt."""
        args, seconds = self.args, {full: [], plus: []}
        ids, middle = self.prompt(max(args.prefill)), args.prefill[len(args.prefill) // 2]
        for turn in range(max(2, args.reps // 2)):
            pair = [full, plus] if turn % 2 else [plus, full]
            for worker in pair:
                reply = self._checked(self.ask(worker, "fill", ids=ids[:middle], batch=1))
                seconds[worker].append(reply["seconds"])
        pairs = zip(seconds[full], seconds[plus], strict=True)
        ratio = statistics.median(with_scores / without for without, with_scores in pairs)
        facts = {"seconds": [statistics.median(seconds[worker]) for worker in (full, plus)]}
        what = f"{full.label}: prefill of {middle:,} tokens, with scores against without"
        self.target(what, ratio, "{:.2f}x", **facts)
        for worker in (full, plus):
            self._checked(self.ask(worker, "drop"))
            for tokens in args.prefill:
                reply = self._checked(self.ask(worker, "fill", ids=ids[:tokens], batch=1))
                grown = (reply["peak"] - worker.facts["resident"]) / MB
                with_or_without = "with" if worker is plus else "without"
                how = f"{with_or_without} scores, {tokens:,} tokens"
                what = f"{full.label}: growth in prefill {how}"
                self.target(what, grown, "{:,.0f} MB", kv_bytes=reply["kv_bytes"])

    def rounds(self, worker: Worker) -> None:
        """Share of time in rounds (and, for Recall, in looks between them), over two intervals that
        begin at --target-length tokens."""
        args = self.args
        budget = max(16, round(0.083 * args.target_length))
        self._checked(self.ask(worker, "configure", share=None, budget=budget))
        for batch in args.batch:
            ids = self.prompt(args.target_length)
            self._checked(self.ask(worker, "fill", ids=ids, batch=batch))
            reply = self._checked(self.ask(worker, "decode", count=2 * args.interval))
            steps, rounds = sum(reply["step_seconds"]), reply["rounds_total"]
            what = (
                f"{worker.name}: share of decode in rounds, batch {batch}, budget {budget} of "
                f"{args.target_length:,}, interval {args.interval}"
            )
            facts = {"round_seconds": reply["round_seconds"], "step_seconds": steps}
            self.target(what, rounds / (steps + rounds), "{:.1%}", **facts)

    def long_text(self, plus: Worker) -> None:
        """Time per token late in a long text against time early in it, in alternating windows."""
        args = self.args
        budget, (early, late), seen = args.budget, args.long, 16
        changes = {"share": None, "budget": budget, "positions": "compact"}
        self._checked(self.ask(plus, "configure", **changes))
        self._checked(self.ask(plus, "fill", ids=self.prompt(seen), batch=1))
        for goal, then in ((early, "snapshot"), (late, "swap")):
            while seen < goal:  # in pieces, each within --timeout
                count = min(500, goal - seen)
                self._checked(self.ask(plus, "decode", count=count))
                seen += count
            self._checked(self.ask(plus, then))
        windows: list[list[float]] = [[], []]  # early, late: seconds a token
        for turn in range(2 * args.windows):
            reply = self._checked(self.ask(plus, "decode", count=2 * args.interval))
            rounds = reply["rounds_total"] / len(reply["step_seconds"])
            windows[turn % 2] += [seconds + rounds for seconds in reply["step_seconds"]]
            self._checked(self.ask(plus, "swap"))
        first, last = (statistics.median(seconds) for seconds in windows)
        what = f"{plus.label}: time per token at {late:,} against {early:,}, budget {budget}"
        self.target(what, last / first, "{:.3f}x", ms=[1e3 * first, 1e3 * last])

    def run_curve(self) -> None:
        """Time per token and memory while a text grows; workers alternate, window by window."""
        args = self.args
        batch, prompt, windows = args.batch[0], 64, 40
        names = [("full", {}), ("lethe-plus", {"budget": args.budget})]
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
        """Everything that was measured, for JSON."""
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "system": platform.platform(),
            **{key: self.machine.facts.get(key) for key in ("gpu", "gpu_memory")},
        }
        middle = quartiles(self.bandwidths) if self.bandwidths else [0.0, 0.0, 0.0]
        return {
            "hardware": machine,
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
        model = f"random weights in the shape of {args.shape}" if args.shape else args.model
        lines = [
            f"{model}, {args.dtype} on {args.device}, commit {commit()}",
            hardware(args.threads, facts.get("gpu", "")),
        ]
        if args.shape:
            lines.append(
                "no checkpoint: prompts are random ids, and the scores behind the prompt are made "
                "up (a few sinks, a decaying tail), so these figures say something about speed "
                "and memory alone"
            )
        if args.one_at_a_time:
            lines.append(
                "systems ran one after the other, so a ratio is one of medians, not of turns"
            )
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
            f"during turns, waiting workers used {shares['idle_workers']:.1%} of the processors "
            f"and other programs {shares['others']:.1%}"
        )
        first = {
            f"{row['system']} {row['policy']}": row["first_steps_seconds"]
            for row in self.rows[::-1]
            if "first_steps_seconds" in row
        }
        if first:
            each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in first.items())
            lines.append(f"the first two steps, which compile, took: {each}")
        for kind, versions in self.versions.items():
            named = {k: v for k, v in versions.items() if k != "torch" or kind != "machine"}
            if named and kind not in ("ours", "machine"):
                lines.append(f"{kind}: " + ", ".join(f"{k} {v}" for k, v in named.items()))
        lines += agreement(self.rows)
        if self.notes:
            lines.append("not measured: " + "; ".join(dict.fromkeys(self.notes)))
        return "\n".join(lines)


# -- the command line ------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    add("--length", type=int, nargs="+", default=[64, 4000],
        help="tokens of the prompt (default: 64 4000)")  # fmt: skip
    add("--policies", nargs="+", default=["full", "lethe-plus@8.3"], metavar="NAME[@PERCENT]",
        help="full, and others at a percentage (default: full lethe-plus@8.3)")  # fmt: skip
    add("--interval", type=int, default=128, help="tokens between rounds (default: 128)")
    add("--compile", action="store_true", help="also measure this package compiled")
    add(
        "--no-eager",
        dest="eager",
        action="store_false",
        help="with --compile: do not measure eager mode",
    )
    add("--peers", nargs="*", choices=PEERS,
        help="other engines (default: transformers, and those whose python is given)")  # fmt: skip
    add("--llama-python", help="a Python that has llama-cpp-python")
    add("--llama-flash", nargs="+", default=["auto", "off"], choices=["auto", "on", "off"],
        help="llama.cpp's flash attention (default: auto off)")  # fmt: skip
    add("--gguf", type=Path, help="the same weights for llama.cpp; default: the demo's")
    add("--kvpress-python", help="a Python that has kvpress")
    add("--reps", type=int, default=9, help="turns of each system in a cell (default: 9)")
    add("--steps", type=int, default=5, help="timed steps in a turn (default: 5)")
    add(
        "--one-at-a-time",
        action="store_true",
        help="run one system after the other, to save memory",
    )
    add("--quick", action="store_true", help="3 turns of 3 steps")
    add("--targets", action="store_true", help="also measure scoring, rounds, prefill, long texts")
    add("--no-grid", dest="grid", action="store_false", help="with --targets: measure nothing else")
    add(
        "--target-length",
        type=int,
        default=4096,
        help="for --targets: tokens in the cache (default: 4096)",
    )
    add("--prefill", type=int, nargs="+", default=[2000, 4000, 8000],
        help="for --targets: tokens of a prompt (default: 2000 4000 8000)")  # fmt: skip
    add("--long", type=int, nargs=2, default=[2000, 16000],
        help="for --targets: tokens early and late in a text (default: 2000 16000)")  # fmt: skip
    add("--windows", type=int, default=4, help="for --targets: early and late, each (default: 4)")
    add(
        "--budget",
        type=int,
        default=512,
        help="for --curve and --long: tokens per layer (default: 512)",
    )
    add("--curve", action="store_true", help="measure time per token against text length instead")
    add("--curve-tokens", type=int, default=4000, help="length of that text (default: 4000)")
    add(
        "--bandwidth-mb",
        type=int,
        default=1000,
        help="size of the block read to measure bandwidth (default: 1000)",
    )
    add("--timeout", type=float, default=900, help="seconds a worker may take for an answer")
    add("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    args.threads = args.threads or cores()
    if args.quick:
        args.reps, args.steps = 3, 3
    least = (*args.batch, *args.length, *args.prefill, *args.long, args.reps, args.steps)
    if min(*least, args.windows, args.interval, args.budget, args.threads) < 1:
        parser.error("sizes and counts should be at least 1")
    if max(args.reps * (args.steps + 1) + 2, 0) > ROOM:
        parser.error(f"--reps times --steps should stay below {ROOM}")
    if not args.eager and not args.compile:
        parser.error("--no-eager needs --compile, or nothing is measured")
    if args.peers is None:
        args.peers = ["transformers"]
        if args.llama_python:
            args.peers.append("llama.cpp")
        if args.kvpress_python:
            args.peers.append("kvpress")
    check_policies(parser, args)
    workers = len(args.policies) * (args.eager + args.compile) + len(args.peers)
    large = args.shape is not None and workers * weights_estimate(args.shape) > memory_bytes() / 2
    args.one_at_a_time |= args.device.startswith("cuda") or large
    return args


def check_policies(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
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
        for another in (signal.SIGINT, signal.SIGTERM):  # or the table would be cut
            signal.signal(another, signal.SIG_IGN)
        bench.note("interrupted before the end")
    except WorkerError as error:
        code = 1
        bench.note(f"stopped: {error}")
    finally:
        bench.close()
    if bench.bandwidths:
        bench.out(bench.tail())
    with user_errors():
        write_json(args.json, args, bench.report())
    return code


if __name__ == "__main__":
    sys.exit(main())
