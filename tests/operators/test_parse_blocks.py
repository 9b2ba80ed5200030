import json
import random

import pyarrow as pa
import pytest

from operators.parse.blocks import ParsedBlocks, blocks_from_markdown, parse_blocks, thousandths_to_points
from schemas.document import BLOCK
from schemas.vocabulary import BLOCK_LABELS, PARSE_STATUSES


def _answer(*items: object) -> str:
    return json.dumps(list(items))


def _item(label: str = "text", bbox: object = (100, 200, 300, 400), text: str = "words") -> dict[str, object]:
    return {"label": label, "bbox": bbox, "text": text}


def _parse(answer: str) -> ParsedBlocks:
    return parse_blocks(answer, 600.0, 800.0)


def test_an_answer_to_the_letter_is_ok_and_boxes_become_points() -> None:
    parsed = _parse(_answer(_item("title", text="Report"), _item("text", [0, 500, 1000, 1000], "Body.")))
    assert parsed.status == "ok"
    assert [block["label"] for block in parsed.blocks] == ["title", "text"]
    assert parsed.blocks[0]["bbox"] == pytest.approx([60, 160, 180, 320])
    assert parsed.blocks[1]["bbox"] == pytest.approx([0, 400, 600, 800])
    assert parsed.blocks[0]["level"] == 1
    assert (parsed.dropped_box_count, parsed.unknown_label_count, parsed.dropped_item_count) == (0, 0, 0)


def test_an_empty_list_is_an_empty_page() -> None:
    assert _parse(" [] ") == ParsedBlocks([], "ok")


def test_tables_are_sanitised_and_formulas_are_latex() -> None:
    table = "<table onload=x><tr><td>a</td><td><img src=x>b</td></tr></table>"
    parsed = _parse(_answer(_item("table", text=table), _item("formula", text="$$\\frac{a}{b}$$")))
    assert parsed.status == "ok"
    assert parsed.blocks[0]["html"] == "<table><tr><td>a</td><td>b</td></tr></table>"
    assert parsed.blocks[0]["text"] == "a\tb"
    assert parsed.blocks[1]["latex"] == "\\frac{a}{b}"


def test_latex_with_single_backslashes_is_not_read_as_control_characters() -> None:
    answer = r'[{"label": "formula", "bbox": [1, 2, 3, 4], "text": "\frac{\alpha}{\beta} \times \nabla f \u0394"}]'
    [block] = _parse(answer).blocks
    assert block["latex"] == "\\frac{\\alpha}{\\beta} \\times \\nabla f Δ"


@pytest.mark.parametrize(
    "answer",
    [
        '```json\n[{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"}]\n```',
        'Here it is:\n[{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"}]\nI hope this helps.',
        '{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"}',
        '{"blocks": [{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"}]}',
        '[{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"},',
        '[{"label": "text", "bbox": [1, 2, 3, 4], "text": "words"',
        '[{"label": "text", "bbox": [1, 2, 3, 4], "text": "words", }]',
    ],
)
def test_damaged_answers_are_salvaged(answer: str) -> None:
    parsed = _parse(answer)
    assert parsed.status == "salvaged"
    assert [block["text"] for block in parsed.blocks] == ["words"]
    assert parsed.blocks[0]["bbox"] == pytest.approx([0.6, 1.6, 1.8, 3.2])


def test_a_truncated_answer_keeps_whole_blocks_and_the_begun_text() -> None:
    whole = _answer(_item(text="first"), _item(text='second "quoted" line\nnext'))
    parsed = _parse(whole[: whole.index("next")])
    assert parsed.status == "salvaged"
    assert [block["text"] for block in parsed.blocks] == ["first", 'second "quoted" line']


@pytest.mark.parametrize(
    "box", [[0, 0, 1001, 10], [-1, 0, 5, 5], [5, 5, 5, 9], [9, 5, 5, 9], [1, 2, 3], ["1", 2, 3, 4], [True, 0, 5, 5], 7]
)
def test_impossible_boxes_are_dropped_and_counted(box: object) -> None:
    parsed = _parse(_answer(_item(bbox=box)))
    assert parsed.status == "salvaged"
    assert parsed.blocks[0]["bbox"] is None
    assert parsed.dropped_box_count == 1


