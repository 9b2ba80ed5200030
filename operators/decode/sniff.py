"""What a file is, from its bytes: pdf, image or video, and its mime type.

Plain Python on the first and last kilobytes: nothing here can crash, hang or open a connection. A name never makes a
file something it is not; it words the error when the bytes are nothing that is read, and a document under the name of a
video, or a video under that of a document, is refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from schemas.errors import DecodeError

HEAD_BYTES: Final = 65536
PDF_JUNK_BYTES: Final = 1024
"""What PDF readers allow before the header."""

PDF_SUFFIXES: Final = {".pdf"}
IMAGE_SUFFIXES: Final = {".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".webp", ".bmp"}
VIDEO_SUFFIXES: Final = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv",
    ".ogv", ".3gp", ".mxf", ".vob", ".y4m", ".ivf",
}  # fmt: skip

IMAGE_STARTS: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"II+\0", "image/tiff"),
    (b"MM\0+", "image/tiff"),
)
VIDEO_STARTS: Final = (
    (b"FLV\x01", "video/x-flv"),
    (b"OggS", "video/ogg"),
    (b"\0\0\x01\xba", "video/mpeg"),
    (b"\0\0\x01\xb3", "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video/x-ms-asf"),
    (b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "application/mxf"),
    (b"YUV4MPEG2 ", "video/x-yuv4mpeg"),
    (b"DKIF\0\0", "video/x-ivf"),
)
QUICKTIME_ATOMS: Final = {b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
STILL_BRANDS: Final = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"miaf"}
"""Pictures in an MP4 container; not read, and not videos either."""


@dataclass(frozen=True)
class Sniffed:
    """What the bytes are: `kind` is "pdf", "image" or "video"."""

    kind: str
    mime_type: str


def sniff(path: Path, name: str | None = None) -> Sniffed:
    """Return what the file at `path` is.

    Args:
        path: a local file.
        name: the name it was listed under, where `path` is a copy; only its suffix is looked at.

    Raises:
        DecodeError: `empty`; `not_video` when a name that promises a video holds a document, or nothing known;
            `not_pdf` and `not_image` likewise; `unknown_format` when neither bytes nor name say anything.
    """
    name = name or path.name
    promised = kind_of_name(name)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if not head:
            raise DecodeError(f"{name}: the file is empty", code="empty")
        found = sniff_bytes(head) or sniff_gif(head, file) or sniff_headless_pdf(head, file, promised)
    if found is None:
        code = f"not_{promised}" if promised else "unknown_format"
        raise DecodeError(f"{name}: content starts with {head[:16]!r}, wanted a PDF, image or video", code=code)
    # A scan saved under the other suffix is still that document; a document among videos is a mistake of the list.
    if promised is not None and (promised == "video") != (found.kind == "video"):
        raise DecodeError(f"{name}: content is {found.mime_type}, its name says {promised}", code=f"not_{promised}")
    return found


def kind_of_name(name: str) -> str | None:
    """Return the kind that the suffix promises; None for GIF, which may be either, and for unknown suffixes."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PDF_SUFFIXES:
        return "pdf"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def sniff_bytes(head: bytes) -> Sniffed | None:
    """Return what `head` is the start of; None for GIF and for anything unknown."""
    if is_archive(head):
        # Its first member may be a PDF, and that member's start near enough to be taken for that of a document.
        return None
    for start, mime_type in IMAGE_STARTS:
        if head.startswith(start):
            return Sniffed("image", mime_type)
    for start, mime_type in VIDEO_STARTS:
        if head.startswith(start):
            return Sniffed("video", mime_type)
    if head.startswith(b"BM") and len(head) > 18 and head[14:18] in BITMAP_HEADER_SIZES:
        return Sniffed("image", "image/bmp")
    found = sniff_riff(head) or sniff_quicktime(head) or sniff_matroska(head)
    if found is None and b"%PDF-" in head[: PDF_JUNK_BYTES + 5]:
        return Sniffed("pdf", "application/pdf")
    if found is None and is_transport_stream(head):
        return Sniffed("video", "video/mp2t")
    return found


BITMAP_HEADER_SIZES: Final = {size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124)}


def is_archive(head: bytes) -> bool:
    """Return whether `head` starts a zip or a tar."""
    return head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar"


def sniff_riff(head: bytes) -> Sniffed | None:
    """Return AVI or WebP; an animated WebP counts as the image of its first frame."""
    if not head.startswith(b"RIFF"):
        return None
    if head[8:12] == b"WEBP":
        return Sniffed("image", "image/webp")
    return Sniffed("video", "video/x-msvideo") if head[8:11] == b"AVI" else None


def sniff_quicktime(head: bytes) -> Sniffed | None:
    """Return MP4 or QuickTime."""
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in STILL_BRANDS:
            return None
        return Sniffed("video", "video/quicktime" if brand == b"qt  " else "video/mp4")
    return Sniffed("video", "video/quicktime") if head[4:8] in QUICKTIME_ATOMS else None


def sniff_matroska(head: bytes) -> Sniffed | None:
    """Return Matroska or WebM."""
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return None
    return Sniffed("video", "video/webm" if b"webm" in head[:64] else "video/x-matroska")


def is_transport_stream(head: bytes) -> bool:
    """Return whether packets of 188 bytes, or of 192 with a time stamp first, follow one another."""
    return any(
        len(head) > first + 4 * size and all(head[first + i * size] == 0x47 for i in range(5))
        for first, size in ((0, 188), (4, 192))
    )


def sniff_gif(head: bytes, file: BinaryIO) -> Sniffed | None:
    """Return a GIF: a video when it has a second frame, an image otherwise."""
    if not head.startswith((b"GIF87a", b"GIF89a")):
        return None
    return Sniffed("video" if has_second_gif_frame(file) else "image", "image/gif")


def has_second_gif_frame(file: BinaryIO) -> bool:
    """Return whether a GIF has two image descriptors; a file that ends early has those it has shown."""
    file.seek(10)
    flags = file.read(3)[:1]
    skip_color_table(file, flags)
    frames = 0
    while frames < 2:
        marker = file.read(1)
        if marker == b",":
            frames += 1
            skip_color_table(file, file.read(9)[8:9])
            file.seek(1, 1)
        elif marker == b"!":
            file.seek(1, 1)
        else:
            break
        while size := file.read(1):
            if size == b"\0":
                break
            file.seek(size[0], 1)
    return frames > 1


def skip_color_table(file: BinaryIO, flags: bytes) -> None:
    """Step over the color table that the flags byte announces."""
    if flags and flags[0] & 0x80:
        file.seek(3 << (flags[0] & 7) + 1, 1)


OBJECT: Final = re.compile(rb"\d+\s+\d+\s+obj\b")
PDF_MARKS: Final = (b"endobj", b"startxref", b"trailer", b"/Catalog", b"/Pages")


def sniff_headless_pdf(head: bytes, file: BinaryIO, promised: str | None) -> Sniffed | None:
    """Return a PDF whose header is damaged, which MuPDF may still repair: a name that promises one, objects inside."""
    if promised != "pdf":
        return None
    size = file.seek(0, 2)
    file.seek(max(0, size - HEAD_BYTES))
    sample = head + file.read(HEAD_BYTES)
    if OBJECT.search(sample) and any(mark in sample for mark in PDF_MARKS):
        return Sniffed("pdf", "application/pdf")
    return None
