"""What goes on beside a run that uses a ledger: others compact it, give to it, and take its lease."""

import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.ledger import current
from operators.archives import Contents, Member
from operators.base import rows_to_table
from operators.probe import ProbeConfig
from pipeline import run
from pipeline.answers import AnswerIndex
from pipeline.commits import COMMITS, PARTS, utc_now
from pipeline.compact import compact
from pipeline.give import Giver
from pipeline.known_archives import KnownArchives
from pipeline.lease import LEASES, Lease
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS
from pipeline.plan import write_plan_part
from pipeline.runfile import read_run_file
from pipeline.shared_ledger import SharedLedger, held, shared_ledger
from pipeline.sink import WriteRecords, WriteRecordsConfig
from pipeline.spec import make_spec
from pipeline.storage import TEMPORARY_PREFIX, Storage
from pipeline.take_over import Copier
from pipeline.verify import inspect
from schemas.errors import ConfigError
from schemas.generation import KEPT_ANSWER
from tests.pipeline.made_rows import (
    document_unit,
    failed_unit,
    records_of,
    records_table,
    source,
    sources_table,
    units_table,
)
from tests.pipeline.test_nightly import write_archives
from tests.pipeline.test_shared_ledger import DISTINCT, compute, plan, take_over

TEMPLATE = "pagereel ocr {source} {part} -o repro"


def given(root: str, run_name: str = "1", probe: str | None = "probe") -> SharedLedger:
    """Return a ledger to which a run gave everything."""
    plan(f"{root}/{run_name}")
    compute(f"{root}/{run_name}")
    shared = SharedLedger(f"{root}/ledger")
    shared.give(Storage(f"{root}/{run_name}"), f"{root}/{run_name}", run_name, probe)
    return shared


def rewrite(root: str) -> None:
    """Compact a ledger of large and small commits, and remove what was before at once."""
    with held(Storage(f"{root}/ledger"), removes_at_once=True) as ledger:
        assert compact(ledger, "compact").commits_after < 2


def test_a_run_takes_over_what_was_compacted_since_it_listed_its_inputs(root: str) -> None:
    given(root)
    reader = SharedLedger(f"{root}/ledger")
    reader.known_sources("probe", retry_failed=False)
    rewrite(root)
    plan(f"{root}/2")
    assert take_over(reader, f"{root}/2") == DISTINCT
    assert inspect(Storage(f"{root}/2"), verify=True).problems == []


def test_records_whose_rows_are_gone_are_neither_taken_over_nor_given(root: str) -> None:
    shared = given(root)
    committed = shared.ledger.committed_records()
    units = units_table([document_unit(0, [1, 2, 3])])
    keys = units["record_keys"].to_pylist()[0]
    outcomes = committed.outcomes_of(keys)
    assert [outcome.failed for outcome in outcomes] == [True, False, False]
    copied = Ledger(Storage(f"{root}/2"))
    plain = [name for name in shared.storage.list(PARTS) if "/pages/" in name]
    errors = [name for name in shared.storage.list(PARTS) if "/errors/" in name]
    for gone, left in ((errors, 2), (plain, 0)):
        for name in gone:
            shared.storage.delete(name)
        copier = Copier(shared.storage, copied, "second", TEMPLATE, 0)
        copier.add(_planned(root, units), outcomes)
        copier.flush()
        assert copier.count == left
    assert inspect(Storage(f"{root}/2"), verify=True).problems == []

    # The ledger is now a run whose parts are gone, and gives what is whole.
    target = Ledger(Storage(f"{root}/other"))
    stale = Giver(target, shared.ledger, "r", "run")
    with Lease(Storage(f"{root}/other"), utc_now, beat_seconds=0) as lease:
        plan(f"{root}/ledger")
        assert stale.records(lease) == 2
    assert inspect(Storage(f"{root}/other"), verify=True).problems == []


def _planned(root: str, units):
    """Return units as they are planned."""
    from pipeline.plan import PlanReader

    listed = [source(row["source_index"], source_uri=row["source_uri"]) for row in units.to_pylist()]
    write_plan_part(Storage(f"{root}/2"), units, sources_table(listed), "s")
    [table] = PlanReader(Storage(f"{root}/2"))
    return table


def test_a_success_takes_the_place_of_a_failure_that_was_given_after_it(root: str) -> None:
    plan(f"{root}/good")
    good = WriteRecords(WriteRecordsConfig(run_uri=f"{root}/good", run_id="good"))
    good(records_table(records_of(document_unit(0, [1, 2, 3]))))
    shared = given(root, "bad")
    assert shared.give(Storage(f"{root}/good"), "good", "good", None).records == 1
    plan(f"{root}/3")
    assert take_over(shared, f"{root}/3") == DISTINCT
    assert Ledger(Storage(f"{root}/3")).committed_records().status_counts() == {"success": DISTINCT}


