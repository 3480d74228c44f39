"""What scores could know at best: eviction that has seen the attention to come.

    python benchmarks/foresight.py --texts 4 --budget 10% --json foresight.json

A policy guesses which tokens will be looked at. `Foresight` knows: the text is read once with the
full cache, noting the mass that the queries of every chunk give each key, and at a round those
tokens stay that receive most from then on, where a chunk counts `fade` times the one before it (0:
the next alone; 1: all to the end). Layers share evenly, every KV head chooses for itself. What lies
between such a policy and one without foresight is what better scores could win; what lies between
it and the full cache is what forgetting costs even so. Prose as in quality.py, prompt free.

A second table says in which layers looks are lost: of the mass (squared, so that a sharp look
counts and a vague one does not) that the full cache's queries of each chunk give to keys before it,
but for the sinks, the share that goes to keys the policy had dropped.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from choices import CHOICES, Cell, budget_text, tokens_of
from memory import hardware
from quality import Bench, Prose, prose_readings, run_prose, table
from reading import CHUNK, SPLITS, Reader, stretches
from results import Lines, write_json
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lethe_mini import Engine
from lethe_mini.cache import KVCache, LayerCache
from lethe_mini.policy import FullKV, Policy, Pruner

SINKS = 4
Mass = list[Tensor]  # of every layer (H_kv, S)


@dataclass(frozen=True)
class Noting(FullKV):
    """Keeps everything, and all mass that it received."""

    name: ClassVar[str] = "noting"
    gamma: ClassVar[float | None] = 1.0

    interval: int = CHUNK


@dataclass(frozen=True)
class Foresight(Pruner):
    """Keeps what the full cache will look at."""

    name: ClassVar[str] = "foresight"
    to_come: ClassVar[dict[int, Mass]] = {}  # of the text that is read: tokens seen -> mass to come

    fade: float = 0.0

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        mass = self.to_come[cache.seen[0]][layer.index]
        return mass.gather(-1, layer.positions[0].long())[None]


class Foretold(Prose):
    """A text whose attention is noted before policies read it."""

    noted: dict[int, Mass] | None = None  # tokens seen -> mass received until then

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """And per layer the squared mass of `looks`, and of those that were `lost`."""
        self.noted = self.noted or self.note(getattr(policy, "interval", CHUNK))
        if isinstance(policy, Foresight):
            Foresight.to_come = to_come(self.noted, policy.fade)
        self.looks, self.lost = torch.zeros(2, len(self.bench.engine.model.layers))
        self.policy = policy
        return super().read(policy) | {"looks": self.looks.tolist(), "lost": self.lost.tolist()}

    def note(self, interval: int) -> dict[int, Mass]:
        reader, noted = Reader(self.bench.engine, Noting(interval), self.bench.prompt), {}
        for _ in reader.read(self.ids[:-1], last_only=True):
            noted[reader.cache.seen[0]] = [x.scores[0].clone() for x in reader.cache.layers]
        return noted

    def log_probs(self, reader: Reader) -> Iterable[Tensor]:
        for logits in super().log_probs(reader):
            end = reader.cache.seen[0]
            if reader.policy is self.policy:  # not while the full cache is read for comparison
                self.count(reader.cache, end - len(logits), end)
            yield logits

    def count(self, cache: KVCache, start: int, end: int) -> None:
        """Looks of the chunk from `start` to `end` at what was before it."""
        for layer, until, now in zip(cache.layers, self.noted[start], self.noted[end], strict=True):
            looks = (now[:, :start] - until)[:, SINKS:].square()
            held, positions = torch.zeros_like(now, dtype=torch.bool), layer.positions[0].long()
            held.scatter_(1, positions, torch.ones_like(positions, dtype=torch.bool))
            self.looks[layer.index] += looks.sum().cpu()
            self.lost[layer.index] += looks[~held[:, SINKS:start]].sum().cpu()


def to_come(noted: dict[int, Mass], fade: float) -> dict[int, Mass]:
    """What every key receives after so many tokens, from what it had received until then."""
    ends = sorted(noted, reverse=True)
    found = {ends[0]: [torch.zeros_like(mass) for mass in noted[ends[0]]]}
    for end, later in zip(ends[1:], ends, strict=False):
        found[end] = [
            (after[:, :end] - before) + fade * further[:, :end]
            for before, after, further in zip(noted[end], noted[later], found[later], strict=True)
        ]
    return found


def by_layer(cells: list[Cell], found: list[list[dict]]) -> str:
    """A row per layer: lost looks in % of all."""
    heads = [f"{cell.choice} {cell.budget}" for cell in cells]
    lines = ["| layer | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(cells)]
    for layer in range(len(found[0][0]["looks"])):
        sums = [
            [sum(result[name][layer] for result in results) for name in ("lost", "looks")]
            for results in found
        ]
        lines.append(f"| {layer} | " + " | ".join(f"{100 * a / b:.1f}" for a, b in sums) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--split", choices=SPLITS, default="report", help="which half of the texts")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--texts", type=int, default=6, help="default: %(default)s")
    add("--tokens", type=int, default=4096, help="of each (default: %(default)s)")
    add("--budget", nargs="+", type=budget_text, default=["10%"], help="default: %(default)s")
    add("--fade", nargs="+", type=float, default=[0.0, 0.8, 1.0], help="default: %(default)s")
    add("--choice", nargs="+", default=["random", "uniform", "lethe"], choices=[*CHOICES],
        metavar="NAME", help="beside it, of quality.py's; default: %(default)s")  # fmt: skip
    add("--lines", type=Path, help="JSON Lines file to write to, and to go on with")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    engine = Engine.from_pretrained(args.model, dtype="float32")
    bench = Bench(engine, Lines(args.lines), prompt=CHUNK)
    texts = stretches(engine, args.split, args.seed, args.texts, args.tokens)
    cells = [Cell("full", "", False, FullKV())]
    for budget in args.budget:
        common = {"budget": tokens_of(budget, args.tokens), "protect_prompt": False, "sinks": SINKS}
        for choice in args.choice:
            make, changes = CHOICES[choice]
            cells.append(Cell(choice, budget, False, make(**common, **changes)))
        for fade in args.fade:
            policy = Foresight(**common, recent_ratio=0.0, fade=fade)
            cells.append(Cell(f"foresight {fade:g}", budget, False, policy))
    rows = run_prose(bench, cells, texts, CHUNK, read=Foretold)
    found = bench.results(cells, prose_readings(bench, texts, CHUNK, Foretold), len(texts))
    print(f"{args.model} in float32, texts to {args.split}; {hardware()}\n")
    print(table("prose", rows), "\n\nlooks lost, in %:\n")
    print(by_layer(cells[1:], found[1:]))
    write_json(args.json, args, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
