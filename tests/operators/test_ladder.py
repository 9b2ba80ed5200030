"""What becomes of a page where the model fails: the real steps from prepared pixels to the CPU engine's text."""

from pathlib import Path

import pyarrow as pa
import pytest

from operators.generate import Generate, GenerateConfig
from operators.minicpmv.config import read_model_config
from operators.minicpmv.demo import write_demo_model
from operators.parse.completions import ParseCompletions, ParseCompletionsConfig
from operators.prepare import PrepareConfig, PrepareImages
from operators.read import ReadPages, ReadPagesConfig
from schemas.generation import DECODED, RECORD
from tests.operators.reading_pages import LANGUAGES, character_error_rate, page_of
from tests.operators.rows46 import page_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return str(path)


@pytest.fixture(scope="module")
def steps(folder):
    """Return the steps after preparation."""
    generate = Generate(GenerateConfig(model_folder=folder, device="cpu", max_new_tokens=8))
    yield [generate, ParseCompletions(ParseCompletionsConfig()), ReadPages(ReadPagesConfig())]
    generate.close()


def prepared(folder, **options):
    """Return the record of a page of English print, with its size in points."""
    image, (width_pt, height_pt) = page_of(LANGUAGES["english"], size=(420, 300))
    row = page_row(image) | {"page_width_pt": width_pt, "page_height_pt": height_pt}
    operator = PrepareImages(PrepareConfig(model_folder=folder, **options))
    return operator(pa.Table.from_pylist([row], schema=DECODED)).to_pylist()[0]


def finished(steps, row):
    table = pa.Table.from_pylist([row], schema=RECORD)
    for step in steps:
        table = step(table)
    return table.to_pylist()[0]


def test_a_page_on_which_the_model_fails_is_read_by_the_cpu_engine(folder, steps) -> None:
    row = prepared(folder)
    # One visual token more than there are pixels for: the forward pass raises.
    row["prompt_ids"] = [*row["prompt_ids"], read_model_config(Path(folder)).tokens.image_pad]
    result = finished(steps, row)
    assert (result["status"], result["route"], result["error"], result["engine"]) == ("fallback", "cpu", None, "cpu")
    assert [failure["error_code"] for failure in result["recovered"]] == ["generation"]
    assert character_error_rate(result["text"], LANGUAGES["english"]) < 0.05
    assert result["pixels"] is None


def test_a_page_whose_prompt_is_too_long_is_read_by_the_cpu_engine(folder, steps) -> None:
    result = finished(steps, prepared(folder, max_prompt_tokens=100))
    assert (result["status"], result["route"], result["error"]) == ("fallback", "cpu", None)
    assert [failure["error_code"] for failure in result["recovered"]] == ["prompt_too_long"]
    assert character_error_rate(result["text"], LANGUAGES["english"]) < 0.05
    assert result["pixels"] is None
