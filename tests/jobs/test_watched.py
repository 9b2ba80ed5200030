"""A run in a child: its status, its signals and its end are those of the process that the user started."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.watched import KILLED, NODE_GONE, OUT_OF_MEMORY

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, time
from jobs.watched import InterruptOnce, go_on_in_child
go_on_in_child()
interrupt = InterruptOnce()
signal.signal(signal.SIGTERM, interrupt)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
try:
    print(os.getpid(), flush=True)
    {body}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(0.3)
    print("in good order", flush=True)
    sys.exit(3)
"""
WAITS = "while True: time.sleep(0.05)"
"""Python sleeps on where a signal comes between its look for one and the system call, so no sleep is long."""


def start(body, **options):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err


def is_gone(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


@pytest.mark.parametrize("status", [0, 2, 3, 4])
def test_a_status_of_ours_is_passed_on_without_a_word(status):
    assert ended(start(f"sys.exit({status})"))[::2] == (status, "")


def test_a_run_that_ray_has_ended_is_incomplete_and_says_why():
    status, _, err = ended(start("os._exit(1)"))
    assert (status, err) == (3, f"pagereel: {NODE_GONE}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_run_that_a_signal_has_ended_ends_by_it_and_says_so(number):
    status, _, err = ended(start(f"os.kill(os.getpid(), {int(number)})"))
    assert status == -number
    cause = OUT_OF_MEMORY if number == signal.SIGKILL else ""
    assert err == f"pagereel: {KILLED.format(name=number.name, cause=cause)}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
def test_an_interrupt_reaches_the_run_once_and_it_ends_in_good_order(number, send):
    process = start(WAITS)
    child = int(process.stdout.readline())
    assert child != process.pid
    send(process.pid, number)
    assert ended(process) == (3, ["interrupted", "in good order"], "")


def test_a_key_at_the_terminal_interrupts_the_run_once():
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT.format(body=WAITS)])
    said = b""
    while b"\n" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):
        while found := os.read(terminal, 1000):
            said += found
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert said.count(b"interrupted") == 1
    assert b"in good order" in said


def test_a_run_ends_with_the_process_that_the_user_started():
    process = start(WAITS)
    child = int(process.stdout.readline())
    assert not is_gone(child)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while not is_gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def has_taken_all_signals(pid):
    found = status_of(pid)
    return not int(found["SigPnd"], 16) | int(found["ShdPnd"], 16)


def test_an_interrupt_that_the_shell_has_ignored_stays_ignored():
    process = start(WAITS, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    child = int(process.stdout.readline())
    assert int(status_of(child)["SigIgn"], 16) & 1 << signal.SIGINT - 1
    process.send_signal(signal.SIGINT)
    wait_until(lambda: has_taken_all_signals(process.pid))
    assert process.poll() is None
    assert not is_gone(child)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (3, ["interrupted", "in good order"], "")


def test_a_stopped_run_goes_on():
    process = start(WAITS)
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: status_of(child)["State"].startswith("T"))
    wait_until(lambda: has_taken_all_signals(process.pid))
    assert process.poll() is None
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not status_of(child)["State"].startswith("T"))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (3, ["interrupted", "in good order"], "")
