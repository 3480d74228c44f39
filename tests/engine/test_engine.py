"""The engine: what a policy may change of a text, what it must not, and what the statistics say.

The two laws that find most bugs come first. No-op: a policy that evicts nothing changes no bit.
Exactness: with any policy, every next-token logit is that of a full cache in which the evicted keys
are masked, layer by layer and head by head. Here the reference is one uncached pass with a mask per
layer, head, query and key, and an attention of its own.
"""

import dataclasses
import math
import signal
import threading
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import runs
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import KV_HEADS, LAYERS, LONG, Letters, few, ids, tokens_of

from lethe_mini import Engine, FullKV, Lethe, LethePlus, Pruner, UserError
from lethe_mini.generation.stats import token_bytes
from lethe_mini.kernels import BLOCK
from lethe_mini.policies import POLICIES

SEEDS = st.integers(0, 999)


@pytest.fixture(scope="module")
def engine():
    return Engine(runs.model())


@pytest.fixture(scope="session")
def demo_engine(demo):
    return Engine.from_pretrained(str(demo), device="cpu", dtype="float32")


@contextmanager
def after_each_step(see):
    """Calls see(cache) whenever the engine asks a pruning policy whether a round is due: after
    every prefill and every step, before the round."""
    due = Pruner.due

    def watched(self, cache, *args):
        see(cache)
        return due(self, cache, *args)

    with mock.patch.object(Pruner, "due", watched):
        yield


def lasting(result):
    """All that two runs of the same must have in common: everything but the time."""
    facts = {k: v for k, v in result.to_dict().items() if not k.endswith(("seconds", "_second"))}
    assert len(facts) == len(result.to_dict()) - 6
    return facts


# --- no-op


@few
@given(
    length=st.integers(1, 61),
    new=st.integers(1, 61),
    policy=st.sampled_from(
        [
            Lethe(),
            Lethe(budget=None),
            Lethe(budget=131),
            LethePlus(budget=131),
            LethePlus(budget=131, value_norm=True, interval=1),
            LethePlus(budget=131, per_head=False),
            LethePlus(budget=131, allocation="uniform", breakpoint="segment", protect_prompt=False),
            Lethe(budget=None, evict_threshold=5, tau=1e9, interval=3),  # rounds, no breakpoint
            Lethe(budget=1.0, evict_threshold=1, interval=1),
            LethePlus(budget=1.0, evict_threshold=1, interval=1, protect_prompt=False),
        ]
    ),
    seed=SEEDS,
)
def test_a_policy_that_evicts_nothing_changes_no_bit(engine, length, new, policy, seed):
    """Tokens equal FullKV's, and so do the logits behind them, bit by bit."""
    written = []
    for one in (FullKV(), policy):
        logits = []
        hook = engine.model.register_forward_hook(
            lambda module, args, out, logits=logits: logits.append(out[:, -1].clone())
        )
        result = engine.generate([ids(length, seed)], one, max_new_tokens=new)
        hook.remove()
        assert result.stats.evicted_tokens == 0
        written.append((tokens_of(result), torch.cat(logits)))
    assert written[0][0] == written[1][0]
    assert torch.equal(written[0][1], written[1][1])


@pytest.mark.demo
def test_a_policy_that_evicts_nothing_changes_no_bit_of_the_demo(demo_engine):
    """On a trained model: a budget above the text, and a text below the threshold."""
    prompts = ["Why is the sky blue?"]
    full = demo_engine.generate(prompts, max_new_tokens=23, ignore_eos=True)
    above = Lethe(budget=512, interval=8), LethePlus(budget=512, interval=8)
    for policy in (Lethe(), Lethe(budget=None), *above):
        result = demo_engine.generate(prompts, policy, max_new_tokens=23, ignore_eos=True)
        assert tokens_of(result) == tokens_of(full)
        assert result.stats.evicted_tokens == 0


# --- exactness


