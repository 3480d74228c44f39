"""One suite for every policy: whatever a policy prefers, the laws of the cache hold.

A new policy listed in `lethe_mini.policies.POLICIES` is tested here without a line more. Models
are tiny, random and of odd sizes (L = 3, H = 6, H_kv = 2, D = 10), with weights large enough that
attention has preferences.
"""

import dataclasses
import math
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.engine import Engine
from lethe_mini.model import Transformer
from lethe_mini.policies import POLICIES
from lethe_mini.policy import FullKV, Lethe
from lethe_mini.rope import rope_cos_sin, rotate

BUDGET, SINKS, WINDOW, VOCAB = 19, 2, 5, 53
FEW = settings(max_examples=max(5, settings.default.max_examples // 10))


def make(policy, **changes):
    """A policy with a small budget and frequent rounds, as far as it has them."""
    common = {"budget": BUDGET, "interval": 3, "sinks": SINKS, "window": WINDOW} | changes
    names = {spec.name for spec in dataclasses.fields(policy)}
    return policy(**{name: value for name, value in common.items() if name in names})


ALL = {name: make(policy) for name, policy in POLICIES.items()}
ALL |= {
    f"{name}-unprotected": make(policy, protect_prompt=False)
    for name, policy in POLICIES.items()
    if policy is not FullKV
}
ALL |= {
    f"lethe-{name}": make(Lethe, **changes)
    for name, changes in {
        "layer": {"granularity": "layer"},
        "value-norm": {"value_norm": True},
        "inverse": {"allocation": "inverse_hoyer", "knee": "none"},
        "uniform": {"allocation": "uniform", "knee": "none", "granularity": "head"},
        "pyramid": {"allocation": "pyramid", "knee": "global", "tau": 3.0},
        "global": {"knee": "global", "tau": 3.0, "granularity": "layer"},
        "segment": {"knee": "segment", "tau": 1.5, "segments": 7},
        "no-knee": {"knee": "none", "protect_prompt": False},
        "distinct": {"distinct_ratio": 0.6, "recent_ratio": 0.2, "alike": 0.3},
        "distinct-layer": {"distinct_ratio": 1.0, "granularity": "layer", "alike": 0.2},
        "not-distinct": {"distinct_ratio": 0.0, "protect_prompt": False},
        "alone": {
            "budget": None,
            "granularity": "layer",
            "evict_threshold": 11,
            "tau": 2.0,
            "segments": 5,
        },
        "alone-segment": {"budget": None, "evict_threshold": 9, "knee": "segment", "tau": 1.5},
        "alone-head": {
            "budget": None,
            "evict_threshold": 5,
            "tau": 3.0,
            "granularity": "head",
            "protect_prompt": False,
        },
    }.items()
}
every_policy = pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
seeds = st.integers(0, 2**32)


def budget_of(policy):
    return getattr(policy, "budget", None)


def has_knee(policy):
    return isinstance(policy, Lethe) and oracles.knee_of(policy) != "none"


def protected_of(policy, prompt):
    """How many first positions the policy promised to keep."""
    sinks, whole = getattr(policy, "sinks", 0), getattr(policy, "protect_prompt", False)
    return max(sinks, prompt) if whole else sinks


# -- rounds on noise -----------------------------------------------------------------------------


def new_cache(policy, prompt=0, compact=False, layers=3):
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    sizes |= {"rope_type": "default", "rope_theta": 10000.0, "rope_scaling": {}}
    sizes |= {"num_hidden_layers": layers}
    cache = KVCache(SimpleNamespace(**sizes), **policy.notes(), compact=compact)
    cache.prompt = [prompt]
    return cache


def feed(cache, T):
    """T tokens of noise for every sequence of every layer, with skewed masses."""
    positions = torch.tensor(cache.seen)[:, None] + torch.arange(T)
    for layer in cache.layers:
        B = len(layer.lengths)
        noise = torch.randn(3, B, 6, T, 10)
        tiny.put(layer, noise[0, :, :2], noise[1, :, :2], positions)
        mass = torch.rand(B, 2, layer.length) ** 6 * layer.valid() if layer.scored else None
        tiny.observe(layer, noise[2], mass)
    cache.seen = [seen + T for seen in cache.seen]


def held_positions(cache):
    """[layer][row][head]: the positions held, in the order of the slots."""
    return [
        [
            [head[:length] for head in row]
            for row, length in zip(layer.positions.tolist(), layer.lengths, strict=True)
        ]
        for layer in cache.layers
    ]


def right_choice(policy, cache, due):
    """What the round should keep, [layer][row][head], by the oracle, from the policy's scores."""
    before, shares = held_positions(cache), policy.shares(cache)
    kept = []
    for layer, held, share in zip(cache.layers, before, shares, strict=True):
        importance = policy.importance(layer, cache)
        kept.append([])
        for row, positions in enumerate(held):
            n = len(positions[0])
            scores = [head[:n] for head in importance[row].tolist()]
            salient = n
            if isinstance(policy, Lethe):
                ranked = [sorted(head, reverse=True) for head in scores]
                mean = [math.fsum(column) / 2 for column in zip(*ranked, strict=True)]
                over = policy.budget or n > (layer.thresholds[row] or policy.evict_threshold)
                found = oracles.breakpoint(
                    mean, policy.segments, policy.tau, oracles.knee_of(policy)
                )
                salient = found if over and found else n
            protected = protected_of(policy, cache.prompt[row])
            room = share[row] - min(protected, n) * (policy.budget is not None)
            recent = min(room, max(policy.min_recent, int(policy.recent_ratio * room)))
            stay = oracles.always(
                positions, protected, recent, *tiny.distinct(policy, layer, row, room, recent)
            )
            chosen = oracles.prune(scores, stay, share[row], salient)
            kept[-1].append(
                [[head[slot] for slot in slots] for head, slots in zip(positions, chosen)]  # noqa: B905
                if due[row]
                else positions
            )
    return kept


@every_policy
@FEW
@given(
    prompts=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(1, 7), st.lists(st.booleans(), min_size=4)), max_size=9),
    seed=seeds,
)
def test_rounds_obey_the_laws_whatever_comes(policy, prompts, steps, seed):
    """After any appends and rounds of any of the sequences: what is protected is there, positions
    increase strictly, counts are exact, and the choice is the oracle's."""
    torch.manual_seed(seed)
    cache = new_cache(policy, prompts[0])
    feed(cache, prompts[0])
    for prompt in prompts[1:]:
        other = new_cache(policy, prompt)
        feed(other, prompt)
        cache.join(other)
    for T, due in steps:
        feed(cache, T)
        due, before = due[: len(prompts)], held_positions(cache)
        right = before if isinstance(policy, FullKV) else right_choice(policy, cache, due)
        policy.round(cache, due)
        after = held_positions(cache)
        assert after == right
        for row, prompt in enumerate(prompts):
            seen = cache.seen[row]
            sizes = [len(layer[row][0]) for layer in after]
            for old, new in zip(before, after, strict=True):
                if not due[row]:
                    assert new[row] == old[row]
                for head in new[row]:
                    assert head == sorted(set(head))
                    assert set(range(min(seen, protected_of(policy, prompt)))) <= set(head)
                    assert head[-1] == seen - 1
                    recent = min(seen, getattr(policy, "min_recent", 1))
                    assert set(range(seen - recent, seen)) <= set(head)
            if due[row] and budget_of(policy):
                total = policy.budget * len(sizes)
                assert sum(sizes) <= total
                if not has_knee(policy):
                    assert sum(sizes) == min(total, sum(len(layer[row][0]) for layer in before))


