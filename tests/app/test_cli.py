"""The command line: what it prints, where, with which exit code; every mistake is one line.

A tiny random checkpoint with a byte-level tokenizer writes lower-case letters. Most runs are
`main([...])` in this process; signals, pipes and encodings get a process of their own.
"""

import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lethe_mini.app import cli
from lethe_mini.app.screen import Screen
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import named_weights
from lethe_mini.engine import Engine
from lethe_mini.generation.sampling import Sampling
from lethe_mini.model import Transformer
from lethe_mini.options import show_budget
from lethe_mini.policies import POLICIES, Lethe, LethePlus

ROOT = Path(__file__).parents[2]
EOS = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 1009,
    "eos_token_id": EOS,
}
STATS = {
    *("model", "policy", "device", "dtype", "seed", "prefill_seconds", "decode_seconds"),
    *("decode_tokens_per_second", "prune_seconds", "kv_bytes_peak", "kv_bytes_final"),
    *("kv_bytes_full", "kv_reduction", "kv_tokens_mean", "kv_tokens_final", "rounds"),
    *("evicted_tokens", "sequences", "sampling"),
}
SEQUENCE = {"prompt_tokens", "generated_tokens", "text", "token_ids", "finish_reason"}
ENDLESS = ["--raw", "--prompt", "abc", "--max-new-tokens", "900000"]


def byte_level():
    """Every byte is a token, and so is the end of text."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    order = [level.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)]
    order += sorted(set(level.alphabet()) - set(order))
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(order)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A checkpoint folder whose greedy text is letters. Not to be changed; see `copy`."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    with torch.device("meta"):
        weights = named_weights(Transformer(parse_config(CONFIG))).items()
    tensors = {name: torch.randn(w.shape) / w.shape[-1] ** 0.5 for name, w in weights}
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1)
    head, letters = tensors["lm_head.weight"], range(ord("a"), ord("z") + 1)
    head[[token for token in range(257) if token not in letters]] = 0
    save_file({k if k == "lm_head.weight" else f"model.{k}": v for k, v in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def run(capsys):
    """main([...]) -> exit code, standard output, standard error."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """Checks the contract of a mistake: one line, nothing else, exit code 2."""

    def call(*arguments, match=""):
        code, out, err = run(*arguments)
        assert_one_line(code, out, err)
        assert re.search(match, err), err

    return call


def assert_one_line(code, out, err):
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert out == ""
    assert code == 2


def process(*arguments, **options):
    """python generate.py ... in a process of its own."""
    command = [sys.executable, ROOT / "generate.py", *arguments]
    return subprocess.run(command, capture_output=True, timeout=100, **options)


# --- what is printed


def test_text_goes_to_output_once_and_the_report_to_error(run, model):
    """Streamed pieces add up to the text that the engine gives, and a line end."""
    arguments = ("--model", model, "--raw", "--prompt", "abc", "--max-new-tokens", 43)
    code, out, err = run(*arguments)
    text = Engine.from_pretrained(str(model), "cpu").generate(["abc"], max_new_tokens=43)
    assert out == text.sequences[0].text + "\n"
    assert re.fullmatch("[a-z]{43}\n", out)
    assert code == 0
    assert "43 tokens" in err
    assert "tokens/s" in err
    assert "KV memory" in err
    assert "policy full" in err
    assert run(*arguments, "--quiet") == (0, out, "")


def test_output_streams(model, capfd, monkeypatch):
    """Each letter is there as soon as its token is made, not at the end."""
    seen, push = [], Screen.on_token
    monkeypatch.setattr(
        Screen,
        "on_token",
        lambda self, *args: (push(self, *args), seen.append(capfd.readouterr().out)),
    )
    arguments = ["--model", str(model), "--raw", "--prompt", "abc", "--max-new-tokens", "13"]
    assert cli.main(arguments) == 0
    assert [len(piece) for piece in seen] == [1] * 13


def test_several_prompts_are_one_batch(run, model):
    """Each text whole, under its number, as it is alone."""
    prompts = ["abc", "defgh", "i"]
    alone = [
        run("--model", model, "--raw", "--quiet", "--max-new-tokens", 11, "--prompt", prompt)[1]
        for prompt in prompts
    ]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    code, out, err = run("--model", model, "--raw", "--max-new-tokens", 11, *options)
    assert code == 0
    assert out == "".join(f"--- {i} ---\n{text}" for i, text in enumerate(alone, 1))
    assert "33 tokens" in err


def test_a_line_of_a_prompt_file_is_a_prompt(run, model, tmp_path):
    """UTF-8, whatever the machine's own encoding is."""
    path, options = tmp_path / "prompt.txt", ("--model", model, "--max-new-tokens", 17)
    path.write_text("naïve €", encoding="utf-8")
    from_file = run(*options, "--quiet", "--prompt-file", path)
    assert from_file == run(*options, "--quiet", "--prompt", "naïve €")
    assert from_file[0] == 0
    assert len(from_file[1]) == 18


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_writes_all_statistics(run, model, tmp_path, policy):
    """Every key of the interface, as JSON, and the text as it was printed."""
    path, options = tmp_path / "stats.json", []
    if policy != "full":
        options = ["--budget", 23, "--interval", 7]
        options += ["--window", 5] if hasattr(POLICIES[policy], "kernel") else []
    code, out, _ = run(
        "--model", model, "--policy", policy, "--prompt", "abc", "--max-new-tokens", 71,
        "--seed", 3, "--stats", path, *options,
    )  # fmt: skip
    stats = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert code == 0
    assert set(stats) >= STATS
    assert set(stats["sequences"][0]) >= SEQUENCE
    assert stats["sequences"][0]["text"] + "\n" == out
    assert stats["policy"]["name"] == policy
    assert set(stats["policy"]) >= {spec.name for spec in fields(POLICIES[policy])}
    assert (stats["model"], stats["seed"]) == (str(model), 3)
    assert (stats["rounds"] > 0) == (stats["kv_reduction"] > 0) == (policy != "full")


