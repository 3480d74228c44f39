"""How much better scores could be: eviction by an oracle that sees all future attention.

    python -m benchmarks.quality.foresight --texts 4 --budget 10% --json foresight.json

A policy estimates which tokens will receive attention; `Foresight` knows. A first pass with the
full cache notes the mass that each chunk's queries give to each key. At a round, those tokens stay
that receive most from then on. A chunk counts `fade` times the one before it: with 0 only the next
chunk counts, with 1 all chunks to the end count alike. Layers share evenly, and every KV head
chooses for itself, like the choice `head` of run.py. The difference between the two is what better
scores can gain at least. It is no upper bound, since other choices of tokens might serve the text
even better. Texts are those of `run prose`, with a free prompt.

A second table says in which layers attention is lost. With the full cache, each query's squared
attention to keys before its chunk is added up; the square makes a sharp query count and a diffuse
one not. The table has the part of this that fell on keys which the policy had dropped. Sinks are
left out: keys that receive more than a hundredth of all mass of their head, wherever they stand.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import coder
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import Lines, write_json
from benchmarks.quality.choices import CHOICES, Cell, budget_text, tokens_of
from benchmarks.quality.reading import CHUNK, SPLITS, Reader, stretches
from benchmarks.quality.run import Bench, Prose, make_cells, prose_readings, run_prose, table
from lethe_mini import FullKV, Policy, Pruner, attention
from lethe_mini.cache import KVCache, LayerCache

SINK = 0.01  # of all mass of a head
Mass = list[Tensor]  # of every layer (H_kv, S)


def squared_mass(q: Tensor, k: Tensor, mask: None, lag: int = 0, weights=None) -> Tensor:
    """The sum of squares, in place of attention.received_mass; one sequence, causal."""
    (B, H_kv, S, D), T = k.shape, q.shape[2]
    logits = torch.matmul(q.reshape(B, H_kv, -1, D) * D**-0.5, k.mT).view(B, H_kv, -1, T, S)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).square().sum(dim=(2, 3))


@dataclass(frozen=True)
class Noting(FullKV):
    """Keeps everything, with the sum of all mass that each key has received."""

    name: ClassVar[str] = "noting"
    scored: ClassVar[bool] = True

    interval: int = CHUNK


@dataclass(frozen=True)
class Foresight(Pruner):
    """Keeps the keys that will receive most attention in the full cache."""

    name: ClassVar[str] = "foresight"
    to_come: ClassVar[dict[int, Mass]] = {}  # of the text being read: tokens seen -> future mass

    fade: float = 0.0

    def importance(self, layer: LayerCache, cache: KVCache) -> Tensor:
        mass = self.to_come[cache.seen[0]][layer.index]
        return mass.gather(-1, layer.positions[0].long())[None]


class Foretold(Prose):
    """A text that is read once with the full cache, noting attention, before policies read it."""

    noted: dict[int, Mass] | None = None  # tokens seen -> mass received so far
    squared: dict[int, Mass] | None = None  # the same, of squares

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """Adds, per layer, the squared attention (`looks`) and the part of it that is `lost`."""
        if self.noted is None:
            interval = getattr(policy, "interval", CHUNK)
            self.noted = self.note(interval, attention.received_mass)
            self.squared = self.note(interval, squared_mass)
        if isinstance(policy, Foresight):
            Foresight.to_come = to_come(self.noted, policy.fade)
        self.looks, self.lost = torch.zeros(2, len(self.bench.engine.model.layers))
        self.policy = policy
        return super().read(policy) | {"looks": self.looks.tolist(), "lost": self.lost.tolist()}

    def note(self, interval: int, mass: Callable[..., Tensor]) -> dict[int, Mass]:
        reader, noted = Reader(self.bench.engine, Noting(interval), self.prompt), {}
        with mock.patch.object(attention, "received_mass", mass):
            for _ in reader.read(self.ids[:-1], last_only=True):
                noted[reader.cache.seen[0]] = [x.scores[0].clone() for x in reader.cache.layers]
        return noted

    def log_probs(self, reader: Reader) -> Iterable[Tensor]:
        for logits in super().log_probs(reader):
            end = reader.cache.seen[0]
            if reader.policy is self.policy:  # not when the full cache reads, for comparison
                self.count(reader.cache, end - len(logits), end)
            yield logits

    def count(self, cache: KVCache, start: int, end: int) -> None:
        """Adds the attention that the chunk from `start` to `end` gives to keys before it."""
        total = self.noted[max(self.noted)]
        for layer, mass in zip(cache.layers, total, strict=True):
            until, now = (self.squared[seen][layer.index][:, :start] for seen in (start, end))
            looks = (now - until).masked_fill(
                (mass > SINK * mass.sum(1, keepdim=True))[:, :start], 0
            )
            held, positions = torch.zeros_like(mass, dtype=torch.bool), layer.positions[0].long()
            held.scatter_(1, positions, torch.ones_like(positions, dtype=torch.bool))
            self.looks[layer.index] += looks.sum().cpu()
            self.lost[layer.index] += looks[~held[:, :start]].sum().cpu()


def to_come(noted: dict[int, Mass], fade: float) -> dict[int, Mass]:
    """tokens seen -> mass that every key receives later; noted: mass received so far."""
    ends = sorted(noted, reverse=True)
    found = {ends[0]: [torch.zeros_like(mass) for mass in noted[ends[0]]]}
    for end, later in zip(ends[1:], ends, strict=False):
        found[end] = [
            (after[:, :end] - before) + fade * further[:, :end]
            for before, after, further in zip(noted[end], noted[later], found[later], strict=True)
        ]
    return found


def by_layer(cells: list[Cell], found: list[list[dict]]) -> str:
    """A row per layer: lost attention in % of all."""
    able = [(cell, results) for cell, results in zip(cells, found, strict=True) if results]
    heads = [f"{cell.choice} {cell.budget}" for cell, _ in able]
    lines = ["| layer | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(able)]
    for layer in range(len(found[0][0]["looks"])):
        lost = [sum(one["lost"][layer] for one in results) for _, results in able]
        looks = [sum(one["looks"][layer] for one in results) for _, results in able]
        shares = [f"{100 * a / b:.1f}" for a, b in zip(lost, looks, strict=True)]
        lines.append(f"| {layer} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--split", choices=SPLITS, default="report", help="which half of the texts (%(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--texts", type=int, default=6, help="how many (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="of each (default: %(default)s)")
    add("--budget", nargs="+", type=budget_text, default=["10%"], metavar="N|P%",
        help="tokens per layer, or a share of the text (default: 10%%)")  # fmt: skip
    add("--fade", nargs="+", type=float, default=[0.0, 0.8, 1.0],
        help="weight of a chunk beside the one before it (default: 0 0.8 1)")  # fmt: skip
    add("--choice", nargs="+", default=["random", "head", "lethe-plus"], metavar="NAME",
        choices=[name for name in CHOICES if name != "full"],
        help="policies of run.py beside it (default: random head lethe-plus)")  # fmt: skip
    add("--lines", type=Path, help="JSON Lines file to write to, and to continue from")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    parser.set_defaults(prompt=CHUNK, interval=CHUNK, sinks=4, protect="no")
    args = parser.parse_args(argv)
    if args.tokens <= CHUNK or args.tokens % CHUNK:
        parser.error(f"--tokens should be a multiple of {CHUNK}, above {CHUNK}")
    return args


def run(args: argparse.Namespace) -> None:
    """Measures, prints both tables and writes the figures."""
    engine = coder.load(args.model, dtype=args.dtype)
    bench = Bench(engine, Lines(args.lines), args.prompt)
    texts = stretches(engine, args.split, args.seed, args.texts, args.tokens)
    cells = make_cells(args, args.tokens)
    for budget in args.budget:
        common = {"budget": tokens_of(budget, args.tokens), "protect_prompt": False}
        for fade in args.fade:
            policy = Foresight(**common, recent_ratio=0.0, fade=fade)
            cells.append(Cell(f"foresight {fade:g}", budget, False, policy))
    rows = run_prose(bench, cells, texts, CHUNK, read=Foretold)
    found = bench.results(cells, prose_readings(bench, texts, CHUNK, Foretold), len(texts))
    print(f"{args.model} in {args.dtype}, texts to {args.split}; {hardware()}\n")
    print(table("prose", rows), "\n\nattention lost, in %:\n")
    print(by_layer(cells[1:], found[1:]))
    layers = [[{name: one[name] for name in ("looks", "lost")} for one in ones] for ones in found]
    write_json(args.json, args, {"hardware": hardware(), "rows": rows, "layers": layers})


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    main()
