"""Ctrl-C that waits for a safe point: a step must not end half way through the layers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back_interrupts(hurry: bool) -> Iterator[list]:
    """Within it, Ctrl-C only puts something into the list that is yielded; if `hurry`, a
    second one raises KeyboardInterrupt at once, which ends the block and no more. Where Python's
    own handler is not in charge, nothing changes."""
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
