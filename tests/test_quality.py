"""benchmarks/quality.py: reading in chunks equals the engine; intervals, pairing, resuming."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_all_policies import ALL, new_model, some_tokens

from lethe_mini.attention import received_mass
from lethe_mini.engine import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import reading

CLOSE = {"atol": 1e-5, "rtol": 1e-4}

# -- reading in chunks -----------------------------------------------------------------------------


def snapshot(cache):
    """Everything that a round leaves behind, copied."""
    layers = [
        {
            "lengths": list(layer.lengths),
            "thresholds": list(layer.thresholds),
            "positions": layer.positions.clone(),
            "scores": layer.scores.clone() if layer.scored else torch.zeros(0),
            "queries": torch.zeros(0) if layer.queries is None else layer.queries.clone(),
            "keys": layer.keys.clone(),
            "values": layer.values.clone(),
        }
        for layer in cache.layers
    ]
    return {"seen": cache.seen[0], "layers": layers}


def by_token(model, policy, prompt, new):
    """The engine's own way: the tokens it made (but the last, which is never read), the logits
    behind the prompt and behind each of them, and what each step left."""
    logits, left = [], []
    hook = model.register_forward_hook(lambda _, args, out: logits.append(out[0, -1]))
    engine = Engine(model)
    options = {"temperature": 1.0, "on_step": lambda cache: left.append(snapshot(cache))}
    result = engine.generate([prompt], policy, max_new_tokens=new + 1, **options)
    hook.remove()
    return result.sequences[0].token_ids[:-1], torch.stack(logits), left


class Recorded(reading.Reader):
    """Keeps what every round left."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = []

    def _round(self, prefilled):
        super()._round(prefilled)
        self.left.append(snapshot(self.cache))


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("prompt", "interval", "chunk", "parts"),
    [(7, 3, 128, (61,)), (5, 13, 128, (61,)), (11, 17, 5, (61,)), (7, 13, 128, (1, 19, 2, 39))],
    ids=["short-rounds", "long-rounds", "small-chunks", "in-parts"],
)
@torch.inference_mode()
def test_reading_in_chunks_is_the_engine(monkeypatch, policy, prompt, interval, chunk, parts):
    """Positions kept, scores, remembered queries, keys, values and logits are those of the engine,
    token by token: after every round, whatever ends a chunk, in how many calls the text is read."""
    monkeypatch.setattr(reading, "CHUNK", chunk)
    if policy.name != "full":
        policy = dataclasses.replace(policy, interval=interval)
    model, ids = new_model(), some_tokens(prompt, seed=3)
    new, right, left = by_token(model, policy, ids, sum(parts))
    reader = Recorded(Engine(model), policy, prompt)
    logits = [list(reader.read(ids, last_only=True))[-1]]
    for part in parts:
        logits += reader.read(new[:part])
        new = new[part:]
    torch.testing.assert_close(torch.cat(logits), right, **CLOSE)
    left = {one["seen"]: one for one in left}
    met = 0
    for one in [*reader.left, snapshot(reader.cache)]:
        if one["seen"] == prompt:  # the engine shows its steps, not its prefill
            continue
        met += 1
        for mine, its in zip(one["layers"], left[one["seen"]]["layers"], strict=True):
            assert mine["lengths"] == its["lengths"]
            assert mine["thresholds"] == its["thresholds"]
            assert torch.equal(mine["positions"], its["positions"])
            for name in ("scores", "queries", "keys", "values"):
                torch.testing.assert_close(mine[name], its[name], **CLOSE)
    assert met == 1 + sum(parts) // reader.interval
    if getattr(policy, "budget", None):
        assert reader.cache.held < 3 * (prompt + sum(parts))


@given(st.integers(1, 150), st.integers(0, 40), st.booleans(), st.integers(0, 2**32))
def test_weighted_mass_is_the_sum_of_weighted_queries(T, before, masked, seed):
    """Query by query, whichever way the mask is given and however queries fall into blocks."""
    rng = torch.Generator().manual_seed(seed)
    S = before + T
    q, k = torch.randn(1, 6, T, 5, generator=rng), torch.randn(1, 2, S, 5, generator=rng)
    weights = torch.rand(T, 1, generator=rng)
    mask = torch.ones(T, S).tril(before).bool()[None, None] if masked else None
    right = torch.zeros(1, 2, S)
    for t in range(T):
        seen = before + t + 1
        right[..., :seen] += weights[t] * received_mass(q[:, :, t : t + 1], k[:, :, :seen], None)
    torch.testing.assert_close(received_mass(q, k, mask, weights), right, atol=1e-5, rtol=1e-4)


def test_mass_is_plain_again_afterwards():
    """Also after an error: the package is not left changed."""
    plain = reading.attention.received_mass

    def fail():
        with reading.fading_mass(torch.ones(2, 1)):
            assert reading.attention.received_mass is not plain
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert reading.attention.received_mass is plain
