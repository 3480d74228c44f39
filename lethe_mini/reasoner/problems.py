"""Problems whose solution is a long chain of small steps, made from a seed and checked exactly.

What a step needs is somewhere in the text: a fact of the prompt, asked for when the chain gets
there; a result noted once, many steps ago; or what the last step left. Almost everything else in
the chain is stale as soon as it is written. So what a cache forgets decides what is solved.

- `walk`: rooms, each with a digit and two exits. A first visit reads the room's digit from the
  prompt and leaves a note in its place; every later visit reads that note. Which exit is taken
  depends on the sum so far, so facts are needed again and again, at times nobody can foresee.
- `sum`: columns of digits, added up from the ones to the highest power of ten, each digit where
  the chain gets to it. A column's total waits for the end, its carry starts the next.
- `run`: a straight program over a total and many registers, each written once. A line adds a
  register that was set by the prompt or any number of lines ago, takes it away, or sets a new one
  to the total; most are never read again.

Texts are words between single spaces; a line of the chain is one step. A lookup is always of the
same kind: a name that stood somewhere before, and what came right behind it (`even C` -> `B`).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

FAMILY_NAMES = ("walk", "sum", "run")
NUMBERS = range(200)  # the numbers that are words; those from FIRST_LABEL on also name steps
FIRST_LABEL = 10
ROOMS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
REGISTERS = [letter + digit for letter in "abcdefghijklmnop" for digit in "01234567"]
POWERS = [f"10^{power}" for power in range(4)]
WORDS = (
    list(".:\n+-=xy")
    + ["digit", "note", "even", "odd", "from", "to", "answer", "carry", "total", "set"]
    + list(FAMILY_NAMES)
    + [str(number) for number in NUMBERS]
    + ROOMS
    + REGISTERS
    + POWERS
)
ANSWER = "answer"
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
}


@dataclass(frozen=True)
class Problem:
    """A question, the only right chain of steps (it ends with the answer), and the answer."""

    family: str
    size: int  # steps: rooms entered, digits added, or program lines run
    prompt: str
    chain: str
    answer: str


def problem(family: str, rng: random.Random, size: int) -> Problem:
    """A problem of `size` steps, drawn from `rng` alone. ValueError for what cannot be made."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    make, most = FAMILIES[family]
    if not 4 <= size <= most:
        raise ValueError(f"a {family} has 4 to {most} steps, not {size}")
    prompt, chain = (" ".join(map(str, words)) for words in make(rng, size))
    chain = chain.replace(" \n ", "\n")
    return Problem(family, size, prompt, chain, chain.partition(f"{ANSWER} ")[2])


def solved(problem: Problem, text: str) -> bool:
    """Does a text, with whatever chain, end in the right answer?"""
    _, found, answer = text.rpartition(ANSWER)
    return bool(found) and answer.split() == problem.answer.split()


def _labels(rng: random.Random, count: int) -> range:
    """Consecutive names for steps, which begin anywhere, so that no step has a name of its own."""
    first = rng.randint(FIRST_LABEL, NUMBERS[-1] + 1 - count)
    return range(first, first + count)


def _facts(rng: random.Random, facts: list[list]) -> list:
    """Facts in no order, a full stop before each."""
    rng.shuffle(facts)
    return [word for fact in facts for word in (".", *fact)]


def _walk(rng: random.Random, size: int) -> tuple[list, list]:
    """Room, digit or note, the sums x and y, an exit. The longest way round of a few houses."""
    houses = [_house(rng, size) for _ in range(8)]
    # A small house may lead round in a circle of few steps; take the one with the most to see.
    rooms, digits, exits, start, x, y, steps = max(houses, key=lambda house: len(set(house[-1])))
    labels = _labels(rng, size + 1)
    chain, notes = [], {}
    first_x, first_y = x, y
    for label, (room, _, _) in zip(labels[:-1], steps, strict=True):
        known = room in notes
        add = notes[room] if known else digits[room]
        chain += [label, room, "note" if known else "digit", room, add]
        chain += ["x", x, "+", add, "=", (x + add) % 10]
        x = (x + add) % 10
        chain += ["y", y, "+", x, "=", (y + x) % 10]
        y = (y + x) % 10
        if not known:
            notes[room] = y
            chain += ["note", room, y]
        parity = "odd" if y % 2 else "even"
        chain += [parity, room, exits[room][y % 2], "\n"]
    asked = rng.choice(sorted(notes))
    facts = [["digit", room, digits[room]] for room in rooms]
    facts += [[word, room, exits[room][odd]] for room in rooms for odd, word in enumerate(
        ("even", "odd"))]  # fmt: skip
    prompt = ["walk", labels[0], "from", start, "x", first_x, "y", first_y]
    prompt += [*_facts(rng, facts), ".", labels[-1], ANSWER, "note", asked, ":"]
    return prompt, [*chain, labels[-1], ANSWER, "note", asked, notes[asked], "x", x, "y", y]


