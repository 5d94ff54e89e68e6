"""Signals: one word and the end within the grace, whatever threads, extensions and readers do."""

import os
import signal
import subprocess
import sys

import pytest

SETTING = """
import os, signal, sys, threading, time
from pipeline.core.errors import Interrupted
from pipeline.core.interrupts import interruptible

def ends_with(signum, body):
    try:
        with interruptible(lambda: print("farewell", file=sys.stderr, flush=True), grace=0.5):
            body()
    except Interrupted as interrupt:
        sys.exit(128 + interrupt.signum)
"""


def run(body: str) -> subprocess.CompletedProcess[bytes]:
    """Run a process whose main thread is interrupted."""
    return subprocess.run([sys.executable, "-c", SETTING + body], capture_output=True, timeout=50)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_extension_that_swallows_the_signal_does_not_hide_it(signum: int) -> None:
    """As Ray's waiting does: it raises its own KeyboardInterrupt."""
    ended = run(f"""
def swallow():
    try:
        signal.raise_signal({signum:d})
    except Interrupted:
        raise KeyboardInterrupt from None

ends_with({signum:d}, swallow)
""")
    assert (ended.returncode, ended.stderr) == (128 + signum, b"farewell\n")


def test_a_callback_whose_exceptions_are_ignored_does_not_hide_it() -> None:
    """As Python ignores what is raised in callbacks of a fork and of the garbage collector."""
    ended = run("""
class Ignored:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

ends_with(signal.SIGTERM, lambda: Ignored() and None)
""")
    assert ended.returncode == 143
    assert ended.stderr.endswith(b"farewell\n")


@pytest.mark.parametrize("where", ["inside", "left behind"])
def test_a_thread_that_goes_on_does_not_hold_the_end_up(where: str) -> None:
    """A thread that the main one waits for, or that Python waits for at exit: as a pool's that was just started."""
    ended = run(f"""
def leave_a_thread():
    thread = threading.Thread(target=time.sleep, args=(60,))
    thread.start()
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        if {where == "inside"}:
            thread.join()

ends_with(signal.SIGTERM, leave_a_thread)
""")
    assert (ended.returncode, ended.stderr) == (143, b"farewell\n")


def test_a_reader_that_has_stopped_does_not_hold_the_end_up() -> None:
    """As a pager does: what is said into a full pipe waits for ever."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    body = "ends_with(signal.SIGINT, lambda: signal.raise_signal(signal.SIGINT))"
    process = subprocess.Popen([sys.executable, "-c", SETTING + body], stderr=write)
    try:
        assert process.wait(60) == 130
    finally:
        process.kill()
        os.close(read)
        os.close(write)


def test_a_second_signal_changes_nothing() -> None:
    ended = run("""
def clean_up():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        print("cleaned", file=sys.stderr)

ends_with(signal.SIGINT, clean_up)
""")
    assert (ended.returncode, ended.stderr) == (130, b"cleaned\nfarewell\n")


def test_without_a_signal_all_is_as_before() -> None:
    ended = run("""
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
ends_with(signal.SIGINT, lambda: None)
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
time.sleep(0.7)
assert signal.set_wakeup_fd(-1) == -1
""")
    assert (ended.returncode, ended.stderr) == (0, b"")
