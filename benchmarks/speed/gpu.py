"""One GPU: is a captured step right, and how fast is it? One command, six minutes at most.

    python -m benchmarks.speed.gpu OUT [--shape llama-8b] [--device cuda] [--minutes 5.5]

Checks, with the small reasoner in float32:

- tokens: every policy writes on the device what it writes on the CPU (two scores may be nearly
  equal, so this is a count of texts, not a law);
- replay: a captured step gives the tokens of the same step run kernel by kernel, over rounds,
  prompts that join and texts that end, greedy and sampled;
- step and round: the host waits for the device in no step, and at most once in a round.

Measures, with random weights in the shape of a published model:

- the cells of a table: full cache, Lethe and LethePlus at 8.3 % of the tokens, by batch and length.
  A cell is `--interval` steps with the round and the captures among them, the host's copy of the
  tokens included; the full cache takes a quarter of the steps. The last batch is the largest that
  fits. The cache is filled with random numbers, as if after a round;
- a prompt of 20,000 tokens, with scores and without;
- transformers beside it, where it is installed.

`reached` is the share of the read bandwidth: weights and held keys and values once, over the median
step. What does not fit into memory says so; what is not reached in time is left out and says so.
OUT/gpu.json is written after every cell. The table is printed last. Exit code 1 if a check fails.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import available_bytes, hardware
from benchmarks.speed.ours import Machine, Ours
from benchmarks.speed.peers import Transformers
from benchmarks.speed.shapes import SHAPES, shape_scores
from benchmarks.speed.system import OutOfMemoryError, on_cuda, reset_peak
from lethe_mini import Engine, Sampling
from lethe_mini.cache import KVCache
from lethe_mini.errors import writing
from lethe_mini.generation.capture import Replayed
from lethe_mini.generation.stats import allocated
from lethe_mini.policies import POLICIES
from lethe_mini.reasoner.problems import problem

ARMS = ("full", "lethe", "lethe-plus")
WARM = 3  # steps: one with new shapes, the capture, a replay
SAMPLED = {"sampling": Sampling(0.8, 40, 0.95, 3), "positions": "compact"}
OUT_OF_MEMORY = (torch.OutOfMemoryError, OutOfMemoryError)


class Bench:
    """What has been found so far, on the disk after every step."""

    def __init__(self, args: argparse.Namespace, out=print):
        self.args, self.out = args, out
        self.started = time.perf_counter()
        self.facts = {"settings": {**vars(args), "out": str(args.out)}, "checks": [], "cells": []}
        self.facts |= {"prefill": [], "notes": []}
        self.settings = {
            "folder": None, "shape": args.shape, "device": args.device, "dtype": args.dtype,
            "threads": args.threads, "interval": args.interval, "budget": None, "share": None,
            "policy": "full", "compile": False, "bandwidth_bytes": args.bandwidth_mb * 1_000_000,
        }  # fmt: skip

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def late(self, what: str) -> bool:
        """Is there no time for it? Then that is noted."""
        over = self.seconds() > 60 * self.args.minutes
        if over:
            self.note(f"{what}: left out for want of time")
        return over

    def note(self, line: str) -> None:
        self.facts["notes"].append(line)
        self.out(f"({line})")

    def put(self, kind: str, fact: dict) -> dict:
        """Keeps a finding, and writes all of them."""
        self.facts[kind].append(fact)
        self.write()
        return fact

    def write(self) -> None:
        self.facts["seconds"] = round(self.seconds(), 1)
        path = self.args.out / "gpu.json"
        with writing(path):
            path.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")

    # -- checks --

    @torch.inference_mode()
    def checks(self) -> None:
        cpu = Engine.from_pretrained("reasoner", "cpu", "float32")
        there = Engine.from_pretrained("reasoner", self.args.device, "float32")
        count = self.args.problems
        problems = [problem("walk", random.Random(seed), 12).prompt for seed in range(count)]
        for name in POLICIES:
            if self.late(f"checks of {name} and what follows"):
                return
            policy = small(name)
            right, mine = (tokens(engine, problems, policy) for engine in (cpu, there))
            same = sum(a == b for a, b in zip(right, mine, strict=True))
            self.check("tokens", name, None, f"{same} of {len(right)} texts as on the CPU")
            for way, options in (("greedy", {}), ("sampled", SAMPLED)):
                options = {"batch_size": 2, **options}
                captured = tokens(there, problems, policy, **options)
                with eager():
                    plain = tokens(there, problems, policy, **options)
                good = captured == plain if on_cuda(self.settings) else None
                self.check("replay", f"{name}, {way}", good, "captured against kernel by kernel")
            self.waits(there, name, policy, problems)

    def check(self, what: str, which: str, good: bool | None, more: str) -> None:
        """good: None where that is no law, or cannot be told on this device."""
        self.put("checks", {"what": what, "which": which, "good": good, "more": more})
        if good is False:
            self.out(f"FAILED: {what}, {which}: {more}")

    def waits(self, engine: Engine, name: str, policy, problems: list[str]) -> None:
        """How often the host waits for the device, by PyTorch's own count."""
        with eager(), counted_waits(engine.device) as steps:
            run = prepared(engine, policy, problems)
            steps.clear()
            for _ in range(3):
                run()
        none = None if engine.device.type != "cuda" else not steps
        self.check("step", name, none, f"{len(steps)} waits in three steps")
        if name != "full":
            with counted_waits(engine.device) as found:
                policy.round(run.cache, [True] * len(run.cache.seen))
            once = None if engine.device.type != "cuda" else len(found) <= 1
            self.check("round", name, once, f"{len(found)} waits in a round")

    # -- measurements --

    @torch.inference_mode()
    def measure(self) -> None:
        args = self.args
        machine = Machine(self.settings)
        self.facts["machine"] = machine.load()
        self.facts["hardware"] = hardware(args.threads, self.facts["machine"].get("gpu"))
        self.facts["bandwidth"] = machine.bandwidth()["bytes_per_second"]
        del machine
        self.out(f"{self.facts['hardware']}; reads {self.facts['bandwidth'] / 1e9:,.0f} GB/s")
        ours = Ours(self.settings)
        self.facts["loaded"] = ours.load()
        grid = [
            (arm, batch, length) for length in args.length for batch in args.batch for arm in ARMS
        ]
        headline = 16 if 16 in args.batch else max(args.batch), max(args.length)
        # The cells that the targets speak of come first.
        first = [("full", 1, min(args.length)), *((arm, *headline) for arm in ARMS)]
        for arm, batch, length in first:
            self.cell(ours, arm, batch, length, "eager")
        if args.compile:
            ours.engine.model.compile()
            for arm, batch, length in dict.fromkeys([*first, *grid]):
                self.cell(ours, arm, batch, length, "compiled")
        else:
            for arm, batch, length in (one for one in grid if one not in first):
                self.cell(ours, arm, batch, length, "eager")
        for arm in ARMS:
            self.largest(ours, arm, max(args.length))
        self.prefills(ours)
        ours.drop()
        del ours
        gc.collect()
        if importlib.util.find_spec("transformers") is None:
            self.note("transformers is not installed")
        elif not self.late("transformers"):
            self.transformers(first[0][1:], headline)

    def cell(self, ours: Ours, arm: str, batch: int, length: int, mode: str) -> dict | None:
        name = f"{mode}, {arm}, {batch} x {length:,}"
        if self.late(name):
            return None
        fact = {"mode": mode, "policy": arm, "batch": batch, "length": length}
        try:
            fill(ours, arm, batch, length)
            count = self.args.interval if arm != "full" else max(4, self.args.interval // 4)
            for _ in range(WARM):
                ours.forward()
            before = ours.replayed.seconds
            ran = ours.decode(count)
        except OUT_OF_MEMORY:
            self.out(f"{name}: out of memory")
            return self.put("cells", {**fact, "out_of_memory": True})
        finally:
            ours.drop()
            reset_peak(self.settings)
        step = statistics.median(ran["step_seconds"])
        total = sum(ran["step_seconds"]) + ran["rounds_total"]
        moved = self.facts["loaded"]["weight_bytes"] + ran["kv_bytes"]
        fact |= {
            "ms": 1000 * total / count,
            "step_ms": 1000 * step,
            "tokens_per_second": batch * count / total,
            "rounds_and_captures": (ran["rounds_total"] + ours.replayed.seconds - before) / total,
            "held": ran["tokens"],
            "kv_bytes": ran["kv_bytes"],
            "peak": ran["peak"],
            "reached": moved / self.facts["bandwidth"] / step,
        }
        self.out(f"{name}: {fact['ms']:.2f} ms a step, {fact['tokens_per_second']:,.0f} tokens/s")
        return self.put("cells", fact)

    def largest(self, ours: Ours, arm: str, length: int) -> None:
        """The largest batch that fits, found by what one sequence takes and, if that was too much,
        by taking a tenth less."""
        mode = "compiled" if self.args.compile else "eager"
        try:
            fill(ours, arm, 1, length)
        except OUT_OF_MEMORY:
            return self.note(f"{arm}: not even one sequence of {length:,} tokens fits")
        one = allocated(ours.cache)
        ours.drop()
        reset_peak(self.settings)
        free = torch.cuda.mem_get_info()[0] if on_cuda(self.settings) else available_bytes()
        batch = min(self.args.largest, int(0.92 * free / one))
        while batch > max(self.args.batch, default=0):
            batch = batch // 8 * 8 or batch
            found = self.cell(ours, arm, batch, length, mode)
            if found is None or not found.get("out_of_memory"):
                return None
            batch = int(batch * 0.9)
        return None

    def prefills(self, ours: Ours) -> None:
        for arm in ("full", "lethe"):
            if self.late(f"prefill, {arm}"):
                return
            ours.configure(policy=arm, share=None, budget=None)
            ids = self.prompt(self.args.prompt)
            try:  # the second time, when all is warm
                ran = [ours.fill(ids, 1) for _ in range(2)][-1]
            except OUT_OF_MEMORY:
                self.put("prefill", {"system": f"ours, {arm}", "out_of_memory": True})
                continue
            self.put("prefill", {"system": f"ours, {arm}", **times(ran)})

    def transformers(self, *cells: tuple[int, int]) -> None:
        theirs = Transformers(self.settings)
        theirs.load()
        for batch, length in cells:
            if self.late(f"transformers, {batch} x {length:,}"):
                return
            fact = {"mode": "transformers", "policy": "full", "batch": batch, "length": length}
            try:
                theirs.fill(self.prompt(length), batch)
                ran = theirs.steps(8, warm=2)
            except OUT_OF_MEMORY:
                self.put("cells", {**fact, "out_of_memory": True})
                continue
            step = statistics.median(ran["step_seconds"])
            moved = self.facts["loaded"]["weight_bytes"] + ran["kv_bytes"]
            fact |= {"ms": 1000 * step, "step_ms": 1000 * step, "tokens_per_second": batch / step}
            fact |= {"kv_bytes": ran["kv_bytes"], "held": ran["tokens"], "peak": ran["peak"]}
            self.put("cells", {**fact, "reached": moved / self.facts["bandwidth"] / step})
        ids = self.prompt(self.args.prompt)
        try:
            ran = [theirs.fill(ids, 1) for _ in range(2)][-1]
            self.put("prefill", {"system": "transformers", **times(ran)})
        except OUT_OF_MEMORY:
            self.put("prefill", {"system": "transformers", "out_of_memory": True})

    def prompt(self, length: int) -> list[int]:
        return Machine(self.settings).prompt(None, self.args.shape, length)["ids"]

    # -- what is printed last --

    def table(self) -> list[str]:
        cells, checks = self.facts["cells"], self.facts["checks"]
        full = {
            (one["mode"], one["batch"], one["length"]): one["ms"]
            for one in cells
            if one["policy"] == "full" and "ms" in one
        }
        lines = [
            "mode          policy      batch  length  ms/step  tokens/s  x full  reached  rounds"
        ]
        for one in cells:
            mode = one["mode"]
            head = f"{mode:13} {one['policy']:11} {one['batch']:5} {one['length']:7,} "
            if one.get("out_of_memory"):
                lines.append(head + "  out of memory")
                continue
            key = "compiled" if mode == "transformers" and self.args.compile else mode
            base = full.get((key, one["batch"], one["length"]))
            times_full = f"{base / one['ms']:6.2f}x" if base else "       "
            rounds = f"{one['rounds_and_captures']:6.1%}" if "rounds_and_captures" in one else ""
            lines.append(
                f"{head}{one['ms']:8.2f} {one['tokens_per_second']:9,.0f} {times_full}"
                f"  {one['reached']:6.0%}  {rounds}".rstrip()
            )
        for one in self.facts["prefill"]:
            took = (
                f"{one['seconds']:.2f} s, peak {one['peak'] / 1e9:.1f} GB"
                if "peak" in one
                else "out of memory"
            )
            lines.append(f"a prompt of {self.args.prompt:,} tokens, {one['system']}: {took}")
        for what in dict.fromkeys(one["what"] for one in checks):
            mine = [one for one in checks if one["what"] == what]
            good, bad = (sum(one["good"] is it for one in mine) for it in (True, False))
            lines.append(
                f"check {what}: {good} hold, {bad} fail, {len(mine) - good - bad} only counted"
            )
        texts = [one["more"].split()[:3:2] for one in checks if one["what"] == "tokens"]
        if texts:
            same, of = (sum(map(int, column)) for column in zip(*texts, strict=True))
            lines.append(f"texts as on the CPU: {same} of {of}")
        return lines

    @property
    def failed(self) -> bool:
        return any(one["good"] is False for one in self.facts["checks"])


# -- runs ------------------------------------------------------------------------------------------


def small(name: str):
    """A policy with rounds every few tokens on the reasoner's problems."""
    return (
        POLICIES[name]()
        if name == "full"
        else POLICIES[name](budget=96, interval=16, protect_prompt=False)
    )


def tokens(
    engine: Engine, problems: list[str], policy, batch_size=None, sampling=None, **options
) -> list:
    """Of every problem. Some end before others; the next joins where `batch_size` is less.
    sampling: greedy by default."""
    limits = [24 + 17 * (index % 3) for index in range(len(problems))]
    more = {"ignore_eos": True, "batch_size": batch_size or len(problems), **options}
    done = engine.generate(problems, policy, limits, sampling or Sampling(), **more)
    return [one.token_ids for one in done.sequences]


def prepared(engine: Engine, policy, problems: list[str]):
    """A function that runs one greedy step of these problems; its cache as `cache`."""
    ids = [engine.text.encode_prompt(one, None, False) for one in problems]
    cache = None
    for one in ids:
        mine = engine.new_cache(policy)
        mine.prompt = [len(one)]
        engine.model(torch.tensor([one], device=engine.device), cache=mine)
        cache = mine if cache is None else cache.join(mine) or cache
    chosen = torch.zeros(len(ids), 1, dtype=torch.long, device=engine.device)

    def run():
        cache.reserve(1)
        policy.decay(cache)
        chosen.copy_(engine.model(chosen, cache=cache)[:, -1].argmax(-1, keepdim=True))

    run.cache = cache
    run()
    return run


@contextmanager
def eager():
    """Every step kernel by kernel."""
    before = os.environ.get("LETHE_MINI_CAPTURE")
    os.environ["LETHE_MINI_CAPTURE"] = "0"
    try:
        yield
    finally:
        del os.environ["LETHE_MINI_CAPTURE"]
        if before is not None:
            os.environ["LETHE_MINI_CAPTURE"] = before


@contextmanager
def counted_waits(device: torch.device):
    """A list that grows by one whenever the host waits for CUDA; elsewhere it stays empty."""
    if device.type != "cuda":
        yield []
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def fill(ours: Ours, arm: str, batch: int, length: int, share: float = 0.083) -> None:
    """A cache as after a round: `length` tokens, or what the policy keeps of them. The next round
    comes within `interval` steps."""
    ours.configure(policy=arm, share=None if arm == "full" else share, budget=None)
    ours.policy = policy = ours._policy(length)
    n = length if arm == "full" else policy.budget
    engine = ours.engine
    ours.cache = cache = KVCache(
        engine.model.config, batch, engine.dtype, engine.device, notes=policy.notes()
    )
    cache.reserve(n)
    for layer in cache.layers:
        for name, tensor in layer.store.items():
            held = tensor[:, :, :n]
            if name == "positions":
                held.copy_(torch.arange(n, device=tensor.device))
            elif name != "scores":
                held.normal_()
    cache.count(n)
    cache.next.add_(n)
    cache.prompt = [n] * batch
    if policy.scored:
        shape_scores(cache)
    ours.tokens = torch.zeros(batch, 1, dtype=torch.long, device=engine.device)
    ours.replayed = Replayed(ours._step, engine.device)


def times(ran: dict) -> dict:
    return {"seconds": ran["seconds"], "peak": ran["peak"]}


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.gpu", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("out", type=Path, help="folder for gpu.json")
    add("--shape", default="llama-8b", choices=SHAPES, help="of the weights (default: llama-8b)")
    add("--device", default="cuda", help="cuda or cpu (default: cuda)")
    add("--dtype", default="bfloat16", help="default: bfloat16")
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    add("--length", type=int, nargs="+", default=[2000, 8000, 20000], help="tokens of a text")
    add("--interval", type=int, default=128, help="steps of a cell, one round (default: 128)")
    add("--prompt", type=int, default=20000, help="tokens of the prefill (default: 20000)")
    add("--largest", type=int, default=512, help="no batch beyond this one (default: 512)")
    add("--problems", type=int, default=6, help="texts of each check (default: 6)")
    add("--no-compile", dest="compile", action="store_false", help="measure eager blocks alone")
    add("--minutes", type=float, default=5.5, help="begin nothing new after them (default: 5.5)")
    add("--bandwidth-mb", type=int, default=2000, help="block read to measure bandwidth")
    add("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    sizes = (*args.batch, *args.length, args.interval, args.prompt, args.largest, args.problems)
    if min(sizes) < 1:
        parser.error("sizes and counts should be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    bench = Bench(args, out=lambda line: print(line, flush=True))
    with user_errors():
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
        bench.checks()
        bench.measure()
        bench.write()
    for line in bench.table():
        bench.out(line)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