def test_numbers_beyond_a_float_are_no_box() -> None:
    assert thousandths_to_points([0, 0, 10**400, 1], 10.0, 10.0) is None
    assert _parse('[{"label": "text", "bbox": [0, 0, 1e999, NaN], "text": "x"}]').blocks[0]["bbox"] is None


def test_unknown_labels_become_text_and_keep_what_the_model_wrote() -> None:
    parsed = _parse(_answer(_item("sidebar"), _item("Section-header", text="Part"), _item("figure", text="")))
    assert [(block["label"], block["label_raw"]) for block in parsed.blocks] == [
        ("text", "sidebar"),
        ("section_header", "Section-header"),
        ("picture", "figure"),
    ]
    assert parsed.unknown_label_count == 1


def test_without_a_page_size_there_are_no_boxes() -> None:
    parsed = parse_blocks(_answer(_item()), None, None)
    assert parsed.blocks[0]["bbox"] is None
    assert parsed.dropped_box_count == 0


def test_plain_markdown_is_salvaged_without_boxes() -> None:
    markdown = (
        "# Report\n\nA paragraph of\ntwo lines.\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "$$\nx^2\n$$\n\n```\ncode\n```\n\n<table><tr><td>z</td></tr></table>\n\n![a cat](cat.png)"
    )
    parsed = _parse(markdown)
    assert parsed.status == "salvaged"
    assert [block["label"] for block in parsed.blocks] == [
        "title", "text", "list_item", "list_item", "table", "formula", "code", "table", "picture",
    ]  # fmt: skip
    assert all(block["bbox"] is None for block in parsed.blocks)
    assert parsed.blocks[4]["html"].startswith("<table><tr><th>a</th>")
    assert parsed.blocks[5]["latex"] == "x^2"
    assert parsed.blocks[6]["text"] == "code"


@pytest.mark.parametrize("answer", ["", "   \n", "[[[[", '[{"', "{}", '[1, 2, "x"]', "null\n" * 0])
def test_an_answer_without_a_block_is_invalid(answer: str) -> None:
    parsed = _parse(answer)
    assert (parsed.status, parsed.blocks) == ("invalid", [])


def test_deep_nesting_is_survived() -> None:
    assert _parse("[" * 100_000).status == "invalid"
    assert _parse('{"a":' * 2_000).status == "invalid"


def test_markdown_of_a_block_is_kept_where_it_says_more_than_the_text() -> None:
    [block] = blocks_from_markdown("some **bold** words")
    assert block["text"] == "some bold words"
    assert block["markdown"] == "some **bold** words"


def test_no_string_raises_and_every_block_fits_the_schema() -> None:
    source = random.Random(11)
    whole = _answer(_item("table", text="<table><tr><td>1</td></tr></table>"), _item("formula", text="\\frac{a}{b}"))
    pieces = [
        '{"label": "text", ', '"bbox": [1, 2, 3, 4]', "[", "]", "{", "}", '"', ",", ":", "\\", "\\u12", "\\f", "1e999",
        "-", "null", "```", "# ", "| a |", "|---|", "$$", "<table>", "<td>", "\n", "\x00", "\ud83d", "漢", '"text": "x',
    ]  # fmt: skip
    for _ in range(4000):
        if source.random() < 0.4:
            cut = list(whole[: source.randrange(len(whole))])
            for _ in range(source.randrange(4)):
                cut.insert(source.randrange(len(cut) + 1), source.choice(pieces))
            answer = "".join(cut)
        else:
            answer = "".join(source.choices(pieces, k=source.randrange(25)))
        parsed = _parse(answer)
        assert parsed.status in PARSE_STATUSES
        assert (parsed.status == "invalid") <= (parsed.blocks == [])
        assert all(block["label"] in BLOCK_LABELS for block in parsed.blocks)
        pa.array(parsed.blocks, BLOCK)
