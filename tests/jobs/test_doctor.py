"""`pagereel doctor --model`: what a model takes is said before it is loaded, and also where it does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.doctor import Report, available_bytes, estimate_model, in_gib, judged, print_report
from operators.minicpmv.config import read_model_config
from operators.minicpmv.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", "doctor", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_tiny_model(tmp_path, "minicpmv4_5", shards=1)
    return tmp_path


def make_huge(folder):
    """Let the weights of a folder take four tebibytes, which no file system stores."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    start = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["llm.huge"] = {"dtype": "BF16", "shape": [2**41], "data_offsets": [start, start + 2**42]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + start + 2**42)


def test_a_model_that_fits_is_estimated_and_loaded(folder):
    done = doctor("--model", folder, "--json")
    value = json.loads(done.stdout)
    checks = {check["name"]: check for check in value["checks"]}
    assert checks["memory"]["state"] == "ok", done.stderr
    assert "loads" in checks["model"]["found"]
    memory = value["memory"]
    assert (memory["title"], memory["dtype"]) == ("MiniCPM-V 4.5", "fp32")
    # Stored in bfloat16, loaded in float32; the rest of the file is its header.
    assert 0 < 2 * (folder / "model.safetensors").stat().st_size - memory["model_bytes"]["weights"] < 2**16
    assert memory["page"]["slices"] == 10
    assert memory["clip"]["slices"] == 90
    for load in (memory["page"], memory["clip"]):
        assert 0 < load["cache_bytes"] < load["needed_bytes"]
        assert load["largest_batch"] > 1


def test_a_model_that_does_not_fit_is_estimated_and_not_loaded(folder):
    make_huge(folder)
    done = doctor("--model", folder)
    assert done.returncode == 2
    assert "not loaded: its weights take" in " ".join(done.stdout.split())
    assert "largest batch in" in done.stdout
    assert "weights 8,192 GiB" in done.stdout


def test_a_folder_without_a_model_is_wrong_and_has_no_estimate(tmp_path):
    done = doctor("--model", tmp_path, "--json")
    value = json.loads(done.stdout)
    assert done.returncode == 2
    assert "memory" not in value
    assert next(check for check in value["checks"] if check["name"] == "model")["state"] == "wrong"


def test_what_fits_decides_the_state(folder):
    estimate = estimate_model(read_model_config(folder))
    assert judged(estimate)[0] == "ok"
    one_page = estimate.memory.needed(estimate.loads["page"], 1)
    estimate.free_bytes = round(one_page * 1.15)
    assert estimate.largest_batches == {"page": 1, "clip": 0}
    assert judged(estimate)[0] == "note"
    estimate.free_bytes = one_page
    assert judged(estimate)[0] == "wrong"


def test_the_table_shows_a_page_and_a_clip(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    estimate = estimate_model(read_model_config(folder))
    print_report(Report(estimate=estimate), as_json=False)
    shown = capsys.readouterr().out
    assert f"MiniCPM-V 4.5 in {estimate.dtype}" in shown
    assert f"cache {estimate.memory.cache_per_token:,} bytes a token" in shown
    for words in ("page, A4 at 200 dpi", "clip of 30 s", "prompt tokens", "vision pass at its widest",
                  "prefill at its widest", "largest batch in"):  # fmt: skip
        assert words in shown
    assert "a record" not in shown


def test_the_memory_of_the_host_is_positive_and_readable():
    assert 2**28 < available_bytes() < 2**50
    assert [in_gib(count) for count in (12, 12_288, 18_874_368, 17_391_790_560)] == [
        "12 bytes", "12 KiB", "18 MiB", "16.2 GiB"
    ]  # fmt: skip
