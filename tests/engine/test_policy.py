"""The policies' pure functions against slow oracles: Hoyer, breakpoints, budgets, choices, RASR.

Scores are drawn as multiples of 1/8 where ties and exact ratios matter, so that float32 has them
exactly and a comparison that comes out differently is a fault, not a rounding.
"""

import copy
import dataclasses
import math
import statistics
from itertools import pairwise
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_mini.attention import attend, received_mass
from lethe_mini.cache import KVCache, Notes
from lethe_mini.checkpoint.rope import inverse_frequencies
from lethe_mini.errors import UserError
from lethe_mini.options import split_budget
from lethe_mini.policies import H2O, POLICIES, RKV, TOVA, LethePlus, PyramidKV, Recall, SnapKV
from lethe_mini.policies.lethe_plus import repeats
from lethe_mini.policies.pyramidkv import pyramid
from lethe_mini.policies.rkv import redundancy
from lethe_mini.policy import Lethe, Pruner, choose, find_breakpoint, hoyer, rank
from lethe_mini.rope import rope_cos_sin, rotate

PRUNERS = [policy for policy in POLICIES.values() if issubclass(policy, Pruner)]
FEW = settings(max_examples=max(5, settings.default.max_examples // 5))
masses = st.floats(0, 2**20, width=32)
eighths = st.integers(0, 60).map(lambda i: i / 8)
seeds = st.integers(0, 2**32)
WEIGHTS = st.floats(1e-3, 1e3) | st.just(0.0) | st.sampled_from([1.0, 2.0])


def cache_of(layers=1, batch=1, heads=3, width=4, group=2, dtype=None, notes=None, **noted):
    """noted: what the cache notes, as in Notes; or give these themselves."""
    sizes = {"num_attention_heads": heads * group, "num_key_value_heads": heads}
    sizes |= {"num_hidden_layers": layers, "head_dim": width}
    sizes["inv_freq"] = inverse_frequencies("default", 10000.0, width, {})
    notes = notes or Notes(**noted)
    return KVCache(SimpleNamespace(**sizes), batch=batch, dtype=dtype, notes=notes)


def feed(cache, T, group=2):
    """T tokens of noise for every sequence, skewed masses and queries included."""
    B, heads, _, width = cache.layers[0].store["keys"].shape
    noise = torch.randn(len(cache.layers), 3, B, heads * group, T, width)
    tiny.put(cache, [(k[:, :heads], v[:, :heads]) for k, v, _ in noise])
    for layer, (_, _, q) in zip(cache.layers, noise, strict=True):
        mass = None
        if layer.notes.scored:
            mass = torch.rand(B, heads, layer.length) ** 6 * layer.valid()
        tiny.observe(layer, q, mass)
    return cache


def hoyer_of(values):
    return hoyer(torch.tensor([values]), torch.tensor([len(values)])).item()


# -- Hoyer ---------------------------------------------------------------------------------------


@given(st.lists(masses, min_size=1, max_size=200))
def test_hoyer_is_the_formula_and_lies_between_0_and_1(values):
    """Eq. 1, with one token or no mass at all defined as uniform."""
    assert 0 <= hoyer_of(values) <= 1
    assert hoyer_of(values) == pytest.approx(oracles.hoyer(values), abs=1e-5)


@given(st.integers(2, 3000), st.floats(1e-6, 1e6), st.data())
def test_hoyer_of_uniform_is_0_and_of_one_hot_is_1(n, value, data):
    """The two ends of the scale, wherever the one stands and whatever the unit."""
    assert hoyer_of([value] * n) == pytest.approx(0, abs=1e-5)
    hot = [0.0] * n
    hot[data.draw(st.integers(0, n - 1))] = value
    assert hoyer_of(hot) == pytest.approx(1, abs=1e-5)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=99), st.integers(-60, 60), seeds)
def test_hoyer_forgets_scale_and_order(values, power, seed):
    """Scores of any magnitude (decay makes them tiny) in any order are as concentrated."""
    assume(all(value == 0 or value > 1e-9 for value in values))
    x = torch.tensor([values])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([len(values)])
    changed = hoyer(x[:, order] * 2.0**power, lengths)
    torch.testing.assert_close(changed, hoyer(x, lengths), atol=1e-5, rtol=0)


