"""GGUF conversion against transformers' own reading of the same file, and against the originals.

Tiny GGUF files are written here from transformers' models with random weights, through the `gguf`
package's table of names, so names, row order and numbers have an oracle that is not our code. The
demo model's file is the real one.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import unicodedata
from functools import cache
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, trainers
from tokenizers import pre_tokenizers as cut
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lethe_mini.checkpoint import convert_gguf
from lethe_mini.checkpoint.config import read_config
from lethe_mini.checkpoint.convert_gguf import convert
from lethe_mini.checkpoint.demo import fetch
from lethe_mini.checkpoint.load import load_model
from lethe_mini.checkpoint.rope import inverse_frequencies
from lethe_mini.errors import UserError

Q = gguf.GGMLQuantizationType
PROSE = (
    "The quick brown fox isn't where it was; they'd moved it. Zwölf Boxkämpfer jagen Viktor "
    "quer über den großen Sylter Deich. Où est l'élève? 今日は天気がいい。 Привет! 😀👩‍👩‍👧\n"
    "def f(x, y=3):\n    if x == 1:\n        return y ** 2\n\treturn f(x-1)*10.5  # 2,048\n\n\n"
    "Runs:   three    four     five.  \n \t \nx=123456789; 3.14159, 1e-5, v2.0.1 and $9.99!!\r\n"
)


# ---------------------------------------------------------------- tiny files


@cache
def vocabulary(extra=()):
    """Byte-level BPE as GGUF keys: 256 bytes, merges learned from PROSE, three control tokens."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = cut.ByteLevel(add_prefix_space=False)
    alphabet = sorted(cut.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([PROSE], trainer)
    model = json.loads(learner.to_str())["model"]
    tokens = [*model["vocab"], *extra, "<|begin|>", "<|end|>", "<|turn｜end|>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 4) + [3, 3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 4,
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eot_token_id": len(tokens) - 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}é",
    }


@cache
def pieces():
    """A SentencePiece vocabulary as GGUF keys, with scores that fall as they do in Llama 2's."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = cut.Metaspace(prepend_scheme="always")
    prose = re.sub(r"[^a-zA-Zäöüßé.,' ]", "", PROSE)
    learner.train_from_iterator([prose], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    joined = ["".join(pair) for pair in model["merges"]]
    single = [token for token in model["vocab"] if len(token) == 1]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*head, *joined, *single, "<extra>"]
    scores = [0.0] * len(head) + [-float(i) for i in range(len(tokens) - len(head))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(single)), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def add(writer, key, value):
    """One metadata entry, typed as llama.cpp types it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](
            key, value
        )


