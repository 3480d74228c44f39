"""Memory that is really released: looked at from outside, in the process, not only in a counter.

The model here has hardly any weights and very wide keys and values, so that the cache is what the
process holds. Nothing is timed: see benchmarks/memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from lethe_mini.engine import Engine
from lethe_mini.generation.stats import allocated
from lethe_mini.kernels import BLOCK, blocks
from lethe_mini.policies import POLICIES, FullKV, Lethe, LethePlus

LAYERS, KV_HEADS, HEAD_DIM = 2, 4, 128
WIDE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": KV_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 5000,
}
TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # bytes of a token's keys and values: 8 KiB
BATCH, TOKENS, BUDGET = 8, 4000, 256
MB = 1 << 20


# -- the process -----------------------------------------------------------------------------------

# In a process of its own, so that its peak is its own. Prints bytes: the peak before the model was
# there (the interpreter and its libraries), the weights, the peak at the end.
WORKER = """
import json, sys
import tiny, test_memory
from lethe_mini import Engine, FullKV, LethePlus

name, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plus = LethePlus(budget=test_memory.BUDGET, protect_prompt=False)
policy = FullKV() if name == "full" else plus
before = test_memory.peak()
engine = Engine(tiny.model(**test_memory.WIDE))
weights = sum(parameter.nbytes for parameter in engine.model.parameters())
result = engine.generate(
    [[i * i % 61 for i in range(prompt)]],
    policy,
    new + 1,
    temperature=1.0,
    num_samples=test_memory.BATCH,
)
stats = result.stats
print(json.dumps({
    "before": before,
    "weights": weights,
    "peak": test_memory.peak(),
    "bytes_full": stats.kv_bytes_full,
    "bytes_peak": stats.kv_bytes_peak,
    "reported": stats.memory_peak,
}))
"""


def peak():
    """Bytes: the most that this process has had. Not ru_maxrss, which a child inherits."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measured(*argv):
    """Runs WORKER: a policy's name, tokens of the prompt, tokens decoded."""
    here, tests, root, *_ = Path(__file__).parents
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{tests}:{root}"}
    argv = [sys.executable, "-c", WORKER, *map(str, argv)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_4000_tokens_at_batch_8_stay_within_the_budget_and_the_full_cache_does_not():
    """The peak of the process, in bytes.

    LethePlus, 8 sequences of 4,000 tokens, all but the first 8 decoded, budget 256: at most 1.3
    times the weights, the budgeted cache (8 x 256 tokens of 8 KiB: 16 MiB) and a working set, which
    is the interpreter with its libraries (measured before the model is made) and 32 MiB: the tokens
    between two rounds (8 x 128 x 8 KiB = 8 MiB), a layer's storage once more while it is moved,
    a layer's keys of all sequences (8 x 448 slots) twice while they turn back to what they were
    before RoPE and are compared, scores and activations.

    The full cache of as many tokens is 8 x 4,000 x 8 KiB = 250 MiB. The process must have had so
    much beside weights and interpreter, which is more than LethePlus may have. Most of its tokens
    come from a prompt that 8 samples share, since decoding them all would take minutes.
    """
    plus = measured("lethe-plus", 8, TOKENS - 8)
    full = measured("full", TOKENS - 40, 40)
    for facts in (plus, full):
        assert facts["bytes_full"] == BATCH * TOKENS * TOKEN
    working_set = plus["before"] + 32 * MB
    bound = 1.3 * (plus["weights"] + BATCH * BUDGET * TOKEN + working_set)
    assert plus["peak"] <= bound
    assert plus["bytes_peak"] <= BATCH * (BUDGET + 128) * TOKEN
    arithmetic = full["before"] + full["weights"] + BATCH * TOKENS * TOKEN
    assert arithmetic <= full["peak"] <= 1.3 * arithmetic
    assert full["peak"] > bound
    # Of the 234 MiB evicted nothing is kept: the process grew by so much less, but for a round's
    # working memory, which the full cache does not need.
    grown = [facts["peak"] - facts["before"] for facts in (full, plus)]
    assert grown[0] - grown[1] > BATCH * (TOKENS - BUDGET) * TOKEN - 32 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="the quirk is Linux's")