@given(st.lists(st.lists(masses, min_size=0, max_size=40), min_size=1, max_size=5))
def test_hoyer_of_a_ragged_batch_is_that_of_each_alone(rows):
    """What lies beyond a sequence's length does not count, even if it is not zero."""
    widest = max(len(row) for row in rows) + 1
    padded = torch.tensor([row + [7.0] * (widest - len(row)) for row in rows])
    together = hoyer(padded, torch.tensor([len(row) for row in rows])).tolist()
    alone = [hoyer_of(row) if row else 0 for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)


# -- the breakpoint ------------------------------------------------------------------------------


def breakpoints_of(curves, *options):
    """The breakpoint of each curve; None where it has none. Beyond a curve lies anything."""
    lengths = [len(curve) for curve in curves]
    ranked = torch.tensor([curve + [7.0] * (max(lengths) + 1 - len(curve)) for curve in curves])
    found = find_breakpoint(ranked, torch.tensor(lengths), *options).tolist()
    return [None if cut == n else cut for cut, n in zip(found, lengths, strict=True)]


@settings(max_examples=5 * settings.default.max_examples)
@given(
    st.lists(st.lists(eighths | st.just(0.0), min_size=1, max_size=70), min_size=1, max_size=3),
    st.integers(2, 19),
    st.sampled_from([1.0, 1.25, 2.0, 4.0, 400.0]),
    st.sampled_from(["global", "segment"]),
)
def test_breakpoints_are_those_of_the_oracle(scores, segments, tau, kind):
    """Both readings of Algorithm 1; ties, zeros and short curves, several at once."""
    curves = [sorted(curve, reverse=True) for curve in scores]
    found = breakpoints_of(curves, segments, tau, kind)
    assert found == [oracles.breakpoint(curve, segments, tau, kind) for curve in curves]
    assert all(cut is None or cut > 0 for cut in found)


@given(st.integers(1, 100), st.integers(2, 20), st.sampled_from(["global", "segment"]))
def test_flat_curves_have_no_breakpoint(n, segments, kind):
    """Spread-out attention: nothing stands out, nothing is dropped."""
    for value in (0.0, 3.0):
        assert breakpoints_of([[value] * n], segments, 2.0, kind) == [None]


# -- budgets -------------------------------------------------------------------------------------


@st.composite
def divisions(draw, weights=WEIGHTS, unique=False):
    """total, weights, floors, holds, of 1 to 128 layers; the total need not fit."""
    layers = draw(st.integers(1, 128))
    some = {"min_size": layers, "max_size": layers}
    floors = draw(
        st.lists(st.integers(0, 20), **some) | st.just([draw(st.integers(0, 9))] * layers)
    )
    holds = draw(st.lists(st.integers(0, 60), **some) | st.just([10**6] * layers))
    total = draw(st.integers(0, 90 * layers))
    return total, draw(st.lists(weights, unique=unique, **some)), floors, holds


def split(total, *layers):
    """The parts of one total, as a list."""
    rows = (torch.tensor([of]) for of in layers)
    return split_budget(torch.tensor([total]), *rows)[0].tolist()


@given(divisions())
def test_budgets_add_up_exactly_and_respect_floors_and_holds(division):
    """From the floors upwards all of it is given out, for one layer as for 128."""
    total, _, floors, holds = division
    parts = split(*division)
    least = [min(floor, hold) for floor, hold in zip(floors, holds, strict=True)]
    assert all(a <= part <= b for a, part, b in zip(least, parts, holds, strict=True))
    assert sum(parts) == min(max(total, sum(least)), sum(holds))


@given(divisions())
def test_budgets_are_those_of_the_oracle(division):
    """Water-filling solved exactly, then the largest remainders."""
    assert oracles.is_largest_remainder(split(*division), oracles.fair_shares(*division))


