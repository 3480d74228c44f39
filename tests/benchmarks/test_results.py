"""JSON Lines files that runs continue from, and the files of figures."""

import json
import os
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.results import HEAD, Lines, write_json
from lethe_mini.errors import UserError
from lethe_mini.jsonlines import Appender, digest, read_lines

OBJECTS = [{"id": 1, "text": "a\nb"}, {"id": 2, "text": "é\u2028"}, {"id": 3, "text": ""}]
ID = b'{"id": '


def written(path, objects=OBJECTS):
    with Appender(path) as file:
        for one in objects:
            file.write(json.dumps(one, ensure_ascii=False))
    return path


def read(path, **options):
    """What a file holds: [(number, object)]."""
    found = []
    read_lines(path, ID, lambda number, one: found.append((number, one)), **options)
    return found


def test_what_was_written_is_read(tmp_path):
    assert read(tmp_path / "none") == []
    path = written(tmp_path / "lines")
    assert read(path) == list(enumerate(OBJECTS, 1))
    written(path, OBJECTS[:1])
    assert read(path) == list(enumerate([*OBJECTS, OBJECTS[0]], 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "lines"


@given(st.data())
def test_a_line_cut_short_is_dropped_and_the_whole_ones_stay(place, data):
    place.unlink(missing_ok=True)
    whole = written(place).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    place.write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert read(place) == list(enumerate(OBJECTS[:complete], 1))
    assert place.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]


@pytest.mark.parametrize("tail", [b"", ID, b'{"id": 4, "te'])
def test_a_refused_file_keeps_every_byte(tmp_path, tail):
    """Also its last line that was cut short: it may belong to another run."""
    path = written(tmp_path / "lines")
    path.write_bytes(path.read_bytes() + tail)
    before = path.read_bytes()

    def refuse(number, one):
        if number == 3:
            raise UserError("belongs to other settings")

    with pytest.raises(UserError, match="other settings"):
        read_lines(path, ID, refuse)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"notes\n", b"[1]\n", b"\n", b"\xff\n", b"[" * 100_000 + b"\n"]
)
def test_a_line_of_something_else_is_named(tmp_path, content):
    path = written(tmp_path / "lines")
    path.write_bytes(path.read_bytes() + content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"line 4.*; name another file"):
        read_lines(path, ID, lambda number, one: one["id"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("tail", [b"notes", b'{"key": ', b'{"ID'])
def test_an_end_of_something_else_is_not_dropped(tmp_path, tail):
    path = written(tmp_path / "lines")
    path.write_bytes(path.read_bytes() + tail)
    before = path.read_bytes()
    with pytest.raises(UserError, match="does not end in a line of this command; delete it"):
        read(path, mend="delete it")
    assert path.read_bytes() == before


def test_what_cannot_be_read_or_written_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*none/lines"):
        Appender(tmp_path / "none" / "lines")
    with pytest.raises(UserError, match=r"cannot write .*none/json"):
        write_json(tmp_path / "none" / "json", Namespace(), {})
    write = os.write
    with Appender(tmp_path / "lines") as file:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
        with pytest.raises(UserError, match="the disk is full"):
            file.write("a line")
    assert (tmp_path / "lines").read_bytes() == b""


def test_a_line_is_one_call(tmp_path, monkeypatch):
    """So that no other process's line can come between its parts."""
    write, calls = os.write, []
    monkeypatch.setattr(os, "write", lambda file, data: calls.append(data) or write(file, data))
    Lines(tmp_path / "lines").put({"a": 1}, {"x": "é" * 100_000})
    assert len(calls) == 1
    assert calls[0].startswith(HEAD)
    assert calls[0].endswith(b"\n")


def test_equal_facts_have_equal_names():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_figures_come_with_their_settings(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, Namespace(json=path, budget=3), {"rows": [1]})
    facts = json.loads(path.read_text())
    assert facts == {"settings": {"json": str(path), "budget": 3}, "rows": [1]}
    write_json(None, Namespace(), {})
