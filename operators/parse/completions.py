"""From a model's completion, or a page's text layer, to the result of the row."""

import json
import math
import re
from typing import Annotated, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.base import Operator, OperatorConfig, with_columns
from operators.parse.blocks import ParsedBlocks, blocks_from_markdown, parse_blocks
from operators.parse.captions import parse_caption
from operators.parse.markdown import blocks_to_markdown, clean_answer, plain_text
from operators.parse.second_look import SecondLook
from schemas.errors import GenerationError, ParseError, RecordError, error_struct
from schemas.generation import FAILURES, RECORD, RESULT, ROUTE

_READS: Final = (
    "kind", "task", "route", "route_reason", "page_width_pt", "page_height_pt", "text_layer_text", "text_layer_blocks",
    "image_width_px", "image_height_px", "pixels", "completion", "thought", "finish_reason", "attempt", "mean_logprob",
    "engine", "status", "recovered", "error",
)  # fmt: skip
_CHANGES: Final = ("pixels", "thought", "engine")
_FINAL_STATUS: Final = {"length": "truncated", "repetition": "repetition"}
_MODEL_STAGES: Final = ("preprocess", "generate")
_MODEL_COMPONENTS: Final = ("PrepareImages", "Generate", "EncodePages", "AskEndpoint")
"""Where a defect is caught around these, its stage says nothing."""

_MIN_REPEATS: Final = 8
_MIN_LOOP_CHARS: Final = 240
_MIN_RULE_CHARS: Final = 1500
"""Leaders and form rules ("......", "______") are this long in real pages before they are a loop."""
_LONGEST_UNIT_CHARS: Final = 600


class ParseCompletionsConfig(OperatorConfig):
    """What may answer when the model does not."""

    cpu_fallback: Annotated[
        bool,
        Field(description="Pages whose model answer failed and that have no trustworthy text go to the CPU reader."),
    ] = True
    repetition_check: Annotated[
        bool, Field(description="A finished answer whose end repeats itself counts as repetition.")
    ] = True
    second_look: Annotated[
        SecondLook | None, Field(description="How pages are sliced once more whose answer failed; null: they are not.")
    ] = None
    is_second_look: Annotated[bool, Field(description="Whether answers are those to other pixels of the page.")] = False


