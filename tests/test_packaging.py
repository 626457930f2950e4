"""What a user installs: the wheel, the symlinked passes, light imports, and dependencies that are declared and pinned."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fxprune
import fxprune.passes
from fxprune._version import __version__
from fxprune.explorer.page import SCRIPTS

ROOT = Path(__file__).resolve().parents[1]
IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "pyyaml": "yaml"}
"""Distributions that are imported under another name."""


def run(*command: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def python(code: str, cwd: Path, path: Path = ROOT) -> str:
    done = run(sys.executable, "-c", code, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(target: str, source: Path, into: Path) -> Path:
    done = run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(into), cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = into.iterdir()
    return built


def files_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    """Every module of the library, as a path within the package."""
    inside = [p.relative_to(ROOT) for p in (ROOT / "fxprune").rglob("*.py")]
    passes = [Path("fxprune") / p.relative_to(ROOT) for p in (ROOT / "passes").rglob("*.py")]
    return sorted({*inside, *passes})


def test_passes_is_one_folder_under_two_names() -> None:
    assert (ROOT / "fxprune" / "passes").is_symlink()
    assert os.readlink(ROOT / "fxprune" / "passes") == str(Path("..") / "passes")
    assert Path(fxprune.passes.__path__[0]).resolve() == ROOT / "passes"


def test_a_stray_import_of_passes_fails_loudly() -> None:
    done = run(sys.executable, "-c", "import passes", cwd=ROOT, path=ROOT)
    assert done.returncode != 0
    assert "ImportError: attempted relative import beyond top-level package" in done.stderr


def test_passes_use_relative_imports_only() -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "passes").rglob("*.py")
        for node, name in imports(path)
        if name in ("fxprune", "passes")
    ]
    assert absolute == []


@pytest.mark.parametrize("module", ["torch", "transformers", "networkx", "rich"])
def test_importing_fxprune_is_light(module: str, tmp_path: Path) -> None:
    assert python(f"import sys, fxprune; print({module!r} in sys.modules)", cwd=tmp_path) == "False"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(files_in(wheel))
    expected = {path.as_posix() for path in sources()}
    assert {n for n in names if n.endswith(".py")} == expected
    assert "fxprune/passes/__init__.py" in names
    assert "fxprune/py.typed" in names
    assert {f"fxprune/explorer/page/{name}" for name in ("page.html", "page.css", *SCRIPTS)} <= names
    assert {n.split("/")[0] for n in names} == {"fxprune", f"fxprune-{__version__}.dist-info"}
    assert not [n for n in names if "test" in n or "__pycache__" in n]


def test_the_installed_wheel_imports_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    code = "import fxprune, fxprune.passes; print(fxprune.__file__); print(fxprune.passes.__file__)"
    printed = python(code, cwd=elsewhere, path=target).splitlines()
    assert printed == [str(target / "fxprune" / "__init__.py"), str(target / "fxprune" / "passes" / "__init__.py")]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive), "a symlink would break on systems without them"
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / f"fxprune-{__version__}", tmp_path / "again")
    assert files_in(again) == files_in(wheel)


def test_the_metadata(wheel: Path, pyproject: dict[str, Any]) -> None:
    info = f"fxprune-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        points = configparser.ConfigParser()
        points.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert {group: dict(points[group]) for group in points.sections()} == {
        "console_scripts": {"fxprune": "fxprune.cli:main"},
        "torch_dynamo_backends": {"fxprune": "fxprune.backend:compile_pruned"},
    }
    assert (metadata["Name"], metadata["Version"]) == ("fxprune", __version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    if (ROOT / "README.md").exists():
        assert pyproject["project"].get("readme") == "README.md", "pyproject.toml: turn on the line `readme`"


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[(Unreleased|{re.escape(__version__)})\]", text, re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_that_git_ignores_is_tracked() -> None:
    done = run("git", "ls-files", "--cached", "--ignored", "--exclude-standard", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:5] == [], "tracked, though .gitignore lists them"


def requirements(pyproject: dict[str, Any], *, development: bool) -> set[str]:
    project = pyproject["project"]
    lines = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    if development:
        lines += [*pyproject["dependency-groups"]["dev"], *pyproject["build-system"]["requires"]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """The top-level packages that a file imports absolutely, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node, node.module.split(".")[0]


def test_what_is_imported_is_declared(pyproject: dict[str, Any]) -> None:
    declared = {IMPORT_NAMES.get(name, name) for name in requirements(pyproject, development=False)}
    known = declared | set(sys.stdlib_module_names) | {"fxprune"}
    undeclared = [f"{path}: {name}" for path in sources() for _, name in imports(ROOT / path) if name not in known]
    assert undeclared == []


def test_every_named_dependency_is_pinned_for_ci(pyproject: dict[str, Any]) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^ ]*", line) for line in lines)
    assert requirements(pyproject, development=True) - pinned == set()
    assert "torch==2.13.0" in lines
