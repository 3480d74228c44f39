"""The reasoner under policies: reading is writing, equal budgets, one factor at a time."""

import dataclasses
import json
import random
import re

import pytest
import tiny
import torch
from cases import ALL, FEW
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ROOT
from benchmarks.common import results
from benchmarks.common.results import Lines, wilson
from benchmarks.quality import ablation, chains, choices, foresight, plot_quality, reason
from benchmarks.quality import run as quality
from benchmarks.quality.reading import SPLITS
from lethe_mini import FullKV, LethePlus
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError
from lethe_mini.reasoner.problems import FAMILIES, problem

CLOSE = {"abs": 1e-4, "rel": 1e-4}
SIZES = dict.fromkeys(FAMILIES, range(5, 8))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint folder of a tiny model whose tokens are bytes."""
    return tiny.folder(tmp_path_factory.mktemp("reason") / "model")


@pytest.fixture(scope="module")
def engine(small):
    return Engine.from_pretrained(str(small), "cpu", "float32")


@pytest.fixture
def short(monkeypatch):
    """Problems of a few steps: a byte is a token here."""
    monkeypatch.setattr(reason, "TRAINED", SIZES)


def some_batch(engine, count=3, family="sum", batch=50):
    return chains.batches(engine, family, SIZES[family], "test", count, batch)[0]


def random_batch(engine, prompts=(5, 7, 11), lengths=(29, 41, 17)):
    """Random tokens instead of a problem's: prompts, and chains to be read."""
    rng = torch.Generator().manual_seed(5)
    batch = some_batch(engine, len(prompts))
    batch.prompts, batch.chains = (
        [torch.randint(256, (length,), generator=rng).tolist() for length in kind]
        for kind in (prompts, lengths)
    )
    return batch


# -- reading and writing ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
def test_reading_finds_the_first_error_where_writing_parts_from_the_chain(engine, policy):
    """What the engine writes under a policy reads as right, to the end; and with one token changed
    as right up to there. So writing gives a chain if and only if reading finds it right."""
    batch = random_batch(engine)
    limits = list(map(len, batch.chains))
    made = engine.generate(batch.prompts, policy, limits, ignore_eos=True)
    batch.chains = [list(one.token_ids) for one in made.sequences]
    whole = batch.read(policy)
    assert whole["exact"] == [True] * 3
    assert whole["first"] == whole["tokens"] == limits
    assert whole["wrong"] == [0] * 3
    assert whole["held"] == pytest.approx(made.stats.kv_tokens_mean)
    places = (13, 0, 16)
    for chain, place in zip(batch.chains, places, strict=True):
        chain[place] = (chain[place] + 1) % 256
    changed = batch.read(policy)
    assert changed["exact"] == [False] * 3
    assert changed["first"] == list(places)
    assert changed["tokens"] == limits
    early = batch.read(policy, whole=False)
    assert (early["exact"], early["first"]) == (changed["exact"], changed["first"])
    assert all(place < read for place, read in zip(places, early["tokens"], strict=True))
    assert early["tokens"][1] < limits[1] or policy.name == "full"  # which has no short chunks


def test_nats_are_those_of_a_plain_forward(engine):
    batch = random_batch(engine)
    read = batch.read(FullKV())
    for row, (prompt, chain) in enumerate(zip(batch.prompts, batch.chains, strict=True)):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([prompt + chain]))[0, len(prompt) - 1 : -1]
        right = torch.tensor(chain)
        nats = torch.nn.functional.cross_entropy(logits, right, reduction="sum")
        assert read["nats"][row] == pytest.approx(nats.item(), **CLOSE)
        assert read["wrong"][row] == (logits.argmax(-1) != right).sum()


@pytest.mark.parametrize("name", ["full", "streaming-unprotected", "random-unprotected", "h2o"])
def test_what_is_held_is_what_the_engine_counts(engine, name):
    """By the formula, for a policy that keeps all of its budget: full at ever so many tokens."""
    batch, policy = random_batch(engine), ALL[name]
    read = batch.read(policy)
    made = engine.generate(batch.prompts, policy, read["tokens"], ignore_eos=True)
    budget, interval = getattr(policy, "budget", None), getattr(policy, "interval", 1)
    for counted in (read["held"], batch.held(read["tokens"], budget, interval)):
        assert counted == pytest.approx(made.stats.kv_tokens_mean)
    assert read["full"] == pytest.approx(batch.held(read["tokens"]))


