"""Archives as inputs: each member of a tar or zip is a source, known by the archive's address and its own name."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final, Protocol

from fsspec.utils import glob_translate

from operators.archives import BYTES_NAME, Contents, Member, has_archive_suffix, raw_name, stored_name
from operators.fetch import FetchConfig, Shelf
from schemas.errors import FetchError

ARCHIVE_LINK: Final = re.compile(r"(?:zip|tar)://(.*?)::(.+)", re.DOTALL)
"""`zip://inner.pdf::/path/a.zip`: a member, and where its archive lies."""

MAGIC: Final = re.compile(r"[*?\[]")
HIDDEN_FOLDERS: Final = {"__MACOSX"}


class ArchiveMemory(Protocol):
    """Remembers what archives hold, from one call to the next."""

    def contents(self, archive: dict[str, Any]) -> Contents | None:
        """Return what an archive holds, None where it must be opened to tell."""

    def learn(self, archive: dict[str, Any], contents: Contents) -> None:
        """Take in what an archive holds."""


class Archives:
    """Looks into archives, one after the other, and keeps what the last one holds.

    Args:
        passed_over_suffixes: members that are left out, and counted, where the archive as a whole was named.
        memory: of earlier calls; None: each archive is opened.
    """

    def __init__(self, passed_over_suffixes: tuple[str, ...], memory: ArchiveMemory | None = None) -> None:
        self._suffixes = passed_over_suffixes
        self._memory = memory
        self._shelf = Shelf()
        self._config = FetchConfig()
        self._last: tuple[tuple[Any, ...], Contents] | None = None
        self.passed_over = 0

    def contents(self, archive: dict[str, Any]) -> Contents:
        """Return what an archive holds; what cannot be read of it is in its `damage`.

        Args:
            archive: its row, as a file's.
        """
        key = tuple(archive.get(name) for name in ("source_uri", "size_bytes", "version_tag"))
        if self._last is None or self._last[0] != key:
            self._last = (key, self._found(archive))
        return self._last[1]

    def _found(self, archive: dict[str, Any]) -> Contents:
        known = self._memory.contents(archive) if self._memory else None
        if known is not None:
            return known
        try:
            found = self._shelf.open(archive["source_uri"], self._config).contents()
        except FetchError as error:
            return Contents(damage=error)
        if self._memory:
            self._memory.learn(archive, found)
        return found

    def close(self) -> None:
        """Let go of the last archive."""
        self._shelf.close()

    def rows(self, archive: dict[str, Any]) -> Iterator[tuple[dict[str, Any], FetchError | None]]:
        """Yield the row of each member that is to be read, with None; then the archive's own with what is wrong.

        Args:
            archive: its row, as a file's.
        """
        contents = self.contents(archive)
        self.passed_over += contents.passed_over
        for member in contents.members.values():
            if _is_hidden(member.name):
                continue
            if PurePosixPath(member.name).suffix.lower() in self._suffixes and not has_archive_suffix(member.name):
                self.passed_over += 1
                continue
            yield member_row(archive, member), None
        if contents.damage is not None:
            yield archive, contents.damage
        elif not contents.members:
            yield archive, FetchError(f"{archive['source_uri']}: the archive holds no file", code="empty")

    def named_rows(self, archive: dict[str, Any], wanted: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of what `wanted` names in an archive: a member, a folder, or a pattern.

        Raises:
            FetchError: the archive cannot be read, and what it tells of itself does not hold it.
        """
        contents = self.contents(archive)
        if wanted.startswith(BYTES_NAME):
            wanted = stored_name(raw_name(wanted))
        if wanted in contents.members:
            yield member_row(archive, contents.members[wanted])
            return
        if contents.damage is not None:
            raise contents.damage
        folder = f"{wanted.rstrip('/')}/" if wanted.strip("/") else ""
        pattern = re.compile(glob_translate(wanted)) if MAGIC.search(wanted) else None
        for member in contents.members.values():
            if pattern.match(member.name) if pattern else member.name.startswith(folder):
                yield member_row(archive, member)

    def member_facts(self, archive: dict[str, Any], wanted: str) -> dict[str, Any]:
        """Return the row of one member by its name; without facts where the archive does not tell them."""
        member = self.contents(archive).members.get(wanted)
        return member_row(archive, member or Member(wanted, -1))


def member_row(archive: dict[str, Any], member: Member) -> dict[str, Any]:
    """Return the row of a member; a size below 0 is not known."""
    is_known = member.size_bytes >= 0
    size = member.size_bytes if is_known else None
    reference = {
        "path": None,
        "member": member.name,
        "byte_offset": member.byte_offset,
        "byte_size": size if member.byte_offset is not None else None,
    }
    # Bytes of a tar have no checksum: they are as new as their archive.
    version = (member.version or archive.get("version_tag")) if is_known else None
    return {**archive, "source_ref": reference, "size_bytes": size, "version_tag": version}


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return any((part.startswith(".") and part.strip(".")) or part in HIDDEN_FOLDERS for part in parts)
