"""What the command says beside the text: the puzzle, the report, and what takes long."""

import io
import json
import re
import time

import pytest
import tiny
import torch

from lethe_mini import Engine, FullKV, Lethe, LethePlus, StreamingLLM
from lethe_mini.app import cli, cluster, screen
from lethe_mini.app.batch import run_batch
from lethe_mini.app.parser import PROMPT
from lethe_mini.app.prompts import Prompt
from lethe_mini.app.puzzle import FAMILY, STEPS, puzzle, verdict
from lethe_mini.app.screen import report, saying


@pytest.fixture(scope="module")
def engine():
    return tiny.engine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("screen") / "tiny", eos=())


# -- the puzzle ------------------------------------------------------------------------------------


def shown(capsys, *options):
    """The puzzle that the command shows, and its verdict; few tokens are written."""
    assert cli.main([*options, "--max-new-tokens", "3"]) == 0
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("a puzzle"))
    return lines[first + 1], lines[-1]


def test_the_puzzle_depends_on_the_seed_alone(capsys):
    """Not on the policy, the budget or how much is written."""
    own = puzzle(3)
    for options in ([], ["--lethe"], ["--lethe-plus", "--budget", "300"], ["--policy", "h2o"]):
        text, last = shown(capsys, "--seed", "3", *options)
        assert text == own.prompt
        assert last.startswith(f"the answer is wrong; right would be: {own.answer} (walk, ")
    assert shown(capsys, "--seed", "4")[0] != own.prompt


def test_puzzles_are_of_one_kind_and_size():
    """Long enough for two rounds, short enough for the model that solves them."""
    puzzles = [puzzle(seed) for seed in range(50)]
    assert {one.family for one in puzzles} == {FAMILY}
    assert {one.size for one in puzzles} == {*STEPS}
    assert len({one.prompt for one in puzzles}) == 50
    assert puzzles == [puzzle(seed) for seed in range(50)]


def test_a_verdict_says_what_is_right():
    """Of one text, of several; the right answer never reads as if it were the wrong one."""
    own = puzzle(0)
    kind = f"(walk, {own.size} steps)"
    assert verdict(own, [own.chain]) == f"the answer is right: {own.answer} {kind}"
    wrong = verdict(own, ["no answer"])
    assert wrong == f"the answer is wrong; right would be: {own.answer} {kind}"
    some = verdict(own, [own.chain, "no answer", own.chain])
    assert some == f"2 of 3 answers are right; right is: {own.answer} {kind}"


def test_lethe_plus_solves_a_puzzle_with_half_of_the_cache_gone(capsys):
    """What `python generate.py --lethe-plus` shows a newcomer, whole."""
    assert cli.main(["--lethe-plus"]) == 0
    out, err = capsys.readouterr()
    assert puzzle(0).prompt in err
    assert len(out.split()) > 600
    assert f"the answer is right: {puzzle(0).answer}" in err
    assert float(re.search(r"\(([\d.]+)% less\)", err)[1]) > 50


# -- the report ------------------------------------------------------------------------------------


def report_of(engine, policy, tokens, prompt=5):
    """The report's line about the policy, after a run of so many tokens."""
    result = engine.generate([list(range(1, prompt + 1))], policy, tokens)
    return report(result, policy).splitlines()[-1]


def test_the_report_counts_rounds_and_what_was_evicted(engine):
    """And says that the tokens held include those written between rounds."""
    told = report_of(engine, LethePlus(budget=16, interval=4), 30)
    assert re.fullmatch(
        r"policy lethe-plus, budget 16: \d+ rounds, \d+ tokens evicted over all layers; "
        r"\d+ tokens held per layer on average, with those written between rounds",
        told,
    )
    assert ": 1 round, " in report_of(engine, StreamingLLM(budget=16, interval=20), 25)
    assert report_of(engine, FullKV(), 9).startswith("policy full: ")


@pytest.mark.parametrize(
    ("policy", "tokens", "reason"),
    [
        (Lethe(), 40, r"the first round comes 128 tokens or fewer after the first 512, .* has 45"),
        (Lethe(budget=99), 40, r"after the first 99, and the longest text has 45"),
        (LethePlus(evict_threshold=50, interval=7), 40, r"comes 7 tokens or fewer after the first"),
        (Lethe(budget=1.0), 40, r"and never is with this budget"),
        (
            Lethe(budget=None, evict_threshold=9, interval=5, tau=1e9),
            40,
            r"since no layer had a breakpoint at 45 tokens",
        ),
    ],
)
def test_where_nothing_was_pruned_the_report_says_why(engine, policy, tokens, reason):
    """Or from when on it would be."""
    told = report_of(engine, policy, tokens)
    assert "nothing was pruned" in told
    assert re.search(reason, told), told


