"""The reasoner's problems in batches, under a policy: written, or read.

`write` decodes greedily with the engine. `read` is given the right chain, in chunks between rounds
(reading.py), and finds the tokens where another one is likelier. There is one right chain, so
decoding writes it if and only if reading finds no error in it. Up to the first error, what is
written equals what is read, and so do scores, rounds and tokens held. tests/benchmarks/
test_reason.py holds the two equal.
"""

import copy
import random
from collections import Counter
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from benchmarks.quality.reading import CHUNK, read_on
from lethe_mini import Engine, Sampling
from lethe_mini.cache import KVCache, Notes
from lethe_mini.policy import Policy
from lethe_mini.reasoner.problems import Problem, problem, solved

COPIES = 3  # so many copies make a loop


def draw(family: str, number: int, seed: str, sizes: range) -> Problem:
    """Problem `number` of a family; its size is drawn evenly from `sizes`."""
    rng = random.Random(f"{seed}-{family}-{number}")
    return problem(family, rng, rng.choice(sizes))


def loops(text: str) -> bool:
    """Does the text have a line three times, or does it end in three copies of some words?

    A right chain has no line twice, since its lines are numbered.
    """
    if Counter(text.split("\n")).most_common(1)[0][1] >= COPIES:
        return True
    words = text.replace("\n", " \n ").split(" ")
    return any(
        words[-COPIES * n :] == words[-n:] * COPIES for n in range(1, len(words) // COPIES + 1)
    )


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts have in common before they part."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Batch:
    """Problems of a family and of about one size: [(number, problem)]."""

    def __init__(self, engine: Engine, family: str, problems: list[tuple[int, Problem]]):
        self.engine, self.family = engine, family
        self.numbers, self.problems = zip(*problems, strict=True)
        encode, (end,) = engine.text.encode, engine.text.eos_ids
        self.prompts = [encode(one.prompt) for one in self.problems]
        self.chains = [[*encode(one.chain), end] for one in self.problems]
        self._prefilled: dict[Notes, tuple[KVCache, Tensor]] = {}

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
        """Slots held per layer, as a mean over all steps, where sequence b writes tokens[b].

        That is in the full cache, or under a policy that keeps its whole budget at every round, and
        everything in between. A step sees the tokens before it and its own. The last token that is
        written is never read.
        """
        total = steps = 0
        for prompt, count in zip(map(len, self.prompts), tokens, strict=True):
            for step in range(1, count):
                since = (step - 1) % interval + 1  # tokens since the last round
                kept = prompt + step - since
                if budget is not None:
                    kept = min(kept, budget)
                total += since + kept
            steps += count - 1
        return total / max(1, steps)

    # -- writing ------------------------------------------------------------------------------

    def write(self, policy: Policy, room: float) -> dict:
        """Decodes greedily, at most `room` times as many tokens as the right chain has.

        Per problem: was the answer right (`solved`), was the whole chain (`exact`), the number of
        right tokens before the first wrong one (`first`), the number of tokens written, did the
        text loop, was it cut off. `held`, `full`: slots per layer as a mean over `steps`, held and
        in a full cache.
        """
        limits = [round(room * len(chain)) for chain in self.chains]
        made = self.engine.generate(self.prompts, policy, limits, Sampling())
        if any(one.finish_reason == "interrupted" for one in made.sequences):
            raise KeyboardInterrupt  # the engine has caught it and returned a part
        pairs = list(zip(made.sequences, self.problems, strict=True))
        tokens = [one.generated_tokens for one, _ in pairs]
        written = [one.token_ids for one, _ in pairs]
        return {
            "solved": [one.finish_reason == "stop" and solved(p, one.text) for one, p in pairs],
            "exact": [one.finish_reason == "stop" and one.text == p.chain for one, p in pairs],
            "first": [common(*both) for both in zip(written, self.chains, strict=True)],
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
        """Reads the right chains. whole: to their ends, also behind an error.

        Per problem: was every token the likeliest one (`exact`), the place of the first that was
        not, or the chain's length (`first`), and of the `tokens` that were read how many were
        `wrong`, and their negative log-likelihood in `nats`. `held`, `full`: see `write`.
        """
        for prompt in self.prompts:
            policy.check_prompt(len(prompt))
        cache, last = self.prefilled(policy)
        if any(due := policy.due(cache, prefilled=True)):
            policy.round(cache, due)
        interval, count = getattr(policy, "interval", CHUNK), len(self.chains)
        pause = getattr(policy, "pause", interval)  # there a policy looks, at least
        first = [len(chain) for chain in self.chains]
        wrong, nats, tokens = [0] * count, [0.0] * count, [1] * count
        live, read, held = list(range(count)), 0, 0.0

        def note(logits: Tensor, begin: int) -> None:
            """Counts errors; logits: (rows, T, vocab) for the chains' tokens from `begin` on."""
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
            new = read % interval
            T = min(interval - new, pause - new % pause, CHUNK)
            before = [sum(layer.lengths[r] for layer in cache.layers) for r in range(len(live))]
            logits = read_on(self.engine, policy, cache, self._tokens(live, read, T))
            note(logits, read + 1)
            for row, slots in zip(live, before, strict=True):
                n = min(T, len(self.chains[row]) - 1 - read)  # the last token is never read
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
            if live and read % interval % pause == 0 and any(due := policy.due(cache)):
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
        """A cache with the prompts before any round, and the logits behind them, (B, 1, vocab).

        Policies whose caches note the same things share one prefill.
        """
        key = policy.notes()
        if key not in self._prefilled:
            caches, logits = [], []
            for ids in self.prompts:
                cache = self.engine.new_cache(policy)
                cache.prompt = [len(ids)]
                tokens = torch.tensor([ids], device=self.engine.device)
                logits.append(self.engine.model(tokens, cache=cache, last_only=True))
                caches.append(cache)
            while len(caches) > 1:  # in pairs, since every join moves all that it has
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
    """`count` problems, sorted by size, in batches of about as many each."""
    problems = [(number, draw(family, number, seed, sizes)) for number in range(count)]
    problems.sort(key=lambda pair: pair[1].size)
    parts = -(-count // batch)
    cuts = [count * part // parts for part in range(parts + 1)]
    return [Batch(engine, family, problems[a:b]) for a, b in pairwise(cuts)]
