"""The killable decoder process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from operators.decode.box import BoxLimits, DecoderBox
from schemas.errors import DecodeError, FetchError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture
def box(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox()
    yield box
    box.close()


def stream(box, function, timeout_seconds=60.0, **arguments):
    return box.stream(
        f"hostile_functions:{function}",
        arguments,
        first_timeout_seconds=timeout_seconds,
        next_timeout_seconds=timeout_seconds,
    )


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid, seconds):
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_items_come_in_order_and_one_process_serves_many_calls(box):
    assert list(stream(box, "count", stop=5)) == [0, 1, 2, 3, 4]
    assert list(stream(box, "count", stop=0)) == []
    assert list(stream(box, "count", stop=1000)) == list(range(1000))
    assert box.start_count == 1
    assert box.peak_rss_bytes > 0


def test_arrays_cross_the_pipe_whole(box):
    items = list(stream(box, "arrays", side_px=1500))
    assert [int(item["image"][0, 0, 0]) for item in items] == [1, 2]
    assert items[1]["image"].shape == (1500, 1500, 3)
    assert np.all(items[0]["image"] == 1)
    assert items[0]["raw"] == b"x" * 10


def test_the_process_imports_neither_ray_nor_torch(box):
    [modules] = stream(box, "imported_modules")
    assert not {"ray", "torch", "transformers"} & set(modules)


def test_the_process_gets_no_secret(box, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    [environment] = stream(box, "environment")
    assert "hush" not in environment.values()


def test_a_segfault_is_a_crash_with_its_signal_and_earlier_items_stay(box):
    items = stream(box, "segfault_after", count=2)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DecodeError) as caught:
        next(items)
    assert (caught.value.code, caught.value.exit_signal) == ("crash", signal.SIGSEGV)
    assert list(stream(box, "count", stop=1)) == [0]
    assert box.start_count == 2


def test_an_exit_is_a_crash_without_a_signal(box):
    items = stream(box, "exit_with_status")
    next(items)
    with pytest.raises(DecodeError, match="status 7") as caught:
        next(items)
    assert (caught.value.code, caught.value.exit_signal) == ("crash", None)


@pytest.mark.parametrize("function", ["hang_after", "native_hang_after"])
def test_a_hang_is_killed_at_its_time_limit(box, function):
    [pid] = stream(box, "process_id")
    items = stream(box, function, timeout_seconds=1.0, count=1)
    assert next(items) == 0
    with pytest.raises(DecodeError) as caught:
        next(items)
    assert caught.value.code == "time_limit"
    assert not is_running(pid)
    assert list(stream(box, "count", stop=2)) == [0, 1]


def test_a_memory_bomb_ends_at_the_address_space_limit(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(address_space_bytes=1_000_000_000))
    seen = []
    with pytest.raises(DecodeError) as caught:
        seen.extend(stream(box, "memory_bomb"))
    assert caught.value.code == "memory_limit"
    assert len(seen) < 10
    assert list(stream(box, "count", stop=1)) == [0]
    assert box.start_count == 2
    box.close()


def test_a_process_that_holds_too_much_is_replaced(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(recycle_rss_bytes=300_000_000))
    list(stream(box, "count", stop=1))
    assert box.start_count == 1
    list(stream(box, "hold", byte_count=400_000_000))
    list(stream(box, "count", stop=1))
    assert box.start_count == 2
    assert box.peak_rss_bytes > 400_000_000
    box.close()


def test_a_process_is_replaced_after_its_number_of_calls(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(recycle_call_count=2))
    pids = [next(iter(list(stream(box, "process_id")))) for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    box.close()


def test_a_record_error_keeps_its_class_code_and_stage(box):
    items = stream(box, "raise_fetch_error")
    next(items)
    with pytest.raises(FetchError, match="gone") as caught:
        next(items)
    error = caught.value
    assert (error.code, error.stage, error.retryable, error.exception_type) == (
        "not_found",
        "fetch",
        True,
        "FetchError",
    )
    assert box.start_count == 1


def test_any_other_exception_is_an_internal_decode_error_with_its_traceback(box):
    items = stream(box, "raise_value_error")
    next(items)
    with pytest.raises(DecodeError, match="a message") as caught:
        next(items)
    assert (caught.value.code, caught.value.exception_type) == ("internal", "ValueError")
    assert "raise_value_error" in caught.value.__notes__[0]


def test_an_item_that_cannot_be_pickled_is_an_error_not_a_hang(box):
    with pytest.raises(DecodeError) as caught:
        list(stream(box, "unpicklable"))
    assert caught.value.code == "internal"


def test_a_message_that_stops_in_its_middle_is_an_error_not_a_hang(box, monkeypatch):
    monkeypatch.setattr("operators.decode.box.REST_OF_MESSAGE_SECONDS", 1)
    monkeypatch.setattr("operators.decode.box.CLOSE_SECONDS", 0.5)
    items = stream(box, "half_a_message")
    next(items)
    with pytest.raises(DecodeError) as caught:
        next(items)
    assert caught.value.code == "crash"
    assert list(stream(box, "count", stop=1)) == [0]


def test_an_item_whose_memory_is_gone_ends_the_process_not_the_parent(box):
    with pytest.raises(DecodeError) as caught:
        list(stream(box, "freed_memory"))
    assert caught.value.code == "crash"


def test_an_unknown_function_is_an_internal_error(box):
    with pytest.raises(DecodeError) as caught:
        list(stream(box, "no_such_function"))
    assert caught.value.code == "internal"


def test_an_abandoned_stream_costs_its_process_and_nothing_else(box):
    items = stream(box, "count", stop=1000)
    next(items)
    items.close()
    assert list(stream(box, "count", stop=3)) == [0, 1, 2]


def test_a_process_that_died_idle_costs_no_record(box):
    [pid] = stream(box, "process_id")
    os.kill(pid, signal.SIGKILL)
    assert wait_until_gone(pid, 10)
    assert list(stream(box, "count", stop=1)) == [0]


def test_close_ends_the_process(box):
    [pid] = stream(box, "process_id")
    box.close()
    assert not is_running(pid)


def test_chatter_of_native_code_stays_off_the_terminal(box, capfd):
    assert list(stream(box, "print_much")) == [1]
    assert capfd.readouterr() == ("", "")


ORPHAN = """
import sys
from operators.decode.box import BoxLimits, DecoderBox
box = DecoderBox(BoxLimits(alarm_margin_seconds=0.5))
[pid] = box.stream("hostile_functions:process_id", {}, first_timeout_seconds=60, next_timeout_seconds=60)
print(pid, flush=True)
items = box.stream("hostile_functions:" + sys.argv[1], {"count": 1}, first_timeout_seconds=60, next_timeout_seconds=2)
print(next(items), flush=True)
list(items)
"""


@pytest.mark.parametrize("function", ["native_hang_after", "endless"])
def test_the_process_ends_when_its_parent_is_killed(function):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, function], stdout=subprocess.PIPE, env=environment)
    pid = int(parent.stdout.readline())
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid, 30)
