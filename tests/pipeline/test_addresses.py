"""What of an address is stored."""

import pytest

from pipeline.addresses import scrubbed, stored_record, stored_uri
from tests.pipeline.made_rows import failure


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("/in/a?b#c.pdf", "/in/a?b#c.pdf"),
        ("file:///in/a?b.pdf", "file:///in/a?b.pdf"),
        ("file+bytes:///in/%FF.pdf", "file+bytes:///in/%FF.pdf"),
        ("https://user:pw@host:8080/a.pdf?token=SECRET#page=2", "https://host:8080/a.pdf"),
        ("https://SECRET@host/a.pdf", "https://host/a.pdf"),
        ("s3://bucket/a#1.pdf", "s3://bucket/a#1.pdf"),
        ("s3://key:secret@bucket/a.pdf", "s3://bucket/a.pdf"),
        ("abfs://container@account.net/a.pdf", "abfs://container@account.net/a.pdf"),
        ("zip://a.pdf::https://u:pw@host/x.zip?sig=S", "zip://a.pdf::https://host/x.zip"),
        ("simplecache::https://u:pw@host/x.pdf?sig=S", "simplecache::https://host/x.pdf"),
        ("https://[broken/a.pdf?token=SECRET", "https://[broken/a.pdf"),
    ],
)
def test_users_passwords_and_signatures_are_not_stored(address, stored):
    assert stored_uri(address) == stored
    assert stored_uri(stored) == stored


def test_queries_of_one_path_stay_apart_and_hide_what_they_say():
    first, second = stored_uri("https://h/get?id=1"), stored_uri("https://h/get?id=2")
    assert first != second
    assert first.startswith("https://h/get#q=")
    assert stored_uri(first) == first


@pytest.mark.parametrize(
    ("signed", "again"),
    [
        ("X-Amz-Date=1&X-Amz-Expires=60&X-Amz-Signature=aa", "X-Amz-Date=2&X-Amz-Expires=60&X-Amz-Signature=bb"),
        ("AWSAccessKeyId=K&Expires=1&Signature=a", "Signature=b&Expires=2&AWSAccessKeyId=K"),
        ("se=2026&sp=r&sv=1&sig=a", "se=2027&sp=r&sv=1&sig=b"),
        ("token=a", "token=b"),
    ],
)
def test_a_url_that_is_signed_anew_is_the_same_source(signed, again):
    for rest in ("", "&versionId=7"):
        assert stored_uri(f"https://h/a.pdf?{signed}{rest}") == stored_uri(f"https://h/a.pdf?{again}{rest}")
    assert stored_uri(f"https://h/a.pdf?{signed}&versionId=7") != stored_uri(f"https://h/a.pdf?{signed}&versionId=8")


def test_short_words_identify_where_there_is_no_signature():
    assert stored_uri("https://h/get?sp=1") != stored_uri("https://h/get?sp=2")


@pytest.mark.parametrize(
    "text",
    [
        "{address}: gone",
        "Cannot open url 'https://us:pw12@h/a.pdf?token=SECRET', tried",
        "GET /a.pdf?token=SECRET",
        "bad token SECRET",
        "login us:pw12 refused",
        "moved to https://us:pw12@other/b?token=SECRET.",
    ],
)
def test_messages_are_scrubbed(text):
    address = "https://us:pw12@h/a.pdf?token=SECRET"
    found = scrubbed(text.format(address=address), address)
    assert "SECRET" not in found
    assert "pw12" not in found


def test_messages_about_local_files_stay_as_they_are():
    assert scrubbed("see https://docs/x?page=1", "/in/a.pdf") == "see https://docs/x?page=1"


def test_failures_of_a_record_are_scrubbed_with_it():
    address = "https://h/a.pdf?token=SECRET"
    failed = failure() | {"message": f"{address}: no", "traceback": f"File {address}"}
    record = stored_record({"source_uri": address, "error": failed, "recovered": [failed], "text": "t"})
    assert "SECRET" not in repr(record)
    assert (record["source_uri"], record["text"]) == ("https://h/a.pdf", "t")
