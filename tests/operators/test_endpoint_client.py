"""The client against a real server on loopback that fails as servers do."""

import json
import socket
import threading

import pytest

from operators.endpoint import client as client_module
from operators.endpoint.answer import Answer, AttemptFailedError
from operators.endpoint.client import EndpointClient
from operators.endpoint.options import ServedModel, ServerOptions
from operators.endpoint.question import Question, Sampling, known_good_question
from schemas.errors import GenerationError, ServiceLostError
from tests.operators.chat_server import MODEL, ChatServer, Reply, completion, models

GOOD = Reply(completion("read"))
PICTURE = known_good_question().files[0]


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server


@pytest.fixture
def connect():
    """Return a function that makes a client, closed at the end."""
    made = []

    def make(url, **options):
        made.append(EndpointClient(ServerOptions(url=url, **options), MODEL, Sampling(max_new_tokens=8)))
        return made[-1]

    yield make
    for client in made:
        client.close()


def questions(*prompts):
    return [Question(prompt, (PICTURE,)) for prompt in prompts]


def in_turn(*replies, then=GOOD):
    """Answer each prompt with these replies, one after the other, and then with `then`."""
    counts = {}
    lock = threading.Lock()

    def answer(seen):
        with lock:
            number = counts[seen.prompt] = counts.get(seen.prompt, -1) + 1
        return replies[number] if number < len(replies) else then

    return answer


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_answers_come_in_the_order_of_the_questions(server, connect):
    server.answer = lambda seen: Reply(completion(seen.prompt.upper()), delay_seconds=0.1 if seen.prompt == "a" else 0)
    found = connect(server.url).ask(questions("a", "b", "c"))
    assert [answer.text for answer in found] == ["A", "B", "C"]
    assert found[0].generate_seconds >= 0.1


def test_so_many_requests_are_under_way_and_no_more(server, connect):
    """The third of three waits until all three are there; a fourth would be seen beside them."""
    together = threading.Barrier(3, timeout=20)

    def answer(seen):
        together.wait()
        return GOOD

    server.answer = answer
    found = connect(server.url, concurrency=3).ask(questions(*map(str, range(12))))
    assert all(isinstance(answer, Answer) for answer in found)
    assert server.most_at_once == 3


