import json
import math
from typing import Any

import pyarrow as pa
import pytest

from operators.base import rows_to_table
from operators.parse.completions import ParseCompletions, ParseCompletionsConfig, is_looping, split_thought
from schemas.errors import (
    ContractError,
    DecodeError,
    GenerationError,
    PrepareError,
    PromptTooLongError,
    RecordError,
    error_struct,
)
from schemas.generation import RECORD
from schemas.vocabulary import STATUSES

PIXELS = b"\x01\x02\x03"
BLOCK_VALUE = {"label": "text", "label_raw": "text", "bbox": [1.0, 2.0, 3.0, 4.0], "text": "From the file."}
LOOP = "The end. " * 60


def _row(**values: Any) -> dict[str, Any]:
    row = {
        "unit_id": "u", "record_key": "k", "kind": "pdf", "task": "ocr", "route": "model",
        "route_reason": "no text layer",
        "page_width_pt": 600.0, "page_height_pt": 800.0, "pixels": PIXELS, "completion": "# Title\n\nWords.",
        "finish_reason": "stop", "mean_logprob": -0.5, "engine": "torch",
    }  # fmt: skip
    return row | values


def _run(*rows: dict[str, Any], **config: Any) -> list[dict[str, Any]]:
    table = rows_to_table(list(rows), RECORD)
    produced = ParseCompletions(ParseCompletionsConfig(**config))(table)
    assert set(produced.column_names) == set(RECORD.names)
    return produced.to_pylist()


def test_a_finished_page_is_a_success_with_text_and_plain_text() -> None:
    [row] = _run(_row())
    assert (row["status"], row["parse_status"], row["error"]) == ("success", "ok", None)
    assert row["text"] == "# Title\n\nWords."
    assert row["plain_text"] == "Title\n\nWords."
    assert row["confidence"] == pytest.approx(math.exp(-0.5))
    assert row["raw_output"] is None
    assert row["blocks"] is None
    assert row["pixels"] is None


def test_a_failed_row_passes_through() -> None:
    failed = error_struct(DecodeError("truncated"), "DecodeDocuments")
    before = _row(error=failed, completion=None, finish_reason=None, route=None, pixels=None)
    [row] = _run(before)
    assert row["error"] == failed
    assert (row["status"], row["text"], row["raw_output"], row["recovered"]) == (None, None, None, None)


def test_an_empty_batch_keeps_its_schema() -> None:
    produced = ParseCompletions(ParseCompletionsConfig())(RECORD.empty_table())
    assert produced.num_rows == 0
    assert {field.name: field.type for field in produced.schema} == {field.name: field.type for field in RECORD}


def test_a_missing_column_is_a_contract_error() -> None:
    table = rows_to_table([_row()], RECORD).drop_columns(["finish_reason"])
    with pytest.raises(ContractError, match="finish_reason"):
        ParseCompletions(ParseCompletionsConfig())(table)


def test_row_order_is_kept_over_mixed_routes() -> None:
    rows = [_row(record_key=str(n), route=("model", "none", "cpu")[n % 3]) for n in range(9)]
    assert [row["record_key"] for row in _run(*rows)] == [str(n) for n in range(9)]


def test_a_text_layer_page_is_a_success_without_an_engine() -> None:
    values = {"route": "text_layer", "text_layer_text": "**From** the file.", "text_layer_blocks": [BLOCK_VALUE]}
    ocr, parse = _run(
        _row(**values, completion=None, engine=None, finish_reason=None),
        _row(**values, completion=None, engine=None, finish_reason=None, task="parse"),
    )
    assert (ocr["status"], ocr["text"], ocr["plain_text"]) == ("success", "**From** the file.", "From the file.")
    assert (ocr["engine"], ocr["blocks"], ocr["pixels"]) == ("none", None, None)
    assert parse["blocks"][0]["text"] == "From the file."


def test_blank_and_skipped_pages() -> None:
    blank, skipped = _run(_row(route="none", route_reason="blank"), _row(route="none", route_reason="not asked for"))
    assert (blank["status"], blank["text"], blank["plain_text"]) == ("blank", "", "")
    assert (skipped["status"], skipped["text"]) == ("skipped", None)


def test_rows_for_the_cpu_reader_wait_with_their_pixels() -> None:
    [row] = _run(_row(route="cpu", completion=None, finish_reason=None))
    assert (row["status"], row["error"], row["pixels"]) == (None, None, PIXELS)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"finish_reason": "length"}, "length"),
        ({"finish_reason": "repetition"}, "repetition"),
        ({"finish_reason": "abort"}, "generation"),
        ({"finish_reason": None, "completion": None}, "generation"),
        ({"completion": LOOP}, "repetition"),
        ({"completion": "<think>It never ends"}, "generation"),
        ({"task": "parse", "completion": "[["}, "unparsable"),
    ],
)
def test_a_failed_answer_falls_back_to_the_trusted_text_layer(values: dict[str, Any], code: str) -> None:
    [row] = _run(_row(**values, text_layer_text="From the file."))
    assert (row["status"], row["route"], row["text"]) == ("fallback", "text_layer", "From the file.")
    assert [failure["error_code"] for failure in row["recovered"]] == [code]
    assert row["raw_output"] == values.get("completion", "# Title\n\nWords.")
    assert row["error"] is None
    assert row["pixels"] is None
    assert code in row["route_reason"]


