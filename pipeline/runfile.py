"""`run.json`: what the run was asked for, on what, and how it ended."""

import json
from typing import Any

from pipeline.config import Settings, probe_config, probe_digest
from pipeline.reading import Reading
from pipeline.spec import HOW_ONLY, RunSpec
from pipeline.storage import Storage
from pipeline.versions import versions
from schemas.errors import ConfigError
from schemas.vocabulary import SCHEMA_VERSION

RUN_FILE = "run.json"


def read_run_file(storage: Storage) -> dict[str, Any] | None:
    """Return the run file, None where there is none.

    Raises:
        ConfigError: it cannot be parsed, or is of another tool.
    """
    try:
        found = json.loads(storage.get(RUN_FILE))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{storage.uri}/{RUN_FILE} cannot be parsed; use another output folder") from error
    if not isinstance(found, dict) or not {"run_id", "spec", "settings_digest"} <= found.keys():
        raise ConfigError(f"{storage.uri}/{RUN_FILE} is none of pagereel's; use another output folder")
    return found


def check_same_settings(storage: Storage, spec: RunSpec, settings: Settings) -> dict[str, Any] | None:
    """Refuse to mix two kinds of rows in one run folder; return the run file that is there, None for a new folder.

    Raises:
        ConfigError: the folder was made with settings under which other rows come out.
    """
    found = read_run_file(storage)
    if found is None or found["settings_digest"] == settings.digest:
        return found
    before, now = found["spec"], spec.stored()
    changed = sorted(name for name in now if name not in HOW_ONLY and before.get(name) != now[name])
    what = ", ".join(f"{name} {before.get(name)!r} now {now[name]!r}" for name in changed[:4])
    if not changed:
        what = "the model's weights, a decoder or the rules of pagereel changed"
    raise ConfigError(f"{storage.uri!r} holds a run with other settings ({what}): choose another output folder")


def write_run_file(
    storage: Storage,
    spec: RunSpec,
    reading: Reading,
    settings: Settings,
    run_id: str,
    summary: dict[str, Any] | None = None,
) -> None:
    """Write the run file; the summary is null until a call has ended.

    Args:
        storage: where the run lives.
        spec: what was asked for; its password is left out.
        reading: who reads.
        settings: everything that determines the rows.
        run_id: the latest call.
        summary: how it ended.
    """
    value = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "spec": spec.stored(),
        "settings": json.loads(settings.text),
        "settings_digest": settings.digest,
        "probe_digest": probe_digest(probe_config(spec, settings)),
        "engine": reading.engine,
        "model_id": reading.model_id,
        "model_revision": reading.model_revision,
        "weights_kind": reading.weights_kind,
        "versions": versions(),
        "summary": summary,
    }
    storage.put(RUN_FILE, json.dumps(value, indent=1, ensure_ascii=False, default=str).encode())
