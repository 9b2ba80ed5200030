"""The benchmark of constrained answers: what it prints, and what its vocabulary is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jobs.bench.structured import grown_tokenizer
from tests.operators.members import qwen_tokenizer

ROOT = Path(__file__).parents[2]
OPTIONS = "--vocabulary 3000 --slots 3 --tokens 20 --repeat 2 --device cpu"


def test_it_prints_one_table_and_json_last(tmp_path):
    saved = tmp_path / "results" / "structured.json"
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "bench", "structured", *OPTIONS.split(), "--save", str(saved)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(saved.read_text())
    assert result["bench"] == "structured"
    free, bound = (sorted(result[f"{side}_us_per_token"]) for side in ("free", "constrained"))
    assert len(free) == len(bound) == len(result["host_us_per_constrained_token"]) == 2
    # Medians of two runs each, rounded to a tenth.
    assert result["ratio"] == pytest.approx(sum(free) / sum(bound), rel=0.01)
    assert result["added_us_per_constrained_token"] == pytest.approx((sum(bound) - sum(free)) / 2, abs=0.2)
    # Twenty steps, and the token that follows each prompt.
    assert result["constrained_tokens"] == [3 * 21] * 2


def test_a_tokenizer_grows_to_the_wanted_size_and_keeps_its_tokens():
    before = qwen_tokenizer(("<|im_end|>",))
    grown = Tokenizer.from_str(grown_tokenizer(before.to_str(), 5000))
    assert grown.get_vocab_size() == 5000
    assert sorted(grown.get_vocab().values()) == list(range(5000))
    assert before.get_vocab().items() <= grown.get_vocab().items()
