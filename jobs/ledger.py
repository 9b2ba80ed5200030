"""`pagereel ledger`: look at a ledger that runs share, prove that it is whole, and take care of it."""

import json
from typing import Annotated

import pyarrow.parquet as pq
import typer

from jobs.terminal import visible
from pipeline.commits import COMMITS
from pipeline.storage import Storage
from pipeline.verify import COUNTED_TABLES, LedgerFacts, inspect
from schemas.errors import ConfigError, one_line

EXIT_UNSOUND = 3

app = typer.Typer(
    help="Look at a ledger that runs share, prove that it is whole, and take care of it.", no_args_is_help=True
)

LedgerUri = Annotated[str, typer.Argument(metavar="LEDGER", help="A folder or an fsspec URL; a run folder as well.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def open_ledger(uri: str) -> Storage:
    """Return where a ledger lives.

    Raises:
        ConfigError: there is none.
    """
    storage = Storage(uri)
    if not storage.list(COMMITS):
        raise ConfigError(f"{uri!r} is no ledger: nothing was ever committed there")
    return storage


@app.command("show")
def show(ledger: LedgerUri, as_json: Json = False) -> None:
    """Count what a ledger holds."""
    _print(inspect(open_ledger(ledger)), as_json=as_json)


@app.command("verify")
def verify(ledger: LedgerUri, as_json: Json = False) -> None:
    """Prove that every committed part is there and unchanged, and that every committed record has its rows."""
    facts = inspect(open_ledger(ledger), verify=True)
    _print(facts, as_json=as_json)
    raise typer.Exit(EXIT_UNSOUND if facts.problems else 0)


@app.command("current")
def current(
    ledger: LedgerUri,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write a Parquet file of all versions.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also show versions that were replaced.")] = False,
    as_json: Json = False,
) -> None:
    """Show the latest of each source, and which are gone."""
    from pipeline.current import CURRENT_SOURCE, source_states
    from pipeline.ledger import Ledger

    tables = source_states(Ledger(open_ledger(ledger)))
    if output is not None:
        try:
            with pq.ParquetWriter(output, CURRENT_SOURCE, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
        except OSError as error:
            raise ConfigError(f"{output!r} cannot be written: {one_line(error)}") from error
        return
    for table in tables:
        for row in table.to_pylist():
            if not everything and row["state"] == "replaced":
                continue
            if as_json:
                typer.echo(json.dumps(row, default=str))
            else:
                member = (row["source_ref"] or {}).get("member")
                name = row["source_uri"] + (f" :: {member}" if member else "")
                what = row["error"]["error_code"] if row["error"] else (row["doc_id"] or "")[:12]
                typer.echo(visible(f"{row['state']:8}  {row['kind'] or '-':5}  {what:12}  {name}"))


@app.command("compact")
def compact_ledger(ledger: LedgerUri) -> None:
    """Write the rows of many small commits as few large ones, and remove what counts for nothing."""
    from pipeline.compact import compact
    from pipeline.shared_ledger import held

    with held(open_ledger(ledger)) as found:
        done = compact(found, "compact")
    typer.echo(f"{done.commits_before} commits became {done.commits_after}")


@app.command("purge")
def purge(
    ledger: LedgerUri,
    sources: Annotated[list[str], typer.Argument(help="Addresses of sources; one that ends in / is all below.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove sources from a ledger: their rows, answers and history. Run folders keep their own tables."""
    from pipeline.compact import compact
    from pipeline.current import removal_of
    from pipeline.shared_ledger import held

    with held(open_ledger(ledger), removes_at_once=not dry_run) as found:
        removal = removal_of(found, sources)
        if not removal.versions:
            raise ConfigError(f"the ledger knows no source of the address {sources[0]!r}")
        rows = 0 if dry_run else compact(found, "purge", removal.purge).rows_removed
    said = f"{removal.versions} versions of sources, {len(removal.purge.doc_ids)} documents"
    typer.echo(f"would be removed: {said}" if dry_run else f"removed: {said}, {rows} rows")
    if removal.shared:
        typer.echo(f"{removal.shared} documents stay: other sources hold the same bytes")


@app.command("add")
def add(ledger: LedgerUri, run: Annotated[str, typer.Argument(help="A run folder.")]) -> None:
    """Give a ledger what a run computed without it, or before it was ended."""
    from pipeline.addresses import stored_uri
    from pipeline.commits import utc_now
    from pipeline.lease import Lease
    from pipeline.runfile import read_run_file
    from pipeline.shared_ledger import SharedLedger

    storage = Storage(run)
    found = read_run_file(storage)
    if found is None:
        raise ConfigError(f"{run!r} is no run folder: it holds no run.json")
    shared = SharedLedger(ledger)
    shared.storage.probe_writable()
    with Lease(storage, utc_now):
        given = shared.give(storage, stored_uri(run), found["run_id"], found.get("probe_digest"))
    typer.echo(f"given: {given.records} records, {given.answers} answers, {given.sources} sources")


def _print(facts: LedgerFacts, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts.as_dict()))
        return
    statuses = ", ".join(f"{count} {name}" for name, count in sorted(facts.statuses.items(), key=lambda item: -item[1]))
    lines = [
        ("records", f"{facts.records} ({statuses})" if statuses else "0"),
        *([("waiting", f"{facts.waiting} for a second look")] if facts.waiting else []),
        *((name, f"{facts.rows[name]} rows") for name in COUNTED_TABLES if facts.rows[name]),
        ("commits", f"{facts.commits}, {facts.bytes / 2**20:.1f} MiB, from {facts.first_at} to {facts.last_at}"),
        ("versions", ", ".join(f"{count} of tables {name}" for name, count in sorted(facts.schema_versions.items()))),
        *(("run", uri) for uri in facts.runs),
        *([("left over", f"{facts.left_behind} part files of no commit")] if facts.left_behind else []),
        *(("problem", problem) for problem in facts.problems),
    ]
    for name, value in lines:
        typer.echo(visible(f"{name:14}  {value}"))