@pytest.mark.parametrize("name", [name for name, policy in ALL.items() if policy.gamma is not None])
@FEW
@given(steps=st.lists(st.integers(1, 6), min_size=3, max_size=25), seed=seeds)
def test_scores_move_with_their_key(name, steps, seed):
    """After any rounds each score is that of its position in a cache that never evicted."""
    policy, chance = ALL[name], torch.Generator().manual_seed(seed)
    cache, ledger = new_cache(policy, prompt=4), {}
    policy = dataclasses.replace(policy, interval=1)
    for T in steps:
        for past in ledger.values():
            past.append(0.0)
        cache.decay(policy.gamma)
        positions = torch.tensor(cache.seen)[:, None] + torch.arange(T)
        everyone = torch.rand(3, 2, cache.seen[0] + T, generator=chance) ** 5
        for index, layer in enumerate(cache.layers):
            noise = torch.randn(2, 1, 2, T, 10, generator=chance)
            tiny.put(layer, noise[0], noise[1], positions)
            mass = everyone[index].gather(-1, layer.positions[0].long())
            tiny.observe(layer, None, mass[None])
            for head, masses in enumerate(everyone[index].tolist()):
                for position, one in enumerate(masses):
                    ledger.setdefault((index, head, position), [0.0])[-1] = one
        cache.seen = [seen + T for seen in cache.seen]
        policy.round(cache, [True])
        for index, (layer, held) in enumerate(zip(cache.layers, held_positions(cache))):  # noqa: B905
            scores = layer.scores[0].tolist()
            for head, positions in enumerate(held[0]):
                right = [oracles.rasr(ledger[index, head, p], policy.gamma) for p in positions]
                assert scores[head] == pytest.approx(right, rel=1e-4)


