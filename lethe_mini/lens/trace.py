"""What a run forgot: every round, layer by layer, in a file that lens.py and plot.py draw.

    trace = Trace()
    engine.generate(prompts, policy, trace=trace)
    trace.write(Path("trace.json"))

A token that is dropped never comes back, so the positions dropped at each round are all it takes to
say what the cache held at any time; replay.py does that. What the policy saw (scores, Hoyer,
shares, breakpoints) is taken from the cache just before each round. docs/TRACE.md has the format.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..cache import KVCache
from ..errors import UserError
from ..policy import Policy, Pruner, hoyer
from .replay import check, pack, runs

FORMAT, VERSION = "lethe-mini trace", 1


class Trace:
    """The record of one run of `Engine.generate`; `data` is what the file holds."""

    def __init__(self):
        self.data: dict = {"format": FORMAT, "version": VERSION, "sequences": []}
        self._rounds: list[list[dict]] = []

    # -- while the engine runs --------------------------------------------------------------------

    def begin(self, engine, policy: Policy, prompts: list[list[int]], samples: int, seen: int):
        """A run of so many samples per prompt (token ids), its cache having `seen` tokens."""
        if self.data["sequences"]:
            raise UserError("this trace holds a run already; give each run a Trace() of its own")
        if seen:
            raise UserError("a trace starts with an empty cache; this one has seen tokens before")
        config, self._text = engine.model.config, engine.text
        options = {"name": policy.name, **asdict(policy)}
        self.data |= {
            "model": engine.name,
            "policy": {
                name: value if _plain(value) else str(value) for name, value in options.items()
            },
            "layers": config.num_hidden_layers,
            "heads": config.num_key_value_heads,
        }
        for number, ids in enumerate(prompts):
            for sample in range(samples):
                one = {"prompt": number, "sample": sample, "prompt_tokens": len(ids), "read": 0}
                one |= {"finish_reason": "interrupted", "token_ids": ids}
                self.data["sequences"].append(one | {"pieces": self._pieces(ids), "rounds": []})
        self._rounds = [[] for _ in self.data["sequences"]]

    @contextmanager
    def round(self, policy: Policy, cache: KVCache, due: list[bool], owners: Sequence[int]):
        """Records the round that runs inside it. Row r of the cache is sequence owners[r]; one that
        is still being prefilled stands for all later samples of its prompt, too."""
        facts = _facts(policy, cache, due)
        before = [layer.positions.cpu().numpy().copy() for layer in cache.layers]
        lengths = [layer.lengths for layer in cache.layers]
        yield
        after = [layer.positions.cpu().numpy() for layer in cache.layers]
        for row in (row for row, ready in enumerate(due) if ready):
            record = {"seen": cache.seen[row], **{name: [] for name in facts}, "dropped": []}
            packed = {"scores": [], "low": [], "high": []} if "importance" in facts else {}
            for index, layer in enumerate(cache.layers):
                old = before[index][row, :, : lengths[index][row]]
                new = after[index][row, :, : layer.lengths[row]]
                record["dropped"].append(_dropped(old, new))
                for name in facts:
                    record[name].append(facts[name][index][row])
                if packed:
                    scores = record["importance"][-1][:, : old.shape[1]]
                    for name, value in zip(packed, pack(_mean(old, scores)), strict=True):
                        packed[name].append(value)
            record.pop("importance", None)
            for name in [name for name, values in record.items() if values == [None] * len(before)]:
                del record[name]
            self._note(owners[row], record | packed)

    def _note(self, index: int, record: dict) -> None:
        one = self.data["sequences"][index]
        if record["seen"] > one["prompt_tokens"]:
            self._rounds[index].append(record)
            return
        later = self.data["sequences"][index:]
        for other in range(index, index + sum(it["prompt"] == one["prompt"] for it in later)):
            self._rounds[other] = [record]

    def ends(self, index: int, read: int, generated) -> None:
        """A sequence leaves, `read` tokens of it having gone through the model."""
        one = self.data["sequences"][index]
        one["token_ids"] = one["token_ids"] + generated.token_ids
        one |= {"pieces": self._pieces(one["token_ids"]), "read": read}
        one |= {"finish_reason": generated.finish_reason, "rounds": self._rounds[index]}

    def _pieces(self, ids: list[int]) -> list[str]:
        return [f"<{id}>" for id in ids] if self._text is None else self._text.pieces(ids)

    # -- files ------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        try:
            path.write_text(
                json.dumps(self.data, separators=(",", ":"), allow_nan=False) + "\n",
                encoding="ascii",
            )
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Raises UserError for a file that is no trace, or of another version, or damaged."""
        trace = cls()
        try:
            trace.data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path} is not JSON, or cut short; record it again") from None
        if not isinstance(trace.data, dict) or trace.data.get("format") != FORMAT:
            raise UserError(f"{path} is no trace; make one with --trace FILE")
        if trace.data.get("version") != VERSION:
            version = trace.data.get("version")
            raise UserError(f"{path} has version {version!r}, not {VERSION}; record it again")
        try:
            check(trace.data)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise UserError(f"{path} is a damaged trace ({why}); record it again") from None
        return trace


