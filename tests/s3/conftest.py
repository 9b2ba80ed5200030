"""A real S3 server for the tests of this folder, and a proxy before it that breaks what it is told to."""

import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipeline import run
from tests.s3.faulty_proxy import FaultyProxy
from tests.s3.s3_runs import CPU, pdf_of

SECRET_KEY = "SecretKeyThatNobodyMaySee"
SESSION_TOKEN = "SessionTokenThatNobodyMaySee"
HANG_SECONDS = 30.0
READ_SECONDS = 10.0
CONFIG = '{"config_kwargs": {"read_timeout": 10.0}}'


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server, hang_seconds=HANG_SECONDS) as proxy:
        yield proxy


@dataclass
class Bucket:
    """A fresh bucket: what is asked through the proxy, and what a child process needs to ask it too."""

    name: str
    direct: s3fs.S3FileSystem
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> None:
        self.direct.pipe_file(f"{self.name}/{key}", data)


@pytest.fixture
def bucket(s3_server: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    variables = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_SESSION_TOKEN": SESSION_TOKEN,
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3": CONFIG,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": READ_SECONDS}})
    s3fs.S3FileSystem.clear_instance_cache()
    direct = s3fs.S3FileSystem(endpoint_url=s3_server, use_listings_cache=False, skip_instance_cache=True)
    name = f"bucket-{uuid.uuid4().hex}"
    direct.mkdir(name)
    yield Bucket(name, direct, {**os.environ, "OMP_NUM_THREADS": "1"})
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Three documents, one of them damaged, in a folder."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "a b+c%41.pdf").write_bytes(pdf_of(12))
    (folder / "ünï.pdf").write_bytes(pdf_of(2, "Other words that are as trustworthy as the first. "))
    (folder / "bad.pdf").write_bytes(pdf_of(3)[:200])
    return folder


@pytest.fixture(scope="session")
def local_run(files, tmp_path_factory):
    target = tmp_path_factory.mktemp("local") / "run"
    run(inputs=[str(files)], output=str(target), **CPU)
    return target