def test_a_source_is_known_as_the_latest_rules_and_a_later_success_found_it(root: str) -> None:
    def found(name: str, unit, probe: str) -> None:
        listed = sources_table([source(0, source_uri="/in/a.pdf", size_bytes=7, version_tag="1")])
        write_plan_part(Storage(f"{root}/{name}"), units_table([unit]), listed, "s")
        shared = SharedLedger(f"{root}/ledger")
        sources.append(shared.give(Storage(f"{root}/{name}"), name, name, probe).sources)

    def known(probe: str):
        config = ProbeConfig(task="ocr", page_settings="p", segment_settings="s")
        listed = sources_table([source(0, source_uri="/in/a.pdf", size_bytes=7, version_tag="1")])
        split = SharedLedger(f"{root}/ledger").known_sources(probe, retry_failed=False).split(listed, config)
        return {unit["error"] is None for unit in split.units.to_pylist()}

    sources: list[int] = []
    bad = failed_unit(0, "damaged") | {"source_uri": "/in/a.pdf"}
    good = document_unit(0, [1]) | {"source_uri": "/in/a.pdf"}
    found("1", bad, "old")
    assert (known("old"), known("new")) == ({False}, set())
    found("2", good, "old")
    assert (known("old"), known("new")) == ({True}, set())
    found("3", bad, "old")
    assert known("old") == {True}, "a failure says less than the success of the same bytes"
    found("4", good, "new")
    assert known("new") == {True}
    found("5", good, "new")
    assert sources == [1, 1, 0, 1, 0]


def answers_part(ledger: Ledger, answers: dict[str, tuple[str, datetime]], **changes) -> str:
    rows = [
        {"content_key": key, "completion": text, "kept_at": moment} | changes for key, (text, moment) in answers.items()
    ]
    part_id = ledger.begin(sorted(answers))
    ledger.commit(part_id, {ANSWERS: rows_to_table(rows, KEPT_ANSWER)}, run_id="r", records={}, statuses={})
    return part_id


