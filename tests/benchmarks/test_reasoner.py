"""The reasoner that ships with the package: a checkpoint like any other, and it solves problems."""

import random

import pytest

from benchmarks.quality.chains import Batch
from benchmarks.quality.choices import CHOICES
from benchmarks.quality.reason import Arm
from lethe_mini import Engine, FullKV, LethePlus
from lethe_mini.app import cli
from lethe_mini.checkpoint.load import resolve
from lethe_mini.errors import UserError
from lethe_mini.policies import POLICIES
from lethe_mini.reasoner.problems import FAMILIES, TRAINED, WORDS, problem, solved


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("reasoner", device="cpu")


def problems(family, count):
    """Of the shorter half of what it was trained on; seeds that training never uses."""
    sizes = TRAINED[family][: len(TRAINED[family]) // 2]
    drawn = (random.Random(f"test-{family}-{number}") for number in range(count))
    return [problem(family, rng, rng.choice(sizes)) for rng in drawn]


def solve(engine, given, policy=None):
    limits = [len(engine.text.encode(one.chain)) + 50 for one in given]
    return engine.generate([one.prompt for one in given], policy, limits)


def test_it_is_small_and_holds_safetensors_and_json_alone():
    """Beside the source of its problems."""
    paths = [path for path in resolve("reasoner").iterdir() if path.is_file()]
    files = {path.name: path.stat().st_size for path in paths if path.suffix != ".py"}
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == names
    assert sum(files.values()) <= 12_000_000


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_solves_unseen_problems(engine, family):
    given = problems(family, 20)
    made = solve(engine, given).sequences
    assert sum(solved(one, its.text) for one, its in zip(given, made, strict=True)) >= 18
    # and by the steps that lead there: nobody guesses an answer
    assert sum(one.chain == its.text for one, its in zip(given, made, strict=True)) >= 18


def test_a_budget_above_the_text_changes_no_token(engine):
    given = [problems(family, 1)[0] for family in sorted(FAMILIES)]
    full = solve(engine, given)
    pruned = solve(engine, given, LethePlus(budget=4000, interval=16))
    for one, other in zip(full.sequences, pruned.sequences, strict=True):
        assert one.token_ids == other.token_ids
    assert pruned.stats.evicted_tokens == 0


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_changes_a_token_that_it_has_room_for(engine, policy):
    given = [problems(family, 1)[0].prompt for family in sorted(FAMILIES)]
    room = {} if policy is FullKV else {"budget": 4000, "interval": 16}
    full, pruned = (engine.generate(given, one, 100) for one in (None, policy(**room)))
    for one, other in zip(full.sequences, pruned.sequences, strict=True):
        assert one.token_ids == other.token_ids


def test_lethe_plus_beats_streaming_at_a_quarter_of_the_cache(engine):
    """By the very problems, read (chains.py): of free prompts it gets fewer words wrong, and where
    the prompt is protected it alone solves twice as many as streaming alone."""
    wrong = {"lethe-plus": [], "streaming": []}
    for family in sorted(FAMILIES):
        given = Batch(engine, family, list(enumerate(problems(family, 20))))
        for choice, counts in wrong.items():
            counts += given.read(arm(choice, False).policy(given))["wrong"]
    assert sum(wrong["lethe-plus"]) < 0.8 * sum(wrong["streaming"])
    pairs = list(zip(*wrong.values(), strict=True))
    assert sum(a < b for a, b in pairs) > 2 * sum(a > b for a, b in pairs)

    right = {"lethe-plus": [], "streaming": []}
    for family in ("walk", "run"):  # a sum's totals are lost by all alike
        given = Batch(engine, family, list(enumerate(problems(family, 40))))
        for choice, exact in right.items():
            exact += given.read(arm(choice, True).policy(given), whole=False)["exact"]
    pairs = list(zip(*right.values(), strict=True))
    assert sum(a and not b for a, b in pairs) >= max(8, 2 * sum(b and not a for a, b in pairs))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_chain_read_goes_wrong_where_one_written_does(engine, family):
    """Of chains that a pruned cache gets right, and of others."""
    given = Batch(engine, family, list(enumerate(problems(family, 8))))
    policy = arm("lethe-plus", True).policy(given)
    read, written = given.read(policy, whole=False), given.write(policy, 1.0)
    assert read["first"] == written["first"]
    assert read["exact"] == written["exact"]


def arm(choice, protect):
    return Arm(choice, *CHOICES[choice], "25%", protect, interval=16, sinks=4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_word_is_a_token_and_texts_come_back_whole(engine, family):
    one = problem(family, random.Random(7), 30)
    for text in (one.prompt, one.chain):
        ids = engine.text.encode(text)
        assert len(ids) == len(text.replace("\n", " \n ").split(" "))
        assert engine.text.decode(ids) == text
        stream = engine.text.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert engine.model.config.vocab_size == len(WORDS) + 1


def own(capsys, *argv):
    """What the command line writes of a problem that the reasoner sets itself."""
    assert cli.main([*argv, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()


def test_without_model_and_prompt_it_solves_a_problem_of_its_own(capsys):
    out, (task, prompt, *report, verdict) = own(capsys)
    assert task.startswith("a puzzle: ")
    assert prompt.split()[0] in FAMILIES
    assert prompt.endswith(" :")
    steps = out.splitlines()
    assert f"the answer is right: {steps[-1].partition('answer ')[2]} (" in verdict
    assert verdict.endswith(f"({prompt.split()[0]}, {verdict.split()[-2]} steps)")
    assert any("KV memory" in line for line in report)
    assert own(capsys)[0] == out  # the same seed, the same problem
    assert own(capsys, "--model", "reasoner", "--quiet") == (out, [])


def test_an_answer_that_is_wrong_or_missing_is_said_to_be(capsys):
    *_, verdict = own(capsys, "--max-new-tokens", "9", "--num-samples", "2", "--seed", "1")[1]
    assert verdict.startswith("0 of 2 answers are right; right is: note ")


def test_a_prompt_or_another_model_is_no_problem_of_its_own(monkeypatch):
    asked = []

    def from_pretrained(model, *_):
        asked.append(model)
        raise UserError("enough")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    for argv in ((), ("--prompt", "a"), ("--interactive",), ("--model", "x"), ("--seed", "5")):
        assert cli.main(list(argv)) == 2
    assert asked == ["reasoner", "demo", "demo", "x", "reasoner"]


def test_a_share_always_has_room_for_the_problem_and_a_number_that_is_too_small_says_so(capsys):
    for seed in range(4):
        options = ["--lethe", "--seed", str(seed), "--max-new-tokens", "1"]
        _, prompt, *_ = own(capsys, *options, "--budget", "1%")[1]
        fits = len(prompt.split()) + 1  # and a recent token
        assert own(capsys, *options, "--budget", str(fits))[1][1] == prompt
        assert cli.main([*options, "--budget", str(fits - 1)]) == 2
        assert f"budget {fits - 1} is too small for the prompt" in capsys.readouterr().err
