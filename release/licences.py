"""What the package depends on, extra by extra: licences, and a CycloneDX list of parts.

Versions and licences are those installed here, which ``constraints.txt`` pins. A licence that is
not allowed, or that nobody can read, stops a release.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from license_expression import ExpressionError, get_spdx_licensing
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.contents import ReleaseError

EXTRAS = ("", "onnx", "cli", "report", "save", "examples", "adapters", "cuda", "monitor", "sweep")
ALLOWED = frozenset({
    "Apache-2.0", "MIT", "MIT-0", "MIT-CMU", "HPND", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC",
    "Zlib", "BSL-1.0", "CC0-1.0", "CNRI-Python", "PSF-2.0", "Python-2.0", "Unlicense", "MPL-2.0",
})
# what packages say in words
SPDX = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "BSD License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause", "BSD": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0", "PSF": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "The Unlicense (Unlicense)": "Unlicense", "ISC License (ISCL)": "ISC",
}
Package = tuple[str, str]  # name and version


def closure(requirements: Iterable[Requirement]) -> dict[str, set[str]]:
    """Distribution → those that it needs itself, of all that are installed for these requirements,
    on this platform.

    Raises:
        ReleaseError: where one is not installed here.
    """
    seen: set[tuple[str, str]] = set()
    found: dict[str, set[str]] = {}
    todo = [(requirement.name, extra) for requirement in requirements
            for extra in ("", *requirement.extras)]
    while todo:
        name, extra = todo.pop()
        if (key := (canonicalize_name(name), extra)) in seen:
            continue
        seen.add(key)
        needs = found.setdefault(key[0], set())
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise ReleaseError(f"{name} is required, and not installed here") from None
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, each) for each in ("", *requirement.extras)]
                needs |= {canonicalize_name(requirement.name)} - {key[0]}
    return found


def direct(own: Iterable[Requirement], extra: str) -> list[Requirement]:
    """What the package requires with an extra, "" without, and with those that it names."""
    found, todo, seen = [], [extra], set[str]()
    requirements = list(own)
    while todo:
        seen.add(each := todo.pop())
        for requirement in requirements:
            marker = requirement.marker
            if not (marker is None if each == "" else
                    marker is not None and marker.evaluate({"extra": each})
                    and not marker.evaluate({"extra": ""})):
                continue
            if requirement.name == "scaleprop":
                todo += requirement.extras - seen
            else:
                found.append(requirement)
    return found


def needed(own: Iterable[Requirement]) -> dict[str, set[str]]:
    """Distribution → the extras that need it, "" for the package itself. own: its requirements."""
    requirements = list(own)
    found: dict[str, set[str]] = {}
    for extra in EXTRAS:
        for name in closure(direct(requirements, extra)):
            found.setdefault(name, set()).add(extra)
    return found


def said(names: Collection[str]) -> dict[Package, str]:
    """What installed distributions say of their licences, as ``pip-licenses`` finds it."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--with-system", "--packages",
               *sorted(names)]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {(row["Name"], row["Version"]): row["License"] for row in listed}
    if lacking := set(names) - {canonicalize_name(name) for name, _ in found}:
        raise ReleaseError(f"no licence was found of {sorted(lacking)}")
    return found


def expression(text: str) -> str:
    """An SPDX expression of what a package says. Several classifiers all apply.

    Raises:
        ReleaseError: for what it cannot read.
    """
    parts = [SPDX.get(part.strip(), part.strip()) for part in text.split(";")]
    try:
        return str(get_spdx_licensing().parse(" AND ".join(
            f"({part})" if len(parts) > 1 else part for part in parts), validate=True))
    except ExpressionError as error:
        raise ReleaseError(f"licence {text!r}: {error}") from None


def allowed(text: str, of: Collection[str] = ALLOWED) -> bool:
    """Whether an SPDX expression can be met: of ``OR`` one side, of ``AND`` both."""
    licensing = get_spdx_licensing()

    def met(part: object) -> bool:
        if isinstance(part, licensing.OR):
            return any(map(met, part.args))
        if isinstance(part, licensing.AND):
            return all(map(met, part.args))
        return str(part).split(" WITH ")[0] in of  # an exception only permits more

    return met(licensing.parse(text))


def refused(licences: Mapping[Package, str], of: Collection[str] = ALLOWED) -> list[str]:
    """One sentence for each package whose licence is not allowed, or cannot be read."""
    found = []
    for (name, version), text in licences.items():
        try:
            if not allowed(expression(text), of):
                found.append(f"{name} {version}: {text} is not allowed")
        except ReleaseError as error:
            found.append(f"{name} {version}: {error}")
    return found


def markdown(licences: Mapping[Package, str], extras: Mapping[str, Collection[str]]) -> str:
    """The list to read."""
    lines = ["# Licences of dependencies", "", "| package | version | licence | needed by |",
             "| --- | --- | --- | --- |"]
    for (name, version), text in sorted(licences.items(), key=lambda each: each[0][0].lower()):
        by = sorted(extras[canonicalize_name(name)])
        who = "the package" if "" in by else ", ".join(f"`{extra}`" for extra in by)
        lines.append(f"| {name} | {version} | {expression(text)} | {who} |")
    return "\n".join(lines) + "\n"


def bill(version: str, licences: Mapping[Package, str], own: Sequence[Requirement]) -> str:
    """CycloneDX 1.6, JSON: the package, its parts, who depends on whom. own: what the package
    itself requires."""
    factory, bom = LicenseFactory(), Bom()

    def component(name: str, number: str, text: str, kind: ComponentType) -> Component:
        url = PackageURL("pypi", name=canonicalize_name(name), version=number)
        return Component(name=name, version=number, type=kind, purl=url, bom_ref=url.to_string(),
                         licenses=[factory.make_from_string(text)])

    bom.metadata.component = component("scaleprop", version, "Apache-2.0", ComponentType.LIBRARY)
    parts = {canonicalize_name(name): component(name, number, expression(text),
                                                ComponentType.LIBRARY)
             for (name, number), text in licences.items()}
    bom.components.update(parts.values())
    needs = {canonicalize_name(requirement.name) for requirement in own}
    bom.register_dependency(bom.metadata.component, [parts[name] for name in sorted(needs)])
    for name, others in closure(own).items():
        bom.register_dependency(parts[name], [parts[other] for other in sorted(others)])
    return JsonV1Dot6(bom).output_as_string(indent=1)


def write(own: Iterable[Requirement], version: str, folder: Path) -> int:
    """``licences.md`` and ``sbom.cdx.json`` in ``folder``; returns how many packages they list.

    Raises:
        ReleaseError: where a licence is not allowed.
    """
    own = list(own)
    extras = needed(own)
    licences = said(extras)
    if sentences := refused(licences):
        raise ReleaseError("\n".join(sentences))
    (folder / "licences.md").write_text(markdown(licences, extras), encoding="utf-8")
    every = [each for extra in EXTRAS for each in direct(own, extra)]
    (folder / "sbom.cdx.json").write_text(bill(version, licences, every) + "\n", encoding="utf-8")
    return len(licences)
