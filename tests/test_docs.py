"""The documents tell the truth: their Python runs, their numbers, tables, links and options hold.

Blocks run as a reader would run them, one after the other, with a tiny random model wherever they
load one.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
import shutil
import zlib
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import tiny
import torch

from lethe_mini import Engine, Lethe, LethePlus, Pruner, Recall
from lethe_mini.app.parser import build_parser
from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.model import Transformer
from lethe_mini.policies import POLICIES

ROOT = Path(__file__).parent.parent
ALGORITHM, GUIDE = ROOT / "docs" / "ALGORITHM.md", ROOT / "docs" / "POLICIES.md"
PLUS, RECALL = ROOT / "docs" / "LETHE_PLUS.md", ROOT / "docs" / "RECALL.md"
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 97,
    "max_position_embeddings": 600,  # no run goes on for longer than that
    "rms_norm_eps": 1e-5,
}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


class Words:
    """A text without a vocabulary: a word is a token, a token is its number."""

    eos_ids = frozenset()
    sampling: ClassVar[dict] = {}

    def encode_prompt(self, prompt, system=None, raw=False, think=None):
        if not isinstance(prompt, str):
            prompt = " ".join(message["content"] for message in prompt)
        return [zlib.crc32(word.encode()) % SIZES["vocab_size"] for word in prompt.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def pieces(self, ids):
        return [f"{id} " for id in ids]

    def stream(self):
        return SimpleNamespace(push=lambda token: f"{token} ", flush=lambda: "")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader stands: the root of a repository, and a model that loads at once."""
    model = Transformer(parse_config(SIZES))
    model.init_rope("cpu")
    signature = inspect.signature(Engine.from_pretrained)

    def from_pretrained(*args, **options):
        signature.bind(*args, **options)
        return Engine(model, Words(), "tiny")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    for name, policy in POLICIES.items():  # what a block adds is gone afterwards
        monkeypatch.setitem(POLICIES, name, policy)
    before = dict(POLICIES)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in POLICIES.keys() - before.keys():
        del POLICIES[name]


def run(text: str, name: str = "text") -> dict:
    """Executes all Python of a document in one namespace, which is returned."""
    names = {"__name__": "document"}
    for block in BLOCK.finditer(text):
        code, line = block[1], text[: block.start(1)].count("\n")
        if ">>>" not in code:
            exec(compile("\n" * line + code, name, "exec"), names)
            continue
        case = doctest.DocTestParser().get_doctest(code, names, name, name, line)
        report: list[str] = []
        runner = doctest.DocTestRunner(verbose=False)
        failed, _ = runner.run(case, out=report.append, clear_globs=False)
        assert not failed, "".join(report)
        names.update(case.globs)
    return names


@pytest.mark.usefixtures("reader")
@each_document
def test_every_block_runs_and_gives_the_numbers_it_prints(path):
    run(path.read_text(encoding="utf-8"), path.name)


@pytest.mark.usefixtures("reader")
def test_the_policies_of_the_guide_prune():
    names = run(GUIDE.read_text(encoding="utf-8"))
    assert names["result"].stats.rounds > 1
    assert names["result"].stats.evicted_tokens > 0
    final = names["one"].stats.kv_tokens_final[0]
    assert names["one"].stats.rounds > 0
    assert final == sorted(final)
    assert final[0] < final[-1]

    cache = KVCache(parse_config(SIZES))
    tiny.put(cache, [torch.zeros(2, 1, 2, 23, 6)] * len(cache.layers))
    names["EverySecond"](budget=9, sinks=0, recent_ratio=0.0).round(cache, [True])
    for layer in cache.layers:  # the last one is always recent, and even
        assert layer.positions[0, 1].tolist() == list(range(6, 23, 2))


@pytest.mark.parametrize(
    "wrong", [">>> 1 + 1\n3\n", "assert 1 + 1 == 3\n", ">>> 1\n1\n```\n\n```python\nnothing\n"]
)
def test_a_document_that_is_wrong_is_found_out(wrong):
    with pytest.raises((AssertionError, NameError)):
        run(f"text\n\n```python\n{wrong}```\n")