@pytest.mark.parametrize("turns", [1, -1])
def test_what_others_have_read_changes_nothing(engine, turns):
    """Prompts are prefilled once for policies that note the same; those that count attention from
    another lag on do not."""
    names = ["h2o-unprotected", "lethe-plus-unprotected", "lethe-unprotected", "snapkv-unprotected",
             "h2o-unprotected"]  # fmt: skip
    policies = [*[ALL[name] for name in names][::turns], LethePlus(budget=20, interval=7, lag=9)]
    batch = random_batch(engine)
    for policy in policies:
        assert batch.read(policy) == random_batch(engine).read(policy)


def test_writing_says_how_it_ended(engine, monkeypatch):
    """Right only where the text ended by itself; its length, and whether it was cut off."""
    batch = some_batch(engine)
    right = [one.chain for one in batch.problems]
    texts = [right[0], f"nonsense\n{right[1].splitlines()[-1]}", right[2]]
    made = engine.generate([[1], [2], [3]], max_new_tokens=1)
    ends = ("stop", "stop", "length")
    for one, text, end, tokens in zip(made.sequences, texts, ends, (5, 7, 11), strict=True):
        one.text, one.finish_reason, one.generated_tokens = text, end, tokens
    for one, chain, count in zip(made.sequences, batch.chains, (5, 0, 3), strict=True):
        one.token_ids = chain[:count] + [256] * 2 * (count < 5)
    asked = []
    monkeypatch.setattr(engine, "generate", lambda *args, **_: asked.append(args) or made)
    written = batch.write(FullKV(), 1.5)
    assert written["solved"] == [True, True, False]
    assert written["exact"] == [True, False, False]
    assert written["truncated"] == [False, False, True]
    assert written["tokens"] == [5, 7, 11]
    assert written["first"] == [5, 0, 3]
    assert asked[0][2] == [round(1.5 * len(chain)) for chain in batch.chains]


def test_an_interrupted_batch_is_no_result(engine, monkeypatch):
    """The engine gives back what there is; that is not to be taken for an answer."""
    batch = some_batch(engine)
    made = engine.generate([[1], [2], [3]], max_new_tokens=1)
    made.sequences[1].finish_reason = "interrupted"
    monkeypatch.setattr(engine, "generate", lambda *args, **_: made)
    with pytest.raises(KeyboardInterrupt):
        batch.write(FullKV(), 1.5)


words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=20)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**32), st.integers(4, 90))
def test_right_chains_do_not_loop(family, seed, size):
    one = problem(family, random.Random(seed), size)
    assert not chains.loops(one.chain)
    line = one.chain.split("\n")[1]
    assert not chains.loops(f"{one.chain}\n{line}")
    assert chains.loops(f"{one.chain}\n{line}\n{line}")


@given(words, words)
def test_three_copies_at_the_end_are_a_loop(start, copied):
    assert chains.loops(" ".join([*start, *copied * 3]))
    assert chains.loops("\n".join([*start, *copied * 3]))


@FEW
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_problem_is_in_one_batch_with_others_of_its_size(count, batch):
    engine = Engine(tiny.model(), FakeText())
    made = chains.batches(engine, "run", range(5, 60), "x", count, batch)
    numbers = [number for one in made for number in one.numbers]
    assert sorted(numbers) == list(range(count))
    sizes = [one.size for each in made for one in each.problems]
    assert sizes == sorted(sizes)
    assert max(len(one.numbers) for one in made) <= batch
    assert max(len(one.numbers) for one in made) - min(len(one.numbers) for one in made) <= 1
    of_one = {n: p for each in made for n, p in zip(each.numbers, each.problems, strict=True)}
    assert of_one[0] == chains.draw("run", 0, "x", range(5, 60))


class FakeText:
    eos_ids = frozenset({257})

    def encode(self, text):
        return list(text.encode())


