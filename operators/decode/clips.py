"""Units of videos to segments: the frames that the model sees of each time range, already sliced."""

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, large_binary, rows_to_table
from operators.decode.box import DecoderBox, remade_error, was_ended_from_outside
from operators.decode.process import BoxLimits
from operators.decode.video_options import SegmentOptions, VideoLimits
from operators.fetch import FetchConfig, KeptCopy
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import StackedConfig, TemporalConfig
from schemas.errors import ContractError, DecodeError, RecordError, error_struct
from schemas.generation import DECODED, IDENTITY
from schemas.image import PIXELS
from schemas.source import UNIT
from schemas.video import SEGMENT_FACTS

logger = logging.getLogger(__name__)

COMPONENT: Final = "DecodeClips"
DEATH_CODES: Final = {"crash", "time_limit", "memory_limit", "internal"}
"""Errors after which the remaining segments go on in a new process."""

Outcome = tuple[dict[str, Any], dict[str, Any] | RecordError, list[RecordError]]
"""A segment, what was decoded of it or why nothing was, and the failures it survived."""


class DecodeClipsConfig(OperatorConfig):
    """How segments are sampled and decoded."""

    temporal: TemporalConfig = StackedConfig()
    slicing: SliceConfig = SliceConfig(max_slices=1)
    segmentation: Annotated[
        Literal["fixed_stride", "scene_cut", "whole"], Field(description="How the plan cut the videos; a column.")
    ] = "fixed_stride"
    read_route: Annotated[Literal["model"], Field(description="Route of segments: only a model reads them.")] = "model"
    pixel_encoding: Annotated[
        Literal["raw"], Field(description="Frames hardly compress: zstd of natural frames gained nothing.")
    ] = "raw"
    decoder: Annotated[
        Literal["auto", "pyav"], Field(description="auto: decord where it is exact, PyAV elsewhere; pyav: always PyAV.")
    ] = "auto"
    max_segment_bytes: Annotated[
        int, Field(gt=0, description="Most bytes of pixels a segment may have: one row holds them all.")
    ] = 96_000_000
    limits: VideoLimits = VideoLimits()
    open_timeout_seconds: Annotated[
        float, Field(gt=0, description="Time to open a video and number its frames, beyond that of the first segment.")
    ] = 60.0
    segment_timeout_seconds: Annotated[float, Field(gt=0, description="Time for each segment.")] = 120.0
    max_deaths: Annotated[
        int, Field(ge=1, description="Decoder deaths in a unit after which its other segments are not tried.")
    ] = 3
    outside_kills: Annotated[
        int, Field(ge=0, description="How often a segment is begun again because its decoder was ended from outside.")
    ] = 3
    box: BoxLimits = BoxLimits()
    fetch: FetchConfig = FetchConfig()