@pytest.fixture
def policy_of(run, model, tmp_path):
    """The policy that statistics name, after a short run with these options."""

    def call(*options):
        path = tmp_path / "stats.json"
        code, _, err = run("--model", model, "--max-new-tokens", 2, "--prompt", "a", "--stats",
                           path, *options)  # fmt: skip
        assert code == 0, err
        return json.loads(path.read_text())["policy"]

    return call


def test_lethe_and_lethe_plus_are_short_for_the_policy(policy_of):
    """--lethe is the paper's policy, with its defaults; --lethe-plus is ours, which has more."""
    lethe, plus = policy_of("--lethe"), policy_of("--lethe-plus")
    assert lethe == policy_of("--policy", "lethe") == policy_of("--policy", "lethe", "--lethe")
    assert lethe == {"name": "lethe", **asdict(Lethe())}
    assert (
        plus == policy_of("--policy", "lethe-plus") == {"name": "lethe-plus", **asdict(LethePlus())}
    )


@pytest.mark.parametrize(
    ("word", "budget"),
    [("512", 512), ("25%", 0.25), ("7.5%", 0.075), ("100%", 1.0), ("none", None)],
)
def test_a_budget_is_a_number_a_share_or_none(policy_of, word, budget):
    """As the policy has it; a share is written in percent."""
    found = policy_of("--lethe", "--budget", word)["budget"]
    assert (type(found), found) == (type(budget), budget)


def test_a_policy_of_the_users_own_brings_its_options(policy_of, capsys):
    """By name, beside those that all policies share; --help shows them."""
    own = f"{ROOT / 'examples/own_policy.py'}:KeyNorm"
    assert policy_of("--policy", own)["largest"] is False
    mine = policy_of("--policy", own, "--largest", "--sinks", 3, "--budget", 64)
    assert (mine["name"], mine["largest"], mine["sinks"], mine["budget"]) == (
        "key-norm",
        True,
        3,
        64,
    )
    for options, there in ((["--policy", own], True), ([], False)):
        with pytest.raises(SystemExit):
            cli.main([*options, "--help"])
        assert ("--largest" in capsys.readouterr().out) == there


