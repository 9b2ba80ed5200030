"""Probing and decoding of videos; each frame of a test video spells its own number."""

import math
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from operators.decode import packet_index
from operators.decode.demux import open_video
from operators.decode.frames import DecordReader, PyavReader, choose_reader, decord_can_read
from operators.decode.packet_index import index_range
from operators.decode.segments import decode_segments
from operators.decode.video import probe
from operators.decode.video_options import VideoLimits
from schemas.errors import DecodeError
from schemas.source import SOURCE_FACTS
from schemas.video import SEGMENT_FACTS

PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
AT_25 = {"time_base": Fraction(1, 25), "ticks": range(250)}
OPEN_GOP = "open-gop=1:keyint=25:min-keyint=25:scenecut=0:bframes=3"


def facts(path, **limits):
    [found] = probe(str(path), limits)
    return found


def ranges(stop_seconds, step_seconds, start_seconds=0.0):
    count = math.ceil((stop_seconds - start_seconds) / step_seconds)
    starts = [start_seconds + step_seconds * number for number in range(count)]
    return [
        {"segment_index": i, "start_seconds": start, "stop_seconds": min(start + step_seconds, stop_seconds)}
        for i, start in enumerate(starts)
    ]


def decoded(path, segments, **options):
    return list(decode_segments(str(path), segments, options))


def pictures(item):
    """Return the slices of a segment as arrays."""
    found, offset = [], 0
    for shape in item["slice_shapes"]:
        size = shape["height_px"] * shape["width_px"] * 3
        found.append(item["pixels"][offset : offset + size].reshape(shape["height_px"], shape["width_px"], 3))
        offset += size
    assert offset == len(item["pixels"])
    return found


def numbers(item, number_of):
    return [number_of(picture) for picture in pictures(item)]


def error_of(path, **limits):
    with pytest.raises(DecodeError) as caught:
        facts(path, **limits)
    return caught.value.code


def test_a_probe_tells_length_rate_codec_and_size(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(50), size=(96, 128))
    found = facts(path)
    assert found == {
        "kind": "video",
        "mime_type": "video/mp4",
        "duration_seconds": 2.0,
        "fps": 25.0,
        "frame_count": 50,
        "codec": "h264",
        "width_px": 128,
        "height_px": 96,
        "stream_note": None,
    }
    assert found.keys() <= set(SOURCE_FACTS.names)


@pytest.mark.parametrize(
    ("name", "codec", "mime_type"),
    [
        ("a.mkv", "libx264", "video/x-matroska"),
        ("a.webm", "libvpx-vp9", "video/webm"),
        ("a.avi", "mpeg4", "video/x-msvideo"),
        ("a.ts", "libx264", "video/mp2t"),
        ("a.mov", "libx264", "video/mp4"),
    ],
)
def test_a_container_without_a_complete_header_is_counted(tmp_path, make_video, name, codec, mime_type):
    options = {"cpu-used": "8", "deadline": "realtime"} if "vp9" in codec else {}
    path = make_video(tmp_path / name, time_base=Fraction(1, 25), ticks=range(60), codec=codec, options=options)
    found = facts(path)
    assert found["mime_type"] == mime_type
    assert found["frame_count"] == 60
    assert found["duration_seconds"] == pytest.approx(2.4, abs=0.002)


def test_a_fragmented_file_is_counted(tmp_path, make_video):
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "50"}, container_options=fragments)
    assert facts(path)["duration_seconds"] == pytest.approx(10.0, abs=0.01)
    assert facts(path)["frame_count"] == 250


