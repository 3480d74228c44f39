"""Results that survive an interruption, and intervals around them."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lethe_mini.errors import writing
from lethe_mini.jsonlines import Appender, read_lines

DRAWS = 10_000  # bootstrap samples: the ends of a 95 % interval then move by about 1 % of its width
HEAD = b'{"key": '  # how every line begins


class Lines:
    """A JSON Lines file of (key, result); each line is on the disk before the next one is begun.

    A key holds every setting that the result depends on. So a later run with the same file uses
    what is there, also with other settings or more texts. A key does not know the code: after a
    change there, begin a new file. Without a path nothing is kept. Raises UserError for a file that
    holds something else; that file stays as it is.
    """

    def __init__(self, path: Path | None):
        self.path, self.found = path, {}
        if path is not None:
            read_lines(path, HEAD, self._accept)

    def _accept(self, number: int, entry) -> None:
        self.found[_name(entry["key"])] = entry["result"]

    def get(self, key: dict) -> dict | None:
        return self.found.get(_name(key))

    def put(self, key: dict, result: dict) -> dict:
        """Raises UserError where the line cannot be written."""
        self.found[_name(key)] = result
        if self.path is not None:
            with Appender(self.path) as file:
                file.write(json.dumps({"key": key, "result": result}))
        return result


def write_json(path: Path | None, args: Namespace, facts: dict) -> None:
    """Writes the figures with every setting of the command; nothing without a path.

    Raises UserError where the file cannot be written.
    """
    if path is None:
        return
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    text = json.dumps({"settings": settings, **facts}, indent=1)
    with writing(path):
        path.write_text(text + "\n", encoding="utf-8")


def _name(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def mean_with_interval(sums: Sequence, counts: Sequence, seed: int = 0) -> list[float]:
    """[mean, low, high]: the mean over all items and its 95 % interval by block bootstrap.

    sums, counts: (blocks,), the sum over a block's items and how many they are. Neighbours in a
    text are alike, so the bootstrap draws blocks, not items. For a paired interval give the
    blocks' differences as `sums`.
    """
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(sums.sum() / counts.sum()), float(low), float(high)]


def wilson(good: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, good / of
    middle = share + z * z / (2 * of)
    half = z * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    low, high = (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)
    return max(0.0, low), min(1.0, high)
