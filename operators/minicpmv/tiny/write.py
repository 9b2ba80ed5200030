"""Write the tiny checkpoint of any member."""

from pathlib import Path

from operators.minicpmv.family import FAMILIES, FamilyName
from operators.minicpmv.tiny.checkpoint import Checkpoint, write_checkpoint
from operators.minicpmv.tiny.merger import merger_checkpoint
from operators.minicpmv.tiny.resampler import resampler_checkpoint


def write_tiny_model(folder: Path, family: FamilyName = "minicpmv4_6", *, shards: int | None = None) -> None:
    """Write the files of a tiny model with random weights.

    Args:
        folder: where they go; it exists.
        family: the member whose layout they have.
        shards: files of weights; None: two for 4.5, one for the others.
    """
    checkpoint = make_tiny_model(family)
    write_checkpoint(folder, checkpoint, checkpoint.shards if shards is None else shards)


def make_tiny_model(family: FamilyName) -> Checkpoint:
    """Return the tiny model of a member, not yet written."""
    return (merger_checkpoint if FAMILIES[family].connector == "merger" else resampler_checkpoint)(family)