def blocks(kind, shape, rng):
    """Valid random blocks of a K-quant, which gguf-py reads but cannot write: (rows, bytes)."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for at in {Q.Q4_K: (0, 2), Q.Q6_K: (208,)}[kind]:  # where the float16 scales are
        scale = rng.uniform(1e-4, 1e-3, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def to_gguf(path, model, tokenizer, kinds=None, change=None, without=(), tensors=None):
    """Writes a transformers model as llama.cpp's converter would.

    kinds: {part of a GGUF name: quantization}; change: metadata to set (None deletes); without:
    names of tensors to leave out; tensors: tensors to add or replace.
    """
    config, family = model.config, model.config.model_type.replace("_", "")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    keys = {
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": heads,
        f"{family}.attention.head_count_kv": kv_heads,
        **({f"{family}.attention.key_length": config.head_dim} if "qwen3" in family else {}),
        **(experts_of(config) if family == "qwen3moe" else {}),
        f"{family}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **tokenizer,
        **(change or {}),
    }
    arch = keys.pop("general.architecture", family)
    writer = gguf.GGUFWriter(path, arch, endianess=keys.pop("endianess", gguf.GGUFEndian.LITTLE))
    for key, value in keys.items():
        if value is not None:
            add(writer, key, value)
    member = getattr(gguf.MODEL_ARCH, family.upper())
    names = gguf.get_tensor_name_map(member, config.num_hidden_layers)
    rng, arrays = np.random.default_rng(0), {}
    for name, weight in stacked(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        weight, count = weight.numpy(), {"attn_q": heads, "attn_k": kv_heads}
        if family == "llama" and (n := count.get(target.split(".")[-2])):
            halves = weight.reshape(n, 2, -1, *weight.shape[1:])  # the converter's permutation
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        arrays[target] = weight
    for name, weight in (arrays | (tensors or {})).items():
        if name in without:
            continue
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), Q.F32)
        kind = Q.F32 if weight.ndim < 2 else kind  # norms and biases are never quantized
        if kind in (Q.Q4_K, Q.Q6_K):
            writer.add_tensor(name, blocks(kind, weight.shape, rng), raw_dtype=kind)
        elif kind in (Q.F32, Q.F16):
            writer.add_tensor(name, weight.astype(np.float16) if kind == Q.F16 else weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def experts_of(config):
    """What llama.cpp's converter writes of a mixture."""
    return {
        "qwen3moe.expert_count": config.num_experts,
        "qwen3moe.expert_used_count": config.num_experts_per_tok,
        "qwen3moe.expert_feed_forward_length": config.moe_intermediate_size,
    }


def stacked(weights):
    """Its experts, as the `gguf` package's table knows them."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            gate, up = weight.chunk(2, dim=1)
            found |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        else:
            found[name + ".weight" * name.endswith("experts.down_proj")] = weight
    return found


def tiny(family, vocab_size, tie=False, **more):
    """A transformers model with random weights, norms and biases included."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family[0].upper()}{family[1:]}ForCausalLM")
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512}
    config = kind.config_class(vocab_size=vocab_size, tie_word_embeddings=tie, **(sizes | more))
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.ndim == 1))
    return model


@torch.no_grad()
def rounded(model):
    """The model with its weights rounded to bfloat16, and nothing else: not RoPE's frequencies."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def reading(path):
    """transformers' own reading of a GGUF file, rounded as our folder is."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return rounded(model.eval())


@torch.no_grad()
def assert_same(folder, model):
    """The folder, read as a hub checkpoint, is `model`: every weight to the bit, and the logits."""
    weights, wanted = load_file(folder / "model.safetensors"), model.state_dict()
    if model.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, wanted[name].bfloat16()), name
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 37))
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    read_config(folder)


@cache
def encoder(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def read_json(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- weights and configuration


def test_qwen2_of_mixed_quantizations_equals_transformers(tmp_path):
    model = tiny("qwen2", 324, hidden_size=256, intermediate_size=512, num_attention_heads=4,
                 num_key_value_heads=2)  # fmt: skip
    kinds = {"token_embd": Q.Q8_0, "attn_q": Q.Q5_0, "attn_k": Q.Q4_0, "attn_v": Q.Q6_K}
    kinds |= {"attn_output": Q.Q4_K, "ffn_down": Q.Q6_K, "ffn_up": Q.Q4_K, "ffn_gate": Q.BF16}
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), {**kinds, "output.weight": Q.F16})
    convert(path, tmp_path / "out")
    read = reading(path)
    assert_same(tmp_path / "out", read)
    config = read_json(tmp_path / "out", "config.json")
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert not config["tie_word_embeddings"]
    # and the oracle itself is right: what was written in full precision comes back
    assert torch.equal(read.model.norm.weight, rounded(model).model.norm.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_qwen3_with_its_norms_of_q_and_k_equals_transformers(tmp_path, bias):
    """And a head size of its own; 128, the only one that transformers reads from such a file."""
    model = tiny("qwen3", 324, tie=True, head_dim=128, attention_bias=bias)
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), {"attn_v": Q.Q8_0})
    convert(path, tmp_path / "out")
    norm = load_file(tmp_path / "out/model.safetensors")["model.layers.1.self_attn.k_norm.weight"]
    assert torch.equal(norm, model.model.layers[1].self_attn.k_norm.weight.bfloat16())
    if not bias:  # transformers' own reading of a GGUF knows no such biases
        assert_same(tmp_path / "out", reading(path))
    assert read_json(tmp_path / "out", "config.json")["architectures"] == ["Qwen3ForCausalLM"]


MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.mark.parametrize("shard", [1 << 30, 100_000])
def test_a_mixtures_experts_come_apart_in_one_file_or_in_shards(tmp_path, monkeypatch, shard):
    """Every weight to the bit, quantized ones as the `gguf` package undoes them."""
    monkeypatch.setattr(convert_gguf, "SHARD", shard)
    model = tiny("qwen3Moe", 324, head_dim=22, norm_topk_prob=True, **MIXTURE)
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), {"down_exps": Q.Q8_0})
    convert(path, tmp_path / "out")
    source = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for i in range(2):
            down = source[f"blk.{i}.ffn_down_exps.weight"]
            down = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
            model.model.layers[i].mlp.experts.down_proj.copy_(down)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    assert (files == ["model.safetensors"]) == (shard == 1 << 30)
    assert all((tmp_path / "out" / name).stat().st_mode & 0o777 == 0o644 for name in files)
    ours = load_model(tmp_path / "out", "cpu", torch.float32)
    rounded(model).set_experts_implementation("eager")
    tokens = torch.randint(0, 324, (2, 37))
    torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-5)
    config = read_json(tmp_path / "out", "config.json")
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["norm_topk_prob"]
    assert config["head_dim"] == 22


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({}, {}),
        ({"attn_factor": 0.75}, {"attn_factor": 0.75}),
        (
            {"yarn_attn_factor": 0.5, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
            {"attn_factor": 0.5, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_yarn_is_read_from_its_keys(tmp_path, keys, numbers):
    path = tmp_path / "tiny.gguf"
    model = tiny("qwen3", 324, head_dim=22)
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 128} | keys
    change = {f"qwen3.rope.scaling.{key}": value for key, value in keys.items()}
    to_gguf(path, model, vocabulary(), change=change)
    config = convert(path, tmp_path / "out")
    wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read_json(tmp_path / "out", "config.json")["rope_scaling"] == wanted | numbers
    factor = (0.1 * math.log(4) + 1) * numbers.get("attn_factor", 1)
    assert config.rope_factor == pytest.approx(factor)


def test_llama_rows_of_q_and_k_come_back_in_order(tmp_path):
    model = tiny("llama", 324, tie=True)
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), {"ffn": Q.Q5_1, "attn_v": Q.Q4_1})
    convert(path, tmp_path / "out")
    assert_same(tmp_path / "out", reading(path))
    for kind in ("q", "k"):
        name = f"model.layers.1.self_attn.{kind}_proj.weight"
        weight = load_file(tmp_path / "out" / "model.safetensors")[name]
        assert torch.equal(weight, model.state_dict()[name].bfloat16())
    assert read_json(tmp_path / "out", "config.json")["tie_word_embeddings"]