def test_without_a_text_layer_the_cpu_reader_is_asked() -> None:
    [row] = _run(_row(finish_reason="length"))
    assert (row["status"], row["route"], row["error"], row["pixels"]) == (None, "cpu", None, PIXELS)
    assert row["recovered"][0]["error_code"] == "length"
    assert row["recovered"][0]["stage"] == "generate"
    assert row["raw_output"] == "# Title\n\nWords."
    assert row["text"] is None


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("length", "truncated", "length"), ("repetition", "repetition", "repetition"), ("abort", "failure", "generation")],
)
def test_the_last_rung_is_an_error(reason: str, status: str, code: str) -> None:
    [row] = _run(_row(finish_reason=reason), cpu_fallback=False)
    assert (row["status"], row["error"]["error_code"]) == (status, code)
    assert row["status"] in STATUSES
    assert (row["text"], row["pixels"], row["recovered"]) == (None, None, None)
    assert row["raw_output"] == "# Title\n\nWords."


MODEL_FAILURES = [
    (GenerationError("the model failed on this request alone", code="out_of_memory", retryable=True), "Generate"),
    (GenerationError("the model failed on this request alone"), "Generate"),
    (PromptTooLongError("the prompt has 9 tokens", stage="generate"), "Generate"),
    (PromptTooLongError("the prompt has 9 tokens"), "PrepareImages"),
    (PrepareError("the page cannot be sliced", code="too_small"), "PrepareImages"),
    (RecordError("Generate: 'NoneType' object", code="internal", stage="postprocess"), "Generate"),
]


@pytest.mark.parametrize(("failure", "component"), MODEL_FAILURES)
def test_where_the_model_failed_the_trusted_text_layer_answers(failure: RecordError, component: str) -> None:
    error = error_struct(failure, component)
    [row] = _run(_row(error=error, completion=None, finish_reason=None, text_layer_text="From the file."))
    assert (row["status"], row["route"], row["text"]) == ("fallback", "text_layer", "From the file.")
    assert (row["error"], row["recovered"]) == (None, [error])
    assert (row["pixels"], row["raw_output"], row["engine"]) == (None, None, "none")
    assert row["route_reason"] == f"no text layer; model answer: {failure.code}"


@pytest.mark.parametrize(("failure", "component"), MODEL_FAILURES)
def test_where_the_model_failed_the_cpu_reader_is_asked(failure: RecordError, component: str) -> None:
    earlier = error_struct(DecodeError("orientation", stage="preprocess"), "DecodeDocuments")
    error = error_struct(failure, component)
    for task in ("ocr", "parse"):
        row = _row(task=task, error=error, recovered=[earlier], completion=None, finish_reason=None)
        [row] = _run(row)
        assert (row["status"], row["route"], row["error"], row["pixels"]) == (None, "cpu", None, PIXELS)
        assert row["recovered"] == [earlier, error]


@pytest.mark.parametrize(
    ("values", "config"),
    [
        ({}, {"cpu_fallback": False}),
        ({"pixels": None}, {}),
        ({"task": "caption", "text_layer_text": "From the file."}, {}),
        ({"kind": "video"}, {}),
    ],
)
def test_where_the_model_failed_and_nothing_else_answers_the_error_stays(values: dict, config: dict) -> None:
    error = error_struct(*MODEL_FAILURES[0])
    [row] = _run(_row(error=error, completion=None, finish_reason=None, **values), **config)
    assert (row["status"], row["error"], row["recovered"]) == ("failure", error, None)
    assert (row["text"], row["pixels"], row["route"]) == (None, None, "model")


def test_a_page_that_failed_before_the_model_keeps_its_error_although_it_has_text() -> None:
    error = error_struct(DecodeError("the page crashed", code="crash", stage="render"), "DecodeDocuments")
    [row] = _run(_row(error=error, completion=None, finish_reason=None, text_layer_text="From the file."))
    assert (row["status"], row["error"], row["text"]) == (None, error, None)


def test_captions_and_videos_have_no_cpu_rung_and_no_text_layer_rung() -> None:
    caption, video = _run(
        _row(task="caption", finish_reason="length", text_layer_text="From the file."),
        _row(kind="video", finish_reason="length"),
    )
    assert (caption["status"], caption["error"]["error_code"]) == ("truncated", "length")
    assert video["status"] == "truncated"


