"""The parts of ``make release-check``, each on what it must refuse; doctests of the package."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from release import check, contents, licences, torches
from release.contents import ReleaseError

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = [path for path in sorted((ROOT / "scaleprop").rglob("*.py"))
                 if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_doctests(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


METADATA = """Metadata-Version: 2.4
Name: scaleprop
Version: 1.2.3
License-Expression: Apache-2.0
Description-Content-Type: text/markdown
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of two files."""
    root = tmp_path / "project"
    for name, text in {
        "scaleprop/__init__.py": '__version__ = "1.2.3"\n', "scaleprop/py.typed": "",
        "scaleprop/report/assets/report.js": "", "CHANGELOG.md": "## [1.2.3]\n",
        "pyproject.toml": '[project]\ndynamic = ["version"]\n[tool.setuptools.dynamic]\n'
                          'version = { attr = "scaleprop.__version__" }\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def wheel(project: Path, metadata: str = METADATA, without: str = "", more: str = "") -> Path:
    path = project.parent / "scaleprop-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in contents.tracked("scaleprop", project):
            if name != without:
                file.writestr(name, "")
        if more:
            file.writestr(more, "")
        file.writestr("scaleprop-1.2.3.dist-info/METADATA", metadata)
    return path


def sdist(project: Path, link: bool = False) -> Path:
    path = project.parent / "scaleprop-1.2.3.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in ("PKG-INFO", *contents.tracked("scaleprop", project)):
            data = METADATA.encode() if name == "PKG-INFO" else b""
            entry = tarfile.TarInfo(f"scaleprop-1.2.3/{name}")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
        if link:
            entry = tarfile.TarInfo("scaleprop-1.2.3/passes")
            entry.type, entry.linkname = tarfile.SYMTYPE, "scaleprop/passes"
            file.addfile(entry)
    return path


def test_good_distributions_pass(project: Path) -> None:
    assert str(contents.check(wheel(project), project).version) == "1.2.3"
    assert str(contents.check(sdist(project), project).version) == "1.2.3"


@pytest.mark.parametrize(("change", "said"), [
    ({"without": "scaleprop/py.typed"}, r"lacks \['scaleprop/py.typed'\]"),
    ({"more": "tests/test_x.py"}, r"holds \['tests'\]"),
    ({"more": "scaleprop/__pycache__/x.pyc"}, "__pycache__"),
    ({"metadata": METADATA.replace("1.2.3", "1.2.4")}, "version 1.2.4"),
    ({"metadata": METADATA.replace("Apache-2.0", "MIT")}, "licence MIT"),
    ({"metadata": METADATA.replace("1.2.3", "one")}, "metadata"),
    ({"metadata": METADATA.replace("markdown", "plain")}, "not Markdown"),
])
def test_bad_wheels_are_refused(project: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(ReleaseError, match=said):
        contents.check(wheel(project, **change), project)


def test_links_are_refused(project: Path) -> None:
    with pytest.raises(ReleaseError, match="links"):
        contents.check(sdist(project, link=True), project)


def test_a_version_needs_a_section_and_one_place(project: Path) -> None:
    (project / "CHANGELOG.md").write_text("## [Unreleased]\n")
    with pytest.raises(ReleaseError, match=r"no section 1\.2\.3"):
        contents.version(project)
    (project / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    with pytest.raises(ReleaseError, match="is to be read from"):
        contents.version(project)


@pytest.mark.parametrize(("text", "good"), [
    ("MIT", True), ("MIT License", True), ("GPL-3.0-only", False), ("UNKNOWN", False),
    ("Apache-2.0 OR GPL-3.0-only", True), ("Apache-2.0 AND GPL-3.0-only", False),
    ("Apache-2.0 WITH LLVM-exception AND MIT", True), ("MIT License; BSD License", True),
    ("MIT License; GPL-2.0-only", False), ("(MIT OR GPL-2.0-only) AND BSD-3-Clause", True),
])
def test_licences_that_are_not_allowed_stop_a_release(text: str, good: bool) -> None:
    assert bool(licences.refused({("thing", "1"): text})) is not good


def test_dependencies_by_extra_and_the_list_of_parts(tmp_path: Path) -> None:
    own = [Requirement(text) for text in (
        "packaging", "rich; extra == 'cli'", "click; extra == 'cli'", "scaleprop[cli]; "
        "extra == 'sweep'", "ruff; extra == 'dev'")]
    extras = licences.needed(own)
    assert extras["packaging"] == {""} and extras["click"] == {"cli", "sweep"}
    assert extras["pygments"] == {"cli", "sweep"}  # which rich needs
    assert "ruff" not in extras
    count = licences.write(own, "1.2.3", tmp_path)
    parts = json.loads((tmp_path / "sbom.cdx.json").read_text())
    assert (parts["bomFormat"], parts["specVersion"]) == ("CycloneDX", "1.6")
    assert len(parts["components"]) == count == len(extras)
    (rich,) = (each["dependsOn"] for each in parts["dependencies"]
               if each["ref"].startswith("pkg:pypi/rich@"))
    assert any(ref.startswith("pkg:pypi/pygments@") for ref in rich)
    assert "| click |" in (tmp_path / "licences.md").read_text()
    (root,) = (each["dependsOn"] for each in parts["dependencies"]
               if each["ref"].startswith("pkg:pypi/scaleprop@"))
    assert [ref.split("/")[1].split("@")[0] for ref in sorted(root)] == [
        "click", "packaging", "rich"]  # not what these need


def test_parts_depend_on_what_is_installed_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = {"a": ["b[x]", "c; extra == 'test'", "c; sys_platform == 'none'"],
                "b": ["c; extra == 'x'", "d; extra == 'y'", "b[x]; extra == 'y'"], "c": [], "d": []}
    monkeypatch.setattr(licences.importlib.metadata, "requires", requires.__getitem__)
    assert licences.closure([Requirement("a")]) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_what_is_not_installed_is_said() -> None:
    with pytest.raises(ReleaseError, match="no-such-thing is required"):
        licences.closure([Requirement("no-such-thing")])


def test_torches_of_the_latest_minors() -> None:
    found = torches.parsed("torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1+cpu, 2.14.1, "
                           "2.14.0+cpu, 2.13.0+cpu, 2.12.0+cpu, 2.16.0rc1\n  INSTALLED: 2.13.0\n")
    supported = SpecifierSet(">=2.14")
    assert torches.choice(found, supported, "Linux") == {
        "2.15": torches.NO_BUILD, "2.14": Version("2.14.1+cpu"),
        "2.13": "the package requires torch>=2.14"}
    assert torches.choice(found, supported, "Darwin")["2.15"] == Version("2.15.0")


def test_constraints_name_the_torch_that_is_tested() -> None:
    text = check.constraints(Version("2.14.1+cpu"))
    assert "\ntorch==2.14.1+cpu\n" in text and text.count("\ntorch==") == 1


def test_only_what_it_wrote_itself_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = tmp_path / "dist"
    dist.mkdir()
    for name in ("mine.txt", "scaleprop-0.1-py3-none-any.whl"):
        (dist / name).write_text("")
    monkeypatch.setattr(contents, "tracked", list[str])
    monkeypatch.setattr(check, "run", lambda *_: [
        (dist / f"scaleprop-1{end}").write_text("") for end in (".tar.gz", "-py3-none-any.whl")])
    found = check.build(tmp_path, dist)
    assert [path.name for path in found] == ["scaleprop-1.tar.gz", "scaleprop-1-py3-none-any.whl"]
    assert {path.name for path in dist.iterdir()} == {"mine.txt", *(path.name for path in found)}


def test_a_torch_may_be_named_without_its_build(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torch"
    said = f"{folder / 'environment' / 'scaleprop.py'} 2.13.0+cpu"
    monkeypatch.setattr(check, "run", lambda command, _: said if check.WHERE in command else "ok")
    assert check.try_out(wheel(project), Version("2.13"), folder) == "ok"
    with pytest.raises(ReleaseError, match="not the wheel"):
        check.try_out(wheel(project), Version("2.14"), tmp_path / "other")
    with pytest.raises(SystemExit):
        check.main(["--torch", "newest"])


def test_an_sdist_is_one_folder(project: Path) -> None:
    path = sdist(project)
    with tarfile.open(path, "w:gz") as file:
        for name in ("scaleprop-1.2.3/PKG-INFO", "/etc/passwd"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(ReleaseError, match="not one folder"):
        contents.names(path)


def test_a_failing_command_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="exit status 3\nwhy"):
        check.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path)
