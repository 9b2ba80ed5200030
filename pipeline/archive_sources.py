"""Archives as inputs: each member of a tar or zip is a source, known by the archive's address and its own name."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Final

from fsspec.utils import glob_translate

from operators.archives import BYTES_NAME, Contents, Member, has_archive_suffix, raw_name, stored_name
from operators.fetch import FetchConfig, Shelf
from schemas.errors import FetchError

ARCHIVE_LINK: Final = re.compile(r"(?:zip|tar)://(.*?)::(.+)", re.DOTALL)
"""`zip://inner.pdf::/path/a.zip`: a member, and where its archive lies."""

MAGIC: Final = re.compile(r"[*?\[]")
HIDDEN_FOLDERS: Final = {"__MACOSX"}


class Archives:
    """Looks into archives, one after the other, and keeps what the last one holds.

    Args:
        passed_over_suffixes: members that are left out, and counted, where the archive as a whole was named.
    """

    def __init__(self, passed_over_suffixes: tuple[str, ...]) -> None:
        self._suffixes = passed_over_suffixes
        self._shelf = Shelf()
        self._config = FetchConfig()
        self.passed_over = 0

    def contents(self, address: str) -> Contents:
        """Return what an archive holds; what cannot be read of it is in its `damage`."""
        try:
            return self._shelf.open(address, self._config).contents()
        except FetchError as error:
            return Contents(damage=error)

    def close(self) -> None:
        """Let go of the last archive."""
        self._shelf.close()

    def rows(self, archive: dict[str, Any]) -> Iterator[tuple[dict[str, Any], FetchError | None]]:
        """Yield the row of each member that is to be read, with None; then the archive's own with what is wrong.

        Args:
            archive: its row, as a file's.
        """
        contents = self.contents(archive["source_uri"])
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
        contents = self.contents(archive["source_uri"])
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
        member = self.contents(archive["source_uri"]).members.get(wanted)
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
