"""A run that hangs ends with status 3 and says what it was waiting for; a slow one goes on."""

import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from operators.base import Operator, OperatorConfig
from pipeline.executor import LocalExecutor, RayExecutor
from pipeline.metrics import Meter, Pulse
from pipeline.progress import Progress, Silent
from pipeline.spec import make_spec
from pipeline.step import Chain, Step
from pipeline.watch import Watch
from pipeline.watchdog import GoneError, Pool, Room, Stillness, unplaced, waits_for
from schemas.errors import TransientError
from schemas.source import UNIT
from tests.pipeline.made_rows import document_unit, units_table

ROOT = Path(__file__).parents[2]
BUSY = Room(cpus=8, free_cpus=0, gpus=1, free_gpus=0, nodes=2)
DECODE = Pool(("DecodeDocuments", "PrepareImages"), 1, 0.5, 0)
GENERATE = Pool(("Generate", "ParseCompletions"), 1, 1, 1)


def pulse(pool, *, is_built=True, work=0, **inside):
    return Pulse(pool.steps, "n", is_built, work, inside)


def test_stillness_counts_from_the_last_change():
    still = Stillness(10.0)
    assert still.seconds("a", 11.0) == 0
    assert still.seconds("a", 15.0) == 4
    assert still.seconds("b", 16.0) == 0


def test_workers_that_the_cluster_has_no_room_for_are_named():
    told = waits_for([DECODE, GENERATE], {}, {"w1": (1.0, pulse(DECODE))}, BUSY)
    assert "Generate (1 GPUs and 1 CPUs): 0 of 1 started" in told
    assert "8 CPUs of which 0 free, 1 GPUs of which 0 free" in told
    assert "DecodeDocuments" not in told


def test_nothing_is_missing_where_each_pool_has_a_worker():
    pulses = {"w1": (1.0, pulse(DECODE)), "w2": (1.0, pulse(GENERATE))}
    assert unplaced([DECODE, GENERATE], pulses, BUSY) is None


def test_who_has_rows_in_hand_and_who_has_gone_silent_is_named():
    pulses = {"w1": (1.0, pulse(DECODE)), "w2": (100.0, pulse(GENERATE, Generate=8))}
    steps = {"DecodeDocuments": {"rows_in": 3, "rows_out": 12}}
    told = waits_for([DECODE, GENERATE], steps, pulses, BUSY)
    assert "Generate has 8 rows in hand, silent for 100 s (w2)" in told
    assert "DecodeDocuments 3 rows in, 12 out" in told


def test_a_worker_that_is_still_being_built_is_named():
    pulses = {"w1": (1.0, pulse(DECODE)), "w2": (1.0, pulse(GENERATE, is_built=False))}
    assert "a worker of Generate is still being built" in waits_for([DECODE, GENERATE], {}, pulses, BUSY)


def test_a_meter_keeps_the_last_pulse_of_each_worker_until_others_start():
    meter = Meter()
    meter.pulse("w", pulse(DECODE, work=1))
    meter.pulse("w", pulse(DECODE, work=2))
    [(age, last)] = meter.pulses().values()
    assert last.work == 2
    assert age >= 0
    meter.forget_workers()
    assert meter.pulses() == {}


class Config(OperatorConfig):
    """None."""


class ThreeTables(Operator[Config]):
    """Its input three times."""

    reads = adds = UNIT
    expands = replaces = True

    def stream(self, table):
        for _ in range(3):
            yield table


def test_a_chain_shows_what_it_has_in_hand_and_that_it_gets_on_inside_a_call():
    chain = Chain([Step(ThreeTables, Config())], Meter().add)
    stream = chain.run(units_table([document_unit(0, [1])]))
    signs = [(next(stream) and chain.inside(), chain.work_done()) for _ in range(3)]
    assert [inside for inside, _ in signs] == [{"ThreeTables": 1}] * 3
    assert [work for _, work in signs] == [1, 2, 3]
    assert list(stream) == []
    assert chain.inside() == {"ThreeTables": 0}


