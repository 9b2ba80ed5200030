"""Every video of the wider corpus: what a probe says, and frames proved against a plain sequential decode."""

import csv
import math

import av
import numpy as np
import pytest

from operators.decode.box import DecoderBox
from operators.decode.segments import decode_segments
from operators.decode.video import probe
from operators.minicpmv.slicing import SliceConfig, slice_image
from schemas.errors import DecodeError

SEGMENT_SECONDS = 3.0
PYAV_FILES = {
    "animated.gif", "av1_video.mkv", "h265_video.mp4", "nasa_13013.mp4", "open_gop_hevc.mp4",
    "testsrc2_odd_height_and_width_vp9.mp4",
}  # fmt: skip
VIDEOS = [
    "animated.gif", "av1_video.mkv", "badminton.mp4", "flipping_a_pancake.mkv", "h265_video.mp4",
    "long_200s_24fps_h264.mp4", "mp4-video-without-audio.mp4", "nasa_13013.mp4", "one_frame_mpeg4.mp4",
    "open_gop_hevc.mp4", "openshot_60fps_mpeg4.mp4", "testsrc2_mpeg4.avi", "testsrc2_odd_height_and_width_vp9.mp4",
    "testsrc2_vp9.webm", "vfr_h264.mp4", "video_90.mov",
]  # fmt: skip
UNOPENED = {
    "broken/zero_length.mp4": "empty",
    "broken/moov_missing.mp4": "damaged",
    "broken/random_header_ftyp.mp4": "damaged",
    "broken/stsz_claims_2e9_samples.mp4": "damaged",
    "broken/timescale_zero.mp4": "damaged",
    "broken/mjpeg_avi_65500x65500.avi": "damaged",
    "broken/pdf_named.mp4": "not_video",
    "broken/m3u8_playlist_named.mp4": "not_video",
    "video/audio_only.mp4": "no_video_stream",
}

pytestmark = pytest.mark.needs_corpus


def facts(path):
    [found] = probe(str(path))
    return found


def segments_of(duration_seconds, step_seconds=SEGMENT_SECONDS):
    return [
        {
            "segment_index": number,
            "start_seconds": number * step_seconds,
            "stop_seconds": min((number + 1) * step_seconds, duration_seconds),
        }
        for number in range(math.ceil(duration_seconds / step_seconds))
    ]


