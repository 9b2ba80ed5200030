"""Units of documents to pages: text layer where it can be trusted, pixels where the page has to be read."""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.base import Operator, OperatorConfig, large_binary, rows_to_table
from operators.decode.box import DecoderBox, remade_error, was_ended_from_outside
from operators.decode.pages import Opened, PageOptions, PageStep, TextVerdict
from operators.decode.process import BoxLimits
from operators.fetch import FetchConfig, KeptCopy
from operators.orientation import find_orientation, hull_size, upright
from schemas.errors import ContractError, DecodeError, RecordError, error_struct
from schemas.generation import DECODED, IDENTITY
from schemas.source import UNIT

logger = logging.getLogger(__name__)

COMPONENT: Final = "DecodeDocuments"
DECODER_OF_KIND: Final = {"pdf": "operators.decode.pdf:decode_pages", "image": "operators.decode.image:decode_pages"}
DEATH_CODES: Final = {"crash", "time_limit", "memory_limit", "internal"}
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class DecodeDocumentsConfig(OperatorConfig):
    """How pages are decoded and routed."""

    dpi: Annotated[float, Field(gt=0, le=1200, description="Rendering resolution where max_pixels allows it.")] = 200.0
    max_pixels: Annotated[
        int, Field(ge=10_000, description="Most pixels of a rendered page; larger ones are scaled down to it.")
    ] = 6_000_000
    text_layer: Annotated[
        Literal["auto", "ignore", "only"],
        Field(description="auto: used where trustworthy; ignore: every page is read; only: no page is read."),
    ] = "auto"
    read_route: Annotated[Literal["model", "cpu"], Field(description="Route of pages that have to be read.")]
    layout: Annotated[bool, Field(description="Text layers as labelled blocks too, about 0.4 s a page.")] = False
    correct_orientation: Annotated[bool, Field(description="Put scans upright before they are read.")] = True
    open_timeout_seconds: Annotated[float, Field(gt=0, description="Time to open a document.")] = 30.0
    page_timeout_seconds: Annotated[float, Field(gt=0, description="Time for each step of a page.")] = 25.0
    max_deaths: Annotated[
        int, Field(ge=1, description="Decoder deaths in a unit after which its other pages are not tried.")
    ] = 3
    outside_kills: Annotated[
        int, Field(ge=0, description="How often a page is begun again because its decoder was ended from outside.")
    ] = 3
    box: BoxLimits = BoxLimits()
    fetch: FetchConfig = FetchConfig()


@dataclass
class _Page:
    """What is known of one page so far."""

    page_number: int
    facts: dict[str, Any] = field(default_factory=dict)
    verdict: TextVerdict | None = None
    image: Pixels | None = None
    is_blank: bool = False
    failure: RecordError | None = None
    recovered: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: PageStep) -> None:
        """Take over what a step found out."""
        self.facts |= step.facts
        self.verdict = step.verdict or self.verdict
        self.image = step.image
        self.is_blank = step.is_blank
        self.failure = remade_error(step.failure) if step.failure else None


