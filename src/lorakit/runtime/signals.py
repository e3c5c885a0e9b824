"""Signals that stop a run: after the current step, or at once if a second one comes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # of schedulers and the terminal
ELSEWHERE = "a signal to another process"
SAME_S = 1.0  # the launcher and the terminal may both send the same signal


class Stop:
    """A handler of signals: raises KeyboardInterrupt at once, or within `deferred` first sets `signal`."""

    def __init__(self) -> None:
        self.signal = ""  # the signal's name, or ELSEWHERE
        self._is_deferred = False
        self._since = float("-inf")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block the first signal only sets `signal`, which the block must check."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within this block, inside a deferred one, signals raise at once again, including one already received."""
        before, self._is_deferred = self._is_deferred, False
        try:
            self.check()
            yield
        finally:
            self._is_deferred = before

    def check(self) -> None:
        """Raise a KeyboardInterrupt if there was a signal."""
        if self.signal:
            raise KeyboardInterrupt(self.signal)

    def __call__(self, number: int, frame: object = None) -> None:
        """Handle a signal."""
        now, is_first = time.monotonic(), not self.signal
        if not is_first and now - self._since < SAME_S:
            return
        self.signal, self._since = signal.Signals(number).name, now
        if not (is_first and self._is_deferred):
            self.check()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Handle SIGTERM, SIGINT and SIGUSR1 by a Stop; signals that the process was started to ignore stay ignored.

    Raises:
        Interrupted: a signal stopped the block.
    """
    stop = Stop()
    # Python allows handlers only there
    handled = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in handled}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield stop
    except KeyboardInterrupt as err:
        raise Interrupted(f"stopped by {stop.signal or 'an interrupt'}") from err
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
