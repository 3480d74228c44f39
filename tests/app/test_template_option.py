"""`--template` chooses among chat templates; that a model has none is said once."""

import json

import pytest
import tiny

from lethe_mini.app.cli import PLAIN, main

NAMED = [
    {"name": "short", "template": "{{ messages[0].content }}"},
    {"name": "long", "template": "{{ messages[0].content }}: a long one"},
]
FEW = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "3")


@pytest.fixture
def run(capfd, tmp_path):
    """The command on a model with this template. -> exit code, what it wrote, and to where"""

    def call(template, *options, model=None, prompt=("--prompt", "Hi")):
        model = model or tiny.folder(tmp_path / "m", template=template)
        code = main(["--model", str(model), *FEW, *prompt, *map(str, options)])
        return code, *capfd.readouterr()

    return call


def tokens(path):
    return json.loads(path.read_text())["sequences"][0]["prompt_tokens"]


def test_a_template_is_chosen_by_name(run, tmp_path):
    stats = tmp_path / "stats.json"
    for name, length in (("short", 2), ("long", 14)):
        code, _, err = run(NAMED, "--template", name, "--stats", stats)
        assert (code, tokens(stats)) == (0, length)
        assert PLAIN not in err
    code, _, _ = run(tiny.TEMPLATE, "--template", "default", "--stats", stats)
    assert code == 0


@pytest.mark.parametrize(
    ("template", "options", "match"),
    [
        (NAMED, (), "templates are 'long', 'short', and none is the default; choose one with --te"),
        (NAMED, ("--template", "x"), "no chat template 'x'; its templates are 'long', 'short'"),
        (tiny.TEMPLATE, ("--template", "x"), "'x'; its templates are 'default'"),
        (None, ("--template", "x"), "no chat template 'x'; it has none at all"),
        (
            NAMED,
            ("--template", "long", "--raw"),
            "--raw leaves out the chat template; leave out --",
        ),
        ("{{ 'x' * 10 ** 9 }}", (), "the chat template is stopped: it makes a text of more than"),
    ],
)
def test_a_template_that_cannot_be_is_one_line(run, template, options, match):
    code, out, err = run(template, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert match in err
    assert len(err.splitlines()) == 1


def test_a_file_is_not_continued_with_another_template(run, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run(NAMED, "--template", "short", "--output", output)[0] == 0
    assert "is complete" in run(NAMED, "--template", "short", "--output", output)[2]
    code, _, err = run(NAMED, "--template", "long", "--output", output)
    assert code == 2
    assert "other settings" in err


def test_a_model_without_a_template_is_continued_and_told_so_once(run, tmp_path):
    """Not where nobody asks for it, and not for the reasoner, whose puzzles are its own prompts."""
    assert run(None)[2].count(PLAIN) == 1
    assert run(None, "--prompt", "Ho")[2].count(PLAIN) == 1
    assert run(None, "--output", tmp_path / "out.jsonl")[2].count(PLAIN) == 1
    for options in (("--raw",), ("--quiet",)):
        assert PLAIN not in run(None, *options)[2]
    assert PLAIN not in run(NAMED, "--raw")[2]
    assert PLAIN not in run(None, model="reasoner")[2]
    assert PLAIN not in run(None, model="reasoner", prompt=())[2]


def test_a_chat_says_it_before_the_first_line(monkeypatch, capsys, tmp_path):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    for template, times in ((None, 1), (tiny.TEMPLATE, 0)):
        folder = tiny.folder(tmp_path / "m", template=template)
        assert main(["--model", str(folder), *FEW, "--interactive"]) == 0
        assert capsys.readouterr().err.count(PLAIN) == times