class ParseCompletions(Operator[ParseCompletionsConfig]):
    """Judge each completion and fill the result columns; a row with a status passes untouched.

    The ladder of a failed answer, and of an error of the model or of what was prepared for it: the page's trusted text
    layer, then the blocks of an answer that was closed for lack of room, then other pixels (the row fails and is marked
    for a second look, which replaces it), then the CPU reader (the row is left on the `cpu` route with its pixels and a
    null status), then the error. Rows with any other error pass untouched. Pixels stay on rows for the CPU reader only.
    """

    reads = pa.schema([RECORD.field(name) for name in _READS])
    adds = pa.schema([*RESULT, *ROUTE, *(RECORD.field(name) for name in _CHANGES), *FAILURES])

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with every open row answered, sent to the CPU reader, or failed."""
        names = [name for name in (*self.adds.names, *_READS) if name in table.column_names and name != "pixels"]
        rows = table.select(list(dict.fromkeys(names))).to_pylist()
        has_pixels = pc.is_valid(table["pixels"]).to_pylist()
        for row, pixels in zip(rows, has_pixels, strict=True):
            if row["status"] is not None:
                continue
            if model_failed(row):
                row.update(_next_rung(row, row["error"], self.config, pixels))
            elif row["error"] is None:
                lost = lost_frames(row["recovered"])
                row.update(answer_row(row, self.config, has_pixels=pixels))
                if row["status"] == "success" and lost:
                    row["status"] = "partial_success"
        columns = {name: [row.get(name) for row in rows] for name in self.adds.names if name != "pixels"}
        waiting = pa.array([row["error"] is None and row["status"] is None for row in rows])
        kept = pc.if_else(waiting, table["pixels"], pa.scalar(None, pa.large_binary()))
        index = table.schema.get_field_index("pixels")
        return with_columns(table.set_column(index, RECORD.field("pixels"), kept), columns, self.adds)


def lost_frames(recovered: list[dict[str, Any]] | None) -> bool:
    """Return whether a part of the source could not be decoded: what was answered is not the whole."""
    return any(error["stage"] in ("demux", "sample") for error in recovered or [])


def model_failed(row: dict[str, Any]) -> bool:
    """Return whether a row carries an error that is not of its source: the model gave no answer, or was not asked."""
    error = row["error"]
    if error is None or row["route"] != "model":
        return False
    return error["stage"] in _MODEL_STAGES or error["component"] in _MODEL_COMPONENTS


def answer_row(row: dict[str, Any], config: ParseCompletionsConfig, *, has_pixels: bool) -> dict[str, Any]:
    """Return the changed values of one open row.

    Args:
        row: the columns that the operator reads, but for the pixels.
        config: which rungs there are.
        has_pixels: whether the CPU reader would find anything.
    """
    if row["route"] == "none":
        is_blank = row["route_reason"] == "blank"
        return {"status": "blank", "text": "", "plain_text": ""} if is_blank else {"status": "skipped"}
    if row["route"] == "text_layer":
        if row["text_layer_text"] is None:
            missing = ParseError("the page was routed to its text layer, but carries none", code="internal")
            return _failed(_failure(missing, row))
        return _text_layer_result(row) | {"status": "success"}
    if row["route"] == "cpu":
        return {}
    answer, thought = split_thought(row["completion"] or "", row["thought"])
    try:
        result = read_answer(answer, row, config)
    except RecordError as error:
        cut = cut_result(answer, row) if error.code == "length" else None
        if cut is not None:
            return cut | {
                "recovered": [*(row["recovered"] or []), _failure(error, row)],
                "rung": _rung(row, config),
                "thought": thought,
                "confidence": _confidence(row),
            }
        judged = {"thought": thought, "raw_output": row["completion"]}
        if error.code == "unparsable":
            judged["parse_status"] = "invalid"
        return judged | _next_rung(row, _failure(error, row), config, has_pixels)
    return result | {"rung": _rung(row, config), "thought": thought, "confidence": _confidence(row)}


def _rung(row: dict[str, Any], config: ParseCompletionsConfig) -> str:
    return "other_pixels" if config.is_second_look else "first" if row["attempt"] in (None, 1) else "same_pixels"


def _confidence(row: dict[str, Any]) -> float | None:
    return None if row["mean_logprob"] is None else math.exp(min(row["mean_logprob"], 0.0))


def cut_result(answer: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the blocks of a page's answer that had no room to go on and was closed; None where it holds none.

    Only one that is JSON to its end counts, as the grammar of a schema closes it: what a model wrote freely may be cut
    off anywhere. Where the page carries its own text, that is whole and better.
    """
    if row["task"] != "parse" or row["kind"] == "video" or row["text_layer_text"] is not None:
        return None
    try:
        json.loads(answer)
    except (ValueError, RecursionError):
        return None
    parsed = parse_blocks(answer, row["page_width_pt"], row["page_height_pt"])
    return _blocks_result(parsed) | {"status": "partial_success"} if parsed.blocks else None


def read_answer(answer: str, row: dict[str, Any], config: ParseCompletionsConfig) -> dict[str, Any]:
    """Return status, text, blocks and parse status of a model's answer.

    Raises:
        GenerationError: the answer did not end by itself, or its end repeats itself.
        ParseError: the answer does not follow the task's grammar.
    """
    reason = row["finish_reason"]
    if row["completion"] is None or reason not in ("stop", "length", "repetition"):
        raise GenerationError(f"no answer (finish reason {reason})")
    if reason != "stop":
        wanted = "cut off by the token limit" if reason == "length" else "stopped in a loop"
        raise GenerationError(f"answer {wanted} after {len(answer)} characters", code=reason)
    if answer.lstrip().startswith("<think>"):
        raise GenerationError("the answer ends inside its thought")
    if config.repetition_check and is_looping(answer):
        raise GenerationError(f"the end of the answer repeats itself ({len(answer)} characters)", code="repetition")
    if row["task"] == "parse" and row["kind"] != "video":
        return _parse_result(answer, row)
    text = parse_caption(answer) if row["task"] == "caption" else clean_answer(answer)
    if not text:
        return _blank_result(row)
    return {"status": "success", "text": text, "plain_text": plain_text(text), "parse_status": "ok"}


