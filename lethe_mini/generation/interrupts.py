"""Ctrl-C that waits for the end of a step, so that no step ends half way through the layers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back_interrupts(hurry: bool) -> Iterator[list]:
    """Inside the block, Ctrl-C puts something into the list that is yielded. If `hurry`, a second
    Ctrl-C raises KeyboardInterrupt at once, which ends the block and goes no further. Where another
    handler than Python's own is installed, nothing changes."""
    pressed: list[bool] = []

    def note(*_) -> None:
        if pressed and hurry:
            raise KeyboardInterrupt
        pressed.append(True)

    try:
        default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        before = signal.signal(signal.SIGINT, note) if default else None
    except ValueError:  # not the main thread
        before = None
    try:
        yield pressed
    except KeyboardInterrupt:  # or one from a callback
        pressed.append(True)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