@given(divisions(unique=True), seeds)
def test_permuted_layers_have_permuted_budgets(division, seed):
    """No layer is better for its place; only of equal remainders the first layer's goes up."""
    total, *layers = division
    order = torch.randperm(len(layers[0]), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = split(total, *([of[i] for i in order] for of in layers))
    parts, shares = split(*division), oracles.fair_shares(*division)
    assert oracles.is_largest_remainder(moved, [shares[i] for i in order])
    if all(b - a > 1e-2 for a, b in pairwise(sorted(x % 1 for x in shares if x % 1))):
        assert moved == [parts[i] for i in order]


@given(divisions(), st.integers(-40, 40))
def test_the_unit_of_the_weights_changes_nothing(division, power):
    """Only their proportions count."""
    total, weights, *bounds = division
    scaled = [weight * 2.0**power for weight in weights]
    assert split(total, scaled, *bounds) == split(total, weights, *bounds)


@given(divisions(weights=st.just(0.0)))
def test_weights_that_are_all_zero_divide_evenly(division):
    """No mass anywhere (or only one-hot layers) is no reason to fail."""
    total, weights, floors, holds = division
    assert split(*division) == split(total, [1.0] * len(weights), floors, holds)


@given(st.data())
def test_budgets_of_several_sequences_are_those_of_each_alone(data):
    """A neighbour changes no part."""
    one = data.draw(divisions())
    total = data.draw(st.integers(0, 9999))
    more = [data.draw(st.permutations(of)) for of in one[1:]]
    rows = (torch.tensor(pair) for pair in zip(one, [total, *more], strict=True))
    assert split_budget(*rows).tolist() == [split(*one), split(total, *more)]


@given(st.integers(1, 128), st.floats(1, 100))
def test_a_pyramid_falls_linearly_and_has_mean_1(layers, beta):
    """Equal steps from the first layer to the last, which has 1 / beta of the mean."""
    weights = pyramid(layers, beta).tolist()
    if layers > 1:
        steps = [a - b for a, b in pairwise(weights)]
        assert steps == pytest.approx([steps[0]] * (layers - 1), abs=1e-9)
        assert steps[0] >= -1e-12
        assert math.fsum(weights) / layers == pytest.approx(1)
        assert weights[-1] == pytest.approx(1 / beta)


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 128])
@pytest.mark.parametrize("name", ["hoyer", "inverse_hoyer", "uniform", "pyramid", "pyramidkv"])
@FEW
@given(spare=st.integers(0, 40), held=st.integers(2, 90), seed=seeds)
def test_every_allocation_gives_out_the_whole_budget(name, layers, spare, held, seed):
    """Per sequence: the layers' shares add up to budget x L, or to what they hold."""
    torch.manual_seed(seed)
    cache = feed(cache_of(layers=layers, batch=2, scored=True), held)
    budget = 2 + 3 + spare  # two sinks, a window of three, and more
    if name == "pyramidkv":
        policy = PyramidKV(budget=budget, sinks=2, window=3)
    else:
        policy = LethePlus(budget=budget, sinks=2, allocation=name)
    sparsity = policy.sparsity(cache) if policy.scored else None
    shares = policy.shares(cache, [0, 1], sparsity).tolist()
    floor = min(held, policy.sinks + policy.min_recent)
    for row in range(2):
        mine = [share[row] for share in shares]
        assert sum(mine) == min(budget, held) * layers
        assert all(floor <= share <= held for share in mine)


def weights_of(policy, cache):
    return policy.weights(cache, policy.sparsity(cache))


@pytest.mark.parametrize("name", ["hoyer", "inverse_hoyer"])
@FEW
@given(even=st.floats(0, 1), seed=seeds)
def test_an_even_share_is_every_layers_and_the_rest_is_hoyers(name, even, seed):
    """All of it is the uniform division, none of it the paper's; the sum stays."""
    torch.manual_seed(seed)
    cache = feed(cache_of(layers=5, batch=2, scored=True), 30)
    ours, papers, alike = (
        weights_of(LethePlus(budget=9, allocation=name, even_share=part), cache)
        for part in (even, 0.0, 1.0)
    )
    mean = papers.mean(1, keepdim=True)  # "papers" but for the cap
    assert (ours >= even * mean - 1e-6).all()
    torch.testing.assert_close(alike, mean.expand_as(alike))
    torch.testing.assert_close(ours, even * mean + (1 - even) * papers)


