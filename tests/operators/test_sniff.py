"""Kind by content."""

import io

import pymupdf
import pytest
from PIL import Image

from operators.decode.sniff import Sniffed, sniff
from schemas.errors import DecodeError

PDF = Sniffed("pdf", "application/pdf")


def pdf_bytes():
    document = pymupdf.open()
    document.new_page().insert_text((72, 72), "hello")
    return document.tobytes()


def image_bytes(image_format, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, image_format, **options)
    return buffer.getvalue()


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.bin", "a.png"])
def test_a_pdf_is_a_pdf_under_any_document_name(tmp_path, name):
    assert sniff(write(tmp_path, name, pdf_bytes())) == PDF


def test_a_pdf_may_follow_junk_up_to_its_limit(tmp_path):
    assert sniff(write(tmp_path, "a.pdf", b"\n" * 1024 + pdf_bytes())) == PDF


def test_a_pdf_with_a_damaged_header_is_still_a_pdf(tmp_path):
    assert sniff(write(tmp_path, "a.pdf", b"XXXXX" + pdf_bytes()[5:])) == PDF


@pytest.mark.parametrize(
    ("image_format", "mime_type"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("TIFF", "image/tiff"),
        ("WEBP", "image/webp"),
        ("BMP", "image/bmp"),
    ],
)
def test_images_are_known_without_their_suffix(tmp_path, image_format, mime_type):
    assert sniff(write(tmp_path, "scan", image_bytes(image_format))) == Sniffed("image", mime_type)


def test_a_gif_of_one_frame_is_an_image_and_of_two_a_video(tmp_path):
    second = Image.new("RGB", (20, 10), "blue")
    assert sniff(write(tmp_path, "a.gif", image_bytes("GIF"))).kind == "image"
    moving = image_bytes("GIF", save_all=True, append_images=[second])
    assert sniff(write(tmp_path, "b.gif", moving)).kind == "video"
    assert sniff(write(tmp_path, "c.gif", moving[:50])).kind == "image"


@pytest.mark.parametrize(
    ("head", "mime_type"),
    [
        (b"\0\0\0\x18ftypisom", "video/mp4"),
        (b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x88matroska", "video/x-matroska"),
        (b"RIFF\0\0\0\0AVI LIST", "video/x-msvideo"),
        ((b"G" + b"\0" * 187) * 6, "video/mp2t"),
        ((b"\0\0\0\0G" + b"\0" * 187) * 6, "video/mp2t"),
        (b"\0\0\x01\xba" + b"\0" * 20, "video/mpeg"),
    ],
)
def test_videos_are_known_under_any_video_name(tmp_path, head, mime_type):
    assert sniff(write(tmp_path, "a.mp4", head)) == Sniffed("video", mime_type)


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("a.pdf", b"", "empty"),
        ("a.pdf", b"\x93\x11garbage" * 100, "not_pdf"),
        ("a.pdf", b"<!DOCTYPE html><html><body>Not Found</body></html>", "not_pdf"),
        ("a.mp4", b"#EXTM3U\n#EXTINF:10.0,\nhttp://127.0.0.1:9/segment0.ts\n", "not_video"),
        ("a.mp4", pdf_bytes(), "not_video"),
        ("a.mp4", image_bytes("PNG"), "not_video"),
        ("a.pdf", b"\0\0\0\x18ftypisom", "not_pdf"),
        ("a.jpg", b"\0\0\0\x18ftypisom", "not_image"),
        ("a.png", b"plain text", "not_image"),
        ("a.jpg", b"\0\0\0\x18ftypheic", "not_image"),
        ("a.m3u8", b"#EXTM3U\n", "unknown_format"),
        ("notes", b"plain text", "unknown_format"),
    ],
)
def test_what_is_not_read_is_named_after_what_its_name_promised(tmp_path, name, data, code):
    with pytest.raises(DecodeError) as caught:
        sniff(write(tmp_path, name, data))
    assert caught.value.code == code


def test_the_listed_name_counts_where_the_path_is_a_copy(tmp_path):
    with pytest.raises(DecodeError) as caught:
        sniff(write(tmp_path, "copy", pdf_bytes()), name="clip.mp4")
    assert caught.value.code == "not_video"
