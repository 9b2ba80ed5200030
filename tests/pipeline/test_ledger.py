"""Commits, their order, garbage, and the lease."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commits import COMMITS, PARTS, parse_commit
from pipeline.committed import Again
from pipeline.key_index import KeyIndex, KeySet
from pipeline.lease import LEASES, Lease
from pipeline.ledger import Ledger
from pipeline.storage import Storage
from schemas.errors import ConfigError, ContractError, TransientError
from schemas.tables import PAGES
from tests.pipeline.made_rows import SteppingClock


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def commit(
    ledger: Ledger, keys: list[str], status: str = "success", pass_index: int = 0, retryable: tuple[str, ...] = ()
) -> str:
    part_id = ledger.begin(keys)
    rows = pa.Table.from_pylist([{"record_key": key} for key in keys], schema=PAGES)
    ledger.commit(
        part_id,
        {"pages": rows},
        run_id="r",
        records={"u": keys},
        statuses={"u": [status] * len(keys)},
        pass_index=pass_index,
        retryable=retryable,
        tokens={"output_tokens": len(keys)},
    )
    return part_id


def test_a_commit_names_its_parts_with_their_hash_and_covers_its_records(storage: Storage) -> None:
    ledger = Ledger(storage)
    part_id = commit(ledger, ["a", "b"])
    [record] = ledger.commits()
    [part] = record.parts
    assert part.path == f"{PARTS}/pages/{part_id}.parquet"
    assert part.sha256 == hashlib.sha256(storage.get(part.path)).hexdigest()
    assert record.records == {"u": ["a", "b"]}
    committed = ledger.committed_records()
    assert "a" in committed
    assert committed.part_of("b") == part_id
    assert committed.part_of("c") is None


def test_a_part_without_a_commit_does_not_exist(storage: Storage) -> None:
    ledger = Ledger(storage)
    ledger._write_part(ledger.begin(["a"]), "pages", PAGES.empty_table())
    assert len(ledger.committed_records()) == 0


def test_the_earliest_commit_of_a_record_wins_whatever_is_read_first(storage: Storage) -> None:
    clock = SteppingClock()
    slow, fast = Ledger(storage, clock), Ledger(storage, clock)
    first = commit(slow, ["a"], "success")
    reader = Ledger(storage)
    reader.refresh()
    second = commit(fast, ["a", "b"], "failure")
    committed = reader.committed_records()
    assert committed.parts_of(["a", "b"]) == [first, second]
    assert committed.status_counts() == {"success": 1, "failure": 1}


def test_a_later_pass_replaces_earlier_rows(storage: Storage) -> None:
    clock = SteppingClock()
    ledger = Ledger(storage, clock)
    commit(ledger, ["a"], "failure")
    second = commit(ledger, ["a"], "fallback", pass_index=1)
    commit(ledger, ["a"], "failure")
    committed = ledger.committed_records()
    assert committed.part_of("a") == second
    assert committed.status_of("a") == "fallback"
    assert committed.last_pass() == 1


def test_records_are_owed_again_only_where_a_later_pass_wants_them(storage: Storage) -> None:
    ledger = Ledger(storage)
    commit(ledger, ["good"], "success")
    commit(ledger, ["lost", "broken"], "failure", retryable=("lost",))
    commit(ledger, ["second"], "failure", pass_index=1)
    keys = ["good", "lost", "broken", "second", "new"]
    committed = ledger.committed_records()
    assert committed.owed(keys).tolist() == [False, False, False, False, True]
    assert committed.owed(keys, Again()).tolist() == [False, True, True, False, True]
    assert committed.owed(keys, Again(only_retryable=True)).tolist() == [False, True, False, False, True]


def test_a_refresh_reads_only_what_is_new(storage: Storage) -> None:
    ledger, writer = Ledger(storage), Ledger(storage)
    commit(writer, ["a"])
    assert ledger.refresh() == 1
    assert ledger.refresh() == 0
    commit(writer, ["b"])
    assert ledger.refresh() == 1
    assert ledger.totals["output_tokens"] == 2


def test_a_sweep_removes_garbage_and_nothing_else(storage: Storage) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    ledger = Ledger(storage, lambda: now[0])
    kept = commit(ledger, ["a"])
    old = ledger.begin(["b"])
    ledger._write_part(old, "pages", PAGES.empty_table())
    now[0] += timedelta(hours=2)
    young = ledger.begin(["c"])
    ledger._write_part(young, "pages", PAGES.empty_table())
    assert ledger.sweep() == 1
    assert {name.rsplit("/", 1)[-1] for name in storage.list(PARTS)} == {f"{kept}.parquet", f"{young}.parquet"}


def test_a_commit_whose_part_was_swept_away_counts_for_nothing(storage: Storage) -> None:
    writer = Ledger(storage)
    lost = commit(writer, ["a"])
    storage.delete(f"{PARTS}/pages/{lost}.parquet")
    ledger = Ledger(storage)
    assert "a" not in ledger.committed_records()
    assert ledger.broken == [lost]
    ledger.sweep()
    assert storage.list(COMMITS) == []


def test_a_call_that_hung_longer_than_a_sweep_waits_does_not_commit(storage: Storage) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    ledger = Ledger(storage, lambda: now[0])
    part_id = ledger.begin(["a"])
    now[0] += timedelta(hours=1)
    with pytest.raises(TransientError, match="too long"):
        ledger.commit(part_id, {}, run_id="r", records={"u": ["a"]}, statuses={"u": ["success"]})
    assert storage.list(COMMITS) == []


def test_a_status_outside_the_vocabulary_is_never_committed(storage: Storage) -> None:
    ledger = Ledger(storage)
    with pytest.raises(ContractError, match="'fine'"):
        ledger.commit(ledger.begin(["a"]), {}, run_id="r", records={"u": ["a"]}, statuses={"u": ["fine"]})
    assert storage.list() == []


def test_a_damaged_commit_record_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match=r"ledger/commits/x\.json"):
        parse_commit("ledger/commits/x.json", b'{"part_id": 3}')


def test_a_hundred_thousand_keys_keep_their_commit_and_state() -> None:
    ranks = [(0, f"{number:03d}", "p") for number in range(300)]
    index = KeyIndex(ranks)
    keys = [f"key {number}" for number in range(100_000)]
    for place, key in enumerate(keys):
        index.add(key, 299 - place % 300, place % 8)
    for place in range(0, 100_000, 7):
        index.add(keys[place], 0, 9)
    commits, states = index.lookup([*keys, "absent"])
    assert len(index) == 100_000
    assert commits[-1] == states[-1] == -1
    again = np.arange(100_000) % 7 == 0
    assert (commits[:-1][again] == 0).all()
    assert (commits[:-1][~again] == 299 - np.flatnonzero(~again) % 300).all()
    assert (states[:-1][~again] == np.flatnonzero(~again) % 8).all()


def test_a_key_set_knows_what_was_new() -> None:
    keys = KeySet()
    assert keys.add_all(["a", "b", "a"]).tolist() == [True, True, False]
    many = [str(number) for number in range(70_000)]
    assert keys.add_all(many).all()
    assert not keys.add_all(many).any()
    assert keys.contains(["a", "5", "z"]).tolist() == [True, True, False]
    assert len(keys) == 70_002


def test_a_second_driver_is_refused_until_the_first_gives_the_run_back(storage: Storage) -> None:
    clock = SteppingClock()
    with Lease(storage, clock, beat_seconds=0), pytest.raises(ConfigError, match="is being worked on"):
        Lease(storage, clock).acquire()
    with Lease(storage, clock, beat_seconds=0):
        assert len(storage.list(LEASES)) == 1


def test_a_silent_lease_of_another_machine_is_taken_over_and_its_holder_notices(storage: Storage) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    first = Lease(storage, lambda: now[0], beat_seconds=0)
    first.acquire()
    now[0] += timedelta(seconds=80)
    first.beat()
    now[0] += timedelta(seconds=80)
    second = Lease(storage, lambda: now[0], beat_seconds=0)
    with pytest.raises(ConfigError):
        second.acquire()
    now[0] += timedelta(seconds=20)
    second.acquire()
    first.beat()
    with pytest.raises(ConfigError, match="taken over"):
        first.check()
    second.beat()
    second.check()
    first.release()
    second.check()


def start_holder(storage: Storage, then: str) -> subprocess.Popen[str]:
    """Start a process that takes the run, says so, and goes on with `then`."""
    code = (
        "import os, signal, sys, time; from pipeline.lease import Lease; from pipeline.commits import utc_now;"
        "from pipeline.storage import Storage;"
        f"Lease(Storage(sys.argv[1]), utc_now).acquire(); print(os.getpid(), flush=True); {then}"
    )
    root = Path(__file__).resolve().parents[2]
    holder = subprocess.Popen([sys.executable, "-c", code, storage.uri], cwd=root, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == str(holder.pid)
    return holder


def test_a_process_that_was_killed_and_is_not_yet_buried_holds_no_lease(storage: Storage) -> None:
    holder = start_holder(storage, "os._exit(1)")
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{holder.pid}/stat").exists()
    with Lease(storage, lambda: datetime.now(UTC)) as lease:
        lease.check()
    holder.communicate()


def test_a_process_that_is_about_to_go_is_waited_for_and_one_that_stays_is_not(storage: Storage) -> None:
    stays = start_holder(storage, "time.sleep(600)")
    try:
        with pytest.raises(ConfigError, match=f"is being worked on by process {stays.pid}"):
            Lease(storage, lambda: datetime.now(UTC)).acquire()
        threading.Timer(0.5, stays.kill).start()
        with Lease(storage, lambda: datetime.now(UTC)) as lease:
            lease.check()
    finally:
        stays.kill()
        stays.communicate()


def test_the_lease_of_a_process_that_is_gone_from_this_machine_is_free_at_once(storage: Storage) -> None:
    start_holder(storage, "os._exit(1)").communicate(timeout=60)
    [name] = storage.list(LEASES)
    assert json.loads(storage.get(name))["pid"] != os.getpid()
    with Lease(storage, lambda: datetime.now(UTC)) as lease:
        lease.check()


def test_the_lease_beats_by_itself(storage: Storage) -> None:
    with Lease(storage, SteppingClock(), beat_seconds=0.01) as lease:
        [name] = storage.list(LEASES)
        first = storage.get(name)
        for _ in range(1000):
            if storage.get(name) != first:
                break
            lease._stop.wait(0.01)
        assert storage.get(name) != first


class BreakingClock(SteppingClock):
    """A clock that breaks once, with an error that no library announces."""

    broke = False

    def __call__(self) -> datetime:
        if threading.current_thread().name == "lease" and not self.broke:
            self.broke = True
            raise RuntimeError
        return super().__call__()


def test_beats_go_on_after_any_error(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    clock = BreakingClock()
    with Lease(storage, clock, beat_seconds=0.01) as lease:
        [name] = storage.list(LEASES)
        first = storage.get(name)
        for _ in range(1000):
            if storage.get(name) != first:
                break
            lease._stop.wait(0.01)
        assert clock.broke
        assert storage.get(name) != first
    assert "no beat this time: RuntimeError" in caplog.text


def test_a_beat_of_a_clock_that_runs_hours_behind_is_a_sign_of_life(storage: Storage) -> None:
    behind = SteppingClock()
    behind.now -= timedelta(hours=5)
    with Lease(storage, behind, beat_seconds=0.02):
        late = Lease(storage, SteppingClock(), beat_seconds=0.2)
        with pytest.raises(ConfigError, match="is being worked on"):
            late.acquire()


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_holder_whose_clock_was_far_off_does_not_keep_a_run_for_hours(storage: Storage, hours: int) -> None:
    off = SteppingClock()
    off.now += timedelta(hours=hours)
    silent = Lease(storage, off, beat_seconds=0)
    silent.acquire()
    other = Lease(storage, SteppingClock(), beat_seconds=0)
    other.acquire()
    with pytest.raises(ConfigError, match="taken over"):
        silent.confirm()