@pytest.mark.parametrize(("rotation", "size"), [(90, (128, 96)), (180, (96, 128)), (270, (128, 96))])
def test_rotated_videos_are_put_upright_alike_by_both_decoders(tmp_path, make_video, number_of, rotation, size):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(30), rotation=rotation)
    plain = make_video(tmp_path / "b.mp4", time_base=Fraction(1, 25), ticks=range(30))
    found = facts(path)
    assert (found["height_px"], found["width_px"]) == size
    [upright] = decoded(path, ranges(1.2, 1.2), decoder="pyav")
    [automatic] = decoded(path, ranges(1.2, 1.2))
    assert np.array_equal(upright["pixels"], automatic["pixels"])
    turned = np.rot90(pictures(decoded(plain, ranges(1.2, 1.2))[0])[1], rotation // 90)
    assert number_of(pictures(upright)[1]) == number_of(turned)


def test_an_empty_file_is_empty(tmp_path):
    path = tmp_path / "a.mp4"
    path.touch()
    assert error_of(path) == "empty"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.mp4", b"%PDF-1.7\n" + b"x" * 500, "not_video"),
        ("a.mp4", PLAYLIST, "not_video"),
        ("a.m3u8", PLAYLIST, "not_video"),
        ("a.txt", b"ffconcat version 1.0\nfile other.mp4\n", "not_video"),
        ("a.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\x8d" * 3000, "damaged"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, name, content, code):
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of(path) == code


def test_no_name_is_taken_as_a_protocol_or_a_pattern(tmp_path, make_video):
    path = make_video(tmp_path / "concat:a|b%03d.mp4", time_base=Fraction(1, 25), ticks=range(5))
    assert facts(path)["frame_count"] == 5


def test_a_file_with_sound_only_has_no_video_stream(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert error_of(path) == "no_video_stream"


def test_of_two_streams_one_is_taken_and_named(tmp_path, make_video, number_of):
    small = make_video(tmp_path / "small.mp4", time_base=Fraction(1, 25), ticks=range(50), size=(96, 128))
    large = make_video(tmp_path / "large.mp4", time_base=Fraction(1, 25), ticks=range(75), size=(192, 256))
    path = tmp_path / "both.mp4"
    sources = [av.open(str(source)) for source in (small, large)]
    with av.open(str(path), "w") as target:
        copies = [target.add_stream_from_template(source.streams.video[0]) for source in sources]
        for source, copied in zip(sources, copies, strict=True):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
            source.close()
    found = facts(path)
    assert found["width_px"] in (128, 256)
    assert found["frame_count"] == {128: 50, 256: 75}[found["width_px"]]
    assert "of video streams 0 (128x96), 1 (256x192)" in found["stream_note"]
    [item] = decoded(path, ranges(2.0, 2.0))
    assert item["decoder"] == "pyav"
    assert numbers(item, number_of) == [0, 25]


def test_limits_refuse_large_frames_and_long_videos(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(50))
    assert error_of(path, max_frame_pixels=96 * 128 - 1) == "too_large"
    assert error_of(path, max_duration_seconds=1.5) == "too_long"


def test_a_file_without_its_index_is_damaged(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(50))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    assert error_of(path) == "damaged"


def test_one_frame_is_a_video(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=[0])
    assert facts(path)["frame_count"] == 1
    [item] = decoded(path, ranges(facts(path)["duration_seconds"], 30.0))
    assert numbers(item, number_of) == [0]
    assert item["motion_score"] is None


def test_a_segment_carries_its_facts(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "50"})
    items = decoded(path, ranges(10.0, 4.0))
    assert [numbers(item, number_of) for item in items] == [[0, 25, 50, 75], [100, 125, 150, 175], [200, 225]]
    item = items[1]
    assert item.keys() - set(SEGMENT_FACTS.names) == {
        "pixels", "slice_shapes", "slice_grids", "damage", "damage_code",
    }  # fmt: skip
    assert (item["start_frame"], item["stop_frame"]) == (100, 200)
    assert item["frame_timestamps_seconds"] == pytest.approx([4.0, 5.0, 6.0, 7.0])
    assert item["temporal_ids"] == [[0], [10], [20], [30]]
    assert (item["packing"], item["pack_count"], item["frame_count_sampled"]) == ("none", 4, 4)
    assert (item["target_fps"], item["sampled_fps"]) == (1.0, 1.0)
    assert item["slice_grids"] == [{"rows": 0, "cols": 0}] * 4
    assert item["decoder"] == "decord"
    assert item["damage"] is None
    assert 0 < item["motion_score"] < 1


@pytest.mark.parametrize(
    ("name", "codec", "options", "expected"),
    [
        ("closed.mp4", "libx264", {"g": "50", "bf": "3"}, "decord"),
        ("closed.mkv", "libx264", {"g": "50", "bf": "3"}, "decord"),
        ("open.mp4", "libx264", {"x264-params": OPEN_GOP}, "pyav"),
        ("open.mkv", "libx264", {"x264-params": OPEN_GOP}, "pyav"),
        ("open_hevc.mp4", "libx265", {"x265-params": f"{OPEN_GOP}:log-level=none"}, "pyav"),
        ("a.ts", "libx264", {"g": "50", "bf": "2"}, "pyav"),
        ("vp8.webm", "libvpx", {"g": "50", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, "pyav"),
        ("vp9.webm", "libvpx-vp9", {"g": "50", "lag-in-frames": "16", "cpu-used": "8"}, "decord"),
        ("mpeg4.mp4", "mpeg4", {"g": "50"}, "decord"),
        ("open_mpeg4.mp4", "mpeg4", {"g": "50", "bf": "2"}, "pyav"),
        ("intra.avi", "mjpeg", {}, "pyav"),
    ],
)
def test_frames_are_exact_in_one_pass_and_at_random_access(
    tmp_path, make_video, number_of, name, codec, options, expected
):
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = make_video(tmp_path / name, **AT_25, codec=codec, options=options, pixel_format=pixel_format)
    segments = ranges(10.0, 3.0)
    wanted = [[0, 25, 50], [75, 100, 125], [150, 175, 200], [225]]
    items = decoded(path, segments)
    assert [numbers(item, number_of) for item in items] == wanted
    assert {item["decoder"] for item in items} == {expected}
    for segment, item in zip(segments, items, strict=True):
        [alone] = decoded(path, [segment], decoder="pyav")
        assert np.array_equal(alone["pixels"], item["pixels"])
        names = ("frame_timestamps_seconds", "start_frame", "stop_frame")
        assert [alone[name] for name in names] == [item[name] for name in names]


def test_every_frame_of_an_open_gop_is_exact_after_a_seek(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"x264-params": OPEN_GOP})
    for first in range(90, 112):
        segment = {"segment_index": 0, "start_seconds": first / 25, "stop_seconds": (first + 1) / 25}
        [item] = decoded(path, [segment])
        assert numbers(item, number_of) == [first]
        assert (item["start_frame"], item["stop_frame"]) == (first, first + 1)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mkv", "libx264", {"g": "50", "bf": "3"}),
        ("open.mkv", "libx264", {"x264-params": OPEN_GOP}),
        ("closed.ts", "libx264", {"g": "50", "bf": "2"}),
        ("open.ts", "libx264", {"x264-params": OPEN_GOP}),
        ("vp8.webm", "libvpx", {"g": "50", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
        ("reordered.avi", "mpeg4", {"g": "25", "bf": "2"}),
        ("fragments.mp4", "libx264", {"g": "50", "bf": "2", "movflags": "frag_keyframe+empty_moov"}),
    ],
)
@pytest.mark.parametrize("scanned_bytes", [0, 256_000_000])
def test_containers_without_an_index_are_exact_at_random_access(
    tmp_path, make_video, number_of, monkeypatch, name, codec, options, scanned_bytes
):
    """At 0 bytes the file counts as too large to be read from its start, and frames are numbered by their times."""
    monkeypatch.setattr(packet_index, "SCAN_FROM_START_BYTES", scanned_bytes)
    container_options = {key: options[key] for key in options if key == "movflags"}
    codec_options = {key: options[key] for key in options if key != "movflags"}
    path = make_video(tmp_path / name, **AT_25, codec=codec, options=codec_options, container_options=container_options)
    for first in range(0, 250, 7):
        segment = {"segment_index": 0, "start_seconds": first / 25, "stop_seconds": (first + 1) / 25}
        [item] = decoded(path, [segment], decoder="pyav")
        assert numbers(item, number_of) == [first]
        assert (item["start_frame"], item["stop_frame"]) == (first, first + 1)


def test_both_decoders_give_the_same_pixels_in_any_order(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"g": "40", "bf": "3"})
    video = open_video(str(path), VideoLimits())
    index = index_range(video, 0.0, 10.0)
    readers = DecordReader(video, index), PyavReader(video, index)
    for position in (0, 1, 39, 40, 41, 41, 130, 131, 249, 12, 200, 3):
        frames = [reader.read(position) for reader in readers]
        assert np.array_equal(*frames), position


