"""Bytes of a source as a local file, wherever it lives: a path, an fsspec URL, a member of an archive."""

import contextlib
import hashlib
import os
import random
import re
import stat
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Final
from urllib.parse import unquote_to_bytes, urlsplit

import fsspec
from pydantic import Field

from operators.base import OperatorConfig
from schemas.errors import FetchError
from schemas.ids import canonical_json

CHUNK_BYTES: Final = 8 * 1024 * 1024
FORBIDDEN_STATUSES: Final = {401, 403, 407}
MISSING_STATUSES: Final = {404, 410}
BYTES_SCHEME: Final = "file+bytes://"
"""Starts the address of a local file whose name is no UTF-8; its bytes follow, percent-encoded."""
QUERY: Final = re.compile(r"(?<=\w)\?[^\s'\")]+")


class FetchConfig(OperatorConfig):
    """How sources are copied."""

    max_source_bytes: Annotated[
        int, Field(gt=0, description="A larger object, or unpacked archive member, is refused as too_large.")
    ] = 64 * 1024**3
    max_attempts: Annotated[int, Field(ge=1, description="Attempts at a download that fails in transit.")] = 4
    first_wait_seconds: Annotated[
        float, Field(ge=0, description="Wait before the second attempt; doubled before each further one.")
    ] = 1.0


@contextlib.contextmanager
def local_copy(
    source_uri: str, source_ref: Mapping[str, Any] | None = None, config: FetchConfig | None = None
) -> Iterator[Path]:
    """Yield a local path that holds the bytes of a source.

    A local file is yielded as it is; anything else is copied to a temporary file, which is removed afterwards and
    keeps the suffix of the name.

    Args:
        source_uri: a local path or any fsspec URL; of the archive, where the source is a member of one.
        source_ref: a `SOURCE_REF` value. `member` names a member of a tar or zip archive; with `byte_offset` and
            `byte_size` only that range is read, as it stands. `path`, where given, is the archive's own address.
        config: limits and retries.

    Raises:
        FetchError: `not_found`, `forbidden`, `unreadable`, or `too_large`.
    """
    config = config or FetchConfig()
    reference = source_ref or {}
    address = str(reference.get("path") or source_uri)
    member = reference.get("member")
    byte_range = (reference.get("byte_offset"), reference.get("byte_size"))
    path = local_path(address)
    with contextlib.ExitStack() as stack:
        if path is not None:
            check_local_file(path)
        if member is None and path is not None and not address.startswith(BYTES_SCHEME):
            yield path
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagereel-")))
        target = folder / f"source{PurePosixPath(member or urlsplit(address).path).suffix[:16]}"
        if member is None and path is not None:
            # Decoders take names as UTF-8.
            target.symlink_to(path.absolute())
        elif member is None:
            download(address, target, config)
        elif byte_range[0] is not None and byte_range[1] is not None:
            download(address, target, config, byte_range[0], byte_range[1])
        else:
            archive = stack.enter_context(local_copy(address, None, config))
            extract_member(archive, member, target, config.max_source_bytes)
        yield target


class KeptCopy:
    """Keeps the local copy of the source that was asked for last: the units of a source follow one another.

    The bytes are checked against the hash that they were planned under, once for each copy and for each state of a
    local file, so that no row is stored under the key of other bytes.
    """

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
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
            self.close()
            self._path = self._stack.enter_context(local_copy(source_uri, source_ref, self.config))
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
        """Remove the copy."""
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


def download(address: str, target: Path, config: FetchConfig, offset: int = 0, size: int | None = None) -> None:
    """Copy a remote object, or `size` bytes of it from `offset`, to `target`.

    Failures in transit are tried again; those that would fail again are not.

    Raises:
        FetchError: as `local_copy`.
    """

    def attempt() -> None:
        filesystem, path = fsspec.core.url_to_fs(address)
        with filesystem.open(path, "rb", block_size=CHUNK_BYTES) as source, target.open("wb") as sink:
            if offset:
                source.seek(offset)
            copied = copy_bounded(source, sink, config.max_source_bytes, size, address)
        if size is not None and copied < size:
            message = f"{without_secrets(address)}: {copied} bytes at {offset}, wanted {size}"
            raise FetchError(message, code="unreadable")

    with_retries(attempt, address, config)


