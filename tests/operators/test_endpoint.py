"""What is sent to a server and what comes back: pure functions, and the operators around them."""

import io
import json
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from operators.endpoint.address import endpoint_url
from operators.endpoint.answer import Answer, AttemptFailedError, error_message, failure_of, read_answer
from operators.endpoint.ask import AskEndpoint, AskEndpointConfig
from operators.endpoint.client import read_models
from operators.endpoint.options import ServedModel, ServerOptions
from operators.endpoint.patience import Silence, delay_seconds, retry_after_seconds
from operators.endpoint.pictures import EncodeClips, EncodeConfig, EncodePages
from operators.endpoint.question import MARK, Question, Sampling, known_good_question, request_body
from operators.minicpmv.slicing import SliceConfig
from operators.picture_files import join_files, picture_file, read_picture, split_files
from operators.prompts import prompt_for
from operators.read import page_image
from schemas.errors import ConfigError, ContractError, GenerationError, PrepareError
from schemas.generation import DECODED, RECORD
from tests.operators.chat_server import MODEL, ChatServer, Reply, completion
from tests.operators.rows46 import clip_frames, clip_row, page_pictures, page_row, table_of

FAILED = {"stage": "render", "error_code": "render", "error_category": "backend_failure", "message": "no"}


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/v1/", "http://host:8000/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/some/where/v1", "https://host/some/where/v1"),
        (" http://[::1]:8000/v1 ", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_may_be_given_with_or_without_its_path(given, used):
    assert endpoint_url(given) == used


@pytest.mark.parametrize("given", ["host:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://a b/v1", ""])
def test_what_is_no_http_address_is_refused(given):
    with pytest.raises(ConfigError, match="endpoint"):
        endpoint_url(given)


@pytest.mark.parametrize("given", ["http://me:hush@host/v1", "http://hush@host/v1", "http://host/v1?key=hush"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(given):
    with pytest.raises(ConfigError, match="PAGEREEL_ENDPOINT_KEY") as caught:
        endpoint_url(given)
    assert "hush" not in str(caught.value)


def test_a_request_holds_the_pictures_in_order_and_then_the_prompt():
    prompt = f'Read "this" \\ {MARK}", "type": and\nthat: ü 表 {json.dumps(MARK)}, '
    body = json.loads(request_body("a/model", Question(prompt, (b"one", b"\xff\x00"), "jpeg"), Sampling()))
    assert body == {
        "model": "a/model",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,b25l"}},
                    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/wA="}},
                    {"type": "text", "text": prompt},
                ],
            }
        ],
        "max_tokens": 4096,
        "temperature": 0.0,
    }


def test_a_model_may_be_called_like_the_mark():
    body = json.loads(request_body(MARK, Question("p", (b"x",)), Sampling()))
    assert body["model"] == MARK
    assert len(body["messages"][0]["content"]) == 2


def test_options_are_sent_only_where_they_differ_from_what_servers_do_anyway():
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, thinking=True, logprobs=True)
    body = json.loads(request_body("m", Question("p", (), seed=7), sampling))
    del body["messages"], body["model"]
    assert body == {
        "max_tokens": 9, "temperature": 0.5, "seed": 7, "top_p": 0.9,
        "chat_template_kwargs": {"enable_thinking": True}, "logprobs": True, "top_logprobs": 1,
    }  # fmt: skip


def answer_of(**changes):
    return read_answer(json.dumps(completion(**changes)).encode())


def test_a_completion_becomes_an_answer():
    assert answer_of(text=" Two\nlines \n") == Answer("Two\nlines", None, "stop", prompt_tokens=12, output_tokens=3)


@pytest.mark.parametrize(
    ("message", "text", "thought"),
    [
        ({"text": "<think>\nhm\n</think>\n\nyes"}, "yes", "hm"),
        ({"text": "hm</think>yes"}, "yes", "hm"),
        ({"text": "yes", "reasoning_content": "hm"}, "yes", "hm"),
        ({"text": "yes", "reasoning": " hm "}, "yes", "hm"),
        ({"text": None, "reasoning_content": "hm"}, "", "hm"),
        ({"text": "yes", "reasoning_content": None}, "yes", None),
        ({"text": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]}, "yes", None),
        ({"text": ""}, "", None),
    ],
)
def test_a_thought_is_kept_apart_however_the_server_gives_it(message, text, thought):
    found = answer_of(**message)
    assert (found.text, found.thought) == (text, thought)


@pytest.mark.parametrize(
    ("said", "reason"), [("stop", "stop"), ("eos", "stop"), ("length", "length"), ("max_tokens", "length")]
)
def test_finish_reasons_become_ours(said, reason):
    assert answer_of(finish_reason=said).finish_reason == reason


