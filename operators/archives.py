"""Members of tar and zip archives, read where they lie: their names never become paths on this machine.

A member is known by its name. Where an archive holds one name several times the last one counts, as it would after
unpacking. A name that is no UTF-8 is written as `bytes://` and its bytes, percent-encoded.
"""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa

from schemas.errors import FetchError, one_line

ARCHIVE_SUFFIXES: Final = (
    ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst",
)  # fmt: skip
BYTES_NAME: Final = "bytes://"
MOST_MEMBERS: Final = 200_000
MOST_UNPACKED_BYTES: Final = 4 * 1024**4
MOST_HEADER_BYTES: Final = 32 * 1024 * 1024
"""Of a tar header with its long names, or a zip directory, at once: about 200,000 entries."""
FREE_BYTES: Final = 1024**3
MOST_RATIO: Final = 1100
"""Beyond the free bytes nothing unpacks to more than this many times its size; deflate cannot."""
STEP_BYTES: Final = 1024 * 1024

DAMAGE: Final = (
    OSError, EOFError, ValueError, RuntimeError, KeyError, IndexError, OverflowError, struct.error, tarfile.TarError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowException,
)  # fmt: skip
"""What the libraries raise on bytes that are no archive. NotImplementedError, for a method of zip that Python does not
know, and RecursionError are among them as RuntimeErrors."""

Opener = Callable[[BinaryIO], Any]
COMPRESSIONS: Final[dict[bytes, Opener]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": lambda packed: bz2.BZ2File(packed),
    b"\xfd7zXZ\x00": lambda packed: lzma.LZMAFile(packed),  # noqa: SIM115
    # Python has zstd from 3.14 on. Arrow closes what it was given, and that is not ours to close.
    b"\x28\xb5\x2f\xfd": lambda packed: pa.CompressedInputStream(pa.PythonFile(_Kept(packed), mode="r"), "zstd"),
}
"""How a compressed file begins, and what unpacks it."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive.

    Attributes:
        name: as it is stored, see the module.
        size_bytes: unpacked, as the archive says.
        byte_offset: of a tar, where its bytes start in the unpacked tar; None for a zip.
        version: of a zip, what changes when its bytes do; empty for a tar.
    """

    name: str
    size_bytes: int
    byte_offset: int | None = None
    version: str = ""


@dataclass
class Contents:
    """What an archive holds, as far as it could be read.

    Attributes:
        members: by name, in the order of the archive.
        passed_over: entries that are no files, have no name, or are followed by another of the same name.
        damage: why it could not be read to its end.
    """

    members: dict[str, Member] = field(default_factory=dict)
    passed_over: int = 0
    damage: FetchError | None = None

    def add(self, member: Member) -> None:
        """Take a member in; it replaces an earlier one of its name."""
        if self.members.pop(member.name, None) is not None:
            self.passed_over += 1
        self.members[member.name] = member


def has_archive_suffix(name: str) -> bool:
    """Return whether a file is an archive by its name."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def raw_name(name: str) -> str:
    """Return the name of a member as Python holds it, from how it is stored."""
    return (
        unquote_to_bytes(name.removeprefix(BYTES_NAME)).decode("utf-8", "surrogateescape")
        if (name.startswith(BYTES_NAME))
        else name
    )


def stored_name(name: str) -> str:
    """Return how the name of a member is stored: as it is, unless UTF-8 cannot hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return BYTES_NAME + quote_from_bytes(name.encode("utf-8", "surrogateescape"))
    return BYTES_NAME + quote_from_bytes(name.encode()) if name.startswith(BYTES_NAME) else name


