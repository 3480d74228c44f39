"""Laws of the policies inside transformers: they write, keep and hold what our engine does."""

import copy
import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    SIZES,
    full_pass,
    new_model,
    some_tokens,
)
from small_policies import make
from transformers import AutoModelForCausalLM

from lethe_mini import Engine, FullKV, Lethe, LethePlus, Recall, SnapKV, reasoner
from lethe_mini.attention import attend
from lethe_mini.errors import UserError
from lethe_mini.integrations.transformers import capped, pruned
from lethe_mini.policies import POLICIES
from lethe_mini.reasoner.problems import TRAINED, problem

ROOT = Path(__file__).parents[2]
FEW = [Lethe, LethePlus, Recall, SnapKV]
every_policy = pytest.mark.parametrize("kind", POLICIES.values(), ids=POLICIES)
few_policies = pytest.mark.parametrize("kind", FEW, ids=lambda kind: kind.name)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def generate(model, tokens, cache, count, mask=None, **options):
    """The new tokens (B, count)."""
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(tokens) if mask is None else mask
    given = {"past_key_values": cache, "attention_mask": mask, "max_new_tokens": count}
    return model.generate(tokens, **given | greedy | options)[:, tokens.shape[1] :]


def step(model, tokens, cache, **options):
    """The logits (B, T, vocab) of one forward pass."""
    with torch.no_grad():
        return model(tokens, past_key_values=cache, **options).logits


def small(kind, **changes):
    """A policy with a small budget, which may evict of the prompt, too."""
    return make(kind, **{"protect_prompt": False} | changes)


def held(cache, row=0):
    """[layer][head]: the positions that a sequence holds."""
    cache.report()
    return [layer.positions[row, :, : layer.lengths[row]].tolist() for layer in cache.kv.layers]


def may(family, kind):
    """Whether a policy can be served; Recall and LethePlus turn keys back, all pairs of them."""
    return "partial" not in family or kind not in (LethePlus, Recall)


# Like our engine.


@pytest.fixture(scope="module")
def trained():
    """Of a name: our engine and the model of transformers, loaded once."""
    made = {}

    def load(name, folder):
        if name not in made:
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            made[name] = Engine.from_pretrained(name, "cpu", "float32"), theirs.eval()
        return made[name]

    return load


def both_agree(engine, model, policy, prompt, count):
    mine = engine.new_cache(policy)
    right = engine.generate([prompt], policy, count, temperature=0, ignore_eos=True, cache=mine)
    cache = pruned(model, policy)
    tokens = generate(model, torch.tensor([prompt]), cache, count)
    assert tokens[0].tolist() == right.sequences[0].token_ids
    report = cache.report()
    assert report.rounds == right.stats.rounds
    assert report.evicted == right.stats.evicted_tokens
    assert report.kept == right.stats.kv_tokens_final
    for layer, other in zip(cache.kv.layers, mine.layers, strict=True):
        assert torch.equal(layer.positions, other.positions)
    return report


@every_policy
def test_the_reasoner_writes_and_keeps_what_our_engine_does(trained, kind):
    engine, model = trained("reasoner", Path(reasoner.__file__).parent)
    prompt = engine.text.encode(problem("walk", random.Random(0), max(TRAINED["walk"])).prompt)
    policy = make(kind, budget=len(prompt) + 60, interval=16, window=32)
    report = both_agree(engine, model, policy, prompt, 300)
    assert kind is FullKV or report.rounds > 10


@pytest.mark.demo
@every_policy
def test_the_demo_model_writes_and_keeps_what_our_engine_does(trained, demo, kind):
    engine, model = trained("demo", demo)
    prompt = engine.text.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[:80]
    policy = small(kind, budget=60, interval=4, window=32)
    report = both_agree(engine, model, policy, prompt, 14)
    assert kind is FullKV or report.rounds >= 3


