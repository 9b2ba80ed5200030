import functools
import http.server
import json
import os
import threading
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators.fetch import local_copy
from operators.retries import RetryPolicy
from pipeline import looks
from pipeline.listing_cache import ListingCache
from pipeline.plan import write_plan_part
from pipeline.source import Listing, check_inputs, list_sources
from pipeline.storage import Storage
from schemas.errors import ConfigError, FetchError, TransientError
from schemas.source import SOURCE
from tests.pipeline.made_rows import document_unit, units_table


def listed(inputs, **options):
    counts = Listing()
    tables = list(list_sources([str(given) for given in inputs], options, counts))
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    return rows, counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.pdf", "a.pdf", "deep/c.png", "notes.md", ".hidden.pdf", "no_suffix"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def test_a_folder_is_walked_in_order_and_passes_over_other_files(folder):
    rows, counts = listed([folder])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf", "no_suffix", "c.png"]
    assert [row["source_index"] for row in rows] == [0, 1, 2, 3]
    assert counts.passed_over == 1
    assert rows[0]["size_bytes"] == 5
    assert rows[0]["version_tag"] == str((folder / "a.pdf").stat().st_mtime_ns)


def test_tables_have_the_source_schema(folder):
    [table] = list_sources([str(folder)], {}, Listing())
    assert table.schema == SOURCE


def test_a_named_file_is_taken_whatever_its_suffix(folder):
    rows, _ = listed([folder / "notes.md"])
    assert len(rows) == 1


def test_a_glob_matches_files_only(folder):
    rows, _ = listed([folder / "*.pdf"])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf"]


def test_options_apply_to_every_source(folder):
    rows, _ = listed([folder / "a.pdf"], page_ranges="2-3", password="s")
    assert (rows[0]["page_ranges"], rows[0]["password"]) == ("2-3", "s")


def test_a_csv_manifest_sets_pages_and_password_and_keeps_missing_files(folder):
    manifest = folder / "list.csv"
    manifest.write_text("uri,pages,password\na.pdf,1-5,\nmissing.pdf,,secret\n")
    rows, _ = listed([manifest], page_ranges="9")
    assert rows[0]["source_uri"] == str(folder / "a.pdf")
    assert rows[0]["page_ranges"] == "1-5"
    assert rows[1]["page_ranges"] == "9"
    assert rows[1]["password"] == "secret"
    assert rows[1]["size_bytes"] is None


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_manifests_of_every_kind_name_the_same_sources(folder, suffix):
    manifest = folder / f"list{suffix}"
    if suffix == ".txt":
        manifest.write_text("# comment\na.pdf\n\nb.pdf\n")
    elif suffix == ".jsonl":
        manifest.write_text("\n".join(json.dumps({"uri": name}) for name in ("a.pdf", "b.pdf")))
    else:
        pq.write_table(pa.table({"uri": ["a.pdf", "b.pdf"]}), manifest)
    rows, _ = listed([manifest])
    assert [Path(row["source_uri"]).name for row in rows] == ["a.pdf", "b.pdf"]


def test_times_of_a_manifest_row_are_seconds(folder):
    manifest = folder / "clips.jsonl"
    manifest.write_text(json.dumps({"uri": "a.pdf", "start_seconds": "1.5", "stop_seconds": 4}))
    rows, _ = listed([manifest])
    assert (rows[0]["start_seconds"], rows[0]["stop_seconds"]) == (1.5, 4.0)


def test_a_remote_folder_is_listed():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/listing/x.pdf", b"12")
    memory.pipe_file("/listing/deep/y.pdf", b"123")
    rows, _ = listed(["memory://listing"])
    assert [row["source_uri"].rsplit("/", 1)[1] for row in rows] == ["y.pdf", "x.pdf"]
    assert [row["size_bytes"] for row in rows] == [3, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pdf", None, "does not exist"),
        ("*.nothing", None, "matches no file"),
        ("gone.csv", None, "does not exist"),
        ("bad.jsonl", "{not json", "cannot be parsed"),
        ("list.jsonl", '"a.pdf"', "wanted an object"),
        ("numbers.jsonl", '{"uri": "a"}\n7', "entry 2: wanted an object"),
        ("wide.csv", 'uri\n"' + "x" * 200_000 + '"\n', "cannot be parsed"),
        ("torn.parquet", "PAR1", "cannot be parsed"),
        ("nouri.csv", "path\na.pdf\n", "no 'uri'"),
        ("empty.txt", "\n", "names no source"),
        ("time.jsonl", '{"uri": "a", "start_seconds": "soon"}', "wanted seconds"),
    ],
)
def test_an_input_that_cannot_be_listed_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        listed([path])
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no file"):
        listed([tmp_path])


