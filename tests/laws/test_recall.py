"""Recall: what past queries want of the keys, against loops in float64.

B sequences, H = 4 query and H_kv = 2 key/value heads, D = 6, one or two layers.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import turned

from lethe_mini import UserError
from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.rope import inverse_frequencies
from lethe_mini.policies import Recall
from lethe_mini.policies.recall import distance, farthest, largest_attention, threshold

H, KV, D, L = 4, 2, 6, 2
INV_FREQ = inverse_frequencies("default", 1e6, D, {})


def new_cache(policy, batch=1, compact=False):
    config = SimpleNamespace(
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=KV,
        head_dim=D,
        inv_freq=INV_FREQ,
    )
    return KVCache(config, batch, torch.float32, compact=compact, notes=policy.notes())


def add_token(cache, q, k, t):
    """The same q (H, D) and k (KV, D), as before RoPE, to every layer, at position t."""
    freq = torch.tensor(INV_FREQ)
    cache.reserve(1)
    for layer in cache.layers:
        angle = cache.next_angle(0)
        layer.remember(turned(q, [angle] * H, freq).float()[None, :, None])
        store, slots = layer.place(1)
        store["keys"][0, :, slots[0, 0]] = turned(k, [angle] * KV, freq).float()
        store["positions"][0, :, slots[0, 0]] = t
    cache.count(1)
    cache.next.add_(1)


def attention_paid(query, keys):
    """Softmax of one query over keys, lists of floats."""
    logits = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(D) for key in keys]
    most = max(logits)
    weights = [math.exp(x - most) for x in logits]
    return [w / sum(weights) for w in weights]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_the_largest_attention_is_the_loops(R, N, S, seed):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(R, H, N, D, generator=g)
    keys = torch.randn(R, KV, S, D, generator=g)
    there = torch.rand(R, H, N, generator=g) < 0.7
    lengths = torch.randint(1, S + 1, (R,), generator=g)
    valid = (torch.arange(S) < lengths[:, None])[:, None]
    found = largest_attention(queries, there, keys, valid)
    for r in range(R):
        n = int(lengths[r])
        for head in range(KV):
            right = [0.0] * S
            for h in range(head * H // KV, (head + 1) * H // KV):
                for i in range(N):
                    if there[r, h, i]:
                        paid = attention_paid(queries[r, h, i].tolist(), keys[r, head, :n].tolist())
                        right[:n] = [max(a, b) for a, b in zip(right, paid, strict=False)]
            torch.testing.assert_close(found[r, head], torch.tensor(right))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_the_farthest_are_chosen_one_by_one(N, n, seed):
    """Of the vectors that exist; the last comes first, none comes twice, nor one like it."""
    g = torch.Generator().manual_seed(seed)
    pool = torch.randn(1, 1, N, D, generator=g)
    there = torch.rand(1, 1, N, generator=g) < 0.7
    there[..., -1] = True
    found = farthest(pool, there, n)[0, 0].tolist()
    twice = farthest(torch.cat((pool, pool), 2), torch.cat((there, there), 2), n)[0, 0].tolist()
    exist = [i for i in range(N) if there[0, 0, i]]
    assert len(found) == n
    if len(exist) > 1:  # one is its own mean, and like nothing
        assert [i % N if i >= 0 else i for i in twice] == found
    mean = pool[0, 0, exist].mean(0)
    unit = torch.nn.functional.normalize(pool[0, 0] - mean, dim=-1).double()
    assert found[0] == N - 1
    found = found[: found.index(-1)] if -1 in found else found
    assert set(found) <= set(exist)
    assert len(set(found)) == len(found) <= min(n, len(exist))
    if len(found) < min(n, len(exist)):  # all that are left are like one of these
        left = set(exist) - set(found)
        assert all(max(float(unit[i] @ unit[j]) for j in found) > 0.99 for i in left)
    for k in range(1, len(found)):
        near = [max(float(unit[i] @ unit[j]) for j in found[:k]) for i in exist]
        chosen = max(float(unit[found[k]] @ unit[j]) for j in found[:k])
        assert chosen <= min(near) + 1e-5


@given(st.integers(0, 12), st.integers(0, 10**6))
def test_the_threshold_leaves_that_many_places(places, seed):
    g = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, KV, S, generator=g) for S in (2, 4)]
    found = threshold(layers, torch.tensor([places]))
    assert found.shape == (1, 1, 1)
    assert sum(int((x >= found).sum()) for x in layers) == min(places, KV * 6)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("window", "interval"), [(3, 6), (4, 6), (6, 6), (9, 6)])
def test_every_query_marks_as_if_it_were_asked_later(window, interval, compact):
    """Token by token: a key's mark is the most that any query paid since the key came, each asked
    `after` tokens behind the end of its pause; beacons are queries as they were before RoPE."""
    policy = Recall(budget=10**6, window=window, interval=interval, beacons=3, after=5, kernel=1)
    cache, g = new_cache(policy, compact=compact), torch.Generator().manual_seed(1)
    asked, keys, freq = [], [], torch.tensor(INV_FREQ)
    right = torch.zeros(KV, 0, dtype=torch.float64)
    for t in range(25):
        q, k = torch.randn(H, D, generator=g), torch.randn(KV, D, generator=g)
        asked.append(q)
        keys.append(k)
        add_token(cache, q, k, t)
        policy.due(cache)
        right = torch.cat((right, torch.zeros(KV, 1, dtype=torch.float64)), dim=1)
        if (t + 1) % interval % window == 0:
            now = t + 1 + policy.after
            for i in range(max(0, t + 1 - window), t + 1):
                turned_q = turned(asked[i], [now] * H, freq)
                for head in range(KV):
                    held = [turned(x[head], [p], freq)[0].tolist() for p, x in enumerate(keys)]
                    for h in range(head * H // KV, (head + 1) * H // KV):
                        paid = torch.tensor(attention_paid(turned_q[h].tolist(), held))
                        right[head] = right[head].maximum(paid.double())
        for layer in cache.layers:
            marks = layer.store["marks"][0, :, : t + 1].double()
            torch.testing.assert_close(marks, right, atol=1e-5, rtol=1e-4)
    plain = torch.stack(asked, dim=1)  # (H, T, D)
    for layer in cache.layers:
        for h in range(H):
            for beacon in layer.beacons[0, h]:
                assert (plain[h] - beacon).abs().amax(1).min() < 1e-5


@pytest.mark.parametrize("options", [{"marked_ratio": 0.0}, {"marked_ratio": 1.0}], ids=str)
def test_a_key_that_one_past_query_wants_stays(options):
    """A key in the first tokens, and one query soon after that looks at it; then 200 tokens, and
    25 rounds, of others. Where no query wants it, it goes."""
    stayed = []
    for wanted in (True, False):
        options = {**options, "outlier_ratio": 0.0, "kernel": 1}
        policy = Recall(budget=24, interval=8, window=4, sinks=1, protect_prompt=False, **options)
        cache, g = new_cache(policy), torch.Generator().manual_seed(1)
        slow = torch.zeros(D)
        slow[D // 2 - 1] = 8.0  # of the pair that RoPE hardly turns
        for t in range(200):
            q, k = torch.randn(H, D, generator=g), torch.randn(KV, D, generator=g)
            k = slow.expand(KV, D) if t == 7 else k * (1 - slow.clamp(max=1))
            q = slow.expand(H, D) if t == 20 and wanted else q * (1 - slow.clamp(max=1))
            add_token(cache, q, k, t)
            if any(due := policy.due(cache)):
                policy.round(cache, due)
        stayed.append([bool((layer.positions[0] == 7).any(1).all()) for layer in cache.layers])
        assert all(layer.lengths[0] <= 24 + 8 for layer in cache.layers)
    assert all(stayed[0])
    assert not any(stayed[1])


def test_a_layer_that_is_wanted_more_holds_more():
    """One layer's keys are alike, so that none is wanted much; the other's few are wanted."""
    policy = Recall(budget=8, interval=4, window=4, sinks=0, protect_prompt=False, kernel=1)
    cache, g = new_cache(policy), torch.Generator().manual_seed(2)
    cache.reserve(16)
    for layer in cache.layers:
        store, slots = layer.place(16)
        scale = 0.01 if layer.index == 0 else 6.0
        store["keys"][0, :, slots[0]] = scale * torch.randn(KV, 16, D, generator=g)
        store["positions"][0, :, slots[0]] = torch.arange(16, dtype=torch.int32)
        layer.remember(torch.randn(1, H, 16, D, generator=g))
    cache.count(16)
    cache.next.add_(16)
    due = policy.due(cache)
    policy.round(cache, due)
    few, many = (layer.lengths[0] for layer in cache.layers)
    assert few < many
    assert few + many == 16


@given(st.integers(1, 3), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_a_layer_s_part_is_what_its_head_with_most_places_has(R, S, share, seed):
    """Places by beacons are evened out over all heads of all layers, no others."""
    g = torch.Generator().manual_seed(seed)
    policy = Recall(budget=20, interval=4, protect_prompt=False, even_share=share)
    cache = new_cache(policy, batch=R)
    cache.reserve(S)
    cache.count(S)
    cache.next.add_(S)
    for layer in cache.layers:
        layer.store["wanted"][:, :, :S] = 3 * torch.rand(R, KV, S, generator=g)
    found = policy.weights(cache, None)
    assert found.shape == (R, L)
    room = torch.tensor(20 - policy.sinks)  # of each head
    always = policy.sinks + int(policy.recent(room))
    for r in range(R):
        wanted = [layer.store["wanted"][r].tolist() for layer in cache.layers]
        placed = [[sum(x >= 1 for x in head) for head in heads] for heads in wanted]
        rest = [[sum(0.5 <= x < 1 for x in head) for head in heads] for heads in wanted]
        mean = sum(map(sum, rest)) / (L * KV)
        for layer in range(L):
            pairs = zip(placed[layer], rest[layer], strict=True)
            most = max(m + (1 - share) * x + share * mean for m, x in pairs)
            assert float(found[r, layer]) == pytest.approx(always + most, rel=1e-5)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_how_far_a_value_lies_out_is_the_loops(R, S, seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(R, KV, S, D, generator=g)
    lengths = torch.randint(1, S + 1, (R,), generator=g)
    valid = (torch.arange(S) < lengths[:, None])[:, None]
    found = distance(values, valid)
    for r in range(R):
        n = int(lengths[r])
        for head in range(KV):
            here = values[r, head, :n].double().tolist()
            mean = [sum(column) / n for column in zip(*here, strict=True)]
            right = [math.dist(value, mean) for value in here] + [0.0] * (S - n)
            torch.testing.assert_close(found[r, head].double(), torch.tensor(right).double())


@pytest.mark.parametrize("kernel", [1, 3])
def test_each_head_keeps_the_values_unlike_the_others(kernel):
    """Tokens whose values lie far out stay for 25 rounds though no query looks at them, in the head
    where they do; with a kernel their neighbours, too. Without places for outliers they go."""
    for ratio in (0.5, 0.0):
        policy = Recall(budget=24, interval=8, window=4, sinks=1, protect_prompt=False,
                        kernel=kernel, outlier_ratio=ratio)  # fmt: skip
        cache, g = new_cache(policy), torch.Generator().manual_seed(1)
        for t in range(200):
            add_token(cache, torch.randn(H, D, generator=g), torch.randn(KV, D, generator=g), t)
            for layer in cache.layers:
                value = torch.randn(KV, D, generator=g)
                value[0] += 50.0 * (t == 31)
                slot = layer.lengths[0] - 1
                layer.store["values"][0, :, slot] = value
            if any(due := policy.due(cache)):
                policy.round(cache, due)
        for layer in cache.layers:
            held = set(layer.positions[0, 0].tolist())
            near = {31} if kernel == 1 else {30, 31, 32}
            assert (near <= held) == bool(ratio)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="kernel should be odd"):
        Recall(kernel=4)
    with pytest.raises(UserError, match="budget"):
        Recall(budget=None)
    assert Recall().pause == 32
    assert Recall(interval=16).pause == 16
