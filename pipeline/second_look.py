"""The second look: other pixels for pages on which the model failed, and what is remembered of the first.

A flow has no way back. So the first look commits such a page with its failure and a mark, and the run goes once more
over the marked ones, with other slices; those rows replace the first. A kill loses nothing, since what is owed is read
from the ledger, and the second look marks nothing, so there is no third.
"""

from collections.abc import Sequence
from typing import Any, Final

import pyarrow.compute as pc

from operators.minicpmv.family import Family
from operators.minicpmv.slicing import DownsampleMode, SliceConfig
from operators.parse.second_look import SecondLook
from pipeline.committed import CommittedRecords
from pipeline.dials import page_slicing
from pipeline.parts import PartCache
from pipeline.reading import Reading
from pipeline.spec import RunSpec
from pipeline.storage import Storage
from schemas.errors import ERROR, ConfigError

TASKS: Final = ("ocr", "parse")
"""A caption that fails has no text to be missed in small print, and segments cost too much to see twice."""

OTHER_DOWNSAMPLE: Final[dict[DownsampleMode, DownsampleMode]] = {"16x": "4x", "4x": "16x"}
"""Of a merger. 4x shows four times the visual tokens, so that print which blurs at 16x can be read: it is ahead on
OmniDocBench, 84.6 to 82.4, and OCRBench, 838 to 824 (model card of 4.6). A page that failed at 4x is shown at 16x: the
model is trained for both, and a quarter of the tokens leaves less to lose the thread in."""

RELEASED_SLICES: Final = 9
FEWER_SLICES: Final = 6
"""Of a resampler, whose tokens a slice are fixed. The released models were trained with up to 9 slices, so a run with
another bound turns to that. From 9 the way is down, not up to what was never trained: 6 move the borders at which a
line or a cell may have been cut, and keep four fifths of the resolution."""

OF_THE_MODEL: Final = ("PrepareImages", "Generate", "ParseCompletions")
"""Failures that a second look goes on from; those of the page itself it meets again."""


def second_look(spec: RunSpec, reading: Reading) -> SecondLook | None:
    """Return how pages are sliced at both looks; None where there is no second.

    Raises:
        ConfigError: one was asked for, and nothing here could give it.
    """
    is_possible = spec.task in TASKS and spec.text_layer != "only" and reading.model is not None
    if spec.second_look and not is_possible:
        raise ConfigError("--second-look is for ocr and parse with a model that runs here: nothing else slices pages")
    if spec.second_look is False or not is_possible or reading.model is None:
        return None
    first = page_slicing(spec, reading.model)
    return SecondLook(first=first, other=other_slicing(first, reading.model.family))


def other_slicing(first: SliceConfig, family: Family) -> SliceConfig:
    """Return limits on slicing under which the model sees other pixels of the same page."""
    if family.connector == "merger":
        return first.model_copy(update={"downsample_mode": OTHER_DOWNSAMPLE[first.downsample_mode]})
    most = FEWER_SLICES if first.max_slices == RELEASED_SLICES else RELEASED_SLICES
    return first.model_copy(update={"max_slices": most})


def in_words(looks: SecondLook) -> str:
    """Return what the second look changes, for people."""
    if looks.first.downsample_mode != looks.other.downsample_mode:
        return f"--downsample {looks.other.downsample_mode} in place of {looks.first.downsample_mode}"
    return f"at most {looks.other.max_slices} slices in place of {looks.first.max_slices}"


class FirstLooks:
    """What the first looks at records failed on, read from their parts.

    Args:
        storage: where the run lives.
        committed: its records.
    """

    def __init__(self, storage: Storage, committed: CommittedRecords) -> None:
        self._parts = PartCache(storage)
        self._committed = committed

    def failures(self, record_keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the model's failures at each record that waits for a second look, values of the `ERROR` struct."""
        parts = self._committed.first_look_parts_of(record_keys)
        wanted: dict[str, set[str]] = {}
        for key, part in zip(record_keys, parts, strict=True):
            if part is not None:
                wanted.setdefault(part, set()).add(key)
        found: dict[str, list[dict[str, Any]]] = {}
        for part, keys in wanted.items():
            table = self._parts.get("errors", part)
            if table is None:
                continue
            of_model = pc.is_in(table["component"], value_set=pc.cast(list(OF_THE_MODEL), table["component"].type))
            for row in table.filter(of_model).to_pylist():
                if row["record_key"] in keys:
                    found.setdefault(row["record_key"], []).append({field.name: row[field.name] for field in ERROR})
        return found
