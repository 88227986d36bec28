"""Is this fit for release? ``make release-check`` builds it and tries it where nothing else is.

    python -m release.check [--torch 2.13.0+cpu]

Builds sdist and wheel from the files that git knows of; checks contents, metadata, changelog and
licences; installs the wheel in an empty environment outside the checkout, once for each of the
latest three minors of torch that have a build for CPUs, and runs doctests and the quickstart there.
Leaves the distributions, ``licences.md`` and ``sbom.cdx.json`` in ``dist``. Exit status 1, and the
reason, where anything is amiss.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from release import contents, licences, torches
from release.contents import ROOT, ReleaseError

EXTRAS = "onnx,cli,report"  # what the README installs, and the quickstart needs
WRITTEN = ("scaleprop-*.tar.gz", "scaleprop-*.whl", "licences.md", "sbom.cdx.json")
PREFIX = "import sys; sys.path[:] = [each for each in sys.path if each]; "  # not this folder
WHERE = PREFIX + "import scaleprop, torch; print(scaleprop.__file__, torch.__version__)"


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Says what is done and how long it took; what is appended comes with it."""
    print(f"{name} …", flush=True)
    started, said = time.monotonic(), list[str]()
    yield said
    print("  " + ", ".join([f"{time.monotonic() - started:.0f} s", *said]), flush=True)


def run(command: Sequence[str | Path], folder: Path) -> str:
    """What a command prints, run with no trace of this checkout in its environment.

    Raises:
        ReleaseError: with the end of its output, where it fails.
    """
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=clean, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-30:])
        raise ReleaseError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{end}")
    return done.stdout


def build(folder: Path, dist: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it; from a copy of the files of git alone."""
    source = folder / "source"
    for name in contents.tracked():
        if (ROOT / name).is_symlink() or not (ROOT / name).exists():
            continue  # a link is for reading here; a file that was deleted
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    for pattern in WRITTEN:  # nothing else: the folder may be anyone's
        for old in dist.glob(pattern):
            old.unlink()
    run([sys.executable, "-m", "build", "--outdir", dist, source], folder)
    (sdist,), (wheel,) = (dist.glob(pattern) for pattern in WRITTEN[:2])
    return sdist, wheel


def constraints(torch: Version) -> str:
    """Those of the repository, with another torch."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.sub(r"^torch==.*$", f"torch=={torch}", text, flags=re.MULTILINE)


def try_out(wheel: Path, torch: Version, folder: Path) -> str:
    """Install the wheel in an empty environment; doctests and quickstart run from there."""
    folder.mkdir()
    python = folder / "environment" / "bin" / "python"
    run([sys.executable, "-m", "venv", folder / "environment"], folder)
    (folder / "constraints.txt").write_text(constraints(torch), encoding="utf-8")
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint",
         "constraints.txt", f"scaleprop[{EXTRAS}] @ {wheel.resolve().as_uri()}", "pytest"], folder)
    place, number = run([python, "-c", WHERE], folder).split()
    if not Path(place).is_relative_to(folder / "environment") \
            or number not in SpecifierSet(f"=={torch}", prereleases=True):
        raise ReleaseError(f"tested would be {place} with torch {number}, not the wheel")
    tested = run([python, "-m", "pytest", "-q", "--doctest-modules", "--pyargs",
                  "--doctest-ignore-import-errors", "-p", "no:cacheprovider", "scaleprop"], folder)
    shutil.copy2(ROOT / "examples" / "quickstart.py", folder)
    run([python, "quickstart.py", "--short", "--out", "quickstart"], folder)
    return tested.strip().splitlines()[-1].strip("= ")


def chosen(given: Version | None, own: Sequence[Requirement]) -> dict[str, Version | str]:
    """What to test with, by minor."""
    if given:
        return {str(given): given}
    (supported,) = (each.specifier for each in own if each.name == "torch")
    return torches.choice(torches.listed(), supported)


def check(dist: Path, given: Version | None) -> None:
    """All of it, in order.

    Raises:
        ReleaseError: where something is amiss.
    """
    number = contents.version()
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        folder = Path(name)
        with step(f"build scaleprop {number}") as said:
            distributions = build(folder, dist)
            said += [f"{each.name} {each.stat().st_size / 1e3:.0f} kB" for each in distributions]
        with step("contents and metadata"):
            metadata = [contents.check(each) for each in distributions][1]
        own = list(metadata.requires_dist or [])
        with step("licences of dependencies") as said:
            said.append(f"{licences.write(own, number, dist)} packages, all allowed")
        tested = 0
        for minor, torch in chosen(given, own).items():
            if isinstance(torch, str):
                print(f"torch {minor}: {torch}")
                continue
            with step(f"wheel with torch {torch}, in an empty environment") as said:
                said += [f"doctests: {try_out(distributions[1], torch, folder / minor)}",
                         "quickstart runs"]
            tested += 1
        if not tested:
            raise ReleaseError("no torch to test with: name one with --torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where it is fit for release."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Version, help="one version, instead of the latest minors")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args(arguments)
    try:
        check(options.dist, options.torch)
    except ReleaseError as error:
        print(f"not fit for release: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"not fit for release: {error}\n{error.stderr or ''}", file=sys.stderr)
        return 1
    print(f"fit for release: {options.dist}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
