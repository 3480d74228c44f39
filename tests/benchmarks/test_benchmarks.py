"""benchmarks.speed.decode on a tiny model: its figures mean what they say. Nothing is timed."""

import ast
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from benchmarks import ROOT
from benchmarks.speed import decode, decode_worker, ours, peers, rows, shapes, system, workers

L, H_kv, D, FLOAT = (
    tiny.SIZES["num_hidden_layers"],
    tiny.SIZES["num_key_value_heads"],
    tiny.SIZES["head_dim"],
    4,
)
TOKEN = 2 * L * H_kv * D * FLOAT  # bytes of a token in all layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("bench") / "model", model_type="qwen2")


@pytest.fixture
def settings(checkpoint):
    return {
        "folder": str(checkpoint),
        "shape": None,
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "interval": 16,
        "timeout": 60,
        "bandwidth_bytes": 4_000_000,
        "room": 64,
        "compile": False,
        "policy": "full",
        "share": None,
        "budget": None,
    }


def loaded(kind, settings, **changes):
    system = kind({**settings, **changes})
    return system, system.load()


IDS = [i * i % 251 for i in range(97)]


def options(checkpoint, *more):
    argv = ["--model", str(checkpoint), "--dtype", "float32", "--threads", "1"]
    argv += ["--bandwidth-mb", "4", "--reps", "2", "--steps", "2", "--batch", "1", "3"]
    return [*argv, "--length", "70", "--interval", "16", "--timeout", "60", *more]


# -- workers ---------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ours.Ours, peers.Transformers])
def test_bytes_are_those_of_the_weights_and_of_the_tokens_held(settings, kind):
    system, facts = loaded(kind, settings)
    weights = tiny.model().state_dict()
    embedding = weights["embed_tokens.weight"].nbytes  # a step reads one row of it
    assert facts["weight_bytes"] == sum(w.nbytes for w in weights.values()) - embedding
    state = system.fill(IDS, batch=3)
    assert state["kv_bytes"] == 3 * len(IDS) * TOKEN
    state = system.steps(4, warm=2)
    assert len(state["step_seconds"]) == 4
    assert state["kv_bytes"] == 3 * (len(IDS) + 6) * TOKEN
    assert state["tokens"] == len(IDS) + 6
    assert rows.bytes_to_move(facts, state) == facts["weight_bytes"] + state["kv_bytes"]


@torch.inference_mode()
def test_both_systems_choose_the_same_tokens(settings):
    chosen = []
    for kind in (ours.Ours, peers.Transformers):
        system, _ = loaded(kind, settings)
        system.fill(IDS, batch=2)
        chosen.append(system.steps(9)["chosen"])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 1 + 1 + 9  # after the prompt, untimed, timed


@torch.inference_mode()
def test_a_share_of_the_cache_is_what_decoding_starts_from(settings):
    system, _ = loaded(ours.Ours, settings, policy="lethe-plus", share=0.25)
    state = system.fill(IDS, batch=2)
    assert state["tokens"] == pytest.approx(round(0.25 * len(IDS)))
    assert len(state["round_seconds"]) == ours.ROUNDS
    state = system.decode(2 * 16)
    assert len(state["step_seconds"]) == 32
    assert state["tokens"] <= round(0.25 * len(IDS)) + 16


@torch.inference_mode()
def test_transformers_with_our_cache_holds_a_share_and_full_writes_what_it_writes(settings):
    system, _ = loaded(peers.Pruned, settings, share=0.25)
    state = system.fill(IDS, batch=3)
    assert state["tokens"] == round(0.25 * len(IDS))
    assert state["kv_bytes"] == 3 * state["tokens"] * TOKEN
    state = system.steps(16, warm=0)
    assert state["tokens"] == round(0.25 * len(IDS))
    chosen = []
    for kind, share in ((peers.Transformers, None), (peers.Pruned, 1.5)):
        system, _ = loaded(kind, settings, share=share)
        system.fill(IDS, batch=2)
        chosen.append(system.steps(9, warm=0)["chosen"])
    assert chosen[0] == chosen[1]


