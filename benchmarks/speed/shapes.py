"""Random weights in the shape of published models, for speed and memory alone.

At import this needs the standard library alone: another engine's interpreter runs it, too.
"""

import json
from pathlib import Path

# As in each model's config.json on the hub, 2024 to 2025; not those that the engine cannot run.
FILE = Path(__file__).parents[2] / "lethe_mini" / "shapes.json"
SHAPES = {
    name: sizes
    for name, sizes in json.loads(FILE.read_text(encoding="utf-8")).items()
    if "kv_lora_rank" not in sizes
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
