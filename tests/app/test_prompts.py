"""Prompt files: any name, any encoding, and what is wrong with each line, told all at once.

A tiny random checkpoint runs what can be run.
"""

import gzip
import io
import json
import os
import subprocess
import sys

import pytest
import tiny

from lethe_mini.app import prompts as module
from lethe_mini.app.cli import main
from lethe_mini.app.prompts import STDIN, TOLD, Prompt, read_prompts
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError

POSITIONS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a token per byte whose texts do not end by themselves."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.folder(folder, eos=(), max_position_embeddings=POSITIONS)


@pytest.fixture
def run(model, capsys):
    """main([...]) for three tokens -> exit code, standard output, lines of standard error."""

    def call(*argv):
        capsys.readouterr()
        options = ["--model", model, "--max-new-tokens", 3, "--device", "cpu"]
        code = main([str(word) for word in [*options, *argv]])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def written(path, *lines):
    """A file of these objects, or of these lines as they are."""
    words = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(word + "\n" for word in words), encoding="utf-8")
    return path


def entries(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- one bad apple ---------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "a"}
READ = {  # bad whatever the model is: a line, what is told of it, and whether its id is known
    '{"id": "b", "prompt": "a"': ("not JSON", False),
    '{"id": "b", "prompt": 3}': ("prompt should be a string, not 3", True),
    '{"id": "b", "prompt": " "}': ("the prompt is empty", True),
    '{"id": "b", "prompt": "a", "max_new_tokens": "3"}': ("max_new_tokens .* not '3'", True),
    '{"id": "b", "prompt": "\\ud800"}': ("not valid Unicode", True),
    '{"id": "b", "messages": [{"role": "user"}]}': ("a message has no content", True),
    '{"id": "a", "prompt": "again"}': ("the id 'a' is there twice .line 1", True),
    '{"id": 1.5, "prompt": "a"}': ("id should be a string or a whole number, not 1.5", False),
    '{"id": "b", "prompt": "\0"}': ("a NUL byte", False),
    "hello": ("not JSON", False),
}
ASKED = {  # bad for this model, its template or the policy
    '{"id": "b", "prompt": "%s"}' % ("x" * 400): ("tokens and the model takes 300; cut it", True),
    '{"id": "b", "messages": [{"role": "user", "content": "nothing here"}]}': ("no n please", True),
}
BAD = [*READ.items(), *ASKED.items()]


@pytest.fixture(scope="module")
def picky(tmp_path_factory):
    """A checkpoint whose template refuses a text."""
    folder = tmp_path_factory.mktemp("model") / "picky"
    refusal = "{{ raise_exception('no n please') if messages[-1].content.startswith('nothing') }}"
    template = refusal + tiny.TEMPLATE
    return tiny.folder(folder, eos=(), template=template, max_position_embeddings=POSITIONS)


@pytest.mark.parametrize(("line", "told"), BAD, ids=range(len(BAD)))
def test_a_bad_prompt_is_named_and_may_be_left_out(run, picky, tmp_path, line, told):
    """By its line and its id, before anything is written; with --skip-invalid the others run, and a
    line with the id says why it is not among them. A second run finds the file complete."""
    good = [{"id": "a", "prompt": "short"}, {"id": "c", "prompt": "short, too"}]
    file, output = written(tmp_path / "p.jsonl", good[0], line, good[1]), tmp_path / "out.jsonl"
    words = ["--model", picky, "--prompt-file", file, "--output", output]
    (reason, known), name = told, "(id 'a')" if '"a", "prompt": "again"' in line else "(id 'b')"
    code, out, err = run(*words)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"error: {file}, line 2{' ' + name if known else ''}: ")
    assert err[0].endswith("; --skip-invalid leaves it out")
    assert not output.exists()
    code, out, err = run(*words, "--skip-invalid")
    assert code == 0
    assert err[0] == f"writing 2 texts to {output}, and what is wrong with 1 of 3 prompts"
    first, *others = entries(output)
    assert set(first) == {"id", "line", "error"}
    assert (first["id"], first["line"]) == (name[5:-2] if known else 2, 2)
    assert module.re.search(reason, first["error"])
    assert [one["id"] for one in others] == ["a", "c"]
    before = output.read_bytes()
    code, _, err = run(*words, "--skip-invalid")
    assert (code, err) == (0, [f"{output} is complete"])
    assert output.read_bytes() == before
    assert run(*words)[0] == 2  # without the option it is an error as ever
    code, out, err = run("--model", picky, "--prompt-file", file, "--skip-invalid", "--quiet")
    assert (code, len(err)) == (0, 1)
    assert err[0].startswith(f"left out: {file}, line 2")
    assert out.count("---\n") == 2


