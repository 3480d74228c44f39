"""Reading a given text under a policy, a chunk at a time; and texts to read.

Where the text is given, nothing needs to go token by token: the tokens between two rounds can be
run at once, under the causal mask. For T tokens in one chunk arXiv 2511.06029, eq. 5, is

    s_T[j] = gamma^T * s_0[j] + sum over queries i = 1 .. T of gamma^(T - i) * A_i[j]

so old scores fade by gamma^T, and a query's mass by its distance from the chunk's end. Rounds fall
where the engine's do: after the prompt and every `interval` tokens from there. The two are held
equal by tests/test_quality.py.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor

from lethe_mini import Engine, attention
from lethe_mini.cache import KVCache
from lethe_mini.policy import Policy

CHUNK = 128  # most tokens at once where no round ends a chunk, as in a long prompt


@contextmanager
def fading_mass(weights: Tensor) -> Iterator[None]:
    """Inside, a query's mass counts as much as its weight; weights: (T, 1), for chunks of T."""
    plain = attention.received_mass
    attention.received_mass = partial(plain, weights=weights)
    try:
        yield
    finally:
        attention.received_mass = plain


def read_on(engine: Engine, policy: Policy, cache: KVCache, tokens: Tensor, **options) -> Tensor:
    """tokens (B, T) behind the prompt -> logits (B, T, vocab). The cache is left as by T steps of
    the engine, but for the rounds."""
    gamma, T = policy.gamma, tokens.shape[1]
    if gamma is None:
        return engine.model(tokens, cache=cache, **options)
    cache.decay(gamma**T)
    ages = torch.arange(T - 1, -1, -1, device=engine.device)
    with fading_mass((gamma**ages)[:, None]):
        return engine.model(tokens, cache=cache, **options)


class Reader:
    """One text, its cache and its rounds.

    The first `prompt` tokens are the prompt: one update of the scores, undecayed, then a round.
    rounds: wherever a round falls, also one that is not due for want of tokens: (tokens seen,
    tokens per layer held after it, on average over layers).
    """

    def __init__(self, engine: Engine, policy: Policy, prompt: int):
        policy.check(prompt)
        self.engine, self.policy, self.cache = engine, policy, engine.new_cache(policy)
        self.cache.prompt = [prompt]
        self.interval = getattr(policy, "interval", CHUNK)
        self.rounds: list[tuple[int, float]] = []

    def read(self, ids: list[int], last_only: bool = False) -> Iterator[Tensor]:
        """Reads on; for every chunk its logits (T, vocab), or of its last token alone (1, vocab).
        Where one call ends and the next begins changes nothing."""
        while ids:
            new = self.cache.seen[0] - self.cache.prompt[0]
            to_round = -new if new < 0 else self.interval - new % self.interval
            T = min(to_round, CHUNK, len(ids))
            yield self._chunk(ids[:T], new < 0, last_only)
            if to_round == T:
                self._round(prefilled=new < 0)
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
    """The texts of Python's own help, half of them for choosing and half for reporting.

    Topics repeat each other, so a paragraph counts once, in the longest topic that has it: no
    paragraph is in both halves. By length, topics go in pairs, one to each half by the seed.
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
    """All texts of a half, one behind the other."""
    return [
        token
        for text in split_topics(split, seed)
        for token in engine.text.encode(text + "\n\n", add_special_tokens=False)
    ]


def stretches(engine: Engine, split: str, seed: int, count: int, tokens: int) -> list[list[int]]:
    """`count` stretches of `tokens` ids, one behind the other, each with the next one's first id
    at its end, to be predicted. Raises SystemExit where there are not as many."""
    stream = token_stream(engine, split, seed)
    if count * tokens >= len(stream):
        sys.exit(f"{split} has {len(stream):,} tokens, not {count} x {tokens:,}: ask for fewer")
    return [stream[i * tokens : (i + 1) * tokens + 1] for i in range(count)]
