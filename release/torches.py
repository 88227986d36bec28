"""Which builds of torch a release is tested with: of the latest three minors, those for CPUs."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterable

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from release.contents import ReleaseError

MINORS = 3
NO_BUILD = "no CPU build on this index"


def listed() -> list[Version]:
    """Versions that pip finds for this interpreter; no file is downloaded.

    Raises:
        ReleaseError: where pip fails.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", "torch",
               "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(command)}: {done.stderr.strip()}")
    return parsed(done.stdout)


def parsed(text: str) -> list[Version]:
    """The versions that ``pip index versions`` prints."""
    (line,) = re.findall(r"^Available versions: (.*)$", text, re.MULTILINE)
    return [Version(each) for each in line.split(", ")]


def is_for_cpu(version: Version, system: str) -> bool:
    """On Linux, builds without a local part ``cpu`` bring CUDA along; elsewhere none does."""
    return version.local == "cpu" or system != "Linux"


def choice(versions: Iterable[Version], supported: SpecifierSet,
           system: str | None = None) -> dict[str, Version | str]:
    """Minor, latest first → what to test it with, or why it is not tested. supported: what the
    package requires."""
    system = system or platform.system()
    by_minor: dict[tuple[int, int], list[Version]] = {}
    for version in versions:
        if not version.is_prerelease:
            by_minor.setdefault((version.major, version.minor), []).append(version)
    found: dict[str, Version | str] = {}
    for minor in sorted(by_minor, reverse=True)[:MINORS]:
        name = "{}.{}".format(*minor)
        fitting = [version for version in by_minor[minor] if version in supported]
        builds = [version for version in fitting if is_for_cpu(version, system)]
        found[name] = max(builds) if builds else NO_BUILD if fitting else (
            f"the package requires torch{supported}")
    return found