@torch.inference_mode()
def test_a_policy_at_100_percent_never_prunes_and_chooses_what_the_full_cache_chooses(settings):
    chosen = []
    for changes in ({}, {"policy": "lethe-plus", "share": 1.0}):
        system, _ = loaded(ours.Ours, settings, **changes)
        system.fill(IDS, batch=1)
        state = system.decode(40)
        assert state["tokens"] == len(IDS) + 40
        chosen.append(state["seen"])
    assert chosen[0] == chosen[1]


@torch.inference_mode()
def test_a_cache_put_aside_comes_back_as_it_was(settings):
    changes = {"policy": "lethe-plus", "budget": 32, "positions": "compact"}
    system, _ = loaded(ours.Ours, settings, **changes)
    system.fill(IDS[:16], batch=1)
    system.snapshot()
    assert system.decode(20)["seen"] == 36
    system.swap()
    assert system.decode(1)["seen"] == 17
    system.swap()
    assert system.decode(1)["seen"] == 37


@torch.inference_mode()
def test_random_weights_of_a_geometry_and_scores_in_a_trained_models_shape(settings, monkeypatch):
    small = {**shapes.SHAPES["llama-1b"], "hidden_size": 24, "intermediate_size": 29}
    small |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    small["vocab_size"] = 61
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    changes = {"shape": "small", "policy": "lethe-plus", "share": 0.5}
    system, facts = loaded(ours.Ours, settings, **changes)
    assert facts["weight_bytes"] == sum(p.nbytes for p in system.engine.model.parameters())
    cache = system.new_cache(50)
    system.engine.model(torch.arange(50)[None], cache=cache)
    shapes.shape_scores(cache)
    for layer in cache.layers:
        shares = layer.scores.sum(1)[0] / layer.scores.sum()
        assert shares[:4].sum() > 0.4
        assert shares[-8:].sum() > shares[8:16].sum()
    state = system.fill(list(range(50)), batch=2)
    assert state["tokens"] == 25
    peer, _ = loaded(peers.Transformers, settings, shape="small")
    assert peer.fill(list(range(50)), batch=2)["tokens"] == 50


def test_published_geometries_have_their_models_sizes():
    billions = {name: shapes.weights_estimate(name) / 2e9 for name in shapes.SHAPES}
    assert billions["llama-8b"] == pytest.approx(8.03, rel=0.01)
    assert billions["llama-70b"] == pytest.approx(70.55, rel=0.01)
    assert billions["llama-1b"] == pytest.approx(1.24, rel=0.01)
    assert billions["qwen-7b"] == pytest.approx(7.62, rel=0.01)
    assert billions["qwen-0.5b"] == pytest.approx(0.494, rel=0.01)
    assert billions["qwen3-0.6b"] == pytest.approx(0.596, rel=0.01)
    assert billions["qwen3-4b"] == pytest.approx(4.02, rel=0.01)
    assert billions["qwen3-8b"] == pytest.approx(8.19, rel=0.01)
    assert billions["qwen3-30b-a3b"] == pytest.approx(30.53, rel=0.01)
    assert billions["smollm2-135m"] == pytest.approx(0.1345, rel=0.01)


def test_what_does_not_fit_is_an_answer_and_the_worker_goes_on(settings, monkeypatch):
    one, _ = loaded(ours.Ours, settings)
    monkeypatch.setattr(system, "available_bytes", lambda: 1000)
    with torch.inference_mode():
        reply = decode_worker.answer(one, "fill", {"ids": IDS, "batch": 2})
        assert reply["out_of_memory"] is True
        assert "GB" in reply["error"]
        monkeypatch.undo()
        assert "error" not in decode_worker.answer(one, "fill", {"ids": IDS, "batch": 2})


def test_an_error_is_an_answer(settings):
    system, _ = loaded(ours.Ours, settings, policy="snapkv", share=0.1)
    reply = decode_worker.answer(system, "fill", {"ids": IDS, "batch": 1})
    assert reply["out_of_memory"] is False
    assert "budget 16" in reply["error"]


