"""What the long run judges, and a shorter one of them."""

import subprocess
import sys
import time

import pytest

from tests.long.long_run import Work, long_run, rises
from tests.long.watch import Held, Process, Sample, Watch, growth, role_of

MB = 10**6


def run_of(*processes, looks=60):
    """Return samples of processes, each a role and two functions from the look to bytes and descriptors."""
    samples = []
    for look in range(looks):
        held = {
            Process(number, "0", role): Held(memory(look), descriptors(look))
            for number, (role, memory, descriptors) in enumerate(processes)
        }
        samples.append(Sample(float(look), look * 100, held))
    return samples


def test_growth_is_the_rise_of_a_straight_line():
    assert growth([(0, 5.0), (1, 6.0), (2, 7.0)]) == pytest.approx(2.0)
    assert growth([(0, 5.0), (1, 9.0), (2, 5.0)]) == pytest.approx(0.0)
    assert growth([(3, 5.0)]) == 0.0


def test_what_settles_and_what_saws_is_flat():
    settles = ("worker", lambda look: 300 * MB - 200 * MB // (look + 1), lambda look: 40)
    saws = ("decoder", lambda look: (100 + 20 * (look % 7)) * MB, lambda look: 7 + look % 3)
    assert rises(run_of(settles, saws)) == []


def test_a_process_that_keeps_growing_is_named():
    leaks = ("driver", lambda look: (200 + 2 * look) * MB, lambda look: 40)
    opens = ("worker", lambda look: 300 * MB, lambda look: 40 + look)
    found = rises(run_of(leaks, opens))
    assert len(found) == 2
    assert found[0].startswith("driver 0: memory rose by 5")
    assert found[1].startswith("worker 1: 28 more descriptors")


def test_a_process_that_takes_one_step_to_other_work_is_flat():
    model = ("worker", lambda look: (300 if look < 40 else 500) * MB, lambda look: 40 if look < 40 else 90)
    assert rises(run_of(model)) == []


def test_a_process_that_was_there_for_a_moment_is_not_judged():
    samples = run_of(("worker", lambda look: 300 * MB, lambda look: 40))
    for look in range(5):
        samples[look].held[Process(9, "1", "decoder")] = Held(look * 100 * MB, look * 10)
    assert rises(samples) == []


def test_processes_are_seen_by_role_and_missed_when_they_are_gone():
    command = [sys.executable, "-c", "import time; time.sleep(600)", "operators.decode.child"]
    process = subprocess.Popen(command)
    watch = Watch(process.pid)
    # It is seen from its first moment, before the interpreter has been loaded.
    while not (seen := watch.look(0).of_role("decoder")) or seen[0].memory_bytes < MB:
        assert process.poll() is None
        time.sleep(0.05)
    assert len(seen) == 1
    assert seen[0].descriptors >= 3
    assert [left.pid for left in watch.left_behind()] == [process.pid]
    process.kill()
    process.wait()
    assert watch.left_behind() == []


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::MapWorker(MapBatches(Worker))", "worker"),
        ("python -m operators.decode.child 7 12 {}", "decoder"),
        ("/x/ray/core/src/ray/raylet/raylet --flag", "object store"),
        ("/x/python -m jobs ocr in -o out", "driver"),
        ("/x/ray/core/src/ray/gcs/gcs_server", "control"),
        ("/x/ray/dashboard/agent.py", "agent"),
        ("sleep 5", "other"),
    ],
)
def test_roles_are_told_by_command(command, role):
    assert role_of(command) == role


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_a_run_over_thousands_of_pages_and_clips_stays_flat_and_leaves_nothing(tmp_path):
    options = ["--object-store-mb=300", "--max-new-tokens=16", "--no-second-look"]
    for work in (Work(pages=6000, pictures=60), Work(clips=400)):
        assert long_run(work, options, tmp_path, sample_seconds=0.5)["problems"] == []
