"""What the engine's tests share: a random model, prompts for it, a stand-in for its text."""

import random
from typing import ClassVar

import tiny
from hypothesis import settings

VOCAB, LAYERS, HEADS, KV_HEADS = 67, 3, 6, 2
LONG = 4093  # more positions than any test has tokens
few = settings(max_examples=max(10, settings.default.max_examples // 4))  # each is several runs


def model(positions=LONG):
    """A random model: 3 layers, 2 key/value heads, groups of 3, logits that are spread out."""
    return tiny.model(vocab_size=VOCAB, max_position_embeddings=positions)


class Letters:
    """A stand-in for Text: token i is one letter, and the given ids end a text."""

    sampling: ClassVar[dict] = {}

    def __init__(self, *eos_ids):
        self.eos_ids = frozenset(eos_ids)

    def encode_prompt(self, prompt, system=None, raw=False, think=None):
        return [ord(letter) % VOCAB for letter in prompt]

    def decode(self, ids):
        return "".join(chr(0x100 + id) for id in ids)


def ids(count, seed=0):
    """A prompt of so many random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def tokens_of(result):
    return [one.token_ids for one in result.sequences]