@pytest.mark.parametrize("biases", [True, False])
def test_llama_biases_and_a_head_size_of_its_own(tmp_path, biases):
    """Without biases that is a Mistral, whose files say llama. transformers' GGUF reading knows no
    such size; the oracle is the model the file was made from."""
    model = tiny("llama", 324, attention_bias=biases, mlp_bias=biases, head_dim=22)
    change = {"llama.attention.key_length": 22, "llama.attention.value_length": 22}
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), change=change)
    convert(path, tmp_path / "out")
    assert_same(tmp_path / "out", rounded(model))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_by_its_factors(tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", 324, hidden_size=384, rope_parameters=rope)  # D = 64
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    freqs = {"rope_freqs.weight": (plain / slowed).numpy().astype(np.float32)}
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), tensors=freqs)
    convert(path, tmp_path / "out")
    wanted = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert read_json(tmp_path / "out", "config.json")["rope_scaling"] == wanted
    assert_same(tmp_path / "out", rounded(model))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.5}, 2.5),  # before there were types
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    ],
)
def test_linear_rope(tmp_path, change, wanted):
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    if wanted:
        rope |= {"rope_type": "linear", "factor": wanted}
    model = tiny("qwen2", 324, rope_parameters=rope)
    change = {f"qwen2.{key}": value for key, value in change.items()}
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary(), change=change)
    config = convert(path, tmp_path / "out")
    numbers = {"factor": wanted} if wanted else {}
    assert config.inv_freq == inverse_frequencies(rope["rope_type"], 20000.0, 16, numbers)
    assert_same(tmp_path / "out", rounded(model))


def test_numbers_read_as_they_were_meant(tmp_path):
    model = tiny("llama", 331, rms_norm_eps=1e-5)
    path = to_gguf(tmp_path / "tiny.gguf", model, vocabulary())
    convert(path, tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert '"rms_norm_eps": 1e-05,' in text
    assert '"vocab_size": 331,' in text  # rows of the embedding, not the number of tokens


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{pre-tokenizer: (GGUF file, converted folder)} over one vocabulary, and SentencePiece's."""
    root, made = tmp_path_factory.mktemp("tokenizers"), {}
    for pre in ("gpt-2", "default", "smollm", "llama-bpe", "llama3", "qwen2", "deepseek-r1-qwen"):
        keys = vocabulary() | {"tokenizer.ggml.pre": pre}
        path = to_gguf(root / f"{pre}.gguf", tiny("llama", 330), keys)
        convert(path, root / pre)
        made[pre] = (path, root / pre)
    path = to_gguf(root / "pieces.gguf", tiny("llama", 500), pieces())
    convert(path, root / "pieces")
    made["pieces"] = (path, root / "pieces")
    return made


def their_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


MARKED = st.sampled_from(["<|begin|>", "<|turn｜end|>", "<think>", "  ", "\n\n", "isn't", "über"])
TEXT = st.lists(MARKED | st.text("abeiox '.,=()\t\r\né日😀0123", max_size=8)).map("".join)


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "llama3", "qwen2"])
def test_byte_level_ids_equal_transformers(folders, pre):
    path, folder = folders[pre]
    theirs, ours = their_tokenizer(path), encoder(folder)
    turned = {"<|turn｜end|>"}  # they take its wide bar for a slip and drop it

    @given(TEXT)
    def check(text):
        for token in turned:
            text = text.replace(token, "")
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False).ids == wanted

    check()
    assert ours.encode(PROSE, add_special_tokens=False).ids == theirs.encode(
        PROSE, add_special_tokens=False
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen"])
@given(text=TEXT)
def test_byte_level_round_trip(folders, pre, text):
    tokenizer = encoder(folders[pre][1])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    wanted = unicodedata.normalize("NFC", text) if "qwen" in pre else text
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted


def test_control_tokens_are_special_and_user_defined_ones_plain(folders):
    tokenizer = encoder(folders["qwen2"][1])
    tokens = vocabulary()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("<|turn｜end|><think><|end|>", add_special_tokens=False).ids
    assert [tokens[i] for i in ids] == ["<|turn｜end|>", "<think>", "<|end|>"]
    assert tokenizer.decode(ids) == "<think>"
    assert len(tokenizer.get_vocab()) == len(tokens)


def test_qwen2_composes_accents_as_its_own_tokenizer_does(folders):
    keys = vocabulary()
    vocab = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    own = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, eos_token="<|end|>", pad_token="<|end|>"
    )
    text = "u\N{COMBINING DIAERESIS}ber cafe\N{COMBINING ACUTE ACCENT} 123"
    assert (
        encoder(folders["qwen2"][1]).encode(text).ids
        == own.encode(text)
        == own.encode("über café 123")
    )


