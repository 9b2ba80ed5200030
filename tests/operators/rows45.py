"""DECODED rows of clips in packs of frames, for tests of prepare and generate."""

import numpy as np

from operators.minicpmv.slicing import slice_image


def clip_in_packs(frames, ids, slicing, **changes):
    """A DECODED row of frames in packs of these temporal ids."""
    sliced = iter([slice_image(frame, slicing) for frame in frames])
    packs = [[next(sliced) for _ in pack] for pack in ids]
    pieces = [piece for pack in packs for cell in zip(*(image.slices for image in pack), strict=True) for piece in cell]
    return {
        "unit_id": "u",
        "record_key": "k",
        "doc_id": "v",
        "kind": "video",
        "task": "caption",
        "segment_index": 0,
        "pixels": b"".join(np.ascontiguousarray(piece).tobytes() for piece in pieces),
        "pixel_encoding": "raw",
        "slice_shapes": [{"height_px": piece.shape[0], "width_px": piece.shape[1]} for piece in pieces],
        "slice_grids": [pack[0].grid._asdict() for pack in packs],
        "temporal_ids": ids,
        "route": "model",
    } | changes
