"""Whole runs that ask a server: real pages and videos, a real server on loopback that dies and moves."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest
from PIL import Image

from operators.minicpmv.slicing import Size, best_resize
from operators.picture_files import read_picture
from operators.prompts import prompt_for
from pipeline import run
from pipeline.config import planning_settings
from pipeline.endpoint import Server, frame_size
from pipeline.preview import plan
from pipeline.reading import Reading
from pipeline.runner import status_of
from pipeline.spec import make_spec
from schemas.errors import ConfigError
from tests.operators.chat_server import MODEL, ChatServer, Reply, completion, models

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "jobs" / "samples"
CHAT_SERVER = ROOT / "tests" / "operators" / "chat_server.py"
SECRET = "sk-hush-hush-0815"


def write_scan(path: Path, pages: int) -> Path:
    """Write a PDF of pictures of text: no text layer, so each page has to be read."""
    typed, scan = pymupdf.open(), pymupdf.open()
    for number in range(1, pages + 1):
        page = typed.new_page(width=300, height=200)
        page.insert_textbox(
            (20, 20, 280, 180), f"Page {number} of {path.stem}. " + "Some more words. " * 6, fontsize=12
        )
        picture = page.get_pixmap(dpi=100)
        scan.new_page(width=300, height=200).insert_image((0, 0, 300, 200), pixmap=picture)
    scan.save(path)
    return path


@pytest.fixture
def server():
    with ChatServer(lambda seen: Reply(completion(f"answer over {len(seen.pictures)} pictures"))) as server:
        yield server


def options(tmp_path: Path, url: str, *inputs: object, **more):
    return {
        "task": "ocr", "inputs": [str(name) for name in inputs], "output": str(tmp_path / "run"), "local": True,
        "endpoint": url, "text_layer": "ignore", **more,
    }  # fmt: skip


def read(run_folder: Path, table: str) -> list[dict]:
    return pq.read_table(run_folder / table).to_pylist()


def test_pages_are_sent_whole_and_their_rows_say_who_read_them(tmp_path, server):
    scan = write_scan(tmp_path / "scan.pdf", 3)
    picture = tmp_path / "colour.png"
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    summary = run(**options(tmp_path, server.url, scan, picture))
    assert summary.complete
    assert summary.statuses == {"success": 4}
    assert (summary.engine, summary.model_id, summary.weights_kind) == ("endpoint", MODEL, None)
    pages = read(tmp_path / "run", "pages")
    assert {row["text"] for row in pages} == {"answer over 1 pictures"}
    for row in pages:
        assert (row["route"], row["engine"], row["model_id"]) == ("model", "endpoint", MODEL)
        unknown = ("weights_kind", "model_revision", "image_tokens", "slice_count", "tokens_saved", "confidence")
        assert {row[name] for name in unknown} == {None}
        assert (row["prompt_tokens"], row["output_tokens"], row["finish_reason"]) == (12, 3, "stop")
        assert row["prompt_sha256"] == prompt_for("ocr", "pdf").sha256
    sent = [read_picture(file) for seen in server.seen for _, file in seen.pictures]
    assert len(sent) == 4
    assert any(np.array_equal(image, pixels) for image in sent)
    assert (tmp_path / "run" / "runs").exists()


def test_frames_of_a_segment_are_sent_one_after_the_other(tmp_path, server):
    video = SAMPLES / "videos" / "notice-board.mp4"
    more = {"task": "caption", "fps": 2, "max_frames": 9, "endpoint_frame_px": 64, "endpoint_image": "jpeg"}
    summary = run(**options(tmp_path, server.url, video, **more))
    assert summary.complete
    [row] = read(tmp_path / "run", "video_segments")
    assert row["caption"] == "answer over 9 pictures"
    assert (row["frame_count"], row["packing"], row["engine"]) == (9, "none", "endpoint")
    [seen] = server.seen
    assert {media_type for media_type, _ in seen.pictures} == {"image/jpeg"}
    areas = [height * width for height, width, _ in (read_picture(file).shape for _, file in seen.pictures)]
    assert max(areas) <= 64**2 * 1.1
    assert seen.prompt == prompt_for("caption", "video").text


def test_frames_are_reduced_by_their_area_alone():
    slicing = frame_size(make_spec({"task": "ocr", "inputs": ["a"], "output": "b", "endpoint_frame_px": 100}))
    assert best_resize(50, 90, slicing, upscale=False) == Size(50, 90)
    assert best_resize(400, 100, slicing, upscale=False) == Size(200, 50)


def test_a_server_may_move_and_nothing_is_asked_twice(tmp_path, server):
    scan = write_scan(tmp_path / "scan.pdf", 2)
    run(**options(tmp_path, server.url, scan))
    with ChatServer() as moved:
        summary = run(**options(tmp_path, moved.url, scan, endpoint_concurrency=3))
        assert (summary.complete, summary.resumed, summary.computed) == (True, 2, 0)
        assert (moved.probes, moved.seen) == (1, [])
        with pytest.raises(ConfigError, match=r"other settings .*endpoint_image 'png' now 'jpeg'"):
            run(**options(tmp_path, moved.url, scan, endpoint_image="jpeg"))


def test_the_keys_of_records_know_the_model_and_the_pictures_but_not_the_address():
    def digest(model_id=MODEL, url="http://a/v1", logprobs=False, **more):
        spec = make_spec({"task": "ocr", "inputs": ["a"], "output": "b", "endpoint": url, **more})
        found = Server(url, None, model_id, logprobs)
        return planning_settings(spec, Reading("endpoint", "", server=found, model_id=model_id)).digest

    assert digest() == digest(url="http://b/v1") == digest(logprobs=True) == digest(endpoint_timeout_seconds=3)
    assert digest() == digest(endpoint_jpeg_quality=50)
    changed = [
        digest(model_id="other"), digest(endpoint_image="jpeg"), digest(temperature=0.5), digest(max_new_tokens=5),
        digest(endpoint_frame_px=200), digest(endpoint_image="jpeg", endpoint_jpeg_quality=50), digest(thinking=True),
    ]  # fmt: skip
    assert len({digest(), *changed}) == 1 + len(changed)


def test_what_the_server_refuses_is_answered_by_the_next_rung(tmp_path, server):
    scan = write_scan(tmp_path / "scan.pdf", 1)
    server.answer = lambda seen: Reply({"error": {"message": "this context length is too much"}}, 400)
    summary = run(**options(tmp_path, server.url, scan, SAMPLES / "documents" / "two-columns.pdf", pages="1"))
    assert summary.complete
    assert summary.statuses == {"fallback": 2}
    routes = {Path(row["source_uri"]).name: row["route"] for row in read(tmp_path / "run", "pages")}
    assert routes == {"scan.pdf": "cpu", "two-columns.pdf": "text_layer"}
    assert "Page 1 of scan" in next(
        row["text"] for row in read(tmp_path / "run", "pages") if row["source_uri"].endswith("scan.pdf")
    )
    errors = read(tmp_path / "run", "errors")
    assert {(row["error_code"], row["component"]) for row in errors} == {("prompt_too_long", "AskEndpoint")}
    repro = errors[0]["repro_command"]
    assert f"--endpoint {server.url}" in repro


def test_the_key_is_written_nowhere(tmp_path, server, monkeypatch):
    monkeypatch.setenv("PAGEREEL_ENDPOINT_KEY", SECRET)
    server.answer = lambda seen: Reply({"error": f"bad {seen.headers['Authorization']}"}, 400)
    run(**options(tmp_path, server.url, write_scan(tmp_path / "scan.pdf", 1), task="caption"))
    assert server.seen[0].headers["Authorization"] == f"Bearer {SECRET}"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"bad Bearer ***" in pq.read_table(path).to_pandas().to_csv().encode() for path in files
               if path.parent.name == "errors")  # fmt: skip
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def stop_before_anything_starts(tmp_path, url, pattern, **more):
    scan = write_scan(tmp_path / "scan.pdf", 1)
    with pytest.raises(ConfigError, match=pattern) as caught:
        run(**options(tmp_path, url, scan, **more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_nobody_at_the_address_stops_a_run_before_it_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        stop_before_anything_starts(tmp_path, url, "cannot be used: no connection: Connection refused")


def test_a_model_that_the_server_lacks_stops_a_run_before_it_starts(tmp_path, server):
    server.models_reply = models("a", "b", owner="vllm")
    stop_before_anything_starts(tmp_path, server.url, "does not serve 'c'; it lists a, b", model="c")
    stop_before_anything_starts(tmp_path, server.url, "needs the name of a model: --model NAME .it lists a, b")
    server.models_reply = models("a", owner="somebody")
    server.probe_reply = Reply({"error": {"message": "no model c"}}, 404)
    stop_before_anything_starts(
        tmp_path, server.url, "does not answer a picture with 'c': .*404: no model c; it lists a", model="c"
    )


def test_a_server_that_sees_no_pictures_stops_a_run_before_it_starts(tmp_path, server):
    server.probe_reply = Reply({"error": {"message": "image input is not supported"}}, 500)
    stop_before_anything_starts(tmp_path, server.url, "does not answer a picture with .*image input is not supported")


def test_a_wrong_key_stops_a_run_before_it_starts(tmp_path, server):
    server.models_reply = Reply({"error": "who are you"}, 401)
    stop_before_anything_starts(tmp_path, server.url, "401: who are you .its key comes from PAGEREEL_ENDPOINT_KEY")


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"max_slices": 4}, "--max-slices"),
        ({"device": "cuda"}, "--device"),
        ({"downsample": "4x"}, "--downsample"),
        ({"engine": "torch"}, "--engine torch asks no server"),
        ({"engine": "cpu"}, "--engine cpu asks no server"),
        ({"engine": "endpoint", "endpoint": None}, "needs the address of a server"),
        ({"endpoint": "http://me:hush@host/v1"}, "carries a user"),
    ],
)
def test_options_that_a_server_decides_are_refused(tmp_path, server, more, pattern):
    stop_before_anything_starts(tmp_path, server.url, pattern, **more)
    assert server.probes == 0


def test_a_model_that_is_not_listed_is_taken_when_it_answers(tmp_path, server):
    summary = run(**options(tmp_path, server.url, write_scan(tmp_path / "scan.pdf", 1), model="loaded/on-demand"))
    assert (summary.complete, summary.model_id) == (True, "loaded/on-demand")
    assert server.seen[0].body["model"] == "loaded/on-demand"


def test_probabilities_are_asked_for_where_the_server_is_known_to_tell_them(tmp_path, server):
    server.models_reply = models(MODEL, owner="vllm")
    told = completion("four tokens")
    told["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}] * 4}
    server.answer = lambda seen: Reply(told)
    run(**options(tmp_path, server.url, write_scan(tmp_path / "scan.pdf", 1)))
    assert server.seen[0].body["logprobs"] is True
    [row] = read(tmp_path / "run", "pages")
    assert row["confidence"] == pytest.approx(np.exp(-0.5), abs=1e-6)


def test_a_plan_shows_the_steps_that_ask_a_server(tmp_path, server):
    scan = write_scan(tmp_path / "scan.pdf", 1)
    report = plan(make_spec(options(tmp_path, server.url, scan, endpoint_concurrency=80, endpoint_frame_px=64)))
    assert [step["step"] for step in report.steps["documents"]] == ["DecodeDocuments", "EncodePages"]
    assert [step["step"] for step in report.steps["videos"]] == ["DecodeClips", "EncodeClips"]
    assert [step["step"] for step in report.steps["trunk"]][:2] == ["AskEndpoint", "ParseCompletions"]
    assert report.steps["trunk"][0]["rows_per_batch"] == 32
    assert [step["gpus"] for step in report.steps["trunk"]] == [0.0] * len(report.steps["trunk"])


class ServerProcess:
    """The chat server in a process of its own, which ends after so many answers."""

    def __init__(self, good: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHAT_SERVER), "0", str(good)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def pagereel(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def lose_and_find_a_server(tmp_path: Path, *more: object) -> None:
    """Let the server die after seven of twelve answers, then go on with another one."""
    for number in range(3):
        write_scan(tmp_path / f"{number}.pdf", 4)
    folder = tmp_path / "run"
    command = ["ocr", *sorted(tmp_path.glob("*.pdf")), "-o", folder, "--text-layer", "ignore", "--model", MODEL]
    command += ["--endpoint-patience-seconds", 1, "--endpoint-concurrency", 2, "--quiet"]
    with ServerProcess(good=7) as server:
        done = pagereel(*command, "--endpoint", server.url, *more)
        assert server.process.wait(20) == 9
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert f"stopped: the endpoint {server.url} gave no answer for 1 s" in lines[0]
    assert "the same command resumes" in lines[0]
    before = status_of(str(folder))
    assert not before.complete
    assert set(before.statuses) <= {"success"}
    with ServerProcess(good=1000) as server:
        done = pagereel(*command, "--endpoint", server.url, "--local")
    assert done.returncode == 0, done.stderr
    assert status_of(str(folder)).complete
    pages = read(folder, "pages")
    assert len(pages) == len({(row["source_uri"], row["page_number"]) for row in pages}) == 12
    assert {row["status"] for row in pages} == {"success"}
    assert {row["text"] for row in pages} == {"answer with 1 pictures"}
    assert read(folder, "errors") == []


def test_a_server_that_dies_stops_the_run_and_another_goes_on(tmp_path):
    lose_and_find_a_server(tmp_path, "--local")


@pytest.mark.ray
def test_a_server_that_dies_stops_a_run_on_ray_and_another_goes_on(tmp_path):
    lose_and_find_a_server(tmp_path, "--object-store-mb", 200)


def test_doctor_asks_a_server(server):
    done = pagereel("doctor", "--endpoint", server.url)
    assert done.returncode == 0, done.stderr
    assert f"{MODEL} answers at" in " ".join(done.stdout.split())
    done = pagereel("doctor", "--endpoint", "http://127.0.0.1:9/v1")
    assert done.returncode == 2
    assert "Connection refused" in " ".join(done.stdout.split())