@few_policies
def test_a_second_generate_goes_on_as_our_engine_does(trained, kind):
    """A conversation: two questions, the first whole or in chunks."""
    engine, model = trained("reasoner", Path(reasoner.__file__).parent)
    policy = small(kind, budget=70, interval=8, window=16)
    mine, cache, chunked = engine.new_cache(policy), pruned(model, policy), pruned(model, policy)
    text = torch.zeros(1, 0, dtype=torch.long)
    for question, size in ((some_tokens(50), 8), (some_tokens(23, seed=1), None)):
        unread = text[:, mine.seen[0] :]
        text = torch.cat((text, question), dim=1)
        prompt = torch.cat((unread, question), dim=1).tolist()
        right = engine.generate(prompt, policy, 40, temperature=0, ignore_eos=True, cache=mine)
        for one, chunk in ((cache, None), (chunked, size)):
            tokens = generate(model, text, one, 40, prefill_chunk_size=chunk)
            assert tokens[0].tolist() == right.sequences[0].token_ids
            for layer, other in zip(one.kv.layers, mine.layers, strict=True):
                assert torch.equal(layer.positions, other.positions)
        text = torch.cat((text, tokens), dim=1)
    assert cache.report() == chunked.report()


# Every family.


@every_family
@few_policies
def test_logits_are_those_of_a_full_pass_without_the_evicted(family, kind):
    """Exactness, against attention by the book that hides from each query what was evicted."""
    if not may(family, kind):
        return
    tokens, prompt, model = some_tokens(61), 7, new_model(family)
    cache = pruned(model, make(kind))
    layers = [place for place, layer in enumerate(cache.layers) if not layer.is_sliding]
    logits = [step(model, tokens[:, :prompt], cache)]
    heads, T = cache.kv.layers[0].keys.shape[1], tokens.shape[1]
    looks = {place: torch.ones(heads, T, T).tril().bool() for place in layers}
    for t in range(prompt, T):
        for place, positions in zip(layers, held(cache), strict=True):
            for head, kept in enumerate(positions):
                looks[place][head, t] = False
                looks[place][head, t, [*kept, t]] = True
        logits.append(step(model, tokens[:, t : t + 1], cache))
    right = full_pass(family, tokens, looks)
    torch.testing.assert_close(torch.cat(logits, dim=1)[0], right, atol=2e-5, rtol=1e-5)
    assert cache.report().evicted


@every_family
def test_room_enough_changes_no_bit(family):
    """No-op: with a budget beyond the text, logits are those of FullKV bit by bit, and close to
    those of the model as it was. Without a cache it stays the model that it was."""
    model, tokens = new_model(family), some_tokens(37)
    model.set_attn_implementation("eager")
    plain = model(tokens, use_cache=False).logits
    runs = {}
    for kind in (FullKV, *(kind for kind in FEW if may(family, kind))):
        cache = pruned(model, make(kind, budget=1000))
        runs[kind] = torch.cat(
            [step(model, part, cache) for part in (tokens[:, :30], *tokens[:, 30:].split(1, 1))], 1
        )
        assert torch.equal(runs[kind], runs[FullKV])
    for logits in (runs[FullKV], model(tokens, use_cache=False).logits):
        torch.testing.assert_close(logits, plain, atol=2e-5, rtol=1e-5)


def padded(texts):
    """Texts (1, n) as a batch padded on the left, and its attention mask."""
    most = max(text.shape[1] for text in texts)
    rows = [torch.nn.functional.pad(text, (most - text.shape[1], 0)) for text in texts]
    masks = [torch.arange(-most, 0)[None] >= -text.shape[1] for text in texts]
    return torch.cat(rows), torch.cat(masks).long()


@every_policy
@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
def test_a_padded_batch_gives_each_sequence_what_it_gets_alone(kind, family):
    """Tokens, and the positions it holds, whole or in chunks. One ends early: transformers then
    feeds it padding, which disturbs no other. In float64, so that rounding decides nothing."""
    model = new_model(family, torch.float64)
    policy = small(kind, budget=40)
    texts = [some_tokens(n, seed=n) for n in (11, 3, 29, 17)]
    tokens, mask = padded(texts)
    alone = []
    for text in texts:
        cache = pruned(model, policy)
        alone.append((generate(model, text, cache, 33)[0].tolist(), held(cache)))
    for chunk in (None, 8) if family == "Llama" else (None,):  # older versions cannot with windows
        cache = pruned(model, policy)
        new = generate(model, tokens, cache, 33, mask, prefill_chunk_size=chunk)
        report = cache.report()
        assert report.seen == [text.shape[1] + 32 for text in texts]
        for row, (right, positions) in enumerate(alone):
            assert new[row].tolist() == right
            assert held(cache, row) == positions
    end = alone[1][0][9]  # a token that the second sequence surely writes, now its end
    new = generate(model, tokens, pruned(model, policy), 33, mask, eos_token_id=end)
    for row, (right, _) in enumerate(alone):
        cut = right.index(end) + 1 if end in right else len(right)
        assert new[row, :cut].tolist() == right[:cut]


