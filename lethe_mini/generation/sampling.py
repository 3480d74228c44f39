"""From logits to tokens: greedy, temperature, top-k, top-p."""

import torch
from torch import Tensor

from ..errors import UserError


def sample(
    logits: Tensor, draws: list[float], temperature: float, top_k: int, top_p: float
) -> Tensor:
    """(B, vocab) float32 and a uniform draw in [0, 1) per sequence -> (B,) tokens.

    Greedy at temperature 0. Else the draw runs up the cumulated probabilities, so that a sequence's
    token depends on its own logits and its own draw alone.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    tokens = None
    if top_k or top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # The best logit at 0: a tiny temperature must not overflow. And a draw must stay below 1.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = (logits / max(temperature, 1e-30)).softmax(dim=-1)
    uniform = torch.tensor(draws, device=logits.device).clamp(max=1 - 2**-24)
    if tokens is not None:
        probs[:, top_k or probs.shape[-1] :] = 0
        before = probs.cumsum(dim=-1) - probs
        beyond = before >= top_p * probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(beyond & (before > 0), 0)  # never the best
    cumulated = probs.cumsum(dim=-1)
    # The first token whose cumulated probability is above the target has a probability itself.
    pick = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(dim=-1, keepdim=True)
    return (pick if tokens is None else tokens.gather(-1, pick))[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError for values that no distribution has."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature should be 0 (greedy) or above, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p should be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise UserError(f"top-k should be 0 (off) or above, not {top_k}")
