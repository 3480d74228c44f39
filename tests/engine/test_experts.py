"""A mixture of experts: three ways to compute one sum, and what each may read.

transformers' own mixture is compared in test_model.py, the compiled one in test_compile.py.
"""

import tape
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import model as random_model

from lethe_mini import experts

MIXTURE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 11, "num_experts_per_tok": 3}
MIXTURE |= {"moe_intermediate_size": 13, "norm_topk_prob": True}


def mixture(**changes):
    """The mixture of the first layer of a random model, hidden size 24."""
    return random_model(**MIXTURE | changes).layers[0].mlp


def by_hand(layer, row):
    """What a mixture makes of one row, expert after expert, in float64."""
    shares = (layer.gate.weight.double() @ row.double()).softmax(0)
    best = sorted(range(len(shares)), key=lambda e: -shares[e])[: layer.chosen]
    total = sum(shares[e] for e in best) if layer.renormalizes else 1.0
    out = torch.zeros(len(row), dtype=torch.float64)
    for e in best:
        gate, up = (layer.gate_up_proj[e].double() @ row.double()).chunk(2)
        inner = gate / (1 + (-gate).exp()) * up
        out += shares[e] / total * (layer.down_proj[e].double() @ inner)
    return out


@given(
    rows=st.integers(1, 40),
    chosen=st.integers(1, 11),
    renormalizes=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.inference_mode()
def test_three_forms_of_one_sum(rows, chosen, renormalizes, seed):
    """As by hand, whichever experts the rows choose and however often."""
    layer = mixture(num_experts_per_tok=chosen, norm_topk_prob=renormalizes)
    torch.manual_seed(seed)
    x = torch.randn(rows, 24)
    right = torch.stack([by_hand(layer, row) for row in x]).float()
    chosen = layer.route(x)
    for form in (layer.by_expert, layer.gathered, layer.all_experts):
        torch.testing.assert_close(form(x, *chosen), right, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rows_keep_their_places():
    """(B, T, hidden) in, the same out, each row's own."""
    layer, x = mixture(), torch.randn(3, 5, 24)
    together = layer(x)
    assert together.shape == x.shape
    for b in range(3):
        for t in range(5):
            torch.testing.assert_close(together[b, t], layer(x[b, t][None])[0])


@torch.inference_mode()
def test_only_the_chosen_experts_are_read(monkeypatch):
    """NaN in an expert that no row chose reaches nobody, nor are its weights multiplied."""
    layer, x = mixture(), torch.randn(4, 24)
    right, (_, chosen) = layer(x), layer.route(x)
    used = set(chosen.flatten().tolist())
    unused = [e for e in range(11) if e not in used]
    assert unused
    layer.gate_up_proj[unused], layer.down_proj[unused] = torch.nan, torch.nan
    assert torch.equal(layer(x), right)
    seen, one = [], experts.Experts.one
    monkeypatch.setattr(experts.Experts, "one", lambda s, e, x: seen.append(e) or one(s, e, x))
    layer(x)
    assert sorted(seen) == sorted(used)


@torch.inference_mode()
def test_few_rows_leave_the_host_out_elsewhere(monkeypatch):
    """Where a step is captured nothing is read from the device, by one row or by many."""
    monkeypatch.setitem(experts.SORTED, "cpu", experts.SORTED["other"])
    layer = mixture()
    for rows in (1, 2, 7, 40):
        x = torch.randn(rows, 24)
        with tape.HostFree():
            layer(x)
