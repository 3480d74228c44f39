"""Problems: made from a seed alone, right by an independent solver, within their lengths.

The solver knows the prompt's words only. It is written apart from the generator: no shared code,
no labels handed over, and it takes the chain apart line by line.
"""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lethe_mini.tasks import BEYOND, FAMILIES, TRAINED, WORDS, Problem, check, problem

families = st.sampled_from(sorted(FAMILIES))


def draw(family, seed, share):
    """A problem of `share` of the family's longest."""
    return problem(family, random.Random(seed), 4 + round(share * (FAMILIES[family][1] - 4)))


drawn = st.builds(draw, families, st.integers(0, 2**32), st.floats(0, 1))


def solve_walk(text):
    first, last, room, x, y = re.match(
        r"walk (\d+) to (\d+) from (\w) x (\d) y (\d) \.", text
    ).groups()
    digits = {name: int(digit) for name, digit in re.findall(r"digit (\w) (\d)", text)}
    exits = {(name, odd): to for odd, name, to in re.findall(r"(odd|even) (\w) (\w)", text)}
    assert len(digits) * 2 == len(exits)
    x, y, notes, lines = int(x), int(y), {}, []
    for label in range(int(first), int(last) + 1):
        new = room not in notes
        add = digits[room] if new else notes[room]
        line = f"{label} {room} {'digit' if new else 'note'} {room} {add} "
        line += f"x {x} + {add} = {(x + add) % 10} "
        x = (x + add) % 10
        line += f"y {y} + {x} = {(x + y) % 10} "
        y = (x + y) % 10
        if new:
            notes[room] = y
            line += f"note {room} {y} "
        odd = ["even", "odd"][y % 2]
        lines.append(f"{line}{odd} {room} {exits[room, odd]}")
        room = exits[room, odd]
    a, b = re.search(r"ask (\w) (\w) :$", text).groups()
    assert a != b
    lines.append(f"answer x {x} y {y} note {a} {notes[a]} note {b} {notes[b]}")
    return lines


def solve_sum(text):
    head, *items = text.removesuffix(" :").split(" . ")
    first, last, places = re.match(r"sum (\d+) to (\d+) 10\^0 to 10\^(\d)$", head).groups()
    written = {int(item.split()[0]): item.split()[:0:-1] for item in items}
    assert list(written) == list(range(int(first), int(last) + 1))
    assert {len(digits) for digits in written.values()} == {int(places) + 1}
    total = str(sum(int("".join(digits)) for digits in written.values()))
    lines, count = [], 0  # count: what has been added in this place and carried into it
    for place in range(int(places) + 1):
        power = f"10^{place}"
        lines.append(f"{power} from {count} = {count % 10} carry {count // 10}")
        for label, digits in written.items():
            digit = int(digits[-1 - place])
            before, count = count, count + digit
            lines.append(
                f"{label} {power} {digit} + {before % 10} = {count % 10} carry {count // 10}"
            )
        lines.append(f"total {power} {count % 10}")
        count //= 10
    total = total.zfill(int(places) + 2)
    cut = len(total) - int(places) - 1
    answer = [f"answer carry {int(total[:cut])}"]
    answer += [f"total 10^{int(places) - i} {digit}" for i, digit in enumerate(total[cut:])]
    return [*lines, " ".join(answer)]


def solve_run(text):
    first, last = re.match(r"run (\d+) to (\d+) \.", text).groups()
    values = {name: int(digit) for name, digit in re.findall(r"\. (\w\d) (\d)", text)}
    program = re.findall(r"(\d+) (\w\d) = (\w\d) ([-+*]) (\w\d)", text)
    assert [int(line[0]) for line in program] == list(range(int(first), int(last) + 1))
    lines = []
    for label, name, a, sign, b in program:
        assert name not in values
        values[name] = eval(f"{values[a]} {sign} {values[b]}") % 10
        reads = f"{a} {values[a]} {b} {values[b]}"
        done = f"{values[a]} {sign} {values[b]} = {values[name]} {name} {values[name]}"
        lines.append(f"{label} {name} = {a} {sign} {b} : {reads} : {done}")
    asked = text.removesuffix(" :").rpartition("ask ")[2].split()
    assert len(set(asked)) == 3
    return [*lines, "answer " + " ".join(f"{name} {values[name]}" for name in asked)]


SOLVERS = {"walk": solve_walk, "sum": solve_sum, "run": solve_run}


@given(drawn)
def test_chain_and_answer_are_those_of_an_independent_solver(one):
    lines = SOLVERS[one.family](one.prompt)
    assert one.chain.split("\n") == lines
    assert lines[-1] == f"answer {one.answer}"
    assert check(one, one.chain)


@given(families, st.integers(), st.integers(4, 60))
def test_a_seed_makes_a_problem_and_another_seed_another(family, seed, size):
    one = problem(family, random.Random(seed), size)
    random.seed(3)  # the generator has no other source of chance
    assert problem(family, random.Random(seed), size) == one
    assert problem(family, random.Random(f"{seed}-other"), size).prompt != one.prompt


@given(drawn)
def test_texts_are_words_of_the_vocabulary_and_one_prompt_is_one_line(one):
    assert "\n" not in one.prompt
    words = f"{one.prompt} {one.chain}".replace("\n", " \n ").split(" ")
    assert set(words) <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_sizes_trained_on_make_chains_of_300_words_to_1300_with_the_prompt():
    for family, sizes in TRAINED.items():
        for seed in range(20):
            short, long = (problem(family, random.Random(seed), sizes[i]) for i in (0, -1))
            assert 300 <= len(short.chain.replace("\n", " \n ").split(" ")) <= 480
            long_words = f"{long.prompt} {long.chain}".replace("\n", " \n ").split(" ")
            assert 1150 <= len(long_words) <= 1300
        assert BEYOND[family][0] > sizes[-1]
        assert BEYOND[family][-1] <= FAMILIES[family][1]


@given(drawn, st.integers(0, 9))
def test_one_wrong_digit_at_the_end_is_wrong(one, digit):
    text = f"{one.chain[:-1]}{digit}"
    assert check(one, text) == (text == one.chain)
    assert not check(one, text.replace("answer", ""))
    assert not check(one, one.chain + " 1")


def test_only_the_answer_counts_and_the_last_one_at_that():
    one = Problem("sum", 4, "?", "...", "carry 1 total 10^0 3")
    assert check(one, "nonsense\nanswer carry 1 total 10^0 3 ")
    assert check(one, "answer 7\nanswer carry 1 total 10^0 3")
    assert not check(one, "answer carry 1 total 10^0 3\nanswer 7")
    assert not check(one, "")


def test_a_walk_of_50_steps_rarely_goes_round_in_circles():
    distinct = []
    for seed in range(40):
        chain = problem("walk", random.Random(seed), 50).chain.split("\n")[:-1]
        distinct.append(len({line.partition(" ")[2] for line in chain}))
    assert min(distinct) >= 20
    assert sorted(distinct)[10] >= 40  # three in four


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_cannot_be_made_is_refused_with_its_value(family):
    most = FAMILIES[family][1]
    for size in (3, most + 1):
        with pytest.raises(ValueError, match=f"4 to {most} steps, not {size}"):
            problem(family, random.Random(0), size)
    with pytest.raises(ValueError, match="no family 'chess'; there are walk, sum, run"):
        problem("chess", random.Random(0), 9)
