"""Bytes of a source as a local file, wherever it lives: a path, an fsspec URL, a member of an archive."""

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Final
from urllib.parse import unquote_to_bytes, urlsplit

import fsspec
from fsspec.implementations.http import HTTPFileSystem
from pydantic import Field

from operators.archives import COMPRESSIONS, OpenArchive
from operators.base import OperatorConfig
from operators.retries import RetryPolicy, http_status, may_pass
from operators.stores import RangeFile, RangesRefusedError, Remote, ShortBodyError
from schemas.errors import ConfigError, FetchError
from schemas.ids import canonical_json

CHUNK_BYTES: Final = 8 * 1024 * 1024
RANGES_AT_ONCE: Final = 4
READ_AHEAD_BYTES: Final = 256 * 1024
"""Of an archive that is read in place: the headers of small members come together."""
DAY_SECONDS: Final = 86_400.0
FORBIDDEN_STATUSES: Final = {401, 403, 407}
MISSING_STATUSES: Final = {404, 410}
BYTES_SCHEME: Final = "file+bytes://"
"""Starts the address of a local file whose name is no UTF-8; its bytes follow, percent-encoded."""
QUERY: Final = re.compile(r"(?<=\w)\?[^\s'\")]+")
SUFFIX: Final = re.compile(r"\.[A-Za-z0-9]{1,15}")


class FetchConfig(OperatorConfig):
    """How sources are copied."""

    max_source_bytes: Annotated[
        int, Field(gt=0, description="A larger object, or unpacked archive member, is refused as too_large.")
    ] = 64 * 1024**3
    max_attempts: Annotated[
        int, Field(ge=1, description="Attempts at each range of a download that fails in transit.")
    ] = RetryPolicy.max_attempts
    first_wait_seconds: Annotated[
        float, Field(ge=0, description="Longest wait before the second attempt; doubled before each further one.")
    ] = RetryPolicy.first_wait_seconds
    most_seconds: Annotated[
        float, Field(gt=0, description="No further attempt at a range when so much time went by.")
    ] = RetryPolicy.most_seconds

    @property
    def retries(self) -> RetryPolicy:
        """The same as a policy."""
        return RetryPolicy(self.max_attempts, self.first_wait_seconds, most_seconds=self.most_seconds)


