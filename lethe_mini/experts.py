"""A mixture of experts in place of a layer's MLP: a router sends every token through a few of them.

Weights are stacked, (E, ...); the hub's checkpoints store them expert by expert. Three functions
compute the same sum. `by_expert` has the host read what the router chose. A CPU waits for nobody,
and many rows are worth the wait. For few rows on a GPU the host stays out, as in all of a decoding
step: `gathered` copies the chosen weights, `all_experts` uses every expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .kernels import Linear, best_size, product

# Rows from which the host sorts them by expert. A CPU has nobody to wait for.
SORTED = {"cpu": 1, "other": 512}
COPIED = 3  # times that a gathered weight passes through memory: read, written, read again


class Experts(nn.Module):
    """E experts of the size moe_intermediate_size (M), k of them for a token; Qwen3-MoE's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.chosen, self.renormalizes = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(hidden, E, bias=False)  # the router, by the hub's name
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(E, hidden, inner))

    def parts(self, leaf: str, weight: Tensor) -> dict[str, Tensor]:
        """One of the two stacks as the hub names what is in it: views."""
        if leaf == "down_proj":
            return {f"experts.{e}.down_proj.weight": one for e, one in enumerate(weight)}
        names = ("gate_proj", "up_proj")
        halves = [zip(names, one.chunk(2), strict=True) for one in weight]
        return {f"experts.{e}.{n}.weight": x for e, pair in enumerate(halves) for n, x in pair}

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)"""
        rows = x.flatten(0, -2)
        shares, experts = self.route(rows)
        if len(rows) >= best_size(SORTED, x.device):
            y = self.by_expert(rows, shares, experts)
        elif COPIED * experts.numel() <= len(self.down_proj):
            y = self.gathered(rows, shares, experts)
        else:
            y = self.all_experts(rows, shares, experts)
        return y.view(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, hidden) -> each row's shares and experts (n, k). Shares are taken over all experts,
        and made to add up to 1 where norm_topk_prob says so; in float32, then rounded."""
        shares, experts = self.gate(rows).float().softmax(-1).topk(self.chosen)
        if self.renormalizes:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(rows.dtype), experts

    @torch.compiler.disable  # what it does depends on numbers
    def by_expert(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """Expert by expert, over the rows that go through it: each weight is read once."""
        flat = experts.flatten()  # (n * k): choice j of row i at i * k + j
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self.down_proj)).tolist()
        groups = rows[order // self.chosen].split(counts)
        outs = torch.cat([self.one(e, x) for e, x in enumerate(groups) if len(x)])
        # Back in the order of choice: what a row adds up does not depend on its neighbours.
        outs = torch.empty_like(outs).index_copy_(0, order, outs).view(*experts.shape, -1)
        return (outs * shares[..., None]).sum(1)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of some rows: (n, hidden) -> (n, hidden)."""
        return product(activate(product(x, self.gate_up_proj[expert])), self.down_proj[expert])

    def gathered(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """The chosen weights, copied to lie behind one another: for few rows."""
        up = (self.gate_up_proj[experts] @ rows[:, None, :, None]).squeeze(-1)  # (n, k, 2M)
        out = (self.down_proj[experts] @ activate(up)[..., None]).squeeze(-1)  # (n, k, hidden)
        return (out * shares[..., None]).sum(1)

    def all_experts(self, rows: Tensor, shares: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every row, times a share that is mostly 0: where the rows together choose
        most of them anyway."""
        E = len(self.down_proj)
        dense = shares.new_zeros(len(rows), E).scatter_(1, experts, shares)
        up = F.linear(rows, self.gate_up_proj.flatten(0, 1)).unflatten(1, (E, -1))  # (n, E, 2M)
        out = activate(up).transpose(0, 1) @ self.down_proj.mT  # (E, n, hidden)
        return (out * dense.t()[..., None]).sum(0)


def activate(x: Tensor) -> Tensor:
    """SwiGLU: (..., 2M) -> (..., M)"""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