def test_llama3_takes_a_whole_word_that_no_merges_reach(tmp_path):
    keys = vocabulary(extra=("Ġxylophone",))
    word = keys["tokenizer.ggml.tokens"].index("Ġxylophone")
    for pre, whole in {"llama-bpe": True, "gpt-2": False}.items():
        change = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        path = to_gguf(tmp_path / f"{pre}.gguf", tiny("llama", 330), keys, change=change)
        convert(path, tmp_path / pre)
        assert (encoder(tmp_path / pre).encode(" xylophone").ids == [word]) == whole


@pytest.mark.parametrize(
    ("pre", "flag", "wanted"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("deepseek-r1-qwen", True, True),
    ],
)
def test_beginning_of_sequence(tmp_path, pre, flag, wanted):
    change = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
    path = to_gguf(tmp_path / "a.gguf", tiny("llama", 330), vocabulary(), change=change)
    convert(path, tmp_path / "out")
    plain = encoder(tmp_path / "out").encode("fox 12", add_special_tokens=False).ids
    ids = encoder(tmp_path / "out").encode("fox 12").ids
    bos = vocabulary()["tokenizer.ggml.bos_token_id"]
    assert ids == ([bos, *plain] if wanted else plain)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("fox 12") == ids


def test_files_beside_the_tokenizer(folders):
    config = read_json(folders["gpt-2"][1], "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|end|>")
    assert config["chat_template"] == "{{ messages[0]['content'] }}é"
    keys = vocabulary()
    ends = [keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]]
    assert read_json(folders["gpt-2"][1], "generation_config.json") == {"eos_token_id": ends}
    theirs = transformers.GenerationConfig.from_pretrained(folders["gpt-2"][1])
    assert theirs.eos_token_id == ends


@pytest.mark.parametrize(
    ("extra", "kind", "ends"),
    [
        (["<|im_end|>", "<|endoftext|>"], 3, [0, 1]),
        (["<|im_end|>", "<|eom_id|>"], 4, [0, 1]),  # some files call them defined by the user
        (["<|im_end|>", "<|eot_id|>"], 1, []),  # ordinary text
        (["<|im_start|>", "<end_of_turn>"], 3, [1]),
        (["<|return|>", "<|endoftext|>"], 3, [0, 1]),
    ],
)
def test_control_tokens_that_end_a_text_are_known_by_name(tmp_path, extra, kind, ends):
    """Those of the metadata end it, too. vocabulary() has an `<|end|>`, which is one of them."""
    keys = vocabulary()
    size, last = len(keys["tokenizer.ggml.tokens"]), len(keys["tokenizer.ggml.tokens"]) - 3
    change = {
        "tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"], *extra],
        "tokenizer.ggml.token_type": [*keys["tokenizer.ggml.token_type"], kind, kind],
        "tokenizer.ggml.eos_token_id": last + 1,
    }
    path = to_gguf(tmp_path / "a.gguf", tiny("llama", 330), keys, change=change)
    convert(path, tmp_path / "out")
    found = read_json(tmp_path / "out", "generation_config.json")["eos_token_id"]
    own = [last + 1] if "<|return|>" in extra else [last, last + 1]
    assert found == [*own, *(size + i for i in ends)]
    if ends:  # a part of no answer, whatever the file calls it
        ids = [size + i for i in ends]
        assert encoder(tmp_path / "out").decode(ids, skip_special_tokens=True) == ""