def _house(rng: random.Random, size: int) -> tuple:
    """Rooms, their digits and exits, where to start with which sums, and the steps taken there."""
    rooms = rng.sample(ROOMS, rng.randint(min(5, size - 1), min(10, size)))
    digits = {room: rng.randrange(10) for room in rooms}
    exits = {room: rng.sample([other for other in rooms if other != room], 2) for room in rooms}
    room = start = rng.choice(rooms)
    x, y = first = rng.randrange(10), rng.randrange(10)
    notes, steps = {}, []
    for _ in range(size):
        steps.append((room, x, y))
        x = (x + notes.get(room, digits[room])) % 10
        y = (y + x) % 10
        notes.setdefault(room, y)
        room = exits[room][y % 2]
    return rooms, digits, exits, start, *first, steps


def _sum(rng: random.Random, size: int) -> tuple[list, list]:
    """Columns of digits, ones first, and behind each a line that asks for its total."""
    columns = rng.randint(2, max(2, min(len(POWERS), size // 4)))
    ends = {*rng.sample(range(1, size), columns - 1), size}
    labels = iter(_labels(rng, size + columns + 1))
    first, place, total, carry, results = next(labels), 0, 0, 0, []
    prompt, chain, label = ["sum", first, "=", total, "carry", carry], [], first
    for added in range(1, size + 1):
        digit, old = rng.randrange(10), total
        carry, total = carry + (total + digit) // 10, (total + digit) % 10
        prompt += [".", label, digit]
        chain += [label, digit, "+", old, "=", total, "carry", carry, "\n"]
        label = next(labels)
        if added in ends:
            results = ["total", POWERS[place], total, *results]
            prompt += [".", label, "total", POWERS[place]]
            chain += [label, "total", POWERS[place], total, "carry", carry]
            total, carry, place = carry % 10, carry // 10, place + 1
            chain += ["=", total, "carry", carry, "\n"]
            label = next(labels)
    prompt += [".", label, ANSWER, ":"]
    return prompt, [*chain, label, ANSWER, "=", total, "carry", carry, *results]


def _run(rng: random.Random, size: int) -> tuple[list, list]:
    """A few registers are set; a line adds one to the total, takes one away, or sets a new one."""
    given = rng.randint(2, 4)
    names = iter(rng.sample(REGISTERS, given + (size + 1) // 2))
    values = {next(names): rng.randrange(10) for _ in range(given)}
    labels, total = _labels(rng, size), rng.randrange(10)
    prompt = ["run", labels[0], "from", total]
    prompt += _facts(rng, [[name, value] for name, value in values.items()])
    chain, last = [], "set"
    for label in labels[:-1]:
        word = last = rng.choice(["+", "-"] if last == "set" else ["+", "-", "set"])
        name = next(names) if word == "set" else rng.choice(sorted(values))
        prompt += [".", label, word, name]
        chain += [label, word, name]
        if word == "set":
            values[name] = total
            chain += [total, "\n"]
        else:
            old, total = total, OPERATIONS[word](total, values[name])
            chain += [values[name], ":", old, word, values[name], "=", total, "\n"]
    asked = rng.choice(sorted(values))
    prompt += [".", labels[-1], ANSWER, asked, ":"]
    return prompt, [*chain, labels[-1], ANSWER, asked, values[asked], "total", total]


# family -> its maker and the most steps that there are words for
FAMILIES = {"walk": (_walk, 180), "sum": (_sum, 185), "run": (_run, 190)}
# Steps that make a chain of at least 300 words and, together with the prompt, at most 1,300:
# the lengths that the shipped model was trained on; and those beyond, up to 2,000 and more.
TRAINED = {"walk": range(15, 54), "sum": range(30, 100), "run": range(37, 93)}
BEYOND = {"walk": range(62, 90), "sum": range(108, 150), "run": range(100, 140)}
