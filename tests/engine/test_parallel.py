"""One model over several processes gives what it gives in one: tokens, and positions held."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import tiny

from lethe_mini import Engine
from lethe_mini.app import cli
from lethe_mini.checkpoint.load import resolve
from lethe_mini.parallel import runs, shares

ROOT = Path(__file__).parents[2]
MODES = ("tensor", "layers")
SMALL = {"budget": 23, "interval": 4, "sinks": 2, "window": 5, "protect_prompt": False}
# By the name of a policy: its fields, and options of `generate`.
CASES = [
    ("full", {}, {}),
    ("lethe", {}, {}),
    ("lethe", {"tau": 3.0, "allocation": "hoyer", "protect_prompt": True, "budget": 40}, {}),
    ("lethe", {"budget": 0.5, "evict_threshold": 20}, {"positions": "compact"}),
    ("lethe", {"budget": None, "evict_threshold": 20, "tau": 2.0}, {}),
    ("lethe-plus", {}, {}),
    ("lethe-plus", {"per_head": False, "value_norm": True}, {"temperature": 1.0, "num_samples": 2}),
    ("h2o", {}, {"positions": "compact"}),
    ("snapkv", {}, {}),
    ("tova", {}, {}),
    ("rkv", {}, {}),
    ("pyramidkv", {}, {}),
    ("random", {}, {"temperature": 0.8, "top_k": 20, "seed": 5}),
    ("streaming", {}, {"batch_size": 2, "prefill_chunk": 7}),
]
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "mlp_bias": True, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "mixture": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def started(count, argv, **options):
    """The processes of a divided model, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env["PYTHONPATH"] = str(ROOT)
    return [
        subprocess.Popen([sys.executable, *map(str, argv)], env={**env, "RANK": str(n)}, **options)
        for n in range(count)
    ]


def together(tmp_path, count, jobs):
    """What each of so many processes makes of the jobs."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    argv = [ranks.__file__, tmp_path / "jobs.json", tmp_path / "out"]
    processes = started(count, argv)
    assert [one.wait(600) for one in processes] == [0] * count
    return [json.loads((tmp_path / f"out{n}").read_text(encoding="utf-8")) for n in range(count)]


def policy_fields(name, fields):
    """SMALL's, as far as the policy has them, and its own."""
    known = {spec.name for spec in dataclasses.fields(ranks.POLICIES[name])}
    return {k: v for k, v in (SMALL | fields).items() if k in known}


def job(model, parallel, name, fields, options, prompts, most=31):
    options = {"max_new_tokens": most, "ignore_eos": True, **options}
    fields = policy_fields(name, fields)
    facts = {"policy": name, "fields": fields, "prompts": prompts, "options": options}
    return {"model": str(model), "parallel": parallel, **facts}


def drawn(seed):
    """Sizes of a small model, odd ones."""
    rng = random.Random(seed)
    kv_heads = rng.choice([3, 4, 5])
    return {
        "architectures": [rng.choice(["Qwen3ForCausalLM", "MistralForCausalLM"])],
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * rng.choice([1, 2, 3]),
        "head_dim": rng.choice([6, 10]),
        "num_hidden_layers": rng.choice([3, 5]),
        "hidden_size": rng.choice([18, 25]),
        "intermediate_size": rng.choice([31, 46]),
        "vocab_size": rng.choice([258, 301]),
        "tie_word_embeddings": rng.random() < 0.5,
    }


def some_ids(count, seed, vocab=258):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


RAGGED = [some_ids(count, count) for count in (9, 30, 17)]


def compare(jobs, found):
    """The processes' figures beside those of one."""
    engines = {}
    for number, (one, *answers) in enumerate(zip(jobs, *found, strict=True)):
        if one["model"] not in engines:
            engines = {one["model"]: Engine.from_pretrained(one["model"], "cpu", "float32")}
        engine = engines[one["model"]]
        tokens, held, stats = json.loads(json.dumps(ranks.run(engine, one)))
        weights = sum(p.numel() for p in engine.model.parameters())
        first = 0
        for mine, heads in zip(answers, kv_heads(one, len(answers)), strict=True):
            told = (number, one)
            assert mine[0] == tokens, told
            assert mine[2] == stats, told
            assert mine[3] < weights, told
            assert len(mine[1]) == len(held), told
            for here, there in zip(mine[1], held, strict=True):
                assert here[:2] == there[:2], told
                for layer, whole in zip(here[2], there[2], strict=True):
                    if one["parallel"] == "tensor":
                        assert layer == whole[first : first + heads], told
                    else:
                        assert layer in ([], whole), told
            first += heads
        if one["parallel"] == "layers" and held:
            last = [[layer != [] for layer in mine[1][-1][2]] for mine in answers]
            assert [sum(column) for column in zip(*last, strict=True)] == [1] * len(last[0])


