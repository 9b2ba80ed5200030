"""Listings of stores: page by page where a store has pages, so that a million objects need not be held at once."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from fsspec.utils import glob_translate

from operators.retries import RetryPolicy, retried
from operators.stores import ask

PAGE_KEYS = 1000
MAGIC: Final = re.compile(r"[*?\[]")


def objects_below(
    filesystem: Any,
    folder: str,
    policy: RetryPolicy,
    passes: Callable[[Exception], bool] | None = None,
    *,
    one_level: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and facts of the files below a folder, sorted; nothing where there is no such folder.

    Args:
        filesystem: any of fsspec.
        folder: where to look, without a slash at its end.
        policy: how failures are tried again; each page of S3 by itself, since a long listing would never end otherwise.
        passes: as `retried` takes it.
        one_level: True leaves out what lies in folders of that folder; for S3 alone, others may yield all.
    """
    if "s3" in getattr(filesystem, "protocol", ()):
        yield from _pages_of_s3(filesystem, folder, policy, passes, one_level)
        return
    found = retried(lambda: ask(filesystem, "find", folder, detail=True), policy, passes)
    yield from sorted(found.items())


def matching(
    filesystem: Any, pattern: str, policy: RetryPolicy, passes: Callable[[Exception], bool] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and facts of the files that match a pattern (`*`, `**`, `?`, `[...]`), sorted."""
    if "s3" not in getattr(filesystem, "protocol", ()):
        found = retried(lambda: ask(filesystem, "glob", pattern, detail=True), policy, passes)
        yield from sorted((name, info) for name, info in found.items() if info.get("type", "file") == "file")
        return
    folder = folder_of_pattern(pattern)
    wanted = re.compile(glob_translate(pattern))
    is_flat = "/" not in pattern[len(folder) :].lstrip("/")
    for name, info in objects_below(filesystem, folder, policy, passes, one_level=is_flat and "**" not in pattern):
        if wanted.match(name):
            yield name, info


def folder_of_pattern(pattern: str) -> str:
    """Return the deepest folder that all matches of a pattern are below."""
    parts = pattern.split("/")
    place = next(place for place, part in enumerate(parts) if MAGIC.search(part))
    return "/".join(parts[:place])


def _pages_of_s3(
    filesystem: Any, folder: str, policy: RetryPolicy, passes: Callable[[Exception], bool] | None, one_level: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    bucket, _, prefix = folder.rstrip("/").partition("/")
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": PAGE_KEYS}
    if one_level:
        options["Delimiter"] = "/"
    while True:
        page = retried(lambda: ask(filesystem, "call_s3", "list_objects_v2", **options), policy, passes)
        for item in page.get("Contents", ()):
            # A key with a slash at its end is how consoles draw an empty folder.
            if not item["Key"].endswith("/"):
                facts = {"type": "file", "size": item["Size"], "ETag": item.get("ETag")}
                yield f"{bucket}/{item['Key']}", facts
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]
