"""Runs of a small random model whose attention has preferences, token by token and by the engine.

L = 3, H = 6, H_kv = 2, D = 10.
"""

import dataclasses
import functools
import math

import torch
from noise import held_positions

from lethe_mini.cache import KVCache
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import named_weights
from lethe_mini.engine import Engine
from lethe_mini.model import Transformer

VOCAB = 53
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
LLAMA3 = {"rope_type": "llama3", "factor": 7.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 13}
# Each with what only it has: biases, kinds of RoPE, norms of q and k, experts but in one layer.
FAMILIES = {
    "Qwen2": {},
    "Llama": {"rope_parameters": LLAMA3 | ORIGINAL, "mlp_bias": True},
    "Mistral": {"sliding_window": None},
    "Qwen3": {"rope_parameters": YARN | ORIGINAL},
    "Qwen3Moe": {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]},
}


@functools.cache
def new_model(family="Qwen2", dtype=torch.float32, positions=128):
    """Random weights, queries and keys large enough for peaked attention."""
    torch.manual_seed(7)
    named = {"architectures": [f"{family}ForCausalLM"], "max_position_embeddings": positions}
    model = Transformer(parse_config(SIZES | FAMILIES[family] | named)).eval()
    for name, weight in sorted(named_weights(model).items()):
        if "norm" not in name:
            scale = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.15)
    model.init_rope("cpu")
    return model.to(dtype)


def some_tokens(count, seed):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model, policy, tokens, prompt, compact=False):
    """Reads the prompt, then token by token, with rounds where they are due.

    Returns the cache, the logits of every step, and what each query may look at: [layer][head][t],
    the positions held when token t came, its own included.
    """
    cache = KVCache(model.config, compact=compact, notes=policy.notes())
    cache.prompt = [prompt]
    looks = [[[list(range(t + 1)) for t in range(prompt)] for _ in range(2)] for _ in range(3)]
    logits = [model(torch.tensor([tokens[:prompt]]), cache=cache)[0, -1]]
    policy.round(cache, policy.due(cache, prefilled=True))
    for t in range(prompt, len(tokens)):
        for layer, held in zip(looks, held_positions(cache), strict=True):
            for head, positions in zip(layer, held[0], strict=True):
                head.append([*positions, t])
        policy.decay(cache)
        logits.append(model(torch.tensor([[tokens[t]]]), cache=cache)[0, -1])
        due = policy.due(cache)
        if any(due):
            policy.round(cache, due)
    return cache, torch.stack(logits), looks


def turned(x, angles, inv_freq):
    """RoPE by complex numbers in float64: x (..., D), a position or slot for each leading index."""
    a, b = x.double().chunk(2, dim=-1)
    turn = torch.tensor(angles, dtype=torch.float64)[..., None] * inv_freq.double()
    z = torch.complex(a, b) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat((z.real, z.imag), dim=-1)


def full_pass(model, tokens, looks, compact=False):
    """All logits at once, without a cache: each query of each head looks at its own positions.

    In compact mode a key's angle is its rank among what the query looks at.
    """
    T = len(tokens)
    x = model.embed_tokens(torch.tensor(tokens))
    for layer, block in enumerate(model.layers):
        attn, y = block.self_attn, block.input_layernorm(x)
        q, k, v = (part.view(T, -1, 10) for part in attn.qkv_proj(y))
        q, k = attn.q_norm(q), attn.k_norm(k)
        out = torch.zeros(T, 6, 10)
        for t in range(T):
            for group in range(2):
                held = looks[layer][group][t]
                angles = list(range(len(held))) if compact else held
                keys = turned(k[held, group], angles, model.inv_freq)
                queries = turned(q[t, 3 * group : 3 * group + 3], [angles[-1]], model.inv_freq)
                scale = model.config.rope_factor**2 / math.sqrt(10)  # on queries and on keys
                weights = (queries @ keys.T * scale).softmax(dim=-1)
                out[t, 3 * group : 3 * group + 3] = (weights @ v[held, group].double()).float()
        x = x + attn.o_proj(out.view(T, 60))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(model.norm(x))


def generate(model, prompts, policy, max_new_tokens=33, text=None, **kwargs):
    """Token ids, what was held ({(prompt length, seen): positions by layer}), and the result."""
    held = {}

    class Spy(type(policy)):
        def round(self, cache, due):
            done = super().round(cache, due)
            after = held_positions(cache)
            for row, key in enumerate(zip(cache.prompt, cache.seen, strict=True)):
                held[key] = [layer[row] for layer in after]
            return done

    values = {spec.name: getattr(policy, spec.name) for spec in dataclasses.fields(policy)}
    engine = Engine(model, text)
    result = engine.generate(prompts, Spy(**values), max_new_tokens=max_new_tokens, **kwargs)
    return [one.token_ids for one in result.sequences], held, result