def kv_heads(one, count):
    """How many each process holds."""
    folder = resolve(one["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return shares(config["num_key_value_heads"], count)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_give_the_tokens_and_keep_the_positions_of_one(tmp_path, count):
    models, jobs = {}, []
    for name, changes in FAMILIES.items():
        sizes = {"num_key_value_heads": 3, "num_attention_heads": 6, "num_hidden_layers": 4}
        models[name] = tiny.folder(tmp_path / name, **sizes | changes)
    for mode in MODES:
        for name, folder in models.items():
            # Two processes of the first family have all policies, the others some of them.
            every = name == "llama" and count == 2
            some = CASES if every else [CASES[i] for i in (0, 1, 5, 7, 8, 12)]
            jobs += [job(folder, mode, *case, RAGGED) for case in some]
        for seed in range(2):
            folder = tmp_path / f"drawn{seed}"
            if not folder.exists():
                tiny.folder(folder, **drawn(10 * count + seed))
            jobs += [job(folder, mode, *CASES[i], RAGGED) for i in (1, 5)]
    compare(jobs, together(tmp_path, count, jobs))


@pytest.mark.parametrize("mode", MODES)
def test_a_trained_model_is_divided_and_memory_with_it(tmp_path, demo, mode):
    """What loading takes is what the part's weights take, and some room to read them."""
    problem = list(range(4, 90))
    fields = {"budget": 60, "interval": 16, "protect_prompt": False}
    jobs = [job(demo, mode, "lethe", fields, {}, [problem, problem[:40]], 30)]
    jobs += [
        job("reasoner", mode, name, fields, {}, [problem, problem[:40]], 100)
        for name in ("lethe", "lethe-plus", "snapkv")
    ]
    found = together(tmp_path, 2, jobs)
    compare(jobs, found)
    whole = sum(p.numel() for p in Engine.from_pretrained(str(demo), "cpu").model.parameters())
    for answers in found:
        *_, weights, grown = answers[0]
        assert 0.3 * whole < weights < 0.75 * whole
        assert 4 * weights < grown < 4 * weights + (100 << 20)


def test_shares_are_of_whole_things():
    assert shares(8, 3) == [3, 3, 2]
    assert shares(2, 2) == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_the_best_of_all(seed):
    rng = random.Random(seed)
    costs = [rng.randrange(1, 50) for _ in range(rng.randrange(2, 8))]
    count = rng.randrange(1, len(costs) + 1)
    found = runs(costs, count)
    assert [i for run in found for i in run] == list(range(len(costs)))
    assert len(found) == count
    assert all(found)

    def splits(first, n):
        if n == 1:
            yield [costs[first:]]
            return
        for last in range(first + 1, len(costs) - n + 2):
            for rest in splits(last, n - 1):
                yield [costs[first:last], *rest]

    best = min(max(map(sum, split)) for split in splits(0, count))
    assert max(sum(costs[i] for i in run) for run in found) == best


def commands(count, *argv, **options):
    """`generate.py` in every process, its output in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return started(count, ["-c", tiny.MAIN, *argv], **pipes, **options)


def ended(processes, seconds=120, text=None):
    """Exit codes, and what was written to standard output and standard error by each."""
    first, *others = processes
    written = [first.communicate(text, timeout=seconds)]
    written += [one.communicate(timeout=seconds) for one in others]
    return [one.returncode for one in processes], *map(list, zip(*written, strict=True))


def in_the_middle(mode, count=2):
    """Processes of which the first has begun to write."""
    processes = commands(count, "--lethe", "--parallel", mode, "--seed", "3")
    assert processes[0].stdout.readline()
    assert processes[0].stdout.readline()
    return processes


@pytest.mark.parametrize("mode", MODES)
def test_the_first_process_writes_a_file_of_prompts(tmp_path, mode):
    prompts = ["hello", "what a long prompt this is", "x"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    model = tiny.folder(tmp_path / "m")
    argv = ["--model", model, "--prompt-file", tmp_path / "p.txt", "--batch-size", "2"]
    argv += ["--max-new-tokens", "20", "--lethe", "--budget", "16", "--interval", "4"]
    argv += ["--no-protect-prompt", "--sinks", "1", "--ignore-eos", "--dtype", "float32"]
    codes, out, err = ended(commands(2, *argv, "--output", tmp_path / "a", "--parallel", mode))
    assert (codes, out) == ([0, 0], ["", ""]), err
    assert err[1] == ""
    alone = tiny.command(*argv, "--output", tmp_path / "b", stderr=subprocess.DEVNULL)
    assert alone.wait(120) == 0
    both = [(tmp_path / name).read_text(encoding="utf-8").splitlines() for name in "ab"]
    assert len(both[0]) == 3
    assert sorted(both[0]) == sorted(both[1])


def test_a_conversation_goes_on(tmp_path):
    model = tiny.folder(tmp_path / "m")
    argv = ["--model", model, "--interactive", "--max-new-tokens", "9", "--ignore-eos"]
    argv += ["--lethe-plus", "--budget", "30", "--interval", "4", "--dtype", "float32"]
    said = "hello\nand then\n/reset\nhello\n/exit\n"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    alone = tiny.command(*argv, **pipes, text=True)
    expected = alone.communicate(said, timeout=120)[0]
    processes = commands(2, *argv, "--parallel", "tensor", stdin=subprocess.PIPE)
    codes, out, _ = ended(processes, text=said)
    assert codes == [0, 0]
    assert out == [expected, ""]
    assert expected


def test_an_error_of_all_is_told_once():
    argv = ["--model", "reasoner", "--prompt", " ", "--parallel", "layers"]
    codes, out, err = ended(commands(2, *argv))
    assert (codes, out) == ([2, 2], ["", ""])
    assert err == ["error: the prompt is empty; give it some text\n", ""]


@pytest.mark.parametrize(
    ("count", "argv", "words"),
    [
        (3, ["--parallel", "tensor"], "go over 3 devices"),
        (1, ["--parallel", "layers", "--compile"], "--compile"),
        (1, ["--parallel", "layers", "--policy", "recall", "--budget", "99"], "recall"),
        (1, ["--parallel", "layers", "--lens", "x.html"], "trace"),
    ],
)
def test_what_cannot_be_divided_is_one_line(tmp_path, count, argv, words):
    codes, _, err = ended(commands(count, *argv, cwd=tmp_path))
    assert codes == [2] * count
    assert err[1:] == [""] * (count - 1)
    told = [line for line in err[0].splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert words in told[0]
    assert "Traceback" not in err[0]


@pytest.mark.parametrize("mode", MODES)
def test_it_takes_several_processes(capsys, mode):
    assert cli.main(["--parallel", mode]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_in_one_process_ends_all_and_keeps_the_text(mode):
    processes = in_the_middle(mode)
    processes[1].send_signal(signal.SIGINT)
    codes, _, err = ended(processes)
    assert codes == [130, 130]
    assert "tokens/s" in err[0]
    assert err[1] == ""


# In one process alone, something fails in the middle of a layer.
FAILS = """
import os, sys
from lethe_mini.app.cli import main
from lethe_mini.model import RMSNorm
calls, forward = [], RMSNorm.forward
def fails(self, x):
    calls.append(1)
    if len(calls) == 100 and os.environ["RANK"] == "1":
        raise MemoryError
    return forward(self, x)
RMSNorm.forward = fails
sys.exit(main())
"""


def test_an_error_in_one_process_ends_all_with_its_line():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = started(2, ["-c", FAILS, "--lethe", "--parallel", "tensor"], **pipes)
    codes, _, err = ended(processes)
    assert codes == [2, 2]
    told = [line for text in err for line in text.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "out of memory" in told[0]


@pytest.mark.parametrize(("mode", "victim"), [("tensor", 1), ("layers", 0)])
def test_when_a_process_is_killed_the_others_end_with_one_line(mode, victim):
    count = 2 + (mode == "layers")
    processes = in_the_middle(mode, count)
    processes[victim].kill()
    begun = time.monotonic()
    codes, _, err = ended(processes, seconds=60)
    assert time.monotonic() - begun < 30
    assert codes[victim] == -signal.SIGKILL
    others = [code for number, code in enumerate(codes) if number != victim]
    assert others == [1] * (count - 1)
    told = [line for text in err for line in text.splitlines() if line.startswith("error: ")]
    # The first process keeps what tells that another has told it. torchrun keeps it itself.
    assert len(told) == (1 if victim else count - 1)
    assert "Traceback" not in "".join(err)
