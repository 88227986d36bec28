"""The project's own promises: small files, a clean wheel, pinned dependencies, honest documents."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import scaleprop
from release import contents
from scaleprop.extras import EXTRAS

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("scaleprop", "tests", "examples", "benchmarks", "release")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines: split it by subject"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source") / "repository"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "demo", "*.egg-info",
                                    "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(target), str(source)],
        check=True, capture_output=True, text=True,
    )
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_only_the_package(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"scaleprop"}


def test_the_wheel_holds_every_source_and_asset(wheel: list[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "scaleprop").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert not wanted - set(wheel)
    assert {"scaleprop/py.typed", "scaleprop/report/assets/report.js"} <= wanted


def test_links_point_into_the_package() -> None:
    for name in ("passes", "backends"):
        link = ROOT / name
        assert link.is_symlink()
        assert link.readlink() == Path("scaleprop") / name


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    command = script.strip().splitlines()[-1].removeprefix("exec ")
    assert command == "make test"
    assert re.search(rf"^{command}\b", readme, re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = itertools.chain(project["dependencies"], *extras)
    required = {re.split(r"[\[>=<]", item)[0].lower() for item in named}
    pins = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").open())
    pinned = {line.split("==")[0].lower() for line in pins if line}
    assert required - pinned == {"scaleprop"}


def test_the_named_extra_has_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        required = {re.split(r"[\[>=<]", item)[0].replace("-", "_")
                    for item in project["optional-dependencies"][extra]}
        assert package in required, f"{package} is not in the extra {extra!r}"


def test_what_the_readme_installs_can_save() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert 'pip install -e ".[onnx,cli,report]"' in (ROOT / "README.md").read_text()
    assert project["optional-dependencies"]["save"][0].startswith("safetensors")
    for extra in ("onnx", "cli"):
        assert "scaleprop[save]" in project["optional-dependencies"][extra]


def test_the_changelog_has_this_version() -> None:
    assert contents.version() == scaleprop.__version__  # raises where there is no section


def test_documents_link_to_files_that_exist() -> None:
    for document in ROOT.glob("*.md"):  # those of docs/ are checked by its strict build
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
