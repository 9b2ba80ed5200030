"""Job files: one YAML file describes a run completely."""

import os
from pathlib import Path
from typing import Any

import yaml

from jobs.options import ENVIRONMENT
from pipeline.spec import RunSpec, make_spec
from schemas.errors import ConfigError


def load_spec(path: str, overrides: dict[str, Any] | None = None) -> RunSpec:
    """Return the spec in a YAML file.

    Relative inputs and outputs are relative to the folder the command is run in, as on the command line.

    Args:
        path: the file.
        overrides: options that win over the file.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or does not describe a run.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"job file {path!r} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"job file {path!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"job file {path!r} is no mapping of options")
    if isinstance(options.get("inputs"), str):
        options["inputs"] = [options["inputs"]]
    if "password" in options:
        raise ConfigError("a job file holds no password: set PAGEREEL_PASSWORD or use a manifest's password column")
    for name, variable in ENVIRONMENT.items():
        if os.environ.get(variable) and not options.get(name):
            options[name] = os.environ[variable]
    return make_spec(options | (overrides or {}))
