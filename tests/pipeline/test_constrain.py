"""When answers about pages are held to JSON, and what that does to the keys of records."""

import pyarrow.parquet as pq
import pytest

from operators.answer_schema import PAGE_BLOCKS
from operators.minicpmv.tiny import write_tiny_model
from operators.parse.blocks import parse_blocks
from pipeline import run
from pipeline.config import compose, planning_settings
from pipeline.reading import choose_reading
from pipeline.spec import make_spec
from tests.jobs.test_every_model import write_scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def spec_of(folder, **options):
    return make_spec({"task": "parse", "inputs": ["a.pdf"], "output": "o", "model": str(folder), **options})


def flow_of(spec):
    return compose(spec, choose_reading(spec), run_uri="-", run_id="r", worker_count=1, gpu_count=0)


def settings_of(spec):
    return planning_settings(spec, choose_reading(spec))


def test_the_built_in_parse_prompt_brings_its_schema(folder):
    assert flow_of(spec_of(folder)).generate.answer_schema == PAGE_BLOCKS


@pytest.mark.parametrize("options", [{"prompt": "Read."}, {"constrain": "never"}, {"task": "ocr"}, {"task": "caption"}])
def test_other_answers_are_free(folder, options):
    assert flow_of(spec_of(folder, **options)).generate.answer_schema is None


def test_pages_are_keyed_by_it_and_segments_are_not(folder):
    held, free = spec_of(folder), spec_of(folder, constrain="never")
    assert settings_of(held).pages != settings_of(free).pages
    assert settings_of(held).segments == settings_of(free).segments
    assert flow_of(held).prepare_pages.decode_params != flow_of(free).prepare_pages.decode_params
    assert flow_of(held).prepare_clips.decode_params == flow_of(free).prepare_clips.decode_params
    assert "--constrain never" in free.repro_template()
    for task in ("ocr", "caption"):
        assert settings_of(spec_of(folder, task=task)) == settings_of(spec_of(folder, task=task, constrain="never"))


def test_a_page_of_a_run_is_answered_in_json(tmp_path, folder):
    source = write_scan(tmp_path / "scan.pdf")
    pages = {}
    for constrain in ("auto", "never"):
        output = tmp_path / constrain
        run(
            task="parse", inputs=[str(source)], output=str(output), model=str(folder), device="cpu", local=True, dpi=72,
            constrain=constrain, second_look=False,
        )  # fmt: skip
        [pages[constrain]] = pq.read_table(output / "pages").to_pylist()
    held, free = pages["auto"], pages["never"]
    # Random weights hardly ever close what they have begun: the engine does, and the row says that it is a part.
    assert held["status"] == "partial_success"
    assert held["block_count"] > 0
    assert held["record_key"] != free["record_key"]
    assert free["raw_output"] is None or parse_blocks(free["raw_output"], 1, 1).status != "ok"
