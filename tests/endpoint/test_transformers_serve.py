"""The endpoint engine against a real `transformers serve` with a tiny checkpoint of random weights."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from operators.endpoint.ask import AskEndpoint, AskEndpointConfig
from operators.endpoint.options import ServerOptions
from operators.endpoint.pictures import EncodeClips, EncodeConfig, EncodePages
from operators.endpoint.question import Sampling
from operators.generate import Generate, GenerateConfig
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.tiny import write_tiny_model
from operators.prepare import PrepareConfig, PrepareImages
from pipeline import run
from schemas.errors import ConfigError
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of

SERVE_PYTHON = os.environ.get("PAGEREEL_SERVE_PYTHON", "")
LAUNCHER = Path(__file__).parent / "serve_launcher.py"
SAMPLES = Path(__file__).parents[2] / "jobs" / "samples"
START_SECONDS = 240
NEW_TOKENS = 24

pytestmark = pytest.mark.skipif(
    not SERVE_PYTHON, reason="PAGEREEL_SERVE_PYTHON names no interpreter with transformers serve (make serve-env)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, "minicpmv4_6")
    return path


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """The server's address, once it answers; its log is shown when it does not."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    log_path = home / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [SERVE_PYTHON, str(LAUNCHER), *arguments], stdout=log, stderr=log, env=os.environ | environment, cwd=home
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log_path)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"transformers serve did not start:\n{log_path.read_text(errors='replace')[-4000:]}")


@pytest.fixture
def ask(folder, url):
    made = []

    def make(**sampling):
        options = {"max_new_tokens": NEW_TOKENS} | sampling
        server = ServerOptions(url=url, concurrency=4, patience_seconds=30)
        made.append(AskEndpoint(AskEndpointConfig(server=server, model_id=str(folder), sampling=Sampling(**options))))
        return made[-1]

    yield make
    for operator in made:
        operator.close()


def test_the_server_writes_what_our_own_engine_writes(folder, ask):
    """Of pictures that no side resizes: torchvision's bicubic and Pillow's differ in the last bit."""
    pictures = [np.ascontiguousarray(picture[:448, :448]) for picture in page_pictures(12, seed=3)]
    rows = [page_row(picture) for picture in pictures if picture.shape[:2] == (448, 448)]
    assert len(rows) >= 3
    served = ask()(EncodePages(EncodeConfig())(table_of(*rows))).to_pylist()
    own = Generate(GenerateConfig(model_folder=str(folder), device="cpu", max_new_tokens=NEW_TOKENS))
    wanted = own(PrepareImages(PrepareConfig(model_folder=str(folder)))(table_of(*rows))).to_pylist()
    own.close()
    for name in ("completion", "thought", "finish_reason", "prompt_tokens", "output_tokens", "error"):
        assert [row[name] for row in served] == [row[name] for row in wanted], name
    assert len({row["completion"] for row in served}) > 1


def test_frames_of_a_clip_are_answered(ask):
    frames = clip_frames(2)
    table = EncodeClips(EncodeConfig(encoding="jpeg"))(table_of(clip_row(frames, SliceConfig(max_slices=1))))
    [row] = ask()(table).to_pylist()
    assert row["error"] is None
    assert row["output_tokens"] > 0
    # A frame of 448 x 448 px is 64 visual tokens.
    assert row["prompt_tokens"] > 40 * len(frames)


def test_drawn_tokens_are_taken_as_they_come(ask):
    table = EncodePages(EncodeConfig())(table_of(page_row(np.full((448, 448, 3), 90, np.uint8))))
    [row] = ask(temperature=0.9, thinking=True)(table).to_pylist()
    assert row["error"] is None
    assert row["finish_reason"] in ("stop", "length")


def test_a_run_reads_pages_and_videos_with_it(folder, url, tmp_path):
    inputs = [SAMPLES / "documents" / "receipt.png", SAMPLES / "videos" / "notice-board.mp4"]
    summary = run(
        task="ocr", inputs=[str(path) for path in inputs], output=str(tmp_path / "run"), local=True, endpoint=url,
        model=str(folder), max_new_tokens=12, max_frames=4, dpi=72,
    )  # fmt: skip
    assert summary.complete
    assert summary.planned == 2
    [segment] = pq.read_table(tmp_path / "run" / "video_segments").to_pylist()
    assert (segment["engine"], segment["model_id"]) == ("endpoint", str(folder))
    assert segment["output_tokens"] == 12 or segment["finish_reason"] == "stop"


def test_another_model_is_refused_before_anything_starts(url, tmp_path):
    with pytest.raises(ConfigError, match=r"does not answer a picture with 'nobody/nothing': .*pinned"):
        run(
            task="ocr", inputs=[str(SAMPLES / "documents")], output=str(tmp_path / "run"), local=True, endpoint=url,
            model="nobody/nothing",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