def test_failures_survived_before_are_kept() -> None:
    earlier = error_struct(DecodeError("orientation"), "DecodeDocuments")
    [row] = _run(_row(finish_reason="length", recovered=[earlier], text_layer_text="x"))
    assert [failure["error_code"] for failure in row["recovered"]] == ["damaged", "length"]


def test_a_parsed_page_has_blocks_and_markdown_made_of_them() -> None:
    items = [
        {"label": "title", "bbox": [0, 0, 500, 100], "text": "Report"},
        {"label": "table", "bbox": [0, 100, 1000, 500], "text": "<table><tr><td>1</td></tr></table>"},
    ]
    [row] = _run(_row(task="parse", completion=json.dumps(items)))
    assert (row["status"], row["parse_status"]) == ("success", "ok")
    assert row["text"] == "# Report\n\n<table><tr><td>1</td></tr></table>"
    assert row["blocks"][0]["bbox"] == pytest.approx([0, 0, 300, 80])
    assert row["plain_text"] == "Report\n\n1"


def test_a_truncated_parse_that_ended_by_itself_is_salvaged() -> None:
    [row] = _run(_row(task="parse", completion='[{"label": "text", "bbox": [1, 2, 3, 4], "text": "Half a'))
    assert (row["status"], row["parse_status"], row["text"]) == ("success", "salvaged", "Half a")


def test_a_clip_is_captioned_and_its_on_screen_text_is_read() -> None:
    caption, text = _run(
        _row(kind="video", task="caption", completion='"A dog runs."'),
        _row(kind="video", task="parse", completion="BREAKING NEWS\\nMore at ten"),
    )
    assert (caption["status"], caption["text"]) == ("success", "A dog runs.")
    assert (text["status"], text["text"], text["blocks"]) == ("success", "BREAKING NEWS\nMore at ten", None)


def test_an_empty_answer_is_a_blank_page_unless_something_must_be_there() -> None:
    blank, layout, caption, contradicted = _run(
        _row(completion=" \n"),
        _row(task="parse", completion="[]"),
        _row(task="caption", completion=""),
        _row(completion="", text_layer_text="From the file."),
    )
    assert (blank["status"], blank["text"]) == ("blank", "")
    assert (layout["status"], layout["blocks"]) == ("blank", [])
    assert (caption["status"], caption["error"]["error_code"]) == ("failure", "unparsable")
    assert (contradicted["status"], contradicted["text"]) == ("fallback", "From the file.")


def test_the_thought_is_never_in_the_text() -> None:
    kept, split = _run(
        _row(thought="I looked.", completion="Words."),
        _row(thought=None, completion="<think>\nI look.\n</think>\n\nWords."),
    )
    assert (kept["text"], kept["thought"]) == ("Words.", "I looked.")
    assert (split["text"], split["thought"]) == ("Words.", "I look.")
    assert split_thought("<think>on and on", None) == ("<think>on and on", "on and on")


def test_a_row_that_has_a_status_already_is_left_alone() -> None:
    [row] = _run(_row(status="success", text="Copied.", completion="Other."))
    assert row["text"] == "Copied."


@pytest.mark.parametrize("text", [LOOP, "Intro.\n" + "ha" * 200, "x\n" + "same line of words\n" * 20, "a" * 400])
def test_loops_are_found(text: str) -> None:
    assert is_looping(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A normal sentence, and another one.",
        "Chapter one " + "." * 300,
        "Name: " + "_" * 400,
        "Yes\nNo\n" * 12,
        "<table>" + "<tr><td>0</td><td>0</td></tr>" * 60 + "</table>",
        "| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 60,
        "\n".join(f"line {n}" for n in range(200)),
    ],
)
def test_what_real_pages_repeat_is_no_loop(text: str) -> None:
    assert not is_looping(text)


def test_the_check_can_be_switched_off() -> None:
    [row] = _run(_row(completion=LOOP), repetition_check=False)
    assert row["status"] == "success"


def test_batch_composition_does_not_change_a_row() -> None:
    rows = [_row(), _row(finish_reason="length"), _row(task="caption", completion="A dog.")]
    together = _run(*rows)
    assert together == [_run(row)[0] for row in rows]
    assert isinstance(rows_to_table(together, RECORD), pa.Table)


def test_a_segment_that_lost_frames_is_a_partial_success() -> None:
    damage = {"stage": "sample", "error_code": "truncated_stream", "error_category": "corrupt_input", "message": "cut"}
    row = {
        "kind": "video", "task": "caption", "route": "model", "completion": "A dog runs.", "finish_reason": "stop",
        "recovered": [damage],
    }  # fmt: skip
    [result] = ParseCompletions(ParseCompletionsConfig())(rows_to_table([row], RECORD)).to_pylist()
    assert (result["status"], result["text"]) == ("partial_success", "A dog runs.")
    assert [error["error_code"] for error in result["recovered"]] == ["truncated_stream"]