def test_a_padded_conversation_goes_on():
    """The second prompts of a batch, padded where they begin, in the middle of the text."""
    model, policy = new_model("Qwen3", torch.float64), small(LethePlus)
    firsts, seconds = ([some_tokens(n, seed=n) for n in counts] for counts in ((9, 4), (5, 13)))
    (a, a_mask), (b, b_mask) = padded(firsts), padded(seconds)
    cache = pruned(model, policy)
    new = generate(model, a, cache, 20, a_mask)
    text = torch.cat((a, new, b), dim=1)
    mask = torch.cat((a_mask, torch.ones_like(new), b_mask), dim=1)
    again = generate(model, text, cache, 20, mask)
    for row, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        alone = pruned(model, policy)
        whole = torch.cat((first, generate(model, first, alone, 20), second), dim=1)
        assert again[row].tolist() == generate(model, whole, alone, 20)[0].tolist()
        assert held(cache, row) == held(alone)


def test_samples_of_one_prompt_are_sequences_of_their_own():
    model, policy = new_model(), small(Lethe)
    cache = pruned(model, policy)
    prompt = some_tokens(15)
    texts = generate(model, prompt, cache, 30, do_sample=True, num_return_sequences=3)
    assert len({tuple(text) for text in texts.tolist()}) == 3
    for row, text in enumerate(texts):
        alone = pruned(model, policy)
        for part in (prompt, *text[None, :-1].split(1, dim=1)):
            step(model, part, alone)
        assert held(cache, row) == held(alone)


# Memory.


def tensors_of(thing, found):
    """All tensors that can be reached from an object, by the address of their memory."""
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for part in thing.values():
            tensors_of(part, found)
    elif isinstance(thing, list | tuple):
        for part in thing:
            tensors_of(part, found)
    elif hasattr(thing, "__dict__") and id(thing) not in found:
        found[id(thing)] = 0
        tensors_of(vars(thing), found)
    return found


def test_memory_stays_what_the_report_says():
    """After 2,000 tokens, by the tensors that can be reached from the cache, and by all of the
    process that have the width of a key."""
    model = new_model()
    cache = pruned(model, small(Lethe, budget=256, interval=64))
    generate(model, some_tokens(20), cache, 1981)
    report = cache.report()
    assert report.seen == [2000]
    assert sum(report.kept[0]) <= 3 * (256 + 64)
    assert report.evicted == 3 * 2000 - sum(report.kept[0])
    width = 2 * 2 * 10 * 4  # bytes of a key and a value of one token in one layer
    assert report.bytes_full == 3 * 2000 * width
    inv_freq = cache.kv.layers[0].inv_freq
    reached = tensors_of(cache.kv, {})
    reached.pop(inv_freq.untyped_storage().data_ptr())
    assert sum(reached.values()) == report.bytes
    assert report.bytes < 3 * (256 + 64 + 128) * (width + 2 * 2 * 4) < report.bytes_full / 2
    gc.collect()
    all_keys = [
        one for one in gc.get_objects()
        if type(one) is torch.Tensor and one.dim() == 4 and one.shape[1::2] == (2, 10)
    ]  # fmt: skip
    assert sum(one.untyped_storage().nbytes() for one in all_keys) <= report.bytes
    mean = round(sum(report.kept[0]) / 3)
    assert str(report).startswith(f"2,000 tokens seen, {mean} held per sequence and layer")
    assert f"{report.evicted:,} evicted in {report.rounds} rounds" in str(report)


def test_an_empty_cache_reports_nothing():
    report = pruned(new_model(), FullKV()).report()
    assert (report.seen, report.kept, report.evicted, report.bytes) == ([], [], 0, 0)
    assert str(report).startswith("0 tokens seen, 0 held")


# What transformers lets one do.


def test_modes_mix_and_no_gradient_is_kept():
    """Passes with gradients, without, and in inference mode write to one storage, and so does the
    round of a report."""
    model, tokens = new_model(), some_tokens(29)
    right = generate(model, tokens, pruned(model, small(Lethe)), 9)
    cache = pruned(model, small(Lethe))
    with torch.inference_mode():
        model(tokens[:, :28], past_key_values=cache)
        assert cache.report().rounds == 1
    step(model, tokens[:, 28:], cache)
    model.requires_grad_(True)
    cache = pruned(model, small(Lethe))
    with torch.inference_mode():
        model(tokens[:, :11], past_key_values=cache)
    model(tokens[:, 11:20], past_key_values=cache)
    assert generate(model, tokens, cache, 9).tolist() == right.tolist()
    assert not cache.kv.layers[0].keys.requires_grad


