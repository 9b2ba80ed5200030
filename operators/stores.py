"""Objects of other file systems, through fsspec: how a store is opened, asked, and read by ranges.

One layer tries again, and it is ours (`operators.retries`): those of botocore and of s3fs are switched off, or three
layers of five attempts each would make 125 of every failure. Addresses and credentials come from the environment.
"""

import io
from collections.abc import Callable
from typing import Any, Final, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.http import HTTPFileSystem

from operators.retries import RetryPolicy, retried
from schemas.errors import ConfigError

T = TypeVar("T")

CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 30.0
"""Longest silence of a store that has taken a request."""
CALL_SILENCES: Final = 4
SLOWEST_BYTES_PER_SECOND: Final = 256 * 1024
"""A call may take some silences, and this much more for what it carries: a store that hangs before it asks for the
body of an upload is under no other limit."""

IDENTITY: Final = {"Accept-Encoding": "identity"}
"""Asks a web server for the bytes as they are: of compressed ones, lengths and ranges mean something else."""

EXTRAS: Final = {
    "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "abfs": ("adlfs", "azure"), "abfss": ("adlfs", "azure"),
    "az": ("adlfs", "azure"), "adl": ("adlfs", "azure"),
}  # fmt: skip
"""Protocols whose library is an option: the library, and the extra that installs it."""


class ShortBodyError(Exception):
    """Fewer bytes came than there are."""

    retryable = True


class ChangedError(Exception):
    """The object is another one than when it was opened."""

    retryable = False


class RangesRefusedError(Exception):
    """The server answers a request for a range with something else."""

    retryable = False


