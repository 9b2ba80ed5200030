"""What a failure inside the model means: less memory, a lost device, or one bad request."""

from typing import Final

import torch

from schemas.errors import GenerationError, RecordError, WorkerLostError

OUT_OF_MEMORY_TEXTS: Final = ("out of memory", "not enough memory", "can't allocate memory")
DEVICE_FAULT_TEXTS: Final = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")

FOREIGN_ERRORS: Final = (RuntimeError, ValueError, IndexError, MemoryError)
"""What a model's code may raise for one batch and not for another."""

FAILURES: Final = (RecordError, *FOREIGN_ERRORS)
"""The same, and what it raises on purpose."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of the host or the device ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def raise_if_lost(error: BaseException) -> None:
    """Raise `WorkerLostError` when `error` leaves the device unusable for this process."""
    if is_out_of_memory(error):
        return
    if isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in DEVICE_FAULT_TEXTS):
        raise WorkerLostError(f"the device failed: {first_line(error)}") from error


def survived(error: Exception) -> Exception:
    """Return `error` without the frames that it came through: they hold the tensors of what failed.

    Raises:
        WorkerLostError: this process cannot go on.
    """
    raise_if_lost(error)
    return error.with_traceback(None)


def translate(error: BaseException) -> RecordError:
    """Return the error row's view of a failure of one request alone."""
    if isinstance(error, RecordError):
        return error
    code = "out_of_memory" if is_out_of_memory(error) else "generation"
    failure = GenerationError(
        f"the model failed on this request alone: {first_line(error)}",
        code=code,
        exception_type=type(error).__name__,
        retryable=code == "out_of_memory",
    )
    failure.__cause__ = error
    return failure


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
