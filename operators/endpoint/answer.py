"""What comes back: a chat completion, or why there is none."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Final

from operators.parse.completions import split_thought
from schemas.errors import GenerationError, RecordError, plain_text

FINISH_REASONS: Final = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "repetition": "repetition",
}
"""The server's word to ours."""

BROKEN_OFF: Final = (None, "abort", "error")
"""Words of a server that gave up an answer: the same request may do better."""

TOO_LONG_WORDS: Final = (
    "context length",
    "context size",
    "context window",
    "context_length_exceeded",
    "exceed_context",
)

ROW_STATUSES: Final = frozenset(range(400, 500)) - {401, 403, 404, 405, 407, 408, 409, 425, 429}
"""Answers to one request as it was put. The others say something of the server: a key, an address, its load."""

BUSY_STATUSES: Final = (429, 502, 503)

MESSAGE_CHARS: Final = 300


class AttemptFailedError(Exception):
    """One attempt gave no answer; another may.

    Attributes:
        blames_request: whether the request itself may be the cause.
        is_timeout: whether time ran out over it.
        retry_after_seconds: how long the server asks to wait; None where it does not say.
    """

    def __init__(
        self,
        message: str,
        *,
        blames_request: bool,
        is_timeout: bool = False,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.blames_request = blames_request
        self.is_timeout = is_timeout
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Answer:
    """A completion. What the server did not tell is None.

    Attributes:
        text: the answer without its thought.
        thought: what came before it.
        finish_reason: `stop`, `length` or `repetition`.
        prompt_tokens: with those of the pictures.
        output_tokens: with those of the thought.
        mean_logprob: over the tokens that the server gave probabilities of.
        queue_seconds: from the call until the attempt that succeeded.
        generate_seconds: of that attempt.
    """

    text: str
    thought: str | None
    finish_reason: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    mean_logprob: float | None = None
    queue_seconds: float = field(default=0.0, compare=False)
    generate_seconds: float = field(default=0.0, compare=False)


Outcome = Answer | RecordError
"""What became of a question."""


def read_answer(body: bytes) -> Answer:
    """Return the completion in the body of a response with status 200.

    Raises:
        AttemptFailedError: it is no chat completion, or was given up.
        GenerationError: the server ended it for a reason of its own, such as a filter.
    """
    try:
        value = json.loads(body)
        choice = value["choices"][0]
        message = choice["message"]
        text, thought = _text(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
        reason = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        found = shortened(body.decode("utf-8", "replace"), 80)
        raise AttemptFailedError(f"the answer is no chat completion: {found}", blames_request=True) from error
    if reason in BROKEN_OFF:
        raise AttemptFailedError(f"the server broke the answer off ({reason})", blames_request=True)
    if reason not in FINISH_REASONS:
        raise GenerationError(f"the server ended the answer with {shortened(str(reason), 40)!r}")
    answer, thought = split_thought(text, thought if isinstance(thought, str) and thought else None)
    usage = value.get("usage")
    return Answer(
        text=plain_text(answer.strip()),
        thought=None if thought is None else plain_text(thought.strip()),
        finish_reason=FINISH_REASONS[reason],
        prompt_tokens=_count(usage, "prompt_tokens"),
        output_tokens=_count(usage, "completion_tokens"),
        mean_logprob=_mean_logprob(choice.get("logprobs")),
    )


def _text(content: Any) -> str:
    """Return the text of a message's content, which may come in parts; none where all was thought."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return content


def _count(usage: Any, name: str) -> int | None:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**31 else None


def _mean_logprob(logprobs: Any) -> float | None:
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def failure_of(status: int, body: bytes, retry_after_seconds: float | None) -> RecordError | AttemptFailedError:
    """Return what a response without an answer means.

    Args:
        status: anything but 200.
        body: of the response, or its beginning.
        retry_after_seconds: what its `Retry-After` says.
    """
    said = f"the server answers {status}: {error_message(body)}"
    if status not in ROW_STATUSES:
        blames = status >= 500 and status not in BUSY_STATUSES
        return AttemptFailedError(
            said, blames_request=blames or status == 408, is_timeout=status in (408, 504),
            retry_after_seconds=retry_after_seconds,
        )  # fmt: skip
    text = body.decode("utf-8", "replace").lower()
    if any(word in text for word in TOO_LONG_WORDS):
        return GenerationError(said, code="prompt_too_long")
    return GenerationError(said, code="too_large" if status == 413 else None)


def error_message(body: bytes) -> str:
    """Return what the body of an error says, in one short line."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return shortened(text) or "no word of why"
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def shortened(text: str, most_chars: int = MESSAGE_CHARS) -> str:
    """Return `text` in one line of at most so many characters."""
    line = plain_text(" ".join(text.split()))
    return line if len(line) <= most_chars else line[: most_chars - 3] + "..."
