"""An unkind world: no memory, a full disk, Ctrl-C at a bad moment. One line, and no half file."""

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import tiny
import torch

from lethe_mini.app import cli
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError, write_whole
from lethe_mini.jsonlines import Appender


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny", eos=())


@pytest.fixture
def run(model, capsys):
    """main([...]) for three tokens -> exit code, standard output, lines of standard error."""

    def call(*argv):
        capsys.readouterr()
        options = ["--model", model, "--max-new-tokens", 3, "--device", "cpu", "--quiet"]
        code = cli.main([str(word) for word in [*options, *argv]])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


# -- memory ----------------------------------------------------------------------------------------

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", NO_MEMORY, ids=range(len(NO_MEMORY)))
def test_out_of_memory_is_one_line_that_says_what_to_lower(run, monkeypatch, tmp_path, error):
    """While a model is loaded, while it writes to the screen, and to a file."""
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", raising(error))
        assert run("--prompt", "a") == (
            2,
            "",
            [
                "error: out of memory while writing; lower --batch-size or --prefill-chunk, or "
                "--max-new-tokens or the policy's --budget"
            ],
        )
        code, _, err = run("--prompt", "a", "--output", output)
        assert (code, len(err)) == (2, 1)
        assert f"lower --batch-size or --prefill-chunk; {output} keeps what is finished" in err[0]
    assert run("--prompt", "a", "--output", output, "--batch-size", 1)[0] == 0
    monkeypatch.setattr(Engine, "from_pretrained", raising(error))
    code, _, err = run("--prompt", "a")
    assert (code, len(err)) == (2, 1)
    assert "out of memory while loading" in err[0]
    assert "take a smaller model, --dtype bfloat16, or --device cpu" in err[0]


def test_another_runtime_error_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(Engine, "generate", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run("--prompt", "a")


# -- the disk --------------------------------------------------------------------------------------

NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MOMENTS = {"write": (Path, "write_text"), "replace": (os, "replace")}


def half(error):
    """A write_text that fails in the middle."""

    def fail(path, text, **_):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise error

    return fail


@pytest.mark.parametrize("option", ["--stats", "--trace", "--lens"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("error", [NO_ROOM, KeyboardInterrupt()], ids=["no room", "Ctrl-C"])
def test_a_file_is_written_whole_or_not_at_all(run, monkeypatch, tmp_path, option, moment, error):
    """A full disk is one line and exit code 2, Ctrl-C is 130. An older file stays as it was, and
    nothing else is in the folder."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("an older run")
    fail = half(error) if moment == "write" else raising(error)
    for path in (old, new):
        with monkeypatch.context() as patch:
            patch.setattr(*MOMENTS[moment], fail)
            code, out, err = run("--prompt", "a", option, path)
        assert out
        if error is NO_ROOM:
            assert (code, err) == (2, [f"error: cannot write {path}: {NO_ROOM.strerror}"])
        else:
            assert (code, err) == (130, [])
        assert [file.name for file in tmp_path.iterdir()] == ["old"]
        assert old.read_text() == "an older run"
    assert run("--prompt", "a", option, old)[0] == 0
    assert old.read_text() != "an older run"


def test_a_written_file_keeps_its_place_and_its_mode(tmp_path):
    """A link stays a link; a new file gets the mode of any new file."""
    file, link, other = tmp_path / "file", tmp_path / "link", tmp_path / "other"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, "né\n")
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "né\n"
    assert file.stat().st_mode & 0o777 == 0o640
    other.touch()
    write_whole(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == other.stat().st_mode


def test_a_link_to_a_file_that_is_not_there_yet_stays(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert run("--prompt", "a", "--stats", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text())["rounds"] == 0


def test_where_no_file_can_stand_beside_it_is_written_as_it_comes(monkeypatch, tmp_path):
    """A pipe, a device, a folder that takes no new file."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    monkeypatch.setattr(os, "replace", raising(AssertionError))
    write_whole(Path("/dev/null"), "text")
    monkeypatch.setattr(os, "access", lambda *_: False)
    write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_pipe_gets_the_statistics_and_nothing_before(run, tmp_path):
    """Its reader sees one writer, who ends once."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert run("--prompt", "a", "--stats", tmp_path / "pipe")[0] == 0
        assert len(json.loads(reader.stdout.read())["sequences"]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
@pytest.mark.parametrize("option", ["--trace", "--lens"])
def test_a_device_that_is_full(run, option):
    code, _, err = run("--prompt", "a", option, "/dev/full")
    assert (code, err) == (2, [f"error: cannot write /dev/full: {NO_ROOM.strerror}"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_standard_output_on_a_full_disk_is_one_line(model):
    """Python says nothing more when it ends."""
    with open("/dev/full", "wb") as full:
        words = ["--model", model, "--prompt", "a", "--max-new-tokens", 3, "--quiet"]
        done = tiny.command(*words, stdout=full, stderr=subprocess.PIPE)
        err = done.communicate()[1].decode()
    assert (done.returncode, err) == (2, f"error: cannot write the text: {NO_ROOM.strerror}\n")


def test_a_line_that_finds_no_room_is_taken_back(run, monkeypatch, tmp_path):
    """The disk takes a part of it: what is finished stays, in whole lines, and one line tells."""
    output, write, count = tmp_path / "out.jsonl", os.write, []

    def short(file, data):
        count.append(file)
        return write(file, data if len(count) < 2 else data[:40])

    prompts = ["--prompt", "a", "--prompt", "b", "--batch-size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        code, _, err = run(*prompts, "--output", output)
    assert (code, err) == (2, [f"error: cannot write {output}: the disk is full"])
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [1]
    assert run(*prompts, "--output", output)[0] == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [1, 2]


def test_a_disk_may_say_only_at_the_end_that_it_is_full(monkeypatch, tmp_path):
    close = os.close
    monkeypatch.setattr(os, "close", lambda file: (close(file), raising(NO_ROOM)()))
    with pytest.raises(UserError, match=r"cannot write .*out"), Appender(tmp_path / "out"):
        pass


def test_a_place_that_cannot_be_written_is_found_before_a_model_is(run, monkeypatch, tmp_path):
    """Also that of --output, and a name that is too long."""
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_: pytest.fail("too late"))
    for option in ("--output", "--stats", "--trace", "--lens"):
        for path in (tmp_path, tmp_path / "no" / "file", tmp_path / ("x" * 300)):
            code, _, err = run("--prompt", "a", option, path)
            assert (code, len(err)) == (2, 1)
            assert "cannot write" in err[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output", "--stats"])
def test_ctrl_c_while_a_model_is_loaded_leaves_nothing(run, monkeypatch, tmp_path, option):
    monkeypatch.setattr(Engine, "from_pretrained", raising(KeyboardInterrupt()))
    assert run("--prompt", "a", option, tmp_path / "file") == (130, "", [])
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_a_line_is_written_leaves_it_whole(run, monkeypatch, tmp_path):
    """The signal comes with the call that writes; the run ends after the step."""
    output, write = tmp_path / "out.jsonl", os.write

    def pressed(file, data):
        signal.raise_signal(signal.SIGINT)
        return write(file, data)

    monkeypatch.setattr(os, "write", pressed)
    code, _, err = run("--prompt", "a", "--prompt", "b", "--batch-size", 1, "--output", output)
    assert (code, err) == (130, [])
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [1]
