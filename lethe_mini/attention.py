"""The hot path: attention that also tells how much mass every key received.

Query heads share key/value heads in groups (G = H / H_kv); keys and values are never repeated.
A decoding step (T = 1) is written out as two grouped products with a softmax between them, so the
mass costs one more sum. A prefill (T > 1) takes PyTorch's fused attention for its output and, only
where scores are wanted, a second pass for the mass. So a policy that evicts nothing changes no bit
of the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .kernels import grouped_logits, grouped_values, lagged, received_mass, widened


def causal_mask(slots: Tensor, S: int) -> Tensor | None:
    """(B, 1, T, S) bool: a query in slot n sees slots 0 .. n, for slots are in the order of the
    text. slots: (B, T) -> None where `attend` needs none."""
    B, T = slots.shape
    if T > 1 and (B == 1 or S == T):  # then the queries are in the last T slots
        return None
    return (torch.arange(S, device=slots.device) <= slots[..., None])[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, want_mass: bool = False, lag: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention and, if wanted, the mass that each key received.

    q: (B, H, T, D); k, v: (B, H_kv, S, D); mask: (B, 1, T, S) bool, True where the query may look,
    or None: the queries are in the last T slots and the mask is causal.
    Returns (B, H, T, D) and the mass (B, H_kv, S) float32, summed over T and the group's G heads
    (arXiv 2511.06029, eq. 2, per sequence and key/value head), or None. lag: for LethePlus alone;
    only queries count that are at least so many slots behind the key.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    if T > 1:
        # PyTorch's is_causal would align it top-left.
        seen = causal_lower_right(T, S) if mask is None else mask
        dtype, (q, k, v) = v.dtype, widened(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.to(dtype), received_mass(q, k, mask, lag) if want_mass else None
    mask = q.new_ones(1, 1, 1, S, dtype=torch.bool) if mask is None else mask
    logits = grouped_logits(q.view(B, H_kv, H // H_kv, D) * D**-0.5, k)
    weights = logits.masked_fill_(~mask, -torch.inf).softmax(dim=-1)  # (B, H_kv, G, S)
    out = grouped_values(weights, v).view(B, H, T, D)
    if not want_mass:
        return out, None
    mass = weights.sum(dim=2)
    return out, mass.mul_(lagged(mask[:, :, 0], lag)) if lag else mass
