"""The error tree, and the error struct that travels in rows.

Classes are named by who must act::

    PagereelError
    ├── ConfigError            the author of the spec, before anything starts (exit status 2)
    ├── RecordError            nobody: the row is kept and an error row is written
    │   ├── FetchError
    │   ├── DecodeError
    │   ├── PrepareError
    │   │   └── PromptTooLongError
    │   ├── GenerationError
    │   └── ParseError
    ├── TransientError         the same call may work later: bounded retry
    │   ├── ServiceLostError   who runs the server that rows wait for: the run stops, the same command resumes
    │   └── WorkersBrokenError who runs the machines: workers die whatever they are given; the same command resumes
    ├── WorkerLostError        this process is unusable: it is replaced, the batch runs again
    └── ContractError          a programmer: a step broke its declared columns
"""

from typing import Any, Final

import pyarrow as pa

CATEGORY_OF_CODE: Final[dict[str, str]] = {
    "not_found": "source_unavailable",
    "forbidden": "source_unavailable",
    "unreadable": "source_unavailable",
    "encrypted": "password_required",
    "damaged": "corrupt_input",
    "no_pages": "corrupt_input",
    "page_missing": "corrupt_input",
    "empty": "corrupt_input",
    "no_frames": "corrupt_input",
    "truncated_stream": "corrupt_input",
    "not_pdf": "unsupported_format",
    "not_video": "unsupported_format",
    "not_image": "unsupported_format",
    "no_video_stream": "unsupported_format",
    "codec": "unsupported_format",
    "too_small": "unsupported_format",
    "unknown_format": "unsupported_format",
    "too_large": "policy",
    "too_many_pages": "policy",
    "too_long": "policy",
    "prompt_too_long": "policy",
    "memory_limit": "capacity",
    "out_of_memory": "capacity",
    "time_limit": "timeout",
    "render": "backend_failure",
    "crash": "backend_failure",
    "generation": "inference_failure",
    "abstained": "inference_failure",
    "unparsable": "inference_failure",
    "repetition": "repetition",
    "length": "truncated",
    "worker_died": "actor_died",
    "write": "target_unavailable",
    "internal": "internal",
}
"""Fine error code to category. Both vocabularies are closed."""

STAGES: Final = (
    "list", "fetch", "open", "render", "demux", "sample", "preprocess", "generate", "postprocess", "write",
)  # fmt: skip

ERROR: Final = pa.struct(
    [
        pa.field("stage", pa.string()),
        pa.field("component", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error_category", pa.string()),
        pa.field("exception_type", pa.string()),
        pa.field("message", pa.string()),
        pa.field("traceback", pa.string()),
        pa.field("exit_signal", pa.int16()),
        pa.field("retryable", pa.bool_()),
        pa.field("attempt", pa.int16()),
        pa.field("batch_id", pa.string()),
        pa.field("batch_size", pa.int32()),
        pa.field("bisect_depth", pa.int16()),
        pa.field("node_id", pa.string()),
        pa.field("actor_id", pa.string()),
    ]
)
"""One failure, as it travels in a row. `error` ends the row; `recovered` lists failures it survived. `attempt` is the
model's attempt at the record that failed, null where no answer was tried; the fields after it are those of a record
that ended its workers, and `attempt` is then the last of these."""


class PagereelError(Exception):
    """Root of every error that pagereel raises on purpose."""


class ConfigError(PagereelError):
    """The spec cannot run as written. Its author acts; nothing has started."""


class RecordError(PagereelError):
    """This row cannot be done, ever.

    Args:
        message: what was found, what was wanted, and which id.
        code: a key of `CATEGORY_OF_CODE`.
        stage: one of `STAGES`; the class default where not given.
        exit_signal: the signal that ended the decoder process, if one did.
        exception_type: the library's exception, where this one translates it.
        retryable: True when a later run may succeed with the same bytes.
    """

    default_code = "internal"
    default_stage = "open"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        stage: str | None = None,
        exit_signal: int | None = None,
        exception_type: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.stage = stage or self.default_stage
        self.exit_signal = exit_signal
        self.exception_type = exception_type
        self.retryable = retryable
        if self.code not in CATEGORY_OF_CODE:
            raise ContractError(f"error code {self.code!r} is not in the closed vocabulary")
        if self.stage not in STAGES:
            raise ContractError(f"stage {self.stage!r} is not in the closed vocabulary")


class FetchError(RecordError):
    """The bytes could not be read."""

    default_code = "unreadable"
    default_stage = "fetch"


class DecodeError(RecordError):
    """The bytes could not be turned into pages, pixels or frames."""

    default_code = "damaged"
    default_stage = "open"


class PrepareError(RecordError):
    """Pixels could not be sliced, or the prompt could not be built."""

    default_code = "internal"
    default_stage = "preprocess"


class PromptTooLongError(PrepareError):
    """The prompt does not fit the model's context."""

    default_code = "prompt_too_long"


class GenerationError(RecordError):
    """The model gave no usable completion for this row."""

    default_code = "generation"
    default_stage = "generate"


class ParseError(RecordError):
    """The completion does not follow the task's grammar."""

    default_code = "unparsable"
    default_stage = "postprocess"


class TransientError(PagereelError):
    """The same call may work later."""


class ServiceLostError(TransientError):
    """A server that rows wait for has answered nobody for long: no row is marked, and no further attempt is made."""


class WorkersBrokenError(TransientError):
    """Workers die whatever they are given: no row is marked, and no further attempt is made."""


class WorkerLostError(PagereelError):
    """This process is unusable, its batch must run in another."""


class ContractError(PagereelError):
    """A step broke its declared columns, or a closed vocabulary."""


def one_line(error: BaseException) -> str:
    """Return what an exception says in one line that UTF-8 can hold; its type where it says nothing."""
    return plain_text(" ".join(str(error).split())) or type(error).__name__


def plain_text(text: str) -> str:
    """Return `text` with what UTF-8 cannot hold, such as bytes of a file name, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def error_struct(
    error: RecordError, component: str, traceback: str | None = None, attempt: int | None = None
) -> dict[str, Any]:
    """Return `error` as a value of the `ERROR` struct.

    Args:
        error: the failure.
        component: the operator or function that failed.
        traceback: formatted traceback of the root cause, for `internal` errors only.
        attempt: which of the model's attempts failed; None where none was made.
    """
    cause = error.__cause__
    return {
        "stage": error.stage,
        "component": component,
        "error_code": error.code,
        "error_category": CATEGORY_OF_CODE[error.code],
        "exception_type": error.exception_type or type(cause or error).__name__,
        "message": plain_text(str(error)[:2000]),
        "traceback": traceback,
        "exit_signal": error.exit_signal,
        "retryable": error.retryable,
        "attempt": attempt,
        # Known of what ended its worker only.
        **dict.fromkeys(("batch_id", "batch_size", "bisect_depth", "node_id", "actor_id")),
    }