def test_a_broken_link_is_a_row_that_is_not_found_when_it_is_read(folder):
    (folder / "broken.pdf").symlink_to(folder / "gone")
    rows, _ = listed([folder])
    [broken] = [row for row in rows if row["source_uri"].endswith("broken.pdf")]
    assert (broken["size_bytes"], broken["version_tag"], broken["error"]) == (None, None, None)
    assert len(rows) == 5
    with pytest.raises(FetchError) as caught, local_copy(broken["source_uri"]):
        pass
    assert caught.value.code == "not_found"
    assert len(listed([folder / "b*.pdf"])[0]) == 2


def test_a_file_whose_name_is_no_utf_8_is_listed_and_read(folder):
    name = os.fsencode(folder) + b"/caf\xe9 %41.pdf"
    Path(os.fsdecode(name)).write_bytes(b"content")
    rows, _ = listed([folder])
    [odd] = [row for row in rows if "caf" in row["source_uri"]]
    assert odd["source_uri"] == f"file+bytes://{folder}/caf%E9%20%2541.pdf"
    assert odd["size_bytes"] == 7
    with local_copy(odd["source_uri"]) as path:
        assert path.read_bytes() == b"content"
        assert str(path).encode().endswith(b".pdf")
    check_inputs([odd["source_uri"]])
    assert listed([odd["source_uri"]])[0][0] | {"source_index": odd["source_index"]} == odd
    os.unlink(name)
    with pytest.raises(FetchError) as caught, local_copy(odd["source_uri"]):
        pass
    assert caught.value.code == "not_found"


def test_a_manifest_may_hold_a_name_that_utf_8_cannot(folder):
    (folder / "list.jsonl").write_text('{"uri": "\\udce9.pdf"}\n{"uri": "\\ud800.pdf"}\n')
    rows, _ = listed([folder / "list.jsonl"])
    assert [row["source_uri"] for row in rows] == [f"file+bytes://{folder}/%E9.pdf", f"{folder}/\\ud800.pdf"]


def test_a_folder_that_cannot_be_listed_is_a_row_with_an_error(folder):
    # Its path is longer than the system takes, which stops even an administrator.
    home = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(20):
            os.mkdir("n" * 250)
            os.chdir("n" * 250)
    finally:
        os.chdir(home)
    rows, _ = listed([folder])
    [failed] = [row for row in rows if row["error"]]
    assert len(rows) == 5
    assert (failed["error"]["stage"], failed["error"]["error_code"]) == ("list", "unreadable")
    assert failed["source_uri"].startswith(f"{folder}/nnn")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to an administrator")
def test_a_forbidden_folder_is_a_row_and_when_it_was_named_a_refusal(folder):
    (folder / "deep").chmod(0)
    try:
        rows, _ = listed([folder])
        assert [row["error"]["error_code"] for row in rows if row["error"]] == ["forbidden"]
        with pytest.raises(ConfigError, match="cannot be read"):
            listed([folder / "deep"])
    finally:
        (folder / "deep").chmod(0o700)


@pytest.mark.parametrize("given", ["", " ", "s3://", "file://"])
def test_an_empty_input_is_not_the_working_directory(given):
    for look in (listed, check_inputs):
        with pytest.raises(ConfigError, match="empty"):
            look([given])


def test_the_home_of_nobody_and_a_name_that_is_too_long_do_not_exist():
    for given in ("~no-such-user/a.pdf", "x" * 5000):
        with pytest.raises(ConfigError, match="does not exist"):
            check_inputs([given])


def test_a_name_with_glob_characters_that_exists_is_taken_literally(folder):
    (folder / "a[1].pdf").write_bytes(b"x")
    (folder / "a1.pdf").write_bytes(b"x")
    (folder / "list[1].txt").write_text("a.pdf\nb.pdf\n")
    for given, names in (("a[1].pdf", ["a[1].pdf"]), ("list[1].txt", ["a.pdf", "b.pdf"])):
        check_inputs([str(folder / given)])
        rows, _ = listed([folder / given])
        assert [Path(row["source_uri"]).name for row in rows] == names
    (folder / "a[1].pdf").unlink()
    assert [Path(row["source_uri"]).name for row in listed([folder / "a[1].pdf"])[0]] == ["a1.pdf"]


def test_a_remote_name_with_glob_characters_that_exists_is_taken_literally():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/literal/a[1].pdf", b"12")
    memory.pipe_file("/literal/a1.pdf", b"123")
    assert [row["size_bytes"] for row in listed(["memory://literal/a[1].pdf"])[0]] == [2]
    assert [row["size_bytes"] for row in listed(["memory://literal/a[0-9].pdf"])[0]] == [3]


def test_hidden_names_of_a_remote_folder_are_passed_over_unless_asked_for():
    memory = fsspec.filesystem("memory")
    for name in ("a.pdf", ".b.pdf", ".cache/c.pdf", "deep/.d/e.pdf", "deep/f.pdf"):
        memory.pipe_file(f"/.root/{name}", b"x")
    names = {row["source_uri"].partition(".root/")[2] for row in listed(["memory://.root"])[0]}
    assert names == {"a.pdf", "deep/f.pdf"}
    assert len(listed(["memory://.root/**/*.pdf"])[0]) == 2
    assert [row["source_uri"][-6:] for row in listed(["memory://.root/.*.pdf"])[0]] == [".b.pdf"]


