"""How much better scores could be: eviction by an oracle that sees all future attention.

    python -m benchmarks.quality.foresight --texts 4 --budget 10% --json foresight.json
    python -m benchmarks.quality.foresight --own gym:gsm_symbolic --model coder --dtype bfloat16

A policy estimates which tokens will receive attention; `Foresight` knows. A first pass with the
full cache notes the mass that each chunk's queries give to each key. At a round, those tokens stay
that receive most from then on. A chunk counts `fade` times the one before it: with 0 only the next
chunk counts, with 1 all chunks to the end count alike. Layers share evenly, and every KV head
chooses for itself, like the choice `head` of run.py. The difference between the two is what better
scores can gain at least. It is no upper bound, since other choices of tokens might serve the text
even better. Texts are those of `run prose`, or with --own those of `run own`; the prompt is free.

Two more tables say in which layers attention is lost, and to how old keys. With the full cache,
each query's squared attention to keys before the last round is added up; the square makes a sharp
query count and a diffuse one not. The tables have the part of this that fell on keys which the
policy had dropped. Sinks are left out: keys that receive more than a hundredth of all mass of their
head, wherever they stand. --json also has the figures of each KV head.
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
from benchmarks.quality import own
from benchmarks.quality.choices import CHOICES, Cell, budget_text, tokens_of
from benchmarks.quality.reading import CHUNK, SPLITS, Reader, stretches
from benchmarks.quality.run import Bench, Own, Prose, make_cells, prose_readings, run_prose, table
from lethe_mini import FullKV, Policy, Pruner, attention
from lethe_mini.cache import KVCache, LayerCache
from lethe_mini.policies import POLICIES

SINK = 0.01  # of all mass of a head
LOOK = POLICIES["recall"].window  # a chunk ends there for Recall, and notes are taken for all
AGES = [128, 256, 512, 1024]  # tokens since a key was read: where the next row begins
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

    policy: Policy | None = None  # that is read under, and loses attention
    noted: dict[int, Mass] | None = None  # tokens seen -> mass received so far
    squared: dict[int, Mass] | None = None  # the same, of squares

    @torch.inference_mode()
    def read(self, policy: Policy) -> dict:
        """Adds the squared attention (`looks`) and the part of it that is `lost`: of each KV head,
        by layer (L, H_kv), and by the keys' age (`old_looks`, `old_lost`)."""
        if isinstance(policy, FullKV):  # it loses nothing, and has no rounds to take notes for
            return super().read(policy)
        if self.noted is None:
            self.noted = self.note(policy.interval, attention.received_mass)
            self.squared = self.note(min(LOOK, policy.interval), squared_mass)
        if isinstance(policy, Foresight):
            Foresight.to_come = to_come(self.noted, policy.fade)
        heads = self.noted[max(self.noted)][0].shape[0]
        self.by_head = torch.zeros(2, len(self.bench.engine.model.layers), heads)
        self.by_age = torch.zeros(2, len(AGES) + 1)
        self.policy = policy
        found = super().read(policy)
        for name, (looks, lost) in {"": self.by_head, "old_": self.by_age}.items():
            found |= {f"{name}looks": looks.tolist(), f"{name}lost": lost.tolist()}
        return found

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
                self.count(reader.cache, end - len(logits), end, reader.rounds[-1][0])
            yield logits

    def count(self, cache: KVCache, start: int, end: int, round_at: int) -> None:
        """Adds the attention that the chunk from `start` to `end` gives to keys before a round."""
        total = self.noted[max(self.noted)]
        age = start - torch.arange(round_at)
        row = torch.bucketize(age, torch.tensor(AGES), right=True)
        for layer, mass in zip(cache.layers, total, strict=True):
            until, now = (self.squared[seen][layer.index][:, :round_at] for seen in (start, end))
            sinks = mass > SINK * mass.sum(1, keepdim=True)
            looks = (now - until).masked_fill(sinks[:, :round_at], 0)
            held, positions = torch.zeros_like(mass, dtype=torch.bool), layer.positions[0].long()
            held.scatter_(1, positions, torch.ones_like(positions, dtype=torch.bool))
            both = torch.stack((looks, looks.masked_fill(held[:, :round_at], 0))).cpu()
            self.by_head[:, layer.index] += both.sum(2)
            self.by_age.index_add_(1, row, both.sum(1))


class ForetoldOwn(Foretold, Own):
    """The same of the model's own chains."""


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


