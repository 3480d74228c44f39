"""Every command of the package: its help, its place in the README, and a small run of most."""

import importlib
import json
import re

import pytest
import tiny

from benchmarks import ROOT
from benchmarks.memory import batches, long_run
from benchmarks.speed import profile_step, tracing

WORKERS = {"benchmarks.speed.decode_worker", "benchmarks.accuracy.grading"}  # no one types these
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny.folder(tmp_path_factory.mktemp("commands") / "model"))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in WORKERS])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_readme_has_every_command_and_no_other():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m (benchmarks\.[\w.]+)", text))
    assert named == set(COMMANDS) - WORKERS


def test_every_command_of_the_documents_is_there():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"python -m (benchmarks\.[\w.]+)", text):
            assert name in COMMANDS, path.name


def test_the_path_of_imports_is_left_alone():
    for path in (*SOURCES, *sorted((ROOT / "tests" / "benchmarks").glob("*.py"))):
        assert "sys" + ".path" not in path.read_text(encoding="utf-8"), path


def test_memory_by_batch_size(checkpoint, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["--model", checkpoint, "--batch", "1", "2", "--tokens", "200", "--budget", "32"]
    batches.main([*argv, "--device", "cpu", "--dtype", "float32", "--json", str(path)])
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert facts["hardware"] in out
    runs = [(run["batch"], run["policy"]) for run in facts["runs"]]
    assert runs == [(batch, name) for batch in (1, 2) for name in ("full", "lethe-plus")]
    for full, pruned in (facts["runs"][:2], facts["runs"][2:]):
        assert full["held"] == full["full"]
        assert pruned["held"] < full["held"] / 2
        assert full["process"] > full["weights"]
    assert out.count("\n|") == 2 + 4


def test_a_run_that_fails_is_a_row(checkpoint, capsys):
    argv = ["--model", checkpoint, "--batch", "1", "--tokens", "5000", "--budget", "32"]
    batches.main([*argv, "--device", "cpu", "--policy", "lethe"])
    out = capsys.readouterr().out
    assert out.count("4,093") + out.count("4093") >= 2  # the model's positions
    with pytest.raises(SystemExit, match="budget should be at least 1"):
        batches.main(["--model", checkpoint, "--budget", "-5"])
    with pytest.raises(SystemExit):
        batches.main(["--model", checkpoint, "--tokens", "12"])
    assert "--tokens should be above" in capsys.readouterr().err


def test_a_long_text(tmp_path, capsys):
    path = tmp_path / "out.json"
    long_run.main(["--tokens", "3001", "--budget", "64", "--windows", "1", "--json", str(path)])
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert facts["tokens"] == 3001
    assert facts["checks"] == 3
    held = [point["held"] for point in facts["memory"]]
    assert max(held) <= 2 * (64 + 128)
    assert facts["hardware"] in out
    with pytest.raises(SystemExit):
        long_run.main(["--tokens", "2000"])


def test_a_step_s_parts_add_up(checkpoint, tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["--model", checkpoint, "--length", "70", "--budget", "32", "--steps", "2"]
    argv += ["--turns", "2", "--dtype", "float32", "--interval", "8", "--json", str(path)]
    assert profile_step.main(argv) == 0
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert [*facts["systems"]] == ["full", profile_step.NEVER, "lethe-plus, budget 32"]
    for name, system in facts["systems"].items():
        parts = system["parts"]
        assert sum(parts.values()) == pytest.approx(system["step"], rel=0.02)
        assert ("scoring: decay" in parts and parts["scoring: decay"] > 0) == (name != "full")
    assert facts["systems"]["lethe-plus, budget 32"]["rounds"] > 0
    assert "scoring, by substitution" in out
    with pytest.raises(SystemExit):
        profile_step.main(["--steps", "0"])


def test_what_a_trace_costs(checkpoint, capsys):
    argv = ["--model", checkpoint, "--tokens", "90", "--budget", "100", "--interval", "8"]
    tracing.main([*argv, "--batch", "2", "--policy", "lethe", "h2o"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("lethe", "2"), ("h2o", "2")]
    for row in rows:
        assert int(row[3]) > 0
        assert 0 < float(row[5]) < float(row[4]) + 0.1
