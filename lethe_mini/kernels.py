"""Matrix products, loops and moves that are quick and need little memory. Nothing else: each
function equals a plain expression, and a reader of the algorithm may take it for that.

A decoding step reads every weight and every cached key once and computes little with each, so it
should take no longer than reading them. On a CPU, PyTorch's products of few rows take about twice
that time. Two forms are faster, depending on the CPU: the large factor on the left, or, compiled,
loops that fuse. A CPU without instructions for 16-bit numbers multiplies them many times slower
than float32. There, products convert them in pieces that fit the CPU's cache.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32  # rows up to which a CPU is quicker with the weight as the left factor
PIECE = 1 << 20  # numbers of a weight converted at once: 4 MB in float32
# Queries whose softmax is held at once: on a CPU it should stay in the cache, on a GPU fill it.
MASS_BLOCK = {"cuda": 256, "other": 64}
PREFILL_CHUNK = {"cuda": 4096, "other": 512}  # tokens of a prompt that are read at once
RUN = 32  # slots; half of what storage grows by
WIDENS = torch.backends.cpu.get_cpu_capability() == "AVX2"  # an x86 without such instructions
# An x86 that has them, but none for whole tiles of a product (AMX).
VECTORS = (
    torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
)
_kept = threading.local()

BLOCK = 64  # slots; capacity is always a multiple, so shapes repeat
Store = dict[str, Tensor]  # keys, values (B, H_kv, S, D); positions, perhaps scores (B, H_kv, S)


class Linear(nn.Linear):
    """nn.Linear for any number of rows, quick for few."""

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b: (..., in) -> (..., out)."""
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, quick for few rows: (..., in), (out, in), (out) -> (..., out)."""
    rows, on_cpu = x.flatten(0, -2), x.device.type == "cpu"
    left = not VECTORS or x.dtype == torch.float32
    if len(rows) == 1 and on_cpu and (left or torch.compiler.is_compiling()):
        y = _matrix_vector(weight, rows[0])[None]
    elif widens(weight):
        y = _wide_product(rows, weight)
    elif len(rows) <= FEW and on_cpu and left:
        y = (weight @ rows.t()).t().contiguous()
    else:
        return F.linear(x, weight, bias)
    return (y if bias is None else y + bias).unflatten(0, x.shape[:-1])


class Joined(Linear):
    """Several linear maps of one input as one product. parts: the hub's name of each, and its rows
    of the weight."""

    def __init__(self, size: int, bias: bool, **parts: int):
        super().__init__(size, sum(parts.values()), bias=bias)
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., size) -> the parts, (..., rows) each."""
        return super().forward(x).split(list(self.parts.values()), dim=-1)


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


def received_mass(
    q: Tensor, k: Tensor, mask: Tensor | None, lag: int = 0, weights: Tensor | None = None
) -> Tensor:
    """softmax(q k^T), summed over T queries and the G heads of a group: the mass each key receives,
    (B, H_kv, S) float32. Arguments as in attention.attend; weights: (T, 1), what each query counts.

    Queries go in blocks, so memory is linear in S. Every row of the softmax sums to 1, so without a
    lag the mass of a sequence adds up to H x T.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    mass = torch.zeros(B, H_kv, S, device=q.device)
    block = best_size(MASS_BLOCK, q.device)
    for first in range(0, T, block):
        last = min(first + block, T)
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


def lagged(mask: Tensor, lag: int) -> Tensor:
    """For LethePlus alone. A causal mask (..., S), less the `lag` newest slots each query sees."""
    return F.pad(mask, (0, lag))[..., lag:]


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in float32 where products should convert them."""
    return [x.float() if widens(x) else x for x in tensors]


def wide(x: Tensor) -> Tensor:
    """x in float32, in memory that the next call in this thread uses again. Fresh memory would cost
    more than the product."""
    if len(getattr(_kept, "numbers", ())) < x.numel():
        with torch.inference_mode(False):
            _kept.numbers = torch.empty(x.numel())
    return _kept.numbers[: x.numel()].view(x.shape).copy_(x)


def to_device(numbers: list, device: torch.device) -> Tensor:
    """Whole numbers of the host, on the device, which the host does not wait for."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def write(store: Store, slots: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """Puts T tokens in their slots of a cache. k, v: (B, H_kv, T, D); slots, positions: (B, T)."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    store["keys"][rows, :, slots] = k.transpose(1, 2)
    store["values"][rows, :, slots] = v.transpose(1, 2)
    heads = k.shape[1]
    store["positions"][rows, :, slots] = positions.int()[..., None].expand(-1, -1, heads)


