"""How much better scores could be: eviction that has seen the attention to come.

    python -m benchmarks.quality.foresight --texts 4 --budget 10% --json foresight.json

A policy guesses which tokens will be looked at. `Foresight` knows: the text is read once with the
full cache, noting the mass that the queries of every chunk give each key, and at a round those
tokens stay that receive most from then on, where a chunk counts `fade` times the one before it (0:
the next alone; 1: all to the end). Layers share evenly, every KV head chooses for itself, as `head`
of quality.py does without foresight. What lies between the two is what scores could win at least,
knowing everything; it is no bound, since other choices might serve the text better still. Prose as
in quality.py, prompt free.

A second table says in which layers looks are lost: of the squared attention (of every query, so
that a sharp look counts and a vague one does not) that the full cache's queries of each chunk give
to keys before it, the share at keys that the policy had dropped. Sinks, wherever they stand, are
left out: keys that receive more than a hundredth of all mass of their head.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.results import Lines, write_json
from benchmarks.memory.batches import hardware
from benchmarks.quality.choices import CHOICES, Cell, budget_text, tokens_of
from benchmarks.quality.reading import CHUNK, SPLITS, Reader, stretches
from benchmarks.quality.run import Bench, Prose, make_cells, prose_readings, run_prose, table
from lethe_mini import Engine, attention
from lethe_mini.cache import KVCache, LayerCache
from lethe_mini.policy import FullKV, Policy, Pruner

SINK = 0.01  # of all mass of a head
Mass = list[Tensor]  # of every layer (H_kv, S)


def squared_mass(q: Tensor, k: Tensor, mask: None, lag: int = 0, weights=None) -> Tensor:
    """In place of attention.received_mass: the sum of squares. One sequence, causal."""
    (B, H_kv, S, D), T = k.shape, q.shape[2]
    logits = torch.matmul(q.reshape(B, H_kv, -1, D) * D**-0.5, k.mT).view(B, H_kv, -1, T, S)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).square().sum(dim=(2, 3))


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
    squared: dict[int, Mass] | None = None  # the same of squares

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """And per layer the `looks`, and of these the `lost`, as sums of squares."""
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
        reader, noted = Reader(self.bench.engine, Noting(interval), self.bench.prompt), {}
        with mock.patch.object(attention, "received_mass", mass):
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
    able = [(cell, results) for cell, results in zip(cells, found, strict=True) if results]
    heads = [f"{cell.choice} {cell.budget}" for cell, _ in able]
    lines = ["| layer | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(able)]
    for layer in range(len(found[0][0]["looks"])):
        lost = [sum(one["lost"][layer] for one in results) for _, results in able]
        looks = [sum(one["looks"][layer] for one in results) for _, results in able]
        shares = [f"{100 * a / b:.1f}" for a, b in zip(lost, looks, strict=True)]
        lines.append(f"| {layer} | " + " | ".join(shares) + " |")
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
    add("--choice", nargs="+", default=["random", "head", "lethe"], metavar="NAME",
        choices=[name for name in CHOICES if name != "full"],
        help="beside it, of quality.py's (default: %(default)s)")  # fmt: skip
    add("--lines", type=Path, help="JSON Lines file to write to, and to go on with")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    parser.set_defaults(prompt=CHUNK, interval=CHUNK, sinks=4, protect="no")
    args = parser.parse_args(argv)
    if args.tokens <= CHUNK or args.tokens % CHUNK:
        parser.error(f"--tokens should be a multiple of {CHUNK}, and more")
    engine = Engine.from_pretrained(args.model, dtype="float32")
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
    print(f"{args.model} in float32, texts to {args.split}; {hardware()}\n")
    print(table("prose", rows), "\n\nlooks lost, in %:\n")
    print(by_layer(cells[1:], found[1:]))
    layers = [[{name: one[name] for name in ("looks", "lost")} for one in ones] for ones in found]
    write_json(args.json, args, {"hardware": hardware(), "rows": rows, "layers": layers})


if __name__ == "__main__":
    main()
