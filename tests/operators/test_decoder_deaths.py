"""Decoders that are ended from outside, and pictures and pages that claim more than there is."""

import os
import signal
import struct
import zlib

import pymupdf
import pytest

from operators.base import rows_to_table
from operators.decode.documents import DecodeDocuments, DecodeDocumentsConfig
from operators.decode.process import BoxLimits
from operators.fetch import sha256_of
from operators.probe import ProbeConfig, ProbeSources
from schemas.errors import DecodeError
from schemas.source import SOURCE, UNIT

PAGES = 6


@pytest.fixture
def document(tmp_path):
    with pymupdf.open() as made:
        for number in range(PAGES):
            page = made.new_page(width=400, height=400)
            page.insert_text((40, 60), f"Page {number} of a document", fontsize=20)
            page.draw_circle((200, 250), 20 + 10 * number, fill=(0.1 * number, 0.4, 0.8))
        made.save(tmp_path / "a.pdf")
    return tmp_path / "a.pdf"


@pytest.fixture
def operator():
    made = []

    def make(**options):
        made.append(
            DecodeDocuments(
                DecodeDocumentsConfig(**({"read_route": "model", "text_layer": "ignore", "dpi": 150} | options))
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def unit(path, page_count=PAGES):
    numbers = list(range(1, page_count + 1))
    row = {"unit_id": "u", "source_index": 0, "source_uri": str(path), "doc_id": sha256_of(path), "kind": "pdf"}
    row |= {"task": "ocr", "page_count": page_count, "page_numbers": numbers}
    return rows_to_table([row | {"record_keys": [f"k{number}" for number in numbers]}], UNIT)


def rows_of(made, table, kill=0):
    """Return the rows of a unit; the decoder is killed after each of the first `kill` rows."""
    rows = []
    for part in made.run(table):
        rows += part.to_pylist()
        if part.num_rows and len(rows) <= kill:
            os.kill(made.box.process_id, signal.SIGKILL)
    return rows


def without_times(rows):
    return [row | {"render_ms": None} for row in rows]


def test_a_page_whose_decoder_was_killed_from_outside_is_begun_again_and_its_row_is_the_same(
    document, operator, caplog
):
    undisturbed = rows_of(operator(), unit(document))
    made = operator()
    rows = rows_of(made, unit(document), kill=1)
    assert without_times(rows) == without_times(undisturbed)
    assert made.box.start_count == 2
    assert "ended by SIGKILL from outside" in caplog.text


def test_what_is_killed_too_often_is_an_error_that_a_later_run_may_try_again(document, operator):
    rows = rows_of(operator(outside_kills=0), unit(document), kill=1)
    [error] = [row["error"] for row in rows if row["error"]]
    assert (error["error_code"], error["exit_signal"], error["retryable"]) == ("crash", signal.SIGKILL, True)


def test_a_page_that_takes_more_memory_than_it_may_is_one_row(tmp_path, operator):
    with pymupdf.open() as made:
        for _ in range(2):
            made.new_page(width=9000, height=9000).draw_circle((4000, 4000), 2000, fill=(1, 0, 0))
        made.save(tmp_path / "a.pdf")
    limits = BoxLimits(resident_bytes=150_000_000)
    rows = rows_of(operator(max_pixels=200_000_000, dpi=72, box=limits), unit(tmp_path / "a.pdf", 2))
    assert {row["error"]["error_code"] for row in rows} == {"memory_limit"}
    assert {row["error"]["exit_signal"] for row in rows} == {signal.SIGKILL}
    assert not any(row["error"]["retryable"] for row in rows)


class KilledBox:
    """A box whose process is killed from outside during the first calls."""

    def __init__(self, box, kills):
        self.box = box
        self.left = kills

    def call(self, function, arguments, *, timeout_seconds):
        if self.left:
            self.left -= 1
            raise DecodeError("killed", code="crash", exit_signal=signal.SIGKILL, retryable=True)
        return self.box.call(function, arguments, timeout_seconds=timeout_seconds)

    def close(self):
        self.box.close()


@pytest.fixture
def probe():
    made = ProbeSources(ProbeConfig(task="ocr", page_settings="p", segment_settings="s"))
    yield made
    made.close()


def probed(probe, *paths):
    sources = [{"source_index": number, "source_uri": str(path)} for number, path in enumerate(paths)]
    return probe(rows_to_table(sources, SOURCE)).to_pylist()


@pytest.mark.parametrize(("kills", "code"), [(3, None), (4, "crash")])
def test_a_probe_that_is_killed_from_outside_is_begun_again_some_times(probe, document, kills, code):
    probe.box = KilledBox(probe.box, kills)
    [found] = probed(probe, document)
    assert (found["error"] and found["error"]["error_code"]) == code
    assert found["page_count"] == (None if code else PAGES)


def png(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


def test_a_picture_wider_than_a_column_can_say_is_one_error_and_ends_no_planning(probe, document, tmp_path):
    (tmp_path / "wide.png").write_bytes(png(2_936_012_896, 64))
    wide, good = probed(probe, tmp_path / "wide.png", document)
    assert wide["error"]["error_code"] == "too_large"
    assert good["page_count"] == PAGES


class BrokenBox:
    """A box that gives facts that no table holds."""

    def __init__(self, box, bad_calls):
        self.box = box
        self.left = bad_calls

    def call(self, function, arguments, *, timeout_seconds):
        facts = self.box.call(function, arguments, timeout_seconds=timeout_seconds)
        self.left -= 1
        return facts | {"width_px": 2**40} if self.left >= 0 else facts

    def close(self):
        self.box.close()


def test_what_nobody_foresaw_about_one_file_is_its_error_and_the_others_are_planned(probe, document):
    probe.box = BrokenBox(probe.box, 2)
    rows = probed(probe, *[document] * 4)
    assert [row["error"] and row["error"]["error_code"] for row in rows] == ["internal", "internal", None, None]
    assert "Traceback" in rows[0]["error"]["traceback"]


def test_what_happens_at_every_file_is_no_error_of_a_file(probe, document):
    probe.box = BrokenBox(probe.box, 99)
    with pytest.raises(ValueError, match="too large"):
        probed(probe, *[document] * 9)
