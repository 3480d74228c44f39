"""ModelConfig: what a config.json means, and that anything else is one line, never a crash."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lethe_mini.checkpoint.config import DTYPES, parse_config, read_config, read_json
from lethe_mini.checkpoint.load import named_weights
from lethe_mini.checkpoint.rope import ROPE_TYPES, YARN, YARN_FACTORS, inverse_frequencies
from lethe_mini.errors import UserError
from lethe_mini.model import Transformer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
QWEN3MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(data, match):
    """`data` raises a UserError of one line that names the file and matches `match`."""
    with pytest.raises(UserError, match=match) as caught:
        parse_config(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


def test_sizes_are_read_and_the_rest_has_transformers_defaults():
    config = parse_config(LLAMA)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (101, 48, 96)
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 6)
    assert (config.num_key_value_heads, config.head_dim) == (2, 8)
    assert config.rms_norm_eps == 1e-5
    assert config.inv_freq == inverse_frequencies("default", 10000.0, 8, {})
    assert config.rope_factor == 1.0
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert config.tie_word_embeddings is False
    assert config.dtype == "float32"


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(LLAMA).head_dim = 4


@pytest.mark.parametrize("null", [True, False])
def test_optional_keys_may_be_absent_or_null(null):
    optional = ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]
    keys = [*optional, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "mlp_bias"]
    keys += ["attention_bias", "tie_word_embeddings", "hidden_act", "layer_types", "dtype"]
    keys += ["quantization_config", "sliding_window", "partial_rotary_factor", "torch_dtype"]
    data = LLAMA | dict.fromkeys(keys) if null else without(LLAMA, *keys)
    config = parse_config(data)
    assert config.num_key_value_heads == config.num_attention_heads == 6
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)


def test_qwen2_has_biases_on_qkv_alone_whatever_the_file_says():
    config = parse_config(QWEN2 | {"attention_bias": False, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)


def test_qwen3_normalizes_q_and_k_and_has_a_head_size_of_its_own():
    config = parse_config(QWEN3)
    assert (config.qk_norm, config.head_dim, config.qkv_bias) == (True, 128, False)
    assert parse_config(QWEN3 | {"head_dim": 64}).head_dim == 64
    biased = parse_config(QWEN3 | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert parse_config(without(QWEN3, "max_position_embeddings")).max_position_embeddings == 32768


def test_a_mixture_says_which_layers_have_experts():
    config = parse_config(QWEN3MOE)
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (24, False)
    assert (config.qk_norm, config.head_dim, config.expert_layers) == (True, 8, (0, 1, 2))
    assert parse_config(QWEN3MOE | {"decoder_sparse_step": 2}).expert_layers == (1,)
    assert parse_config(QWEN3MOE | {"mlp_only_layers": [0, 2, 9]}).expert_layers == (1,)
    assert parse_config(QWEN3MOE | {"decoder_sparse_step": 4}).expert_layers == ()
    # transformers 5 writes another name.
    renamed = without(QWEN3MOE, "num_experts") | {"num_local_experts": 8}
    assert parse_config(renamed) == config
    assert parse_config(QWEN3).expert_layers == ()


@pytest.mark.parametrize("window", [None, 512, 9999])
def test_a_mixtures_window_may_be_switched_off_or_as_long_as_its_positions(window):
    parse_config(QWEN3MOE | {"use_sliding_window": True, "sliding_window": window})
    parse_config(QWEN3MOE | {"use_sliding_window": False, "sliding_window": 4})
    # It reaches every layer, whatever max_window_layers says.
    short = {"use_sliding_window": True, "sliding_window": 511, "max_window_layers": 99}
    refused(QWEN3MOE | short, "sliding-window attention")


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"num_experts": 10**6}, "num_experts .1000000. is larger than 4096"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok .9. is above num_experts .8."),
        ({"num_experts": None}, "'num_local_experts' is missing"),
        ({"num_experts_per_tok": None}, "'num_experts_per_tok' is missing"),
        ({"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
        ({"mlp_only_layers": 3}, "mlp_only_layers should be a list of layers"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers should be"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step should be"),
        ({"norm_topk_prob": 1}, "norm_topk_prob should be true or false"),
        ({"shared_expert_intermediate_size": 48}, "shared_expert_intermediate_size 48 is not"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(extra, match):
    refused(QWEN3MOE | extra, match)


def test_mistral_has_no_biases_whatever_the_file_says():
    config = parse_config(MISTRAL | {"attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert not config.qk_norm
    assert config.head_dim == 8


@pytest.mark.parametrize("window", [None, 512, 4096])
def test_mistrals_window_may_be_as_long_as_its_positions(window):
    assert parse_config(MISTRAL | {"sliding_window": window}).max_position_embeddings == 512


@pytest.mark.parametrize("window", [511, 1, "x", True])
def test_a_mistral_whose_window_hides_tokens_is_refused(window):
    refused(MISTRAL | {"sliding_window": window}, "sliding-window attention")
    # Without the key it is 4096, as in transformers.
    long = without(MISTRAL, "sliding_window") | {"max_position_embeddings": 8192}
    refused(long, "sliding-window attention")


def test_yarn_factors_of_attention():
    """Given, or 0.1 ln(factor) + 1; `attn_factor` multiplies that, as in yarn's own code: in
    DeepSeek-R1-0528-Qwen3-8B the two make 1."""

    def factor(**numbers):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        return parse_config(QWEN3 | {"rope_scaling": rope | numbers}).rope_factor

    assert factor() == pytest.approx(1.13863, abs=1e-5)
    assert factor(attention_factor=0.5) == 0.5
    assert factor(attn_factor=0.8782488562869419) == pytest.approx(1, abs=1e-6)
    assert factor(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(1.27726 / 1.13863, abs=1e-5)
    assert factor(factor=0.5) == 1
    assert parse_config(QWEN3).rope_factor == 1


# What the hub's config.json files say, and how many parameters their checkpoints have.
HUB = {
    "Qwen3-0.6B": (
        QWEN3,
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936}
        | {"tie_word_embeddings": True, "rope_theta": 1000000, "max_position_embeddings": 40960}
        | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
        596_049_920,
    ),
    "Qwen3-8B": (
        QWEN3,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
        | {"tie_word_embeddings": False, "rope_theta": 1000000, "max_position_embeddings": 40960},
        8_190_735_360,
    ),
    "DeepSeek-R1-0528-Qwen3-8B": (
        QWEN3,
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
        | {"tie_word_embeddings": False, "rope_theta": 1000000, "max_position_embeddings": 131072}
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8782488562869419}
            | {"original_max_position_embeddings": 32768}
        },
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        QWEN3MOE,
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        | {"rope_theta": 1000000.0, "max_position_embeddings": 40960, "sliding_window": None}
        | {"use_sliding_window": False, "max_window_layers": 48, "tie_word_embeddings": False},
        30_532_122_624,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768}
        | {"rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": None},
        7_248_023_552,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        QWEN2,
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
        | {"rope_theta": 10000, "max_position_embeddings": 131072, "sliding_window": 4096}
        | {"use_sliding_window": False, "max_window_layers": 21},
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        QWEN2,
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"rope_theta": 10000, "max_position_embeddings": 131072, "use_sliding_window": False},
        7_615_616_512,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        LLAMA,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
        | {"rope_theta": 500000.0, "max_position_embeddings": 131072}
        | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_have_their_parameters_to_the_last_one(name):
    """A tied head counts once, as in the checkpoint."""
    family, facts, count = HUB[name]
    with torch.device("meta"):
        model = Transformer(parse_config(family | facts))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def names_on_the_hub(family, facts):
    """Every tensor of such a checkpoint, by its name there less the leading `model.`: its shape.
    Facts of the formats, written down without the code that is tested."""
    D = facts.get("head_dim", facts["hidden_size"] // facts["num_attention_heads"])
    hidden, inner = facts["hidden_size"], facts["intermediate_size"]
    q, kv = facts["num_attention_heads"] * D, facts["num_key_value_heads"] * D
    named = {"embed_tokens.weight": (facts["vocab_size"], hidden), "norm.weight": (hidden,)}
    if not facts.get("tie_word_embeddings"):
        named["lm_head.weight"] = (facts["vocab_size"], hidden)
    for i in range(facts["num_hidden_layers"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        layer |= {"self_attn.q_proj": (q, hidden), "self_attn.o_proj": (hidden, q)}
        layer |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        if family in (QWEN3, QWEN3MOE):
            layer |= {"self_attn.q_norm": (D,), "self_attn.k_norm": (D,)}
        mlps = {"mlp": inner}
        if family is QWEN3MOE:
            layer["mlp.gate"] = (facts["num_experts"], hidden)
            mid = facts["moe_intermediate_size"]
            mlps = {f"mlp.experts.{e}": mid for e in range(facts["num_experts"])}
        for mlp, width in mlps.items():
            layer |= {f"{mlp}.gate_proj": (width, hidden), f"{mlp}.up_proj": (width, hidden)}
            layer[f"{mlp}.down_proj"] = (hidden, width)
        named |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if family is QWEN2:
            biases = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            named |= {f"layers.{i}.self_attn.{name}.bias": (n,) for name, n in biases.items()}
    return named


@pytest.mark.parametrize("name", HUB)
def test_models_of_the_hub_have_their_tensors_under_their_names(name):
    family, facts, _ = HUB[name]
    with torch.device("meta"):
        model = Transformer(parse_config(family | facts))
    named = {key: tuple(weight.shape) for key, weight in named_weights(model).items()}
    assert named == names_on_the_hub(family, facts)


def test_llama_switches_its_biases():
    config = parse_config(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)


def test_head_dim_may_differ_from_hidden_over_heads():
    assert parse_config(LLAMA | {"head_dim": 10}).head_dim == 10
    assert parse_config(LLAMA | {"head_dim": 16, "hidden_size": 47}).head_dim == 16


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("default", {}), ("linear", {"factor": 4.0}), ("llama3", LLAMA3)],
)
def test_both_spellings_of_rope_say_the_same(kind, numbers):
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": kind, **numbers}}
    newer = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **numbers}}
    newest = LLAMA | {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **numbers}}
    config = parse_config(old)
    assert config == parse_config(newer) == parse_config(newest)
    assert config.inv_freq == inverse_frequencies(kind, 5e5, 8, numbers)
    assert set(numbers) == set(ROPE_TYPES[kind])


def test_theta_beside_a_rope_dictionary_still_counts():
    data = LLAMA | {"rope_theta": 3e6, "rope_parameters": {"rope_type": "default"}}
    assert parse_config(data).inv_freq == inverse_frequencies("default", 3e6, 8, {})


@pytest.mark.parametrize("name", DTYPES)
def test_the_dtype_has_two_spellings(name):
    assert parse_config(LLAMA | {"torch_dtype": name}).dtype == name
    assert parse_config(LLAMA | {"dtype": name, "torch_dtype": name}).dtype == name


@pytest.mark.parametrize(
    "extra",
    [
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
    ],
)
def test_a_sliding_window_that_reaches_no_layer_is_none(extra):
    parse_config(QWEN2 | extra)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not supported"),
        ({"architectures": None}, "None is not supported"),
        ({"architectures": []}, "is not supported"),
        ({"architectures": [[]]}, "is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoint .'gptq'"),
        ({"quantization_config": {"quant_method": "a\nb"}}, "quantized checkpoint"),
        ({"quantization_config": "awq"}, "quantized checkpoint .'awq'"),
        ({"use_sliding_window": True, "num_hidden_layers": 40}, "sliding-w"),  # 4096, from layer 28
        ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 9}, "sliding-w"),
        ({"use_sliding_window": True, "max_window_layers": "x"}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"layer_types": [[]]}, "sliding-window"),
        ({"layer_types": 7}, "sliding-window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_slow": 32}}, "beta_fast should be"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}},
            "truncate should be",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 1},
            "rope_theta should",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": -1}},
            "mscale should be",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not"),
        ({"logits_scaling": 8}, "logits_scaling 8 is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm True is not supported"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers .1, 0. is not supported"),
        ({"head_dim": 2**17}, "head_dim .131072. is larger than"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .1000000000. is larger than 1000"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"type": ["linear"]}}, "RoPE type"),
        ({"rope_scaling": "linear"}, "should be an object"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor should be a positive"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "high_freq"),
        ({"rope_scaling": {"type": "llama3", **without(LLAMA3, "factor")}}, "'factor' is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "between layers"),
        ({"rope_theta": "1e4"}, "rope_theta should be"),
        ({"rope_theta": float("nan")}, "rope_theta should be"),
        ({"rope_theta": float("inf")}, "rope_theta should be"),
        ({"rope_theta": 10**400}, "rope_theta should be"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps should be"),
        ({"num_key_value_heads": 4}, "not divisible by num_key_value_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads .5. is not divisible"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size .48. is not divisible"),
        ({"head_dim": 7}, "head_dim .7. is odd"),
        ({"head_dim": 0}, "head_dim should be"),
        ({"hidden_size": 48.0}, "hidden_size should be"),
        ({"vocab_size": True}, "vocab_size should be"),
        ({"vocab_size": -1}, "vocab_size should be"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers should be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings should be true or false"),
        ({"attention_bias": 1}, "attention_bias should be true or false"),
    ],
)
def test_what_cannot_run_is_refused_by_name(extra, match):
    refused(QWEN2 | extra if "use_sliding_window" in extra else LLAMA | extra, match)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_the_sizes_have_no_defaults(key):
    refused(without(LLAMA, key), f"'{key}' is missing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ROPE_KEYS = ["type", "rope_type", "rope_theta", "partial_rotary_factor", *LLAMA3]
ROPE_KEYS += [*YARN, *YARN_FACTORS, "truncate"]
rope = st.dictionaries(
    st.sampled_from(ROPE_KEYS), st.sampled_from([*ROPE_TYPES, 8.0, 2, None]) | json_values
)
OTHERS = ["rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim"]
OTHERS += ["tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype"]
OTHERS += ["hidden_act", "quantization_config", "use_sliding_window", "sliding_window"]
OTHERS += ["max_window_layers", "layer_types"]
keys = st.sampled_from([*LLAMA, *OTHERS])
values = json_values | rope | st.integers(1, 64)


@pytest.mark.filterwarnings("ignore::lethe_mini.errors.CheckpointWarning")
@given(
    st.sampled_from([LLAMA, MISTRAL, QWEN2, QWEN3, {}]),
    st.dictionaries(keys | st.text(), values, max_size=5),
)
def test_any_json_gives_a_config_or_one_line(base, extra):
    refusal = None
    try:
        config = parse_config(base | extra)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert len(refusal.splitlines()) == 1
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim > 0
    assert config.head_dim % 2 == 0
    assert len(config.inv_freq) == config.head_dim // 2
    assert config.rope_factor > 0
    assert config.dtype in DTYPES


def test_from_folder_reads_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == parse_config(LLAMA)


def test_from_folder_says_that_config_json_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "not a list"),
        (b"null", "not a NoneType"),
        (b"{}", "architecture None is not supported"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_path(tmp_path, content, match):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        read_config(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)


def test_read_json_says_why_a_file_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)  # a folder