def test_choosing_and_reporting_share_no_problem(engine, short):
    made = []
    for split in SPLITS:
        args = quality.arguments(["reason", "--problems", "20", "--split", split])
        batches, count = reason.all_batches(engine, args)
        batches = list(batches)
        assert len(batches) == count == 3
        made.append({one.prompt for batch in batches for one in batch.problems})
    assert len(made[0]) == len(made[1]) == 60
    assert not made[0] & made[1]


# -- equal budgets ---------------------------------------------------------------------------------


def arm(choice, budget="25%", protect=False, **changes):
    make, own = choices.CHOICES[choice]
    return reason.Arm(choice, make, own | changes, budget, protect, 4, 2)


def test_a_budget_is_a_share_of_the_text_or_of_the_chain_beyond_a_protected_prompt(engine):
    batch = some_batch(engine)
    free, protected = (
        arm("lethe-plus", protect=protect).policy(batch) for protect in (False, True)
    )
    assert free.budget == round(batch.length / 4)
    assert protected.budget == batch.prompt + round(batch.chain / 4)
    assert (free.protect_prompt, protected.protect_prompt) == (False, True)
    assert free.interval == 4
    assert free.sinks == 2
    assert arm("lethe-plus", "17").policy(batch).budget == 17
    with pytest.raises(UserError, match="too small"):
        arm("lethe-plus", "2").policy(batch)


def test_a_window_takes_no_more_than_a_quarter_of_the_room(engine):
    batch = some_batch(engine)
    for choice, default in (("snapkv", 64), ("pyramidkv", 64), ("rkv", 8)):
        assert arm(choice, "1000").policy(batch).window == default
        assert arm(choice, "21").policy(batch).window == 5
        assert arm(choice, "21", protect=True).policy(batch).window == 5


BREAKS = {"breakpoint": "segment", "tau": 1.05, "per_head": False, "distinct_ratio": 0.0}


@pytest.mark.parametrize("changes", [BREAKS, {"interval": 11}, {"breakpoint": "none"}], ids=str)
def test_as_much_is_held_whatever_the_breakpoint_and_the_interval(engine, changes):
    """As much as a policy may that keeps its budget, with a round every 4 tokens."""
    batch, base = some_batch(engine), arm("lethe-plus", **changes)
    allowed = batch.held(list(map(len, batch.chains)), base.policy(batch).budget, 4)
    result = reason.measured(batch, base, batch.read, whole=True)
    assert result["held"] == pytest.approx(allowed, rel=2 * choices.TOLERANCE)
    if changes != {"breakpoint": "none"}:
        assert result["nominal"] != base.policy(batch).budget
    early = reason.measured(batch, base, lambda policy: batch.read(policy, False), whole=False)
    assert early["exact"] == result["exact"]
    assert early["tokens"] < result["tokens"]
    for name in ("nominal", "full", "steps"):  # although chains are left at their first error
        assert early[name] == result[name]
    assert early["held"] == pytest.approx(result["held"])


def test_writing_takes_the_budget_that_reading_found(engine):
    batch, one = some_batch(engine), arm("lethe-plus", **BREAKS)
    found = reason.measured(batch, one, batch.read, whole=True)["nominal"]
    asked = []

    def write(policy):
        asked.append(policy)
        return batch.read(policy)

    reason.measured(batch, one, write, whole=False)
    assert [policy.budget for policy in asked] == [found]


# -- figures ---------------------------------------------------------------------------------------


def test_wilson_is_the_score_interval():
    """Its ends are where the truth is 1.96 standard errors, by that truth, away."""
    for good, of in ((0, 7), (3, 11), (199, 200), (13, 13)):
        share = good / of
        for end in wilson(good, of):
            assert 0 <= end <= 1
            spread = 1.96 * (end * (1 - end) / of) ** 0.5
            assert abs(share - end) == pytest.approx(spread, abs=1e-9)


