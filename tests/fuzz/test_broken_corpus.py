"""Every broken file of the wider corpus in one run with good ones: one outcome each, and no harm to the others."""

import csv

import pytest

from tests.fuzz.runs import assert_same, deaths_of, outcome_of, read_all
from tests.fuzz.seeds import make_seeds
from tests.operators.test_broken_documents import CODES_OF_WORD, OUTCOMES

WITHOUT_ERRORS = ("ok", "partial")


def expectations(corpus):
    with (corpus / "MANIFEST.csv").open(newline="") as file:
        return {row["file"]: row["expected"] for row in csv.DictReader(file) if row["file"].startswith("broken/")}


@pytest.mark.chaos
@pytest.mark.needs_corpus
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("text_layer", ["auto", "ignore"])
def test_broken_files_come_out_as_expected_and_harm_no_other(corpus, tmp_path, text_layer):
    good = make_seeds(tmp_path / "good")
    expected = expectations(corpus)
    broken = [corpus / name for name in expected]
    assert {path.name for path in broken} == {path.name for path in (corpus / "broken").iterdir()}
    alone = read_all(good, tmp_path / "alone", text_layer=text_layer)
    result = read_all([*broken, *good], tmp_path / "run", text_layer=text_layer)
    assert_same(result, alone, good)
    outcomes = {path.relative_to(corpus).as_posix(): outcome_of(result, path) for path in broken}
    unlike = {name: found for name, found in outcomes.items() if not is_allowed(expected[name], found)}
    assert not unlike, (unlike, deaths_of(result))
    assert "internal" not in outcomes.values()


def is_allowed(expected, found):
    """Return whether the MANIFEST allows an outcome; of videos it says in words how many frames come."""
    if expected not in OUTCOMES:
        may_fail = "error:" in expected
        return found in WITHOUT_ERRORS or (may_fail and found not in WITHOUT_ERRORS)
    allowed = OUTCOMES[expected]
    codes = {code for word in allowed.words for code in CODES_OF_WORD[word]}
    return (allowed.is_ok and found == "ok") or found in codes or (allowed.failed_pages and found == "partial")
