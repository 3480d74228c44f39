"""Problems of lethe_mini/tasks.py, in batches, under a policy: solved by writing, or read.

`write` decodes greedily with the engine. `read` is given the right chain, in chunks between rounds
(reading.py), and looks where the likeliest token is another. The chain is unique, so the two agree:
decoding writes the chain if and only if reading finds no error in it. For up to the first error
what is written is what is read, and with it scores, rounds and what is held. tests/test_reason.py
holds them equal.
"""

import copy
import random
from collections import Counter
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from benchmarks.quality.reading import CHUNK, read_on
from lethe_mini import Engine
from lethe_mini.cache import KVCache
from lethe_mini.policy import Policy
from lethe_mini.reasoner.problems import Problem, check, problem

COPIES = 3  # of the same, that make a loop


def draw(family: str, number: int, seed: str, sizes: range) -> Problem:
    """Problem `number` of a family, of a size that is drawn evenly from `sizes`."""
    rng = random.Random(f"{seed}-{family}-{number}")
    return problem(family, rng, rng.choice(sizes))


def loops(text: str) -> bool:
    """Does a line stand there three times, or does the text end in three copies of some words?

    A right chain has no line twice, for its lines are numbered.
    """
    if Counter(text.split("\n")).most_common(1)[0][1] >= COPIES:
        return True
    words = text.replace("\n", " \n ").split(" ")
    return any(
        words[-COPIES * n :] == words[-n:] * COPIES for n in range(1, len(words) // COPIES + 1)
    )


class Batch:
    """Problems of a family and of about one size: [(number, problem)]."""

    def __init__(self, engine: Engine, family: str, problems: list[tuple[int, Problem]]):
        self.engine, self.family = engine, family
        self.numbers, self.problems = zip(*problems, strict=True)
        encode, (end,) = engine.text.encode, engine.text.eos_ids
        self.prompts = [encode(one.prompt) for one in self.problems]
        self.chains = [[*encode(one.chain), end] for one in self.problems]
        self._prefilled: dict[tuple, tuple[KVCache, Tensor]] = {}

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def chain(self) -> float:
        """Tokens of a chain, on average."""
        return sum(map(len, self.chains)) / len(self.chains)

    @property
    def length(self) -> float:
        """Tokens of prompt and chain, on average."""
        return self.chain + sum(map(len, self.prompts)) / len(self.prompts)

    def held(self, tokens: list[int], budget: int | None = None, interval: int = 1) -> float:
        """Slots held per layer, mean over all steps, where sequence b writes tokens[b]: by the full
        cache, or by a policy that keeps its budget at every round and everything in between.

        What is last written is never read. A step sees the tokens before it and its own.
        """
        total = steps = 0
        for prompt, count in zip(map(len, self.prompts), tokens, strict=True):
            for step in range(1, count):
                since = (step - 1) % interval + 1  # tokens since the last round
                kept = prompt + step - since
                total += since + (kept if budget is None else min(kept, budget))
            steps += count - 1
        return total / max(1, steps)

    # -- writing ------------------------------------------------------------------------------

    def write(self, policy: Policy, room: float) -> dict:
        """Greedy decoding, of at most `room` times the right chain's tokens. Per problem: was the
        answer right, was the chain, and up to which token; tokens written, did it loop, did the
        room end it. `held` and `full`: slots per layer, mean over `steps`, held and in a full
        cache."""
        limits = [round(room * len(chain)) for chain in self.chains]
        made = self.engine.generate(self.prompts, policy, limits)
        if any(one.finish_reason == "interrupted" for one in made.sequences):
            raise KeyboardInterrupt  # which the engine answers with what there is
        pairs = list(zip(made.sequences, self.problems, strict=True))
        tokens = [one.generated_tokens for one, _ in pairs]
        return {
            "solved": [one.finish_reason == "stop" and check(p, one.text) for one, p in pairs],
            "exact": [one.finish_reason == "stop" and one.text == p.chain for one, p in pairs],
            "first": [
                sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False)))
                for both in zip((one.token_ids for one, _ in pairs), self.chains, strict=True)
            ],
            "tokens": tokens,
            "looped": [loops(one.text) for one, _ in pairs],
            "truncated": [one.finish_reason != "stop" for one, _ in pairs],
            "held": made.stats.kv_tokens_mean,
            "full": self.held(tokens),
            "steps": sum(tokens) - len(tokens),
        }

    # -- reading ------------------------------------------------------------------------------

    @torch.inference_mode()
    def read(self, policy: Policy, whole: bool = True) -> dict:
        """The right chains, teacher-forced. Per problem: was every token the likeliest, the first
        that was not (or how many there are), and of those read (`tokens`) how many were `wrong` and
        minus the sum of their log-probabilities, `nats`. `held` and `full` as by `write`. Unless
        `whole`, a chain is left soon after its first error."""
        for prompt in self.prompts:
            policy.check(len(prompt))
        cache, last = self.prefilled(policy)
        if any(due := policy.due(cache, prefilled=True)):
            policy.round(cache, due)
        interval, count = getattr(policy, "interval", CHUNK), len(self.chains)
        first = [len(chain) for chain in self.chains]
        wrong, nats, tokens = [0] * count, [0.0] * count, [1] * count
        live, read, held = list(range(count)), 0, 0.0

        def note(logits: Tensor, begin: int) -> None:
            """logits (rows, T, vocab) of the chains' tokens from `begin` on."""
            T = logits.shape[1]
            targets = self._tokens(live, begin, T)
            slots = torch.arange(begin, begin + T, device=self.engine.device)
            there = slots < lengths[:, None]
            costs = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * there
            missed = (logits.argmax(-1) != targets) & there
            places = slots.where(missed, 10**9)
            rows = zip(live, costs.sum(1).tolist(), missed.sum(1).tolist(), strict=True)
            for (row, cost, misses), place in zip(rows, places.amin(1).tolist(), strict=True):
                nats[row] += cost
                wrong[row] += misses
                first[row] = min(first[row], place)

        lengths = torch.tensor([len(chain) for chain in self.chains], device=self.engine.device)
        note(last, 0)
        while live:
            T = min(interval - read % interval, CHUNK)
            before = [sum(layer.lengths[r] for layer in cache.layers) for r in range(len(live))]
            logits = read_on(self.engine, policy, cache, self._tokens(live, read, T))
            note(logits, read + 1)
            for row, slots in zip(live, before, strict=True):
                n = min(T, len(self.chains[row]) - 1 - read)  # what is last is never read
                held += n * slots / len(cache.layers) + n * (n + 1) / 2
                tokens[row] += n
            read += T
            stay = [
                r
                for r, row in enumerate(live)
                if tokens[row] < len(self.chains[row]) and (whole or not wrong[row])
            ]
            if len(stay) < len(live):
                cache.select(stay)
                live, lengths = [live[r] for r in stay], lengths[stay]
            if live and read % interval == 0 and any(due := policy.due(cache)):
                policy.round(cache, due)
        return {
            "exact": [place == len(chain) for place, chain in zip(first, self.chains, strict=True)],
            "first": first,
            "wrong": wrong,
            "nats": nats,
            "tokens": tokens,
            "held": held / (sum(tokens) - count),
            "full": self.held(tokens),
            "steps": sum(tokens) - count,
        }

    def _tokens(self, rows: list[int], begin: int, T: int) -> Tensor:
        """(rows, T): tokens of the chains from `begin` on, then zeros."""
        parts = [self.chains[row][begin : begin + T] for row in rows]
        padded = [part + [0] * (T - len(part)) for part in parts]
        return torch.tensor(padded, device=self.engine.device)

    def prefilled(self, policy: Policy) -> tuple[KVCache, Tensor]:
        """A cache that holds the prompts, as no round has touched it yet, and the logits behind
        them, (B, 1, vocab). The same for all policies whose caches note the same things."""
        key = tuple(sorted(policy.notes().items()))
        if key not in self._prefilled:
            caches, logits = [], []
            for ids in self.prompts:
                cache = self.engine.new_cache(policy)
                cache.prompt = [len(ids)]
                tokens = torch.tensor([ids], device=self.engine.device)
                logits.append(self.engine.model(tokens, cache=cache, last_only=True))
                caches.append(cache)
            while len(caches) > 1:  # by halves: every join moves all it has
                pairs = [caches[i : i + 2] for i in range(0, len(caches), 2)]
                for one, *other in pairs:
                    if other:
                        one.join(*other)
                caches = [one for one, *_ in pairs]
            self._prefilled[key] = caches[0], torch.cat(logits)
        cache, logits = self._prefilled[key]
        return copy.deepcopy(cache), logits


def batches(
    engine: Engine, family: str, sizes: range, seed: str, count: int, batch: int
) -> list[Batch]:
    """`count` problems in batches of like size, about as many in each."""
    problems = [(number, draw(family, number, seed, sizes)) for number in range(count)]
    problems.sort(key=lambda pair: pair[1].size)
    parts = -(-count // batch)
    cuts = [count * part // parts for part in range(parts + 1)]
    return [Batch(engine, family, problems[a:b]) for a, b in pairwise(cuts)]
