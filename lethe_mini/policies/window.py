"""Attention of the last queries, for policies that look through a window (arXiv 2404.14469)."""

import torch
from torch import Tensor

from ..cache import KVCache, LayerCache


def window_logits(layer: LayerCache, cache: KVCache) -> tuple[Tensor, Tensor]:
    """The last W queries against every key held: logits (B, H_kv, G, W, S) float32, -inf where a
    query may not look, and which of the W queries there are at all, (B, W) bool."""
    queries, keys = layer.queries, layer.keys
    B, _, W, D = queries.shape
    grouped = queries.view(B, keys.shape[1], -1, W, D) * D**-0.5
    logits = torch.matmul(grouped, keys.transpose(2, 3)[:, :, None]).float()
    places = cache.next[:, None] + torch.arange(-W, 0, device=cache.device)  # (B, W)
    ahead = layer.positions[:, :, None] > places[:, None, :, None]  # (B, H_kv, W, S)
    hidden = (ahead | ~layer.valid()[:, :, None])[:, :, None]
    # A query that was never asked looks everywhere, so that its softmax is finite; callers drop it.
    asked = places >= 0
    return logits.masked_fill(hidden & asked[:, None, None, :, None], -torch.inf), asked


def window_attention(layer: LayerCache, cache: KVCache) -> Tensor:
    """Attention of the last W queries, (B, H_kv, G, W, S) float32; rows that do not exist are 0."""
    logits, asked = window_logits(layer, cache)
    weights = logits.softmax(dim=-1)
    return weights * (asked[:, None, None, :, None] & layer.valid()[:, :, None, None])