def sequential_frames(path):
    """Yield (seconds, frame) of the stream that FFmpeg prefers, decoded from start to end."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        for frame in container.decode(stream):
            yield float((frame.pts - (stream.start_time or 0)) * stream.time_base), frame


def overview_of(frame):
    """Return the picture that the model gets of a PyAV frame."""
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    return slice_image(rgb, SliceConfig(max_slices=1)).slices[0]


def pictures(item):
    found, offset = [], 0
    for shape in item["slice_shapes"]:
        size = shape["height_px"] * shape["width_px"] * 3
        found.append(item["pixels"][offset : offset + size].reshape(shape["height_px"], shape["width_px"], 3))
        offset += size
    return found


def wanted_frames(times, fps, tick_seconds, segment):
    """Return the numbers of the frames on display at each second of a segment, by search through all times."""
    start, stop = segment["start_seconds"], segment["stop_seconds"]
    inside = [n for n, time in enumerate(times) if start - 1e-6 <= time < stop - 1e-6]
    slack = min(tick_seconds / 2, 0.001) + 1e-6
    constant = inside and all(abs(times[n] - start - k / fps) <= 2 * slack for k, n in enumerate(inside))
    found = []
    for second in range(math.ceil(stop - start)):
        if constant:
            found.append(inside[min(int(second * fps), len(inside) - 1)])
        else:
            shown = [n for n, time in enumerate(times) if time <= start + second + slack and time < stop]
            found.append(shown[-1] if shown else inside[0])
    return found


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_and_times_are_those_of_a_sequential_decode(corpus, name):
    path = corpus / "video" / name
    found = facts(path)
    with av.open(str(path)) as container:
        tick_seconds = float(container.streams.best("video").time_base)
        times = sorted(
            float((packet.pts - (packet.stream.start_time or 0)) * packet.time_base)
            for packet in container.demux(container.streams.best("video"))
            if packet.size
        )
    segments = segments_of(found["duration_seconds"])
    items = list(decode_segments(str(path), segments))
    assert len(items) == len(segments)
    expected = {}
    for segment, item in zip(segments, items, strict=True):
        assert item["damage"] is None
        assert item["decoder"] == ("pyav" if name in PYAV_FILES else "decord")
        frames = wanted_frames(times, found["fps"], tick_seconds, segment)
        assert item["frame_timestamps_seconds"] == pytest.approx([times[n] for n in frames], abs=1e-6)
        start, stop = segment["start_seconds"] - 1e-6, segment["stop_seconds"] - 1e-6
        assert item["start_frame"] == sum(time < start for time in times)
        assert item["stop_frame"] == sum(time < stop for time in times)
        for number, picture in zip(frames, pictures(item), strict=True):
            expected.setdefault(number, []).append(picture)
    for number, (seconds, frame) in enumerate(sequential_frames(path)):
        assert seconds == pytest.approx(times[number], abs=1e-6)
        if number in expected:
            overview = overview_of(frame)
            assert all(np.array_equal(picture, overview) for picture in expected.pop(number)), (number, seconds)
        if not expected:
            break
    assert not expected


@pytest.mark.parametrize("name", VIDEOS)
def test_a_segment_alone_is_the_segment_in_its_unit(corpus, name):
    path = corpus / "video" / name
    segments = segments_of(facts(path)["duration_seconds"])
    together = list(decode_segments(str(path), segments))
    for number in sorted({0, len(segments) // 2, len(segments) - 1}):
        for decoder in ("auto", "pyav"):
            [alone] = decode_segments(str(path), [segments[number]], {"decoder": decoder})
            assert np.array_equal(alone.pop("pixels"), together[number]["pixels"])
            assert alone.pop("decoder") in ("decord", "pyav")
            assert alone.items() <= together[number].items()


def test_durations_give_the_segments_that_the_manifest_expects(corpus):
    with (corpus / "MANIFEST.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for name in VIDEOS:
        found = facts(corpus / "video" / name)
        row = rows[f"video/{name}"]
        assert math.ceil(found["duration_seconds"] / 30) == math.ceil(float(row["duration_s"]) / 30), name
        assert found["codec"] == row["codec"]
        if name == "nasa_13013.mp4":
            assert found["stream_note"] == "stream 3 of video streams 0 (320x180), 3 (480x270)"
            assert (found["width_px"], found["frame_count"]) == (480, 390)
            continue
        assert found["stream_note"] is None
        assert found["frame_count"] == int(row["frames"])
        assert found["fps"] == pytest.approx(float(row["fps"]), abs=0.01)
        sizes = f"{found['width_px']}x{found['height_px']}", f"{found['height_px']}x{found['width_px']}"
        assert row["width_x_height"] == sizes[1 if name == "video_90.mov" else 0], name


@pytest.mark.parametrize(("name", "code"), UNOPENED.items())
def test_a_file_that_is_no_video_says_why(corpus, name, code):
    with pytest.raises(DecodeError) as caught:
        facts(corpus / name)
    assert caught.value.code == code


def test_a_header_that_lies_about_the_size_is_overruled(corpus):
    found = facts(corpus / "broken/header_says_60000x60000.mp4")
    assert (found["width_px"], found["height_px"]) == (640, 272)


def test_a_name_does_not_make_the_container(corpus):
    assert facts(corpus / "broken/webm_named.mp4")["mime_type"] == "video/webm"


@pytest.mark.parametrize(
    ("name", "seconds", "code"),
    [
        ("faststart_truncated_50pct.mp4", [0, 1, 2, 3, 4], "truncated_stream"),
        ("mkv_truncated_60pct.mkv", [0, 1, 2, 3, 4, 5], "truncated_stream"),
        ("corrupt_packets_middle.mp4", [0, 1, 2, 3, 8, 9], "damaged"),
        ("corrupted.mp4", [0, 1, 2], "damaged"),
    ],
)
def test_what_is_whole_of_a_damaged_file_comes_out(corpus, name, seconds, code):
    path = corpus / "broken" / name
    [item] = decode_segments(str(path), segments_of(facts(path)["duration_seconds"], 30.0))
    assert item["frame_timestamps_seconds"] == pytest.approx(seconds)
    assert item["damage_code"] == code


def test_frames_around_damage_are_those_of_the_undamaged_file(corpus):
    """Both files are copies of one video, so that what is kept can be compared."""
    options = {"temporal": {"kind": "stacked", "fps": 5.0}}
    segment = [{"segment_index": 0, "start_seconds": 0.0, "stop_seconds": 10.0}]
    [torn] = decode_segments(str(corpus / "broken/corrupt_packets_middle.mp4"), segment, options)
    [whole] = decode_segments(str(corpus / "broken/header_says_60000x60000.mp4"), segment, options)
    clean = dict(zip(whole["frame_timestamps_seconds"], pictures(whole), strict=True))
    kept = dict(zip(torn["frame_timestamps_seconds"], pictures(torn), strict=True))
    assert 20 < len(kept) < len(clean)
    assert all(np.array_equal(picture, clean[seconds]) for seconds, picture in kept.items())


def test_a_hundred_hours_of_a_hundred_frames_stay_bounded(corpus):
    path = corpus / "broken/duration_100h_100frames.mp4"
    assert facts(path)["duration_seconds"] == 360_000.0
    [whole] = decode_segments(str(path), segments_of(360_000.0, 360_000.0))
    assert whole["pack_count"] == 128
    [late] = decode_segments(str(path), [{"segment_index": 0, "start_seconds": 9000.0, "stop_seconds": 9030.0}])
    assert set(late["frame_timestamps_seconds"]) == {7200.0}


def test_a_frame_of_8k_takes_less_than_a_gigabyte(corpus):
    path = corpus / "broken/legal_7680x4320_30frames_h264.mp4"
    box = DecoderBox()
    try:
        item = box.call(
            "operators.decode.segments:decode_segments",
            {
                "path": str(path),
                "segments": segments_of(1.0),
                "options": {"temporal": {"kind": "stacked", "fps": 10, "stack_frames": 2}},
            },
            timeout_seconds=120,
        )
        assert item["pack_count"] == 20
        assert box.peak_rss_bytes < 1_000_000_000
    finally:
        box.close()