def test_bad_prompts_are_told_all_at_once(run, tmp_path):
    """A line each, in two groups: those known from the file before a model is looked for, those
    that are too long before anything is computed. Of very many the rest is counted."""
    few = [{"id": i, "prompt": "x" * (299 + i)} for i in range(5)]
    code, _, err = run("--raw", "--prompt-file", written(tmp_path / "a.jsonl", *few))
    assert (code, len(err)) == (2, 3)
    for line, number in zip(err, (2, 3, 4), strict=True):
        assert f"line {number + 1} (id {number}): the prompt has {299 + number} tokens" in line
    assert [line.endswith("; --skip-invalid leaves them out") for line in err] == [0, 0, 1]
    many = [{"prompt": "a"}, *({"prompt": i} for i in range(40))]
    code, _, err = run("--model", "no", "--prompt-file", written(tmp_path / "b.jsonl", *many))
    assert (code, len(err)) == (2, TOLD + 1)
    assert err[-1] == f"error: and {40 - TOLD} more; --skip-invalid leaves them out"
    code, _, err = run("--prompt-file", tmp_path / "b.jsonl", "--skip-invalid", "--quiet")
    assert (code, len(err)) == (0, TOLD + 1)


def test_where_all_prompts_are_bad_nothing_is_left_out(run, tmp_path):
    """An option is wrong rather than a prompt: one line if they have one reason, and no file."""
    output = tmp_path / "out.jsonl"
    words = ["--output", output, "--prompt-file"]
    same = written(tmp_path / "p.txt", "a", "b", "c", "d")
    for more in ([], ["--skip-invalid"]):
        code, _, err = run(*words, same, "--raw", "--system", "Be brief.", *more)
        assert (code, len(err)) == (2, 1)
        assert err[0].startswith(f"error: {same}, line 1 and the 3 others: a system text needs")
        differ = written(tmp_path / "p.jsonl", {"prompt": "x" * 400}, "hello")
        code, _, err = run(*words, differ, *more)
        assert (code, len(err)) == (2, 1 if not more else 2)
    assert not output.exists()


def test_prompts_of_options_are_left_out_too(run, tmp_path):
    """They go by their number."""
    words = ["--prompt", "a", "--prompt", "", "--prompt", "c"]
    assert run(*words)[2] == [
        "error: prompt 2: the prompt is empty; give it some text; --skip-invalid leaves it out"
    ]
    code, out, err = run(*words, "--skip-invalid", "--quiet")
    assert (code, err) == (0, ["left out: prompt 2: the prompt is empty; give it some text"])
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        "--- 1 ---",
        "--- 3 ---",
    ]


def test_a_mended_prompt_is_completed_by_the_same_command(run, tmp_path):
    """Its result follows the line with the error; what was there stays, and is not done again. A
    prompt that is bad for another reason gets another line."""
    output, file = tmp_path / "out.jsonl", tmp_path / "p.jsonl"
    words = ["--prompt-file", file, "--output", output, "--skip-invalid", "--num-samples", 2]
    good, bad = {"id": "a", "prompt": "a"}, {"id": "b", "prompt": "x" * 400}
    written(file, good, bad)
    assert run(*words)[0] == 0
    before = output.read_bytes()
    written(file, good, {**bad, "max_new_tokens": 0})
    assert run(*words)[0] == 0
    written(file, good, {"id": "b", "prompt": "mended"})
    assert run(*words)[0] == 0
    assert output.read_bytes().startswith(before)
    assert [(one["id"], one.get("sample")) for one in entries(output)] == [
        *(("b", None), ("a", 0), ("a", 1), ("b", None), ("b", 0), ("b", 1))
    ]
    assert run(*words)[2] == [f"{output} is complete"]


@pytest.mark.parametrize(
    "entry", [{"error": "x"}, {"line": 1, "error": 3}, {"line": True, "error": "x"}]
)
def test_a_line_with_an_error_that_is_not_ours_is_refused(run, tmp_path, entry):
    output = written(tmp_path / "out.jsonl", {"id": 1, **entry})
    code, _, err = run("--prompt", "a", "--output", output)
    assert (code, len(err)) == (2, 1)
    assert "this command did not write it" in err[0]


