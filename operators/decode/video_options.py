"""Options of the video decoder. No decoder is imported here: its caller is not the process that runs it."""

from typing import Annotated, Literal

from pydantic import Field

from operators.base import OperatorConfig
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import StackedConfig, TemporalConfig


class VideoLimits(OperatorConfig):
    """Bounds on what is decoded at all."""

    max_frame_pixels: Annotated[
        int, Field(gt=0, description="Most pixels of a frame; a larger video is too_large. The default is 8192 x 8192.")
    ] = 2**26
    max_duration_seconds: Annotated[
        float, Field(gt=0, description="Longest video; a longer one is too_long. The default is two weeks.")
    ] = 1_209_600.0
    count_bytes: Annotated[
        int, Field(ge=0, description="Largest file that is read whole when its header does not tell its length.")
    ] = 4_000_000_000


class SegmentOptions(OperatorConfig):
    """How the frames of a segment are taken and reduced."""

    temporal: TemporalConfig = StackedConfig()
    slicing: SliceConfig = SliceConfig(max_slices=1)
    limits: VideoLimits = VideoLimits()
    decoder: Annotated[
        Literal["auto", "pyav"], Field(description="auto: decord where it is exact, PyAV elsewhere; pyav: always PyAV.")
    ] = "auto"
    max_segment_bytes: Annotated[
        int, Field(gt=0, description="Most bytes of pixels a segment may have: one row holds them all.")
    ] = 96_000_000
