"""Inputs to sources: what the user named, listed, one row an object, nothing opened."""

import csv
import glob
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote_from_bytes

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.asyn import AsyncFileSystem, sync

from operators.base import rows_to_table
from operators.fetch import BYTES_SCHEME, MISSING_STATUSES, http_status, local_path, translated
from pipeline.addresses import scrubbed, stored_uri
from schemas.errors import ConfigError, FetchError, PagereelError, TransientError, error_struct, one_line, plain_text
from schemas.source import SOURCE

MANIFEST_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
PASSED_OVER_SUFFIXES = (
    ".csv", ".css", ".doc", ".docx", ".gz", ".htm", ".html", ".ini", ".js", ".json", ".jsonl", ".log", ".md",
    ".mp3", ".parquet", ".ppt", ".pptx", ".py", ".rst", ".srt", ".sha256", ".tar", ".toml", ".tsv", ".ttf", ".txt",
    ".vtt", ".wav", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip",
)  # fmt: skip
"""Files in a folder that are passed over, and counted, when the folder itself was named."""

SOURCES_PER_TABLE = 1000
LOOKS_AT_ONCE = 32
LOOK_SECONDS = 10.0
"""A remote source of a manifest that does not tell its size in this time is found out about when it is read."""

TAGS: Final = (
    "etag", "contentmd5", "digest", "md5hash", "lastmodified", "updated", "mtime", "modified", "modify", "created",
)  # fmt: skip
"""What file systems call the version or time of an object, best first; in small letters, without `-` and `_`."""


@dataclass
class Listing:
    """Counts of one listing.

    Attributes:
        sources: rows listed so far.
        passed_over: files of a named folder that are no documents or videos by their name.
    """

    sources: int = 0
    passed_over: int = 0


def list_sources(inputs: Iterable[str], options: dict[str, Any], counts: Listing) -> Iterator[pa.Table]:
    """Yield SOURCE tables for the inputs, in order; bounded memory.

    What a folder or manifest names and cannot be looked at is a row all the same: reading it will tell why. A folder
    below a named one that cannot be listed is a row with an error. A local file whose name is no UTF-8 has a
    `file+bytes://` address.

    Args:
        inputs: files, folders, globs, URLs of any fsspec protocol, or manifests (.txt, .csv, .jsonl, .parquet).
        options: `page_ranges`, `password`, `start_seconds`, `stop_seconds` for every source that a manifest row does
            not set itself.
        counts: filled while the tables are consumed.

    Raises:
        ConfigError: an input does not exist, matches nothing, or cannot be listed.
        TransientError: a store did not answer.
    """
    held: list[dict[str, Any]] = []
    for row in _rows(inputs, counts):
        row["source_index"] = counts.sources
        counts.sources += 1
        held.append({**options, **{key: value for key, value in row.items() if value is not None}})
        if len(held) == SOURCES_PER_TABLE:
            yield rows_to_table(held, SOURCE)
            held = []
    if held:
        yield rows_to_table(held, SOURCE)


def check_inputs(inputs: Iterable[str]) -> None:
    """Refuse local inputs that do not exist, before anything starts; URLs are looked at when they are listed.

    Raises:
        ConfigError: one of them is not there.
    """
    for given in inputs:
        path = _named_path(given)
        if path is None or os.path.exists(path):
            continue
        if not glob.has_magic(given):
            raise ConfigError(f"{'manifest' if _has_manifest_suffix(given) else 'input'} {given!r} does not exist")
        if next(glob.iglob(str(path), recursive=True), None) is None:
            raise ConfigError(f"input {given!r} matches no file")


def _named_path(given: str) -> Path | None:
    """Return the local path that an input names, None for one of another file system.

    Raises:
        ConfigError: the input is empty, and would mean the folder that the command runs in.
    """
    if not given.strip() or given.endswith("://"):
        raise ConfigError(f"input {given!r} is empty: it names nothing")
    return _expanded(local_path(given) if "://" in given else Path(given))


def _expanded(path: Path | None) -> Path | None:
    try:
        return path and path.expanduser()
    except RuntimeError:
        # "~name" of a user that this machine does not have.
        return path


def _rows(inputs: Iterable[str], counts: Listing) -> Iterator[dict[str, Any]]:
    for given in inputs:
        path = _named_path(given)
        if _has_manifest_suffix(given) and (not _has_magic(given) or _is_file(given, path)):
            yield from _manifest(given, path)
        elif path is None:
            yield from _remote(given, counts)
        else:
            yield from _local(given, path, counts)


def _first_link(given: str) -> tuple[str, str, str]:
    """Return what stands before, in and after the link of a chained URL that names the object itself."""
    links = given.split("::")
    place = next((place for place, link in enumerate(links) if "://" in link), 0)
    before, after = links[:place], links[place + 1 :]
    return "".join(f"{link}::" for link in before), links[place], "".join(f"::{link}" for link in after)


