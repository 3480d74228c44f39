"""The one exception for what a user can mend: a bad path, a bad value, a broken checkpoint.

Its message is a single line that says what is wrong and how to mend it; the command line prints it
and exits with code 2. Anything else that escapes is a bug in lethe-mini and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    def lines(self) -> list[str]:
        """What is told, an error a line."""
        return [" ".join(str(self).split())]


class PromptError(UserError):
    """What is wrong with one prompt of a call. number: which, from 0; alone: it is the only one."""

    def __init__(self, number: int, reason: str, alone: bool = False):
        super().__init__(reason if alone else f"prompt {number + 1}: {reason}")
        self.number, self.reason = number, reason


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Around code that writes a file: an OSError becomes a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
