"""The sizes and switches of one transformer. checkpoint/config.py reads them from config.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one transformer, mostly under the names of `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # H_kv
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]  # RoPE: radians a position turns each of the D/2 pairs
    rope_factor: float  # what RoPE multiplies cos and sin by
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool  # RMSNorm of every head's q and k, before RoPE (Qwen3)
    o_bias: bool
    mlp_bias: bool
    dtype: str  # the dtype that the weights were saved in
    num_experts: int = 0  # in the layers of expert_layers, in place of an MLP
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    expert_layers: tuple[int, ...] = ()
