"""The signals that end a run: Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal sends. All save what is trained.

A signal that was ignored when the process began stays so: `nohup` keeps a run alive when its terminal is gone.
"""

import _thread
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# a signal within so many seconds of another is the same wish: it must not break what saves or says how to go on
AGAIN_S = 2.0

# seconds after which a signal is sent again whose interrupt was lost
SOON_S = 0.05

# blocks that handle signals now, and when a signal last came in them, and which
_blocks, _asked_at, _asked_by = 0, -math.inf, signal.SIGINT


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on any of STOPS, so that work is saved and no worker outlives its driver."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with _handled(interrupt), _insistent():
        yield


@contextmanager
def _insistent() -> Iterator[None]:
    """Send a signal again whose KeyboardInterrupt is lost in the block: Python drops what a finalizer raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, before = threading.get_ident(), sys.unraisablehook

    def again() -> None:
        global _asked_at
        time.sleep(SOON_S)
        if _blocks:
            _asked_at = -math.inf
            signal.pthread_kill(main, _asked_by)

    def dropped(raised: "sys.UnraisableHookArgs") -> None:
        if raised.exc_type is KeyboardInterrupt:
            # not a threading.Thread: the finalizer may have come while one of its locks is held
            _thread.start_new_thread(again, ())
        else:
            before(raised)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def deferred() -> Iterator[threading.Event]:
    """Turn STOPS into an event in the block, so that no step is interrupted."""
    interrupted = threading.Event()
    with _handled(interrupted.set):
        yield interrupted


@contextmanager
def _handled(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on STOPS in the block, once for several that follow each other; only the main thread can."""
    global _blocks, _asked_at
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(sign: int, _: object) -> None:
        global _asked_at, _asked_by
        before, _asked_at, _asked_by = _asked_at, time.monotonic(), signal.Signals(sign)
        if _asked_at - before > AGAIN_S:
            stop()

    if _blocks == 0:
        _asked_at = -math.inf
    heard = [sign for sign in STOPS if signal.getsignal(sign) is not signal.SIG_IGN]
    before = {sign: signal.signal(sign, handle) for sign in heard}
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        for sign, handler in before.items():
            # unless `ignore` was called in the block
            if signal.getsignal(sign) is handle:
                signal.signal(sign, handler)


@contextmanager
def unheard() -> Iterator[None]:
    """Block what a terminal sends in the block, also in processes that start there: their driver ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Ignore STOPS from now on: Python's own end takes a moment, in which another Ctrl-C would be a traceback."""
    for sign in STOPS:
        signal.signal(sign, signal.SIG_IGN)