def test_figures_are_paired_and_weighted_by_their_steps(monkeypatch):
    monkeypatch.setattr(results, "DRAWS", 500)
    noise = random.Random(0)
    ones = [
        {
            "exact": [noise.random() < 0.5 for _ in range(20)],
            "first": [5] * 20,
            "nats": [noise.random() for _ in range(20)],
            "wrong": [1] * 20,
            "tokens": [count] * 20,
            "right": [count] * 20,
            "held": held,
            "full": 10.0,
            "steps": 20 * (count - 1),
        }
        for count, held in ((11, 2.0), (31, 6.0))
    ]
    base = reason.columns(ones)
    more = [one | {"nats": [x + 0.5 for x in one["nats"]]} for one in ones]
    row = reason.figures(reason.columns(more), base)
    assert row["less_nats"] == pytest.approx([20 / (20 * 42), 20 / (20 * 42), 20 / (20 * 42)], 0.3)
    assert row["less_exact"] == [0, 0, 0]
    assert row["held"] == pytest.approx((2.0 * 10 + 6.0 * 30) / 40)
    assert row["share"] == pytest.approx(row["held"] / 10)
    assert row["wrong"][0] == pytest.approx(2 / 42)
    assert row["problems"] == 40
    assert row["reach"][0] == pytest.approx((5 / 11 + 5 / 31) / 2)
    early = reason.columns([one | {"tokens": [7] * 20} for one in more])
    assert "nats" not in reason.figures(early, base)


# -- the command lines -----------------------------------------------------------------------------

