"""What every command does around its work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lethe_mini.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a command: what the user can mend ends it with one line on standard error."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
