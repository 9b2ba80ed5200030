"""Inputs to sources: what the user named, listed, one row an object, nothing opened."""

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from operators.base import rows_to_table
from schemas.errors import ConfigError
from schemas.source import SOURCE

MANIFEST_SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
PASSED_OVER_SUFFIXES = (
    ".csv", ".css", ".doc", ".docx", ".gz", ".htm", ".html", ".ini", ".js", ".json", ".jsonl", ".log", ".md",
    ".mp3", ".parquet", ".ppt", ".pptx", ".py", ".rst", ".srt", ".sha256", ".tar", ".toml", ".tsv", ".ttf", ".txt",
    ".vtt", ".wav", ".xls", ".xlsx", ".xml", ".yaml", ".yml", ".zip",
)  # fmt: skip
"""Files in a folder that are passed over, and counted, when the folder itself was named."""

SOURCES_PER_TABLE = 1000


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

    Args:
        inputs: files, folders, globs, URLs of any fsspec protocol, or manifests (.txt, .csv, .jsonl, .parquet).
        options: `page_ranges`, `password`, `start_seconds`, `stop_seconds` for every source that a manifest row does
            not set itself.
        counts: filled while the tables are consumed.

    Raises:
        ConfigError: an input does not exist or matches nothing.
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
        path = Path(given).expanduser()
        if "://" in given or path.exists():
            continue
        if not glob.has_magic(given):
            kind = "manifest" if path.suffix.lower() in MANIFEST_SUFFIXES else "input"
            raise ConfigError(f"{kind} {given!r} does not exist")
        if next(glob.iglob(str(path), recursive=True), None) is None:
            raise ConfigError(f"input {given!r} matches no file")


def _rows(inputs: Iterable[str], counts: Listing) -> Iterator[dict[str, Any]]:
    for given in inputs:
        if Path(given).suffix.lower() in MANIFEST_SUFFIXES and not glob.has_magic(given):
            yield from _manifest(given)
        elif "://" in given:
            yield from _remote(given, counts)
        else:
            yield from _local(given, counts)


def _local(given: str, counts: Listing) -> Iterator[dict[str, Any]]:
    path = Path(given).expanduser()
    if path.is_file():
        yield _local_row(path)
    elif path.is_dir():
        yield from _folder(path, counts)
    elif glob.has_magic(given):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise ConfigError(f"input {given!r} matches no file")
        yield from (_local_row(Path(match)) for match in matches)
    else:
        raise ConfigError(f"input {given!r} does not exist")


def _folder(folder: Path, counts: Listing) -> Iterator[dict[str, Any]]:
    before = counts.sources
    found = False
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in PASSED_OVER_SUFFIXES:
                counts.passed_over += 1
                continue
            found = True
            yield _local_row(Path(root) / name)
    if not found and counts.sources == before:
        raise ConfigError(f"folder {str(folder)!r} holds no file to read")


def _local_row(path: Path) -> dict[str, Any]:
    facts = path.stat()
    return {
        "source_uri": str(path.absolute()),
        "size_bytes": facts.st_size,
        "version_tag": str(facts.st_mtime_ns),
    }


def _remote(given: str, counts: Listing) -> Iterator[dict[str, Any]]:
    protocol = given.split("://", 1)[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(given)
        if glob.has_magic(given) and protocol not in ("http", "https"):
            found = filesystem.glob(path, detail=True)
        elif filesystem.isdir(path) and protocol not in ("http", "https"):
            found = filesystem.find(path, detail=True)
        else:
            found = {path: filesystem.info(path)}
    except FileNotFoundError as error:
        raise ConfigError(f"input {given!r} does not exist") from error
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"input {given!r} cannot be listed: {str(error).splitlines()[0]}") from error
    files = {name: info for name, info in sorted(found.items()) if info.get("type", "file") == "file"}
    if not files:
        raise ConfigError(f"input {given!r} matches no file")
    for name, info in files.items():
        if len(files) > 1 and Path(name).suffix.lower() in PASSED_OVER_SUFFIXES:
            counts.passed_over += 1
            continue
        tag = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
        yield {
            "source_uri": given if len(files) == 1 and not glob.has_magic(given) else filesystem.unstrip_protocol(name),
            "size_bytes": info.get("size"),
            "version_tag": str(tag),
        }


def _manifest(given: str) -> Iterator[dict[str, Any]]:
    """Yield one row for each line of a manifest; a file that is missing becomes an error row when it is probed."""
    try:
        with fsspec.open(given, "rb") as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise ConfigError(f"manifest {given!r} does not exist") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"manifest {given!r} cannot be read: {str(error).splitlines()[0]}") from error
    base = "" if "://" in given else str(Path(given).expanduser().absolute().parent)
    count = 0
    for entry in _manifest_entries(given, data):
        uri = entry.get("uri")
        if not uri:
            raise ConfigError(f"manifest {given!r}, entry {count + 1}: no 'uri'")
        count += 1
        yield _manifest_row(str(uri), base, entry, f"manifest {given!r}, entry {count}")
    if not count:
        raise ConfigError(f"manifest {given!r} names no source")


def _manifest_entries(given: str, data: bytes) -> Iterator[dict[str, Any]]:
    suffix = Path(given).suffix.lower()
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
    except (ValueError, pa.ArrowException) as error:
        raise ConfigError(f"manifest {given!r} cannot be parsed: {str(error).splitlines()[0]}") from error


def _manifest_row(uri: str, base: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"source_uri": uri}
    if "://" not in uri:
        path = Path(uri).expanduser()
        row["source_uri"] = str(path if path.is_absolute() else Path(base) / path)
        if Path(row["source_uri"]).is_file():
            row |= _local_row(Path(row["source_uri"]))
    row["page_ranges"] = str(entry["pages"]) if entry.get("pages") not in (None, "") else None
    row["password"] = str(entry["password"]) if entry.get("password") not in (None, "") else None
    for key in ("start_seconds", "stop_seconds"):
        value = entry.get(key)
        try:
            row[key] = float(value) if value not in (None, "") else None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {key} is {value!r}, wanted seconds") from error
    return row
