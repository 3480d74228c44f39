"""Mutated checkpoints: each runs, or is refused in one line.

The folder is the reasoner's, one file of which is changed: a value of its JSON, or its bytes. CI
takes 500 of each kind. By hand, 10,000 others take ten minutes:

    HYPOTHESIS_PROFILE=random FUZZ=5000 python -m pytest tests/checkpoint/test_fuzz.py
"""

import json
import os
import shutil
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert_gguf import tiny, to_gguf, vocabulary

from lethe_mini.checkpoint.convert_gguf import convert
from lethe_mini.checkpoint.load import resolve
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError

COUNT = int(os.environ.get("FUZZ", "500"))
fuzz = settings(max_examples=COUNT, suppress_health_check=list(HealthCheck))
REASONER = resolve("reasoner")
JSONS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
ADDED = ["special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% endfor %}"
# Words that some file gives a meaning: drawn as keys and as values.
WORDS = [
    "rope_scaling", "rope_parameters", "rope_theta", "rope_type", "yarn", "llama3", "linear",
    "factor", "head_dim", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings", "architectures",
    "Qwen3MoeForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "num_experts", "weight_map",
    "num_experts_per_tok", "moe_intermediate_size", "tie_word_embeddings", "eos_token_id",
    "eos_token", "bos_token", "chat_template", "added_tokens", "added_tokens_decoder", "content",
    "do_sample", "temperature", "top_p", "top_k", "model", "vocab", "merges", "decoder", "special",
    "post_processor", "pre_tokenizer", "normalizer", "model.safetensors", TEMPLATE,
]  # fmt: skip
numbers = st.integers() | st.sampled_from([0, 1, -1, 7, 2**31, 2**63, 10**30]) | st.floats()
leaves = st.none() | st.booleans() | numbers | st.text(max_size=9) | st.sampled_from(WORDS)
keys = st.sampled_from(WORDS) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@cache
def original(name):
    """The bytes of a file of the reasoner's, or of one that it lacks."""
    path = REASONER / name
    return path.read_bytes() if path.is_file() else b"{}"


def mutated(data, value, depth=4):
    """The value with something in it replaced, removed or added, at any depth."""
    inside = [*value] if isinstance(value, dict) else [*range(len(value))]
    if inside and depth and data.draw(st.booleans()):
        at = data.draw(st.sampled_from(inside))
        if isinstance(value[at], dict | list):
            value[at] = mutated(data, value[at], depth - 1)
            return value
    what = data.draw(st.sampled_from(["replace", "remove", "add", "whole"]))
    if what == "whole" and depth < 4:
        return data.draw(values)
    if what == "add" or not inside:
        if isinstance(value, dict):
            value[data.draw(keys)] = data.draw(values)
        else:
            value.insert(data.draw(st.integers(0, len(value))), data.draw(values))
        return value
    at = data.draw(st.sampled_from(inside))
    if what == "remove":
        del value[at]
    else:
        value[at] = data.draw(values)
    return value


def cut(data, raw, most):
    """The bytes with some of the first `most` replaced, or cut off anywhere."""
    if data.draw(st.booleans()):
        return raw[: data.draw(st.integers(0, len(raw)))]
    at = data.draw(st.integers(0, min(most, len(raw))))
    new = data.draw(st.binary(max_size=9))
    return raw[:at] + new + raw[at + len(new) :]


def runs_or_is_refused(run):
    """Quickly, and if refused in one line; anything else that is raised is a fault of ours."""
    start, said = time.monotonic(), "it ran"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run()
        except UserError as error:
            said = str(error)
    assert len(said.splitlines()) == 1, said
    assert said.strip()
    assert time.monotonic() - start < 60


@fuzz
@given(data=st.data())
def test_a_mutated_folder_runs_or_is_refused(data):
    """Loaded, prompted as text and as messages, and continued by some tokens."""
    name = data.draw(st.sampled_from([*JSONS, *JSONS, *ADDED, "model.safetensors"]))
    raw = original(name)
    if name != "model.safetensors" and data.draw(st.integers(0, 9)):
        changed = json.loads(raw)
        for _ in range(data.draw(st.integers(1, 3))):
            changed = mutated(data, changed)
            if not isinstance(changed, dict | list):
                break
        raw = json.dumps(changed).encode()
    else:
        raw = cut(data, raw, 3000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in REASONER.iterdir():
            if file.is_file() and file.suffix in (".json", ".safetensors"):
                (folder / file.name).symlink_to(file)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(raw)

        def run():
            engine = Engine.from_pretrained(str(folder), "cpu", "float32")
            prompts = ["walk 152", [{"role": "user", "content": "hi"}]]
            for prompt in prompts[: 1 + engine.text.has_template]:
                engine.generate([prompt], max_new_tokens=3)

        runs_or_is_refused(run)


@cache
def gguf_file():
    """A whole one, without its weights' bytes drawn out of order: metadata first."""
    folder = Path(tempfile.mkdtemp())
    return to_gguf(folder / "small.gguf", tiny("llama", 330), vocabulary()).read_bytes()


@fuzz
@given(data=st.data())
def test_a_mutated_gguf_is_converted_or_is_refused(data):
    raw = gguf_file()
    for _ in range(data.draw(st.integers(1, 3))):
        raw = cut(data, raw, 12_000)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "a.gguf"
        path.write_bytes(raw)
        runs_or_is_refused(lambda: convert(path, path.with_name("out")))
        shutil.rmtree(path.with_name("out"), ignore_errors=True)


@pytest.mark.parametrize("length", [2**40, 2**63])
def test_a_gguf_that_would_keep_its_reader_busy_is_refused(tmp_path, length):
    """The length of a list of bytes: a reader that believes it reads on behind the end for ever."""
    raw = gguf_file()
    at = raw.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path = tmp_path / "a.gguf"
    path.write_bytes(raw[:at] + length.to_bytes(8, "little") + raw[at + 8 :])
    with pytest.raises(UserError, match="not a whole, readable GGUF file"):
        convert(path, tmp_path / "out")
