"""Signals that ask a run to stop: granted after the step in hand, and the second one at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # schedulers' and the terminal's
ELSEWHERE = "a signal to another process"
SAME_S = 1.0  # a launcher and the terminal may both pass on one wish


class Stop:
    """What signals have asked for. A signal raises KeyboardInterrupt on the spot, or within `deferred` sets `asked` first."""

    def __init__(self) -> None:
        self.asked = ""  # the signal's name, or ELSEWHERE
        self._is_deferred = False
        self._since = float("-inf")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block the first signal only sets `asked`, which the block must look at."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within this block, inside of a deferred one, a signal raises on the spot again; so does one that waits."""
        before, self._is_deferred = self._is_deferred, False
        try:
            self.check()
            yield
        finally:
            self._is_deferred = before

    def check(self) -> None:
        """Raise the KeyboardInterrupt that a signal has asked for."""
        if self.asked:
            raise KeyboardInterrupt(self.asked)

    def __call__(self, number: int, frame: object = None) -> None:
        """Handle a signal."""
        now, is_first = time.monotonic(), not self.asked
        if not is_first and now - self._since < SAME_S:
            return
        self.asked, self._since = signal.Signals(number).name, now
        if not (is_first and self._is_deferred):
            self.check()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Hand SIGTERM, SIGINT and SIGUSR1 to a Stop; those that the process was started to ignore stay ignored.

    Raises:
        Interrupted: a signal stopped the block.
    """
    stop = Stop()
    heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()  # Python's rule
    before = {number: signal.getsignal(number) for number in heard}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield stop
    except KeyboardInterrupt as err:
        raise Interrupted(f"stopped by {stop.asked or 'an interrupt'}") from err
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