def test_what_the_server_does_not_tell_is_none():
    value = completion("read")
    del value["usage"]
    found = read_answer(json.dumps(value).encode())
    assert (found.prompt_tokens, found.output_tokens, found.mean_logprob) == (None, None, None)
    value["usage"] = {"prompt_tokens": "many", "completion_tokens": True}
    found = read_answer(json.dumps(value).encode())
    assert (found.prompt_tokens, found.output_tokens) == (None, None)


@pytest.mark.parametrize(
    ("logprobs", "mean"),
    [
        ([{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2}], -1.5),
        ([{"token": "a", "logprob": None}], None),
        ([], None),
    ],
)
def test_confidence_is_the_mean_of_the_probabilities_that_were_told(logprobs, mean):
    value = completion("ab")
    value["choices"][0]["logprobs"] = {"content": logprobs}
    assert read_answer(json.dumps(value).encode()).mean_logprob == mean


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>Sign in</html>", b"null", b"[]", b'{"choices": []}', b'{"choices": [{}]}', b'{"error": "x"}',
        b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}', b"\xff\xfe", b"[" * 100_000,
        json.dumps(completion(finish_reason=None)).encode(), json.dumps(completion(finish_reason="abort")).encode(),
    ],
)  # fmt: skip
def test_what_is_no_whole_completion_may_be_tried_again(body):
    with pytest.raises(AttemptFailedError) as caught:
        read_answer(body)
    assert caught.value.blames_request
    assert len(str(caught.value)) < 200


def test_an_answer_that_a_filter_ended_is_the_rows_error():
    with pytest.raises(GenerationError, match="content_filter"):
        answer_of(finish_reason="content_filter")


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, {"error": {"message": "bad image"}}, "generation"),
        (422, {"detail": [{"loc": ["body"], "msg": "no"}]}, "generation"),
        (413, "too big", "too_large"),
        (400, {"error": {"message": "This model's maximum context length is 2048 tokens"}}, "prompt_too_long"),
        (400, {"error": {"type": "exceed_context_size_error", "message": "too many"}}, "prompt_too_long"),
    ],
)
def test_a_refused_request_is_the_rows_error(status, body, code):
    failure = failure_of(status, json.dumps(body).encode(), None)
    assert isinstance(failure, GenerationError)
    assert failure.code == code
    assert str(status) in str(failure)


@pytest.mark.parametrize(
    ("status", "blames"),
    [*((status, False) for status in (302, 401, 403, 404, 429, 502, 503)), (408, True), (500, True), (504, True)],
)
def test_other_statuses_may_be_tried_again(status, blames):
    failure = failure_of(status, b"", 3.0)
    assert isinstance(failure, AttemptFailedError)
    assert (failure.blames_request, failure.retry_after_seconds) == (blames, 3.0)


def test_error_messages_are_short_and_in_one_line():
    assert error_message(b'{"error": {"message": "no\\n  such model", "code": 404}}') == "no such model"
    assert error_message(b'{"error": "plain"}') == "plain"
    assert error_message(b'{"detail": "plain"}') == "plain"
    assert error_message(b"") == "no word of why"
    assert len(error_message(b"x" * 10_000)) == 300
    assert error_message(b'{"message": "\\ud800"}').encode()


def test_a_list_of_models_is_read_with_its_aliases():
    body = {"data": [{"id": "a", "owned_by": "llamacpp", "aliases": ["b"]}, {"id": "c"}]}
    assert read_models(json.dumps(body).encode()) == [ServedModel(("a", "b"), "llamacpp"), ServedModel(("c",), "")]
    assert read_models(b"nothing") == read_models(b"[]") == read_models(b'{"data": [3]}') == []


def test_delays_grow_to_a_bound_and_are_drawn_apart():
    longest = [delay_seconds(failures, 1.0, None, 180) for failures in range(1, 12)]
    shortest = [delay_seconds(failures, 0.0, None, 180) for failures in range(1, 12)]
    assert longest[:4] == [0.5, 1.0, 2.0, 4.0]
    assert longest[-1] == 30
    assert shortest == [delay / 2 for delay in longest]
    assert delay_seconds(10_000, 1.0, None, 180) == 30


def test_a_server_that_asks_for_time_gets_it_within_the_patience():
    assert delay_seconds(1, 0.0, 20.0, 180) == 20.25
    assert delay_seconds(1, 0.0, 86_400.0, 180) == 180.25


def test_retry_after_is_read_as_seconds_and_as_a_date():
    now = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_seconds("7", now) == 7
    assert retry_after_seconds("Tue, 01 Jan 2030 12:01:30 GMT", now) == 90
    assert retry_after_seconds("Tue, 01 Jan 2030 11:00:00 GMT", now) == 0
    assert [retry_after_seconds(text, now) for text in (None, "soon", "", "nan", "inf")] == [None] * 5


