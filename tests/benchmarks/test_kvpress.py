"""benchmarks.quality.kvpress with a stub in place of kvpress: it keeps the last tokens.

So it does what our StreamingLLM without sinks does, and both engines have to read alike.
"""

import json
import sys

import pytest
import tiny

from benchmarks.quality import kvpress

STUB = """
import contextlib

class SnapKVPress:
    def __init__(self, window_size):
        self.window = window_size

class DecodingPress:
    def __init__(
        self, base_press, compression_interval, target_size, hidden_states_buffer_size
    ):
        assert hidden_states_buffer_size > base_press.window, "too few queries"
        self.interval, self.size, self.steps = compression_interval, target_size, 0

    @contextlib.contextmanager
    def __call__(self, model):
        hook = model.register_forward_hook(self.prune, with_kwargs=True)
        yield
        hook.remove()

    def prune(self, model, args, kwargs, out):
        self.steps += 1
        if self.steps % self.interval == 0:
            for layer in (kwargs.get("cache") or kwargs["past_key_values"]).layers:
                layer.keys = layer.keys[:, :, -self.size :]
                layer.values = layer.values[:, :, -self.size :]
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """A small run's, with a Python that finds the stub."""
    (tmp_path / "kvpress.py").write_text(STUB)
    info = tmp_path / "kvpress-0.5.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checkpoint = tiny.folder(tmp_path / "model", model_type="qwen2")
    argv = ["--kvpress-python", sys.executable, "--model", str(checkpoint), "--sinks", "0"]
    argv += ["--texts", "2", "--tokens", "331", "--prompt", "67", "--interval", "71"]
    return [*argv, "--choice", "streaming", "--block", "50"]


def test_kvpress_reads_the_same_texts_at_the_same_places(options, tmp_path, capsys):
    path = tmp_path / "out.json"
    kvpress.main([*options, "--budget", "30%", "--json", str(path)])
    facts, printed = json.loads(path.read_text()), capsys.readouterr().out
    _, full, theirs, ours = facts["rows"]
    assert facts["versions"]["kvpress"] == "0.5.5"
    assert "| kvpress | free | 30% | 91 |" in printed
    assert "over kvpress" in printed
    assert full["kept"] == (67 + 138 + 209 + 280) / 4
    assert full["gap"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert theirs["kept"] == ours["kept"] == pytest.approx((67 + 3 * 99) / 4)
    for name in ("nats", "gap", "kl", "agree"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
    assert theirs["kl"][0] > 0.01
    assert ours["over_rival"] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--interval", "64"], "error: kvpress: AssertionError: too few queries"),
        (["--kvpress-python", "/nowhere"], "error: kvpress: cannot start /nowhere"),
    ],
)
def test_what_kvpress_cannot_do_is_a_line(options, more, line):
    with pytest.raises(SystemExit) as stop:
        kvpress.main([*options, "--budget", "30%", *more])
    assert line in str(stop.value.code)


def test_a_budget_holds_the_prompt(options, capsys):
    with pytest.raises(SystemExit) as stop:
        kvpress.arguments([*options, "--budget", "100", "20%"])
    assert stop.value.code == 2
    assert "--budget should hold the prompt, 67 tokens, not 20%" in capsys.readouterr().err