@pytest.mark.parametrize("name", ["hoyer", "inverse_hoyer"])
@FEW
@given(cap=st.floats(1, 4), layers=st.integers(1, 9), seed=seeds)
def test_no_layer_counts_more_than_the_cap_of_the_median_one(name, cap, layers, seed):
    """Per sequence; those below count as they would without a cap."""
    torch.manual_seed(seed)
    cache = feed(cache_of(layers=layers, batch=2, scored=True), 30)
    free, ours = (
        weights_of(LethePlus(budget=9, allocation=name, even_share=0.0, cap=limit), cache).tolist()
        for limit in (0.0, cap)
    )
    for before, after in zip(free, ours, strict=True):
        most = cap * statistics.median(before)
        assert after == pytest.approx([min(weight, most) for weight in before], rel=1e-5)


# -- choices -------------------------------------------------------------------------------------


@st.composite
def curves(draw, heads=None):
    """scores [head][slot]."""
    n, heads = draw(st.integers(1, 23)), heads or draw(st.integers(1, 3))
    score = st.integers(-8, 8).map(float) | st.sampled_from([math.nan, math.inf, -math.inf])
    row = st.lists(score, min_size=n, max_size=n)
    return draw(st.lists(row, min_size=heads, max_size=heads))


@settings(max_examples=5 * settings.default.max_examples)
@given(curves())
def test_rank_puts_the_best_first_and_of_equals_the_newer(scores):
    n = len(scores[0])
    ranked = rank(torch.tensor(scores), torch.ones(n, dtype=torch.bool)).tolist()
    for row, order in zip(scores, ranked, strict=True):
        # Infinities are the greatest numbers, and NaN no better than the least.
        row = [min(max(score, -3e38), 3e38) if score == score else -3e38 for score in row]
        assert sorted(order) == list(range(n))
        for first in range(n + 1):
            assert set(order[:first]) == oracles.best(row, first, list(range(n)))


@settings(max_examples=5 * settings.default.max_examples)
@given(
    st.lists(st.tuples(curves(heads=2), *[st.integers(1, 25)] * 2), min_size=1, max_size=3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_choice_is_the_oracles(sequences, all_stand_out, chance):
    """As many in every head, whatever the heads hold, at any counts, ties and NaN included; of
    several sequences at once, and whatever lies beyond the length of each."""
    most = max(len(scores[0]) for scores, _, _ in sequences) + 1
    stays, scored, right = [], [], []
    for scores, salient, share in sequences:
        n = len(scores[0])
        always = [{slot for slot in range(n) if chance.random() < 0.3} for _ in scores]
        salient = n if all_stand_out else salient
        kept = oracles.prune(scores, always, share, min(salient, n))
        right.append(([set(head) for head in kept], len(kept[0])))
        beyond = [chance.choice([math.nan, math.inf, 0.0]) for _ in range(most - n)]
        scored.append([head + beyond for head in scores])
        stays.append([[slot in stay or slot >= n for slot in range(most)] for stay in always])
    _, salient, share = zip(*sequences, strict=True)
    lengths = torch.tensor([len(scores[0]) for scores, _, _ in sequences])
    valid = torch.arange(most) < lengths[:, None, None]
    salient = lengths if all_stand_out else torch.tensor(salient).minimum(lengths)
    found = choose(torch.tensor(scored), torch.tensor(stays), valid, salient, torch.tensor(share))
    for row, (mask, n) in enumerate(zip(*found, strict=True)):
        kept = [set(head.nonzero()[:, 0].tolist()) for head in mask]
        assert (kept, int(n)) == right[row]


@FEW
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 320)), min_size=1, max_size=3),
    st.integers(1, 3),
    seeds,
)
def test_repeats_is_the_oracles(sequences, heads, seed):
    """The best cosine with a newer key, per sequence and head, whatever the blocks it is computed
    in, the neighbours and what lies beyond the length."""
    torch.manual_seed(seed)
    lengths, near = torch.tensor(sequences).T
    keys = torch.randn(len(lengths), heads, max(lengths), 4) + torch.randn(
        len(lengths), heads, 1, 4
    )
    for row, n in enumerate(lengths.tolist()):
        keys[row, :, n:] = 0
    found = repeats(keys, lengths, near, int((lengths - near).min()))
    for row, (n, reach) in enumerate(sequences):
        right = [oracles.repeats(head[:n], reach) for head in keys[row].tolist()]
        torch.testing.assert_close(found[row, :, :n], torch.tensor(right), atol=1e-5, rtol=0)