def test_odd_sizes_and_other_pixel_formats_are_not_left_to_decord(tmp_path, make_video):
    odd = make_video(tmp_path / "a.mkv", **AT_25, size=(97, 131), codec="libvpx-vp9", options={"cpu-used": "8"})
    wide = make_video(tmp_path / "b.mp4", **AT_25, pixel_format="yuv444p")
    for path in (odd, wide):
        video = open_video(str(path), VideoLimits())
        index = index_range(video, 0.0, 1.0)
        assert not decord_can_read(video, index)
        assert choose_reader(video, index, "auto").name == "pyav"


def test_variable_rates_go_by_presentation_time(tmp_path, make_video, number_of):
    ticks = [0, 40, 80, 500, 540, 1900, 2100, 2900, 3300, 5000, 5040, 7000]
    path = make_video(tmp_path / "a.mp4", ticks=ticks, options={"g": "4"})
    assert facts(path)["duration_seconds"] >= 7.0
    items = decoded(path, ranges(7.5, 3.0))
    assert [numbers(item, number_of) for item in items] == [[0, 4, 5], [7, 8, 9], [10, 11]]
    assert items[1]["frame_timestamps_seconds"] == pytest.approx([2.9, 3.3, 5.0])
    assert [(item["start_frame"], item["stop_frame"]) for item in items] == [(0, 8), (8, 11), (11, 12)]