def test_help_tells_every_option_and_its_default(capsys, monkeypatch):
    """The policies' from their dataclasses, the rest from the functions that they go to."""
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is broken inside a sentence
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    entries = re.findall(r"(?ms)^  (?:-h, )?--([a-z-]+)(.*?)(?=^  \S|\Z|^\S)", out)
    lines = {name.replace("-", "_"): text for name, text in entries}
    for policy in POLICIES.values():
        for spec in fields(policy):
            line = lines[spec.name].partition("default: ")[2]
            shown = show_budget(spec.default) if spec.name == "budget" else str(spec.default)
            assert re.search(rf"(?<![\w.]){re.escape(shown)}(?![\w.])", line), spec
    defaults = {**inspect.signature(Engine.generate).parameters}
    defaults |= inspect.signature(Engine.from_pretrained).parameters
    defaults |= inspect.signature(Sampling).parameters
    shown = {name for name in lines if name in defaults and defaults[name].default is not None}
    assert {"temperature", "top_k", "top_p", "seed", "max_new_tokens", "device", "dtype"} <= shown
    switches = {"raw", "ignore_eos", "compile"}  # off unless they are there
    for name in shown - switches - {"model"}:
        own = "the model's own, else " if name in ("temperature", "top_k", "top_p") else ""
        default = "greedy" if name == "temperature" else defaults[name].default
        assert re.search(rf"\(default: {own}{default}[;)]", lines[name])
    assert {"model", "prompt", "prompt_file", "raw", "system", "stats", "quiet", "lethe", "policy",
            "lethe_plus", "threads"} <= set(lines)  # fmt: skip