class OpenArchive:
    """An archive that is open: what it holds, and its members one after the other.

    Members of a compressed tar are cheap in the order of the archive, since going back means to unpack it again.

    Args:
        file: its bytes; random access.
        shown: what messages call it.
    """

    def __init__(self, file: BinaryIO, shown: str) -> None:
        self._shown = shown
        self._file = file
        head = file.read(512)
        self._opener = next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None)
        self.is_compressed_tar = self._opener is not None
        self.is_zip = not self.is_compressed_tar and head[257:262] != b"ustar" and _is_zip(file)
        self._contents: Contents | None = None
        self._zip: zipfile.ZipFile | None = None
        self._by_name: dict[str, zipfile.ZipInfo] = {}
        self._tar = Unpacked(file, self._opener) if self._opener else file

    def contents(self) -> Contents:
        """Return what the archive holds; what stopped the reading is in its `damage`."""
        if self._contents is None:
            self._contents = found = Contents()
            try:
                if self.is_zip:
                    self._list_zip(found)
                else:
                    self._list_tar(found)
            except DAMAGE as error:
                count = len(found.members)
                where = f" after {count} members" if count else ""
                found.damage = FetchError(
                    f"{self._shown}: cannot be read as an archive{where}: {one_line(error)}",
                    code="damaged",
                    exception_type=type(error).__name__,
                )
            except FetchError as error:
                found.damage = error
        return self._contents

    def copy(self, name: str, sink: BinaryIO, max_bytes: int, byte_offset: int | None, byte_size: int | None) -> None:
        """Write the bytes of one member to `sink`.

        Args:
            name: as it is stored.
            sink: where they go.
            max_bytes: a larger member is refused.
            byte_offset: where it starts in the unpacked tar; with `byte_size` it spares the search.
            byte_size: its length.

        Raises:
            FetchError: `not_found`, `damaged`, `encrypted`, or `too_large`.
        """
        try:
            if self.is_zip:
                self._copy_of_zip(name, sink, max_bytes)
            else:
                self._copy_of_tar(name, sink, max_bytes, byte_offset, byte_size)
        except DAMAGE as error:
            raise FetchError(f"{self._shown}:{name}: {one_line(error)}", code="damaged") from error

    def _list_zip(self, found: Contents) -> None:
        packed = self._opened_zip()
        self._refuse_beyond(len(packed.infolist()), sum(info.file_size for info in packed.infolist()))
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if not info.filename or kind not in (0, stat.S_IFREG):
                found.passed_over += 1
                continue
            found.add(Member(stored_name(info.filename), info.file_size, version=f"crc32:{info.CRC:08x}"))

    def _list_tar(self, found: Contents) -> None:
        self._tar.seek(0)
        headers: Any = _Headers(self._tar, self._shown)
        held: Member | None = None
        unpacked_bytes = place = 0
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as packed:
            while True:
                info = packed.next()
                # Only now is it known that the one before is there to its end.
                if held is not None:
                    found.add(held)
                    held = None
                if info is None:
                    _check_end(headers, packed.offset)  # type: ignore[attr-defined]
                    return
                if info.size < 0 or info.offset < place:
                    raise tarfile.ReadError(f"the header at {info.offset} leads backwards")
                place = info.offset + 1
                # It keeps all that it has seen.
                packed.members.clear()  # type: ignore[attr-defined]
                unpacked_bytes += info.size
                self._refuse_beyond(len(found.members) + 1, unpacked_bytes)
                if not info.isreg() or info.issparse() or not info.name:
                    found.passed_over += not info.isdir()
                    continue
                held = Member(stored_name(info.name), info.size, info.offset_data)

    def _refuse_beyond(self, members: int, unpacked_bytes: int) -> None:
        if members > MOST_MEMBERS:
            raise FetchError(f"{self._shown}: more than {MOST_MEMBERS} members", code="too_large")
        if unpacked_bytes > MOST_UNPACKED_BYTES:
            raise FetchError(f"{self._shown}: unpacks to {unpacked_bytes} bytes", code="too_large")

    def _opened_zip(self) -> zipfile.ZipFile:
        if self._zip is None:
            headers: Any = _Headers(self._file, self._shown)
            self._zip = zipfile.ZipFile(headers)
            self._by_name = {stored_name(info.filename): info for info in self._zip.infolist()}
        return self._zip

    def _copy_of_zip(self, name: str, sink: BinaryIO, max_bytes: int) -> None:
        packed = self._opened_zip()
        info = self._by_name.get(name)
        if info is None:
            raise FetchError(f"{self._shown}: no member {name!r}", code="not_found")
        if info.flag_bits & 1:
            raise FetchError(f"{self._shown}:{name}: encrypted", code="encrypted")
        if info.is_dir():
            raise FetchError(f"{self._shown}:{name}: a folder", code="unreadable")
        bound = min(max_bytes, max(FREE_BYTES, info.compress_size * MOST_RATIO))
        with packed.open(info) as source:
            copied = self._copied(source.read, sink, bound, name)
        if copied != info.file_size:
            raise zipfile.BadZipFile(f"{copied} bytes, wanted {info.file_size}")

    def _copy_of_tar(
        self, name: str, sink: BinaryIO, max_bytes: int, byte_offset: int | None, byte_size: int | None
    ) -> None:
        if byte_offset is None or byte_size is None:
            contents = self.contents()
            member = contents.members.get(name)
            if member is None:
                raise contents.damage or FetchError(f"{self._shown}: no member {name!r}", code="not_found")
            byte_offset, byte_size = member.byte_offset or 0, member.size_bytes
        if byte_size > max_bytes:
            raise FetchError(f"{self._shown}:{name}: more than {max_bytes} bytes", code="too_large")
        self._tar.seek(byte_offset)
        left = byte_size

        def read(count: int) -> bytes:
            nonlocal left
            data: bytes = self._tar.read(min(count, left))
            left -= len(data)
            return data

        self._copied(read, sink, max_bytes, name)
        if left:
            raise tarfile.ReadError(f"{byte_size - left} bytes, wanted {byte_size}")

    def _copied(self, read: Callable[[int], bytes], sink: BinaryIO, max_bytes: int, name: str) -> int:
        copied = 0
        while data := read(STEP_BYTES):
            copied += len(data)
            if copied > max_bytes:
                raise FetchError(f"{self._shown}:{name}: more than {max_bytes} bytes", code="too_large")
            sink.write(data)
        return copied


