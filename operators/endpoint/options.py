"""What is known of a server before it is asked anything."""

from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ServerOptions(BaseModel):
    """Where a server is, and how it is treated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, Field(description="Root of its addresses, such as http://host:8000/v1.")]
    key: Annotated[SecretStr | None, Field(description="Sent as a bearer token; null: none.")] = None
    concurrency: Annotated[int, Field(ge=1, description="Requests that are under way at the same time.")] = 16
    timeout_seconds: Annotated[float, Field(gt=0, description="Time for one attempt, the whole answer included.")] = (
        600.0
    )
    patience_seconds: Annotated[
        float, Field(ge=0, description="The server counts as gone when for so long it answered nobody.")
    ] = 180.0
    most_attempts: Annotated[
        int, Field(ge=1, description="Failures that a request may have caused, before a known good one decides.")
    ] = 4


class ServedModel(NamedTuple):
    """One entry of a server's list of models.

    Attributes:
        names: under which it answers; the first is its own.
        owner: what the server says of itself, such as `vllm`; empty where it does not.
    """

    names: tuple[str, ...]
    owner: str