def test_the_installed_command_is_the_same_function():
    """`lethe-mini` and `python generate.py` are one."""
    assert runpy.run_path(str(ROOT / "generate.py"))["main"] is cli.main
    scripts = re.findall(r'^lethe-mini = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert scripts == ["lethe_mini.app.cli:main"]


def test_the_script_runs(model):
    """python generate.py, from any folder."""
    options = ["--model", model, "--raw", "--prompt", "abc", "--max-new-tokens", "11", "--lethe"]
    done = process(*options, cwd=model)
    assert done.returncode == 0
    assert re.fullmatch(rb"[a-z]{11}\n", done.stdout)
    assert b"tokens/s" in done.stderr
    done = process(*options, "--budget", "0")
    assert_one_line(done.returncode, done.stdout.decode(), done.stderr.decode())


# --- what a user gets wrong: options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n "], "the prompt is empty"),
        (["--prompt", "abc", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 1010], "1010 tokens and the model takes 1009"),
        (["--prompt", "\udcff"], "not valid Unicode"),
        (["--lethe", "--budget", 20, "--prompt", "x" * 20], "budget 20 is too small .* prompt"),
        (["--lethe", "--budget", 4, "--no-protect-prompt"], "budget 4 is too small"),
        (["--lethe", "--budget", 9, "--sinks", 9, "--no-protect-prompt"], "budget 9 is too small"),
        (["--policy", "snapkv", "--budget", 60, "--no-protect-prompt"], "budget 60 is too small"),
        *(
            (
                ["--lethe", "--budget", word],
                "^error: --budget should be a number of tokens such as 512, a share of the text "
                f"such as 25%, up to 100%, or none, not '{word}' ",
            )
            for word in ("0", "-5", "1.5", "many", "", "%", "0%", "150%", "nan%", "None")
        ),
        (["--lethe", "--budget", "-1%"], "--budget: expected one argument"),
        (["--policy", "h2o", "--budget", "none"], "H2O needs a budget"),
        (["--lethe-plus", "--budget", "none"], "LethePlus needs a budget"),
        (["--lethe", "--gamma", 1.5], "gamma should be from 0 to 1, not 1.5"),
        (["--lethe", "--gamma", -0.5], "gamma should be from 0 to 1, not -0.5"),
        (["--lethe", "--gamma", math.nan], "gamma should be from 0 to 1, not nan"),
        (["--lethe", "--gamma", "x"], "--gamma"),
        (["--lethe", "--tau", 0.5], "tau should be .*, not 0.5"),
        (["--lethe", "--tau", math.nan], "tau should be .*, not nan"),
        (["--lethe", "--tau", math.inf], "tau should be .*, not inf"),
        (["--lethe", "--recent-ratio", 1.5], "recent_ratio should be from 0 to 1, not 1.5"),
        (["--lethe", "--recent-ratio", math.nan], "recent_ratio should be .*, not nan"),
        (["--lethe", "--sinks", -1], "sinks should be at least 0, not -1"),
        (["--lethe", "--interval", 0], "interval should be at least 1, not 0"),
        (["--lethe", "--segments", 1], "segments should be at least 2, not 1"),
        (["--lethe", "--breakpoint", "elbow"], "breakpoint should be one of global, segment, none"),
        (["--lethe", "--breakpoint", "none", "--budget", "none"], "breakpoint none needs a budget"),
        (["--lethe", "--allocation", "uniform", "--budget", "none"], "uniform needs a budget"),
        (["--policy", "snapkv", "--kernel", 4], "kernel should be odd, not 4"),
        (["--temperature", -1], "temperature should be .*, not -1"),
        (["--temperature", math.nan], "temperature should be .*, not nan"),
        (["--temperature", math.inf], "temperature should be .*, not inf"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", 0], "top-p should be .*, not 0"),
        (["--top-p", 1.01], "top-p should be .*, not 1.01"),
        (["--top-p", math.nan], "top-p should be .*, not nan"),
        (["--top-k", -1], "top-k should be .*, not -1"),
        (["--top-k", 2.5], "--top-k"),
        (["--max-new-tokens", 0], "at least 1"),
        (["--prefill-chunk", 0], "at least 1"),
        (["--num-samples", 0], "at least 1"),
        (["--batch-size", 0], "at least 1"),
        (["--seed", "x"], "--seed"),
        (["--positions", "relative"], "--positions"),
        (["--policy", "lether"], "no policy 'lether'; there are full, lethe"),
        (["--policy", "h2o", "--lethe"], "--lethe and --policy h2o name two policies; give one"),
        (["--lethe", "--lethe-plus"], "--lethe and --lethe-plus name two policies; give one"),
        (["--paper"], "unrecognized arguments: --paper"),
        (["--policy", "mine.py:Mine"], "no policy 'mine.py:Mine': there is no file mine.py"),
        (["--policy", f"{ROOT}/generate.py:Mine"], "has no policy 'Mine'; a policy is a subclass"),
        (["--threads", 0], "threads should be at least 1, not 0"),
        (["--threads", "many"], "--threads"),
        (["--policy", "h2o", "--gamma", 0.5], "policy h2o has no --gamma"),
        (["--budget", 99], "policy full has no --budget"),
        (["--no-protect-prompt"], "policy full has no --protect-prompt"),
        (["--lethe", "--window", 5], "policy lethe has no --window; it is an option of recall"),
        (["--lethe", "--lag", 5], "policy lethe has no --lag; it is an option of lethe-plus"),
        (["--device", "tpu"], "device should be auto, cpu, cuda or mps, not 'tpu'"),
        (["--device", "cpu:x"], "'cpu:x'"),
        (["--device", "cuda"], "'cuda'"),
        (["--dtype", "int4"], "dtype should be auto, .* not 'int4'"),
        (["--system", "Be brief."], "system text"),
        (["--revision", "main"], "revision"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["a prompt\nof two lines"], "unrecognized arguments: a prompt of two lines"),
        (["--stats", "/"], "cannot write /"),
        (["--stats", "nowhere/stats.json"], "cannot write nowhere/stats.json"),
        (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompt-file", "."], "cannot read"),
    ],
    ids=lambda value: " ".join(map(str, value))[:50] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(refused, model, monkeypatch, tmp_path, options, match):
    """On standard error, with exit code 2, before any text."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    refused("--model", model, *options, match=match)
    assert not list(tmp_path.iterdir())


def test_a_prompt_file_that_is_not_utf8(refused, model, tmp_path):
    """Latin-1 is refused, not guessed at."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("naïve".encode("latin-1"))
    refused("--model", model, "--prompt-file", path, match="not UTF-8")


# --- what a user gets wrong: models


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, key):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


def change(folder, name, tensor):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path)


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def shards(folder, weight_map=None, lose=False):
    """Two shards and their index, with another map or a shard lost."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    told = {key: file for file, keys in parts.items() for key in keys} | (weight_map or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": told}))
    if lose:
        (folder / "b.safetensors").unlink()


def only_pickles(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


NORM = "model.norm.weight"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "only pickles": (only_pickles, "pytorch_model.bin; pickled weights .* are never read"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a list"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\0"), "is not JSON"),
    "config lacks a key": (lambda f: drop(f, "hidden_size"), "'hidden_size' is missing"),
    "config of no sense": (lambda f: edit(f, hidden_size=-24), "hidden_size .* not -24"),
    "heads that do not divide": (lambda f: edit(f, num_key_value_heads=4), "not divisible"),
    "another size": (lambda f: edit(f, hidden_size=30), "misshapen"),
    "a layer more": (lambda f: edit(f, num_hidden_layers=3), "missing: layers.2"),
    "a layer less": (lambda f: edit(f, num_hidden_layers=1), "unexpected: model.layers.1"),
    "architecture": (lambda f: edit(f, architectures=["MambaForCausalLM"]), "'MambaForCausalLM'"),
    "RoPE": (lambda f: edit(f, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer"),
    "tokenizer of another": (lambda f: shrink(f), "from 0 to 30"),
    "truncated": (lambda f: cut(f, -7), "is damaged or no safetensors file"),
    "cut to nothing": (lambda f: cut(f, 0), "is damaged or no safetensors file"),
    "corrupt": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 999),
        "is damaged or no safetensors file",
    ),
    "tensor missing": (lambda f: change(f, NORM, None), "missing: norm.weight"),
    "tensor too many": (lambda f: change(f, "extra", torch.ones(2)), "unexpected: extra"),
    "tensor misshapen": (lambda f: change(f, NORM, torch.ones(23)), "misshapen: model.norm"),
    "shard missing": (lambda f: shards(f, lose=True), "lacks b.safetensors"),
    "index outside": (
        lambda f: shards(f, {NORM: "../other/a.safetensors"}),
        "should be a .safetensors file beside the index",
    ),
}


def shrink(folder):
    """A model with fewer tokens than its tokenizer."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:31].clone()
    save_file(tensors, path)
    edit(folder, vocab_size=31)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_line(refused, copy, damage):
    """Whatever is wrong with the folder: no traceback, and no text from half a model."""
    hurt, match = DAMAGE[damage]
    hurt(copy)
    refused("--model", copy, "--prompt", "abc", "--max-new-tokens", 3, match=match)


