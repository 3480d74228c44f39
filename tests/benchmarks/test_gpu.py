"""The command for one GPU, to its end on the CPU, at a shape that anybody has."""

import json

import pytest
import torch

from benchmarks.speed import gpu, shapes
from benchmarks.speed.ours import Ours

TOY = {
    **shapes.SHAPES["llama-8b"],
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
ARGV = [
    *("--shape", "toy", "--device", "cpu", "--dtype", "float32", "--no-compile"),
    *("--batch", 1, 2, "--length", 40, 300, "--interval", 8, "--prompt", 300, "--largest", 3),
    *("--problems", 3, "--bandwidth-mb", 4, "--threads", 1),
]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs it with some policies; -> exit code, lines, figures."""
    monkeypatch.setitem(shapes.SHAPES, "toy", TOY)
    some = {name: gpu.POLICIES[name] for name in ("full", "lethe", "random")}
    monkeypatch.setattr(gpu, "POLICIES", some)
    threads = torch.get_num_threads()

    def call(*argv):
        code = gpu.main([str(tmp_path / "out"), *map(str, [*ARGV, *argv])])
        torch.set_num_threads(threads)
        facts = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
        return code, capsys.readouterr().out.splitlines(), facts

    return call


def test_it_runs_to_its_end(command):
    """Every cell of the grid, the largest batch, prefill, another engine; the table comes last."""
    code, lines, facts = command()
    assert code == 0
    assert [one["good"] for one in facts["checks"] if one["what"] == "replay"] == [None] * 6
    same = [one["more"] for one in facts["checks"] if one["what"] == "tokens"]
    assert same == ["3 of 3 texts as on the CPU"] * 3
    cells = {
        (one["mode"], one["policy"], one["batch"], one["length"]): one for one in facts["cells"]
    }
    grid = [(arm, batch, n) for arm in gpu.ARMS for batch in (1, 2) for n in (40, 300)]
    assert {("eager", *one) for one in grid} < cells.keys()
    assert {("eager", arm, 3, 300) for arm in gpu.ARMS} < cells.keys()
    assert ("transformers", "full", 2, 300) in cells
    held = [cells["eager", arm, 2, 300]["held"] for arm in gpu.ARMS]
    assert held[0] == 300 + gpu.WARM + 4
    assert held[1] == held[2] < 25 + 8
    for one in cells.values():
        assert one["ms"] >= 0.5 * one["step_ms"] > 0
        assert one["tokens_per_second"] > 0
    assert cells["eager", "lethe", 2, 300]["rounds_and_captures"] > 0
    assert [one["system"] for one in facts["prefill"]] == [
        "ours, full", "ours, lethe", "transformers",
    ]  # fmt: skip
    assert lines[-1] == "texts as on the CPU: 9 of 9"
    table = lines[lines.index(next(line for line in lines if line.startswith("mode"))) :]
    assert sum("lethe-plus" in line for line in table) == 5


def test_what_does_not_fit_says_so(command, monkeypatch):
    decode = Ours.decode

    def full(self, count):
        if self.cache.next.numel() > 1 and self.policy.name == "full":
            raise torch.OutOfMemoryError("no room")
        return decode(self, count)

    monkeypatch.setattr(Ours, "decode", full)
    code, lines, facts = command()
    gone = [one for one in facts["cells"] if one.get("out_of_memory")]
    assert {(one["policy"], one["batch"]) for one in gone} == {("full", 2), ("full", 3)}
    assert sum("out of memory" in line for line in lines) == 2 * len(gone)
    assert code == 0


def test_no_time_left_is_said(command):
    _, lines, facts = command("--minutes", 0)
    assert facts["cells"] == facts["checks"] == []
    assert any("left out for want of time" in line for line in lines)


def test_a_check_that_fails_is_the_exit_code(command, monkeypatch):
    monkeypatch.setattr(gpu, "on_cuda", lambda settings: True)
    monkeypatch.setattr(gpu.Bench, "measure", lambda self: None)
    draws = iter(range(1000))
    monkeypatch.setattr(gpu, "tokens", lambda *args, **options: [[next(draws)]])
    code, lines, _ = command()
    assert code == 1
    assert any(line.startswith("FAILED: replay, lethe, greedy") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path)])
    assert "sees no CUDA device" in capsys.readouterr().err
