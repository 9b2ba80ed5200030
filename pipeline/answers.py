"""Answers that were given before: what a model would see again is not shown to it again.

The content key of a record stands for the pixels, the prompt, the model and how it writes. Before a record goes to the
model, an index is asked for its key. It knows the answers that are committed, in the run and in a ledger that it
shares, and which keys a record of this attempt already asks about: a second record that shows the same leaves the flow,
stays owed, and takes the answer in the next round.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from operators.base import Operator, OperatorConfig, rows_to_table, with_columns
from pipeline.commits import conformed, part_path, utc_now
from pipeline.key_index import KEY_BYTES, SourceIndex, short_key
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS
from pipeline.storage import Storage
from schemas.errors import TransientError
from schemas.generation import GENERATION, KEPT_ANSWER, RECORD, RESULT

logger = logging.getLogger(__name__)

ROUTES: Final = ("model", "cpu")
MODEL_STEPS: Final = ("Generate", "AskEndpoint")
"""Components whose failures belong to an answer of a model; others are of the page, or of how it was judged."""

WHOLE_PART_BYTES: Final = 4 * 2**20
"""Of a larger part only the column of keys is fetched."""

_RESULT_NAMES: Final = tuple(name for name in RESULT.names if name in KEPT_ANSWER.names)
_FILLED: Final = (*GENERATION.names, *_RESULT_NAMES)

ANSWER_KEY: Final = pa.schema([KEPT_ANSWER.field(name) for name in ("content_key", "kept_at")])
TIME_BYTES: Final = 8
PARTS_KEPT: Final = 8
PARTS_AT_ONCE: Final = 500


class Where(NamedTuple):
    """What is known of a content key.

    Attributes:
        state: `known`: the answer lies in a part; `new`: whoever asked computes it; `promised`: another record does.
        store: which of the stores.
        part_id: which part.
    """

    state: Literal["known", "new", "promised"]
    store: int = 0
    part_id: str = ""


class AnswerIndex:
    """Where the newest answer to each content key lies: about 40 bytes a key. One for all workers of an attempt.

    Args:
        uris: the run, then the ledger that it shares, if any.
        since: what was answered before is not known.
    """

    def __init__(self, uris: Sequence[str], since: datetime | None = None) -> None:
        self._places: list[tuple[int, str]] = []
        # The version of a key is the time of its answer.
        self._index = SourceIndex()
        self._asked: dict[bytes, bytes] = {}
        self._since = microseconds(since)
        for store, uri in enumerate(uris):
            self.read(Ledger(Storage(uri)), store)

    def read(self, ledger: Ledger, store: int = 0) -> None:
        """Take in the committed answers of a ledger."""
        for part_id, keys, times in answer_keys(ledger):
            self._add(store, part_id, keys, times)

    def __len__(self) -> int:
        return len(self._index)

    def place_of(self, content_key: str) -> Where | None:
        """Return where the answer to a key lies, None where there is none."""
        entry = self._index.get(short_key(content_key))
        return None if entry is None else Where("known", *self._places[entry[0]])

    def kept_at(self, content_key: str) -> int:
        """Return when the answer to a key was given, in microseconds; below 0 where there is none."""
        entry = self._index.get(short_key(content_key))
        return -1 if entry is None else _time_of(entry[1])

    def find(self, content_keys: Sequence[str], record_keys: Sequence[str]) -> list[Where]:
        """Return what is known of each key; a key that nobody asked about is from now on asked by its record."""
        return [self._find(key, owner) for key, owner in zip(content_keys, record_keys, strict=True)]

    def note(self, part_id: str, content_keys: Sequence[str]) -> None:
        """Take in the answers of a part of the run that was committed just now."""
        self._add(0, part_id, content_keys, [microseconds(utc_now())] * len(content_keys))
        for key in content_keys:
            self._asked.pop(short_key(key), None)

    def _find(self, content_key: str, record_key: str) -> Where:
        place = self.place_of(content_key)
        if place is not None:
            return place
        owner = short_key(record_key)
        return Where("new" if self._asked.setdefault(short_key(content_key), owner) == owner else "promised")

    def _add(self, store: int, part_id: str, content_keys: Sequence[str], times: Sequence[int]) -> None:
        number = len(self._places)
        self._places.append((store, part_id))
        for content_key, time in zip(content_keys, times, strict=True):
            key = short_key(content_key)
            known = self._index.get(key)
            if time >= self._since and (known is None or _time_of(known[1]) < time):
                self._index.put(key, number, time.to_bytes(TIME_BYTES, "big").ljust(KEY_BYTES, b"\1"))


def microseconds(moment: datetime | None) -> int:
    """Return a time as a number, 0 for none."""
    return 0 if moment is None else int(moment.timestamp() * 1_000_000)


def _time_of(version: bytes) -> int:
    return int.from_bytes(version[:TIME_BYTES], "big")


def answer_keys(ledger: Ledger) -> Iterator[tuple[str, list[str], list[int]]]:
    """Yield the id of each committed part with answers, their content keys, and when they were kept, as numbers."""
    commits = ledger.commits()
    found = [(commit.part_id, file.bytes) for commit in commits for file in commit.parts if file.table == ANSWERS]
    small = [part_id for part_id, size in found if size <= WHOLE_PART_BYTES]
    for start in range(0, len(small), PARTS_AT_ONCE):
        chunk = small[start : start + PARTS_AT_ONCE]
        names = [part_path(ANSWERS, part_id) for part_id in chunk]
        for part_id, data in zip(chunk, ledger.storage.get_many(names), strict=True):
            if data is not None:
                yield part_id, *_keys_and_times(pq.ParquetFile(pa.BufferReader(data)))
    for part_id in (part_id for part_id, size in found if size > WHOLE_PART_BYTES):
        with ledger.storage.open_input(part_path(ANSWERS, part_id), ranges=True) as file:
            yield part_id, *_keys_and_times(pq.ParquetFile(file))


def _keys_and_times(part: pq.ParquetFile) -> tuple[list[str], list[int]]:
    table = conformed(part.read(columns=ANSWER_KEY.names, use_threads=False), ANSWER_KEY)
    times = table["kept_at"].cast(pa.int64()).fill_null(0)
    return table["content_key"].to_pylist(), times.to_pylist()


class FindAnswersConfig(OperatorConfig):
    """Where answers are kept."""

    uris: Annotated[tuple[str, ...], Field(min_length=1, description="The run, then the ledger that it shares.")]
    index: Annotated[Any, Field(description="An `AnswerIndex` over them, shared by all workers.")]
    waits: Annotated[
        bool, Field(description="True lets a record leave the flow, still owed, whose answer another one fetches.")
    ] = True


class FindAnswers(Operator[FindAnswersConfig]):
    """Fill in the answers that were given before to what a record shows, and mark it; others pass untouched.

    A record that shows what another one of this attempt asks about is left out, where the config says so.
    """

    reads: ClassVar[pa.Schema] = pa.schema(
        [RECORD.field(name) for name in ("record_key", "content_key", "route", "status", "error", "recovered")]
    )
    adds: ClassVar[pa.Schema] = pa.schema([RECORD.field(name) for name in (*_FILLED, "recovered", "ledger_hit")])
    expands: ClassVar[bool] = True

    def __init__(self, config: FindAnswersConfig) -> None:
        super().__init__(config)
        self._parts = _AnswerParts(config.uris)

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the records of `table` that are answered, or go on to be."""
        rows = table.select(self.reads.names).to_pylist()
        asking = [place for place, row in enumerate(rows) if _asks(row)]
        where = self.config.index.call(
            "find", [rows[place]["content_key"] for place in asking], [rows[place]["record_key"] for place in asking]
        )
        found: dict[int, dict[str, Any]] = {}
        left_out: set[int] = set()
        for place, answer in zip(asking, where, strict=True):
            kept = self._parts.answer(answer, rows[place]["content_key"]) if answer.state == "known" else None
            if kept is not None:
                found[place] = kept
            elif answer.state == "promised" and self.config.waits:
                left_out.add(place)
        if found:
            table = _filled(table, found)
        if left_out:
            table = table.take(pa.array([place for place in range(len(rows)) if place not in left_out], pa.int64()))
        if table.num_rows:
            yield table