def blocks(slots: int) -> int:
    """`slots` rounded up to whole blocks."""
    return -(-slots // BLOCK) * BLOCK


def grown(x: Tensor, capacity: int) -> Tensor:
    """(B, H_kv, S, ...) in new storage of `capacity` slots, zero beyond S."""
    new = x.new_zeros(*x.shape[:2], capacity, *x.shape[3:])
    new[:, :, : x.shape[2]] = x
    return new


def kept_slots(kept: Tensor, n: int) -> Tensor:
    """The slots where `kept` is True, ascending: (..., S) bool -> (..., n) int64, for n at least as
    many as there are. Behind them, any slot."""
    slots = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    places = torch.where(kept, kept.cumsum(-1) - 1, n)  # n: one too far
    return slots.new_zeros(*kept.shape[:-1], n + 1).scatter_(-1, places, slots)[..., :n]


def gathered(x: Tensor, rows: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
    """x[rows[i], head, slots[i]], zero beyond the first counts[i]: x (B, H_kv, S, ...), slots
    (R, 1 or H_kv, n), rows, counts (R,) -> (R, H_kv, n, ...)."""
    heads, places = (torch.arange(n, device=x.device) for n in (x.shape[1], slots.shape[-1]))
    out = x[rows[:, None, None], heads[:, None], slots]
    beyond = (places >= counts[:, None, None]).view(len(rows), 1, -1, *[1] * (x.dim() - 3))
    return out.masked_fill_(beyond, 0)


def best_size(sizes: dict[str, int], device: torch.device) -> int:
    """The one that suits the kind of device."""
    return sizes.get(device.type, sizes["other"])


def widest(device: torch.device) -> torch.dtype:
    """The widest floats of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def spare(length: int, device: torch.device) -> int:
    """Slots that a cache without rounds grows by, beyond what it needs. A CPU reads them at every
    step; on CUDA a step is captured anew whenever a cache grows, so fewer times is better."""
    return max(length // 16, 256 if device.type == "cuda" else 0)


def uniform(seeds: Tensor | int, counts: Tensor) -> Tensor:
    """A draw in [0, 1) for every seed and count (int64), float32; the same on every device, and no
    other draw changes it. SplitMix64 (Steele, Lea and Flood 2014) after `counts` steps."""
    x = seeds + counts * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 40 & (1 << 24) - 1).float() * 2.0**-24


def _wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32: (n, in), (out, in) -> (n, out) in the weight's dtype."""
    rows = rows.float()
    if torch.compiler.is_compiling():
        return F.linear(rows, weight.float()).to(weight.dtype)
    parts = weight.split(max(1, PIECE // weight.shape[1]))
    products = [F.linear(rows, wide(part)).to(weight.dtype) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _fusing(x: Tensor) -> bool:
    """Whether loops may replace products: compiled, on a CPU. Which loops do was measured on three
    kinds of CPU: with tiles, with vectors, and without instructions for 16-bit numbers."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """(out, in), (in) -> (out)."""
    if not torch.compiler.is_compiling():
        return weight.mv(x)
    # Rows from four places at a time keep more reads in flight than one row after the other.
    x = _computed(x).float()
    return torch.cat([(part.float() * x).sum(-1) for part in weight.chunk(4)]).to(weight.dtype)


def _loops(a: Tensor, b: Tensor) -> Tensor:
    """a b as loops for the compiler to fuse: (B, H_kv, N, K), (B, H_kv, K, M), N small. For one
    sequence; the two functions below are quicker for several."""
    return (_computed(a).float()[..., None] * b.float()[:, :, None]).sum(-2).to(a.dtype)


def _logit_loops(q: Tensor, k: Tensor) -> Tensor:
    """`grouped_logits` as loops for the compiler to fuse: a key is read, and converted, once for
    all queries of its group."""
    q, k = _computed(q).float(), k.float()
    return torch.stack([(k * q[:, :, g, None]).sum(-1) for g in range(q.shape[2])], dim=2)


def _value_loops(weights: Tensor, v: Tensor) -> Tensor:
    """`grouped_values` as such loops; float32. It sums over few slots at a time, so that values
    stay in the CPU's cache until their next column is read."""
    slots = RUN if v.shape[2] % RUN == 0 else v.shape[2]
    v = v.unflatten(2, (-1, slots)).float()
    groups = _computed(weights).float().unflatten(3, (-1, slots))[..., None].unbind(2)
    return torch.stack([_computed((v * g).sum(-2)).sum(-2) for g in groups], dim=2)


def _computed(x: Tensor) -> Tensor:
    """x; as_strided has the compiler compute it here, once, and not anew wherever it is read."""
    return x.as_strided(x.shape, x.stride())
