"""Prompts of any length: ordinary words in random order."""

import random

TEXT = (
    "the river ran under a stone bridge while seven children counted boats and an old clerk wrote "
    "every number down because tomorrow somebody would ask how many had passed before noon"
)


def word_ids(text, tokens: int, seed: int = 0) -> list[int]:
    """The ids of so many tokens. text: a model's Text; another seed gives another order."""
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < tokens:
        words = " ".join(rng.choices(TEXT.split(), k=200))
        ids += text.encode(words, add_special_tokens=False)
    return ids[:tokens]
