"""Damaged files through whole runs: one outcome each, and the good files beside them as if they were alone."""

import os
import sys

import pytest

from tests.fuzz.campaign import run_campaign


def test_each_damaged_file_has_one_outcome_and_harms_no_other(tmp_path):
    campaign = run_campaign(tmp_path, count=140, seed=5, files_a_run=70)
    assert campaign.outcomes.total() == 140
    assert campaign.outcomes["ok"] < 140
    assert not campaign.surprises


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_many_damaged_files_have_one_outcome_each(tmp_path, capsys):
    count = int(os.environ.get("PAGEREEL_FUZZED_FILES", "2000"))
    campaign = run_campaign(tmp_path, count=count, seed=1)
    with capsys.disabled():
        sys.stdout.write(f"\n{campaign.line()}\n")
    assert campaign.outcomes.total() == count
    assert not campaign.surprises
