"""Manifests: lists of sources in a file, read line by line, wherever they lie."""

import contextlib
import csv
import io
import json
import posixpath
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow.parquet as pq

from operators.fetch import FetchConfig, download
from operators.retries import passes_once_reached
from pipeline import looks
from pipeline.addresses import stored_uri
from pipeline.looks import address_of, is_plain_absolute, looked_at, refusal
from schemas.errors import ConfigError, one_line, plain_text

MANIFEST_SUFFIXES: Final = (".txt", ".csv", ".jsonl", ".parquet")
COLUMNS: Final = ("uri", "member", "pages", "password", "start_seconds", "stop_seconds")
ROWS_AT_ONCE: Final = 1000
LOOKS_AT_ONCE: Final = 32
LOOKS_PER_TASK: Final = 25
MOST_LINE_BYTES: Final = 1024 * 1024


def manifest_rows(given: str, path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield one row for each entry of a manifest, in bounded memory; a member of an archive has a `member`.

    Args:
        given: the manifest, as it was named.
        path: where it lies, None for one of another file system.

    Raises:
        ConfigError: it cannot be read or parsed, or names nothing.
        TransientError: its store did not answer.
    """
    what = f"manifest {stored_uri(given)!r}"
    with contextlib.ExitStack() as stack:
        try:
            if path is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagereel-")))
                # Its rows go by the folder that it came from; the copy is only to be read without a connection.
                download(given, folder / "manifest", _patience(), passes_once_reached)
            file = stack.enter_context((path or folder / "manifest").open("rb"))
        except Exception as error:
            raise refusal(what, given, error) from error
        rows = _rows(what, given, path, file)
        pool = stack.enter_context(ThreadPoolExecutor(LOOKS_AT_ONCE))
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            shares = [chunk[start : start + LOOKS_PER_TASK] for start in range(0, len(chunk), LOOKS_PER_TASK)]
            for looked in pool.map(_all_looked_at, shares):
                yield from looked


def first_link(given: str) -> tuple[str, str, str]:
    """Return what stands before, in and after the link of a chained URL that names the object itself."""
    links = given.split("::")
    place = next((place for place, link in enumerate(links) if "://" in link), 0)
    before, after = links[:place], links[place + 1 :]
    return "".join(f"{link}::" for link in before), links[place], "".join(f"::{link}" for link in after)


def has_manifest_suffix(given: str) -> bool:
    """Return whether an input is a manifest by its name."""
    return suffix_of_input(given) in MANIFEST_SUFFIXES


def suffix_of_input(given: str) -> str:
    """Return the suffix of a path or URL, in small letters."""
    return posixpath.splitext(name_of_input(given))[1].lower()


def name_of_input(given: str) -> str:
    """Return a path or URL without its query, which may hold dots of its own."""
    if "://" not in given:
        return given
    link = first_link(given)[1]
    return link.partition("?")[0] if link.startswith(("http://", "https://")) else link


def _patience() -> FetchConfig:
    policy = looks.LISTING_RETRIES
    return FetchConfig(
        max_attempts=policy.max_attempts,
        first_wait_seconds=policy.first_wait_seconds,
        most_seconds=policy.most_seconds,
    )


def _all_looked_at(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row if row.get("member") else row | looked_at(row["source_uri"]) for row in rows]


def _rows(what: str, given: str, path: Path | None, file: BinaryIO) -> Iterator[dict[str, Any]]:
    folder = None if path is None else str(path.absolute().parent)
    count = 0
    for count, entry in enumerate(_entries(what, suffix_of_input(given), file), 1):
        where = f"{what}, entry {count}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: wanted an object with a 'uri', found {type(entry).__name__}")
        uri = str(entry.get("uri") or "")
        if not uri.strip():
            raise ConfigError(f"{where}: no 'uri'")
        yield _row(_entry_address(uri, given, folder), entry, where)
    if not count:
        raise ConfigError(f"{what} names no source")


def _entries(what: str, suffix: str, file: BinaryIO) -> Iterator[Any]:
    try:
        if suffix == ".parquet":
            table = pq.ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if name in COLUMNS]
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist() if columns else [{}] * batch.num_rows
        elif suffix == ".csv":
            yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        elif suffix == ".jsonl":
            yield from (json.loads(line.decode()) for line in _lines(file))
        else:
            # A name is bytes to the system that a list of names was made on.
            yield from ({"uri": line.decode("utf-8", "surrogateescape")} for line in _lines(file))
    except Exception as error:
        raise ConfigError(f"{what} cannot be parsed: {one_line(error)}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines that say something, without white space around them.

    Raises:
        ValueError: the file is no text, or one line of it is as long as a file.
    """
    is_first = True
    while line := file.readline(MOST_LINE_BYTES + 1):
        if is_first:
            line = line.removeprefix(b"\xef\xbb\xbf")
        is_first = False
        if len(line) > MOST_LINE_BYTES:
            raise ValueError(f"a line has more than {MOST_LINE_BYTES} bytes")
        if b"\0" in line:
            raise ValueError("holds a NUL: it is no text in UTF-8")
        line = line.strip()
        if line and not line.startswith(b"#"):
            yield line


def _entry_address(uri: str, given: str, folder: str | None) -> str:
    """Return the address that an entry of a manifest names: relative to the folder of the manifest, on its store."""
    if "://" in uri:
        return plain_text(uri)
    if folder is not None and uri[0] not in "/~.":
        joined = f"{folder}/{uri}"
        if is_plain_absolute(joined):
            return address_of(joined)
    own = _expanded(Path(uri))
    if folder is not None or own.is_absolute():
        return address_of(Path(folder) / own if folder else own)
    before, link, after = first_link(given)
    protocol, _, name = link.partition("://")
    if protocol in ("http", "https"):
        name = name.partition("?")[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(name), uri))
    return plain_text(f"{before}{protocol}://{place}{after}")


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        # "~name" of a user that this machine does not have.
        return path


def _row(address: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"source_uri": address}
    for key, column in (("pages", "page_ranges"), ("password", "password"), ("member", "member")):
        if entry.get(key) not in (None, ""):
            row[column] = plain_text(str(entry[key]))
    for key in ("start_seconds", "stop_seconds"):
        value = entry.get(key)
        try:
            row[key] = float(value) if value not in (None, "") else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {key} is {value!r}, wanted seconds") from error
    return row