# -- rows ------------------------------------------------------------------------------------------


def row(system="ours eager", policy="full", batch=2, length=64, step=0.1, **more):
    worker = workers.Worker(system, policy, "ours", {"interval": 10})
    worker.facts = {"weight_bytes": 3_000_000}
    state = {"kv_bytes": 1_000_000, "kv_allocated": 1_100_000, "tokens": length, "peak": 7_000_000}
    fill = {"seconds": 0.5, **state, **more}
    turn = {"step_seconds": [step, step, 2 * step], "chosen": [1, 2], **state}
    cell = {"batch": batch, "length": length}
    return rows.make_row(worker, cell, fill, [turn, turn], bandwidth=400_000_000)


def test_a_row_has_what_must_move_and_how_near_that_bound_it_came():
    made = row(step=0.02, round_seconds=[0.1, 0.3, 0.2])
    assert made["bytes_to_move"] == 4_000_000
    assert made["bound_seconds"] == pytest.approx(0.01)
    assert made["reached"] == pytest.approx(0.5)
    assert made["tokens_per_second"] == pytest.approx(100)
    assert made["step_with_rounds"] == pytest.approx(0.02 + 0.2 / 10)
    line = rows.table_row(made)
    assert line.count("|") == rows.HEADER.splitlines()[0].count("|")
    assert "| 20.00 | 20.00 to 35.00 | 40.00 |" in line
    assert line.endswith("| 10.00 | 50% |")


def test_ratios_are_against_our_full_cache_in_the_same_cell_and_mode():
    eager, compiled = row(step=0.1), row("ours compiled", step=0.05)
    plus, peer = row(policy="lethe-plus@8.3", step=0.02), row("transformers", step=0.2)
    table = [eager, compiled, plus, peer, row(batch=1)]
    assert rows.baseline(table, plus) is eager
    assert rows.baseline(table, peer) is compiled
    assert rows.speedup(plus, eager) == pytest.approx(5)
    assert rows.speedup(peer, compiled, together=False) == pytest.approx(0.25)


def test_rows_without_figures_keep_their_place_in_every_table():
    worker = workers.Worker("ours eager", "full", "ours", {})
    fill = {"error": "needs 3 GB of 1 GB", "out_of_memory": True}
    full = rows.make_row(worker, {"batch": 4, "length": 64}, fill, [], 1.0)
    line = rows.table_row(full)
    assert "out of memory" in line
    assert line.count("|") == rows.HEADER.splitlines()[0].count("|")
    table = rows.by_batch([row(batch=1), row(batch=2), full])
    assert "| system | policy | 1 | 2 | 4 |" in table
    assert "| ours eager | full | 10.0 | 20.0 | out of memory |" in table


# -- the command -----------------------------------------------------------------------------------


def test_the_grid_from_start_to_end(checkpoint, tmp_path, capsys):
    out = tmp_path / "out.json"
    more = ["--policies", "full", "lethe-plus@30", "--targets", "--json", str(out)]
    more += ["--target-length", "80", "--prefill", "40", "80", "--long", "40", "60"]
    more += ["--windows", "1", "--budget", "32"]
    assert decode.main(options(checkpoint, *more)) == 0
    printed = capsys.readouterr().out
    facts = json.loads(out.read_text())
    grid = [r for r in facts["rows"] if r["length"] == 70]
    kinds = [("ours eager", "full"), ("ours eager", "lethe-plus@30"), ("transformers", "full")]
    assert [(r["batch"], r["system"], r["policy"]) for r in grid] == [
        (batch, *kind) for batch in (1, 3) for kind in kinds
    ]
    for one in grid:
        assert "error" not in one
        assert len(one["turn_medians"]) == 2
        assert 0 < one["step_quartiles"][0] <= one["step_seconds"] <= one["step_quartiles"][1]
        assert one["times_full"] > 0
        assert rows.table_row(one) in printed
    assert facts["bandwidth"]["median"] > 0
    assert facts["settings"]["batch"] == [1, 3]
    assert {"hardware", "versions", "commit", "processor_shares"} <= facts.keys()
    assert facts["versions"]["transformers"]["transformers"]
    asked = "\n".join(target["what"] for target in facts["targets"])
    for part in ("cost of scoring", "with scores against without", "time per token"):
        assert part in asked
    for policy in ("lethe-plus", "lethe", "recall"):
        assert f"{policy}@100: share of decode in rounds" in asked
    assert facts["notes"] == []