def test_a_silence_is_too_long_when_nobody_was_answered_and_nobody_waits_from_before():
    silence = Silence(10)
    assert not silence.is_too_long(99, [])
    silence.lasts(100)
    silence.lasts(105)
    assert not silence.is_too_long(109, [])
    assert silence.is_too_long(110, [])
    assert silence.is_too_long(110, [101.0, 109.0])
    assert not silence.is_too_long(110, [50.0, 109.0])
    silence.ends()
    assert not silence.is_too_long(500, [])


def test_a_png_loses_nothing_and_a_picture_without_colour_has_one_channel():
    coloured = page_pictures(3, seed=4)[2]
    grey = np.repeat(coloured[..., :1], 3, axis=2)
    for image, mode in ((coloured, "RGB"), (grey, "L")):
        file = picture_file(image, "png", 90)
        np.testing.assert_array_equal(read_picture(file), image)
        assert Image.open(io.BytesIO(file)).mode == mode
    assert read_picture(picture_file(coloured, "jpeg", 90)).shape == coloured.shape


def test_files_are_joined_and_split_without_loss():
    files = [b"", b"one", b"\x00" * 300]
    assert [bytes(file) for file in split_files(join_files(files))] == files
    for broken in (b"\x05\x00\x00\x00ab", b"\x01"):
        with pytest.raises(PrepareError, match="lengths"):
            split_files(broken)
    with pytest.raises(PrepareError, match="decoded"):
        read_picture(b"no picture")


def test_a_page_is_kept_whole_as_one_file():
    picture = page_pictures(1)[0]
    [row] = EncodePages(EncodeConfig())(table_of(page_row(picture))).to_pylist()
    assert row["pixel_encoding"] == "png"
    assert row["slice_shapes"] == [{"height_px": picture.shape[0], "width_px": picture.shape[1]}]
    assert row["slice_grids"] is None
    [file] = split_files(row["pixels"])
    np.testing.assert_array_equal(read_picture(file), picture)
    prompt = prompt_for("ocr", "pdf", None)
    assert (row["prompt_id"], row["prompt_sha256"]) == (prompt.prompt_id, prompt.sha256)
    assert (row["prompt_ids"], row["image_tokens"]) == (None, None)
    assert len(row["content_key"]) == 64


def test_the_cpu_engine_can_read_a_page_that_was_kept_for_a_server():
    picture = page_pictures(1)[0]
    [row] = EncodePages(EncodeConfig())(table_of(page_row(picture))).to_pylist()
    np.testing.assert_array_equal(page_image(row), picture)
    for broken in ({"pixels": None}, {"pixels": row["pixels"] + row["pixels"]}, {"pixels": b"abc"}):
        with pytest.raises(GenerationError):
            page_image(row | broken)
    with pytest.raises(GenerationError, match="shapes"):
        page_image(row | {"slice_shapes": [{"height_px": 1, "width_px": 1}]})