class DecodeClips(Operator[DecodeClipsConfig]):
    """Turn units of videos into one row a segment, in the order of the unit.

    Decoding runs in a process of its own: a segment that crashes or hangs it is one row with an error, and the others
    still come. A segment that lost a part of its frames goes on with the rest, and says so in `recovered`. A unit that
    carries an error has no records and yields nothing.
    """

    reads: ClassVar[pa.Schema] = UNIT
    adds: ClassVar[pa.Schema] = DECODED
    expands: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    stage: ClassVar[str] = "sample"

    def __init__(self, config: DecodeClipsConfig) -> None:
        super().__init__(config)
        self.box = DecoderBox(config.box)
        self.copy = KeptCopy(config.fetch)
        self._options = SegmentOptions(
            temporal=config.temporal,
            slicing=config.slicing,
            limits=config.limits,
            decoder=config.decoder,
            max_segment_bytes=config.max_segment_bytes,
        )

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield one table a segment, so that no more than one or two are held."""
        yield DECODED.empty_table()
        for unit in table.to_pylist():
            if unit["error"] is None:
                yield from self._unit_tables(unit)

    def at_risk(self, table: pa.Table) -> list[bool]:
        """Return for each unit whether it is decoded."""
        return [not error.is_valid for error in table["error"]]

    def close(self) -> None:
        """End the decoder process and remove the copy of the last source."""
        self.box.close()
        self.copy.close()

    def _unit_tables(self, unit: dict[str, Any]) -> Iterator[pa.Table]:
        if unit["kind"] != "video":
            raise ContractError(f"unit {unit['unit_id']} is of kind {unit['kind']!r}, wanted 'video'")
        keys = iter(unit["record_keys"])
        for segment, outcome, recovered in self._outcomes(unit):
            yield segment_table(unit, next(keys), segment, outcome, recovered, self.config)

    def _outcomes(self, unit: dict[str, Any]) -> Iterator[Outcome]:
        owed = deque(unit["segments"])
        try:
            path = self.copy.path_of(unit["source_uri"], unit["source_ref"], unit["doc_id"])
            yield from self._decoded(path, owed)
        except RecordError as error:
            for segment in owed:
                yield segment, error, []

    def _decoded(self, path: Path, owed: deque[dict[str, Any]]) -> Iterator[Outcome]:
        """Yield what became of each segment in `owed`, taking it out; a dead decoder is replaced after its segment.

        A segment at which decord may have died is tried once more, with PyAV, and so are those after it. One whose
        decoder was ended from outside is begun again as it was, and its row does not differ by that.

        Raises:
            RecordError: the video cannot be opened, or has ended too many decoders; `owed` is what is left.
        """
        options = self._options
        recovered: list[RecordError] = []
        deaths = kills = 0
        while owed:
            try:
                for item in self._items(path, list(owed), options):
                    failure = item.get("failure")
                    yield owed.popleft(), remade_error(failure) if failure else item, recovered
                    recovered, kills = [], 0
                if owed:
                    raise DecodeError(f"the decoder left out {len(owed)} segments", code="internal", stage="sample")
            except RecordError as error:
                if was_ended_from_outside(error) and kills < self.config.outside_kills:
                    kills += 1
                    logger.warning("segment %d of %s is begun again: %s", owed[0]["segment_index"], path.name, error)
                    continue
                if error.code not in DEATH_CODES:
                    raise
                deaths += 1
                if options.decoder == "auto" and deaths < self.config.max_deaths:
                    options = options.model_copy(update={"decoder": "pyav"})
                    recovered.append(error)
                    continue
                yield owed.popleft(), error, recovered
                recovered, kills = [], 0
                if deaths == self.config.max_deaths and owed:
                    raise after_deaths(error, deaths) from error

    def _items(self, path: Path, segments: list[dict[str, Any]], options: SegmentOptions) -> Iterator[dict[str, Any]]:
        return self.box.stream(
            "operators.decode.segments:decode_segments",
            {"path": str(path), "segments": segments, "options": options},
            first_timeout_seconds=self.config.open_timeout_seconds + self.config.segment_timeout_seconds,
            next_timeout_seconds=self.config.segment_timeout_seconds,
        )


def after_deaths(error: RecordError, deaths: int) -> DecodeError:
    """Return the error of the segments that are not tried after too many decoder deaths."""
    message = f"not tried: {deaths} segments of this unit ended their decoder, the last by: {error}"
    return DecodeError(message, code=error.code, stage=error.stage, exit_signal=error.exit_signal)


def segment_table(
    unit: dict[str, Any],
    record_key: str,
    segment: dict[str, Any],
    outcome: dict[str, Any] | RecordError,
    recovered: list[RecordError],
    config: DecodeClipsConfig,
) -> pa.Table:
    """Return a segment as a table of one `DECODED` row."""
    row = {name: unit[name] for name in IDENTITY.names if name in unit}
    row |= segment
    row |= {"record_key": record_key, "segmentation": config.segmentation}
    survived = [error_struct(error, COMPONENT) for error in recovered]
    if isinstance(outcome, RecordError):
        notes = getattr(outcome, "__notes__", [])
        row["error"] = error_struct(outcome, COMPONENT, notes[0] if notes else None)
        row["recovered"] = survived or None
        return rows_to_table([row], DECODED)
    if outcome["damage"] is not None:
        lost = DecodeError(outcome["damage"], code=outcome["damage_code"], stage="sample")
        survived.append(error_struct(lost, COMPONENT))
    row |= {name: outcome[name] for name in SEGMENT_FACTS.names if name in outcome}
    row |= {name: outcome[name] for name in ("slice_shapes", "slice_grids")}
    row |= {"pixel_encoding": config.pixel_encoding, "route": config.read_route, "route_reason": "video"}
    row["recovered"] = survived or None
    table = rows_to_table([row], DECODED)
    index = DECODED.get_field_index(PIXELS.names[0])
    return table.set_column(index, DECODED.field(index), large_binary(outcome["pixels"]))
