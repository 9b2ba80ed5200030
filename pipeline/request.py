"""What a spec asks to read: refused early where it cannot be, listed where it can."""

from collections.abc import Iterator

import pyarrow as pa

from operators.probe import parse_page_ranges
from pipeline.archive_sources import ArchiveMemory
from pipeline.executor import check_address
from pipeline.source import Listing, check_inputs, list_sources
from pipeline.spec import RunSpec


def check_request(spec: RunSpec) -> None:
    """Refuse what can be refused by looking at the spec and the local inputs alone.

    Raises:
        ConfigError: an input or a cluster is not there, or the page ranges cannot be read.
    """
    check_inputs(spec.inputs)
    if spec.pages:
        parse_page_ranges(spec.pages)
    if spec.address:
        check_address(spec.address)


def listed(spec: RunSpec, counts: Listing, memory: ArchiveMemory | None = None) -> Iterator[pa.Table]:
    """Yield SOURCE tables of the inputs of `spec`, at most its `limit` of sources; `memory` as `list_sources` takes it.

    Raises:
        ConfigError: an input is not there.
    """
    options = {
        "page_ranges": spec.pages,
        "password": spec.password.get_secret_value() if spec.password else None,
        "start_seconds": spec.start_seconds,
        "stop_seconds": spec.stop_seconds,
    }
    left = spec.limit
    for table in list_sources(spec.inputs, options, counts, memory):
        taken = table if left is None else table.slice(0, left)
        yield taken
        if left is not None:
            left -= taken.num_rows
            if left <= 0:
                return
