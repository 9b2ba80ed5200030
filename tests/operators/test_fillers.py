import pytest

from operators.fillers import is_filler

FILLERS = [
    "<td></td>",
    "<tr><td></td><td></td></tr>\n",
    '<td colspan="2"></td>',
    "|---|---|",
    "|---|---|\n",
    "| | | |\n",
    "| 0.00 | 0.00 ",
    "<td>0.00</td>",
    "<td>&nbsp;</td>",
    ". ",
    "...... ",
    "_____ ",
    "* * *\n",
    "☐ ",
    "0",
    "2024-01-01\n",
    "& 0 & 0 \\\\ \\hline\n",
    "\\quad ",
    "<fcel><ecel>",
    "<td>N/A</td>",
    "| yes ",
    "<td>not tested</td>",
    "<td> 表 </td>",
]
LOOPS = [
    "The same words. ",
    "and ",
    "表",
    "<td>The tenant shall pay the landlord</td>",
    "<tr><td>Total</td><td>Sum</td></tr>",
    "| Total | 0.00 | EUR ",
    "Name: ____ ",
    "<b>Note</b> ",
    "x < y and ",
    "> quoted ",
    "\\frac{a}{b} ",
    "\n",
    "  ",
]


def rotations(text):
    """The pattern as it may be cut."""
    return [text[place:] + text[:place] for place in range(len(text))]


@pytest.mark.parametrize("text", FILLERS)
def test_what_documents_repeat_is_a_filler_wherever_it_is_cut(text):
    assert [cut for cut in rotations(text) if not is_filler(cut * 2)] == []


@pytest.mark.parametrize("text", LOOPS)
def test_words_are_none_wherever_they_are_cut(text):
    assert [cut for cut in rotations(text) if is_filler(cut * 2)] == []


def test_nothing_is_none():
    assert not is_filler("")