# -- runs of a model -----------------------------------------------------------------------------


def new_model(**changes):
    """Random weights, queries and keys large enough for peaked attention."""
    sizes = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 42,
        "intermediate_size": 38,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(7)
    model = Transformer(parse_config(sizes | changes)).eval()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            scale = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.15)
    model.init_rope("cpu")
    return model


@pytest.fixture(scope="module")
def model():
    return new_model()


def some_tokens(count, seed):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model, policy, tokens, prompt, compact=False):
    """Reads the prompt, then token by token, with rounds where they are due.

    Returns the cache, the logits of every step, and what each query may look at: [layer][head][t],
    the positions held when token t came, its own included.
    """
    cache = new_cache(policy, prompt, compact)
    looks = [[[list(range(t + 1)) for t in range(prompt)] for _ in range(2)] for _ in range(3)]
    logits = [model(torch.tensor([tokens[:prompt]]), cache=cache)[0, -1]]
    policy.round(cache, policy.due(cache))
    for t in range(prompt, len(tokens)):
        for layer, held in zip(looks, held_positions(cache), strict=True):
            for head, positions in zip(layer, held[0], strict=True):
                head.append([*positions, t])
        if policy.gamma is not None:
            cache.decay(policy.gamma)
        logits.append(model(torch.tensor([[tokens[t]]]), cache=cache)[0, -1])
        due = policy.due(cache)
        if any(due):
            policy.round(cache, due)
    return cache, torch.stack(logits), looks


def turned(x, angles, inv_freq):
    """RoPE by complex numbers in float64: x (..., D), a position or slot for each leading index."""
    a, b = x.double().chunk(2, dim=-1)
    turn = torch.tensor(angles, dtype=torch.float64)[..., None] * inv_freq.double()
    z = torch.complex(a, b) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat((z.real, z.imag), dim=-1)


