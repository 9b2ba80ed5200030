"""The killable decoder process."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from operators.decode.box import DecoderBox, was_ended_from_outside
from operators.decode.process import BoxLimits
from operators.decode.wire import SLOT_BYTES, SLOT_COUNT
from schemas.errors import DecodeError, FetchError, WorkerLostError

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


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def wait_until_gone(pid, seconds):
    return wait_until(lambda: not is_running(pid), seconds)


def descriptor_count():
    return len(os.listdir("/proc/self/fd"))


def leftovers():
    return descriptor_count(), threading.active_count(), zombie_count()


def zombie_count():
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if (state, int(parent)) == ("Z", os.getpid()):
                found.append(folder.name)
    return len(found)


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


def test_arrays_that_are_held_stay_what_they_are_while_others_come(box):
    items = list(stream(box, "pages", byte_count=300_000, count=12))
    again = stream(box, "pages", byte_count=300_000, count=12)
    for number, item in enumerate(items):
        assert item["number"] == number
        assert np.all(next(again)["image"] == number)
        assert np.all(item["image"] == number)
    with pytest.raises(ValueError, match="read-only"):
        items[0]["image"][0] = 1


def test_a_part_of_an_array_that_is_held_keeps_it(box):
    parts = [item["image"].reshape(2, -1)[1] for item in stream(box, "pages", byte_count=300_000, count=12)]
    assert [set(part.tolist()) for part in parts] == [{number} for number in range(12)]


def test_memory_is_used_again_and_only_what_is_held_takes_descriptors(box):
    list(stream(box, "count", stop=1))
    before = descriptor_count()
    for item in stream(box, "pages", byte_count=300_000, count=50):
        assert item["image"][0] == item["number"]
    assert descriptor_count() <= before + SLOT_COUNT


def test_a_process_does_not_run_ahead_of_a_slow_receiver_by_more_than_an_item(box, tmp_path):
    items = stream(box, "logged_pages", byte_count=300_000, count=20, log=str(tmp_path / "log"))
    next(items)
    time.sleep(1.0)
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]
    assert [item["number"] for item in items] == list(range(1, 20))


def test_an_array_larger_than_a_slot_crosses_and_leaves_nothing(box):
    list(stream(box, "count", stop=1))
    before = descriptor_count()
    for item in stream(box, "pages", byte_count=SLOT_BYTES + 1, count=3):
        assert item["image"].nbytes == SLOT_BYTES + 1
        assert item["image"][-1] == item["number"]
    del item
    assert descriptor_count() == before


def test_several_arrays_of_any_size_cross_in_one_item(box):
    [[small, numbers, tiny, halves, empty]] = stream(box, "rows_of_arrays")
    assert small.sum() == 7 * 300_001
    assert tiny.tolist() == [9, 9, 9]
    assert np.array_equal(numbers, np.arange(900_000))
    assert np.array_equal(halves, np.arange(0, 900_000, 2))
    assert empty.shape == (0,)


def test_the_arrays_of_a_process_that_died_stay(box):
    items = stream(box, "pages", byte_count=300_000, count=3)
    held = next(items)["image"]
    box.close()
    assert np.all(held == 0)


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


def test_a_call_that_fills_memory_is_ended_within_it_even_in_native_code(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(resident_bytes=400_000_000))
    items = stream(box, "fill_then_hang", byte_count=600_000_000)
    assert next(items) == 0
    with pytest.raises(DecodeError, match="it may hold 400 MB") as caught:
        next(items)
    assert (caught.value.code, caught.value.exit_signal) == ("memory_limit", signal.SIGKILL)
    assert not caught.value.retryable
    assert list(stream(box, "count", stop=1)) == [0]
    box.close()


def test_memory_is_watched_while_nobody_waits(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(resident_bytes=400_000_000))
    items = stream(box, "fill_then_hang", byte_count=600_000_000)
    next(items)
    assert wait_until_gone(box.process_id, 30)
    with pytest.raises(DecodeError) as caught:
        next(items)
    assert caught.value.code == "memory_limit"
    box.close()


def test_a_kill_from_outside_is_told_from_our_own(box):
    items = stream(box, "hang_after", count=1)
    next(items)
    os.kill(box.process_id, signal.SIGKILL)
    with pytest.raises(DecodeError, match="from outside while it held") as caught:
        next(items)
    assert (caught.value.code, caught.value.exit_signal, caught.value.retryable) == ("crash", signal.SIGKILL, True)
    assert was_ended_from_outside(caught.value)


def test_a_signal_without_a_name_is_a_crash_with_its_number(box):
    items = stream(box, "hang_after", count=1)
    next(items)
    os.kill(box.process_id, signal.SIGRTMIN + 5)
    with pytest.raises(DecodeError, match=f"signal {signal.SIGRTMIN + 5}") as caught:
        next(items)
    assert caught.value.exit_signal == signal.SIGRTMIN + 5


def test_deaths_leave_no_zombie_no_thread_and_no_descriptor(box):
    list(stream(box, "count", stop=1))
    box.close()
    before = leftovers()
    for _ in range(3):
        for function in ("segfault_after", "hang_after"):
            with pytest.raises(DecodeError):
                list(stream(box, function, timeout_seconds=0.5, count=1))
        list(stream(box, "process_id"))
    box.close()
    assert wait_until(lambda: all(now <= then for now, then in zip(leftovers(), before, strict=True)), 10)


def test_a_box_that_is_collected_takes_its_process_along(box):
    forgotten = DecoderBox()
    list(stream(forgotten, "count", stop=1))
    pid = forgotten.process_id
    del forgotten
    gc.collect()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10)


def test_the_process_outlives_the_thread_that_asked_for_it(box):
    thread = threading.Thread(target=lambda: list(stream(box, "count", stop=1)))
    thread.start()
    thread.join()
    [pid] = stream(box, "process_id")
    assert box.start_count == 1
    assert is_running(pid)


def test_a_machine_that_cannot_start_a_process_loses_the_worker_not_the_record(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerLostError, match="no decoder process can be started"):
        list(stream(DecoderBox(), "count", stop=1))


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
    monkeypatch.setattr("operators.decode.process.REST_OF_MESSAGE_SECONDS", 1)
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
from operators.decode.box import DecoderBox
box = DecoderBox()
[pid] = box.stream("hostile_functions:process_id", {}, first_timeout_seconds=60, next_timeout_seconds=60)
print(pid, flush=True)
items = box.stream("hostile_functions:" + sys.argv[1], {"count": 1}, first_timeout_seconds=60, next_timeout_seconds=60)
print(next(items), flush=True)
list(items)
"""


@pytest.mark.parametrize("function", ["native_hang_after", "hang_after", "endless"])
def test_the_process_ends_with_its_parent(function):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, function], stdout=subprocess.PIPE, env=environment)
    pid = int(parent.stdout.readline())
    parent.stdout.readline()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid, 10)


def test_a_hang_that_nobody_waits_for_ends_by_itself(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    box = DecoderBox(BoxLimits(alarm_margin_seconds=0.5))
    items = stream(box, "native_hang_after", timeout_seconds=1.0, count=1)
    next(items)
    assert wait_until_gone(box.process_id, 10)
    with pytest.raises(DecodeError) as caught:
        next(items)
    assert (caught.value.code, caught.value.exit_signal) == ("time_limit", signal.SIGALRM)
    box.close()
