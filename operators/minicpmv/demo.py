"""Names of the models that need no download: `demo` and `demo:MEMBER`, made by `operators.minicpmv.tiny`."""

from pathlib import Path
from typing import Final

from operators.minicpmv.family import FAMILIES, FamilyName
from operators.minicpmv.tiny import write_tiny_model
from schemas.errors import ConfigError

DEMO_MODEL: Final = "demo"
DEMO_FAMILY: Final[FamilyName] = "minicpmv4_6"
"""The member that `demo` alone names."""

DEMO_VERSION: Final = "2"
"""Raised when the maker's output changes, so that an older cached model is not taken for it."""


def demo_family(model: str) -> FamilyName | None:
    """Return the member that a name such as `demo` or `demo:minicpmv4_5` asks for; None where it asks for no demo.

    Raises:
        ConfigError: it asks for a member that there is none of.
    """
    name, separator, member = model.partition(":")
    if name != DEMO_MODEL:
        return None
    wanted = member if separator else DEMO_FAMILY
    for known in FAMILIES:
        if known == wanted:
            return known
    names = ", ".join(f"{DEMO_MODEL}:{known}" for known in FAMILIES)
    raise ConfigError(f"there is no demo model {model!r}; there are {DEMO_MODEL}, {names}")


def write_demo_model(folder: Path) -> None:
    """Write the files of the model that `demo` alone names into `folder`, which exists."""
    write_tiny_model(folder, DEMO_FAMILY)
