"""Inputs to sources: what the user named, listed, one row an object; archives alone are opened, when they are new."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.archives import has_archive_suffix
from operators.base import rows_to_table
from operators.fetch import local_path
from operators.retries import passes_once_reached, retried
from operators.stores import ask, open_store
from pipeline import looks
from pipeline.addresses import stored_uri
from pipeline.archive_sources import ARCHIVE_LINK, ArchiveMemory, Archives
from pipeline.listing import folder_of_pattern, matching, objects_below
from pipeline.looks import error_row, facts_of, local_row, looked_at, refusal
from pipeline.manifests import first_link, has_manifest_suffix, manifest_rows, name_of_input, suffix_of_input
from schemas.errors import ConfigError, FetchError, plain_text
from schemas.source import SOURCE

PASSED_OVER_SUFFIXES = (
    ".csv", ".css", ".doc", ".docx", ".gz", ".htm", ".html", ".ini", ".js", ".json", ".jsonl", ".log", ".md",
    ".mp3", ".parquet", ".ppt", ".pptx", ".py", ".rst", ".srt", ".sha256", ".toml", ".tsv", ".ttf", ".txt",
    ".vtt", ".wav", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
)  # fmt: skip
"""Files in a folder or archive that are passed over, and counted, when the folder or archive itself was named."""

SOURCES_PER_TABLE = 1000


@dataclass
class Listing:
    """Counts of one listing.

    Attributes:
        sources: rows listed so far.
        passed_over: files of a named folder or archive that are no documents or videos by their name, and what else
            of an archive is no file.
    """

    sources: int = 0
    passed_over: int = 0


def list_sources(
    inputs: Iterable[str], options: dict[str, Any], counts: Listing, memory: ArchiveMemory | None = None
) -> Iterator[pa.Table]:
    """Yield SOURCE tables for the inputs, in order; bounded memory.

    What a folder or manifest names and cannot be looked at is a row all the same: reading it will tell why. A folder
    below a named one that cannot be listed is a row with an error, and so is an archive, beside its members that could
    be. A local file whose name is no UTF-8 has a `file+bytes://` address.

    Args:
        inputs: files, folders, globs, archives, members of archives (`zip://inner.pdf::/path/a.zip`), URLs of any
            fsspec protocol, or manifests (.txt, .csv, .jsonl, .parquet).
        options: `page_ranges`, `password`, `start_seconds`, `stop_seconds` for every source that a manifest row does
            not set itself.
        counts: filled while the tables are consumed.
        memory: of what archives hold, from earlier calls; None opens each of them.

    Raises:
        ConfigError: an input does not exist, matches nothing, or cannot be listed.
        TransientError: a store did not answer.
    """
    held: list[dict[str, Any]] = []
    archives = Archives(PASSED_OVER_SUFFIXES, memory)
    try:
        for row in _rows(inputs, counts, archives):
            row["source_index"] = counts.sources
            counts.sources += 1
            held.append({**options, **{key: value for key, value in row.items() if value is not None}})
            if len(held) == SOURCES_PER_TABLE:
                yield rows_to_table(held, SOURCE)
                held = []
        if held:
            yield rows_to_table(held, SOURCE)
    finally:
        archives.close()


def check_inputs(inputs: Iterable[str]) -> None:
    """Refuse local inputs that do not exist, before anything starts; URLs are looked at when they are listed.

    Raises:
        ConfigError: one of them is not there.
    """
    for given in inputs:
        inside = ARCHIVE_LINK.fullmatch(given)
        path = _named_path(inside[2] if inside else given)
        if path is None or os.path.exists(path):
            continue
        if not glob.has_magic(given):
            raise ConfigError(f"{'manifest' if has_manifest_suffix(given) else 'input'} {given!r} does not exist")
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


def _rows(inputs: Iterable[str], counts: Listing, archives: Archives) -> Iterator[dict[str, Any]]:
    for given in inputs:
        path = _named_path(given)
        inside = ARCHIVE_LINK.fullmatch(given)
        passed_over = archives.passed_over
        if has_manifest_suffix(given) and inside is None and (not _has_magic(given) or _is_file(given, path)):
            yield from _of_manifest(given, path, archives)
        elif inside is not None:
            yield from _inside(given, inside[1], inside[2], archives)
        else:
            files = _remote(given, counts) if path is None else _local(given, path, counts)
            yield from _unpacked(files, given, archives)
        counts.passed_over += archives.passed_over - passed_over


def _unpacked(files: Iterable[dict[str, Any]], given: str, archives: Archives) -> Iterator[dict[str, Any]]:
    """Yield rows of files, with those of its members in the place of an archive.

    Raises:
        ConfigError: all that was named is archives without a file to read.
    """
    listed = is_archive = False
    for row in files:
        is_archive = row.get("error") is None and has_archive_suffix(name_of_input(row["source_uri"]))
        for found in _members(row, archives) if is_archive else (row,):
            listed = True
            yield found
    if is_archive and not listed:
        raise ConfigError(f"archive {stored_uri(given)!r} holds no file to read")


def _members(row: dict[str, Any], archives: Archives) -> Iterator[dict[str, Any]]:
    for found, damage in archives.rows(row):
        yield found if damage is None else {**found, **error_row(found["source_uri"], damage)}


def _inside(given: str, wanted: str, address: str, archives: Archives) -> Iterator[dict[str, Any]]:
    what = f"input {stored_uri(given)!r}"
    path = _named_path(address)
    if path is not None and not path.exists():
        raise ConfigError(f"{what}: there is no such archive")
    archive = local_row(path) if path is not None else {"source_uri": plain_text(address), **looked_at(address)}
    try:
        rows = list(archives.named_rows(archive, wanted))
    except FetchError as error:
        raise refusal(what, address, error) from error
    if not rows:
        raise ConfigError(f"{what} matches no member of the archive")
    yield from rows


def _of_manifest(given: str, path: Path | None, archives: Archives) -> Iterator[dict[str, Any]]:
    for row in manifest_rows(given, path):
        member = row.pop("member", None)
        inside = ARCHIVE_LINK.fullmatch(row["source_uri"])
        if inside is not None:
            member, row["source_uri"] = inside[1], inside[2]
        if member is not None:
            yield archives.member_facts(row | looked_at(row["source_uri"]), member)
        elif has_archive_suffix(name_of_input(row["source_uri"])):
            yield from _members(row, archives)
        else:
            yield row


def _has_magic(given: str) -> bool:
    """Return whether an input may be a pattern; the ? of a URL starts its query."""
    return glob.has_magic(given) and not first_link(given)[1].startswith(("http://", "https://"))


def _is_file(given: str, path: Path | None) -> bool:
    if path is not None:
        return path.is_file()
    try:
        filesystem, name = open_store(given)
        return _kind(filesystem, name) == "file"
    except Exception:  # noqa: BLE001
        # A name that a file system refuses, as it may refuse a pattern, is no file of it; the listing tells the rest.
        return False


def _kind(filesystem: Any, path: str) -> str | None:
    """Return `file` or `directory`, None for what does not exist."""
    try:
        facts = retried(lambda: ask(filesystem, "info", path), looks.LISTING_RETRIES, passes_once_reached)
    except FileNotFoundError:
        return None
    return str(facts.get("type", "file"))


def _local(given: str, path: Path, counts: Listing) -> Iterator[dict[str, Any]]:
    if os.path.isdir(path):
        yield from _folder(path, counts)
    elif os.path.lexists(path):
        yield local_row(path)
    elif glob.has_magic(given):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if not os.path.isdir(match))
        if not matches:
            raise ConfigError(f"input {given!r} matches no file")
        yield from (local_row(Path(match)) for match in matches)
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
            if os.path.splitext(name)[1].lower() in PASSED_OVER_SUFFIXES and not has_archive_suffix(name):
                counts.passed_over += 1
                continue
            found = True
            yield local_row(os.path.join(root, name))
    if unread and not found and counts.sources == before and unread[0].filename == str(folder):
        raise refusal(f"folder {str(folder)!r}", str(folder), unread[0]) from unread[0]
    yield from _unread_folders(unread, folder)
    if not found and counts.sources == before:
        raise ConfigError(f"folder {str(folder)!r} holds no file to read")


def _unread_folders(unread: list[OSError], folder: Path) -> Iterator[dict[str, Any]]:
    while unread:
        error = unread.pop(0)
        yield error_row(looks.address_of(Path(error.filename or folder)), error)


def _remote(given: str, counts: Listing) -> Iterator[dict[str, Any]]:
    what = f"input {stored_uri(given)!r}"
    listed, passed_over = False, 0
    try:
        filesystem, path = open_store(given)
        # An earlier listing of this process may be older than the files.
        filesystem.invalidate_cache()
        found, base, is_folder = _found(filesystem, path, given)
        for name, info in found:
            if info.get("type", "file") != "file" or (base is not None and _is_hidden(name, path, base)):
                continue
            if is_folder and suffix_of_input(name) in PASSED_OVER_SUFFIXES and not has_archive_suffix(name):
                passed_over += 1
                continue
            listed = True
            uri = given if base is None else filesystem.unstrip_protocol(name) + first_link(given)[2]
            yield {"source_uri": plain_text(uri), **facts_of(info)}
    except Exception as error:
        raise refusal(what, given, error) from error
    counts.passed_over += passed_over
    if not listed:
        raise ConfigError(f"{what} matches no file")


def _found(filesystem: Any, path: str, given: str) -> tuple[Iterable[tuple[str, dict[str, Any]]], str | None, bool]:
    """Return the objects that a URL names, where they were searched, and whether that folder was named.

    An object that was named itself was searched nowhere: None.
    """
    policy, passes = looks.LISTING_RETRIES, passes_once_reached
    is_web = given.startswith(("http://", "https://"))
    kind = None if is_web else _kind(filesystem, path)
    if kind == "directory":
        return objects_below(filesystem, path, policy, passes), path, True
    if kind is None and not is_web and glob.has_magic(path):
        return matching(filesystem, path, policy, passes), folder_of_pattern(path), False
    return [(path, retried(lambda: ask(filesystem, "info", path), policy, passes))], None, False


def _is_hidden(name: str, path: str, base: str) -> bool:
    """Return whether a name below `base` is hidden, unless the pattern `path` asks for hidden ones."""
    start = len(base.rstrip("/"))
    asked = any(part.startswith(".") for part in path[start:].split("/"))
    return not asked and any(part.startswith(".") for part in name[start:].split("/"))
