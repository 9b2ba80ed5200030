"""Which failures are tried again, how often, after how long."""

import errno
import random
import socket

import aiohttp
import botocore.exceptions
import pytest

from operators.retries import RetryPolicy, http_status, is_unreachable, may_pass, passes_once_reached, retried
from schemas.errors import FetchError


def client_error(code, status):
    answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "GetObject")


def raised_from(error, cause):
    error.__cause__ = cause
    return error


def web_error(status):
    return aiohttp.ClientResponseError(None, (), status=status)


PASSING = [
    client_error("SlowDown", 503),
    client_error("RequestLimitExceeded", 400),
    client_error("InternalError", 500),
    client_error("RequestTimeout", 400),
    client_error("429", 429),
    client_error("ConditionalRequestConflict", 409),
    raised_from(OSError(errno.EBUSY, "busy"), client_error("SlowDown", 503)),
    web_error(503),
    web_error(429),
    raised_from(FileNotFoundError("url"), web_error(502)),
    raised_from(FileNotFoundError("url"), aiohttp.ServerDisconnectedError()),
    aiohttp.ClientPayloadError(),
    raised_from(aiohttp.ClientPayloadError(), aiohttp.http_exceptions.ContentLengthError("m")),
    TimeoutError(),
    ConnectionResetError(),
    socket.gaierror(socket.EAI_AGAIN, "the name server fails"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="u"),
    botocore.exceptions.FlexibleChecksumError(error_msg="m"),
    FetchError("m", retryable=True),
]
LASTING = [
    client_error("AccessDenied", 403),
    client_error("NoSuchBucket", 404),
    client_error("PreconditionFailed", 412),
    client_error("InvalidAccessKeyId", 403),
    raised_from(FileNotFoundError("key"), client_error("NoSuchKey", 404)),
    raised_from(FileNotFoundError("url"), web_error(404)),
    raised_from(FileNotFoundError("key"), KeyError("key")),
    FileNotFoundError("key"),
    web_error(401),
    web_error(501),
    PermissionError(),
    OSError(errno.ENOSPC, "full"),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.ParamValidationError(report="r"),
    ImportError(),
    ValueError(),
    raised_from(FileNotFoundError("url"), raised_from(OSError(), socket.gaierror(socket.EAI_NONAME, "no such host"))),
    FetchError("m"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again(error):
    assert may_pass(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_would_come_again_is_not(error):
    assert not may_pass(error)


def test_an_address_that_leads_nowhere_is_a_wrong_one_at_first_contact():
    for error in (
        ConnectionRefusedError(),
        socket.gaierror(),
        botocore.exceptions.EndpointConnectionError(endpoint_url="u"),
        raised_from(FileNotFoundError("url"), raised_from(aiohttp.ClientConnectionError(), ConnectionRefusedError())),
    ):
        assert is_unreachable(error)
        assert may_pass(error)
        assert not passes_once_reached(error)
    assert passes_once_reached(TimeoutError())


def test_the_status_is_that_of_the_cause():
    assert http_status(raised_from(OSError(), client_error("SlowDown", 503))) == 503
    assert http_status(raised_from(FileNotFoundError(), web_error(418))) == 418
    assert http_status(ValueError()) is None


def test_waits_grow_to_a_bound_and_differ_from_client_to_client():
    policy = RetryPolicy(max_attempts=12, first_wait_seconds=1.0, most_wait_seconds=8.0)
    clients = [list(policy.waits(random.Random(seed))) for seed in range(200)]
    assert all(len(waits) == 11 for waits in clients)
    longest = [max(waits[place] for waits in clients) for place in range(11)]
    shortest = [min(waits[place] for waits in clients) for place in range(11)]
    for place, bound in enumerate([1, 2, 4, 8, 8, 8, 8, 8, 8, 8, 8]):
        assert 0.9 * bound < longest[place] <= bound
        assert shortest[place] < 0.1 * bound


def test_attempts_end_by_their_number_and_the_last_failure_is_told():
    calls, waits = [], []

    def fail():
        calls.append(1)
        raise ConnectionResetError(str(len(calls)))

    with pytest.raises(ConnectionResetError, match="5"):
        retried(fail, RetryPolicy(max_attempts=5), wait=waits.append)
    assert (len(calls), len(waits)) == (5, 4)


def test_no_attempt_begins_after_its_time():
    calls = []

    def fail():
        calls.append(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        retried(fail, RetryPolicy(max_attempts=1000, most_seconds=0.0, first_wait_seconds=1.0), wait=lambda _: None)
    assert len(calls) == 1


def test_a_success_after_failures_is_a_success():
    failures = [TimeoutError(), client_error("SlowDown", 503)]

    def call():
        if failures:
            raise failures.pop()
        return "done"

    assert retried(call, RetryPolicy(), wait=lambda _: None) == "done"
