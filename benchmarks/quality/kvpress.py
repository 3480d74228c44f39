"""Prose under kvpress' DecodingPress with SnapKV's scores, beside our policies.

    python -m benchmarks.quality.kvpress --kvpress-python PYTHON [--budget 10% 25%] [--json FILE]

The texts, the figures and the intervals are those of `benchmarks.quality.run prose`, with a prompt
that is free. PYTHON has kvpress; there transformers reads the same token ids one by one, and the
full cache's in one go. Its figures are differences from that full cache, as ours are from ours.
Both keep `budget` tokens per layer, at the same places of the text. What is held is measured.

A budget holds at least the prompt: kvpress first prunes one interval behind it. The interval is
longer than the window, since kvpress scores with queries since the last round alone.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.common import coder
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import Lines, write_json
from benchmarks.quality.choices import CHOICES, Cell, budget_text, markdown, tokens_of
from benchmarks.quality.reading import SPLITS, stretches
from benchmarks.quality.run import HEADS, Bench, Prose, make_cells, run_prose
from benchmarks.speed.workers import Worker, WorkerError
from lethe_mini import Engine, SnapKV, UserError
from lethe_mini.checkpoint.load import resolve

TIMEOUT = 3600  # seconds for one text: minutes even on a busy machine


@dataclass(frozen=True)
class DecodingPress:
    """What kvpress is asked for. budget: None is its full cache."""

    name: ClassVar[str] = "kvpress"
    interval: int
    budget: int | None = None
    window: int = SnapKV.window


class Pair(Bench):
    """Our engine, and a worker that has kvpress."""

    def __init__(self, engine: Engine, prompt: int, worker: Worker):
        super().__init__(engine, Lines(None), prompt)
        self.worker = worker

    def ask(self, request: str, **options) -> dict:
        """The worker's answer. Raises UserError where it has none."""
        try:
            reply = self.worker.ask(request, **options)
        except WorkerError as error:
            raise UserError(f"kvpress: {error}") from None
        if "error" in reply:
            raise UserError(f"kvpress: {reply['error']}")
        return reply


class Beside(Prose):
    """One stretch of text, which either engine reads."""

    def read(self, policy) -> dict:
        if not isinstance(policy, DecodingPress):
            return super().read(policy)
        reply = self.bench.ask("read", ids=self.ids, prompt=self.prompt, **asdict(policy))
        columns = {name: torch.tensor(reply[name]) for name in ("nats", "kl", "agree")}
        blocks = {name: values.split(self.block) for name, values in columns.items()}
        sums = {name: [part.sum().item() for part in parts] for name, parts in blocks.items()}
        return {**sums, "tokens": [len(x) for x in blocks["nats"]], "rounds": reply["rounds"]}


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Both full caches, then kvpress at every budget, then our policies."""
    first, *ours = make_cells(args, args.tokens)
    theirs = [Cell("kvpress-full", "", False, DecodingPress(args.interval))]
    for budget in args.budget:
        press = DecodingPress(args.interval, tokens_of(budget, args.tokens))
        theirs.append(Cell("kvpress", budget, False, press))
    return [first, *theirs, *ours]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--kvpress-python", required=True, metavar="PYTHON", help="a Python that has kvpress")
    add("--model", default="demo", help="default: %(default)s")
    add("--split", choices=SPLITS, default="report", help="half of the texts (default: report)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--texts", type=int, default=3, help="how many (default: %(default)s)")
    add("--tokens", type=int, default=1536, help="of each (default: %(default)s)")
    add("--prompt", type=int, default=128, help="tokens that are the prompt (%(default)s)")
    add("--block", type=int, default=128, help="tokens the bootstrap draws together (%(default)s)")
    add("--budget", nargs="+", type=budget_text, default=["10%", "25%"], metavar="N|P%",
        help="tokens per layer, or a share of the text (default: 10%% 25%%)")  # fmt: skip
    add("--choice", nargs="+", choices=CHOICES, default=["random", "snapkv", "recall"],
        metavar="NAME", help="our policies (default: random snapkv recall)")  # fmt: skip
    add("--interval", type=int, default=128, help="tokens between rounds (%(default)s)")
    add("--sinks", type=int, default=4, help="first tokens that ours always keep (%(default)s)")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    parser.set_defaults(protect="no")
    args = parser.parse_args(argv)
    for budget in args.budget:
        if tokens_of(budget, args.tokens) < args.prompt:
            parser.error(f"--budget should hold the prompt, {args.prompt} tokens, not {budget}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with user_errors():
        engine = coder.load(args.model, "cpu", "float32")
        texts = stretches(engine, args.split, args.seed, args.texts, args.tokens)
        settings = {"folder": str(resolve(coder.checkpoint(args.model))), "shape": None}
        settings |= {"device": "cpu", "dtype": "float32", "timeout": TIMEOUT}
        settings["threads"] = torch.get_num_threads()
        worker = Worker("kvpress", "snapkv", "kvpress-text", settings, args.kvpress_python)
        worker.start()
        try:
            pair = Pair(engine, args.prompt, worker)
            rows = run_prose(pair, cells_of(args), texts, args.block, "kvpress", Beside)
        finally:
            worker.close()
        versions = worker.facts["versions"]
        print(f"prose, {args.model} in float32, texts to {args.split}; {hardware()}; {versions}\n")
        heads = HEADS["prose"] | {"over_rival": "over kvpress"}
        print(markdown(rows, heads, lambda row: f"{row['kept']:.0f}"))
        facts = {"hardware": hardware(), "versions": versions, "rows": rows}
        write_json(args.json, args, facts)


if __name__ == "__main__":
    main()