def test_logits_that_are_not_numbers_name_the_prompt_and_keep_what_is_finished(
    run, model, monkeypatch, tmp_path
):
    """The line of the file, on the screen too; lines of sequences that have ended stay."""
    file = written(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "a", "max_new_tokens": 1},
        {"id": "b", "prompt": "bbb"},
    )
    load, output = Engine.from_pretrained, tmp_path / "out.jsonl"

    def spoiled(*args):
        engine = load(*args)
        engine.model.embed_tokens.weight[:, 0] = float("inf")
        return engine

    code, _, err = run("--prompt-file", file, "--output", output, "--quiet")
    whole = output.read_bytes()
    monkeypatch.setattr(Engine, "from_pretrained", spoiled)
    for more in ([], ["--temperature", 0.8]):
        code, out, err = run("--prompt-file", file, "--quiet", *more)
        assert (code, out, len(err)) == (2, "", 1)
        assert f"{file}, line 1 (id 'a'): the model's logits are not numbers" in err[0]
    output.write_bytes(whole.splitlines(keepends=True)[0])
    code, out, err = run("--prompt-file", file, "--output", output, "--quiet")
    assert (code, len(err)) == (2, 1)
    assert f"{file}, line 2 (id 'b'): the model's logits are not numbers" in err[0]
    assert output.read_bytes() == whole.splitlines(keepends=True)[0]


def test_an_error_ends_the_line_of_a_text_that_has_begun(run, monkeypatch):
    """So that it stands at the beginning of its own."""
    generate = Engine.generate

    def failing(self, *args, on_token, **options):
        def on_each(index, token):
            on_token(index, token)
            raise UserError("it failed")

        return generate(self, *args, on_token=on_each, **options)

    monkeypatch.setattr(Engine, "generate", failing)
    code, out, err = run("--prompt", "a", "--quiet")
    assert (code, err) == (2, ["error: it failed"])
    assert out.endswith("\n")


# -- names and encodings ---------------------------------------------------------------------------

TEXTS = ["first né", "second \u2028 line", "third"]


