"""Memory by batch size: what the cache holds and what the process takes, full and pruned.

    python -m benchmarks.memory.batches [--model demo] [--batch 1 4 8 16 32] [--tokens 4000]
        [--budget 512] [--policy lethe-plus ...] [--all-decoded] [--json FILE]

Every batch size and policy runs in a process of its own, which has a peak of its own. Each sequence
grows to --tokens tokens. Prefill reads a prompt of words in random order, another one for each
sequence, and the last 128 tokens are decoded. With --all-decoded the prompt has 16 tokens and the
rest is decoded, which takes far longer. The prompt is not protected, since it is most of the text.

`held` and `peak` count the keys and values of the tokens held, at the end and at most. `allocated`
counts all tensors of the cache at most, with spare room and bookkeeping. `process` is the most that
the process had, with weights, interpreter and libraries; on CUDA, the most of PyTorch's allocator.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.policies import make_policy
from benchmarks.common.results import write_json
from benchmarks.common.words import word_ids
from lethe_mini import Engine, Sampling
from lethe_mini.policies import POLICIES
from lethe_mini.policy import Policy

DECODED, SHORT = 128, 16  # tokens decoded behind a long prompt; a prompt when all are decoded
FACTS = ("model", "tokens", "budget", "all_decoded", "device", "dtype")  # what a run needs to know


def make(name: str, budget: int) -> Policy:
    """A policy by name, with this budget if it has one, that protects no prompt."""
    return make_policy(name, budget=budget, protect_prompt=False)


def prompt_tokens(args: argparse.Namespace) -> int:
    """Tokens of a prompt; the rest of a sequence is decoded."""
    return SHORT if args.all_decoded else args.tokens - DECODED


def one_run(args: argparse.Namespace) -> dict:
    """Runs a batch in this process. -> its figures, in bytes and seconds."""
    engine = Engine.from_pretrained(args.model, args.device, args.dtype)
    first = prompt_tokens(args)
    stats = engine.generate(
        [word_ids(engine.text, first, seed) for seed in range(args.batch)],
        make(args.policy, args.budget),
        args.tokens - first + 1,  # the last token is drawn and never read
        Sampling(),
        ignore_eos=True,
    ).stats
    return {
        "batch": args.batch,
        "policy": args.policy,
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


def in_own_process(task: dict) -> dict:
    """`one_run` in a process of its own; a run that failed is an entry with `error`."""
    argv = [sys.executable, "-m", "benchmarks.memory.batches", "--worker", json.dumps(task)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"batch": task["batch"], "policy": task["policy"], "error": last}
    return json.loads(done.stdout)


def row(run: dict) -> str:
    """A line of the table."""
    if "error" in run:
        return f"| {run['batch']} | {run['policy']} | {run['error']} | | | | |"
    sizes = [f"{run[name] / 1e6:,.0f}" for name in ("held", "peak", "allocated", "process")]
    rate = f"{run['tokens_per_second']:.1f}"
    return f"| {run['batch']} | {run['policy']} | {' | '.join(sizes)} | {rate} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32],
        help="batch sizes (default: 1 4 8 16 32)")  # fmt: skip
    add("--tokens", type=int, default=4000, help="of each sequence (default: %(default)s)")
    add("--budget", type=int, default=512, help="tokens per layer (default: %(default)s)")
    add("--policy", nargs="+", default=["lethe-plus"], choices=[*POLICIES], metavar="NAME",
        help="beside the full cache (default: lethe-plus)")  # fmt: skip
    add("--all-decoded", action="store_true", help="decode all, instead of a long prompt")
    add("--device", default="auto", help="default: %(default)s")
    add("--dtype", default="auto", help="default: %(default)s")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with user_errors():
        if args.worker is not None:
            print(json.dumps(one_run(argparse.Namespace(**json.loads(args.worker)))))
            return
        if args.tokens <= DECODED or min(args.batch) < 1:
            parser.error(f"--tokens should be above {DECODED}, --batch at least 1")
        for name in args.policy:
            make(name, args.budget)  # says now what is wrong with the budget
        run(args)


def run(args: argparse.Namespace) -> None:
    """Prints the table, row by row, and writes the figures."""
    first, machine = prompt_tokens(args), hardware()
    how = f"{first:,} tokens of words in random order in prefill, {args.tokens - first:,} decoded"
    print(f"{args.model}, {args.tokens:,} tokens a sequence ({how}), budget {args.budget}")
    print(machine)
    print("\n| batch | policy | held MB | peak MB | allocated MB | process MB | tokens/s |")
    print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    facts, runs = {name: getattr(args, name) for name in FACTS}, []
    for batch in args.batch:
        for name in dict.fromkeys(["full", *args.policy]):
            runs.append(in_own_process({**facts, "batch": batch, "policy": name}))
            print(row(runs[-1]), flush=True)
    if good := next((run for run in runs if "error" not in run), None):
        weights = f"weights {good['weights'] / 1e6:,.0f} MB"
        print(f"\n{weights}, {good['dtype']} on {good['device']}")
    write_json(args.json, args, {"hardware": machine, "how": how, "runs": runs})


if __name__ == "__main__":
    main()
