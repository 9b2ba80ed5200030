"""The main phase of a call: everything that is owed is brought to a row, first from what is known, then by the flow."""

import math
import time
from typing import Any, Final

import pyarrow as pa

from pipeline.answers import AnswerIndex, FindAnswersConfig
from pipeline.call import Call
from pipeline.committed import Again
from pipeline.flow import DOCUMENT_HEAD, HEADS, VIDEO_HEAD, head_of, record_flow
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.plan import PlanReader, as_units, count_owed, count_plan, owed_units, unit_blocks, unit_keys
from pipeline.second_look import FirstLooks, in_words, second_look
from pipeline.shared import Shared
from pipeline.sink import TOKEN_COLUMNS
from pipeline.strikes import Strikes
from schemas.errors import CATEGORY_OF_CODE, ServiceLostError, TransientError, WorkersBrokenError

MOST_ATTEMPTS: Final = 3
"""Attempts in a row without a new commit after which a run gives up, incomplete."""

MOST_BLOCKS: Final = 20_000
"""Tasks of the first step: each costs the driver about 10 ms (measured), so units are grouped beyond this."""

RECORDS_PER_BLOCK: Final = {DOCUMENT_HEAD: 10, VIDEO_HEAD: 2}
"""Records of small sources that go through the first step together: as many as a unit of a large one has."""

BLOCKS_PER_WORKER: Final = 8


