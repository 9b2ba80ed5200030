import random

import pytest

from operators.parse.markdown import blocks_to_markdown, clean_answer, plain_text, repair_newlines, strip_fence
from operators.parse.tables import is_pipe_rule, pipes_to_html, sanitise_table, table_text


def _block(label: str, text: str = "", **fields: object) -> dict[str, object]:
    empty = {"level": None, "markdown": None, "html": None, "latex": None}
    return {"label": label, "text": text, **empty, **fields}


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("# Title #\n\ntext", "Title\n\ntext"),
        ("**bold** and *it* and ~~gone~~", "bold and it and gone"),
        ("snake_case_name stays, _this_ does not", "snake_case_name stays, this does not"),
        ("- item\n* other\n1. first", "item\nother\n1. first"),
        ("> quoted", "quoted"),
        ("see [the page](http://a.b/c) and ![a cat](cat.png)", "see the page and a cat"),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", "a\tb\n1\t2"),
        ("<table><tr><td>x</td><td>1 &lt; 2</td></tr>\n<tr><td>y</td></tr></table>", "x\t1 < 2\ny"),
        ("$\\frac{1}{2}\\alpha + x^{2}$", "1/2α + x^2"),
        ("$$\\sum_{i=1}^n \\text{area}_i$$", "∑_i=1^n area_i"),
        ("it costs $5 and then $10", "it costs $5 and then $10"),
        ("a < b and c > d", "a < b and c > d"),
        ("`x*y*z`", "x*y*z"),
        ("```python\na = **b**\n# no heading\n```", "a = **b**\n# no heading"),
        ("one\n\n---\n\ntwo", "one\n\ntwo"),
        ("", ""),
    ],
)
def test_plain_text_has_no_markup(markdown: str, plain: str) -> None:
    assert plain_text(markdown) == plain


def test_literal_newlines_become_newlines_outside_code_maths_and_paths() -> None:
    assert repair_newlines(r"one\ntwo") == "one\ntwo"
    assert repair_newlines(r"one\nNext") == "one\nNext"
    for kept in (
        r"$\nabla\n$",
        r"$$a\nb$$",
        r"\(x\ny\)",
        r"\[x\ny\]",
        r"`a\nb`",
        r"C:\new\names",
        r"\neq and \nabla f",
    ):
        assert repair_newlines(kept) == kept
    fenced = "```\na\\nb\n```"
    assert repair_newlines(f"x\\ny\n{fenced}\nz\\nw") == f"x\ny\n{fenced}\nz\nw"


def test_a_fence_around_the_whole_answer_goes_and_others_stay() -> None:
    assert strip_fence("```markdown\n# A\n```") == "# A"
    assert strip_fence("```\ntext\n```\n") == "text"
    assert strip_fence("```markdown\n# A cut answer") == "# A cut answer"
    for kept in ("```python\nx = 1\n```", "text\n```\ncode\n```", "```md\na\n```\nb\n```\nc\n```"):
        assert strip_fence(kept) == kept


def test_a_clean_answer_has_no_control_characters() -> None:
    assert clean_answer("```md\r\na\x00\x08b\\nc\r\n```") == "ab\nc"


def test_blocks_become_markdown_by_their_labels() -> None:
    markdown = blocks_to_markdown(
        [
            _block("title", "Report", level=1),
            _block("section_header", "Part", level=3),
            _block("text", "Words."),
            _block("list_item", "one"),
            _block("list_item", "2. two"),
            _block("table", "a", html="<table><tr><td>a</td></tr></table>"),
            _block("formula", "x", latex="x^2"),
            _block("code", "a = 1"),
            _block("picture"),
            _block("page_footer", "7"),
        ]
    )
    assert markdown == (
        "# Report\n\n### Part\n\nWords.\n\n- one\n2. two\n\n<table><tr><td>a</td></tr></table>\n\n"
        "$$\nx^2\n$$\n\n```\na = 1\n```\n\n7"
    )


def test_tables_keep_table_tags_and_spans_only() -> None:
    dirty = (
        '<div onclick="x()"><table class="a" border=1><tr><th colspan="2" onclick="evil()">A<b>B</b></th></tr>'
        "<tr><td>1<script>alert(1)</script></td><td rowspan='99999'>2 < 3<br></td></tr></table></div>"
    )
    assert sanitise_table(dirty) == (
        '<table><tr><th colspan="2">AB</th></tr><tr><td>1</td><td>2 &lt; 3<br></td></tr></table>'
    )


def test_tables_are_closed_where_the_model_did_not() -> None:
    assert sanitise_table("<table><tr><td>a<td>b<tr><td>c") == (
        "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>"
    )
    assert table_text(sanitise_table("<table><tr><td>a<td>b<tr><td>c")) == "a\tb\nc"


def test_nested_tables_stay_nested() -> None:
    nested = "<table><tr><td><table><tr><td>x</td></tr></table></td><td>y</td></tr></table>"
    assert sanitise_table(nested) == nested


def test_pipe_tables_become_html() -> None:
    assert is_pipe_rule("|---|:-:|")
    assert not is_pipe_rule("| a | b |")
    assert pipes_to_html(["| a | <b> |", "|---|---|", "| 1 | 2 |"]) == (
        "<table><tr><th>a</th><th>&lt;b&gt;</th></tr><tr><td>1</td><td>2</td></tr></table>"
    )


def test_nothing_raises_and_no_tag_but_a_table_tag_survives() -> None:
    source = random.Random(5)
    pieces = [
        "<table>", "<td", ">", "</tr>", "<tr>", "<![x", "<!--", "<?", "&amp;", "&#x0;", "<script>", "a", "|", "\\n",
        "$", "`", "```", "\n", "<td colspan=3>", "</table>", "\x00", "\ud800", "\\(", "#", "*",
    ]  # fmt: skip
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randrange(30)))
        plain_text(text)
        clean_answer(text)
        markup = sanitise_table(text)
        assert markup.count("<table>") == markup.count("</table>")
        assert "<script" not in markup
