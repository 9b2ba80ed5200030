"""Reading order of boxes on a page."""

import numpy as np
from numpy.typing import NDArray

_MAX_BOXES = 256
"""The order is found in time and memory cubic in the boxes; pages with more are drawings or tables."""

_MARGIN_SHARE = 0.12
"""Running heads and feet lie in this part of the page's height, at its top and bottom."""


def reading_order(boxes: list[tuple[float, float, float, float]], *, right_to_left: bool = False) -> list[int]:
    """Return the indices of `boxes` (left, top, right, bottom) in reading order, columns before rows.

    A box comes before those that lie below it in the same column, and before those to its right unless something that
    spans both lies between them in height. What this leaves open keeps the order given. A given order that breaks no
    rule is kept as a whole, where of the second kind only pairs in one row count: it is the order of the file, and its
    author knew better than to read a table by columns.

    Args:
        boxes: in points, origin top-left.
        right_to_left: the rightmost column is read first: Arabic, Hebrew, vertical writing.

    Source:
        T. Breuel, High performance document layout analysis (2003), section on reading order; the exceptions are ours.
    """
    array = np.asarray(boxes, np.float64).reshape(-1, 4)
    if right_to_left:
        array = array[:, [2, 1, 0, 3]] * np.array([-1.0, 1.0, -1.0, 1.0])
    head, body, foot = _bands(array)
    return [*head, *(body[index] for index in _body_order(array[body])), *foot]


def _body_order(boxes: NDArray[np.float64]) -> list[int]:
    count = len(boxes)
    if count > _MAX_BOXES:
        return list(range(count)) if _is_downward(boxes) else _rows_first(boxes)
    above = _above(boxes)
    if not np.tril(above | (_beside(boxes) & _in_one_row(boxes)), -1).any():
        return list(range(count))
    return _topological(above | (_left_of(boxes, above) & ~above.T))


def _bands(boxes: NDArray[np.float64]) -> tuple[list[int], list[int], list[int]]:
    """Return the boxes of one-line rows at the top, the rest, and those of one-line rows at the bottom.

    A running head over three columns is no part of them, nor is a page number between two.
    """
    rest = list(range(len(boxes)))
    if len(rest) < 3:
        return [], rest, []
    start, stop = float(boxes[:, 1].min()), float(boxes[:, 3].max())
    limit = _MARGIN_SHARE * (stop - start)
    head = _peel(boxes, rest, 1.0, start + limit)
    foot = _peel(boxes, rest, -1.0, stop - limit)
    return head, rest, foot[::-1]


def _peel(boxes: NDArray[np.float64], rest: list[int], sign: float, limit: float) -> list[int]:
    """Move rows from the outer edge of `rest` to the list that is returned, outermost first."""
    taken: list[int] = []
    near, far = (1, 3) if sign > 0 else (3, 1)
    while len(rest) > 1:
        rest.sort(key=lambda index: sign * boxes[index, near])
        row_stop = boxes[rest[0], far]
        size = 1
        while size < len(rest) and sign * boxes[rest[size], near] < sign * row_stop:
            row_stop = sign * max(sign * row_stop, sign * boxes[rest[size], far])
            size += 1
        lowest = min(boxes[index, 3] - boxes[index, 1] for index in rest[:size])
        is_one_line = abs(row_stop - boxes[rest[0], near]) <= 2.5 * max(lowest, 1.0)
        if size == len(rest) or not is_one_line or sign * row_stop > sign * limit:
            break
        taken += sorted(rest[:size], key=lambda index: sign * boxes[index, 0])
        del rest[:size]
    rest.sort()
    return taken


def _above(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (i, j) True where i overlaps j in width and lies above it."""
    left, top, right, bottom = boxes.T
    overlap = np.minimum(right[:, None], right[None]) - np.maximum(left[:, None], left[None])
    narrow = np.minimum((right - left)[:, None], (right - left)[None])
    middle = (top + bottom) / 2
    shared = np.minimum(bottom[:, None], bottom[None]) - np.maximum(top[:, None], top[None])
    low = np.minimum((bottom - top)[:, None], (bottom - top)[None])
    return np.asarray(
        (overlap > 0.1 * np.maximum(narrow, 1e-6)) & (shared < 0.5 * low) & (middle[:, None] < middle[None])
    )


def _in_one_row(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (i, j) True where i and j share most of the lower one's height."""
    _, top, _, bottom = boxes.T
    shared = np.minimum(bottom[:, None], bottom[None]) - np.maximum(top[:, None], top[None])
    low = np.minimum((bottom - top)[:, None], (bottom - top)[None])
    return np.asarray(shared > 0.5 * low)


def _beside(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (i, j) True where i ends before j begins, but for a tenth of the narrower one."""
    left, _, right, _ = boxes.T
    narrow = np.minimum((right - left)[:, None], (right - left)[None])
    return np.asarray((right[:, None] <= left[None] + 0.1 * narrow) & (left[:, None] < left[None]))


def _left_of(boxes: NDArray[np.float64], above: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (i, j) True where i is left of j and no box between them in height spans both.

    A centred heading is right of a short line in the column below it, and yet comes first: such pairs are left out.
    """
    left, top, right, bottom = boxes.T
    overlaps = (np.minimum(right[:, None], right[None]) - np.maximum(left[:, None], left[None])) > 0
    spanning = overlaps[:, None, :] & overlaps[None, :, :]
    middle = (top + bottom) / 2
    low = np.minimum(middle[:, None], middle[None])[:, :, None]
    high = np.maximum(middle[:, None], middle[None])[:, :, None]
    between = (middle[None, None, :] > low) & (middle[None, None, :] < high)
    blocked = (spanning & between).any(axis=2)
    under = above & (right[None] <= ((left + right) / 2)[:, None] + 1)
    hangs_over = (under.astype(np.int32) @ overlaps.astype(np.int32)) > 0
    return np.asarray(_beside(boxes) & ~blocked & ~(hangs_over.T & (middle[None] < middle[:, None])))


def _topological(before: NDArray[np.bool_]) -> list[int]:
    """Return an order in which predecessors come first; cycles are cut where they are met."""
    order: list[int] = []
    state = [0] * len(before)
    for root in range(len(before)):
        stack = [root]
        while stack:
            index = stack[-1]
            if state[index] == 0:
                state[index] = 1
                stack += [int(i) for i in np.flatnonzero(before[:, index])[::-1] if state[i] == 0]
                continue
            stack.pop()
            if state[index] == 1:
                state[index] = 2
                order.append(index)
    return order


def _is_downward(boxes: NDArray[np.float64]) -> bool:
    steps = np.diff(boxes[:, 1])
    return bool((steps < -2).mean() < 0.1)


def _rows_first(boxes: NDArray[np.float64]) -> list[int]:
    height = max(float(np.median(boxes[:, 3] - boxes[:, 1])), 1.0)
    return sorted(range(len(boxes)), key=lambda i: (round(float(boxes[i, 1]) / height), float(boxes[i, 0])))
