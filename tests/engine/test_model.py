"""The transformer against transformers' own, and cached against uncached.

Tiny random checkpoints of every family are written by transformers' own `save_pretrained` and read
by `load_model`; weights are large and biases and norms random, so that no two logits agree by
chance. Both sides then compute in float32.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model as random_model

from lethe_mini.cache import KVCache, Notes
from lethe_mini.checkpoint.load import load_model
from lethe_mini.engine import Engine

VOCAB, POSITIONS = 67, 509
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Qwen3Moe"]
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 13}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 7.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 101,
    },
}
ROPE["yarn"] = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 101,
}
ROPE["yarn-all"] = ROPE["yarn"] | {
    "beta_fast": 20.0,
    "beta_slow": 2.0,
    "truncate": False,
    "mscale": 1.5,
    "mscale_all_dim": 0.5,
}
ROPE["yarn-given"] = ROPE["yarn"] | {"attention_factor": 0.75}
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

transformers.utils.logging.disable_progress_bar()


def reference(family, **changes):
    """A transformers model in float32 whose logits are spread out, biases and norms included."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 29,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": ROPE["default"],
        "tie_word_embeddings": False,
    }
    if family == "Mistral":
        sizes["sliding_window"] = None  # its default is a window
    if family == "Qwen3Moe":
        sizes |= EXPERTS | {"head_dim": 4}
    Config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(Config(**sizes | changes | ENDLESS))
    if family == "Qwen3Moe":
        model.set_experts_implementation("eager")  # its quicker ones want sizes of whole 16 bytes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def loaded(model, folder, spelling="rope_parameters"):
    """The same model, read from what transformers writes; `rope_scaling` is the hub's older way."""
    model.save_pretrained(folder)
    if spelling != "rope_parameters":
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {spelling: kind, **rope}
        path.write_text(json.dumps(config))
    return load_model(Path(folder), "cpu", torch.float32)


@torch.inference_mode()
def assert_same(model, ours, tokens):
    """Logits as transformers' to 1e-5 of the largest one, and far from constant."""
    expected = model(tokens).logits
    assert expected.std() > 0.1
    assert_close(ours(tokens), expected)


def assert_close(logits, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest logit: float32 promises no more."""
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@torch.inference_mode()
def greedy(model, prompt, count):
    """transformers' own greedy text."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=count, do_sample=False, pad_token_id=0
        ),
    )
    return out[0, len(prompt) :].tolist()


# --- equal to transformers

CASES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 10}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "llama-no-groups": ("Llama", {"num_key_value_heads": 6, "mlp_bias": True}),
    "llama-one-layer-one-head": (
        "Llama",
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen2-head-dim": ("Qwen2", {"head_dim": 14, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-tied": ("Qwen3", {"head_dim": 4, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1}),
    "qwen3moe": ("Qwen3Moe", {"norm_topk_prob": True, "head_dim": 10}),
    "qwen3moe-one": ("Qwen3Moe", {"num_experts_per_tok": 1, "attention_bias": True}),
    "qwen3moe-all": ("Qwen3Moe", {"num_experts_per_tok": 7, "tie_word_embeddings": True}),
    "qwen3moe-first-dense": ("Qwen3Moe", {"mlp_only_layers": [0]}),
    "qwen3moe-every-third": (
        "Qwen3Moe",
        {"num_hidden_layers": 6, "decoder_sparse_step": 3, "mlp_only_layers": [2, 11]},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-head-dim": ("Mistral", {"head_dim": 10, "sliding_window": POSITIONS}),
}


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path, case, rope):
    """Every family, each switch, each kind of RoPE, over more positions than llama3's original."""
    family, changes = CASES[case]
    model = reference(family, rope_parameters=ROPE[rope], **changes)
    assert_same(model, loaded(model, tmp_path), torch.randint(VOCAB, (3, 131)))


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_the_same_model(tmp_path, family):
    """Several files and their index, as large checkpoints are stored."""
    model = reference(family)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = load_model(tmp_path, "cpu", torch.float32)
    assert_same(model, ours, torch.randint(VOCAB, (2, 31)))


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hubs_spelling_of_rope_is_the_same_model(tmp_path, family, rope, spelling):
    """`rope_theta` beside `rope_scaling`, as checkpoints on the hub carry it."""
    model = reference(family, rope_parameters=ROPE[rope])
    assert_same(model, loaded(model, tmp_path, spelling), torch.randint(VOCAB, (2, 131)))


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("Llama", "llama3"),
        ("Llama", "linear"),
        ("Qwen2", "default"),
        ("Qwen3", "yarn"),
        ("Mistral", "linear"),
        ("Qwen3Moe", "default"),
    ],
)
def test_greedy_text_equals_that_of_transformers(tmp_path, family, rope):
    """200 tokens, prefill and decoding included, the same as transformers' own loop writes."""
    model = reference(family, rope_parameters=ROPE[rope])
    engine = Engine(loaded(model, tmp_path))
    prompt = torch.randint(VOCAB, (11,)).tolist()
    ours = engine.generate([prompt], max_new_tokens=200).sequences[0].token_ids
    assert ours == greedy(model, prompt, 200)


