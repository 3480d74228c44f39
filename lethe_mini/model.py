"""The transformer of Llama, Mistral and Qwen: `model(tokens, positions, cache) -> logits`.

Parameters carry the hub's names, less the leading `model.`; only what has one input is one product
(`Joined`). The cache is passed in and is the only state. The model knows nothing of policies: it
appends keys and values to the cache, attends over them, and adds to scores what each key received.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, causal_mask
from .cache import KVCache
from .config import ModelConfig
from .experts import Experts
from .kernels import Joined, Linear, Store, write
from .rope import rope_cos_sin, rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size); the mean square is taken in float32."""
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, D = config.hidden_size, config.head_dim
        inner, kv = config.num_attention_heads * D, config.num_key_value_heads * D
        self.qkv_proj = Joined(hidden, config.qkv_bias, q_proj=inner, k_proj=kv, v_proj=kv)
        self.o_proj = Linear(inner, hidden, bias=config.o_bias)
        norm = RMSNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.q_norm, self.k_norm = (norm(D, config.rms_norm_eps) for _ in range(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Joined(hidden, config.mlp_bias, gate_proj=inner, up_proj=inner)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """One layer, a function of tensors alone, so that it compiles as a whole."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (Experts if index in config.expert_layers else MLP)(config)

    def forward(self, x, cos, sin, positions, store: Store | None = None, slots=None, lag=0):
        """x: (B, T, hidden); cos, sin: (B, 1, T, D/2); positions: (B, T) -> x and the queries
        (B, H, T, D). With a layer's `store`, it writes to `slots` (B, T), looks at all up to there,
        and adds the mass (see `attend`) to the scores: the sum in arXiv 2511.06029, eq. 5."""
        B, T, _ = x.shape
        attn, normed = self.self_attn, self.input_layernorm(x)
        parts = attn.qkv_proj(normed)
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in parts)
        q, k = rotate(attn.q_norm(q), cos, sin), rotate(attn.k_norm(k), cos, sin)
        if store is None:
            out, _ = attend(q, k, v, mask=None)
        else:
            write(store, slots, k, v, positions)
            keys, scores = store["keys"], store.get("scores")
            mask = causal_mask(slots, keys.shape[2])
            out, mass = attend(q, keys, store["values"], mask, scores is not None, lag)
            if mass is not None:
                scores.add_(mass)
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x)), q


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.decode_layers, self.decode_head = list(self.layers), self.head  # for one token

    def init_rope(self, device: torch.device | str) -> None:
        """Puts the frequencies, which no checkpoint holds, on the device of the weights."""
        self.inv_freq = torch.tensor(self.config.inv_freq, device=device)

    def compile(self) -> None:
        """Opt-in: decoding through torch.compile, a layer at a time, for any size of the cache."""
        self.decode_layers = [torch.compile(block, dynamic=True) for block in self.layers]
        self.decode_head = torch.compile(self.head, dynamic=True)

    def head(self, x: Tensor) -> Tensor:
        """(B, T, hidden) -> logits (B, T, vocab) float32."""
        return self.lm_head(self.norm(x)).float()

    def forward(
        self, tokens: Tensor, positions=None, cache: KVCache | None = None, last_only=False
    ) -> Tensor:
        """tokens: (B, T) int64 -> logits (B, T, vocab) float32; (B, 1, vocab) with `last_only`.
        positions: (B, T), the tokens' places in the text; by default they follow what the cache
        has seen. With a cache its sequences all grow by T."""
        T = tokens.shape[1]
        if cache is not None:
            cache.reserve(T)
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand_as(tokens)
            positions = positions if cache is None else positions + cache.next[:, None]
        x = self.embed_tokens(tokens)
        factor = self.config.rope_factor
        cos, sin = rope_cos_sin(positions[:, None], self.inv_freq, factor)
        layers, head = self.layers, self.head
        if T == 1 and cache is not None:
            layers, head = self.decode_layers, self.decode_head
        for index, block in enumerate(layers):
            if cache is None:
                x, _ = block(x, cos, sin, positions)
                continue
            layer = cache.layers[index]
            store, slots = layer.place(T)
            if layer.compact:  # there a token's angle is its slot's
                cos, sin = rope_cos_sin(slots[:, None], layer.inv_freq, factor)
            x, q = block(x, cos, sin, positions, store, slots, layer.notes.lag)
            layer.remember(q)
        if cache is not None:
            cache.next.add_(T)
            cache.count(T)
        return head(x[:, -1:] if last_only else x)
