"""Signals that end a run: heard once, all alike, and not where they were ignored."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from sbeval.runtime import signals


@pytest.mark.parametrize("sign", signals.STOPS)
def test_a_stop_is_an_interrupt_and_those_that_follow_are_none(sign: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in signals.STOPS}
    with signals.terminable():
        with pytest.raises(KeyboardInterrupt), signals.terminable():
            signal.raise_signal(sign)
        for each in signals.STOPS:
            signal.raise_signal(each)
    assert {each: signal.getsignal(each) for each in signals.STOPS} == before


def test_a_later_stop_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN_S", 0.0)
    with signals.terminable():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


class Finalized:
    """Sends a signal while Python finalizes it, where exceptions are dropped; at most `times`."""

    times = 2

    def __del__(self) -> None:
        if Finalized.times:
            Finalized.times -= 1
            signal.raise_signal(signal.SIGTERM)


def test_a_stop_in_a_finalizer_is_not_lost() -> None:
    before, until = sys.unraisablehook, time.monotonic() + 20
    with pytest.raises(KeyboardInterrupt), signals.terminable():
        while time.monotonic() < until:
            Finalized()
            time.sleep(0.001)
    assert Finalized.times == 0 and sys.unraisablehook is before


def test_deferred_stops_are_an_event() -> None:
    with signals.deferred() as stopped:
        assert not stopped.is_set()
        signal.raise_signal(signal.SIGHUP)
        assert stopped.is_set()
    with signals.deferred() as stopped:
        assert not stopped.is_set()


def test_what_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.terminable(), signals.deferred() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_that_start_unheard_do_not_hear_a_terminal() -> None:
    kill = "import os, signal\nfor s in (signal.SIGINT, signal.SIGHUP): os.kill(os.getpid(), s)\nprint('lives')"
    with signals.unheard():
        done = subprocess.run([sys.executable, "-c", kill], capture_output=True, text=True, check=True)
    assert done.stdout == "lives\n"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_threads_leave_handlers_alone() -> None:
    handler, found = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with signals.terminable(), signals.deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [handler]
