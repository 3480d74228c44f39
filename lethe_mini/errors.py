"""The one exception for what a user can mend: a bad path, a bad value, a broken checkpoint.

Its message is a single line that says what is wrong and how to mend it; the command line prints it
and exits with code 2. Anything else that escapes is a bug in lethe-mini and keeps its traceback.
`warn` is for what runs all the same, yet perhaps not as the user expects.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    pass


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
