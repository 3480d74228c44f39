"""From logits to tokens: against a slow sampler in float64; and `Sampling`, which checks itself."""

import dataclasses
import math

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import Letters, ids, tokens_of

from lethe_mini import Engine, Sampling, UserError
from lethe_mini.generation.sampling import NO_TOKEN, pick, sample
from lethe_mini.kernels import uniform

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def engine():
    return Engine(runs.model())


LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -math.inf])),
    min_size=1,
    max_size=13,
).filter(lambda row: max(row) > -math.inf)
MOST = 2**24 - 1
DRAWS = (st.integers(0, MOST) | st.sampled_from([0, 1, MOST])).map(lambda n: n / 2**24)


def kept_probabilities(row, temperature, top_k, top_p):
    """In float64: what top-k and then top-p leave of the distribution, best first, and whose it is.

    A token stays while those before it are below top-p of what top-k left.
    """
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or None]
    total, kept, before = sum(weights[i] for i in order), {}, 0.0
    for i in order:
        # At the very edge float32 may decide either way.
        if before < (top_p + 1e-5) * total and weights[i] > 0:
            kept[i] = weights[i]
        before += weights[i]
    return kept


@given(
    row=LOGITS,
    draw=DRAWS,
    temperature=st.sampled_from([1e-300, 1e-40, 0.1, 1.0, 3.0, 1e30]),
    top_k=st.sampled_from([0, 1, 2, 5, 10**30]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
)
def test_no_draw_picks_a_token_without_probability(row, draw, temperature, top_k, top_p):
    """Ties, -inf, any draw from 0 to just below 1, any temperature: what top-k and top-p left."""
    sampling = Sampling(temperature, top_k, top_p)
    token = pick(torch.tensor([row]), torch.tensor([draw]), sampling).item()
    kept = kept_probabilities(row, max(temperature, 1e-9), top_k, top_p)
    ties = {row[i] for i in kept}  # of equal tokens either may stay
    assert row[token] in ties
    assert row[token] > -math.inf


@given(row=st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=13, unique=True), draw=DRAWS)
def test_one_candidate_is_greedy(row, draw):
    """top_k 1, a tiny top_p, a tiny temperature and temperature 0 all take the best token."""
    logits, best, draw = torch.tensor([row]), row.index(max(row)), torch.tensor([draw])
    assert pick(logits, draw, Sampling(0.0, 0, 1.0)).item() == best
    assert pick(logits, draw, Sampling(1.0, 1, 1.0)).item() == best
    assert pick(logits, draw, Sampling(1.0, 0, 1e-9)).item() == best
    assert pick(logits, draw, Sampling(5.0, 10**30, 1e-300)).item() == best
    if max(row) - sorted(row)[-2] > 1e-20:
        assert pick(logits, draw, Sampling(1e-300, 0, 1.0)).item() == best


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7)]
)
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20,000 draws, far from its bound (p = 1e-6) if all is well."""
    row, count = [0.3, -1.1, 1.7, 0.9, -0.2, 2.3, 0.1], 20_000
    draws = torch.stack((torch.arange(count), torch.zeros(count, dtype=torch.long)))
    sampling = Sampling(temperature, top_k, top_p)
    tokens = sample(torch.tensor([row]).expand(count, -1), draws, sampling)
    seen = torch.bincount(tokens, minlength=7).tolist()
    kept = kept_probabilities(row, temperature, top_k, top_p)
    expected = [kept.get(i, 0) / sum(kept.values()) * count for i in range(7)]
    assert [n > 0 for n in seen] == [n > 0 for n in expected]
    chi = sum((n - e) ** 2 / e for n, e in zip(seen, expected, strict=True) if e)
    assert chi < 38.3  # the quantile for 6 degrees of freedom; fewer need less


@given(rows=st.lists(LOGITS, min_size=2, max_size=5), draws=st.lists(DRAWS, min_size=5, max_size=5))
def test_a_sequences_token_is_its_own(rows, draws):
    """Of a batch, each row gives what it gives alone."""
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows])
    for sampling in (Sampling(0.8), Sampling(0.8, 3, 0.9), Sampling()):
        together = pick(logits, torch.tensor(draws[: len(rows)]), sampling).tolist()
        alone = [
            pick(logits[i : i + 1], torch.tensor(draws[i : i + 1]), sampling).item()
            for i in range(len(rows))
        ]
        assert together == alone


ANY = st.lists(
    st.sampled_from([0.0, 1.5, -3.0, 3e38, NAN, INF, -INF]) | st.floats(width=32),
    min_size=5,
    max_size=5,
)


@given(rows=st.lists(ANY, min_size=1, max_size=7))
def test_a_row_that_is_not_numbers_has_no_token(rows):
    """NaN anywhere, +inf, or nothing but -inf: NO_TOKEN, however tokens are chosen; the other rows
    have theirs. -inf alone is a token that must not come."""
    draws = torch.stack((torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.long)))
    right = [not any(x != x or x == INF for x in row) and max(row) > -INF for row in rows]
    for sampling in (Sampling(), Sampling(0.7), Sampling(1.0, 3, 0.9), Sampling(1e-40, 0, 1e-9)):
        tokens = sample(torch.tensor(rows), draws.clone(), sampling).tolist()
        assert [token != NO_TOKEN for token in tokens] == right
        for row, token in zip(rows, tokens, strict=True):
            assert token == NO_TOKEN or row[token] > -INF


def splitmix(seed, count):
    """SplitMix64's output after `count` steps from `seed`, in plain integers."""
    x, mask = seed + count * 0x9E3779B97F4A7C15, (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x &= mask
        x = (x ^ (x >> shift)) * factor
    return x & mask


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
def test_a_draw_is_that_of_the_oracle(seed, count):
    """The 24 highest bits; of a seed that is a number or a tensor."""
    right = (splitmix(seed, count) >> 40) / 2**24
    for one in (seed, torch.tensor(seed)):
        assert uniform(one, torch.tensor(count)).item() == right


def test_draws_are_even():
    """Of one seed one after the other, and of one seed after another: 64 cells, chi-square."""
    numbers = torch.arange(100_000)
    for draws in (uniform(7, numbers), uniform(numbers, torch.tensor(3))):
        cells = torch.bincount((draws * 64).long(), minlength=64).double()
        assert ((cells - 1562.5) ** 2 / 1562.5).sum() < 130  # p = 1e-6 for 63 degrees
        assert abs(torch.corrcoef(torch.stack((draws[1:], draws[:-1])))[0, 1]) < 0.02


def test_seeds_reproduce_and_differ(engine):
    """The same seed writes the same text; another seed another; greedy knows no seed."""
    options = {"max_new_tokens": 29, "temperature": 1.0}
    texts = [tokens_of(engine.generate([ids(5)], seed=seed, **options))[0] for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3
    greedy = engine.generate([ids(5)], max_new_tokens=29)
    assert greedy.sequences == engine.generate([ids(5)], max_new_tokens=29, seed=7).sequences
    for one in ({"top_k": 1}, {"top_p": 1e-9}):
        assert tokens_of(engine.generate([ids(5)], **options, **one)) == tokens_of(greedy)


# --- the object


def refused(match, call):
    """The call raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


WRONG = [
    ({"temperature": -0.1}, "temperature should be .* not -0.1"),
    ({"temperature": NAN}, "temperature should be .* not nan"),
    ({"temperature": INF}, "temperature should be .* not inf"),
    ({"temperature": "0.7"}, "temperature should be a number, not '0.7'"),
    ({"temperature": None}, "temperature should be a number, not None"),
    ({"temperature": True}, "temperature should be a number, not True"),
    ({"top_p": 0.0}, "top-p should be .* not 0"),
    ({"top_p": -0.5}, "top-p should be .* not -0.5"),
    ({"top_p": 1.1}, "top-p should be .* not 1.1"),
    ({"top_p": NAN}, "top-p should be .* not nan"),
    ({"top_p": "all"}, "top_p should be a number, not 'all'"),
    ({"top_k": -1}, "top-k should be .* not -1"),
    ({"top_k": 2.5}, "top_k should be a .*number, not 2.5"),
    ({"top_k": None}, "top_k should be a .*number, not None"),
    ({"seed": 1.5}, "seed should be a .*number, not 1.5"),
    ({"seed": "one"}, "seed should be a .*number, not 'one'"),
]


@pytest.mark.parametrize(("fields", "match"), WRONG)
def test_sampling_checks_itself(engine, fields, match):
    """When it is made, and so when `generate` is given the same as plain keywords."""
    refused(match, lambda: Sampling(**fields))
    refused(match, lambda: engine.generate([ids(3)], **fields))


@given(
    temperature=st.floats(0, allow_nan=False, allow_infinity=False) | st.integers(0, 9),
    top_k=st.integers(0),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(),
)
def test_whatever_is_in_range_is_taken(temperature, top_k, top_p, seed):
    """And stays as it is: the object is frozen."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    assert dataclasses.astuple(sampling) == (temperature, top_k, top_p, seed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.seed = 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "seed": 5},
        {"temperature": 1, "top_k": 3},
        {"temperature": 0.9, "top_k": 11, "top_p": 0.8, "seed": 2},
    ],
)
def test_an_object_and_plain_keywords_say_the_same(engine, fields):
    """Tokens and the seed that the statistics tell are equal, for two samples of two prompts."""
    prompts = [ids(7), ids(3, 1)]
    plain = engine.generate(prompts, None, 23, num_samples=2, **fields)
    made = engine.generate(prompts, None, 23, Sampling(**fields), num_samples=2)
    named = engine.generate(prompts, None, 23, sampling=Sampling(**fields), num_samples=2)
    assert tokens_of(plain) == tokens_of(made) == tokens_of(named)
    assert plain.stats.seed == made.stats.seed == fields.get("seed", 0)