def kept_answers(records: Sequence[Mapping[str, Any]], now: datetime) -> pa.Table:
    """Return the KEPT_ANSWER rows of finished records that were asked just now, good answers and bad, each key once."""
    kept = {row["content_key"]: row | {"kept_at": now} for row in map(_kept, records) if row is not None}
    return rows_to_table(list(kept.values()), KEPT_ANSWER)


def _kept(record: Mapping[str, Any]) -> dict[str, Any] | None:
    if record["content_key"] is None or record["ledger_hit"]:
        return None
    shared: dict[str, Any] = {name: record[name] for name in ("content_key", "record_key", "doc_id", *GENERATION.names)}
    failures = record["recovered"] or ()
    if record["answered_by"] is not None and record["completion"] is not None:
        return {**shared, **record["answered_by"], "lost": _lost(record["attempt"], failures)}
    if record["route"] == "cpu" and record["rung"] is None and record["error"] is None:
        lost = [failure for failure in failures if failure["component"] == "ReadPages"]
        return shared | {name: record[name] for name in _RESULT_NAMES} | {"lost": lost}
    return None


def _lost(attempt: int | None, failures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the failures of the attempts right before one, at the same pixels."""
    of_model = {failure["attempt"]: failure for failure in failures if failure["component"] in MODEL_STEPS}
    number = (attempt or 1) - 1
    while number in of_model:
        number -= 1
    return [of_model[count] for count in range(number + 1, attempt or 1)]


def _asks(row: Mapping[str, Any]) -> bool:
    return row["route"] in ROUTES and row["error"] is None and row["status"] is None and row["content_key"] is not None


def _filled(table: pa.Table, found: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    for name in _FILLED:
        values = table[name].to_pylist()
        for place, answer in found.items():
            values[place] = answer[name]
        columns[name] = values
    recovered, hits = table["recovered"].to_pylist(), table["ledger_hit"].to_pylist()
    for place, answer in found.items():
        recovered[place] = [*(recovered[place] or ()), *(answer["lost"] or ())] or None
        hits[place] = True
    return with_columns(table, columns | {"recovered": recovered, "ledger_hit": hits}, RECORD)


class _AnswerParts:
    """Answers by part and content key; the parts used last are kept."""

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = uris
        self._ledgers: dict[int, Ledger] = {}
        self._kept: OrderedDict[tuple[int, str], tuple[pa.Table, dict[str, int]]] = OrderedDict()

    def answer(self, where: Where, content_key: str) -> dict[str, Any] | None:
        """Return a KEPT_ANSWER row; None where the part is gone, for then the answer is computed once more."""
        place = (where.store, where.part_id)
        if place not in self._kept:
            ledger = self._ledgers.setdefault(where.store, Ledger(Storage(self._uris[where.store])))
            try:
                table = ledger.read_part(ANSWERS, where.part_id, KEPT_ANSWER)
            except (FileNotFoundError, TransientError) as error:
                logger.warning("an answer that was given before cannot be read: %s", error)
                return None
            self._kept[place] = table, {key: row for row, key in enumerate(table["content_key"].to_pylist())}
            if len(self._kept) > PARTS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        table, rows = self._kept[place]
        row = rows.get(content_key)
        return None if row is None else table.slice(row, 1).to_pylist()[0]
