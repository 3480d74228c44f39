"""What a run forgot: every round, layer by layer, in a file that lens.py and plot.py draw.

    trace = Trace()
    engine.generate(prompts, policy, trace=trace)
    trace.write(Path("trace.json"))

A token that is dropped never comes back, so the positions dropped at each round are all it takes to
say what the cache held at any time; `replay` does that. What the policy saw (scores, Hoyer, shares,
breakpoints) is taken from the cache just before each round. docs/TRACE.md has the format.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from .cache import KVCache
from .errors import UserError
from .policy import Policy, Pruner, hoyer

FORMAT, VERSION = "lethe-mini trace", 1
OCTAVE = 8  # steps of a packed score in which it doubles
COUNTS, NUMBERS = ("budget", "recent", "breakpoint"), ("hoyer", "low", "high")  # of a round's layers


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
        self.data |= {
            "model": engine.name,
            "policy": {"name": policy.name, **asdict(policy)},
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
            path.write_text(json.dumps(self.data, separators=(",", ":")) + "\n", encoding="ascii")
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
            raise UserError(f"{path} is no trace, or cut short: not JSON; record it again") from None
        if not isinstance(trace.data, dict) or trace.data.get("format") != FORMAT:
            raise UserError(f"{path} is no trace; make one with --trace FILE")
        if trace.data.get("version") != VERSION:
            version = trace.data.get("version")
            raise UserError(f"{path} has version {version!r}, not {VERSION}; record it again")
        try:
            _check(trace.data)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise UserError(f"{path} is a damaged trace ({why}); record it again") from None
        return trace


def _facts(policy: Policy, cache: KVCache, due: list[bool]) -> dict[str, list]:
    """What a round is decided by: name -> [layer][row]. A policy that is no Pruner tells nothing;
    None where there is no such thing."""
    facts: dict[str, list] = {}
    if any(layer.scored for layer in cache.layers):
        alike = getattr(policy, "granularity", "head") == "layer"  # as Lethe.weights reads eq. 1
        values = []
        for layer in cache.layers:
            scores = layer.scores.sum(1, keepdim=True) if alike else layer.scores
            values.append(hoyer(scores, layer.lengths_tensor()[:, None]).mean(1))
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
        salient = policy.salient(importance, layer, due)
        rows = zip(share, protected, layer.lengths, salient, strict=True)
        rows = [(policy.recent(s - min(p, n)), k if k < n else None) for s, p, n, k in rows]
        facts["recent"].append([recent for recent, _ in rows])
        facts["breakpoint"].append([found for _, found in rows])
        facts["importance"].append(importance.float().cpu().numpy())
    return facts


# -- positions and scores, packed ------------------------------------------------------------------


def _dropped(old: np.ndarray, new: np.ndarray) -> list[list[int]]:
    """The runs of what is in `old` and not in `new`, (heads, slots) both: a list per head, a single
    one if it is the same for all, none if nothing is dropped."""
    if old.shape == new.shape:
        return []
    if (old == old[0]).all() and (new == new[0]).all():
        old, new = old[:1], new[:1]
    return [runs(np.setdiff1d(a, b, assume_unique=True)) for a, b in zip(old, new, strict=True)]


def runs(positions: np.ndarray) -> list[int]:
    """Ascending positions as gap, length, gap, length, ...: [3, 4, 5, 9] is [3, 3, 3, 1]."""
    if not len(positions):
        return []
    first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    starts, counts = positions[first], np.diff(first, append=len(positions))
    gaps = np.diff(starts, prepend=0) - np.concatenate(([0], counts[:-1]))
    return np.stack((gaps, counts), axis=1).ravel().tolist()


def positions_of(packed: list[int]) -> np.ndarray:
    """What `runs` was given."""
    gaps, counts = np.array(packed, dtype=np.int64).reshape(-1, 2).T
    if (counts < 1).any() or (gaps < 0).any() or (gaps[1:] < 1).any():
        raise ValueError("positions should ascend")
    before = np.cumsum(counts) - counts
    return np.repeat(np.cumsum(gaps), counts) + np.arange(counts.sum()) if len(before) else before


def _mean(positions: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """A score per position that any head holds, ascending: the mean over the heads that do."""
    if (positions == positions[0]).all():
        return scores.mean(0)
    inverse = np.unique(positions, return_inverse=True)[1].ravel()
    return np.bincount(inverse, weights=scores.ravel()) / np.bincount(inverse)


def pack(scores: np.ndarray) -> tuple[str, float | None, float]:
    """A byte per score, in base64, then low and high; see `unpack`. What is no number is byte 0."""
    scores = scores.astype(np.float64)
    known = np.isfinite(scores)
    low, high = (float(f(scores[known])) for f in (np.min, np.max)) if known.any() else (0.0, 0.0)
    if low >= 0:  # mass spans orders of magnitude
        with np.errstate(divide="ignore"):
            steps = 255 + OCTAVE * np.log2(scores / (high or 1.0), where=known, out=scores * 0.0)
        steps, low = np.where(scores > 0, np.clip(np.rint(steps), 1, 255), 0), None
    else:
        steps = 1 + np.rint(254 * ((scores - low) / ((high - low) or 1.0)))
    data = np.where(known, steps, 0).astype(np.uint8).tobytes()
    low, high = (None if end is None else float(f"{end:.6g}") for end in (low, high))
    return base64.b64encode(data).decode(), low, high


def unpack(packed: str, low: float | None, high: float) -> np.ndarray:
    """The scores: where low is None, to 4.5 % (eight steps to an octave, below high; byte 0 is 0),
    else to 1/508 of the way from low to high (byte 0 is NaN)."""
    steps = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8).astype(float)
    if low is None:
        return np.where(steps > 0, high * 2 ** ((steps - 255) / OCTAVE), 0.0)
    return np.where(steps > 0, low + (high - low) * (steps - 1) / 254, np.nan)


# -- reading ---------------------------------------------------------------------------------------


def replay(data: dict, sequence: int) -> Iterator[tuple[dict, list[list], list[list]]]:
    """Every round of a sequence, with the positions held before and after it: [layer][head], each
    an ascending array. Raises ValueError where what is dropped was not held."""
    one, seen = data["sequences"][sequence], 0
    held = [[np.arange(0)] * data["heads"] for _ in range(data["layers"])]
    for record in one["rounds"]:
        new = np.arange(seen, record["seen"])
        seen = record["seen"]
        before = [[np.concatenate((head, new)) for head in layer] for layer in held]
        held = []
        for layer, dropped in zip(before, record["dropped"], strict=True):
            gone = [positions_of(packed) for packed in dropped] or [np.arange(0)]
            gone = gone * data["heads"] if len(gone) == 1 else gone
            held.append(
                [np.setdiff1d(a, b, assume_unique=True) for a, b in zip(layer, gone, strict=True)]
            )
            if any(len(a) - len(b) != len(c) for a, b, c in zip(layer, gone, held[-1], strict=True)):
                raise ValueError("a position is dropped that is not held")
        yield record, before, held


def _check(data: dict) -> None:
    """Raises one of Python's own errors where the data is not as docs/TRACE.md says."""

    def need(*conditions) -> None:
        if not all(conditions):
            raise ValueError("not as the format says")

    def whole(*values) -> bool:
        return all(type(value) is int and 0 <= value < 2**31 for value in values)

    def number(value) -> bool:
        return type(value) in (int, float) and abs(value) < float("inf")

    L, H = data["layers"], data["heads"]
    need(whole(L, H), 0 < L < 2**12, 0 < H < 2**12, isinstance(data["model"], str))
    need(isinstance(data["policy"], dict), isinstance(data["policy"]["name"], str))
    need(isinstance(data["sequences"], list))
    for index, one in enumerate(data["sequences"]):
        ids, pieces, prompt = one["token_ids"], one["pieces"], one["prompt_tokens"]
        need(whole(one["prompt"], one["sample"], prompt, one["read"], *ids))
        need(len(pieces) == len(ids), all(isinstance(piece, str) for piece in pieces))
        need(0 < prompt <= len(ids), one["read"] <= len(ids), isinstance(one["rounds"], list))
        need(isinstance(one["finish_reason"], str))
        seen = 0
        for record in one["rounds"]:
            need(whole(record["seen"]), seen < record["seen"] <= one["read"])
            seen = record["seen"]
            need(len(record["dropped"]) == L)
            for dropped in record["dropped"]:
                need(len(dropped) in (0, 1, H))
                need(all(whole(*packed) and sum(packed) <= seen for packed in dropped))
            for name, kind in {**dict.fromkeys(COUNTS, whole), **dict.fromkeys(NUMBERS, number)}.items():
                values = record.get(name, [None] * L)
                need(len(values) == L, all(value is None or kind(value) for value in values))
            need("scores" not in record or None not in record["high"])
        for record, before, _ in replay(data, index):
            need(len(record.get("scores", before)) == L)
            for heads, scores in zip(before, record.get("scores", ()), strict=False):
                union = len(np.unique(np.concatenate(heads)))
                need(len(base64.b64decode(scores, validate=True)) == union)
