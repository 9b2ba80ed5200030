"""The harness itself: it sees what is wrong, and a seed says everything."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.chaos.__main__ import summarise
from tests.chaos.compare import KEYS, compare
from tests.chaos.harness import Outcome
from tests.chaos.processes import Process, descendants, end_all, is_alive, is_service_of_ray, read_process, send
from tests.chaos.schedules import ENDS_WORKERS, KINDS, MOST_WORKER_DEATHS, draw

PAGES = [{"record_key": key, "text": f"page {key}", "confidence": 0.5} for key in "abc"]


def tables(pages):
    return {name: [] for name in KEYS} | {"pages": pages}


def counts(pages):
    found = compare(tables(pages), tables(PAGES))
    return found.lost, found.doubled, found.different


def test_equal_tables_have_nothing_wrong():
    assert counts(PAGES) == (0, 0, 0)
    assert counts([PAGES[0] | {"confidence": 0.50001}, *PAGES[1:]]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("pages", "wrong"),
    [
        (PAGES[:2], (1, 0, 0)),
        ([*PAGES, PAGES[1]], (0, 1, 0)),
        ([PAGES[0], PAGES[0], PAGES[2]], (1, 1, 0)),
        ([*PAGES, {"record_key": "d", "text": "", "confidence": None}], (0, 0, 1)),
        ([PAGES[0] | {"text": "other"}, *PAGES[1:]], (0, 0, 1)),
        ([PAGES[0] | {"confidence": None}, *PAGES[1:]], (0, 0, 1)),
        ([PAGES[0] | {"confidence": 0.6}, *PAGES[1:]], (0, 0, 1)),
        (PAGES[::-1], (0, 0, 1)),
    ],
    ids=["lost", "doubled", "both", "unknown", "other text", "no confidence", "other confidence", "other order"],
)
def test_rows_that_are_lost_doubled_or_different_are_counted(pages, wrong):
    assert counts(pages) == wrong


def test_a_seed_says_everything():
    assert [draw(seed) for seed in range(60)] == [draw(seed) for seed in range(60)]
    assert len({str(draw(seed)) for seed in range(60)}) > 50


def test_any_twenty_schedules_have_every_kind_of_fault():
    for first in (0, 7, 180):
        met = {fault.kind for seed in range(first, first + 20) for call in draw(seed).calls for fault in call}
        assert met == set(KINDS)


def test_no_schedule_kills_the_worker_of_one_record_three_times():
    for seed in range(300):
        kinds = [fault.kind for call in draw(seed).calls for fault in call]
        assert sum(kind in ENDS_WORKERS for kind in kinds) <= MOST_WORKER_DEATHS


def test_only_the_kinds_that_were_asked_for_lead():
    assert {draw(seed, ["disk_full"]).calls[0][0].kind for seed in range(9)} == {"disk_full"}


def test_processes_of_processes_are_found_and_ended():
    script = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    while len(found := descendants(parent.pid)) < 1:
        time.sleep(0.01)
    assert found[0].parent == parent.pid
    assert send(found[0], signal.SIGSTOP)
    end_all([read_process(parent.pid), *found])
    parent.wait()
    assert not any(is_alive(process) for process in found)
    assert not send(found[0], signal.SIGCONT)
    assert not any(process.pid == found[0].pid for process in descendants(os.getpid()))


@pytest.mark.parametrize(
    ("command", "is_service"),
    [
        ("ray::DashboardAgent", True),
        ("ray::RuntimeEnvAgent", True),
        ("ray::MapWorker(MapBatches(Worker))", False),
        ("python -m operators.decode.child ray::DashboardAgent", False),
        ("/x/ray/core/src/ray/raylet/raylet --flag", False),
    ],
)
def test_only_services_of_ray_may_stay_behind_a_killed_driver(command, is_service):
    assert is_service_of_ray(Process(1, 1, "S", 0, command)) == is_service


def test_a_summary_counts_what_is_wrong_and_what_ray_left_behind():
    wrong = Outcome(draw(3), hung=1, left_by_ray=2, ended_by_ray=1, statuses=[None, 0])
    summary = summarise([wrong, Outcome(draw(4), left_by_ray=1, statuses=[0])])
    assert (summary["hung"], summary["services_left_by_ray"], summary["calls"]) == (1, 3, 3)
    assert summary["drivers_ended_by_ray"] == 1
    assert (summary["wrong_seeds"], summary["sound"]) == ([3], False)
    assert summarise([Outcome(draw(4), left_by_ray=1)])["sound"]