def test_a_content_key_tells_pixels_prompt_encoding_and_model_apart():
    first, second = page_pictures(2)

    def key(picture, **options):
        return EncodePages(EncodeConfig(**options))(table_of(page_row(picture)))["content_key"][0].as_py()

    keys = [
        key(first), key(second), key(first, encoding="jpeg"), key(first, encoding="jpeg", jpeg_quality=50),
        key(first, custom_prompt="Read."), key(first, decode_params='["other"]'),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(first) == key(first, jpeg_quality=50)


def test_a_segment_keeps_each_frame_as_a_file():
    frames = clip_frames(1)
    record = table_of(clip_row(frames, SliceConfig(max_slices=1)))
    [row] = EncodeClips(EncodeConfig())(record).to_pylist()
    files = split_files(row["pixels"])
    assert len(files) == len(frames) == len(row["slice_shapes"])
    shapes = [(shape["height_px"], shape["width_px"], 3) for shape in row["slice_shapes"]]
    assert [read_picture(file).shape for file in files] == shapes
    assert b"".join(read_picture(file).tobytes() for file in files) == record["pixels"][0].as_py()
    assert row["prompt_id"] == prompt_for(row["task"], "video").prompt_id


@pytest.mark.parametrize("operator", [EncodePages, EncodeClips])
def test_rows_that_no_server_reads_pass_with_their_errors(operator):
    picture = page_pictures(1)[0]
    rows = [page_row(picture, route="text_layer", image=None), page_row(picture, error=FAILED, recovered=[FAILED])]
    table = operator(EncodeConfig())(table_of(*rows))
    assert table.schema == RECORD
    assert [row["content_key"] for row in table.to_pylist()] == [None, None]
    assert table.to_pylist()[1]["error"]["error_code"] == "render"
    assert operator(EncodeConfig())(DECODED.empty_table()).schema == RECORD


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture
def ask(server):
    made = []

    def make(**options):
        sampling = Sampling(**options.pop("sampling", {}))
        config = AskEndpointConfig(server=ServerOptions(url=server.url), model_id=MODEL, sampling=sampling, **options)
        made.append(AskEndpoint(config))
        return made[-1]

    yield make
    for operator in made:
        operator.close()


def records(*rows):
    return EncodePages(EncodeConfig())(table_of(*rows))


def test_the_columns_of_an_answer_are_filled_and_what_nobody_knows_is_null(server, ask):
    server.answer = lambda seen: Reply(completion("# Title", reasoning_content="hm"))
    [row] = ask()(records(page_row(page_pictures(1)[0]))).to_pylist()
    assert row["error"] is None
    assert {name: row[name] for name in ("completion", "thought", "finish_reason", "attempt", "temperature")} == {
        "completion": "# Title", "thought": "hm", "finish_reason": "stop", "attempt": 1, "temperature": 0.0,
    }  # fmt: skip
    assert (row["prompt_tokens"], row["output_tokens"]) == (12, 3)
    assert (row["engine"], row["model_id"]) == ("endpoint", MODEL)
    assert json.loads(row["decode_params"])["max_new_tokens"] == 4096
    assert row["generate_ms"] > 0
    assert row["queue_ms"] >= 0
    unknown = ("tokens_saved", "mean_logprob", "weights_kind", "model_revision", "image_tokens", "prompt_ids", "status")
    assert {row[name] for name in unknown} == {None}


def test_the_server_gets_the_page_and_the_prompt(server, ask):
    picture = page_pictures(1)[0]
    ask()(records(page_row(picture)))
    [seen] = server.seen
    [(media_type, file)] = seen.pictures
    assert media_type == "image/png"
    np.testing.assert_array_equal(read_picture(file), picture)
    assert seen.prompt == prompt_for("ocr", "pdf", None).text
    assert seen.body["model"] == MODEL
    assert "Authorization" not in seen.headers


def test_the_same_content_draws_the_same_numbers_on_every_call(server, ask):
    pictures = page_pictures(2)
    operator = ask(sampling={"temperature": 0.7})
    operator(records(*[page_row(picture) for picture in pictures]))
    operator(records(page_row(pictures[0])))
    by_picture = {}
    for seen in server.seen:
        by_picture.setdefault(seen.pictures[0][1], set()).add(seen.body["seed"])
    assert [len(seeds) for seeds in by_picture.values()] == [1, 1]
    assert len(set.union(*by_picture.values())) == 2
    assert all(0 <= seen.body["seed"] < 2**31 for seen in server.seen)


def test_a_refused_row_costs_one_row_and_others_keep_their_order(server, ask):
    pictures = page_pictures(4)
    files = [picture_file(picture, "png", 90) for picture in pictures]

    def answer(seen):
        number = files.index(seen.pictures[0][1])
        return Reply({"error": {"message": "no"}}, 400) if number == 2 else Reply(completion(f"page {number}"))

    server.answer = answer
    found = ask()(records(*[page_row(picture) for picture in pictures])).to_pylist()
    assert [row["completion"] for row in found] == ["page 0", "page 1", None, "page 3"]
    error = found[2]["error"]
    assert (error["stage"], error["component"], error["error_code"]) == ("generate", "AskEndpoint", "generation")
    assert found[2]["engine"] == "endpoint"


def test_rows_without_a_question_pass_untouched(server, ask):
    picture = page_pictures(1)[0]
    table = records(page_row(picture, route="text_layer", image=None), page_row(picture, error=FAILED))
    assert ask()(table).to_pylist() == table.to_pylist()
    assert server.seen == []


def test_an_empty_batch_keeps_its_schema_and_a_missing_column_breaks_the_contract(ask):
    assert set(ask()(RECORD.empty_table()).schema) == set(RECORD)
    with pytest.raises(ContractError, match="content_key"):
        ask()(RECORD.empty_table().drop_columns(["content_key"]))


def test_a_row_whose_pictures_are_no_files_is_an_error_row(ask):
    table = records(page_row(page_pictures(1)[0]))
    index = table.schema.get_field_index("pixel_encoding")
    table = table.set_column(index, "pixel_encoding", [["zstd"]])
    [row] = ask()(table).to_pylist()
    assert "zstd" in row["error"]["message"]


def test_the_known_good_question_is_a_small_picture():
    body = request_body("m", known_good_question(), Sampling())
    assert len(body) < 3000
    [file] = known_good_question().files
    assert read_picture(file).shape == (224, 224, 3)
