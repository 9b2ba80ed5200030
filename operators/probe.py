"""Sources to units: what each file is, how much it holds, and which records it owes."""

import logging
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, rows_to_table
from operators.decode.box import DecoderBox, was_ended_from_outside
from operators.decode.process import BoxLimits
from operators.decode.sniff import Sniffed, sniff
from operators.fetch import FetchConfig, KeptCopy, sha256_of
from schemas.errors import ConfigError, ContractError, DecodeError, PagereelError, RecordError, error_struct
from schemas.ids import canonical_json, digest, record_key
from schemas.source import SOURCE, SOURCE_FACTS, UNIT

logger = logging.getLogger(__name__)

COMPONENT: Final = "ProbeSources"
UNIT_ID_CHARS: Final = 32
SPARSE_FRAMES: Final = 16
MOST_STRIKES: Final = 3
"""Sources one after the other that may fail in a way that nobody foresaw, before the operator is held to be broken."""
UNITS_AT_ONCE: Final = 1000
MOST_SECONDS_HELD: Final = 1.0
SOURCE_COLUMNS: Final = ("source_index", "source_uri", "source_ref", "password")


class ProbeConfig(OperatorConfig):
    """What is owed of each source, and the policy on how much that may be."""

    task: Annotated[Literal["ocr", "parse", "caption"], Field(description="What each record is for.")]
    page_settings: Annotated[str, Field(description="Digest of all that determines the row of a page.")]
    segment_settings: Annotated[str, Field(description="Digest of all that determines the row of a segment.")]
    unit_pages: Annotated[int, Field(ge=1, description="Pages that one decode task opens.")] = 10
    segment_seconds: Annotated[float, Field(gt=0, description="Length of a video segment.")] = 30.0
    unit_segments: Annotated[int, Field(ge=1, description="Segments that one decode task opens.")] = 2
    max_pages: Annotated[int, Field(ge=1, description="A document with more pages is too_many_pages.")] = 20_000
    max_segments: Annotated[int, Field(ge=1, description="A video with more segments is too_long.")] = 20_000
    probe_timeout_seconds: Annotated[float, Field(gt=0, description="Time to open and probe one file.")] = 60.0
    outside_kills: Annotated[
        int, Field(ge=0, description="How often a probe is begun again because its decoder was ended from outside.")
    ] = 3
    box: BoxLimits = BoxLimits()
    fetch: FetchConfig = FetchConfig()


class Part(NamedTuple):
    """One record that a source owes.

    Attributes:
        key: what `record_key` takes: the page number, or start and stop in seconds.
        value: the entry of `page_numbers` or `segments`.
    """

    key: int | tuple[float, float]
    value: Any


