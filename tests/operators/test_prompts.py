import hashlib

import pytest

from operators.parse.blocks import parse_blocks
from operators.prompts import prompt_for
from schemas.errors import ConfigError
from schemas.vocabulary import BLOCK_LABELS, KINDS, TASKS


def test_every_task_and_kind_has_a_prompt_with_a_versioned_id() -> None:
    seen = {}
    for task in TASKS:
        for kind in KINDS:
            prompt = prompt_for(task, kind, None)
            assert prompt.prompt_id.split("-v")[-1].isdigit()
            assert prompt.sha256 == hashlib.sha256(prompt.text.encode()).hexdigest()
            assert seen.setdefault(prompt.prompt_id, prompt.text) == prompt.text
    assert len(seen) == 5


def test_pdf_pages_and_images_are_asked_the_same() -> None:
    assert prompt_for("ocr", "pdf") == prompt_for("ocr", "image")
    assert prompt_for("ocr", "pdf") != prompt_for("ocr", "video")


def test_the_parse_prompt_states_the_grammar_that_the_parser_reads() -> None:
    text = prompt_for("parse", "pdf").text
    for label in BLOCK_LABELS:
        assert label in text
    example = text[text.index("{") : text.index("}") + 1].replace("[left, top, right, bottom]", "[1, 2, 3, 4]")
    assert parse_blocks(f"[{example}]", 100.0, 100.0).status == "ok"


def test_a_custom_prompt_takes_the_place_of_the_built_in_one() -> None:
    prompt = prompt_for("ocr", "pdf", "Read the serial number.")
    assert prompt.text == "Read the serial number."
    assert prompt.prompt_id.startswith("ocr-page-custom-")
    assert prompt_for("ocr", "pdf", "Read something else.").prompt_id != prompt.prompt_id
    assert prompt_for("label", "image", "Fill in the fields.").text == "Fill in the fields."


def test_what_has_no_prompt_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no built-in prompt"):
        prompt_for("label", "pdf")
    with pytest.raises(ConfigError, match="kind"):
        prompt_for("ocr", "audio")
    with pytest.raises(ConfigError, match="empty"):
        prompt_for("ocr", "pdf", "  ")
