"""Which pages are shown to the model once more, and what their rows say."""

import pytest

from operators.base import rows_to_table
from operators.minicpmv.slicing import SliceConfig
from operators.parse.completions import ParseCompletions, ParseCompletionsConfig
from operators.parse.second_look import SecondLook
from schemas.errors import GenerationError, PromptTooLongError, error_struct
from schemas.generation import RECORD

MERGED = SecondLook(first=SliceConfig(), other=SliceConfig(downsample_mode="4x"))
RESAMPLED = SecondLook(first=SliceConfig(query_count=64), other=SliceConfig(query_count=64, max_slices=6))
PIXELS = b"\x01\x02\x03"


def judged(config, **values):
    row = {
        "unit_id": "u", "record_key": "k", "kind": "pdf", "task": "ocr", "route": "model", "route_reason": "a scan",
        "image_width_px": 1654, "image_height_px": 2339, "pixels": PIXELS, "completion": "Words.",
        "finish_reason": "length", "attempt": 1, "engine": "torch",
    }  # fmt: skip
    table = rows_to_table([row | values], RECORD)
    return ParseCompletions(ParseCompletionsConfig(**config))(table).to_pylist()[0]


@pytest.mark.parametrize(
    ("values", "code", "status"),
    [
        ({}, "length", "truncated"),
        ({"finish_reason": "repetition", "attempt": 2}, "repetition", "repetition"),
        ({"finish_reason": "stop", "completion": "The end. " * 60}, "repetition", "repetition"),
        ({"finish_reason": "stop", "task": "parse", "completion": "[["}, "unparsable", "failure"),
        ({"kind": "image"}, "length", "truncated"),
    ],
)
def test_a_page_whose_answer_failed_fails_for_now_and_is_owed_a_second_look(values, code, status):
    row = judged({"second_look": MERGED}, **values)
    assert (row["needs_second_look"], row["status"], row["route"], row["rung"]) == (True, status, "model", None)
    assert (row["error"]["error_code"], row["error"]["attempt"]) == (code, values.get("attempt", 1))
    assert (row["pixels"], row["recovered"], row["text"]) == (None, None, None)


def test_a_page_with_text_of_its_own_needs_none():
    row = judged({"second_look": MERGED}, text_layer_text="From the file.")
    assert (row["needs_second_look"], row["status"], row["rung"]) == (None, "fallback", "text_layer")


@pytest.mark.parametrize(
    "values", [{"kind": "video"}, {"task": "caption"}, {"finish_reason": "stop"}, {"route": "cpu"}, {"route": "none"}]
)
def test_others_need_none(values):
    assert judged({"second_look": MERGED}, **values)["needs_second_look"] is None


@pytest.mark.parametrize(
    "failure", [GenerationError("no memory", code="out_of_memory"), PromptTooLongError("9 tokens")]
)
def test_a_page_to_which_the_model_wrote_nothing_goes_to_the_cpu_reader(failure):
    error = error_struct(failure, "Generate", attempt=1)
    row = judged({"second_look": MERGED}, error=error, completion=None, finish_reason=None)
    assert (row["needs_second_look"], row["route"], row["status"], row["rung"]) == (None, "cpu", None, "cpu")


def test_a_page_that_looks_the_same_under_the_other_limit_goes_to_the_cpu_reader():
    # 500 x 900 px are three slices at most, whatever the limit; 1654 x 2339 are twenty.
    small = judged({"second_look": RESAMPLED}, image_height_px=500, image_width_px=900)
    assert (small["needs_second_look"], small["route"]) == (None, "cpu")
    assert judged({"second_look": RESAMPLED})["needs_second_look"] is True
    assert judged({"second_look": MERGED}, image_height_px=500, image_width_px=900)["needs_second_look"] is True


def test_the_answer_of_a_second_look_is_a_success_that_names_its_rung():
    first = error_struct(GenerationError("cut", code="length"), "ParseCompletions", attempt=2)
    for attempt in (3, 4):
        row = judged({"is_second_look": True}, finish_reason="stop", attempt=attempt, recovered=[first])
        assert (row["status"], row["rung"], row["recovered"]) == ("success", "other_pixels", [first])


def test_what_fails_at_the_second_look_too_goes_to_the_cpu_reader_and_never_to_a_third():
    first = error_struct(GenerationError("cut", code="length"), "ParseCompletions", attempt=1)
    row = judged({"is_second_look": True}, attempt=2, recovered=[first])
    assert (row["needs_second_look"], row["route"], row["rung"], row["pixels"]) == (None, "cpu", "cpu", PIXELS)
    assert [failure["attempt"] for failure in row["recovered"]] == [1, 2]
    last = judged({"is_second_look": True, "cpu_fallback": False}, attempt=2, recovered=[first])
    assert (last["needs_second_look"], last["status"], last["rung"]) == (None, "truncated", None)
    assert (last["error"]["attempt"], last["recovered"]) == (2, [first])