def test_shards_are_read(run, copy, model):
    """The helper above makes good shards, if nothing is wrong with them."""
    options = ("--prompt", "abc", "--max-new-tokens", 19, "--quiet")
    whole = run("--model", model, *options)
    shards(copy)
    assert run("--model", copy, *options) == whole
    assert whole[0] == 0


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./nowhere", "no such folder: './nowhere'"),
        ("/nowhere/model", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "no such folder"),
        ("two words", "hub id"),
        ("nobody/nothing", "could not be fetched .* not in the cache"),
    ],
)
def test_a_model_that_is_nowhere_is_one_line(refused, monkeypatch, tmp_path, name, match):
    """Neither a folder nor, without a network, a repository on the hub."""

    def offline(model, **_):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(model)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    refused("--model", name, "--prompt", "abc", match=match)


# --- the file of statistics


def test_a_failed_run_leaves_statistics_as_they_were(refused, copy, tmp_path):
    """Nothing new beside the model, and an older run's file untouched."""
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("an older run")
    for path in (new, old):
        refused("--model", "./nowhere", "--stats", path)
        refused("--model", copy, "--prompt", "", "--stats", path)
        refused("--model", copy, "--lethe", "--budget", 1, "--stats", path)
    (copy / "tokenizer.json").unlink()
    refused("--model", copy, "--stats", new)
    assert not new.exists()
    assert old.read_text() == "an older run"


