"""What a checkpoint's `config.json` says, checked and frozen.

Two architectures are known, `LlamaForCausalLM` and `Qwen2ForCausalLM`, and three kinds of RoPE.
Whatever would need other mathematics is refused by name here, so that no model is ever run wrongly.
Both spellings of RoPE are read: `rope_theta` with `rope_scaling` (checkpoints up to 2025), and
`rope_parameters` (written by transformers 5).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
ROPE_TYPES = {  # kind of scaling -> the numbers it needs
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
DTYPES = ("float32", "bfloat16", "float16")


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one transformer, under the names of `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # H_kv
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_type: str
    rope_scaling: dict[str, float]  # the numbers of ROPE_TYPES[rope_type]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str  # the dtype that the weights were saved in

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads `folder/config.json`. Raises UserError for what cannot be run as it stands."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: a model folder needs config.json")
        return cls.from_dict(read_json(path), where=str(path))

    @classmethod
    def from_dict(cls, data: dict, where: str = "config.json") -> "ModelConfig":
        """`data`: a parsed config.json; `where`: its name in errors. Raises UserError."""

        def number(key, kind=int, default=None, source=data):
            value = source.get(key)
            value = default if value is None else value
            if value is None:
                raise UserError(f"{where}: the key {key!r} is missing")
            fits = isinstance(value, (int, float) if kind is float else int)
            limit = 1e38 if kind is float else 2**31  # what float32 and PyTorch's sizes can hold
            if not fits or isinstance(value, bool) or not 0 < value < limit:
                raise UserError(f"{where}: {key} should be a positive number, not {value!r}")
            return kind(value)

        def flag(key, default=False):
            value = data.get(key)
            value = default if value is None else value
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} should be true or false, not {value!r}")
            return value

        names = data.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else names
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"{where}: architecture {architecture!r} is not supported; "
                f"lethe-mini runs {' and '.join(ARCHITECTURES)}"
            )
        cls._refuse(data, where)

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        kv_heads = number("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads ({heads}) is not divisible by "
                f"num_key_value_heads ({kv_heads})"
            )
        if data.get("head_dim") is None and hidden % heads:
            raise UserError(
                f"{where}: hidden_size ({hidden}) is not divisible by "
                f"num_attention_heads ({heads}), and head_dim is not given"
            )
        head_dim = number("head_dim", default=max(1, hidden // heads))
        if head_dim % 2:
            raise UserError(f"{where}: head_dim ({head_dim}) is odd; RoPE turns pairs")

        # transformers 5 keeps everything about RoPE in one dictionary; before, theta stood beside.
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: rope_parameters should be an object, not {rope!r}")
        if any(x.get("partial_rotary_factor") not in (None, 1) for x in (data, rope)):
            raise UserError(f"{where}: partial_rotary_factor is not supported; only 1.0")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{where}: RoPE that differs between layers is not supported")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise UserError(
                f"{where}: RoPE type {kind!r} is not supported; "
                f"lethe-mini runs {', '.join(ROPE_TYPES)}"
            )
        theta_source = rope if rope.get("rope_theta") is not None else data
        scaling = {key: number(key, float, source=rope) for key in ROPE_TYPES[kind]}
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise UserError(f"{where}: high_freq_factor should be above low_freq_factor")

        qwen2 = architecture == "Qwen2ForCausalLM"
        dtype = data.get("dtype") or data.get("torch_dtype") or "float32"
        return cls(
            architecture=architecture,
            vocab_size=number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=number("max_position_embeddings", default=2048),
            rms_norm_eps=number("rms_norm_eps", float, default=1e-6),
            rope_theta=number("rope_theta", float, default=10000.0, source=theta_source),
            rope_type=kind,
            rope_scaling=scaling,
            tie_word_embeddings=flag("tie_word_embeddings"),
            qkv_bias=True if qwen2 else flag("attention_bias"),
            o_bias=False if qwen2 else flag("attention_bias"),
            mlp_bias=False if qwen2 else flag("mlp_bias"),
            dtype=dtype if dtype in DTYPES else "float32",
        )

    @staticmethod
    def _refuse(data: dict, where: str) -> None:
        """Raises UserError for features that change the mathematics and are not built here."""
        if data.get("quantization_config"):
            method = data["quantization_config"]
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise UserError(
                f"{where}: a quantized checkpoint ({method!r}) is not supported; take the "
                "unquantized one, or convert a GGUF with python -m lethe_mini.convert_gguf"
            )
        # Qwen2's switch may be on and yet reach no layer: the window starts at max_window_layers.
        # layer_types, where given, has the last word. The defaults are those of transformers.
        kinds = data.get("layer_types")
        if not kinds and data.get("use_sliding_window") and data.get("sliding_window", 4096):
            first, layers = data.get("max_window_layers", 28), data.get("num_hidden_layers")
            reaches_none = isinstance(first, int) and isinstance(layers, int) and first >= layers
            kinds = [] if reaches_none else ["sliding_attention"]
        if kinds and (not isinstance(kinds, list) or any(k != "full_attention" for k in kinds)):
            raise UserError(f"{where}: sliding-window attention is not supported")
        if data.get("hidden_act") not in (None, "silu", "swish"):
            act = data["hidden_act"]
            raise UserError(f"{where}: hidden_act {act!r} is not supported; only silu")