def test_a_copy_goes_on_by_itself():
    model, tokens = new_model(), some_tokens(31)
    cache = pruned(model, small(LethePlus))
    step(model, tokens[:, :30], cache)
    twin = copy.deepcopy(cache)
    new = generate(model, tokens, cache, 9)
    assert twin.report().seen == [30]
    assert generate(model, tokens, twin, 9).tolist() == new.tolist()


def test_sixteen_bits_keep_scores_in_thirty_two():
    model = new_model("Gemma 2", torch.bfloat16)
    cache = pruned(model, small(Lethe))
    generate(model, some_tokens(21), cache, 20)
    layer = cache.kv.layers[1]
    assert (layer.keys.dtype, layer.scores.dtype) == (torch.bfloat16, torch.float32)
    assert layer.scores.isfinite().all()
    assert cache.report().rounds


def test_a_compiled_model_writes_the_same():
    """torch.compile leaves the attention as it is, and compiles the rest."""
    tokens, model = some_tokens(13), new_model()
    right, cache = pruned(model, small(Lethe)), pruned(model, small(Lethe))
    for one, forward in (
        (right, model.forward),
        (cache, torch.compile(model.forward, backend="eager")),
    ):
        model.forward = forward
        one.logits = [step(model, part, one) for part in (tokens, tokens[:, :1], tokens[:, 1:2])]
    assert held(cache) == held(right)
    for mine, plain in zip(cache.logits, right.logits, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 83), (5, 5), (67, 83), (130, 131)])
@pytest.mark.parametrize("lag", [0, 3])
def test_capped_attention_is_attention_of_capped_logits(T, S, lag):
    """Without a cap to speak of it is `attend`; with one, what is written out here."""
    q, k, v = torch.randn(2, 6, T, 10), torch.randn(2, 2, S, 10), torch.randn(2, 2, S, 10)
    for mine, right in zip(
        capped(q, k, v, None, 1e6, lag), attend(q, k, v, None, True, lag), strict=True
    ):
        torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)
    looks = torch.ones(T, S).tril(S - T).bool()
    logits = q @ k.repeat_interleave(3, dim=1).mT / 10**0.5
    weights = (0.7 * (logits / 0.7).tanh()).masked_fill(~looks, -torch.inf).softmax(-1)
    out, mass = capped(q, k, v, looks[None, None], 0.7, lag)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(3, dim=1))
    counted = weights * torch.ones(T, S).tril(S - T - lag)
    torch.testing.assert_close(mass, counted.view(2, 2, 3, T, S).sum((2, 3)))


