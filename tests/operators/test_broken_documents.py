"""Every document of the wider corpus, against what its MANIFEST expects."""

import csv
import os
import resource
from pathlib import Path
from typing import NamedTuple

import pytest

from operators.base import rows_to_table
from operators.decode.documents import DecodeDocuments, DecodeDocumentsConfig
from operators.probe import ProbeConfig, ProbeSources
from schemas.errors import CATEGORY_OF_CODE
from schemas.source import SOURCE

CODES_OF_WORD = {
    "empty": {"empty"},
    "encrypted": {"encrypted"},
    "damaged": {"damaged"},
    "no_pages": {"no_pages"},
    "not_pdf": {"not_pdf"},
    "not_video": {"not_video"},
    "too_large": {"too_large"},
    "too_many_pages": {"too_many_pages"},
    "render": {"render"},
    "timeout": {"time_limit", "memory_limit"},
}
"""Words of the MANIFEST's `expected` column to error codes."""


class Allowed(NamedTuple):
    """What a file may come to: `pages` good pages, or an error of one of the words, on `failed_pages` pages if set."""

    is_ok: bool = False
    words: tuple[str, ...] = ()
    failed_pages: int = 0


OUTCOMES = {
    "ok": Allowed(is_ok=True),
    "ok (repaired)": Allowed(is_ok=True),
    "ok with capped pixels": Allowed(is_ok=True),
    "ok, memory bounded page by page": Allowed(is_ok=True),
    "ok or partial": Allowed(is_ok=True, words=("damaged", "render")),
    "ok or error:damaged": Allowed(is_ok=True, words=("damaged",)),
    "ok or error:too_large": Allowed(is_ok=True, words=("too_large",)),
    "ok with capped pixels or error:too_large": Allowed(is_ok=True, words=("too_large",)),
    "ok in bounded memory or error:too_large": Allowed(is_ok=True, words=("too_large",)),
    "ok with 1 page error": Allowed(is_ok=True, words=("damaged",), failed_pages=1),
    "error:encrypted": Allowed(words=("encrypted",)),
    "error:empty": Allowed(words=("empty",)),
    "error:not_pdf": Allowed(words=("not_pdf",)),
    "error:not_video": Allowed(words=("not_video",)),
    "error:damaged": Allowed(words=("damaged",)),
    "error:no_pages": Allowed(words=("no_pages",)),
    "error:render": Allowed(words=("render",)),
    "error:timeout": Allowed(words=("timeout",)),
    "error:no_pages (or 2 pages), never ok with 0 pages": Allowed(is_ok=True, words=("no_pages",)),
    "error:damaged or 0 pages": Allowed(words=("damaged", "no_pages")),
    "error:damaged or 1 page": Allowed(is_ok=True, words=("damaged",)),
    "error:too_many_pages or damaged": Allowed(words=("too_many_pages", "damaged")),
    "error:too_large (or capped scale)": Allowed(is_ok=True, words=("too_large",)),
    "error:too_large (or capped)": Allowed(is_ok=True, words=("too_large",)),
}
"""The MANIFEST's `expected` column to what is allowed."""

NO_VIDEOS = ("pdf_named.mp4", "m3u8_playlist_named.mp4", "zero_length.mp4")
MAX_RSS_BYTES = 3_000_000_000


def manifest_rows():
    folder = os.environ.get("PAGEREEL_CORPUS")
    if not folder:
        return []
    with (Path(folder) / "MANIFEST.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["file"].endswith(".pdf") or row["file"].endswith(NO_VIDEOS)]


@pytest.fixture(scope="module", params=["auto", "ignore"])
def operators(request):
    """Probe and decode as a run does, once by text layers and once with every page rendered."""
    probe = ProbeSources(ProbeConfig(task="ocr", page_settings="p", segment_settings="s"))
    decode = DecodeDocuments(
        DecodeDocumentsConfig(read_route="model", correct_orientation=False, text_layer=request.param)
    )
    yield probe, decode
    probe.close()
    decode.close()


def outcome_of(operators, path):
    """Return the error code of the source or None, and the error code or None of each page."""
    probe, decode = operators
    units = probe(rows_to_table([{"source_index": 0, "source_uri": str(path)}], SOURCE))
    first = units.slice(0, 1).to_pylist()[0]
    if first["error"] is not None:
        assert units.num_rows == 1
        assert first["record_keys"] is None
        return first["error"]["error_code"], []
    owed = sum(len(keys) for keys in units.column("record_keys").to_pylist())
    assert owed == first["page_count"]
    codes = []
    for table in decode.run(units):
        for row in table.drop_columns(["image"]).to_pylist():
            codes.append(row["error"] and row["error"]["error_code"])
            assert row["error"] or row["route"]
            assert row["page_number"] == len(codes)
    assert len(codes) == owed
    return None, codes


def check(row, source_code, page_codes):
    """Assert that an outcome is one that the MANIFEST's row allows."""
    allowed = OUTCOMES[row["expected"]]
    codes = {code for word in allowed.words for code in CODES_OF_WORD[word]}
    failed = [code for code in page_codes if code]
    found = [source_code] if source_code else failed
    assert set(found) <= codes, (source_code, page_codes)
    if allowed.failed_pages:
        assert len(failed) == allowed.failed_pages
    if not allowed.is_ok:
        assert source_code or len(failed) == len(page_codes) > 0
    if source_code is None and row["expected_pages"]:
        assert len(page_codes) == int(row["expected_pages"])


def test_each_word_stands_for_codes_of_the_closed_vocabulary():
    assert set().union(*CODES_OF_WORD.values()) <= CATEGORY_OF_CODE.keys()
    assert {word for allowed in OUTCOMES.values() for word in allowed.words} == CODES_OF_WORD.keys()
    assert all(allowed.is_ok or allowed.words for allowed in OUTCOMES.values())


@pytest.mark.needs_corpus
def test_each_expectation_of_the_manifest_is_in_the_table(corpus):
    assert {row["expected"] for row in manifest_rows()} <= OUTCOMES.keys()


@pytest.mark.needs_corpus
@pytest.mark.parametrize("row", manifest_rows(), ids=lambda row: row["file"])
def test_a_document_comes_out_as_the_manifest_expects(corpus, operators, row):
    check(row, *outcome_of(operators, corpus / row["file"]))


@pytest.mark.needs_corpus
def test_no_decoder_has_held_more_than_its_bound(corpus, operators):
    for operator in operators:
        operator.close()
        assert operator.box.peak_rss_bytes < MAX_RSS_BYTES
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MAX_RSS_BYTES