def test_products_of_rounds_come_in_few_shapes():
    """PyTorch keeps code for every shape of a 16-bit product on a CPU: with one for every length, a
    text of 12,000 tokens took 800 MB more than its cache."""
    shapes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                shapes.add(tuple(tuple(x.shape) for x in args))
            return function(*args, **(kwargs or {}))

    policy = LethePlus(budget=8, interval=1)
    cache = cache_of(batch=2, notes=policy.notes())
    for n in range(1, 500, 7):
        feed(cache, 7 if n > 1 else 1)
        with Products():
            rooms = torch.tensor([n, 1 + n // 3])
            policy.always(cache.layers[0], torch.arange(2), torch.zeros(2, dtype=int), rooms)
    assert 1 <= len(shapes) <= 8  # 64, 128, .. 512 columns


def test_a_repeated_token_makes_room_for_one_that_nothing_repeats():
    """All scores alike: of the older half, which two contents share, the newest distinct ones stay
    in place of repeated ones that are newer."""
    cache = cache_of(width=16, heads=1)
    layer, contents = cache.layers[0], torch.eye(16)
    words = [0, 5, 1, 6, 1, 2, 1, 2, 1, 2, 3, 1, 2, 3]
    positions = torch.arange(len(words))[None]
    keys = contents[words][None, None]
    turned = rotate(keys, *rope_cos_sin(positions[:, None], layer.inv_freq))
    tiny.put(cache, [(turned, turned)])
    options = {"budget": 7, "sinks": 1, "interval": 12, "recent_ratio": 0.5, "lag": 0}
    for ratio, kept in ((0.0, {8, 9, 10}), (0.4, {3, 9, 10}), (0.7, {1, 3, 10})):
        twin = copy.deepcopy(cache)
        for one in twin.layers:
            one.store["scores"] = torch.zeros(1, 1, one.capacity)
        LethePlus(distinct_ratio=ratio, **options).round(twin, [True])
        assert set(twin.layers[0].positions[0, 0].tolist()) == {0, 11, 12, 13} | kept


def kept_sets(policy, seed, held):
    """Per head, the positions that one round leaves of a seeded cache of one layer."""
    torch.manual_seed(seed)
    cache = feed(cache_of(scored=True, window=5), held)
    policy.round(cache, [True])
    return [set(row) for row in cache.layers[0].positions[0].tolist()]


# Not Recall: a larger budget has more places for marks, which comes before what beacons want.
NESTED = [(policy, "none") for policy in PRUNERS if policy is not Recall]
NESTED += [(policy, kind) for policy in (Lethe, LethePlus) for kind in ("global", "segment")]


@pytest.mark.parametrize(("policy", "kind"), NESTED, ids=lambda x: getattr(x, "name", x))
@FEW
@given(held=st.integers(12, 60), ratio=st.floats(0, 1), seed=seeds)
def test_a_larger_budget_keeps_all_that_a_smaller_one_kept(policy, kind, held, ratio, seed):
    """Nested sets, for the same scores: no token is lost because there is more room."""
    more = {"breakpoint": kind, "tau": 4.0} if issubclass(policy, Lethe) else {}
    if kind != "none" and policy is LethePlus:
        more["per_head"] = False  # heads in which less stands out are filled up to the fullest
    more |= {"window": 5} if issubclass(policy, SnapKV) else {}
    smaller = [set()] * 3
    for budget in range(8, held + 2):
        one = policy(budget=budget, sinks=2, recent_ratio=ratio, **more)
        kept = kept_sets(one, seed, held)
        assert all(a <= b for a, b in zip(smaller, kept, strict=True))
        smaller = kept
    if kind == "none":
        assert smaller == [set(range(held))] * 3


def test_protection_is_by_position_however_few_tokens_are_left():
    """A prompt that another policy has thinned: what is left of it stays, though it is short."""
    cache = feed(cache_of(scored=True), 9)
    cache.prompt, layer = [9], cache.layers[0]
    layer.evict([0], *tiny.mask_of([[[3, 4, 6, 8]]]))
    layer.scores.copy_(torch.tensor([8.0, 1, 1, 1]))
    Lethe(budget=2, tau=1.5).round(cache, [True])
    assert layer.positions.tolist() == [[[3, 4, 6, 8]] * 3]


def test_a_policy_may_follow_another_that_protected_less():
    """Heads may then hold more or fewer protected tokens, yet all keep these and the newest, in
    the order of the text."""
    cache = feed(cache_of(scored=True), 40)
    H2O(budget=20, protect_prompt=False).round(cache, [True])
    layer = cache.layers[0]
    sinks = [[p for p in head if p < 4] for head in layer.positions[0].tolist()]
    LethePlus(budget=10, protect_prompt=False).round(cache, [True])
    assert layer.lengths == [10]
    assert len({len(held) for held in sinks}) > 1
    for head, held in zip(layer.positions[0].tolist(), sinks, strict=True):
        assert head == sorted(set(head))
        assert set(held) | {39} <= set(head)


# -- scores over time ----------------------------------------------------------------------------


@given(
    st.lists(st.lists(eighths, min_size=3, max_size=3), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_rasr_is_the_decayed_sum_of_what_each_token_received(steps, gamma):
    """Eq. 5 per key: any gamma equals the oracle, 0 the last step alone, 1 the plain sum."""

    def run(gamma):
        cache = cache_of(heads=1, scored=True)
        layer = cache.layers[0]
        tiny.put(cache, [torch.ones(2, 1, 1, 3, 4)])
        for mass in steps:
            Lethe(gamma=gamma).decay(cache)
            tiny.observe(layer, None, torch.tensor([[mass]]))
        return layer.scores[0, 0].tolist()

    columns = list(zip(*steps, strict=True))
    assert run(0.0) == list(steps[-1])
    assert run(1.0) == [math.fsum(column) for column in columns]
    right = [oracles.rasr(column, gamma) for column in columns]
    assert run(gamma) == pytest.approx(right, rel=1e-5, abs=1e-30)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), st.integers(1, 70), seeds)
def test_the_mass_of_a_step_adds_up_to_the_queries(B, kv_heads, group, T, seed):
    """Rows of a softmax sum to 1: B x H x T in all, from T queries at once or from one."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, kv_heads * group, T, 6) * 3, torch.randn(B, kv_heads, T, 6)
    for mass, queries in (
        (received_mass(q, k, None), T),
        (attend(q[:, :, -1:], k, k, None, want_mass=True)[1], 1),
    ):
        assert mass.dtype == torch.float32
        assert mass.sum().item() == pytest.approx(B * kv_heads * group * queries, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1.0, 0.98, 0.0])
def test_scores_outlast_a_narrow_cache(dtype, gamma):
    """32,000 steps in a half-precision cache: scores are float32, finite, and still exact."""
    cache, policy = cache_of(batch=2, dtype=dtype, scored=True), Lethe(gamma=gamma)
    layer = cache.layers[0]
    tiny.put(cache, [torch.ones(2, 2, 3, 5, 4, dtype=dtype)])
    mass = torch.tensor([6.0, 0, 1, 2, 2**-14]).expand(2, 3, 5)
    for _ in range(32_000):
        policy.decay(cache)
        tiny.observe(layer, None, mass)
    assert layer.keys.dtype == dtype
    assert layer.scores.dtype == torch.float32
    total = 32_000 if gamma == 1 else 1 / (1 - gamma)
    torch.testing.assert_close(layer.scores, mass * total, rtol=1e-4, atol=0)


# -- the other policies' scores ------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [TOVA(), SnapKV(kernel=3), SnapKV(kernel=5), RKV(lam=0.3)], ids=repr
)
@FEW
@given(prompts=st.lists(st.integers(1, 13), min_size=1, max_size=3), seed=seeds)
def test_importance_is_that_of_the_oracle(policy, prompts, seed):
    """TOVA, SnapKV and R-KV in a ragged batch, sequences shorter than the window included."""
    torch.manual_seed(seed)
    caches = [feed(cache_of(window=5), prompt) for prompt in prompts]
    cache = caches[0]
    for other in caches[1:]:
        cache.join(other)
    feed(cache, 1)
    layer = cache.layers[0]
    seen = [[range(max(0, n + 1 - 5), n + 1)] for n in prompts]
    importance = policy.importance(layer, cache).expand(-1, 3, -1)
    for row, n in enumerate(prompts):
        times = list(seen[row][0])
        keys = layer.keys[row, :, : n + 1].tolist()
        queries = layer.queries[row, :, -len(times) :].tolist()
        groups = [queries[2 * head : 2 * head + 2] for head in range(3)]
        masks = [[slot <= time for slot in range(n + 1)] for time in times]
        for head, (group, mine) in enumerate(zip(groups, keys, strict=True)):
            if isinstance(policy, RKV):
                right = oracles.rkv(group, mine, masks, policy.kernel, policy.lam)
            elif isinstance(policy, SnapKV):
                right = oracles.snapkv(group, mine, masks, policy.kernel)
            else:
                last = [[query[-1] for query in each] for each in groups]
                right = oracles.tova(last, keys, [masks[-1]] * 3)
            got = importance[row, head, : n + 1].tolist()
            assert got == pytest.approx(right, abs=2e-5)


@given(st.integers(1, 40), st.integers(1, 9), seeds)
def test_redundancy_is_that_of_the_oracle_whatever_the_block(n, block, seed):
    """Blocks of rows bound the memory and change no result; slots beyond the length weigh 0."""
    torch.manual_seed(seed)
    keys = torch.randn(1, 2, n + 3, 4)
    valid = (torch.arange(n + 3) < n)[None, None]
    got = redundancy(keys, valid, block=block)
    assert got[:, :, n:].count_nonzero() == 0
    for head in range(2):
        right = oracles.redundancy(keys[0, head, :n].tolist())
        assert got[0, head, :n].tolist() == pytest.approx(right, abs=1e-5)


# -- parameters ----------------------------------------------------------------------------------


def bad_values():
    """(policy, parameter, value) for every parameter of every policy and each way to miss it."""
    for policy in PRUNERS:
        for spec in dataclasses.fields(policy):
            for value in misses(spec):
                yield pytest.param(
                    policy, spec.name, value, id=f"{policy.name}-{spec.name}-{value}"
                )


def misses(spec):
    """Values that this parameter cannot have."""
    values, low, high = ["no", [3]], spec.metadata["low"], spec.metadata["high"]
    if spec.name == "budget":
        return [*values, True, 0, -5, 0.0, -0.1, 1.5, math.nan, math.inf, -math.inf]
    values += [None]
    if low is not None:
        values += [low - 1, low - 1000, math.nan, math.inf, -math.inf]
    if high is not None:
        values += [high + 1, high + 0.25]
    if spec.type not in (float, bool, str):
        values += [float(low) + 0.5, float(low) + 1, True]
    if spec.type in (bool, str):
        values += [0, 1.0]
    return values


@pytest.mark.parametrize(("policy", "name", "value"), list(bad_values()))
def test_a_bad_parameter_is_one_line_that_names_it(policy, name, value):
    """The value is echoed, and what would be right is said."""
    with pytest.raises(UserError) as caught:
        policy(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} should be ")
    assert "\n" not in message
    assert str(value) in message


@pytest.mark.parametrize("policy", PRUNERS, ids=lambda policy: policy.name)
def test_the_ends_of_every_range_are_allowed(policy):
    """Ranges are closed, and every word of a choice is a value."""
    for spec in dataclasses.fields(policy):
        low, high = spec.metadata["low"], spec.metadata["high"]
        for value in {low, high, *(spec.metadata["choices"] or ())} - {None}:
            changes = {"budget": 9} | {spec.name: value}
            assert getattr(policy(**changes), spec.name) == value


@pytest.mark.parametrize("allocation", ["hoyer", "uniform"])
def test_an_allocation_without_a_budget_is_refused(allocation):
    """There is nothing to divide."""
    with pytest.raises(UserError, match=rf"^allocation {allocation} needs a budget; .*--budget\)$"):
        Lethe(budget=None, allocation=allocation)


def test_lethe_with_neither_budget_nor_breakpoint_is_refused():
    """It would be the full cache by another name."""
    with pytest.raises(UserError, match=r"^breakpoint none needs a budget"):
        Lethe(budget=None, breakpoint="none")


@pytest.mark.parametrize("policy", PRUNERS, ids=lambda policy: policy.name)
def test_only_algorithm_1_goes_without_a_budget(policy):
    """For any other policy a budget alone says how much to keep."""
    if policy is Lethe:
        assert policy(budget=None).budget is None
        return
    with pytest.raises(UserError, match=rf"^{policy.__name__} needs a budget: .* such as 0.25$"):
        policy(budget=None)


@pytest.mark.parametrize("kernel", [2, 4, 64])
def test_an_even_kernel_is_refused(kernel):
    """It has no middle."""
    with pytest.raises(UserError, match=f"^kernel should be odd, not {kernel}$"):
        SnapKV(kernel=kernel)


@pytest.mark.parametrize("policy", PRUNERS, ids=lambda policy: policy.name)
@given(prompt=st.integers(1, 40), sinks=st.integers(0, 9), short=st.integers(-3, 3))
def test_a_budget_without_room_is_refused_before_anything_is_computed(policy, prompt, sinks, short):
    """Protected tokens and the least of recent ones are the floor, and it is exact."""
    more = {"window": 5} if issubclass(policy, SnapKV) else {}
    for protect in (True, False):
        floor = (max(sinks, prompt) if protect else sinks) + more.get("window", 1)
        budget = max(1, floor + short)
        one = policy(budget=budget, sinks=sinks, protect_prompt=protect, **more)
        if budget >= floor:
            one.check_prompt(prompt)
            continue
        with pytest.raises(
            UserError, match=f"^budget {budget} is too small .*: {floor} tokens"
        ) as e:
            one.check_prompt(prompt)
        assert "\n" not in str(e.value)


def test_lethes_defaults_are_the_papers():
    """All that the paper gives a number or a name; a prompt is protected, as for every policy.
    Layers are divided against its words, as real models have it."""
    paper = Lethe()
    assert (paper.tau, paper.recent_ratio, paper.breakpoint) == (400, 0.3, "global")
    assert (paper.allocation, paper.budget, paper.protect_prompt) == ("inverse_hoyer", 0.25, True)


@pytest.mark.parametrize("policy", PRUNERS, ids=lambda policy: policy.name)
def test_every_pruner_has_the_same_default_budget_and_protection(policy):
    """So that a comparison of defaults differs in the choice alone."""
    mine = policy()
    assert (mine.budget, mine.protect_prompt, mine.evict_threshold) == (0.25, True, 512)


def test_only_lethe_plus_asks_the_cache_for_a_lag():
    assert LethePlus().notes().lag == LethePlus().lag > 0
    assert Lethe().notes() == H2O().notes() == Notes(scored=True, interval=128, threshold=512)


def test_a_policy_without_importance_is_refused():
    """The protocol's one method that has no default."""
    with pytest.raises(UserError, match=r"^Mine should define importance\(layer, cache\)$"):
        type("Mine", (Pruner,), {})()
