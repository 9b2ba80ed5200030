"""Versions of what a run runs on, without importing any of it."""

import importlib.metadata

PACKAGES = ("pagereel", "ray", "torch", "transformers", "pyarrow", "pymupdf", "decord", "av", "rapidocr-onnxruntime")


def versions() -> dict[str, str | None]:
    """Return the installed version of each package, None for one that is absent."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
