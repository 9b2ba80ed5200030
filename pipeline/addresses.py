"""Addresses as they are stored: what identifies a source, without what opens it."""

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, quote_from_bytes, unquote

from operators.archives import BYTES_NAME
from operators.fetch import without_secrets
from schemas.ids import digest

LOCAL_PROTOCOLS: Final = ("file", "file+bytes")
CONTAINER_PROTOCOLS: Final = ("abfs", "abfss", "wasb", "wasbs")
"""Here the part before the @ of the host is a container, not a user."""

KEY_PROTOCOLS: Final = ("s3", "s3a", "gs", "gcs", "memory")
"""Here a question mark is a character of a name, and nothing is a query."""

SIGNATURES: Final = {"signature", "sig", "token", "access_token", "x-amz-signature", "x-goog-signature"}
SIGNING: Final = SIGNATURES | {
    "awsaccesskeyid", "expires", "googleaccessid", "key-pair-id", "policy", "se", "sip", "ske", "skoid", "sks", "skt",
    "sktid", "skv", "sp", "spr", "sr", "srt", "ss", "st", "sv",
}  # fmt: skip
"""Parameters that change when a URL is signed anew. Short words among them mean this only beside a signature."""

QUERY_CHARS: Final = 16
"""Of the hash that stands for a query: a million queries of one path meet with a chance of about 10^-8."""

_MARK: Final = re.compile(rf"#q=[0-9a-f]{{{QUERY_CHARS}}}$")
_LINKS: Final = re.compile(r"::(?=[\w+.-]+(?:://|::))")
_URL: Final = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+")
_SHORTEST_SECRET: Final = 4


def stored_uri(address: str) -> str:
    """Return an address without user, password and query; applied again it changes nothing.

    A query that says more than a signature leaves its hash, as `#q=` and 16 hex digits, so that two queries of one
    path stay two sources and a URL that was signed anew stays the same one. Local addresses are returned as they are.
    """
    if "://" not in address:
        return address
    return "::".join(_stored_link(link) for link in _LINKS.split(address))


def named_input(source_uri: str, source_ref: Mapping[str, Any] | None) -> str:
    """Return the input that names a source alone: its address, or `zip://member::address`."""
    member = (source_ref or {}).get("member")
    if member is None:
        return source_uri
    scheme = "zip" if source_uri.lower().endswith(".zip") else "tar"
    if "::" in member and not member.startswith(BYTES_NAME):
        member = BYTES_NAME + quote_from_bytes(member.encode())
    return f"{scheme}://{member}::{source_uri}"


def scrubbed(text: str | None, address: str) -> str | None:
    """Return a message about a source without the secrets of its address."""
    if text is None or "://" not in address or address.startswith("file"):
        return text
    text = _URL.sub(lambda found: without_secrets(found.group()), text.replace(address, stored_uri(address)))
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def stored_error(error: dict[str, Any] | None, address: str) -> dict[str, Any] | None:
    """Return a value of the `ERROR` struct without the secrets of the address that it is about."""
    if error is None:
        return None
    return error | {name: scrubbed(error[name], address) for name in ("message", "traceback")}


def stored_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a RECORD row, or a unit, with its address and failures as they are stored."""
    address = record.get("source_uri") or ""
    if stored_uri(address) == address:
        return record
    changed: dict[str, Any] = {"source_uri": stored_uri(address), "error": stored_error(record.get("error"), address)}
    if record.get("recovered"):
        changed["recovered"] = [stored_error(failure, address) for failure in record["recovered"]]
    return record | changed


def _stored_link(link: str) -> str:
    protocol, separator, rest = link.partition("://")
    if not separator or protocol in LOCAL_PROTOCOLS:
        return link
    path, _, query = (rest, "", "") if protocol in KEY_PROTOCOLS else rest.partition("?")
    mark = _MARK.search(path)
    kept = mark.group() if mark else ""
    path = path.removesuffix(kept)
    if protocol in ("http", "https"):
        path, query = path.partition("#")[0], query.partition("#")[0]
    host, slash, path = path.partition("/")
    user = host.rpartition("@")[0]
    if protocol not in CONTAINER_PROTOCOLS or ":" in user:
        host = host.rpartition("@")[2]
    return f"{protocol}://{host}{slash}{path}{kept or _query_mark(query)}"


def _query_mark(query: str) -> str:
    pairs = parse_qsl(query, keep_blank_values=True)
    signed = any(name.lower() in SIGNATURES for name, _ in pairs)
    telling = sorted((name, value) for name, value in pairs if not _is_signing(name.lower(), signed=signed))
    return f"#q={digest(*(part for pair in telling for part in pair))[:QUERY_CHARS]}" if telling else ""


def _is_signing(name: str, *, signed: bool) -> bool:
    return name in SIGNATURES or name.startswith(("x-amz-", "x-goog-")) or (signed and name in SIGNING)


def _secrets(address: str) -> set[str]:
    found: set[str] = set()
    for link in _LINKS.split(address):
        rest, _, query = link.partition("://")[2].partition("?")
        user, _, password = rest.partition("/")[0].rpartition("@")[0].partition(":")
        found |= {f"{user}:{password}", password, unquote(password), query} | ({user} if not password else set())
        found |= {value for name, value in parse_qsl(query) if _is_signing(name.lower(), signed=False)}
    return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}
