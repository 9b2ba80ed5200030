"""When a call to a store or server is tried again: what may pass by itself, how often, and after how long."""

import errno
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

PASSING_CODES: Final = {
    "SlowDown", "ServiceUnavailable", "InternalError", "InternalFailure", "Throttling", "ThrottlingException",
    "ThrottledException", "RequestThrottled", "RequestThrottledException", "TooManyRequests", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "LimitExceededException", "PriorRequestNotComplete", "EC2ThrottledException",
    "RequestTimeout", "RequestTimeoutException", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody",
    "BadDigest", "XAmzContentSHA256Mismatch",
}  # fmt: skip
"""What S3 and its kin call an answer that a later request may not get. The last three say that a body did not arrive
as it was sent."""

PASSING_STATUSES: Final = {408, 425, 429}
LASTING_STATUSES: Final = {501, 505}
LASTING_ERRORS: Final = (
    PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ImportError, NotImplementedError,
    ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip
LASTING_NAMES: Final = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ParamValidationError",
    "ProfileNotFound", "UnknownProtocol", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError",
    "SSLCertVerificationError", "ClientConnectorCertificateError",
}  # fmt: skip
"""Exceptions of libraries that are not imported here, none of which a second try cures."""
LASTING_ERRNOS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG}
PASSING_NAMES: Final = {"ResponseParserError", "FlexibleChecksumError", "IncompleteReadError", "ClientPayloadError"}
"""Exceptions that say that an answer came in pieces."""
UNREACHABLE_NAMES: Final = {
    "EndpointConnectionError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectTimeoutError",
}  # fmt: skip


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is made, and for how long; waits grow twofold, each drawn between nothing and its bound.

    Attributes:
        max_attempts: calls in all.
        first_wait_seconds: bound of the wait before the second call.
        most_wait_seconds: no wait is longer.
        most_seconds: no further call after this time.
    """

    max_attempts: int = 8
    first_wait_seconds: float = 0.5
    most_wait_seconds: float = 20.0
    most_seconds: float = 300.0

    def waits(self, chance: random.Random | None = None) -> Iterator[float]:
        """Yield the seconds to wait before the second call, the third, and so on."""
        drawn = chance or random.Random()
        for number in range(self.max_attempts - 1):
            # All that were refused at one moment must not come back at one moment.
            yield drawn.uniform(0.0, min(self.most_wait_seconds, self.first_wait_seconds * 2**number))


def retried(
    call: Callable[[], T],
    policy: RetryPolicy,
    passes: Callable[[Exception], bool] | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """Return what `call` returns, calling again while it raises what may pass.

    Args:
        call: what to do; doing it twice must not hurt.
        policy: how often, and for how long.
        passes: whether an exception may not come again; `may_pass` where not given.
        wait: waits so many seconds.

    Raises:
        Exception: the last one of `call`.
    """
    again = passes or may_pass
    waits = policy.waits()
    deadline = time.monotonic() + policy.most_seconds
    while True:
        try:
            return call()
        # Each fsspec backend has exceptions of its own (botocore, aiohttp, google, azure), with no common root.
        except Exception as error:
            wait_seconds = next(waits, None)
            if wait_seconds is None or not again(error) or time.monotonic() + wait_seconds > deadline:
                raise
        wait(wait_seconds)


def may_pass(error: BaseException) -> bool:
    """Return whether the call that raised `error` may succeed when it is made again."""
    known = getattr(error, "retryable", None)
    if isinstance(known, bool):
        return known
    if any(type(found).__name__ in PASSING_NAMES for found in causes(error)):
        return True
    code, status = service_code(error), http_status(error)
    if code in PASSING_CODES:
        return True
    if status is not None:
        return status in PASSING_STATUSES or (status >= 500 and status not in LASTING_STATUSES)
    if code is not None:
        return False
    if any(type(found).__name__ in LASTING_NAMES or _is_no_host(found) for found in causes(error)):
        return False
    if isinstance(error, FileNotFoundError):
        # fsspec's web file system makes one of whatever befell its first look, a lost connection included.
        return error.__cause__ is not None and may_pass(error.__cause__)
    return not isinstance(error, LASTING_ERRORS) and getattr(error, "errno", None) not in LASTING_ERRNOS


def _is_no_host(error: BaseException) -> bool:
    """Return whether a host does not exist, as those of many old links; a name server that fails says otherwise."""
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME


def is_unreachable(error: BaseException) -> bool:
    """Return whether no connection came about: a wrong address, or a server that is down."""
    return any(
        isinstance(found, ConnectionRefusedError | socket.gaierror) or type(found).__name__ in UNREACHABLE_NAMES
        for found in causes(error)
    )


def passes_once_reached(error: BaseException) -> bool:
    """Return whether `error` may pass, for a first contact: there, an address that leads nowhere is a wrong one."""
    return may_pass(error) and not is_unreachable(error)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an exception, or one that it was raised from, carries.

    fsspec raises FileNotFoundError from whatever answer it got to its first look at a URL, 503 included.
    """
    for found in causes(error):
        # `code` is a status in google's errors alone: in aiohttp's it is also what a torn body is called.
        names = ("status", "status_code", "code") if type(found).__name__ == "HttpError" else ("status", "status_code")
        for name in names:
            status = getattr(found, name, None)
            if isinstance(status, int) and 100 <= status <= 599:
                return status
        status = _response(found).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    return None


def service_code(error: BaseException) -> str | None:
    """Return what an S3 service called its error, None where it said nothing."""
    for found in causes(error):
        code = _response(found).get("Error", {}).get("Code")
        if code:
            return str(code)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}