def test_the_statistics_report_this_process_not_its_parent():
    """A large process starts a small one: the small one's memory_peak is its own."""
    large = torch.ones(600 * MB // 4)
    facts = measured("lethe-plus", 8, 10)
    assert facts["reported"] < 500 * MB < large.nbytes
    assert facts["reported"] == pytest.approx(facts["peak"], rel=0.05)


# -- the allocator's figure ------------------------------------------------------------------------


def storages(cache):
    """Bytes of all storages that a cache keeps alive, each counted once."""
    tensors = [t for layer in cache.layers for t in layer.store.values()]
    tensors += [t for layer in cache.layers for t in (layer.queries, layer.beacons, layer.gone)]
    tensors.append(cache.next)
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in found.values())


@pytest.fixture(scope="module")
def engine():
    return tiny.engine(vocab_size=61)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_the_allocators_figure_falls_with_a_round(monkeypatch, engine, name):
    """The sum of all storages, before and after every round: the first leaves what it keeps and the
    room of an interval, later ones no more, and nothing is a view that keeps old storage alive."""
    policy = POLICIES[name](budget=100, protect_prompt=False)
    around, plain = [], POLICIES[name].round

    def watched(self, cache, due):
        before = storages(cache)
        plain(self, cache, due)
        assert storages(cache) == allocated(cache)
        for layer in cache.layers:
            wanted = blocks(layer.length + policy.interval)
            assert wanted <= layer.capacity <= wanted + BLOCK
        around.append((before, storages(cache)))

    monkeypatch.setattr(POLICIES[name], "round", watched)
    prompts = [[i * n % 61 for i in range(n)] for n in (500, 300, 47)]
    engine.generate(prompts, policy, 400, temperature=1.0)
    assert len(around) > 4
    # Prefill held 500 tokens, in room for 628; now 100, in room for 228 at most.
    assert around[0][1] < 0.55 * around[0][0]
    for before, after in around[1:]:
        assert after <= before


def test_capacity_follows_what_is_held_in_blocks(engine):
    """At every step there is no more room than for an interval and two blocks beyond the longest
    sequence, and with `FullKV` as many blocks as the text needs, or one more."""

    def on_step(cache):
        for layer in cache.layers:
            interval = getattr(policy, "interval", 0)
            assert layer.length <= layer.capacity < layer.length + interval + 2 * BLOCK
            assert layer.capacity % BLOCK == 0
        assert storages(cache) == allocated(cache)

    for policy in (FullKV(), Lethe(budget=80, interval=50), LethePlus(budget=80, interval=50)):
        result = engine.generate([[1, 2], [3]], policy, [150, 280], on_step=on_step)
        assert result.stats.kv_allocated_peak >= result.stats.kv_bytes_peak


# -- long runs -------------------------------------------------------------------------------------


def test_a_long_run_in_compact_mode_is_flat():
    """8,000 tokens through a model of 700 positions, budget 512: from the first rounds on, memory
    before each round is the same to the byte, and the invariants hold all the way."""
    engine, interval = tiny.engine(num_hidden_layers=2, max_position_embeddings=700), 128
    policy, fullest, live = LethePlus(budget=512, interval=interval), [], []

    def on_step(cache):
        seen = cache.seen[0]
        assert cache.held <= 2 * (512 + interval)
        if seen % interval == interval - 1:
            fullest.append((cache.held, storages(cache)))
        if seen % 500 == 0:
            live.append(resident())
            for layer in cache.layers:
                positions, length = layer.positions[0], layer.lengths[0]
                assert (positions.diff() > 0).all()
                assert positions[:, :4].tolist() == [[0, 1, 2, 3]] * 2
                assert (positions[:, -1] == seen - 1).all()
                assert not any(t[:, :, length:].any() for t in layer.store.values())
                for tensor in (layer.keys, layer.values, layer.scores):
                    assert tensor.isfinite().all()
                # Turned some sixty times, a key is as long as it was: turning does not add up.
                assert layer.keys.norm(dim=-1).max() < 100

    prompt = list(range(128))  # as many as an interval, so that rounds fall on its multiples
    options = {"positions": "compact", "temperature": 1.0, "on_step": on_step}
    one = engine.generate([prompt], policy, 8000, **options).sequences[0]
    assert (one.finish_reason, one.generated_tokens) == ("length", 8000)
    # A layer's share of the budget moves, the sum does not; storage moves by a block at most.
    steady = fullest[6:]
    assert {held for held, _ in steady} == {2 * 512 + 2 * (interval - 1)}
    block = max(size for _, size in steady) - min(size for _, size in steady)
    assert block <= 2 * BLOCK * 2 * (2 * 10 * 4 + 4 + 4)
    assert live[-1] - live[3] < 8 * MB


