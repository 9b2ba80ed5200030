"""What archives hold, hostile ones included."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import warnings
import zipfile

import pyarrow as pa
import pytest

from operators import archives
from operators.archives import BYTES_NAME, OpenArchive, has_archive_suffix, stored_name
from operators.fetch import FetchConfig, local_copy
from schemas.errors import FetchError

DATA = os.urandom(5000)


def entry(name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar_of(*entries, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(*entries, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def opened(data):
    return OpenArchive(io.BytesIO(data), "x")


def read(archive, member):
    sink = io.BytesIO()
    archive.copy(member.name, sink, 10**9, member.byte_offset, member.size_bytes if member.byte_offset else None)
    return sink.getvalue()


def names_of(data):
    return list(opened(data).contents().members)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_members_of_a_tar_are_read_forward_backward_and_by_name(pack):
    contents = {f"d/{number}.pdf": os.urandom(20_000 + number) for number in range(5)}
    archive = opened(pack(tar_of(entry("d", kind=tarfile.DIRTYPE), *(entry(*item) for item in contents.items()))))
    found = archive.contents()
    assert (list(found.members), found.passed_over, found.damage) == (list(contents), 0, None)
    for name in ("d/1.pdf", "d/4.pdf", "d/0.pdf"):
        assert read(archive, found.members[name]) == contents[name]
        sink = io.BytesIO()
        archive.copy(name, sink, 10**9, None, None)
        assert sink.getvalue() == contents[name]


def test_members_of_a_zip_know_when_their_bytes_change():
    first, second = (opened(zip_of(("a.pdf", b"1"), ("b.pdf", data))).contents().members for data in (b"2", b"3"))
    assert first["a.pdf"].version == second["a.pdf"].version
    assert first["b.pdf"].version != second["b.pdf"].version


def test_tricks_with_paths_are_names_like_any_other(tmp_path):
    tricks = (
        "../../evil.pdf",
        "/etc/evil.pdf",
        "a/../../b.pdf",
        "C:\\evil.pdf",
        "-rf.pdf",
        "new\nline.pdf",
        "A.pdf",
        "a.pdf",
    )
    for data in (tar_of(*(entry(name, name.encode()) for name in tricks)), zip_of(*((n, n.encode()) for n in tricks))):
        path = tmp_path / "archive"
        path.write_bytes(data)
        assert names_of(data) == list(tricks)
        for name in tricks:
            with local_copy(str(path), {"member": name}) as copy:
                assert copy.read_bytes() == name.encode()
                assert copy.name == "source.pdf"
    assert sorted(os.listdir(tmp_path)) == ["archive"]


def test_what_is_no_file_is_passed_over():
    data = tar_of(
        entry("d", kind=tarfile.DIRTYPE),
        entry("real.pdf", DATA),
        entry("soft.pdf", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        entry("hard.pdf", kind=tarfile.LNKTYPE, link="real.pdf"),
        entry("device.pdf", kind=tarfile.CHRTYPE),
        entry("pipe.pdf", kind=tarfile.FIFOTYPE),
        entry("", DATA),
    )
    found = opened(data).contents()
    assert (list(found.members), found.passed_over, found.damage) == (["real.pdf"], 5, None)
    link = zipfile.ZipInfo("soft.pdf")
    link.external_attr = 0o120777 << 16
    found = opened(zip_of((link, "/etc/passwd"), ("d/", b""), ("real.pdf", DATA))).contents()
    assert (list(found.members), found.passed_over) == (["real.pdf"], 1)


def test_the_last_of_one_name_counts():
    for data in (
        tar_of(entry("a.pdf", b"old"), entry("b.pdf", b"x"), entry("a.pdf", b"new")),
        zip_of(("a.pdf", b"old"), ("b.pdf", b"x"), ("a.pdf", b"new")),
        gzip.compress(tar_of(entry("a.pdf", b"old"), entry("b.pdf", b"x"), entry("a.pdf", b"new"))),
    ):
        archive = opened(data)
        found = archive.contents()
        assert (sorted(found.members), found.passed_over) == (["a.pdf", "b.pdf"], 1)
        assert read(archive, found.members["a.pdf"]) == b"new"


def test_names_that_differ_only_in_bytes_stay_apart():
    raw = [b"caf\xe9.pdf", b"caf\xe8.pdf", "café.pdf".encode()]
    data = tar_of(*(entry(name.decode("utf-8", "surrogateescape"), name) for name in raw))
    archive = opened(data)
    found = archive.contents().members
    assert list(found) == [f"{BYTES_NAME}caf%E9.pdf", f"{BYTES_NAME}caf%E8.pdf", "café.pdf"]
    assert [read(archive, member) for member in found.values()] == raw
    "".join(found).encode()
    assert stored_name("bytes://x") != "bytes://x"
    twins = zip_of(("caf\xe9.pdf", b"1"), ("cafe\u0301.pdf", b"2"))
    assert len(names_of(twins)) == 2


def test_every_byte_may_stand_in_a_name():
    raw = [bytes([byte]) + b".pdf" for byte in range(1, 256)]
    data = tar_of(*(entry(name.decode("utf-8", "surrogateescape"), name) for name in raw))
    archive = opened(data)
    members = list(archive.contents().members.values())
    assert len(members) == 255
    assert [read(archive, member) for member in members] == raw


def test_a_name_in_a_zip_that_is_not_the_utf_8_it_claims_to_be_is_damage():
    data = zip_of(("ä.pdf", b"1")).replace("ä".encode(), b"\xff\xfe")
    assert opened(data).contents().damage.code == "damaged"


def test_a_nul_in_a_name_ends_it_and_reaches_no_path(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of(("aXb.pdf", b"1")).replace(b"aXb", b"a\0b"))
    archive = opened(path.read_bytes())
    assert list(archive.contents().members) == ["a"]
    pax = tar_of(entry("aXXXXb.p\u00e9f", b"1"))
    tar = tmp_path / "a.tar"
    tar.write_bytes(pax.replace(b"aXXXXb", b"aX\0\0Xb", 1))
    [name] = opened(tar.read_bytes()).contents().members
    assert "\0" in name
    with local_copy(str(tar), {"member": name}) as copy:
        assert copy.read_bytes() == b"1"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9])
def test_a_tar_that_was_cut_gives_what_is_there_and_one_error(pack, kept):
    names = [f"{number}.pdf" for number in range(10)]
    whole = pack(tar_of(*(entry(name, os.urandom(10_000)) for name in names)))
    archive = opened(whole[: int(len(whole) * kept)])
    found = archive.contents()
    assert list(found.members) == names[: len(found.members)]
    assert len(found.members) < 10
    assert found.damage.code == "damaged"
    for member in found.members.values():
        assert len(read(archive, member)) == 10_000


def test_a_zip_that_was_cut_or_is_none_is_damage():
    whole = zip_of(("a.pdf", DATA), ("b.pdf", DATA))
    for data in (whole[: len(whole) // 2], b"PK\3\4" + os.urandom(1000), os.urandom(3000), b"", b"\0" * 100, b"x"):
        found = opened(data).contents()
        assert (found.members, found.damage.code) == ({}, "damaged")
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    archive = opened(bytes(flipped))
    with pytest.raises(FetchError) as caught:
        read(archive, archive.contents().members["a.pdf"])
    assert caught.value.code == "damaged"


def test_an_encrypted_member_says_so():
    data = bytearray(zip_of(("a.pdf", DATA)))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    archive = opened(bytes(data))
    with pytest.raises(FetchError) as caught:
        read(archive, archive.contents().members["a.pdf"])
    assert caught.value.code == "encrypted"


def test_bombs_are_too_large(monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    zeros = b"\0" * 30_000_000
    bomb = gzip.compress(tar_of(entry("a.pdf", b"1"), entry("zeros.pdf", zeros), entry("b.pdf", b"2")))
    monkeypatch.setattr(archives, "MOST_RATIO", 100)
    found = opened(bomb).contents()
    assert (list(found.members), found.damage.code) == (["a.pdf"], "too_large")
    archive = opened(zip_of(("zeros.pdf", zeros)))
    with pytest.raises(FetchError) as caught:
        read(archive, archive.contents().members["zeros.pdf"])
    assert caught.value.code == "too_large"
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(entry("zeros.pdf", zeros)))
    with (
        pytest.raises(FetchError) as caught,
        local_copy(str(path), {"member": "zeros.pdf"}, FetchConfig(max_source_bytes=9)),
    ):
        pass
    assert caught.value.code == "too_large"


def test_members_that_claim_more_than_any_disk_holds_are_too_large(monkeypatch):
    monkeypatch.setattr(archives, "MOST_UNPACKED_BYTES", 1_000_000)
    found = opened(zip_of(*((f"{number}.pdf", b"\0" * 300_000) for number in range(4)))).contents()
    assert (found.members, found.damage.code) == ({}, "too_large")


def test_a_header_that_claims_the_whole_memory_is_too_large():
    header = bytearray(tar_of(entry("././@LongLink", b"x" * 600, kind=tarfile.GNUTYPE_LONGNAME))[:1024])
    header[124:136] = b"%011o\0" % (2**33 - 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    found = opened(bytes(header) + bytes(60_000)).contents()
    assert found.damage.code in ("too_large", "damaged")


@pytest.mark.timeout(30)
def test_a_size_below_zero_does_not_go_round_for_ever():
    header = bytearray(tar_of(entry("a.pdf", b""))[:512])
    header[124:136] = b"\xff" + b"\xff" * 9 + struct.pack(">h", -512)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    found = opened(bytes(512 * 4).join([bytes(header) * 3]) + bytes(1024)).contents()
    assert (found.members, found.damage.code) == ({}, "damaged")


def test_long_headers_nested_in_headers_are_damage():
    info, data = entry("././@LongLink", b"n" * 100, kind=tarfile.GNUTYPE_LONGNAME)
    found = opened(tar_of(*[(info, data)] * 5000)).contents()
    assert found.damage.code == "damaged"


def test_a_hundred_thousand_members_are_listed_and_more_than_the_limit_are_refused(monkeypatch):
    block = tar_of(entry("0000000.pdf", b""))[:512]
    headers = bytearray()
    for number in range(100_000):
        header = bytearray(block)
        header[:7] = b"%07d" % number
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        headers += header
    data = bytes(headers) + bytes(1024)
    assert len(names_of(data)) == 100_000
    monkeypatch.setattr(archives, "MOST_MEMBERS", 99_999)
    assert opened(data).contents().damage.code == "too_large"


def test_archives_are_known_by_their_names():
    for name in ("a.zip", "A.ZIP", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"):
        assert has_archive_suffix(name)
    for name in ("a.gz", "a.pdf", "zip", "a.docx"):
        assert not has_archive_suffix(name)