@settings(max_examples=max(10, settings.default.max_examples // 5))
@given(data=st.data())
def test_any_sizes_equal_transformers(data):
    """Odd sizes, head_dim beside hidden / heads, groups of 1, 2 and 3, in any combination."""
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (3, 2), (5, 3)]))
    heads = kv_heads * group
    family = data.draw(st.sampled_from(FAMILIES))
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * data.draw(st.sampled_from([3, 7])),
        "head_dim": data.draw(st.sampled_from([2, 6, 22])),
        "intermediate_size": data.draw(st.integers(1, 41)),
        "num_hidden_layers": data.draw(st.integers(1, 3)),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "rope_parameters": ROPE[data.draw(st.sampled_from([*ROPE]))],
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    if family == "Qwen3Moe":
        count = data.draw(st.integers(1, 9))
        changes["num_experts"] = count
        changes["num_experts_per_tok"] = data.draw(st.integers(1, count))
        changes["moe_intermediate_size"] = data.draw(st.integers(1, 17))
        changes["norm_topk_prob"] = data.draw(st.booleans())
        changes["decoder_sparse_step"] = data.draw(st.integers(1, 3))
        changes["mlp_only_layers"] = data.draw(st.lists(st.integers(0, 2), max_size=2))
    if family in ("Llama", "Qwen3", "Qwen3Moe"):
        changes["attention_bias"] = data.draw(st.booleans())
    if family == "Llama":
        changes["mlp_bias"] = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = reference(family, **changes)
    with tempfile.TemporaryDirectory() as folder:
        ours = loaded(model, folder)
    assert_same(model, ours, torch.randint(VOCAB, (2, data.draw(st.integers(1, 23)))))


# --- cached equals uncached


def tiny(**changes):
    """A random model of our own: groups of 3, biases, llama3 RoPE."""
    llama = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "vocab_size": VOCAB}
    sizes = {"num_hidden_layers": 2, "rope_parameters": ROPE["llama3"]}
    return random_model(**{**llama, **sizes, **changes})


@given(
    chunks=st.lists(st.integers(1, 19), min_size=1, max_size=7),
    batch=st.sampled_from([1, 3]),
    scored=st.booleans(),
    window=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
)
def test_any_chunking_through_a_cache_gives_the_uncached_logits(
    chunks, batch, scored, window, seed
):
    """However the tokens are cut, and whatever else the cache is asked to remember."""
    torch.manual_seed(seed)
    model = tiny()
    tokens = torch.randint(VOCAB, (batch, sum(chunks)))
    cache = KVCache(model.config, batch=batch, notes=Notes(scored, window))
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    assert_close(torch.cat(parts, 1), model(tokens))
    assert cache.seen == [sum(chunks)] * batch


@given(
    prompts=st.lists(st.integers(1, 23), min_size=2, max_size=4),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_sequences_of_different_lengths_share_a_cache(prompts, chunks, seed):
    """Joined after prompts of any lengths, each sequence gets the logits it has alone."""
    torch.manual_seed(seed)
    model = tiny()
    rows = [torch.randint(VOCAB, (1, prompt + sum(chunks))) for prompt in prompts]
    caches = [KVCache(model.config, notes=Notes(scored=True)) for _ in rows]
    for row, cache, prompt in zip(rows, caches, prompts, strict=True):
        model(row[:, :prompt], cache=cache)
    for other in caches[1:]:
        caches[0].join(other)
    tails = torch.cat([row[:, -sum(chunks) :] for row in rows])
    parts = [model(part, cache=caches[0]) for part in tails.split(chunks, dim=1)]
    for row, logits in zip(rows, torch.cat(parts, 1), strict=True):
        assert_close(logits, model(row)[0, -sum(chunks) :])


@given(shift=st.integers(0, 300), seed=st.integers(0, 99))
def test_only_distances_matter(shift, seed):
    """RoPE: the whole text moved along by any number of positions gives the same logits."""
    torch.manual_seed(seed)
    model = tiny()
    tokens, positions = torch.randint(VOCAB, (2, 13)), torch.arange(13).expand(2, 13)
    # The angle itself is float32, so off by up to 300 * 2 ** -24.
    assert_close(model(tokens, positions + shift), model(tokens, positions), 1e-4)


def test_the_last_logits_alone_are_those_of_all():
    """`last_only` spares the head, and changes nothing else."""
    model, tokens = tiny(), torch.randint(VOCAB, (3, 17))
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    """Logits are float32 whatever the weights are, and off by no more than rounding."""
    model, tokens = tiny(), torch.randint(VOCAB, (2, 31))
    expected = model(tokens)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == torch.float32
    error = (logits - expected).norm() / expected.norm()
    assert error < 40 * torch.finfo(dtype).eps


# --- the demo model


@pytest.mark.demo
def test_the_demo_model_equals_transformers(demo):
    """A trained model: logits to 1e-4, and 200 greedy tokens.

    The tokens are compared by induction: transformers' choice after every prefix of ours is ours.
    """
    model = transformers.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    engine = Engine.from_pretrained(str(demo), device="cpu", dtype="float32")
    result = engine.generate(
        ["Tell me about the sea."], max_new_tokens=200, ignore_eos=True, system="Be brief."
    )
    prompt = engine.text.encode_prompt("Tell me about the sea.", "Be brief.")
    tokens = torch.tensor([prompt + result.sequences[0].token_ids])
    with torch.inference_mode():
        expected, ours = model(tokens).logits, engine.model(tokens)
    assert (ours - expected).abs().max() < 1e-4
    choices = expected[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert result.sequences[0].token_ids == choices
    assert len(choices) == 200