class DecodeDocuments(Operator[DecodeDocumentsConfig]):
    """Turn units of PDFs and images into one row a page, in the order of the unit.

    Decoding runs in a process of its own: a page that crashes or hangs it is one row with an error, and the others
    still come. A unit that carries an error has no records and yields nothing. A page that is put upright has the
    size of the upright page, in points as in pixels. What the unit says a record has survived stands first in its row.
    """

    reads: ClassVar[pa.Schema] = UNIT
    adds: ClassVar[pa.Schema] = DECODED
    expands: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    stage: ClassVar[str] = "render"

    def __init__(self, config: DecodeDocumentsConfig) -> None:
        super().__init__(config)
        self.box = DecoderBox(config.box)
        self.copy = KeptCopy(config.fetch)

    def stream(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield one small table a page, so that no more than a page or two is held."""
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
        if unit["kind"] not in DECODER_OF_KIND:
            raise ContractError(f"unit {unit['unit_id']} is of kind {unit['kind']!r}, wanted {list(DECODER_OF_KIND)}")
        keys = iter(unit["record_keys"])
        survived = iter(unit["survived"] or [None] * len(unit["record_keys"]))
        for page in self._pages(unit):
            page.recovered[:0] = next(survived) or ()
            yield page_table(unit, next(keys), page, self.config)

    def _pages(self, unit: dict[str, Any]) -> Iterator[_Page]:
        owed = deque(unit["page_numbers"])
        try:
            path = self.copy.path_of(unit["source_uri"], unit["source_ref"], unit["doc_id"])
            for page in self._decoded(unit, path, owed):
                if self.config.correct_orientation and needs_turning(page, unit["kind"]):
                    turn_upright(page)
                yield page
        except RecordError as error:
            for page_number in owed:
                yield _Page(page_number, failure=error)

    def _decoded(self, unit: dict[str, Any], path: Path, owed: deque[int]) -> Iterator[_Page]:
        """Yield a page for each number in `owed`, taking it out; a dead decoder is replaced after its page.

        A page whose decoder was ended from outside is begun again, and its row does not differ by that.

        Raises:
            RecordError: the document cannot be opened, or has ended too many decoders; `owed` is what is left.
        """
        deaths = kills = 0
        while owed:
            page = _Page(owed[0])
            was_opened = False
            try:
                for step in self._steps(unit, path, list(owed)):
                    was_opened = True
                    if isinstance(step, Opened):
                        continue
                    page.add(step)
                    if step.is_last:
                        owed.popleft()
                        yield page
                        page, kills = _Page(owed[0] if owed else 0), 0
                if owed:
                    raise DecodeError(f"the decoder left out pages {list(owed)}", code="internal")
            except RecordError as error:
                if not owed:
                    # It failed while closing a document whose pages are all here.
                    return
                if was_ended_from_outside(error) and kills < self.config.outside_kills:
                    kills += 1
                    logger.warning("unit %s, page %d is begun again: %s", unit["unit_id"], owed[0], error)
                    continue
                if not was_opened or error.code not in DEATH_CODES:
                    raise
                deaths += 1
                error.stage = "render"
                page.failure = error
                owed.popleft()
                yield page
                kills = 0
                if deaths == self.config.max_deaths and owed:
                    raise after_deaths(error, deaths) from error

    def _steps(self, unit: dict[str, Any], path: Path, page_numbers: list[int]) -> Iterator[Opened | PageStep]:
        arguments = {
            "path": str(path),
            "password": unit["password"],
            "page_numbers": page_numbers,
            "options": page_options(unit["task"], self.config),
        }
        return self.box.stream(
            DECODER_OF_KIND[unit["kind"]],
            arguments,
            first_timeout_seconds=self.config.open_timeout_seconds,
            next_timeout_seconds=self.config.page_timeout_seconds,
        )


def page_options(task: str | None, config: DecodeDocumentsConfig) -> PageOptions:
    """Return what the decoder does with the pages of a unit of `task`."""
    render: Literal["always", "untrusted", "never"] = "untrusted"
    if task == "caption" or config.text_layer == "ignore":
        render = "always"
    elif config.text_layer == "only":
        render = "never"
    return PageOptions(
        dpi=config.dpi,
        max_pixels=config.max_pixels,
        render=render,
        layout=config.layout and render != "always",
        find_blank=task != "caption",
    )


def after_deaths(error: RecordError, deaths: int) -> DecodeError:
    """Return the error of the pages that are not tried after too many decoder deaths."""
    message = f"not tried: {deaths} pages of this unit ended their decoder, the last by: {error}"
    return DecodeError(message, code=error.code, stage=error.stage, exit_signal=error.exit_signal)


def choose_route(
    verdict: TextVerdict | None, is_blank: bool, task: str | None, config: DecodeDocumentsConfig
) -> tuple[str | None, str | None]:
    """Return route and reason of a page; both null when it failed before its text layer was judged."""
    if verdict is None:
        return None, None
    if task == "caption":
        return config.read_route, "captions need pixels"
    if config.text_layer != "ignore" and verdict.trustworthy:
        return "text_layer", verdict.reason
    if config.text_layer == "only":
        return "none", f"no trustworthy text layer: {verdict.reason}"
    if is_blank:
        return "none", "blank"
    reason = "the text layer is ignored" if config.text_layer == "ignore" else verdict.reason
    return config.read_route, reason


def needs_turning(page: _Page, kind: str) -> bool:
    """Return whether a page is a picture of paper that will be read."""
    return page.image is not None and (kind == "image" or (page.verdict is not None and page.verdict.is_scan))


def turn_upright(page: _Page) -> None:
    """Correct rotation and skew of the page's image, and its size; a failure leaves it as it is, and noted."""
    assert page.image is not None
    try:
        orientation = find_orientation(page.image)
        image = upright(page.image, orientation)
    except Exception as error:
        failure = DecodeError(f"orientation: {error}", code="internal", stage="preprocess")
        failure.__cause__ = error
        page.recovered.append(error_struct(failure, COMPONENT))
        return
    height_pt, width_pt = page.facts["page_height_pt"], page.facts["page_width_pt"]
    if orientation.rotation in (90, 270):
        height_pt, width_pt = width_pt, height_pt
    height_pt, width_pt = hull_size(height_pt, width_pt, orientation.skew_degrees)
    page.image = image
    page.facts |= {
        "rotation": orientation.rotation,
        "skew_degrees": orientation.skew_degrees,
        "image_height_px": image.shape[0],
        "image_width_px": image.shape[1],
        "page_height_pt": height_pt,
        "page_width_pt": width_pt,
    }


def page_table(unit: dict[str, Any], record_key: str, page: _Page, config: DecodeDocumentsConfig) -> pa.Table:
    """Return a page as a table of one `DECODED` row."""
    route, reason = choose_route(page.verdict, page.is_blank, unit["task"], config)
    error = None
    if page.failure is not None:
        notes = getattr(page.failure, "__notes__", [])
        error = error_struct(page.failure, COMPONENT, notes[0] if notes else None)
    row = {name: unit[name] for name in IDENTITY.names if name in unit}
    row |= page.facts
    row |= {
        "record_key": record_key,
        "page_number": page.page_number,
        "page_count": page.facts.get("page_count", unit["page_count"]),
        "route": route,
        "route_reason": reason,
        "error": error,
        "recovered": page.recovered or None,
    }
    table = rows_to_table([row], DECODED)
    if page.image is None or page.failure is not None:
        return table
    index = DECODED.get_field_index("image")
    return table.set_column(index, DECODED.field(index), large_binary(page.image))