class Witness:
    """What a run's every step computed and kept: logits, and positions after every round."""

    def __init__(self, engine):
        self.engine = engine
        self.logits = {}  # sequence -> [(vocab,), ...], from the prompt's last token on
        self.kept = []  # (tokens seen, [per layer: (H_kv, n) positions]) after each round

    def run(self, prompt, policy, new):
        rounds = type(policy).round
        outputs = []

        def watched(this, cache, due):
            done = rounds(this, cache, due)
            self.kept.append(
                (cache.seen[0], [layer.positions[0].clone() for layer in cache.layers])
            )
            return done

        hook = self.engine.model.register_forward_hook(
            lambda module, args, out: outputs.append(out[0, -1].clone())
        )
        with mock.patch.object(type(policy), "round", watched):
            result = self.engine.generate(
                [prompt], policy, max_new_tokens=new, ignore_eos=True, prefill_chunk=LONG
            )
        hook.remove()
        self.text = prompt + result.sequences[0].token_ids[:-1]  # the last is never fed
        self.logits = torch.stack(outputs)
        return result

    def masks(self):
        """Per layer (H_kv, T, T): may the query at t see the key at s? Never what lies ahead, and
        what a round has evicted no longer."""
        T, config = len(self.text), self.engine.model.config
        masks = []
        for layer in range(config.num_hidden_layers):
            mask = torch.ones(config.num_key_value_heads, T, T).tril().bool()
            for seen, kept in self.kept:
                evicted = torch.ones(config.num_key_value_heads, T, dtype=torch.bool)
                evicted[:, seen:] = False
                evicted.scatter_(1, kept[layer].long(), False)
                mask[:, seen:] &= ~evicted[:, None]
            masks.append(mask)
        return masks

    def expected(self):
        """The logits of one uncached pass with those masks, where the engine computed its own."""
        model, T = self.engine.model, len(self.text)
        config = model.config
        angles = torch.arange(T).double()[:, None] * model.inv_freq.double()
        cos, sin = angles.cos().float().repeat(1, 2), angles.sin().float().repeat(1, 2)
        D, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

        def turned(x):
            return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin

        x = model.embed_tokens(torch.tensor(self.text))
        for block, mask in zip(model.layers, self.masks(), strict=True):
            a = block.self_attn
            h = block.input_layernorm(x)
            q, k, v = (part.view(T, -1, D).transpose(0, 1) for part in a.qkv_proj(h))
            k, v, m = (y.repeat_interleave(group, 0) for y in (turned(k), v, mask))
            logits = (turned(q) @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(~m, -torch.inf)
            x = x + a.o_proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(T, -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        return model.lm_head(model.norm(x[-len(self.logits) :]))

    def error(self):
        """The largest difference, in units of the largest logit."""
        expected = self.expected()
        return ((self.logits - expected).abs().max() / expected.abs().max()).item()


POLICY_CASES = {
    "head": LethePlus(budget=23, interval=7),
    "layer": LethePlus(budget=23, interval=7, per_head=False),
    "norm": LethePlus(budget=23, interval=7, value_norm=True),
    "uniform": LethePlus(budget=29, interval=5, allocation="uniform"),
    "inverse": LethePlus(budget=29, interval=1, allocation="inverse_hoyer", protect_prompt=False),
    "pyramid": LethePlus(
        budget=23, interval=11, allocation="pyramid", protect_prompt=False, sinks=0
    ),
    "paper": Lethe(budget=23, interval=7, tau=5.0, protect_prompt=False),
    "segment": Lethe(budget=None, evict_threshold=11, interval=7, breakpoint="segment", tau=1.5),
    "global": Lethe(budget=None, evict_threshold=13, interval=7, tau=3.0, protect_prompt=False),
    "share": Lethe(budget=0.4, evict_threshold=19, interval=7),
    "share-head": LethePlus(budget=0.25, evict_threshold=23, interval=5, protect_prompt=False),
}
POLICY_CASES |= {
    name: kind(budget=23, interval=7, **({"window": 5} if hasattr(kind, "kernel") else {}))
    for name, kind in POLICIES.items()
    if issubclass(kind, Pruner)
}


@torch.inference_mode()
@pytest.mark.parametrize("case", POLICY_CASES)
def test_logits_are_those_of_a_full_cache_with_the_evicted_keys_masked(case):
    """Every policy, at every step after every round: 1e-5 of the logits' scale. The usual weights,
    twice as wild, amplify rounding to that much by themselves: one step in a hundred."""
    engine, evicted = Engine(tiny.model(spread=1.5)), 0
    for length, seed in ((1, 1), (17, 2), (17, 3)):
        witness = Witness(engine)
        evicted += witness.run(ids(length, seed), POLICY_CASES[case], 73).stats.evicted_tokens
        assert witness.error() < 1e-5
    assert evicted > 50
    # The check can fail: with other layers' masks, and with none at all, logits differ.
    kept, witness.kept = witness.kept, [(seen, kept[::-1]) for seen, kept in witness.kept]
    assert witness.error() > 1e-4 or all(torch.equal(k[0], k[-1]) for _, k in kept)
    witness.kept = []
    assert witness.error() > 1e-4


@pytest.mark.demo
@torch.inference_mode()
@pytest.mark.parametrize(
    "policy",
    [
        LethePlus(budget=64, interval=16),
        LethePlus(budget=40, interval=24, protect_prompt=False),
        Lethe(budget=64, interval=16),
    ],
    ids=["head", "unprotected", "layer"],
)
def test_logits_of_the_demo_are_those_of_a_full_cache_with_the_evicted_keys_masked(
    demo_engine, policy
):
    """The same on a trained model, which has sinks: 30 layers, 120 tokens, several rounds."""
    witness = Witness(demo_engine)
    prompt = demo_engine.text.encode_prompt("Why is the sky blue?")
    result = witness.run(prompt, policy, 120)
    assert result.stats.rounds >= 4
    assert result.stats.evicted_tokens > 30 * 60
    assert witness.error() < 1e-5


# --- memory


def check_memory(engine, prompt, policy, new):
    """The bound at every step: budget + interval tokens a layer on average, in what is held, in
    what the tensors take, and in what the statistics report."""
    layers = engine.model.config.num_hidden_layers
    held, taken = [], []

    def see(cache):
        held.append(cache.held)
        stores = [layer.store[name] for layer in cache.layers for name in ("keys", "values")]
        taken.append(sum(tensor.untyped_storage().nbytes() for tensor in stores))
        see.token_bytes = token_bytes(cache)

    with after_each_step(see):
        stats = engine.generate([prompt], policy, max_new_tokens=new, ignore_eos=True).stats
    bound = (policy.budget + policy.interval) * layers
    assert len(held) == new  # the prefill, and one step less than tokens
    assert max(held) <= bound
    # A round leaves the room of its interval, and storage that is hardly larger where it is.
    assert max(taken) <= (bound + (2 * BLOCK - 1) * layers) * see.token_bytes
    assert min(t - h * see.token_bytes for t, h in zip(taken, held, strict=True)) >= 0
    assert stats.kv_bytes_peak == max(held) * see.token_bytes <= bound * see.token_bytes
    moves = sum(after != before for before, after in pairwise(taken))
    assert moves <= stats.rounds + 1  # before the first round it grows once
    assert stats.rounds == (new - 1) // policy.interval
    assert stats.kv_tokens_mean == pytest.approx(sum(held[1:]) / (len(held) - 1) / layers)


def test_memory_is_bounded_over_thousands_of_tokens(engine):
    """100 tokens of prompt, 2,000 more, budget 128."""
    check_memory(engine, ids(100), LethePlus(budget=128), 2000)


@pytest.mark.demo
def test_memory_is_bounded_on_the_demo(demo_engine):
    """The same on a trained model, with 400 tokens."""
    text = "The sea is deep and full of strange and wonderful things. " * 20
    prompt = demo_engine.text.encode(text)[:100]
    assert len(prompt) == 100
    check_memory(demo_engine, prompt, LethePlus(budget=128, interval=64), 400)


# --- a share of the text as budget


class Course:
    """A run of one prompt under a policy: tokens seen and held after the prefill and every step,
    before and after a round where there was one."""

    def __init__(self, engine, policy, prompt, new, **options):
        self.before, self.after, self.rounds = {}, {}, []
        rounds = type(policy).round

        def watched(this, cache, due):
            done = rounds(this, cache, due)
            self.rounds.append(cache.seen[0])
            self.after[cache.seen[0]] = cache.held
            return done

        with (
            mock.patch.object(type(policy), "round", watched),
            after_each_step(lambda cache: self.before.update({cache.seen[0]: cache.held})),
        ):
            result = engine.generate([prompt], policy, new, ignore_eos=True, **options)
        self.stats = result.stats
        self.after = {**self.before, **self.after}


SHARED = {name: kind for name, kind in POLICIES.items() if issubclass(kind, Pruner)}


@few
@given(
    data=st.data(),
    name=st.sampled_from([*SHARED]),
    percent=st.integers(1, 100),
    threshold=st.integers(1, 61),
    interval=st.sampled_from([1, 5, 16]),
    sinks=st.integers(0, 5),
    protect=st.booleans(),
    length=st.integers(1, 61),
)
def test_a_share_of_the_text_is_held_at_every_round(
    engine, data, name, percent, threshold, interval, sinks, protect, length
):
    """Nothing is pruned before `evict_threshold`. Every `interval` tokens a sequence that holds
    more than its share has a round, and then holds its share of the tokens seen, over all layers,
    or its floor: protected tokens and the share's room at the threshold. No prompt is too long."""
    share = percent / 100
    options = {"budget": share, "evict_threshold": threshold, "interval": interval}
    if issubclass(SHARED[name], Lethe):
        options["breakpoint"] = data.draw(st.sampled_from(["global", "none"]))
    if hasattr(SHARED[name], "kernel"):
        options["window"] = 5
    policy = SHARED[name](sinks=sinks, protect_prompt=protect, **options)
    run = Course(engine, policy, ids(length), 97)
    protected = max(sinks, length) if protect else sinks
    floor = protected + max(policy.min_recent, math.floor(share * threshold))
    exact = options.get("breakpoint", "none") == "none"
    for seen, before in run.before.items():
        after, most = run.after[seen], LAYERS * max(math.floor(share * seen), floor)
        time = seen == length or (seen - length) % interval == 0
        if seen <= threshold:
            assert after == seen * LAYERS
        elif time and before > most:
            assert seen in run.rounds
            assert after == most if exact else after <= most
        else:
            assert seen not in run.rounds
            assert after == before
    assert sorted(run.before) == [*range(length, length + 97)]
    assert percent < 100 or not run.rounds


def test_the_default_of_every_policy_is_a_quarter_from_512_tokens_on(engine):
    """As `--lethe` runs it: whole until 512 tokens, then a quarter of the text at every round."""
    for name, kind in SHARED.items():
        policy = kind(breakpoint="none") if issubclass(kind, Lethe) else kind()
        run = Course(engine, policy, ids(17), 1300)
        first = 17 + 4 * 128  # every 128 tokens of the answer
        assert run.rounds[0] == first, name
        assert run.rounds == [*range(first, 17 + 1300, 128)]
        assert all(run.after[seen] == seen * LAYERS for seen in run.before if seen < first)
        floor = policy.protected(17) + max(policy.min_recent, 128)
        for seen in run.rounds:
            assert run.after[seen] == LAYERS * max(seen // 4, floor)
        kept = run.stats.kv_tokens_final[0]
        assert 1 - sum(kept) / (LAYERS * (17 + 1299)) == run.stats.kv_reduction > 0.6


def test_a_long_prompt_is_pruned_at_once_if_it_may_be(engine):
    """A prompt above the threshold: unprotected, its share remains before the first token;
    protected, it stays whole, and rounds begin where the answer outgrows its room."""
    options = {"budget": 0.25, "evict_threshold": 64, "interval": 8}
    for kind in (LethePlus, POLICIES["h2o"]):
        run = Course(engine, kind(protect_prompt=False, **options), ids(203), 9)
        assert run.rounds[0] == 203
        assert run.after[203] == LAYERS * (203 // 4)
        run = Course(engine, kind(**options), ids(203), 60)
        assert run.rounds[0] == 203 + 24  # the first multiple of 8 above 16, a quarter of 64
        assert {run.after[seen] for seen in run.rounds} == {LAYERS * (203 + 16)}


@pytest.mark.parametrize("kind", [Lethe, LethePlus])
def test_each_of_a_batch_has_a_share_of_its_own_text(engine, kind):
    """Long and short beside each other: the short one is whole until it is long enough itself."""
    policy = kind(budget=0.25, evict_threshold=100, interval=8)
    prompts, limits = [ids(150), ids(5, 1), ids(90, 2)], [90, 60, 130]
    together = engine.generate(prompts, policy, limits)
    finals = together.stats.kv_tokens_final
    assert finals[1] == [5 + 59] * LAYERS
    assert sum(finals[0]) < LAYERS * (150 + 89)
    for prompt, limit, final in zip(prompts, limits, finals, strict=True):
        assert engine.generate([prompt], policy, limit).stats.kv_tokens_final == [final]


def test_a_share_needs_no_room_and_a_number_does(engine):
    """A share counts beside what is always kept; a number includes it, and says so in one line."""
    for kind in SHARED.values():
        policy = kind(budget=0.01, evict_threshold=1, interval=8)
        result = engine.generate([ids(61)], policy, 30)
        assert result.sequences[0].generated_tokens == 30
        with pytest.raises(UserError, match="budget 61 is too small for the prompt, sinks and r"):
            engine.generate([ids(61)], kind(budget=61), 30)


# --- statistics


@few
@given(
    lengths=st.lists(st.integers(1, 29), min_size=1, max_size=4),
    limits=st.lists(st.integers(1, 47), min_size=4, max_size=4),
    policy=st.sampled_from([FullKV(), *POLICY_CASES.values()]),
    batch_size=st.sampled_from([None, 1, 2]),
    seed=SEEDS,
)
def test_statistics_add_up(engine, lengths, limits, policy, batch_size, seed):
    """What is held and what was evicted is what was seen; every number follows from the others."""
    prompts = [ids(length, seed + i) for i, length in enumerate(lengths)]
    limits = limits[: len(prompts)]
    if getattr(policy, "protect_prompt", False) and isinstance(policy.budget, int):
        prompts = [prompt[: policy.budget - policy.min_recent] for prompt in prompts]
    steps = []  # tokens held in all layers, sequences

    def see(cache):
        if cache.seen[0] > cache.prompt[0]:
            steps.append((cache.held, len(cache.seen)))

    with after_each_step(see):
        result = engine.generate(prompts, policy, max_new_tokens=limits, batch_size=batch_size)
    stats, sequences = result.stats, result.sequences
    token_bytes = 2 * KV_HEADS * 10 * 4

    assert [one.prompt_tokens for one in sequences] == [len(prompt) for prompt in prompts]
    assert [one.generated_tokens for one in sequences] == limits
    assert [len(one.token_ids) for one in sequences] == limits
    assert {one.finish_reason for one in sequences} == {"length"}
    # The last token is never fed: it needs no place in the cache.
    seen = [one.prompt_tokens + one.generated_tokens - 1 for one in sequences]
    final = [sum(per_layer) for per_layer in stats.kv_tokens_final]
    assert [len(per_layer) for per_layer in stats.kv_tokens_final] == [LAYERS] * len(prompts)
    assert stats.kv_bytes_full == sum(seen) * LAYERS * token_bytes
    assert stats.kv_bytes_final == sum(final) * token_bytes
    assert stats.evicted_tokens + sum(final) == sum(seen) * LAYERS
    assert stats.kv_reduction == 1 - stats.kv_bytes_final / stats.kv_bytes_full
    assert (stats.evicted_tokens > 0) <= (stats.rounds > 0)
    assert stats.kv_bytes_peak >= max(final) * token_bytes
    assert stats.kv_allocated_peak >= stats.kv_bytes_peak
    assert stats.decode_seconds >= 0
    assert stats.prefill_seconds > 0
    assert stats.prune_seconds <= stats.decode_seconds + stats.prefill_seconds
    if isinstance(policy, Pruner):
        count = sum(rows for _, rows in steps) * LAYERS
        mean = sum(held for held, _ in steps) / max(1, count)
        assert stats.kv_tokens_mean == pytest.approx(mean)
        peak = max([held for held, _ in steps], default=0) * token_bytes
        assert stats.kv_bytes_peak >= peak
    assert stats.policy == {"name": policy.name, **dataclasses.asdict(policy)}


def test_the_peak_counts_what_waits_beside_a_prefill(engine):
    """While a prompt is read, the batch it will join is there, too."""
    policy = LethePlus(budget=13, protect_prompt=False)
    prompts = [ids(61, 1), ids(53, 2)]
    stats = engine.generate(prompts, policy, max_new_tokens=1).stats
    assert stats.kv_bytes_peak == (13 + 53) * LAYERS * 2 * KV_HEADS * 10 * 4


def test_a_run_again_is_the_same_run(engine):
    """Greedy or sampled, with whatever policy: nothing is left behind in engine or policy."""
    for policy in (FullKV(), *POLICY_CASES.values()):
        options = {"max_new_tokens": 31, "temperature": 0.7, "seed": 5, "top_p": 0.9}
        prompts = [ids(13), ids(7, 1)]
        first, again = (engine.generate(prompts, policy, **options) for _ in range(2))
        assert lasting(first) == lasting(again)


# --- sequences and their ends


@few
@given(
    lengths=st.lists(st.integers(1, 22), min_size=2, max_size=5),
    limits=st.lists(st.integers(1, 41), min_size=5, max_size=5),
    policy=st.sampled_from([FullKV(), *POLICY_CASES.values()]),
    temperature=st.sampled_from([0.0, 1.0]),
    batch_size=st.sampled_from([None, 1, 2, 3]),
    seed=SEEDS,
)
def test_a_batch_is_each_prompt_alone(
    engine, lengths, limits, policy, temperature, batch_size, seed
):
    """Prompts and texts of different lengths, joining and leaving at any time: each gets its own
    text, its own budget and its own rounds, whatever its neighbours do."""
    if isinstance(policy, Pruner) and isinstance(policy.budget, int):
        lengths = [min(length, policy.budget - policy.min_recent) for length in lengths]
    prompts = [ids(length, seed + i) for i, length in enumerate(lengths)]
    options = {"temperature": temperature, "seed": seed}
    together = engine.generate(
        prompts, policy, limits[: len(prompts)], batch_size=batch_size, **options
    )
    totals = {"rounds": 0, "evicted_tokens": 0, "kv_bytes_final": 0, "kv_bytes_full": 0}
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], policy, limits[i], **options)
        assert together.sequences[i] == alone.sequences[0]
        assert together.stats.kv_tokens_final[i] == alone.stats.kv_tokens_final[0]
        totals = {key: total + getattr(alone.stats, key) for key, total in totals.items()}
    assert totals == {key: getattr(together.stats, key) for key in totals}


@pytest.mark.demo
def test_a_batch_is_each_prompt_alone_on_the_demo(demo_engine):
    """A trained model, prompts of different lengths, rounds at different times."""
    prompts = ["Name three colours, one per line. " * 4, "Why do we sleep? " * 15]
    policy = LethePlus(budget=80, interval=8)
    options = {"max_new_tokens": 29, "raw": True, "ignore_eos": True}
    together = demo_engine.generate(prompts, policy, **options)
    assert together.stats.rounds > 0
    for prompt, one in zip(prompts, together.sequences, strict=True):
        assert one == demo_engine.generate([prompt], policy, **options).sequences[0]


@pytest.mark.parametrize("policy", [FullKV(), POLICY_CASES["layer"], POLICY_CASES["head"]])
def test_samples_of_a_prompt_share_its_prefill_alone(engine, policy):
    """Sample i of a prompt depends on seed and i; sample 0 is the only one without num_samples."""
    options = {"max_new_tokens": 37, "temperature": 1.0, "seed": 3}
    prompts = [ids(11), ids(5, 1)]
    whole = engine.generate(prompts, policy, num_samples=3, **options).sequences
    assert len({tuple(one.token_ids) for one in whole}) == 6
    for batch_size in (1, 2, 4, 5):
        part = engine.generate(prompts, policy, num_samples=3, batch_size=batch_size, **options)
        assert part.sequences == whole
    fewer = engine.generate(prompts, policy, num_samples=2, **options).sequences
    assert fewer == [whole[0], whole[1], whole[3], whole[4]]
    assert engine.generate(prompts, policy, **options).sequences == [whole[0], whole[3]]


def test_an_end_of_text_ends_it_unless_ignored():
    """The text is the endless one, cut behind the first end; the end itself is not lost."""
    model, prompts = runs.model(), [ids(5), ids(7, 1), ids(3, 2)]
    endless = tokens_of(Engine(model).generate(prompts, max_new_tokens=43))
    eos = endless[1][17]
    engine = Engine(model, Letters(eos))
    result = engine.generate(prompts, max_new_tokens=43)
    for one, text in zip(result.sequences, endless, strict=True):
        cut = text[: text.index(eos) + 1] if eos in text else text
        assert one.token_ids == cut
        assert one.finish_reason == ("stop" if eos in text else "length")
        assert one.text == Letters().decode(cut)
    assert "stop" in {one.finish_reason for one in result.sequences}
    assert tokens_of(engine.generate(prompts, max_new_tokens=43, ignore_eos=True)) == endless


def test_the_last_position_ends_a_text():
    """A model of 41 positions feeds 41 tokens and no more; a prompt may fill it alone."""
    engine = Engine(runs.model(positions=41))
    for length in (1, 40, 41):
        one = engine.generate([ids(length)], max_new_tokens=100).sequences[0]
        assert one.finish_reason == "positions"
        assert length + one.generated_tokens == 42
    one = engine.generate([ids(30)], max_new_tokens=12).sequences[0]
    assert (one.finish_reason, one.generated_tokens) == ("length", 12)


def test_compact_positions_outgrow_the_model():
    """There a key's angle is its slot's: with a budget the text goes on, without one it ends."""
    engine = Engine(runs.model(positions=41))
    options = {"max_new_tokens": 90, "positions": "compact"}
    policy = LethePlus(budget=23, interval=7)
    one = engine.generate([ids(9)], policy, **options).sequences[0]
    assert (one.finish_reason, one.generated_tokens) == ("length", 90)
    one = engine.generate([ids(9)], **options).sequences[0]
    assert (one.finish_reason, one.generated_tokens) == ("positions", 33)
    # Before the first round slots are positions.
    absolute = engine.generate([ids(9)], policy, max_new_tokens=14)
    assert tokens_of(absolute) == [
        engine.generate([ids(9)], policy, **options).sequences[0].token_ids[:14]
    ]


def test_callbacks_tell_what_the_result_says():
    """on_token: every token once and in order. on_finish: every sequence once, complete."""
    engine, told, finished = Engine(runs.model(), Letters(3, 5, 7)), {}, {}
    result = engine.generate(
        [ids(5), ids(9, 1)],
        max_new_tokens=[23, 19],
        num_samples=2,
        batch_size=3,
        temperature=1.0,
        on_token=lambda index, token: told.setdefault(index, []).append(token),
        on_finish=lambda index, one: finished.update({index: dataclasses.replace(one)}),
    )
    assert [told[i] for i in range(4)] == tokens_of(result)
    assert [finished[i] for i in range(4)] == result.sequences


# --- Ctrl-C


def raising(after):
    """A callback that is interrupted the `after`th time."""
    calls = []

    def callback(*_):
        calls.append(0)
        if len(calls) == after:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("policy", [FullKV(), POLICY_CASES["layer"]], ids=["full", "lethe"])
@pytest.mark.parametrize("after", [1, 2, 3, 40, 61])
def test_an_interrupt_keeps_the_text_so_far(after, policy):
    """Wherever in a batch it comes: the tokens are the run's first, and statistics add up."""
    engine, prompts = Engine(runs.model(), Letters()), [ids(5), ids(11, 1), ids(3, 2)]
    limits = [31, 7, 29]
    whole = engine.generate(prompts, policy, limits)
    result = engine.generate(prompts, policy, limits, batch_size=2, on_token=raising(after))
    count = 0
    for one, full in zip(result.sequences, whole.sequences, strict=True):
        assert one.token_ids == full.token_ids[: one.generated_tokens]
        assert one.text == full.text[: one.generated_tokens]
        if one.generated_tokens < full.generated_tokens:
            assert one.finish_reason == "interrupted"
        count += one.generated_tokens
    assert count == after
    stats = result.stats
    assert (stats.evicted_tokens * 160) + stats.kv_bytes_final == stats.kv_bytes_full


def test_an_interrupt_in_on_finish_counts_nothing_twice():
    """Stopping once the first sequence is through: it is finished, the others interrupted."""
    engine = Engine(runs.model(), Letters())
    result = engine.generate([ids(5), ids(7, 1)], max_new_tokens=[9, 31], on_finish=raising(1))
    assert [one.finish_reason for one in result.sequences] == ["length", "interrupted"]
    assert [one.generated_tokens for one in result.sequences] == [9, 9]
    assert result.stats.kv_bytes_final == result.stats.kv_bytes_full == (13 + 15) * LAYERS * 160


@pytest.fixture
def pythons_ctrl_c():
    """Python's own handler of Ctrl-C is there again afterwards."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def pressing(at, times=1):
    """A hook that presses Ctrl-C, once or twice, the `at`th time it is called."""
    calls = []

    def hook(*_):
        calls.append(0)
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return hook


@pytest.mark.parametrize("policy", [FullKV(), POLICY_CASES["layer"]], ids=["full", "lethe"])
@pytest.mark.parametrize("owner", ["layers.1.mlp", "layers.0", "lm_head"])
def test_ctrl_c_amid_a_step_waits_for_its_end(pythons_ctrl_c, owner, policy):
    """Where it mostly comes: inside the model, when some layers have the token and some not."""
    model = runs.model()
    engine, prompts = Engine(model, Letters()), [ids(5), ids(11, 1)]
    whole = engine.generate(prompts, policy, max_new_tokens=43)
    for at in (1, 2, 3, 9, 37):  # the first two are the prefills
        hook = model.get_submodule(owner).register_forward_hook(pressing(at))
        result = engine.generate(prompts, policy, max_new_tokens=43)
        hook.remove()
        assert {one.finish_reason for one in result.sequences} == {"interrupted"}
        for one, full in zip(result.sequences, whole.sequences, strict=True):
            assert one.generated_tokens == max(0, at - 2)
            assert one.token_ids == full.token_ids[: one.generated_tokens]
            assert one.text == full.text[: one.generated_tokens]
        stats = result.stats
        assert stats.evicted_tokens * 160 + stats.kv_bytes_final == stats.kv_bytes_full
        assert stats.kv_reduction >= 0
    assert engine.generate(prompts, policy, max_new_tokens=43).sequences == whole.sequences


def test_a_second_ctrl_c_does_not_wait(pythons_ctrl_c):
    """It ends a step half way; the text so far is kept all the same."""
    model, prompts = runs.model(), [ids(5), ids(11, 1)]
    engine = Engine(model, Letters())
    whole = engine.generate(prompts, max_new_tokens=23)
    hook = model.layers[1].register_forward_hook(pressing(9, times=2))
    result = engine.generate(prompts, max_new_tokens=23)
    hook.remove()
    for one, full in zip(result.sequences, whole.sequences, strict=True):
        assert one.finish_reason == "interrupted"
        assert one.token_ids == full.token_ids[:7]
        assert one.text == full.text[:7]


@pytest.mark.parametrize("policy", [FullKV(), POLICY_CASES["layer"]], ids=["full", "lethe"])
def test_a_cache_that_goes_on_is_whole_however_often_ctrl_c_was_pressed(pythons_ctrl_c, policy):
    """A conversation's next turn stands on it: a step half way would count a token twice."""
    engine = Engine(runs.model())
    results = []
    for times in (1, 2):
        cache = engine.new_cache(policy)
        hook = engine.model.layers[1].register_forward_hook(pressing(9, times))
        cut = engine.generate([ids(5)], policy, max_new_tokens=23, cache=cache)
        hook.remove()
        unread = (ids(5) + cut.sequences[0].token_ids)[cache.seen[0] :]
        on = engine.generate([unread + ids(3, 1)], policy, max_new_tokens=9, cache=cache)
        results.append((cut.sequences, on.sequences, cache.seen, [x.lengths for x in cache.layers]))
    assert results[0][0][0].finish_reason == "interrupted"
    assert results[0] == results[1]


def test_an_engine_works_in_any_thread():
    """Signals belong to the main thread; elsewhere a run does without them."""
    engine, results = Engine(runs.model()), []
    thread = threading.Thread(
        target=lambda: results.append(engine.generate([ids(5)], max_new_tokens=7))
    )
    thread.start()
    thread.join()
    assert results[0].sequences == engine.generate([ids(5)], max_new_tokens=7).sequences