class Shelf:
    """Keeps the archive open that was asked for last: members of one archive follow one another."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._held: tuple[str, tuple[int, ...]] | None = None
        self._archive: OpenArchive | None = None

    def copy_member(self, address: str, reference: Mapping[str, Any], target: Path, config: FetchConfig) -> None:
        """Copy a member to `target`; an archive that was kept is opened anew before it counts as damaged.

        Raises:
            FetchError: as `local_copy`.
        """
        wanted = (address, _state_of(address))
        is_kept = self._held == wanted
        try:
            self._copy(address, reference, target, config, wanted)
        except FetchError as error:
            if error.code not in ("damaged", "unreadable") or not is_kept:
                raise
            self.close()
            self._copy(address, reference, target, config, wanted)

    def open(self, address: str, config: FetchConfig) -> OpenArchive:
        """Return an archive; it stays open until the next one is asked for, or `close`.

        Raises:
            FetchError: its bytes cannot be had.
        """
        return self._opened(address, config, (address, _state_of(address)))

    def close(self) -> None:
        """Close the archive, and remove its copy."""
        self._archive = self._held = None
        self._stack.close()

    def _copy(
        self,
        address: str,
        reference: Mapping[str, Any],
        target: Path,
        config: FetchConfig,
        wanted: tuple[str, tuple[int, ...]],
    ) -> None:
        archive = self._opened(address, config, wanted)
        place = (reference.get("byte_offset"), reference.get("byte_size"))
        with target.open("wb") as sink:
            archive.copy(str(reference["member"]), sink, config.max_source_bytes, *place)

    def _opened(self, address: str, config: FetchConfig, wanted: tuple[str, tuple[int, ...]]) -> OpenArchive:
        if self._archive is None or self._held != wanted:
            self.close()
            file = self._stack.enter_context(opened_bytes(address, config))
            self._archive, self._held = OpenArchive(file, PurePosixPath(without_secrets(address)).name), wanted
        return self._archive


def _state_of(address: str) -> tuple[int, ...]:
    """Return what changes when a local file does; nothing for a remote one, which is asked once."""
    path = local_path(address)
    try:
        found = path.stat() if path else None
    except (OSError, ValueError):
        found = None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if found else ()


@contextlib.contextmanager
def opened_bytes(address: str, config: FetchConfig) -> Iterator[BinaryIO]:
    """Yield a file with random access to the bytes of an object, which are fetched as they are read.

    A compressed tar is fetched whole, since it is read from its start again and again; so is what a server does not
    give in parts.

    Raises:
        FetchError: as `local_copy`.
    """
    path = local_path(address)
    with contextlib.ExitStack() as stack:
        if path is None:
            in_place = _in_place(address, config)
            if in_place is not None:
                yield in_place
                return
            path = stack.enter_context(local_copy(address, None, config))
        check_local_file(path)
        yield stack.enter_context(path.open("rb"))


def _in_place(address: str, config: FetchConfig) -> BinaryIO | None:
    try:
        remote = Remote(address, config.retries)
        if not remote.has_ranges:
            return None
        head = remote.read(0, min(8, remote.size_bytes or 0))
        if head.startswith(tuple(COMPRESSIONS)):
            return None
    except RangesRefusedError:
        return None
    except Exception as error:
        raise translated(error, address) from error
    return io.BufferedReader(RangeFile(remote, lambda error: translated(error, address)), READ_AHEAD_BYTES)


@contextlib.contextmanager
def local_copy(
    source_uri: str,
    source_ref: Mapping[str, Any] | None = None,
    config: FetchConfig | None = None,
    shelf: Shelf | None = None,
) -> Iterator[Path]:
    """Yield a local path that holds the bytes of a source.

    A local file is yielded as it is; anything else is copied to a temporary file, which is removed afterwards and
    keeps the suffix of the name.

    Args:
        source_uri: a local path or any fsspec URL; of the archive, where the source is a member of one.
        source_ref: a `SOURCE_REF` value. `member` names a member of a tar or zip archive; `byte_offset` and
            `byte_size` say where it lies in the tar, unpacked if it was compressed. `path`, where given, is the
            archive's own address.
        config: limits and retries.
        shelf: keeps the archive open for the next call.

    Raises:
        FetchError: `not_found`, `forbidden`, `unreadable`, or `too_large`; of archives also `damaged`, `encrypted`.
    """
    config = config or FetchConfig()
    reference = source_ref or {}
    address = str(reference.get("path") or source_uri)
    member = reference.get("member")
    path = local_path(address)
    with contextlib.ExitStack() as stack:
        if path is not None:
            check_local_file(path)
        if member is None and path is not None and not address.startswith(BYTES_SCHEME):
            yield path
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagereel-")))
        target = folder / f"source{suffix_of(member or urlsplit(address).path)}"
        if member is not None:
            archives = shelf or stack.enter_context(contextlib.closing(Shelf()))
            archives.copy_member(address, reference, target, config)
        elif path is not None:
            # Decoders take names as UTF-8.
            target.symlink_to(path.absolute())
        else:
            download(address, target, config)
        yield target


def suffix_of(name: str) -> str:
    """Return the suffix of a name if it is a plain one, else nothing: it becomes part of a path."""
    suffix = PurePosixPath(name).suffix
    return suffix if SUFFIX.fullmatch(suffix) else ""


class KeptCopy:
    """Keeps the local copy of the source that was asked for last: the units of a source follow one another.

    The bytes are checked against the hash that they were planned under, once for each copy and for each state of a
    local file, so that no row is stored under the key of other bytes.
    """

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._shelf = Shelf()
        self._stack = contextlib.ExitStack()
        self._held: tuple[str, str | None] | None = None
        self._path = Path()
        self._checked: tuple[int, int] | None = None

    def path_of(self, source_uri: str, source_ref: Mapping[str, Any] | None, doc_id: str | None) -> Path:
        """Return the local path of a source; it stays valid until the next call or `close`.

        Args:
            source_uri: as `local_copy` takes it.
            source_ref: as `local_copy` takes it.
            doc_id: sha256 of the bytes as they were planned; None checks nothing.

        Raises:
            FetchError: as `local_copy`; `unreadable` and retryable when the bytes are others than were planned.
        """
        wanted = (canonical_json([source_uri, source_ref]), doc_id)
        if wanted != self._held:
            self._drop()
            self._path = self._stack.enter_context(local_copy(source_uri, source_ref, self.config, self._shelf))
            self._held = wanted
        check_local_file(self._path)
        found = self._path.stat()
        state = (found.st_size, found.st_mtime_ns)
        if doc_id is not None and state != self._checked:
            if sha256_of(self._path) != doc_id:
                raise FetchError(f"{without_secrets(source_uri)}: changed since it was planned", retryable=True)
            self._checked = state
        return self._path

    def close(self) -> None:
        """Remove the copy, and close the archive that it came from."""
        self._drop()
        self._shelf.close()

    def _drop(self) -> None:
        self._stack.close()
        self._held = self._checked = None


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex.

    Raises:
        FetchError: it could not be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise translated(error, str(path)) from error


def local_path(address: str) -> Path | None:
    """Return the path that a plain path or `file://` URL names; None for other URLs."""
    if address.startswith("file://"):
        return Path(fsspec.core.strip_protocol(address))
    if address.startswith(BYTES_SCHEME):
        return Path(os.fsdecode(unquote_to_bytes(address.removeprefix(BYTES_SCHEME))))
    return None if "://" in address or address.startswith("data:") else Path(address)


def check_local_file(path: Path) -> None:
    """Raise `FetchError` unless `path` is a regular file; a pipe or device would block its reader."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise FetchError(f"{path}: not a regular file", code="unreadable")
        with path.open("rb"):
            pass
    except OSError as error:
        raise translated(error, str(path)) from error
    except ValueError as error:
        raise FetchError(f"{path!s}: not a path: {error}", code="not_found") from error