def sentencepiece_ids(text, keys, prefix=True):
    """SentencePiece's BPE, slowly: join the best-scored neighbours, leftmost first, until none."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {t: i for t, i in ids.items() if keys["tokenizer.ggml.token_type"][i] == 1}
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        unions = [normal.get(a + b) for a, b in pairwise(parts)]
        best = max((i for i in unions if i is not None), key=lambda i: scores[i], default=None)
        if best is None:
            break
        at = unions.index(best)
        parts[at : at + 2] = [tokens[best]]
    spelled = [[p] if p in normal else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [ids[token] for part in spelled for token in part]


PLAIN = st.text("abcdefghijklmnoprstuvwxyzVZB äöüßé.,'0日😀\n", max_size=40)


@given(PLAIN)
def test_sentencepiece_ids(folders, text):
    keys, tokenizer = pieces(), encoder(folders["pieces"][1])
    ids = tokenizer.encode(text).ids
    assert ids == [1, *sentencepiece_ids(text, keys)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_equals_transformers(folders):
    path, folder = folders["pieces"]
    theirs, ours = their_tokenizer(path), encoder(folder)
    for text in (PROSE, "Zwölf Boxkämpfer", "the  fox", "a\n\nb", "日本 über 12"):
        assert ours.encode(text).ids == theirs.encode(text)
    # Here they differ: Llama 2's own tokenizer puts a space before text that has one already, and
    # after a special token; transformers' class does not any more.
    own = sentencepiece_ids(" fox", pieces())
    assert ours.encode(" fox").ids == [1, *own]
    assert ours.encode("</s>fox<extra>").ids[1:-1] == [2, *sentencepiece_ids("fox", pieces())]


def test_sentencepiece_without_prefix_and_without_bos(tmp_path):
    change = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    path = to_gguf(tmp_path / "a.gguf", tiny("llama", 500), pieces(), change=change)
    convert(path, tmp_path / "out")
    tokenizer = encoder(tmp_path / "out")
    for text in ("the fox", " the fox"):
        ids = tokenizer.encode(text).ids
        assert ids == sentencepiece_ids(text, pieces(), prefix=False)
        assert tokenizer.decode(ids) == text


# ---------------------------------------------------------------- what is refused


def refused(path, folder, match):
    """The conversion is refused in one line that matches, and leaves nothing behind."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError, match=match) as info:
        convert(path, folder)
    assert "\n" not in str(info.value)
    assert sorted(folder.parent.iterdir()) == before


CHANGES = {
    "architecture 'gemma2' is not supported": {"general.architecture": "gemma2"},
    "a mixture of experts is not supported in llama": {"llama.expert_count": 8},
    "sliding-window": {"llama.attention.sliding_window": 4096},
    "one of 3 parts": {"split.count": 3},
    "RoPE scaling 'longrope'": {"llama.rope.scaling.type": "longrope"},
    "rope.scaling.original_context_length is missing": {"llama.rope.scaling.type": "yarn"},
    "rope.scaling.yarn_ext_factor is not supported": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.yarn_ext_factor": 0.5,
    },
    "big-endian": {"endianess": gguf.GGUFEndian.BIG},
    "pre-tokenizer 'tekken'": {"tokenizer.ggml.pre": "tekken"},
    "tokenizer 'bert'": {"tokenizer.ggml.model": "bert"},
    "do not fit together": {"tokenizer.ggml.token_type": [1, 1, 3]},
    "the eos token 4000000 is outside": {"tokenizer.ggml.eos_token_id": 4_000_000},
    "the tokenizer is broken": {"tokenizer.ggml.merges": ["a b", "nowhere tobefound"]},
    "llama.block_count should be a int": {"llama.block_count": "two"},
    "llama.rope.freq_base should be a float": {"llama.rope.freq_base": True},
    "is not divisible": {"llama.attention.head_count_kv": 4},
    "rope.dimension_count is 8": {"llama.rope.dimension_count": 8},
    "num_attention_heads should be": {"llama.attention.head_count": 0},
    "rope_theta should be": {"llama.rope.freq_base": -1.0},
    "the tensor blk.2.attn_k.weight is missing": {"llama.block_count": 3},
    "token_embd.weight has the shape": {"llama.embedding_length": 192},
}
KEYS = [
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length")),
    *("llama.feed_forward_length", "llama.attention.head_count"),
    "llama.attention.layer_norm_rms_epsilon",
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")),
]


