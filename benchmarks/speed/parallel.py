"""A decoding step of one model in two processes beside one process with as many threads.

    python -m benchmarks.speed.parallel [--model demo] [--batch 1 8] [--json FILE]

On one machine this gains nothing: the same cores do the same work, and the processes must speak.
What it shows is what their speaking costs. One process with N threads, N processes of a thread each
that divide heads and columns (tensor), and N that divide layers take turns, each several times.
Speaking includes waiting for the other: of layers, one process works while the others wait.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import write_json
from benchmarks.speed.rows import quartiles
from lethe_mini import Engine, FullKV
from lethe_mini.parallel import MODES, Devices

KINDS = ("alone", *MODES)
SPEAKS = ("summed", "joined", "from_rank", "send", "receive")


def listened() -> list[float]:
    """From here on, the seconds of everything that a process says or waits for."""
    spent: list[float] = []

    def timed(call):
        def inner(*args):
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent.append(time.perf_counter() - start)

        return inner

    for name in SPEAKS:
        setattr(Devices, name, timed(getattr(Devices, name)))
    return spent


@torch.inference_mode()
def worker(args: argparse.Namespace) -> None:
    """One process: prints the seconds of its steps, and of speaking in each, by batch."""
    spent = listened()
    parallel = None if args.worker == "alone" else args.worker
    engine = Engine.from_pretrained(args.model, "cpu", args.dtype, parallel=parallel)
    found = {}
    for batch in args.batch:
        cache = engine.new_cache(FullKV())
        torch.manual_seed(0)
        ids = torch.randint(engine.model.config.vocab_size, (1, args.tokens))
        engine.model(ids, cache=cache, last_only=True)
        cache.select([0] * batch)
        step = ids[:, -1:].expand(batch, 1).contiguous()
        times = []
        for _ in range(args.steps + 3):
            spent.clear()
            start = time.perf_counter()
            engine.model(step, cache=cache)
            times.append((time.perf_counter() - start, sum(spent), len(spent)))
        found[batch] = times[3:]  # the first ones warm up
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


def measured(kind: str, argv: list[str], count: int) -> dict:
    """What the worker of the first process prints."""
    threads = count if kind == "alone" else 1
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = [sys.executable]
    if kind != "alone":
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command = [*start, "-m", "benchmarks.speed.parallel", *argv, "--worker", kind]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--dtype", default="float32", choices=["bfloat16", "float32"])
    add("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    add("--tokens", type=int, default=512, help="of the prompt (default: %(default)s)")
    add("--steps", type=int, default=24, help="of each turn (default: %(default)s)")
    add("--turns", type=int, default=3, help="of each kind (default: %(default)s)")
    add("--count", type=int, default=2, help="processes, or threads (default: %(default)s)")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    add("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args)
        return
    with user_errors():
        found: dict = {kind: {str(batch): [] for batch in args.batch} for kind in KINDS}
        for _ in range(args.turns):
            for kind in KINDS:
                for batch, times in measured(kind, argv, args.count).items():
                    found[kind][batch] += times
        print(f"{args.model} in {args.dtype}, {args.tokens} tokens, {args.count} processes or "
              f"threads; {hardware(args.count)}\n")  # fmt: skip
        print("| batch | kind | ms a step | of it speaking | times a step |")
        print("|---:|---|---:|---:|---:|")
        for batch in map(str, args.batch):
            for kind in KINDS:
                steps, speaking, times = zip(*found[kind][batch], strict=True)
                low, middle, high = (1000 * second for second in quartiles(steps))
                said = 1000 * statistics.median(speaking)
                print(f"| {batch} | {kind} | {middle:.1f} [{low:.1f}, {high:.1f}] | "
                      f"{said:.1f} | {times[0]} |")  # fmt: skip
        write_json(args.json, args, {"hardware": hardware(args.count), "steps": found})


if __name__ == "__main__":
    main()