class Stuck(LocalExecutor):
    """An executor whose workers say the same for ever, or something new each time, or nothing at all."""

    def __init__(self, says, patience_seconds=0.0):
        super().__init__()
        self.says, self.patience_seconds = says, patience_seconds
        self.asked = threading.Semaphore(0)

    def signs(self):
        self.asked.release()
        return self.says()

    def waits_for(self):
        return "it waits for Godot"


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["in front", "in the background"])
def quick(monkeypatch, request):
    """A watch that looks all the time, over a driver that hears one signal alone."""
    handlers = {number: signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.signal(request.param, signal.default_int_handler)
    monkeypatch.setattr("pipeline.watch.INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr("pipeline.watch.SIGNS_SECONDS", 0.01)
    monkeypatch.setattr("pipeline.watch.UNREACHABLE_SECONDS", 0.05)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def watch_until_ended(executor, phase="run"):
    with Watch(Progress(phase=phase), executor, Silent()):
        threading.Event().wait(100)
        raise AssertionError("nobody ended it")


def test_a_run_whose_workers_do_not_get_on_ends_and_says_what_it_waited_for(quick):
    with pytest.raises(TransientError, match=r"nothing has moved for .* it waits for Godot"):
        watch_until_ended(Stuck(lambda: "the same"))


def test_a_run_whose_cluster_does_not_answer_any_more_ends(quick):
    def gone():
        raise OSError("no route to the head")

    with pytest.raises(TransientError, match=r"the cluster has not answered for .* no route to the head"):
        watch_until_ended(Stuck(gone))


def test_a_run_whose_own_node_is_gone_ends_at_once(quick, monkeypatch):
    def gone():
        raise GoneError("the node of this driver is gone")

    monkeypatch.setattr("pipeline.watch.UNREACHABLE_SECONDS", math.inf)
    with pytest.raises(TransientError, match="the node of this driver is gone"):
        watch_until_ended(Stuck(gone, math.inf))


@pytest.mark.parametrize(("phase", "patience"), [("run", math.inf), ("list", 0.0), ("publish", 0.0)])
def test_a_run_that_gets_on_or_is_not_at_its_workers_is_left_alone(quick, phase, patience):
    executor = Stuck(lambda: "the same", patience)
    progress = Progress(phase=phase)
    with Watch(progress, executor, Silent()) as watch:
        for _ in range(3):
            if phase == "run":
                assert executor.asked.acquire(timeout=60)
            else:
                assert not executor.asked.acquire(timeout=0.05)
    assert watch.stuck is None


def test_an_interrupt_by_a_person_is_not_taken_for_a_run_that_hangs(quick):
    with pytest.raises(KeyboardInterrupt), Watch(Progress(phase="run"), Stuck(object, math.inf), Silent()):
        raise KeyboardInterrupt


HELD = """
import ctypes
from pipeline import watch
from pipeline.executor import LocalExecutor, RayExecutor
from pipeline.progress import Progress, Silent

watch.INTERVAL_SECONDS = watch.SIGNS_SECONDS = 0.01

class Stuck(LocalExecutor):
    patience_seconds = 0.0

    def __init__(self):
        super().__init__()
        self.patience_seconds = 0.0

    def waits_for(self):
        return "it waits for a mutex"

with watch.Watch(Progress(phase="run"), Stuck(), Silent(), grace_seconds=0.2):
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


def test_a_driver_that_native_code_does_not_give_back_is_left_with_status_3():
    done = subprocess.run(
        [sys.executable, "-c", HELD], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "it waits for a mutex" in done.stderr


class Severed:
    """Lifelines of a Ray that is being left while it is asked after."""

    def __init__(self, executor):
        self.executor = executor
        self.leaves = True

    def check(self):
        if self.leaves:
            self.executor._meter = None
        raise GoneError("nobody listens")


def test_a_ray_that_is_being_left_is_not_taken_for_lost():
    executor = RayExecutor(make_spec({"task": "ocr", "inputs": ["a.pdf"], "output": "run"}))
    assert executor.signs() is None
    executor._meter, executor._lifelines = Meter(), Severed(executor)
    assert executor.signs() is None
    executor._meter, executor._lifelines.leaves = Meter(), False
    with pytest.raises(GoneError):
        executor.signs()
