"""Matrix products of decoding, at the memory's pace. Nothing but speed: each function equals a
plain product, and a reader of the algorithm may take it for that.

A decoding step reads every weight and every cached key once and computes little with each, so it
should take no longer than the reading. On a CPU, PyTorch's products reach about half of that for
few rows. What comes closer depends on its kind: the large factor on the left, or, compiled, loops
that fuse. A CPU that has no instructions for 16-bit numbers multiplies them many times slower than
float32; there products convert them, a piece that stays in the CPU's cache at a time.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32  # rows up to which a CPU is quicker with the weight as the left factor
PIECE = 1 << 20  # numbers of a weight converted at once: 4 MB in float32
RUN = 32  # slots; half of what storage grows by
WIDENS = torch.backends.cpu.get_cpu_capability() == "AVX2"  # an x86 without such instructions
# An x86 that has them, but none for whole tiles of a product (AMX).
VECTORS = (
    torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
)
_kept = threading.local()


class Linear(nn.Linear):
    """nn.Linear for any number of rows, quick for few."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b: (..., in) -> (..., out)."""
        rows, on_cpu = x.flatten(0, -2), x.device.type == "cpu"
        left = not VECTORS or x.dtype == torch.float32
        if len(rows) == 1 and on_cpu and (left or torch.compiler.is_compiling()):
            y = _matrix_vector(self.weight, rows[0])[None]
        elif widens(self.weight):
            y = _wide_product(rows, self.weight)
        elif len(rows) <= FEW and on_cpu and left:
            y = (self.weight @ rows.t()).t().contiguous()
        else:
            return F.linear(x, self.weight, self.bias)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def widens(x: Tensor) -> bool:
    """Whether products should convert x to float32. Not where gradients are asked for."""
    narrow = WIDENS and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return narrow and not (x.requires_grad and torch.is_grad_enabled())


def grouped_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: (B, H_kv, G, D), (B, H_kv, S, D) -> (B, H_kv, G, S) float32, for a small G."""
    if _fusing(k) and (VECTORS or (len(k) > 1 and widens(k))):
        return _logit_loops(q, k)
    if _fusing(k) and len(k) == 1:
        return _loops(q, k.mT).float()
    if widens(k):
        return torch.stack([x.float() @ wide(y).mT for x, y in zip(q, k, strict=True)])
    return torch.matmul(q, k.mT).float()


def grouped_values(weights: Tensor, v: Tensor) -> Tensor:
    """weights v: (B, H_kv, G, S), (B, H_kv, S, D) -> (B, H_kv, G, D) in v's dtype."""
    if _fusing(v) and (VECTORS or (len(v) > 1 and widens(v))):
        return _value_loops(weights.to(v.dtype), v).to(v.dtype)
    if _fusing(v) and len(v) == 1:
        return _loops(weights.to(v.dtype), v)
    if widens(v):
        return torch.stack([x @ wide(y) for x, y in zip(weights, v, strict=True)]).to(v.dtype)
    return torch.matmul(weights.to(v.dtype), v)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in float32 where products should convert them."""
    return [x.float() if widens(x) else x for x in tensors]


def wide(x: Tensor) -> Tensor:
    """x in float32, in memory that the next call uses again: a fresh piece would cost more than
    the product. Valid until then, in this thread."""
    if len(getattr(_kept, "numbers", ())) < x.numel():
        with torch.inference_mode(False):
            _kept.numbers = torch.empty(x.numel())
    return _kept.numbers[: x.numel()].view(x.shape).copy_(x)


def _wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32: (n, in), (out, in) -> (n, out) in the weight's dtype."""
    rows = rows.float()
    if torch.compiler.is_compiling():
        return F.linear(rows, weight.float()).to(weight.dtype)
    parts = weight.split(max(1, PIECE // weight.shape[1]))
    products = [F.linear(rows, wide(part)).to(weight.dtype) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _fusing(x: Tensor) -> bool:
    """Compiled on a CPU loops may beat products; which do was measured on three kinds: with tiles,
    with vectors, and where numbers are converted."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in), (in) -> (out)."""
    if not torch.compiler.is_compiling():
        return weight.mv(x)
    # Rows from four places at a time keep more reads in flight than one row after the other.
    x = _computed(x).float()
    return torch.cat([(part.float() * x).sum(-1) for part in weight.chunk(4)]).to(weight.dtype)


def _loops(a: Tensor, b: Tensor) -> Tensor:
    """a b as loops for the compiler to fuse: (B, H_kv, N, K), (B, H_kv, K, M), N small. The
    quickest for one sequence; two and more want what follows."""
    return (_computed(a).float()[..., None] * b.float()[:, :, None]).sum(-2).to(a.dtype)


def _logit_loops(q: Tensor, k: Tensor) -> Tensor:
    """`grouped_logits` as loops for the compiler to fuse: a key is read, and converted, once for
    all queries of its group."""
    q, k = _computed(q).float(), k.float()
    return torch.stack([(k * q[:, :, g, None]).sum(-1) for g in range(q.shape[2])], dim=2)


def _value_loops(weights: Tensor, v: Tensor) -> Tensor:
    """`grouped_values` as such loops; float32. Sums over few slots come first, for the loop over
    slots is the inner one and values have to wait in the CPU's cache for their next column."""
    slots = RUN if v.shape[2] % RUN == 0 else v.shape[2]
    v = v.unflatten(2, (-1, slots)).float()
    groups = _computed(weights).float().unflatten(3, (-1, slots))[..., None].unbind(2)
    return torch.stack([_computed((v * g).sum(-2)).sum(-2) for g in groups], dim=2)


def _computed(x: Tensor) -> Tensor:
    """x; as_strided has the compiler compute it here, once, and not anew wherever it is read."""
    return x.as_strided(x.shape, x.stride())
