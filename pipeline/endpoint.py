"""The server that a run asks: found and tried before anything starts."""

import os
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr, ValidationError

from operators.endpoint.address import endpoint_url
from operators.endpoint.answer import AttemptFailedError
from operators.endpoint.ask import AskEndpointConfig
from operators.endpoint.options import ServedModel, ServerOptions
from operators.endpoint.question import Sampling
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import StackedConfig
from pipeline.spec import RunSpec
from schemas.errors import ConfigError

KEY_VARIABLE: Final = "PAGEREEL_ENDPOINT_KEY"

WHOLE_LISTS: Final = ("vllm", "sglang", "llamacpp")
"""Servers that list all they serve, and call themselves so. Of these the last two answer to any name."""

CHEAP_LOGPROBS: Final = WHOLE_LISTS
"""Servers that give the probabilities of tokens on the way; others refuse the question or ignore it."""

FOREIGN_OPTIONS: Final = (
    "revision", "device", "dtype", "downsample", "small_image_upsize", "max_slices", "video_max_slices", "use_image_id",
    "stack_frames", "packing",
)  # fmt: skip
"""What a server decides, or was started with."""

MAX_NEW_TOKENS: Final = 4096
"""As for the other engines, where neither the command nor the model says."""

FRAME_BYTES: Final = 3.3
"""Of a pixel, with what rounding its sides may add."""


@dataclass(frozen=True)
class Server:
    """A server that answered.

    Attributes:
        url: root of its addresses.
        key: what it is opened with, from the environment; never written down.
        model_id: the model's name there.
        gives_logprobs: whether it tells the probabilities of tokens.
    """

    url: str
    key: SecretStr | None
    model_id: str
    gives_logprobs: bool


def find_server(spec: RunSpec) -> Server:
    """Return the server of `spec`, once it has answered a question about a small picture.

    Raises:
        ConfigError: there is none at the address, it does not serve the model, or it does not see pictures.
    """
    if spec.endpoint is None:
        raise ConfigError("--engine endpoint needs the address of a server: --endpoint http://host:8000/v1")
    url = endpoint_url(spec.endpoint)
    for name in FOREIGN_OPTIONS:
        if getattr(spec, name) not in (None, "auto"):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is nothing that a run with --endpoint decides: the server does")
    return try_server(url, server_key(), spec.model, sampling_of(spec))


def server_key() -> SecretStr | None:
    """Return the key from the environment, None where none is set."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return SecretStr(key) if key else None


def sampling_of(spec: RunSpec) -> Sampling:
    """Return how the server is to choose tokens, but for their probabilities."""
    return Sampling(
        max_new_tokens=spec.max_new_tokens or MAX_NEW_TOKENS, temperature=spec.temperature, thinking=spec.thinking
    )


def try_server(url: str, key: SecretStr | None, model: str | None, sampling: Sampling) -> Server:
    """Return the server at `url` with the model it is to use, after it has answered once.

    Raises:
        ConfigError: see `find_server`.
    """
    # Here and not above: a run without a server does not pay for its client.
    from operators.endpoint.client import EndpointClient

    options = ServerOptions(url=url, key=key)
    lister = EndpointClient(options)
    try:
        served = lister.served_models()
    except AttemptFailedError as error:
        hint = f" (its key comes from {KEY_VARIABLE})" if "answers 401" in str(error) else ""
        raise ConfigError(f"the endpoint {url} cannot be used: {error}{hint}") from error
    finally:
        lister.close()
    model_id, owner = choose_model(url, served, model)
    gives_logprobs = owner in CHEAP_LOGPROBS
    asker = EndpointClient(options, model_id, sampling.model_copy(update={"logprobs": gives_logprobs}))
    try:
        refusal = asker.try_once()
    finally:
        asker.close()
    if refusal is not None:
        serves = f"; it lists {_names(served)}" if served and owner is None else ""
        raise ConfigError(f"the endpoint {url} does not answer a picture with {model_id!r}: {refusal}{serves}")
    return Server(url, key, model_id, gives_logprobs)


def choose_model(url: str, served: list[ServedModel], model: str | None) -> tuple[str, str | None]:
    """Return the model's name on the server, and what the server calls itself where it lists that model.

    Raises:
        ConfigError: none is named and not exactly one is served, or the server certainly does not have it.
    """
    if model is None:
        if len(served) == 1:
            return served[0].names[0], served[0].owner
        listed = f"it lists {_names(served)}" if served else "it lists none"
        raise ConfigError(f"the endpoint {url} needs the name of a model: --model NAME ({listed})")
    for entry in served:
        if model in entry.names:
            return model, entry.owner
    if served and all(entry.owner in WHOLE_LISTS for entry in served):
        raise ConfigError(f"the endpoint {url} does not serve {model!r}; it lists {_names(served)}")
    return model, None


def _names(served: list[ServedModel], most: int = 5) -> str:
    names = [entry.names[0] for entry in served]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def frame_sampling(spec: RunSpec) -> StackedConfig:
    """Return how frames are taken for a server: one after the other, none on a canvas.

    Raises:
        ConfigError: a number is out of range.
    """
    asked: dict[str, Any] = {"fps": spec.fps, "max_frames": spec.max_frames}
    try:
        return StackedConfig(**{name: value for name, value in asked.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['msg']}".replace("_", "-")) from error


def frame_size(spec: RunSpec) -> SliceConfig:
    """Return how frames are reduced for a server: by their area alone, to whole pixels, and never enlarged."""
    return SliceConfig(
        max_slices=1, slice_side_px=spec.endpoint_frame_px, patch_px=1, query_count=1, small_image_upsize="never"
    )


def segment_bytes(spec: RunSpec) -> float:
    """Return the bytes of pixels that a segment of full length carries at most, about."""
    return frame_sampling(spec).most_pictures(spec.segment_seconds) * spec.endpoint_frame_px**2 * FRAME_BYTES


def ask_config(spec: RunSpec, server: Server) -> AskEndpointConfig:
    """Return the options of the step that asks."""
    return AskEndpointConfig(
        server=ServerOptions(
            url=server.url,
            key=server.key,
            concurrency=spec.endpoint_concurrency,
            timeout_seconds=spec.endpoint_timeout_seconds,
            patience_seconds=spec.endpoint_patience_seconds,
        ),
        model_id=server.model_id,
        sampling=sampling_of(spec).model_copy(update={"logprobs": server.gives_logprobs}),
        custom_prompt=spec.prompt,
    )


def picture_settings(spec: RunSpec) -> dict[str, Any]:
    """Return what determines the pictures that a server is sent, beyond their rendering."""
    quality = spec.endpoint_jpeg_quality if spec.endpoint_image == "jpeg" else None
    return {"encoding": spec.endpoint_image, "quality": quality}