def definitions(path: Path) -> set[str]:
    """Names a file defines at its top level, and Class.name for what its classes define."""

    def own(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from own(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if hasattr(target, "id"))

    return set(own(ast.parse(path.read_text(encoding="utf-8")).body))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_files_headings_and_functions(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    assert links
    for label, link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        if target.suffix == ".py" and label.startswith("`") and not label.endswith(".py`"):
            assert label.strip("`") in definitions(target), (label, link)


SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN = {"--phase", "--largest"}  # of policies that are not ours


def commands(path: Path) -> list[list[str]]:
    """The commands of a document's shell blocks, as words."""
    lines = [
        line for block in SHELL.findall(path.read_text("utf-8")) for line in block.splitlines()
    ]
    parts = [part for line in lines for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def options_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}


@each_document
def test_options_of_the_command_line_exist(path):
    """Those in running text are the command's, or of a command that the page shows."""
    known = set(re.findall(r"--[a-z][a-z-]+", build_parser().format_help())) | OWN
    for words in commands(path):
        known |= options_of(words) if "generate.py" not in words else set()
    words = re.findall(r"`(--[a-z][a-z-]+)", path.read_text(encoding="utf-8"))
    if path.name not in ("QUALITY.md", "README.md") or path == README:
        assert set(words) <= known | BENCHMARKS


def help_of(module: str, *kind: str) -> set[str]:
    """The options of a command, or of one kind of it, from its help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*kind, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", out.getvalue()))


BENCHMARKS = {"--lines", "--json", "--targets", "--quick", "--split", "--beyond", "--compare"}


@each_document
def test_commands_of_the_documents_exist(path):
    """Every script, module and option in a shell block is there; what they write goes to out/."""
    shown = help_of("lethe_mini.app.cli") | OWN
    for words in commands(path):
        words = [
            word.removeprefix(".venv/bin/") for word in words if not re.match("[A-Z_]+=", word)
        ]
        if words[0] == "torchrun":
            words = ["python", *words[words.index("generate.py") :]]
        if words[:2] == ["python", "generate.py"]:
            assert options_of(words) <= shown, words
            for option, value in pairwise(words):
                if option in ("--output", "--stats", "--trace", "--lens"):
                    assert value.startswith("out/"), words
        elif words[:2] == ["python", "-m"] and words[2] not in ("pytest", "venv"):
            module = "lethe_mini.lens.__main__" if words[2] == "lethe_mini.lens" else words[2]
            kind = words[3:4] if words[2] == "benchmarks.quality.run" else []
            assert options_of(words) <= help_of(module, *kind), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1:3] == ["-m", "pytest"], words
        else:
            assert words[0] in ("python3", "pip", ".", "mkdir", "chromium"), words


# -- the front page --------------------------------------------------------------------------------


def marked(name: str) -> str:
    """The command of the README behind <!-- name -->."""
    text = README.read_text(encoding="utf-8")
    return re.search(rf"^<!-- {name} -->\n```sh\n(python3 .*)\n```$", text, re.MULTILINE)[1]


def test_the_readme_is_short_and_its_two_commands_are_there():
    """One page; a set-up that runs, and one that tests, each a line that works by itself."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140
    setup = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert marked("run") == f"{setup} . && .venv/bin/python generate.py --lethe-plus"
    assert (
        marked("tests") == f"{setup} '.[test]' && .venv/bin/python -m pytest -n 2 --dist worksteal"
    )


def test_the_readme_counts_the_lines_of_the_reading_path():
    """By wc -l, file by file and together."""
    text, total = README.read_text(encoding="utf-8"), 0
    rows = re.findall(r"^\| (\[\w+\.py\].*?) \| (\d+) \|", text, re.MULTILINE)
    for files, count in rows:
        paths = [ROOT / path for path in re.findall(r"\]\((.*?)\)", files)]
        assert sum(path.read_text(encoding="utf-8").count("\n") for path in paths) == int(count)
        total += int(count)
    assert f"The whole path is {total} lines" in text
    assert len(re.findall(r"\]\((\w|/)+\.py\)", "".join(files for files, _ in rows))) == 8


def test_the_tree_of_the_readme_has_every_room():
    """Each folder in one line that says what it holds."""
    tree = (
        README.read_text(encoding="utf-8").partition("```text\ngenerate.py")[2].partition("```")[0]
    )
    named = set(re.findall(r"^ *(\w+)/ +\w", tree, re.MULTILINE))
    inside = {path.parent.name for path in (ROOT / "lethe_mini").glob("*/__init__.py")}
    assert named == {"lethe_mini", *inside, "benchmarks", "examples", "tests", "docs"}
    assert set(re.findall(r"[A-Z][A-Z_]+", tree.rpartition("docs/")[2])) == {
        path.stem for path in (ROOT / "docs").glob("*.md")
    }


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("random eviction", "random"),
        ("StreamingLLM", "streaming"),
        ("H2O", "h2o"),
        ("R-KV", "rkv"),
        ("Lethe", "lethe"),
        ("Lethe, the paper's words on layers", "lethe-hoyer"),
        ("LethePlus", "lethe-plus"),
        ("Recall", "recall"),
    ],
)
def test_the_quality_table_of_the_readme_is_the_documents(name, choice):
    """Walks with a protected prompt at a tenth and a quarter, own chains and prose at a tenth."""
    quality, text = (
        path.read_text(encoding="utf-8") for path in (ROOT / "docs/QUALITY.md", README)
    )

    def row(section: str, start: str) -> list[str]:
        found = re.search(rf"^\| {choice} \|{start}(.*)\|$", section, re.MULTILINE)
        return [cell.partition("[")[0].strip() for cell in found[1].split("|")] if found else []

    walks = quality.partition("`walk`:\n")[2].partition("| prompt protected |")[2]
    own = quality.partition("## Own chains\n")[2].partition("\n## ")[0]
    prose = quality.partition("\n## Prose\n")[2].partition("\n## ")[0]  # first, free prompts
    own, prose = row(own, r" 10% \|"), row(prose, r" 10% \|")
    right = [*row(walks, "")[1:3], own[1] if own else "", prose[2] if prose else ""]
    mine = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)[1]
    assert [cell.strip(" *%") for cell in mine.split("|")] == [
        cell.removesuffix(".0") for cell in right
    ]


