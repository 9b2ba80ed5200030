"""Absurd but well-formed documents and pictures: one outcome each, in the closed vocabularies, none unforeseen."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from operators.base import rows_to_table
from operators.decode.documents import DecodeDocuments, DecodeDocumentsConfig
from operators.prepare import PrepareConfig, PrepareImages
from operators.probe import ProbeConfig, ProbeSources
from schemas.errors import CATEGORY_OF_CODE
from schemas.source import SOURCE
from tests.fuzz.structured import documents, pictures

FOR_EACH = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    # To shrink an example means to end decoders over and over: the drawn one is small enough to look at.
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(scope="module")
def road():
    """Probe, decode and prepare as a run does, with every page rendered."""
    steps = (
        ProbeSources(ProbeConfig(task="ocr", page_settings="p", segment_settings="s", max_pages=50)),
        DecodeDocuments(DecodeDocumentsConfig(read_route="cpu", text_layer="ignore", page_timeout_seconds=10)),
        PrepareImages(PrepareConfig(model_folder=None)),
    )
    yield steps
    for step in steps:
        step.close()


def codes_of(road, path):
    """Return the error codes of a file's pages, None for good ones; or the one of the file itself."""
    probe, decode, prepare = road
    units = probe(rows_to_table([{"source_index": 0, "source_uri": str(path)}], SOURCE))
    [error, *_] = units["error"].to_pylist()
    if error is not None:
        assert units.num_rows == 1
        return [error["error_code"]]
    records = prepare(decode(units)).to_pylist()
    owed = [key for keys in units["record_keys"].to_pylist() for key in keys]
    assert [record["record_key"] for record in records] == owed
    assert all(record["error"] or record["route"] in ("cpu", "none") for record in records)
    return [record["error"] and record["error"]["error_code"] for record in records]


def check(codes):
    assert codes
    assert set(codes) - {None} <= CATEGORY_OF_CODE.keys() - {"internal"}


@given(data=documents())
@FOR_EACH
def test_an_absurd_document_has_one_outcome(road, tmp_path, data):
    (tmp_path / "a.pdf").write_bytes(data)
    check(codes_of(road, tmp_path / "a.pdf"))


@given(picture=pictures())
@FOR_EACH
def test_a_picture_of_any_mode_and_shape_has_one_outcome(road, tmp_path, picture):
    suffix, data = picture
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    check(codes_of(road, path))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@given(data=documents())
@settings(FOR_EACH, max_examples=1500)
def test_many_absurd_documents_have_one_outcome_each(road, tmp_path, data):
    (tmp_path / "a.pdf").write_bytes(data)
    check(codes_of(road, tmp_path / "a.pdf"))