# What is refused, each in one line.


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("Mistral", {"sliding_window": 8}, "every layer of MistralForCausalLM has a sliding"),
        ("Bloom", {}, "BloomForCausalLM does not use the attention or the cache"),
        ("Mamba", {}, "MambaForCausalLM does not use the attention or the cache"),
        ("T5", {}, "T5ForConditionalGeneration does not use the attention or the cache"),
        (
            "MiniMax", {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "MiniMaxForCausalLM has linear_attention",
        ),
        (
            "Gemma3n", {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
            "Gemma3nForCausalLM has layers that share keys",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_served_is_refused_by_name(kind, changes, why):
    text = "Text" if kind == "Gemma3n" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**SIZES | changes)
    name = "T5ForConditionalGeneration" if kind == "T5" else f"{kind}ForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    with pytest.raises(UserError, match=why):
        pruned(model, Lethe(budget=512))


def test_attention_that_asks_for_more_is_refused_by_name():
    """GPT-OSS has a sink beside the keys, of each head."""
    sizes = {**SIZES, "num_local_experts": 4, "intermediate_size": 16, "hidden_size": 64}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    with pytest.raises(UserError, match="GptOssAttention, which asks for s_aux"):
        step(model.eval(), some_tokens(3), pruned(model, FullKV()))


@pytest.mark.parametrize("kind", [LethePlus, Recall])
def test_a_policy_that_turns_keys_is_refused_where_they_turn_otherwise(kind):
    model = new_model("Phi-3, partial RoPE")
    with pytest.raises(UserError, match=f"{kind.__name__} turns keys .* Phi3ForCausalLM"):
        step(model, some_tokens(3), pruned(model, kind()))


def test_other_kinds_of_rope_are_known():
    """Pairs side by side, and angles that change with the length, are not ours; YaRN is."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    for kind, rope, serves in (
        ("Llama", yarn, True), ("Llama", dynamic, False), ("Helium", None, False)
    ):  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(**SIZES)
        if rope is not None:
            config.rope_parameters = {"rope_theta": 10000.0, **rope}
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        cache = pruned(model, make(Recall))
        if serves:
            assert generate(model, some_tokens(9), cache, 40).shape == (1, 40)
            assert cache.report().rounds
        else:
            with pytest.raises(UserError, match="turns keys"):
                step(model, some_tokens(3), cache)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "no beam search"),
        ({"prompt_lookup_num_tokens": 3, "eos_token_id": 2}, "no assisted decoding"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
    ],
)
def test_a_way_to_generate_that_cannot_be_served_is_refused(options, why):
    model = new_model()
    with pytest.raises(ValueError, match=why) as error:
        generate(model, some_tokens(19), pruned(model, small(Lethe)), 9, **options)
    assert "\n" not in str(error.value)


def test_an_assistant_is_refused():
    model = new_model()
    options = {"assistant_model": new_model("Qwen2"), "eos_token_id": 2}
    with pytest.raises(UserError, match="no assisted decoding"):
        generate(model, some_tokens(19), pruned(model, small(Lethe)), 9, **options)


def test_what_is_no_model_or_no_policy_is_refused():
    with pytest.raises(UserError, match="takes a model of transformers, not str"):
        pruned("Qwen/Qwen3-4B", Lethe())
    with pytest.raises(UserError, match="takes a policy such as Lethe"):
        pruned(new_model(), "lethe")
    spread = new_model()
    spread.lm_head.to("meta")
    with pytest.raises(UserError, match="LlamaForCausalLM is on several"):
        pruned(spread, Lethe())


def test_a_cache_is_for_one_model():
    model, other = new_model(), new_model()
    cache, _ = pruned(model, FullKV()), pruned(other, FullKV())
    with pytest.raises(UserError, match="made for another model"):
        step(other, some_tokens(3), cache)
    step(model, some_tokens(3), cache)
    with pytest.raises(UserError, match="belongs to another model"):
        step(other, some_tokens(3), cache)


def test_a_cache_is_for_one_batch():
    model = new_model()
    cache = pruned(model, FullKV())
    step(model, some_tokens(3).repeat(2, 1), cache)
    with pytest.raises(UserError, match="holds 2 sequences, not 3"):
        step(model, some_tokens(1).repeat(3, 1), cache)


def test_another_attention_set_since_is_noticed():
    model = new_model()
    cache = pruned(model, FullKV())
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="another one was set since"):
        step(model, some_tokens(3), cache)


def test_a_prompt_without_room_is_refused_before_anything_is_computed():
    model = new_model()
    cache = pruned(model, make(Lethe, budget=19))
    with pytest.raises(UserError, match="budget 19 is too small"):
        generate(model, some_tokens(23), cache, 5)
    assert generate(model, some_tokens(7), cache, 30).shape == (1, 30)


def test_masks_that_hide_what_was_read_or_are_not_causal_are_refused():
    model = new_model()
    cache = pruned(model, FullKV())
    step(model, some_tokens(9), cache)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 4] = 0
    with pytest.raises(UserError, match=r"shows \[11\] tokens .* seen \[12\]"):
        step(model, some_tokens(3), cache, attention_mask=mask)
    with pytest.raises(UserError, match=r"shows \[3\] tokens"):
        step(model, some_tokens(3), cache, attention_mask=mask[:, -3:])
    free = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    for other in (free, free.float().log(), free.expand(1, 6, 5, 5)):
        with pytest.raises(UserError, match="takes causal attention"):
            step(model, some_tokens(5), pruned(model, FullKV()), attention_mask=other)


def test_dropout_is_refused():
    model = new_model()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="asks for dropout"):
        step(model.train(), some_tokens(3), pruned(model, FullKV()))


# The example.


def test_the_example_runs_and_is_short():
    example = ROOT / "examples/with_transformers.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, example], cwd=ROOT, env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held per sequence and layer" in done.stdout
