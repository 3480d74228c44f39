"""The hot path against loops in float64: attention, the mass each key received, RoPE's algebra.

Sequences B, key/value heads H_kv, groups G, queries T, slots S and head dimension D are drawn from
different numbers, so a swapped axis shows. Then, through the engine: the way a prompt is cut into
chunks changes nothing.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import model as random_model
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_mini import Engine, Lethe, LethePlus, kernels
from lethe_mini.attention import attend
from lethe_mini.cache import KVCache, Notes
from lethe_mini.kernels import received_mass
from lethe_mini.rope import rope_cos_sin, rotate

SHAPES = st.tuples(
    st.sampled_from([1, 2, 3]),  # B
    st.sampled_from([1, 2, 5]),  # H_kv
    st.sampled_from([1, 2, 3]),  # G
    st.sampled_from([2, 6, 14]),  # D
)
SEEDS = st.integers(0, 999)


@contextmanager
def mass_block(size):
    """So small a block that a handful of queries crosses its edges."""
    before, kernels.MASS_BLOCK = kernels.MASS_BLOCK, {"other": size}
    try:
        yield
    finally:
        kernels.MASS_BLOCK = before


def tensors(shape, T, S, seed, spread=1.0):
    """q: (B, H, T, D); k, v: (B, H_kv, S, D). A larger spread makes attention more concentrated."""
    torch.manual_seed(seed)
    B, H_kv, G, D = shape
    q = torch.randn(B, H_kv * G, T, D) * spread
    return q, torch.randn(B, H_kv, S, D), torch.randn(B, H_kv, S, D)


def oracle(q, k, v, mask, lag=0):
    """Attention and mass by loops over everything, in float64. lag: for causal masks."""
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    mass = torch.zeros(B, H_kv, S, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(B):
        for h in range(H):
            kv = h // (H // H_kv)
            for t in range(T):
                if mask is None:
                    seen = [s for s in range(S) if s <= t + S - T]
                else:
                    seen = [s for s in range(S) if mask[b % mask.shape[0], 0, t, s]]
                logits = [float(q[b, h, t] @ k[b, kv, s]) / math.sqrt(D) for s in seen]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                for s, weight in zip(seen, weights, strict=True):
                    out[b, h, t] += weight / sum(weights) * v[b, kv, s]
                    if s <= seen[-1] - lag:
                        mass[b, kv, s] += weight / sum(weights)
    return out, mass


def causal(lengths, T, S):
    """(B, 1, T, S): T queries that end each sequence, of which `lengths` slots are held."""
    last = torch.tensor(lengths)[:, None] - T + torch.arange(T)
    return (torch.arange(S) <= last[:, :, None])[:, None]


def masks(draw, B, T, kinds=("none", "ragged", "shared", "any")):
    """S and a mask of every kind that `attend` is given, or None."""
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return T + draw(st.integers(0, 19)), None
    if kind == "any":
        S = draw(st.integers(1, 19))
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=B * T * S, max_size=B * T * S)))
        mask = mask.view(B, 1, T, S)
        mask[..., draw(st.integers(0, S - 1))] = True  # a softmax over nothing is no attention
        return S, mask
    rows = B if kind == "ragged" else 1
    lengths = draw(st.lists(st.integers(T, T + 11), min_size=rows, max_size=rows))
    return max(lengths), causal(lengths, T, max(lengths))


# --- against the oracle


@given(data=st.data(), shape=SHAPES, T=st.integers(1, 11), seed=SEEDS)
def test_attend_equals_loops_in_float64(data, shape, T, seed):
    """Grouped heads, ragged lengths, any mask, one query or many; blocks of 3 queries."""
    S, mask = masks(data.draw, shape[0], T)
    q, k, v = tensors(shape, T, S, seed, spread=data.draw(st.sampled_from([0.1, 1.0, 10.0])))
    expected, expected_mass = oracle(q, k, v, mask)
    with mass_block(3):
        out, mass = attend(q, k, v, mask, want_mass=True)
    assert out.shape == q.shape
    assert mass.shape == k.shape[:3]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.double(), expected_mass, atol=1e-5, rtol=1e-5)


@given(data=st.data(), shape=SHAPES, T=st.integers(1, 11), lag=st.integers(0, 14), seed=SEEDS)
def test_with_a_lag_only_later_queries_count(data, shape, T, lag, seed):
    """Mass comes from queries at least `lag` slots behind the key; the output is as without."""
    S, mask = masks(data.draw, shape[0], T, ("none", "ragged", "shared"))
    q, k, v = tensors(shape, T, S, seed)
    _, expected = oracle(q, k, v, mask, lag)
    with mass_block(3):
        out, mass = attend(q, k, v, mask, want_mass=True, lag=lag)
        assert torch.equal(out, attend(q, k, v, mask)[0])
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=1e-5)


@given(data=st.data(), shape=SHAPES, T=st.integers(1, 11), seed=SEEDS)
def test_the_mass_of_a_sequence_adds_up(data, shape, T, seed):
    """Every row of a softmax sums to 1: H x T in all, T x G for each key/value head."""
    S, mask = masks(data.draw, shape[0], T)
    q, k, v = tensors(shape, T, S, seed)
    _, mass = attend(q, k, v, mask, want_mass=True)
    assert mass.dtype == torch.float32
    assert (mass >= 0).all()
    per_head = torch.full(mass.shape[:2], float(T * shape[2]))
    torch.testing.assert_close(mass.sum(-1), per_head, atol=1e-4, rtol=0)


@given(data=st.data(), shape=SHAPES, T=st.integers(1, 11), seed=SEEDS)
def test_a_hidden_key_weighs_nothing(data, shape, T, seed):
    """Whatever stands where no query may look, output and mass are the same, bit by bit."""
    S, mask = masks(data.draw, shape[0], T)
    if mask is None:
        return
    q, k, v = tensors(shape, T, S, seed)
    hidden = ~mask.any(2)[:, 0].expand(shape[0], S)
    other_k, other_v = (x.masked_fill(hidden[:, None, :, None], 7.0) for x in (k, v))
    out, mass = attend(q, k, v, mask, want_mass=True)
    other, other_mass = attend(q, other_k, other_v, mask, want_mass=True)
    assert torch.equal(out, other)
    assert torch.equal(mass, other_mass)
    assert not mass[hidden[:, None].expand_as(mass)].any()


@given(data=st.data(), shape=SHAPES, T=st.integers(1, 11), seed=SEEDS)
def test_the_output_does_not_depend_on_who_keeps_scores(data, shape, T, seed):
    """With or without mass: bit-equal, in every dtype."""
    S, mask = masks(data.draw, shape[0], T)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    q, k, v = (x.to(dtype) for x in tensors(shape, T, S, seed))
    out, mass = attend(q, k, v, mask, want_mass=True)
    alone, none = attend(q, k, v, mask)
    assert torch.equal(out, alone)
    assert out.dtype == dtype
    assert mass.dtype == torch.float32
    assert none is None


@given(shape=SHAPES, T=st.integers(2, 23), block=st.integers(1, 29), seed=SEEDS)
def test_the_block_changes_no_mass(shape, T, block, seed):
    """Any block gives one block's mass, with the causal mask written out or left out."""
    q, k, _ = tensors(shape, T, T, seed)
    whole = received_mass(q, k, None)
    with mass_block(block):
        for mask in (None, causal([T], T, T)):
            torch.testing.assert_close(received_mass(q, k, mask), whole, atol=1e-5, rtol=1e-5)


