"""Memory by batch size: what the cache holds and what the process takes, full cache against Lethe.

    python -m benchmarks.memory.batches [--model demo] [--batch 1 4 8 16 32] [--tokens 4000] [--budget 512]
        [--policy lethe ...] [--all-decoded] [--json FILE]

Every batch size and policy runs in a process of its own, so that its peak is its own. Each
sequence gets to --tokens tokens: a prompt of words in random order, another one for each, is read
in prefill, and the last 128 tokens are decoded. With --all-decoded the prompt has 16 tokens and all
else is decoded, which takes far longer. The prompt is not protected: it is most of the text here.
`held` and `peak` count keys and values of the tokens held, at the end and at most; `allocated` all
tensors of the cache at most, spare room and bookkeeping included; `process` the most that the
process had (on CUDA: PyTorch's allocator), weights, interpreter and libraries included.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import torch

from lethe_mini import Engine
from lethe_mini.errors import UserError
from lethe_mini.policies import POLICIES

DECODED, SHORT = 128, 16  # tokens decoded behind a long prompt; a prompt when all are decoded
TEXT = (
    "the river ran under a stone bridge while seven children counted boats and an old clerk wrote "
    "every number down because tomorrow somebody would ask how many had passed before noon"
)


def prompt(engine: Engine, tokens: int, seed: int) -> list[int]:
    """As many tokens of words in random order."""
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        ids += engine.text.encode(
            " ".join(rng.choices(TEXT.split(), k=200)), add_special_tokens=False
        )
    return ids[:tokens]


def make(name: str, budget: int):
    """A policy by name; the budget where it has one, the prompt unprotected."""
    known = {spec.name for spec in fields(POLICIES[name])}
    options = {"budget": budget, "protect_prompt": False}
    return POLICIES[name](**{key: value for key, value in options.items() if key in known})


def one_run(args: dict) -> dict:
    """A batch in this process. -> its figures, bytes and seconds."""
    engine = Engine.from_pretrained(args["model"], args["device"], args["dtype"])
    first = SHORT if args["all_decoded"] else args["tokens"] - DECODED
    prompts = [prompt(engine, first, seed) for seed in range(args["batch"])]
    stats = engine.generate(
        prompts,
        make(args["policy"], args["budget"]),
        args["tokens"] - first + 1,  # the last token that is drawn is not read any more
        ignore_eos=True,
    ).stats
    return {
        "batch": args["batch"],
        "policy": args["policy"],
        "held": stats.kv_bytes_final,
        "peak": stats.kv_bytes_peak,
        "full": stats.kv_bytes_full,
        "allocated": stats.kv_allocated_peak,
        "process": stats.memory_peak,
        "weights": sum(parameter.nbytes for parameter in engine.model.parameters()),
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": stats.decode_tokens_per_second,
        "rounds": stats.rounds,
        "device": stats.device,
        "dtype": stats.dtype,
    }


def in_own_process(args: dict) -> dict:
    """`one_run` in a child; what it could not do is an entry with `error`."""
    argv = [sys.executable, __file__, "--worker", json.dumps(args)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"batch": args["batch"], "policy": args["policy"], "error": last}
    return json.loads(done.stdout)


def hardware() -> str:
    """One line: processor or GPU, threads, versions."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := info.read_text().partition("model name")[2]):
        name = found.partition(":")[2].partition("\n")[0].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads, python = torch.get_num_threads(), platform.python_version()
    cores = os.cpu_count()
    return (
        f"{name}, {cores} cores, {threads} threads{gpu}; Python {python}, torch {torch.__version__}"
    )


def row(run: dict) -> str:
    """A line of the table."""
    if "error" in run:
        return f"| {run['batch']} | {run['policy']} | {run['error']} | | | | |"
    sizes = [f"{run[name] / 1e6:,.0f}" for name in ("held", "peak", "allocated", "process")]
    rate = f"{run['tokens_per_second']:.1f}"
    return f"| {run['batch']} | {run['policy']} | {' | '.join(sizes)} | {rate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="default: 1 4 8 16 32")
    add("--tokens", type=int, default=4000, help="of each sequence (default: %(default)s)")
    add("--budget", type=int, default=512, help="tokens per layer (default: %(default)s)")
    add("--policy", nargs="+", default=["lethe"], choices=[*POLICIES], help="beside full")
    add("--all-decoded", action="store_true", help="decode all, instead of a prompt for most")
    add("--device", default="auto", help="default: %(default)s")
    add("--dtype", default="auto", help="default: %(default)s")
    add("--json", type=Path, help="also write the figures to this file")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(one_run(json.loads(args.worker))))
        return
    if args.tokens <= DECODED or min(args.batch) < 1:
        parser.error(f"--tokens should be above {DECODED}, --batch at least 1")
    try:
        make(args.policy[0], args.budget)
    except UserError as error:
        parser.error(str(error))
    first = SHORT if args.all_decoded else args.tokens - DECODED
    how = f"{first:,} tokens of words in random order in prefill, {args.tokens - first:,} decoded"
    print(f"{args.model}, {args.tokens:,} tokens a sequence ({how}), budget {args.budget}")
    print(hardware())
    print("\n| batch | policy | held MB | peak MB | allocated MB | process MB | tokens/s |")
    print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    runs = []
    for batch in args.batch:
        for name in dict.fromkeys(["full", *args.policy]):
            names = ("model", "tokens", "budget", "all_decoded", "device", "dtype")
            task = {key: getattr(args, key) for key in names}
            runs.append(in_own_process({**task, "batch": batch, "policy": name}))
            print(row(runs[-1]), flush=True)
    if good := next((run for run in runs if "error" not in run), None):
        weights = f"weights {good['weights'] / 1e6:,.0f} MB"
        print(f"\n{weights}, {good['dtype']} on {good['device']}")
    if args.json is not None:
        facts = {"hardware": hardware(), "how": how, "budget": args.budget, "runs": runs}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
