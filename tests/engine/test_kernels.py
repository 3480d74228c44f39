"""The quick products equal the plain ones: for one row, few and many, in every dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lethe_mini import kernels
from lethe_mini.kernels import FEW, Linear, grouped_logits, grouped_values

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["tiles", "vectors", "widens"])  # of CPU
SEEDS = st.integers(0, 2**32)


def near(mine, a, b, dtype, more=0.0):
    """mine is a b + more to a few roundings of `dtype`, of the sum without its signs: where terms
    cancel, a result may be far smaller than what was rounded on the way."""
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs() + abs(more) + 1e-9
    worst = ((mine.double() - (a @ b + more)).abs() / size).amax().item() if mine.numel() else 0.0
    assert worst <= 8 * torch.finfo(dtype).eps


@given(
    lead=st.sampled_from([(1,), (1, 1), (3,), (2, 5), (FEW,), (FEW + 1,), (7, 1, 11), (0,)]),
    sizes=st.tuples(st.integers(1, 29), st.integers(1, 31)),
    bias=st.booleans(),
    dtype=DTYPES,
    kind=KINDS,
    seed=SEEDS,
)
def test_linear_is_a_product(lead, sizes, bias, dtype, kind, seed):
    """On a CPU that knows 16-bit numbers, and on one that has to widen them, in pieces."""
    torch.manual_seed(seed)
    layer = Linear(*sizes, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(*lead, sizes[0]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "WIDENS", kind == "widens")
        patch.setattr(kernels, "VECTORS", kind == "vectors")
        patch.setattr(kernels, "PIECE", 3 * sizes[0])
        y = layer(x)
    assert y.shape == (*lead, sizes[1])
    assert y.dtype == dtype
    near(y, x, layer.weight.t(), dtype, layer.bias.double() if bias else 0.0)


@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 2, 4, 19, 9)]),
    loops=st.booleans(),
    kind=KINDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_grouped_products_are_products(shape, loops, kind, dtype, seed):
    """As matrix products and as the loops that a compiler is given."""
    torch.manual_seed(seed)
    B, H_kv, G, S, D = shape
    q, k = torch.randn(B, H_kv, G, D).to(dtype), torch.randn(B, H_kv, S, D).to(dtype)
    weights = torch.rand(B, H_kv, G, S).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_fusing", lambda x: loops)
        patch.setattr(kernels, "WIDENS", kind == "widens")
        patch.setattr(kernels, "VECTORS", kind == "vectors")
        logits, values = grouped_logits(q, k), grouped_values(weights.float(), k)
    assert logits.dtype == torch.float32
    assert values.dtype == dtype
    near(logits, q, k.mT, dtype)
    near(values, weights, k, dtype)


@given(sizes=st.tuples(st.integers(1, 29), st.integers(1, 31)), seed=SEEDS)
def test_rows_from_four_places_are_all_rows(sizes, seed):
    """What the compiler is given for one row, fewer rows of weights than four included."""
    torch.manual_seed(seed)
    weight, x = torch.randn(*sizes), torch.randn(sizes[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        y = kernels._matrix_vector(weight, x)
    near(y, weight, x, torch.float32)
