"""How a command is asked to end from outside, and the exit status it ends with: 128 + the number of the signal.

Ctrl-C (SIGINT, 130), SIGTERM (143; batch systems and containers send it) and SIGHUP (129; a terminal that closes) are
one thing: the first one raises KeyboardInterrupt wherever the main thread is, so that all that is open is put in order.
Some systems send a signal twice, which changes nothing. What does not end by itself, because a library has swallowed
the exception or does not come back, is ended: everything this project writes survives that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

#: Time to end in order; batch systems leave 10 (containers) to 30 seconds (SLURM) before they kill.
SECONDS_TO_END = 9.0
#: Whoever asks again after so many seconds does not want to wait.
_SECONDS_TO_ASK_AGAIN = 1.0
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ending:
    """Whether this process has been asked to end.

    Attributes:
        number: The first signal that came; None for none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0
        self._timer: threading.Timer | None = None

    @property
    def status(self) -> int:
        """The exit status of an interrupted command."""
        return 128 + (signal.SIGINT if self.number is None else self.number)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if self.number is None:
            self.number, self._at = number, time.monotonic()
            self._timer = _end_soon(self.status)
            raise KeyboardInterrupt
        if time.monotonic() - self._at > _SECONDS_TO_ASK_AGAIN:
            os._exit(self.status)

    def over(self) -> None:
        """All is in order."""
        if self._timer is not None:
            self._timer.cancel()


_CURRENT: list[Ending] = []


def is_asked_to_end() -> bool:
    """Whether a signal has come: what goes wrong from now on may be its consequence."""
    return bool(_CURRENT) and _CURRENT[0].number is not None


def was_interrupted(status: int) -> bool:
    """Whether a command's exit status says that it was asked to end."""
    return status > 128


def quiet_while_starting(*, always: bool = False) -> None:
    """End without a traceback on a signal that comes before :func:`asked_to_end`: imports take a second.

    For packages that hold commands, which call it as they are imported. Whoever else imports them keeps the handlers:
    only ``python -m`` has no name of a program yet. A console script asks for it `always`.
    """
    if always or sys.argv[:1] == ["-m"]:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: os._exit(128 + number))


def leave(status: int) -> NoReturn:
    """End the process with a command's exit status; a second signal while Python shuts down does not change it."""
    if was_interrupted(status):
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # A KeyboardInterrupt that has left an exec() (of an import: dataclasses use it) counts as not caught, and
        # Python would end by SIGINT whatever the status, unless another exec() ends well after it.
        exec("")
        _end_soon(status)
    sys.exit(status)


@contextmanager
def asked_to_end() -> Iterator[Ending]:
    """In this block the signals raise KeyboardInterrupt, and whatever else a signal leads to is one in the end.

    Blocks inside each other are asked together. An inner one takes the signals back from a library that has
    taken them (Ray), and gives them as it found them. Signals that are ignored (``nohup``) stay so. In other threads
    than the main one nothing changes.

    Raises:
        KeyboardInterrupt: A signal has come, also where the block has turned it into another exception or none. The
            outermost block ends well where it was finished.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Ending()
        return
    outermost = not _CURRENT
    if outermost:
        _CURRENT.append(Ending())
    ending = _CURRENT[0]
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, ending.ask)
        yield ending
        if ending.number is not None and not outermost:
            raise KeyboardInterrupt
    except (Exception, SystemExit) as error:
        if ending.number is None:
            raise
        raise KeyboardInterrupt from error
    finally:
        if outermost:
            _CURRENT.clear()
            ending.over()
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _end_soon(status: int) -> threading.Timer:
    timer = threading.Timer(SECONDS_TO_END, os._exit, (status,))
    timer.daemon = True
    timer.start()
    return timer
