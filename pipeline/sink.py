"""The sink: finished records to part files and one commit."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, rows_to_table
from pipeline.addresses import stored_record, stored_uri
from pipeline.answers import kept_answers
from pipeline.commits import utc_now
from pipeline.ledger import Ledger
from pipeline.parts import ANSWERS
from pipeline.rows import (
    REPRO_TEMPLATE,
    RowContext,
    block_rows,
    error_rows,
    final_status,
    is_video,
    page_row,
    segment_row,
)
from pipeline.storage import Storage
from schemas.errors import ContractError, TransientError
from schemas.generation import RECORD
from schemas.tables import PART_TABLES, TABLES, check_vocabulary

logger = logging.getLogger(__name__)

UNREAD: Final = ("pixels", "pixel_encoding", "slice_shapes", "prompt_ids", "text_layer_text", "text_layer_blocks")
"""Columns of RECORD that no table needs; a step before may have dropped them."""

TOKEN_COLUMNS: Final = ("prompt_tokens", "image_tokens", "output_tokens", "tokens_saved", "tokens_wasted")

ORDER_COLUMN: Final = pa.field("source_index", pa.int64())
"""Part files carry it in front of their table's columns; it orders the published tables and does not appear there."""

SUMMARY: Final = pa.schema(
    [
        pa.field("unit_id", pa.string()),
        pa.field("record_key", pa.string()),
        pa.field("source_index", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("task", pa.string()),
        pa.field("status", pa.string()),
        pa.field("needs_second_look", pa.bool_()),
        pa.field("ledger_hit", pa.bool_()),
        pa.field("route", pa.string()),
        pa.field("engine", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("error_code", pa.string()),
        *(pa.field(name, pa.int32()) for name in TOKEN_COLUMNS),
        pa.field("generate_ms", pa.float32()),
        pa.field("frame_count_sampled", pa.int32()),
        pa.field("text_bytes", pa.int64()),
        pa.field("block_count", pa.int32()),
        pa.field("part_id", pa.string()),
    ]
)
"""What leaves the sink: one small row a record, for counting."""


class WriteRecordsConfig(OperatorConfig):
    """Where and as what records are written."""

    run_uri: Annotated[str, Field(min_length=1, description="Run folder or fsspec URL.")]
    run_id: Annotated[str, Field(min_length=1, description="This invocation; goes into every row.")]
    repro_template: Annotated[
        str, Field(description="One line with {source} and {part} that reproduces a failure.")
    ] = REPRO_TEMPLATE
    downsample_mode: Annotated[str | None, Field(description="Visual token setting, as asked for.")] = None
    max_slice_nums: Annotated[int | None, Field(ge=1, description="Most slices a page, as asked for.")] = None
    clip_max_slice_nums: Annotated[int | None, Field(ge=1, description="Most slices a frame, as asked for.")] = None
    max_attempts: Annotated[int | None, Field(ge=1, description="Answers that a model may try to a record.")] = None
    pass_index: Annotated[
        int, Field(ge=0, description="Above 0 these rows replace those of earlier passes over the same run.")
    ] = 0
    answers: Annotated[Any, Field(description="An `AnswerIndex` that is told of what was committed; null: none.")] = (
        None
    )


class WriteRecords(Operator[WriteRecordsConfig]):
    """Write the rows of each record to their tables, commit them, and return one summary row a record.

    A call writes part files of all tables, then one commit: either all of its rows count, or none.

    Raises:
        ContractError: a record has no outcome, or a closed column holds another word; nothing was committed.
        TransientError: the store failed; the same call may be made again.
    """

    reads: ClassVar[pa.Schema] = pa.schema([field for field in RECORD if field.name not in UNREAD])
    adds: ClassVar[pa.Schema] = SUMMARY
    replaces: ClassVar[bool] = True

    def __init__(self, config: WriteRecordsConfig) -> None:
        super().__init__(config)
        self._ledger = Ledger(Storage(config.run_uri))

    def process(self, table: pa.Table) -> pa.Table:
        """Return SUMMARY rows for `table`, once its rows are committed."""
        wanted = [name for name in table.column_names if name not in UNREAD]
        records = table.select(wanted).to_pylist()
        for record in records:
            if record["record_key"] is None or record["unit_id"] is None:
                raise ContractError(f"a record of {stored_uri(record['source_uri'])} has no key or no unit")
        once = list({record["record_key"]: record for record in reversed(records)}.values())[::-1]
        part_id = self._ledger.begin([record["record_key"] for record in once])
        answers = kept_answers(once, utc_now())
        tables = tables_of(once, self._context()) | {ANSWERS: answers}
        units: dict[str, list[str]] = defaultdict(list)
        statuses: dict[str, list[str]] = defaultdict(list)
        for record in once:
            units[record["unit_id"]].append(record["record_key"])
            statuses[record["unit_id"]].append(final_status(record))
        self._ledger.commit(
            part_id,
            tables,
            run_id=self.config.run_id,
            records=units,
            statuses=statuses,
            retryable=[record["record_key"] for record in once if record["error"] and record["error"]["retryable"]],
            second_look=[record["record_key"] for record in once if record["needs_second_look"]],
            tokens=_token_sums(once),
            pass_index=self.config.pass_index,
            ledger_hits=sum(bool(record.get("ledger_hit")) for record in once),
        )
        self._note(part_id, answers)
        return rows_to_table([_summary(record, part_id) for record in records], SUMMARY)

    def _note(self, part_id: str, answers: pa.Table) -> None:
        if self.config.answers is None or not answers.num_rows:
            return
        try:
            self.config.answers.call("note", part_id, answers["content_key"].to_pylist())
        except TransientError as error:
            # What is not noted is looked up after the next round has read the commits.
            logger.warning("%s", error)

    def _context(self) -> RowContext:
        return RowContext(
            run_id=self.config.run_id,
            created_at=utc_now(),
            repro_template=self.config.repro_template,
            downsample_mode=self.config.downsample_mode,
            max_slice_nums=self.config.max_slice_nums,
            clip_max_slice_nums=self.config.clip_max_slice_nums,
            max_attempts=self.config.max_attempts,
        )


def tables_of(records: list[dict[str, Any]], context: RowContext) -> dict[str, pa.Table]:
    """Return the part tables of `records`, each with `source_index` in front; no secret of an address is in them.

    Raises:
        ContractError: a record has no outcome or no place, or a closed column holds another word.
    """
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in PART_TABLES}
    for record in map(stored_record, records):
        order = {"source_index": record["source_index"]}
        if is_video(record):
            rows["video_segments"].append(order | segment_row(record, context))
        else:
            rows["pages"].append(order | page_row(record, context))
            rows["blocks"] += [order | row for row in block_rows(record, context)]
        rows["errors"] += [order | row for row in error_rows(record, context)]
    tables = {name: rows_to_table(found, part_schema(name)) for name, found in rows.items()}
    for name, table in tables.items():
        check_vocabulary(name, table)
    return tables


def part_schema(table_name: str) -> pa.Schema:
    """Return the schema of a part file: the table's own, with the ordering column in front."""
    schema = TABLES[table_name]
    return pa.schema([ORDER_COLUMN, *schema], metadata=schema.metadata)


def _token_sums(records: list[dict[str, Any]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for record in records:
        sums.update({name: count or 0 for name, count in _tokens(record).items()})
    return dict(sums)


def _tokens(record: Mapping[str, Any]) -> dict[str, int | None]:
    """Return the tokens that a record cost; what was written for a row that will be replaced is wasted."""
    if record.get("ledger_hit"):
        return dict.fromkeys(TOKEN_COLUMNS, 0)
    tokens = {name: record[name] for name in TOKEN_COLUMNS}
    if record["needs_second_look"]:
        tokens["tokens_wasted"] = (record["tokens_wasted"] or 0) + (record["output_tokens"] or 0)
        tokens["output_tokens"] = 0
    return tokens


def _summary(record: Mapping[str, Any], part_id: str) -> dict[str, Any]:
    row = {name: record[name] for name in SUMMARY.names if name in record} | _tokens(record)
    row["status"] = final_status(record)
    row["error_code"] = record["error"]["error_code"] if record["error"] else None
    row["text_bytes"] = len((record["text"] or "").encode())
    row["block_count"] = None if record["blocks"] is None else len(record["blocks"])
    row["part_id"] = part_id
    return row