def _has_manifest_suffix(given: str) -> bool:
    return _suffix(given) in MANIFEST_SUFFIXES


def _suffix(given: str) -> str:
    name = _first_link(given)[1].partition("?")[0] if "://" in given else given
    return posixpath.splitext(name)[1].lower()


def _has_magic(given: str) -> bool:
    """Return whether an input may be a pattern; the ? of a URL starts its query."""
    return glob.has_magic(given) and not _first_link(given)[1].startswith(("http://", "https://"))


def _is_file(given: str, path: Path | None) -> bool:
    if path is not None:
        return path.is_file()
    try:
        filesystem, name = fsspec.core.url_to_fs(given)
        return bool(filesystem.isfile(name))
    except Exception:  # noqa: BLE001
        # A name that a file system refuses, as it may refuse a pattern, is no file of it; the listing tells the rest.
        return False


def _refusal(what: str, given: str, error: Exception) -> PagereelError:
    """Return the error for an input that cannot be listed or read, in one line without the secrets of its address."""
    status = http_status(error)
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, OSError):
        # What fsspec makes of a host that does not answer.
        error = cause
    if status in MISSING_STATUSES or (status is None and isinstance(error, FileNotFoundError)):
        return ConfigError(f"{what} does not exist")
    passes = isinstance(error, TimeoutError | ConnectionResetError) or (status is not None and status >= 500)
    kind = TransientError if passes else ConfigError
    answer = f" (status {status})" if status else ""
    return kind(f"{what} cannot be read{answer}: {scrubbed(one_line(error), given)}")


def _local(given: str, path: Path, counts: Listing) -> Iterator[dict[str, Any]]:
    if os.path.isdir(path):
        yield from _folder(path, counts)
    elif os.path.lexists(path):
        yield _local_row(path)
    elif glob.has_magic(given):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match))
        if not matches:
            raise ConfigError(f"input {given!r} matches no file")
        yield from (_local_row(Path(match)) for match in matches)
    else:
        raise ConfigError(f"input {given!r} does not exist")