def with_retries(attempt: Callable[[], None], address: str, config: FetchConfig) -> None:
    """Run `attempt` until it succeeds, fails for good, or has failed `config.max_attempts` times."""
    chance = random.Random()
    for number in range(1, config.max_attempts + 1):
        try:
            attempt()
            return
        except FetchError:
            raise
        # Each fsspec backend has exceptions of its own (botocore, aiohttp, google, azure), with no common root.
        except Exception as error:
            failure = translated(error, address)
            if not failure.retryable or number == config.max_attempts:
                raise failure from error
        wait_seconds = config.first_wait_seconds * 2 ** (number - 1)
        time.sleep(wait_seconds * chance.uniform(0.5, 1.5))


def translated(error: Exception, address: str) -> FetchError:
    """Return the `FetchError` for a library's exception; retryable when it may have been in transit."""
    status = http_status(error)
    if status in MISSING_STATUSES:
        code, retryable = "not_found", False
    elif isinstance(error, PermissionError) or status in FORBIDDEN_STATUSES:
        code, retryable = "forbidden", False
    elif status is None and isinstance(error, FileNotFoundError | NotADirectoryError):
        code, retryable = "not_found", False
    elif isinstance(error, ImportError | ValueError | NotImplementedError | IsADirectoryError):
        code, retryable = "unreadable", False
    else:
        code, retryable = "unreadable", True
    message = f"{without_secrets(address)}: {type(error).__name__}: {QUERY.sub('', str(error))}"
    return FetchError(message, code=code, retryable=retryable)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an exception, or one that it was raised from, carries.

    fsspec raises FileNotFoundError from whatever answer it got to its first look at a URL, 503 included.
    """
    found: BaseException | None = error
    while found is not None:
        status = getattr(found, "status", None)
        if isinstance(status, int):
            return status
        found = found.__cause__
    return None


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


def copy_bounded(source: BinaryIO, sink: BinaryIO, max_bytes: int, size: int | None, address: str) -> int:
    """Copy up to `size` bytes, or all, and return how many; more than `max_bytes` is `too_large`."""
    copied = 0
    while size is None or copied < size:
        chunk = source.read(CHUNK_BYTES if size is None else min(CHUNK_BYTES, size - copied))
        if not chunk:
            break
        copied += len(chunk)
        if copied > max_bytes:
            raise FetchError(f"{without_secrets(address)}: more than {max_bytes} bytes", code="too_large")
        sink.write(chunk)
    return copied


def extract_member(archive: Path, member: str, target: Path, max_bytes: int) -> None:
    """Copy one member of a tar or zip archive to `target`; its name never becomes a path on this machine.

    Raises:
        FetchError: `not_found` for no such member, `unreadable` for a damaged archive or a member that is no file,
            `too_large` when it unpacks to more than `max_bytes`.
    """
    try:
        with open_member(archive, member) as source, target.open("wb") as sink:
            copy_bounded(source, sink, max_bytes, None, f"{archive.name}:{member}")
    except KeyError as error:
        raise FetchError(f"{archive.name}: no member {member!r}", code="not_found") from error
    # zlib and lzma errors reach us bare; NotImplementedError and RuntimeError are zip's odd methods and passwords.
    except (OSError, EOFError, ValueError, RuntimeError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{archive.name}:{member}: {error}", code="unreadable") from error


@contextlib.contextmanager
def open_member(archive: Path, member: str) -> Iterator[BinaryIO]:
    """Yield a reader of one member of a tar (of any compression) or zip archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed, packed.open(member) as source:
            yield source  # type: ignore[misc]
        return
    with tarfile.open(archive) as packed_tar:
        found = packed_tar.extractfile(member)
        if found is None:
            raise ValueError("not a regular file")
        with found:
            yield found  # type: ignore[misc]