class ProbeSources(Operator[ProbeConfig]):
    """Turn listed sources into units of work.

    Kind is decided by content. A source that cannot be listed, read or opened becomes one unit with an error and no
    records, with the hash of its bytes where they could be read. Pages that were asked for and lie beyond the end of
    the document are left out; when none remains, that is the source's error (`page_missing`). Videos are cut on a
    grid of whole segments that starts at 0, clipped to the range that was asked for.
    """

    reads: ClassVar[pa.Schema] = SOURCE
    adds: ClassVar[pa.Schema] = UNIT
    expands: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.box = DecoderBox(config.box)
        self._strikes = 0
        self.copy = KeptCopy(config.fetch)
        self._last: tuple[str | None, dict[str, Any]] = (None, {})

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield the units of the sources, those of many quick ones together."""
        held: list[dict[str, Any]] = []
        began = time.monotonic()
        for source in table.to_pylist():
            held += self._units_or_error(source)
            if len(held) >= UNITS_AT_ONCE or time.monotonic() - began > MOST_SECONDS_HELD:
                yield rows_to_table(held, UNIT)
                held, began = [], time.monotonic()
        if held:
            yield rows_to_table(held, UNIT)

    def close(self) -> None:
        """End the decoder process, and remove the copy of the last source."""
        self.box.close()
        self.copy.close()

    def _units_or_error(self, source: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the units of one source; what nobody foresaw is its error, unless it is met at every source."""
        try:
            state, units = self._last[0], self._units(source)
            if self._last[0] is None or self._last[0] != state:
                # Odd facts are met here, and not beside the units of others.
                rows_to_table(units[:1], UNIT)
            self._strikes = 0
            return units
        except PagereelError:
            raise
        # One odd file must not end the planning of a night's run.
        except Exception as error:
            self._last = (None, {})
            self._strikes += 1
            if self._strikes > MOST_STRIKES:
                raise
            unit = {name: source[name] for name in SOURCE_COLUMNS} | {"task": self.config.task}
            return [failed_unit(unit, source, unforeseen(error))]

    def _units(self, source: dict[str, Any]) -> list[dict[str, Any]]:
        unit = {name: source[name] for name in SOURCE_COLUMNS} | {"task": self.config.task}
        if source["error"] is not None:
            return [failed_unit(unit, source, source["error"])]
        try:
            unit |= self._bytes(source, unit)
            return cut_units(unit, owed_parts(unit, source, self.config), self.config)
        except RecordError as error:
            notes = getattr(error, "__notes__", [])
            return [failed_unit(unit, source, error_struct(error, COMPONENT, notes[0] if notes else None))]

    def _bytes(self, source: dict[str, Any], unit: dict[str, Any]) -> dict[str, Any]:
        """Return what the bytes of a source are; a manifest may name a thousand pages of one file in a row."""
        seen = ("source_uri", "source_ref", "size_bytes", "version_tag", "password")
        state = canonical_json([source[name] for name in seen]) if source["version_tag"] else None
        if state is not None and state == self._last[0]:
            return self._last[1]
        path = self.copy.path_of(source["source_uri"], source["source_ref"], None)
        # What is found first stays with the unit when the rest cannot be.
        unit["doc_id"] = sha256_of(path)
        found = sniff(path, name_of(source))
        unit |= {"kind": found.kind, "mime_type": found.mime_type}
        facts = {name: unit[name] for name in ("doc_id", "kind", "mime_type")}
        facts |= self._facts(found, path, source["password"])
        self._last = (state, facts)
        return facts

    def _facts(self, found: Sniffed, path: Path, password: str | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"path": str(path)}
        if found.kind == "video":
            arguments["limits"] = {"max_duration_seconds": self.config.max_segments * self.config.segment_seconds}
        else:
            arguments |= {"password": password, "max_pages": self.config.max_pages}
        function, limit_seconds = f"operators.decode.{found.kind}:probe", self.config.probe_timeout_seconds
        for left in reversed(range(self.config.outside_kills + 1)):
            try:
                facts: dict[str, Any] = self.box.call(function, arguments, timeout_seconds=limit_seconds)
                return facts
            except RecordError as error:
                if not was_ended_from_outside(error) or not left:
                    raise
                logger.warning("%s is probed again: %s", path.name, error)
        raise ContractError("a probe neither returned nor failed")


def unforeseen(error: Exception) -> dict[str, Any]:
    """Return an exception that no step translated as a value of the `ERROR` struct, with its traceback."""
    failure = DecodeError(f"probe: {type(error).__name__}: {error}", code="internal")
    failure.__cause__ = error
    return error_struct(failure, COMPONENT, "".join(traceback.format_exception(error))[-8000:])


def name_of(source: dict[str, Any]) -> str:
    """Return the name that a source was listed under: its member of an archive, or the last part of its address."""
    reference = source["source_ref"] or {}
    return PurePosixPath(reference.get("member") or source["source_uri"].partition("?")[0]).name