def split_thought(completion: str, thought: str | None) -> tuple[str, str | None]:
    """Return the answer and the thought of a completion that may still hold a think block."""
    before, mark, after = completion.rpartition("</think>")
    if not mark:
        unfinished = completion.lstrip().removeprefix("<think>") if completion.lstrip().startswith("<think>") else None
        return completion, thought or unfinished
    inner = re.sub(r"\A\s*<think>", "", before).strip()
    return after.strip(), thought or inner or None


def is_looping(text: str) -> bool:
    """Return True when `text` ends in one unit written again and again; tables are exempt, their rows may be equal."""
    tail = re.sub(r"<table\b.*?</table\s*>", "", text[-20_000:], flags=re.S | re.I)
    tail = "\n".join(line for line in tail.split("\n") if not line.lstrip().startswith("|")).rstrip()
    for unit_chars in range(1, min(_LONGEST_UNIT_CHARS, len(tail) // _MIN_REPEATS) + 1):
        looped = _periodic_suffix_chars(tail, unit_chars)
        unit = tail[-unit_chars:]
        enough = _MIN_LOOP_CHARS if any(map(str.isalnum, unit)) else _MIN_RULE_CHARS
        if looped >= max(enough, _MIN_REPEATS * unit_chars):
            return True
    return False


def _periodic_suffix_chars(text: str, period: int) -> int:
    """Return the length of the longest suffix of `text` that repeats every `period` characters."""
    index = len(text) - 1 - period
    while index >= 0 and text[index] == text[index + period]:
        index -= 1
    return len(text) - 1 - index


def _blank_result(row: dict[str, Any]) -> dict[str, Any]:
    """Return the result of an empty answer, which the prompts ask for where there is no text.

    Raises:
        ParseError: something must be there: a caption, or the words that the text layer holds.
    """
    if row["task"] == "caption" or row["text_layer_text"]:
        raise ParseError("the answer is empty")
    return {"status": "blank", "text": "", "plain_text": "", "parse_status": "ok"}


def _parse_result(answer: str, row: dict[str, Any]) -> dict[str, Any]:
    parsed = parse_blocks(answer, row["page_width_pt"], row["page_height_pt"])
    if parsed.status == "invalid":
        raise ParseError(f"no block could be read from an answer of {len(answer)} characters")
    if not parsed.blocks:
        return _blank_result(row) | {"blocks": []}
    return _blocks_result(parsed)


def _blocks_result(parsed: ParsedBlocks) -> dict[str, Any]:
    text = blocks_to_markdown(parsed.blocks)
    return {
        "status": "success",
        "text": text,
        "plain_text": plain_text(text),
        "blocks": parsed.blocks,
        "parse_status": parsed.status,
    }


def _text_layer_result(row: dict[str, Any]) -> dict[str, Any]:
    text = row["text_layer_text"]
    blocks = row["text_layer_blocks"]
    if row["task"] != "parse":
        blocks = None
    elif blocks is None:
        blocks = blocks_from_markdown(text)
    return {"text": text, "plain_text": plain_text(text), "blocks": blocks, "engine": "none"}


def _next_rung(
    row: dict[str, Any], error: dict[str, Any], config: ParseCompletionsConfig, has_pixels: bool
) -> dict[str, Any]:
    """Return what answers instead of a failed model answer; `error` is a value of the `ERROR` struct."""
    survived = {"recovered": [*(row["recovered"] or []), error], "error": None}
    reads_text = row["kind"] in ("pdf", "image") and row["task"] in ("ocr", "parse")
    reason = f"{row['route_reason'] or 'model'}; model answer: {error['error_code']}"
    if reads_text and row["text_layer_text"] is not None:
        changed = {"status": "fallback", "route": "text_layer", "route_reason": reason, "rung": "text_layer"}
        return survived | changed | _text_layer_result(row)
    if reads_text and config.second_look and config.second_look.may_help(row, error["error_code"]):
        return _failed(error) | {"needs_second_look": True}
    if reads_text and config.cpu_fallback and has_pixels:
        return survived | {"route": "cpu", "route_reason": reason, "rung": "cpu"}
    return _failed(error)


def _failure(error: RecordError, row: dict[str, Any]) -> dict[str, Any]:
    return error_struct(error, ParseCompletions.__name__, attempt=row["attempt"])


def _failed(error: dict[str, Any]) -> dict[str, Any]:
    return {"status": _FINAL_STATUS.get(error["error_code"], "failure"), "text": None, "error": error}