def _folder(folder: Path, counts: Listing) -> Iterator[dict[str, Any]]:
    before = counts.sources
    unread: list[OSError] = []
    found = False
    for root, folders, names in os.walk(folder, onerror=unread.append):
        # A folder fails when the walk enters it, which is before the next one that it can list.
        yield from _unread_folders(unread, folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in PASSED_OVER_SUFFIXES:
                counts.passed_over += 1
                continue
            found = True
            yield _local_row(Path(root) / name)
    if unread and not found and counts.sources == before and unread[0].filename == str(folder):
        raise _refusal(f"folder {str(folder)!r}", str(folder), unread[0]) from unread[0]
    yield from _unread_folders(unread, folder)
    if not found and counts.sources == before:
        raise ConfigError(f"folder {str(folder)!r} holds no file to read")


def _unread_folders(unread: list[OSError], folder: Path) -> Iterator[dict[str, Any]]:
    while unread:
        error = unread.pop(0)
        address = _address(Path(error.filename or folder))
        failure = translated(error, address)
        listed = FetchError(str(failure), code=failure.code, stage="list", exception_type=type(error).__name__)
        yield {"source_uri": address, "error": error_struct(listed, "list_sources")}


def _local_row(path: Path) -> dict[str, Any]:
    """Return the row of a file; one that cannot be looked at, such as a broken link, has no size."""
    row: dict[str, Any] = {"source_uri": _address(path)}
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return row
    return row | {"size_bytes": facts.st_size, "version_tag": str(facts.st_mtime_ns)}


def _address(path: Path) -> str:
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        try:
            return BYTES_SCHEME + quote_from_bytes(os.fsencode(name))
        except UnicodeEncodeError:
            return plain_text(name)
    return name


def _remote(given: str, counts: Listing) -> Iterator[dict[str, Any]]:
    what = f"input {stored_uri(given)!r}"
    try:
        filesystem, path = fsspec.core.url_to_fs(given)
        # An earlier listing of this process may be older than the files.
        filesystem.invalidate_cache()
        found, base = _found(filesystem, path, given)
    except Exception as error:
        raise _refusal(what, given, error) from error
    listed = False
    for name, info in sorted(found.items()):
        if info.get("type", "file") != "file" or (base is not None and _is_hidden(name, path, base)):
            continue
        if base is not None and len(found) > 1 and _suffix(name) in PASSED_OVER_SUFFIXES:
            counts.passed_over += 1
            continue
        listed = True
        uri = given if base is None else filesystem.unstrip_protocol(name) + _first_link(given)[2]
        yield {"source_uri": plain_text(uri), **_facts(info)}
    if not listed:
        raise ConfigError(f"{what} matches no file")


def _found(filesystem: Any, path: str, given: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the objects that a URL names, and the folder that they were searched in; None where it names one."""
    if given.startswith(("http://", "https://")):
        return {path: filesystem.info(path)}, None
    if glob.has_magic(path) and not filesystem.exists(path):
        return filesystem.glob(path, detail=True), _folder_of_pattern(path)
    if filesystem.isdir(path):
        return filesystem.find(path, detail=True), path
    return {path: filesystem.info(path)}, None


def _folder_of_pattern(pattern: str) -> str:
    parts = pattern.split("/")
    place = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:place])


def _is_hidden(name: str, path: str, base: str) -> bool:
    """Return whether a name below `base` is hidden, unless the pattern `path` asks for hidden ones."""
    start = len(base.rstrip("/"))
    asked = any(part.startswith(".") for part in path[start:].split("/"))
    return not asked and any(part.startswith(".") for part in name[start:].split("/"))


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    by_name = {str(key).lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    tag = next((str(by_name[name]) for name in TAGS if by_name.get(name)), "")
    return {"size_bytes": info.get("size"), "version_tag": tag}


def _manifest(given: str, path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield one row for each line of a manifest; a file that is missing becomes an error row when it is probed."""
    what = f"manifest {stored_uri(given)!r}"
    try:
        if path is not None:
            data = path.read_bytes()
        else:
            filesystem, name = fsspec.core.url_to_fs(given)
            with filesystem.open(name, "rb") as stream:
                data = stream.read()
    except Exception as error:
        raise _refusal(what, given, error) from error
    rows = _manifest_rows(what, given, path, data)
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        while chunk := list(islice(rows, SOURCES_PER_TABLE)):
            for row, facts in zip(chunk, pool.map(_looked_at, chunk), strict=True):
                yield row | facts


def _looked_at(row: dict[str, Any]) -> dict[str, Any]:
    """Return size and version tag of a source of a manifest; nothing where they cannot be had."""
    uri = row["source_uri"]
    path = local_path(uri)
    if path is not None:
        return _local_row(path) if os.path.lexists(path) else {}
    try:
        filesystem, name = fsspec.core.url_to_fs(uri)
        if isinstance(filesystem, AsyncFileSystem):
            return _facts(sync(filesystem.loop, filesystem._info, name, timeout=LOOK_SECONDS))
        return _facts(filesystem.info(name))
    except Exception:  # noqa: BLE001
        # Each file system has errors of its own. This one will come again when the source is read, and be its row.
        return {}


def _manifest_rows(what: str, given: str, path: Path | None, data: bytes) -> Iterator[dict[str, Any]]:
    count = 0
    for count, entry in enumerate(_manifest_entries(what, _suffix(given), data), 1):
        where = f"{what}, entry {count}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: wanted an object with a 'uri', found {type(entry).__name__}")
        uri = str(entry.get("uri") or "")
        if not uri.strip():
            raise ConfigError(f"{where}: no 'uri'")
        yield _manifest_row(_entry_address(uri, given, path), entry, where)
    if not count:
        raise ConfigError(f"{what} names no source")


def _manifest_entries(what: str, suffix: str, data: bytes) -> Iterator[Any]:
    try:
        if suffix == ".parquet":
            yield from pq.read_table(io.BytesIO(data)).to_pylist()
            return
        text = data.decode("utf-8-sig")
        if suffix == ".csv":
            yield from csv.DictReader(io.StringIO(text))
            return
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        yield from ((json.loads(line) for line in lines) if suffix == ".jsonl" else ({"uri": line} for line in lines))
    except Exception as error:
        raise ConfigError(f"{what} cannot be parsed: {one_line(error)}") from error


def _entry_address(uri: str, given: str, path: Path | None) -> str:
    """Return the address that an entry of a manifest names: relative to the folder of the manifest, on its store."""
    own = _expanded(Path(uri))
    if own is None or "://" in uri:
        return plain_text(uri)
    if path is not None or own.is_absolute():
        return _address(path.absolute().parent / own if path else own)
    before, link, after = _first_link(given)
    protocol, _, name = link.partition("?")[0].partition("://")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(name), uri))
    return plain_text(f"{before}{protocol}://{place}{after}")


def _manifest_row(address: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"source_uri": address}
    for key, column in (("pages", "page_ranges"), ("password", "password")):
        row[column] = plain_text(str(entry[key])) if entry.get(key) not in (None, "") else None
    for key in ("start_seconds", "stop_seconds"):
        value = entry.get(key)
        try:
            row[key] = float(value) if value not in (None, "") else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {key} is {value!r}, wanted seconds") from error
    return row
