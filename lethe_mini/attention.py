"""The hot path: RoPE, and attention that also tells how much mass every key received.

Query heads share key/value heads in groups (G = H / H_kv); keys and values are never repeated.
A decoding step (T = 1) is written out as two grouped products with a softmax between them, so the
mass is a sum over what is there anyway. A prefill (T > 1) takes PyTorch's fused attention for its
output and, only where scores are wanted, a second pass for the mass. So the output never depends on
whether anybody keeps scores: a policy that evicts nothing changes no bit of the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASS_BLOCK = 64  # queries whose softmax is held at once; small enough to stay in the CPU's cache


def rope_cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle: positions (...) int, inv_freq (D/2) -> (..., D/2) float32.

    Angles are taken in the dtype of inv_freq. Models were trained with float32, where the angle of
    position 8,000 is off by up to 5e-4; only in float64 does turning by a, then b, turn by a + b.
    """
    angles = positions.to(inv_freq.dtype)[..., None] * inv_freq
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) by their angles. x: (..., D); cos, sin: (..., D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, want_mass: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention and, if wanted, the mass that each key received.

    q: (B, H, T, D); k, v: (B, H_kv, S, D); mask: (B or 1, 1, T, S) bool, True where the query may
    look, or None: the last query sees every slot and, with T > 1, T == S and the mask is causal.
    Returns (B, H, T, D) and the mass (B, H_kv, S) float32, summed over T and the group's G heads
    (arXiv 2511.06029, eq. 2, per sequence and key/value head), or None.
    """
    B, H, T, D = q.shape
    if T > 1:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out, received_mass(q, k, mask) if want_mass else None
    grouped = q.view(B, k.shape[1], -1, D)  # (B, H_kv, G, D)
    weights = _weights(grouped, k, mask)
    out = torch.matmul(weights.to(v.dtype), v)
    return out.view(B, H, T, D), weights.sum(dim=2) if want_mass else None


def received_mass(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The mass each key receives from T queries; shapes and mask as in `attend`.

    Queries go in blocks, so memory is linear in S. Every row of the softmax sums to 1, so the mass
    of a sequence adds up to H x T.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    mass = torch.zeros(B, H_kv, S, device=q.device)
    for start in range(0, T, MASS_BLOCK):
        stop = min(start + MASS_BLOCK, T)
        if mask is None:  # causal with T == S: keys behind the block's last query weigh nothing
            seen = stop
            block = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).tril(start)
        else:
            seen, block = S, mask[:, :, start:stop]
        rows = q[:, :, start:stop].reshape(B, H_kv, -1, D)  # (B, H_kv, G * t, D)
        weights = _weights(
            rows, k[:, :, :seen], block.repeat(*[1] * (block.dim() - 2), H // H_kv, 1)
        )
        mass[:, :, :seen] += weights.sum(dim=2)
    return mass


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) in float32: (B, H_kv, N, D), (B, H_kv, S, D) -> (B, H_kv, N, S)."""
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).float()
    if mask is not None:
        logits = logits.masked_fill_(~mask, -torch.inf)
    return logits.softmax(dim=-1)
