"""Reading a given text under a policy, chunk by chunk; and texts to read.

A given text need not go token by token: all tokens between two rounds can run at once, under the
causal mask. For a chunk of T tokens, arXiv 2511.06029, eq. 5 becomes

    s_T[j] = gamma^T * s_0[j] + sum over queries i = 1 .. T of gamma^(T - i) * A_i[j]

So old scores fade by gamma^T, and a query's mass by its distance from the end of the chunk. Rounds
come where the engine's come: behind the prompt, and every `interval` tokens from there on.
tests/benchmarks/test_quality.py holds the two equal.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor

from lethe_mini import Engine, attention
from lethe_mini.cache import KVCache
from lethe_mini.errors import UserError
from lethe_mini.policy import Lethe, Policy

CHUNK = 128  # most tokens at once, also where no round ends a chunk, as in a long prompt


@contextmanager
def fading_mass(weights: Tensor) -> Iterator[None]:
    """Inside, the mass of a query counts by its weight. weights: (T, 1), for chunks of T tokens."""
    plain = attention.received_mass
    attention.received_mass = partial(plain, weights=weights)
    try:
        yield
    finally:
        attention.received_mass = plain


def read_on(engine: Engine, policy: Policy, cache: KVCache, tokens: Tensor, **options) -> Tensor:
    """tokens (B, T) behind the prompt -> logits (B, T, vocab).

    Leaves the cache as T steps of the engine leave it, but for rounds.
    """
    if not policy.scored:
        return engine.model(tokens, cache=cache, **options)
    T, gamma = tokens.shape[1], 1.0
    if isinstance(policy, Lethe):
        gamma = policy.gamma
    torch._foreach_mul_(cache.scores, gamma**T)
    ages = torch.arange(T - 1, -1, -1, device=engine.device)
    with fading_mass((gamma**ages)[:, None]):
        return engine.model(tokens, cache=cache, **options)


class Reader:
    """One text, its cache and its rounds.

    The first `prompt` tokens are the prompt: one update of the scores without decay, then a round.
    rounds: (tokens seen, tokens held per layer on average) behind every round, also behind one that
    was not due because the sequence was short.
    """

    def __init__(self, engine: Engine, policy: Policy, prompt: int):
        policy.check_prompt(prompt)
        self.engine, self.policy, self.cache = engine, policy, engine.new_cache(policy)
        self.cache.prompt = [prompt]
        self.interval = getattr(policy, "interval", CHUNK)
        self.pause = getattr(policy, "pause", self.interval)  # and there it looks, at least
        self.rounds: list[tuple[int, float]] = []

    def read(self, ids: list[int], last_only: bool = False) -> Iterator[Tensor]:
        """Reads on. Yields every chunk's logits: (T, vocab), or (1, vocab) of its last token alone.
        A text may be read in several calls; where one ends changes nothing."""
        while ids:
            new = self.cache.seen[0] - self.cache.prompt[0]
            to_round = -new if new < 0 else self.interval - new % self.interval
            to_look = to_round if new < 0 else self.pause - new % self.interval % self.pause
            T = min(to_round, to_look, CHUNK, len(ids))
            yield self._chunk(ids[:T], new < 0, last_only)
            if to_round == T:
                self._round(prefilled=new < 0)
            elif to_look == T:
                self.policy.due(self.cache)
            ids = ids[T:]

    def _chunk(self, ids: list[int], in_prompt: bool, last_only: bool) -> Tensor:
        tokens = torch.tensor([ids], device=self.engine.device)
        if in_prompt:
            return self.engine.model(tokens, cache=self.cache, last_only=last_only)[0]
        return read_on(self.engine, self.policy, self.cache, tokens, last_only=last_only)[0]

    def _round(self, prefilled: bool) -> None:
        cache = self.cache
        due = self.policy.due(cache, prefilled)
        if any(due):
            self.policy.round(cache, due)
        self.rounds.append((cache.seen[0], cache.held / len(cache.layers)))


# -- texts -----------------------------------------------------------------------------------------

SPLITS = ("choose", "report")


def split_topics(split: str, seed: int) -> list[str]:
    """The texts of Python's own help; one half is for choosing, the other for reporting.

    Topics share paragraphs. Only the longest topic that has a paragraph keeps it, so that none is
    in both halves. Topics are sorted by length and go in pairs, one of each pair to each half.
    """
    met: set[str] = set()
    texts = []
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        new = []
        for paragraph in text.strip().split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in met:
                met.add(words)
                new.append(paragraph)
        texts.append("\n\n".join(new))
    texts = sorted((text for text in texts if len(text) >= 500), key=len, reverse=True)
    rng, chosen = random.Random(seed), []
    for first in range(0, len(texts), 2):
        pair = texts[first : first + 2]
        rng.shuffle(pair)
        chosen += pair[:1] if split == "choose" else pair[1:]
    rng.shuffle(chosen)
    return chosen


def token_stream(engine: Engine, split: str, seed: int) -> list[int]:
    """All texts of a half, joined."""
    return [
        token
        for text in split_topics(split, seed)
        for token in engine.text.encode(text + "\n\n", add_special_tokens=False)
    ]


def stretches(engine: Engine, split: str, seed: int, count: int, tokens: int) -> list[list[int]]:
    """`count` stretches of `tokens` ids, one behind the other. Each has the next one's first id at
    its end, to be predicted. Raises UserError where the texts are too short."""
    stream = token_stream(engine, split, seed)
    if count * tokens >= len(stream):
        asked = f"{count} texts of {tokens:,} tokens"
        raise UserError(f"{split} has {len(stream):,} tokens, too few for {asked}; ask for fewer")
    return [stream[i * tokens : (i + 1) * tokens + 1] for i in range(count)]
