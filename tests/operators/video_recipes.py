"""The published recipes for videos of MiniCPM-V 4.5, and of 2.6 and 4.0, restated for whole files."""

import math

import numpy as np


def recipe_packs(frame_count, fps, choose_fps, max_frames, max_packing, forced=None):
    """The recipe for a file, step by step: (frame, id) pairs in packs. None where it divides by zero."""
    duration = frame_count / fps
    if choose_fps * int(duration) <= max_frames:
        packing = 1
        wanted = round(min(choose_fps, round(fps)) * min(max_frames, duration))
    else:
        packing = math.ceil(duration * choose_fps / max_frames)
        wanted = round(duration * choose_fps)
        if packing > max_packing:
            wanted, packing = max_frames * max_packing, max_packing
    if not wanted:
        return None
    if forced:
        packing = min(forced, max_packing)
    gap = frame_count / wanted
    frames = np.array([int(k * gap + gap / 2) for k in range(wanted)])
    scale = np.arange(0, duration, 0.1)
    nearest = [scale[np.argmin(np.abs(scale - time))] for time in frames / fps]
    ids = (np.array(nearest) / 0.1).astype(np.int32).tolist()
    pairs = list(zip(frames.tolist(), ids, strict=True))
    return [pairs[start : start + packing] for start in range(0, len(pairs), packing)]


def recipe_frames(frame_count, fps, max_frames):
    """The recipe of 2.6 and 4.0 for a file: the frames. None where its step is zero."""
    step = round(fps)
    if not step:
        return None
    frames = list(range(0, frame_count, step))
    if len(frames) > max_frames:
        gap = len(frames) / max_frames
        frames = [frames[int(k * gap + gap / 2)] for k in range(max_frames)]
    return frames