@pytest.mark.parametrize("match", CHANGES)
def test_refused_metadata(tmp_path, match):
    path = tmp_path / "a.gguf"
    to_gguf(path, tiny("llama", 330), vocabulary(), change=CHANGES[match])
    refused(path, tmp_path / "out", f"a.gguf: .*{re.escape(match)}")


@pytest.mark.parametrize("key", KEYS)
def test_refused_for_a_missing_key(tmp_path, key):
    path = to_gguf(tmp_path / "a.gguf", tiny("llama", 330), vocabulary(), change={key: None})
    refused(path, tmp_path / "out", f"the key {re.escape(key)} is missing")


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("blk.1.attn_k.weight is missing", {"without": ["blk.1.attn_k.weight"]}),
        ("token_embd.weight is missing", {"without": ["token_embd.weight"]}),
        ("attn_q_norm.weight is not one", {"tensors": {"blk.0.attn_q_norm.weight": np.ones(16)}}),
        ("blk.0.ffn_up.weight has the shape", {"tensors": {"blk.0.ffn_up.weight": np.ones(7)}}),
        ("output_norm.weight is I8", {"tensors": {"output_norm.weight": np.ones(96, np.int8)}}),
        ("other factors than llama3", {"tensors": {"rope_freqs.weight": np.full(8, 2.0)}}),
        ("rope_freqs.weight has the shape", {"tensors": {"rope_freqs.weight": np.ones(7)}}),
    ],
)
def test_refused_tensors(tmp_path, match, how):
    for name, array in how.get("tensors", {}).items():
        how["tensors"][name] = array if array.dtype == np.int8 else array.astype(np.float32)
    path = to_gguf(tmp_path / "a.gguf", tiny("llama", 330), vocabulary(), **how)
    refused(path, tmp_path / "out", match)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One whole file, and the bytes of it that have to be there."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    to_gguf(path, tiny("llama", 330), vocabulary())
    return path, max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(path).tensors)


def test_a_file_cut_anywhere_is_refused(tmp_path, small):
    whole, size = small
    data = whole.read_bytes()
    header = gguf.GGUFReader(whole).data_offset
    draw = random.Random(0)
    cuts = {0, 3, 4, 23, header, size - 1, *draw.sample(range(header), 30), draw.randrange(size)}
    for at in sorted(cuts):
        (tmp_path / "cut.gguf").write_bytes(data[:at])
        refused(tmp_path / "cut.gguf", tmp_path / "out", "not a whole, readable GGUF file")