def test_sampling_is_greedy_where_nothing_is_said(engine):
    assert Sampling() == Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
    texts = [engine.generate([ids(7)], None, 23, one) for one in (None, Sampling())]
    assert (
        tokens_of(texts[0]) == tokens_of(texts[1]) == tokens_of(engine.generate([ids(7)], None, 23))
    )


OWN = {"temperature": 0.9, "top_p": 0.8, "top_k": 11}


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, Sampling(0.9, 11, 0.8)),
        ({"temperature": 1.3}, Sampling(1.3, 11, 0.8)),
        ({"top_k": 0, "seed": 4}, Sampling(0.9, 0, 0.8, 4)),
        ({"temperature": 0}, Sampling(0, 11, 0.8)),
        ({"sampling": Sampling()}, Sampling()),
        ({"sampling": Sampling(0.5)}, Sampling(0.5)),
    ],
)
def test_a_models_own_sampling_is_what_nobody_says_otherwise(engine, given, used):
    """Fields override it one by one, a Sampling whole; the statistics tell what was used."""
    own = Engine(engine.model, Letters())
    own.text.sampling = OWN
    result = own.generate([ids(7)], max_new_tokens=23, **given)
    assert result.stats.sampling == dataclasses.asdict(used)
    assert tokens_of(result) == tokens_of(engine.generate([ids(7)], None, 23, used))


def test_sampling_is_said_once(engine):
    """Either the object or plain keywords, even if both say the same; and no other object."""
    both = "give sampling=Sampling.* or temperature, seed, not both"
    sampling = Sampling(temperature=0.7)
    refused(both, lambda: engine.generate([ids(3)], sampling=sampling, temperature=0.7, seed=0))
    for wrong in (0.7, {"temperature": 0.7}, Sampling, "greedy"):
        refused(
            "sampling should be a Sampling", lambda w=wrong: engine.generate([ids(3)], sampling=w)
        )


def test_an_option_that_is_not_there_is_an_error(engine):
    """A misspelled keyword is never taken for one of sampling's and dropped."""
    with pytest.raises(TypeError, match="temprature"):
        engine.generate([ids(3)], temprature=0.7)