def _plain(value) -> bool:
    """Can JSON hold it as it is? A policy of somebody's own may have any option."""
    finite = isinstance(value, float) and math.isfinite(value)
    return finite or value is None or isinstance(value, int | str)


def _facts(policy: Policy, cache: KVCache, due: list[bool]) -> dict[str, list]:
    """What a round is decided by: name -> [layer][row]. A policy that is no Pruner tells nothing;
    None where there is no such thing."""
    facts: dict[str, list] = {}
    if any(layer.scored for layer in cache.layers):
        alike = not getattr(policy, "per_head", True)  # as Lethe.weights reads eq. 1
        values = []
        for layer in cache.layers:
            scores = layer.scores.sum(1, keepdim=True) if alike else layer.scores
            values.append(hoyer(scores, layer.filled[:, None]).mean(1))
        facts["hoyer"] = [[round(x, 4) for x in row] for row in torch.stack(values).tolist()]
    if not isinstance(policy, Pruner):
        return facts
    shares = policy.shares(cache)
    bounded = policy.budget is not None
    facts |= {"budget": shares if bounded else [[None] * len(due)] * len(shares)}
    facts |= {"breakpoint": [], "recent": [], "importance": []}
    protected = [policy.protected(prompt) if bounded else 0 for prompt in cache.prompt]
    for layer, share in zip(cache.layers, shares, strict=True):
        importance = policy.importance(layer, cache)
        lengths = layer.lengths
        salient = [policy.salient(importance[r, :, :n], layer, r) for r, n in enumerate(lengths)]
        rows = zip(share, protected, lengths, salient, strict=True)
        rows = [(policy.recent(s - min(p, n)), k if k < n else None) for s, p, n, k in rows]
        facts["recent"].append([recent for recent, _ in rows])
        facts["breakpoint"].append([found for _, found in rows])
        facts["importance"].append(importance.float().cpu().numpy())
    return facts


def _dropped(old: np.ndarray, new: np.ndarray) -> list[list[int]]:
    """The runs of what is in `old` and not in `new`, (heads, slots) both: a list per head, a single
    one if it is the same for all, none if nothing is dropped."""
    if old.shape == new.shape:
        return []
    if (old == old[0]).all() and (new == new[0]).all():
        old, new = old[:1], new[:1]
    return [runs(np.setdiff1d(a, b, assume_unique=True)) for a, b in zip(old, new, strict=True)]


def _mean(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """A score per position that any head holds, ascending: the mean over the heads that do."""
    if (positions == positions[0]).all():
        return scores.mean(0)
    inverse = np.unique(positions, return_inverse=True)[1].ravel()
    return np.bincount(inverse, weights=scores.ravel()) / np.bincount(inverse)
