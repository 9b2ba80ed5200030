"""A second look: the model is shown other pixels of a page on which its answer failed."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from operators.minicpmv.slicing import SliceConfig, plan_slices

ANSWER_CODES: Final = ("repetition", "length", "unparsable")
"""Failures of what the model wrote, which follows from what it saw. Where it wrote nothing (no memory, a prompt that is
too long, an error of the device) other pixels are no answer to the cause."""


class SecondLook(BaseModel):
    """How pages are sliced at the first look, and how at the second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: SliceConfig
    other: SliceConfig

    def may_help(self, row: Mapping[str, Any], error_code: str) -> bool:
        """Return whether the page of a row looks another way to the model, and the failure is one of its answer.

        Args:
            row: `image_height_px` and `image_width_px`, of the whole page.
            error_code: why the answer failed.
        """
        height_px, width_px = row["image_height_px"], row["image_width_px"]
        if error_code not in ANSWER_CODES or not height_px or not width_px:
            return False
        if self.first.downsample_mode != self.other.downsample_mode:
            return True
        # A page that is small enough has the same slices whatever their limit.
        return plan_slices(height_px, width_px, self.first) != plan_slices(height_px, width_px, self.other)
