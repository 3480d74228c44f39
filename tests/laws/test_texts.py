"""Laws of whole runs: what a policy leaves in the cache, and what the model then writes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise import held_positions, seeds
from small_policies import bounded, limit_of, make
from texts import full_pass, generate, new_model, run, some_tokens, turned

from lethe_mini.policies.lethe_plus import keys_before_rope
from lethe_mini.policy import FullKV, Lethe
from lethe_mini.rope import rope_cos_sin, rotate

both_positions = pytest.mark.parametrize("compact", [False, True], ids=["absolute", "compact"])


@both_positions
@torch.inference_mode()
def test_logits_are_those_of_a_full_pass_without_the_evicted(model, policy, compact):
    """Exactness: to 1e-5 the cache computes what masks in a full pass would."""
    tokens = some_tokens(47, seed=3)
    cache, logits, looks = run(model, policy, tokens, prompt=7, compact=compact)
    right = full_pass(model, tokens, looks, compact)[6:]
    torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)
    if not isinstance(policy, FullKV):
        assert cache.held < 3 * 47


@both_positions
@torch.inference_mode()
def test_keys_are_raw_keys_turned_to_their_position_or_slot(model, policy, compact):
    """However often a key moved, its angle is that of its position, or in a compact cache of its
    slot (layer 0, whose raw keys depend on the token alone); and it turns back."""
    tokens = some_tokens(61, seed=5)
    cache, _, _ = run(model, policy, tokens, prompt=7, compact=compact)
    block, layer = model.layers[0], cache.layers[0]
    inputs = block.input_layernorm(model.embed_tokens(torch.tensor(tokens)))
    _, raw, _ = block.self_attn.qkv_proj(inputs)
    raw = block.self_attn.k_norm(raw.view(-1, 2, 10)) * model.config.rope_factor
    before_rope = keys_before_rope(layer, torch.tensor([0]))[0]
    for head, positions in enumerate(held_positions(cache)[0][0]):
        raw_keys, angles = raw[positions, head], range(len(positions)) if compact else positions
        right = turned(raw_keys, list(angles), model.inv_freq)
        torch.testing.assert_close(layer.keys[0, head].double(), right, atol=1e-5, rtol=1e-5)
        turned_back = before_rope[head, : layer.length]
        torch.testing.assert_close(turned_back, raw_keys, atol=1e-5, rtol=1e-5)
        assert not before_rope[head, layer.length :].any()


@given(st.integers(-4000, 4000), st.integers(-4000, 4000), seeds)
def test_turning_by_a_then_b_is_turning_by_a_plus_b(a, b, seed):
    """What makes a key's slot exchangeable; angles in float64, as compact caches have them."""
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(seed))
    inv_freq = 10000.0 ** -(torch.arange(0, 10, 2, dtype=torch.float64) / 10)

    def turn(x, by):
        return rotate(x, *rope_cos_sin(torch.tensor(by), inv_freq))

    torch.testing.assert_close(turn(turn(x, a), b), turn(x, a + b), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_room_enough_changes_no_bit(model, policy):
    """No-op: with a budget beyond the text, tokens and logits are those of FullKV, bit by bit."""
    if not isinstance(policy, FullKV):
        roomy = {"evict_threshold": 1000}
        roomy |= {} if policy.budget is None else {"budget": 1000 if bounded(policy) else 1.0}
        policy = dataclasses.replace(policy, **roomy)
    tokens = some_tokens(41, seed=11)
    _, logits, _ = run(model, policy, tokens, prompt=7)
    assert torch.equal(logits, run(model, FullKV(), tokens, prompt=7)[1])
    prompts = [some_tokens(n, seed=n) for n in (3, 11, 5)]
    texts = [generate(model, prompts, one)[0] for one in (policy, FullKV())]
    assert texts[0] == texts[1]


@torch.inference_mode()
def test_after_every_round_a_sequence_holds_at_most_its_budget(model, pruner):
    """In a ragged batch; a share counts the tokens that the sequence has seen by then."""
    prompts = [some_tokens(n, seed=n) for n in (3, 11, 5)]
    _, held, result = generate(model, prompts, pruner, max_new_tokens=60)
    assert result.stats.rounds
    if pruner.budget is None:
        return
    first = max(pruner.evict_threshold, 0) if isinstance(pruner.budget, float) else 0
    for (prompt, seen), layers in held.items():
        limit = limit_of(pruner, prompt, seen)
        # Between its own rounds a sequence grows; neighbours' rounds are noted here, too.
        grown = min(pruner.interval - 1, (seen - prompt) % pruner.interval)
        most = max(first, limit_of(pruner, prompt, seen - grown)) + grown
        assert sum(len(heads[0]) for heads in layers) <= max(limit, most) * 3


def test_the_same_run_gives_the_same_result(model, policy):
    """Nothing of a run is left in a policy, a model or an engine: A then B is B then A."""
    prompts = [some_tokens(n, seed=n) for n in (3, 11)]
    other = make(Lethe, budget=None, evict_threshold=11, tau=2.0, segments=5)

    def both(*policies):
        return [
            generate(model, prompts, one, temperature=0.8, top_k=11, seed=5)[:2] for one in policies
        ]

    (a, b), (again, once_more) = both(policy, other), both(other, policy)
    assert a == once_more
    assert b == again


@pytest.mark.parametrize(
    ("lengths", "sampling"),
    [((2, 13, 7, 5, 1), {}), ((11, 3, 5), {"temperature": 0.9, "top_p": 0.9, "seed": 3})],
    ids=["greedy", "sampled"],
)
def test_a_sequence_never_depends_on_its_neighbours(exact_model, policy, lengths, sampling):
    """In a ragged batch every sequence has the tokens it has alone, and holds the same positions
    after each round, also when neighbours end early."""
    model, prompts = exact_model, [some_tokens(n, seed=n) for n in lengths]
    alone = [generate(model, [prompt], policy, **sampling) for prompt in prompts]
    together = generate(model, prompts, policy, **sampling)
    assert together[0] == [texts[0] for texts, _, _ in alone]
    for n, (_, held, _) in zip(lengths, alone, strict=True):
        for key in held:
            assert together[1].get(key, held[key]) == held[key], n
        rounds = {key: value for key, value in together[1].items() if key[0] == n}
        assert held.items() <= rounds.items()

    ends = together[0][0][9]  # a token that the first sequence surely writes, now its end
    text = SimpleNamespace(eos_ids=frozenset({ends}), decode=lambda ids: "", sampling={})
    stopped = generate(model, prompts, policy, text=text, **sampling)
    for sequence, whole in zip(stopped[2].sequences, together[0], strict=True):
        cut = whole.index(ends) + 1 if ends in whole else len(whole)
        assert sequence.token_ids == whole[:cut]
        assert sequence.finish_reason == ("stop" if ends in whole else "length")
    for key, held in stopped[1].items():
        assert together[1].get(key, held) == held


def test_compact_text_may_outgrow_the_positions(policy):
    """With absolute positions a model of 43 stops there; turned to their slots, keys go on, as
    long as what is held is bounded."""
    model, prompts = new_model(positions=43), [some_tokens(n, n) for n in (7, 4)]
    _, _, result = generate(model, prompts, policy, max_new_tokens=90)
    for one in result.sequences:
        assert one.finish_reason == "positions"
        # The last token made is never read, so it needs no position.
        assert one.prompt_tokens + len(one.token_ids) == 43 + 1
    _, _, result = generate(model, prompts, policy, max_new_tokens=90, positions="compact")
    for one, held in zip(result.sequences, result.stats.kv_tokens_final, strict=True):
        assert max(held) <= 43
        if bounded(policy):
            assert (one.finish_reason, len(one.token_ids)) == ("length", 90)
        elif isinstance(policy, FullKV):
            assert one.finish_reason == "positions"
            assert one.prompt_tokens + len(one.token_ids) == 43 + 1
