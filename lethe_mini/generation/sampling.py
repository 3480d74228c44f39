"""From logits to tokens: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from ..kernels import uniform

NO_TOKEN = -1  # in no vocabulary: there is nothing to choose from


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature: 0 is greedy; top_k: from so many of the best, 0 is all;
    top_p: from the best that add up to this share; seed: of the draws. A sequence's draws come from
    the seed and its number among its prompt's samples alone. Raises UserError for what cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, kinds in (("temperature", (int, float)), ("top_p", (int, float)),
                            ("top_k", (int,)), ("seed", (int,))):  # fmt: skip
            if type(getattr(self, name)) not in kinds:
                raise UserError(f"{name} should be a number, not {getattr(self, name)!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature should be 0 (greedy) or above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p should be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top-k should be 0 (off) or above, not {self.top_k}")

    @classmethod
    def of(cls, sampling: "Sampling | None", fields: dict, text=None) -> "Sampling":
        """The one that is given, or one made of these fields; UserError for both. Fields that are
        not given are the model's own, by its text (checkpoint/text.py; None: it has none)."""
        if sampling is None:
            own = {} if text is None else text.sampling
            return cls(**{**own, **fields})
        if fields:
            raise UserError(f"give sampling=Sampling(...) or {', '.join(fields)}, not both")
        if not isinstance(sampling, cls):
            raise UserError(f"sampling should be a Sampling, not {sampling!r}")
        return sampling


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """(B, vocab) float32 -> (B,) tokens. draws: (2, B) int64, every sequence's seed, and how many
    draws it has had, which is counted up.

    NO_TOKEN where a row holds NaN or +inf, or nothing but -inf. The host, which looks at nothing
    but the tokens, sees it there before any step reads it.
    """
    draw = None
    if sampling.temperature:
        draw = uniform(*draws)
        draws[1].add_(1)
    tokens = pick(logits, draw, sampling)
    return tokens.masked_fill(~logits.amax(dim=-1).isfinite(), NO_TOKEN)  # NaN is its row's maximum


def pick(logits: Tensor, draw: Tensor | None, sampling: Sampling) -> Tensor:
    """(B, vocab) float32, (B,) float32 in [0, 1) -> (B,) tokens.

    Greedy, without a draw, at temperature 0. Else the draw runs up the cumulated probabilities, so
    that a sequence's token depends on its own logits and its own draw alone.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    tokens = None
    if sampling.top_k or sampling.top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # The best logit at 0: a tiny temperature must not overflow.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probs = (logits / max(sampling.temperature, 1e-30)).softmax(dim=-1)
    if tokens is not None:
        probs[:, sampling.top_k or probs.shape[-1] :].zero_()
        before = probs.cumsum(dim=-1) - probs
        beyond = before >= sampling.top_p * probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(beyond & (before > 0), 0)  # never the best
    cumulated = probs.cumsum(dim=-1)
    # The first token whose cumulated probability is above the target has a probability itself.
    found = (cumulated <= draw[:, None] * cumulated[:, -1:]).sum(dim=-1, keepdim=True)
    return (found if tokens is None else tokens.gather(-1, found))[:, 0]