def test_no_document_names_what_only_we_see():
    """No path of a machine, and nothing beside the repository."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for word in ("/work", "../shared", "/root", "/tmp", "--paper", "granularity", "knee"):
            assert word not in text, (path.name, word)


def table(path: Path, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    section = path.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def parameters(path: Path) -> dict:
    """A document's table of parameters: name -> default."""
    rows = table(path, "Parameters")
    return {name.strip("`"): ast.literal_eval(default.strip("`")) for name, default, _ in rows}


def test_the_table_of_parameters_is_the_dataclass():
    shown = parameters(ALGORITHM)
    assert shown == {spec.name: spec.default for spec in fields(Lethe)}
    shown = parameters(PLUS)
    of_lethe = {spec.name: spec.default for spec in fields(Lethe)}
    own = {spec.name: spec.default for spec in fields(LethePlus)}
    assert shown == {name: own[name] for name in shown}
    assert {name for name in own if own[name] != of_lethe.get(name)} <= shown.keys()
    shared = {spec.name for spec in fields(Pruner)}
    own = {spec.name: spec.default for spec in fields(Recall) if spec.name not in shared}
    assert parameters(RECALL) == own


def test_the_table_of_policies_is_the_registry():
    shared = {spec.name: spec.default for spec in fields(Pruner)}
    rows = {row[0].strip("`"): row for row in table(GUIDE, "The built-in policies")}
    assert rows.keys() == POLICIES.keys()
    for name, (_, _, paper, options) in rows.items():
        assert paper in (inspect.getdoc(POLICIES[name]) or "")
        pairs = (option.partition("=") for option in re.findall(r"`([^`]+)`", options))
        shown = {key: ast.literal_eval(value) for key, _, value in pairs}
        own = {spec.name: spec.default for spec in fields(POLICIES[name])}
        differ = {key for key in own if key not in shared or own[key] != shared[key]}
        assert shown == {key: own[key] for key in differ}


def test_the_picture_adds_up():
    """72 of 6 x 24 slots are held: a budget of 12; the legend has one more of each kind."""
    cells = [
        rect.get("class")
        for rect in ElementTree.parse(ROOT / "docs" / "lethe.svg").findall("{*}rect")
        if rect.get("class") in tuple("psrd")
    ]
    assert len(cells) == 6 * 24 + 4
    assert sum(kind != "d" for kind in cells) == 6 * 12 + 3
