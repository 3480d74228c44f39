"""What recording a trace costs: the time spent in the recorder, as a share of decoding.

    python -m benchmarks.speed.tracing [--model demo] [--tokens 600] [--budget 128] [--interval 128]
        [--batch 1 8] [--policy lethe h2o snapkv rkv]

Timed is the recorder itself, around every round, and where a sequence ends, in a run that is
traced; two runs set side by side differ by more than that for reasons of their own. The prompt is
not part of it. Prints a table.
"""

import argparse
import time
from contextlib import contextmanager
from dataclasses import fields

from lethe_mini import Engine
from lethe_mini.lens.trace import Trace
from lethe_mini.policies import POLICIES

PROMPT = "Write a long story about a lighthouse keeper."


class Timed(Trace):
    """A trace that knows how long it took; the round that it records is not counted."""

    seconds = 0.0

    @contextmanager
    def round(self, policy, cache, due, owners):
        start = time.perf_counter()
        with super().round(policy, cache, due, owners):
            inside = time.perf_counter()
            yield
            start += time.perf_counter() - inside
        self.seconds += time.perf_counter() - start

    def ends(self, index, read, generated):
        start = time.perf_counter()
        super().ends(index, read, generated)
        self.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--policy", nargs="+", default=["lethe", "h2o", "snapkv", "rkv"])
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    print(
        "| policy | batch | rounds | decode, s | recorder, s | share |\n|---|---|---|---|---|---|"
    )
    for name in args.policy:
        known = {spec.name for spec in fields(POLICIES[name])}
        options = {"budget": args.budget, "interval": args.interval}
        policy = POLICIES[name](**{k: v for k, v in options.items() if k in known})
        for batch in args.batch:
            trace = Timed()
            stats = engine.generate(
                [PROMPT] * batch, policy, args.tokens, temperature=1.0, ignore_eos=True, trace=trace
            ).stats
            share = trace.seconds / stats.decode_seconds
            print(
                f"| {name} | {batch} | {stats.rounds} | {stats.decode_seconds:.1f} | "
                f"{trace.seconds:.3f} | {share:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