def resident():
    """Bytes that this process has now; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().partition("VmRSS:")[2].split()[0]) * 1024


class Rounds:
    """Notes when a policy without a budget prunes: at which tokens, and which layers it changed."""

    def __init__(self, monkeypatch, engine, policy, prompt, new):
        self.at, self.changed, plain = [], [], Lethe.round

        def facts(cache):
            return [(layer.lengths[0], layer.thresholds[0]) for layer in cache.layers]

        def watched(lethe, cache, due):
            before = facts(cache)
            plain(lethe, cache, due)
            self.at.append(cache.seen[0])
            pairs = zip(before, facts(cache), strict=True)
            self.changed.append([old != new for old, new in pairs])

        monkeypatch.setattr(Lethe, "round", watched)
        result = engine.generate([prompt], policy, new, temperature=1.0)
        self.final = result.stats.kv_tokens_final[0]

    def check(self, steps):
        """No layer fires at more than every fourth step, and hardly a round is for nothing."""
        per_layer = [sum(column) for column in zip(*self.changed, strict=True)]
        assert max(per_layer) <= steps / 4, f"{per_layer} rounds of a layer in {steps} steps"
        assert sum(not any(row) for row in self.changed) <= 3


@pytest.mark.parametrize("tau", [1.0, 3.0, 50.0, 1e6])
@pytest.mark.parametrize("kind", ["global", "segment"])
def test_thresholds_do_not_fire_on_every_step(monkeypatch, engine, kind, tau):
    """Without a budget and with rounds allowed at every step (interval 1), once a layer's salient
    set exceeds its threshold of 16: the threshold gives way, as it does without a breakpoint."""
    options = {"breakpoint": kind, "tau": tau, "protect_prompt": False}
    policy = Lethe(budget=None, evict_threshold=16, interval=1, **options)
    rounds = Rounds(monkeypatch, engine, policy, [5, 6, 7], 600)
    assert rounds.at
    rounds.check(600)


def test_a_protected_prompt_above_the_threshold_does_not_fire_on_every_step(monkeypatch, engine):
    """A prompt longer than the threshold is never pruned: the threshold gives way, too."""
    policy = Lethe(budget=None, evict_threshold=16, interval=1, tau=3.0)
    rounds = Rounds(monkeypatch, engine, policy, [i * i % 61 for i in range(100)], 600)
    assert min(rounds.final) >= 100
    rounds.check(600)


def test_the_default_interval_bounds_the_rounds(monkeypatch, engine):
    """At most one round in 128 tokens, however small the threshold, and one after the prompt."""
    policy = Lethe(budget=None, evict_threshold=1, tau=3.0)
    rounds = Rounds(monkeypatch, engine, policy, [1] * 50, 1000)
    gaps = [b - a for a, b in zip(rounds.at, rounds.at[1:], strict=False)]
    assert rounds.at
    assert all(gap % 128 == 0 for gap in gaps)


def test_an_engine_lets_go_of_a_run(engine):
    """When `generate` has returned, nothing keeps the cache."""
    import gc
    import weakref

    caches = []
    Engine(engine.model).generate(
        [[1, 2, 3]],
        LethePlus(budget=20),
        30,
        on_step=lambda cache: caches.append(weakref.ref(cache)),
    )
    gc.collect()
    assert caches
    assert all(cache() is None for cache in caches)