def open_store(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it; listings are not cached, failures not tried again.

    Raises:
        ConfigError: the library for its protocol is not installed.
        Exception: whatever fsspec says of an address that it does not understand.
    """
    protocols = {link.partition("://")[0] for link in address.split("::") if "://" in link}
    try:
        filesystem, path = fsspec.core.url_to_fs(
            address, **{name: _options(name) for name in protocols if _options(name)}
        )
    except ImportError as error:
        raise ConfigError(_missing_library(protocols, error)) from error
    if "s3" in getattr(filesystem, "protocol", ()):
        filesystem.retries = 1
    return filesystem, path


def call_seconds(filesystem: Any, size_bytes: int = 0) -> float:
    """Return how long one call that carries `size_bytes` may take."""
    silence = getattr(filesystem, "config_kwargs", {}).get("read_timeout", READ_SECONDS)
    return float(silence) * CALL_SILENCES + size_bytes / SLOWEST_BYTES_PER_SECOND


def ask(filesystem: Any, method: str, *arguments: Any, size_bytes: int = 0, **options: Any) -> Any:
    """Return what a method of a file system answers, within the time that a call may take.

    Args:
        filesystem: any of fsspec.
        method: its name, such as `info`.
        arguments: for the method.
        size_bytes: what the call carries, up or down.
        options: for the method.
    """
    if not isinstance(filesystem, AsyncFileSystem):
        return getattr(filesystem, method)(*arguments, **options)
    seconds = call_seconds(filesystem, size_bytes)
    return sync(filesystem.loop, getattr(filesystem, f"_{method}"), *arguments, timeout=seconds, **options)


class Remote:
    """One object of a store: what it was like when it was opened, and its bytes by ranges.

    Args:
        address: any fsspec URL.
        policy: how failures are tried again.
        passes: as `retried` takes it.
        opened: the file system and path of the address, where they are at hand.

    Raises:
        Exception: whatever the store says when it is asked about the object.
    """

    def __init__(
        self,
        address: str,
        policy: RetryPolicy,
        passes: Callable[[Exception], bool] | None = None,
        opened: tuple[Any, str] | None = None,
    ) -> None:
        self.address = address
        self._policy = policy
        self._passes = passes
        self.filesystem, self.path = opened or open_store(address)
        self.facts = self.look()
        size = self.facts.get("size")
        self.size_bytes: int | None = None if size is None else int(size)

    @property
    def has_ranges(self) -> bool:
        """Whether parts may be asked for; a server may still refuse."""
        is_remote = isinstance(self.filesystem, AsyncFileSystem)
        return is_remote and self.size_bytes is not None and self.facts.get("partial", True) is not False

    def look(self) -> dict[str, Any]:
        """Return what the store says about the object now."""
        facts = self.again(lambda: ask(self.filesystem, "info", self.path))
        if facts.get("type", "file") != "file":
            raise IsADirectoryError(f"{self.path} is a folder")
        return dict(facts)

    def version_of(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return what of its facts changes when the object does."""
        if isinstance(self.filesystem, HTTPFileSystem):
            # One page may come from several machines, with tags and signed addresses of their own.
            return {name: facts.get(name) for name in ("size", "Last-Modified")}
        return facts

    def again(self, call: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """Return what `call` returns, tried again under the policy, or another one."""
        return retried(call, policy or self._policy, self._passes)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of a range that lies inside the object, all of them.

        Raises:
            RangesRefusedError: the server cannot answer with a part.
        """
        return self.again(lambda: self._read_once(start, stop))

    def read_whole(self) -> bytes:
        """Return all bytes of a small object, in one request that is not tried again.

        Raises:
            ShortBodyError: fewer came than there are.
        """
        options = {"headers": IDENTITY} if isinstance(self.filesystem, HTTPFileSystem) else {}
        data = ask(self.filesystem, "cat_file", self.path, size_bytes=self.size_bytes or 0, **options)
        if self.size_bytes is not None and len(data) != self.size_bytes:
            raise ShortBodyError(f"{len(data)} bytes came of {self.size_bytes}")
        return bytes(data)

    def _read_once(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        length = stop - start
        if isinstance(self.filesystem, HTTPFileSystem):
            seconds = call_seconds(self.filesystem, length)
            data = sync(self.filesystem.loop, _web_range, self.filesystem, self.path, start, stop, timeout=seconds)
        else:
            data = ask(self.filesystem, "cat_file", self.path, start=start, end=stop, size_bytes=length)
        if len(data) != length:
            if self.version_of(ask(self.filesystem, "info", self.path)) != self.version_of(self.facts):
                raise ChangedError("changed while it was read")
            raise ShortBodyError(f"{len(data)} bytes came of {length} at {start}")
        return bytes(data)


class RangeFile(io.RawIOBase):
    """A remote object as a file: what is read is fetched, by ranges, and nothing else.

    Args:
        remote: the object.
        failure: makes the exception to raise of what the store raised; the same where not given.
    """

    def __init__(self, remote: Remote, failure: Callable[[Exception], Exception] | None = None) -> None:
        super().__init__()
        self._remote = remote
        self._failure = failure
        self._size = remote.size_bytes or 0
        self._place = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in the file."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the object goes."""
        stop = min(self._size, self._place + len(buffer))
        try:
            data = self._remote.read(self._place, stop)
        except Exception as error:
            if self._failure is None:
                raise
            raise self._failure(error) from error
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


async def _web_range(filesystem: Any, url: str, start: int, stop: int) -> bytes:
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {**options.pop("headers", {}), **IDENTITY, "Range": f"bytes={start}-{stop - 1}"}
    async with session.get(filesystem.encode_url(url), headers=headers, **options) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            # The body is the whole object, however large.
            raise RangesRefusedError(f"answered a range with status {answer.status}")
        data: bytes = await answer.read()
        return data


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        config = {**limits, **own, "retries": {"total_max_attempts": 1, "mode": "standard"}}
        # One at once in a file: s3fs then leaves out the question for its size before it reads one.
        return {"config_kwargs": config, "max_concurrency": 1, "use_listings_cache": False}
    if protocol in ("http", "https"):
        own = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return {"client_kwargs": {"timeout": timeout, **own}, "use_listings_cache": False}
    return {"use_listings_cache": False} if protocol in EXTRAS else {}


def _missing_library(protocols: set[str], error: ImportError) -> str:
    for name in sorted(protocols):
        if name in EXTRAS:
            library, extra = EXTRAS[name]
            return f"{name}:// needs {library}: pip install 'pagereel[{extra}]' (here: pip install -e '.[{extra}]')"
    return str(error)