def test_two_batches_share_the_connections(server, connect):
    server.answer = lambda seen: Reply(completion(seen.prompt), delay_seconds=0.02)
    client = connect(server.url, concurrency=4)
    batches = [[f"{name}{number}" for number in range(10)] for name in "ab"]
    found = {}

    def ask(prompts):
        found[prompts[0]] = [answer.text for answer in client.ask(questions(*prompts))]

    threads = [threading.Thread(target=ask, args=(prompts,)) for prompts in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == batches or list(found.values()) == batches[::-1]
    assert server.most_at_once <= 4


@pytest.mark.parametrize(
    "bad",
    [
        Reply({"error": "busy"}, 503),
        Reply({"error": "slow down"}, 429),
        Reply("boom", 500),
        Reply("gateway", 502, content_type="text/html"),
        Reply(b"<html>Sign in</html>", content_type="text/html"),
        Reply(b'{"choices": [{"mess'),
        Reply(completion("read"), cut_after=20),
        Reply(completion("read"), cut_after=0),
        Reply(is_dropped=True),
        Reply(completion("re", finish_reason="abort")),
        Reply({}, 404),
    ],
    ids=["503", "429", "500", "502", "html", "half-json", "cut", "cut-at-once", "dropped", "abort", "404"],
)
def test_what_may_pass_is_tried_again(server, connect, bad):
    server.answer = in_turn(bad)
    [found] = connect(server.url).ask(questions("q"))
    assert found == Answer("read", None, "stop", 12, 3)
    assert len(server.seen) == 2
    assert server.seen[0].body == server.seen[1].body


def test_an_answer_of_another_content_type_is_read_all_the_same(server, connect):
    server.answer = lambda seen: Reply(completion("read"), content_type="text/plain; charset=latin-1")
    assert connect(server.url).ask(questions("q"))[0].text == "read"


def test_a_server_that_says_when_to_come_back_is_not_asked_before(server, connect):
    server.answer = in_turn(Reply({}, 429, headers={"Retry-After": "1"}))
    connect(server.url).ask(questions("q"))
    first, second = server.seen
    assert second.arrived - first.arrived >= 1.0


def test_a_slow_answer_is_given_up_and_asked_for_again(server, connect):
    server.answer = in_turn(Reply(completion("late"), delay_seconds=3))
    [found] = connect(server.url, timeout_seconds=0.5).ask(questions("q"))
    assert found.text == "read"
    assert len(server.seen) == 2


def test_an_answer_that_never_ends_is_given_up(server, connect, monkeypatch):
    monkeypatch.setattr(client_module, "MOST_RESPONSE_BYTES", 10_000)
    server.answer = in_turn(Reply(completion("x" * 20_000)))
    assert connect(server.url).ask(questions("q"))[0].text == "read"


def test_a_refused_request_is_not_tried_again(server, connect):
    server.answer = lambda seen: Reply({"error": {"message": "bad picture"}}, 400) if seen.prompt == "b" else GOOD
    first, second, third = connect(server.url).ask(questions("a", "b", "c"))
    assert isinstance(second, GenerationError)
    assert "bad picture" in str(second)
    assert not second.retryable
    assert (first.text, third.text) == ("read", "read")
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("bad", "code", "retryable"),
    [
        (Reply("boom", 500), "generation", False),
        (Reply(is_dropped=True), "generation", False),
        (Reply(completion("late"), delay_seconds=1), "time_limit", True),
        (Reply({"error": "too much"}, 429), "generation", True),
    ],
    ids=["500", "dropped", "slow", "turned-away"],
)
def test_a_request_on_which_the_server_always_fails_is_told_from_a_server_that_fails(
    server, connect, bad, code, retryable
):
    server.answer = lambda seen: bad if seen.prompt == "poison" else GOOD
    client = connect(server.url, most_attempts=2, timeout_seconds=0.4, patience_seconds=0)
    [found] = client.ask(questions("poison"))
    assert isinstance(found, GenerationError)
    assert (found.code, found.retryable) == (code, retryable)
    assert len(server.seen) == 2
    assert server.probes > 0
    assert client.ask(questions("fine"))[0].text == "read"


def test_a_request_that_fells_the_server_does_not_take_others_with_it(server, connect):
    """Whenever the poison comes, every request that is under way is cut off."""
    falls = 0
    changed = threading.Condition()

    def answer(seen):
        nonlocal falls
        with changed:
            if seen.prompt == "poison":
                falls += 1
                changed.notify_all()
                return Reply(is_dropped=True)
            before = falls
            fell = changed.wait_for(lambda: falls > before, timeout=0.8)
        return Reply(is_dropped=True) if fell else GOOD

    server.answer = answer
    found = connect(server.url, most_attempts=3).ask(questions(*"abcdef", "poison"))
    assert isinstance(found[-1], GenerationError)
    assert [answer.text for answer in found[:-1]] == ["read"] * 6
    assert falls == 3


def test_no_row_is_blamed_while_the_known_good_request_fails_too(server, connect):
    """The server fails on everything for longer than a request may fail alone, and then works again."""
    server.probe_reply = Reply("boom", 500)
    server.answer = in_turn(*[Reply("boom", 500)] * 3)
    found = connect(server.url, most_attempts=2).ask(questions("a", "b"))
    assert [answer.text for answer in found] == ["read", "read"]
    assert server.probes == 2


def test_a_server_that_is_gone_stops_the_work_and_blames_nobody(connect):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServiceLostError, match=r"no answer for 0\.2 s; the last attempt: no connection: Conn"):
        connect(url, patience_seconds=0.2).ask(questions("a", "b", "c"))


