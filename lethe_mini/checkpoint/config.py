"""config.json to a ModelConfig: every value is checked, since a checkpoint may hold anything.

The engine runs the architectures of FAMILIES, and the kinds of RoPE of rope.py. Anything else
raises an error that names the unsupported feature. Both spellings of RoPE are read: `rope_theta`
with `rope_scaling` (most checkpoints on the hub), and `rope_parameters` (of transformers 5). Where
a file says one thing twice, `first_of` takes the source that transformers takes, and warns.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..errors import UserError, warn
from .rope import ROPE_TYPES, YARN, YARN_FACTORS, inverse_frequencies, rope_factor


@dataclass(frozen=True)
class Family:
    """What an architecture fixes, and its defaults. A bias may be a key of config.json."""

    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str = False
    qk_norm: bool = False
    head_dim: int | None = None  # where config.json does not say; None: hidden_size / heads
    positions: int = 2048
    window: str = "layers"  # of a sliding window, see _has_window: "layers", "switch" or "always"
    experts: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("attention_bias", "attention_bias", "mlp_bias"),
    "MistralForCausalLM": Family(False, False, positions=131072, window="always"),
    "Qwen2ForCausalLM": Family(True, False),
    "Qwen3ForCausalLM": Family(
        "attention_bias", "attention_bias", qk_norm=True, head_dim=128, positions=32768
    ),
    "Qwen3MoeForCausalLM": Family(
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        positions=32768,
        window="switch",
        experts=True,
    ),
}
DTYPES = ("float32", "bfloat16", "float16")
LAYERS, EXPERTS = 1000, 4096  # at most: a model is built before its weights are looked at
THETA = 10000.0  # where a file says nothing
# What other architectures compute otherwise, and the value that changes nothing. A file that asks
# for it under a name of FAMILIES would run, and be wrong.
REFUSED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "clip_qkv": None,
    "use_qk_norm": False,
    "attention_chunk_size": None,
    "no_rope_layers": [],
    "shared_expert_intermediate_size": 0,
    "n_shared_experts": 0,
}


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a model folder needs {path.name}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def first_of(where: str, sources: dict):
    """The value of the first source that has one: {its name in warnings: value or None}, in order.
    Warns of a later source that says otherwise. None: nobody says anything."""
    given = [(name, value) for name, value in sources.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            used = f"{given[0][0]} ({given[0][1]!r:.200}) is used"
            warn(f"{where}: {used}, not {name} ({value!r:.200}), which says otherwise")
    return given[0][1] if given else None


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder/config.json`. Raises UserError for what cannot be run as it stands."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), where=str(path))


def parse_config(data: dict, where: str = "config.json") -> ModelConfig:
    """data: a parsed config.json; where: its name in errors. Raises UserError."""
    read = _Reader(data, where)
    name, family = _family(read)
    positions = read.number("max_position_embeddings", default=family.positions)
    read.refuse(_has_window(data, family, positions), "sliding-window attention is not supported")
    act = data.get("hidden_act")
    strange = act not in (None, "silu", "swish")
    read.refuse(strange, f"hidden_act {act!r} is not supported; only silu")
    for key, neutral in REFUSED.items():
        value = data.get(key)
        read.refuse(value not in (None, neutral), f"{key} {value!r} is not supported")

    heads, hidden = read.number("num_attention_heads"), read.number("hidden_size")
    kv_heads = read.number("num_key_value_heads", default=heads)
    uneven = f"num_attention_heads ({heads}) is not divisible by"
    read.refuse(heads % kv_heads, f"{uneven} num_key_value_heads ({kv_heads})")
    uneven = f"hidden_size ({hidden}) is not divisible by num_attention_heads ({heads})"
    given = data.get("head_dim") or family.head_dim
    read.refuse(given is None and hidden % heads, f"{uneven}; head_dim is not given")
    head_dim = read.number("head_dim", default=family.head_dim or max(1, hidden // heads))
    read.refuse(head_dim % 2, f"head_dim ({head_dim}) is odd; RoPE turns pairs")
    read.refuse(head_dim > 2**16, f"head_dim ({head_dim}) is larger than {2**16}")

    inv_freq, factor = _rope(read, head_dim, positions)
    layers = read.number("num_hidden_layers")
    read.refuse(layers > LAYERS, f"num_hidden_layers ({layers}) is larger than {LAYERS}")
    biases = (family.qkv_bias, family.o_bias, family.mlp_bias)
    qkv, o, mlp = (read.flag(one) if isinstance(one, str) else one for one in biases)
    dtype = first_of(where, {key: data.get(key) or None for key in ("dtype", "torch_dtype")})
    return ModelConfig(
        architecture=name,
        vocab_size=read.number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.number("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=read.number("rms_norm_eps", float, default=1e-6),
        inv_freq=inv_freq,
        rope_factor=factor,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        qkv_bias=qkv,
        qk_norm=family.qk_norm,
        o_bias=o,
        mlp_bias=mlp,
        dtype=dtype if dtype in DTYPES else "float32",
        **(_experts(read, layers) if family.experts else {}),
    )


class _Reader:
    """The values of a config.json, each checked."""

    def __init__(self, data: dict, where: str):
        self.data, self.where = data, where

    def refuse(self, condition, message: str) -> None:
        if condition:
            raise UserError(f"{self.where}: {message}")

    def number(self, key, kind=int, default=None, source=None):
        """A number above 0, of the whole file or of a dictionary in it."""
        value = (self.data if source is None else source).get(key)
        value = default if value is None else value
        self.refuse(value is None, f"the key {key!r} is missing")
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        limit = 1e38 if kind is float else 2**31  # what float32 and PyTorch's sizes can hold
        fits = fits and 0 < value < limit
        self.refuse(not fits, f"{key} should be a positive number, not {value!r}")
        return kind(value)

    def flag(self, key, default=False, source=None) -> bool:
        value = (self.data if source is None else source).get(key)
        value = default if value is None else value
        self.refuse(not isinstance(value, bool), f"{key} should be true or false, not {value!r}")
        return value


def _family(read: _Reader) -> tuple[str, Family]:
    """The architecture, by its name."""
    names = read.data.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    known = f"lethe-mini runs {', '.join(FAMILIES)}"
    strange = not isinstance(name, str) or name not in FAMILIES
    read.refuse(strange, f"architecture {name!r} is not supported; {known}")
    quantized = read.data.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    instead = "take the unquantized one, or convert a GGUF (lethe_mini.checkpoint.convert_gguf)"
    read.refuse(quantized, f"a quantized checkpoint ({method!r}) is not supported; {instead}")
    return name, FAMILIES[name]


def _rope_sources(read: _Reader) -> tuple[dict, float]:
    """RoPE's dictionary, with its kind as `rope_type`, and theta. As in transformers 5,
    `rope_scaling` hides all of `rope_parameters`, and a theta in the dictionary that is read hides
    the one beside it. Where only the hidden dictionary has one, nobody can mean what follows."""
    both, thetas = {}, {}
    for key in ("rope_scaling", "rope_parameters"):
        given = read.data.get(key) or {}
        read.refuse(not isinstance(given, dict), f"{key} should be an object, not {given!r}")
        if given:
            names = {f"{name} of {key}": given.get(name) or None for name in ("rope_type", "type")}
            kind = first_of(read.where, names) or "default"
            numbers = {name: given[name] for name in given if name not in ("type", "rope_theta")}
            both[key], thetas[key] = {**numbers, "rope_type": kind}, given.get("rope_theta")
    rope = first_of(read.where, both) or {}
    used = next(iter(both), "rope_parameters")
    hidden = thetas["rope_parameters"] if len(both) == 2 else None
    said = {f"rope_theta of {used}": thetas.get(used), "rope_theta": read.data.get("rope_theta")}
    lost = hidden not in (None, THETA) and all(value is None for value in said.values())
    why = f"rope_scaling is read, but only rope_parameters has rope_theta ({hidden!r})"
    read.refuse(lost, f"{why}; write it into rope_scaling")
    if hidden is not None:
        said["rope_theta of rope_parameters"] = hidden
    theta = first_of(read.where, said)
    return rope, read.number("rope_theta", float, default=THETA, source={"rope_theta": theta})


def _rope(read: _Reader, head_dim: int, positions: int) -> tuple[tuple[float, ...], float]:
    """The frequencies of RoPE, and what cos and sin are multiplied by."""
    data, (rope, theta) = read.data, _rope_sources(read)
    partial = any(x.get("partial_rotary_factor") not in (None, 1) for x in (data, rope))
    read.refuse(partial, "partial_rotary_factor is not supported; only 1.0")
    per_layer = any(isinstance(value, dict) for value in rope.values())
    read.refuse(per_layer, "RoPE that differs between layers is not supported")
    kind = rope.get("rope_type", "default")
    strange = not isinstance(kind, str) or kind not in ROPE_TYPES
    read.refuse(strange, f"RoPE type {kind!r} is not supported; only {', '.join(ROPE_TYPES)}")
    key = "original_max_position_embeddings"
    if kind in ("llama3", "yarn"):  # here transformers hears the top level first
        said = {f"{key} at the top level": data.get(key), f"{key} of RoPE": rope.get(key)}
        rope = {**rope, key: first_of(read.where, said)}
    scaling = {name: read.number(name, float, source=rope) for name in ROPE_TYPES[kind]}
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    read.refuse(high <= low, "high_freq_factor should be above low_freq_factor")
    if kind == "yarn":
        read.refuse(theta <= 1, f"rope_theta should be above 1 for yarn, not {theta}")
        scaling[key] = read.number(key, float, default=positions, source=rope)
        scaling["truncate"] = read.flag("truncate", default=True, source=rope)
        scaling |= {key: read.number(key, float, default, rope) for key, default in YARN.items()}
        given = [key for key in YARN_FACTORS if rope.get(key) is not None]
        scaling |= {key: read.number(key, float, source=rope) for key in given}
        uneven = scaling["beta_fast"] <= scaling["beta_slow"]
        read.refuse(uneven, "beta_fast should be above beta_slow")
    return inverse_frequencies(kind, theta, head_dim, scaling), rope_factor(kind, scaling)


def _experts(read: _Reader, layers: int) -> dict:
    """The fields of a mixture of experts. The number of experts has two names: that of files which
    transformers 5 writes, and that of the hub."""
    counts = {key: read.data.get(key) for key in ("num_local_experts", "num_experts")}
    first_of(read.where, counts)
    key = next((key for key, count in counts.items() if count is not None), "num_local_experts")
    count, chosen = read.number(key), read.number("num_experts_per_tok")
    read.refuse(count > EXPERTS, f"{key} ({count}) is larger than {EXPERTS}")
    read.refuse(chosen > count, f"num_experts_per_tok ({chosen}) is above {key} ({count})")
    dense = read.data.get("mlp_only_layers") or []
    known = isinstance(dense, list) and all(type(index) is int for index in dense)
    read.refuse(not known, f"mlp_only_layers should be a list of layers, not {dense!r}")
    step = read.number("decoder_sparse_step", default=1)
    return {
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": read.number("moe_intermediate_size"),
        "norm_topk_prob": read.flag("norm_topk_prob"),
        "expert_layers": tuple(sorted(set(range(step - 1, layers, step)) - set(dense))),
    }


def _has_window(data: dict, family: Family, positions: int) -> bool:
    """Does a sliding window reach any layer? `layer_types`, where given, has the last word; else
    Qwen's window starts at layer max_window_layers if use_sliding_window switches it on, a
    mixture's is then in every layer, and Mistral's always is. There one as long as the positions
    does nothing. Defaults are those of transformers."""
    kinds = data.get("layer_types")
    if kinds:
        return not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    window = data.get("sliding_window", 4096)
    if family.window != "always" and not data.get("use_sliding_window"):
        return False
    if family.window == "layers":
        first, layers = data.get("max_window_layers", 28), data.get("num_hidden_layers")
        reaches_none = isinstance(first, int) and isinstance(layers, int) and first >= layers
        return bool(window) and not reaches_none
    return window is not None and not (isinstance(window, int) and window >= positions)
