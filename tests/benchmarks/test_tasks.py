"""Problems: made from a seed alone, right by an independent solver, within their lengths.

The solver knows the prompt's words only. It is written apart from the generator: no shared code,
no labels handed over, and it takes the chain apart line by line.
"""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ROOT
from lethe_mini.reasoner.problems import BEYOND, FAMILIES, TRAINED, WORDS, Problem, problem, solved

families = st.sampled_from(sorted(FAMILIES))


def draw(family, seed, share):
    """A problem of `share` of the family's longest."""
    return problem(family, random.Random(seed), 4 + round(share * (FAMILIES[family][1] - 4)))


drawn = st.builds(draw, families, st.integers(0, 2**32), st.floats(0, 1))


def solve_walk(text):
    first, room, x, y = re.match(r"walk (\d+) from (\w) x (\d) y (\d) \.", text).groups()
    last, asked = re.search(r"\. (\d+) answer note (\w) :$", text).groups()
    digits = {name: int(digit) for name, digit in re.findall(r"digit (\w) (\d)", text)}
    exits = {(name, odd): to for odd, name, to in re.findall(r"(odd|even) (\w) (\w)", text)}
    assert len(digits) * 2 == len(exits)
    x, y, notes, lines = int(x), int(y), {}, []
    for label in range(int(first), int(last)):
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
    lines.append(f"{last} answer note {asked} {notes[asked]} x {x} y {y}")
    return lines


def solve_sum(text):
    head, *items = text.removesuffix(" :").split(" . ")
    label = int(re.match(r"sum (\d+) = 0 carry 0$", head)[1])
    columns, lines, count = [[]], [], 0  # count: what has been added in this place or carried there
    for item in items:
        number, *words = item.split()
        assert int(number) == label
        label += 1
        if words == ["answer"]:
            assert item == items[-1]
        elif words[0] == "total":
            assert words[1:] == [f"10^{len(columns) - 1}"]
            before, count = count, count // 10
            carried = f"{before % 10} carry {before // 10} = {count % 10} carry {count // 10}"
            lines.append(f"{item} {carried}")
            columns.append([])
        else:
            before, count = count, count + int(words[0])
            lines.append(f"{item} + {before % 10} = {count % 10} carry {count // 10}")
            columns[-1].append(int(words[0]))
    assert columns.pop() == []  # a total behind the last digit
    assert len(columns) >= 2
    assert all(columns)
    total = sum(10**place * sum(column) for place, column in enumerate(columns))
    carry, rest = divmod(total, 10 ** len(columns))
    digits = str(rest).zfill(len(columns))
    totals = [f"total 10^{len(columns) - 1 - i} {digit}" for i, digit in enumerate(digits)]
    return [*lines, " ".join([f"{items[-1]} = {carry % 10} carry {carry // 10}", *totals])]


def solve_run(text):
    head, *items = text.removesuffix(" :").split(" . ")
    first, total = map(int, re.match(r"run (\d+) from (\d)$", head).groups())
    values, lines, label = {}, [], first
    for item in items:
        if re.match(r"\w\d \d$", item):  # a register that is given, before the first line
            assert not lines
            values[item[:2]] = int(item[3])
            continue
        number, word, name = item.split()
        assert int(number) == label
        label += 1
        if word == "answer":
            assert item == items[-1]
            lines.append(f"{item} {values[name]} total {total}")
        elif word == "set":
            assert name not in values
            values[name] = total
            lines.append(f"{item} {total}")
        else:
            old, total = total, eval(f"{total} {word} {values[name]}") % 10
            lines.append(f"{item} {values[name]} : {old} {word} {values[name]} = {total}")
    return lines


SOLVERS = {"walk": solve_walk, "sum": solve_sum, "run": solve_run}


@given(drawn)
def test_chain_and_answer_are_those_of_an_independent_solver(one):
    lines = SOLVERS[one.family](one.prompt)
    assert one.chain.split("\n") == lines
    assert lines[-1].partition("answer ")[2] == one.answer
    assert solved(one, one.chain)


def test_the_examples_of_the_document_are_of_today():
    text = (ROOT / "docs" / "QUALITY.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(walk .*?)\n```", text, re.DOTALL)[1].split("\n\n")
    assert [one.split()[0] for one in shown] == list(FAMILIES)
    for one in shown:
        prompt, *lines = one.split("\n")
        assert SOLVERS[prompt.split()[0]](prompt) == lines
    assert f"The vocabulary has {len(WORDS) + 1} words" in text  # and the end of the text


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
    assert solved(one, text) == (text == one.chain)
    assert not solved(one, text.replace("answer", ""))
    assert not solved(one, one.chain + " 1")


def test_only_the_answer_counts_and_the_last_one_at_that():
    one = Problem("sum", 4, "?", "...", "carry 1 total 10^0 3")
    assert solved(one, "nonsense\nanswer carry 1 total 10^0 3 ")
    assert solved(one, "answer 7\nanswer carry 1 total 10^0 3")
    assert not solved(one, "answer carry 1 total 10^0 3\nanswer 7")
    assert not solved(one, "")


def test_a_walk_of_50_steps_rarely_goes_round_in_circles():
    distinct = []
    for seed in range(40):
        chain = problem("walk", random.Random(seed), 50).chain.split("\n")[:-1]
        distinct.append(len({line.partition(" ")[2] for line in chain}))
    assert min(distinct) >= 20
    assert sorted(distinct)[10] >= 40  # three in four


@given(drawn)
def test_no_line_of_a_chain_stands_there_twice(one):
    """So a line that is written again is a sign of a loop."""
    lines = one.chain.split("\n")
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_cannot_be_made_is_refused_with_its_value(family):
    most = FAMILIES[family][1]
    for size in (3, most + 1):
        with pytest.raises(ValueError, match=f"4 to {most} steps, not {size}"):
            problem(family, random.Random(0), size)
    with pytest.raises(ValueError, match="no family 'chess'; there are walk, sum, run"):
        problem("chess", random.Random(0), 9)
