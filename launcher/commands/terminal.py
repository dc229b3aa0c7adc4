"""The terminal's echo of Ctrl-C. It would shift a progress bar, of which a stale copy would then remain."""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

_LOCAL_FLAGS = 3  # the index in what termios.tcgetattr returns


@contextmanager
def without_echo_of_control_keys() -> Iterator[None]:
    """Keep the terminal of standard error from printing ^C for the duration of the block."""
    had_echo = _set_echo(False)
    try:
        yield
    finally:
        if had_echo:
            _set_echo(True)


def _set_echo(is_on: bool) -> bool:
    """Turn the echo of control keys on or off; whether it was on. False without a terminal of ours."""
    try:
        terminal = sys.stderr.fileno()
        if os.tcgetpgrp(terminal) != os.getpgrp():  # a background process would be stopped by the change
            return False
        attributes = termios.tcgetattr(terminal)
        was_on = bool(attributes[_LOCAL_FLAGS] & termios.ECHOCTL)
        if is_on:
            attributes[_LOCAL_FLAGS] |= termios.ECHOCTL
        else:
            attributes[_LOCAL_FLAGS] &= ~termios.ECHOCTL
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    except (OSError, ValueError, termios.error):
        return False
    return was_on
