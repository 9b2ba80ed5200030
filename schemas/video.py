"""Video segments, as they travel between steps."""

from typing import Final

import pyarrow as pa

SEGMENT_FACTS: Final = pa.schema(
    [
        pa.field("segment_index", pa.int32()),
        pa.field("start_seconds", pa.float64()),
        pa.field("stop_seconds", pa.float64()),
        pa.field("start_frame", pa.int64()),
        pa.field("stop_frame", pa.int64()),
        pa.field("segmentation", pa.string()),
        pa.field("scene_score", pa.float32()),
        pa.field("sampling_policy", pa.string()),
        pa.field("target_fps", pa.float32()),
        pa.field("sampled_fps", pa.float32()),
        pa.field("frame_count_sampled", pa.int32()),
        pa.field("frame_timestamps_seconds", pa.list_(pa.float64())),
        pa.field("packing", pa.string()),
        pa.field("temporal_ids", pa.list_(pa.list_(pa.int32()))),
        pa.field("pack_count", pa.int32()),
        pa.field("decoder", pa.string()),
        pa.field("motion_score", pa.float32()),
    ]
)
"""One half-open time range and the frames that were sampled from it. Times are presentation timestamps from the
start of the stream; `decoder` is `decord` or `pyav`.

`sampling_policy` names the rule by the member of the family that brought it: `minicpmv4_6` (main frames, others stacked
on canvases), `minicpmv4_5` (packs), `minicpmv2_6` (frames alone). `target_fps` was asked for, `sampled_fps` came of it;
where frames are stacked both count main frames. `packing` is `none`, `stack`, or `3d_resampler` where frames share
visual tokens; `pack_count` counts images, canvases or packs, and `temporal_ids` has one list for each: a tenth of a
second from the start of the segment for each of its frames."""
