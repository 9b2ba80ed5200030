"""Talks to a server: so many requests at once, each tried again until it is answered or found at fault."""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import aiohttp

from operators.endpoint.answer import (
    Answer,
    AttemptFailedError,
    Outcome,
    error_message,
    failure_of,
    read_answer,
    shortened,
)
from operators.endpoint.options import ServedModel, ServerOptions
from operators.endpoint.patience import Silence, delay_seconds, retry_after_seconds
from operators.endpoint.question import Question, Sampling, known_good_question, request_body
from schemas.errors import GenerationError, RecordError, ServiceLostError, one_line

CONNECT_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 120.0
"""For an answer of a few tokens, behind the requests that wait already or while the server loads the model."""

PROBE_TOKENS: Final = 4

ALONE_FROM: Final = 2
"""Failures that a request may have caused, after which it waits for other such requests."""

MOST_RESPONSE_BYTES: Final = 64 * 2**20
"""Of an answer of 32,768 tokens with the probability of each, about eight times."""

T = TypeVar("T")


class EndpointClient:
    """Asks one server from any number of threads; its requests run on a thread of their own.

    Args:
        options: the server.
        model_id: the model that is asked.
        sampling: how it chooses tokens.
    """

    def __init__(self, options: ServerOptions, model_id: str = "", sampling: Sampling | None = None) -> None:
        self._options = options
        self._model_id = model_id
        self._sampling = sampling or Sampling()
        self._silence = Silence(options.patience_seconds)
        self._sent: dict[object, float] = {}
        self._random = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._suspects = asyncio.Lock()
        self._slots = asyncio.Semaphore(options.concurrency)
        self._session = self._wait_for(self._open())

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """Return what became of each question, in their order.

        Raises:
            ServiceLostError: the server answers nobody any more; nothing is said of any question.
        """
        return self._wait_for(self._ask_all(questions))

    def try_once(self) -> str | None:
        """Put the known good question once; return None when it is answered, else in one line why not."""
        return self._wait_for(self._try_known_good())

    def served_models(self) -> list[ServedModel]:
        """Return the models that the server lists; none where it keeps no list.

        Raises:
            AttemptFailedError: the server does not answer, or refuses us.
        """
        return self._wait_for(self._served_models())

    def close(self) -> None:
        """End the connections and the thread."""
        if not self._loop.is_closed():
            self._wait_for(self._session.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt of this thread ends the requests too.
            future.cancel()
            raise

    async def _open(self) -> aiohttp.ClientSession:
        headers = {"Accept": "application/json"}
        if self._options.key is not None:
            headers["Authorization"] = f"Bearer {self._options.key.get_secret_value()}"
        return aiohttp.ClientSession(
            # A kept connection may be closed by the server while the next request is on its way, which looks like a
            # server that broke off over it. A new one costs a fraction of a millisecond, an answer takes seconds.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=self._timeout(self._options.timeout_seconds),
            headers=headers,
        )

    def _timeout(self, seconds: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=seconds, sock_connect=min(CONNECT_SECONDS, seconds))

    async def _ask_all(self, questions: Sequence[Question]) -> list[Outcome]:
        tasks = [asyncio.ensure_future(self._ask(question)) for question in questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, question: Question) -> Outcome:
        arrived = time.perf_counter()
        # The slot is kept while waiting to try again: a server that is overloaded sees fewer requests, not more.
        async with self._slots:
            failures = suspicions = 0
            while True:
                began = time.perf_counter()
                # Requests that were under way when the server fell are all suspect: from now on one at a time, so that
                # the one that fells it does not take the others with it.
                suspects = self._suspects if suspicions >= ALONE_FROM else contextlib.nullcontext()
                try:
                    async with suspects:
                        answer = await self._attempt(question, self._sampling, self._options.timeout_seconds)
                except RecordError as error:
                    self._silence.ends()
                    return error
                except AttemptFailedError as failure:
                    failures += 1
                    suspicions = await self._suspicions(failure, suspicions)
                    if suspicions >= self._options.most_attempts:
                        return at_fault(failure, failures)
                    asked = failure.retry_after_seconds
                else:
                    self._silence.ends()
                    seconds = time.perf_counter() - began
                    return dataclasses.replace(answer, queue_seconds=began - arrived, generate_seconds=seconds)
                patience = self._options.patience_seconds
                await asyncio.sleep(delay_seconds(failures, self._random.random(), asked, patience))

    async def _suspicions(self, failure: AttemptFailedError, before: int) -> int:
        """Return how often a request may have been the cause of its failures; a known good one decides in the end.

        Raises:
            ServiceLostError: the server is gone.
        """
        self._silence.lasts(time.monotonic())
        is_too_long = self._silence.is_too_long(time.monotonic(), self._sent.values())
        # After a long silence it may be that only this request was asked, and is turned away each time.
        suspicions = before + (failure.blames_request or is_too_long)
        if not is_too_long and suspicions < self._options.most_attempts:
            return suspicions
        if await self._try_known_good() is None:
            return suspicions
        if is_too_long:
            patience = self._options.patience_seconds
            raise ServiceLostError(
                f"the endpoint {self._options.url} gave no answer for {patience:g} s; the last attempt: {failure}"
            )
        return 0

    async def _try_known_good(self) -> str | None:
        sampling = self._sampling.model_copy(update={"max_new_tokens": PROBE_TOKENS})
        seconds = min(PROBE_SECONDS, self._options.timeout_seconds)
        try:
            await self._attempt(known_good_question(), sampling, seconds)
        except (AttemptFailedError, RecordError) as error:
            return one_line(error)
        self._silence.ends()
        return None

    async def _attempt(self, question: Question, sampling: Sampling, seconds: float) -> Answer:
        """Send a request once.

        Raises:
            AttemptFailedError: no answer came; another attempt may bring one.
            RecordError: the server refuses this request.
        """
        body = request_body(self._model_id, question, sampling)
        status, found, wait_seconds = await self._exchange("POST", "/chat/completions", seconds, body)
        try:
            if 200 <= status < 300:
                return read_answer(found)
            raise failure_of(status, found, wait_seconds)
        except (AttemptFailedError, RecordError) as error:
            raise self._without_key(error) from None

    async def _exchange(
        self, method: str, path: str, seconds: float, body: bytes | None = None
    ) -> tuple[int, bytes, float | None]:
        """Return status, body and `Retry-After` of a response.

        Raises:
            AttemptFailedError: there is no whole response.
        """
        attempt = object()
        self._sent[attempt] = time.monotonic()
        try:
            # A redirect is not followed: it could carry the key to another host.
            async with self._session.request(
                method,
                self._options.url + path,
                data=None if body is None else io.BytesIO(body),
                headers={"Content-Type": "application/json"} if body is not None else None,
                timeout=self._timeout(seconds),
                allow_redirects=False,
            ) as response:
                asked = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
                return response.status, await _bounded_body(response), asked
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise AttemptFailedError(f"no connection: {_reason(error)}", blames_request=False) from error
        except TimeoutError as error:
            said = f"no whole answer within {seconds:g} s"
            raise AttemptFailedError(said, blames_request=True, is_timeout=True) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            said = f"the connection broke off: {type(error).__name__}: {shortened(str(error))}"
            raise AttemptFailedError(said, blames_request=True) from error
        finally:
            del self._sent[attempt]

    def _without_key(self, error: T) -> T:
        """Return an error whose message does not repeat the key, as some servers do."""
        secret = self._options.key.get_secret_value() if self._options.key else ""
        if secret and isinstance(error, Exception) and secret in str(error):
            error.args = (str(error).replace(secret, "***"), *error.args[1:])
        return error

    async def _served_models(self) -> list[ServedModel]:
        seconds = min(CONNECT_SECONDS, self._options.timeout_seconds)
        status, body, _ = await self._exchange("GET", "/models", seconds)
        if status in (401, 403):
            said = AttemptFailedError(f"the server answers {status}: {error_message(body)}", blames_request=False)
            raise self._without_key(said)
        return read_models(body) if status == 200 else []


def _reason(error: OSError) -> str:
    """Return why a connection could not be made, without the library's own words where the system has some."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else shortened(str(error))


def at_fault(failure: AttemptFailedError, failures: int) -> GenerationError:
    """Return the error of a request that fails where another is answered; what hangs on load may pass."""
    return GenerationError(
        f"the server answers other requests, and failed on this one {failures} times; at last: {failure}",
        code="time_limit" if failure.is_timeout else None,
        retryable=failure.is_timeout or not failure.blames_request,
    )


def read_models(body: bytes) -> list[ServedModel]:
    """Return the models of a list in OpenAI's form; none where it cannot be read."""
    try:
        entries = json.loads(body)["data"]
        return [
            ServedModel((entry["id"], *(entry.get("aliases") or ())), str(entry.get("owned_by") or ""))
            for entry in entries
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


async def _bounded_body(response: aiohttp.ClientResponse) -> bytes:
    """Return the body of a response.

    Raises:
        AttemptFailedError: it is too large.
    """
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MOST_RESPONSE_BYTES:
            raise AttemptFailedError(f"an answer of more than {MOST_RESPONSE_BYTES} bytes", blames_request=True)
        parts.append(part)
    return b"".join(parts)
