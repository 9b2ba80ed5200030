"""Where a run lives: files of a local folder or of any fsspec store, each written whole or not at all."""

import errno
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import ConfigError, PagereelError, TransientError, one_line

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".writing-"
FETCH_TOGETHER = 500
CONFLICT_WORDS = ("PreconditionFailed", "pre-conditions", "ConditionalRequestConflict")
"""How S3 says that a conditional creation found something, or lost a race."""


class Storage:
    """Named byte strings under one root.

    A name is a relative path with `/`. A write is atomic and durable when it returns: locally a file in the same
    folder is synced and renamed, on object stores it is one upload, which is visible only when complete.

    Args:
        uri: a folder, or a URL of any fsspec protocol. Credentials and endpoints come from the environment.

    Raises:
        ConfigError: the protocol is unknown, or its library is missing; from any method: there are no credentials.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            # A listing that was cached before another process wrote would hide its commits.
            options = {"use_listings_cache": False} if "://" in uri and not uri.startswith("memory://") else {}
            self.filesystem, self.root = fsspec.core.url_to_fs(os.fspath(uri), **options)
        except Exception as error:
            raise ConfigError(f"output {uri!r} cannot be used: {one_line(error)}") from error
        self.root = self.root.rstrip("/")
        self.is_local = isinstance(self.filesystem, LocalFileSystem)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return type(self), (self.uri,)

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
                self.filesystem.pipe_file(self.path(name), data)
        except Exception as error:
            raise _failure(f"cannot write {self.uri}/{name}", error) from error

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `data` under `name` unless it exists; return whether it was written.

        Of several writers at once exactly one gets True, on local folders and on stores with conditional creation
        (S3); elsewhere the check and the write are two calls.

        Raises:
            TransientError: the store refused for another reason.
        """
        try:
            if self.is_local:
                _publish_local(self.path(name), data, replace=False)
            else:
                self._create_remote(self.path(name), data)
        except FileExistsError:
            return False
        except Exception as error:
            if any(word in f"{error!r} {error.__cause__!r}" for word in CONFLICT_WORDS):
                return False
            raise _failure(f"cannot create {self.uri}/{name}", error) from error
        return True

    def get(self, name: str) -> bytes:
        """Return the content of `name`.

        Raises:
            FileNotFoundError: there is none.
            TransientError: the store did not answer.
        """
        try:
            data: bytes = self.filesystem.cat_file(self.path(name))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise _failure(f"cannot read {self.uri}/{name}", error) from error
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
            except Exception as error:
                raise _failure(f"cannot read from {self.uri}", error) from error
            found += [self._content_or_raise(answers[path]) for path in paths]
        return found

    def exists(self, name: str) -> bool:
        """Return whether `name` has content.

        Raises:
            TransientError: the store did not answer.
        """
        try:
            return bool(self.filesystem.isfile(self.path(name)))
        except Exception as error:
            raise _failure(f"cannot read {self.uri}/{name}", error) from error

    def list(self, prefix: str = "") -> list[str]:
        """Return the names below the folder `prefix`, sorted, files that are still being written left out.

        Raises:
            TransientError: the store did not answer.
        """
        try:
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(self.path(prefix))
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _failure(f"cannot list {self.uri}/{prefix}", error) from error
        start = len(self.root) + 1
        names = (path[start:] for path in found)
        return sorted(name for name in names if not name.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX))

    def delete(self, name: str) -> None:
        """Remove `name`; removing what is not there is fine.

        Raises:
            TransientError: the store refused.
        """
        try:
            self.filesystem.rm_file(self.path(name))
        except FileNotFoundError:
            return
        except Exception as error:
            raise _failure(f"cannot remove {self.uri}/{name}", error) from error

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
        if ranges:
            try:
                return pa.PythonFile(self.filesystem.open(self.path(name), "rb", cache_type="none"), mode="r")
            except FileNotFoundError:
                raise
            except Exception as error:
                raise _failure(f"cannot read {self.uri}/{name}", error) from error
        return pa.BufferReader(self.get(name))

    def delete_temporaries(self) -> int:
        """Remove what killed local writers left behind; return how many files."""
        if not self.is_local or not os.path.isdir(self.root):
            return 0
        removed = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.startswith(TEMPORARY_PREFIX):
                    os.unlink(os.path.join(folder, name))
                    removed += 1
        return removed

    def probe_writable(self) -> None:
        """Write and remove a small file.

        Raises:
            ConfigError: nothing can be written here, in one line.
        """
        name = f"ledger/probe-{uuid.uuid4().hex}"
        try:
            self.put(name, b"pagereel")
            self.delete(name)
        except Exception as error:
            # Stores raise anything from botocore's own errors to OSError; all mean the same to the author.
            raise ConfigError(f"output {self.uri!r} is not writable: {one_line(error.__cause__ or error)}") from error

    def _create_remote(self, path: str, data: bytes) -> None:
        try:
            self.filesystem.pipe_file(path, data, mode="create")
        except (TypeError, NotImplementedError, ValueError) as error:
            if self.filesystem.exists(path):
                raise FileExistsError(path) from error
            logger.debug("%s has no conditional creation", type(self.filesystem).__name__)
            self.filesystem.pipe_file(path, data)

    def _get_or_none(self, name: str) -> bytes | None:
        try:
            return self.get(name)
        except FileNotFoundError:
            return None

    def _content_or_raise(self, answer: Any) -> bytes | None:
        if isinstance(answer, FileNotFoundError):
            return None
        if isinstance(answer, Exception):
            raise _failure(f"cannot read from {self.uri}", answer) from answer
        return bytes(answer)


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


def _failure(what: str, error: BaseException) -> PagereelError:
    """Return the error for what a store raised: anything from botocore's and google's own to OSError.

    Absent credentials do not come by waiting; whatever else there is may.
    """
    kind = ConfigError if "Credentials" in type(error).__name__ else TransientError
    return kind(f"{what}: {one_line(error)}")