class Unpacked(io.RawIOBase):
    """What a compressed file unpacks to, as a file: forward it unpacks on, backward it starts again."""

    def __init__(self, packed: BinaryIO, opener: Opener) -> None:
        super().__init__()
        self._packed = packed
        self._opener = opener
        self._start()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in what is unpacked."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, or to the end when it lies beyond.

        Raises:
            ValueError: counted from the end, which is not known; or before the start.
        """
        wanted = {io.SEEK_SET: 0, io.SEEK_CUR: self._place}[whence] + offset if whence != io.SEEK_END else -1
        if wanted < 0:
            raise ValueError(f"seek to {offset} from {whence}")
        if wanted < self._place:
            self._start()
        while self._place < wanted and self.read(min(STEP_BYTES, wanted - self._place)):
            pass
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what comes next.

        Raises:
            FetchError: `too_large` when it unpacks to far more than its size.
        """
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        if self._place > FREE_BYTES and self._place > MOST_RATIO * max(1, self._packed.tell()):
            raise FetchError(f"unpacks to more than {MOST_RATIO} times its size", code="too_large")
        return len(data)

    def _start(self) -> None:
        self._packed.seek(0)
        self._unpacked = self._opener(self._packed)
        self._place = 0


class _Kept:
    """A file that its reader cannot close."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.closed = False

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes."""
        data: bytes = self._file.read(count)
        return data

    def close(self) -> None:
        """Leave it open."""


class _Headers(_Kept):
    """A file as the archive libraries read it: what a header claims to need cannot fill the memory."""

    def __init__(self, file: Any, shown: str) -> None:
        super().__init__(file)
        self._shown = shown

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes."""
        data = super().read(count if 0 <= count <= MOST_HEADER_BYTES else MOST_HEADER_BYTES + 1)
        if len(data) > MOST_HEADER_BYTES:
            raise FetchError(f"{self._shown}: a header of more than {MOST_HEADER_BYTES} bytes", code="too_large")
        return data


def _check_end(file: Any, place: int) -> None:
    """Raise unless the tar ends here on purpose: tarfile takes a torn header for the end."""
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends at {place} without a mark of its end")
    if any(block):
        raise tarfile.ReadError(f"no header at {place}")


def _is_zip(file: BinaryIO) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except DAMAGE:
        # A zip that is odd to its end record; what is odd comes again when it is listed.
        return True
