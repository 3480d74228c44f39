"""What recording a trace costs: the time spent in the recorder, as a share of decoding time.

    python -m benchmarks.speed.tracing [--model demo] [--tokens 600] [--budget 128] [--interval 128]
        [--batch 1 8] [--policy lethe-plus h2o snapkv rkv]

The clock runs only inside the recorder: before and after every round, and where a sequence ends. A
run with a trace is not compared with one without, for two runs differ by more than the recorder
takes. Prefill is not counted. Prints a Markdown table.
"""

import argparse
import time

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.policies import make_policy
from lethe_mini import Engine, Sampling
from lethe_mini.lens.trace import Trace
from lethe_mini.policies import POLICIES

PROMPT = "Write a long story about a lighthouse keeper."


class Timed(Trace):
    """A trace that measures how long it takes to record."""

    seconds = 0.0

    def round_begins(self, *args):
        self._timed(super().round_begins, *args)

    def round_ends(self, *args):
        self._timed(super().round_ends, *args)

    def ends(self, *args):
        self._timed(super().ends, *args)

    def _timed(self, record, *args) -> None:
        start = time.perf_counter()
        record(*args)
        self.seconds += time.perf_counter() - start


def row(engine: Engine, name: str, batch: int, args: argparse.Namespace) -> str:
    """A line of the table, from a run with a trace."""
    policy = make_policy(name, budget=args.budget, interval=args.interval)
    trace, prompts = Timed(), [PROMPT] * batch
    stats = engine.generate(
        prompts, policy, args.tokens, Sampling(1.0), ignore_eos=True, trace=trace
    ).stats
    cells = [name, batch, stats.rounds, f"{stats.decode_seconds:.1f}", f"{trace.seconds:.3f}"]
    cells.append(f"{trace.seconds / stats.decode_seconds:.2%}")
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--tokens", type=int, default=600, help="tokens to decode (default: %(default)s)")
    add("--budget", type=int, default=128, help="tokens per layer (default: %(default)s)")
    add("--interval", type=int, default=128, help="tokens between rounds (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    add("--policy", nargs="+", default=["lethe-plus", "h2o", "snapkv", "rkv"], choices=[*POLICIES],
        metavar="NAME", help="default: lethe-plus h2o snapkv rkv")  # fmt: skip
    args = parser.parse_args(argv)
    with user_errors():
        engine = Engine.from_pretrained(args.model)
        print(f"{args.model}, {args.tokens} tokens, budget {args.budget}; {hardware()}\n")
        print("| policy | batch | rounds | decode, s | recorder, s | share |")
        print("|---|---|---|---|---|---|")
        for name in args.policy:
            for batch in args.batch:
                print(row(engine, name, batch, args), flush=True)


if __name__ == "__main__":
    main()
