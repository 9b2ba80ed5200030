"""What a source looks like when it is listed: its address, its size, what changes when it does. Nothing is opened."""

import os
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote_from_bytes

from fsspec.asyn import AsyncFileSystem, sync

from operators.fetch import BYTES_SCHEME, MISSING_STATUSES, local_path, translated
from operators.retries import RetryPolicy, http_status, passes_once_reached, retried
from operators.stores import open_store
from pipeline.addresses import scrubbed
from schemas.errors import (
    ConfigError,
    FetchError,
    PagereelError,
    TransientError,
    error_struct,
    one_line,
    plain_text,
)

COMPONENT: Final = "list_sources"
LISTING_RETRIES = RetryPolicy()
"""How the driver asks again when a store fails while it lists; a run cannot start without."""

LOOK_RETRIES = RetryPolicy(max_attempts=4, most_wait_seconds=2.0, most_seconds=30.0)
LOOK_SECONDS = 10.0
"""A remote source of a manifest that does not tell its size in this time is found out about when it is read."""

TAGS: Final = (
    "etag", "contentmd5", "digest", "md5hash", "lastmodified", "updated", "mtime", "modified", "modify", "created",
)  # fmt: skip
"""What file systems call the version or time of an object, best first; in small letters, without `-` and `_`."""


def local_row(path: str | Path) -> dict[str, Any]:
    """Return the row of a file; one that cannot be looked at, such as a broken link, has no size."""
    row: dict[str, Any] = {"source_uri": address_of(path)}
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return row
    return row | {"size_bytes": facts.st_size, "version_tag": str(facts.st_mtime_ns)}


def address_of(path: str | Path) -> str:
    """Return the address of a local file: its absolute path, or its bytes where UTF-8 cannot hold them."""
    name = str(Path(path).absolute()) if isinstance(path, Path) or not is_plain_absolute(path) else path
    try:
        name.encode()
    except UnicodeEncodeError:
        try:
            return BYTES_SCHEME + quote_from_bytes(os.fsencode(name))
        except UnicodeEncodeError:
            return plain_text(name)
    return name


def is_plain_absolute(path: str) -> bool:
    """Return whether a path is one that `Path` would not write otherwise; asked first, since it is much faster."""
    return path.startswith("/") and "//" not in path and "/./" not in path and not path.endswith(("/", "/."))


def facts_of(info: dict[str, Any]) -> dict[str, Any]:
    """Return size and version tag from what a file system says about an object."""
    by_name = {str(key).lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    tag = next((str(by_name[name]) for name in TAGS if by_name.get(name)), "")
    return {"size_bytes": info.get("size"), "version_tag": tag}


def looked_at(uri: str) -> dict[str, Any]:
    """Return size and version tag of what a manifest names, local or not; nothing where they cannot be had."""
    path = local_path(uri)
    if path is not None:
        return {name: value for name, value in local_row(path).items() if name != "source_uri"}
    try:
        filesystem, name = open_store(uri)

        def look() -> Any:
            if isinstance(filesystem, AsyncFileSystem):
                return sync(filesystem.loop, filesystem._info, name, timeout=LOOK_SECONDS)
            return filesystem.info(name)

        return facts_of(retried(look, LOOK_RETRIES))
    except Exception:  # noqa: BLE001
        # Each file system has errors of its own. This one will come again when the source is read, and be its row.
        return {}


def error_row(address: str, error: Exception, **columns: Any) -> dict[str, Any]:
    """Return the row of something that could not be listed."""
    failure = translated(error, address)
    kind = failure.exception_type or (type(failure.__cause__ or error).__name__)
    listed = FetchError(str(failure), code=failure.code, stage="list", exception_type=kind, retryable=failure.retryable)
    return {"source_uri": address, "error": error_struct(listed, COMPONENT), **columns}


def refusal(what: str, given: str, error: Exception) -> PagereelError:
    """Return the error for an input that cannot be listed or read, in one line without the secrets of its address."""
    if isinstance(error, ConfigError):
        return ConfigError(f"{what} cannot be read: {error}")
    if isinstance(error, FetchError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = http_status(error)
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        # What fsspec makes of a host that does not answer.
        error = cause
    if status in MISSING_STATUSES or (status is None and isinstance(error, FileNotFoundError)):
        return ConfigError(f"{what} does not exist")
    kind = TransientError if passes_once_reached(error) else ConfigError
    answer = f" (status {status})" if status else ""
    return kind(f"{what} cannot be read{answer}: {scrubbed(one_line(error), given)}")
