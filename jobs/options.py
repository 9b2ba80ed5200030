"""Command-line options made from the fields of `RunSpec`, so that both say the same."""

import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from pipeline.spec import RunSpec

ENVIRONMENT = {"password": "PAGEREEL_PASSWORD", "address": "RAY_ADDRESS"}
"""Secrets and addresses may come from the environment; a job on a Ray cluster finds RAY_ADDRESS set."""

ARGUMENT_FIELDS = ("task", "inputs", "output")
GROUPS = {
    "What to read": (
        "pages", "start_seconds", "stop_seconds", "password", "text_layer", "limit", "retry_failed",
    ),
    "Model": (
        "engine", "model", "revision", "device", "dtype", "prompt", "thinking", "max_new_tokens", "temperature",
        "constrain", "attempts",
    ),
    "Pages": ("dpi", "max_pixels", "downsample", "small_image_upsize", "max_slices", "use_image_id", "second_look"),
    "Videos": ("segment_seconds", "fps", "max_frames", "stack_frames", "packing", "max_packing", "video_max_slices"),
    "Server": (
        "endpoint", "endpoint_concurrency", "endpoint_timeout_seconds", "endpoint_patience_seconds", "endpoint_image",
        "endpoint_jpeg_quality", "endpoint_frame_px",
    ),
    "Where it runs": ("address", "local", "workers", "gpus", "gpus_per_worker", "cuda_graphs", "object_store_mb"),
    "Result": ("ledger", "max_error_rate", "price_per_gpu_hour"),
}  # fmt: skip


def spec_parameters() -> list[inspect.Parameter]:
    """Return one keyword parameter for each option of a run, as Typer reads them."""
    panels = {name: panel for panel, names in GROUPS.items() for name in names}
    return [
        _parameter(name, field, panels[name])
        for name, field in RunSpec.model_fields.items()
        if name not in ARGUMENT_FIELDS
    ]


def _parameter(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    wanted, is_flag = _option_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    declared = [f"{flag}/--no-{flag[2:]}"] if is_flag and field.default is None else [flag]
    help_text = field.description or ""
    if field.default not in (None, False):
        help_text += f" (default: {field.default})"
    extra: dict[str, Any] = {"envvar": ENVIRONMENT[name], "show_envvar": True} if name in ENVIRONMENT else {}
    option = typer.Option(*declared, help=help_text, rich_help_panel=panel, show_default=False, **extra)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[wanted | None, option]
    )


def _option_type(annotation: Any) -> tuple[Any, bool]:
    """Return the plain type of a field for Typer, and whether it is a flag."""
    members = [part for part in typing.get_args(annotation) if part is not type(None)]
    is_union = type(None) in typing.get_args(annotation)
    plain = members[0] if is_union else annotation
    if plain is SecretStr:
        return str, False
    # Typer shows choices of a Literal; the numbers' bounds are checked by the spec, which says them in one line.
    return plain, plain is bool


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function` with its `options` parameter spread into the options of a run."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
    names = {parameter.name for parameter in spec_parameters()}

    def wrapper(**arguments: Any) -> None:
        options = {name: value for name, value in arguments.items() if name in names and value is not None}
        rest = {name: value for name, value in arguments.items() if name not in names}
        function(**rest, options=options)

    wrapper.__name__ = function.__name__
    wrapper.__doc__ = function.__doc__
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature([*keyword_only, *spec_parameters()])  # type: ignore[attr-defined]
    return wrapper