def full_pass(model, tokens, looks, compact=False):
    """All logits at once, without a cache: each query of each head looks at its own positions.

    In compact mode a key's angle is its rank among what the query looks at.
    """
    T = len(tokens)
    x = model.embed_tokens(torch.tensor(tokens))
    for layer, block in enumerate(model.layers):
        attn, y = block.self_attn, block.input_layernorm(x)
        q = attn.q_proj(y).view(T, 6, 10)
        k, v = (proj(y).view(T, 2, 10) for proj in (attn.k_proj, attn.v_proj))
        out = torch.zeros(T, 6, 10)
        for t in range(T):
            for group in range(2):
                held = looks[layer][group][t]
                angles = list(range(len(held))) if compact else held
                keys = turned(k[held, group], angles, model.inv_freq)
                queries = turned(q[t, 3 * group : 3 * group + 3], [angles[-1]], model.inv_freq)
                weights = (queries @ keys.T / math.sqrt(10)).softmax(dim=-1)
                out[t, 3 * group : 3 * group + 3] = (weights @ v[held, group].double()).float()
        x = x + attn.o_proj(out.view(T, 60))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(model.norm(x))


@every_policy
@pytest.mark.parametrize("compact", [False, True], ids=["absolute", "compact"])
@torch.inference_mode()
def test_logits_are_those_of_a_full_pass_without_the_evicted(model, policy, compact):
    """Exactness: to 1e-5 the cache computes what masks in a full pass would."""
    tokens = some_tokens(47, seed=3)
    cache, logits, looks = run(model, policy, tokens, prompt=7, compact=compact)
    right = full_pass(model, tokens, looks, compact)[6:]
    torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)
    if not isinstance(policy, FullKV):
        assert cache.held < 3 * 47


@every_policy
@torch.inference_mode()
@pytest.mark.parametrize("compact", [False, True], ids=["absolute", "compact"])
def test_keys_are_raw_keys_turned_to_their_position_or_slot(model, policy, compact):
    """However often a key moved, its angle is that of its position, or in a compact cache of its
    slot (layer 0, whose raw keys depend on the token alone); `content` turns it back."""
    tokens = some_tokens(61, seed=5)
    cache, _, _ = run(model, policy, tokens, prompt=7, compact=compact)
    block, layer = model.layers[0], cache.layers[0]
    raw = block.self_attn.k_proj(
        block.input_layernorm(model.embed_tokens(torch.tensor(tokens)))
    ).view(-1, 2, 10)
    for head, positions in enumerate(held_positions(cache)[0][0]):
        raw_keys, angles = raw[positions, head], range(len(positions)) if compact else positions
        right = turned(raw_keys, list(angles), model.inv_freq)
        torch.testing.assert_close(layer.keys[0, head].double(), right, atol=1e-5, rtol=1e-5)
        content = layer.content([0])[0, head]
        torch.testing.assert_close(content[: layer.length], raw_keys, atol=1e-5, rtol=1e-5)
        assert not content[layer.length :].any()


@given(st.integers(-4000, 4000), st.integers(-4000, 4000), seeds)
def test_turning_by_a_then_b_is_turning_by_a_plus_b(a, b, seed):
    """What makes a key's slot exchangeable; angles in float64, as compact caches have them."""
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))
    inv_freq = 10000.0 ** -(torch.arange(0, 10, 2, dtype=torch.float64) / 10)

    def turn(x, by):
        return rotate(x, *rope_cos_sin(torch.tensor(by), inv_freq))

    torch.testing.assert_close(turn(turn(x, a), b), turn(x, a + b), atol=1e-5, rtol=1e-5)


@every_policy
@torch.inference_mode()
def test_room_enough_changes_no_bit(model, policy):
    """No-op: with a budget beyond the text, tokens and logits are those of FullKV, bit by bit."""
    if not isinstance(policy, FullKV):
        roomy = {"budget": 1000} if policy.budget else {"evict_threshold": 1000}
        policy = dataclasses.replace(policy, **roomy)
    tokens = some_tokens(41, seed=11)
    _, logits, _ = run(model, policy, tokens, prompt=7)
    assert torch.equal(logits, run(model, FullKV(), tokens, prompt=7)[1])
    prompts = [some_tokens(n, seed=n) for n in (3, 11, 5)]
    texts = [generate(model, prompts, one)[0] for one in (policy, FullKV())]
    assert texts[0] == texts[1]


