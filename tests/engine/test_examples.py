"""The examples: Lethe by hand does what the engine does, and a policy of one's own works."""

import importlib.util
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from lethe_mini import Engine, Lethe, cache
from lethe_mini.policies import find_policy
from lethe_mini.reasoner.problems import TRAINED, problem

ROOT = Path(__file__).parents[2]
BY_HAND, OWN = ROOT / "examples/lethe_by_hand.py", ROOT / "examples/own_policy.py"


@pytest.fixture
def by_hand():
    """The example as a module of its own, whose constants a test may change."""
    spec = importlib.util.spec_from_file_location("lethe_by_hand", BY_HAND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reasoner():
    return Engine.from_pretrained("reasoner", device="cpu")


def run(command):
    """What a command prints, which runs in the repository's root and must succeed."""
    argv = [sys.executable, *shlex.split(command)[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def constants(module):
    return {name: value for name, value in vars(module).items() if name.isupper()}


def test_by_hand_is_short_and_takes_no_class_of_the_package(by_hand):
    assert len(BY_HAND.read_text(encoding="utf-8").splitlines()) <= 80
    classes = [value for value in vars(by_hand).values() if isinstance(value, type)]
    assert not [kind for kind in classes if kind.__module__.startswith("lethe_mini")]


def test_by_hand_has_the_values_of_lethe(by_hand):
    named = constants(by_hand)
    del named["WORDS"]
    assert named == {name: getattr(Lethe(), name.lower()) for name in named}
    # What it has no constant for is as it is in Lethe().
    assert (Lethe().allocation, Lethe().breakpoint) == ("inverse_hoyer", "global")
    assert Lethe().protect_prompt


def kept_by_hand(by_hand, model, prompt, most):
    """The new tokens, and after every round the tokens seen and, per layer, positions and scores of
    every head."""
    rounds, prune = [], by_hand.prune

    def spy(layers, prompt, seen):
        before = [layer["keys"].shape for layer in layers]
        prune(layers, prompt, seen)
        if before != [layer["keys"].shape for layer in layers]:
            kept = [(layer["positions"][0], layer["scores"][0].clone()) for layer in layers]
            rounds.append((seen, kept))

    by_hand.prune = spy
    return by_hand.write(model, prompt, most=most)[len(prompt) :], rounds


def kept_by_engine(engine, policy, prompt, most):
    """The same of the engine."""
    rounds = []

    class Spy(Lethe):
        def round(self, cache, due):
            done = super().round(cache, due)
            kept = [(layer.positions[0], layer.scores[0].clone()) for layer in cache.layers]
            rounds.append((cache.seen[0], kept))
            return done

    result = engine.generate([prompt], Spy(**policy), most - len(prompt))
    return result.sequences[0].token_ids, rounds


@pytest.mark.parametrize(
    ("family", "seed", "rounds", "policy"),
    [
        ("walk", 1, 3, {}),
        ("sum", 0, 3, {}),
        ("run", 6, 3, {}),
        ("walk", 3, 12, {"interval": 37, "evict_threshold": 150}),
        ("run", 2, 5, {"budget": 0.1, "tau": 50.0, "segments": 7, "sinks": 0}),
        ("sum", 5, 3, {"budget": 0.6, "gamma": 0.9, "recent_ratio": 0.1, "interval": 61}),
    ],
)
def test_by_hand_writes_and_keeps_what_the_engine_does(
    by_hand, reasoner, monkeypatch, family, seed, rounds, policy
):
    """Tokens, and the positions and scores of every layer after every round, bit for bit. Storage
    moves slot by slot here, so that tensors have the same shapes and rounding is the same."""
    rng = random.Random(seed)
    prompt = reasoner.text.encode(problem(family, rng, max(TRAINED[family])).prompt)
    for name, value in policy.items():
        assert name.upper() in constants(by_hand)
        setattr(by_hand, name.upper(), value)
    monkeypatch.setattr(cache.LayerCache, "capacity_for", lambda layer, length: length)
    most = len(prompt) + 900
    tokens, hand = kept_by_hand(by_hand, reasoner.model, prompt, most)
    right, engine = kept_by_engine(reasoner, policy, prompt, most)
    assert tokens == right
    assert len(hand) >= rounds
    for (seen, mine), (right_seen, its) in zip(hand, engine, strict=True):
        assert seen == right_seen
        for (positions, scores), (right_positions, right_scores) in zip(mine, its, strict=True):
            assert positions.tolist() == right_positions.tolist()
            assert torch.equal(scores, right_scores)


def test_by_hand_ends_and_stops_where_it_should(by_hand, reasoner):
    """Against the engine as it is, to the end of the text and to a limit."""
    prompt = reasoner.text.encode(problem("walk", random.Random(4), 40).prompt)
    text = by_hand.write(reasoner.model, prompt)
    result = reasoner.generate([prompt], Lethe(), 1500 - len(prompt)).sequences[0]
    assert (result.finish_reason, result.token_ids) == ("stop", text[len(prompt) :])
    assert by_hand.write(reasoner.model, prompt, most=len(prompt) + 7) == text[: len(prompt) + 7]


def test_by_hand_tells_its_rounds_and_whether_it_is_right():
    lines = run(f"python {BY_HAND.relative_to(ROOT)} 2").splitlines()
    assert lines[-1] == "The answer is right."
    rounds = [line for line in lines if "tokens seen" in line]
    layers = [line for line in lines if "Hoyer" in line]
    assert len(rounds) == 3
    assert len(layers) == 3 * 4


@pytest.mark.parametrize("largest", [False, True])
@torch.inference_mode()
def test_own_policy_keeps_the_keys_of_smallest_norm(largest):
    kind = find_policy(f"{OWN}:KeyNorm")
    policy = kind(largest=largest, budget=13, sinks=0, recent_ratio=0.0, protect_prompt=False)
    engine = tiny.engine()
    prompt = torch.randint(258, (1, 31))
    held = engine.new_cache(policy)
    engine.model(prompt, cache=held)
    norms = [layer.keys[0].norm(dim=-1).tolist() for layer in held.layers]
    policy.round(held, [True])
    for layer, heads in zip(held.layers, norms, strict=True):
        for head, positions in zip(heads, layer.positions[0].tolist(), strict=True):
            best = sorted(range(30), key=head.__getitem__, reverse=largest)[:12]
            assert positions == [*sorted(best), 30]  # and the newest token
    result = engine.generate(prompt.tolist(), policy, 40)
    assert result.stats.rounds
    assert result.stats.policy["name"] == "key-norm"


COMMANDS = [
    line.strip()
    for line in OWN.read_text(encoding="utf-8").splitlines()
    if line.startswith("    python")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_own_policy_runs_by_the_commands_that_it_names(command):
    """It writes text, and it obeys the laws."""
    assert len(COMMANDS) == 3
    assert run(command)
