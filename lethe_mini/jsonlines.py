"""JSON Lines files that survive a crash: a second run reads what is there and appends the rest.

A line is written with one system call, so a crash can cut short only the last one. `read_lines`
removes such a rest, but only after the caller has accepted every whole line: a file that holds
something else is refused and keeps every byte.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from .errors import UserError, writing


def digest(facts: object) -> str:
    """A short name for what JSON can hold: equal facts have equal names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(
    path: Path, head: bytes, accept: Callable[[int, object], None], mend: str = "name another file"
) -> None:
    """Calls accept(number, object) for every whole line, numbered from 1; then drops a cut line.

    head: how each line begins; a cut last line must begin so, too. `accept` raises UserError with
    a reason of its own, or ValueError, KeyError or TypeError for an object of something else.
    mend: what the user can do about a refused file. Raises UserError; no file is no line.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; {mend}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    whole = data[: data.rfind(b"\n") + 1]
    number = 0
    try:
        for number, line in enumerate(whole.splitlines(), 1):
            accept(number, json.loads(line))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        where = f"{path}, line {number}"
        raise UserError(f"{where}: this command did not write it; {mend}") from None
    cut = data[len(whole) :]
    if not cut:
        return
    if not (cut.startswith(head) or head.startswith(cut)):
        raise UserError(f"{path} does not end in a line of this command; {mend}")
    with writing(path):
        os.truncate(path, len(whole))


class Appender:
    """A file to append whole lines to. Raises UserError where it cannot be opened or written."""

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: str) -> None:
        """The line is on the disk whole or, after a crash, cut short at the end of the file. A disk
        that had room for a part of it keeps nothing of it."""
        data = line.encode() + b"\n"
        with writing(self.path):
            written = os.write(self.file, data)  # one call
            if written != len(data):
                os.ftruncate(self.file, os.fstat(self.file).st_size - written)
                raise UserError(f"cannot write {self.path}: the disk is full")

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_) -> None:
        with writing(self.path):  # some disks say only now that they are full
            os.close(self.file)
