"""The hot path: attention that also tells how much mass every key received.

Query heads share key/value heads in groups (G = H / H_kv); keys and values are never repeated.
A decoding step (T = 1) is written out as two grouped products with a softmax between them, so the
mass is a sum over what is there anyway. A prefill (T > 1) takes PyTorch's fused attention for its
output and, only where scores are wanted, a second pass for the mass. So the output never depends on
whether anybody keeps scores: a policy that evicts nothing changes no bit of the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import grouped_logits, grouped_values, widened

MASS_BLOCK = 64  # queries whose softmax is held at once; small enough to stay in the CPU's cache


def causal_mask(slots: Tensor, S: int) -> Tensor | None:
    """(B, 1, T, S) bool: a query in slot n sees slots 0 .. n, for slots are in the order of the
    text. slots: (B, T) -> None where `attend` needs none."""
    B, T = slots.shape
    if T > 1 and (B == 1 or S == T):  # then the queries are in the last T slots
        return None
    return (torch.arange(S, device=slots.device) <= slots[..., None])[:, None]


def lagged(mask: Tensor, lag: int) -> Tensor:
    """A causal mask (..., S), less the `lag` newest slots that each query sees."""
    return F.pad(mask, (0, lag))[..., lag:]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, want_mass: bool = False, lag: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention and, if wanted, the mass that each key received.

    q: (B, H, T, D); k, v: (B, H_kv, S, D); mask: (B, 1, T, S) bool, True where the query may look,
    or None: the queries are in the last T slots and the mask is causal.
    Returns (B, H, T, D) and the mass (B, H_kv, S) float32, summed over T and the group's G heads
    (arXiv 2511.06029, eq. 2, per sequence and key/value head), or None. Only queries count that
    are at least `lag` slots behind the key.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    if T > 1:
        seen, square = mask, mask is None and S == T
        if mask is None and not square:  # PyTorch's is_causal would align it top-left
            seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        dtype, (q, k, v) = v.dtype, widened(q, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=square, enable_gqa=True
        )
        return out.to(dtype), received_mass(q, k, mask, lag) if want_mass else None
    mask = q.new_ones(1, 1, 1, S, dtype=torch.bool) if mask is None else mask
    logits = grouped_logits(q.view(B, H_kv, H // H_kv, D) * D**-0.5, k)
    weights = logits.masked_fill_(~mask, -torch.inf).softmax(dim=-1)  # (B, H_kv, G, S)
    out = grouped_values(weights, v).view(B, H, T, D)
    if not want_mass:
        return out, None
    mass = weights.sum(dim=2)
    return out, mass.mul_(lagged(mask[:, :, 0], lag)) if lag else mass


def received_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, lag: int = 0, weights: Tensor | None = None
) -> Tensor:
    """The mass each key receives from T queries; the rest as in `attend`. weights: (T, 1), what
    each query counts.

    Queries go in blocks, so memory is linear in S. Every row of the softmax sums to 1, so without a
    lag the mass of a sequence adds up to H x T.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    mass = torch.zeros(B, H_kv, S, device=q.device)
    for first in range(0, T, MASS_BLOCK):
        last = min(first + MASS_BLOCK, T)
        seen = S if mask is not None else S - T + last
        rows = q[:, :, first:last].reshape(B, H_kv, -1, D) * D**-0.5  # (B, H_kv, G * t, D)
        logits = torch.matmul(rows, k[:, :, :seen].mT).float()
        logits = logits.view(B, H_kv, H // H_kv, -1, seen)  # (B, H_kv, G, t, seen)
        if mask is None:
            near = min(seen, last - first + lag)  # slots that some query of the block may not count
            looks = torch.ones(last - first, near, dtype=torch.bool, device=q.device)
            looks = looks.tril(near - (last - first))
        else:
            near, looks = S, mask[:, :, first:last].unsqueeze(2)
        logits[..., -near:].masked_fill_(~looks, -torch.inf)
        shares = logits.softmax(dim=-1)
        if lag:
            shares[..., -near:] *= lagged(looks, lag)
        if weights is not None:
            shares *= weights[first:last]
        mass[:, :, :seen] += shares.sum(dim=(2, 3))
    return mass