def lost_table(head: str, names: list[str], found: list[tuple[str, list[dict]]], name: str) -> str:
    """A row per name: its part of all looks, and how much of it each choice lost, in %. found: the
    choices and their results, whose `name`looks and `name`lost are (rows,) or (rows, heads)."""

    def total(results: list[dict], what: str) -> Tensor:
        return sum(torch.tensor(one[name + what]) for one in results).reshape(len(names), -1).sum(1)

    columns = [total(results, "lost") / total(results, "looks") for _, results in found]
    looks = total(found[0][1], "looks")
    lines = [f"| {head} | of all looks | " + " | ".join(choice for choice, _ in found) + " |"]
    lines.append("|---:|" + "---:|" * (len(found) + 1))
    for row, *shares in zip(names, looks / looks.sum(), *columns, strict=True):
        lines.append(f"| {row} | " + " | ".join(f"{100 * x:.1f}" for x in shares) + " |")
    return "\n".join(lines)


def lost_tables(cells: list[Cell], found: list[list[dict]]) -> str:
    """By layer and by age."""
    pairs = zip(cells, found, strict=True)
    able = [(f"{cell.choice} {cell.budget}", results) for cell, results in pairs if results]
    layers = [str(layer) for layer in range(len(able[0][1][0]["looks"]))]
    starts = [0, *AGES]
    ages = [f"{a:,} to {b:,}" for a, b in zip(starts, AGES, strict=False)] + [f"{AGES[-1]:,} on"]
    by_age = lost_table("age of the key", ages, able, "old_")
    return lost_table("layer", layers, able, "") + "\n\n" + by_age


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="default: %(default)s")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--split", choices=SPLITS, default="report", help="which half of the texts (%(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--own", metavar="gym:NAME|FILE", help="read the model's own chains of these problems")
    add("--texts", type=int, default=6, help="how many (default: %(default)s)")
    add("--tokens", type=int, help="of each (default: 4096; least of own chains: 1500)")
    add("--interval", type=int, help="tokens between rounds (default: 128; own chains: 64)")
    add("--count", type=int, default=150, help="with --own: problems (default: %(default)s)")
    add("--budget", nargs="+", type=budget_text, default=["10%"], metavar="N|P%",
        help="tokens per layer, or a share of the text (default: 10%%)")  # fmt: skip
    add("--fade", nargs="+", type=float, default=[0.0, 0.8, 1.0],
        help="weight of a chunk beside the one before it (default: 0 0.8 1)")  # fmt: skip
    add("--choice", nargs="+", default=["random", "head", "lethe-plus"], metavar="NAME",
        choices=[name for name in CHOICES if name != "full"],
        help="policies of run.py beside it (default: random head lethe-plus)")  # fmt: skip
    add("--lines", type=Path, help="JSON Lines file to write to, and to continue from")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    parser.set_defaults(prompt=0, sinks=4, protect="no", alone=False, max_new_tokens=512)
    parser.set_defaults(batch_size=16)
    args = parser.parse_args(argv)
    args.problems = args.own
    args.tokens = args.tokens or (1500 if args.own else 4096)
    args.interval = args.interval or (64 if args.own else CHUNK)
    if args.interval % min(LOOK, args.interval):
        parser.error(f"--interval should be a multiple of {LOOK}, or less")
    if not args.own:
        args.prompt = CHUNK
        if args.tokens <= CHUNK or args.tokens % CHUNK:
            parser.error(f"--tokens should be a multiple of {CHUNK}, above {CHUNK}")
    return args


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables and writes the figures."""
    engine = coder.load(args.model, dtype=args.dtype)
    bench = Bench(engine, Lines(args.lines), args.prompt)
    length, read = args.tokens, ForetoldOwn if args.own else Foretold
    if args.own:
        texts = own.texts(engine, args, bench.lines, bench.weights)
        length = own.mean_length(texts)
    else:
        texts = stretches(engine, args.split, args.seed, args.texts, args.tokens)
    cells = make_cells(args, length)
    for budget in args.budget:
        common = {"budget": tokens_of(budget, length), "protect_prompt": False}
        for fade in args.fade:
            policy = Foresight(**common, interval=args.interval, recent_ratio=0.0, fade=fade)
            cells.append(Cell(f"foresight {fade:g}", budget, False, policy))
    rows = run_prose(bench, cells, texts, CHUNK, read=read)
    found = bench.results(cells, prose_readings(bench, texts, CHUNK, read), len(texts))
    print(f"{args.model} in {args.dtype}, texts to {args.split}; {hardware()}\n")
    print(table("prose", rows), "\n\nattention lost, in %:\n")
    print(lost_tables(cells[1:], found[1:]))
    names = ("looks", "lost", "old_looks", "old_lost")
    lost = [[{name: one[name] for name in names} for one in ones] for ones in found[1:]]
    write_json(args.json, args, {"hardware": hardware(), "rows": rows, "lost": lost})


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    main()
