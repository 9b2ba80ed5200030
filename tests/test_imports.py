"""The four generic package names mean this working tree, and CPU workers stay light."""

import importlib.machinery
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("schemas", "operators", "pipeline", "jobs")
CPU_MODULES = (
    "operators.decode.documents",
    "operators.decode.clips",
    "operators.endpoint.pictures",
    "operators.endpoint.ask",
    "operators.prepare",
    "operators.probe",
    "operators.read",
    "operators.parse.completions",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_comes_from_the_repository_root(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_else_on_the_path_has_our_names(package: str) -> None:
    # An editable install lists no packages in its metadata, so places are compared and not owners.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    spec = importlib.machinery.PathFinder.find_spec(package, elsewhere)
    assert spec is None, f"{package} is also found at {spec.origin or list(spec.submodule_search_locations or [])}"


def test_no_other_distribution_ships_our_names() -> None:
    claims = {
        f"{distribution.name}: {file}"
        for distribution in importlib.metadata.distributions()
        if distribution.name != "pagereel"
        for file in distribution.files or ()
        if file.parts[0].removesuffix(".py") in PACKAGES
    }
    assert claims == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_tests_are_not_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("module", CPU_MODULES)
def test_a_cpu_worker_imports_no_model_library_and_no_ray(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'ray'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
