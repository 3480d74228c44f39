"""Matrix products of decoding, at the memory's pace. Nothing but speed: each function equals a
plain product, and a reader of the algorithm may take it for that.

A decoding step reads every weight and every cached key once and computes little with each, so it
should take no longer than the reading. On a CPU, PyTorch's products reach about half of that for
few rows; what comes closer is the large factor on the left, and, compiled, loops that fuse.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32  # rows up to which a CPU is quicker with the weight as the left factor


class Linear(nn.Linear):
    """nn.Linear for any number of rows, quick for few."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b: (..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        if len(rows) > FEW or x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        if len(rows) == 1:
            y = _matrix_vector(self.weight, rows[0])[None]
        else:
            y = (self.weight @ rows.t()).t().contiguous()
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def grouped_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: (B, H_kv, G, D), (B, H_kv, S, D) -> (B, H_kv, G, S) float32, for a small G."""
    return (_loops if _fusing(k) else torch.matmul)(q, k.mT).float()


def grouped_values(weights: Tensor, v: Tensor) -> Tensor:
    """weights v: (B, H_kv, G, S), (B, H_kv, S, D) -> (B, H_kv, G, D) in v's dtype."""
    return (_loops if _fusing(v) else torch.matmul)(weights.to(v.dtype), v)


def _fusing(x: Tensor) -> bool:
    """Compiled and for one sequence on a CPU, loops beat products; else products beat loops."""
    return torch.compiler.is_compiling() and len(x) == 1 and x.device.type == "cpu"


def _matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in), (in) -> (out)."""
    if not torch.compiler.is_compiling():
        return weight.mv(x)
    # Rows from four places at a time keep more reads in flight than one row after the other.
    x = _computed(x).float()
    return torch.cat([(part.float() * x).sum(-1) for part in weight.chunk(4)]).to(weight.dtype)


def _loops(a: Tensor, b: Tensor) -> Tensor:
    """a b as loops for the compiler to fuse: (B, H_kv, N, K), (B, H_kv, K, M), N small."""
    return (_computed(a).float()[..., None] * b.float()[:, :, None]).sum(-2).to(a.dtype)


def _computed(x: Tensor) -> Tensor:
    """x; as_strided has the compiler compute it here, once, and not anew wherever it is read."""
    return x.as_strided(x.shape, x.stride())