def test_a_server_that_only_turns_away_counts_as_gone(server, connect):
    server.probe_reply = Reply({"error": "quota used up"}, 429, headers={"Retry-After": "3600"})
    server.answer = lambda seen: server.probe_reply
    with pytest.raises(ServiceLostError, match="429: quota used up"):
        connect(server.url, patience_seconds=0.3).ask(questions("a"))


def test_a_server_that_is_busy_with_others_is_not_gone(server, connect):
    """One request is turned away for longer than the patience, while another is being answered."""
    turned_away = threading.Event()
    count = 0

    def answer(seen):
        nonlocal count
        if seen.prompt == "long":
            turned_away.wait(20)
            return GOOD
        count += 1
        if count < 4:
            return Reply({"error": "busy"}, 503)
        turned_away.set()
        return GOOD

    server.answer = answer
    client = connect(server.url, patience_seconds=0.1)
    found = {}
    thread = threading.Thread(target=lambda: found.update(long=client.ask(questions("long"))))
    thread.start()
    while not server.seen:
        turned_away.wait(0.01)
    assert client.ask(questions("short"))[0].text == "read"
    thread.join()
    assert found["long"][0].text == "read"
    assert count == 4


def test_a_server_that_comes_back_goes_on(connect):
    port = free_port()
    client = connect(f"http://127.0.0.1:{port}/v1", patience_seconds=60)
    found = []
    thread = threading.Thread(target=lambda: found.extend(client.ask(questions("a", "b"))))
    thread.start()
    thread.join(0.6)
    assert thread.is_alive()
    with ChatServer(port=port):
        thread.join(40)
    assert [answer.text for answer in found] == ["read", "read"]


def test_a_redirect_is_not_followed(server, connect):
    with ChatServer() as other:
        server.probe_reply = Reply({}, 307, headers={"Location": f"{other.url}/chat/completions"})
        server.answer = lambda seen: server.probe_reply
        client = connect(server.url, key="hush-hush", patience_seconds=0)
        with pytest.raises(ServiceLostError, match="307"):
            client.ask(questions("a"))
        assert other.seen == []


def test_the_key_is_sent_and_never_said(server, connect):
    secret = "sk-hush-hush"
    server.answer = lambda seen: Reply({"error": f"not allowed: {seen.headers['Authorization']}"}, 400)
    client = connect(server.url, key=secret)
    [found] = client.ask(questions("a"))
    assert server.seen[0].headers["Authorization"] == f"Bearer {secret}"
    assert str(found) == "the server answers 400: not allowed: Bearer ***"
    server.models_reply = Reply({"error": f"wrong key {secret}"}, 401)
    with pytest.raises(AttemptFailedError) as caught:
        client.served_models()
    assert str(caught.value) == "the server answers 401: wrong key ***"
    assert secret not in repr(client._options)


def test_a_server_may_keep_no_list_of_models(server, connect):
    client = connect(server.url)
    assert client.served_models() == [ServedModel((MODEL,), "tests")]
    for reply in (Reply({}, 404), Reply("boom", 500), Reply(b"<html>")):
        server.models_reply = reply
        assert client.served_models() == []
    server.models_reply = models("a", "b", owner="vllm")
    assert client.served_models() == [ServedModel(("a",), "vllm"), ServedModel(("b",), "vllm")]


def test_the_known_good_question_is_put_once(server, connect):
    client = connect(server.url)
    assert client.try_once() is None
    server.probe_reply = Reply({"error": {"message": "this model takes no pictures"}}, 400)
    assert client.try_once() == "the server answers 400: this model takes no pictures"
    assert (server.probes, server.seen) == (2, [])


def test_many_large_pictures_arrive_whole(server, connect):
    files = tuple(bytes([number]) * 3_000_000 for number in range(3))
    connect(server.url).ask([Question("q", files)])
    assert [file for _, file in server.seen[0].pictures] == list(files)
    assert len(json.dumps(server.seen[0].body)) > 12_000_000
