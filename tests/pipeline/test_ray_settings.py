"""The settings of Ray that a run relies on: each was seen to hang a run, or to lose rows, when it was otherwise."""

import copy
import subprocess
import sys

import pytest
from ray.data import DataContext

from operators.base import Operator, OperatorConfig
from pipeline import cluster, connect
from pipeline.step import Flow, Step
from pipeline.watchdog import Pool
from schemas.source import UNIT


class Config(OperatorConfig):
    """None."""


class Nothing(Operator[Config]):
    """Leaves units as they are."""

    reads = adds = UNIT


@pytest.fixture
def context():
    before = DataContext.get_current()
    DataContext._set_current(copy.deepcopy(before))
    yield DataContext.get_current()
    DataContext._set_current(before)


def options_of_workers(monkeypatch, *steps):
    given = []
    monkeypatch.setattr(connect, "_map_batches", lambda dataset, worker, **options: given.append(options) or dataset)
    connect._add_steps(None, steps, (None, "", None), 1.0)
    return given


def test_a_block_that_failed_ends_the_attempt_and_never_drops_its_rows(context):
    context.max_errored_blocks = 5
    connect.configure_data()
    assert context.max_errored_blocks == 0


def test_a_worker_that_cannot_be_built_ends_the_attempt_at_once(context):
    connect.configure_data()
    assert context.actor_init_retry_on_errors is False
    assert context.max_consecutive_actor_init_deaths == 0


def test_nothing_that_ray_repeats_is_repeated_for_ever_or_for_other_reasons_than_a_death(context):
    connect.configure_data()
    assert context.retried_map_errors is False
    assert context.actor_task_retry_on_errors is False


def test_ray_itself_gives_up_long_after_the_watch_of_the_run(context):
    connect.configure_data()
    assert 10 * Flow({}).no_progress_seconds < context.execution_no_progress_timeout_s


def test_dead_workers_are_always_replaced_and_their_tasks_repeated_for_a_finite_number_of_times(monkeypatch):
    [options] = options_of_workers(monkeypatch, Step(Nothing, Config()))
    assert options["max_restarts"] == -1
    # Three deaths for each of three culprits in each of the two batches that a worker holds, and some from outside.
    assert 18 < options["max_task_retries"] < 100


def test_pools_that_together_want_more_than_there_is_ask_for_less_and_all_get_their_first_worker(monkeypatch):
    heads = {"documents": [Step(Nothing, Config(), cpus=1.0)], "videos": [Step(Nothing, Config(), cpus=1.0)]}
    flow = Flow(heads, [Step(Nothing, Config(), cpus=1.0), Step(Nothing, Config(), cpus=0.25)])
    for cpus in (0.5, 1.0, 2.0, 3.0, 64.0):
        monkeypatch.setattr(connect, "steady_cpus", lambda cpus=cpus: cpus)
        for used in (["documents"], ["documents", "videos"]):
            pools = connect.pools_of(flow, used)
            assert sum(pool.cpus * pool.fewest for pool in pools) <= cpus
            assert len(pools) == len(used) + 2


@pytest.mark.parametrize(
    ("nodes", "cpus"),
    [([8.0], 8.0), ([0.0, 2.0, 2.0], 2.0), ([4.0, 64.0], 4.0), ([0.0, 16.0], 16.0), ([16.0] * 5, 64.0)],
)
def test_workers_have_to_fit_into_what_is_left_when_the_largest_node_is_lost(monkeypatch, nodes, cpus):
    alive = [{"Alive": True, "Resources": {"CPU": count} if count else {}} for count in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 128.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*alive, gone])
    monkeypatch.setattr(cluster, "cluster_cpus", lambda: sum(nodes))
    assert cluster.steady_cpus() == cpus


def test_a_pool_is_all_the_steps_that_share_its_workers(monkeypatch):
    monkeypatch.setattr(connect, "steady_cpus", lambda: 8.0)
    steps = [Step(Nothing, Config(), gpus=1.0, workers=(2, 2)), Step(Nothing, Config(), same_worker=True)]
    assert connect.pools_of(Flow({}, steps), []) == [Pool(("Nothing", "Nothing"), 2, 1.0, 1.0)]


def test_the_settings_of_nodes_are_set_before_our_own_ray_starts(monkeypatch):
    for name in cluster.RAYLET_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    cluster.quiet_ray()
    assert cluster._unset_here() == []
    monkeypatch.delenv("RAY_task_oom_retries")
    assert cluster._unset_here() == ["RAY_task_oom_retries"]


LEAVES = """
import sys, time
import ray
from pipeline import cluster
cluster.start_ray(cluster.Cluster(cpus=1, object_store_bytes=100_000_000))
if sys.argv[1] == "hangs":
    cluster.GOODBYE_SECONDS = 1.0
    ray.shutdown = lambda: time.sleep(600)
if sys.argv[1] == "joined":
    cluster._joined = True
    ray.shutdown = lambda: sys.exit("a cluster that was joined is not said goodbye to")
sys.stdout.write("said")
cluster.leave_and_exit(4)
"""


@pytest.mark.parametrize("how", ["well", "hangs", "joined"])
def test_a_command_ends_with_its_own_status_however_ray_takes_its_leave(how):
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, how], capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "said"), done.stderr
