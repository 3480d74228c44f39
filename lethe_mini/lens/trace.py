"""A trace: what a run dropped, round by round and layer by layer. page.py and plot.py draw it.

    trace = Trace()
    engine.generate(prompts, policy, trace=trace)
    trace.write(Path("trace.json"))

A dropped token never comes back. So a trace notes the positions that each round dropped, and
replay.py computes from them what the cache held at any time. The scores, Hoyer values, shares and
breakpoints come from the report that a policy's round returns. docs/TRACE.md describes the format.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..errors import UserError, write_whole
from .replay import check_trace, pack, runs

FORMAT, VERSION = "lethe-mini trace", 1


class Trace:
    """The record of one run of `Engine.generate`; `data` is what the file holds."""

    def __init__(self):
        self.data: dict = {"format": FORMAT, "version": VERSION, "sequences": []}
        self._rounds: list[list[dict]] = []  # of every sequence
        self._before: list[list[np.ndarray]] = []  # [layer][row] (heads, slots): positions held

    # -- while the engine runs --------------------------------------------------------------------

    def begin(self, engine, policy, prompts: list[list[int]], samples: int, seen: int):
        """A run begins: the prompts' token ids, the samples per prompt, and the tokens that its
        cache has seen. Raises UserError where this trace or that cache is not empty."""
        if self.data["sequences"]:
            raise UserError("this trace holds a run already; give each run a Trace() of its own")
        if seen:
            raise UserError("a trace starts with an empty cache; this one has seen tokens before")
        config, self._text = engine.model.config, engine.text
        options = {"name": policy.name or type(policy).__name__, **asdict(policy)}
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

    def round_begins(self, cache) -> None:
        """Notes the positions held, just before a round."""
        self._before = [_positions(layer) for layer in cache.layers]

    def round_ends(self, cache, due: list[bool], owners: Sequence[int], done) -> None:
        """Records a round of the sequences that were due; row r of the cache is sequence owners[r].
        One that is still being prefilled stands for all later samples of its prompt, too.

        done: the policy's Round. None, from a policy that reports nothing: positions alone.
        """
        after = [_positions(layer) for layer in cache.layers]
        for row, ready in enumerate(due):
            if not ready:
                continue
            before, now = ([layer[row] for layer in held] for held in (self._before, after))
            dropped = [_dropped(*pair) for pair in zip(before, now, strict=True)]
            record = {"seen": cache.seen[row], "dropped": dropped}
            if done is not None and row in done.rows:
                record |= self._facts(done, row, before)
            self._note(owners[row], record)

    def _facts(self, done, row: int, before: list[np.ndarray]) -> dict[str, list]:
        """What decided a round of one sequence: name -> a value per layer, by the Round `done`.
        before: per layer (heads, slots), the positions that it held."""
        i, facts = done.rows.index(row), {}
        if done.hoyer is not None:
            facts["hoyer"] = [round(value, 4) for value in done.hoyer[row].tolist()]
        if self.data["policy"].get("budget") is not None:
            facts["budget"] = [layer[i] for layer in done.shares]
        facts["recent"] = [layer[i] for layer in done.recent]
        pairs = zip(done.salient, before, strict=True)
        breakpoints = [n[i] if n[i] < held.shape[1] else None for n, held in pairs]
        if any(found is not None for found in breakpoints):
            facts["breakpoint"] = breakpoints
        packed = []
        for positions, importance in zip(before, done.importance, strict=True):
            slots = positions.shape[1]
            scores = importance[i, :, :slots].float().cpu().numpy()  # (1 or heads, slots)
            packed.append(pack(_mean(positions, np.broadcast_to(scores, positions.shape))))
        columns = zip(*packed, strict=True)
        return facts | dict(zip(("scores", "low", "high"), map(list, columns), strict=True))

    def _note(self, index: int, record: dict) -> None:
        one = self.data["sequences"][index]
        if record["seen"] > one["prompt_tokens"]:
            self._rounds[index].append(record)
            return
        later = self.data["sequences"][index:]
        for other in range(index, index + sum(it["prompt"] == one["prompt"] for it in later)):
            self._rounds[other] = [record]

    def ends(self, index: int, read: int, generated) -> None:
        """A sequence has ended; `read`: how many of its tokens went through the model."""
        one = self.data["sequences"][index]
        one["token_ids"] = one["token_ids"] + generated.token_ids
        one |= {"pieces": self._pieces(one["token_ids"]), "read": read}
        one |= {"finish_reason": generated.finish_reason, "rounds": self._rounds[index]}

    def _pieces(self, ids: list[int]) -> list[str]:
        return [f"<{id}>" for id in ids] if self._text is None else self._text.pieces(ids)

    # -- files ------------------------------------------------------------------------------------

    def write(self, path: Path) -> None:
        """Raises UserError if the file cannot be written."""
        write_whole(path, json.dumps(self.data, separators=(",", ":"), allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """The trace in a file. Raises UserError if it is none, damaged, or of another version."""
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
            check_trace(trace.data)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise UserError(f"{path} is a damaged trace ({why}); record it again") from None
        return trace


def _plain(value) -> bool:
    """Can JSON hold this value of an option? The options of a policy that is not ours can be
    anything."""
    finite = isinstance(value, float) and math.isfinite(value)
    return finite or value is None or isinstance(value, int | str)


def _positions(layer) -> list[np.ndarray]:
    """Per sequence of the batch (heads, slots): the positions that a layer holds."""
    held = layer.positions.cpu().numpy()
    return [held[row, :, :length].copy() for row, length in enumerate(layer.lengths)]


def _dropped(old: np.ndarray, new: np.ndarray) -> list[list[int]]:
    """The runs of the positions that are in `old` and not in `new`, both (heads, slots): a list per
    head, one list if it is the same for all heads, no list if nothing is dropped."""
    if old.shape == new.shape:
        return []
    if (old == old[0]).all() and (new == new[0]).all():
        old, new = old[:1], new[:1]
    return [runs(np.setdiff1d(a, b, assume_unique=True)) for a, b in zip(old, new, strict=True)]


def _mean(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """A score per position, ascending: the mean over the heads that hold it. Both arguments:
    (heads, slots)."""
    if (positions == positions[0]).all():
        return scores.mean(0)
    inverse = np.unique(positions, return_inverse=True)[1].ravel()
    return np.bincount(inverse, weights=scores.ravel()) / np.bincount(inverse)
