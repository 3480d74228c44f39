"""Sizing: what it says that a device holds is what a run's tensors measure; parts make a whole."""

import re
import shlex
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import lethe_mini.attention
from benchmarks.speed import shapes
from lethe_mini import Engine, FullKV, Lethe, sizing

CPU, SCALE = torch.device("cpu"), Path(__file__).parents[2] / "docs" / "SCALE.md"


# -- against a run ---------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of all storages that operations within it have made: those alive now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return made

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture
def live(monkeypatch):
    plain = lethe_mini.attention.causal_lower_right

    def outside(*sizes):  # it makes no tensor, but a subclass that such a mode cannot see
        with _disable_current_modes():
            return plain(*sizes)

    monkeypatch.setattr(lethe_mini.attention, "causal_lower_right", outside)
    return Live()


def job(engine, prompt, length):
    shape = sizing.count(engine.model.config)
    return sizing.Job(shape, 1, "tensor", engine.dtype, prompt, length, engine.device)


def prompts(engine, count, length):
    vocab = engine.model.config.vocab_size
    return torch.randint(vocab, (count, length)).tolist()


def weights(engine):
    return sum(parameter.nbytes for parameter in engine.model.parameters())


EVEN = {"allocation": "uniform", "breakpoint": "none"}
POLICIES = {
    "full": FullKV(),
    "share": Lethe(budget=0.3, evict_threshold=250, **EVEN),
    "number": Lethe(budget=180, interval=60, **EVEN),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_bytes_of_the_reasoner_are_those_that_a_run_measures(live, policy):
    """Weights, cache and working room within 5 %. Three sequences at a time; in the second run one
    ends a little before the others, so a fourth prompt is read where the batch is at its fullest.
    """
    engine = Engine.from_pretrained("reasoner", "cpu", "float32")
    fit = job(engine, 120, 600).fullest(policy, 3)
    assert fit.weights == weights(engine)
    four, options = prompts(engine, 4, 120), {"ignore_eos": True, "batch_size": 3}
    stats = engine.generate(four[:3], policy, 481, **options).stats
    assert (stats.rounds > 0) == (policy.name != "full")
    assert fit.cache == pytest.approx(stats.kv_allocated_peak, rel=0.05)
    with live:
        engine.generate(four, policy, [481, 470, 481, 5], **options)
    assert fit.total == pytest.approx(fit.weights + live.peak, rel=0.05)


@pytest.mark.parametrize(("batch", "more"), [(2, 0.05), (6, 0.15)])
def test_uneven_budgets_take_little_more_than_even_ones(batch, more):
    """A layer's storage is as wide as the longest sequence needs, which differs where Hoyer divides
    the budget."""
    engine, policy = Engine.from_pretrained("reasoner", "cpu", "float32"), Lethe(budget=600)
    fit = job(engine, 550, 740).fullest(policy, batch)
    stats = engine.generate(prompts(engine, batch, 550), policy, 191, ignore_eos=True).stats
    assert stats.rounds == batch
    assert 0.95 * fit.cache <= stats.kv_allocated_peak <= (1 + more) * fit.cache


def test_the_room_for_a_long_prompt_is_what_reading_it_takes(live):
    """A prompt of several chunks with scores, before there is anything else."""
    engine, policy = Engine.from_pretrained("reasoner", "cpu", "float32"), Lethe(budget=0.1)
    fit = job(engine, 1500, 1510).fullest(policy, 1)
    with live:
        engine.generate(prompts(engine, 1, 1500), policy, 10)
    assert fit.cache + fit.room == pytest.approx(live.peak, rel=0.05)


@pytest.mark.demo
@pytest.mark.parametrize("policy", [FullKV(), Lethe(budget=90, interval=50)], ids=["full", "lethe"])
def test_the_bytes_of_the_demo_are_those_that_a_run_measures(demo, policy):
    """Weights and cache, within 5 %."""
    engine = Engine.from_pretrained(str(demo), "cpu", "float32")
    fit = job(engine, 60, 200).fullest(policy, 2)
    assert fit.weights == weights(engine)
    stats = engine.generate(prompts(engine, 2, 60), policy, 141, ignore_eos=True).stats
    assert (stats.rounds > 0) == (policy.name == "lethe")
    assert fit.cache == pytest.approx(stats.kv_allocated_peak, rel=0.05)


# -- dividing --------------------------------------------------------------------------------------

DENSE = [name for name, sizes in shapes.SHAPES.items() if "num_experts" not in sizes]


@pytest.mark.parametrize("name", sizing.SHAPES)
def test_a_published_model_has_its_billions(name):
    """Those that the benchmarks estimate; for DeepSeek-V3, those that its makers name."""
    right = 671.03e9 if name == "deepseek-v3" else shapes.weights_estimate(name) / 2
    assert sizing.find_shape(name).weights == pytest.approx(right, rel=1e-3)


def test_heads_divide_whole_and_unevenly():
    shares = sizing.tensor_shares(sizing.find_shape("llama-70b"), 3)
    assert [share.config.num_key_value_heads for share in shares] == [3, 3, 2]
    assert [share.config.num_attention_heads for share in shares] == [24, 24, 16]
    assert [share.config.intermediate_size for share in shares] == [9558, 9557, 9557]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("devices", [1, 2])
def test_the_shares_are_the_model_and_what_all_have(name, devices):
    """Norms are on every device; the rest is on one."""
    shape = sizing.find_shape(name)
    c, shares = shape.config, sizing.tensor_shares(shape, devices)
    norms = 2 * c.hidden_size + (2 * c.head_dim if c.qk_norm else 0)
    common = c.num_hidden_layers * norms + c.hidden_size
    total = sum(share.weights for share in shares)
    assert total == shape.weights + (devices - 1) * common


@pytest.mark.parametrize("name", ["llama-70b", "qwen-1.5b", "deepseek-v3"])
def test_runs_of_layers_are_the_whole_model(name):
    """A tied head, which is the embedding, is a second time on the last device."""
    shape = sizing.find_shape(name)
    whole = sizing.Job(shape, 1, "layers", torch.bfloat16, 128, 2000, CPU)
    parts = sizing.Job(shape, 5, "layers", torch.bfloat16, 128, 2000, CPU)
    for policy in (FullKV(), Lethe()):
        (all_of_it,), fits = whole.fits(policy, 4), parts.fits(policy, 4)
        twice = 2 * shape.embedding if shape.config.tie_word_embeddings else 0
        assert (
            sum(fit.weights for fit in fits)
            == all_of_it.weights + twice
            == (2 * shape.weights + twice)
        )
        assert sum(fit.cache for fit in fits) == all_of_it.cache
        assert sum(fit.layers for fit in fits) == all_of_it.layers


def test_the_largest_batch_fits_and_one_more_does_not():
    engine = Engine.from_pretrained("reasoner", "cpu", "float32")
    for policy in (FullKV(), Lethe()):
        one = job(engine, 128, 2000)
        batch = one.largest_batch(policy, 80 * 10**6)
        assert one.fullest(policy, batch).total <= 80 * 10**6
        assert one.fullest(policy, batch + 1).total > 80 * 10**6
        assert one.largest_batch(policy, weights(engine)) == 0


# -- the command -----------------------------------------------------------------------------------

SHAPE = ["--shape", "llama-70b"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "--shape --model"),
        (["--shape", "llama-71b"], "llama-71b"),
        (["--model", "./nowhere"], "no such folder"),
        ([*SHAPE, "--devices", "9"], "8 key/value heads do not go over 9 devices"),
        (
            [*SHAPE, "--devices", "81", "--parallel", "layers"],
            "80 layers do not go over 81 devices",
        ),
        ([*SHAPE, "--devices", "0"], "--devices should be at least 1, not 0"),
        ([*SHAPE, "--batch", "-1"], "--batch should be at least 1, not -1"),
        ([*SHAPE, "--prompt", "0"], "--prompt should be at least 1, not 0"),
        ([*SHAPE, "--length", "100"], "--length should be above --prompt (128), not 100"),
        ([*SHAPE, "--memory", "80"], "80GB or 80GiB, not '80'"),
        ([*SHAPE, "--memory", "0GB"], "not '0GB'"),
        ([*SHAPE, "--budget", "0%"], "not '0%'"),
        ([*SHAPE, "--budget", "none"], "give a number or P%"),
        ([*SHAPE, "--budget", "100"], "budget 100 is too small for the prompt"),
        (["--shape", "deepseek-v3", "--devices", "2"], "--parallel layers"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, told, capsys):
    assert sizing.main(argv) == 2
    out, error = capsys.readouterr()
    assert told in error
    assert len(error.splitlines()) == 1
    assert not out


def test_the_command_takes_a_checkpoint_and_units(capsys):
    argv = ["--model", "reasoner", "--device", "cpu", "--length", "600", "--batch", "3"]
    engine = Engine.from_pretrained("reasoner", "cpu", "float32")
    shown = {}
    for more in (["--memory", "1.5GB"], ["--memory", "1MiB"], ["--dtype", "bfloat16"]):
        assert sizing.main([*argv, *more]) == 0
        shown[more[1]] = capsys.readouterr().out
    fit = job(engine, 128, 600).fullest(FullKV(), 3)
    assert f"| weights | {fit.weights / 1e9:.2f} |" in shown["1.5GB"]
    assert "1 of 1.5 GB (cpu)" in shown["1.5GB"]
    assert shown["1MiB"].endswith("| largest batch | 0 | 0 |\n")
    assert "a slot has 512 bytes in each of 4 layers" in shown["1.5GB"]
    assert "a slot has 256 bytes" in shown["bfloat16"]


EXAMPLE = re.compile(
    r"^```sh\npython -m lethe_mini\.sizing (.*)\n```\n\n```text\n([^`]*)^```$", re.MULTILINE
)


def test_the_document_prints_what_its_commands_print(capsys):
    text = SCALE.read_text(encoding="utf-8")
    examples = EXAMPLE.findall(text)
    assert len(examples) == text.count("python -m lethe_mini.sizing ") > 2
    for command, printed in examples:
        assert sizing.main(shlex.split(command)) == 0
        assert capsys.readouterr().out == printed
