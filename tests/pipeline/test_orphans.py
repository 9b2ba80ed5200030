"""A process ends with the one that started it, whatever it is doing, and not with the thread that did."""

import signal
import subprocess
import sys
import time

import pytest

from tests.chaos.processes import is_alive, read_process

CHILD = """
import ctypes, time
from pipeline.orphans import end_with_parent
end_with_parent()
print("ready", flush=True)
{then}
"""
HOLDS_THE_INTERPRETER = "ctypes.PyDLL(None).sleep(600)"
SLEEPS = "time.sleep(600)"
PARENT = """
import subprocess, sys, threading, time
def start():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    print(child.pid, flush=True)
if sys.argv[2] == "main":
    start()
else:
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
time.sleep(600)
"""


@pytest.mark.parametrize(("thread", "then"), [("main", HOLDS_THE_INTERPRETER), ("main", SLEEPS), ("other", SLEEPS)])
def test_it_ends_with_its_parent_alone(thread, then):
    command = [sys.executable, "-c", PARENT, CHILD.format(then=then), thread]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = read_process(int(parent.stdout.readline()))
        time.sleep(0.5)
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 60
        while is_alive(child):
            assert time.monotonic() < deadline, "the child outlived its parent"
            time.sleep(0.05)
