"""Ids are functions of content."""

from schemas.ids import segment_id


def test_segments_of_different_times_have_different_ids() -> None:
    times = [(0.0, 2.0), (2.0, 4.0), (0.0, 4.0), (0.0, 2.0001), (0.0001, 2.0)]
    assert len({segment_id("v", start, stop) for start, stop in times}) == len(times)


def test_equal_times_give_equal_ids() -> None:
    assert segment_id("v", 0, 30) == segment_id("v", 0.0, 30.0) == "v:0.0-30.0"