def test_a_picture_that_stays_serves_every_segment_it_is_shown_in(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mkv", ticks=[0, 4000, 8000])
    items = decoded(path, ranges(8.5, 3.0))
    assert [numbers(item, number_of) for item in items] == [[0, 0, 0], [0, 1, 1], [1, 1, 2]]
    assert items[1]["frame_timestamps_seconds"] == pytest.approx([0.0, 4.0, 4.0])


def cut_with_edit_list(source, target, first):
    """Copy `source` from its start so that an edit list hides the frames before number `first`."""
    with av.open(str(source)) as opened, av.open(str(target), "w") as written:
        stream = opened.streams.video[0]
        copied = written.add_stream_from_template(stream)
        shift = round(first / 25 / stream.time_base)
        for packet in opened.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copied
                written.mux(packet)


def test_frames_hidden_by_an_edit_list_are_not_shown(tmp_path, make_video, number_of):
    whole = make_video(tmp_path / "a.mp4", **AT_25, options={"x264-params": "keyint=50:scenecut=0:bframes=2"})
    path = tmp_path / "b.mp4"
    cut_with_edit_list(whole, path, 30)
    with av.open(str(path)) as opened:
        assert any(packet.is_discard for packet in opened.demux(video=0))
    assert facts(path)["duration_seconds"] == pytest.approx(8.8, abs=0.05)
    items = decoded(path, ranges(8.8, 3.0))
    assert {item["decoder"] for item in items} == {"pyav"}
    assert [numbers(item, number_of) for item in items] == [[30, 55, 80], [105, 130, 155], [180, 205, 230]]
    assert [(item["start_frame"], item["stop_frame"]) for item in items] == [(0, 75), (75, 150), (150, 220)]
    [alone] = decoded(path, [{"segment_index": 1, "start_seconds": 3.0, "stop_seconds": 6.0}])
    assert numbers(alone, number_of) == [105, 130, 155]
    assert (alone["start_frame"], alone["stop_frame"]) == (75, 150)


def test_stacked_frames_share_a_canvas(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, size=(96, 128))
    [item] = decoded(path, ranges(2.0, 2.0), temporal={"kind": "stacked", "stack_frames": 3})
    main, canvas, second, _ = pictures(item)
    assert (number_of(main), number_of(second)) == (0, 25)
    # Two frames of 128x96 stand one above the other, 6 of 198 pixels apart.
    half = round(canvas.shape[0] * 96 / 198)
    assert (number_of(canvas[:half]), number_of(canvas[-half:])) == (8, 16)
    assert item["packing"] == "stack"
    assert item["temporal_ids"] == [[0], [3, 6], [10], [13, 16]]
    assert item["frame_timestamps_seconds"] == pytest.approx([0, 0.32, 0.64, 1.0, 1.32, 1.64])
    assert (item["pack_count"], item["frame_count_sampled"], item["sampled_fps"]) == (4, 6, 1.0)


def test_large_frames_are_sliced_when_asked_for(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", time_base=Fraction(1, 25), ticks=range(10), size=(720, 1280))
    [item] = decoded(path, ranges(0.4, 1.0), slicing={"max_slices": 4})
    [grid] = item["slice_grids"]
    assert grid["rows"] * grid["cols"] + 1 == len(item["slice_shapes"]) > 1


def test_pixels_beyond_the_bound_are_too_large_and_other_segments_still_come(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", **AT_25)
    long, short = decoded(
        path,
        [
            {"segment_index": 0, "start_seconds": 0.0, "stop_seconds": 8.0},
            {"segment_index": 1, "start_seconds": 8.0, "stop_seconds": 10.0},
        ],
        max_segment_bytes=2_000_000,
    )
    assert long["failure"]["code"] == "too_large"
    assert long["failure"]["class_name"] == "PrepareError"
    assert short["frame_count_sampled"] == 2


def test_frames_before_and_after_damage_still_come(tmp_path, make_video, number_of):
    path = make_video(tmp_path / "a.mp4", **AT_25, options={"x264-params": "keyint=50:scenecut=0"}, size=(240, 320))
    with av.open(str(path)) as opened:
        packets = [packet for packet in opened.demux(video=0) if packet.size]
        torn = [packet for packet in packets if 85 <= round(packet.pts * packet.time_base * 25) < 89]
        places = [(packet.pos, packet.size) for packet in torn]
    data = bytearray(path.read_bytes())
    for pos, size in places:
        data[pos : pos + size] = b"\xff" * size
    path.write_bytes(data)
    first, second, third = decoded(path, ranges(10.0, 4.0))
    assert numbers(first, number_of) == [0, 25, 50, 75]
    assert first["damage"] is None
    assert numbers(second, number_of) == [100, 125, 150, 175]
    assert numbers(third, number_of) == [200, 225]
    [torn_segment] = decoded(
        path, [{"segment_index": 0, "start_seconds": 2.0, "stop_seconds": 4.0}], temporal={"kind": "stacked", "fps": 5}
    )
    assert numbers(torn_segment, number_of) == [50, 55, 60, 65, 70, 75, 80]
    assert torn_segment["damage_code"] == "damaged"
    assert "cannot be decoded" in torn_segment["damage"]


@pytest.mark.parametrize(("name", "flags"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {})])
def test_a_cut_file_gives_what_is_left_and_says_so(tmp_path, make_video, number_of, name, flags):
    options = {"g": "25", "bf": "0", "preset": "ultrafast"}
    path = make_video(tmp_path / name, **AT_25, options=options, container_options=flags, size=(240, 320))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    duration = facts(path)["duration_seconds"]
    assert duration == pytest.approx(10.0)
    whole, cut, lost = decoded(path, ranges(duration, 4.0))
    assert numbers(whole, number_of) == [0, 25, 50, 75]
    assert whole["damage"] is None
    assert numbers(cut, number_of)[0] == 100
    assert cut["frame_count_sampled"] < 4
    assert cut["damage_code"] == "truncated_stream"
    assert lost["failure"]["code"] == "truncated_stream"


def test_probing_and_options_need_no_torch_and_no_ray():
    code = (
        "import sys, operators.decode.clips, operators.decode.video, operators.decode.segments\n"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
