"""What a distribution holds: every file of the package, valid metadata, nothing else."""

from __future__ import annotations

import email.parser
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

from packaging.metadata import InvalidMetadata, Metadata

ROOT = Path(__file__).resolve().parents[1]
MUST = ("scaleprop/py.typed", "scaleprop/report/assets/report.js")


class ReleaseError(Exception):
    """Why this is not released."""


def tracked(folder: str = ".", root: Path = ROOT) -> list[str]:
    """Files that git knows of."""
    found = subprocess.run(["git", "ls-files", "-z", folder], cwd=root, capture_output=True,
                           text=True, check=True).stdout
    return [name for name in found.split("\0") if name]


def version(root: Path = ROOT) -> str:
    """The version, from its one place.

    Raises:
        ReleaseError: where ``pyproject.toml`` states another one itself, or the changelog has no
            section of it.
    """
    source = (root / "scaleprop" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    if "version" in project["project"] or project["tool"]["setuptools"]["dynamic"]["version"] != {
            "attr": "scaleprop.__version__"}:
        raise ReleaseError("pyproject.toml: the version is to be read from scaleprop.__version__")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[?{re.escape(found)}\]?(\s|$)", changelog, re.MULTILINE):
        raise ReleaseError(f"CHANGELOG.md has no section {found}")
    return found


def names(distribution: Path) -> tuple[set[str], bytes]:
    """Files, and the metadata.

    Raises:
        ReleaseError: on links, and on paths that leave the archive.
    """
    if distribution.suffix == ".whl":
        with zipfile.ZipFile(distribution) as wheel:
            inside = set(wheel.namelist())
            (metadata,) = (name for name in inside if name.endswith(".dist-info/METADATA"))
            return inside, wheel.read(metadata)
    with tarfile.open(distribution) as sdist:
        members = sdist.getmembers()
        if links := [each.name for each in members if not each.isfile() and not each.isdir()]:
            raise ReleaseError(f"{distribution.name} has links: {links}")
        files = [each for each in members if each.isfile()]
        tops = {PurePosixPath(each.name).parts[0] for each in files}
        if len(tops) != 1:
            raise ReleaseError(f"{distribution.name} unpacks into {sorted(tops)}, not one folder")
        (top,) = tops
        inside = {each.name.removeprefix(f"{top}/") for each in files}
        metadata = sdist.extractfile(f"{top}/PKG-INFO")
        assert metadata
        return inside, metadata.read()


def check(distribution: Path, root: Path = ROOT) -> Metadata:
    """The metadata of a wheel or an sdist that holds what it should.

    Raises:
        ReleaseError: otherwise.
    """
    inside, raw = names(distribution)
    wanted = {*tracked("scaleprop", root), *MUST}
    if lacking := sorted(wanted - inside):
        raise ReleaseError(f"{distribution.name} lacks {lacking[:5]}, {len(lacking)} in all")
    tops = {PurePosixPath(name).parts[0] for name in inside}
    allowed = {"scaleprop"} | (
        {top for top in tops if top.endswith(".dist-info")} if distribution.suffix == ".whl" else
        {"scaleprop.egg-info", "PKG-INFO", "setup.cfg", "pyproject.toml", "README.md", "LICENSE",
         "tests"})  # setuptools adds tests/test*.py to an sdist
    if strange := sorted(tops - allowed) + sorted(name for name in inside if "__pycache__" in name):
        raise ReleaseError(f"{distribution.name} holds {strange} besides the package")
    try:
        metadata = Metadata.from_email(raw, validate=True)
    except (InvalidMetadata, ExceptionGroup) as error:
        raise ReleaseError(f"{distribution.name}: metadata: {error!r}") from error
    if str(metadata.version) != version(root) or str(metadata.license_expression) != "Apache-2.0":
        raise ReleaseError(f"{distribution.name}: version {metadata.version}, "
                           f"licence {metadata.license_expression}")
    message = email.parser.BytesParser().parsebytes(raw)
    if message.get("Description-Content-Type", "").split(";")[0] != "text/markdown":
        raise ReleaseError(f"{distribution.name}: the description is not Markdown")
    return metadata