def failed_unit(unit: dict[str, Any], source: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """Return the one unit of a source that cannot be done; `error` is a value of the `ERROR` struct.

    What was asked for goes into its id: several ranges of one file are several sources, and each may fail.
    """
    asked = [source[name] for name in ("page_ranges", "start_seconds", "stop_seconds")]
    unit_id = unit_id_of(unit, canonical_json(["error", *asked]), "")
    kept = {name: value for name, value in unit.items() if name not in SOURCE_FACTS.names}
    facts = {name: unit.get(name) for name in ("doc_id", "kind", "mime_type")}
    return kept | facts | {"unit_id": unit_id, "error": error}


def unit_id_of(unit: dict[str, Any], parts: str, settings: str) -> str:
    """Return the id of a unit: a function of its bytes, its address, the parts it covers and the settings."""
    reference = canonical_json(unit["source_ref"])
    return digest(unit.get("doc_id"), unit["source_uri"], reference, parts, settings)[:UNIT_ID_CHARS]


def cut_units(unit: dict[str, Any], parts: Sequence[Part], config: ProbeConfig) -> list[dict[str, Any]]:
    """Return the units of one source, each with its share of `parts`."""
    is_video = unit["kind"] == "video"
    settings = config.segment_settings if is_video else config.page_settings
    column, size = ("segments", config.unit_segments) if is_video else ("page_numbers", config.unit_pages)
    return [
        unit
        | {
            "unit_id": unit_id_of(unit, canonical_json([part.key for part in share]), settings),
            column: [part.value for part in share],
            "record_keys": [record_key(unit["doc_id"], part.key, {"settings": settings}) for part in share],
        }
        for share in (parts[i : i + size] for i in range(0, len(parts), size))
    ]


def owed_parts(unit: dict[str, Any], source: dict[str, Any], config: ProbeConfig) -> list[Part]:
    """Return the records that a source owes.

    Raises:
        DecodeError: `page_missing` or `too_long`.
    """
    if unit["kind"] == "video":
        start, stop = source["start_seconds"], source["stop_seconds"]
        step = segment_step(unit["duration_seconds"], unit.get("frame_count"), config.segment_seconds)
        return owed_segments(unit["duration_seconds"], start, stop, step, config.max_segments)
    return [Part(number, number) for number in owed_pages(source["page_ranges"], unit["page_count"])]


def owed_pages(page_ranges: str | None, page_count: int) -> list[int]:
    """Return the pages that are asked for and exist, ascending, each once.

    Args:
        page_ranges: "1-5,8", with open ends as "7-" and "-3"; None for all pages.
        page_count: pages of the document.

    Raises:
        DecodeError: `page_missing` when none of the pages exists, or the text cannot be read as page ranges.
    """
    if page_ranges is None or not page_ranges.strip():
        return list(range(1, page_count + 1))
    chosen: set[int] = set()
    try:
        ranges = parse_page_ranges(page_ranges)
    except ConfigError as error:
        # A cell of a manifest is found out here, in the middle of a run; the driver parses what the command line says.
        raise DecodeError(str(error), code="page_missing") from error
    for start, stop in ranges:
        chosen.update(range(start, min(stop or page_count, page_count) + 1))
    if not chosen:
        raise DecodeError(f"pages {page_ranges} of a document that has {page_count}", code="page_missing")
    return sorted(chosen)


def parse_page_ranges(page_ranges: str) -> list[tuple[int, int | None]]:
    """Return first and last page of each range; the last is None where the end is open.

    Raises:
        ConfigError: the text cannot be read as page ranges.
    """
    found: list[tuple[int, int | None]] = []
    for item in page_ranges.split(","):
        first, dash, last = (text.strip() for text in item.partition("-"))
        try:
            start = int(first) if first or not dash else 1
            stop = (int(last) if last else None) if dash else start
        except ValueError as error:
            raise ConfigError(f"pages {page_ranges!r}: {item.strip()!r} is no page and no range") from error
        if start < 1 or (stop is not None and stop < start) or item.strip() == "-":
            raise ConfigError(f"pages {page_ranges!r}: {item.strip()!r} is empty or does not ascend")
        found.append((start, stop))
    return found


def segment_step(duration_seconds: float, frame_count: int | None, segment_seconds: float) -> float:
    """Return the length of segments of one video: `segment_seconds`, or a multiple of it for a sparse video.

    A video with fewer frames than segments would mostly owe segments in which nothing happens, and a header that
    claims a hundred hours for a hundred frames would owe thousands: there a segment holds about `SPARSE_FRAMES`.
    """
    wanted = math.ceil(duration_seconds / segment_seconds)
    if not frame_count or frame_count >= wanted:
        return segment_seconds
    return segment_seconds * math.ceil(wanted / max(1, frame_count // SPARSE_FRAMES))


def owed_segments(
    duration_seconds: float,
    start_seconds: float | None,
    stop_seconds: float | None,
    step: float,
    max_segments: int,
) -> list[Part]:
    """Return the segments of a video, at least one, on the grid of whole segments.

    Args:
        duration_seconds: length of the video.
        start_seconds: where the range that was asked for starts; None for 0.
        stop_seconds: where it stops; None for the end.
        step: length of a segment in seconds.
        max_segments: policy on their number.

    Raises:
        DecodeError: `too_long` for more segments than the policy allows, `no_frames` when the range lies outside.
    """
    start = max(0.0, start_seconds or 0.0)
    stop = min(duration_seconds, stop_seconds if stop_seconds is not None else math.inf)
    if start >= stop and (start > 0 or stop_seconds is not None):
        raise DecodeError(f"range starts at {start:g} s and stops at {stop:g} s: nothing between", code="no_frames")
    first = int(start // step)
    last = max(first + 1, math.ceil(stop / step))
    if last - first > max_segments:
        raise DecodeError(f"{last - first} segments, the policy allows {max_segments}", code="too_long")
    # A video shorter than a clock tick still owes the segment of its only frame.
    ranges = [(max(start, i * step), min(max(stop, start + 1e-3), (i + 1) * step)) for i in range(first, last)]
    return [
        Part((begin, end), {"segment_index": index, "start_seconds": begin, "stop_seconds": end})
        for index, (begin, end) in enumerate(ranges, first)
    ]
