"""What the reasoner does where nothing is asked: it solves a puzzle that the seed alone decides."""

import random

from ..reasoner.problems import Problem, problem, solved

FAMILY = "walk"
# Texts of 700 to 1,000 tokens: two or three rounds. The model that ships here solves these with
# the full cache, so a wrong answer says something about the policy.
STEPS = range(30, 40)
TASK = "a puzzle: walk through the rooms, add up their digits, and note each sum at a first visit"
SPARE = 50  # tokens beyond what a right solution takes


def puzzle(seed: int) -> Problem:
    """The puzzle of a seed."""
    rng = random.Random(str(seed))
    return problem(FAMILY, rng, rng.choice(STEPS))


def verdict(own: Problem, texts: list[str]) -> str:
    """Were the answers right?"""
    right, kind = sum(solved(own, text) for text in texts), f"({own.family}, {own.size} steps)"
    if right == len(texts):
        return f"the answer is right: {own.answer} {kind}"
    if len(texts) == 1:
        return f"the answer is wrong; right would be: {own.answer} {kind}"
    return f"{right} of {len(texts)} answers are right; right is: {own.answer} {kind}"