def test_the_curve_has_times_and_memory_by_length(checkpoint, tmp_path):
    out = tmp_path / "curve.json"
    more = ["--curve", "--curve-tokens", "184", "--budget", "32", "--json", str(out)]
    assert decode.main(options(checkpoint, *more)) == 0
    full, plus = json.loads(out.read_text())["curve"]
    assert full["points"][-1]["tokens"] == 64 + 2 + 40 * 3
    assert full["points"][-1]["kv_bytes"] == 186 * TOKEN
    assert max(point["kv_bytes"] for point in plus["points"]) <= (32 + 16) * TOKEN
    pytest.importorskip("matplotlib")
    from benchmarks.speed import plot_decode

    drawing = tmp_path / "speed.svg"
    plot_decode.draw(json.loads(out.read_text()), drawing)
    text = drawing.read_text()
    assert "LethePlus, budget 32" in text
    assert "full cache" in text
    # Told apart without colour: by their names, and by markers of two shapes.
    assert text.count("<use ") > 4


def test_a_worker_that_dies_leaves_the_others_rows_and_a_line(checkpoint, tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text(
        f"#!{sys.executable}\nimport sys; sys.stdin.readline(); sys.exit('no more')\n"
    )
    broken.chmod(0o755)
    out = tmp_path / "out.json"
    more = ["--policies", "full", "--json", str(out)]
    more += ["--peers", "kvpress", "--kvpress-python", str(broken)]
    assert decode.main(options(checkpoint, "--batch", "1", *more)) == 0
    printed = capsys.readouterr().out
    assert "kvpress snapkv@8.3: died in `load` (exit code 1): no more" in printed
    measured = json.loads(out.read_text())["rows"]
    assert [r["system"] for r in measured if "error" not in r] == ["ours eager"]


def test_a_worker_that_is_killed_or_stuck_is_named(settings):
    worker = workers.Worker("ours eager", "full", "ours", settings)
    worker.start()
    assert worker.gone is None
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(workers.WorkerError, match="killed by SIGKILL"):
        worker.ask("steps", count=1)
    with pytest.raises(workers.WorkerError, match="killed by SIGKILL"):
        worker.ask("steps", count=1)
    worker.close()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupted_run_prints_what_it_has(checkpoint, tmp_path):
    out = tmp_path / "out.json"
    argv = [sys.executable, "-m", "benchmarks.speed.decode", *options(checkpoint)]
    argv += ["--reps", "100", "--batch", "1", *["2"] * 500, "--json", str(out)]
    argv += ["--policies", "full", "--peers"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
    for line in run.stdout:
        if line.startswith("| 1 | 70 |"):
            break
    run.terminate()
    rest, _ = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "interrupted" in rest
    assert json.loads(out.read_text())["rows"]


@pytest.mark.parametrize("policy", ["nothing@8", "lethe-plus", "lethe@0", "lethe@x", "full@50"])
def test_a_policy_that_cannot_be_is_refused_in_a_line(policy, capsys):
    with pytest.raises(SystemExit) as stop:
        decode.parse(["--policies", policy])
    assert stop.value.code == 2
    assert policy in capsys.readouterr().err


def test_no_benchmark_depends_on_a_checkpoints_own_sampling():
    """Every `generate` says how tokens are chosen; no generation_config.json changes a figure."""
    found = 0
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "generate":
                continue
            named = any(keyword.arg == "sampling" for keyword in node.keywords)
            assert named or len(node.args) > 3, f"{path}, line {node.lineno}"
            found += 1
    assert found > 5