@pytest.mark.parametrize(
    "name", ["p.jsonl", "P.JSONL", "p.NdJson", "p.jsonl.gz", "p.JSONL.GZ", "p"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_name_and_encoding_is_read(tmp_path, name, encoding, end):
    """The kind by the name, in any case; gzip by its content; line ends of every system, also
    without one at the end."""
    objects, mark = name != "p", "\ufeff" if encoding.endswith("with BOM") else ""
    encoding = encoding.split()[0]
    lines = [json.dumps({"prompt": text}) for text in TEXTS] if objects else TEXTS
    data = (mark + end.join(lines)).encode(encoding)
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert read_prompts(file) == [Prompt(i, text) for i, text in enumerate(TEXTS, 1)]
    if not encoding.startswith("utf-16"):  # whose line ends would need their own mark
        file.write_bytes(gzip.compress(data + end.encode()))
        assert [prompt.prompt for prompt in read_prompts(file)] == TEXTS


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input_is_a_file_too(run, monkeypatch, tmp_path):
    """Objects if it begins with `{`, else texts; errors name its lines."""
    feed(monkeypatch, b"a\n{b\n")
    assert read_prompts(STDIN) == [Prompt(1, "a"), Prompt(2, "{b")]
    feed(monkeypatch, gzip.compress(b'\n {"prompt": "a"}\n{"prompt": "b", "id": 7}'))
    assert read_prompts(STDIN) == [Prompt(2, "a"), Prompt(7, "b")]
    feed(monkeypatch, b'{"prompt": "a"}\n{"prompt": "b", "id": 1.5}')
    assert run("--prompt-file", "-")[2] == [
        "error: standard input, line 2: id should be a string or a whole number, not 1.5; "
        "--skip-invalid leaves it out"
    ]
    feed(monkeypatch, b"a\nb")
    assert run("--prompt-file", "-", "--quiet")[1].count("---\n") == 2


LIKE_OBJECTS = {
    "objects": '{"a": 1}\n{"b": 2}\n',
    "prompts": '\n  {"prompt": "a"}\n',
    "broken": '{"messages": [\nhello\n',
    "broken id": '{ "id" : 3, "prompt": \n',
    "indented": '{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n',
    "list": '[\n{"prompt": "a"}\n]\n',
    "list of texts": '["a", "b"]',
}


@pytest.mark.parametrize("content", LIKE_OBJECTS.values(), ids=LIKE_OBJECTS)
@pytest.mark.parametrize("name", ["p.txt", "p", "p.json", "p.jsonl.txt"])
def test_objects_are_not_read_as_texts(run, tmp_path, name, content):
    """A file of JSON whose name says otherwise is refused, with how to mend it."""
    file = tmp_path / name
    file.write_text(content)
    code, _, err = run("--prompt-file", file)
    assert (code, len(err)) == (2, 1)
    assert f"{file} holds JSON, but would be read as plain text; name it .jsonl" in err[0]


@pytest.mark.parametrize(
    "text", ["{x}", "{", '{"id": 5} is JSON', "[INST] a [/INST]", "[1]\nb", "12", '"a"', "{a\nb"]
)
def test_texts_with_brackets_are_texts(tmp_path, text):
    """As long as they are no JSON."""
    file = written(tmp_path / "p.txt", *text.split("\n"))
    if text == "{":  # as a list of indented objects begins
        with pytest.raises(UserError, match="holds JSON"):
            read_prompts(file)
    else:
        assert [prompt.prompt for prompt in read_prompts(file)] == text.split("\n")


REFUSED = [
    ("p.jsonl", None, "cannot read .*p.jsonl: No such file"),
    ("p.jsonl", b"", "p.jsonl holds no prompt; write one a line"),
    ("p.txt", b"\xef\xbb\xbf\n \n", "holds no prompt"),
    ("p.txt", gzip.compress(b"\n"), "holds no prompt"),
    ("p.txt", gzip.compress(b"some text")[:-9], "p.txt is a damaged gzip file; pack it again"),
    ("p.txt", b"\x1f\x8bnothing", "p.txt is a damaged gzip file; pack it again"),
    ("p.txt", b"\xff\xfea\0b", "p.txt is damaged UTF-16 text; save it as UTF-8"),
    ("p.jsonl", b'[\n{"prompt": "a"}\n]', "p.jsonl is a single JSON value over several lines"),
    ("p.jsonl", b'{\n"prompt": "a"\n}', "p.jsonl is a single JSON value over several lines"),
    ("p.txt", "naïve".encode("latin-1"), "p.txt, line 1: not UTF-8 text; save it as UTF-8"),
    ("p.jsonl", b'{"prompt": "\xff"}', "p.jsonl, line 1: not UTF-8 text"),
    ("p.txt", "a\nb\nc".encode("utf-16-le"), "line 1 and the 2 others: it holds a NUL byte"),
    ("p.jsonl", b"a\nb\nc", "line 1 and the 2 others: not JSON .Expecting value in column 1"),
    ("p.jsonl", b'{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}', "7 is there twice .line 1"),
    ("p.jsonl", b'{"prompt": "a", "id": 2}\n{"prompt": "b"}', "2 is there twice .line 1"),
]


@pytest.mark.parametrize(("name", "content", "match"), REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_cannot_be_read_is_refused(run, tmp_path, name, content, match):
    """In one line that says how to mend it, and no model is looked for."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    code, _, err = run("--model", "nowhere", "--prompt-file", file)
    assert (code, len(err)) == (2, 1)
    assert module.re.search(match, err[0]), err


def test_a_folder_is_no_prompt_file(run, tmp_path):
    code, _, err = run("--prompt-file", tmp_path)
    assert (code, err) == (2, [f"error: cannot read {tmp_path}: it is a folder; name a file"])


def test_one_file_has_one_use(run, tmp_path):
    """A prompt file is not overwritten, whatever its name looks like; `-` is no output."""
    file = written(tmp_path / "p.txt", "a")
    os.symlink(file, tmp_path / "link")
    for option in ("--stats", "--trace", "--output", "--lens"):
        for place in (file, tmp_path / "link", tmp_path / "." / "p.txt"):
            code, _, err = run("--prompt-file", file, option, place)
            assert (code, len(err)) == (2, 1)
            assert "is named twice" in err[0]
        assert "no output file" in run("--prompt-file", file, option, "-")[2][0]
    assert file.read_text() == "a\n"
    assert run("--prompt-file", file, "--stats", "/dev/null", "--lens", "/dev/null")[0] == 0


def test_a_pipe_brings_prompts(model):
    """From another process, as `-` and as a name of the shell's own."""
    for name in ("-", "/dev/stdin"):
        words = ["--model", model, "--prompt-file", name, "--max-new-tokens", 3, "--quiet"]
        done = tiny.command(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert done.communicate(b"a\nb\n")[0].count(b"---\n") == 2
        assert done.returncode == 0
