"""An object that every worker of a run reaches, whatever process or machine it is in."""

from typing import Any, Protocol


class Shared(Protocol):
    """Reaches one object from anywhere; whoever holds this may be pickled into a worker."""

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method returns.

        Raises:
            TransientError: the object cannot be reached now.
        """

    def close(self) -> None:
        """End the object; what it remembers is lost."""


class LocalShared:
    """The object itself, for workers of this process."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method returns."""
        return getattr(self._made, method)(*arguments)

    def close(self) -> None:
        """Nothing to end."""