class Owed:
    """What a call owes, until it does not any more.

    Args:
        call: whose.
        intake: what was listed.

    Attributes:
        counts: of the plan.
    """

    def __init__(self, call: Call, intake: Intake) -> None:
        self.call = call
        self.intake = intake
        self.counts = count_plan(PlanReader(call.storage))
        self._ledger = Ledger(call.storage)
        self._committed = self._ledger.committed_records()
        self._again: Again | None = None
        self._second_pass: int | None = None
        self._strikes: Shared | None = None
        self._count = 0

    def run(self) -> None:
        """Look at everything that is owed a first look, then once more at what that has left to a second.

        Raises:
            TransientError: attempts end and nothing that is owed comes out of them.
        """
        call, committed = self.call, self._committed
        call.progress.planned = self.counts.records
        call.progress.failed_sources = self.counts.failed_sources
        if call.spec.retry_failed or committed.retryable_count():
            # What failed for a passing reason is owed again on every call, once; the rest only when asked for.
            self._again = Again(only_retryable=not call.spec.retry_failed, pass_index=committed.last_pass() + 1)
        owed = count_owed(PlanReader(call.storage), committed, self._again)
        call.progress.resumed = self.counts.records - owed
        if owed:
            self._take_over()
            owed -= call.progress.ledger_hits
        if not owed:
            return
        self._count = owed
        self._look()
        due = owed_units(PlanReader(call.storage), committed, second_look=True)
        waiting = sum(len(unit_keys(table)) for table in due)
        looks = second_look(call.spec, call.reading)
        if waiting and looks:
            call.observer.note(f"shown to the model once more, with {in_words(looks)}: {waiting} on which it failed")
            self._second_pass = committed.last_pass() + 1
            self._look()

    def _take_over(self) -> None:
        """Copy what is owed and lies in the shared ledger."""
        call = self.call
        if call.shared is None:
            return
        began = time.perf_counter()
        call.progress.ledger_hits = call.shared.take_over(
            call.storage,
            lambda: owed_units(PlanReader(call.storage), self._committed, self._again),
            call.run_id,
            repro_template=call.spec.repro_template(),
            retry_failed=call.spec.retry_failed,
            pass_index=self._again.pass_index if self._again else 0,
        )
        self._ledger.refresh()
        call.seconds["take_over"] = time.perf_counter() - began

    def _look(self) -> None:
        """Run the flow over what is owed this look, again after a failed attempt, until nothing is.

        Raises:
            TransientError: attempts end and nothing that is owed comes out of them.
        """
        stalled, owed_before, failure, waits = 0, math.inf, None, True
        while True:
            units, owed = self._units()
            if not owed:
                return
            stalled = 0 if owed < owed_before else stalled + 1
            if stalled and failure is None:
                raise TransientError(f"the flow ended, and {owed} records that were owed did not come out of it")
            if stalled >= MOST_ATTEMPTS:
                raise TransientError(f"{MOST_ATTEMPTS} attempts ended without a new row: {failure}") from failure
            if failure is not None:
                self.call.observer.note(f"the flow broke off and is started again over what is owed: {failure}")
            owed_before = owed
            try:
                self._attempt(units, waits=waits)
                # What waited for another's answer has it now, or asks itself.
                failure, waits = None, False
            except (ServiceLostError, WorkersBrokenError):
                # Waited for long enough, and tried often enough, where the work is done.
                raise
            except TransientError as error:
                failure = error
            self._ledger.refresh()

    def _units(self) -> tuple[dict[str, list[Any]], int]:
        """Return the owed units of each head, held by the executor, and the number of owed records."""
        call = self.call
        per_block = max(1, -(-self.counts.units // MOST_BLOCKS))
        owed = 0
        units: dict[str, list[Any]] = {}
        is_second = self._second_pass is not None
        first_looks = FirstLooks(call.storage, self._committed) if is_second else None
        for table in owed_units(PlanReader(call.storage), self._committed, self._again, second_look=is_second):
            keys = unit_keys(table)
            survived = first_looks.failures(keys) if first_looks else None
            ready = as_units(table, self.intake.passwords, self.intake.addresses, survived)
            owed += len(keys)
            if not units:
                call.start()
            # Small sources go together, as long as every worker has some.
            share = self._count // (BLOCKS_PER_WORKER * call.executor.worker_count)
            for name in HEADS:
                mine = ready.filter(pa.array([head_of(kind) == name for kind in ready["kind"].to_pylist()]))
                blocks = unit_blocks(mine, per_block, min(share, RECORDS_PER_BLOCK[name]))
                units.setdefault(name, []).extend(call.executor.hold(block) for block in blocks)
        return units, owed

    def _attempt(self, units: dict[str, list[Any]], *, waits: bool) -> None:
        call = self.call
        call.phase("run")
        began = time.perf_counter()
        done_before = call.progress.run_seconds
        uris = (call.spec.output, *([call.shared.uri] if call.shared else []))
        # What is to be tried again must not meet its own earlier answer.
        since = call.started_at if call.spec.retry_failed else None
        answers = call.executor.share(AnswerIndex, uris, since)
        config = call.flow_config(
            has_videos=bool(self.counts.records_by_kind["video"]),
            pass_index=self._second_pass or (self._again.pass_index if self._again else 0),
            is_second_look=self._second_pass is not None,
            find=FindAnswersConfig(uris=uris, index=answers, waits=waits),
        )
        try:
            for table in call.executor.run(record_flow(config), units, self._counted_deaths()):
                call.lease.check()
                self._add(table)
                call.progress.run_seconds = done_before + time.perf_counter() - began
        finally:
            answers.close()
            call.progress.run_seconds = done_before + time.perf_counter() - began
            call.seconds["run"] = call.progress.run_seconds
            call.progress.steps = call.executor.steps()

    def _counted_deaths(self) -> Shared:
        """Return what counts the deaths of workers, one for all attempts of this call."""
        if self._strikes is None:
            self._strikes = self.call.executor.share(Strikes, self.call.spec.output)
            if self.call.spec.retry_failed:
                self._strikes.call("pardon")
        return self._strikes

    def _add(self, table: pa.Table) -> None:
        """Count rows that came out of the flow."""
        progress = self.call.progress
        for row in table.to_pylist():
            for name in TOKEN_COLUMNS:
                setattr(progress, name, getattr(progress, name) + (row[name] or 0))
            if row["needs_second_look"]:
                continue
            progress.known_answers += bool(row["ledger_hit"])
            progress.statuses[row["status"]] += 1
            progress.segments += row["kind"] == "video"
            progress.pages += row["kind"] != "video"
            progress.frames += row["frame_count_sampled"] or 0
            if row["error_code"]:
                progress.errors[CATEGORY_OF_CODE[row["error_code"]]] += 1