FEW_PROBLEMS = ["--problems", "3", "--batch", "2", "--families", "walk", "run", "--interval", "8"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("way", [[], ["--read"], ["--read", "--until-wrong"]], ids=str)
def test_reason_from_the_command_line(small, tmp_path, capsys, way):
    """Tables of each family and of all, JSON with every setting, a plot; then from its lines alone,
    also when the families' lines come from two runs."""
    path, lines, svg = (tmp_path / name for name in ("out.json", "lines", "out.svg"))
    few = ["--choice", "random", "lethe-plus", "lethe", "--budget", "25%", "--model", str(small)]
    argv = ["reason", *FEW_PROBLEMS, *few, *way]
    quality.main([*argv, "--lines", str(lines), "--json", str(path)])
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert facts["settings"]["choice"] == ["random", "lethe-plus", "lethe"]
    assert [row["family"] for row in facts["rows"]] == ["walk"] * 7 + ["run"] * 7 + ["all"] * 7
    assert out.count("\n|") == 3 * 2 + len(facts["rows"])
    full, *others = facts["rows"][-7:]
    assert full["share"] == 1
    assert full["problems"] == 6
    assert all(0 < row["share"] < 1 for row in others)
    assert ("solved" in full) == (not way)
    assert ("nats" in full) == (way == ["--read"])
    assert others[1]["choice"] == "lethe-plus"
    assert [row["policy"]["protect_prompt"] for row in others] == [False] * 3 + [True] * 3
    parts = []
    for family in ("walk", "run"):
        parts.append(tmp_path / family)
        quality.main([*argv, "--lines", str(parts[-1]), "--families", family])
    both = tmp_path / "both"
    both.write_text("".join(part.read_text() for part in parts))
    for old in (lines, both):
        before = old.read_text()
        quality.main([*argv, "--lines", str(old), "--json", str(path)])
        assert json.loads(path.read_text())["rows"] == facts["rows"]
        assert old.read_text() == before
    capsys.readouterr()
    assert plot_quality.main([str(path), str(svg)]) == 0
    tables, text = capsys.readouterr().out, svg.read_text()
    assert tables.count("\n| lethe-plus |") == 2
    right = others[1]["solved" if "solved" in full else "exact"]
    assert f"\n| lethe-plus | {100 * right[0]:.1f} [{100 * right[1]:.1f}, " in tables
    assert all(f">{name}<" in text for name in ("full", "random", "lethe-plus", "lethe"))
    assert plot_quality.main([str(path), str(svg), "--family", "sum"]) == 2
    with pytest.raises(SystemExit):
        quality.main(["reason", "--until-wrong"])


def test_other_weights_are_another_run(engine, small, tmp_path):
    other = tiny.folder(tmp_path / "other", head_dim=12)
    facts = [
        reason.Bench(Engine.from_pretrained(str(folder), "cpu"), Lines(None), True, 1, True).facts
        for folder in (small, other)
    ]
    assert facts[0] != facts[1]


def test_every_arm_differs_from_the_base_in_what_it_is_named_for(engine):
    args = ablation.arguments(["--base", "gamma=0.9", "allocation=uniform", "--budget", "40"])
    full, base, *arms = ablation.arms_of(args, "40")
    assert full.choice == "full"
    batch = some_batch(engine)
    base = base.policy(batch)
    assert base == LethePlus(
        budget=base.budget, interval=16, gamma=0.9, allocation="uniform", sinks=base.sinks
    )
    names = [one.choice for one in arms]
    assert len(set(names)) == len(names)
    parts = [dict(part.split("=") for part in name.split(", ") if "=" in part) for name in names]
    assert {key for one in parts for key in one} == {*ablation.FACTORS}
    halves = [name for name, one in zip(names, parts, strict=True) if not one]
    assert halves == [*ablation.HALVES]
    for one, settings in zip(arms, parts, strict=True):
        mine, its = dataclasses.asdict(one.policy(batch)), dataclasses.asdict(base)
        if settings:
            assert {key: str(mine[key]) for key in settings} == settings
            assert {key for key in its if mine[key] != its[key]} - {"tau"} <= {*settings}
            assert mine != its
            assert mine["budget"] == its["budget"]
    assert "gamma=0.9" not in names
    assert "allocation=uniform" not in names


def test_halves_keep_what_they_say(engine):
    """Without allocation layers hold the same; with nothing at all the first and the newest."""
    batch = some_batch(engine)
    seen = {}
    for name, (make, changes) in ablation.HALVES.items():
        one = reason.Arm(name, make, {"breakpoint": "none"} | changes, "40", False, 8, 2)
        cache, _ = batch.prefilled(one.policy(batch))
        one.policy(batch).round(cache, [True] * len(batch.prompts))
        seen[name] = cache
    for name, cache in seen.items():
        same = all(len({layer.lengths[row] for layer in cache.layers}) == 1 for row in range(3))
        assert same == (name in ("no-allocation", "distinct-alone", "none"))
        newest = all(
            layer.positions[row, head, :length].tolist()
            == [0, 1, *range(len(batch.prompts[row]) - length + 2, len(batch.prompts[row]))]
            for layer in cache.layers
            for row, length in enumerate(layer.lengths)
            for head in range(2)
        )
        assert newest == (name == "none")


@pytest.mark.usefixtures("short")
def test_ablation_from_the_command_line(small, tmp_path, capsys):
    path, lines = tmp_path / "out.json", tmp_path / "lines"
    argv = [*FEW_PROBLEMS, "--model", str(small), "--budget", "25%", "50%", "--lines", str(lines)]
    argv += ["--factors", "interval", "halves", "--json", str(path)]
    ablation.main(argv)
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert facts["base"]["gamma"] == LethePlus().gamma
    rows = [row for row in facts["rows"] if row["family"] == "all"]
    assert [row["choice"] for row in rows[:3]] == ["full", "base", "interval=4"]
    assert len(rows) == 2 * (2 + 4 + 6)  # of five intervals one is the base's
    for first in (0, 12):
        assert rows[first + 1]["less_nats"] == [0, 0, 0]
        for row in rows[first + 2 : first + 12]:
            if "error" not in row:
                assert row["held"] == pytest.approx(rows[first + 1]["held"], rel=0.06)
    assert out.count("nats/word over base's") == 3
    before = lines.read_text()
    ablation.main(argv)
    assert json.loads(path.read_text()) == facts
    assert lines.read_text() == before
    ablation.main([*argv[:-5], "--factors", "interval", "--base", "allocation=uniform"])
    assert "'allocation': 'uniform'" in capsys.readouterr().out
    for wrong in (["--base", "interval=3"], ["--base", "colour=3"], ["--base", "gamma=7"]):
        with pytest.raises(SystemExit):
            ablation.main(wrong)
    with pytest.raises(SystemExit, match="no such folder"):
        ablation.main(["--model", "./nowhere"])


def test_the_commands_of_the_document_are_understood():
    text = (ROOT / "docs" / "QUALITY.md").read_text(encoding="utf-8")
    parsers = {
        "run": quality.arguments,
        "ablation": ablation.arguments,
        "foresight": foresight.arguments,
    }
    command = r"^python -m benchmarks\.quality\.(run|ablation|foresight) (.*)$"
    found = re.findall(command, text, re.MULTILINE)
    assert len(found) >= 8
    for name, options in found:
        parsers[name](options.partition(" #")[0].split())