def test_where_the_report_says_the_first_round_comes_it_comes(engine):
    """The number in it is true: a text that much longer has a round."""
    policy = LethePlus(evict_threshold=50, interval=7)
    told = report_of(engine, policy, 40)
    wait, first = map(int, re.search(r"comes (\d+) .* first (\d+),", told).groups())
    assert "round" in report_of(engine, policy, first - 5)
    assert "nothing was pruned" in report_of(engine, policy, first - 5)
    assert "evicted" in report_of(engine, policy, first - 5 + wait + 1)


# -- sampling --------------------------------------------------------------------------------------

OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
PENALTY = "generation_config.json asks for repetition_penalty 1.05, which is not applied"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A checkpoint whose makers advise a sampling."""
    folder = tiny.folder(tmp_path_factory.mktemp("sampled") / "tiny", eos=())
    (folder / "generation_config.json").write_text(json.dumps(OWN))
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "temperature 0.6 and top-p 0.95 (generation_config.json), seed 0"),
        (
            ["--top-k", "5"],
            "temperature 0.6 and top-p 0.95 (generation_config.json), top-k 5, seed 0",
        ),
        (
            ["--temperature", "1", "--seed", "7"],
            "top-p 0.95 (generation_config.json), temperature 1, seed 7",
        ),
        (["--top-p", "1"], "temperature 0.6 (generation_config.json), seed 0"),
        (["--temperature", "0.7", "--top-p", "0.9"], "temperature 0.7, top-p 0.9, seed 0"),
        (["--temperature", "0"], None),
    ],
)
def test_the_report_says_what_tokens_were_drawn_with(capsys, sampled, tmp_path, options, told):
    """And what of it the checkpoint decided. The penalty that it asks for in vain is told once,
    where anything of the file is used."""
    path = tmp_path / "stats.json"
    words = ["--model", str(sampled), "--prompt", "a", "--max-new-tokens", "3", *options]
    assert cli.main([*words, "--stats", str(path)]) == 0
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("sampled at ")]
    assert lines == ([] if told is None else [f"sampled at {told}"])
    assert err.count(PENALTY) == (told is not None and "json" in told)
    used = json.loads(path.read_text())["sampling"]
    assert used.keys() == {"temperature", "top_k", "top_p", "seed"}
    for name, value in zip(options[::2], options[1::2], strict=True):
        assert used[name[2:].replace("-", "_")] == float(value)
    assert cli.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_three_things_of_the_file_are_listed(engine):
    result = engine.generate([[1]], max_new_tokens=2, temperature=0.6, top_p=0.9, top_k=20)
    told = report(result, FullKV(), ["temperature", "top_p", "top_k"]).splitlines()[1]
    file = "temperature 0.6, top-p 0.9 and top-k 20 (generation_config.json)"
    assert told == f"sampled at {file}, seed 0"


def test_a_greedy_model_says_nothing_of_sampling(capsys, folder):
    assert cli.main(["--model", str(folder), "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert "sampled" not in capsys.readouterr().err


def test_a_chat_uses_the_models_sampling(capsys, monkeypatch, sampled):
    """And says once what is not applied."""
    used, generate = [], Engine.generate

    def watched(self, *args, **options):
        result = generate(self, *args, **options)
        used.append(result.stats.sampling)
        return result

    monkeypatch.setattr(Engine, "generate", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n/exit\n"))
    words = ["--model", str(sampled), "--interactive", "--max-new-tokens", "3", "--top-k", "4"]
    assert cli.main(words) == 0
    assert used == [{"temperature": 0.6, "top_k": 4, "top_p": 0.95, "seed": 0}] * 2
    assert capsys.readouterr().err.count(PENALTY) == 1


def test_an_output_file_belongs_to_the_sampling_that_was_used(capsys, sampled, tmp_path):
    """The model's own, or the same said by options; with another it is refused."""
    file = tmp_path / "out.jsonl"
    words = ["--model", str(sampled), "--prompt", "a", "--max-new-tokens", "3"]
    words += ["--output", str(file)]
    assert cli.main(words) == 0
    assert cli.main([*words, "--temperature", "0.6", "--top-p", "0.95"]) == 0
    assert "is complete" in capsys.readouterr().err
    engine = Engine.from_pretrained(str(sampled), "cpu")
    assert run_batch(engine, [Prompt(1, "a")], FullKV(), tmp_path / "other.jsonl", 3, quiet=True)
    run = [json.loads(path.read_text())["token_ids"] for path in (file, tmp_path / "other.jsonl")]
    assert run[0] == run[1]
    assert cli.main([*words, "--temperature", "0"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_bad_generation_config_is_one_line(capsys, tmp_path):
    folder = tiny.folder(tmp_path / "bad")
    for content in ("[]", '{"do_sample": true, "temperature": NaN}', "{"):
        (folder / "generation_config.json").write_text(content)
        assert cli.main(["--model", str(folder), "--prompt", "a"]) == 2
        out, err = capsys.readouterr()
        assert "generation_config.json" in err
        assert (out, err.count("\n")) == ("", 1)


# -- what goes on ----------------------------------------------------------------------------------


def test_the_prompt_that_nobody_gave_is_shown(capsys, folder):
    """Before the text; not where a prompt was given, and not with --quiet."""
    options = ["--model", str(folder), "--max-new-tokens", "2"]
    assert cli.main(options) == 0
    assert capsys.readouterr().err.startswith(f"prompt: {PROMPT}\n")
    for more in (["--prompt", "abc"], ["--quiet"]):
        assert cli.main([*options, *more]) == 0
        assert PROMPT not in capsys.readouterr().err


def test_what_takes_long_is_said_and_what_does_not_is_not(capsys, monkeypatch):
    """After PATIENCE seconds, once; never with --quiet, or once it is stopped."""
    monkeypatch.setattr(screen, "PATIENCE", 0.05)
    with saying("loading"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading\n"
    with saying("loading", quiet=True):
        time.sleep(0.2)
    with saying("loading") as begun:
        begun()
        time.sleep(0.2)
    with saying("loading"):
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_loading_and_reading_are_said(capsys, monkeypatch, folder):
    """The two silences of a plain run, if they last."""
    monkeypatch.setattr(screen, "PATIENCE", 0.0)
    slow = torch.nn.Module.eval
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: (time.sleep(0.1), slow(self))[1])
    assert cli.main(["--model", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert f"loading {folder}\n" in capsys.readouterr().err


def test_a_batch_says_where_it_writes(capsys, folder, tmp_path):
    """Before its first line is there."""
    file = tmp_path / "out.jsonl"
    options = ["--model", str(folder), "--prompt", "a", "--prompt", "b", "--max-new-tokens", "2"]
    assert cli.main([*options, "--output", str(file)]) == 0
    assert f"writing 2 texts to {file}\n" in capsys.readouterr().err
    assert cli.main([*options, "--output", str(file)]) == 0
    assert capsys.readouterr().err == f"{file} is complete\n"


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """Threads that PyTorch uses while text is written; three before and after."""
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    write = cli._write

    def watched(*args):
        seen.append(torch.get_num_threads())
        return write(*args)

    monkeypatch.setattr(cli, "_write", watched)
    yield seen
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(("options", "count"), [([], 1), (["--threads", "2"], 2)])
def test_a_small_model_takes_one_thread_unless_it_is_told(threads, folder, options, count):
    """A second one costs it more than it gains. Afterwards all is as it was."""
    words = ["--model", str(folder), "--prompt", "a", "--max-new-tokens", "2", *options]
    assert cli.main(words) == 0
    assert threads == [count]


def test_a_larger_model_takes_all_threads(threads, folder, monkeypatch):
    """What is small is a question of parameters."""
    monkeypatch.setattr(cluster, "SMALL", 100)
    assert cli.main(["--model", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert threads == [3]


def test_statistics_have_the_budget_as_python_does(capsys, folder, tmp_path):
    """A share is a number, so that a reader need not parse it."""
    path = tmp_path / "stats.json"
    words = ["--model", str(folder), "--prompt", "a", "--max-new-tokens", "2", "--lethe"]
    assert cli.main([*words, "--stats", str(path)]) == 0
    assert json.loads(path.read_text())["policy"]["budget"] == 0.25
