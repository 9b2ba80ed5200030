"""Pages whose answers follow a schema, from the model to the rows."""

import json

import pyarrow as pa
import pytest

from operators.answer_schema import PAGE_BLOCKS
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.demo import write_demo_model
from operators.minicpmv.slicing import SliceConfig
from operators.parse.completions import ParseCompletions, ParseCompletionsConfig
from operators.prepare import PrepareClips, PrepareConfig, PrepareImages
from schemas.errors import ConfigError
from schemas.generation import RECORD
from tests.operators.answer_schemas import assert_valid
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_demo_model(path)
    return str(path)


def records_of(folder, **options):
    images = PrepareImages(PrepareConfig(model_folder=folder, **options))
    clips = PrepareClips(PrepareConfig(model_folder=folder, slicing=SliceConfig(max_slices=1), **options))
    kinds = ("pdf", "image")
    pictures = page_pictures(2, seed=3)
    pages = [page_row(one, task="parse", kind=kind) for kind, one in zip(kinds, pictures, strict=True)]
    clip = clip_row(clip_frames(1), SliceConfig(max_slices=1), task="parse")
    return pa.concat_tables([images(table_of(*pages)), clips(table_of(clip))])


def generated(folder, records, **options):
    return Generate(GenerateConfig(model_folder=folder, device="cpu", **options))(records)


def test_pages_follow_the_schema_and_segments_do_not(folder):
    records = records_of(folder)
    *pages, clip = generated(folder, records, max_new_tokens=150, answer_schema=PAGE_BLOCKS).to_pylist()
    *free_pages, free_clip = generated(folder, records, max_new_tokens=150).to_pylist()
    for page, free in zip(pages, free_pages, strict=True):
        assert_valid("page blocks", page["completion"])
        assert page["completion"] != free["completion"]
        params = json.loads(page["decode_params"])
        assert len(params.pop("answer_schema")) == 64
        assert params == json.loads(free["decode_params"])
    assert clip["completion"] == free_clip["completion"]
    assert clip["decode_params"] == free_clip["decode_params"]


def test_a_thought_comes_before_the_json(folder):
    records = records_of(folder, thinking=True).slice(0, 2)
    for options in ({}, {"max_thought_tokens": 9}):
        table = generated(folder, records, max_new_tokens=200, answer_schema=PAGE_BLOCKS, **options)
        for row in table.to_pylist():
            assert row["thought"]
            assert_valid("page blocks", row["completion"])


def test_a_schema_that_cannot_be_used_is_refused_with_the_model(folder):
    with pytest.raises(ConfigError, match=r"\Athe answer schema [^\n]+\Z"):
        generated(folder, RECORD.empty_table(), answer_schema='{"type": "strin"}')


CUT = '[{"label":"title","bbox":[1,2,30,40],"text":"A"},{"label":"text","bbox":[1,2,30,40],"text":"wor"}]'


def judged(completion, **values):
    row = {
        "kind": "pdf", "task": "parse", "route": "model", "page_width_pt": 100.0, "page_height_pt": 100.0,
        "completion": completion, "finish_reason": "length", "mean_logprob": -1.0, "engine": "torch", "attempt": 2,
    }  # fmt: skip
    table = pa.Table.from_pylist([row | values], schema=RECORD)
    [result] = ParseCompletions(ParseCompletionsConfig())(table).to_pylist()
    return result


def test_blocks_that_were_closed_for_lack_of_room_are_kept_and_the_row_says_so():
    row = judged(CUT)
    assert row["status"] == "partial_success"
    assert [(block["label"], block["text"]) for block in row["blocks"]] == [("title", "A"), ("text", "wor")]
    assert (row["parse_status"], row["rung"], row["error"]) == ("ok", "same_pixels", None)
    assert [failure["error_code"] for failure in row["recovered"]] == ["length"]


@pytest.mark.parametrize(
    ("completion", "values"),
    [
        (CUT[:-3], {}), ("[]", {}), ("Words.", {}), (CUT, {"task": "ocr"}), (CUT, {"kind": "video"}),
        (CUT, {"finish_reason": "repetition"}),
    ],
)  # fmt: skip
def test_other_answers_without_an_end_fail_as_ever(completion, values):
    assert judged(completion, **values)["status"] in ("truncated", "repetition")


def test_the_pages_own_text_is_better_than_a_part_of_its_blocks():
    row = judged(CUT, text_layer_text="A words")
    assert (row["status"], row["route"]) == ("fallback", "text_layer")