def download(
    address: str, target: Path, config: FetchConfig, passes: Callable[[Exception], bool] | None = None
) -> None:
    """Copy a remote object to `target`, all of it: as many bytes as the store says that it has.

    A large object comes in ranges, of which one that fails in transit is asked for again by itself.

    Args:
        address: any fsspec URL.
        target: where the bytes go.
        config: limits and retries.
        passes: as `retried` takes it.

    Raises:
        FetchError: as `local_copy`.
    """
    try:
        remote = Remote(address, config.retries, passes)
        size = remote.size_bytes
        if size is not None and size > config.max_source_bytes:
            raise FetchError(f"{without_secrets(address)}: more than {config.max_source_bytes} bytes", code="too_large")
        if not (size and size > CHUNK_BYTES and remote.has_ranges and _came_in_ranges(remote, target, size)):
            # However long the copy took, it may break at its end.
            patient = dataclasses.replace(config.retries, most_seconds=DAY_SECONDS)
            remote.again(lambda: _copy_whole(remote, target, config), patient)
    except FetchError:
        raise
    except Exception as error:
        raise translated(error, address) from error


def _came_in_ranges(remote: Remote, target: Path, size: int) -> bool:
    """Copy an object range by range, several at once; return False when the server gives no ranges."""

    def copy(start: int) -> None:
        data = remote.read(start, min(start + CHUNK_BYTES, size))
        os.pwrite(file.fileno(), data, start)

    with target.open("wb") as file, ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
        try:
            copy(0)
            for _ in pool.map(copy, range(CHUNK_BYTES, size, CHUNK_BYTES)):
                pass
        except RangesRefusedError:
            return False
        finally:
            pool.shutdown(cancel_futures=True)
    if remote.version_of(remote.look()) != remote.version_of(remote.facts):
        raise FetchError(f"{without_secrets(remote.address)}: changed while it was read", retryable=True)
    return True


def _copy_whole(remote: Remote, target: Path, config: FetchConfig) -> None:
    options = {"block_size": 0 if isinstance(remote.filesystem, HTTPFileSystem) else CHUNK_BYTES}
    with target.open("wb") as sink:
        if remote.has_ranges and (remote.size_bytes or 0) <= CHUNK_BYTES:
            sink.write(remote.read_whole())
            return
        with remote.filesystem.open(remote.path, "rb", **options) as source:
            copied = copy_bounded(source, sink, config.max_source_bytes, remote.address)
    if remote.size_bytes is not None and copied != remote.size_bytes:
        raise ShortBodyError(f"{copied} bytes came of {remote.size_bytes}")


def translated(error: Exception, address: str) -> FetchError:
    """Return the `FetchError` for a library's exception; retryable when it may have been in transit."""
    if isinstance(error, FetchError):
        return error
    status = http_status(error)
    if status in MISSING_STATUSES:
        code, retryable = "not_found", False
    elif isinstance(error, PermissionError) or status in FORBIDDEN_STATUSES:
        code, retryable = "forbidden", False
    elif isinstance(error, FileNotFoundError | NotADirectoryError) and not may_pass(error):
        code, retryable = "not_found", False
    elif isinstance(error, ImportError | ValueError | NotImplementedError | IsADirectoryError | ConfigError):
        code, retryable = "unreadable", False
    else:
        code, retryable = "unreadable", True
    message = f"{without_secrets(address)}: {type(error).__name__}: {QUERY.sub('', str(error))}"
    return FetchError(message, code=code, retryable=retryable)


def without_secrets(address: str) -> str:
    """Return a URL without user, password and query, which may hold signatures."""
    return "::".join(link_without_secrets(link) for link in address.split("::"))


def link_without_secrets(link: str) -> str:
    """Return one link of a chained URL (`zip://a.pdf::https://host/x.zip`) without user, password and query."""
    if "://" not in link:
        return link
    try:
        parts = urlsplit(link)
    except ValueError:
        return link.partition("://")[0] + "://"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def copy_bounded(source: BinaryIO, sink: BinaryIO, max_bytes: int, address: str) -> int:
    """Copy all bytes and return how many; more than `max_bytes` is `too_large`."""
    copied = 0
    while chunk := source.read(CHUNK_BYTES):
        copied += len(chunk)
        if copied > max_bytes:
            raise FetchError(f"{without_secrets(address)}: more than {max_bytes} bytes", code="too_large")
        sink.write(chunk)
    return copied
