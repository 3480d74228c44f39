"""Laws of a decoding step and of a round: what the host may do, and when storage may move."""

import dataclasses
from types import SimpleNamespace

import pytest
import tape
import torch
from noise import batch_of, feed, held_positions
from texts import generate, some_tokens

from lethe_mini import experts
from lethe_mini.cache import KVCache
from lethe_mini.generation import capture
from lethe_mini.generation.sampling import Sampling, sample
from lethe_mini.model import Transformer
from lethe_mini.policy import FullKV, Pruner

SAMPLED = {"temperature": 0.8, "top_k": 11, "top_p": 0.9, "seed": 3, "positions": "compact"}


@pytest.fixture
def replayed(monkeypatch):
    """Steps are captured and replayed, though there is no CUDA. -> the captures."""
    tapes = []
    monkeypatch.setitem(experts.SORTED, "cpu", experts.SORTED["other"])

    def record(step, before):
        tapes.append(tape.capture(step))
        return tapes[-1]

    monkeypatch.setitem(capture.CAPTURE, "cpu", record)
    return tapes


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled, compact"])
def test_a_replayed_step_is_the_engines(monkeypatch, model, replayed, policy, options):
    """Tokens, and positions held after every round, over rounds, prompts that join and texts that
    end; and most steps are replays. A step takes no number from the host, or capturing fails."""
    prompts = [some_tokens(n, seed=n) for n in (3, 11, 5, 7)]
    options = {"batch_size": 3, "max_new_tokens": [19, 11, 29, 7], **options}
    captured = generate(model, prompts, policy, **options)
    assert sum(one.replays for one in replayed) > 10
    monkeypatch.setenv("LETHE_MINI_CAPTURE", "0")
    count = len(replayed)
    assert generate(model, prompts, policy, **options)[:2] == captured[:2]
    assert len(replayed) == count  # the variable switches it off


def test_a_text_that_ends_early_ends_in_a_replay(monkeypatch, model, replayed):
    """The host tests for the end of the text with the tokens that it takes."""
    prompts = [some_tokens(n, seed=n) for n in (3, 11)]
    whole = generate(model, prompts, FullKV())[0]
    text = SimpleNamespace(eos_ids=frozenset({whole[0][20]}), decode=lambda ids: "", sampling={})
    ended = generate(model, prompts, FullKV(), text=text)[2].sequences
    for one, tokens in zip(ended, whole, strict=True):
        last = min(i for i, t in enumerate([*tokens, whole[0][20]]) if t == whole[0][20])
        assert one.token_ids == tokens[: last + 1]


def test_storage_stays_between_rounds(model, policy):
    """Without rounds, sequences that come or go, or growth, every tensor of the cache is where it
    was; after a round it is there, or smaller, or larger by what the interval needs."""
    moves, state = [], {}

    def on_step(cache):
        places = [t.data_ptr() for t in cache.tensors()]
        rounds, seen = tuple(sum(layer.evicted) for layer in cache.layers), cache.seen[0]
        if state and rounds == state["rounds"] and places != state["places"]:
            moves.append(seen)
        state.update(places=places, rounds=rounds)

    if isinstance(policy, Pruner):
        policy = dataclasses.replace(policy, interval=32)
    generate(model, [some_tokens(9, 1)], policy, max_new_tokens=119, on_step=on_step)
    assert len(moves) <= 2  # of 119 steps: a cache that grows by more than a block


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 11, 0.9)], ids=["best", "sampled"])
def test_a_step_on_a_device_leaves_the_host_out(model, policy, sampling):
    """On another device than the CPU, whose tensors have no numbers at all: reading one fails, and
    so does a tensor that comes from the host."""
    config = model.config
    with torch.inference_mode(), torch.device("meta"):
        model = Transformer(config)
        model.inv_freq = torch.empty(config.head_dim // 2)
        cache = KVCache(config, 3, torch.float32, "meta", False, policy.notes())
        tokens, draws = torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
        model(tokens.expand(3, 7), cache=cache)
        for _ in range(3):
            cache.reserve(1)
            with tape.HostFree():
                policy.decay(cache)
                logits = model(tokens, cache=cache)[:, -1]
                tokens.copy_(sample(logits, draws, sampling)[:, None])


def round_of(policy, batch, monkeypatch):
    """Operations of a round, and how often the host read the device."""
    torch.manual_seed(0)
    cache, reads = batch_of(policy, [5] * batch), []
    feed(cache, 40)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(0) or x.numpy().tolist())
    with tape.Unwaited() as counted:
        policy.round(cache, [True] * batch)
    monkeypatch.undo()
    held = held_positions(cache)
    assert sum(len(row[0]) for row in held[0]) < 45 * batch or policy.budget is None
    return counted.operations, len(reads)


def test_a_round_waits_once_and_has_no_loop_over_sequences(monkeypatch, pruner):
    """It reads the device once; and a round of five sequences has as many operations as one of
    two."""
    few, many = (round_of(pruner, batch, monkeypatch) for batch in (2, 5))
    assert few == many
    assert few[1] <= 1
