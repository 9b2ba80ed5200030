"""Flows as a plain loop in this process: the same steps, the same sink, no Ray."""

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from pipeline.metrics import Meter
from pipeline.step import Chain, Flow, Step, check_contract, workers_of
from pipeline.witness import Witness


def run_flow(
    flow: Flow,
    units: dict[str, Iterable[pa.Table]],
    meter: Meter,
    chains: list[Chain] | None = None,
    witness: Witness | None = None,
) -> Iterator[pa.Table]:
    """Run `flow` over `units` in this process and yield what its last step returns.

    Args:
        flow: heads and trunk.
        units: tables of units for each head.
        meter: receives the counts of every step.
        chains: receives the chains that are at work, as they are built.
        witness: counts what ends this process; None: nobody does.

    Raises:
        ContractError: the steps do not fit together, before any operator is built.
    """
    for name in units:
        check_contract(flow.trunk, check_contract(flow.heads[name], flow.incoming))
    built = [] if chains is None else chains
    trunk = [Chain(group, meter.add, witness) for group in workers_of(flow.trunk)]
    built += trunk
    batch_rows = [group[0].rows_per_batch for group in workers_of(flow.trunk)]

    def records() -> Iterator[pa.Table]:
        for name, tables in units.items():
            yield from _through(flow.heads[name], tables, meter, built, witness)

    stream = records()
    for chain, rows in zip(trunk, batch_rows, strict=True):
        stream = _apply(chain, rebatch(stream, rows))
    try:
        yield from stream
    finally:
        for chain in trunk:
            chain.close()


def _through(
    steps: Sequence[Step],
    tables: Iterable[pa.Table],
    meter: Meter,
    built: list[Chain],
    witness: Witness | None,
) -> Iterator[pa.Table]:
    groups = workers_of(steps)
    chains = [Chain(group, meter.add, witness) for group in groups]
    built += chains
    stream: Iterator[pa.Table] = iter(tables)
    for group, chain in zip(groups, chains, strict=True):
        stream = _apply(chain, rebatch(stream, group[0].rows_per_batch))
    try:
        yield from stream
    finally:
        for chain in chains:
            chain.close()


def _apply(chain: Chain, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        yield from chain.run(table)


def rebatch(tables: Iterable[pa.Table], rows: int | None) -> Iterator[pa.Table]:
    """Yield the rows of `tables` in tables of `rows` rows (the last may be shorter); None leaves them as they come."""
    if rows is None:
        yield from tables
        return
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held = [whole.slice(rows)]
            count -= rows
    if count:
        yield pa.concat_tables(held)
