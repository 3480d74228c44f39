"""The one exception for what a user can mend: a bad path, a bad value, a broken checkpoint.

Its message is a single line that says what is wrong and how to mend it; the command line prints it
and exits with code 2. Several at once are a line each. Anything else that escapes is a bug in
lethe-mini and keeps its traceback. `warn` is for what runs all the same, yet perhaps not as the
user expects. And how files are written, so that no failure leaves half of one.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    code = 2  # the command's exit code

    def lines(self) -> list[str]:
        """What is told, an error a line."""
        return [" ".join(str(self).split())]


class PromptError(UserError):
    """What is wrong with one prompt of a call. number: which, from 0; alone: it is the only one."""

    def __init__(self, number: int, reason: str, alone: bool = False):
        super().__init__(reason if alone else f"prompt {number + 1}: {reason}")
        self.number, self.reason = number, reason


class UserErrors(UserError):
    """Several at once, each a line."""

    def __init__(self, told: list[str]):
        super().__init__("\n".join(told))
        self.told = told

    def lines(self) -> list[str]:
        return [" ".join(line.split()) for line in self.told]


def one_line(error: Exception, most: int = 300) -> str:
    """What an exception of another library says, in one line of so many characters."""
    return " ".join(str(error).split())[:most]


class CheckpointWarning(UserWarning):
    """A checkpoint contradicts itself. The command line prints the message as one line."""


def warn(message: str) -> None:
    """Warns once of each message, unless Python's filters of warnings say otherwise."""
    warnings.warn(message, CheckpointWarning, stacklevel=2)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Around code that writes a file: an OSError becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: Path) -> None:
    """Raises UserError where a file cannot be written; leaves it as it is. A pipe or a device is
    not opened: its reader would take that for all there is."""
    with writing(path):
        place = Path(os.path.realpath(path))  # a link whose file is not there stays, too
        existed = place.exists()
        if existed and not (place.is_file() or place.is_dir()):
            return
        with place.open("a"):
            pass
        if not existed:
            place.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Puts a text into a file, whole or not at all: first into another beside it, which then takes
    its place. Devices and pipes have no such place, nor have folders that take no file; there it is
    written as it comes. Raises UserError."""
    with writing(path):
        place = Path(os.path.realpath(path))  # a link stays one
        device = path.absolute().is_relative_to("/dev") or (place.exists() and not place.is_file())
        if device or not os.access(place.parent, os.W_OK):
            place.write_text(text, encoding="utf-8")
            return
        beside = place.with_name(f".lethe-mini-{os.getpid()}.tmp")
        try:
            beside.write_text(text, encoding="utf-8")
            if place.exists():
                shutil.copymode(place, beside)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
