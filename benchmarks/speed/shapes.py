"""Random weights in the shape of published models, for speed and memory alone.

At import this needs the standard library alone: another engine's interpreter runs it, too.
"""

# As in each model's config.json on the hub, 2024 to 2025.
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def _sizes(base, hidden, inner, layers, heads, kv_heads, tied, **more) -> dict:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        **more,
    }


SHAPES = {
    "smollm2-135m": _sizes(
        LLAMA3, 576, 1536, 30, 9, 3, True, vocab_size=49152, rope_theta=100000.0
    ),
    "llama-1b": _sizes(LLAMA3, 2048, 8192, 16, 32, 8, True),  # Llama 3.2 1B
    "llama-3b": _sizes(LLAMA3, 3072, 8192, 28, 24, 8, True),  # Llama 3.2 3B
    "llama-8b": _sizes(LLAMA3, 4096, 14336, 32, 32, 8, False),  # Llama 3.1 8B, R1-Distill-Llama-8B
    "qwen-0.5b": _sizes(QWEN2, 896, 4864, 24, 14, 2, True, vocab_size=151936),  # Qwen2.5 0.5B
    "qwen-1.5b": _sizes(QWEN2, 1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen-7b": _sizes(QWEN2, 3584, 18944, 28, 28, 4, False, vocab_size=152064),
    "qwen3-0.6b": _sizes(QWEN3, 1024, 3072, 28, 16, 8, True),
    "qwen3-4b": _sizes(QWEN3, 2560, 9728, 36, 32, 8, True),
    "qwen3-8b": _sizes(QWEN3, 4096, 12288, 36, 32, 8, False),  # R1-0528-Qwen3-8B, too
    "qwen3-30b-a3b": _sizes(QWEN3_MOE, 2048, 6144, 48, 32, 4, False),
}


def weights_estimate(shape: str) -> int:
    """Bytes of a shape's weights, at two bytes a number."""
    s = SHAPES[shape]
    hidden, heads = s["hidden_size"], s["num_attention_heads"]
    D = s.get("head_dim", hidden // heads)
    attention = 2 * hidden * D * (heads + s["num_key_value_heads"])
    inner = s["intermediate_size"]
    if "num_experts" in s:
        inner = s["num_experts"] * s["moe_intermediate_size"]
    layer = attention + 3 * hidden * inner
    ends = s["vocab_size"] * hidden * (1 if s["tie_word_embeddings"] else 2)
    return 2 * (s["num_hidden_layers"] * layer + ends)


def fill_random(parameters, seed: int = 0) -> None:
    """Small random numbers. One draw is repeated, since billions of draws would take minutes."""
    import torch

    torch.manual_seed(seed)
    draw = torch.randn(1 << 20)
    for parameter in parameters:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        tile = (draw * parameter.shape[-1] ** -0.5).to(parameter.device, parameter.dtype)
        for first in range(0, len(flat), len(tile)):
            part = flat[first : first + len(tile)]
            part.copy_(tile[: len(part)])


def shape_scores(cache, seed: int = 0) -> None:
    """Overwrites the scores of a cache with some that look like a trained model's.

    A few sinks have a large share of the mass, the newest tokens come next, then a long decaying
    tail. Deeper layers are more concentrated.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(cache.layers):
        scores = layer.scores  # (B, H_kv, S)
        B, H_kv, S = scores.shape
        age = torch.arange(S, 0, -1).float()
        noise = torch.randn(B, H_kv, S, generator=draw)
        steep = 0.4 + 0.4 * index / max(1, len(cache.layers) - 1)
        shaped = age.pow(-steep) * noise.exp()
        shaped[..., :4] += shaped.sum(-1, keepdim=True) * torch.tensor([0.6, 0.2, 0.1, 0.1])[:S]
        scores.copy_(shaped.to(scores.device))
