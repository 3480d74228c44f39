"""Many prompts on a Ray cluster: each text once, whatever happens to a worker, and as a plain run
has it. What needs no Ray runs without it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from benchmarks.accuracy import run as accuracy
from lethe_mini import Engine
from lethe_mini.app import cluster
from lethe_mini.app.cli import main
from lethe_mini.app.puzzle import puzzle
from lethe_mini.errors import UserError

COUNT = 40


def words(prompts, output, *more):
    argv = ["--model", "reasoner", "--device", "cpu", "--raw", "--prompt-file", prompts]
    argv += ["--output", output, "--max-new-tokens", 60, "--temperature", 1, "--batch-size", 5]
    argv += ["--lethe", "--budget", 40, "--interval", 8, "--no-protect-prompt", *more]
    return [str(word) for word in argv]


def puzzles(folder, limits):
    """A file of puzzles, some with a limit of their own: by number."""
    lines = [{"id": f"p{i}", "prompt": puzzle(i).prompt} for i in range(COUNT)]
    for i, limit in limits.items():
        lines[i]["max_new_tokens"] = limit
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def without_ray(prompts):
    """The lines of a run without Ray, sorted."""
    output = prompts.with_name("plain.jsonl")
    assert main(words(prompts, output, "--quiet")) == 0
    return sorted(output.read_bytes().splitlines())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return puzzles(tmp_path_factory.mktemp("cluster"), {7: 9})


@pytest.fixture(scope="module")
def plain(prompts):
    return without_ray(prompts)


def lines(folder):
    return [line for part in sorted(folder.glob("*")) for line in part.read_bytes().splitlines()]


def workers(of):
    """Ids of the processes below this one that Ray calls workers of ours."""
    ours, found = {of}, []
    for _ in range(4):  # a worker is a child of a child
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent in ours and int(entry.name) not in ours:
                ours.add(int(entry.name))
                if name.startswith(b"ray::MapWorker"):
                    found.append(int(entry.name))
    return found


def wait_for(run, condition):
    while not condition():
        assert run.poll() is None, "the command ended before"
        time.sleep(0.02)


def written(folder, count):
    return folder.exists() and len(lines(folder)) >= count


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in Linux's /proc")
def test_a_worker_that_is_killed_costs_no_text_and_doubles_none(tmp_path):
    """Two workers of a local cluster, one killed half way: the lines are those of a plain run. Then
    Ctrl-C in a run that completes a half: what is there stays, and the next run adds the rest."""
    pytest.importorskip("ray.data")
    # No two texts of a batch end together, so that there is a middle to interrupt.
    prompts = puzzles(tmp_path, {i: 20 + 10 * i for i in range(COUNT)})
    plain = without_ray(prompts)
    folder, threads = tmp_path / "out", max(1, os.cpu_count() // 2)
    argv = words(prompts, folder, "--ray", "local", "--threads", threads)
    run = tiny.command(*argv, stderr=subprocess.PIPE)
    wait_for(run, lambda: written(folder, 3))
    first = workers(run.pid)
    for one in first:  # one may start seconds before the other: it is halted in its block till then
        os.kill(one, signal.SIGSTOP)
    wait_for(run, lambda: len(workers(run.pid)) == 2)
    assert len(lines(folder)) < COUNT
    os.kill(first[0], signal.SIGKILL)
    for one in first[1:]:
        os.kill(one, signal.SIGCONT)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert said.startswith(f"writing {COUNT} texts to {folder}\n".encode())
    assert said.endswith(f"{folder} is complete\n".encode())
    assert sorted(lines(folder)) == plain

    kept = lines(folder)[: COUNT // 2]
    (folder / "part-00000.jsonl").write_bytes(b"".join(line + b"\n" for line in kept))
    run = tiny.command(*argv, stderr=subprocess.PIPE)
    wait_for(run, lambda: written(folder, COUNT // 2 + 2))
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 130, said
    assert b"Traceback" not in said
    before = lines(folder)
    assert before[: len(kept)] == kept
    assert len(set(before)) == len(before) < COUNT
    assert set(before) <= set(plain)


# -- without Ray -----------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """A cluster without Ray: its worker is this process, and sends every text twice."""

    def run(self, serve, jobs, batch, policy):
        worker = cluster.Worker(self.load, serve, 1)
        for number, job in enumerate(jobs):
            for row in [*worker({"job": [json.dumps(job)]})] * (2 if number % 2 else 1):
                one = json.loads(row["sent"][0])
                if "error" in one:
                    raise UserError(one["error"])
                yield one["sent"]

    monkeypatch.setattr(cluster.Cluster, "run", run)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)


def test_texts_that_come_twice_are_written_once_and_parts_complete_each_other(
    here, prompts, plain, tmp_path, capsys
):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine\n")
    argv = words(prompts, folder, "--ray", "local")
    (folder / "part-00003.jsonl").write_bytes(b"".join(line + b"\n" for line in plain[:11]))
    assert main(argv) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "notes.txt", "part-00003.jsonl", "part-00004.jsonl",
    ]  # fmt: skip
    assert sorted(lines(folder)) == sorted([b"mine", *plain])
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().err == f"{folder} is complete\n"
    assert len(list(folder.iterdir())) == 3


def test_parts_of_other_settings_or_with_a_text_in_two_are_refused(
    here, prompts, plain, tmp_path, capsys
):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("part-00000.jsonl", "part-00001.jsonl"):
        (folder / name).write_bytes(plain[0] + b"\n")
    for more, told in (([], "in another part, too"), (["--seed", 5], "made with other settings")):
        assert main(words(prompts, folder, "--ray", "local", *more)) == 2
        error = capsys.readouterr().err
        assert told in error
        assert len(error.splitlines()) == 1
    assert lines(folder) == [plain[0]] * 2


def test_samples_and_prompts_that_are_left_out_are_as_in_a_plain_run(here, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    texts = [json.dumps({"prompt": puzzle(i).prompt}) for i in range(3)]
    file.write_text("\n".join([*texts[:2], "no JSON", texts[2]]), encoding="utf-8")
    for output, more in (("plain.jsonl", []), ("out", ["--ray", "auto"])):
        argv = words(file, tmp_path / output, "--num-samples", 3, *more)
        assert main(argv) == 2
        assert main([*argv, "--skip-invalid"]) == 0
    expected = (tmp_path / "plain.jsonl").read_bytes().splitlines()
    assert len(expected) == 10
    assert sorted(lines(tmp_path / "out")) == sorted(expected)
    capsys.readouterr()


def test_what_goes_wrong_in_a_worker_is_one_line_and_the_part_keeps_the_rest(
    here, monkeypatch, prompts, tmp_path, capsys
):
    """Weights that are broken; logits that are not numbers, of the prompt that it names."""
    model = tiny.folder(tmp_path / "model")
    argv = words(prompts, tmp_path / "out", "--ray", "local")
    argv[1] = str(model)
    (model / "model.safetensors").write_bytes(b"nothing")
    assert main(argv) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    load = Engine.from_pretrained

    def broken(*args):
        engine = load(*args)
        plain = engine.model.forward

        def forward(tokens, *rest, **options):
            logits = plain(tokens, *rest, **options)
            return logits * float("nan") if options["cache"].seen[0] > 150 else logits

        monkeypatch.setattr(engine.model, "forward", forward)
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", broken)
    argv[1] = "reasoner"
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {prompts}, line 1 (id 'p0'): the model's logits")


def test_texts_that_never_come_are_told(here, monkeypatch, prompts, tmp_path, capsys):
    monkeypatch.setattr(cluster.Cluster, "run", lambda *_: iter(()))
    assert main(words(prompts, tmp_path / "out", "--ray", "local")) == 2
    assert "40 texts did not come back; the same command" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--stats", "s.json"], "leave out --stats, --trace and --lens"),
        (["--trace", "t.json"], "leave out --stats, --trace and --lens"),
        (["--interactive"], "--interactive reads prompts from you"),
        (["--prompt", "a"], "give --prompt or --prompt-file, not both"),
        (["--output", __file__], "with --ray, --output is a folder"),
        (["--output", "nowhere/out"], "cannot write nowhere/out"),
    ],
)
def test_what_does_not_go_with_a_cluster_is_one_line(here, prompts, tmp_path, capsys, change, told):
    assert main(words(prompts, tmp_path / "out", "--ray", "local", *change)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_cluster_needs_prompts_and_a_folder(here, prompts, capsys):
    for argv in (["--prompt", "a"], ["--prompt-file", str(prompts)], []):
        assert main(["--ray", "local", *argv]) == 2
        assert "--ray needs --prompt-file and --output" in capsys.readouterr().err


def test_without_ray_one_line_says_what_to_install(monkeypatch, prompts, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert main(words(prompts, tmp_path / "out", "--ray", "local")) == 2
    error = capsys.readouterr().err
    assert error == "error: --ray needs Ray; pip install 'lethe-mini[cluster]'\n"
    with pytest.raises(UserError, match="cluster"):
        cluster._ray()


@pytest.mark.parametrize("address", ["nowhere", "ray://localhost:1", "localhost:port", ":6379"])
def test_what_is_no_address_is_said(address):
    with pytest.raises(UserError, match="local, auto or HOST:PORT"):
        cluster.Cluster(address, None, "cpu", None, True)._knock()


def test_where_nobody_listens_is_said_at_once():
    with pytest.raises(UserError, match="no Ray cluster at 127"):
        cluster.Cluster("127.0.0.1:1", None, "cpu", None, True)._knock()


class Machines:
    """What `_workers` asks of Ray."""

    def __init__(self, *resources):
        self.resources = resources

    def nodes(self):
        return [{"Alive": True, "Resources": one} for one in self.resources] + [
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        ]


@pytest.mark.parametrize(
    ("device", "threads", "small", "count", "takes"),
    [
        ("cpu", None, True, 12, {"num_cpus": 1, "threads": 1}),
        ("cpu", None, False, 3, {"num_cpus": 4, "threads": 4}),
        ("cpu", 3, True, 3, {"num_cpus": 3, "threads": 3}),
        ("cuda", None, False, 2, {"num_gpus": 1, "num_cpus": 0, "threads": 1}),
    ],
)
def test_workers_fill_the_machines(device, threads, small, count, takes):
    """Of 8 cores with two GPUs, and of 4 cores."""
    machines = Machines({"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0})
    found = cluster.Cluster("auto", None, device, threads, small)._workers(machines)
    assert found == (count, takes)


def test_machines_that_are_too_small_are_said():
    with pytest.raises(UserError, match="9 cores; lower --threads"):
        cluster.Cluster("auto", None, "cpu", 9, True)._workers(Machines({"CPU": 8.0}))
    with pytest.raises(UserError, match="no GPU; use --device cpu"):
        cluster.Cluster("auto", None, "cuda", None, True)._workers(Machines({"CPU": 8.0}))


def test_without_weights_prompts_are_encoded_as_with_them(tmp_path):
    model = str(tiny.folder(tmp_path / "model"))
    whole = Engine.from_pretrained(model, "cpu", "bfloat16")
    head = cluster.without_weights(model, "cpu", "bfloat16", None)
    assert head.dtype == whole.dtype
    assert head.name == whole.name
    assert head.text.encode_prompt("Why?") == whole.text.encode_prompt("Why?")
    with pytest.raises(UserError, match="dtype should be"):
        cluster.without_weights(model, "cpu", "float8", None)


def test_the_accuracy_benchmark_writes_the_same_on_a_cluster(here, tmp_path, capsys):
    """Texts, and what was held meanwhile; also of a policy whose budget is on top of the prompt."""
    file = tmp_path / "problems.jsonl"
    problems = [{"prompt": puzzle(i).prompt, "answer": "5"} for i in range(3)]
    file.write_text("".join(json.dumps(one) + "\n" for one in problems), encoding="utf-8")
    found = []
    for name, more in (("plain", []), ("ray", ["--ray", "local"])):
        argv = ["--task", file, "--model", "reasoner", "--policies", "full", "lethe", "--budget"]
        argv += ["60%", "--interval", 8, "--max-new-tokens", 40, "--batch-size", 2, "--device"]
        argv += ["cpu", "--samples", 2, "--temperature", 1, "--lines", tmp_path / name, *more]
        assert accuracy.run([str(word) for word in argv]) == 0
        entries = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        texts = [(e["key"], e["result"]) for e in entries if "text" in e["result"]]
        found.append(sorted(map(json.dumps, texts)))
    assert found[0] == found[1]
    assert len(found[0]) == 2 * 3 * 2
    capsys.readouterr()