def test_scores_sum_in_float32_in_half_precision():
    """4,099 queries in bfloat16: added up there, the mass would stall at 256."""
    q, k, v = (x.to(torch.bfloat16) for x in tensors((1, 1, 1, 2), 4099, 4099, seed=0))
    _, mass = attend(q, k, v, None, want_mass=True)
    assert abs(mass.sum().item() - 4099) < 1


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation made or looked at."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.largest = max([self.largest, *(x.numel() for x in made if torch.is_tensor(x))])
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_the_memory_of_the_mass_is_linear_in_the_prompt(masked):
    """No tensor above H x block x S: twice the prompt, twice the memory, not four times."""
    largest = []
    for T in (509, 1018):
        q, k, _ = tensors((1, 2, 3, 14), T, T, seed=0)
        mask = causal([T], T, T) if masked else None
        with Sizes() as sizes:
            received_mass(q, k, mask)
        assert sizes.largest <= 6 * kernels.MASS_BLOCK["other"] * T
        largest.append(sizes.largest)
    assert largest[1] <= 2.01 * largest[0]


# --- RoPE


@given(
    D=st.sampled_from([2, 6, 14]),
    positions=st.lists(st.integers(0, 40_000), min_size=1),
    seed=SEEDS,
)
def test_a_turn_keeps_every_pairs_length(D, positions, seed):
    """Rotation: the pairs (x[i], x[i + D/2]) keep their norms, at any position."""
    torch.manual_seed(seed)
    x = torch.randn(3, len(positions), D)
    turned = rotate(x, *rope_cos_sin(torch.tensor(positions), frequencies(D, torch.float32)))
    before, after = (y.unflatten(-1, (2, D // 2)).norm(dim=-2) for y in (x, turned))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@given(D=st.sampled_from([2, 6, 14]), a=st.integers(0, 40_000), b=st.integers(-40_000, 40_000))
def test_turning_twice_is_turning_by_the_sum(D, a, b):
    """By a, then by b, is by a + b, backwards too: what compact mode does to keys, in float64."""
    torch.manual_seed(0)
    x, freq = torch.randn(3, 5, D), frequencies(D, torch.float64)

    def turned(y, by):
        return rotate(y, *rope_cos_sin(torch.tensor(by), freq))

    torch.testing.assert_close(turned(turned(x, a), b), turned(x, a + b), atol=1e-5, rtol=0)


@given(D=st.sampled_from([2, 6, 14]), seed=SEEDS)
def test_position_zero_is_the_identity(D, seed):
    """The first token is not turned, to the bit, in every dtype."""
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, D).to(dtype)
        assert torch.equal(rotate(x, *rope_cos_sin(torch.tensor(0), frequencies(D))), x)


@given(q_at=st.integers(0, 4000), k_at=st.integers(0, 4000), shift=st.integers(0, 4000))
def test_a_product_depends_on_the_distance_alone(q_at, k_at, shift):
    """<R(m) q, R(n) k> is a function of m - n."""
    torch.manual_seed(0)
    q, k, freq = torch.randn(14), torch.randn(14), frequencies(14, torch.float64)

    def product(m, n):
        return rotate(q, *rope_cos_sin(torch.tensor(m), freq)) @ rotate(
            k, *rope_cos_sin(torch.tensor(n), freq)
        )

    torch.testing.assert_close(
        product(q_at + shift, k_at + shift), product(q_at, k_at), atol=1e-5, rtol=0
    )


def frequencies(D, dtype=torch.float32):
    return 1.0 / 10_000.0 ** (torch.arange(0, D, 2, dtype=dtype) / D)


# --- a prompt in chunks


def tiny():
    """A random model with groups of 3."""
    return random_model(spread=1.0, vocab_size=67)


def prefilled(model, prompt, chunk):
    """A scored cache that has read the prompt in chunks."""
    cache = KVCache(model.config, notes=Notes(scored=True))
    for part in torch.tensor([prompt]).split(chunk, dim=1):
        model(part, cache=cache)
    return cache


PRUNERS = {
    "lethe": Lethe(budget=11, breakpoint="none", protect_prompt=False),
    "plus": LethePlus(budget=11, protect_prompt=False),
    "layer": LethePlus(budget=11, protect_prompt=False, per_head=False),
    "norm": LethePlus(budget=11, protect_prompt=False, value_norm=True),
    "share": LethePlus(budget=0.4, evict_threshold=13, protect_prompt=False),
    "no-budget": Lethe(
        budget=None, evict_threshold=13, breakpoint="segment", tau=2.0, protect_prompt=False
    ),
}


@given(
    length=st.integers(13, 97),
    chunk=st.integers(1, 101),
    block=st.sampled_from([1, 3, 64]),
    policy=st.sampled_from([*PRUNERS.values()]),
    seed=SEEDS,
)
def test_the_chunk_changes_neither_scores_nor_what_is_kept(length, chunk, block, policy, seed):
    """One prefill is one update of the scores, however it is cut."""
    torch.manual_seed(seed)
    model = tiny()
    prompt = torch.randint(67, (length,)).tolist()
    whole = prefilled(model, prompt, length)
    with mass_block(block):
        cut = prefilled(model, prompt, chunk)
    for one, other in zip(whole.layers, cut.layers, strict=True):
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-5)
        total = one.scores.sum((1, 2))
        torch.testing.assert_close(total, torch.full_like(total, 6 * length), rtol=1e-5, atol=0)
    for cache in (whole, cut):
        policy.round(cache, [True])
    if policy.budget is not None:
        assert cut.held == 3 * policy.limit(0, length)
    for one, other in zip(whole.layers, cut.layers, strict=True):
        assert torch.equal(one.positions, other.positions)


@pytest.mark.parametrize("name", ["full", *PRUNERS])
def test_the_chunk_changes_no_text(name):
    """Greedy tokens and statistics are those of a prompt read at once."""
    engine, policy = Engine(tiny()), PRUNERS.get(name)
    prompt = torch.randint(67, (83,)).tolist()
    results = [
        engine.generate([prompt], policy, max_new_tokens=41, prefill_chunk=chunk)
        for chunk in (83, 1, 2, 29, 64, 82, 4096)
    ]
    for result in results[1:]:
        assert result.sequences == results[0].sequences
        assert result.stats.kv_tokens_final == results[0].stats.kv_tokens_final
        assert result.stats.evicted_tokens == results[0].stats.evicted_tokens
