"""Ctrl-C and SIGTERM unwind everything, so that nothing half-written stays and the logger learns of the end."""

from __future__ import annotations

import signal
import sys


class Stopped(SystemExit):
    """The process was told to stop.

    It is no KeyboardInterrupt, which Lightning turns into an exit of its own.
    """


def stopped_before(error: BaseException | None) -> Stopped | None:
    """The stop during whose unwinding an error came up, as where the same signal has ended a service of a library."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def unwind_on_signals() -> None:
    """Raise Stopped where SIGINT or SIGTERM arrives; the second signal kills."""
    stderr = sys.stderr  # of now: while a network is traced, for one, that of the moment is redirected

    def stop(number: int, frame: object) -> None:
        for each in signal.SIGINT, signal.SIGTERM:
            signal.signal(each, signal.SIG_DFL)
        print(f"qexp: stopped by {signal.Signals(number).name}", file=stderr)
        raise Stopped(128 + number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    sys.unraisablehook = _stop_again


def _stop_again(unraisable) -> None:
    """Python drops what is raised inside a destructor or a weak reference's callback: raise it once more, outside."""
    stopped = unraisable.exc_value
    if not isinstance(stopped, Stopped):
        return sys.__unraisablehook__(unraisable)

    def raise_again(number: int, frame: object) -> None:
        raise Stopped(stopped.code)

    signal.signal(signal.SIGALRM, raise_again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
