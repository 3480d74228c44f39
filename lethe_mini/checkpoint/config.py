"""config.json to a ModelConfig: every value is checked, since a checkpoint may hold anything.

The engine runs the architectures of FAMILIES, and the kinds of RoPE of rope.py. Anything else
raises an error that names the unsupported feature. Both spellings of RoPE are read: `rope_theta`
with `rope_scaling` (most checkpoints on the hub), and `rope_parameters` (of transformers 5).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..errors import UserError
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
    window: str = "use_sliding_window"  # "always": sliding_window alone decides


FAMILIES = {
    "LlamaForCausalLM": Family("attention_bias", "attention_bias", "mlp_bias"),
    "MistralForCausalLM": Family(False, False, positions=131072, window="always"),
    "Qwen2ForCausalLM": Family(True, False),
    "Qwen3ForCausalLM": Family(
        "attention_bias", "attention_bias", qk_norm=True, head_dim=128, positions=32768
    ),
}
DTYPES = ("float32", "bfloat16", "float16")


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


def read_config(folder: Path) -> ModelConfig:
    """Reads `folder/config.json`. Raises UserError for what cannot be run as it stands."""
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), where=str(path))


def parse_config(data: dict, where: str = "config.json") -> ModelConfig:
    """data: a parsed config.json; where: its name in errors. Raises UserError."""

    def refuse(condition, message: str) -> None:
        if condition:
            raise UserError(f"{where}: {message}")

    def number(key, kind=int, default=None, source=data):
        value = default if source.get(key) is None else source[key]
        refuse(value is None, f"the key {key!r} is missing")
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        limit = 1e38 if kind is float else 2**31  # what float32 and PyTorch's sizes can hold
        fits = fits and 0 < value < limit
        refuse(not fits, f"{key} should be a positive number, not {value!r}")
        return kind(value)

    def flag(key, default=False, source=data) -> bool:
        value = default if source.get(key) is None else source[key]
        refuse(not isinstance(value, bool), f"{key} should be true or false, not {value!r}")
        return value

    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    known = f"lethe-mini runs {', '.join(FAMILIES)}"
    strange = not isinstance(name, str) or name not in FAMILIES
    refuse(strange, f"architecture {name!r} is not supported; {known}")
    family = FAMILIES[name]
    quantized = data.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    instead = "take the unquantized one, or convert a GGUF (lethe_mini.checkpoint.convert_gguf)"
    refuse(quantized, f"a quantized checkpoint ({method!r}) is not supported; {instead}")
    positions = number("max_position_embeddings", default=family.positions)
    refuse(_has_window(data, family, positions), "sliding-window attention is not supported")
    act = data.get("hidden_act")
    refuse(act not in (None, "silu", "swish"), f"hidden_act {act!r} is not supported; only silu")

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    kv_heads = number("num_key_value_heads", default=heads)
    uneven = f"num_attention_heads ({heads}) is not divisible by"
    refuse(heads % kv_heads, f"{uneven} num_key_value_heads ({kv_heads})")
    uneven = f"hidden_size ({hidden}) is not divisible by num_attention_heads ({heads})"
    given = data.get("head_dim") or family.head_dim
    refuse(given is None and hidden % heads, f"{uneven}; head_dim is not given")
    head_dim = number("head_dim", default=family.head_dim or max(1, hidden // heads))
    refuse(head_dim % 2, f"head_dim ({head_dim}) is odd; RoPE turns pairs")
    refuse(head_dim > 2**16, f"head_dim ({head_dim}) is larger than {2**16}")

    # transformers 5 keeps everything about RoPE in one dictionary; others keep theta beside it.
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    refuse(not isinstance(rope, dict), f"rope_parameters should be an object, not {rope!r}")
    partial = any(x.get("partial_rotary_factor") not in (None, 1) for x in (data, rope))
    refuse(partial, "partial_rotary_factor is not supported; only 1.0")
    per_layer = any(isinstance(value, dict) for value in rope.values())
    refuse(per_layer, "RoPE that differs between layers is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    strange = not isinstance(kind, str) or kind not in ROPE_TYPES
    refuse(strange, f"RoPE type {kind!r} is not supported; only {', '.join(ROPE_TYPES)}")
    scaling = {key: number(key, float, source=rope) for key in ROPE_TYPES[kind]}
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    refuse(high <= low, "high_freq_factor should be above low_freq_factor")
    theta_beside = data if rope.get("rope_theta") is None else rope
    theta = number("rope_theta", float, default=10000.0, source=theta_beside)
    if kind == "yarn":
        refuse(theta <= 1, f"rope_theta should be above 1 for yarn, not {theta}")
        key = "original_max_position_embeddings"
        scaling[key] = number(key, float, default=positions, source=rope)
        scaling["truncate"] = flag("truncate", default=True, source=rope)
        scaling |= {key: number(key, float, default, rope) for key, default in YARN.items()}
        given = [key for key in YARN_FACTORS if rope.get(key) is not None]
        scaling |= {key: number(key, float, source=rope) for key in given}
        refuse(scaling["beta_fast"] <= scaling["beta_slow"], "beta_fast should be above beta_slow")

    biases = (family.qkv_bias, family.o_bias, family.mlp_bias)
    qkv, o, mlp = (flag(one) if isinstance(one, str) else one for one in biases)
    dtype = data.get("dtype") or data.get("torch_dtype")
    return ModelConfig(
        architecture=name,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=number("rms_norm_eps", float, default=1e-6),
        inv_freq=inverse_frequencies(kind, theta, head_dim, scaling),
        rope_factor=rope_factor(kind, scaling),
        tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=qkv,
        qk_norm=family.qk_norm,
        o_bias=o,
        mlp_bias=mlp,
        dtype=dtype if dtype in DTYPES else "float32",
    )


def _has_window(data: dict, family: Family, positions: int) -> bool:
    """Does a sliding window reach any layer? `layer_types`, where given, has the last word; else
    Qwen's window starts at layer max_window_layers, and Mistral's is in every layer, where one as
    long as the positions does nothing. Defaults are those of transformers."""
    kinds = data.get("layer_types")
    if kinds:
        return not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    if family.window == "always":
        window = data.get("sliding_window", 4096)
        return window is not None and not (isinstance(window, int) and window >= positions)
    first, layers = data.get("max_window_layers", 28), data.get("num_hidden_layers")
    reaches_none = isinstance(first, int) and isinstance(layers, int) and first >= layers
    window = data.get("use_sliding_window") and data.get("sliding_window", 4096)
    return bool(window) and not reaches_none
