"""The documents tell the truth: their Python runs, their numbers, tables, links and options hold.

Blocks run as a reader would run them, one after the other, with a tiny random model wherever they
load one.
"""

import ast
import doctest
import inspect
import re
import shutil
import zlib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import tiny
import torch

from lethe_mini import Engine, Lethe, Pruner
from lethe_mini.app.cli import build_parser
from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.model import Transformer
from lethe_mini.policies import POLICIES

ROOT = Path(__file__).parent.parent
ALGORITHM, GUIDE = ROOT / "docs" / "ALGORITHM.md", ROOT / "docs" / "POLICIES.md"
TRACE = ROOT / "docs" / "TRACE.md"
DOCUMENTS = [path for path in (ALGORITHM, GUIDE, TRACE, ROOT / "README.md") if path.is_file()]
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

    def encode_prompt(self, prompt, system=None, raw=False):
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
def test_the_policies_of_the_guide_prune(capsys):
    names = run(GUIDE.read_text(encoding="utf-8"))
    assert names["result"].stats.rounds > 1
    assert names["result"].stats.evicted_tokens > 0
    assert names["status"] == 0
    final = names["one"].stats.kv_tokens_final[0]
    assert names["one"].stats.rounds > 0
    assert final == sorted(final)
    assert final[0] < final[-1]
    assert "policy every-second" in capsys.readouterr().err

    cache, kv = KVCache(parse_config(SIZES)), torch.zeros(1, 2, 23, 6)
    for layer in cache.layers:
        tiny.put(layer, kv, kv, torch.arange(23)[None])
    cache.seen = [23]
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
        if target.suffix == ".py" and label.startswith("`"):
            assert label.strip("`") in definitions(target), (label, link)


@each_document
def test_options_of_the_command_line_exist(path):
    shown = set(re.findall(r"--[a-z][a-z-]+", build_parser().format_help()))
    shown |= {"--phase"}  # of the guide's own policy
    words = re.findall(r"`(--[a-z][a-z-]+)", path.read_text(encoding="utf-8"))
    assert set(words) <= shown


def table(path: Path, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    section = path.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_of_parameters_is_the_dataclass():
    rows = {name.strip("`"): default for name, default, _ in table(ALGORITHM, "Parameters")}
    shown = {name: ast.literal_eval(default.strip("`")) for name, default in rows.items()}
    assert shown == {spec.name: spec.default for spec in fields(Lethe)}


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
