"""Where a run lives: files of a local folder or of any fsspec store, each written whole or not at all."""

import contextlib
import errno
import io
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from operators.retries import RetryPolicy, may_pass, passes_once_reached, retried, service_code
from operators.stores import RangeFile, Remote, ask, open_store
from pipeline.addresses import scrubbed, stored_uri
from pipeline.listing import objects_below
from schemas.errors import ConfigError, PagereelError, TransientError, one_line

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".writing-"
FETCH_TOGETHER = 500
RANGE_BYTES = 1024 * 1024
"""Of a file that is read in parts, fetched at once: footers and column chunks are read in small steps."""

T = TypeVar("T")


class Storage:
    """Named byte strings under one root.

    A name is a relative path with `/`. A write is atomic and durable when it returns: locally a file in the same
    folder is synced and renamed, on object stores it is one upload, which is visible only when complete. What fails on
    an object store and may pass is tried again, here and nowhere below.

    Args:
        uri: a folder, or a URL of any fsspec protocol. Credentials and endpoints come from the environment.

    Attributes:
        retries: how calls to an object store are tried again.

    Raises:
        ConfigError: the protocol is unknown, or its library is missing; from any method: there are no credentials.
    """

    def __init__(self, uri: str) -> None:
        self.uri = os.fspath(uri)
        self.retries = RetryPolicy()
        self._shown = stored_uri(self.uri)
        self._passes: Callable[[Exception], bool] = may_pass
        try:
            self.filesystem, self.root = open_store(self.uri)
        except Exception as error:
            raise ConfigError(f"output {self._shown!r} cannot be used: {self._said(error)}") from error
        self.root = self.root.rstrip("/")
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return type(self), (self.uri,)

    def is_same_place(self, other: "Storage") -> bool:
        """Return whether another storage has the same root, however either is spelled."""
        if self.is_local and other.is_local:
            return os.path.realpath(self.root) == os.path.realpath(other.root)
        return bool(self.filesystem == other.filesystem) and self.root == other.root

    def path(self, name: str) -> str:
        """Return the path of `name` inside the file system."""
        return f"{self.root}/{name}" if name else self.root

    def put(self, name: str, data: bytes) -> None:
        """Write `data` under `name`, replacing what was there.

        Raises:
            TransientError: the store refused; the old content is untouched.
        """
        try:
            if self.is_local:
                _publish_local(self.path(name), data, replace=True)
            else:
                self._ask("pipe_file", self.path(name), data, size_bytes=len(data))
        except Exception as error:
            raise self._failure(f"cannot write {self._shown}/{name}", error) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `data` under `name` unless it exists; return whether it was written.

        Of several writers at once exactly one gets True, on local folders and on stores with conditional creation
        (S3); elsewhere the check and the write are two calls. On a remote store writers must write different bytes:
        a creation whose answer was lost on the way knows its own object by them.

        Raises:
            TransientError: the store refused for another reason.
        """
        try:
            if self.is_local:
                _publish_local(self.path(name), data, replace=False)
            else:
                retried(lambda: self._create_remote(self.path(name), data), self.retries, self._passes)
        except Exception as error:
            if not (isinstance(error, FileExistsError) or service_code(error) == "PreconditionFailed"):
                raise self._failure(f"cannot create {self._shown}/{name}", error) from error
            return isinstance(self.filesystem, AsyncFileSystem) and self._get_or_none(name) == data
        return True

    def get(self, name: str) -> bytes:
        """Return the content of `name`.

        Raises:
            FileNotFoundError: there is none.
            TransientError: the store did not answer.
        """
        try:
            data: bytes = self._ask("cat_file", self.path(name))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failure(f"cannot read {self._shown}/{name}", error) from error
        return data

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the contents of `names`, None for those that do not exist; object stores are asked in parallel.

        Raises:
            TransientError: the store did not answer.
        """
        if self.is_local:
            return [self._get_or_none(name) for name in names]
        found: list[bytes | None] = []
        for start in range(0, len(names), FETCH_TOGETHER):
            paths = [self.path(name) for name in names[start : start + FETCH_TOGETHER]]
            try:
                answers = self.filesystem.cat(paths, on_error="return")
            except Exception:  # noqa: BLE001
                # Whatever stopped them together, each is asked for alone before this fails.
                answers = dict.fromkeys(paths, TimeoutError())
            for name, path in zip(names[start : start + FETCH_TOGETHER], paths, strict=True):
                answer = answers[path]
                is_absent = isinstance(answer, FileNotFoundError) and not may_pass(answer)
                found.append(
                    None if is_absent else self._get_or_none(name) if isinstance(answer, Exception) else bytes(answer)
                )
        return found

    def exists(self, name: str) -> bool:
        """Return whether `name` has content.

        Raises:
            TransientError: the store did not answer.
        """
        try:
            # Not `isfile`, for which a store that fails has no files.
            return bool(self._ask("info", self.path(name))["type"] == "file")
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._failure(f"cannot read {self._shown}/{name}", error) from error

    def list(self, prefix: str = "") -> list[str]:
        """Return the names below the folder `prefix`, sorted, files that are still being written left out.

        Raises:
            TransientError: the store did not answer.
        """
        try:
            self.filesystem.invalidate_cache()
            found = [path for path, _ in objects_below(self.filesystem, self.path(prefix), self.retries, self._passes)]
        except FileNotFoundError:
            return []
        except Exception as error:
            raise self._failure(f"cannot list {self._shown}/{prefix}", error) from error
        start = len(self.root) + 1
        names = (path[start:] for path in found)
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX))

    def delete(self, name: str) -> None:
        """Remove `name`; removing what is not there is fine.

        Raises:
            TransientError: the store refused.
        """
        try:
            self._ask("rm_file", self.path(name))
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._failure(f"cannot remove {self._shown}/{name}", error) from error

    def open_input(self, name: str, *, ranges: bool = False) -> pa.NativeFile:
        """Return the content of `name` as a random-access Arrow file.

        Args:
            name: what to open.
            ranges: True fetches from an object store only what is read, which suits a few columns of a large file;
                False fetches a small file in one request.

        Raises:
            FileNotFoundError: there is none.
            TransientError: the store did not answer.
        """
        if self.is_local:
            return pa.OSFile(self.path(name))
        if not ranges:
            return pa.BufferReader(self.get(name))
        try:
            remote = Remote(self._shown, self.retries, self._passes, (self.filesystem, self.path(name)))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._failure(f"cannot read {self._shown}/{name}", error) from error
        if not remote.has_ranges:
            return pa.BufferReader(self.get(name))
        file = RangeFile(remote, lambda error: self._failure(f"cannot read {self._shown}/{name}", error))
        return pa.PythonFile(io.BufferedReader(file, RANGE_BYTES), mode="r")

    def delete_temporaries(self, age_seconds: float = 0.0) -> int:
        """Remove what killed local writers left behind so long ago; return how many files."""
        if not self.is_local or not os.path.isdir(self.root):
            return 0
        removed = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if not name.startswith(TEMPORARY_PREFIX):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - os.stat(path).st_mtime >= age_seconds:
                        os.unlink(path)
                        removed += 1
        return removed

    def probe_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            ConfigError: nothing can be written here, in one line.
        """
        name = f"ledger/probe-{uuid.uuid4().hex}"
        self._passes = passes_once_reached
        try:
            self.put(name, b"pagereel")
            self.delete(name)
        except Exception as error:
            # Stores raise anything from botocore's own errors to OSError; all mean the same to the author.
            cause = self._said(error.__cause__ or error)
            raise ConfigError(f"output {self._shown!r} is not writable: {cause}") from error
        finally:
            self._passes = may_pass

    def _ask(self, method: str, *arguments: Any, size_bytes: int = 0) -> Any:
        if self.is_local:
            return getattr(self.filesystem, method)(*arguments)
        return retried(
            lambda: ask(self.filesystem, method, *arguments, size_bytes=size_bytes), self.retries, self._passes
        )

    def _create_remote(self, path: str, data: bytes) -> None:
        try:
            ask(self.filesystem, "pipe_file", path, data, size_bytes=len(data), mode="create")
        except (TypeError, NotImplementedError, ValueError) as error:
            if self.filesystem.exists(path):
                raise FileExistsError(path) from error
            logger.debug("%s has no conditional creation", type(self.filesystem).__name__)
            ask(self.filesystem, "pipe_file", path, data, size_bytes=len(data))

    def _get_or_none(self, name: str) -> bytes | None:
        try:
            return self.get(name)
        except FileNotFoundError:
            return None

    def _said(self, error: BaseException) -> str:
        return scrubbed(one_line(error), self.uri) or type(error).__name__

    def _failure(self, what: str, error: BaseException) -> PagereelError:
        """Return the error for what a store raised: anything from botocore's and google's own to OSError.

        Absent credentials do not come by waiting; whatever else there is may.
        """
        kind = ConfigError if "Credentials" in type(error).__name__ else TransientError
        return kind(f"{what}: {self._said(error)}")


def _publish_local(path: str, data: bytes, *, replace: bool) -> None:
    """Make `data` appear at `path` in one step.

    Raises:
        FileExistsError: `replace` is False and there is a file already.
        OSError: the disk refused.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _link_or_create(temporary, path, data)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    _sync_folder(folder)


def _link_or_create(temporary: str, path: str, data: bytes) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        # Some network file systems have no hard links. Creation is exclusive there too, but a kill may leave it short.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
