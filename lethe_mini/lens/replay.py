"""Reading a trace: packs and unpacks positions and scores, and computes what the cache held.

docs/TRACE.md describes the format; trace.py writes it.
"""

import base64
from collections.abc import Iterator

import numpy as np

OCTAVE = 8  # a packed score doubles in so many steps


def runs(positions: np.ndarray) -> list[int]:
    """Ascending positions as gap, length, gap, length, ...: [3, 4, 5, 9] is [3, 3, 3, 1]."""
    if not len(positions):
        return []
    first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    starts, counts = positions[first], np.diff(first, append=len(positions))
    gaps = np.diff(starts, prepend=0) - np.concatenate(([0], counts[:-1]))
    return np.stack((gaps, counts), axis=1).ravel().tolist()


def positions_of(packed: list[int]) -> np.ndarray:
    """The positions that `runs` packed. Raises ValueError if they do not ascend."""
    if not len(packed):
        return np.arange(0)
    gaps, counts = np.array(packed, dtype=np.int64).reshape(-1, 2).T
    if (counts < 1).any() or (gaps < 0).any() or (gaps[1:] < 1).any():
        raise ValueError("positions should ascend")
    return np.repeat(np.cumsum(gaps), counts) + np.arange(counts.sum())


def pack(scores: np.ndarray) -> tuple[str, float | None, float]:
    """A byte per score, in base64, then low and high: see `unpack`. NaN and infinity are 0."""
    known = np.isfinite(scores)
    scores = np.where(known, scores, 0).astype(np.float64)
    low = high = 0.0
    if known.any():
        low, high = float(scores[known].min()), float(scores[known].max())
    if low >= 0:  # mass spans orders of magnitude
        with np.errstate(divide="ignore"):
            steps = 255 + OCTAVE * np.log2(scores / (high or 1.0))
        steps, low = np.where(scores > 0, np.clip(np.rint(steps), 1, 255), 0), None
    else:
        steps = 1 + np.rint(254 * (scores - low) / ((high - low) or 1.0))
    data = np.where(known, steps, 0).astype(np.uint8).tobytes()
    low, high = (None if end is None else float(f"{end:.6g}") for end in (low, high))
    return base64.b64encode(data).decode(), low, high


def unpack(packed: str, low: float | None, high: float) -> np.ndarray:
    """The scores. Where low is None: eight steps per octave below high, exact to 4.5 %, and byte 0
    is 0. Else: even steps from low to high, exact to 1/508 of the way, and byte 0 is NaN."""
    steps = np.frombuffer(base64.b64decode(packed, validate=True), np.uint8).astype(float)
    if low is None:
        return np.where(steps > 0, high * 2 ** ((steps - 255) / OCTAVE), 0.0)
    return np.where(steps > 0, low + (high - low) * (steps - 1) / 254, np.nan)


def replay(data: dict, sequence: int) -> Iterator[tuple[dict, list[list], list[list]]]:
    """Every round of a sequence, and the positions held before and after it: [layer][head], each
    an ascending array. Raises ValueError if a round drops a position that is not held."""
    one, seen = data["sequences"][sequence], 0
    held = [[np.arange(0)] * data["heads"] for _ in range(data["layers"])]
    for record in one["rounds"]:
        new = np.arange(seen, record["seen"])
        seen = record["seen"]
        before = [[np.concatenate((head, new)) for head in layer] for layer in held]
        pairs = zip(before, record["dropped"], strict=True)
        held = [_without(layer, dropped) for layer, dropped in pairs]
        yield record, before, held


def _without(layer: list[np.ndarray], dropped: list[list[int]]) -> list[np.ndarray]:
    """The positions that each head of a layer keeps; dropped: packed, for no head, for all heads at
    once, or for each head."""
    gone = [positions_of(packed) for packed in dropped]
    if not gone:
        return layer
    if len(gone) == 1:
        gone = gone * len(layer)
    kept = []
    for held, out in zip(layer, gone, strict=True):
        kept.append(np.setdiff1d(held, out, assume_unique=True))
        if len(kept[-1]) != len(held) - len(out):
            raise ValueError("a position is dropped that is not held")
    return kept


def scored(record: dict, layer: int, heads: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The positions that a layer's heads held before a round, and their scores."""
    positions = np.unique(np.concatenate(heads))
    return positions, unpack(*(record[name][layer] for name in ("scores", "low", "high")))


def check_trace(data: dict) -> None:
    """Raises one of Python's own errors if the data is not as docs/TRACE.md says."""

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
    options = data["policy"].values()
    need(all(one is None or isinstance(one, str | bool) or number(one) for one in options))
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
            for name in ("budget", "recent", "breakpoint", "hoyer", "low", "high"):
                values = record.get(name, [None] * L)
                kind = number if name in ("hoyer", "low", "high") else whole
                need(len(values) == L, all(value is None or kind(value) for value in values))
            need("scores" not in record or ("low" in record and None not in record["high"]))
        for record, before, _ in replay(data, index):
            need(len(record.get("scores", before)) == L)
            for heads, scores in zip(before, record.get("scores", ()), strict=False):
                union = len(np.unique(np.concatenate(heads)))
                need(len(base64.b64decode(scores, validate=True)) == union)