def test_of_several_answers_the_one_that_was_kept_last_counts_wherever_it_lies(root: str, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.answers.WHOLE_PART_BYTES", 10_000)
    day = datetime(2026, 11, 1, tzinfo=UTC)
    ledger = Ledger(Storage(f"{root}/ledger"))
    noise = os.urandom(30_000).hex()
    answers_part(ledger, {"a": ("first", day), "b": ("last", day + timedelta(days=9))})
    answers_part(ledger, {"a": ("second", day + timedelta(days=1)), "b": ("early", day)}, doc_id=noise)
    answers_part(ledger, {"a": ("last", day + timedelta(days=2)), "c": ("only", day)})
    answers_part(ledger, {"a": ("old, given late", day - timedelta(days=1))})

    def newest(since: datetime | None = None) -> dict[str, str]:
        now = Ledger(Storage(f"{root}/ledger"))
        index = AnswerIndex((f"{root}/ledger",), since)
        found = {}
        for key in "abc":
            place = index.place_of(key)
            if place is not None:
                rows = now.read_part(ANSWERS, place.part_id, KEPT_ANSWER).to_pylist()
                [found[key]] = [row["completion"] for row in rows if row["content_key"] == key]
        return found

    wanted = {"a": "last", "b": "last", "c": "only"}
    assert newest() == wanted
    assert newest(day + timedelta(days=3)) == {"b": "last"}
    compact(Ledger(Storage(f"{root}/ledger")), "compact")
    [commit] = Ledger(Storage(f"{root}/ledger")).commits()
    assert commit.parts[0].rows == 3
    assert newest() == wanted


def test_drivers_that_take_a_lease_from_each_other_never_hold_it_together(tmp_path) -> None:
    storage, holding, seen, surprises = Storage(str(tmp_path)), [], [], []

    def take() -> None:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                with Lease(storage, utc_now, beat_seconds=0):
                    holding.append(1)
                    seen.append(len(holding))
                    holding.pop()
            except ConfigError:
                pass
            except Exception as error:  # noqa: BLE001
                surprises.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert surprises == []
    assert len(seen) > 10
    assert set(seen) == {1}


class Slow(Storage):
    """A driver that stands still between its look and its claim, while two others come and go."""

    is_waiting = True

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.is_waiting:
            self.is_waiting = False
            for _ in range(2):
                Lease(Storage(self.uri), utc_now, beat_seconds=0).acquire()
                [newest] = Storage(self.uri).list(LEASES)[-1:]
                holder = Storage(self.uri).get(newest).replace(b'"released": false', b'"released": true')
                Storage(self.uri).put(newest, holder)
        return super().put_if_absent(name, data)


def test_a_driver_that_comes_late_does_not_believe_in_a_generation_that_is_gone(tmp_path) -> None:
    Lease(Storage(str(tmp_path)), utc_now, beat_seconds=0).__enter__().release()
    with pytest.raises(ConfigError, match="another driver"):
        Lease(Slow(str(tmp_path)), utc_now, beat_seconds=0).acquire()
    assert len(Storage(str(tmp_path)).list(LEASES)) == 1


def test_a_ledger_keeps_no_secret_of_the_address_of_an_archive(root: str) -> None:
    own = Ledger(Storage(f"{root}/run"))
    known = KnownArchives(own, "r")
    archive = {
        "source_uri": "https://me:hunter2@h.example/a.zip?X-Amz-Signature=SECRETSIG",
        "size_bytes": 9,
        "version_tag": "1",
    }
    known.learn(archive, Contents(members={"a.pdf": Member("a.pdf", 3)}))
    known.flush()
    data = b"".join(own.storage.get(name) for name in [*own.storage.list(PARTS), *own.storage.list(COMMITS)])
    assert b"hunter2" not in data
    assert b"SECRETSIG" not in data
    again = KnownArchives(own, "r").contents(archive)
    assert again is not None
    assert list(again.members) == ["a.pdf"]


def test_what_could_not_be_listed_leaves_no_trace_once_it_can(tmp_path) -> None:
    folder = tmp_path / "in"
    write_archives(folder, "Pack my box. ")
    data = (folder / "b.tar.gz").read_bytes()
    (folder / "b.tar.gz").write_bytes(data[:40])
    options = {"task": "ocr", "engine": "cpu", "local": True, "output": str(tmp_path / "run")}
    first = run(**options, inputs=[str(folder)])
    assert (first.failed_sources, first.pages) == (1, 1)
    (folder / "b.tar.gz").write_bytes(data)
    elsewhere = run(**options, inputs=[str(folder / "a.zip")])
    assert elsewhere.failed_sources == 1, "nobody looked at the other archive"
    for _ in range(2):
        run(**options, inputs=[str(folder)])
        again = run(**options, inputs=[str(folder)])
        assert (again.failed_sources, again.complete) == (0, True)
    assert pq.read_table(tmp_path / "run" / "errors").num_rows == 0
    members = [row["source_ref"]["member"] for row in pq.read_table(tmp_path / "run" / "documents").to_pylist()]
    assert sorted(members) == ["deep/page.pdf", "page.pdf"]


def test_the_run_folder_is_no_ledger_however_it_is_spelled(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "r")
    wanted = {"task": "ocr", "inputs": ["-"], "output": "r"}
    for ledger in ("./r", "r/", str(tmp_path / "r"), f"file://{tmp_path}/r", "link", "", " "):
        with pytest.raises(ConfigError, match=r"--ledger is (the run folder itself|empty)"):
            shared_ledger(make_spec(wanted | {"ledger": ledger}))
    assert shared_ledger(make_spec(wanted | {"ledger": "r2"})) is not None


def test_a_sweep_removes_what_killed_writers_left_long_ago(tmp_path) -> None:
    ledger = Ledger(Storage(str(tmp_path)))
    old, new = (tmp_path / "ledger" / "parts" / f"{TEMPORARY_PREFIX}{name}" for name in ("old", "new"))
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert ledger.sweep(grace_seconds=3600) == 1
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("content", ["[]", '{"run_id": "r"}', "{"])
def test_the_run_file_of_another_tool_is_refused_in_one_line(tmp_path, content) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="use another output folder"):
        read_run_file(Storage(str(tmp_path)))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path) -> None:
    answers_part(Ledger(Storage(str(tmp_path))), {"a": ("text", datetime(2026, 11, 1, tzinfo=UTC))})
    with pytest.raises(ConfigError, match="cannot be written"):
        current(str(tmp_path), output=str(tmp_path / "no" / "such.parquet"))


def test_a_live_lease_is_not_taken_by_a_machine_of_the_same_name(tmp_path, monkeypatch) -> None:
    storage = Storage(str(tmp_path))
    with Lease(storage, utc_now, beat_seconds=0):
        [name] = storage.list(LEASES)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        other_boot = storage.get(name).replace(boot_id.encode(), str(uuid.uuid4()).encode())
        storage.put(name, other_boot)
        # No process of this number and start is on the machine that looks.
        monkeypatch.setattr("pipeline.lease._process_start", lambda pid: "")
        with pytest.raises(ConfigError, match="is being worked on"):
            Lease(storage, utc_now, beat_seconds=0).acquire()
        storage.put(name, other_boot.replace(b'"released": false', b'"released": true'))


@pytest.mark.parametrize("ledger", ["", "run"], ids=["no name", "the run folder"])
def test_a_command_that_is_refused_for_its_ledger_leaves_no_folder(tmp_path, ledger) -> None:
    (tmp_path / "in").mkdir()
    output = str(tmp_path / "run")
    with pytest.raises(ConfigError, match="--ledger is"):
        run(task="ocr", inputs=[str(tmp_path / "in")], output=output, local=True, ledger=ledger and output)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
