"""GGUF to a model folder: python -m lethe_mini.checkpoint.convert_gguf IN.gguf OUT_FOLDER

Reads files of `llama`, `qwen2`, `qwen3` and `qwen3moe`, in any quantization that the `gguf` package
can undo, and writes what a checkpoint on the hub holds: config.json, safetensors in bfloat16 (in
shards, so that memory need not hold the model), tokenizer.json, tokenizer_config.json,
generation_config.json. Anything else (another architecture, RoPE or pre-tokenizer, a tensor that
the model does not have) raises an error that names it. The folder appears whole or not at all.
"""

import argparse
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config import ModelConfig
from ..errors import UserError
from .config import parse_config
from .gguf_tokenizer import make_tokenizer

ARCHITECTURES = {  # a Mistral's file says llama
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
SHARD = 4 << 30  # bytes of weights in a file
READS = 20_000_000  # of numbers and strings of metadata; a vocabulary of 150,000 takes 2 million


def import_gguf():
    """The `gguf` package, imported only where it is needed: the engine runs without it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UserError("reading GGUF needs a package: pip install 'lethe-mini[demo]'") from None
    return gguf


def read_gguf(gguf, path: Path):
    """The package's reader, which counts on its file: here it stops where the file ends, and after
    READS reads, where a broken length would keep it busy for ever."""
    reads = 0

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *args, **kwargs):
            nonlocal reads
            reads += 1
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            if reads > READS:
                raise ValueError("its metadata is longer than any model's")
            return super()._get(offset, dtype, count, *args, **kwargs)

    return Reader(path)


class Source:
    """A GGUF file that is whole: its metadata by key and kind, its tensors by name."""

    def __init__(self, path: Path):
        self.gguf = import_gguf()
        if not path.is_file():
            raise UserError("there is no such file; give the path of a GGUF file")
        try:
            reader = read_gguf(self.gguf, path)
        except Exception as error:  # the reader trusts its file: a broken one may raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"not a whole, readable GGUF file ({reason}); fetch it again") from None
        self.fields, self.tensors = reader.fields, {t.name: t for t in reader.tensors}
        if reader.byte_order != "I":
            raise UserError("this is the big-endian kind of file; take the little-endian one")
        if (parts := self.get("split.count", int, 1)) > 1:
            raise UserError(f"one of {parts} parts; join them with llama-gguf-split --merge")
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"architecture {self.architecture!r} is not supported, only {known}")

    def get(self, key: str, kind: type, *default):
        """The value of `key`, or `default` where it is absent. `ARCH.` stands for the family."""
        key = key.replace("ARCH.", f"{getattr(self, 'architecture', '')}.")
        if key not in self.fields and default:
            return default[0]
        if key not in self.fields:
            raise UserError(f"the key {key} is missing; take another GGUF of the model")
        try:
            value = self.fields[key].contents()
        except ValueError:  # text that is not UTF-8
            value = None
        if type(value) is not kind:
            raise UserError(f"{key} should be a {kind.__name__}, not {value!r:.60}")
        # A float was float32: say 1e-05 for 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind is float else value

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, dequantized: `shape` float32."""
        tensor = self.tensors[name]
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise UserError(f"{name} has the shape {found}, not {shape}")
        try:
            return self.gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{name} is {kind}, which cannot be read; take a Q8_0 file") from None


def convert(path: Path | str, folder: Path | str) -> ModelConfig:
    """Converts the GGUF file `path` into the new folder `folder`. Raises UserError."""
    path, folder = Path(path), Path(folder).resolve()
    # Beside the folder, so that the last step is a rename within one disk.
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; name a new one")
        source = Source(path)
        config = make_config(source)
        tokenizer, documents = make_tokenizer(source, config["vocab_size"])
        checked = parse_config(config)
        weights = make_weights(source, checked)
        temporary.mkdir(parents=True)
        for name, data in {"config.json": config, **documents}.items():
            text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        save_weights(weights, temporary)
        if folder.is_dir():
            folder.rmdir()  # it is empty; not every system renames onto a folder
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; name another folder") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return checked


def make_config(source: Source) -> dict:
    """config.json under the hub's keys; ModelConfig checks the numbers."""
    experts = source.get("ARCH.expert_count", int, 0)
    if experts and source.architecture != "qwen3moe":
        raise UserError(f"a mixture of experts is not supported in {source.architecture}")
    if source.get("ARCH.attention.sliding_window", int, 0):
        raise UserError("sliding-window attention is not supported; take one with full attention")
    if "token_embd.weight" not in source.tensors:
        raise UserError("the tensor token_embd.weight is missing; take another GGUF of the model")
    hidden = source.get("ARCH.embedding_length", int)
    heads = source.get("ARCH.attention.head_count", int)
    head_dim = source.get("ARCH.attention.key_length", int, hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := source.get(f"ARCH.{key}", int, head_dim)) != head_dim:
            raise UserError(f"{key} is {width}, which is not the head size, {head_dim}")
    config = {
        "architectures": [ARCHITECTURES[source.architecture]],
        "model_type": source.architecture,
        "dtype": "bfloat16",
        "vocab_size": int(source.tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": source.get("ARCH.feed_forward_length", int),
        "num_hidden_layers": source.get("ARCH.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("ARCH.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.get("ARCH.context_length", int),
        "rms_norm_eps": source.get("ARCH.attention.layer_norm_rms_epsilon", float),
        "rope_theta": source.get("ARCH.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": source.get("tokenizer.ggml.eos_token_id", int, None),
    }
    if source.architecture == "qwen3moe":  # whose shares are always made to add up to 1
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": source.get("ARCH.expert_used_count", int),
            "moe_intermediate_size": source.get("ARCH.expert_feed_forward_length", int),
            "norm_topk_prob": True,
        }
    # Qwen2 always has biases on q, k and v, and nowhere else.
    config["attention_bias"] = "blk.0.attn_q.bias" in source.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in source.tensors
    config["rope_scaling"] = rope_scaling(source, head_dim, config["rope_theta"])
    return config


def rope_scaling(source: Source, head_dim: int, theta: float) -> dict | None:
    """The hub's `rope_scaling`: linear and yarn from keys, llama3 from the factors of each pair."""
    kind = source.get("ARCH.rope.scaling.type", str, "linear")  # the old files' only kind
    factor = source.get("ARCH.rope.scale_linear", float, 1.0)
    factor = source.get("ARCH.rope.scaling.factor", float, factor)
    if kind == "yarn" and "rope_freqs.weight" not in source.tensors:
        return yarn(source, factor)
    if kind not in ("none", "linear"):
        raise UserError(f"RoPE scaling {kind!r} is not supported, only linear, llama3 and yarn")
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
    if "rope_freqs.weight" not in source.tensors:
        return linear
    given = source.weight("rope_freqs.weight", (head_dim // 2,))
    with np.errstate(all="ignore"):  # parse_config checks theta later
        turns = 8192 / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    # A pair that turns less than once in the 8,192 tokens of the first training is slowed by the
    # factor, one that turns more than 4 times is left alone, and those between are blended.
    alone = np.clip((turns - 1) / (4 - 1), 0, 1)
    for factor in (8.0, 32.0):
        if not linear and np.allclose(given, 1 / ((1 - alone) / factor + alone), rtol=1e-4):
            numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": 8192}
    raise UserError("rope_freqs.weight holds other factors than llama3's (8 or 32): not supported")


def yarn(source: Source, factor: float) -> dict:
    """`rope_scaling` of yarn. A file's attn_factor multiplies the factor of attention, as ours."""
    for key in ("yarn_ext_factor", "yarn_log_multiplier"):
        if source.get(f"ARCH.rope.scaling.{key}", float, None) is not None:
            raise UserError(f"rope.scaling.{key} is not supported; take another GGUF of the model")
    original = source.get("ARCH.rope.scaling.original_context_length", int)
    numbers = {"factor": factor, "original_max_position_embeddings": original}
    names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    names |= {"attn_factor": "attn_factor", "yarn_attn_factor": "attn_factor"}
    for key, name in names.items():
        if (number := source.get(f"ARCH.rope.scaling.{key}", float, None)) is not None:
            numbers[name] = number
    return {"rope_type": "yarn", **numbers}


def make_weights(source: Source, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Hub name and bfloat16 weight, in the names and shapes of the model, no more and no less.
    Raises UserError for a tensor that is missing or too many, before the first one is read."""
    plan = plan_of(source, config)
    for name in sorted(set(plan) ^ (set(source.tensors) - {"rope_freqs.weight"})):
        problem = "is missing" if name in plan else "is not one of this model's"
        raise UserError(f"the tensor {name} {problem}; take another GGUF of the model")
    return read_weights(source, plan, config.head_dim)


def plan_of(source: Source, config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (hub name, shape). The hub name of a stack of experts has `{}` for their
    number."""
    hidden, mid, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    layer = {
        "attn_norm": ("input_layernorm", (hidden,), False),
        "attn_q": ("self_attn.q_proj", (q, hidden), config.qkv_bias),
        "attn_k": ("self_attn.k_proj", (kv, hidden), config.qkv_bias),
        "attn_v": ("self_attn.v_proj", (kv, hidden), config.qkv_bias),
        "attn_output": ("self_attn.o_proj", (hidden, q), config.o_bias),
        "ffn_norm": ("post_attention_layernorm", (hidden,), False),
    }
    dense = {
        "ffn_gate": ("mlp.gate_proj", (mid, hidden), config.mlp_bias),
        "ffn_up": ("mlp.up_proj", (mid, hidden), config.mlp_bias),
        "ffn_down": ("mlp.down_proj", (hidden, mid), config.mlp_bias),
    }
    E, mid = config.num_experts, config.moe_intermediate_size
    mixture = {
        "ffn_gate_inp": ("mlp.gate", (E, hidden), False),
        "ffn_gate_exps": ("mlp.experts.{}.gate_proj", (E, mid, hidden), False),
        "ffn_up_exps": ("mlp.experts.{}.up_proj", (E, mid, hidden), False),
        "ffn_down_exps": ("mlp.experts.{}.down_proj", (E, hidden, mid), False),
    }
    if config.qk_norm:
        layer["attn_q_norm"] = ("self_attn.q_norm", (D,), False)
        layer["attn_k_norm"] = ("self_attn.k_norm", (D,), False)
    plan = {
        "token_embd.weight": ("model.embed_tokens.weight", (config.vocab_size, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config.tie_word_embeddings:
        plan["output.weight"] = ("lm_head.weight", (config.vocab_size, hidden))
    for i in range(min(config.num_hidden_layers, len(source.tensors))):
        parts = layer | (mixture if i in config.expert_layers else dense)
        for name, (target, shape, bias) in parts.items():
            plan[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{target}.weight", shape)
            if bias:
                plan[f"blk.{i}.{name}.bias"] = (f"model.layers.{i}.{target}.bias", shape[:1])
    return plan


def read_weights(source: Source, plan: dict, D: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a plan, one after the other."""
    for name, (target, shape) in plan.items():
        weight = torch.from_numpy(np.require(source.weight(name, shape), requirements="W"))
        # A llama file's RoPE turns neighbouring rows of a head; the hub's (and a Qwen file's)
        # turns row i with row i + D/2: bring (D/2, 2) to (2, D/2).
        if source.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            weight = weight.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).reshape(shape)
        weight = weight.to(torch.bfloat16).contiguous()
        if "{}" in target:
            yield from ((target.format(e), one) for e, one in enumerate(weight))
        else:
            yield target, weight


def save_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """One file, or shards of at most SHARD bytes and the index that says what is where."""
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = 0

    def save() -> None:
        path = folder / f"{len(files)}.tmp"
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(0o644)  # as the other files; the library says 600
        files.append([*held])
        held.clear()

    for name, weight in weights:
        if held and size + weight.nbytes > SHARD:
            save()
            size = 0
        held[name] = weight
        size += weight.nbytes
    save()
    if len(files) == 1:
        (folder / "0.tmp").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        shard = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.tmp").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    program, about = "lethe_mini.checkpoint.convert_gguf", "Converts a GGUF file to a model folder."
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("gguf", metavar="IN.gguf")
    parser.add_argument("folder", metavar="OUT_FOLDER")
    args = parser.parse_args(argv)
    try:
        config = convert(args.gguf, args.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {config.architecture}, {config.num_hidden_layers} layers, bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