def generate(model, prompts, policy, max_new_tokens=33, text=None, **kwargs):
    """Token ids, what was held ({(prompt length, seen): positions by layer}), and the result."""
    held = {}

    class Spy(type(policy)):
        def round(self, cache, due):
            super().round(cache, due)
            after = held_positions(cache)
            for row, key in enumerate(zip(cache.prompt, cache.seen, strict=True)):
                held[key] = [layer[row] for layer in after]

    values = {spec.name: getattr(policy, spec.name) for spec in dataclasses.fields(policy)}
    engine = Engine(model, text)
    result = engine.generate(prompts, Spy(**values), max_new_tokens=max_new_tokens, **kwargs)
    return [one.token_ids for one in result.sequences], held, result


@every_policy
def test_the_same_run_gives_the_same_result(model, policy):
    """Nothing of a run is left in a policy, a model or an engine: A then B is B then A."""
    prompts = [some_tokens(n, seed=n) for n in (3, 11)]
    other = ALL["lethe-alone"]

    def both(*policies):
        return [
            generate(model, prompts, one, temperature=0.8, top_k=11, seed=5)[:2] for one in policies
        ]

    (a, b), (again, once_more) = both(policy, other), both(other, policy)
    assert a == once_more
    assert b == again


@every_policy
@pytest.mark.parametrize(
    ("lengths", "sampling"),
    [((2, 13, 7, 5, 1), {}), ((11, 3, 5), {"temperature": 0.9, "top_p": 0.9, "seed": 3})],
    ids=["greedy", "sampled"],
)
def test_a_sequence_never_depends_on_its_neighbours(model, policy, lengths, sampling):
    """In a ragged batch every sequence has the tokens it has alone, and holds the same positions
    after each round, also when neighbours end early."""
    prompts = [some_tokens(n, seed=n) for n in lengths]
    alone = [generate(model, [prompt], policy, **sampling) for prompt in prompts]
    together = generate(model, prompts, policy, **sampling)
    assert together[0] == [texts[0] for texts, _, _ in alone]
    for n, (_, held, _) in zip(lengths, alone, strict=True):
        for key in held:
            assert together[1].get(key, held[key]) == held[key], n
        rounds = {key: value for key, value in together[1].items() if key[0] == n}
        assert held.items() <= rounds.items()

    ends = together[0][0][9]  # a token that the first sequence surely writes, now its end
    text = SimpleNamespace(eos_ids=frozenset({ends}), decode=lambda ids: "")
    stopped = generate(model, prompts, policy, text=text, **sampling)
    for sequence, whole in zip(stopped[2].sequences, together[0], strict=True):
        cut = whole.index(ends) + 1 if ends in whole else len(whole)
        assert sequence.token_ids == whole[:cut]
        assert sequence.finish_reason == ("stop" if ends in whole else "length")
    for key, held in stopped[1].items():
        assert together[1].get(key, held) == held


@every_policy
def test_compact_text_may_outgrow_the_positions(policy):
    """With absolute positions a model of 43 stops there; turned to their slots, keys go on, as
    long as what is held is bounded."""
    model, prompts = new_model(max_position_embeddings=43), [some_tokens(n, n) for n in (7, 4)]
    _, _, result = generate(model, prompts, policy, max_new_tokens=90)
    for one in result.sequences:
        assert one.finish_reason == "positions"
        # The last token made is never read, so it needs no position.
        assert one.prompt_tokens + len(one.token_ids) == 43 + 1
    _, _, result = generate(model, prompts, policy, max_new_tokens=90, positions="compact")
    bounded = budget_of(policy) is not None
    for one, held in zip(result.sequences, result.stats.kv_tokens_final, strict=True):
        assert max(held) <= 43
        if bounded:
            assert (one.finish_reason, len(one.token_ids)) == ("length", 90)
        elif isinstance(policy, FullKV):
            assert one.finish_reason == "positions"
            assert one.prompt_tokens + len(one.token_ids) == 43 + 1