def test_refused_paths(tmp_path, small, monkeypatch):
    refused(tmp_path / "none.gguf", tmp_path / "out", "no such file")
    refused(tmp_path, tmp_path / "out", "no such file")
    (tmp_path / "text.gguf").write_text("not a GGUF file, but longer than one word\n" * 9)
    refused(tmp_path / "text.gguf", tmp_path / "out", "not a whole, readable GGUF file .*magic")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(small[0], tmp_path / "full", "full exists and is not an empty folder")
    refused(small[0], tmp_path / "text.gguf", "exists and is not an empty folder")
    (tmp_path / "text.gguf").rename(tmp_path / "text")
    with pytest.raises(UserError, match="cannot write"):
        convert(small[0], tmp_path / "text" / "out")
    monkeypatch.chdir(tmp_path / "full")
    with pytest.raises(UserError, match="full exists"):
        convert(small[0], ".")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_the_gguf_package_is_asked_for_by_name(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(small[0], tmp_path / "out", r"pip install 'lethe-mini\[demo\]'")


# ---------------------------------------------------------------- the folder appears whole


def test_an_empty_folder_is_filled_and_a_deep_one_made(tmp_path, small):
    (tmp_path / "empty").mkdir()
    convert(small[0], tmp_path / "empty")
    convert(small[0], tmp_path / "a" / "b")
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert {path.name for path in folder.iterdir()} == files | {"generation_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "a"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, small, monkeypatch, error):
    def half(weights, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(convert_gguf, "save_file", half)
    with pytest.raises((KeyboardInterrupt, UserError)):
        convert(small[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from lethe_mini.checkpoint import convert_gguf
convert_gguf.save_file = lambda *_, **__: os._exit(9)
convert_gguf.convert(*sys.argv[1:])
"""


def test_a_killed_conversion_leaves_no_folder_and_can_be_repeated(tmp_path, small):
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, small[0], out]).returncode == 9
    assert not out.exists()
    convert(small[0], out)


def test_two_conversions_at_once(tmp_path, small):
    command = [
        sys.executable,
        "-m",
        "lethe_mini.checkpoint.convert_gguf",
        small[0],
        tmp_path / "out",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    spoken = [process.communicate() for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], spoken  # the slower one is told that the folder exists
    assert any("LlamaForCausalLM, 2 layers" in out for out, _ in spoken)
    assert any(re.fullmatch(r"error: [^\n]*\n", err) for _, err in spoken)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    convert(small[0], tmp_path / "alone")
    for name in os.listdir(tmp_path / "out"):
        same = (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert same, name


def test_main_prints_one_line_and_returns_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_gguf", str(tmp_path / "no.gguf"), str(tmp_path)])
    assert convert_gguf.main() == 2
    assert re.fullmatch(r"error: .*no\.gguf: [^\n]*\n", capsys.readouterr().err)


# ---------------------------------------------------------------- the demo model


@pytest.fixture(scope="module")
def demo_gguf(demo, tmp_path_factory):
    """The file that the demo folder was made from; the folder's maker threw it away."""
    try:
        return fetch(tmp_path_factory.mktemp("demo"))
    except UserError as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.demo
def test_demo_weights_and_logits_equal_transformers(demo, demo_gguf):
    assert_same(demo, reading(demo_gguf))
    assert read_json(demo, "generation_config.json") == {"eos_token_id": [0, 2]}


SPECIAL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>\n", "    ", "\n\n", "don't", "naïve", "def "]
)
WILD = st.lists(SPECIAL | st.text("aeot Z'.,:=_()\t\r\né日本😀0129½٣", max_size=9)).map("".join)


@pytest.mark.demo
def test_demo_ids_equal_transformers(demo, demo_gguf):
    theirs, ours = their_tokenizer(demo_gguf), encoder(demo)
    turn = "<|im_start|>user\nHow many r's are in strawberry?<|im_end|>\n<|endoftext|>"
    long = "".join(f"{turn} {word} {PROSE}" for word in ("one", "two", "three"))
    # transformers has no entry for the file's pre-tokenizer, `smollm`, and takes GPT-2's, which
    # does not cut digits off first: "\n\n1" is "\n", "\n", "1" there and "\n\n", "1" in truth. So
    # its reading is the oracle only for text in which no two spaces stand before a digit ...
    assert not re.search(r"\s\s\d", long)
    assert len(long) > 1000
    assert ours.encode(long).ids == theirs.encode(long)
    # ... and with the pre-tokenizer of SmolLM2's own tokenizer.json put in, for every text.
    steps = "Steps:\n\n1. Mix.\n\n2. Wait  15 minutes.\n\n   3. Eat ½.\n"
    assert ours.encode(steps).ids != theirs.encode(steps)
    theirs.backend_tokenizer.pre_tokenizer = cut.Sequence(
        [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
    )

    @given(WILD)
    def check(text):
        assert ours.encode(text).ids == theirs.encode(text)
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text

    check()
    assert ours.encode(steps).ids == theirs.encode(steps)
    assert "ĊĊ" in ours.encode(steps).tokens