def test_statistics_replace_those_of_an_older_run(run, model, tmp_path):
    """The file is the run's own, whole."""
    path = tmp_path / "stats.json"
    path.write_text("an older run, longer than the new one " * 999)
    code, *_ = run("--model", model, "--prompt", "a", "--max-new-tokens", 2, "--stats", path)
    assert code == 0
    assert json.loads(path.read_text())["sequences"][0]["generated_tokens"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_one_line_after_the_text(run, model):
    """What only shows when statistics are written: the text is out, the rest is one line."""
    code, out, err = run(
        "--model", model, "--prompt", "a", "--max-new-tokens", 7, "--stats", "/dev/full", "--quiet"
    )
    assert len(out) == 8
    assert_one_line(code, "", err)


def test_a_place_that_cannot_be_written_is_found_first(refused, monkeypatch, tmp_path):
    """Before a model is even looked for."""
    monkeypatch.setattr(cli.Engine, "from_pretrained", lambda *_: pytest.fail("too late"))
    refused("--stats", tmp_path, match="cannot write")
    refused("--stats", tmp_path / "no" / "stats.json", match="cannot write")


# --- signals, pipes, encodings

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


def started(model, *arguments, **options):
    """A run of many tokens in a process of its own."""
    command = [sys.executable, ROOT / "generate.py", "--model", model, *arguments]
    # Unbuffered: `communicate` would not see what a buffered read(1) had taken already.
    return subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, **options)


def taken(run, count):
    """The first bytes of its output, as soon as they are there."""
    return b"".join(run.stdout.read(1) for _ in range(count))


@pytest.fixture
def endless(copy):
    """A model with so many positions that its texts do not end by themselves."""
    edit(copy, max_position_embeddings=1_000_000)
    return copy


@posix
@pytest.mark.parametrize("prompts", [1, 2])
def test_ctrl_c_keeps_the_text_so_far(endless, tmp_path, prompts):
    """The text, the report, the statistics; no traceback; exit code 130."""
    path = tmp_path / "stats.json"
    options = [*ENDLESS, "--stats", path, "--lethe", "--budget", "64", "--interval", "16"]
    if prompts == 1:
        run = started(endless, *options, stderr=subprocess.PIPE)
        out = taken(run, 1)
    else:  # of a batch, the one that ends first is printed first
        batch = tmp_path / "prompts.jsonl"
        short = {"prompt": "d", "max_new_tokens": 7}
        batch.write_text(json.dumps(short) + '\n{"prompt": "abc"}\n')
        options = [*options[:1], "--prompt-file", batch, *options[3:]]
        run = started(endless, *options, stderr=subprocess.PIPE)
        out = taken(run, 9)
    run.send_signal(signal.SIGINT)
    rest, err = run.communicate(timeout=60)
    out = (out + rest).decode()
    assert run.returncode == 130
    assert b"tokens/s" in err
    assert b"Traceback" not in err
    sequences = json.loads(path.read_text())["sequences"]
    assert sequences[-1]["finish_reason"] == "interrupted"
    assert sequences[-1]["generated_tokens"] > 0
    printed = out.rstrip("\n").splitlines()[-1]
    # A signal between making a token and printing it costs one letter at most.
    assert sequences[-1]["text"][: len(printed)] == printed
    assert len(printed) >= len(sequences[-1]["text"]) - 1


@posix
@pytest.mark.parametrize("streams", ["out", "both"])
def test_a_closed_pipe_is_quiet(endless, streams):
    """| head -c 5 has read enough: no message, no traceback; 2>&1 | head, too."""
    stderr = subprocess.PIPE if streams == "out" else subprocess.STDOUT
    run = started(endless, *ENDLESS, stderr=stderr)
    assert re.fullmatch(rb"[a-z]{5}", taken(run, 5))
    run.stdout.close()
    if streams == "out":
        assert run.stderr.read() == b""
        run.stderr.close()
    assert run.wait(60) == 0


def test_an_encoding_that_lacks_a_letter_costs_the_letter_only(copy):
    """An ASCII terminal: replacement characters, no traceback."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    head = tensors["lm_head.weight"]
    head[200:250] = head[97:123].repeat(2, 1)[:50] * 2  # bytes that are no letters at all
    save_file(tensors, path)
    options = ["--model", copy, "--raw", "--prompt", "abc", "--max-new-tokens", "23"]
    done = process(*options, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"?" in done.stdout
    done.stdout.decode("ascii")
