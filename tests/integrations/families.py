"""Tiny random checkpoints of transformers, one of each family, and an oracle for their logits.

L = 3, H = 6, H_kv = 2, D = 10. Weights are spread out, so that attention has preferences.
"""

import functools

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

VOCAB, LAYERS, HEADS, KV_HEADS = 53, 3, 6, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 38,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
SLIDING = {
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
# The class of each, and what only it has.
FAMILIES = {
    "Llama": ("Llama", {}),
    "without groups": ("Llama", {"num_key_value_heads": HEADS}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Gemma 2": ("Gemma2", {**SLIDING, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 2.0}),
    "Gemma 3": ("Gemma3", {**SLIDING, "query_pre_attn_scalar": 13}),
    "Phi-3": ("Phi3", {"partial_rotary_factor": 1.0}),
    "Phi-3, partial RoPE": ("Phi3", {"partial_rotary_factor": 0.8}),
}


@functools.cache
def weights(family, dtype=torch.float32):
    kind, changes = FAMILIES[family]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**SIZES | changes)
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            scale = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            torch.nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)
    return model.to(dtype).requires_grad_(False)


def new_model(family="Llama", dtype=torch.float32):
    """A model of its own, whose attention a test may change."""
    model = weights(family, dtype)
    twin = type(model)(model.config).eval().to(dtype).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return twin


def some_tokens(count, seed=0):
    """(1, count) random tokens that end nothing."""
    return torch.randint(3, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


LOOKS = {}  # of the pass at hand: layer -> (H_kv, T, T) bool, which keys each query may look at


def by_the_book(module, query, key, value, attention_mask, scaling, softcap=None, **kwargs):
    """Attention written out, over all keys: of a layer in LOOKS over those alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    looks = attention_mask
    if module.layer_idx in LOOKS:
        looks = LOOKS[module.layer_idx].repeat_interleave(groups, dim=0)
    logits = query.double() @ key.mT * scaling
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    out = logits.masked_fill(~looks, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).to(query.dtype), None


def full_mask(*args, **kwargs):
    """A mask in any case."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("by_the_book", by_the_book)
AttentionMaskInterface.register("by_the_book", full_mask)


@torch.no_grad()
def full_pass(family, tokens, looks, dtype=torch.float32):
    """The logits (T, vocab) of one pass without a cache; looks: as LOOKS."""
    model = new_model(family, dtype)
    model.set_attn_implementation("by_the_book")
    LOOKS.update(looks)
    try:
        return model(tokens, use_cache=False).logits[0]
    finally:
        LOOKS.clear()