def test_a_remote_folder_of_one_file_names_the_file():
    fsspec.filesystem("memory").pipe_file("/single/only.pdf", b"x")
    [row] = listed(["memory://single"])[0]
    assert row["source_uri"].endswith("single/only.pdf")


def test_entries_of_a_remote_manifest_are_relative_to_its_folder():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shelf/deep/a.pdf", b"123")
    memory.pipe_file("/shelf/b.pdf", b"12345")
    memory.pipe_file("/shelf/deep/list.csv", b"uri,pages\na.pdf,1\n../b.pdf,\n/there/c.pdf,\nmemory://shelf/b.pdf,2\n")
    rows, _ = listed(["memory://shelf/deep/list.csv"])
    wanted = ["memory://shelf/deep/a.pdf", "memory://shelf/b.pdf", "/there/c.pdf", "memory://shelf/b.pdf"]
    assert [row["source_uri"] for row in rows] == wanted
    assert [row["size_bytes"] for row in rows] == [3, 5, None, 5]
    assert rows[0]["version_tag"]


class Untagged(http.server.BaseHTTPRequestHandler):
    """Serves the server's `content`, as some web services do: without a date or tag; or the server's `status`."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()
        self.wfile.write(self.server.content)

    def answer(self):
        self.send_response_only(self.server.status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def log_message(self, *arguments):
        pass


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.content, server.status = b"", 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def planned_once(storage, given):
    """List `given`, write a plan of what is new, and return how many sources that were."""
    [table] = list_sources([given], {}, Listing())
    fresh = ListingCache(storage, "s").to_probe(table)
    if fresh.num_rows:
        write_plan_part(storage, units_table([document_unit(0, [1], source_uri=given)]), fresh, "s")
    return fresh.num_rows


def test_a_remote_file_that_changes_and_keeps_its_size_is_planned_again(tmp_path, serve):
    (tmp_path / "a.pdf").write_bytes(b"one")
    os.utime(tmp_path / "a.pdf", (1_700_000_000, 1_700_000_000))
    _, url = serve(functools.partial(Quiet, directory=str(tmp_path)))
    storage = Storage(str(tmp_path / "run"))
    assert [planned_once(storage, f"{url}/a.pdf") for _ in range(2)] == [1, 0]
    (tmp_path / "a.pdf").write_bytes(b"two")
    os.utime(tmp_path / "a.pdf", (1_700_000_100, 1_700_000_100))
    assert [planned_once(storage, f"{url}/a.pdf") for _ in range(2)] == [1, 0]


def test_a_remote_file_without_a_version_tag_is_planned_every_time(tmp_path, serve):
    server, url = serve(Untagged)
    server.content = b"one"
    storage = Storage(str(tmp_path / "run"))
    assert [planned_once(storage, f"{url}/a.pdf") for _ in range(2)] == [1, 1]
    (tmp_path / "twice.txt").write_text(f"{url}/a.pdf\n{url}/a.pdf\n")
    assert planned_once(storage, str(tmp_path / "twice.txt")) == 1


def test_a_remote_manifest_with_a_signature_is_a_manifest(tmp_path, serve):
    server, url = serve(Untagged)
    server.content = b"a.pdf\n"
    [row] = listed([f"{url}/deep/list.txt?token=hush"])[0]
    assert row["source_uri"] == f"{url}/deep/a.pdf"


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(404, ConfigError, "does not exist"), (403, ConfigError, "403"), (503, TransientError, "503")],
)
@pytest.mark.parametrize("name", ["a.pdf", "list.csv"])
def test_a_url_that_is_refused_is_one_line_without_its_signature(serve, monkeypatch, status, kind, message, name):
    monkeypatch.setattr(looks, "LISTING_RETRIES", RetryPolicy(max_attempts=2, first_wait_seconds=0.01))
    server, url = serve(Untagged)
    server.status = status
    given = f"{url}/{name}?token=hush-hush".replace("http://", "http://user:secret@")
    with pytest.raises(kind, match=message) as caught:
        listed([given])
    assert "hush" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("protocol", "library", "extra"), [("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")])
def test_a_store_whose_library_is_an_option_says_what_to_install(protocol, library, extra):
    if find_spec(library):
        pytest.skip(f"{library} is installed")
    for look in (lambda: listed([f"{protocol}://bucket/a.pdf"]), lambda: Storage(f"{protocol}://bucket/run")):
        with pytest.raises(ConfigError, match=f"needs {library}: .*{extra}") as caught:
            look()
        assert "\n" not in str(caught.value)


def test_a_store_without_credentials_is_refused_in_one_line(monkeypatch, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    for given in ("s3://bucket/x", "s3://bucket/*.pdf", "s3://bucket/list.csv"):
        with pytest.raises(ConfigError, match="credentials"):
            listed([given])
    with pytest.raises(ConfigError, match="credentials"):
        Storage("s3://bucket/run").list()
    s3fs.S3FileSystem.clear_instance_cache()
